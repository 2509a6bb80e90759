//! Pods as a kubelet asks for them, through CRI: every test once with pods that begin with a pause container, and once
//! with those of the sandbox API.

mod exec;
mod life;
mod many;
mod namespaces;
mod place;
mod refusals;
mod removal;
mod resources;
mod restarts;
mod streaming;

/// Bodies of tests, by their modules, as tests of their own for each sandboxer.
macro_rules! for_both_sandboxers {
    ($($module:ident: $($(#[$attribute:meta])* $name:ident)*;)*) => {
        mod podsandbox {
            use husk_tests::cri::Handler;
            $($(
                #[test]
                $(#[$attribute])*
                fn $name() {
                    crate::$module::$name(Handler::Husk);
                }
            )*)*
        }

        /// Pods by the sandbox API, which containerd 1.7 does not have: the lab runs these under 2.1 always.
        mod shim {
            use husk_tests::cri::Handler;
            $($(
                #[test]
                $(#[$attribute])*
                fn $name() {
                    crate::$module::$name(Handler::HuskShim);
                }
            )*)*
        }
    };
}

for_both_sandboxers! {
    life:
        containers_join_and_leave
        files_are_as_kubernetes_makes_them;
    namespaces:
        network_and_ipc_are_the_pods
        processes_are_the_containers
        processes_are_the_pods_where_asked_for;
    exec:
        exec_tells_streams_and_codes_and_keeps_its_limit
        logs_say_which_stream_and_where_a_line_ends
        a_stop_asks_first_and_kills_then
        what_outgrows_its_memory_is_told;
    resources:
        stats_are_the_containers
        an_update_changes_the_guests_cgroup;
    removal:
        a_pod_is_removed_in_every_state
        a_pod_that_was_being_made_leaves_nothing;
    place:
        a_pod_is_as_large_as_its_limits
        shim_and_vmm_are_in_the_pods_cgroup;
    restarts:
        pods_go_on_while_containerd_is_away
        a_pod_without_shim_or_vmm_is_told_and_removed;
    streaming:
        exec_is_streamed
        exec_has_a_terminal
        attach_is_streamed
        attach_has_a_terminal
        ports_are_forwarded;
    refusals:
        what_is_the_hosts_is_refused_by_name
        a_privileged_container_has_no_devices_of_the_host;
    many:
        #[ignore = "long: make test-long"]
        twenty_pods_at_once;
}
