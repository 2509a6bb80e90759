//! A container's cgroup v2 files, as the agent sends them, turned into containerd's `Metrics`. The
//! text is the guest's: what does not parse counts as 0, what is unknown is skipped.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat, RdmaEntry, RdmaStat,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};

use crate::{fault::Fault, untrusted};

/// Entries of `io.stat` that are looked at: a guest could make up any number of devices.
const IO_DEVICES: usize = 64;
/// Sizes of huge pages, and RDMA devices: the same.
const PAGE_SIZES: usize = 16;
const RDMA_DEVICES: usize = 64;

/// `Metrics` as containerd wants them in `StatsResponse`.
pub fn to_any(files: &HashMap<String, String>) -> Result<Any, Fault> {
    Ok(Any {
        type_url: "io.containerd.cgroups.v2.Metrics".into(),
        value: metrics(files).write_to_bytes().map_err(Fault::internal)?,
        ..Any::default()
    })
}

fn metrics(files: &HashMap<String, String>) -> Metrics {
    let file = |name: &str| files.get(name).map_or("", String::as_str);
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number(file("pids.current")),
            limit: limit(file("pids.max")),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            psi: pressure(file("cpu.pressure")),
            ..cpu(file("cpu.stat"))
        }),
        memory: MessageField::some(MemoryStat {
            usage: number(file("memory.current")),
            usage_limit: limit(file("memory.max")),
            max_usage: number(file("memory.peak")),
            swap_usage: number(file("memory.swap.current")),
            swap_limit: limit(file("memory.swap.max")),
            swap_max_usage: number(file("memory.swap.peak")),
            psi: pressure(file("memory.pressure")),
            ..memory(file("memory.stat"))
        }),
        memory_events: MessageField::some(memory_events(file("memory.events"))),
        io: MessageField::some(IOStat {
            psi: pressure(file("io.pressure")),
            ..io(file("io.stat"))
        }),
        rdma: MessageField::some(RdmaStat {
            current: rdma(file("rdma.current")),
            limit: rdma(file("rdma.max")),
            ..RdmaStat::default()
        }),
        hugetlb: hugetlb(files),
        ..Metrics::default()
    }
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// "max" is no limit, which the largest number stands for.
fn limit(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        text => number(text),
    }
}

/// Lines of `key value`.
fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, number(value)))
    })
}

fn cpu(text: &str) -> CPUStat {
    let mut stat = CPUStat::default();
    for (key, value) in pairs(text) {
        match key {
            "usage_usec" => stat.usage_usec = value,
            "user_usec" => stat.user_usec = value,
            "system_usec" => stat.system_usec = value,
            "nr_periods" => stat.nr_periods = value,
            "nr_throttled" => stat.nr_throttled = value,
            "throttled_usec" => stat.throttled_usec = value,
            "nr_bursts" => stat.nr_bursts = value,
            "burst_usec" => stat.burst_usec = value,
            _ => {}
        }
    }
    stat
}

fn memory(text: &str) -> MemoryStat {
    let mut stat = MemoryStat::default();
    for (key, value) in pairs(text) {
        match key {
            "anon" => stat.anon = value,
            "file" => stat.file = value,
            "kernel_stack" => stat.kernel_stack = value,
            "slab" => stat.slab = value,
            "sock" => stat.sock = value,
            "shmem" => stat.shmem = value,
            "file_mapped" => stat.file_mapped = value,
            "file_dirty" => stat.file_dirty = value,
            "file_writeback" => stat.file_writeback = value,
            "anon_thp" => stat.anon_thp = value,
            "inactive_anon" => stat.inactive_anon = value,
            "active_anon" => stat.active_anon = value,
            "inactive_file" => stat.inactive_file = value,
            "active_file" => stat.active_file = value,
            "unevictable" => stat.unevictable = value,
            "slab_reclaimable" => stat.slab_reclaimable = value,
            "slab_unreclaimable" => stat.slab_unreclaimable = value,
            "pgfault" => stat.pgfault = value,
            "pgmajfault" => stat.pgmajfault = value,
            "workingset_refault" => stat.workingset_refault = value,
            "workingset_activate" => stat.workingset_activate = value,
            "workingset_nodereclaim" => stat.workingset_nodereclaim = value,
            "pgrefill" => stat.pgrefill = value,
            "pgscan" => stat.pgscan = value,
            "pgsteal" => stat.pgsteal = value,
            "pgactivate" => stat.pgactivate = value,
            "pgdeactivate" => stat.pgdeactivate = value,
            "pglazyfree" => stat.pglazyfree = value,
            "pglazyfreed" => stat.pglazyfreed = value,
            "thp_fault_alloc" => stat.thp_fault_alloc = value,
            "thp_collapse_alloc" => stat.thp_collapse_alloc = value,
            _ => {}
        }
    }
    stat
}

