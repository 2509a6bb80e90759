//! A pod as Kubernetes describes it to a sandbox: the specification of the container that holds its namespaces, and the
//! files that all of its containers share. Where a pause container makes a pod, containerd's CRI does the same.

use std::{fs, io, path::Path};

use husk_proto::cri::{NamespaceMode, PodSandboxConfig};
use protobuf::EnumOrUnknown;
use serde_json::{Value, json};
use thiserror::Error;

use crate::spec::{self, SpecError};

/// Of whoever holds a pod together: the kubelet's for it, nearly never killed.
const OOM_SCORE_ADJ: i64 = -998;

#[derive(Debug, Error)]
pub enum PodConfigError {
    #[error(transparent)]
    Field(#[from] SpecError),
    #[error("the pod's {file}: {cause}")]
    File {
        file: &'static str,
        cause: io::Error,
    },
}

/// A file that each container of the pod has, unless its specification says otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedFile {
    pub destination: &'static str,
    pub source: String,
}

fn refuse(field: &str, reason: &str) -> PodConfigError {
    spec::refuse(format!("PodSandboxConfig.linux.{field}"), reason).into()
}

/// Whether `mode` is this one.
fn is(mode: EnumOrUnknown<NamespaceMode>, wanted: NamespaceMode) -> bool {
    mode.enum_value() == Ok(wanted)
}

/// The OCI specification of sandbox `id`'s holder: its namespaces, the network being `network`'s, its hostname and sysctls.
///
/// # Errors
/// What a microVM cannot do, by the name of the field that asks for it.
pub fn specification(
    id: &str,
    config: &PodSandboxConfig,
    network: &str,
) -> Result<Value, PodConfigError> {
    let security = &config.linux.security_context;
    let options = &security.namespace_options;
    for (field, mode) in [
        ("network", options.network),
        ("pid", options.pid),
        ("ipc", options.ipc),
    ] {
        if is(mode, NamespaceMode::NODE) {
            let field = format!("security_context.namespace_options.{field}");
            let reason = "NODE: a microVM cannot share a namespace with its host";
            return Err(refuse(&field, reason));
        }
    }
    if network.is_empty() {
        let reason = "there is none for the pod: a microVM cannot share its host's";
        return Err(spec::refuse("netns_path", reason).into());
    }
    let mut namespaces = vec![
        json!({"type": "network", "path": network}),
        json!({"type": "ipc"}),
        json!({"type": "uts"}),
        json!({"type": "mount"}),
        json!({"type": "pid"}),
    ];
    let users = &options.userns_options;
    let mut linux = json!({
        "cgroupsPath": cgroups_path(&config.linux.cgroup_parent, id),
        "sysctl": config.linux.sysctls,
    });
    if users.is_some() && is(users.mode, NamespaceMode::POD) {
        namespaces.push(json!({"type": "user"}));
        for (name, maps) in [("uidMappings", &users.uids), ("gidMappings", &users.gids)] {
            let maps = maps.iter().map(
                |map| json!({"hostID": map.host_id, "containerID": map.container_id, "size": map.length}),
            );
            linux[name] = maps.collect();
        }
    }
    linux["namespaces"] = namespaces.into();
    Ok(json!({
        "ociVersion": "1.1.0",
        "hostname": config.hostname,
        "root": {"path": husk_proto::PAUSE_ROOT, "readonly": true},
        "process": {
            "args": [husk_proto::PAUSE], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": true, "oomScoreAdj": OOM_SCORE_ADJ,
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        ],
        "linux": linux,
        "annotations": annotations(id, config),
    }))
}

