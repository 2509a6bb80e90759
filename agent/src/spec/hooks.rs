//! The `hooks` object (OCI runtime specification 1.2, "POSIX-platform Hooks"), as far as it reaches the guest.
//!
//! Those of the runtime's namespaces are the host's: the shim runs them and takes them out. What is left
//! runs inside the container, by `oci_init::hooks`.

use serde::{Deserialize, Serialize};

use super::unset::Unset;
use super::{Problem, absolute, or_default};

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Hooks {
    /// Before the container's mounts are closed.
    #[serde(default, deserialize_with = "or_default")]
    pub create_container: Vec<Hook>,
    /// As the container's user, before its program.
    #[serde(default, deserialize_with = "or_default")]
    pub start_container: Vec<Hook>,

    #[serde(default, skip_serializing)]
    pub prestart: Unset,
    #[serde(default, skip_serializing)]
    pub create_runtime: Unset,
    #[serde(default, skip_serializing)]
    pub poststart: Unset,
    #[serde(default, skip_serializing)]
    pub poststop: Unset,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Of a program in the container's root filesystem.
    pub path: String,
    /// From the program's name on; none means the path.
    #[serde(default, deserialize_with = "or_default")]
    pub args: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Seconds.
    #[serde(default)]
    pub timeout: Option<u32>,
}

impl Hooks {
    pub fn validate(&self, at: &str) -> Result<(), Problem> {
        for (kind, hooks) in [
            ("createContainer", &self.create_container),
            ("startContainer", &self.start_container),
        ] {
            for (i, hook) in hooks.iter().enumerate() {
                hook.validate(&format!("{at}.{kind}[{i}]"))?;
            }
        }
        Ok(())
    }
}

impl Hook {
    fn validate(&self, at: &str) -> Result<(), Problem> {
        absolute(&format!("{at}.path"), &self.path)?;
        if self.timeout == Some(0) {
            return Err(Problem::new(format!("{at}.timeout"), "must be above zero"));
        }
        let mut strings = self.args.iter().chain(&self.env);
        if strings.any(|text| text.contains('\0')) {
            return Err(Problem::new(
                format!("{at}.args or env"),
                "contains a NUL byte",
            ));
        }
        let named = |entry: &&String| entry.find('=').is_some_and(|length| length > 0);
        match self.env.iter().find(|entry| !named(entry)) {
            Some(entry) => Err(Problem::new(
                format!("{at}.env"),
                format!("{entry:?} is not NAME=value"),
            )),
            None => Ok(()),
        }
    }
}
