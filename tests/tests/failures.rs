//! What can be wrong with a host: each ends soon, says cause and file, and leaves nothing.

use std::{
    fs::{self, File},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::Command,
    time::Duration,
};

use husk_tests::{
    census::Census,
    command::{self, Outcome},
    cpio,
    ctr::{Container, PROBE, Run, Runtime},
    settings::{COLD, Settings},
};

/// The limit, in lab time, where the lab has its host to itself.
const SOON: Duration = Duration::from_secs(5);
/// A good start takes about a third of that.
const GOOD_STARTS: u32 = 3;

/// Runs a container that must fail: soon, in these words, and without a trace.
#[track_caller]
fn assert_fails(run: &Run<'_>, words: &[&str]) {
    assert_fails_within(SOON, run, words);
}

#[track_caller]
fn assert_fails_within(limit: Duration, run: &Run<'_>, words: &[&str]) {
    let before = Census::take();
    let outcome = run.go();
    assert_says(&outcome, words);
    before.assert_restored();
    assert!(
        outcome.took <= limit || outcome.took <= limit - SOON + GOOD_STARTS * a_good_start(),
        "took {:?}: {}",
        outcome.took,
        outcome.err()
    );
}

/// The time that a pod takes now, which the lab's busy host may have slowed; none where no pod can start.
fn a_good_start() -> Duration {
    let _settings = Settings::only(COLD);
    let good = Run::husk(&["true"]).go();
    match good.code() {
        0 => good.took,
        _ => Duration::ZERO,
    }
}

#[track_caller]
fn assert_says(outcome: &Outcome, words: &[&str]) {
    assert!(
        outcome.code() != 0,
        "no error, where one with {words:?} is due: {outcome:?}"
    );
    for word in words {
        assert!(
            outcome.err().contains(word),
            "no {word:?} in {}",
            outcome.err()
        );
    }
}

/// A good pod after each bad one: nothing stays broken.
#[track_caller]
fn assert_works_again() {
    Run::husk(&["true"]).go().ok();
}

/// Puts something in a file's place for the length of a test.
struct Moved {
    from: &'static str,
    aside: String,
}

impl Moved {
    fn away(from: &'static str) -> Self {
        let aside = format!("{from}.aside");
        fs::rename(from, &aside).unwrap_or_else(|error| panic!("move {from}: {error}"));
        Moved { from, aside }
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.from);
        let _ = fs::rename(&self.aside, self.from);
    }
}

#[test]
fn no_kvm() {
    let moved = Moved::away("/dev/kvm");
    assert_fails(
        &Run::husk(&["true"]),
        &["/dev/kvm", "No such file or directory"],
    );
    drop(moved);
    assert_works_again();
}

#[test]
fn a_kvm_that_is_none() {
    let moved = Moved::away("/dev/kvm");
    // A character device that opens and knows no KVM request: /dev/null's number.
    let made = Command::new("mknod")
        .args(["/dev/kvm", "c", "1", "3"])
        .status();
    assert!(made.is_ok_and(|status| status.success()), "mknod");
    assert_fails(&Run::husk(&["true"]), &["/dev/kvm"]);
    drop(moved);
    assert_works_again();
}

#[test]
fn kernel_missing() {
    let _settings = Settings::write("kernel = \"/nowhere/vmlinux\"\n");
    assert_fails(
        &Run::husk(&["true"]),
        &["/nowhere/vmlinux", "No such file or directory"],
    );
}

#[test]
fn kernel_no_elf() {
    let _settings = Settings::write("kernel = \"/etc/passwd\"\n");
    assert_fails(&Run::husk(&["true"]), &["/etc/passwd", "ELF"]);
}

#[test]
fn kernel_cut_short() {
    let path = "/var/tmp/vmlinux-cut-short";
    let mut bytes = fs::read("/usr/local/lib/husk/vmlinux").expect("read the kernel");
    bytes.truncate(1 << 20);
    fs::write(path, bytes).expect("write");
    let _settings = Settings::write(&format!("kernel = \"{path}\"\n"));
    assert_fails(&Run::husk(&["true"]), &[path]);
    fs::remove_file(path).expect("remove");
}

#[test]
fn initrd_missing() {
    let _settings = Settings::write("initrd = \"/nowhere/initrd.img\"\n");
    assert_fails(
        &Run::husk(&["true"]),
        &["/nowhere/initrd.img", "No such file or directory"],
    );
}

