//! `Unset`: the type of every field of the specification that the agent does not act on; `Ignored`: of those that
//! mean nothing in a guest, and are accepted with a notice.
//!
//! It reads what means "not set" (absent, null, false, 0, empty) and refuses everything else, so that
//! such a field is never dropped in silence. The path of the field is added by the reader
//! ([`super::parse`]). It must never accept a value somebody could rely on.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A field of the specification that must not be set, because the agent does not act on it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Unset;

impl<'de> Deserialize<'de> for Unset {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Judged as a whole, so that the error names this field and none inside it.
        match Empty::deserialize(deserializer)? {
            Empty(true) => Ok(Unset),
            Empty(false) => Err(Error::custom("is set, and husk does not support it yet")),
        }
    }
}

/// A field that is accepted and has no effect in a guest: whether it is set. Whoever owns it says so in the log.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Ignored(pub bool);

impl<'de> Deserialize<'de> for Ignored {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Empty(empty) = Empty::deserialize(deserializer)?;
        Ok(Ignored(!empty))
    }
}

/// Whether a value, of whatever type, means "not set".
struct Empty(bool);

impl<'de> Deserialize<'de> for Empty {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Judge)
    }
}

struct Judge;

impl<'de> Visitor<'de> for Judge {
    type Value = Empty;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("any value")
    }
    fn visit_unit<E: Error>(self) -> Result<Empty, E> {
        Ok(Empty(true))
    }
    fn visit_bool<E: Error>(self, value: bool) -> Result<Empty, E> {
        Ok(Empty(!value))
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<Empty, E> {
        Ok(Empty(value == 0))
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<Empty, E> {
        Ok(Empty(value == 0))
    }
    fn visit_f64<E: Error>(self, _: f64) -> Result<Empty, E> {
        Ok(Empty(false))
    }
    fn visit_str<E: Error>(self, value: &str) -> Result<Empty, E> {
        Ok(Empty(value.is_empty()))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Empty, A::Error> {
        let mut empty = true;
        while elements.next_element::<IgnoredAny>()?.is_some() {
            empty = false;
        }
        Ok(Empty(empty))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Empty, A::Error> {
        let mut empty = true;
        while let Some((IgnoredAny, Empty(value))) = entries.next_entry()? {
            empty &= value;
        }
        Ok(Empty(empty))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_not_set_is_read() {
        for text in [
            "null",
            "false",
            "0",
            "\"\"",
            "[]",
            "{}",
            "{\"a\":null,\"b\":{\"c\":[]}}",
        ] {
            assert!(serde_json::from_str::<Unset>(text).is_ok(), "{text}");
            assert!(!serde_json::from_str::<Ignored>(text).unwrap().0, "{text}");
        }
    }

    #[test]
    fn what_is_set_is_refused() {
        for text in [
            "true",
            "1",
            "-1",
            "1.5",
            "\"x\"",
            "[0]",
            "{\"a\":{\"b\":1}}",
        ] {
            let error = serde_json::from_str::<Unset>(text).expect_err(text);
            assert!(error.to_string().contains("is set"), "{text}: {error}");
            assert!(serde_json::from_str::<Ignored>(text).unwrap().0, "{text}");
        }
    }
}
