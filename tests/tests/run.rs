//! `ctr run`: a container that is a microVM, and ends as its user expects.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    process::Stdio,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use husk_tests::{
    command::{self, PATIENCE, eventually},
    ctr::{Container, PROBE_MOUNT, Run, Runtime, state},
    settings::{COLD, Settings},
};

#[test]
fn uname_is_the_guest_kernels() {
    let inside = Run::husk(&["uname", "-r"]).go().ok();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").expect("host's release");
    assert!(inside.trim().ends_with("-husk"), "{inside}");
    assert_ne!(inside.trim(), host.trim());
}

#[test]
fn cpuinfo_and_meminfo_are_the_guests() {
    let inside = Run::husk(&["cat", "/proc/cpuinfo", "/proc/meminfo"])
        .go()
        .ok();
    let processors = inside
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    assert_eq!(processors, 1, "{inside}");
    assert!(
        inside.contains("hypervisor"),
        "no hypervisor flag: {inside}"
    );
    let total: u64 = inside
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.trim().strip_suffix(" kB"))
        .and_then(|number| number.parse().ok())
        .expect("MemTotal");
    assert!(
        (100 << 10..=256 << 10).contains(&total),
        "MemTotal {total} kB"
    );
}

#[test]
fn exit_codes_reach_ctr() {
    assert_eq!(Run::husk(&["true"]).go().code(), 0);
    assert_eq!(Run::husk(&["sh", "-c", "exit 42"]).go().code(), 42);
}

#[test]
fn death_by_signal_is_128_and_its_number() {
    for (signal, code) in [("KILL", 137), ("TERM", 143)] {
        let script = format!("kill -{signal} $$; sleep 60");
        // As PID 1 a shell does not die of its own signals: one level down it does.
        let outcome = Run::husk(&["sh", "-c", &format!("sh -c '{script}'; exit $?")]).go();
        assert_eq!(outcome.code(), code, "{signal}: {outcome:?}");
    }
}

#[test]
fn kill_from_outside_ends_it_with_137() {
    let id = husk_tests::ctr::fresh_id("kill");
    let running = Run::husk(&["sleep", "86400"]).start_and_see(&id);
    command::run(
        &mut husk_tests::ctr::ctr(&["task", "kill", "-s", "KILL", &id]),
        b"",
    )
    .ok();
    assert_eq!(running.finish().code(), 137);
}

#[test]
fn a_sigterm_handler_runs() {
    let id = husk_tests::ctr::fresh_id("term");
    let script = "trap 'echo handled; exit 7' TERM; echo ready; while :; do sleep 1; done";
    let running = Run::husk(&["sh", "-c", script]).start_and_see(&id);
    // The handler is set a moment after the task is running: ask until it is seen to work.
    let ended = eventually(Instant::now() + PATIENCE, || {
        command::run(
            &mut husk_tests::ctr::ctr(&["task", "kill", "-s", "TERM", &id]),
            b"",
        );
        (state(&id).as_deref() != Some("RUNNING")).then_some(())
    });
    assert!(ended.is_some(), "{id} ignores SIGTERM");
    let outcome = running.finish();
    assert_eq!(outcome.code(), 7, "{outcome:?}");
    assert!(outcome.out().ends_with("handled\n"), "{outcome:?}");
}

/// Which signal a process died of is told by the agent, not by a shell in between.
#[test]
fn every_deadly_signal_keeps_its_number() {
    let pod = Container::idle(Runtime::Husk);
    for (signal, code) in [("HUP", 129), ("KILL", 137), ("TERM", 143)] {
        let outcome = pod.exec(&["sh", "-c", &format!("kill -{signal} $$; sleep 60")]);
        assert_eq!(outcome.code(), code, "{signal}: {outcome:?}");
    }
}

/// Not with SIGKILL: that ends all of them even if it is sent to the first one alone.
#[test]
fn kill_all_reaches_every_process() {
    // `wait` ends with each signal handled, or at once when nobody is left.
    let script = "trap 'echo handled' TERM; sleep 86400 & sleep 86400 & wait; wait; exit 5";
    let pod = Container::detached(Runtime::Husk, &["--null-io"], &["sh", "-c", script]);
    let extra = command::start(&mut pod.exec_command(&[], &["sleep", "86400"]), b"");
    let seen = eventually(Instant::now() + PATIENCE, || {
        let list = pod.exec(&["ps", "-o", "args"]).out();
        (list
            .lines()
            .filter(|line| line.starts_with("sleep 86400"))
            .count()
            == 3)
            .then_some(())
    });
    assert!(seen.is_some(), "three sleeps never ran");
    pod.task("kill", &["-a", "-s", "TERM"]).ok();
    let stopped = eventually(Instant::now() + PATIENCE / 4, || {
        (pod.state().as_deref() != Some("RUNNING")).then_some(())
    });
    assert!(
        stopped.is_some(),
        "SIGTERM to all left some: {:?}",
        pod.exec(&["ps", "-o", "args"])
    );
    assert_eq!(extra.finish().code(), 143);
}

/// As soon as anything runs, not only once the host has set the clock again.
#[test]
fn the_clock_is_the_hosts_after_a_cold_boot() {
    /// Milliseconds: on a busy machine the time that the shim says may be so old when the agent has it, and
    /// no guest of the lab boots in less.
    const NEARLY: u128 = 150;
    let _settings = Settings::write(COLD);
    let pod = Container::detached(
        Runtime::Husk,
        &["--null-io", "--mount", PROBE_MOUNT],
        &["sleep", "86400"],
    );
    let mut probe = pod
        .exec_command(&[], &["/probe", "clock"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("start ctr");
    let now = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        now.expect("after 1970").as_millis()
    };
    let mut input = probe.stdin.take().expect("piped");
    let mut output = BufReader::new(probe.stdout.take().expect("piped"));
    for _ in 0..3 {
        let before = now();
        writeln!(input).expect("ask");
        let mut said = String::new();
        output.read_line(&mut said).expect("an answer");
        let after = now();
        let guest = said.trim().parse::<u128>().expect("a number") / 1_000_000;
        assert!(
            (before - NEARLY..=after + NEARLY).contains(&guest),
            "{guest}, not from {before} to {after}"
        );
    }
    drop(input);
    assert!(probe.wait().expect("wait for ctr").success());
}

#[test]
fn a_missing_working_directory_is_made_as_under_runc() {
    for flags in [
        &["--cwd", "/no/such/directory"][..],
        &["--cwd", "/no/such/directory", "--read-only"],
        &["--cwd", "/etc/passwd/directory"],
    ] {
        let [husk, runc] = [Runtime::Husk, Runtime::Runc].map(|runtime| {
            let outcome = Run::husk(&["sh", "-c", "pwd; ls -ld ."])
                .runtime(runtime)
                .flags(flags)
                .go();
            let error = outcome.err();
            let cause = error.trim().rsplit(": ").next().map(str::to_owned);
            // Without the time, which differs.
            let said: Vec<_> = outcome
                .out()
                .split_whitespace()
                .take(5)
                .map(str::to_owned)
                .collect();
            (outcome.code(), said, cause)
        });
        assert_eq!(husk, runc, "{flags:?}");
    }
}

/// systemd raises the kernel's bound, and clients pass on the host's limit.
#[test]
fn as_many_files_as_on_a_host_may_be_asked_for() {
    let script = "ulimit -Hn 1073741816 && ulimit -Hn";
    let flags = ["--privileged", "--privileged-without-host-devices"];
    let out = Run::husk(&["sh", "-c", script]).flags(&flags).go().ok();
    assert_eq!(out, "1073741816\n");
}
