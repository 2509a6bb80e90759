//! `linux.seccomp`: each action, each comparison, filters that do not load.

use serde_json::{Value, json};

use crate::compare::{Case, Known, compare};

/// Everything goes but these calls, which `action` answers.
fn filter(spec: &mut Value, names: &[&str], action: &str) {
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [{ "names": names, "action": action }],
    });
}

/// `chmod` fails where its arguments are such.
fn where_arguments(spec: &mut Value, arguments: Value) {
    filter(spec, &["setpriority", "socket"], "SCMP_ACT_ERRNO");
    spec["linux"]["seccomp"]["syscalls"][0]["errnoRet"] = json!(99);
    spec["linux"]["seccomp"]["syscalls"][0]["args"] = arguments;
}

#[test]
#[ignore = "long: make test-long"]
fn seccomp_filters_are_runcs() {
    const CASES: &[Case] = &[
        ("errno", |s| {
            filter(s, &["chmod", "mkdir", "add_key"], "SCMP_ACT_ERRNO")
        }),
        ("errno of one's own", |s| {
            filter(s, &["chmod", "mkdir"], "SCMP_ACT_ERRNO");
            s["linux"]["seccomp"]["syscalls"][0]["errnoRet"] = json!(38);
        }),
        ("errno for the rest", |s| {
            filter(
                s,
                &["chmod", "sethostname", "reboot", "swapon"],
                "SCMP_ACT_ALLOW",
            );
            s["linux"]["seccomp"]["syscalls"][0]["names"] = json!(MOST);
            s["linux"]["seccomp"]["defaultAction"] = json!("SCMP_ACT_ERRNO");
            s["linux"]["seccomp"]["defaultErrnoRet"] = json!(97);
        }),
        ("kill", |s| filter(s, &["chmod"], "SCMP_ACT_KILL")),
        ("kill the thread", |s| {
            filter(s, &["chmod"], "SCMP_ACT_KILL_THREAD")
        }),
        ("kill the process", |s| {
            filter(s, &["chmod"], "SCMP_ACT_KILL_PROCESS")
        }),
        ("trap", |s| filter(s, &["chmod"], "SCMP_ACT_TRAP")),
        ("trace", |s| filter(s, &["chmod"], "SCMP_ACT_TRACE")),
        ("log", |s| filter(s, &["chmod"], "SCMP_ACT_LOG")),
        ("notify without a listener", |s| {
            filter(s, &["chmod"], "SCMP_ACT_NOTIFY")
        }),
        ("an unknown call", |s| {
            filter(s, &["chmod", "husk_call"], "SCMP_ACT_ERRNO")
        }),
        ("an unknown action", |s| {
            filter(s, &["chmod"], "SCMP_ACT_HUSK")
        }),
        ("an unknown architecture", |s| {
            filter(s, &["chmod"], "SCMP_ACT_ERRNO");
            s["linux"]["seccomp"]["architectures"] = json!(["SCMP_ARCH_HUSK"]);
        }),
        ("no calls", |s| {
            s["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW" })
        }),
        ("flags", |s| {
            filter(s, &["chmod"], "SCMP_ACT_ERRNO");
            s["linux"]["seccomp"]["flags"] =
                json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"]);
        }),
        ("equal", |s| {
            where_arguments(s, json!([{ "index": 0, "value": 9, "op": "SCMP_CMP_EQ" }]))
        }),
        ("not equal", |s| {
            where_arguments(s, json!([{ "index": 0, "value": 16, "op": "SCMP_CMP_NE" }]))
        }),
        ("less", |s| {
            where_arguments(s, json!([{ "index": 0, "value": 17, "op": "SCMP_CMP_LT" }]))
        }),
        ("less or equal", |s| {
            where_arguments(s, json!([{ "index": 0, "value": 17, "op": "SCMP_CMP_LE" }]))
        }),
        ("greater", |s| {
            where_arguments(s, json!([{ "index": 0, "value": 17, "op": "SCMP_CMP_GT" }]))
        }),
        ("greater or equal", |s| {
            where_arguments(s, json!([{ "index": 0, "value": 17, "op": "SCMP_CMP_GE" }]))
        }),
        ("masked", |s| {
            where_arguments(
                s,
                json!([{ "index": 0, "value": 0x30, "valueTwo": 0x20, "op": "SCMP_CMP_MASKED_EQ" }]),
            )
        }),
        ("two arguments", |s| {
            where_arguments(
                s,
                json!([
                    { "index": 0, "value": 16, "op": "SCMP_CMP_EQ" },
                    { "index": 1, "value": 3, "op": "SCMP_CMP_EQ" },
                ]),
            );
        }),
        ("one argument twice", |s| {
            where_arguments(
                s,
                json!([
                    { "index": 0, "value": 16, "op": "SCMP_CMP_EQ" },
                    { "index": 0, "value": 17, "op": "SCMP_CMP_EQ" },
                ]),
            );
        }),
        ("a filter and new privileges", |s| {
            filter(s, &["chmod"], "SCMP_ACT_ERRNO");
            s["process"]["noNewPrivileges"] = json!(false);
        }),
    ];
    const KNOWN: &[Known] = &[];
    compare(CASES, KNOWN);
}

/// Enough for a static program to look around.
const MOST: &[&str] = &[
    "access",
    "arch_prctl",
    "bind",
    "brk",
    "capget",
    "capset",
    "chdir",
    "clock_gettime",
    "clone",
    "clone3",
    "close",
    "connect",
    "dup",
    "dup2",
    "dup3",
    "epoll_create1",
    "epoll_ctl",
    "epoll_pwait",
    "execve",
    "exit",
    "exit_group",
    "faccessat2",
    "fchdir",
    "fchown",
    "fcntl",
    "fork",
    "fstat",
    "fstatfs",
    "futex",
    "getcwd",
    "getdents64",
    "getpid",
    "getppid",
    "getrandom",
    "gettid",
    "getuid",
    "ioctl",
    "ioprio_get",
    "keyctl",
    "lseek",
    "lstat",
    "madvise",
    "mkdir",
    "mkdirat",
    "mknod",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "personality",
    "pipe2",
    "poll",
    "ppoll",
    "prctl",
    "pread64",
    "prlimit64",
    "read",
    "readlink",
    "readlinkat",
    "rmdir",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "sched_getaffinity",
    "sched_getattr",
    "sched_yield",
    "set_robust_list",
    "set_tid_address",
    "setgid",
    "setgroups",
    "setuid",
    "sigaltstack",
    "statx",
    "tgkill",
    "uname",
    "unlink",
    "unlinkat",
    "wait4",
    "write",
    "writev",
];
