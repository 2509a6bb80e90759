//! Files, as they look under runc.

use std::{collections::BTreeSet, fs, os::unix::fs::symlink, path::Path, process::Command};

use husk_tests::{
    command,
    ctr::{Container, PROBE, Run, Runtime},
};

/// A directory that the container must not see: a bait for symlinks.
const OUTSIDE: &str = "/etc/hostname-of-the-host";

struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = Path::new("/var/tmp").join(husk_tests::ctr::fresh_id(name));
        fs::create_dir_all(&path).expect("create a scratch directory");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
        let _ = fs::remove_file(OUTSIDE);
    }
}

/// The lines that only one of two texts has, instead of the texts: an entry that is missing does not
/// make all behind it differ.
#[track_caller]
fn assert_same_lines(what: &str, runc: &str, husk: &str) {
    let only = |name: &str, one: &str, other: &str| -> Vec<String> {
        let other: BTreeSet<_> = other.lines().collect();
        one.lines()
            .filter(|line| !other.contains(line))
            .take(20)
            .map(|line| format!("only {name}: {line}"))
            .collect()
    };
    let differ = [only("runc", runc, husk), only("husk", husk, runc)].concat();
    assert!(differ.is_empty(), "{what}:\n{}", differ.join("\n"));
    assert!(runc == husk, "{what}: the same lines in another order");
    assert!(
        runc.lines().count() > 100,
        "{what}: hardly anything to compare: {runc}"
    );
}

fn bind(source: &str, target: &str, access: &str) -> String {
    format!("type=bind,src={source},dst={target},options=rbind:{access}")
}

#[track_caller]
fn probe(runtime: Runtime, script: &str, data: &Path) -> String {
    let probe = bind(PROBE, "/probe", "ro");
    let data = bind(data.to_str().expect("utf-8"), "/data", "rw");
    Run::husk(&["sh", "-c", script])
        .runtime(runtime)
        .flags(&["--mount", &probe, "--mount", &data])
        .go()
        .ok()
}

/// Planted on the host, listed inside.
#[test]
fn a_hosts_tree_looks_the_same_inside() {
    let scratch = Scratch::new("host-tree");
    fs::write(OUTSIDE, "bait").expect("write the bait");
    command::run(
        Command::new(PROBE)
            .arg("plant")
            .arg(&scratch.0)
            .arg("10000"),
        b"",
    )
    .ok();
    let runc = probe(Runtime::Runc, "/probe tree /data", &scratch.0);
    let husk = probe(Runtime::Husk, "/probe tree /data", &scratch.0);
    assert_same_lines("listed inside", &runc, &husk);
}

/// Planted inside, in a volume; listed inside and on the host.
#[test]
fn a_tree_made_inside_looks_the_same_everywhere() {
    let listed = [Runtime::Runc, Runtime::Husk].map(|runtime| {
        let scratch = Scratch::new("made-inside");
        let inside = probe(
            runtime,
            "/probe plant /data/t 500 && /probe tree /data/t",
            &scratch.0,
        );
        let mut list = Command::new(PROBE);
        list.arg("tree").arg(scratch.0.join("t"));
        let outside = command::run(&mut list, b"").ok();
        (inside, outside)
    });
    let [runc, husk] = &listed;
    assert_same_lines("inside", &runc.0, &husk.0);
    assert_same_lines("on the host", &runc.1, &husk.1);
}

/// The same in the root filesystem, which is an overlay on the host.
#[test]
fn a_tree_made_in_the_rootfs_looks_the_same() {
    let scratch = Scratch::new("rootfs");
    let script = "mkdir -p /var/t && /probe plant /var/t/x 500 && /probe tree /var/t/x && rm -r /var/t && ls /var/t 2>&1 | wc -l";
    let runc = probe(Runtime::Runc, script, &scratch.0);
    let husk = probe(Runtime::Husk, script, &scratch.0);
    assert_same_lines("rootfs", &runc, &husk);
}

/// What came with the image: its own odd files.
#[test]
fn the_images_own_files_look_the_same() {
    let scratch = Scratch::new("image");
    let script = "/probe tree /bin; /probe tree /etc";
    let [runc, husk] =
        [Runtime::Runc, Runtime::Husk].map(|runtime| probe(runtime, script, &scratch.0));
    assert_same_lines("image", &runc, &husk);
}

#[test]
fn a_read_only_volume_is() {
    let scratch = Scratch::new("read-only");
    fs::write(scratch.0.join("file"), "kept").expect("write");
    let mount = bind(scratch.0.to_str().expect("utf-8"), "/data", "ro");
    let outcome = Run::husk(&["sh", "-c", "cat /data/file; echo x >/data/file"])
        .flags(&["--mount", &mount])
        .go();
    assert_eq!(outcome.out(), "kept");
    assert!(
        outcome.err().contains("Read-only file system"),
        "{outcome:?}"
    );
    assert_eq!(
        fs::read_to_string(scratch.0.join("file")).expect("read"),
        "kept"
    );
}

