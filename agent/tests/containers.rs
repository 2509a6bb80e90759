//! Real containers on this machine: the agent's own code served over a socket pair, its helper as built,
//! an image made of Debian's static busybox.
//!
//! Needs root, cgroup v2 and busybox-static; what is missing is said, and nothing is tested then.
//! Limits of memory and processes need controllers, and are tested in the lab.

// A test that cannot go on has to fail where it stands.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod rig;

use std::path::Path;
use std::time::Duration;

use husk_proto::agent::*;
use rig::{Io, Rig, rig};
use serde_json::json;

/// Runs the test with the rig, if this machine has what it takes.
macro_rules! with_rig {
    ($rig:ident, $body:block) => {
        let Some($rig) = rig() else { return };
        $rig.run(async $body)
    };
}

#[path = "containers/beside_runc.rs"]
mod beside_runc;
#[path = "containers/mounts.rs"]
mod mounts;
#[path = "containers/namespaces.rs"]
mod namespaces;

#[test]
fn output_and_exit_codes_reach_the_host() {
    with_rig!(rig, {
        for (script, status, out, err) in [
            ("echo hello; echo oops >&2", 0, "hello\n", "oops\n"),
            ("exit 42", 42, "", ""),
            ("kill -9 $$; echo alive", 0, "alive\n", ""),
            (
                "readlink /proc/self/ns/pid >/dev/null; echo pid $$",
                0,
                "pid 1\n",
                "",
            ),
        ] {
            let done = rig.run_container(rig.spec(&["sh", "-c", script])).await;
            assert_eq!(
                (done.status, done.out.as_str(), done.err.as_str()),
                (status, out, err),
                "{script}"
            );
        }
    });
}

#[test]
fn death_by_signal_is_128_and_more() {
    with_rig!(rig, {
        let c = rig
            .create(rig.spec(&[
                "sh",
                "-c",
                "trap 'echo term; exit 7' TERM; echo up; while :; do sleep 0.05; done",
            ]))
            .await
            .unwrap();
        rig.start(&c.id, "").await.unwrap();
        c.io.line().await;
        let exec = rig
            .exec(&c.id, "victim", rig.process(&["sleep", "60"]))
            .await
            .unwrap();
        rig.start(&c.id, "victim").await.unwrap();
        rig.signal(&c.id, "victim", 15, false).await.unwrap();
        assert_eq!(rig.exit(&c.id, "victim").await, 143);
        drop(exec);
        let gone = rig.signal(&c.id, "victim", 15, false).await.unwrap_err();
        assert_eq!(
            gone,
            ("NOT_FOUND".into(), "process already finished".into())
        );
        rig.signal(&c.id, "", 15, false).await.unwrap();
        assert_eq!(rig.exit(&c.id, "").await, 7);
        rig.delete(&c.id, "").await.unwrap();

        let c = rig.create(rig.spec(&["sleep", "60"])).await.unwrap();
        rig.start(&c.id, "").await.unwrap();
        let wrong = rig.signal(&c.id, "", 65, false).await.unwrap_err();
        assert_eq!(wrong.0, "INVALID_ARGUMENT");
        rig.signal(&c.id, "", 9, true).await.unwrap();
        assert_eq!(rig.exit(&c.id, "").await, 137);
        rig.delete(&c.id, "").await.unwrap();
    });
}

