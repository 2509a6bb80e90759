//! Options and kinds of mounts, and what becomes of the paths that are closed.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

use serde_json::{Value, json};

use crate::rig::{Io, rig};

fn push(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn a_tmpfs_begins_with_what_it_covers() {
    with_rig!(rig, {
        let image = rig.fresh_image("copyup");
        let etc = image.join("etc");
        fs::create_dir_all(etc.join("deep/er")).unwrap();
        fs::write(etc.join("deep/er/file"), "kept").unwrap();
        fs::set_permissions(etc.join("deep"), fs::Permissions::from_mode(0o1770)).unwrap();
        chown(etc.join("deep/er/file"), Some(3), Some(4)).unwrap();
        fs::set_permissions(etc.join("deep/er/file"), fs::Permissions::from_mode(0o4711)).unwrap();
        symlink("/etc/passwd", etc.join("link")).unwrap();
        fs::set_permissions(&etc, fs::Permissions::from_mode(0o750)).unwrap();
        let script = "cd /etc; cat deep/er/file; echo; busybox stat -c '%n %a %u:%g' . deep deep/er/file; readlink link; \
            echo new >passwd && cat passwd; busybox stat -f -c %T .";
        let mut spec = rig.spec(&["sh", "-c", script]);
        spec["root"]["path"] = json!(image);
        push(
            &mut spec,
            json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m"]}),
        );
        let done = rig.run_container(spec).await;
        assert_eq!(
            done.out,
            "kept\n. 750 0:0\ndeep 1770 0:0\ndeep/er/file 4711 3:4\n/etc/passwd\nnew\ntmpfs\n",
            "{}",
            done.err
        );
        assert!(
            fs::read_to_string(etc.join("passwd"))
                .unwrap()
                .starts_with("root:")
        );
        // What does not fit is no half of it.
        fs::write(etc.join("large"), vec![1; 2 << 20]).unwrap();
        let mut spec = rig.spec(&["true"]);
        spec["root"]["path"] = json!(image);
        push(
            &mut spec,
            json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "size=1m"]}),
        );
        let error = rig.create(spec).await.unwrap_err();
        let words =
            "mounts[7] (tmpfs at /etc): tmpcopyup: copy what is there: no space left on device";
        assert_eq!(error.1, words);
        fs::remove_dir_all(image).unwrap();
    });
}

#[test]
fn what_is_mounted_can_be_mounted_anew() {
    with_rig!(rig, {
        let mut spec = rig.spec(&["cat", "/proc/self/mountinfo"]);
        push(
            &mut spec,
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["remount", "nosuid", "ro", "size=1m"]}),
        );
        push(
            &mut spec,
            json!({"destination": "/sys", "type": "bind", "source": "none", "options": ["bind", "remount", "nodev"]}),
        );
        let done = rig.run_container(spec).await;
        let line = |at: &str| {
            let line = done
                .out
                .lines()
                .find(|line| line.contains(&format!(" {at} ")));
            let fields: Vec<String> = line.unwrap().split(' ').map(str::to_owned).collect();
            (fields[5].clone(), fields.last().unwrap().clone())
        };
        let (of_mount, of_whole) = line("/dev/shm");
        assert_eq!(of_mount, "ro,nosuid,relatime", "{}", done.out);
        assert!(of_whole.starts_with("rw,size=1024k"), "{of_whole}");
        assert_eq!(line("/sys").0, "rw,nodev,relatime");
    });
}

