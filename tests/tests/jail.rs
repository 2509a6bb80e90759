//! The jail: what a VMM in its guest's hands tries is refused, or its death; and what `husk inspect` shows of one that runs.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::{
        fd::AsFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::symlink,
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    path::Path,
    process::Command,
};

use husk_shim::spawn::{self, Launch};
use husk_tests::{
    command,
    ctr::{Container, Runtime},
};

/// Where the lab installs it.
const JAILBREAK: &str = "/usr/local/lib/husk-tests/husk-jailbreak";
const PLACE: &str = "/var/tmp/husk-jail";

/// What is tried, by whether it is refused without seccomp too; that is the jail's first line.
const REFUSED: [&str; 44] = [
    "open-host-file",
    "make-host-file",
    "open-proc-sys",
    "open-sysfs",
    "open-cgroupfs",
    "open-kvm",
    "proc-sys-by-descriptor",
    "out-of-share",
    "out-of-share-by-link",
    "device-node",
    "open-device",
    "file-handle",
    "socket-packet",
    "connect-tcp",
    "bind-tcp",
    "connect-abstract",
    "connect-path",
    "mount",
    "clone-mount",
    "chroot",
    "new-mount-namespace",
    "new-net-namespace",
    "new-pid-namespace",
    "join-namespace",
    "execve",
    "ptrace-outsider",
    "read-outsider",
    "kill-outsider",
    "kill-outsiders-thread",
    "watch-outsider",
    "limit-outsider",
    "raise-limit",
    "regain-capabilities",
    "real-time",
    "raise-priority",
    "ioperm",
    "iopl",
    "bpf",
    "fanotify",
    "set-hostname",
    "set-clock",
    "kernel-log",
    "accounting",
    "userfaultfd",
];

/// What only seccomp refuses: it harms nobody by itself, but is a way into much of the kernel.
const FILTERED: [&str; 15] = [
    "socket",
    "socket-unix",
    "file-flags",
    "born-in-user-namespace",
    "code-without-file",
    "new-code",
    "changed-code",
    "fork",
    "ptrace-me",
    "kill-itself",
    "another-user",
    "keyctl",
    "io-uring",
    "another-abi",
    "serve-files",
];

/// By whom a VMM is entered: the thread that has the bug.
const ROLES: [&str; 5] = ["service", "vcpu", "vsock", "net", "files"];

/// A process of nobody's pod, and what it offers to those who can reach it.
struct Outsider {
    process: std::process::Child,
    _sockets: (UnixListener, UnixListener, TcpListener),
}

impl Outsider {
    fn new() -> Self {
        let _ = fs::remove_dir_all(PLACE);
        for directory in ["share/a", "share/b"] {
            fs::create_dir_all(Path::new(PLACE).join(directory)).expect("make the share");
        }
        symlink("/etc/passwd", format!("{PLACE}/share/link")).expect("make a link");
        let mut node = Command::new("mknod");
        node.arg(format!("{PLACE}/share/null"))
            .args(["c", "1", "3"]);
        command::run(&mut node, b"").ok();
        let name = SocketAddr::from_abstract_name(b"husk-jail").expect("a name");
        let sockets = (
            UnixListener::bind_addr(&name).expect("listen by name"),
            UnixListener::bind(format!("{PLACE}/socket")).expect("listen by path"),
            TcpListener::bind(("127.0.0.1", 4711)).expect("listen for TCP"),
        );
        let process = Command::new("sleep").arg("86400").spawn();
        Outsider {
            process: process.expect("start a process"),
            _sockets: sockets,
        }
    }

    /// As an ordinary process of root's.
    fn free(&self, attempt: &str) -> String {
        let _ = fs::remove_file(format!("{PLACE}/share/device"));
        let mut tried = Command::new(JAILBREAK);
        tried.args([attempt, &self.process.id().to_string()]);
        command::run(&mut tried, b"").ok().trim().to_owned()
    }

    /// Started as the shim starts the VMM, in the network namespace that everything above listens in.
    fn jailed(&self, layer: &str, role: &str, attempt: &str) -> String {
        let _ = fs::remove_file(format!("{PLACE}/share/device"));
        let (mut ours, machine) = UnixStream::pair().expect("a socket pair");
        let (_descriptors, remote) = UnixStream::pair().expect("a socket pair");
        let mut options = File::options();
        let stderr = options
            .append(true)
            .create(true)
            .open(format!("{PLACE}/stderr"))
            .expect("a log");
        let network = File::open("/proc/self/ns/net").expect("our network");
        let child = spawn::spawn(&Launch {
            core_scheduling: false,
            program: Path::new(JAILBREAK),
            machine: machine.as_fd(),
            descriptors: remote.as_fd(),
            stderr: stderr.as_fd(),
            network: Some(network.as_fd()),
            cgroup: None,
        })
        .expect("start it");
        drop((machine, remote));
        let outsider = self.process.id();
        writeln!(ours, "{layer} {role} {attempt} {outsider}").expect("say what to try");
        let mut answer = String::new();
        BufReader::new(ours)
            .read_line(&mut answer)
            .expect("hear what came of it");
        let end = spawn::reap(&child.pidfd).expect("its end");
        match answer.trim() {
            "" => {
                let said = fs::read_to_string(format!("{PLACE}/stderr")).unwrap_or_default();
                format!("{end} {}", said.lines().last().unwrap_or_default())
            }
            answer => answer.to_owned(),
        }
    }
}