#[test]
fn what_cannot_be_executed_is_told_in_runcs_words() {
    with_rig!(rig, {
        let cases = [
            (
                vec!["nosuch"],
                "/",
                "exec: \"nosuch\": executable file not found in $PATH",
            ),
            (
                vec!["/x"],
                "/",
                "exec: \"/x\": stat /x: no such file or directory",
            ),
            (vec!["/etc"], "/", "exec: \"/etc\": is a directory"),
            (
                vec!["/etc/passwd"],
                "/",
                "exec: \"/etc/passwd\": permission denied",
            ),
            (vec!["/garbage"], "/", "exec /garbage: exec format error"),
            (
                vec!["/nointerpreter"],
                "/",
                "exec /nointerpreter: no such file or directory",
            ),
            (
                vec!["true"],
                "/etc/passwd",
                "chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory",
            ),
        ];
        for (args, cwd, words) in &cases {
            let mut spec = rig.spec(args);
            spec["process"]["cwd"] = json!(cwd);
            let error = match rig.create(spec).await {
                Err(error) => error,
                Ok(c) => {
                    let error = rig.start(&c.id, "").await.unwrap_err();
                    rig.delete(&c.id, "").await.unwrap();
                    error
                }
            };
            assert_eq!(
                (error.0.as_str(), error.1.as_str()),
                ("INVALID_ARGUMENT", *words),
                "{args:?}"
            );
        }
        let c = rig.sleeper().await;
        for (i, (args, cwd, words)) in cases.iter().enumerate() {
            let mut process = rig.process(args);
            process["cwd"] = json!(cwd);
            let id = format!("e{i}");
            rig.exec(&c, &id, process).await.unwrap();
            let error = rig.start(&c, &id).await.unwrap_err();
            assert_eq!(
                (error.0.as_str(), error.1.as_str()),
                ("INVALID_ARGUMENT", *words),
                "{args:?}"
            );
            rig.delete(&c, &id).await.unwrap();
        }
        let mut process = rig.process(&["true"]);
        process["cwd"] = json!("/nope");
        rig.exec(&c, "nope", process).await.unwrap();
        let error = rig.start(&c, "nope").await.unwrap_err();
        assert_eq!(
            error.1,
            "chdir to cwd (\"/nope\") set in config.json failed: no such file or directory"
        );
        let mut process = rig.process(&["true"]);
        process["cwd"] = json!("/root");
        process["user"] = json!({"uid": 1000, "gid": 1000});
        rig.exec(&c, "user", process).await.unwrap();
        // As runc: root may enter where the user may not.
        rig.start(&c, "user").await.unwrap();
        rig.remove(&c).await;
    });
}

/// For a container's init, whatever the image's links say; not for added processes, as above.
#[test]
fn a_missing_working_directory_is_made() {
    with_rig!(rig, {
        let image = rig.fresh_image("cwd");
        let outside = image.with_extension("cwd-outside");
        std::os::unix::fs::symlink(&outside, image.join("link")).unwrap();
        for (cwd, read_only) in [("/srv/a/b", false), ("/srv/c", true), ("/link/d", false)] {
            let mut spec = rig.spec(&["sh", "-c", "pwd; ls -ld . | cut -c1-10"]);
            spec["root"] = json!({"path": image, "readonly": read_only});
            spec["process"]["cwd"] = json!(cwd);
            spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            let done = rig.run_container(spec).await;
            let at = if cwd == "/link/d" {
                format!("{}/d", outside.display())
            } else {
                cwd.into()
            };
            assert_eq!(done.out, format!("{at}\ndrwxr-xr-x\n"), "{}", done.err);
        }
        assert!(!outside.exists());
        let mut spec = rig.spec(&["true"]);
        spec["process"]["cwd"] = json!("/etc/passwd/d");
        let error = rig.create(spec).await.unwrap_err();
        assert_eq!(error.1, "mkdir /etc/passwd/d: not a directory");
        std::fs::remove_dir_all(image).unwrap();
    });
}

#[test]
fn the_last_of_several_values_counts() {
    with_rig!(rig, {
        // Not through a shell, which would sort it out.
        let mut spec = rig.spec(&["cat", "/proc/self/environ"]);
        spec["process"]["env"] = json!(["PATH=/nowhere", "WORD=old", "PATH=/bin", "WORD=new"]);
        let done = rig.run_container(spec).await;
        assert_eq!(
            done.out, "PATH=/bin\0WORD=new\0HOME=/root\0",
            "{}",
            done.err
        );
    });
}

