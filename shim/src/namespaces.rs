//! `linux.namespaces` on the way to the agent. The network is the VMM's, and so the pod's. A path can name what
//! the pod has: containerd builds it from the pid that it was told, which is the VMM's for all of a pod.
//! Everything else is a namespace of the host's kernel, and refused by name.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use serde_json::{Value, json};

use crate::spec::{self, Network, Running, SpecError, refuse};

/// The network that the pod is to be in; what is left of the list is for the agent.
pub fn rewrite(spec: &mut Value, pod: Option<Running<'_>>) -> Result<Network, SpecError> {
    let of_kubernetes = spec
        .get("annotations")
        .is_some_and(|annotations| annotations.get(spec::CONTAINER_TYPE).is_some());
    let none = || {
        refuse(
            "linux.namespaces",
            "no network namespace: a microVM cannot share the host's network",
        )
    };
    let Some(namespaces) = spec.pointer_mut("/linux/namespaces") else {
        return Err(none());
    };
    let Some(namespaces) = namespaces.as_array_mut() else {
        return Err(refuse("linux.namespaces", "not an array"));
    };
    let mut network = None;
    let mut kept = Vec::with_capacity(namespaces.len());
    for (index, mut namespace) in std::mem::take(namespaces).into_iter().enumerate() {
        let text = |name| namespace.get(name).and_then(Value::as_str);
        let kind = text("type").unwrap_or_default().to_owned();
        let path = text("path").unwrap_or_default().to_owned();
        let foreign = |reason: String| {
            let field = format!("linux.namespaces[{index}].path");
            Err(refuse(field, format!("{path}: {reason}")))
        };
        match (kind.as_str(), path.as_str(), pod) {
            ("network", "", None) => network = Some(Network::New),
            ("network", path, None) => network = Some(Network::Existing(path.into())),
            // One of its own, in the guest.
            ("network", "", Some(_)) => {
                network = Some(Network::New);
                kept.push(namespace);
            }
            ("network", path, Some(pod)) => {
                if !is_network_of(path, pod) {
                    return foreign(
                        "not the network of the pod, which its containers share".into(),
                    );
                }
                network = Some(Network::Existing(path.into()));
            }
            (_, "", _) => kept.push(namespace),
            (kind, path, Some(pod)) if file(kind).is_some_and(|file| path == of(pod, file)) => {
                let (root, sandbox) = (husk_proto::CONTAINERS, pod.sandbox);
                if let Some(namespace) = namespace.as_object_mut() {
                    namespace.insert("path".into(), json!(format!("{root}/{sandbox}/ns/{kind}")));
                }
                kept.push(namespace);
            }
            (kind, ..) => {
                return foreign(format!(
                    "a microVM cannot join a {kind} namespace of the host, or of another pod"
                ));
            }
        }
    }
    let network = network.ok_or_else(none)?;
    // CRI's way to say hostPID and hostIPC. From others it asks for no more than the guest's.
    for (kind, field) in [("pid", "hostPID"), ("ipc", "hostIPC")] {
        if of_kubernetes && !kept.iter().any(|namespace| namespace["type"] == kind) {
            let reason =
                format!("no {kind} namespace ({field}): a microVM cannot share the host's");
            return Err(refuse("linux.namespaces", reason));
        }
    }
    *namespaces = kept;
    Ok(network)
}

/// The name in `/proc/<pid>/ns` of a kind that containers share.
fn file(kind: &str) -> Option<&str> {
    matches!(kind, "pid" | "ipc" | "uts" | "user" | "cgroup" | "time").then_some(kind)
}

fn of(pod: Running<'_>, file: &str) -> String {
    format!("/proc/{}/ns/{file}", pod.pid)
}

