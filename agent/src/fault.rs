//! What a request can fail with, as the contract's statuses (agent.proto, "Errors").
//!
//! Every module has its own error type; they meet here, at the edge to `service`. A fault says what
//! was asked wrongly or what broke, once; it must never be built from a bare errno.

use std::io;

use thiserror::Error;
use ttrpc::Code;

use crate::cgroup::CgroupError;
use crate::control::ControlError;
use crate::spec::Problem;
use crate::streams::StreamError;

#[derive(Debug, Error)]
pub enum Fault {
    /// The request or its specification is wrong.
    #[error("{0}")]
    Invalid(String),
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    Exists(String),
    /// Right at another time.
    #[error("{0}")]
    State(String),
    /// Who was to be reached cannot be.
    #[error("{0}")]
    Unavailable(String),
    /// The guest failed to do it.
    #[error("{0}")]
    Broken(String),
}

impl Fault {
    /// The kernel refused `what`.
    pub fn of_call(what: &str, error: io::Error) -> Self {
        Fault::Broken(format!("{what}: {error}"))
    }

    fn code(&self) -> Code {
        match self {
            Fault::Invalid(_) => Code::INVALID_ARGUMENT,
            Fault::NotFound(_) => Code::NOT_FOUND,
            Fault::Exists(_) => Code::ALREADY_EXISTS,
            Fault::State(_) => Code::FAILED_PRECONDITION,
            Fault::Unavailable(_) => Code::UNAVAILABLE,
            Fault::Broken(_) => Code::INTERNAL,
        }
    }
}

impl From<Fault> for ttrpc::Error {
    fn from(fault: Fault) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(fault.code(), fault.to_string()))
    }
}

impl From<Problem> for Fault {
    fn from(problem: Problem) -> Self {
        Fault::Invalid(problem.to_string())
    }
}

impl From<CgroupError> for Fault {
    fn from(error: CgroupError) -> Self {
        match error {
            CgroupError::Spec(_)
            | CgroupError::BelowUse { .. }
            | CgroupError::NoDevice(_)
            | CgroupError::NoController { .. } => Fault::Invalid(error.to_string()),
            CgroupError::Exists(_) => Fault::Exists(error.to_string()),
            _ => Fault::Broken(error.to_string()),
        }
    }
}

impl From<StreamError> for Fault {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Id(..) | StreamError::Terminal(_) => Fault::Invalid(error.to_string()),
            _ => Fault::Broken(error.to_string()),
        }
    }
}

impl From<ControlError> for Fault {
    fn from(error: ControlError) -> Self {
        Fault::Broken(error.to_string())
    }
}