#[test]
fn vmm_missing() {
    let _settings = Settings::write("vmm = \"/nowhere/husk-vmm\"\n");
    assert_fails(
        &Run::husk(&["true"]),
        &["/nowhere/husk-vmm", "No such file or directory"],
    );
}

#[test]
fn memory_too_small() {
    let _settings = Settings::write("memory_mib = 8\n");
    assert_fails(
        &Run::husk(&["true"]),
        &["/etc/husk/config.toml", "memory_mib = 8", "64"],
    );
}

#[test]
fn an_unknown_configuration_key() {
    let _settings = Settings::write("memroy_mib = 256\n");
    assert_fails(
        &Run::husk(&["true"]),
        &["memroy_mib", "/etc/husk/config.toml"],
    );
}

#[test]
fn a_configuration_that_is_no_toml() {
    let _settings = Settings::write("memory_mib = = 256\n");
    assert_fails(&Run::husk(&["true"]), &["/etc/husk/config.toml"]);
}

/// containerd always writes a good one; a broken disk does not.
#[test]
fn an_unreadable_config_json() {
    let bundle = Path::new("/var/tmp/broken-bundle");
    fs::create_dir_all(bundle).expect("create a bundle");
    for (content, cause) in [(Some("{\"ociVersion\": "), "EOF"), (None, "Is a directory")] {
        let config = bundle.join("config.json");
        let _ = fs::remove_file(&config);
        let _ = fs::remove_dir(&config);
        match content {
            Some(text) => fs::write(&config, text).expect("write"),
            None => fs::create_dir(&config).expect("create"),
        }
        let before = Census::take();
        let mut start = Command::new("/usr/local/bin/containerd-shim-husk-v2");
        start
            .args(["-namespace", "default", "-id", "broken", "-address"])
            .args([
                "/run/containerd/containerd.sock",
                "-publish-binary",
                "containerd",
                "start",
            ])
            .env("TTRPC_ADDRESS", "/run/containerd/containerd.sock.ttrpc")
            .current_dir(bundle);
        let outcome = command::run(&mut start, b"");
        assert_says(&outcome, &["config.json", cause]);
        assert!(outcome.took <= SOON, "took {:?}", outcome.took);
        before.assert_restored();
    }
    fs::remove_dir_all(bundle).expect("remove");
}

#[test]
fn a_rootfs_that_vanished() {
    let run = Run::husk(&["true"])
        .flags(&["--rootfs"])
        .image("/var/tmp/vanished");
    assert_fails(&run, &["/var/tmp/vanished", "No such file or directory"]);
}

#[test]
fn a_bind_source_that_is_missing() {
    let mount = "type=bind,src=/var/tmp/missing,dst=/data,options=rbind:rw";
    assert_fails(
        &Run::husk(&["true"]).flags(&["--mount", mount]),
        &["/var/tmp/missing", "No such file or directory"],
    );
}

/// Found when the VM started ahead is already on its way.
#[test]
fn a_log_that_husk_cannot_write() {
    // The first pod of all leaves directories of containerd's that stay for good.
    assert_works_again();
    let uri = "binary:///nowhere/logger";
    assert_fails(
        &Run::husk(&["true"]).flags(&["--log-uri", uri]),
        &["/nowhere/logger"],
    );
    assert_works_again();
}

#[test]
fn the_hosts_network_is_refused_by_name() {
    assert_fails(&Run::husk(&["true"]).flags(&["--net-host"]), &["network"]);
}

/// Its number would be somebody else's in the guest.
#[test]
fn a_device_of_the_host_is_refused_by_name() {
    assert_fails(
        &Run::husk(&["true"]).flags(&["--device", "/dev/kvm"]),
        &["linux.devices[", "/dev/kvm"],
    );
}

/// Bidirectional, in Kubernetes' words.
#[test]
fn a_mount_that_would_show_on_the_host_is_refused() {
    let mount = "type=bind,src=/var/tmp,dst=/data,options=rbind:rshared";
    assert_fails(
        &Run::husk(&["true"]).flags(&["--mount", mount]),
        &["mounts[", "rshared"],
    );
}

