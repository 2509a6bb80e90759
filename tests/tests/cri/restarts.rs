//! Pods whose containerd, shim or VMM goes away under them.

use std::time::Instant;

use husk_proto::cri as api;
use husk_tests::{
    census::Census,
    command::{self, PATIENCE, eventually},
    containerd::{self, Restored},
    cri::{Container, Handler, Pod},
};

pub fn pods_go_on_while_containerd_is_away(handler: Handler) {
    let before = Census::take();
    let _restored = Restored::when_dropped();
    let pod = Pod::run(handler);
    let script = "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.2; done";
    let logs = pod.start(pod.container(&["sh", "-c", script]));
    let ends = pod.start(pod.container(&[
        "sh",
        "-c",
        "while ! test -e /end; do sleep 0.1; done; exit 9",
    ]));
    let address = pod.ip();

    containerd::kill().expect("kill");
    containerd::start().expect("start");
    assert!(pod.is_ready());
    assert_eq!(pod.ip(), address);
    for container in [&logs, &ends] {
        assert_eq!(
            container.status().state,
            api::ContainerState::CONTAINER_RUNNING.into()
        );
        assert_eq!(container.try_exec(&["echo", "hello"]), "hello\n");
    }
    assert_grows(&logs);
    // One joins, as if nothing had happened.
    assert_eq!(pod.try_words(&["hostname"]), "a-pod\n");

    // An end that nobody saw is known later.
    ends.try_exec(&["sh", "-c", "{ sleep 1; touch /end; } >/dev/null 2>&1 &"]);
    containerd::kill().expect("kill");
    std::thread::sleep(std::time::Duration::from_secs(3));
    containerd::start().expect("start");
    assert_eq!(ends.exit_code(), 9);
    assert_grows(&logs);
    // What it had read and not yet written has gone with containerd; nothing comes twice, or in another order.
    let text = logs.logs();
    let numbers = text
        .lines()
        .map(|line| line.strip_prefix("line ")?.parse::<u32>().ok());
    let numbers: Vec<_> = numbers.collect();
    assert!(
        numbers.iter().all(Option::is_some) && numbers.is_sorted_by(|a, b| a < b),
        "{text}"
    );
    pod.end();
    before.assert_restored();
}

#[track_caller]
fn assert_grows(container: &Container) {
    let length = container.logs().len();
    let grown = eventually(Instant::now() + PATIENCE / 4, || {
        (container.logs().len() > length).then_some(())
    });
    assert!(grown.is_some(), "its log stays at {length} bytes");
}

pub fn a_pod_without_shim_or_vmm_is_told_and_removed(handler: Handler) {
    let before = Census::take();
    for comm in ["husk-shim", "husk-vmm"] {
        let pod = Pod::run(handler);
        let container = pod.idle();
        let created = pod.create(pod.container(&["true"])).expect("create");
        let [pid] = command::processes_named(comm)[..] else {
            panic!("{comm}: {:?}", command::processes_named(comm));
        };
        command::kill(pid);
        assert_ne!(container.exit_code(), 0);
        let told = eventually(Instant::now() + PATIENCE / 4, || {
            (!pod.is_ready()).then_some(())
        });
        assert!(told.is_some(), "{comm} is dead, and the pod ready");
        let joined = pod.create(pod.container(&["true"]));
        let joined = joined.and_then(|container| container.start());
        assert!(joined.is_err(), "{comm} is dead, and a container joins");
        let started = created.start();
        assert!(started.is_err(), "{comm} is dead, and a container starts");
        pod.end();
        before.assert_restored();
    }
}
