//! `ctr task exec`: often, at once, and wrongly.

use std::time::Instant;

use husk_tests::{
    command::{self, PATIENCE, eventually},
    ctr::{Container, PROBE_MOUNT, Runtime},
};

#[test]
fn fifty_in_a_row() {
    let pod = Container::idle(Runtime::Husk);
    for round in 0..50 {
        let text = format!("round {round}");
        let outcome = pod.exec(&["sh", "-c", &format!("echo {text}; exit {}", round % 7)]);
        assert_eq!(outcome.code(), round % 7, "{outcome:?}");
        assert_eq!(outcome.out(), format!("{text}\n"));
    }
}

#[test]
fn ten_at_once() {
    let pod = Container::idle(Runtime::Husk);
    let running: Vec<_> = (0..10)
        .map(|number| {
            let script = format!("echo {number}; exit {number}");
            command::start(&mut pod.exec_command(&[], &["sh", "-c", &script]), b"")
        })
        .collect();
    for (number, exec) in (0..).zip(running) {
        let outcome = exec.finish();
        assert_eq!(outcome.code(), number, "{outcome:?}");
        assert_eq!(outcome.out(), format!("{number}\n"));
    }
}

/// The client sees which binary, user or directory it was, and the pod goes on.
#[test]
fn a_wrong_exec_says_what_is_wrong() {
    let pod = Container::idle(Runtime::Husk);
    let missing = pod.exec(&["no-such-binary"]);
    assert_ne!(missing.code(), 0);
    assert!(missing.err().contains("no-such-binary"), "{missing:?}");
    assert!(
        missing.err().contains("executable file not found in $PATH"),
        "{missing:?}"
    );

    let path = pod.exec(&["/no/such/path"]);
    assert_ne!(path.code(), 0);
    assert!(path.err().contains("/no/such/path"), "{path:?}");
    assert!(path.err().contains("no such file or directory"), "{path:?}");

    let cwd = command::run(
        &mut pod.exec_command(&["--cwd", "/no/such/cwd"], &["true"]),
        b"",
    );
    assert_ne!(cwd.code(), 0);
    assert!(cwd.err().contains("/no/such/cwd"), "{cwd:?}");

    assert_eq!(pod.exec(&["echo", "fine"]).ok(), "fine\n");
}

/// ctr looks a user's name up itself: what is refused, and how, must not depend on the runtime.
#[test]
fn an_unknown_user_is_refused_as_under_runc() {
    let said = [Runtime::Husk, Runtime::Runc].map(|runtime| {
        let pod = Container::idle(runtime);
        let mut exec = pod.exec_command(&["--user", "nobody-here"], &["true"]);
        let outcome = command::run(&mut exec, b"");
        assert_ne!(outcome.code(), 0);
        let text = outcome.err().trim().to_owned();
        // Behind the path of ctr's own temporary mount.
        text.rsplit(": ").next().map(str::to_owned)
    });
    assert_eq!(said[0], said[1]);
}

/// The same mistakes give the same words under runc.
#[test]
fn a_wrong_exec_says_it_as_runc_does() {
    let husk = Container::idle(Runtime::Husk);
    let runc = Container::idle(Runtime::Runc);
    for args in [
        &["no-such-binary"][..],
        &["/no/such/path"],
        &["/etc/passwd"],
        &["/etc"],
    ] {
        let (husk, runc) = (husk.exec(args), runc.exec(args));
        let cause = |text: String| text.trim().rsplit(": ").next().map(str::to_owned);
        assert_eq!(
            cause(husk.err()),
            cause(runc.err()),
            "{args:?}: {husk:?} {runc:?}"
        );
        assert_eq!(husk.code(), runc.code(), "{args:?}: {husk:?} {runc:?}");
    }
}

#[test]
fn exec_runs_as_the_user_asked_for() {
    let pod = Container::idle(Runtime::Husk);
    let outcome = command::run(
        &mut pod.exec_command(
            &["--user", "1000:1001", "--cwd", "/tmp"],
            &["sh", "-c", "id -u; id -g; pwd"],
        ),
        b"",
    );
    assert_eq!(outcome.ok(), "1000\n1001\n/tmp\n");
}

/// Standard streams travel by vsock, which needs no privilege: a process that reached the agent's port could
/// answer in place of the host for what is executed next.
#[test]
fn a_container_does_not_reach_the_port_of_streams() {
    let pod = Container::detached(
        Runtime::Husk,
        &["--null-io", "--mount", PROBE_MOUNT],
        &["sleep", "86400"],
    );
    let mut probe = pod.exec_command(&["--user", "1000"], &["/probe", "streams"]);
    let said = command::run(&mut probe, b"").ok();
    assert_eq!(said.lines().count(), 2, "{said}");
    assert!(!said.contains("let in"), "{said}");
}

/// As Docker and systemd do: processes in a child, and controllers for the children. What is executed then has
/// no place in the container's own cgroup, and goes where init is.
#[test]
fn exec_works_where_a_container_manages_cgroups() {
    // In a privileged container the whole tree is there. It works once nothing is executed in the meantime.
    let script = "mkdir /tmp/all && mount -t cgroup2 none /tmp/all && \
        cd /tmp/all$(cut -d: -f3 /proc/self/cgroup) && mkdir own && echo 1 >own/cgroup.procs && \
        until echo +pids >cgroup.subtree_control; do sleep 0.1; done && touch /tmp/ready; \
        exec sleep 86400";
    for runtime in [Runtime::Husk, Runtime::Runc] {
        let flags = ["--null-io", "--privileged"];
        let pod = Container::detached(runtime, &flags, &["sh", "-c", script]);
        let ready = eventually(Instant::now() + PATIENCE / 8, || {
            (pod.exec(&["test", "-e", "/tmp/ready"]).code() == 0).then_some(())
        });
        let place = pod.exec(&["cat", "/proc/self/cgroup"]);
        assert!(ready.is_some(), "{runtime:?}: {place:?}");
        assert!(place.ok().trim().ends_with("/own"), "{runtime:?}");
    }
}
