//! The OCI specification on its way from containerd to the agent: only what names something of the
//! host is read and rewritten here. Everything else passes as it is, and the agent refuses what it
//! does not know. No system calls but reading `config.json`.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::{
    devices,
    hooks::{self, Hooks},
    idmap::{self, IdMaps},
    mount::Attributes,
    namespaces,
    size::Demand,
};

/// Bytes of a `config.json` at most.
const FILE_LIMIT: u64 = 16 << 20;

/// CRI's annotations.
pub const KUBERNETES_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
pub const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

#[derive(Debug, Error)]
pub enum SpecError {
    #[error("read {path}: {cause}")]
    Read { path: PathBuf, cause: io::Error },
    #[error("parse {path}: {cause}")]
    Parse {
        path: PathBuf,
        cause: serde_json::Error,
    },
    #[error("{field}: {reason}")]
    Field { field: String, reason: String },
}

/// The network namespace that the VMM lives in, and so the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// Made by somebody else, e.g. `/run/netns/cni-…`.
    Existing(PathBuf),
    New,
}

/// The pod that a container is to be added to: how its namespaces are named on the host, and by whom they
/// were made.
#[derive(Clone, Copy, Debug)]
pub struct Running<'a> {
    /// Of the VMM, which containerd knows all containers of the pod by.
    pub pid: u32,
    /// The pod's first container.
    pub sandbox: &'a str,
}

/// A bind mount: what of the host the guest is to see, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// For errors, e.g. `mounts[7]`.
    pub field: String,
    pub source: PathBuf,
    /// Name of the share; its path in the guest is below `husk_proto::SHARES`.
    pub share: String,
    /// With the mounts below the source.
    pub recursive: bool,
    pub attributes: Attributes,
    /// What its files' owners are to the guest, if not who they are.
    pub idmap: Option<IdMaps>,
}

/// A root file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// `root.path`, absolute.
    pub path: PathBuf,
    /// Name of the share, as in [`Bind`].
    pub share: String,
}

/// What the host has to do for a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Where the rootfs is, or is to be mounted; none where it is the guest's own.
    pub root: Option<Root>,
    pub binds: Vec<Bind>,
    pub network: Network,
    pub hooks: Hooks,
    /// `linux.cgroupsPath` of the host, if there was one.
    pub cgroups_path: Option<String>,
    pub oom_score_adj: Option<i64>,
    /// What is asked for of memory and processors.
    pub demand: Demand,
    /// Of a pod of Kubernetes; containerd's own is `k8s.io` for all of these.
    pub kubernetes_namespace: Option<String>,
}

pub(crate) fn refuse(field: impl Into<String>, reason: impl Into<String>) -> SpecError {
    SpecError::Field {
        field: field.into(),
        reason: reason.into(),
    }
}

fn open(path: &Path) -> Result<impl Read + use<>, SpecError> {
    let file = File::open(path).map_err(|cause| SpecError::Read {
        path: path.to_owned(),
        cause,
    })?;
    Ok(io::BufReader::new(file).take(FILE_LIMIT))
}

fn broken(path: &Path, cause: serde_json::Error) -> SpecError {
    let path = path.to_owned();
    match cause.is_io() {
        true => SpecError::Read {
            path,
            cause: cause.into(),
        },
        false => SpecError::Parse { path, cause },
    }
}

/// The specification as it stands in the bundle.
pub fn read(bundle: &Path) -> Result<Value, SpecError> {
    let path = bundle.join("config.json");
    serde_json::from_reader(open(&path)?).map_err(|e| broken(&path, e))
}

