//! `linux.namespaces` and what belongs to single ones of them: id mappings, clock offsets.
//!
//! Data and its validity. A namespace with a path is one that another container of this guest has made:
//! nothing else can be named, as the host's are in another kernel.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Problem, Spec, or_default};

/// Lines of one map that the kernel takes (user_namespaces(7)).
const MAP_LINES: usize = 340;

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    #[serde(rename = "type")]
    pub kind: NamespaceKind,
    /// `husk_proto::CONTAINERS`/<id>/ns/<kind>: that of another container. Empty: a new one.
    #[serde(default, deserialize_with = "or_default")]
    pub path: String,
}

/// A `network` namespace is one that only this container has; without, it has the guest's: the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceKind {
    Mount,
    Uts,
    Ipc,
    Pid,
    Cgroup,
    Network,
    User,
    Time,
}

impl NamespaceKind {
    /// `CLONE_NEW…`
    pub fn flag(self) -> i32 {
        match self {
            Self::Mount => libc::CLONE_NEWNS,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Pid => libc::CLONE_NEWPID,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
            Self::Network => libc::CLONE_NEWNET,
            Self::User => libc::CLONE_NEWUSER,
            // Shares its bit with the exit signal of clone(2), for which libc gives it no name.
            Self::Time => 0x80,
        }
    }
}

/// A line of `/proc/<pid>/uid_map` or `gid_map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct IdMapping {
    #[serde(rename = "containerID")]
    pub container_id: u32,
    #[serde(rename = "hostID")]
    pub host_id: u32,
    pub size: u32,
}

/// The maps of a user namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Maps {
    pub uid: Vec<IdMapping>,
    pub gid: Vec<IdMapping>,
}

/// What an id of the container is outside of it.
pub fn outside(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id)?;
        (offset < mapping.size).then(|| mapping.host_id.checked_add(offset))?
    })
}

/// The kernel's words for a map.
pub fn lines(mappings: &[IdMapping]) -> String {
    let line = |mapping: &IdMapping| {
        format!(
            "{} {} {}\n",
            mapping.container_id, mapping.host_id, mapping.size
        )
    };
    mappings.iter().map(line).collect()
}

/// How far a clock of the container is ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TimeOffset {
    #[serde(default)]
    pub secs: i64,
    #[serde(default)]
    pub nanosecs: u32,
}

/// The kernel's words for the offsets of `/proc/<pid>/timens_offsets`.
pub fn offsets(clocks: &BTreeMap<String, TimeOffset>) -> String {
    let line = |(clock, offset): (&String, &TimeOffset)| {
        format!("{clock} {} {}\n", offset.secs, offset.nanosecs)
    };
    clocks.iter().map(line).collect()
}

impl Spec {
    fn namespace(&self, kind: NamespaceKind) -> Option<&Namespace> {
        let mut all = self.linux.namespaces.iter();
        all.find(|namespace| namespace.kind == kind)
    }

    /// Whether its namespace of this kind is another one than the guest's.
    pub fn has(&self, kind: NamespaceKind) -> bool {
        self.namespace(kind).is_some()
    }

    /// Whether it gets a new namespace of this kind.
    pub fn makes(&self, kind: NamespaceKind) -> bool {
        self.namespace(kind)
            .is_some_and(|namespace| namespace.path.is_empty())
    }

    /// The `CLONE_NEW…` of all namespaces that an added process has to join.
    pub fn namespace_flags(&self) -> i32 {
        let flags = self.linux.namespaces.iter().map(|it| it.kind.flag());
        flags.fold(0, |all, flag| all | flag)
    }

    /// Whether it can be born into its namespaces: they are new, and nobody outside has to say more of them.
    pub fn is_born_into_namespaces(&self) -> bool {
        let namespaces = &self.linux.namespaces;
        namespaces.iter().all(|it| it.path.is_empty())
            && !self.has(NamespaceKind::User)
            && !self.has(NamespaceKind::Time)
    }

    /// The `CLONE_NEW…` of the new namespaces that its first process is born into. That of the cgroup is
    /// made from inside, and the user and time namespaces before.
    pub fn born_into(&self) -> i32 {
        use NamespaceKind::{Ipc, Mount, Network, Pid, Uts};
        let kinds = [Mount, Uts, Ipc, Pid, Network].into_iter();
        kinds
            .filter(|kind| self.makes(*kind))
            .fold(0, |flags, kind| flags | kind.flag())
    }

