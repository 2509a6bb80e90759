//! When the process runs, and where, as the specification says (`spec::scheduling`).
//!
//! Called while it is root still: most of it takes a capability.

use rustix::thread::{CpuSet, sched_setaffinity};

use super::failure::{Explain, Failure};
use crate::spec::process::Process;
use crate::spec::scheduling::processors;
use crate::sys::{self, SchedulerAttributes};

/// The scheduler's policy and the priority of input and output.
pub(super) fn schedule(process: &Process) -> Result<(), Failure> {
    if let Some(priority) = &process.io_priority {
        let level = u16::try_from(priority.priority).unwrap_or_default();
        sys::set_io_priority(priority.class as u16, level)
            .request(|| format!("process.ioPriority: set {priority:?}"))?;
    }
    if let Some(scheduler) = &process.scheduler {
        let attributes = SchedulerAttributes {
            policy: scheduler.policy as u32,
            flags: scheduler.flags.iter().fold(0, |all, &one| all | one as u64),
            nice: scheduler.nice,
            priority: scheduler.priority.unsigned_abs(),
            runtime: scheduler.runtime,
            deadline: scheduler.deadline,
            period: scheduler.period,
            ..SchedulerAttributes::default()
        };
        sys::set_scheduler(&attributes)
            .request(|| format!("process.scheduler: set {:?}", scheduler.policy))?;
    }
    Ok(())
}

/// The processors of an added process, on its way into the container and in it: `name` is the list's. A list without
/// any processor of the container's is an error, as with runc.
pub(super) fn pin(name: &str, list: &str) -> Result<(), Failure> {
    let numbers = processors(list).unwrap_or_default();
    if numbers.is_empty() {
        return Ok(());
    }
    let mut set = CpuSet::new();
    for number in numbers
        .into_iter()
        .filter(|&number| number < CpuSet::MAX_CPU)
    {
        set.set(number);
    }
    sched_setaffinity(None, &set)
        .request(|| format!("process.execCPUAffinity.{name}: set {list:?}"))
}
