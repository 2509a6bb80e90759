//! The runtime options that containerd carries from its configuration: a protobuf `Any` with
//! `runtimeoptions.v1.Options`. Decoded by hand, as it is three strings.

use std::sync::Once;

use protobuf::{CodedInputStream, well_known_types::any::Any};
use thiserror::Error;

/// `runtimeoptions.v1.Options`, without `type_url`, which says nothing about husk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A file instead of `/etc/husk/config.toml`; empty for none.
    pub config_path: String,
    /// TOML, taken after the file; CRI puts the runtime class' whole `options` table here.
    pub config_body: String,
}

#[derive(Debug, Error)]
pub enum OptionsError {
    #[error("runtime options of type {0:?}: husk takes runtimeoptions.v1.Options")]
    Type(String),
    #[error("runtime options: {0}")]
    Malformed(#[from] protobuf::Error),
}

/// `runtimeoptions.v1.Options`, without what comes before in a type's URL.
const OURS: &str = "runtimeoptions.v1.Options";
/// Those of runc, and the fields of each from number 1 on: what clients send to whatever runtime they meet.
const RUNCS: [(&str, &[&str]); 2] = [
    (
        "containerd.runc.v1.Options",
        &[
            "NoPivotRoot",
            "NoNewKeyring",
            "ShimCgroup",
            "IoUid",
            "IoGid",
            "BinaryName",
            "Root",
            "CriuPath",
            "SystemdCgroup",
            "CriuImagePath",
            "CriuWorkPath",
            "TaskApiAddress",
            "TaskApiVersion",
        ],
    ),
    // Of containerd 1.7's client, for a container with ids of its own (`ctr run --uidmap`).
    (
        "containerd.linux.runc.CreateOptions",
        &[
            "NoPivotRoot",
            "OpenTcp",
            "ExternalUnixSockets",
            "Terminal",
            "FileLocks",
            "EmptyNamespaces",
            "CgroupsMode",
            "NoNewKeyring",
            "ShimCgroup",
            "IoUid",
            "IoGid",
            "CriuWorkPath",
            "CriuImagePath",
        ],
    ),
];

/// The fields that options of runc of this type have.
fn of_runc(kind: &str) -> Option<&'static [&'static str]> {
    let found = RUNCS.iter().find(|(name, _)| *name == kind);
    found.map(|(_, fields)| *fields)
}

/// Whether these are options that husk understands, or knows to ignore.
pub fn is_known(type_url: &str) -> bool {
    let kind = type_url.rsplit('/').next().unwrap_or_default();
    kind == OURS || of_runc(kind).is_some()
}

impl Options {
    /// Reads the `options` of a `CreateTaskRequest`; none at all is fine.
    pub fn decode(any: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(any) = any.filter(|any| !(any.type_url.is_empty() && any.value.is_empty())) else {
            return Ok(Self::default());
        };
        let kind = any.type_url.rsplit('/').next().unwrap_or_default();
        if kind == OURS {
            return Ok(Self::from_bytes(&any.value)?);
        }
        let unknown = || OptionsError::Type(any.type_url.clone());
        let fields = of_runc(kind).ok_or_else(unknown)?;
        // Nothing in it is meant for a VM.
        let ignored = set_in(&any.value, fields)?;
        if !ignored.is_empty() {
            // Asked of each container, and of the VM started ahead: said once.
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                let ignored = ignored.join(", ");
                log::info!("runtime options of runc are ignored: {ignored}");
            });
        }
        Ok(Self::default())
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, protobuf::Error> {
        let mut options = Self::default();
        let mut input = CodedInputStream::from_bytes(bytes);
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            // A tag is (field << 3) | wire type; strings are type 2.
            match tag {
                0x12 => options.config_path = input.read_string()?,
                0x1a => options.config_body = input.read_string()?,
                _ => protobuf::rt::skip_field_for_tag(tag, &mut input)?,
            }
        }
        Ok(options)
    }
}

/// Names of the fields that a message of runc's sets.
fn set_in(bytes: &[u8], fields: &[&'static str]) -> Result<Vec<&'static str>, protobuf::Error> {
    let mut names = Vec::new();
    let mut input = CodedInputStream::from_bytes(bytes);
    while let Some(tag) = input.read_raw_tag_or_eof()? {
        let field = usize::try_from(tag >> 3).unwrap_or(usize::MAX);
        let name = field.checked_sub(1).and_then(|field| fields.get(field));
        names.push(*name.unwrap_or(&"others"));
        protobuf::rt::skip_field_for_tag(tag, &mut input)?;
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Any::default()
        }
    }

    #[test]
    fn reads_path_and_body_and_skips_the_rest() {
        let bytes = b"\x0a\x01t\x12\x02/p\x1a\x04a = \x22\x00\x28\x07";
        let options = Options::decode(Some(&any("runtimeoptions.v1.Options", bytes))).unwrap();
        assert_eq!(options.config_path, "/p");
        assert_eq!(options.config_body, "a = ");
        let prefixed = any("type.googleapis.com/runtimeoptions.v1.Options", bytes);
        assert_eq!(Options::decode(Some(&prefixed)).unwrap(), options);
    }

    #[test]
    fn none_and_runcs_are_no_options() {
        for any in [
            None,
            Some(&any("", b"")),
            Some(&any("containerd.runc.v1.Options", b"\x08\x01")),
            Some(&any("containerd.linux.runc.CreateOptions", b"\x50\x05")),
        ] {
            assert_eq!(Options::decode(any).unwrap(), Options::default());
        }
    }

    #[test]
    fn what_is_ignored_of_runcs_is_named() {
        // BinaryName, SystemdCgroup, and a field of the future.
        let bytes = b"\x32\x04crun\x48\x01\xf8\x01\x01";
        let fields = of_runc("containerd.runc.v1.Options").unwrap();
        assert_eq!(
            set_in(bytes, fields).unwrap(),
            ["BinaryName", "SystemdCgroup", "others"]
        );
        assert!(set_in(b"\x32\x09crun", fields).is_err());
        let fields = of_runc("containerd.linux.runc.CreateOptions").unwrap();
        assert_eq!(
            set_in(b"\x50\x05\x58\x06", fields).unwrap(),
            ["IoUid", "IoGid"]
        );
    }

    #[test]
    fn refuses_other_types_and_broken_bytes() {
        let error = Options::decode(Some(&any("kata.Options", b""))).unwrap_err();
        assert!(error.to_string().contains("kata.Options"));
        assert!(Options::decode(Some(&any("runtimeoptions.v1.Options", b"\x12\x09/p"))).is_err());
    }
}
