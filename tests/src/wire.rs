//! What the runner on the host and the lab's own init say to each other: one plan on the run's disk, and one
//! line of JSON per report on a virtio-serial port.

use serde::{Deserialize, Serialize};

use crate::containerd::Version;

/// Where the plan lies, seen from inside the lab.
pub const PLAN: &str = "/lab/plan.json";

/// Names of the two virtio-serial ports.
pub const REPORTS: &str = "husk.reports";
pub const OUTPUT: &str = "husk.output";

/// What one boot of the lab is for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    pub job: Job,
    /// The containerd to start first, with the demo image in it; `None`: none.
    pub containerd: Option<Version>,
    /// `/results` lies in memory until the end, so that no measured span waits for a disk.
    pub results_in_memory: bool,
    /// Seconds of lab time that one test may take before it counts as hanging.
    pub limit_secs: u64,
    /// Further environment of the job.
    pub env: Vec<(String, String)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Job {
    /// A shell on the first serial port.
    Shell,
    /// One command, its output streamed.
    Run { command: Vec<String> },
    /// Tests, each in a process of its own.
    Test { cases: Vec<Case> },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The test target (`tests/NAME.rs`); its binary is `/lab/tests/NAME`.
    pub target: String,
    pub name: String,
    /// Whether pods start as clones of a template; else they boot.
    pub clones: bool,
}

impl Case {
    /// As it is shown, chosen and counted: `run::uname_is_the_guest_kernels`, or `run::… (clones)`.
    pub fn title(&self) -> String {
        format!("{}::{}{}", self.target, self.name, self.suffix())
    }

    pub fn suffix(&self) -> &'static str {
        if self.clones { " (clones)" } else { "" }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Report {
    /// The lab lives; sent every second of its own time.
    Beat,
    /// containerd answers, the image is there; uptime in seconds. `None`: the plan wants no containerd.
    Ready {
        uptime: f64,
        /// What the server says it is.
        containerd: Option<String>,
    },
    /// Something the person at the terminal should know.
    Note { text: String },
    /// Case number `index` of the plan begins.
    Start { index: usize },
    End {
        index: usize,
        verdict: Verdict,
        secs: f64,
        output: String,
    },
    /// The job is done and its results are on the disk.
    Exit { status: i32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    Passed,
    Failed,
    TimedOut,
}