#[test]
fn a_guest_that_panics_at_boot() {
    let _settings = Settings::write("cmdline = \"rdinit=/nowhere/init init=/nowhere/init\"\n");
    assert_fails(&Run::husk(&["true"]), &["panic", "vmlinux"]);
}

#[test]
fn an_agent_that_never_answers() {
    let initrd = "/var/tmp/silent-initrd.img";
    let probe = fs::read(PROBE).expect("read the probe");
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o644)
        .open(initrd)
        .expect("create the initrd");
    cpio::write_init(file, &probe).expect("write the initrd");
    let _settings = Settings::write(&format!("initrd = \"{initrd}\"\nagent_timeout_ms = 3000\n"));
    let limit = Duration::from_millis(3000) + SOON;
    assert_fails_within(limit, &Run::husk(&["true"]), &["agent", "3000 ms", initrd]);
    fs::remove_file(initrd).expect("remove");
}

#[test]
fn a_missing_binary_says_what_runc_says() {
    let [husk, runc] = [Runtime::Husk, Runtime::Runc]
        .map(|runtime| Run::husk(&["no-such-binary"]).runtime(runtime).go());
    assert_eq!(husk.code(), runc.code(), "{husk:?} {runc:?}");
    assert_says(
        &husk,
        &["no-such-binary", "executable file not found in $PATH"],
    );
}

/// Files that are no programs, each in its own way.
fn no_programs() -> &'static str {
    let path = Path::new("/var/tmp/no-programs");
    fs::create_dir_all(path).expect("create a directory");
    // The head of an ELF file for AArch64, as far as the kernel looks.
    let mut foreign = b"\x7fELF\x02\x01\x01".to_vec();
    foreign.resize(16, 0);
    foreign.extend([2, 0, 183, 0, 1, 0, 0, 0]);
    foreign.resize(64, 0);
    for (name, mode, content) in [
        ("garbage", 0o755, b"\x01nothing that runs".as_slice()),
        ("foreign", 0o755, &foreign),
        ("interpreter", 0o755, b"#!/no/such/interpreter\n"),
        ("plain", 0o644, b"#!/bin/sh\n"),
    ] {
        let file = path.join(name);
        fs::write(&file, content).expect("write");
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode))
            .expect("chmod");
    }
    "type=bind,src=/var/tmp/no-programs,dst=/data,options=rbind:ro"
}

/// Docker and nerdctl look for these words, and take 126 or 127 from them.
#[test]
fn what_cannot_be_run_says_and_returns_what_it_does_under_runc() {
    let mount = no_programs();
    let [husk, runc] = [Runtime::Husk, Runtime::Runc].map(|runtime| {
        Container::detached(
            runtime,
            &["--null-io", "--mount", mount],
            &["sleep", "86400"],
        )
    });
    let mut different = Vec::new();
    for (args, cwd, words) in [
        (
            &["no-such-binary"][..],
            "/",
            "exec: \"no-such-binary\": executable file not found in $PATH",
        ),
        (
            &["/no/such/binary"],
            "/",
            "exec: \"/no/such/binary\": stat /no/such/binary: no such file or directory",
        ),
        (&["/data"], "/", "exec: \"/data\": is a directory"),
        (
            &["/data/plain"],
            "/",
            "exec: \"/data/plain\": permission denied",
        ),
        (
            &["/data/garbage"],
            "/",
            "exec /data/garbage: exec format error",
        ),
        (
            &["/data/foreign"],
            "/",
            "exec /data/foreign: exec format error",
        ),
        (
            &["/data/interpreter"],
            "/",
            "exec /data/interpreter: no such file or directory",
        ),
        (&["true"], "/data/plain", "/data/plain"),
    ] {
        let flags = ["--cwd", cwd, "--mount", mount];
        let run = |runtime| Run::husk(args).flags(&flags).runtime(runtime).go();
        let exec = |container: &Container| {
            command::run(&mut container.exec_command(&["--cwd", cwd], args), b"")
        };
        for (what, husk, runc) in [
            ("run", run(Runtime::Husk), run(Runtime::Runc)),
            ("exec", exec(&husk), exec(&runc)),
        ] {
            if husk.code() != runc.code() || !husk.err().contains(words) {
                different.push(format!("{what} {args:?} in {cwd}: {husk:?}{runc:?}"));
            }
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}