/// The annotations alone, for `start`. A bundle without specification has none: a sandbox that the
/// shim itself serves.
pub fn annotations(bundle: &Path) -> Result<HashMap<String, String>, SpecError> {
    #[derive(Deserialize)]
    struct Annotated {
        #[serde(default)]
        annotations: HashMap<String, String>,
    }
    let path = bundle.join("config.json");
    let file = match open(&path) {
        Ok(file) => file,
        Err(SpecError::Read { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
            return Ok(HashMap::new());
        }
        Err(e) => return Err(e),
    };
    let annotated: Annotated = serde_json::from_reader(file).map_err(|e| broken(&path, e))?;
    Ok(annotated.annotations)
}

/// Replaces everything of the host in `spec` by what the guest will find in its place. Shares are
/// named `<prefix>-root` and `<prefix>-m<index>`; `id` is the container's, `pod` none for a pod's first.
pub fn rewrite(
    spec: &mut Value,
    bundle: &Path,
    id: &str,
    prefix: &str,
    pod: Option<Running<'_>>,
) -> Result<Plan, SpecError> {
    if !spec.is_object() {
        return Err(refuse("config.json", "not a JSON object"));
    }
    let hooks = hooks::take(spec)?;
    let network = namespaces::rewrite(spec, pod)?;
    let root = rewrite_root(spec, bundle, prefix)?;
    share_memory(spec);
    let binds = rewrite_binds(spec, bundle, prefix)?;
    note_what_is_ignored(spec);
    devices::rewrite(spec)?;
    let cgroups_path = match spec.pointer_mut("/linux/cgroupsPath") {
        // The guest's cgroup tree is the pod's own: the host's place in it means nothing there.
        Some(Value::String(path)) => Some(std::mem::replace(path, format!("/{id}"))),
        Some(_) => return Err(refuse("linux.cgroupsPath", "not a string")),
        None => None,
    };
    Ok(Plan {
        root,
        binds,
        network,
        hooks,
        cgroups_path: cgroups_path.filter(|path| !path.is_empty()),
        oom_score_adj: spec.pointer("/process/oomScoreAdj").and_then(Value::as_i64),
        demand: Demand::of(spec),
        kubernetes_namespace: spec
            .get("annotations")
            .and_then(|annotations| annotations.get(KUBERNETES_NAMESPACE))
            .and_then(Value::as_str)
            .map(str::to_owned),
    })
}

/// What the host mounts later does not show in the guest: its shares are sealed.
fn note_what_is_ignored(spec: &Value) {
    let kind = spec.pointer("/linux/rootfsPropagation");
    if let Some(kind @ ("slave" | "rslave")) = kind.and_then(Value::as_str) {
        log::info!("linux.rootfsPropagation {kind}: what the host mounts later is not seen");
    }
}

fn rewrite_root(spec: &mut Value, bundle: &Path, prefix: &str) -> Result<Option<Root>, SpecError> {
    let share = format!("{prefix}-root");
    let Some(Value::String(path)) = spec.pointer_mut("/root/path") else {
        return Err(refuse("root.path", "missing, or not a string"));
    };
    if path.is_empty() {
        return Err(refuse("root.path", "empty"));
    }
    if path == husk_proto::PAUSE_ROOT {
        return Ok(None);
    }
    let path = bundle.join(std::mem::replace(path, guest_path(&share)));
    Ok(Some(Root { path, share }))
}

/// What a pod of Kubernetes has at /dev/shm, a directory that CRI makes on the host for all of its containers, is in the
/// guest's memory instead, which is where they share it.
fn share_memory(spec: &mut Value) {
    let annotation = format!("/annotations/{}", SANDBOX.replace('/', "~1"));
    let Some(sandbox) = spec.pointer(&annotation).and_then(Value::as_str) else {
        return;
    };
    let of_cri = format!("/sandboxes/{sandbox}/shm");
    let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut);
    for mount in mounts.into_iter().flatten() {
        let text = |name| mount.get(name).and_then(Value::as_str).unwrap_or_default();
        if text("destination") == "/dev/shm" && text("source").ends_with(&of_cri) {
            mount["source"] = json!(husk_proto::SHM);
        }
    }
}

fn guest_path(share: &str) -> String {
    format!("{}/{share}", husk_proto::SHARES)
}

