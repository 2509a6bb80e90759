//! What containerd is answered when a request fails: a ttrpc code, on which its fallbacks depend,
//! and a message for people. Every module's error turns into one of these at the service's edge.

use std::fmt;

use ttrpc::Code;

use crate::untrusted;

/// The end of a request that failed.
#[derive(Clone, Debug)]
pub struct Fault {
    pub code: Code,
    pub message: String,
}

impl Fault {
    pub fn new(code: Code, message: impl fmt::Display) -> Self {
        Self {
            code,
            message: message.to_string(),
        }
    }

    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(Code::INTERNAL, message)
    }

    pub fn invalid(message: impl fmt::Display) -> Self {
        Self::new(Code::INVALID_ARGUMENT, message)
    }

    pub fn not_found(message: impl fmt::Display) -> Self {
        Self::new(Code::NOT_FOUND, message)
    }

    pub fn precondition(message: impl fmt::Display) -> Self {
        Self::new(Code::FAILED_PRECONDITION, message)
    }

    pub fn unimplemented(message: impl fmt::Display) -> Self {
        Self::new(Code::UNIMPLEMENTED, message)
    }

    /// The failure of a call to the VMM or the agent, which may lie: the code is taken only if it
    /// is one of the contract's, the text is bounded.
    pub fn of_call(what: &str, error: ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else {
            let error = untrusted::message(&error.to_string());
            return Self::internal(format_args!("{what}: {error}"));
        };
        let code = match status.code() {
            // What a spec or a process got wrong is UNKNOWN to runc's clients.
            Code::INVALID_ARGUMENT => Code::UNKNOWN,
            code @ (Code::NOT_FOUND
            | Code::ALREADY_EXISTS
            | Code::FAILED_PRECONDITION
            | Code::UNIMPLEMENTED) => code,
            _ => Code::INTERNAL,
        };
        Self::new(
            code,
            format_args!("{what}: {}", untrusted::message(status.message())),
        )
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl From<Fault> for ttrpc::Error {
    fn from(fault: Fault) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(fault.code, fault.message))
    }
}