/// As Docker and systemd do in a container: init moves into a child, and the children get controllers.
#[test]
fn a_process_is_added_where_cgroups_are_the_containers_own() {
    with_rig!(rig, {
        let spec = rig.spec(&["sleep", "1000"]);
        let cgroup = rig.cgroup(spec["linux"]["cgroupsPath"].as_str().unwrap());
        let c = rig.create(spec.clone()).await.unwrap().id;
        rig.start(&c, "").await.unwrap();
        let controllers = std::fs::read_to_string(cgroup.join("cgroup.controllers")).unwrap();
        let Some(controller) = controllers.split_whitespace().next() else {
            eprintln!("SKIPPED: no controllers of cgroup v2 here");
            return rig.remove(&c).await;
        };
        let own = cgroup.join("own");
        std::fs::create_dir(&own).unwrap();
        let init = rig.pids(&spec)[0].to_string();
        std::fs::write(own.join("cgroup.procs"), init).unwrap();
        let children = cgroup.join("cgroup.subtree_control");
        std::fs::write(children, format!("+{controller}")).unwrap();

        let process = rig.process(&["cat", "/proc/self/cgroup"]);
        let io = rig.exec(&c, "e", process).await.unwrap();
        rig.start(&c, "e").await.unwrap();
        let out = io.rest().await.0;
        assert!(out.contains("0::/own\n"), "{out}");
        assert_eq!(rig.exit(&c, "e").await, 0);
        rig.remove(&c).await;
        assert!(!cgroup.exists());
    });
}

/// A privileged container without a cgroup namespace can leave its cgroup, and must end all the same.
#[test]
fn a_container_that_left_its_cgroup_can_be_killed() {
    with_rig!(rig, {
        let spec = rig.spec(&["sleep", "1000"]);
        let c = rig.create(spec.clone()).await.unwrap().id;
        rig.start(&c, "").await.unwrap();
        let path = spec["linux"]["cgroupsPath"].as_str().unwrap();
        let elsewhere = rig.cgroup(&format!("{path}-elsewhere"));
        std::fs::create_dir(&elsewhere).unwrap();
        let init = rig.pids(&spec)[0].to_string();
        std::fs::write(elsewhere.join("cgroup.procs"), init).unwrap();
        rig.signal(&c, "", 9, true).await.unwrap();
        assert_eq!(rig.exit(&c, "").await, 137);
        rig.delete(&c, "").await.unwrap();
        std::fs::remove_dir(&elsewhere).unwrap();
    });
}

#[test]
fn a_process_is_who_the_specification_says() {
    with_rig!(rig, {
        let mut spec = rig.spec(&[
            "sh",
            "-c",
            "id -u; id -g; id -G; umask; pwd; hostname; echo $HOME; ulimit -n; cat /proc/self/oom_score_adj; grep -E '^(Cap|NoNew)' /proc/self/status; ls /proc/self/fd | wc -l",
        ]);
        spec["process"]["user"] =
            json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 7});
        spec["process"]["cwd"] = json!("/tmp");
        spec["process"]["oomScoreAdj"] = json!(321);
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"],
            "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]
        });
        spec["hostname"] = json!("blue");
        let done = rig.run_container(spec).await;
        let lines: Vec<&str> = done.out.lines().collect();
        assert_eq!(
            &lines[..9],
            [
                "1000", "1001", "1001 5 6", "0007", "/tmp", "blue", "/home/u", "1024", "321"
            ],
            "{}",
            done.err
        );
        assert_eq!(
            &lines[9..15],
            [
                "CapInh:\t0000000000000020",
                "CapPrm:\t0000000000000020",
                "CapEff:\t0000000000000020",
                "CapBnd:\t0000000000000021",
                "CapAmb:\t0000000000000020",
                "NoNewPrivs:\t1"
            ]
        );
        // 0, 1, 2 and the one ls reads the directory with.
        assert_eq!(lines[15].trim(), "4");
    });
}

#[test]
fn an_added_process_is_confined_like_init() {
    with_rig!(rig, {
        let c = rig.sleeper().await;
        let script = "grep -E '^(CapBnd|NoNew)' /proc/self/status; ulimit -n; umask; readlink /proc/self/ns/mnt; readlink /proc/1/ns/mnt; \
            readlink /proc/self/ns/cgroup; readlink /proc/1/ns/cgroup; cat /proc/self/cgroup; ls /proc/self/fd | wc -l; cat /proc/self/oom_score_adj; echo $HOME";
        let io = rig
            .exec(&c, "probe", rig.process(&["sh", "-c", script]))
            .await
            .unwrap();
        rig.start(&c, "probe").await.unwrap();
        let (out, _) = io.rest().await;
        assert_eq!(rig.exit(&c, "probe").await, 0);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(
            &lines[..4],
            [
                "CapBnd:\t00000000a80425fb",
                "NoNewPrivs:\t1",
                "1024",
                "0022"
            ]
        );
        assert_eq!(lines[4], lines[5]);
        assert_eq!(lines[6], lines[7]);
        assert!(lines.contains(&"0::/"), "{out}");
        assert_eq!(&lines[lines.len() - 3..], ["4", "0", "/root"]);
        rig.remove(&c).await;
    });
}

