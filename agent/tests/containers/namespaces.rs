//! Namespaces that a container makes or joins: user, time, network, and those of another container.

use serde_json::{Value, json};

use crate::rig::{Rig, rig};

fn remapped(rig: &Rig, args: &[&str]) -> Value {
    let mut spec = rig.spec(args);
    add_namespace(&mut spec, json!({"type": "user"}));
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = map.clone();
    spec["linux"]["gidMappings"] = map;
    spec
}

fn add_namespace(spec: &mut Value, namespace: Value) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|known| known["type"] != namespace["type"]);
    namespaces.push(namespace);
}

fn of(id: &str, kind: &str) -> Value {
    let path = format!("{}/{id}/ns/{kind}", husk_proto::CONTAINERS);
    json!({"type": kind, "path": path})
}

/// An image whose files belong to the root of the user namespace, as containerd prepares it.
fn give_away(image: &std::path::Path, owner: u32) {
    for entry in std::fs::read_dir(image).unwrap() {
        let entry = entry.unwrap();
        std::os::unix::fs::lchown(entry.path(), Some(owner), Some(owner)).unwrap();
        if entry.file_type().unwrap().is_dir() {
            give_away(&entry.path(), owner);
        }
    }
    std::os::unix::fs::lchown(image, Some(owner), Some(owner)).unwrap();
}

#[test]
fn a_user_namespace_is_the_containers_own() {
    with_rig!(rig, {
        let image = rig.fresh_image("remapped");
        give_away(&image, 100_000);
        let script = "cat /proc/self/uid_map; cat /proc/self/setgroups; id -u; busybox stat -c %u /etc/passwd; touch /made; \
            ls -l /dev/null | cut -c1-10; echo x >/dev/null && cat /dev/null; cat /proc/self/oom_score_adj; ulimit -n; \
            grep CapEff /proc/self/status; hostname; busybox hostname own && hostname; ls -d /sys/class/net /sys/fs/cgroup; \
            busybox mount -t tmpfs none /tmp && echo mounted; busybox tail -n 1 /proc/self/mounts | cut -d' ' -f1-3; echo again >/dev/stdout; \
            readlink /proc/self/ns/user; cat /proc/sys/kernel/msgmax";
        let mut spec = remapped(rig, &["sh", "-c", script]);
        spec["root"]["path"] = json!(image);
        spec["hostname"] = json!("inside");
        spec["process"]["oomScoreAdj"] = json!(77);
        let nofile = json!({"type": "RLIMIT_NOFILE", "hard": 15_000, "soft": 4000});
        spec["process"]["rlimits"] = json!([nofile]);
        spec["linux"]["sysctl"] = json!({"kernel.msgmax": "4321"});
        spec["process"]["capabilities"]["effective"] = json!(["CAP_SYS_ADMIN", "CAP_CHOWN"]);
        spec["process"]["capabilities"]["permitted"] = json!(["CAP_SYS_ADMIN", "CAP_CHOWN"]);
        spec["process"]["capabilities"]["bounding"] = json!(["CAP_SYS_ADMIN", "CAP_CHOWN"]);
        let done = rig.run_container(spec).await;
        let mut lines: Vec<&str> = done.out.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 17, "{}\n{}", done.out, done.err);
        let map: Vec<&str> = lines.remove(0).split_whitespace().collect();
        assert_eq!(map, ["0", "100000", "65536"]);
        let mine = std::fs::read_link("/proc/self/ns/user").unwrap();
        assert_ne!(lines.remove(14), mine.to_str().unwrap());
        let expected = [
            "allow",
            "0",
            "0",
            "crw-rw-rw-",
            "77",
            "4000",
            "CapEff:\t0000000000200001",
            "inside",
            "own",
            "/sys/class/net",
            "/sys/fs/cgroup",
            "mounted",
            "none /tmp tmpfs",
            "again",
            "4321",
        ];
        for (line, wanted) in lines.iter().zip(expected) {
            assert_eq!(*line, wanted, "{}\n{}", done.out, done.err);
        }
        let made = std::os::unix::fs::MetadataExt::uid(&image.join("made").metadata().unwrap());
        assert_eq!(made, 100_000);
        std::fs::remove_dir_all(image).unwrap();
    });
}

