//! `linux.personality`: the execution domain, as personality(2) has it.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum Domain {
    #[serde(rename = "LINUX")]
    Linux,
    /// uname(2) speaks of i686.
    #[serde(rename = "LINUX32")]
    Linux32,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Personality {
    pub domain: Domain,
    /// The specification knows none, and runc ignores them.
    #[serde(default, skip_serializing, deserialize_with = "super::or_default")]
    pub flags: Vec<String>,
}

impl Personality {
    pub fn number(&self) -> u64 {
        match self.domain {
            Domain::Linux => 0,
            Domain::Linux32 => 8,
        }
    }
}
