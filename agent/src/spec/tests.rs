//! What the reader of specifications accepts and what it refuses, by name.

use super::*;

/// `ctr run` of containerd 1.7 for a busybox image, as the shim passes it on (paths rewritten,
/// network namespace removed).
pub(crate) const CTR: &str = include_str!("ctr-1.7.json");

fn problem(json: &serde_json::Value) -> String {
    let text = serde_json::to_vec(json).unwrap();
    match parse::<Spec>(&text).and_then(|spec| spec.validate()) {
        Err(problem) => problem.to_string(),
        Ok(()) => panic!("accepted: {json}"),
    }
}

fn document() -> serde_json::Value {
    serde_json::from_str(CTR).unwrap()
}

#[test]
fn the_specification_of_ctr_is_read_whole() {
    let spec: Spec = parse(CTR.as_bytes()).unwrap();
    spec.validate().unwrap();
    assert_eq!(spec.process.args, ["sh"]);
    assert_eq!(spec.mounts.len(), 7);
    assert!(spec.has(NamespaceKind::Pid));
    // What is sent to oci-init is read there by the same code.
    let again: Spec = parse(&serde_json::to_vec(&spec).unwrap()).unwrap();
    again.validate().unwrap();
    assert_eq!(again.linux.masked_paths, spec.linux.masked_paths);
}

#[test]
fn an_unknown_field_is_named_with_its_place() {
    let mut spec = document();
    spec["process"]["nonsense"] = 1.into();
    assert!(problem(&spec).contains("process"), "{}", problem(&spec));
    assert!(problem(&spec).contains("nonsense"));
    let mut spec = document();
    spec["linux"]["resources"]["memory"]["limt"] = 1.into();
    assert!(problem(&spec).starts_with("linux.resources.memory"));
}

#[test]
fn every_field_nobody_acts_on_is_refused_by_name() {
    let set = serde_json::json!({"x": "y"});
    for path in [
        "hooks.prestart",
        "hooks.createRuntime",
        "hooks.poststart",
        "hooks.poststop",
        "solaris",
        "windows",
        "vm",
        "zos",
        "process.commandLine",
        "linux.netDevices",
        "linux.memoryPolicy",
        "linux.resources.rdma",
    ] {
        let mut spec = document();
        let pointer = format!("/{}", path.replace('.', "/"));
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        if spec.pointer(parent).is_none() {
            // The specification of ctr has none.
            spec[&parent[1..]] = serde_json::json!({});
        }
        spec.pointer_mut(parent).unwrap()[key] = set.clone();
        assert!(
            problem(&spec).starts_with(&format!("{path}: is set")),
            "{path}: {}",
            problem(&spec)
        );
        spec.pointer_mut(parent).unwrap()[key] = serde_json::json!({});
        assert!(
            parse::<Spec>(&serde_json::to_vec(&spec).unwrap()).is_ok(),
            "empty {path}"
        );
    }
    let mut spec = document();
    spec["mounts"][2]["uidMappings"] =
        serde_json::json!([{"containerID": 0, "hostID": 1, "size": 1}]);
    assert!(problem(&spec).starts_with("mounts[2].uidMappings"));
}