#[test]
fn the_container_sees_its_own_files_and_no_others() {
    with_rig!(rig, {
        let script = "cat /proc/mounts; echo ==; ls -l /dev; echo ==; cat /proc/keys | wc -c; ls /sys/firmware | wc -l; \
            echo 1 > /proc/sys/kernel/panic; touch /x; touch /run/y && echo writable; cat /proc/1/comm; ls /";
        let mut spec = rig.spec(&["sh", "-c", script]);
        spec["root"]["readonly"] = json!(true);
        let done = rig.run_container(spec).await;
        let (mounts, rest) = done.out.split_once("==").unwrap();
        for line in [
            "proc /proc proc rw,nosuid,nodev,noexec,relatime 0 0",
            "devpts /dev/pts devpts rw,nosuid,noexec,relatime,gid=5,mode=620,ptmxmode=666 0 0",
            "tmpfs /dev tmpfs rw,nosuid,size=65536k,mode=755",
            "mqueue /dev/mqueue mqueue rw,nosuid,nodev,noexec,relatime 0 0",
            "sysfs /sys sysfs ro,nosuid,nodev,noexec,relatime 0 0",
            "proc /proc/sys proc ro,nosuid,nodev,noexec,relatime 0 0",
            "tmpfs /proc/keys tmpfs",
            "tmpfs /sys/firmware tmpfs ro,relatime,size=4k,nr_inodes=1",
        ] {
            assert!(mounts.contains(line), "{line}:\n{mounts}");
        }
        assert!(!mounts.contains(rig.image().to_str().unwrap()), "{mounts}");
        assert!(
            mounts.lines().next().unwrap().contains(" / ")
                && mounts.lines().next().unwrap().contains("ro,"),
            "{mounts}"
        );
        let (dev, rest) = rest.split_once("==").unwrap();
        for node in [
            "null",
            "zero",
            "full",
            "random",
            "urandom",
            "tty",
            "ptmx -> pts/ptmx",
            "fd -> /proc/self/fd",
            "stdout -> /proc/self/fd/1",
        ] {
            assert!(dev.contains(node), "{node}:\n{dev}");
        }
        assert!(!dev.contains("vda") && !dev.contains("sda"), "{dev}");
        let lines: Vec<&str> = rest.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(&lines[..4], ["0", "0", "writable", "sh"], "{}", done.err);
        assert!(
            done.err
                .contains("/proc/sys/kernel/panic: Read-only file system"),
            "{}",
            done.err
        );
        assert!(
            done.err.contains("/x: Read-only file system"),
            "{}",
            done.err
        );
    });
}

#[test]
fn links_of_an_image_lead_no_mount_outside() {
    with_rig!(rig, {
        let image = rig.fresh_image("links");
        let outside = image.with_extension("outside");
        std::fs::create_dir_all(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, image.join("mnt")).unwrap();
        std::os::unix::fs::symlink("/../../../etc", image.join("data")).unwrap();
        let mut spec = rig.spec(&["sh", "-c", "ls /data/in; cat /file"]);
        spec["root"]["path"] = json!(image);
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/mnt/here", "type": "tmpfs", "source": "tmpfs"}));
        mounts.push(json!({"destination": "/data/in", "type": "bind", "source": rig.image().join("home"), "options": ["rbind", "ro"]}));
        mounts.push(json!({"destination": "/file", "type": "bind", "source": rig.image().join("etc/passwd"), "options": ["bind"]}));
        let done = rig.run_container(spec).await;
        assert!(
            done.out.starts_with("u\nroot:x:0:0"),
            "{} {}",
            done.out,
            done.err
        );
        assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
        assert!(image.join("etc/in").is_dir());

        std::fs::remove_dir(image.join("proc")).unwrap();
        std::os::unix::fs::symlink("etc", image.join("proc")).unwrap();
        let mut spec = rig.spec(&["true"]);
        spec["root"]["path"] = json!(image);
        let error = rig.create(spec).await.unwrap_err();
        assert!(
            error.1.starts_with("mounts[0] (proc at /proc)"),
            "{error:?}"
        );
        std::fs::remove_dir_all(image).unwrap();
        std::fs::remove_dir_all(outside).unwrap();
    });
}

