//! What system calls answer: with arguments that do nothing, so that a filter's or a capability's answer is told from
//! the kernel's own. Where a filter is set each is made by a child, which it may kill.

use super::{Report, answer, content};

/// An address that is nobody's.
const NOWHERE: usize = 8;
const BAD_FD: usize = usize::MAX;

pub fn look(report: &mut Report) {
    let filtered = content("/proc/self/status").contains("Seccomp:\t2");
    for (name, number, args) in calls() {
        let said = if filtered {
            by_a_child(number, args)
        } else {
            answer(number, args)
        };
        report.say(format!("call {name}"), said);
    }
}

type Call = (&'static str, libc::c_long, [usize; 6]);

fn calls() -> Vec<Call> {
    let path = c"/husk-probe-is-not-here".as_ptr() as usize;
    let root = c"/".as_ptr() as usize;
    vec![
        ("getuid-is-root", libc::SYS_getuid, [0; 6]),
        ("chmod", libc::SYS_chmod, [path, 0o600, 0, 0, 0, 0]),
        ("mkdir", libc::SYS_mkdir, [NOWHERE, 0, 0, 0, 0, 0]),
        ("chroot", libc::SYS_chroot, [root, 0, 0, 0, 0, 0]),
        (
            "mount",
            libc::SYS_mount,
            [NOWHERE, NOWHERE, NOWHERE, 0, 0, 0],
        ),
        ("umount2", libc::SYS_umount2, [path, 0, 0, 0, 0, 0]),
        (
            "pivot_root",
            libc::SYS_pivot_root,
            [NOWHERE, NOWHERE, 0, 0, 0, 0],
        ),
        ("setns", libc::SYS_setns, [BAD_FD, 0, 0, 0, 0, 0]),
        ("unshare-bad", libc::SYS_unshare, [1, 0, 0, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0xffff, 0, 0, 0, 0, 0]),
        (
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            [0x3fff_ffff, 0, 0, 0, 0, 0],
        ),
        (
            "kcmp",
            libc::SYS_kcmp,
            [0x3fff_ffff, 0x3fff_ffff, 0, 0, 0, 0],
        ),
        ("bpf", libc::SYS_bpf, [0xffff, NOWHERE, 0, 0, 0, 0]),
        (
            "perf_event_open",
            libc::SYS_perf_event_open,
            [NOWHERE, 0, 0, BAD_FD, 0, 0],
        ),
        (
            "userfaultfd",
            libc::SYS_userfaultfd,
            [0xffff, 0, 0, 0, 0, 0],
        ),
        (
            "io_uring_setup",
            libc::SYS_io_uring_setup,
            [0, NOWHERE, 0, 0, 0, 0],
        ),
        (
            "init_module",
            libc::SYS_init_module,
            [NOWHERE, 0, NOWHERE, 0, 0, 0],
        ),
        (
            "delete_module",
            libc::SYS_delete_module,
            [NOWHERE, 0, 0, 0, 0, 0],
        ),
        (
            "kexec_load",
            libc::SYS_kexec_load,
            [0, 0, 0, 0xffff_ffff, 0, 0],
        ),
        ("swapon", libc::SYS_swapon, [NOWHERE, 0, 0, 0, 0, 0]),
        ("reboot", libc::SYS_reboot, [0, 0, 0, 0, 0, 0]),
        ("acct", libc::SYS_acct, [NOWHERE, 0, 0, 0, 0, 0]),
        (
            "sethostname",
            libc::SYS_sethostname,
            [NOWHERE, 3, 0, 0, 0, 0],
        ),
        (
            "settimeofday",
            libc::SYS_settimeofday,
            [NOWHERE, 0, 0, 0, 0, 0],
        ),
        ("adjtimex", libc::SYS_adjtimex, [NOWHERE, 0, 0, 0, 0, 0]),
        ("iopl", libc::SYS_iopl, [3, 0, 0, 0, 0, 0]),
        ("ioperm", libc::SYS_ioperm, [0xffff_ffff, 1, 1, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, [10, 0, 0, 0, 0, 0]),
        ("setpriority", libc::SYS_setpriority, [9, 0, 0, 0, 0, 0]),
        (
            "open_by_handle_at",
            libc::SYS_open_by_handle_at,
            [BAD_FD, NOWHERE, 0, 0, 0, 0],
        ),
        (
            "name_to_handle_at",
            libc::SYS_name_to_handle_at,
            [BAD_FD, NOWHERE, NOWHERE, NOWHERE, 0, 0],
        ),
        ("add_key", libc::SYS_add_key, [NOWHERE, NOWHERE, 0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0xffff, 0, 0, 0, 0, 0]),
        ("quotactl", libc::SYS_quotactl, [0xffff_ffff, 0, 0, 0, 0, 0]),
        (
            "get_mempolicy",
            libc::SYS_get_mempolicy,
            [NOWHERE, 0, 0, 0, 0, 0],
        ),
        ("mbind", libc::SYS_mbind, [1, 1, 9, 0, 0, 9]),
        (
            "fanotify_init",
            libc::SYS_fanotify_init,
            [0xffff_ffff, 0, 0, 0, 0, 0],
        ),
        (
            "personality",
            libc::SYS_personality,
            [0xffff_ffff, 0, 0, 0, 0, 0],
        ),
        (
            "clone-newuser",
            libc::SYS_unshare,
            [0x1000_0001, 0, 0, 0, 0, 0],
        ),
        ("clone3", libc::SYS_clone3, [NOWHERE, 0, 0, 0, 0, 0]),
        ("socket-netlink", libc::SYS_socket, [16, 3, 0xff, 0, 0, 0]),
        ("socket-packet", libc::SYS_socket, [17, 0xf, 0, 0, 0, 0]),
        ("socket-inet-raw", libc::SYS_socket, [2, 3, 999, 0, 0, 0]),
        ("socket-vsock", libc::SYS_socket, [40, 0xf, 0, 0, 0, 0]),
        ("socket-alg", libc::SYS_socket, [38, 0xf, 0, 0, 0, 0]),
        (
            "setuid-out-of-range",
            libc::SYS_setuid,
            [0xffff_ffff, 0, 0, 0, 0, 0],
        ),
        ("capset", libc::SYS_capset, [NOWHERE, 0, 0, 0, 0, 0]),
        ("seccomp", libc::SYS_seccomp, [0xffff, 0, 0, 0, 0, 0]),
        (
            "landlock_create_ruleset",
            libc::SYS_landlock_create_ruleset,
            [0, 0, 0xff, 0, 0, 0],
        ),
        ("vmsplice", libc::SYS_vmsplice, [BAD_FD, 0, 0, 0, 0, 0]),
        ("none", 9999, [0; 6]),
    ]
}

fn by_a_child(number: libc::c_long, args: [usize; 6]) -> String {
    // SAFETY: this process has one thread; the child makes one call and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let code = match super::call(number, args) {
            Ok(_) => 0,
            Err(error) => error.raw_os_error().unwrap_or(254),
        };
        // SAFETY: ends the child without anything of its parent's being run.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for the child above; the status is ours.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    match () {
        () if waited != child => "no child".to_owned(),
        () if libc::WIFSIGNALED(status) => format!("signal {}", libc::WTERMSIG(status)),
        () => match libc::WEXITSTATUS(status) {
            0 => "0".to_owned(),
            code => super::named(rustix::io::Errno::from_raw_os_error(code)),
        },
    }
}
