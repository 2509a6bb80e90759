//! What a process is and may do: real containers on this machine, as in `containers`.
//!
//! Needs root, cgroup v2 and busybox-static; what is missing is said, and nothing is tested then.

// A test that cannot go on has to fail where it stands.
#![allow(clippy::unwrap_used, clippy::expect_used)]

// Each of the two test programs uses a part of it.
#[allow(dead_code)]
mod rig;

use rig::{Rig, rig};
use serde_json::{Value, json};

/// Runs the test with the rig, if this machine has what it takes.
macro_rules! with_rig {
    ($rig:ident, $body:block) => {
        let Some($rig) = rig() else { return };
        $rig.run(async $body)
    };
}

/// What a process that is added to the container says, and its status.
async fn added(rig: &Rig, id: &str, exec: &str, process: Value) -> (u32, String) {
    let io = rig.exec(id, exec, process).await.unwrap();
    if let Err((_, words)) = rig.start(id, exec).await {
        rig.delete(id, exec).await.unwrap();
        return (u32::MAX, words);
    }
    let (out, err) = io.rest().await;
    let status = rig.exit(id, exec).await;
    rig.delete(id, exec).await.unwrap();
    (status, out + &err)
}

#[test]
fn a_seccomp_profile_holds_for_init_and_added_processes() {
    with_rig!(rig, {
        let script = "mkdir /tmp/x; grep -E '^Seccomp' /proc/self/status; kill -0 $$ && chmod 700 /tmp; echo unreached";
        let said = "mkdir: can't create directory '/tmp/x': Function not implemented\n";
        for no_new_privileges in [true, false] {
            let mut spec = rig.spec(&["sh", "-c", script]);
            spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [
                    {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
                    {"names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_KILL_PROCESS"},
                ]
            });
            let c = rig.create(spec.clone()).await.unwrap();
            let sleeper = {
                let mut spec = spec.clone();
                spec["process"]["args"] = json!(["sleep", "1000"]);
                spec["linux"]["cgroupsPath"] = json!(format!(
                    "{}-b",
                    spec["linux"]["cgroupsPath"].as_str().unwrap()
                ));
                rig.create(spec).await.unwrap().id
            };
            rig.start(&c.id, "").await.unwrap();
            let (out, err) = c.io.rest().await;
            // SIGSYS kills the child of the shell, which goes on.
            assert_eq!(rig.exit(&c.id, "").await, 0, "{out} {err}");
            assert!(err.starts_with(said), "{err}");
            assert!(err.contains("Bad system call"), "{err}");
            assert!(out.contains("Seccomp:\t2\nSeccomp_filters:\t1\n"), "{out}");
            rig.delete(&c.id, "").await.unwrap();

            rig.start(&sleeper, "").await.unwrap();
            let mut process = rig.process(&["sh", "-c", "mkdir /tmp/x; exec chmod 700 /tmp"]);
            process["noNewPrivileges"] = json!(no_new_privileges);
            let (status, said_there) = added(rig, &sleeper, "added", process).await;
            assert_eq!((status, said_there.as_str()), (128 + 31, said));
            rig.remove(&sleeper).await;
        }
    });
}

/// Everything that a static program needs to run, and nothing of what is done before it.
fn bare_profile() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": [
            "execve", "brk", "arch_prctl", "set_tid_address", "set_robust_list", "rseq", "prlimit64", "readlink",
            "readlinkat", "getrandom", "mprotect", "mmap", "munmap", "exit_group", "write", "prctl", "getuid", "fstat",
            "newfstatat", "ioctl",
        ]}]
    })
}