/// A symlink in a volume that points out of it leads to the container's file, not the host's.
#[test]
fn symlinks_never_leave_the_container() {
    let scratch = Scratch::new("symlink");
    fs::write(OUTSIDE, "bait").expect("write the bait");
    symlink(OUTSIDE, scratch.0.join("out")).expect("symlink");
    symlink("../../../../../../..", scratch.0.join("up")).expect("symlink");
    let script = format!("cat /data/out; cat /data/up{OUTSIDE}; ls /data/up");
    let husk = probe(Runtime::Husk, &format!("{script}; true"), &scratch.0);
    assert!(!husk.contains("bait"), "{husk}");
    assert!(
        husk.contains("probe"),
        "/data/up is not the container's root: {husk}"
    );
}

/// Writes on one side are seen on the other, while the pod runs.
#[test]
fn a_volume_is_shared_with_the_host() {
    let scratch = Scratch::new("shared");
    let mount = bind(scratch.0.to_str().expect("utf-8"), "/data", "rw");
    let pod = husk_tests::ctr::Container::detached(
        Runtime::Husk,
        &["--null-io", "--mount", &mount],
        &["sleep", "86400"],
    );
    assert_ne!(pod.exec(&["cat", "/data/later"]).code(), 0);
    fs::write(scratch.0.join("later"), "from the host").expect("write");
    assert_eq!(pod.exec(&["cat", "/data/later"]).ok(), "from the host");
    fs::write(scratch.0.join("later"), "changed").expect("write");
    assert_eq!(pod.exec(&["cat", "/data/later"]).ok(), "changed");
    pod.exec(&["sh", "-c", "echo inside >/data/back; sync"])
        .ok();
    assert_eq!(
        fs::read_to_string(scratch.0.join("back")).expect("read"),
        "inside\n"
    );
}

/// Few open files, for this host and for what containerd starts; as many as before when dropped.
struct FewOpenFiles {
    containerd: String,
    /// Soft and hard, as prlimit(1) takes them.
    before: String,
    host: String,
}

const NR_OPEN: &str = "/proc/sys/fs/nr_open";

impl FewOpenFiles {
    fn new(limit: u32) -> Self {
        let pid = command::run(Command::new("pidof").arg("containerd"), b"").ok();
        let containerd = pid.trim().to_owned();
        let limits = fs::read_to_string(format!("/proc/{containerd}/limits")).expect("its limits");
        let files = limits
            .lines()
            .find(|line| line.starts_with("Max open files"));
        let words: Vec<&str> = files.expect("its limit").split_whitespace().collect();
        let few = FewOpenFiles {
            before: format!("{}:{}", words[3], words[4]),
            host: fs::read_to_string(NR_OPEN).expect("the host's limit"),
            containerd,
        };
        few.set(&format!("{limit}:{limit}"));
        fs::write(NR_OPEN, limit.to_string()).expect("set the host's limit");
        few
    }

    fn set(&self, limits: &str) {
        let nofile = format!("--nofile={limits}");
        let args = ["--pid", &self.containerd, &nofile];
        command::run(Command::new("prlimit").args(args), b"").ok();
    }
}

impl Drop for FewOpenFiles {
    fn drop(&mut self) {
        let _ = fs::write(NR_OPEN, self.host.trim());
        self.set(&self.before);
    }
}

/// The file server holds a descriptor for each file that the guest's kernel remembers, and has no more than
/// the host allows.
#[test]
fn a_pod_walks_through_more_files_than_it_may_remember() {
    const LIMIT: u32 = 2048;
    let scratch = Scratch::new("many-files");
    for directory in 0..10 {
        let directory = scratch.0.join(directory.to_string());
        fs::create_dir(&directory).expect("create a directory");
        for file in 0..160 {
            fs::write(directory.join(file.to_string()), "x").expect("write a file");
        }
    }
    let pod = {
        let _few = FewOpenFiles::new(LIMIT);
        let data = bind(scratch.0.to_str().expect("utf-8"), "/data", "rw");
        Container::detached(
            Runtime::Husk,
            &["--null-io", "--mount", &data],
            &["sleep", "86400"],
        )
    };
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", pod.pid())).map_or(0, Iterator::count);
    // Each of them is looked at: by its size, by its content, by its name in a new place.
    for script in [
        "find /data -type f -size 1c | wc -l",
        "cat /data/*/* | wc -c",
        "for d in /data/?; do mv $d $d.moved; done; ls -l /data/*/ | grep -c ' 1 root'",
    ] {
        let outcome = pod.exec(&["sh", "-c", script]);
        assert_eq!(outcome.ok().trim(), "1600", "{script}");
        let held = descriptors();
        // The VMM keeps 512 for itself, and has few of them.
        assert!(
            held < LIMIT as usize - 300,
            "{held} descriptors after {script}"
        );
    }
    assert!(
        descriptors() > LIMIT as usize / 4,
        "the limit was never near"
    );
}
