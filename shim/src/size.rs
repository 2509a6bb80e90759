//! How large a pod's microVM is: as the configuration says, and larger where what is asked for would not fit. What Kubernetes
//! says of the pod as a whole comes first, in CRI's annotations of a sandbox; else the limits of the pod's first container.
//!
//! A limit bounds a container in the guest; the guest needs some memory beside it. Memory that a guest does not touch costs
//! its host nothing, so there is no smaller guest for a smaller limit, and one template serves nearly all sizes.

use std::{fs, thread};

use serde_json::Value;

use crate::config::{Config, MEMORY_MIB_MAX, VCPUS_MAX};

/// CRI's annotations of a sandbox: the sums of its containers.
const ANNOTATION: &str = "/annotations/io.kubernetes.cri.sandbox-";
/// What a guest takes beside its containers, MiB: kernel, agent, caches that cannot be given up.
const BESIDE_MIB: u64 = 64;
/// Memory is added in blocks, MiB (machine.proto).
const BLOCK_MIB: u64 = 128;

/// What is asked for; none: no limit is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    pub memory_bytes: Option<u64>,
    /// Rounded up.
    pub cpus: Option<u64>,
}

impl Demand {
    /// Of config.json.
    pub fn of(spec: &Value) -> Self {
        let annotation = |name: &str| {
            let value = spec.pointer(&format!("{ANNOTATION}{name}"))?;
            value.as_str()?.parse().ok()
        };
        let of_pod = Self::from_limits(
            annotation("memory"),
            annotation("cpu-quota"),
            annotation("cpu-period"),
        );
        let resources = spec.pointer("/linux/resources");
        let of_container = resources.map(Self::of_resources).unwrap_or_default();
        Self {
            memory_bytes: of_pod.memory_bytes.or(of_container.memory_bytes),
            cpus: of_pod.cpus.or(of_container.cpus),
        }
    }

    /// Of `linux.resources`.
    pub fn of_resources(resources: &Value) -> Self {
        let limit = |at: &str| resources.pointer(at)?.as_i64();
        Self::from_limits(
            limit("/memory/limit"),
            limit("/cpu/quota"),
            limit("/cpu/period"),
        )
    }

    /// What of it a guest of this size cannot give, in words for the log.
    pub fn beyond(self, memory_mib: u64, vcpus: u32) -> Option<String> {
        let limit_mib = self.memory_bytes.map_or(0, |bytes| bytes >> 20);
        let memory = (limit_mib > memory_mib).then(|| format!("{limit_mib} MiB of memory"));
        let cpus = self.cpus.filter(|cpus| *cpus > vcpus.into());
        let cpus = cpus.map(|cpus| format!("{cpus} processors"));
        let asked: Vec<String> = memory.into_iter().chain(cpus).collect();
        (!asked.is_empty()).then(|| {
            let asked = asked.join(" and ");
            format!("limits of {asked} are more than the microVM has ({memory_mib} MiB, {vcpus})")
        })
    }

    /// As cgroups have them: bytes, and microseconds of CPU time in a period. What is not above 0 is no limit.
    fn from_limits(memory: Option<i64>, quota: Option<i64>, period: Option<i64>) -> Self {
        let positive = |number: Option<i64>| {
            number
                .and_then(|n| u64::try_from(n).ok())
                .filter(|n| *n > 0)
        };
        // The kernel's own where only a quota is set.
        let period = positive(period).unwrap_or(100_000);
        Self {
            memory_bytes: positive(memory),
            cpus: positive(quota).map(|quota| quota.div_ceil(period)),
        }
    }

    /// Makes the VM of `config` as large as is asked for: at most as the host, and never smaller than it was.
    pub fn enlarge(self, config: &mut Config) {
        self.enlarge_on(config, host_memory_mib(), host_cpus());
    }

    fn enlarge_on(self, config: &mut Config, host_mib: u64, host_cpus: u32) {
        if let Some(bytes) = self.memory_bytes {
            let wanted = (bytes >> 20).saturating_add(BESIDE_MIB);
            let most = host_mib.min(MEMORY_MIB_MAX);
            let missing = wanted.min(most).saturating_sub(config.memory_mib);
            // Whole blocks more, but not above what there is.
            let blocks = missing.div_ceil(BLOCK_MIB);
            let room = MEMORY_MIB_MAX.saturating_sub(config.memory_mib) / BLOCK_MIB;
            config.memory_mib += blocks.min(room) * BLOCK_MIB;
        }
        if let Some(cpus) = self.cpus {
            let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
            let most = host_cpus.clamp(1, VCPUS_MAX);
            config.vcpus = config.vcpus.max(cpus.min(most));
        }
    }
}

/// None that can be read is none to go by.
fn host_memory_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|total| total.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(MEMORY_MIB_MAX, |kib| kib >> 10)
}

fn host_cpus() -> u32 {
    let found = thread::available_parallelism().map_or(1, usize::from);
    u32::try_from(found).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::options::Options;

    fn sized(spec: &Value) -> (u64, u32) {
        let mut config = Config::load(Path::new("/nowhere"), &Options::default()).unwrap();
        Demand::of(spec).enlarge_on(&mut config, 4096, 4);
        (config.memory_mib, config.vcpus)
    }

    fn annotated(memory: &str, quota: &str, period: &str) -> Value {
        json!({"annotations": {
            "io.kubernetes.cri.sandbox-memory": memory,
            "io.kubernetes.cri.sandbox-cpu-quota": quota,
            "io.kubernetes.cri.sandbox-cpu-period": period,
        }})
    }

    #[test]
    fn a_pod_is_as_large_as_its_containers_need() {
        for (memory, quota, period, size) in [
            ("0", "0", "100000", (256, 1)),
            // Fits as it is.
            ("134217728", "50000", "100000", (256, 1)),
            // 256 MiB and what the guest takes: one block more.
            ("268435456", "150000", "100000", (384, 2)),
            ("1073741824", "-1", "100000", (1152, 1)),
            // More than the host has.
            ("1099511627776", "6400000", "100000", (4096, 4)),
            ("no number", "", "", (256, 1)),
        ] {
            let spec = annotated(memory, quota, period);
            assert_eq!(sized(&spec), size, "{memory} {quota}");
        }
    }

    #[test]
    fn what_a_guest_cannot_give_is_said() {
        let limits = |memory: u64, quota: u64| {
            Demand::of_resources(&json!({"memory": {"limit": memory}, "cpu": {"quota": quota}}))
        };
        assert_eq!(limits(256 << 20, 100_000).beyond(256, 1), None);
        assert_eq!(Demand::default().beyond(256, 1), None);
        assert_eq!(
            limits(512 << 20, 150_000).beyond(256, 1).as_deref(),
            Some(
                "limits of 512 MiB of memory and 2 processors are more than the microVM has (256 MiB, 1)"
            )
        );
    }

    #[test]
    fn without_a_word_of_the_pod_the_first_containers_limits_count() {
        let limits = json!({"memory": {"limit": 536_870_912}, "cpu": {"quota": 300_000}});
        let mut spec = json!({"linux": {"resources": limits}});
        assert_eq!(sized(&spec), (640, 3));
        spec["annotations"] = annotated("1073741824", "200000", "100000")["annotations"].take();
        assert_eq!(sized(&spec), (1152, 2));
    }
}