impl Drop for Outsider {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(PLACE);
    }
}

fn is_refusal(answer: &str) -> bool {
    // By the kernel, not by our mistake: an unknown name, a bad address, a call it does not have.
    answer.starts_with("refused: ")
        && [
            "unknown attempt",
            "Bad address",
            "Bad file descriptor",
            "Invalid argument",
            "not implemented",
        ]
        .iter()
        .all(|mistake| !answer.contains(mistake))
}

fn is_death(answer: &str) -> bool {
    answer.starts_with("was killed for a system call that its jail does not allow (SIGSYS)")
}

/// Without this, the tests below would show nothing.
#[test]
fn a_process_of_roots_may_do_it_all() {
    let outsider = Outsider::new();
    for attempt in REFUSED.iter().chain(&FILTERED) {
        assert_eq!(outsider.free(attempt), "done", "{attempt}");
    }
}

#[test]
fn without_seccomp_the_host_is_out_of_reach() {
    let outsider = Outsider::new();
    for attempt in REFUSED {
        let answer = outsider.jailed("unfiltered", "service", attempt);
        assert!(is_refusal(&answer), "{attempt}: {answer}");
    }
    for attempt in FILTERED {
        let answer = outsider.jailed("unfiltered", "service", attempt);
        assert_eq!(answer, "done", "{attempt}: list it as refused");
    }
}

#[test]
fn no_thread_of_a_vmm_may_do_it() {
    let outsider = Outsider::new();
    let mut served = Vec::new();
    for attempt in REFUSED.iter().chain(&FILTERED) {
        for role in ROLES {
            let answer = outsider.jailed("jailed", role, attempt);
            match (*attempt, role) {
                ("serve-files", "files") => served.push(answer),
                _ => assert!(
                    is_refusal(&answer) || is_death(&answer),
                    "{attempt} by {role}: {answer}"
                ),
            }
        }
    }
    // A jail in which nothing works would pass, too.
    assert_eq!(served, ["done"]);
}

fn inspect(pod: &str) -> command::Outcome {
    command::run(Command::new("husk").args(["inspect", pod]), b"")
}

#[test]
fn a_running_vmm_is_in_its_jail() {
    let pod = Container::idle(Runtime::Husk);
    let text = inspect(&pod.id).ok();
    let has = |line: &str| {
        assert!(
            text.lines().any(|found| found == line),
            "no {line:?} in {text}"
        )
    };
    has(&format!("pod: default/{}", pod.id));
    has(&format!("process: {}", pod.pid()));
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts"] {
        has(&format!("namespace {kind}: not the host's"));
    }
    has("user ids: all mapped to themselves");
    has("root: empty, read-only, the only mount");
    has("environment: empty");
    has("limit of core dump: 0 bytes");
    has("limit of locked memory: 0 bytes");
    has("capabilities of what it executes: none");
    assert!(
        !text.contains("limit of writable memory: unlimited"),
        "{text}"
    );

    let inode = "chown dac_override fowner fsetid setgid setuid setfcap";
    has(&format!("capabilities it can ever have: {inode}"));
    let mut names = Vec::new();
    for thread in text.lines().filter(|line| line.starts_with("thread ")) {
        let (name, facts) = thread.split_once(": ").expect("a name and facts");
        let name = name.rsplit(' ').next().unwrap_or_default();
        assert!(facts.ends_with("; no new privileges"), "{thread}");
        // The process's, and but for the nursery the thread's own.
        let filters = if name == "nursery" { 1 } else { 2 };
        assert!(
            facts.starts_with(&format!("seccomp {filters} filters; ")),
            "{thread}"
        );
        let held = match name {
            "nursery" | "fs-request" | "fs-hiprio" => inode,
            _ => "none",
        };
        assert!(facts.contains(&format!("capabilities {held};")), "{thread}");
        names.push(name);
    }
    for name in [
        "husk-vmm",
        "nursery",
        "vcpu0",
        "vsock",
        "fs-request",
        "fs-hiprio",
    ] {
        assert!(names.contains(&name), "no {name} in {text}");
    }

    has("fd 0: /dev/null");
    let mut own = 0;
    for fd in text.lines().filter(|line| line.starts_with("fd ")) {
        assert!(!fd.contains(" on "), "{fd} leads to the host");
        own += usize::from(fd.ends_with("its own descriptors as a directory, cut out of procfs"));
    }
    assert_eq!(own, 1, "{text}");

    // What it says is what the kernel says.
    let pid = pod.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
        assert!(
            status.lines().any(|found| found == line),
            "{line}: {status}"
        );
    }
    let entries = fs::read_dir(format!("/proc/{pid}/root/")).expect("its root");
    assert_eq!(entries.count(), 0);
}

#[test]
fn a_pod_that_is_none_is_named() {
    let outcome = inspect("no-such-pod");
    assert_ne!(outcome.code(), 0);
    assert_eq!(
        outcome.err(),
        "husk inspect: pod \"no-such-pod\": no such pod\n"
    );
}
