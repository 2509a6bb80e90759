//! The `linux.resources` object (OCI runtime specification 1.2, "Linux control groups").
//!
//! Data alone; what becomes of it in cgroup v2 is decided in `cgroup::settings`, and by
//! `device_filter` for the devices. It must never drop a key: what nobody acts on is `Unset`, and what cgroup v2 has no
//! place for (runc ignores that in silence) is `Ignored`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::or_default;
use super::unset::{Ignored, Unset};

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Resources {
    #[serde(default, deserialize_with = "or_default")]
    pub devices: Vec<DeviceRule>,
    #[serde(default, deserialize_with = "or_default")]
    pub memory: Memory,
    #[serde(default, deserialize_with = "or_default")]
    pub cpu: Cpu,
    #[serde(default, deserialize_with = "or_default")]
    pub pids: Pids,
    #[serde(default, deserialize_with = "or_default")]
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Files of cgroup v2 by name, written as they are.
    #[serde(default, deserialize_with = "or_default")]
    pub unified: BTreeMap<String, String>,

    #[serde(default, deserialize_with = "or_default", rename = "blockIO")]
    pub block_io: BlockIo,
    #[serde(default, skip_serializing)]
    pub network: Ignored,
    /// The guest has no such device.
    #[serde(default, skip_serializing)]
    pub rdma: Unset,
}

/// One rule for device nodes. `None` and -1 mean any number.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceRule {
    pub allow: bool,
    /// "a", "c" or "b"; empty means "a".
    #[serde(default, rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub major: Option<i64>,
    #[serde(default)]
    pub minor: Option<i64>,
    /// Any of "r", "w", "m"; empty means all.
    #[serde(default)]
    pub access: String,
}

/// Bytes; -1 means unlimited.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Memory {
    #[serde(default)]
    pub limit: Option<i64>,
    #[serde(default)]
    pub reservation: Option<i64>,
    /// Memory and swap together, as in cgroup v1.
    #[serde(default)]
    pub swap: Option<i64>,
    /// Refuse a limit below the present use instead of reclaiming and killing.
    #[serde(default)]
    pub check_before_update: Option<bool>,
    /// cgroup v2 knows no other way than true.
    #[serde(default)]
    pub use_hierarchy: Option<bool>,

    #[serde(default, skip_serializing)]
    pub kernel: Ignored,
    #[serde(default, skip_serializing, rename = "kernelTCP")]
    pub kernel_tcp: Ignored,
    #[serde(default, skip_serializing)]
    pub swappiness: Ignored,
    #[serde(default, skip_serializing, rename = "disableOOMKiller")]
    pub disable_oom_killer: Ignored,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Cpu {
    /// As in cgroup v1: 2 to 262144.
    #[serde(default)]
    pub shares: Option<u64>,
    /// Microseconds per period; negative means unlimited.
    #[serde(default)]
    pub quota: Option<i64>,
    /// Microseconds a burst may add.
    #[serde(default)]
    pub burst: Option<u64>,
    /// Microseconds.
    #[serde(default)]
    pub period: Option<u64>,
    #[serde(default, deserialize_with = "or_default")]
    pub cpus: String,
    #[serde(default, deserialize_with = "or_default")]
    pub mems: String,
    #[serde(default)]
    pub idle: Option<i64>,

    #[serde(default, skip_serializing)]
    pub realtime_runtime: Ignored,
    #[serde(default, skip_serializing)]
    pub realtime_period: Ignored,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Pids {
    /// Negative means unlimited; 0 and absent mean that nothing is said.
    #[serde(default)]
    pub limit: Option<i64>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct HugepageLimit {
    /// As in the file names: "2MB", "1GB".
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// Devices are the guest's.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct BlockIo {
    /// 10 to 1000, as in cgroup v1.
    #[serde(default)]
    pub weight: Option<u16>,
    #[serde(default, deserialize_with = "or_default")]
    pub throttle_read_bps_device: Vec<Throttle>,
    #[serde(default, deserialize_with = "or_default")]
    pub throttle_write_bps_device: Vec<Throttle>,
    #[serde(default, rename = "throttleReadIOPSDevice")]
    #[serde(deserialize_with = "or_default")]
    pub throttle_read_iops_device: Vec<Throttle>,
    #[serde(default, rename = "throttleWriteIOPSDevice")]
    #[serde(deserialize_with = "or_default")]
    pub throttle_write_iops_device: Vec<Throttle>,

    /// These two are BFQ's, which the guest's kernel has not.
    #[serde(default, skip_serializing)]
    pub weight_device: Ignored,
    #[serde(default, skip_serializing)]
    pub leaf_weight: Ignored,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Throttle {
    pub major: u32,
    pub minor: u32,
    /// Bytes or operations per second.
    pub rate: u64,
}

impl Resources {
    /// What is asked for and has no effect, for the log; the names of fields.
    pub fn without_effect(&self) -> Vec<String> {
        let (memory, cpu, io) = (&self.memory, &self.cpu, &self.block_io);
        let flat = Ignored(memory.use_hierarchy == Some(false));
        [
            (memory.kernel, "memory.kernel"),
            (memory.kernel_tcp, "memory.kernelTCP"),
            (memory.swappiness, "memory.swappiness"),
            (memory.disable_oom_killer, "memory.disableOOMKiller"),
            (flat, "memory.useHierarchy"),
            (cpu.realtime_runtime, "cpu.realtimeRuntime"),
            (cpu.realtime_period, "cpu.realtimePeriod"),
            (io.weight_device, "blockIO.weightDevice"),
            (io.leaf_weight, "blockIO.leafWeight"),
            (self.network, "network"),
        ]
        .into_iter()
        .filter(|(Ignored(set), _)| *set)
        .map(|(_, name)| format!("linux.resources.{name}"))
        .collect()
    }
}
