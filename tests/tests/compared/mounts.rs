//! `mounts`, `root`, and what makes parts of them invisible or read-only.

use serde_json::{Value, json};

use crate::compare::{Case, Known, ROOT, compare, known, look_at, make_sources, mount, push};

fn bind(spec: &mut Value, source: &str, destination: &str, options: &[&str]) {
    let source = format!("/var/tmp/spec-sources/{source}");
    mount(spec, destination, "bind", &source, options);
    look_at(spec, &[destination]);
}

/// Replaces the options of a mount of the base.
fn options(spec: &mut Value, destination: &str, options: &[&str]) {
    for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == destination {
            mount["options"] = json!(options);
        }
    }
}

fn without(spec: &mut Value, destination: &str) {
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.retain(|mount| mount["destination"] != destination);
    }
}

#[test]
#[ignore = "long: make test-long"]
fn file_systems_are_runcs() {
    const CASES: &[Case] = &[
        ("tmpfs with options", |s| {
            mount(
                s,
                "/mnt",
                "tmpfs",
                "name",
                &[
                    "noexec",
                    "nodev",
                    "noatime",
                    "size=64k",
                    "mode=1711",
                    "uid=5",
                    "gid=6",
                ],
            );
            look_at(s, &["/mnt"]);
        }),
        ("tmpfs, read-only", |s| {
            mount(s, "/mnt", "tmpfs", "tmpfs", &["ro", "nr_inodes=30"]);
            look_at(s, &["/mnt"]);
        }),
        ("tmpfs with what was there", |s| {
            mount(s, "/opt/full", "tmpfs", "tmpfs", &["tmpcopyup", "size=1m"]);
            look_at(s, &["/opt/full", "/opt/full/file"]);
        }),
        ("tmpfs that is shared", |s| {
            mount(s, "/mnt", "tmpfs", "tmpfs", &["shared"])
        }),
        ("tmpfs that is unbindable", |s| {
            mount(s, "/mnt", "tmpfs", "tmpfs", &["unbindable"])
        }),
        ("tmpfs in a new directory", |s| {
            mount(
                s,
                "/new/place",
                "tmpfs",
                "tmpfs",
                &["strictatime", "sync", "dirsync"],
            )
        }),
        ("tmpfs over a link", |s| {
            mount(s, "/mnt/link", "tmpfs", "tmpfs", &[])
        }),
        ("tmpfs in tmpfs", |s| {
            mount(s, "/mnt", "tmpfs", "outer", &["size=1m"]);
            mount(s, "/mnt/deep/in", "tmpfs", "inner", &["nosuid"]);
        }),
        ("terminals with options", |s| {
            options(
                s,
                "/dev/pts",
                &[
                    "newinstance",
                    "ptmxmode=0600",
                    "mode=0600",
                    "gid=7",
                    "max=9",
                ],
            )
        }),
        ("no terminals", |s| without(s, "/dev/pts")),
        ("message queues, executable", |s| {
            options(s, "/dev/mqueue", &[])
        }),
        ("a second proc", |s| {
            mount(s, "/mnt", "proc", "proc", &["ro", "hidepid=2"])
        }),
        ("proc with options", |s| {
            options(s, "/proc", &["subset=pid"])
        }),
        ("sys, writable", |s| options(s, "/sys", &["nosuid"])),
        ("cgroup, writable", |s| {
            options(s, "/sys/fs/cgroup", &["rw", "nosuid"])
        }),
        ("cgroup2 by name", |s| {
            without(s, "/sys/fs/cgroup");
            mount(s, "/sys/fs/cgroup", "cgroup2", "cgroup", &["ro"]);
        }),
        ("no cgroup", |s| without(s, "/sys/fs/cgroup")),
        ("no dev", |s| {
            for destination in ["/dev", "/dev/pts", "/dev/shm", "/dev/mqueue"] {
                without(s, destination);
            }
        }),
        ("dev, read-only", |s| {
            options(s, "/dev", &["nosuid", "mode=755", "ro"])
        }),
        ("an unknown type", |s| {
            mount(s, "/mnt", "huskfs", "none", &[])
        }),
        ("an unknown option", |s| {
            mount(s, "/mnt", "tmpfs", "tmpfs", &["nonsense"])
        }),
    ];
    const NODES: &str = "device nodes that are bound";
    const KNOWN: &[Known] = &[
        known("no dev", "mount /dev/*", NODES),
        known("no dev", "mount /proc/keys *", NODES),
        known("no dev", "mount /proc/timer_list *", NODES),
        known("no dev", "mknod *", "device nodes in the root"),
        known("proc with options", "start", "`proc` with `subset=pid`"),
    ];
    compare(CASES, KNOWN);
}

