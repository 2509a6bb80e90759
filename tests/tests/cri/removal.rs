//! Nothing of a pod is left once it is removed, whatever it was at.

use std::{thread, time::Instant};

use husk_tests::{
    census::Census,
    command::{self, PATIENCE, eventually},
    cri::{self, Handler, Pod, pod_config},
    ctr::fresh_id,
};

pub fn a_pod_is_removed_in_every_state(handler: Handler) {
    let before = Census::take();
    let all = cri::pods();

    // Running, with containers of all states; as `crictl rmp -f` does, too.
    let pod = Pod::run(handler);
    let running = pod.idle();
    let ended = pod.start(pod.container(&["true"]));
    ended.exit_code();
    let created = pod.create(pod.container(&["true"])).expect("create");
    pod.remove().expect("remove what runs");
    for container in [running, ended, created] {
        // What is not there is removed.
        container.remove().expect("remove again");
    }
    before.assert_restored();

    // With a container that was never started.
    let pod = Pod::run(handler);
    let created = pod.create(pod.container(&["true"])).expect("create");
    created.remove().expect("remove what is created");
    pod.create(pod.container(&["true"])).expect("create");
    pod.stop().expect("stop");
    pod.stop().expect("stop again");
    pod.remove().expect("remove what is stopped");
    pod.remove().expect("remove again");
    before.assert_restored();

    // Without any.
    Pod::run(handler).end();
    before.assert_restored();

    assert_eq!(cri::pods(), all);
}

/// A RunPodSandbox whose shim or VMM is killed on the way, or which cannot succeed.
pub fn a_pod_that_was_being_made_leaves_nothing(handler: Handler) {
    let before = Census::take();
    let mut wrong = pod_config(&fresh_id("pod"));
    let sysctls = &mut wrong.linux.mut_or_insert_default().sysctls;
    sysctls.insert("kernel.no_such_thing".into(), "1".into());
    let error = Pod::of(handler, wrong)
        .map(|pod| pod.id.clone())
        .expect_err("a wrong sysctl");
    assert!(
        format!("{error:#}").contains("kernel.no_such_thing"),
        "{error:#}"
    );
    forget_pods();
    before.assert_restored();

    for comm in ["husk-shim", "husk-vmm"] {
        let config = pod_config(&fresh_id("pod"));
        let asked = thread::spawn({
            let config = config.clone();
            move || Pod::of(handler, config)
        });
        let found = eventually(Instant::now() + PATIENCE, || {
            command::processes_named(comm).into_iter().next()
        });
        let pid = found.unwrap_or_else(|| panic!("no {comm} comes"));
        command::kill(pid);
        match asked.join().expect("no panic") {
            // It was faster than we.
            Ok(pod) => pod.remove().expect("remove"),
            Err(error) => println!("{comm} killed: {error:#}"),
        }
        forget_pods();
        before.assert_restored();
    }
}

/// Those that containerd still knows of, as a kubelet removes what it does not want.
#[track_caller]
fn forget_pods() {
    for (id, _) in cri::pods() {
        cri::remove_pod(&id).unwrap_or_else(|error| panic!("{error:#}"));
    }
}