#[test]
fn wrong_mounts_are_named() {
    with_rig!(rig, {
        for (mount, words) in [
            (
                json!({"destination": "/m", "type": "bind", "source": "/nosuch", "options": ["bind"]}),
                "mounts[7] (bind at /m): source /nosuch: no such file or directory",
            ),
            (
                json!({"destination": "/m", "type": "nofs", "source": "x"}),
                "mounts[7] (nofs at /m): file system type \"nofs\": no such device",
            ),
            (
                json!({"destination": "/m", "type": "tmpfs", "source": "x", "options": ["sise=5"]}),
                "mounts[7] (tmpfs at /m): option \"sise=5\": invalid argument",
            ),
            (
                json!({"destination": "/m", "type": "tmpfs", "source": "x", "options": ["idmap"]}),
                "mounts[7].options: \"idmap\" is for bind mounts only",
            ),
            (
                json!({"destination": "/m", "type": "bind", "source": "/tmp", "options": ["bind", "size=1m"]}),
                "mounts[7].options: \"size=1m\": bind mounts cannot have any filesystem-specific options applied",
            ),
            (
                json!({"destination": "/etc", "type": "tmpfs", "source": "x", "options": ["remount"]}),
                "mounts[7] (tmpfs at /etc): invalid argument",
            ),
            (
                json!({"destination": "/proc/1", "type": "tmpfs", "source": "x"}),
                "mounts[7] (tmpfs at /proc/1): \"/proc/1\" cannot be mounted because it is inside /proc",
            ),
        ] {
            let mut spec = rig.spec(&["true"]);
            spec["mounts"].as_array_mut().unwrap().push(mount);
            let error = rig.create(spec).await.unwrap_err();
            assert!(
                error.0 == "INVALID_ARGUMENT" && error.1.starts_with(words),
                "{error:?}"
            );
        }
        let mut spec = rig.spec(&["true"]);
        spec["root"]["path"] = json!("/nosuch/rootfs");
        assert_eq!(
            rig.create(spec).await.unwrap_err().1,
            "root.path /nosuch/rootfs: no such file or directory"
        );
    });
}

#[test]
fn devices_outside_the_rules_cannot_be_opened() {
    with_rig!(rig, {
        let script = "mknod /run/kmsg c 1 11 && cat /run/kmsg; echo x > /dev/null && head -c 4 /dev/zero | wc -c; ls -l /dev/extra";
        let mut spec = rig.spec(&["sh", "-c", script]);
        spec["linux"]["devices"] = json!([{"path": "/dev/extra", "type": "c", "major": 1, "minor": 7, "fileMode": 0o640, "uid": 3, "gid": 4}]);
        let done = rig.run_container(spec).await;
        assert!(done.err.contains("Operation not permitted"), "{}", done.err);
        assert!(
            done.out
                .starts_with("4\ncrw-r-----    1 3        4           1,   7"),
            "{}",
            done.out
        );
    });
}

