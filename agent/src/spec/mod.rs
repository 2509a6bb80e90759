//! The OCI runtime specification as the agent understands it: config.json, 1.2, Linux.
//!
//! Owned by `pod`, which reads it once per request. Every field of the specification is listed; one
//! that the agent does not act on has the type [`unset::Unset`], and one that is not listed is an
//! error. So nothing a user asked for is ever dropped in silence. Errors name the field by its path.

pub mod hooks;
pub mod namespaces;
pub mod personality;
pub mod process;
pub mod resources;
pub mod scheduling;
pub mod seccomp;
pub mod unset;

use std::collections::{BTreeMap, HashMap};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use hooks::Hooks;
use namespaces::{IdMapping, Namespace, TimeOffset};
use personality::Personality;
use process::Process;
use resources::Resources;
use seccomp::Seccomp;
use unset::{Ignored, Unset};

pub use namespaces::NamespaceKind;

/// What is wrong with a specification, and where.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{field}: {what}")]
pub struct Problem {
    field: String,
    what: String,
}

impl Problem {
    pub fn new(field: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            what: what.into(),
        }
    }
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Spec {
    #[serde(default)]
    pub oci_version: String,
    pub root: Root,
    pub process: Process,
    #[serde(default, deserialize_with = "or_default")]
    pub hostname: String,
    #[serde(default, deserialize_with = "or_default")]
    pub domainname: String,
    #[serde(default, deserialize_with = "or_default")]
    pub mounts: Vec<Mount>,
    #[serde(default, deserialize_with = "or_default")]
    pub linux: Linux,
    /// For the host's eyes, and for hooks.
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: HashMap<String, String>,
    #[serde(default, deserialize_with = "or_default")]
    pub hooks: Hooks,

    #[serde(default, skip_serializing)]
    pub solaris: Unset,
    #[serde(default, skip_serializing)]
    pub windows: Unset,
    #[serde(default, skip_serializing)]
    pub vm: Unset,
    #[serde(default, skip_serializing)]
    pub zos: Unset,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// Absolute, in the guest.
    pub path: String,
    #[serde(default)]
    pub readonly: bool,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Mount {
    pub destination: String,
    #[serde(default, rename = "type", deserialize_with = "or_default")]
    pub kind: String,
    #[serde(default, deserialize_with = "or_default")]
    pub source: String,
    #[serde(default, deserialize_with = "or_default")]
    pub options: Vec<String>,

    #[serde(default, skip_serializing)]
    pub uid_mappings: Unset,
    #[serde(default, skip_serializing)]
    pub gid_mappings: Unset,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Linux {
    #[serde(default, deserialize_with = "or_default")]
    pub resources: Resources,
    /// Below the guest's cgroup root, whether it begins with a slash or not.
    #[serde(default, deserialize_with = "or_default")]
    pub cgroups_path: String,
    #[serde(default, deserialize_with = "or_default")]
    pub namespaces: Vec<Namespace>,
    #[serde(default, deserialize_with = "or_default")]
    pub devices: Vec<Device>,
    #[serde(default, deserialize_with = "or_default")]
    pub masked_paths: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub readonly_paths: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub sysctl: BTreeMap<String, String>,
    #[serde(default)]
    pub seccomp: Option<Seccomp>,

    /// Of the user namespace, if it is this container's.
    #[serde(default, deserialize_with = "or_default")]
    pub uid_mappings: Vec<IdMapping>,
    #[serde(default, deserialize_with = "or_default")]
    pub gid_mappings: Vec<IdMapping>,
    /// By clock: `monotonic`, `boottime`.
    #[serde(default, deserialize_with = "or_default")]
    pub time_offsets: BTreeMap<String, TimeOffset>,
    #[serde(default, deserialize_with = "or_default")]
    pub personality: Option<Personality>,
    /// Of the root mount, inside: nothing is mounted from here on the host.
    #[serde(default, deserialize_with = "or_default")]
    pub rootfs_propagation: String,

    #[serde(default, skip_serializing)]
    pub net_devices: Unset,
    /// The guest has no such security module.
    #[serde(default, skip_serializing)]
    pub mount_label: Ignored,
    /// Cache and bandwidth are the host's to share out; the guest's processor has no resource control.
    #[serde(default, skip_serializing)]
    pub intel_rdt: Ignored,
    #[serde(default, skip_serializing)]
    pub memory_policy: Unset,
}

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Device {
    pub path: String,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub major: i64,
    #[serde(default)]
    pub minor: i64,
    #[serde(default)]
    pub file_mode: Option<u32>,
    #[serde(default)]
    pub uid: Option<u32>,
    #[serde(default)]
    pub gid: Option<u32>,
}

/// Reads a document of type `T`; an error names the path of the field.
pub fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, Problem> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let read = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let (field, mut what) = (error.path().to_string(), error.inner().to_string());
        // The field is the better place, unless the document is no JSON.
        if error.inner().is_data() {
            what.truncate(what.rfind(" at line ").unwrap_or(what.len()));
        }
        Problem::new(field, what)
    })?;
    deserializer
        .end()
        .map_err(|error| Problem::new("document", error.to_string()))?;
    Ok(read)
}