fn rewrite_binds(spec: &mut Value, bundle: &Path, prefix: &str) -> Result<Vec<Bind>, SpecError> {
    let mut binds = Vec::new();
    let containers = idmap::of_container(spec);
    let Some(mounts) = spec.get_mut("mounts") else {
        return Ok(binds);
    };
    let Some(mounts) = mounts.as_array_mut() else {
        return Err(refuse("mounts", "not an array"));
    };
    for (index, mount) in mounts.iter_mut().enumerate() {
        let field = format!("mounts[{index}]");
        let options: Vec<&str> = mount
            .get("options")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let recursive = options.contains(&"rbind");
        let is_bind = mount.get("type").and_then(Value::as_str) == Some("bind");
        if !(is_bind || recursive || options.contains(&"bind")) {
            continue;
        }
        if let Some(option) = options
            .iter()
            .find(|option| matches!(**option, "shared" | "rshared"))
        {
            let reason = format!("{option:?}: mounts made in a microVM cannot appear on the host");
            return Err(refuse(format!("{field}.options"), reason));
        }
        let source = mount.get("source").and_then(Value::as_str);
        if source == Some(husk_proto::SHM) {
            continue;
        }
        let attributes = attributes(&options);
        let idmap = idmap::take(mount, &field, containers.as_ref())?;
        let share = format!("{prefix}-m{index}");
        let source = mount
            .get("source")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if source.is_empty() {
            return Err(refuse(
                format!("{field}.source"),
                "a bind mount needs a source",
            ));
        }
        let source = bundle.join(source);
        if let Some(mount) = mount.as_object_mut() {
            mount.insert("source".into(), json!(guest_path(&share)));
        }
        binds.push(Bind {
            field,
            source,
            share,
            recursive,
            attributes,
            idmap,
        });
    }
    Ok(binds)
}

