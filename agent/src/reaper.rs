//! The end of every child: PID 1 inherits all orphans, and somebody waits for some of them.
//!
//! One task for the life of the agent. Whoever starts a process claims its pid before giving
//! control back to the runtime, so no exit can be missed; the rest is reaped and forgotten.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;

use rustix::process::{WaitOptions, WaitStatus, wait};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Exit code, or 128 + signal.
pub type Status = u32;

#[derive(Default)]
pub struct Reaper {
    claims: RefCell<HashMap<i32, oneshot::Sender<Status>>>,
}

impl Reaper {
    /// Reaps for ever; an error only if SIGCHLD cannot be received at all.
    pub async fn run(self: Rc<Self>) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                let Some(status) = code(status) else { continue };
                let claim = self.claims.borrow_mut().remove(&pid.as_raw_nonzero().get());
                match claim {
                    Some(claim) => drop(claim.send(status)),
                    None => log::debug!("orphan {pid:?} ended: {status}"),
                }
            }
            children.recv().await;
        }
    }

    /// The exit of `pid`, a child that has not been reaped. The receiver fails only with the agent.
    pub fn claim(&self, pid: i32) -> oneshot::Receiver<Status> {
        let (sender, receiver) = oneshot::channel();
        self.claims.borrow_mut().insert(pid, sender);
        receiver
    }
}

fn code(status: WaitStatus) -> Option<Status> {
    let exit = status.exit_status();
    let signal = status
        .terminating_signal()
        .map(|signal| signal.saturating_add(128));
    exit.or(signal).and_then(|code| u32::try_from(code).ok())
}