/// Those that CRI gives a pause container, for whoever reads them there.
fn annotations(id: &str, config: &PodSandboxConfig) -> Value {
    let mut annotations = json!(config.annotations);
    annotations[spec::CONTAINER_TYPE] = "sandbox".into();
    annotations[spec::SANDBOX] = id.into();
    annotations[spec::KUBERNETES_NAMESPACE] = config.metadata.namespace.clone().into();
    annotations["io.kubernetes.cri.sandbox-name"] = config.metadata.name.clone().into();
    annotations["io.kubernetes.cri.sandbox-uid"] = config.metadata.uid.clone().into();
    let resources = &config.linux.resources;
    for (name, value) in [
        ("cpu-period", resources.cpu_period),
        ("cpu-quota", resources.cpu_quota),
        ("cpu-shares", resources.cpu_shares),
        ("memory", resources.memory_limit_in_bytes),
    ] {
        annotations[format!("io.kubernetes.cri.sandbox-{name}")] = value.to_string().into();
    }
    annotations
}

/// Below the pod's: a path, or where the parent is a slice of systemd's, a scope in it.
fn cgroups_path(parent: &str, id: &str) -> String {
    let name = parent.rsplit('/').next().unwrap_or_default();
    match name.ends_with(".slice") {
        true => format!("{name}:cri-containerd:{id}"),
        false => format!("{}/{id}", parent.trim_end_matches('/')),
    }
}

/// Writes `hostname`, `hosts` and `resolv.conf` into `directory`, as CRI does for a pause container.
pub fn share_files(
    directory: &Path,
    config: &PodSandboxConfig,
) -> Result<Vec<SharedFile>, PodConfigError> {
    let host = |file: &'static str, path: &str| match fs::read_to_string(path) {
        Ok(text) => Ok(text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(cause) => Err(PodConfigError::File { file, cause }),
    };
    let hostname = match config.hostname.as_str() {
        "" => host("hostname", "/proc/sys/kernel/hostname")?,
        name => format!("{name}\n"),
    };
    let resolv_conf = match config.dns_config.as_ref() {
        Some(_) => resolv_conf(config),
        None => host("resolv.conf", "/etc/resolv.conf")?,
    };
    let mut shared = Vec::new();
    for (file, destination, text) in [
        ("hostname", "/etc/hostname", hostname),
        ("hosts", "/etc/hosts", host("hosts", "/etc/hosts")?),
        ("resolv.conf", "/etc/resolv.conf", resolv_conf),
    ] {
        let path = directory.join(file);
        fs::write(&path, text).map_err(|cause| PodConfigError::File { file, cause })?;
        shared.push(SharedFile {
            destination,
            source: path.to_string_lossy().into_owned(),
        });
    }
    Ok(shared)
}

/// resolv.conf(5).
fn resolv_conf(config: &PodSandboxConfig) -> String {
    let dns = &config.dns_config;
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text.push_str(&format!("search {}\n", dns.searches.join(" ")));
    }
    for server in &dns.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !dns.options.is_empty() {
        text.push_str(&format!("options {}\n", dns.options.join(" ")));
    }
    text
}

/// Adds to a container's specification what the pod's containers share: the files, and memory at /dev/shm. What is there
/// already is the container's own.
pub fn complete(spec: &mut Value, files: &[SharedFile]) {
    let has = |mounts: &[Value], destination: &str| {
        let mut at = mounts
            .iter()
            .filter_map(|mount| mount.get("destination")?.as_str());
        at.any(|at| at.trim_end_matches('/') == destination)
    };
    let Some(spec) = spec.as_object_mut() else {
        return;
    };
    let Some(mounts) = spec.entry("mounts").or_insert(json!([])).as_array_mut() else {
        return;
    };
    for file in files {
        if !has(mounts, file.destination) {
            mounts.push(json!({
                "destination": file.destination, "type": "bind", "source": file.source,
                "options": ["rbind", "rprivate", "rw"],
            }));
        }
    }
    let shm = json!({
        "destination": "/dev/shm", "type": "bind", "source": husk_proto::SHM, "options": ["rbind", "rw"],
    });
    let own =
        |mount: &&mut Value| mount.get("destination").and_then(Value::as_str) == Some("/dev/shm");
    match mounts.iter_mut().find(own) {
        // What containerd gives a container that is alone.
        Some(mount) if mount.get("type").and_then(Value::as_str) == Some("tmpfs") => *mount = shm,
        Some(_) => {}
        None => mounts.push(shm),
    }
}

