//! One process of a container, the init or an exec, as containerd sees it.
//!
//! ```text
//! Creating ──► Created ──► Starting ──► Running ──► Stopped
//! ```
//! The agent reports an exit whenever it happens, so it may come before the answer to the request
//! that made the process. It is kept then (`early`), so that containerd hears of things in order.
//! Plain state: nothing here waits or calls anybody.

use std::time::SystemTime;

use containerd_shim_protos::types::task::Status as TaskStatus;
use tokio::sync::watch;

use crate::{
    fault::Fault,
    stdio::{Paths, Streams},
};

/// The status containerd knows for "it is over, and nobody knows how".
pub const UNKNOWN_STATUS: u32 = 255;
/// 128 + SIGKILL: what ends with its VM was killed.
pub const KILLED_STATUS: u32 = 137;

/// The end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// By the host's clock: the guest's is not to be relied on.
    pub at: SystemTime,
}

impl Exit {
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Creating { early: Option<Exit> },
    Created,
    Starting { early: Option<Exit> },
    Running,
    Stopped(Exit),
}

/// A process and its streams.
#[derive(Debug)]
pub struct Process {
    state: State,
    pub paths: Paths,
    pub streams: Streams,
    /// `CloseIO` came before there were streams.
    stdin_closed: bool,
    exited: watch::Sender<Option<Exit>>,
}

impl Process {
    /// The agent has yet to be asked for it.
    pub fn creating(paths: Paths) -> Self {
        Self {
            state: State::Creating { early: None },
            paths,
            streams: Streams::default(),
            stdin_closed: false,
            exited: watch::channel(None).0,
        }
    }

    /// The agent has made it. An exit that came early is returned, to be given to [`Self::exited`].
    pub fn created(&mut self, streams: Streams) -> Option<Exit> {
        self.streams = streams;
        if self.stdin_closed {
            self.streams.close_stdin();
        }
        match self.state {
            State::Creating { early } => {
                self.state = State::Created;
                early
            }
            _ => None,
        }
    }

    /// `CloseIO` of stdin.
    pub fn close_stdin(&mut self) {
        self.stdin_closed = true;
        self.streams.close_stdin();
    }

    /// Containerd wants it to run.
    pub fn start(&mut self) -> Result<(), Fault> {
        match self.state {
            State::Created => {
                self.streams.begin().map_err(Fault::invalid)?;
                self.state = State::Starting { early: None };
                Ok(())
            }
            State::Creating { .. } => Err(Fault::precondition("process is not created yet")),
            State::Starting { .. } | State::Running => {
                Err(Fault::precondition("process is already started"))
            }
            State::Stopped(_) => Err(Fault::precondition("process has already ended")),
        }
    }

    /// The agent has started it. An early exit is returned, as in [`Self::created`].
    pub fn started(&mut self) -> Option<Exit> {
        match self.state {
            State::Starting { early } => {
                self.state = State::Running;
                early
            }
            _ => None,
        }
    }

    /// It never ran: whoever waits for it is let go, and its streams carry nothing.
    pub fn start_failed(&mut self) {
        self.streams = Streams::default();
        self.stop(Exit::now(UNKNOWN_STATUS));
    }

    /// It has ended. Says whether that is news for containerd now.
    pub fn exited(&mut self, exit: Exit) -> bool {
        match &mut self.state {
            State::Creating { early } | State::Starting { early } => {
                early.get_or_insert(exit);
                false
            }
            State::Created => {
                // It has said nothing, and nobody will close its streams.
                self.streams = Streams::default();
                self.stop(exit);
                true
            }
            State::Running => {
                self.stop(exit);
                true
            }
            State::Stopped(_) => false,
        }
    }

    fn stop(&mut self, exit: Exit) {
        self.state = State::Stopped(exit);
        self.streams.process_ended();
        self.exited.send_replace(Some(exit));
    }

    pub fn exit(&self) -> Option<Exit> {
        match self.state {
            State::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Whether it may be doing something now.
    pub fn is_active(&self) -> bool {
        matches!(self.state, State::Starting { .. } | State::Running)
    }

    /// Whether it is there and was never started.
    pub fn is_created(&self) -> bool {
        self.state == State::Created
    }

    pub fn is_creating(&self) -> bool {
        matches!(self.state, State::Creating { .. })
    }

    /// To wait for its end without holding on to it.
    pub fn subscribe(&self) -> watch::Receiver<Option<Exit>> {
        self.exited.subscribe()
    }

    pub fn status(&self) -> TaskStatus {
        match self.state {
            State::Creating { .. } | State::Created | State::Starting { .. } => TaskStatus::CREATED,
            State::Running => TaskStatus::RUNNING,
            State::Stopped(_) => TaskStatus::STOPPED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn created() -> Process {
        let mut process = Process::creating(Paths::default());
        assert_eq!(process.created(Streams::default()), None);
        process
    }

    #[test]
    fn lives_once() {
        let mut process = created();
        assert_eq!(process.status(), TaskStatus::CREATED);
        process.start().unwrap();
        assert_eq!(process.started(), None);
        assert_eq!(process.status(), TaskStatus::RUNNING);
        assert_eq!(
            process.start().unwrap_err().code,
            ttrpc::Code::FAILED_PRECONDITION
        );
        assert!(process.exited(Exit::now(3)));
        assert!(!process.exited(Exit::now(4)));
        assert_eq!(process.exit().unwrap().status, 3);
        assert_eq!(
            process.start().unwrap_err().code,
            ttrpc::Code::FAILED_PRECONDITION
        );
    }

    #[test]
    fn an_exit_never_overtakes_the_start() {
        let mut process = Process::creating(Paths::default());
        assert!(process.start().is_err());
        assert!(!process.exited(Exit::now(1)));
        let early = process.created(Streams::default()).unwrap();
        assert!(process.exited(early));

        let mut process = created();
        process.start().unwrap();
        assert!(!process.exited(Exit::now(7)));
        assert!(process.exit().is_none());
        let early = process.started().unwrap();
        assert_eq!(early.status, 7);
        assert!(process.exited(early));
    }

    #[test]
    fn waiters_are_let_go_at_the_end_and_when_the_start_fails() {
        let mut process = created();
        let waiter = process.subscribe();
        process.start().unwrap();
        assert!(waiter.borrow().is_none());
        process.start_failed();
        assert_eq!(waiter.borrow().unwrap().status, UNKNOWN_STATUS);
        assert!(!process.exited(Exit::now(0)));
    }

    #[test]
    fn a_created_process_can_be_killed() {
        let mut process = created();
        assert!(process.exited(Exit::now(KILLED_STATUS)));
        assert_eq!(process.status(), TaskStatus::STOPPED);
    }
}