#[test]
fn a_terminal_has_a_size_and_carries_both_ways() {
    with_rig!(rig, {
        let mut spec = rig.spec(&["sh", "-c", "tty; stty size; test -t 0 && test -t 2 && echo yes; read a; stty size; echo got $a; ls -l /dev/console"]);
        spec["process"]["terminal"] = json!(true);
        spec["process"]["consoleSize"] = json!({"height": 30, "width": 100});
        let c = rig.create(spec).await.unwrap();
        rig.start(&c.id, "").await.unwrap();
        assert_eq!(c.io.line().await, "/dev/pts/0\r\n");
        assert_eq!(c.io.line().await, "30 100\r\n");
        assert_eq!(c.io.line().await, "yes\r\n");
        rig.resize(&c.id, "", 132, 43).await.unwrap();
        c.io.write(b"word\n").await;
        let rest = c.io.rest().await.0;
        assert!(
            rest.starts_with("word\r\n43 132\r\ngot word\r\n"),
            "{rest:?}"
        );
        assert!(rest.contains("136,   0"), "{rest:?}");
        assert_eq!(rig.exit(&c.id, "").await, 0);
        rig.delete(&c.id, "").await.unwrap();

        let c = rig.sleeper().await;
        let mut process = rig.process(&["sh", "-c", "stty size; tty; sleep 60"]);
        process["terminal"] = json!(true);
        let io = rig.exec(&c, "t", process).await.unwrap();
        rig.resize(&c, "t", 70, 20).await.unwrap();
        rig.start(&c, "t").await.unwrap();
        assert_eq!(io.line().await, "20 70\r\n");
        assert_eq!(io.line().await, "/dev/pts/0\r\n");
        // The client hangs up: so does the terminal.
        drop(io);
        assert_eq!(rig.exit(&c, "t").await, 129);
        let none = rig.resize(&c, "", 1, 1).await.unwrap_err();
        assert_eq!(none.0, "FAILED_PRECONDITION");
        rig.remove(&c).await;
    });
}

#[test]
fn streams_are_whole_alone_and_in_parallel() {
    with_rig!(rig, {
        let c = rig.sleeper().await;
        let bytes: Vec<u8> = (0..64u32 << 20)
            .map(|i| (i ^ (i >> 9) ^ (i >> 17)) as u8)
            .collect();
        let one = |id: &'static str| {
            let (c, bytes) = (c.clone(), &bytes);
            async move {
                let io = rig.exec(&c, id, rig.process(&["cat"])).await.unwrap();
                rig.start(&c, id).await.unwrap();
                let back = io.through(bytes).await;
                assert!(
                    back == *bytes,
                    "{id}: {} bytes of {}",
                    back.len(),
                    bytes.len()
                );
                assert_eq!(rig.exit(&c, id).await, 0);
            }
        };
        one("alone").await;
        tokio::join!(one("a"), one("b"), one("c"));
        rig.remove(&c).await;
        let done = rig
            .run_container(rig.spec(&[
                "sh",
                "-c",
                "head -c 20971520 /dev/zero | tr '\\0' x; echo end",
            ]))
            .await;
        assert_eq!(done.out.len(), (20 << 20) + 4);
        assert!(done.out.ends_with("xend\n"));
    });
}

#[test]
fn dead_readers_and_unread_input_hold_nothing_up() {
    with_rig!(rig, {
        let c = rig.sleeper().await;
        // The reader goes away: the writer is told.
        let io = rig.exec(&c, "yes", rig.process(&["yes"])).await.unwrap();
        rig.start(&c, "yes").await.unwrap();
        io.line().await;
        drop(io);
        assert_eq!(rig.exit(&c, "yes").await, 141);
        // The reader does not read: the exit is told all the same.
        let io = rig
            .exec(&c, "full", rig.process(&["sh", "-c", "yes & sleep 0.3"]))
            .await
            .unwrap();
        rig.start(&c, "full").await.unwrap();
        assert_eq!(rig.exit(&c, "full").await, 0);
        // Deleting closes what the orphaned writer still holds.
        rig.delete(&c, "full").await.unwrap();
        tokio::time::timeout(Duration::from_secs(5), io.rest())
            .await
            .unwrap();
        // Input that nobody reads ends with the process.
        let io = rig.exec(&c, "deaf", rig.process(&["true"])).await.unwrap();
        rig.start(&c, "deaf").await.unwrap();
        assert_eq!(rig.exit(&c, "deaf").await, 0);
        tokio::time::timeout(Duration::from_secs(5), io.stdin_closed())
            .await
            .unwrap();
        // Standard output can be opened again, by the user that the process runs as.
        let mut process = rig.process(&["sh", "-c", "echo again > /dev/stdout"]);
        process["user"] = json!({"uid": 1000, "gid": 1000});
        let io = rig.exec(&c, "reopen", process).await.unwrap();
        rig.start(&c, "reopen").await.unwrap();
        assert_eq!(io.rest().await, ("again\n".into(), String::new()));
        rig.remove(&c).await;
    });
}

