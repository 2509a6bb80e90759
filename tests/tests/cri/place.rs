//! How large a pod's guest is, and who is charged for it.

use std::{collections::BTreeSet, fs, path::Path};

use husk_proto::cri as api;
use husk_tests::cri::{Handler, Pod};
use protobuf::MessageField;

/// Processors and MiB of memory that a guest has.
fn size(pod: &Pod) -> (u64, u64) {
    let script = "nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    let words = pod.try_words(&["sh", "-c", script]);
    let numbers: Vec<u64> = words.lines().filter_map(|line| line.parse().ok()).collect();
    let [cpus, kib] = numbers[..] else {
        panic!("{words}");
    };
    (cpus, kib >> 10)
}

pub fn a_pod_is_as_large_as_its_limits(handler: Handler) {
    let pod = Pod::run(handler);
    let (cpus, memory) = size(&pod);
    assert!(cpus == 1 && memory < 256, "{cpus}, {memory} MiB");
    pod.end();
    let pod = Pod::with(handler, |config| {
        let linux = config.linux.mut_or_insert_default();
        linux.resources = MessageField::some(api::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 150_000,
            memory_limit_in_bytes: 512 << 20,
            ..Default::default()
        });
    });
    let (cpus, memory) = size(&pod);
    assert!(
        cpus == 2 && (512..768).contains(&memory),
        "{cpus}, {memory} MiB"
    );
    pod.end();
}

/// The names of the programs in a cgroup.
fn programs(cgroup: &Path) -> BTreeSet<String> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).expect("cgroup.procs");
    let programs = text.lines().map(|pid| {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        exe.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    });
    programs.collect()
}

pub fn shim_and_vmm_are_in_the_pods_cgroup(handler: Handler) {
    let pod = Pod::run(handler);
    let parent = pod.config.linux.cgroup_parent.trim_start_matches('/');
    let parent = Path::new("/sys/fs/cgroup").join(parent);
    assert_eq!(
        programs(&parent.join(&pod.id)),
        BTreeSet::from(["containerd-shim-husk-v2".into(), "husk-vmm".into()])
    );
    pod.end();
    // A kubelet that cannot remove it would complain for good.
    assert!(!parent.exists(), "{}", parent.display());
}
