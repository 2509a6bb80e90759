//! A container's cgroup v2 files, as the agent sends them, turned into containerd's `Metrics`. The
//! text is the guest's: what does not parse counts as 0, what is unknown is skipped.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};

use crate::fault::Fault;

/// Entries of `io.stat` that are looked at: a guest could make up any number of devices.
const IO_DEVICES: usize = 64;

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
        cpu: MessageField::some(cpu(file("cpu.stat"))),
        memory: MessageField::some(MemoryStat {
            usage: number(file("memory.current")),
            usage_limit: limit(file("memory.max")),
            max_usage: number(file("memory.peak")),
            swap_usage: number(file("memory.swap.current")),
            swap_limit: limit(file("memory.swap.max")),
            swap_max_usage: number(file("memory.swap.peak")),
            ..memory(file("memory.stat"))
        }),
        memory_events: MessageField::some(memory_events(file("memory.events"))),
        io: MessageField::some(io(file("io.stat"))),
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
    fn a_guest_that_lies_makes_nothing_worse() {
        let files = [("cpu.stat", "usage_usec -1\n\u{0}\n"), ("memory.max", "")];
        let files = files
            .map(|(name, text)| (name.to_owned(), text.to_owned()))
            .into();
        let metrics = metrics(&files);
        assert_eq!((metrics.cpu.usage_usec, metrics.memory.usage_limit), (0, 0));
    }
}
