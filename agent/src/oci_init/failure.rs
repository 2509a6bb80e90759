//! How `oci-init` fails: in runc's words, which users know and search for.

use std::io;

use crate::control::{Blame, ControlError};

/// What is reported to the agent.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) blame: Blame,
}

impl Failure {
    /// The specification or the image is to blame.
    pub(super) fn request(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            blame: Blame::Request,
        }
    }

    pub(super) fn guest(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            blame: Blame::Guest,
        }
    }

    /// Says where.
    pub(super) fn at(self, place: impl FnOnce() -> String) -> Self {
        Self {
            reason: format!("{}: {}", place(), self.reason),
            ..self
        }
    }
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        Self::guest(error.to_string())
    }
}

/// Says what was tried when it failed.
pub(super) trait Explain<T> {
    fn request(self, tried: impl FnOnce() -> String) -> Result<T, Failure>;
    fn guest(self, tried: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Explain<T> for Result<T, E> {
    fn request(self, tried: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::request(format!("{}: {}", tried(), words(&error.into()))))
    }
    fn guest(self, tried: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|error| Failure::guest(format!("{}: {}", tried(), words(&error.into()))))
    }
}

/// An error as runc (Go) words it: "no such file or directory", without a number.
pub(super) fn words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error ").next().unwrap_or_default();
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => "unknown error".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_read_like_those_of_runc() {
        assert_eq!(
            words(&io::Error::from_raw_os_error(libc::ENOENT)),
            "no such file or directory"
        );
        assert_eq!(
            words(&io::Error::from_raw_os_error(libc::ENOEXEC)),
            "exec format error"
        );
        assert_eq!(
            words(&io::Error::from_raw_os_error(libc::EACCES)),
            "permission denied"
        );
    }
}
