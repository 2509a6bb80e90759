//! Resources of the specification as files of cgroup v2: pure conversions, runc's arithmetic.
//!
//! Owned by `cgroup`, which writes the files in the order given here. Must never touch the system.

use crate::spec::Problem;
use crate::spec::resources::{Cpu, Memory, Resources};

/// A file of the container's cgroup and what is to be written into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub file: String,
    pub value: String,
    /// A kernel without swap has no such file, and no swap to limit.
    pub may_be_missing: bool,
}

fn setting(file: impl Into<String>, value: impl ToString) -> Setting {
    Setting {
        file: file.into(),
        value: value.to_string(),
        may_be_missing: false,
    }
}

/// All files to write for `resources`, in order. Devices are not among them.
pub fn settings(resources: &Resources) -> Result<Vec<Setting>, Problem> {
    let mut list = Vec::new();
    cpu(&resources.cpu, &mut list);
    memory(&resources.memory, &mut list)?;
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
    }
    for (file, value) in &resources.unified {
        // A name of one file: nothing that leads out of the container's own cgroup.
        if file.contains(['/', '\0'])
            || !file.contains('.')
            || file.starts_with('.')
            || file.starts_with("cgroup.")
        {
            return Err(Problem::new(
                format!("linux.resources.unified.{file}"),
                "is no file of a resource",
            ));
        }
        list.push(setting(file, value));
    }
    Ok(list)
}

fn cpu(cpu: &Cpu, list: &mut Vec<Setting>) {
    if let Some(idle) = cpu.idle {
        list.push(setting("cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares.filter(|&shares| shares != 0) {
        list.push(setting("cpu.weight", weight(shares)));
    }
    let (quota, period) = (cpu.quota.unwrap_or(0), cpu.period.unwrap_or(0));
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

/// 2 to 262144 of cgroup v1 onto 1 to 10000, linearly.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9_999 / 262_142
}

fn bytes(value: i64) -> String {
    if value < 0 {
        "max".into()
    } else {
        value.to_string()
    }
}

fn memory(memory: &Memory, list: &mut Vec<Setting>) -> Result<(), Problem> {
    if memory.use_hierarchy == Some(false) {
        return Err(Problem::new(
            "linux.resources.memory.useHierarchy",
            "false is not possible in cgroup v2",
        ));
    }
    let limit = memory.limit.unwrap_or(0);
    let swap = swap(limit, memory.swap.unwrap_or(0))?;
    // Swap first when it grows, or the memory limit would be met by swapping less: runc's order.
    if let Some(value) = swap {
        list.push(Setting {
            may_be_missing: true,
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
            (r#"{"cpu":{"shares":1024}}"#, "cpu.weight", "39"),
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
            (r#"{"memory":{"kernel":5}}"#, "memory.kernel"),
            (r#"{"memory":{"swappiness":60}}"#, "memory.swappiness"),
            (
                r#"{"memory":{"disableOOMKiller":true}}"#,
                "memory.disableOOMKiller",
            ),
            (r#"{"cpu":{"realtimePeriod":5}}"#, "cpu.realtimePeriod"),
            (r#"{"blockIO":{"weight":5}}"#, "blockIO"),
            (r#"{"network":{"classID":5}}"#, "network"),
            (r#"{"rdma":{"mlx5_1":{"hcaHandles":3}}}"#, "rdma"),
            (
                r#"{"memory":{"useHierarchy":false}}"#,
                "linux.resources.memory.useHierarchy",
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
    fn unified_files_come_last_and_as_they_are() {
        let list =
            of(r#"{"pids":{"limit":5},"unified":{"pids.max":"7","memory.high":"1M"}}"#).unwrap();
        assert_eq!(
            list.last().unwrap(),
            &("pids.max".to_string(), "7".to_string())
        );
        assert_eq!(list.len(), 3);
    }
}
