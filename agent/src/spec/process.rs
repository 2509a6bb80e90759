//! The `process` object (OCI runtime specification 1.2, "Process" and "Linux Process").
//!
//! Data and its validity. It must never look at the system: whether a user or a file exists is found
//! out inside the container, by `oci_init`.

use std::collections::HashSet;

use rustix::process::Resource;
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use super::scheduling::{CpuAffinity, IoPriority, Scheduler};
use super::unset::{Ignored, Unset};
use super::{Problem, or_default};

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Process {
    #[serde(default)]
    pub terminal: bool,
    /// The terminal's size when it is opened; characters.
    #[serde(default)]
    pub console_size: Option<ConsoleSize>,
    #[serde(default)]
    pub user: User,
    #[serde(default, deserialize_with = "or_default")]
    pub args: Vec<String>,
    /// `NAME=value`; of several with one name the last counts (`oci_init`).
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    pub cwd: String,
    /// `None` for init means none; for an added process, those of the container's init.
    #[serde(default)]
    pub capabilities: Option<Capabilities>,
    #[serde(default, deserialize_with = "or_default")]
    pub rlimits: Vec<Rlimit>,
    /// `None` for an added process means what the container's init has.
    #[serde(default)]
    pub no_new_privileges: Option<bool>,
    /// -1000 to 1000.
    #[serde(default)]
    pub oom_score_adj: Option<i32>,

    #[serde(default)]
    pub scheduler: Option<Scheduler>,
    #[serde(default)]
    pub io_priority: Option<IoPriority>,
    /// Of added processes; in the container's own process, for those that do not say.
    #[serde(default, rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Option<CpuAffinity>,

    /// The guest has no such security module.
    #[serde(default, skip_serializing)]
    pub apparmor_profile: Ignored,
    #[serde(default, skip_serializing)]
    pub selinux_label: Ignored,
    #[serde(default, skip_serializing)]
    pub command_line: Unset,
}

#[derive(Debug, Clone, Copy, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleSize {
    pub height: u16,
    pub width: u16,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct User {
    #[serde(default)]
    pub uid: u32,
    #[serde(default)]
    pub gid: u32,
    #[serde(default)]
    pub umask: Option<u32>,
    #[serde(default, deserialize_with = "or_default")]
    pub additional_gids: Vec<u32>,
    /// Names are Windows' (specification, "User"); on Linux the client resolves them, and runc looks at none.
    #[serde(default, skip_serializing)]
    pub username: Ignored,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    #[serde(default, deserialize_with = "or_default")]
    pub bounding: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub effective: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub inheritable: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub permitted: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub ambient: Vec<String>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    #[serde(rename = "type")]
    pub kind: String,
    pub hard: u64,
    pub soft: u64,
}

impl Process {
    /// Takes over from the container's init what runc takes over when an added process is silent.
    pub fn inherit(&mut self, init: &Process) {
        if self.capabilities.is_none() {
            self.capabilities = init.capabilities.clone();
        }
        if self.rlimits.is_empty() {
            self.rlimits = init.rlimits.clone();
        }
        self.no_new_privileges = self.no_new_privileges.or(init.no_new_privileges);
        self.oom_score_adj = self.oom_score_adj.or(init.oom_score_adj);
        self.user.umask = self.user.umask.or(init.user.umask);
        if self.scheduler.is_none() {
            self.scheduler = init.scheduler.clone();
        }
        if self.io_priority.is_none() {
            self.io_priority = init.io_priority.clone();
        }
        if self.exec_cpu_affinity.is_none() {
            self.exec_cpu_affinity = init.exec_cpu_affinity.clone();
        }
    }

    /// What is asked for and has no effect, for the log; the names of fields.
    pub fn without_effect(&self) -> Vec<String> {
        let mut list = Vec::new();
        for (Ignored(set), name) in [
            (self.apparmor_profile, "process.apparmorProfile"),
            (self.selinux_label, "process.selinuxLabel"),
            (self.user.username, "process.user.username"),
        ] {
            if set {
                list.push(name.into());
            }
        }
        let Some(capabilities) = &self.capabilities else {
            return list;
        };
        for (set, names) in capabilities.sets() {
            for name in unknown(names) {
                list.push(format!("process.capabilities.{set}: {name:?}"));
            }
        }
        let (may, must) = (
            bits(&capabilities.inheritable),
            bits(&capabilities.permitted),
        );
        for refused in (bits(&capabilities.ambient) - (may & must)).iter() {
            list.push(format!(
                "process.capabilities.ambient: {refused:?}, which is not inheritable and permitted too"
            ));
        }
        list
    }