fn memory_events(text: &str) -> MemoryEvents {
    let mut events = MemoryEvents::default();
    for (key, value) in pairs(text) {
        match key {
            "low" => events.low = value,
            "high" => events.high = value,
            "max" => events.max = value,
            "oom" => events.oom = value,
            "oom_kill" => events.oom_kill = value,
            "oom_group_kill" => events.oom_group_kill = value,
            _ => {}
        }
    }
    events
}

/// Lines of `major:minor key=value …`.
fn io(text: &str) -> IOStat {
    let entry = |line: &str| -> Option<IOEntry> {
        let mut fields = line.split(' ');
        let (major, minor) = fields.next()?.split_once(':')?;
        let mut entry = IOEntry {
            major: number(major),
            minor: number(minor),
            ..IOEntry::default()
        };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            match key {
                "rbytes" => entry.rbytes = number(value),
                "wbytes" => entry.wbytes = number(value),
                "rios" => entry.rios = number(value),
                "wios" => entry.wios = number(value),
                _ => {}
            }
        }
        Some(entry)
    };
    IOStat {
        usage: text.lines().filter_map(entry).take(IO_DEVICES).collect(),
        ..IOStat::default()
    }
}

/// Lines `some` and `full` of `avg10=0.00 avg60=0.00 avg300=0.00 total=0`; nothing where there is no such file.
fn pressure(text: &str) -> MessageField<PSIStats> {
    let line = |kind: &str| -> MessageField<PSIData> {
        let Some(line) = text.lines().find_map(|line| line.strip_prefix(kind)) else {
            return MessageField::none();
        };
        let mut data = PSIData::default();
        for (key, value) in line
            .split_whitespace()
            .filter_map(|field| field.split_once('='))
        {
            let average = || {
                let average = value.parse().unwrap_or(0.0);
                if f64::is_finite(average) {
                    average
                } else {
                    0.0
                }
            };
            match key {
                "avg10" => data.avg10 = average(),
                "avg60" => data.avg60 = average(),
                "avg300" => data.avg300 = average(),
                "total" => data.total = number(value),
                _ => {}
            }
        }
        MessageField::some(data)
    };
    if text.is_empty() {
        return MessageField::none();
    }
    MessageField::some(PSIStats {
        some: line("some "),
        full: line("full "),
        ..PSIStats::default()
    })
}