#[test]
fn an_added_process_joins_the_user_namespace() {
    with_rig!(rig, {
        let spec = remapped(rig, &["sleep", "1000"]);
        let c = rig.create(spec.clone()).await.unwrap().id;
        rig.start(&c, "").await.unwrap();
        let own = std::fs::read_link(format!("/proc/{}/ns/user", rig.pids(&spec)[0])).unwrap();
        let script = "id -u; readlink /proc/self/ns/user; cat /proc/self/oom_score_adj; echo out >/dev/stdout";
        for user in [0, 7] {
            let mut process = rig.process(&["sh", "-c", script]);
            process["user"] = json!({"uid": user, "gid": user});
            let exec = format!("as{user}");
            let io = rig.exec(&c, &exec, process).await.unwrap();
            rig.start(&c, &exec).await.unwrap();
            let (out, err) = io.rest().await;
            let expected = format!("{user}\n{}\n0\nout\n", own.display());
            assert_eq!(out, expected, "{err}");
            assert_eq!(rig.exit(&c, &exec).await, 0);
        }
        // A user that the namespace does not have.
        let mut process = rig.process(&["true"]);
        process["user"] = json!({"uid": 70_000, "gid": 0});
        rig.exec(&c, "nobody", process).await.unwrap();
        let error = rig.start(&c, "nobody").await.unwrap_err();
        assert_eq!(
            error,
            (
                "INVALID_ARGUMENT".into(),
                "process.user.uid: set 70000: invalid argument".into()
            )
        );
        rig.remove(&c).await;
    });
}

/// Where it may write to them: as with runc, for any user that is the container's.
#[test]
fn a_container_may_make_cgroups_of_its_own() {
    with_rig!(rig, {
        let script = "cd /sys/fs/cgroup && mkdir own && echo $$ >own/cgroup.procs && echo moved; \
            busybox stat -c %u . cgroup.procs cgroup.max.depth";
        let writable = |spec: &mut Value| {
            spec["mounts"].as_array_mut().unwrap().push(
                json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "rw"]}),
            );
        };
        let mut spec = remapped(rig, &["sh", "-c", script]);
        writable(&mut spec);
        let done = rig.run_container(spec).await;
        assert_eq!(done.out, "moved\n0\n0\n65534\n", "{}", done.err);
        let mut spec = rig.spec(&["sh", "-c", script]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        writable(&mut spec);
        let done = rig.run_container(spec).await;
        assert_eq!(done.out, "moved\n1000\n1000\n0\n", "{}", done.err);
    });
}

#[test]
fn clocks_of_a_time_namespace_are_ahead() {
    with_rig!(rig, {
        for user in [false, true] {
            let args = ["sh", "-c", "cat /proc/self/timens_offsets /proc/uptime"];
            let mut spec = if user {
                remapped(rig, &args)
            } else {
                rig.spec(&args)
            };
            add_namespace(&mut spec, json!({"type": "time"}));
            spec["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 5000}, "boottime": {"secs": 1_000_000, "nanosecs": 5}});
            let done = rig.run_container(spec).await;
            let words: Vec<&str> = done.out.split_whitespace().collect();
            let offsets = ["monotonic", "5000", "0", "boottime", "1000000", "5"];
            assert_eq!(words[..6], offsets, "{}", done.err);
            let uptime: f64 = words[6].parse().unwrap();
            assert!(uptime > 1_000_000.0, "{uptime}");
        }
        // An added process has them too.
        let mut spec = rig.spec(&["sleep", "1000"]);
        add_namespace(&mut spec, json!({"type": "time"}));
        spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000}});
        let c = rig.create(spec).await.unwrap().id;
        rig.start(&c, "").await.unwrap();
        let process = rig.process(&["cat", "/proc/uptime"]);
        let io = rig.exec(&c, "e", process).await.unwrap();
        rig.start(&c, "e").await.unwrap();
        let out = io.rest().await.0;
        assert!(out.split('.').next().unwrap().len() >= 7, "{out}");
        rig.remove(&c).await;
    });
}