#[test]
fn the_root_propagates_as_it_is_told() {
    with_rig!(rig, {
        for (kind, root, below) in [
            ("", false, false),
            ("rprivate", false, false),
            ("slave", false, false),
            ("shared", true, false),
            ("rshared", true, true),
        ] {
            let mut spec = rig.spec(&["cat", "/proc/self/mountinfo"]);
            spec["linux"]["rootfsPropagation"] = json!(kind);
            let done = rig.run_container(spec).await;
            let is_shared = |at: &str| {
                let line = done
                    .out
                    .lines()
                    .find(|line| line.contains(&format!(" {at} ")));
                line.unwrap().contains("shared:")
            };
            assert_eq!((is_shared("/"), is_shared("/dev")), (root, below), "{kind}");
        }
        let mut spec = rig.spec(&["true"]);
        spec["linux"]["rootfsPropagation"] = json!("sideways");
        let error = rig.create(spec).await.unwrap_err();
        assert_eq!(
            error,
            (
                "INVALID_ARGUMENT".into(),
                "linux.rootfsPropagation: \"sideways\" is no propagation".into()
            )
        );
    });
}

#[test]
fn a_bind_is_read_only_as_deep_as_it_says() {
    with_rig!(rig, {
        // /dev of this machine has something mounted in it.
        if !fs::read_to_string("/proc/mounts")
            .unwrap()
            .contains(" /dev/shm ")
        {
            eprintln!("SKIPPED: nothing is mounted in /dev");
            return;
        }
        for (options, top, below) in [
            (json!(["rbind", "ro"]), "ro", "rw"),
            (json!(["rbind", "rro"]), "ro", "ro"),
            (json!(["rbind", "rro", "rw"]), "ro", "ro"),
        ] {
            let mut spec = rig.spec(&["cat", "/proc/self/mountinfo"]);
            push(
                &mut spec,
                json!({"destination": "/m", "type": "bind", "source": "/dev", "options": options}),
            );
            let done = rig.run_container(spec).await;
            let access = |at: &str| {
                let line = done
                    .out
                    .lines()
                    .find(|line| line.contains(&format!(" {at} ")));
                line.unwrap().split(' ').nth(5).unwrap()[..2].to_owned()
            };
            assert_eq!(
                (&*access("/m"), &*access("/m/shm")),
                (top, below),
                "{options}"
            );
        }
    });
}

/// Relative, as the specification allows and old ones have it.
#[test]
fn kinds_of_mounts() {
    with_rig!(rig, {
        let image = rig.fresh_image("kinds");
        for name in ["lower", "upper", "work"] {
            fs::create_dir(image.join(name)).unwrap();
        }
        fs::write(image.join("lower/file"), "from below").unwrap();
        let at = |name: &str| image.join(name).to_str().unwrap().to_owned();
        let layers = [
            format!("lowerdir={}", at("lower")),
            format!("upperdir={}", at("upper")),
            format!("workdir={}", at("work")),
        ];
        let script = "cat /srv/over/file; echo; echo x >/srv/over/new; ls /p | grep -c '^[0-9]'; ls /p | grep -c sys; \
            busybox stat -c '%a %g' /pts/ptmx; ls /srv/over/nested; cat /proc/self/mounts";
        let mut spec = rig.spec(&["sh", "-c", script]);
        spec["root"]["path"] = json!(image);
        for mount in [
            json!({"destination": "srv/over", "type": "overlay", "source": "overlay", "options": layers}),
            json!({"destination": "/srv/over/nested", "type": "tmpfs", "source": "n", "options": ["noatime", "relatime", "mode=0700"]}),
            json!({"destination": "/srv/over/nested/file", "type": "bind", "source": image.join("etc/passwd"), "options": ["bind", "sync", "ro"]}),
            json!({"destination": "/p", "type": "proc", "source": "proc", "options": ["subset=pid", "hidepid=2"]}),
            json!({"destination": "/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0600", "mode=0620", "gid=7"]}),
            json!({"destination": "/mq", "type": "mqueue", "source": "mqueue"}),
        ] {
            push(&mut spec, mount);
        }
        let done = rig.run_container(spec).await;
        let mut lines = done.out.lines();
        assert_eq!(lines.next(), Some("from below"), "{}", done.err);
        let processes: u32 = lines.next().unwrap().parse().unwrap();
        assert!(processes >= 1);
        assert_eq!(lines.next(), Some("0"), "subset=pid leaves nothing else");
        assert_eq!(lines.next(), Some("600 0"));
        assert_eq!(lines.next(), Some("file"));
        for line in [
            "overlay /srv/over overlay rw,relatime,lowerdir=",
            "n /srv/over/nested tmpfs rw,noatime,mode=700",
            " /srv/over/nested/file ",
            "proc /p proc rw,relatime,hidepid=invisible,subset=pid",
            "devpts /pts devpts rw,relatime,gid=7,mode=620,ptmxmode=600",
            "mqueue /mq mqueue rw,relatime",
        ] {
            assert!(done.out.contains(line), "{line}:\n{}", done.out);
        }
        assert!(image.join("upper/new").exists());
        assert!(image.join("srv/over").metadata().unwrap().uid() == 0);
        fs::remove_dir_all(image).unwrap();
    });
}