/// By that path or by any other, e.g. the one it was made under (`/run/netns/cni-…`).
fn is_network_of(path: &str, pod: Running<'_>) -> bool {
    let own = of(pod, "net");
    let identity = |path: &str| {
        let found = fs::metadata(Path::new(path)).ok()?;
        Some((found.dev(), found.ino()))
    };
    path == own || identity(path).is_some_and(|found| Some(found) == identity(&own))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(namespaces: Value, pod: Option<Running<'_>>) -> Result<(Network, Value), String> {
        let mut spec = json!({"linux": {"namespaces": namespaces}});
        let network = rewrite(&mut spec, pod).map_err(|error| error.to_string())?;
        Ok((network, spec["linux"]["namespaces"].take()))
    }

    fn pod() -> Option<Running<'static>> {
        Some(Running {
            pid: std::process::id(),
            sandbox: "pause",
        })
    }

    fn own(file: &str) -> String {
        format!("/proc/{}/ns/{file}", std::process::id())
    }

    #[test]
    fn the_pods_namespaces_are_those_of_its_first_container() {
        let (_, left) = rewritten(
            json!([
                {"type": "network", "path": own("net")}, {"type": "ipc", "path": own("ipc")},
                {"type": "pid", "path": own("pid")}, {"type": "uts", "path": own("uts")},
                {"type": "user", "path": own("user")}, {"type": "mount"}
            ]),
            pod(),
        )
        .unwrap();
        let at = |kind: &str| json!({"type": kind, "path": format!("/run/husk/containers/pause/ns/{kind}")});
        assert_eq!(
            left,
            json!([at("ipc"), at("pid"), at("uts"), at("user"), {"type": "mount"}])
        );
    }

    #[test]
    fn a_first_container_joins_nothing_but_a_network() {
        let network = json!({"type": "network", "path": "/run/netns/a"});
        let (found, left) = rewritten(json!([network, {"type": "uts"}]), None).unwrap();
        assert_eq!(found, Network::Existing("/run/netns/a".into()));
        assert_eq!(left, json!([{"type": "uts"}]));
        let uts = json!({"type": "uts", "path": own("uts")});
        let error = rewritten(json!([network, uts]), None).unwrap_err();
        assert!(
            error.starts_with(&format!("linux.namespaces[1].path: {}: ", own("uts"))),
            "{error}"
        );
    }

    #[test]
    fn what_is_another_pods_is_refused_by_name() {
        for (kind, path) in [
            ("ipc", "/proc/1/ns/ipc".to_owned()),
            ("pid", own("ipc")),
            ("mount", own("mnt")),
            ("uts", "/run/utsns/x".to_owned()),
            ("network", "/run/netns/other".to_owned()),
        ] {
            let network = json!({"type": "network", "path": own("net")});
            let foreign = json!({"type": kind, "path": path});
            let error = rewritten(json!([foreign, network]), pod()).unwrap_err();
            let start = format!("linux.namespaces[0].path: {path}: ");
            assert!(error.starts_with(&start), "{error}");
        }
    }

    #[test]
    fn what_kubernetes_wants_of_the_host_is_refused_by_name() {
        let own =
            |kinds: &[&str]| -> Value { kinds.iter().map(|kind| json!({"type": kind})).collect() };
        let all = ["network", "pid", "ipc", "uts"];
        for (field, missing) in [("hostPID", "pid"), ("hostIPC", "ipc")] {
            let left: Vec<&str> = all.into_iter().filter(|kind| *kind != missing).collect();
            let mut spec = json!({
                "linux": {"namespaces": own(&left)}, "annotations": {spec::CONTAINER_TYPE: "sandbox"},
            });
            let error = rewrite(&mut spec, None).unwrap_err().to_string();
            let start = format!("linux.namespaces: no {missing} namespace ({field}): ");
            assert!(error.starts_with(&start), "{error}");
            // ctr asks for the guest's.
            rewritten(own(&left), None).unwrap();
        }
        let mut spec = json!({"linux": {"namespaces": own(&all)}, "annotations": {spec::CONTAINER_TYPE: "sandbox"}});
        rewrite(&mut spec, None).unwrap();
    }

    #[test]
    fn the_pods_network_goes_by_any_name_and_a_new_one_is_the_guests() {
        for path in [own("net"), "/proc/self/ns/net".to_owned()] {
            let network = json!([{"type": "network", "path": path}]);
            assert_eq!(rewritten(network, pod()).unwrap().1, json!([]));
        }
        let network = json!([{"type": "network"}]);
        assert_eq!(rewritten(network.clone(), pod()).unwrap().1, network);
        let error = rewritten(json!([{"type": "pid"}]), pod()).unwrap_err();
        assert!(error.starts_with("linux.namespaces: no network"), "{error}");
    }
}
