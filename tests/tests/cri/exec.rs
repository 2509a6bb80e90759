//! Commands in containers, what they log, and how they end.

use std::time::Instant;

use husk_proto::cri as api;
use husk_tests::{
    command::{PATIENCE, eventually},
    cri::{self, Container, Handler, Pod},
};
use protobuf::MessageField;

pub fn exec_tells_streams_and_codes_and_keeps_its_limit(handler: Handler) {
    let pod = Pod::run(handler);
    let container = pod.idle();
    let said = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(
        (&*said.stdout, &*said.stderr, said.exit_code),
        (&b"out\n"[..], &b"err\n"[..], 3)
    );
    let refused = cri::refused("ExecSync", &request(&container, &["/no/such/program"], 0));
    assert!(refused.message.contains("/no/such/program"), "{refused}");

    // Whose time is up is killed.
    let late = cri::refused("ExecSync", &request(&container, &["sleep", "44444"], 1));
    assert_eq!(late.code, 4, "{late}");
    let killed = eventually(Instant::now() + PATIENCE, || {
        let processes = container.try_exec(&["ps", "-o", "args"]);
        (!processes.contains("44444")).then_some(())
    });
    assert!(killed.is_some(), "it runs on after its limit");
    pod.end();
}

fn request(container: &Container, words: &[&str], timeout: i64) -> api::ExecSyncRequest {
    api::ExecSyncRequest {
        container_id: container.id.clone(),
        cmd: words.iter().map(|word| (*word).to_owned()).collect(),
        timeout,
        ..Default::default()
    }
}

/// Without the times.
fn tagged(container: &Container) -> Vec<String> {
    let log = container.raw_log();
    log.lines()
        .map(|line| line.split_once(' ').unwrap_or_default().1.into())
        .collect()
}

pub fn logs_say_which_stream_and_where_a_line_ends(handler: Handler) {
    let pod = Pod::run(handler);
    let long = "head -c 20000 /dev/zero | tr '\\0' x; echo";
    let script = format!("echo out; echo err >&2; {long}; printf cut");
    let container = pod.start(pod.container(&["sh", "-c", &script]));
    assert_eq!(container.exit_code(), 0);
    let whole = eventually(Instant::now() + PATIENCE, || {
        let mut lines = tagged(&container);
        lines.sort_by_key(|line| line.starts_with("stderr"));
        (lines.len() == 5).then_some(lines)
    });
    let lines = whole.unwrap_or_else(|| panic!("{}", container.raw_log()));
    assert_eq!(lines[0], "stdout F out");
    assert_eq!(lines[1], format!("stdout P {}", "x".repeat(16384)));
    assert_eq!(lines[2], format!("stdout F {}", "x".repeat(20000 - 16384)));
    assert_eq!(lines[3], "stdout P cut");
    assert_eq!(lines[4], "stderr F err");

    // A terminal has one stream.
    let mut config = pod.container(&["sh", "-c", "echo out; echo err >&2; tty"]);
    config.tty = true;
    let container = pod.start(config);
    assert_eq!(container.exit_code(), 0);
    let whole = eventually(Instant::now() + PATIENCE, || {
        let lines = tagged(&container);
        (lines.len() == 3).then_some(lines)
    });
    let lines = whole.unwrap_or_else(|| panic!("{}", container.raw_log()));
    let lines: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
    assert_eq!(
        lines,
        ["stdout F out", "stdout F err", "stdout F /dev/pts/0"]
    );
    pod.end();
}

pub fn a_stop_asks_first_and_kills_then(handler: Handler) {
    let pod = Pod::run(handler);
    let script = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let polite = pod.start(pod.container(&["sh", "-c", script]));
    wait_for_log(&polite, "ready");
    polite.stop(200).expect("stop");
    let status = polite.status();
    assert_eq!((status.exit_code, &*status.reason), (7, "Error"));
    assert_eq!(polite.logs(), "ready\nasked\n");
    assert!(status.finished_at >= status.started_at && status.started_at >= status.created_at);

    let script = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
    let stubborn = pod.start(pod.container(&["sh", "-c", script]));
    wait_for_log(&stubborn, "ready");
    stubborn.stop(1).expect("stop");
    assert_eq!(stubborn.status().exit_code, 137);
    // Once more, of one that has ended.
    stubborn.stop(1).expect("stop again");

    // The pod's end is theirs.
    let last = pod.idle();
    pod.stop().expect("stop");
    assert!(!pod.is_ready());
    assert_eq!(last.status().exit_code, 137);
    pod.end();
}

#[track_caller]
pub fn wait_for_log(container: &Container, words: &str) {
    let found = eventually(Instant::now() + PATIENCE, || {
        container.logs().contains(words).then_some(())
    });
    assert!(found.is_some(), "no {words:?} in {:?}", container.logs());
}

pub fn what_outgrows_its_memory_is_told(handler: Handler) {
    let pod = Pod::run(handler);
    let mut config = pod.container(&["dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1"]);
    config.linux.mut_or_insert_default().resources =
        MessageField::some(api::LinuxContainerResources {
            memory_limit_in_bytes: 20 << 20,
            ..Default::default()
        });
    let container = pod.start(config);
    assert_eq!(container.exit_code(), 137);
    let told = eventually(Instant::now() + PATIENCE, || {
        (container.status().reason == "OOMKilled").then_some(())
    });
    assert!(told.is_some(), "{:?}", container.status());
    assert!(pod.is_ready());
    pod.end();
}