/// Go writes an absent list or object as null at times: both are the default.
pub(crate) fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Spec {
    /// What is asked for and has no effect in a guest, for the log.
    pub fn without_effect(&self) -> Vec<String> {
        let mut list = self.process.without_effect();
        list.extend(self.linux.resources.without_effect());
        for (Ignored(set), name) in [
            (self.linux.mount_label, "linux.mountLabel"),
            (self.linux.intel_rdt, "linux.intelRdt"),
        ] {
            if set {
                list.push(name.into());
            }
        }
        let personality = self.linux.personality.as_ref();
        if personality.is_some_and(|personality| !personality.flags.is_empty()) {
            list.push("linux.personality.flags".into());
        }
        list
    }

    /// Checks what the types do not say; to be called once, before anything is done.
    pub fn validate(&self) -> Result<(), Problem> {
        self.process.validate("process")?;
        self.hooks.validate("hooks")?;
        absolute("root.path", &self.root.path)?;
        self.validate_namespaces()?;
        let named = !(self.hostname.is_empty() && self.domainname.is_empty());
        if named && !self.has(NamespaceKind::Uts) {
            return Err(Problem::new("hostname", "needs a uts namespace"));
        }
        for (i, mount) in self.mounts.iter().enumerate() {
            // One that is relative begins at the root, as in old specifications.
            let destination = format!("/{}", mount.destination);
            absolute(&format!("mounts[{i}].destination"), &destination)?;
        }
        let paths = self
            .linux
            .masked_paths
            .iter()
            .chain(&self.linux.readonly_paths);
        for path in paths {
            absolute("linux.maskedPaths or linux.readonlyPaths", path)?;
        }
        for (i, device) in self.linux.devices.iter().enumerate() {
            let at = format!("linux.devices[{i}]");
            absolute(&format!("{at}.path"), &device.path)?;
            if !matches!(device.kind.as_str(), "c" | "b" | "u" | "p") {
                return Err(Problem::new(
                    format!("{at}.type"),
                    format!("{:?} is none of c, b, u, p", device.kind),
                ));
            }
            // The kernel's own bounds: 12 bits of major, 20 of minor (include/linux/kdev_t.h).
            if !(0..1 << 12).contains(&device.major) || !(0..1 << 20).contains(&device.minor) {
                return Err(Problem::new(
                    format!("{at}.major or minor"),
                    "is out of range",
                ));
            }
        }
        if self
            .linux
            .cgroups_path
            .split('/')
            .any(|part| part == ".." || part.contains('\0'))
        {
            return Err(Problem::new("linux.cgroupsPath", "must not contain .."));
        }
        if let Some(seccomp) = &self.linux.seccomp {
            seccomp.validate("linux.seccomp")?;
        }
        self.linux
            .sysctl
            .keys()
            .try_for_each(|key| self.sysctl_is_own(key))
    }

    /// Only what belongs to a namespace of the container may be set, as with runc. The network
    /// namespace is the pod's own, so net.* belongs to it.
    fn sysctl_is_own(&self, key: &str) -> Result<(), Problem> {
        const IPC: [&str; 8] = [
            "kernel.msgmax",
            "kernel.msgmnb",
            "kernel.msgmni",
            "kernel.sem",
            "kernel.shmall",
            "kernel.shmmax",
            "kernel.shmmni",
            "kernel.shm_rmid_forced",
        ];
        let at = format!("linux.sysctl.{key}");
        let dotted = key.replace('/', ".");
        if key.split(['/', '.']).any(str::is_empty) || key.contains('\0') {
            return Err(Problem::new(at, "is no name of a sysctl"));
        }
        if dotted == "kernel.hostname" {
            return Err(Problem::new(at, "conflicts with hostname"));
        }
        let own = if IPC.contains(&dotted.as_str()) || dotted.starts_with("fs.mqueue.") {
            self.has(NamespaceKind::Ipc)
        } else if dotted == "kernel.domainname" {
            self.has(NamespaceKind::Uts)
        } else {
            dotted.starts_with("net.")
        };
        if own {
            Ok(())
        } else {
            Err(Problem::new(at, "is not in a separate kernel namespace"))
        }
    }
}

fn absolute(field: &str, path: &str) -> Result<(), Problem> {
    if !path.starts_with('/') {
        return Err(Problem::new(
            field,
            format!("{path:?} is not an absolute path"),
        ));
    }
    if path.contains('\0') {
        return Err(Problem::new(field, "contains a NUL byte"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
