//! `process`, and what else says how the first process starts.

use serde_json::{Value, json};

use crate::compare::{Case, Known, LIMITS, compare, compare_first, known, push};

const ALL: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// These, in these sets, and no others.
fn capabilities(spec: &mut Value, sets: &[&str], names: &[&str]) {
    spec["process"]["capabilities"] = json!({});
    for set in sets {
        spec["process"]["capabilities"][*set] = json!(names);
    }
}

const THREE: [&str; 3] = ["bounding", "permitted", "effective"];
const FIVE: [&str; 5] = [
    "bounding",
    "permitted",
    "effective",
    "inheritable",
    "ambient",
];

fn privileged(spec: &mut Value) {
    capabilities(spec, &THREE, &ALL);
    spec["process"]["noNewPrivileges"] = json!(false);
}

fn user(spec: &mut Value) {
    spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
}

#[test]
fn a_pods_first_container_is_runcs() {
    const CASES: &[Case] = &[("as ctr has it", |_| {}), ("all capabilities", privileged)];
    const KNOWN: &[Known] = &[
        known("*", "mount /sys type", "`/sys` read-only"),
        known("all capabilities", "call syslog", "kernel, "),
    ];
    compare_first(CASES, KNOWN);
}

#[test]
fn capabilities_and_users_are_runcs() {
    const CASES: &[Case] = &[
        ("as ctr has it", |_| {}),
        ("no capabilities", |s| capabilities(s, &[], &[])),
        ("all capabilities", privileged),
        ("one capability", |s| {
            capabilities(s, &THREE, &["CAP_CHOWN"])
        }),
        ("ambient", |s| {
            capabilities(s, &FIVE, &["CAP_NET_RAW", "CAP_SYS_NICE"]);
            user(s);
        }),
        ("bounding alone", |s| {
            capabilities(s, &["bounding"], &["CAP_KILL", "CAP_CHOWN"])
        }),
        ("inheritable", |s| {
            capabilities(s, &["bounding", "permitted", "inheritable"], &["CAP_KILL"])
        }),
        ("a user", user),
        ("a user with groups", |s| {
            s["process"]["user"] = json!({ "uid": 7, "gid": 8, "additionalGids": [9, 8, 4000, 9] });
        }),
        ("a user with large numbers", |s| {
            s["process"]["user"] = json!({ "uid": 4_000_000_000_u32, "gid": 4_000_000_001_u32 });
        }),
        ("root of another group", |s| {
            s["process"]["user"] = json!({ "uid": 0, "gid": 1000 })
        }),
        ("new privileges", |s| {
            s["process"]["noNewPrivileges"] = json!(false)
        }),
        ("umask 027", |s| s["process"]["user"]["umask"] = json!(0o27)),
        ("umask 0", |s| s["process"]["user"]["umask"] = json!(0)),
    ];
    const KNOWN: &[Known] = &[
        // The size of the kernel's log.
        known("all capabilities", "call syslog", "kernel, "),
    ];
    compare(CASES, KNOWN);
}