#[cfg(test)]
mod tests {
    use husk_proto::cri::{
        DNSConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption,
    };
    use protobuf::MessageField;

    use super::*;

    fn with_options(options: NamespaceOption) -> PodSandboxConfig {
        PodSandboxConfig {
            hostname: "a-pod".into(),
            linux: MessageField::some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".into(),
                sysctls: [("net.core.somaxconn".to_owned(), "77".to_owned())].into(),
                security_context: MessageField::some(LinuxSandboxSecurityContext {
                    namespace_options: MessageField::some(options),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_holder_has_what_the_pod_was_given() {
        let config = with_options(NamespaceOption::default());
        let spec = specification("id", &config, "/run/netns/a").unwrap();
        for (at, value) in [
            ("/hostname", json!("a-pod")),
            ("/root/path", json!(husk_proto::PAUSE_ROOT)),
            ("/linux/sysctl/net.core.somaxconn", json!("77")),
            ("/linux/cgroupsPath", json!("/kubepods/pod1/id")),
            ("/linux/namespaces/0/path", json!("/run/netns/a")),
        ] {
            assert_eq!(spec.pointer(at), Some(&value), "{at}");
        }
    }

    #[test]
    fn what_a_microvm_cannot_share_is_refused_by_name() {
        let node = EnumOrUnknown::new(NamespaceMode::NODE);
        for (field, options) in [
            (
                "network",
                NamespaceOption {
                    network: node,
                    ..Default::default()
                },
            ),
            (
                "pid",
                NamespaceOption {
                    pid: node,
                    ..Default::default()
                },
            ),
            (
                "ipc",
                NamespaceOption {
                    ipc: node,
                    ..Default::default()
                },
            ),
        ] {
            let error = specification("id", &with_options(options), "/run/netns/a").unwrap_err();
            let start =
                format!("PodSandboxConfig.linux.security_context.namespace_options.{field}: NODE");
            assert!(error.to_string().starts_with(&start), "{error}");
        }
        let none = specification("id", &with_options(NamespaceOption::default()), "");
        assert!(none.unwrap_err().to_string().starts_with("netns_path: "));
    }

    #[test]
    fn a_slice_of_systemds_has_a_scope() {
        let path = cgroups_path("/kubepods.slice/kubepods-pod1.slice", "id");
        assert_eq!(path, "kubepods-pod1.slice:cri-containerd:id");
    }

    #[test]
    fn containers_share_files_and_memory_unless_they_have_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = with_options(NamespaceOption::default());
        config.dns_config = MessageField::some(DNSConfig {
            servers: vec!["10.0.0.1".into()],
            searches: vec!["a".into(), "b".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        });
        let files = share_files(directory.path(), &config).unwrap();
        let read = |file: &str| fs::read_to_string(directory.path().join(file)).unwrap();
        assert_eq!(read("hostname"), "a-pod\n");
        assert_eq!(
            read("resolv.conf"),
            "search a b\nnameserver 10.0.0.1\noptions ndots:5\n"
        );

        let own = json!({"destination": "/etc/hosts", "type": "bind", "source": "/own"});
        let alone = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm"});
        let mut spec = json!({"mounts": [own, alone]});
        complete(&mut spec, &files);
        let mounts = spec["mounts"].as_array().unwrap();
        let found: Vec<_> = mounts.iter().map(|mount| &mount["destination"]).collect();
        assert_eq!(
            found,
            [
                "/etc/hosts",
                "/dev/shm",
                "/etc/hostname",
                "/etc/resolv.conf"
            ]
        );
        assert_eq!(
            (&mounts[0], &mounts[1]["source"]),
            (&own, &json!(husk_proto::SHM))
        );
    }
}
