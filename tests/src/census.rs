//! Counts everything a pod could leave on its host.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use crate::command::eventually;

/// Names of everything that is there now, each with its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census(BTreeSet<String>);

/// Directories whose whole content counts.
const PLACES: [&str; 11] = [
    "/run/husk",
    "/run/netns",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/io.containerd.runtime.v2.task",
    "/var/lib/containerd/io.containerd.runtime.v2.task",
    "/run/containerd/io.containerd.grpc.v1.cri",
    "/var/lib/containerd/io.containerd.grpc.v1.cri",
    "/run/containerd/io.containerd.sandbox.controller.v1.shim",
    "/var/lib/containerd/io.containerd.sandbox.controller.v1.shim",
    "/sys/class/net",
];

/// What containerd and CNI make with their first container or pod, and keep.
const KEPT: [&str; 12] = [
    "file /run/containerd/io.containerd.runtime.v2.task/default",
    "file /var/lib/containerd/io.containerd.runtime.v2.task/default",
    "file /run/containerd/io.containerd.runtime.v2.task/k8s.io",
    "file /var/lib/containerd/io.containerd.runtime.v2.task/k8s.io",
    "file /run/containerd/io.containerd.grpc.v1.cri/containers",
    "file /var/lib/containerd/io.containerd.grpc.v1.cri/containers",
    "file /run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "file /var/lib/containerd/io.containerd.grpc.v1.cri/sandboxes",
    "file /run/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io",
    "file /var/lib/containerd/io.containerd.sandbox.controller.v1.shim/k8s.io",
    "file /sys/class/net/cni0",
    // The kubelet's, which these tests are.
    "cgroup /sys/fs/cgroup/kubepods",
];

impl Census {
    pub fn take() -> Self {
        let mut found = BTreeSet::new();
        for place in PLACES {
            walk(Path::new(place), "file", &mut found);
        }
        cgroups(Path::new("/sys/fs/cgroup"), &mut found);
        for line in read("/proc/self/mountinfo").lines() {
            // Without the mount's id and its parent's: they are never used again.
            let rest: Vec<&str> = line.split(' ').skip(2).collect();
            found.insert(format!("mount {}", rest.join(" ")));
        }
        for line in read("/proc/net/unix").lines().skip(1) {
            if let Some(path) = line.split_whitespace().nth(7) {
                found.insert(format!("socket {path}"));
            }
        }
        processes(&mut found);
        leases(&mut found);
        found.retain(|name| !KEPT.contains(&&**name));
        Census(found)
    }

    /// What is there now that was not there before.
    pub fn news(&self) -> Vec<String> {
        Census::take().0.difference(&self.0).cloned().collect()
    }

    /// Waits until there is nothing that was not there before.
    ///
    /// # Panics
    /// Names what is left when it is still there after 10 s: removal ends a moment after `ctr`.
    #[track_caller]
    pub fn assert_restored(&self) {
        let mut left = Vec::new();
        let restored = eventually(Instant::now() + Duration::from_secs(10), || {
            left = self.news();
            left.is_empty().then_some(())
        });
        assert!(restored.is_some(), "left behind: {left:#?}");
    }
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

fn walk(directory: &Path, kind: &str, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        found.insert(format!("{kind} {}", path.display()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, kind, found);
        }
    }
}

fn cgroups(directory: &Path, found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.insert(format!("cgroup {}", entry.path().display()));
            cgroups(&entry.path(), found);
        }
    }
}

/// Addresses that CNI's host-local has given away; beside them it has files of its own, which stay.
fn leases(found: &mut BTreeSet<String>) {
    for network in fs::read_dir("/var/lib/cni/networks")
        .into_iter()
        .flatten()
        .flatten()
    {
        for lease in fs::read_dir(network.path()).into_iter().flatten().flatten() {
            let name = lease.file_name().to_string_lossy().into_owned();
            if !name.starts_with("last_reserved_ip") && name != "lock" {
                found.insert(format!("lease {name}"));
            }
        }
    }
}

/// Processes by pid and name (kernel threads come and go as they please), and the namespaces
/// they live in.
fn processes(found: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir("/proc") else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if read(path.join("cmdline")).is_empty() || pid == std::process::id() {
            continue;
        }
        let comm = read(path.join("comm"));
        // containerd starts and ends helpers of its own while we look.
        if comm.starts_with("containerd-shim") || comm.starts_with("husk") {
            found.insert(format!("process {pid} {}", comm.trim()));
        }
        for kind in ["net", "mnt", "pid", "ipc", "uts", "cgroup"] {
            if let Ok(link) = fs::read_link(path.join("ns").join(kind)) {
                found.insert(format!("namespace {}", link.display()));
            }
        }
    }
}