/// Lines of `device hca_handle=… hca_object=…`; "max" is the largest number.
fn rdma(text: &str) -> Vec<RdmaEntry> {
    let count = |value: &str| match value {
        "max" => u32::MAX,
        value => value.parse().unwrap_or(0),
    };
    let entry = |line: &str| -> Option<RdmaEntry> {
        let mut fields = line.split_whitespace();
        let mut entry = RdmaEntry {
            device: untrusted::message(fields.next()?),
            ..RdmaEntry::default()
        };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            match key {
                "hca_handle" => entry.hca_handles = count(value),
                "hca_object" => entry.hca_objects = count(value),
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).take(RDMA_DEVICES).collect()
}

/// Files `hugetlb.<size>.current` and their like, the sizes in order.
fn hugetlb(files: &HashMap<String, String>) -> Vec<HugeTlbStat> {
    let size = |name: &str| -> Option<String> {
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
        let plain = !size.is_empty() && size.bytes().all(|byte| byte.is_ascii_alphanumeric());
        (plain && size.len() <= 16).then(|| size.into())
    };
    let mut sizes: Vec<String> = files.keys().filter_map(|name| size(name)).collect();
    sizes.sort_unstable();
    sizes.truncate(PAGE_SIZES);
    let stat = |size: String| {
        let file = |kind: &str| {
            let text = files.get(&format!("hugetlb.{size}.{kind}"));
            text.map_or("", String::as_str)
        };
        HugeTlbStat {
            current: number(file("current")),
            max: limit(file("max")),
            failcnt: pairs(file("events"))
                .find_map(|(key, value)| (key == "max").then_some(value))
                .unwrap_or(0),
            pagesize: size.clone(),
            ..HugeTlbStat::default()
        }
    };
    sizes.into_iter().map(stat).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let files = [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 1200\nuser_usec 800\nsystem_usec 400\ncore_sched 1\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.max", "134217728\n"),
            ("memory.stat", "anon 100\nfile 200\ninactive_file 50\n"),
            ("memory.events", "low 0\noom 1\noom_kill 2\n"),
            ("io.stat", "8:0 rbytes=1 wbytes=2 rios=3 wios=4\nbroken\n"),
        ];
        let files = files
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .into();
        let metrics = metrics(&files);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (3, u64::MAX));
        assert_eq!(
            (metrics.cpu.usage_usec, metrics.cpu.system_usec),
            (1200, 400)
        );
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit),
            (4096, 134_217_728)
        );
        assert_eq!(
            (metrics.memory.anon, metrics.memory.inactive_file),
            (100, 50)
        );
        assert_eq!(metrics.memory_events.oom_kill, 2);
        assert_eq!((metrics.io.usage.len(), metrics.io.usage[0].wios), (1, 4));
        assert!(!to_any(&files).unwrap().value.is_empty());
    }

    #[test]
    fn pressure_huge_pages_and_rdma_are_told() {
        let psi = "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=9\n";
        let files = [
            ("cpu.pressure", psi),
            ("memory.pressure", psi),
            ("io.pressure", psi),
            (
                "memory.stat",
                "pgscan 5\nthp_collapse_alloc 6\nworkingset_nodereclaim 7\npglazyfreed 8\n",
            ),
            ("memory.events", "oom_group_kill 3\n"),
            ("hugetlb.2MB.current", "4096\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 4\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
            ("rdma.max", "mlx4_0 hca_handle=3 hca_object=max\n"),
        ];
        let files = files.map(|(name, text)| (name.to_owned(), text.to_owned()));
        let metrics = metrics(&files.into());
        for psi in [&metrics.cpu.psi, &metrics.memory.psi, &metrics.io.psi] {
            assert_eq!(
                (psi.some.avg10, psi.some.avg60, psi.some.total),
                (1.5, 0.25, 77)
            );
            assert_eq!(psi.full.total, 9);
        }
        let memory = &metrics.memory;
        assert_eq!((memory.pgscan, memory.thp_collapse_alloc), (5, 6));
        assert_eq!((memory.workingset_nodereclaim, memory.pglazyfreed), (7, 8));
        assert_eq!(metrics.memory_events.oom_group_kill, 3);
        let [huge] = metrics.hugetlb.as_slice() else {
            panic!("{:?}", metrics.hugetlb)
        };
        assert_eq!((huge.pagesize.as_str(), huge.current), ("2MB", 4096));
        assert_eq!((huge.max, huge.failcnt), (u64::MAX, 4));
        assert_eq!(metrics.rdma.current[0].hca_objects, 2000);
        assert_eq!(metrics.rdma.limit[0].hca_objects, u32::MAX);
    }

    #[test]
    fn a_guest_that_lies_makes_nothing_worse() {
        let files = [("cpu.stat", "usage_usec -1\n\u{0}\n"), ("memory.max", "")];
        let files = files
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .into();
        let metrics = metrics(&files);
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage_limit), (0, 0));
    }
}