/// With no_new_privs the filter comes last of all; without, loading it takes a capability, so that it has to allow
/// what is done after it (docs of runc and Docker: the profile needs setuid and its like).
#[test]
fn with_no_new_privileges_a_profile_need_not_allow_what_prepares_the_process() {
    with_rig!(rig, {
        let mut spec = rig.spec(&["echo", "runs"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["noNewPrivileges"] = json!(true);
        spec["process"]["capabilities"] = json!({});
        spec["linux"]["seccomp"] = bare_profile();
        let done = rig.run_container(spec.clone()).await;
        assert_eq!(
            (done.status, done.out.as_str()),
            (0, "runs\n"),
            "{}",
            done.err
        );
        spec["process"]["noNewPrivileges"] = json!(false);
        let error = rig.create(spec).await.unwrap_err();
        assert!(error.1.ends_with("operation not permitted"), "{error:?}");
    });
}

#[test]
fn what_seccomp_cannot_give_is_refused_by_name() {
    with_rig!(rig, {
        for (seccomp, field) in [
            (
                json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
                "linux.seccomp.defaultAction: SCMP_ACT_NOTIFY is not supported",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_NOTIFY"}]}),
                "linux.seccomp.syscalls[0].action: SCMP_ACT_NOTIFY is not supported",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x"}),
                "linux.seccomp.listenerPath: ",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_FLY"}),
                "linux.seccomp.defaultAction: unknown variant `SCMP_ACT_FLY`",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_S390X"]}),
                "linux.seccomp: architectures: add S390X",
            ),
            (
                json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_X"]}),
                "linux.seccomp.flags[0]: unknown variant",
            ),
            (
                json!({"syscalls": [{"names": ["bpf"], "action": "SCMP_ACT_ALLOW"}]}),
                "linux.seccomp.defaultAction: is missing",
            ),
        ] {
            let mut spec = rig.spec(&["true"]);
            spec["linux"]["seccomp"] = seccomp;
            let error = rig.create(spec).await.unwrap_err();
            assert_eq!(error.0, "INVALID_ARGUMENT");
            assert!(error.1.starts_with(field), "{}", error.1);
        }
    });
}

#[test]
fn a_process_runs_when_and_where_the_specification_says() {
    with_rig!(rig, {
        // nice (19), rt_priority (40) and policy (41) of proc(5).
        let show = "cut -d' ' -f19,40,41 /proc/self/stat; grep Cpus_allowed_list /proc/self/status";
        let mut spec = rig.spec(&["sh", "-c", show]);
        spec["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 7});
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 6});
        spec["process"]["execCPUAffinity"] = json!({"initial": "0", "final": "0"});
        let done = rig.run_container(spec.clone()).await;
        assert!(done.out.starts_with("7 0 3\n"), "{} {}", done.out, done.err);
        // Not the container's own process.
        let all = std::fs::read_to_string("/proc/self/status").unwrap();
        let all = all
            .lines()
            .find(|line| line.starts_with("Cpus_allowed_list"));
        assert_eq!(done.out.lines().nth(1), all);

        spec["process"]["args"] = json!(["sleep", "1000"]);
        spec["linux"]["cgroupsPath"] = rig.spec(&["true"])["linux"]["cgroupsPath"].clone();
        let c = rig.create(spec).await.unwrap();
        rig.start(&c.id, "").await.unwrap();
        let (_, out) = added(rig, &c.id, "heir", rig.process(&["sh", "-c", show])).await;
        assert_eq!(out, "7 0 3\nCpus_allowed_list:\t0\n");
        for (i, (scheduler, expected)) in [
            (
                json!({"policy": "SCHED_FIFO", "priority": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
                "0 5 1\n",
            ),
            (
                json!({"policy": "SCHED_RR", "priority": 9, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}),
                "0 9 2\n",
            ),
            (json!({"policy": "SCHED_IDLE"}), "0 0 5\n"),
            (json!({"policy": "SCHED_OTHER", "nice": -3}), "-3 0 0\n"),
            (
                json!({"policy": "SCHED_DEADLINE", "flags": ["SCHED_FLAG_RESET_ON_FORK"],
                    "runtime": 10_000_000, "deadline": 100_000_000, "period": 100_000_000}),
                "0 0 6\n",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let mut process = rig.process(&["cut", "-d", " ", "-f19,40,41", "/proc/self/stat"]);
            process["scheduler"] = scheduler.clone();
            // A deadline takes all processors.
            process["execCPUAffinity"] = json!({"initial": "", "final": ""});
            let (status, out) = added(rig, &c.id, &format!("own{i}"), process).await;
            // A host may keep real time for itself; the guest does not.
            if !out.contains("operation not permitted") {
                assert_eq!((status, out.as_str()), (0, expected), "{scheduler}");
            }
        }
        for (i, (field, value, words)) in [
            (
                "execCPUAffinity",
                json!({"final": "1023"}),
                "process.execCPUAffinity.final: set \"1023\": invalid argument",
            ),
            (
                "scheduler",
                json!({"policy": "SCHED_DEADLINE"}),
                "process.scheduler: set Deadline: invalid argument",
            ),
            (
                "scheduler",
                json!({"policy": "SCHED_ISO"}),
                "process.scheduler: set Iso: invalid argument",
            ),
        ]
        .into_iter()
        .enumerate()
        {
            let mut process = rig.process(&["true"]);
            process[field] = value;
            assert_eq!(
                added(rig, &c.id, &format!("wrong{i}"), process).await.1,
                words
            );
        }
        rig.remove(&c.id).await;
    });
}

#[test]
fn the_priority_of_input_and_output_reaches_the_kernel() {
    with_rig!(rig, {
        let mut spec = rig.spec(&["sleep", "1000"]);
        spec["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_RT", "priority": 3});
        let c = rig.create(spec.clone()).await.unwrap();
        rig.start(&c.id, "").await.unwrap();
        let pid = rig.pids(&spec)[0];
        // ioprio_get(2) of IOPRIO_WHO_PROCESS.
        // SAFETY: numbers alone.
        let value = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, pid) };
        assert_eq!(value, 1 << 13 | 3);
        rig.remove(&c.id).await;
    });
}

#[test]
fn what_has_no_effect_in_a_guest_stops_nothing() {
    with_rig!(rig, {
        let mut spec = rig.spec(&["sh", "-c", "grep -E '^Cap(Bnd|Amb)' /proc/self/status"]);
        spec["process"]["apparmorProfile"] = json!("docker-default");
        spec["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
        spec["process"]["user"]["username"] = json!("nobody");
        spec["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0");
        spec["linux"]["intelRdt"] = json!({"closID": "guaranteed"});
        // An unknown one, and one that cannot be raised because it is not inheritable.
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_FLY"], "permitted": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_CHOWN"],
            "inheritable": ["CAP_CHOWN"], "ambient": ["CAP_KILL", "CAP_CHOWN"]
        });
        let done = rig.run_container(spec).await;
        assert_eq!(
            done.out, "CapBnd:\t0000000000000001\nCapAmb:\t0000000000000001\n",
            "{}",
            done.err
        );
    });
}