#[test]
fn closed_paths_are_closed_as_runc_closes_them() {
    with_rig!(rig, {
        let image = rig.fresh_image("closed");
        fs::create_dir_all(image.join("secret/below")).unwrap();
        fs::write(image.join("secret/file"), "seen").unwrap();
        symlink("/secret", image.join("alias")).unwrap();
        let script = "ls /secret; echo x >/secret/new; cat /etc/passwd; echo x >/home/new; echo x >/home/u/new; \
            busybox tail -n 4 /proc/self/mountinfo";
        let mut spec = rig.spec(&["sh", "-c", script]);
        spec["root"]["path"] = json!(image);
        // By a link, which leads to what it says inside.
        spec["linux"]["maskedPaths"] = json!(["/nosuch/path", "/alias", "/etc/passwd"]);
        spec["linux"]["readonlyPaths"] = json!(["/nosuch", "/home", "/home"]);
        let done = rig.run_container(spec).await;
        assert_eq!(
            done.err.matches("Read-only file system").count(),
            3,
            "{}",
            done.err
        );
        let ends: Vec<&str> = done
            .out
            .lines()
            .filter_map(|line| line.split(" - ").nth(1))
            .collect();
        assert_eq!(ends.len(), 4, "{}", done.out);
        assert!(!done.out.contains("root:"), "{}", done.out);
        assert!(ends[2].starts_with("tmpfs tmpfs ro"), "{}", done.out);
        assert!(done.out.contains(" /null /etc/passwd "), "{}", done.out);
        // A file in the place of a directory is not missing.
        for field in ["maskedPaths", "readonlyPaths"] {
            let mut spec = rig.spec(&["true"]);
            spec["linux"][field] = json!(["/etc/passwd/below"]);
            let error = rig.create(spec).await.unwrap_err();
            assert_eq!(
                error.1,
                format!("linux.{field}: /etc/passwd/below: not a directory")
            );
        }
        fs::remove_dir_all(image).unwrap();
    });
}

/// By a path that means something inside.
#[test]
fn a_stream_that_is_null_is_the_containers() {
    with_rig!(rig, {
        let image = rig.fresh_image("null");
        let script = "for n in 0 1 2; do readlink /proc/self/fd/$n >>/streams; done; busybox stat -L -c %d /dev/null /proc/self/fd/0 >/devices";
        let mut spec = rig.spec(&["sh", "-c", script]);
        spec["root"]["path"] = json!(image);
        let id = "null-streams";
        rig.create_with(id, spec, &Io::none()).await.unwrap();
        rig.start(id, "").await.unwrap();
        assert_eq!(rig.exit(id, "").await, 0);
        rig.delete(id, "").await.unwrap();
        // What readlink and stat write to is the file.
        let seen = fs::read_to_string(image.join("streams")).unwrap();
        assert_eq!(seen, "/dev/null\n/streams\n/dev/null\n");
        let devices = fs::read_to_string(image.join("devices")).unwrap();
        let (there, given) = devices.trim().split_once('\n').unwrap();
        assert_eq!(there, given);
        fs::remove_dir_all(image).unwrap();
    });
}
