//! Pods beside each other, and what they leave: nothing.

use std::{fs, os::unix::net::UnixListener, process::Command, time::Instant};

use husk_tests::{
    census::Census,
    command::{self, PATIENCE, eventually, signal_by_name},
    ctr::{Container, Run, Runtime, ctr, fresh_id},
};

fn boot_id(pod: &Container) -> String {
    pod.exec(&["cat", "/proc/sys/kernel/random/boot_id"]).ok()
}

#[test]
fn two_pods_are_two_kernels() {
    let first = Container::idle(Runtime::Husk);
    let second = Container::idle(Runtime::Husk);
    assert_ne!(boot_id(&first), boot_id(&second));
    first.exec(&["sh", "-c", "echo mine >/tmp/mark"]).ok();
    assert_ne!(second.exec(&["cat", "/tmp/mark"]).code(), 0);
    assert_eq!(first.exec(&["cat", "/tmp/mark"]).ok(), "mine\n");
}

#[test]
fn a_pod_that_ran_leaves_nothing() {
    // The first of its kind may create directories that stay for good.
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    Run::husk(&["true"]).go().ok();
    before.assert_restored();
}

#[test]
fn a_pod_that_was_killed_leaves_nothing() {
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let first = Container::idle(Runtime::Husk);
    let second = Container::idle(Runtime::Husk);
    first.exec(&["true"]).ok();
    first.remove();
    second.remove();
    before.assert_restored();
}

#[test]
fn a_pod_whose_vmm_dies_is_reported_and_leaves_nothing() {
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let pod = Container::idle(Runtime::Husk);
    signal_by_name("-9", "husk-vmm");
    pod.wait_stopped();
    pod.remove();
    before.assert_restored();
}

/// A guest that answers nothing: its VMM is stopped, and still goes.
#[test]
fn a_pod_that_hangs_is_removed_and_leaves_nothing() {
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let pod = Container::idle(Runtime::Husk);
    signal_by_name("-STOP", "husk-vmm");
    pod.task("kill", &["-s", "9"]).ok();
    pod.wait_stopped();
    pod.remove();
    before.assert_restored();
}

#[test]
fn a_pod_whose_shim_dies_is_reported_and_leaves_nothing() {
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let pod = Container::idle(Runtime::Husk);
    signal_by_name("-9", "containerd-shim-husk-v2");
    pod.wait_stopped();
    pod.remove();
    before.assert_restored();
}

#[test]
fn the_native_snapshotter_works_too() {
    let id = fresh_id("native");
    let mut command = ctr(&["run", "--rm", "--snapshotter", "native", "--runtime"]);
    command
        .args([Runtime::Husk.name(), husk_tests::ctr::IMAGE, &id])
        .args(["sh", "-c", "echo kept >/file && cat /file && uname -r"]);
    let out = command::run(&mut command, b"").ok();
    assert!(
        out.starts_with("kept\n") && out.trim().ends_with("-husk"),
        "{out}"
    );
}

/// What the tests of traces rely on.
#[test]
fn a_trace_of_any_kind_is_seen() {
    let run = |program: &str, args: &[&str]| {
        command::run(Command::new(program).args(args), b"").ok();
    };
    let spawn = |program: &str, args: &[&str]| Command::new(program).args(args).spawn();
    let before = Census::take();

    let (fifo, directory) = ("/run/containerd/fifo/trace", "/run/husk/trace");
    let (socket, cgroup) = ("/run/husk/trace.sock", "/sys/fs/cgroup/trace");
    fs::create_dir_all("/run/containerd/fifo").expect("create");
    run("mkfifo", &[fifo]);
    fs::create_dir_all(directory).expect("create");
    run("mount", &["-t", "tmpfs", "trace", directory]);
    let listener = UnixListener::bind(socket).expect("bind");
    fs::create_dir(cgroup).expect("create");
    fs::copy("/bin/sleep", "/var/tmp/husk-trace").expect("copy");
    let process = spawn("/var/tmp/husk-trace", &["1000"]).expect("spawn");
    let namespace = spawn("unshare", &["--net", "sleep", "1000"]).expect("spawn");

    let wanted = [
        format!("file {fifo}"),
        format!("file {directory}"),
        format!("{directory} rw"),
        format!("socket {socket}"),
        format!("cgroup {cgroup}"),
        format!("process {} husk-trace", process.id()),
        "namespace net:".to_owned(),
    ];
    let missed = |news: &[String]| -> Vec<String> {
        let is_missed = |trace: &&String| !news.iter().any(|new| new.contains(trace.as_str()));
        wanted.iter().filter(is_missed).cloned().collect()
    };
    let all = eventually(Instant::now() + PATIENCE, || {
        missed(&before.news()).is_empty().then_some(())
    });
    let news = before.news();
    for mut child in [process, namespace] {
        child.kill().expect("kill");
        child.wait().expect("wait");
    }
    drop(listener);
    run("umount", &[directory]);
    for file in [fifo, socket, "/var/tmp/husk-trace"] {
        fs::remove_file(file).expect("remove");
    }
    for directory in [directory, cgroup] {
        fs::remove_dir(directory).expect("remove");
    }
    assert!(all.is_some(), "not seen: {:?} in {news:#?}", missed(&news));
    before.assert_restored();
}
