//! The containerd that the lab was asked for, and that it can be taken away and changed under what runs.

use std::fs;

use husk_tests::{
    census::Census,
    command,
    containerd::{self, Restored, Version},
    ctr::{Container, Run, Runtime, ctr},
    settings::Settings,
};
use serde_json::{Value, json};

/// The lab's runner names it in the environment; without, anything could be taken for it.
fn asked_for() -> Version {
    let name = std::env::var("HUSK_LAB_CONTAINERD").expect("the lab names its containerd");
    name.parse().expect("a version that the lab has")
}

fn assert_all_are(version: Version) {
    let start = format!("{}.", version.name());
    let server = containerd::served().expect("ask for the version");
    assert!(
        server.starts_with(&start),
        "{server} serves, not {version:?}"
    );
    let client = command::run(&mut ctr(&["--version"]), b"").ok();
    assert!(client.contains(&format!(" {start}")), "{client}");
    let shim = command::run(
        std::process::Command::new("containerd-shim-runc-v2").arg("-v"),
        b"",
    );
    let shim = shim.ok();
    assert!(shim.contains(&format!(" {start}")), "{shim}");
}

#[test]
fn server_client_and_runcs_shim_are_of_the_version_asked_for() {
    assert_all_are(asked_for());
}

#[test]
fn it_is_killed_and_upgraded_and_comes_back() {
    let restored = Restored::when_dropped();
    let before = containerd::pid().expect("it runs");
    containerd::kill().expect("kill");
    assert_eq!(containerd::pid(), None);
    containerd::start().expect("start");
    assert_ne!(containerd::pid().expect("it runs again"), before);

    containerd::change_to(asked_for().other()).expect("change");
    assert_all_are(asked_for().other());
    for runtime in [Runtime::Runc, Runtime::Husk] {
        let out = Run::husk(&["echo", "hello"]).runtime(runtime).go().ok();
        assert_eq!(out, "hello\n");
    }
    drop(restored);
    assert_all_are(asked_for());
}

/// The third version of the task service is what containerd 2 has. 1.7 refuses it, and leaves the shim to itself, which
/// ends when nobody has called it for two minutes.
#[test]
fn the_third_task_service_is_spoken_where_that_is_configured() {
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let settings = Settings::write("task_api = 3\n");
    if asked_for() == Version::V1_7 {
        let outcome = Run::husk(&["true"]).go();
        assert_ne!(outcome.code(), 0);
        assert!(outcome.err().contains("version"), "{outcome:?}");
        return;
    }
    let pod = Container::idle(Runtime::Husk);
    let path = format!("{}/{}/bootstrap.json", containerd::TASKS, pod.id);
    let answer = fs::read_to_string(path).expect("read what the shim has answered");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(answer["version"], json!(3));
    assert_eq!(pod.exec(&["sh", "-c", "exit 9"]).code(), 9);
    pod.task("pause", &[]).ok();
    pod.task("resume", &[]).ok();
    pod.task("kill", &["-s", "KILL"]).ok();
    pod.wait_stopped();
    pod.remove();
    drop(settings);
    before.assert_restored();
}
