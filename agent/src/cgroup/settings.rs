//! Resources of the specification as files of cgroup v2: pure conversions, runc's arithmetic.
//!
//! Owned by `cgroup`, which writes the files in the order given here. Must never touch the system.

use crate::spec::Problem;
use crate::spec::resources::{BlockIo, Cpu, Memory, Resources};

/// A file of the container's cgroup and what is to be written into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub file: String,
    pub value: String,
    pub refused: Refused,
}

/// What it means when the kernel refuses a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    Failure,
    /// This error number means that there is nothing to limit, or that the setting comes again later.
    Harmless(i32),
    /// The user named the file: the error says whether its controller is there.
    Unified,
}

fn setting(file: impl Into<String>, value: impl ToString) -> Setting {
    Setting {
        file: file.into(),
        value: value.to_string(),
        refused: Refused::Failure,
    }
}

/// All files to write for `resources`, in order. Devices are not among them.
pub fn settings(resources: &Resources) -> Result<Vec<Setting>, Problem> {
    let mut list = Vec::new();
    cpu(&resources.cpu, &mut list);
    memory(&resources.memory, &mut list)?;
    io(&resources.block_io, &mut list)?;
    match resources.pids.limit {
        None | Some(0) => {}
        Some(limit) => list.push(setting("pids.max", bytes(limit))),
    }
    for (i, page) in resources.hugepage_limits.iter().enumerate() {
        if !page.page_size.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Problem::new(
                format!("linux.resources.hugepageLimits[{i}].pageSize"),
                format!("{:?} is no page size", page.page_size),
            ));
        }
        list.push(setting(
            format!("hugetlb.{}.max", page.page_size),
            page.limit,
        ));
        // Reservations, which older kernels do not count.
        list.push(Setting {
            refused: Refused::Harmless(libc::ENOENT),
            ..setting(format!("hugetlb.{}.rsvd.max", page.page_size), page.limit)
        });
    }
    for (file, value) in &resources.unified {
        unified(file, value, &mut list)?;
    }
    Ok(list)
}

fn unified(file: &str, value: &str, list: &mut Vec<Setting>) -> Result<(), Problem> {
    let wrong = |what: &str| {
        let field = format!("linux.resources.unified.{file}");
        Err(Problem::new(field, what))
    };
    // A name of one file: nothing that leads out of the container's own cgroup.
    if file.contains(['/', '\0']) {
        return wrong("must be a file name (no slashes)");
    }
    match file.split_once('.') {
        None | Some(("", _)) | Some((_, "")) => {
            return wrong("must be in the form CONTROLLER.PARAMETER");
        }
        // The others move, stop or end processes, behind the back of whoever made the container.
        Some(("cgroup", name)) if !matches!(name, "max.depth" | "max.descendants" | "pressure") => {
            return wrong("is not a resource");
        }
        Some(_) => {}
    }
    // The kernel takes one line at a time; an empty value is one, too.
    let lines = value.lines().filter(|line| !line.is_empty());
    let empty = value.is_empty().then_some("");
    for line in lines.chain(empty) {
        list.push(Setting {
            refused: Refused::Unified,
            ..setting(file, line)
        });
    }
    Ok(())
}

fn io(io: &BlockIo, list: &mut Vec<Setting>) -> Result<(), Problem> {
    match io.weight {
        None | Some(0) => {}
        // 10 to 1000 of cgroup v1 onto 1 to 10000, linearly.
        Some(weight @ 10..=1000) => {
            let weight = 1 + (u64::from(weight) - 10) * 9_999 / 990;
            list.push(setting("io.weight", weight));
        }
        Some(weight) => {
            return Err(Problem::new(
                "linux.resources.blockIO.weight",
                format!("{weight} is not within 10 to 1000"),
            ));
        }
    }
    for (devices, key) in [
        (&io.throttle_read_bps_device, "rbps"),
        (&io.throttle_write_bps_device, "wbps"),
        (&io.throttle_read_iops_device, "riops"),
        (&io.throttle_write_iops_device, "wiops"),
    ] {
        for device in devices {
            let value = format!("{}:{} {key}={}", device.major, device.minor, device.rate);
            list.push(setting("io.max", value));
        }
    }
    Ok(())
}