#[test]
#[ignore = "long: make test-long"]
fn binds_and_roots_are_runcs() {
    const CASES: &[Case] = &[
        ("a directory", |s| bind(s, "directory", "/mnt", &["bind"])),
        ("a directory, read-only", |s| {
            bind(s, "directory", "/mnt", &["rbind", "ro"])
        }),
        ("a directory, read-only to the bottom", |s| {
            bind(s, "directory", "/mnt", &["rbind", "rro"])
        }),
        ("a directory without much", |s| {
            bind(
                s,
                "directory",
                "/mnt",
                &["rbind", "nosuid", "nodev", "noexec", "noatime"],
            )
        }),
        ("a directory, without much to the bottom", |s| {
            bind(
                s,
                "directory",
                "/mnt",
                &["rbind", "rnosuid", "rnodev", "rnoexec"],
            )
        }),
        ("a directory, private", |s| {
            bind(s, "directory", "/mnt", &["rbind", "rprivate"])
        }),
        ("a directory, slave", |s| {
            bind(s, "directory", "/mnt", &["rbind", "rslave"])
        }),
        ("a directory in a new place", |s| {
            bind(s, "directory", "/new/place", &["rbind"])
        }),
        ("a directory without symbolic links", |s| {
            bind(s, "directory", "/mnt", &["rbind", "nosymfollow"])
        }),
        ("a file", |s| bind(s, "file", "/mnt/file", &["bind"])),
        ("a file, read-only", |s| {
            bind(s, "file", "/mnt/file", &["bind", "ro"])
        }),
        ("a file in a new place", |s| {
            bind(s, "file", "/new/file", &["bind", "ro"])
        }),
        ("a file over a link", |s| {
            bind(s, "directory", "/mnt/link", &["rbind"])
        }),
        ("binds in binds", |s| {
            bind(s, "directory", "/mnt", &["rbind"]);
            bind(s, "file", "/mnt/file", &["bind", "ro"]);
            mount(s, "/mnt/below", "tmpfs", "tmpfs", &["size=64k"]);
        }),
        ("a bind that is not there", |s| {
            bind(s, "nothing", "/mnt", &["rbind"])
        }),
        ("a bind below dev", |s| {
            bind(s, "directory", "/dev/husk", &["rbind", "ro"])
        }),
        ("a bind by its type alone", |s| {
            bind(s, "directory", "/mnt", &[])
        }),
        ("a root that is read-only", |s| {
            s["root"]["readonly"] = json!(true)
        }),
        ("a root that is read-only, with volumes", |s| {
            s["root"]["readonly"] = json!(true);
            bind(s, "directory", "/mnt", &["rbind", "rw"]);
            mount(s, "/tmp", "tmpfs", "tmpfs", &["mode=1777"]);
        }),
        ("a root that is private", |s| {
            s["linux"]["rootfsPropagation"] = json!("private")
        }),
        ("a root that is slave", |s| {
            s["linux"]["rootfsPropagation"] = json!("rslave")
        }),
        ("a root that is shared", |s| {
            s["linux"]["rootfsPropagation"] = json!("shared")
        }),
        ("a root that is unbindable", |s| {
            s["linux"]["rootfsPropagation"] = json!("unbindable")
        }),
        ("nothing masked", |s| {
            s["linux"]["maskedPaths"] = json!([]);
            s["linux"]["readonlyPaths"] = json!([]);
        }),
        ("more masked", |s| {
            for path in ["/opt/full", "/etc/passwd", "/not/here", "/mnt/link"] {
                push(&mut s["linux"]["maskedPaths"], json!(path));
            }
            look_at(s, &["/opt/full", "/etc/passwd", "/not/here", "/mnt/link"]);
        }),
        ("more read-only", |s| {
            for path in ["/opt/full", "/etc/passwd", "/not/here", "/tmp"] {
                push(&mut s["linux"]["readonlyPaths"], json!(path));
            }
            look_at(s, &["/opt/full", "/etc/passwd", "/not/here"]);
        }),
        ("a mount label", |s| {
            s["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0")
        }),
        ("a mapped bind", |s| {
            bind(s, "directory", "/mnt", &["rbind", "idmap"]);
            if let Some(mount) = s["mounts"]
                .as_array_mut()
                .and_then(|mounts| mounts.last_mut())
            {
                mount["uidMappings"] = json!([{ "containerID": 0, "hostID": 1000, "size": 1000 }]);
                mount["gidMappings"] = json!([{ "containerID": 0, "hostID": 1000, "size": 1000 }]);
            }
        }),
    ];
    const KNOWN: &[Known] = &[
        known("*", "mount /mnt* root", ROOT),
        known("*", "mount /mnt* source", ROOT),
        known("*", "mount /mnt* type", ROOT),
        known("*", "mount /new/* root", ROOT),
        known("*", "mount /new/* source", ROOT),
        known("*", "mount /new/* type", ROOT),
        known("a bind below dev", "mount /dev/husk root", ROOT),
        known("a bind below dev", "mount /dev/husk source", ROOT),
        known("a bind below dev", "mount /dev/husk type", ROOT),
        known("a file over a link", "mount /opt/full root", ROOT),
        known("a file over a link", "mount /opt/full source", ROOT),
        known("a file over a link", "mount /opt/full type", ROOT),
        known("more read-only", "mount * source", ROOT),
        known("more read-only", "mount * type", ROOT),
        known("a mapped bind", "mount /mnt options", "`idmap`"),
        known(
            "a bind by its type alone",
            "start",
            "a mount of type `bind`",
        ),
        known("a mount label", "start", "`process.apparmorProfile`"),
    ];
    make_sources();
    compare(CASES, KNOWN);
}
