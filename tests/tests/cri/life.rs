//! A pod and the containers that come into it and go.

use std::{fs, path::PathBuf};

use husk_proto::cri as api;
use husk_tests::{
    cri::{Handler, Pod},
    ctr::fresh_id,
};

/// A directory of the host, for volumes; removed when dropped.
pub struct Volume(pub PathBuf);

impl Volume {
    pub fn new() -> Self {
        let path = PathBuf::from("/var/tmp").join(fresh_id("volume"));
        fs::create_dir_all(&path).expect("create a volume");
        Self(path)
    }

    pub fn file(&self, name: &str, content: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, content).expect("write to a volume");
        path.display().to_string()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn mount(host_path: impl Into<String>, container_path: &str) -> api::Mount {
    api::Mount {
        host_path: host_path.into(),
        container_path: container_path.into(),
        ..Default::default()
    }
}

pub fn containers_join_and_leave(handler: Handler) {
    let volume = Volume::new();
    let pod = Pod::run(handler);
    assert!(pod.is_ready());
    let with_volume = |script: &str| {
        let mut config = pod.container(&["sh", "-c", script]);
        config
            .mounts
            .push(mount(volume.0.display().to_string(), "/volume"));
        config
    };

    // As an init container: it has ended when the next one begins, and the pod goes on.
    let init = pod.start(with_volume("echo prepared >/volume/file"));
    assert_eq!(init.exit_code(), 0, "{}", init.logs());
    assert_eq!(init.status().reason, "Completed");
    assert!(pod.is_ready());
    let main = pod.start(with_volume("cat /volume/file; exec sleep 86400"));
    let address = pod.ip();
    let seen = main.try_exec(&["ip", "-o", "address", "show", "dev", "eth0"]);
    assert!(seen.contains(&format!(" {address}/")), "{address}: {seen}");
    assert_eq!(main.logs(), "prepared\n");

    // One beside it, as an ephemeral container, which ends before it.
    assert_eq!(pod.try_words(&["echo", "beside"]), "beside\n");
    main.stop(0).expect("stop");
    assert_eq!(main.exit_code(), 137);
    assert!(pod.is_ready());

    // Nobody is left, and one comes that fails, and comes again.
    let config = with_volume("cat /volume/crashed && exit; echo twice >/volume/crashed; exit 3");
    let first = pod.start(config.clone());
    assert_eq!(first.exit_code(), 3);
    assert_eq!(first.status().reason, "Error");
    let mut again = config;
    again.metadata.mut_or_insert_default().attempt = 1;
    again.log_path = format!("again-{}", again.log_path);
    let second = pod.start(again);
    assert_eq!(second.exit_code(), 0);
    assert_eq!(second.logs(), "twice\n");
    // The first is still told of.
    assert_eq!(first.status().exit_code, 3);
    first.remove().expect("remove");
    pod.end();
}

/// What runc's pods say under the same containerd is what ours have to say.
pub fn files_are_as_kubernetes_makes_them(handler: Handler) {
    let theirs = said_of_files(Handler::Runc);
    assert!(theirs.contains("nameserver 10.96.0.10"), "{theirs}");
    assert!(theirs.contains("1 2 3"), "{theirs}");
    assert_eq!(said_of_files(handler), theirs);
}

fn said_of_files(handler: Handler) -> String {
    let volume = Volume::new();
    let hosts = volume.file("hosts", "127.0.0.1 localhost\n10.0.0.1 of-the-kubelet\n");
    let reason = volume.file("reason", "");
    let secret = volume.file("secret", "sesame\n");
    let pod = Pod::with(handler, |config| {
        let sysctls = &mut config.linux.mut_or_insert_default().sysctls;
        for (name, value) in [
            ("kernel.shm_rmid_forced", "1"),
            ("net.ipv4.ip_unprivileged_port_start", "79"),
            ("kernel.msgmax", "4242"),
        ] {
            sysctls.insert(name.into(), value.into());
        }
    });
    let script = "hostname; cat /etc/hostname /etc/hosts /etc/resolv.conf /etc/secret
        cd /proc/sys; cat kernel/shm_rmid_forced net/ipv4/ip_unprivileged_port_start kernel/msgmax
        echo why >/dev/termination-log; (echo changed >/etc/secret) 2>/dev/null || echo read-only
        df /dev/shm | tail -n 1 | tr -s ' ' | cut -d' ' -f2,6; echo 1 >/dev/shm/x 2>&1 && echo 1 2 3; exit 4";
    let mut config = pod.container(&["sh", "-c", script]);
    config.mounts.push(mount(hosts, "/etc/hosts"));
    config.mounts.push(mount(&*reason, "/dev/termination-log"));
    config.mounts.push(api::Mount {
        readonly: true,
        ..mount(secret, "/etc/secret")
    });
    let container = pod.start(config);
    assert_eq!(container.exit_code(), 4, "{}", container.logs());
    let said = container.logs();
    assert_eq!(
        fs::read_to_string(reason).ok().as_deref(),
        Some("why\n"),
        "{said}"
    );
    pod.end();
    said
}
