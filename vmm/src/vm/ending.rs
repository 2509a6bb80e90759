//! How a machine ends: the first reason reported is the reason.
//!
//! Anyone who runs a part of the machine holds an [`Ending`] and reports to it; the service waits
//! for it, stops the vCPUs and tells the client.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::watch;

use crate::log::ONCE;

/// What ended the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The guest said goodbye.
    PoweredOff,
    /// The guest asked for a reboot.
    Reset,
    /// The guest kernel panicked.
    Panicked,
    TripleFault,
    /// KVM_RUN failed, or returned what this VMM cannot handle.
    KvmError,
    /// The client asked for it.
    Stopped,
    /// A device failed for good.
    DeviceError,
}

/// The end of a machine, with one line for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    pub cause: Cause,
    pub detail: String,
}

/// Reports and awaits the end of one machine. Clones share it.
#[derive(Clone)]
pub struct Ending {
    end: watch::Sender<Option<End>>,
    /// Mirrors `end`, for vCPUs to look at on every exit.
    come: Arc<AtomicBool>,
}

impl Default for Ending {
    fn default() -> Self {
        Self {
            end: watch::Sender::new(None),
            come: Arc::default(),
        }
    }
}

impl Ending {
    /// Ends the machine, unless it has ended already.
    pub fn report(&self, cause: Cause, detail: impl fmt::Display) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            if first {
                let detail = detail.to_string();
                let separator = if detail.is_empty() { "" } else { ": " };
                log::info!(target: ONCE, "the guest ended, {cause:?}{separator}{detail}");
                *end = Some(End { cause, detail });
            }
            first
        });
        self.come.store(true, Ordering::Release);
    }

    /// Whether the machine has ended.
    pub fn has_come(&self) -> bool {
        self.come.load(Ordering::Acquire)
    }

    /// The end, if it has come.
    #[cfg(test)]
    pub fn get(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    /// Waits for the end.
    pub async fn wait(&self) -> End {
        let mut receiver = self.end.subscribe();
        loop {
            if let Some(end) = receiver.borrow_and_update().clone() {
                return end;
            }
            // The sender lives as long as `self`: an error cannot come.
            if receiver.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_stands() {
        let ending = Ending::default();
        assert_eq!(ending.get(), None);
        ending.report(Cause::Panicked, "first");
        ending.report(Cause::Reset, "second");
        let end = ending.get().unwrap();
        assert_eq!((end.cause, end.detail.as_str()), (Cause::Panicked, "first"));
    }
}
