//! The containerd that the lab was asked for, and that it can be taken away and changed under what runs.

use husk_tests::{
    command,
    containerd::{self, Restored, Version},
    ctr::{Run, Runtime, ctr},
};

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