    /// The ids of the containers whose namespaces are joined, each with the `CLONE_NEW…` of these.
    pub fn joined(&self) -> Result<BTreeMap<&str, i32>, Problem> {
        let mut joined = BTreeMap::new();
        for (i, namespace) in self.linux.namespaces.iter().enumerate() {
            if namespace.path.is_empty() {
                continue;
            }
            let id = container_of(namespace).ok_or_else(|| {
                Problem::new(
                    format!("linux.namespaces[{i}].path"),
                    format!("{}: no namespace of this pod's", namespace.path),
                )
            })?;
            *joined.entry(id).or_insert(0) |= namespace.kind.flag();
        }
        Ok(joined)
    }

    pub(super) fn validate_namespaces(&self) -> Result<(), Problem> {
        use NamespaceKind::{Mount, Time, User};
        let namespaces = &self.linux.namespaces;
        for (i, namespace) in namespaces.iter().enumerate() {
            let mut others = namespaces.iter().skip(i.saturating_add(1));
            if others.any(|other| other.kind == namespace.kind) {
                return Err(Problem::new(
                    format!("linux.namespaces[{i}]"),
                    "the type is there twice",
                ));
            }
        }
        if !self.makes(Mount) {
            return Err(Problem::new(
                "linux.namespaces",
                "a container needs a mount namespace of its own",
            ));
        }
        self.joined()?;
        for (field, mappings) in [
            ("linux.uidMappings", &self.linux.uid_mappings),
            ("linux.gidMappings", &self.linux.gid_mappings),
        ] {
            if self.makes(User) {
                validate_map(field, mappings)?;
            } else if !mappings.is_empty() && !self.has(User) {
                return Err(Problem::new(field, "needs a user namespace"));
            }
        }
        for (clock, offset) in &self.linux.time_offsets {
            let field = format!("linux.timeOffsets.{clock}");
            if !matches!(clock.as_str(), "monotonic" | "boottime") {
                return Err(Problem::new(field, "is none of monotonic, boottime"));
            }
            if offset.nanosecs > 999_999_999 {
                return Err(Problem::new(
                    format!("{field}.nanosecs"),
                    "is above a second",
                ));
            }
            if !self.makes(Time) {
                return Err(Problem::new(field, "needs a time namespace of its own"));
            }
        }
        Ok(())
    }
}

fn container_of(namespace: &Namespace) -> Option<&str> {
    let rest = namespace.path.strip_prefix(husk_proto::CONTAINERS)?;
    let (id, kind) = rest.strip_prefix('/')?.split_once("/ns/")?;
    let known: NamespaceKind = serde_json::from_value(kind.into()).ok()?;
    (known == namespace.kind && !id.is_empty() && !id.contains('/')).then_some(id)
}

fn validate_map(field: &str, mappings: &[IdMapping]) -> Result<(), Problem> {
    if mappings.is_empty() {
        return Err(Problem::new(field, "a user namespace needs one"));
    }
    if mappings.len() > MAP_LINES {
        return Err(Problem::new(
            field,
            format!("has more than {MAP_LINES} entries"),
        ));
    }
    for (i, mapping) in mappings.iter().enumerate() {
        let end = |first: u32| first.checked_add(mapping.size);
        if mapping.size == 0
            || end(mapping.container_id).is_none()
            || end(mapping.host_id).is_none()
        {
            return Err(Problem::new(format!("{field}[{i}]"), "is no range of ids"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: [IdMapping; 2] = [
        IdMapping {
            container_id: 0,
            host_id: 1000,
            size: 10,
        },
        IdMapping {
            container_id: 100,
            host_id: 5,
            size: 1,
        },
    ];

    #[test]
    fn ids_are_what_the_map_says() {
        assert_eq!(outside(&TWO, 0), Some(1000));
        assert_eq!(outside(&TWO, 9), Some(1009));
        assert_eq!(outside(&TWO, 10), None);
        assert_eq!(outside(&TWO, 100), Some(5));
        assert_eq!(lines(&TWO), "0 1000 10\n100 5 1\n");
    }
}