/// The options that the host enforces too, whatever the guest does with its own mount.
fn attributes(options: &[&str]) -> Attributes {
    use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};

    let mut attributes = Attributes::default();
    for option in options {
        // As with mount(8), the last one of a kind counts.
        let (bit, on) = match option.strip_prefix('r').unwrap_or(option) {
            "o" => (MOUNT_ATTR_RDONLY, true),  // "ro"
            "w" => (MOUNT_ATTR_RDONLY, false), // "rw"
            "ro" => (MOUNT_ATTR_RDONLY, true), // "rro"
            "rw" => (MOUNT_ATTR_RDONLY, false),
            "nosuid" => (MOUNT_ATTR_NOSUID, true),
            "suid" => (MOUNT_ATTR_NOSUID, false),
            "nodev" => (MOUNT_ATTR_NODEV, true),
            "dev" => (MOUNT_ATTR_NODEV, false),
            "noexec" => (MOUNT_ATTR_NOEXEC, true),
            "exec" => (MOUNT_ATTR_NOEXEC, false),
            _ => continue,
        };
        let recursive = !matches!(*option, "ro" | "rw") && option.starts_with('r');
        let set = if recursive {
            &mut attributes.set_recursive
        } else {
            &mut attributes.set
        };
        if on {
            *set |= bit;
        } else {
            *set &= !bit;
        }
    }
    attributes
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn spec() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": ["sh"], "oomScoreAdj": 100},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/data", "type": "bind", "source": "/srv/data",
                 "options": ["rbind", "ro", "rnosuid", "rprivate"]},
                {"destination": "/etc/hosts", "source": "hosts", "options": ["bind", "ro", "rw"]}
            ],
            "linux": {
                "cgroupsPath": "/default/x",
                "namespaces": [
                    {"type": "pid"}, {"type": "network", "path": "/run/netns/a"}, {"type": "uts"}
                ]
            },
            "annotations": {"a": "b"}
        })
    }

    #[test]
    fn takes_what_is_the_hosts_and_leaves_the_rest() {
        let mut spec = spec();
        let plan = rewrite(&mut spec, Path::new("/b"), "x", "c0", None).unwrap();
        let root = plan.root.unwrap();
        assert_eq!(root.path, Path::new("/b/rootfs"));
        assert_eq!(root.share, "c0-root");
        assert_eq!(plan.network, Network::Existing("/run/netns/a".into()));
        assert_eq!(plan.cgroups_path.as_deref(), Some("/default/x"));
        assert_eq!(plan.oom_score_adj, Some(100));
        assert_eq!(
            plan.binds,
            [
                Bind {
                    field: "mounts[1]".into(),
                    source: "/srv/data".into(),
                    share: "c0-m1".into(),
                    recursive: true,
                    attributes: Attributes {
                        set: libc::MOUNT_ATTR_RDONLY,
                        set_recursive: libc::MOUNT_ATTR_NOSUID
                    },
                    idmap: None,
                },
                Bind {
                    field: "mounts[2]".into(),
                    source: "/b/hosts".into(),
                    share: "c0-m2".into(),
                    recursive: false,
                    attributes: Attributes::default(),
                    idmap: None,
                },
            ]
        );
        assert_eq!(spec["root"]["path"], "/run/husk/shares/c0-root");
        assert_eq!(spec["mounts"][0]["source"], "proc");
        assert_eq!(spec["mounts"][1]["source"], "/run/husk/shares/c0-m1");
        assert_eq!(spec["linux"]["cgroupsPath"], "/x");
        assert_eq!(
            spec["linux"]["namespaces"],
            json!([{"type": "pid"}, {"type": "uts"}])
        );
        assert_eq!(spec["annotations"]["a"], "b");
    }

    #[test]
    fn an_absolute_root_stays_where_it_is() {
        let mut spec = spec();
        spec["root"]["path"] = "/var/lib/docker/merged".into();
        let plan = rewrite(&mut spec, Path::new("/b"), "x", "c0", None).unwrap();
        assert_eq!(plan.root.unwrap().path, Path::new("/var/lib/docker/merged"));
    }

    fn error_of(change: impl FnOnce(&mut Value)) -> String {
        let mut spec = spec();
        change(&mut spec);
        rewrite(&mut spec, Path::new("/b"), "x", "c0", None)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn refusals_name_the_field() {
        assert_eq!(
            error_of(|spec| spec["linux"]["namespaces"] = json!([{"type": "pid"}])),
            "linux.namespaces: no network namespace: a microVM cannot share the host's network"
        );
        let error =
            error_of(|spec| spec["linux"]["namespaces"][2]["path"] = "/proc/1/ns/uts".into());
        assert!(
            error.starts_with("linux.namespaces[2].path: /proc/1/ns/uts: "),
            "{error}"
        );
        let error = error_of(|spec| spec["hooks"] = json!({"prestart": [{"path": "x"}]}));
        assert!(error.starts_with("hooks.prestart[0].path: "), "{error}");
        let error = error_of(|spec| spec["root"] = json!({}));
        assert!(error.starts_with("root.path: "), "{error}");
        let error = error_of(|spec| spec["mounts"][1]["source"] = "".into());
        assert!(error.starts_with("mounts[1].source: "), "{error}");
        let error = error_of(|spec| *spec = json!([]));
        assert!(error.starts_with("config.json: "), "{error}");
    }

    #[test]
    fn what_would_propagate_to_the_host_is_refused() {
        for option in ["shared", "rshared"] {
            let error = error_of(|spec| spec["mounts"][1]["options"] = json!(["rbind", option]));
            assert!(
                error.starts_with(&format!("mounts[1].options: {option:?}: ")),
                "{error}"
            );
            // Between mounts of the container it is nobody else's business.
            let mut spec = spec();
            spec["mounts"][0]["options"] = json!([option]);
            rewrite(&mut spec, Path::new("/b"), "x", "c0", None).unwrap();
        }
    }

    #[test]
    fn devices_of_the_host_are_refused() {
        let error = error_of(|spec| {
            spec["linux"]["devices"] =
                json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
        });
        assert!(
            error.starts_with("linux.devices[0]: /dev/sda (b 8:0)"),
            "{error}"
        );
    }

    #[test]
    fn files_are_named_with_what_is_wrong_with_them() {
        let bundle = tempfile::tempdir().unwrap();
        assert!(annotations(bundle.path()).unwrap().is_empty());
        let error = read(bundle.path()).unwrap_err().to_string();
        assert!(error.contains("config.json: No such file"), "{error}");

        fs::write(
            bundle.path().join("config.json"),
            "{\"annotations\": {\"k\": ",
        )
        .unwrap();
        let error = annotations(bundle.path()).unwrap_err().to_string();
        assert!(error.contains("config.json: EOF while parsing"), "{error}");

        fs::write(bundle.path().join("config.json"), spec().to_string()).unwrap();
        assert_eq!(annotations(bundle.path()).unwrap()["a"], "b");
    }
}
