//! What a VM cannot give is refused by the field's name, and leaves nothing.

use std::fs;

use husk_proto::cri as api;
use husk_tests::{
    census::Census,
    cri::{Handler, Pod, pod_config},
    ctr::fresh_id,
};

use crate::life::mount;

type Wish<T> = fn(&mut T);

pub fn what_is_the_hosts_is_refused_by_name(handler: Handler) {
    let before = Census::take();
    let of_pods: [(&str, Wish<api::NamespaceOption>); 3] = [
        ("network", |options| {
            options.network = api::NamespaceMode::NODE.into()
        }),
        ("pid", |options| {
            options.pid = api::NamespaceMode::NODE.into()
        }),
        ("ipc", |options| {
            options.ipc = api::NamespaceMode::NODE.into()
        }),
    ];
    for (word, wish) in of_pods {
        if (handler, word) == (Handler::HuskShim, "network") {
            // containerd 2.1.9 itself dies of it (containerd/containerd#12983) before it has asked any shim. What ours says is
            // `what_a_microvm_cannot_share_is_refused_by_name` in shim/src/pod_config.rs.
            continue;
        }
        let mut config = pod_config(&fresh_id("pod"));
        let context = config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default();
        wish(context.namespace_options.mut_or_insert_default());
        let error = Pod::of(handler, config).map(|pod| pod.id.clone());
        let error = format!("{:#}", error.expect_err(word));
        println!("{error}");
        let named = error.contains(word) && error.contains("a microVM cannot share");
        assert!(named, "{word}: {error}");
    }
    before.assert_restored();

    let _description = Description::of_a_cdi_device();
    let pod = Pod::run(handler);
    let whole = Census::take();
    let of_containers: [(&str, Wish<api::ContainerConfig>); 3] = [
        ("].options: \"rshared\"", |config| {
            config.mounts.push(api::Mount {
                propagation: api::MountPropagation::PROPAGATION_BIDIRECTIONAL.into(),
                ..mount("/mnt", "/mnt")
            });
        }),
        ("linux.devices[", |config| {
            config.devices.push(api::Device {
                host_path: "/dev/kvm".into(),
                container_path: "/dev/kvm".into(),
                permissions: "rwm".into(),
                ..Default::default()
            });
        }),
        ("linux.devices[", |config| {
            config.CDI_devices.push(api::CDIDevice {
                name: "husk.test/device=kvm".into(),
                ..Default::default()
            });
        }),
    ];
    for (word, wish) in of_containers {
        let mut config = pod.container(&["true"]);
        wish(&mut config);
        // containerd has the task made by the start.
        let error = pod.create(config).and_then(|container| {
            let started = container.start();
            let _ = container.remove();
            started
        });
        let error = format!("{:#}", error.expect_err(word));
        println!("{error}");
        assert!(error.contains(word), "{word}: {error}");
    }
    whole.assert_restored();
    // The pod is none the worse for it.
    assert_eq!(pod.try_words(&["echo", "well"]), "well\n");
    pod.end();
    before.assert_restored();
}

pub fn a_privileged_container_has_no_devices_of_the_host(handler: Handler) {
    let said = |handler| {
        let pod = Pod::with(handler, |config| {
            let linux = config.linux.mut_or_insert_default();
            linux.security_context.mut_or_insert_default().privileged = true;
        });
        let script = "grep CapEff /proc/self/status; test -w /proc/sys/kernel/msgmax && echo writable
            mkdir /tmp/m && mount -t tmpfs none /tmp/m && echo mounted; ls /dev | grep -vx core | grep -v tty";
        let mut config = pod.container(&["sh", "-c", script]);
        let context = config
            .linux
            .mut_or_insert_default()
            .security_context
            .mut_or_insert_default();
        context.privileged = true;
        let container = pod.start(config);
        assert_eq!(container.exit_code(), 0, "{}", container.logs());
        let said = container.logs();
        pod.end();
        said
    };
    let ours = said(handler);
    assert!(
        ours.contains("writable\nmounted\n") && ours.contains("null\n"),
        "{ours}"
    );
    assert!(!ours.contains("kvm") && !ours.contains("vda"), "{ours}");
}

/// What CDI knows of a device; removed when dropped.
struct Description;

const DESCRIPTION: &str = "/etc/cdi/husk-test.json";

impl Description {
    fn of_a_cdi_device() -> Self {
        let text = serde_json::json!({
            "cdiVersion": "0.5.0", "kind": "husk.test/device",
            "devices": [{"name": "kvm", "containerEdits": {"deviceNodes": [{"path": "/dev/kvm"}]}}],
        });
        fs::create_dir_all("/etc/cdi").expect("create /etc/cdi");
        fs::write(DESCRIPTION, text.to_string()).expect("describe a device");
        Self
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        let _ = fs::remove_file(DESCRIPTION);
    }
}