fn cpu(cpu: &Cpu, list: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle {
        list.push(setting("cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares.filter(|&shares| shares != 0) {
        list.push(setting("cpu.weight", weight(shares)));
    }
    let (quota, period) = (cpu.quota.unwrap_or(0), cpu.period.unwrap_or(0));
    // A burst is at most the quota, the old one as well as the new one: once before, where it shrinks, and once
    // behind, where it grows.
    if let Some(burst) = cpu.burst.filter(|_| quota != 0) {
        list.push(Setting {
            refused: Refused::Harmless(libc::EINVAL),
            ..setting("cpu.max.burst", burst)
        });
    }
    if quota != 0 || period != 0 {
        let quota = if quota > 0 {
            quota.to_string()
        } else {
            "max".into()
        };
        let period = if period == 0 { 100_000 } else { period };
        list.push(setting("cpu.max", format!("{quota} {period}")));
    }
    if let Some(burst) = cpu.burst {
        list.push(setting("cpu.max.burst", burst));
    }
    for (file, value) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if !value.is_empty() {
            list.push(setting(file, value));
        }
    }
}

/// 2 to 262144 of cgroup v1 onto 1 to 10000, with v1's default, 1024, at v2's, 100: the curve through these three that
/// runc has from 1.3.2 on, and crun.
fn weight(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        3..262_144 => {
            #[allow(clippy::cast_precision_loss, reason = "below 2^18")]
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            #[allow(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "between 1 and 10000"
            )]
            let weight = 10_f64.powf(exponent).ceil() as u64;
            weight
        }
        _ => 10_000,
    }
}

fn bytes(value: i64) -> String {
    if value < 0 {
        "max".into()
    } else {
        value.to_string()
    }
}

fn memory(memory: &Memory, list: &mut Vec<Setting>) -> Result<(), Problem> {
    let limit = memory.limit.unwrap_or(0);
    let swap = swap(limit, memory.swap.unwrap_or(0))?;
    // Swap first when it grows, or the memory limit would be met by swapping less: runc's order.
    if let Some(value) = swap {
        // A kernel without swap has no such file; what needs none is met there.
        let met = value == "max" || value == "0";
        list.push(Setting {
            refused: if met {
                Refused::Harmless(libc::ENOENT)
            } else {
                Refused::Failure
            },
            ..setting("memory.swap.max", value)
        });
    }
    if limit != 0 {
        list.push(setting("memory.max", bytes(limit)));
    }
    match memory.reservation {
        None | Some(0) => {}
        Some(reservation) => list.push(setting("memory.low", bytes(reservation))),
    }
    Ok(())
}

