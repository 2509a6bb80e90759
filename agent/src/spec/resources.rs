//! The `linux.resources` object (OCI runtime specification 1.2, "Linux control groups").
//!
//! Data alone; what becomes of it in cgroup v2 is decided in `cgroup::settings`, and by
//! `device_filter` for the devices. It must never drop a key: what nobody acts on is `Unset`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::or_default;
use super::unset::Unset;

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

    #[serde(default, skip_serializing, rename = "blockIO")]
    pub block_io: Unset,
    #[serde(default, skip_serializing)]
    pub network: Unset,
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
    pub kernel: Unset,
    #[serde(default, skip_serializing, rename = "kernelTCP")]
    pub kernel_tcp: Unset,
    #[serde(default, skip_serializing)]
    pub swappiness: Unset,
    #[serde(default, skip_serializing, rename = "disableOOMKiller")]
    pub disable_oom_killer: Unset,
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
    pub realtime_runtime: Unset,
    #[serde(default, skip_serializing)]
    pub realtime_period: Unset,
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