#[test]
fn many_execs_in_a_row_and_at_once() {
    with_rig!(rig, {
        let c = rig.sleeper().await;
        let one = |id: String| {
            let c = c.clone();
            async move {
                let io = rig
                    .exec(
                        &c,
                        &id,
                        rig.process(&["sh", "-c", &format!("echo {id}; exit 3")]),
                    )
                    .await
                    .unwrap();
                rig.start(&c, &id).await.unwrap();
                assert_eq!(io.rest().await.0, format!("{id}\n"));
                assert_eq!(rig.exit(&c, &id).await, 3);
                rig.delete(&c, &id).await.unwrap();
            }
        };
        let start = std::time::Instant::now();
        for i in 0..50 {
            one(format!("row{i}")).await;
        }
        eprintln!("exec: {:?} each", start.elapsed() / 50);
        futures_util::future::join_all((0..10).map(|i| one(format!("once{i}")))).await;
        rig.remove(&c).await;
    });
}

#[test]
fn requests_at_the_wrong_time_are_refused() {
    with_rig!(rig, {
        let code = |error: (String, String)| error.0;
        assert_eq!(
            code(rig.start("nosuch", "").await.unwrap_err()),
            "NOT_FOUND"
        );
        let c = rig.create(rig.spec(&["true"])).await.unwrap().id;
        let mut again = rig.spec(&["true"]);
        again["linux"]["cgroupsPath"] = json!("/elsewhere");
        assert_eq!(
            code(rig.create_as(&c, again).await.unwrap_err()),
            "ALREADY_EXISTS"
        );
        rig.exec(&c, "e", rig.process(&["true"])).await.unwrap();
        assert_eq!(
            code(rig.exec(&c, "e", rig.process(&["true"])).await.unwrap_err()),
            "ALREADY_EXISTS"
        );
        assert_eq!(
            code(rig.signal(&c, "e", 9, false).await.unwrap_err()),
            "FAILED_PRECONDITION"
        );
        assert_eq!(
            code(rig.exec(&c, "", rig.process(&["true"])).await.unwrap_err()),
            "INVALID_ARGUMENT"
        );
        rig.start(&c, "").await.unwrap();
        assert_eq!(rig.exit(&c, "").await, 0);
        assert_eq!(
            code(rig.start(&c, "").await.unwrap_err()),
            "FAILED_PRECONDITION"
        );
        assert_eq!(
            code(rig.start(&c, "e").await.unwrap_err()),
            "FAILED_PRECONDITION"
        );
        assert_eq!(
            code(
                rig.exec(&c, "late", rig.process(&["true"]))
                    .await
                    .unwrap_err()
            ),
            "FAILED_PRECONDITION"
        );
        assert_eq!(
            code(rig.signal(&c, "", 9, true).await.unwrap_err()),
            "NOT_FOUND"
        );
        rig.delete(&c, "e").await.unwrap();
        rig.delete(&c, "").await.unwrap();
        assert_eq!(code(rig.delete(&c, "").await.unwrap_err()), "NOT_FOUND");
        let c = rig.sleeper().await;
        assert_eq!(
            code(rig.delete(&c, "").await.unwrap_err()),
            "FAILED_PRECONDITION"
        );
        rig.remove(&c).await;
        // Created and never started.
        let c = rig.create(rig.spec(&["true"])).await.unwrap().id;
        rig.delete(&c, "").await.unwrap();
        assert_eq!(rig.exit(&c, "").await, 137);
    });
}

#[test]
fn a_paused_container_stands_still() {
    with_rig!(rig, {
        let spec = rig.spec(&[
            "sh",
            "-c",
            "sleep 60 & while :; do echo x; sleep 0.01; done",
        ]);
        let c = rig.create(spec.clone()).await.unwrap();
        rig.start(&c.id, "").await.unwrap();
        c.io.line().await;
        assert!(rig.pids(&spec).len() >= 2);
        rig.pause(&c.id, true).await.unwrap();
        assert_eq!(
            rig.pause(&c.id, true).await.unwrap_err().0,
            "FAILED_PRECONDITION"
        );
        // What was under way when it stopped; then nothing more, where ten lines would have come.
        c.io.drained().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(c.io.drained().await, 0);
        rig.exec(&c.id, "e", rig.process(&["true"])).await.unwrap();
        assert_eq!(
            rig.start(&c.id, "e").await.unwrap_err().0,
            "FAILED_PRECONDITION"
        );
        rig.pause(&c.id, false).await.unwrap();
        c.io.line().await;
        assert!(rig.statistics(&c.id).await.contains_key("cgroup.stat"));
        rig.signal(&c.id, "", 15, true).await.unwrap();
        rig.remove(&c.id).await;
    });
}

