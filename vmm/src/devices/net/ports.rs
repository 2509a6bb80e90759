//! The tap's queues, and how many of them are used: each has what its thread waits by.

use std::{
    io,
    os::fd::AsRawFd,
    sync::atomic::{AtomicU16, Ordering},
};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{tap::Tap, vhost::Vhost};

/// Epoll data of the tap.
pub(super) const TAP: u64 = 1;

/// One queue of the tap, and what its thread waits by.
pub(super) struct Port {
    pub(super) tap: Tap,
    pub(super) epoll: Epoll,
    /// Where the host's kernel serves it: then nobody here waits for the tap.
    pub(super) vhost: Option<Vhost>,
}

/// All queues of the tap. The first is always used.
pub(super) struct Ports {
    all: Vec<Port>,
    used: AtomicU16,
}

impl Ports {
    /// Of queues that the tap uses, all of them, and as many vhosts or none. There is one queue at least.
    pub(super) fn new(taps: Vec<Tap>, vhosts: Vec<Vhost>) -> io::Result<Self> {
        let mut all = Vec::new();
        let mut vhosts = vhosts.into_iter();
        for tap in taps {
            let epoll = Epoll::new()?;
            let vhost = vhosts.next();
            let port = Port { tap, epoll, vhost };
            port.watch(ControlOperation::Add)?;
            all.push(port);
        }
        let used = AtomicU16::new(all.len() as u16);
        Ok(Self { all, used })
    }

    pub(super) fn get(&self, index: usize) -> Option<&Port> {
        self.all.get(index)
    }

    /// Those that the host's kernel serves: of all queues, or none.
    pub(super) fn vhosts(&self) -> impl Iterator<Item = &Vhost> {
        self.all.iter().filter_map(|port| port.vhost.as_ref())
    }

    /// How many queues there are.
    pub(super) fn count(&self) -> u16 {
        self.all.len() as u16
    }

    /// How many of them are used.
    pub(super) fn used(&self) -> u16 {
        self.used.load(Ordering::SeqCst)
    }

    /// Has the tap use the first `wanted` queues. Two threads must not do it at a time.
    ///
    /// # Errors
    /// There are not so many, or none is asked for; or the host refuses.
    pub(super) fn use_first(&self, wanted: u16) -> io::Result<()> {
        if !(1..=self.count()).contains(&wanted) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        while self.used() < wanted {
            let next = self.used();
            if let Some(port) = self.get(next.into()) {
                port.tap.use_queue(true)?;
                // Not earlier: a queue that is not used can be watched, and nothing is ever heard of it.
                port.watch(ControlOperation::Add)?;
            }
            self.used.store(next.saturating_add(1), Ordering::SeqCst);
        }
        while self.used() > wanted {
            let last = self.used().saturating_sub(1);
            if let Some(port) = self.get(last.into()) {
                port.watch(ControlOperation::Delete)?;
                port.tap.use_queue(false)?;
            }
            self.used.store(last, Ordering::SeqCst);
        }
        Ok(())
    }
}

impl Port {
    fn watch(&self, operation: ControlOperation) -> io::Result<()> {
        if self.vhost.is_some() {
            return Ok(());
        }
        let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(both, TAP);
        self.epoll.ctl(operation, self.tap.as_raw_fd(), event)
    }
}