/// cgroup v1 counts memory and swap together, cgroup v2 swap alone.
fn swap(limit: i64, both: i64) -> Result<Option<String>, Problem> {
    let wrong = |what: &str| Err(Problem::new("linux.resources.memory.swap", what));
    match (limit, both) {
        // For compatibility with v1: unlimited memory means unlimited swap, unless said otherwise.
        (-1, 0) | (_, -1) => Ok(Some("max".into())),
        (_, 0) => Ok(None),
        (_, ..0) => wrong("is negative"),
        (..=0, _) => wrong("needs a memory limit"),
        (limit, both) if both < limit => wrong("is below the memory limit"),
        (limit, both) => Ok(Some((both - limit).to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>, String> {
        let resources = crate::spec::parse(json.as_bytes()).map_err(|e| e.to_string())?;
        let list = settings(&resources).map_err(|e| e.to_string())?;
        Ok(list.into_iter().map(|one| (one.file, one.value)).collect())
    }

    #[test]
    fn cpu_as_runc_converts_it() {
        for (json, file, value) in [
            (r#"{"cpu":{"shares":2}}"#, "cpu.weight", "1"),
            (r#"{"cpu":{"shares":3}}"#, "cpu.weight", "2"),
            (r#"{"cpu":{"shares":512}}"#, "cpu.weight", "59"),
            (r#"{"cpu":{"shares":1024}}"#, "cpu.weight", "100"),
            (r#"{"cpu":{"shares":262143}}"#, "cpu.weight", "10000"),
            (r#"{"cpu":{"shares":262144}}"#, "cpu.weight", "10000"),
            (
                r#"{"cpu":{"shares":18446744073709551615}}"#,
                "cpu.weight",
                "10000",
            ),
            (r#"{"cpu":{"quota":50000}}"#, "cpu.max", "50000 100000"),
            (
                r#"{"cpu":{"quota":-1,"period":20000}}"#,
                "cpu.max",
                "max 20000",
            ),
            (r#"{"cpu":{"cpus":"0-1"}}"#, "cpuset.cpus", "0-1"),
            (r#"{"pids":{"limit":-1}}"#, "pids.max", "max"),
            (r#"{"pids":{"limit":20}}"#, "pids.max", "20"),
        ] {
            assert_eq!(
                of(json).unwrap(),
                [(file.to_string(), value.to_string())],
                "{json}"
            );
        }
        assert!(
            of(r#"{"cpu":{"shares":0},"pids":{"limit":0},"memory":{}}"#)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn memory_and_swap_as_runc_converts_them() {
        let pair = |file: &str, value: &str| (file.to_string(), value.to_string());
        assert_eq!(
            of(r#"{"memory":{"limit":1000,"swap":1500,"reservation":10}}"#).unwrap(),
            [
                pair("memory.swap.max", "500"),
                pair("memory.max", "1000"),
                pair("memory.low", "10")
            ]
        );
        assert_eq!(
            of(r#"{"memory":{"limit":-1}}"#).unwrap(),
            [pair("memory.swap.max", "max"), pair("memory.max", "max")]
        );
        assert_eq!(
            of(r#"{"memory":{"limit":5,"swap":5}}"#).unwrap()[0],
            pair("memory.swap.max", "0")
        );
        for wrong in [
            r#"{"limit":10,"swap":5}"#,
            r#"{"swap":5}"#,
            r#"{"limit":1,"swap":-2}"#,
        ] {
            let error = of(&format!(r#"{{"memory":{wrong}}}"#)).unwrap_err();
            assert!(
                error.starts_with("linux.resources.memory.swap: "),
                "{error}"
            );
        }
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        for (json, field) in [
            (r#"{"rdma":{"mlx5_1":{"hcaHandles":3}}}"#, "rdma"),
            (
                r#"{"blockIO":{"weight":9}}"#,
                "linux.resources.blockIO.weight",
            ),
            (
                r#"{"unified":{"memory":"1"}}"#,
                "linux.resources.unified.memory",
            ),
            (
                r#"{"unified":{"../x.y":"1"}}"#,
                "linux.resources.unified.../x.y",
            ),
            (
                r#"{"unified":{"cgroup.procs":"1"}}"#,
                "linux.resources.unified.cgroup.procs",
            ),
            (
                r#"{"hugepageLimits":[{"pageSize":"../2","limit":1}]}"#,
                "linux.resources.hugepageLimits[0].pageSize",
            ),
        ] {
            let error = of(json).unwrap_err();
            assert!(error.starts_with(&format!("{field}: ")), "{json}: {error}");
        }
        assert!(
            of(r#"{"blockIO":{"weight":0},"network":{},"memory":{"disableOOMKiller":false}}"#)
                .is_ok()
        );
    }

    #[test]
    fn what_cgroup_v2_has_no_place_for_is_named_and_writes_nothing() {
        for (json, field) in [
            (r#"{"memory":{"kernel":5}}"#, "memory.kernel"),
            (r#"{"memory":{"kernelTCP":5}}"#, "memory.kernelTCP"),
            (r#"{"memory":{"swappiness":60}}"#, "memory.swappiness"),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "memory.disableOOMKiller",
            ),
            (
                r#"{"memory":{"useHierarchy":false}}"#,
                "memory.useHierarchy",
            ),
            (r#"{"cpu":{"realtimePeriod":5}}"#, "cpu.realtimePeriod"),
            (r#"{"cpu":{"realtimeRuntime":5}}"#, "cpu.realtimeRuntime"),
            (
                r#"{"blockIO":{"weightDevice":[{"major":8,"minor":0,"weight":50}]}}"#,
                "blockIO.weightDevice",
            ),
            (r#"{"blockIO":{"leafWeight":50}}"#, "blockIO.leafWeight"),
            (r#"{"network":{"classID":5}}"#, "network"),
        ] {
            assert!(of(json).unwrap().is_empty(), "{json}");
            let resources: Resources = crate::spec::parse(json.as_bytes()).unwrap();
            assert_eq!(
                resources.without_effect(),
                [format!("linux.resources.{field}")]
            );
        }
    }

    #[test]
    fn io_as_runc_converts_it() {
        let all = r#"{"blockIO":{"weight":500,
            "throttleReadBpsDevice":[{"major":7,"minor":1,"rate":10}],
            "throttleWriteBpsDevice":[{"major":7,"minor":2,"rate":20}],
            "throttleReadIOPSDevice":[{"major":7,"minor":3,"rate":30}],
            "throttleWriteIOPSDevice":[{"major":7,"minor":4,"rate":40}]}}"#;
        let list = of(all).unwrap();
        let expected = [
            ("io.weight", "4950"),
            ("io.max", "7:1 rbps=10"),
            ("io.max", "7:2 wbps=20"),
            ("io.max", "7:3 riops=30"),
            ("io.max", "7:4 wiops=40"),
        ];
        assert_eq!(
            list,
            expected.map(|(file, value)| (file.into(), value.into()))
        );
        for (weight, value) in [(10, "1"), (1000, "10000")] {
            let json = format!(r#"{{"blockIO":{{"weight":{weight}}}}}"#);
            assert_eq!(of(&json).unwrap()[0].1, value);
        }
    }

    #[test]
    fn a_burst_is_written_on_both_sides_of_the_quota() {
        let files = |json: &str| -> Vec<String> {
            of(json)
                .unwrap()
                .into_iter()
                .map(|(file, _)| file)
                .collect()
        };
        assert_eq!(
            files(r#"{"cpu":{"quota":5000,"burst":1000}}"#),
            ["cpu.max.burst", "cpu.max", "cpu.max.burst"]
        );
        assert_eq!(files(r#"{"cpu":{"burst":1000}}"#), ["cpu.max.burst"]);
    }

    #[test]
    fn reservations_of_huge_pages_are_limited_with_their_use() {
        let list = of(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":4194304}]}"#).unwrap();
        let expected = [
            ("hugetlb.2MB.max", "4194304"),
            ("hugetlb.2MB.rsvd.max", "4194304"),
        ];
        assert_eq!(
            list,
            expected.map(|(file, value)| (file.into(), value.into()))
        );
    }

    #[test]
    fn unified_files_come_last_and_as_they_are() {
        let list =
            of(r#"{"pids":{"limit":5},"unified":{"pids.max":"7","memory.high":"1M"}}"#).unwrap();
        assert_eq!(
            list.last().unwrap(),
            &("pids.max".to_string(), "7".to_string())
        );
        assert_eq!(list.len(), 3);
        let lines = of(r#"{"unified":{"io.max":"7:0 rbps=1\n7:1 rbps=2\n"}}"#).unwrap();
        assert_eq!(lines.len(), 2);
        assert!(of(r#"{"unified":{"cgroup.max.depth":"3"}}"#).is_ok());
    }
}
