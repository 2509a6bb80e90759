//! When a process runs, and where: `process.scheduler`, `process.ioPriority` and `process.execCPUAffinity` (OCI runtime
//! specification 1.2, "Linux Process").
//!
//! Data and its validity, which is runc's; `oci_init::scheduling` gives it to the kernel.

use serde::{Deserialize, Serialize};

use super::{Problem, or_default};

/// Processors are numbered below this (CONFIG_NR_CPUS of the largest kernels is 8192; ours has 64).
const PROCESSORS: usize = 1024;

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Scheduler {
    pub policy: Policy,
    #[serde(default)]
    pub nice: i32,
    #[serde(default)]
    pub priority: i32,
    #[serde(default, deserialize_with = "or_default")]
    pub flags: Vec<SchedulerFlag>,
    /// Nanoseconds, these three.
    #[serde(default)]
    pub runtime: u64,
    #[serde(default)]
    pub deadline: u64,
    #[serde(default)]
    pub period: u64,
}

/// The numbers are the kernel's (linux/sched.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[allow(clippy::enum_variant_names, reason = "the names of the specification")]
pub enum Policy {
    #[serde(rename = "SCHED_OTHER")]
    Other = 0,
    #[serde(rename = "SCHED_FIFO")]
    Fifo = 1,
    #[serde(rename = "SCHED_RR")]
    RoundRobin = 2,
    #[serde(rename = "SCHED_BATCH")]
    Batch = 3,
    #[serde(rename = "SCHED_ISO")]
    Iso = 4,
    #[serde(rename = "SCHED_IDLE")]
    Idle = 5,
    #[serde(rename = "SCHED_DEADLINE")]
    Deadline = 6,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum SchedulerFlag {
    #[serde(rename = "SCHED_FLAG_RESET_ON_FORK")]
    ResetOnFork = 0x01,
    #[serde(rename = "SCHED_FLAG_RECLAIM")]
    Reclaim = 0x02,
    #[serde(rename = "SCHED_FLAG_DL_OVERRUN")]
    DeadlineOverrun = 0x04,
    #[serde(rename = "SCHED_FLAG_KEEP_POLICY")]
    KeepPolicy = 0x08,
    #[serde(rename = "SCHED_FLAG_KEEP_PARAMS")]
    KeepParameters = 0x10,
    #[serde(rename = "SCHED_FLAG_UTIL_CLAMP_MIN")]
    UtilisationMinimum = 0x20,
    #[serde(rename = "SCHED_FLAG_UTIL_CLAMP_MAX")]
    UtilisationMaximum = 0x40,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IoPriority {
    pub class: IoClass,
    /// 0 to 7.
    #[serde(default)]
    pub priority: i32,
}

/// The numbers are the kernel's (linux/ioprio.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum IoClass {
    #[serde(rename = "IOPRIO_CLASS_RT")]
    RealTime = 1,
    #[serde(rename = "IOPRIO_CLASS_BE")]
    BestEffort = 2,
    #[serde(rename = "IOPRIO_CLASS_IDLE")]
    Idle = 3,
}

/// Lists of processors, as in `0-3,7`; empty means nothing is said.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CpuAffinity {
    /// Until the process is in the container.
    #[serde(default, deserialize_with = "or_default")]
    pub initial: String,
    /// From then on.
    #[serde(default, rename = "final", deserialize_with = "or_default")]
    pub last: String,
}

impl Scheduler {
    pub(super) fn validate(&self, at: &str) -> Result<(), Problem> {
        let timed = self.runtime != 0 || self.deadline != 0 || self.period != 0;
        let nice = matches!(self.policy, Policy::Other | Policy::Batch);
        let real_time = matches!(self.policy, Policy::Fifo | Policy::RoundRobin);
        if nice && !(-20..=19).contains(&self.nice) {
            let what = format!("{} is not within -20 to 19", self.nice);
            return Err(Problem::new(format!("{at}.nice"), what));
        }
        if self.priority != 0 && !real_time || self.priority < 0 {
            let what = "can only be specified for SCHED_FIFO or SCHED_RR";
            return Err(Problem::new(format!("{at}.priority"), what));
        }
        if timed && self.policy != Policy::Deadline {
            let what = "can only be specified for SCHED_DEADLINE";
            return Err(Problem::new(
                format!("{at}.runtime, deadline or period"),
                what,
            ));
        }
        Ok(())
    }
}

impl IoPriority {
    pub(super) fn validate(&self, at: &str) -> Result<(), Problem> {
        if (0..=7).contains(&self.priority) {
            return Ok(());
        }
        let what = format!("{} is not within 0 to 7", self.priority);
        Err(Problem::new(format!("{at}.priority"), what))
    }
}

impl CpuAffinity {
    pub(super) fn validate(&self, at: &str) -> Result<(), Problem> {
        for (name, list) in [("initial", &self.initial), ("final", &self.last)] {
            processors(list).ok_or_else(|| {
                Problem::new(
                    format!("{at}.{name}"),
                    format!("{list:?} is no list of processors"),
                )
            })?;
        }
        Ok(())
    }
}

/// The numbers in a list as `0-3,7`; none in an empty one.
pub fn processors(list: &str) -> Option<Vec<usize>> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number: usize = text.parse().ok().filter(|_| digits)?;
        (number < PROCESSORS).then_some(number)
    };
    let mut numbers = Vec::new();
    for part in list.split(',').filter(|_| !list.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first.trim())?, number(last.trim())?);
        if first > last {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors() {
        assert_eq!(processors("0-2,7").unwrap(), [0, 1, 2, 7]);
        assert_eq!(processors(" 3 , 5-5").unwrap(), [3, 5]);
        assert!(processors("").unwrap().is_empty());
        for wrong in [
            "x",
            "1-",
            "3-1",
            "1,,2",
            "-1",
            "+1",
            "1024",
            "0-99999999999999999999",
        ] {
            assert!(processors(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn what_runc_refuses_is_refused_by_name() {
        for (json, field) in [
            (r#"{"policy":"SCHED_OTHER","nice":20}"#, "s.nice"),
            (r#"{"policy":"SCHED_BATCH","priority":1}"#, "s.priority"),
            (r#"{"policy":"SCHED_FIFO","priority":-1}"#, "s.priority"),
            (
                r#"{"policy":"SCHED_RR","runtime":5}"#,
                "s.runtime, deadline or period",
            ),
        ] {
            let scheduler: Scheduler = crate::spec::parse(json.as_bytes()).unwrap();
            let problem = scheduler.validate("s").unwrap_err().to_string();
            assert!(problem.starts_with(&format!("{field}: ")), "{problem}");
        }
        assert!(crate::spec::parse::<Scheduler>(br#"{"nice":1}"#).is_err());
        assert!(crate::spec::parse::<Scheduler>(br#"{"policy":"SCHED_X"}"#).is_err());
        let priority: IoPriority =
            crate::spec::parse(br#"{"class":"IOPRIO_CLASS_BE","priority":8}"#).unwrap();
        assert!(priority.validate("i").is_err());
        assert!(crate::spec::parse::<IoPriority>(br#"{"class":"X"}"#).is_err());
    }
}