#[test]
fn nothing_is_left_behind() {
    with_rig!(rig, {
        let mounts = || {
            std::fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .lines()
                .count()
        };
        let before = mounts();
        let mut spec = rig.spec(&[
            "sh",
            "-c",
            "sleep 1000 & sleep 1000 & mkdir /sys/fs/cgroup/x 2>/dev/null; exit 0",
        ]);
        let path = spec["linux"]["cgroupsPath"].as_str().unwrap().to_string();
        spec["linux"]["cgroupsPath"] = json!(format!("{path}/deeper/still"));
        rig.run_container(spec).await;
        assert!(!rig.cgroup(&path).exists());
        assert_eq!(mounts(), before);
        // Failures, too.
        let mut spec = rig.spec(&["nosuch"]);
        let path = spec["linux"]["cgroupsPath"].as_str().unwrap().to_string();
        spec["linux"]["resources"]["unified"] = json!({"no.such": "1"});
        let error = rig.create(spec.clone()).await.unwrap_err();
        assert!(
            error.1.contains("controller \"no\" not available"),
            "{error:?}"
        );
        spec["linux"]["resources"]["unified"] = json!({});
        rig.create(spec).await.unwrap_err();
        assert!(!rig.cgroup(&path).exists());
    });
}

/// Each exec leaves two processes to the agent: the one that joins the container, and the one in it.
#[test]
fn execs_leave_no_zombie() {
    with_rig!(rig, {
        let c = rig.sleeper().await;
        for i in 0..20 {
            let id = format!("short{i}");
            rig.exec(&c, &id, rig.process(&["true"])).await.unwrap();
            rig.start(&c, &id).await.unwrap();
            assert_eq!(rig.exit(&c, &id).await, 0);
        }
        rig.remove(&c).await;
        // Other tests have children, too, which are zombies for a moment each.
        let mut left = rig::zombies();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while !left.is_empty() && std::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let now = rig::zombies();
            left.retain(|pid| now.contains(pid));
        }
        assert!(left.is_empty(), "{left:?}");
    });
}

#[test]
fn statuses_of_a_burst_come_complete() {
    with_rig!(rig, {
        let c = rig.sleeper().await;
        futures_util::future::join_all((0..20).map(|i| {
            let c = c.clone();
            async move {
                let id = format!("x{i}");
                let none = Io::none();
                rig.exec_with(
                    &c,
                    &id,
                    rig.process(&["sh", "-c", &format!("exit {i}")]),
                    &none,
                )
                .await
                .unwrap();
                let request = StartRequest {
                    container_id: c.clone(),
                    exec_id: id.clone(),
                    ..Default::default()
                };
                assert!(
                    rig.client()
                        .start(Rig::context(), &request)
                        .await
                        .unwrap()
                        .pid
                        > 0
                );
                assert_eq!(rig.exit(&c, &id).await, i);
            }
        }))
        .await;
        rig.remove(&c).await;
    });
}

#[test]
fn a_rehearsal_succeeds_and_leaves_nothing() {
    with_rig!(rig, {
        assert_eq!(rig.rehearsed, Ok(()));
        assert!(!Path::new("/run/husk-rehearsal").exists());
        assert!(!rig.cgroup("husk-rehearsal").exists());
        let c = rig.sleeper().await;
        let request = PrepareRequest::default();
        let again = rig.client().prepare(Rig::context(), &request).await;
        let error = again.unwrap_err().to_string();
        assert!(error.contains("has containers already"), "{error}");
        rig.remove(&c).await;
        // Not even word of its end, which would have come first.
        assert!(!rig.knows_of("husk-rehearsal"));
    });
}
