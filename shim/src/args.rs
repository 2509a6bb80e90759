//! The command line of `containerd-shim-husk-v2`, as containerd writes it (Go's flag syntax).
//! It never touches the file system.

use std::path::PathBuf;

use thiserror::Error;

/// What this process was started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Start,
    Delete,
    /// Our own: the long-lived process that `start` leaves behind.
    Serve,
    /// Our own: builds a template that a cold start has missed. The rest is on stdin.
    BuildTemplate,
    Version,
    Info,
}

/// One parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    pub action: Action,
    /// containerd's namespace; a valid identifier.
    pub namespace: String,
    /// The container; in serve mode the pod. A valid identifier.
    pub id: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// Where `delete` finds the bundle; otherwise the working directory is it.
    pub bundle: Option<PathBuf>,
    pub debug: bool,
    /// In serve mode, when the shim was executed first, nanoseconds of CLOCK_MONOTONIC; 0 unknown.
    pub since_ns: u64,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum ArgsError {
    #[error("unknown flag {0}")]
    UnknownFlag(String),
    #[error("flag {0} needs a value")]
    MissingValue(String),
    #[error("unknown action {0:?}: expected start or delete")]
    UnknownAction(String),
    #[error("no action: expected start or delete")]
    NoAction,
    #[error("{flag} {value:?}: not a containerd identifier ([A-Za-z0-9._-], 1 to 128 characters)")]
    Identifier { flag: &'static str, value: String },
}

/// Whether `name` may become part of a path: containerd's identifiers, as long as none is special.
pub fn is_identifier(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=128).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.')
}

impl Invocation {
    /// Parses the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut args = args.into_iter();
        let mut invocation = Self {
            action: Action::Start,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            debug: false,
            since_ns: 0,
        };
        let mut action = None;
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix('-') else {
                action = Some(match arg.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    "serve" => Action::Serve,
                    "build-template" => Action::BuildTemplate,
                    _ => return Err(ArgsError::UnknownAction(arg)),
                });
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "v" | "version" => action = Some(Action::Version),
                "info" => action = Some(Action::Info),
                "debug" => invocation.debug = value.as_deref() != Some("false"),
                "namespace" | "id" | "address" | "publish-binary" | "bundle" | "since" => {
                    let value = value
                        .or_else(|| args.next())
                        .ok_or_else(|| ArgsError::MissingValue(arg.clone()))?;
                    match name {
                        "namespace" => invocation.namespace = value,
                        "id" => invocation.id = value,
                        "address" => invocation.address = value,
                        "bundle" => invocation.bundle = Some(value.into()),
                        "since" => invocation.since_ns = value.parse().unwrap_or(0),
                        // The publish binary: our events go by ttrpc.
                        _ => {}
                    }
                }
                _ => return Err(ArgsError::UnknownFlag(arg)),
            }
        }
        invocation.action = action.ok_or(ArgsError::NoAction)?;
        if matches!(
            invocation.action,
            Action::Version | Action::Info | Action::BuildTemplate
        ) {
            return Ok(invocation);
        }
        for (flag, value) in [
            ("-namespace", &invocation.namespace),
            ("-id", &invocation.id),
        ] {
            if !is_identifier(value) {
                return Err(ArgsError::Identifier {
                    flag,
                    value: value.clone(),
                });
            }
        }
        Ok(invocation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, ArgsError> {
        Invocation::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn reads_what_containerd_writes() {
        let got = parse(
            "-namespace k8s.io -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id a1 -debug start",
        )
        .unwrap();
        assert_eq!(got.action, Action::Start);
        assert_eq!(got.namespace, "k8s.io");
        assert_eq!(got.id, "a1");
        assert_eq!(got.address, "/run/containerd/containerd.sock");
        assert!(got.debug);

        let got = parse("--namespace=default --id=x -bundle /run/b delete").unwrap();
        assert_eq!(got.action, Action::Delete);
        assert_eq!(got.bundle, Some("/run/b".into()));
        assert!(!got.debug);
    }

    #[test]
    fn version_and_info_need_no_identity() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn refuses_what_could_leave_a_directory() {
        for id in ["..", ".", "a/b", "a\u{e9}", ".hidden"] {
            let error = parse(&format!("-namespace n -id {id} start")).unwrap_err();
            assert!(
                matches!(error, ArgsError::Identifier { flag: "-id", .. }),
                "{error}"
            );
        }
        assert!(parse("-namespace n start").is_err());
    }

    #[test]
    fn refuses_unknown_words() {
        assert_eq!(
            parse("-frob start"),
            Err(ArgsError::UnknownFlag("-frob".into()))
        );
        assert_eq!(parse("-id"), Err(ArgsError::MissingValue("-id".into())));
        assert_eq!(parse("run"), Err(ArgsError::UnknownAction("run".into())));
        assert_eq!(parse(""), Err(ArgsError::NoAction));
    }
}