#[test]
fn wrong_values_are_named() {
    use serde_json::json;
    for (pointer, value, start) in [
        ("/process/args", json!([]), "process.args"),
        ("/process/cwd", json!("tmp"), "process.cwd"),
        ("/process/env", json!(["NOEQUALS"]), "process.env"),
        ("/process/env", json!(["=x"]), "process.env"),
        (
            "/process/env",
            json!(["A=b\u{0}"]),
            "process.args, env or cwd",
        ),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_X", "hard": 1, "soft": 1}]),
            "process.rlimits",
        ),
        (
            "/process/rlimits",
            json!([{"type": "RLIMIT_CPU", "hard": 1, "soft": 2}]),
            "process.rlimits",
        ),
        ("/process/user/uid", json!(-1), "process.user.uid"),
        ("/root/path", json!("rootfs"), "root.path"),
        (
            "/mounts/0/destination",
            json!("a\u{0}b"),
            "mounts[0].destination",
        ),
        (
            "/linux/namespaces",
            json!([{"type": "pid"}]),
            "linux.namespaces",
        ),
        (
            "/linux/namespaces/0",
            json!({"type": "nest"}),
            "linux.namespaces[0].type",
        ),
        (
            "/linux/namespaces/0",
            json!({"type": "user"}),
            "linux.uidMappings: a user namespace needs one",
        ),
        (
            "/linux/uidMappings",
            json!([{"containerID": 0, "hostID": 1, "size": 1}]),
            "linux.uidMappings: needs a user namespace",
        ),
        (
            "/linux/timeOffsets",
            json!({"boottime": {"secs": 1}}),
            "linux.timeOffsets.boottime: needs a time namespace of its own",
        ),
        (
            "/linux/timeOffsets",
            json!({"realtime": {"secs": 1}}),
            "linux.timeOffsets.realtime",
        ),
        (
            "/linux/personality",
            json!({"domain": "BSD"}),
            "linux.personality.domain",
        ),
        (
            "/linux/sysctl",
            json!({"kernel.hostname": "x"}),
            "linux.sysctl.kernel.hostname: conflicts with hostname",
        ),
        (
            "/linux/namespaces/0/path",
            json!("/proc/1/ns/pid"),
            "linux.namespaces[0].path",
        ),
        (
            "/linux/namespaces/0/path",
            json!("/run/husk/containers/a/ns/mount"),
            "linux.namespaces[0].path",
        ),
        (
            "/linux/namespaces/0/path",
            json!("/run/husk/containers/a/b/ns/pid"),
            "linux.namespaces[0].path",
        ),
        (
            "/linux/cgroupsPath",
            json!("/a/../../b"),
            "linux.cgroupsPath",
        ),
        (
            "/linux/sysctl",
            json!({"kernel.panic": "1"}),
            "linux.sysctl.kernel.panic",
        ),
        (
            "/linux/sysctl",
            json!({"net..x": "1"}),
            "linux.sysctl.net..x",
        ),
        (
            "/hooks",
            json!({"createContainer": [{"path": "bin/x"}]}),
            "hooks.createContainer[0].path",
        ),
        (
            "/hooks",
            json!({"startContainer": [{"path": "/x", "timeout": 0}]}),
            "hooks.startContainer[0].timeout",
        ),
        (
            "/hooks",
            json!({"startContainer": [{"path": "/x"}, {"path": "/x", "env": ["A"]}]}),
            "hooks.startContainer[1].env",
        ),
        (
            "/linux/devices",
            json!([{"path": "/dev/x", "type": "c", "major": 5000, "minor": 1}]),
            "linux.devices[0].major",
        ),
    ] {
        let mut spec = document();
        match spec.pointer_mut(pointer) {
            Some(place) => *place = value,
            None => {
                let (parent, key) = pointer.rsplit_once('/').unwrap();
                spec.pointer_mut(parent).unwrap()[key] = value;
            }
        }
        let text = problem(&spec);
        assert!(text.starts_with(start), "{pointer}: {text}");
    }
}

#[test]
fn broken_json_says_where() {
    assert!(
        parse::<Spec>(b"{")
            .unwrap_err()
            .to_string()
            .contains("line 1")
    );
    assert!(parse::<Spec>(b"[]").is_err());
    assert!(
        parse::<Spec>(format!("{CTR} x").as_bytes())
            .unwrap_err()
            .to_string()
            .contains("document")
    );
}

#[test]
fn an_added_process_inherits_what_it_does_not_say() {
    let spec: Spec = parse(CTR.as_bytes()).unwrap();
    let mut process: Process = parse(br#"{"args":["a"],"cwd":"/"}"#).unwrap();
    process.inherit(&spec.process);
    assert_eq!(process.no_new_privileges, Some(true));
    assert_eq!(process.rlimits.len(), 1);
    assert!(process.capabilities.is_some());
}

#[test]
fn what_has_no_effect_is_accepted_and_named() {
    let mut spec = document();
    assert!(
        parse::<Spec>(CTR.as_bytes())
            .unwrap()
            .without_effect()
            .is_empty()
    );
    spec["process"]["apparmorProfile"] = "docker-default".into();
    spec["process"]["selinuxLabel"] = "system_u:system_r:svirt_lxc_net_t:s0".into();
    spec["process"]["user"]["username"] = "root".into();
    spec["process"]["capabilities"]["bounding"] = serde_json::json!(["CAP_CHOWN", "CAP_FLY"]);
    spec["process"]["capabilities"]["ambient"] = serde_json::json!(["CAP_SYS_ADMIN"]);
    spec["linux"]["mountLabel"] = "x".into();
    spec["linux"]["intelRdt"] = serde_json::json!({"closID": "a"});
    spec["linux"]["personality"] = serde_json::json!({"domain": "LINUX", "flags": ["X"]});
    let spec: Spec = parse(&serde_json::to_vec(&spec).unwrap()).unwrap();
    spec.validate().unwrap();
    let list = spec.without_effect();
    for name in [
        "process.apparmorProfile",
        "process.selinuxLabel",
        "process.user.username",
        "process.capabilities.bounding: \"CAP_FLY\"",
        "linux.mountLabel",
        "linux.intelRdt",
        "linux.personality.flags",
    ] {
        assert!(list.iter().any(|entry| entry == name), "{name}: {list:?}");
    }
    assert!(
        list.iter().any(|entry| entry.contains("ambient")),
        "{list:?}"
    );
}