    /// Checks what the types do not say. `at` is the object's own path in the document.
    pub fn validate(&self, at: &str) -> Result<(), Problem> {
        let field = |name: &str| {
            if at.is_empty() {
                name.into()
            } else {
                format!("{at}.{name}")
            }
        };
        if self.args.is_empty() {
            return Err(Problem::new(field("args"), "must not be empty"));
        }
        if !self.cwd.starts_with('/') {
            return Err(Problem::new(
                field("cwd"),
                format!("{:?} is not an absolute path", self.cwd),
            ));
        }
        let strings = self.args.iter().chain(&self.env).chain([&self.cwd]);
        if strings.into_iter().any(|text| text.contains('\0')) {
            return Err(Problem::new(
                field("args, env or cwd"),
                "contains a NUL byte",
            ));
        }
        let named = |entry: &&String| entry.find('=').is_some_and(|length| length > 0);
        if let Some(entry) = self.env.iter().find(|entry| !named(entry)) {
            return Err(Problem::new(
                field("env"),
                format!("{entry:?} is not NAME=value"),
            ));
        }
        let mut seen = HashSet::new();
        for limit in &self.rlimits {
            limit.resource().ok_or_else(|| {
                Problem::new(
                    field("rlimits"),
                    format!("{:?} is no limit of Linux", limit.kind),
                )
            })?;
            if limit.soft > limit.hard {
                return Err(Problem::new(
                    field("rlimits"),
                    format!("{}: soft is above hard", limit.kind),
                ));
            }
            if !seen.insert(&limit.kind) {
                return Err(Problem::new(
                    field("rlimits"),
                    format!("{} is there twice", limit.kind),
                ));
            }
        }
        if let Some(scheduler) = &self.scheduler {
            scheduler.validate(&field("scheduler"))?;
        }
        if let Some(priority) = &self.io_priority {
            priority.validate(&field("ioPriority"))?;
        }
        if let Some(affinity) = &self.exec_cpu_affinity {
            affinity.validate(&field("execCPUAffinity"))?;
        }
        match self.oom_score_adj {
            Some(value) if !(-1000..=1000).contains(&value) => Err(Problem::new(
                field("oomScoreAdj"),
                format!("{value} is not within -1000 to 1000"),
            )),
            _ => Ok(()),
        }
    }
}

impl Capabilities {
    fn sets(&self) -> [(&'static str, &[String]); 5] {
        [
            ("bounding", &self.bounding),
            ("effective", &self.effective),
            ("inheritable", &self.inheritable),
            ("permitted", &self.permitted),
            ("ambient", &self.ambient),
        ]
    }
}

fn known(name: &str) -> Option<CapabilitySet> {
    name.strip_prefix("CAP_").and_then(CapabilitySet::from_name)
}

/// The set of capabilities named `CAP_…`; what is unknown is left out, as with runc.
pub fn bits(names: &[String]) -> CapabilitySet {
    names.iter().filter_map(|name| known(name)).collect()
}

fn unknown(names: &[String]) -> impl Iterator<Item = &String> {
    names.iter().filter(|name| known(name).is_none())
}

impl Rlimit {
    /// The limit that `type` names; `None` when Linux has no such limit.
    pub fn resource(&self) -> Option<Resource> {
        Some(match self.kind.as_str() {
            "RLIMIT_AS" => Resource::As,
            "RLIMIT_CORE" => Resource::Core,
            "RLIMIT_CPU" => Resource::Cpu,
            "RLIMIT_DATA" => Resource::Data,
            "RLIMIT_FSIZE" => Resource::Fsize,
            "RLIMIT_LOCKS" => Resource::Locks,
            "RLIMIT_MEMLOCK" => Resource::Memlock,
            "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
            "RLIMIT_NICE" => Resource::Nice,
            "RLIMIT_NOFILE" => Resource::Nofile,
            "RLIMIT_NPROC" => Resource::Nproc,
            "RLIMIT_RSS" => Resource::Rss,
            "RLIMIT_RTPRIO" => Resource::Rtprio,
            "RLIMIT_RTTIME" => Resource::Rttime,
            "RLIMIT_SIGPENDING" => Resource::Sigpending,
            "RLIMIT_STACK" => Resource::Stack,
            _ => return None,
        })
    }
}