#[test]
#[ignore = "long: make test-long"]
fn limits_and_scheduling_are_runcs() {
    const CASES: &[Case] = &[
        ("no limits", |s| s["process"]["rlimits"] = json!([])),
        ("every limit", |s| {
            for (index, name) in [
                "AS",
                "CORE",
                "CPU",
                "DATA",
                "FSIZE",
                "LOCKS",
                "MEMLOCK",
                "MSGQUEUE",
                "NICE",
                "NOFILE",
                "NPROC",
                "RSS",
                "RTPRIO",
                "RTTIME",
                "SIGPENDING",
                "STACK",
            ]
            .iter()
            .enumerate()
            {
                // Enough for runc's own init.
                let soft = (1_u64 << 34) + (index as u64) * 4096;
                let soft = if matches!(*name, "NOFILE" | "NICE" | "RTPRIO") {
                    30
                } else {
                    soft
                };
                let name = format!("RLIMIT_{name}");
                push(
                    &mut s["process"]["rlimits"],
                    json!({ "type": name, "soft": soft, "hard": soft + 10 }),
                );
            }
            // Of the base: one of a kind only.
            s["process"]["rlimits"]
                .as_array_mut()
                .expect("limits")
                .remove(0);
        }),
        ("a limit twice", |s| {
            push(
                &mut s["process"]["rlimits"],
                json!({ "type": "RLIMIT_NOFILE", "soft": 1, "hard": 2 }),
            );
        }),
        ("an unlimited limit", |s| {
            s["process"]["rlimits"] =
                json!([{ "type": "RLIMIT_CORE", "soft": u64::MAX, "hard": u64::MAX }]);
        }),
        ("an unknown limit", |s| {
            s["process"]["rlimits"] = json!([{ "type": "RLIMIT_HUSK", "soft": 1, "hard": 2 }]);
        }),
        ("oom score 500", |s| {
            s["process"]["oomScoreAdj"] = json!(500)
        }),
        ("oom score -500", |s| {
            s["process"]["oomScoreAdj"] = json!(-500)
        }),
        ("io priority, real time", |s| {
            s["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_RT", "priority": 3 })
        }),
        ("io priority, best effort", |s| {
            s["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 7 })
        }),
        ("io priority, idle", |s| {
            s["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 })
        }),
        ("nice", |s| {
            s["process"]["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": 7 })
        }),
        ("batch", |s| {
            s["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": -3 })
        }),
        ("idle", |s| {
            s["process"]["scheduler"] = json!({ "policy": "SCHED_IDLE" })
        }),
        ("first in, first out", |s| {
            s["process"]["scheduler"] = json!({ "policy": "SCHED_FIFO", "priority": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"] });
        }),
        ("round robin", |s| {
            s["process"]["scheduler"] = json!({ "policy": "SCHED_RR", "priority": 9 })
        }),
        ("deadline", |s| {
            s["process"]["scheduler"] = json!({
                "policy": "SCHED_DEADLINE", "runtime": 1_000_000, "deadline": 20_000_000, "period": 40_000_000
            });
        }),
    ];
    const KNOWN: &[Known] = &[
        known("no limits", "rlimit Max open files", LIMITS),
        known("an unlimited limit", "rlimit Max open files", LIMITS),
    ];
    compare(CASES, KNOWN);
}

#[test]
fn the_rest_of_the_process_is_runcs() {
    const CASES: &[Case] = &[
        ("a directory", |s| s["process"]["cwd"] = json!("/opt/full")),
        ("a directory that is made", |s| {
            s["process"]["cwd"] = json!("/not/here")
        }),
        ("variables twice", |s| {
            s["process"]["env"] =
                json!(["A=1", "B=2", "A=3", "PATH=/bin", "HOME=/x", "EMPTY=", "A=1"]);
        }),
        ("no variables", |s| s["process"]["env"] = json!([])),
        ("a variable that is none", |s| {
            push(&mut s["process"]["env"], json!("NOVALUE"))
        }),
        ("a program in PATH", |s| {
            s["process"]["env"] = json!(["PATH=/nowhere:/"]);
            s["process"]["args"] = json!(["probe", "self"]);
        }),
        ("no program", |s| s["process"]["args"] = json!([])),
        ("a program that is not there", |s| {
            s["process"]["args"] = json!(["/not/here"])
        }),
        ("a terminal", |s| s["process"]["terminal"] = json!(true)),
        ("a terminal with a size", |s| {
            s["process"]["terminal"] = json!(true);
            s["process"]["consoleSize"] = json!({ "width": 77, "height": 33 });
        }),
        ("a terminal of a user", |s| {
            s["process"]["terminal"] = json!(true);
            user(s);
        }),
        ("an AppArmor profile", |s| {
            s["process"]["apparmorProfile"] = json!("unconfined")
        }),
        ("an AppArmor profile that is not there", |s| {
            s["process"]["apparmorProfile"] = json!("husk-nothing")
        }),
        ("an SELinux label", |s| {
            s["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0")
        }),
        ("annotations", |s| {
            s["annotations"] = json!({ "org.example.key": "value" })
        }),
        ("a hook in the container", |s| {
            s["hooks"] = json!({ "startContainer": [{ "path": "/probe", "args": ["probe", "plant", "/tmp/planted", "2"] }] });
            crate::compare::look_at(s, &["/tmp/planted/owner-1-65534"]);
        }),
        ("a hook in the container that fails", |s| {
            s["hooks"] =
                json!({ "startContainer": [{ "path": "/probe", "args": ["probe", "no-verb"] }] });
        }),
        ("personality", |s| {
            s["linux"]["personality"] = json!({ "domain": "LINUX32" })
        }),
    ];
    const NOTICE: &str = "`process.apparmorProfile`";
    const KNOWN: &[Known] = &[
        known("no variables", "environment", "`HOME` where"),
        known("an SELinux label", "start", NOTICE),
        known("an AppArmor profile that is not there", "start", NOTICE),
    ];
    compare(CASES, KNOWN);
}