/// An added process that does not say has what the container has; what it says counts.
#[test]
fn an_added_process_has_the_containers_umask_and_score_unless_it_says_otherwise() {
    with_rig!(rig, {
        let mut spec = rig.spec(&["sleep", "1000"]);
        spec["process"]["user"]["umask"] = json!(0o27);
        spec["process"]["oomScoreAdj"] = json!(55);
        let c = rig.create(spec).await.unwrap();
        rig.start(&c.id, "").await.unwrap();
        let show = "umask; cat /proc/self/oom_score_adj; id -G";
        let mut process = rig.process(&["sh", "-c", show]);
        assert_eq!(
            added(rig, &c.id, "a", process.clone()).await.1,
            "0027\n55\n0\n"
        );
        process["user"] = json!({"uid": 0, "gid": 0, "umask": 0o77, "additionalGids": [7, 8]});
        process["oomScoreAdj"] = json!(66);
        assert_eq!(added(rig, &c.id, "b", process).await.1, "0077\n66\n0 7 8\n");
        rig.remove(&c.id).await;
    });
}

/// A shell script as a hook.
fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["WHO=hook"]})
}

#[test]
fn hooks_run_inside_the_container_in_their_order() {
    with_rig!(rig, {
        let image = rig.fresh_image("hooks");
        let log = "echo $WHO $0 $(id -u) $(hostname) $(readlink /proc/self/ns/mnt) >>/tmp/log; cat >>/tmp/log; echo >>/tmp/log";
        let mut spec = rig.spec(&[
            "sh",
            "-c",
            "echo program >>/tmp/log; cat /tmp/log; readlink /proc/self/ns/mnt",
        ]);
        spec["root"]["path"] = json!(image);
        spec["root"]["readonly"] = json!(false);
        spec["hostname"] = json!("blue");
        spec["annotations"] = json!({"org.example": "x"});
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let at = |name: &str| {
            let mut hook = hook(log);
            hook["args"].as_array_mut().unwrap().push(json!(name));
            hook
        };
        std::fs::set_permissions(
            image.join("tmp"),
            std::os::unix::fs::PermissionsExt::from_mode(0o777),
        )
        .unwrap();
        let open = hook("touch /tmp/log; chmod 666 /tmp/log");
        spec["hooks"] =
            json!({"createContainer": [open, at("a"), at("b")], "startContainer": [at("c")]});
        let c = rig.create(spec).await.unwrap();
        let before = std::fs::read_to_string(image.join("tmp/log")).unwrap();
        assert_eq!(before.lines().count(), 4, "{before}");
        rig.start(&c.id, "").await.unwrap();
        let (out, err) = c.io.rest().await;
        rig.exit(&c.id, "").await;
        rig.delete(&c.id, "").await.unwrap();
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 8, "{out} {err}");
        let namespace = lines[7];
        for (i, (name, user, status)) in [
            ("a", 0, "creating"),
            ("b", 0, "creating"),
            ("c", 1000, "created"),
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(lines[2 * i], format!("hook {name} {user} blue {namespace}"));
            let state: Value = serde_json::from_str(lines[2 * i + 1]).unwrap();
            assert_eq!(
                (&state["id"], &state["status"]),
                (&json!(c.id), &json!(status))
            );
            assert_eq!(
                (&state["pid"], &state["annotations"]["org.example"]),
                (&json!(1), &json!("x"))
            );
            assert!(state["ociVersion"].is_string() && state["bundle"].is_string());
        }
        assert_eq!(lines[6], "program");
        std::fs::remove_dir_all(image).unwrap();
    });
}

