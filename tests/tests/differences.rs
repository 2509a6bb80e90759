//! The rows of docs/differences.md that no other test shows. Where one fails, husk has come nearer to runc, and
//! the page wants a change.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use husk_tests::{
    command,
    ctr::{Container, PROBE, PROBE_MOUNT, Run, Runtime, ctr, fresh_id},
};

/// A directory of the host, gone with this value.
struct Volume(PathBuf);

impl Volume {
    fn new() -> Self {
        let path = Path::new("/var/tmp").join(fresh_id("volume"));
        fs::create_dir_all(&path).expect("create a volume");
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("file")
    }

    fn mount(&self) -> String {
        let source = self.0.display();
        format!("type=bind,src={source},dst=/data,options=rbind:rw")
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The pid that containerd knows the task by.
fn pid(container: &Container) -> u32 {
    let list = command::run(&mut ctr(&["task", "ls"]), b"").ok();
    let line = list
        .lines()
        .find(|line| line.starts_with(&format!("{} ", container.id)))
        .unwrap_or_else(|| panic!("{} is not in {list}", container.id));
    let pid = line.split_whitespace().nth(1).expect("a pid");
    pid.parse().expect("a number")
}

#[test]
fn the_pid_is_the_vmms() {
    let name = |runtime| {
        let container = Container::idle(runtime);
        let comm = fs::read_to_string(format!("/proc/{}/comm", pid(&container)));
        comm.expect("read the name of the process")
    };
    assert_eq!(name(Runtime::Runc), "sleep\n");
    assert_eq!(name(Runtime::Husk), "husk-vmm\n");
}

#[test]
fn loopback_is_the_only_network_and_it_is_up() {
    let script = "ls /sys/class/net; ping -c 1 -W 5 127.0.0.1 >/dev/null && echo answered";
    let out = Run::husk(&["sh", "-c", script]).go().ok();
    assert_eq!(out, "lo\nanswered\n");
}

/// Locks are the guest kernel's: another process of the pod is kept out, the host is not.
#[test]
fn locks_on_a_volume_end_at_the_guest() {
    let outcome = |runtime| {
        let volume = Volume::new();
        fs::write(volume.file(), "").expect("write");
        let container = Container::detached(
            runtime,
            &[
                "--null-io",
                "--mount",
                &volume.mount(),
                "--mount",
                PROBE_MOUNT,
            ],
            &["sleep", "86400"],
        );
        let mut holder = container
            .exec_command(&[], &["/probe", "lock", "/data/file"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start ctr");
        let mut word = [0; 7];
        let out = holder.stdout.as_mut().expect("piped");
        out.read_exact(&mut word).expect("the first word");
        assert_eq!(&word, b"locked\n");
        let inside = container.exec(&["/probe", "lock", "/data/file"]).out();
        let mut host = Command::new(PROBE);
        let outside = command::run(host.arg("lock").arg(volume.file()), b"").out();
        drop(holder.stdin.take());
        assert!(holder.wait().expect("wait for ctr").success());
        (inside, outside)
    };
    let (held, locked) = ("held\n".to_string(), "locked\n".to_string());
    assert_eq!(outcome(Runtime::Runc), (held.clone(), held.clone()));
    assert_eq!(outcome(Runtime::Husk), (held, locked));
}

/// A file kept open shows what it held when it was opened, while its size is the same.
#[test]
fn an_open_file_of_a_volume_is_cached() {
    let outcome = |runtime| {
        let volume = Volume::new();
        fs::write(volume.file(), "old\n").expect("write");
        let script = "exec 3</data/file; read before <&3; echo $before; read go; \
            /probe reread <&3; cat /data/file";
        let id = fresh_id("cached");
        let mount = volume.mount();
        let mut running = Run::husk(&["sh", "-c", script])
            .runtime(runtime)
            .flags(&["--mount", &mount, "--mount", PROBE_MOUNT])
            .command(&id)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("start ctr");
        let mut out = running.stdout.take().expect("piped");
        let mut first = [0; 4];
        out.read_exact(&mut first).expect("the first line");
        assert_eq!(&first, b"old\n");
        fs::write(volume.file(), "new\n").expect("write again");
        let mut input = running.stdin.take().expect("piped");
        input.write_all(b"go\n").expect("go on");
        drop(input);
        let mut rest = String::new();
        out.read_to_string(&mut rest).expect("the rest");
        assert!(running.wait().expect("wait for ctr").success());
        rest
    };
    assert_eq!(outcome(Runtime::Runc), "new\nnew\n");
    assert_eq!(outcome(Runtime::Husk), "old\nnew\n");
}

/// The host's own view of the root file system: nothing of it is mounted where runc's is.
#[test]
fn the_rootfs_is_not_mounted_on_the_host() {
    let entries = |runtime| {
        let container = Container::idle(runtime);
        let rootfs = format!(
            "/run/containerd/io.containerd.runtime.v2.task/default/{}/rootfs",
            container.id
        );
        fs::read_dir(rootfs).map_or(0, Iterator::count)
    };
    assert!(entries(Runtime::Runc) > 0);
    assert_eq!(entries(Runtime::Husk), 0);
}

#[test]
fn the_root_is_a_share() {
    let out = Run::husk(&["cat", "/proc/mounts"]).go().ok();
    let root = out.lines().find(|line| line.split(' ').nth(1) == Some("/"));
    let root = root.unwrap_or_else(|| panic!("no root in {out}"));
    let words: Vec<_> = root.split(' ').collect();
    assert_eq!((words[0], words[2]), ("none", "virtiofs"), "{root}");
}

/// Privileged is what it is in the guest, with the guest's devices.
#[test]
fn a_privileged_container_has_the_guests_devices() {
    let script = "ls /dev; : <>/dev/net/tun && echo opened";
    let listed = |runtime| {
        let args = ["sh", "-c", script];
        let run = Run::husk(&args).runtime(runtime);
        let out = run.flags(&["--privileged"]).go().ok();
        let lines: Vec<_> = out.lines().map(str::to_owned).collect();
        let has = |name: &str| lines.iter().any(|line| line == name);
        (has("opened"), has("fuse"), has("kvm"))
    };
    assert_eq!(listed(Runtime::Runc), (true, true, true));
    assert_eq!(listed(Runtime::Husk), (true, true, false));
}

/// The share is sealed when the container is made: HostToContainer, in Kubernetes' words, has no effect.
#[test]
fn mounts_made_on_the_host_later_are_not_seen() {
    let seen = |runtime| {
        let volume = Volume::new();
        let at = volume.0.to_str().expect("UTF-8");
        let mount = |args: &[&str]| {
            command::run(Command::new("mount").args(args), b"").ok();
        };
        mount(&["--bind", at, at]);
        mount(&["--make-shared", at]);
        let below = format!("{at}/below");
        fs::create_dir(&below).expect("mkdir");
        let option = format!("type=bind,src={at},dst=/data,options=rbind:rslave");
        let container = Container::detached(
            runtime,
            &["--null-io", "--mount", &option],
            &["sleep", "86400"],
        );
        mount(&["-t", "tmpfs", "tmpfs", &below]);
        fs::write(format!("{below}/file"), "").expect("write");
        let seen = container.exec(&["test", "-e", "/data/below/file"]).code() == 0;
        drop(container);
        command::run(Command::new("umount").args(["-R", at]), b"").ok();
        seen
    };
    assert!(seen(Runtime::Runc));
    assert!(!seen(Runtime::Husk));
}

/// The file server's capabilities count for inodes, and not for the host's devices.
#[test]
fn device_nodes_are_made_on_the_guests_own_file_systems_only() {
    let script = "cd /dev && mknod own c 1 3 && echo made there; cd /var && mkfifo pipe && echo a FIFO here; \
                  mknod node c 1 3 && echo made here";
    let made = |runtime| Run::husk(&["sh", "-c", script]).runtime(runtime).go();
    let (runc, husk) = (made(Runtime::Runc), made(Runtime::Husk));
    assert_eq!(
        runc.out(),
        "made there\na FIFO here\nmade here\n",
        "{runc:?}"
    );
    assert_eq!(husk.out(), "made there\na FIFO here\n", "{husk:?}");
    assert!(husk.err().contains("Operation not permitted"), "{husk:?}");
}

/// They ask for a capability in the host's own user namespace, where husk-vmm is not.
#[test]
fn trusted_attributes_cannot_be_set() {
    let plant = |runtime| {
        let volume = Volume::new();
        Run::husk(&["/probe", "plant", "/data/t", "1"])
            .runtime(runtime)
            .flags(&[
                "--privileged",
                "--mount",
                PROBE_MOUNT,
                "--mount",
                &volume.mount(),
            ])
            .go()
            .ok()
    };
    let refused = "set trusted.husk: Operation not permitted";
    assert!(!plant(Runtime::Runc).contains(refused));
    assert!(plant(Runtime::Husk).contains(refused));
}
