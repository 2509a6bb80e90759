//! What the shim says of itself: `-v` for people, and `-info` for containerd (`RuntimeInfo`), which CRI asks for what a
//! runtime can do before it offers it to pods.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::{Value, json};

use crate::{RUNTIME, VERSION, options::is_known};

/// The type under which containerd knows the OCI runtime's features, whose bytes are JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// In the form that containerd's own shim has.
pub fn version() -> String {
    format!("containerd-shim-husk-v2:\n  Version:  {VERSION}\n\n")
}

/// The answer to `-info`; `options` is what was written to stdin: the runtime options, an `Any`.
pub fn runtime_info(options: &[u8]) -> protobuf::Result<Vec<u8>> {
    let options = Any::parse_from_bytes(options).ok();
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(RuntimeVersion {
            version: VERSION.into(),
            ..RuntimeVersion::default()
        }),
        options: options.filter(|any| is_known(&any.type_url)).into(),
        features: MessageField::some(Any {
            type_url: FEATURES.into(),
            value: features().to_string().into_bytes(),
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    };
    info.write_to_bytes()
}

/// features.md of the OCI specification: what this husk knows, on whatever host. What is not named is unknown there.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": mount_options(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": true, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP"
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"]
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}}
        }
    })
}

/// Those that are taken and that no file system has to know; `r` before an attribute is for all mounts below.
fn mount_options() -> Vec<String> {
    let attributes = [
        "atime",
        "dev",
        "diratime",
        "exec",
        "noatime",
        "nodev",
        "nodiratime",
        "noexec",
        "norelatime",
        "nostrictatime",
        "nosuid",
        "nosymfollow",
        "relatime",
        "ro",
        "rw",
        "strictatime",
        "suid",
        "symfollow",
    ];
    let others = [
        "async",
        "bind",
        "defaults",
        "dirsync",
        "idmap",
        "iversion",
        "lazytime",
        "loud",
        "mand",
        "noiversion",
        "nolazytime",
        "nomand",
        "private",
        "rbind",
        "remount",
        "ridmap",
        "rprivate",
        "rslave",
        "runbindable",
        "silent",
        "slave",
        "sync",
        "tmpcopyup",
        "unbindable",
    ];
    let deep = attributes.iter().map(|name| format!("r{name}"));
    let plain = attributes
        .iter()
        .chain(&others)
        .map(|name| (*name).to_owned());
    let mut all: Vec<String> = deep.chain(plain).collect();
    all.sort_unstable();
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_who_it_is_and_what_it_knows() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x12\x02/p".to_vec(),
            ..Any::default()
        };
        let bytes = runtime_info(&options.write_to_bytes().unwrap()).unwrap();
        let info = RuntimeInfo::parse_from_bytes(&bytes).unwrap();
        assert_eq!(
            (info.name.as_str(), info.version.version.as_str()),
            (RUNTIME, VERSION)
        );
        assert_eq!(*info.options, options);
        assert_eq!(info.features.type_url, FEATURES);
        let features: Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["ociVersionMin"], "1.0.0");
        // By this one CRI knows whether volumes can be read-only with all below.
        let options = features["mountOptions"].as_array().unwrap();
        assert!(options.contains(&"rro".into()) && options.contains(&"nosuid".into()));
        for unknown in [&b""[..], b"\xff"] {
            let info = RuntimeInfo::parse_from_bytes(&runtime_info(unknown).unwrap()).unwrap();
            assert!(info.options.is_none() && info.features.is_some());
        }
        assert!(version().contains(VERSION));
    }
}