#[test]
fn a_hook_that_fails_ends_the_container_in_runcs_words() {
    with_rig!(rig, {
        let mut slow = hook("sleep 1000");
        slow["timeout"] = json!(1);
        for (failing, words) in [
            (
                hook("echo out; echo err >&2; exit 3"),
                "exit status 3, stdout: out, stderr: err",
            ),
            (hook("kill -9 $$"), "signal: killed, stdout: , stderr: "),
            (
                json!({"path": "/no/such"}),
                "fork/exec /no/such: no such file or directory",
            ),
            (
                json!({"path": "/etc/passwd"}),
                "fork/exec /etc/passwd: permission denied",
            ),
            (slow, "hook ran past specified timeout of 1.0s"),
        ] {
            let mut spec = rig.spec(&["true"]);
            let cgroup = rig.cgroup(spec["linux"]["cgroupsPath"].as_str().unwrap());
            spec["hooks"] = json!({"createContainer": [hook("true"), failing.clone()]});
            let error = rig.create(spec.clone()).await.unwrap_err();
            let expected = format!("error running createContainer hook #1: {words}");
            assert_eq!(error, ("INVALID_ARGUMENT".into(), expected));
            assert!(!cgroup.exists());

            spec["hooks"] = json!({"startContainer": [failing]});
            let c = rig.create(spec).await.unwrap();
            let error = rig.start(&c.id, "").await.unwrap_err();
            let expected = format!("error running startContainer hook #0: {words}");
            assert_eq!(error, ("INVALID_ARGUMENT".into(), expected));
            rig.delete(&c.id, "").await.unwrap();
            assert!(!cgroup.exists());
        }
    });
}

#[test]
fn a_start_hook_is_confined_like_the_program() {
    with_rig!(rig, {
        let script = "mkdir /tmp/x 2>&1; grep -E '^(CapEff|Seccomp):' /proc/self/status; false";
        let mut spec = rig.spec(&["true"]);
        spec["process"]["noNewPrivileges"] = json!(true);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        spec["process"]["capabilities"] = json!({});
        spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]});
        spec["hooks"] = json!({"startContainer": [hook(script)]});
        let c = rig.create(spec).await.unwrap();
        let error = rig.start(&c.id, "").await.unwrap_err().1;
        assert!(error.contains("Function not implemented"), "{error}");
        assert!(
            error.contains("CapEff:\t0000000000000000\nSeccomp:\t2"),
            "{error}"
        );
        rig.delete(&c.id, "").await.unwrap();
    });
}