/// As the containers of a pod: what the sandbox has made is theirs, too.
#[test]
fn namespaces_of_another_container_are_shared() {
    with_rig!(rig, {
        for user in [false, true] {
            let shaped = |args: &[&str]| match user {
                true => remapped(rig, args),
                false => rig.spec(args),
            };
            let mut sandbox = shaped(&["sh", "-c", "echo sandbox; exec sleep 1000"]);
            sandbox["hostname"] = json!("the-pod");
            sandbox["linux"]["sysctl"] = json!({"kernel.shmmni": "123"});
            let pause = rig.create(sandbox.clone()).await.unwrap();
            rig.start(&pause.id, "").await.unwrap();
            pause.io.line().await;
            let init = rig.pids(&sandbox)[0];
            let theirs = |kind: &str| {
                let link = std::fs::read_link(format!("/proc/{init}/ns/{kind}"));
                link.unwrap().to_str().unwrap().to_owned()
            };

            let script = "hostname; cat /proc/sys/kernel/shmmni; cat /proc/1/comm; \
                for kind in uts ipc pid mnt cgroup user; do readlink /proc/self/ns/$kind; done; echo ready; sleep 1000; true";
            let mut spec = shaped(&["sh", "-c", script]);
            let mut kinds = vec!["uts", "ipc", "pid"];
            if user {
                kinds.push("user");
            }
            for kind in &kinds {
                add_namespace(&mut spec, of(&pause.id, kind));
            }
            let c = rig.create(spec.clone()).await.unwrap();
            rig.start(&c.id, "").await.unwrap();
            let mut lines = Vec::new();
            while lines.last().is_none_or(|line| line != "ready\n") {
                lines.push(c.io.line().await);
            }
            assert_eq!(lines[..3], ["the-pod\n", "123\n", "sleep\n"]);
            let shared: Vec<bool> = ["uts", "ipc", "pid", "mnt", "cgroup", "user"]
                .iter()
                .zip(&lines[3..])
                .map(|(kind, line)| line.trim() == theirs(kind))
                .collect();
            // Without a user namespace of theirs, both have the guest's.
            assert_eq!(shared, [true, true, true, false, false, true]);

            let process = rig.process(&[
                "sh",
                "-c",
                "for kind in uts ipc pid user; do readlink /proc/self/ns/$kind; done",
            ]);
            let io = rig.exec(&c.id, "e", process).await.unwrap();
            rig.start(&c.id, "e").await.unwrap();
            let expected: String = ["uts", "ipc", "pid", "user"]
                .map(|kind| theirs(kind) + "\n")
                .concat();
            assert_eq!(io.rest().await.0, expected);

            // No pid namespace dies with its init: what it has left is ended all the same.
            assert!(rig.pids(&spec).len() >= 2);
            rig.signal(&c.id, "", 9, false).await.unwrap();
            assert_eq!(rig.exit(&c.id, "").await, 137);
            rig.delete(&c.id, "").await.unwrap();
            rig.remove(&pause.id).await;
        }
    });
}

#[test]
fn namespaces_that_cannot_be_joined_are_named() {
    with_rig!(rig, {
        let with = |namespace: Value| {
            let mut spec = rig.spec(&["true"]);
            add_namespace(&mut spec, namespace);
            spec
        };
        let error = rig.create(with(of("nosuch", "ipc"))).await.unwrap_err();
        assert_eq!(error, ("NOT_FOUND".into(), "container \"nosuch\"".into()));
        let c = rig.sleeper().await;
        let error = rig.create(with(of(&c, "user"))).await.unwrap_err();
        assert_eq!(
            error.1,
            format!("linux.namespaces: user: container {c:?} has none")
        );
        rig.signal(&c, "", 9, true).await.unwrap();
        rig.exit(&c, "").await;
        let error = rig.create(with(of(&c, "ipc"))).await.unwrap_err();
        assert_eq!(
            error.1,
            format!("cannot join the namespaces of container {c:?}: it is stopped")
        );
        rig.delete(&c, "").await.unwrap();
    });
}

/// Of a container that shall not have its pod's.
#[test]
fn a_network_namespace_has_a_loopback_alone() {
    with_rig!(rig, {
        let script = "ls /sys/class/net; busybox ping -c 1 -W 5 127.0.0.1 >/dev/null && echo answered; \
            cat /proc/sys/net/ipv4/ip_unprivileged_port_start";
        for user in [false, true] {
            let args = ["sh", "-c", script];
            let mut spec = match user {
                true => remapped(rig, &args),
                false => rig.spec(&args),
            };
            add_namespace(&mut spec, json!({"type": "network"}));
            spec["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "99"});
            let done = rig.run_container(spec).await;
            assert!(
                done.out.ends_with("lo\nanswered\n99\n"),
                "{} {}",
                done.out,
                done.err
            );
            let ours = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
            assert_ne!(ours.unwrap().trim(), "99");
        }
    });
}

#[test]
fn the_execution_domain_is_init_and_execs() {
    with_rig!(rig, {
        let mut spec = rig.spec(&["sh", "-c", "busybox uname -m; exec sleep 1000"]);
        spec["linux"]["personality"] = json!({"domain": "LINUX32"});
        let c = rig.create(spec).await.unwrap();
        rig.start(&c.id, "").await.unwrap();
        assert_eq!(c.io.line().await, "i686\n");
        let process = rig.process(&["busybox", "uname", "-m"]);
        let io = rig.exec(&c.id, "e", process).await.unwrap();
        rig.start(&c.id, "e").await.unwrap();
        assert_eq!(io.rest().await.0, "i686\n");
        rig.remove(&c.id).await;
    });
}
