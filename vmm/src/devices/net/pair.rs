//! The thread of a pair of queues: one way each, with one queue of the tap.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use vmm_sys_util::epoll::{ControlOperation, EpollEvent, EventSet};

use super::{
    PairQueues, control, host,
    ports::{Port, Ports, TAP},
    receive::Receiver,
    transmit::Transmitter,
};
use crate::{
    memory::GuestRam,
    virtio::{DeviceError, queue::Queue},
};

/// Epoll data of what is no tap.
const DOORBELL: u64 = TAP + 1;
/// For epoll: no limit.
pub(super) const FOREVER: i32 = -1;
const EVENTS: usize = 4;

/// What the thread owns.
pub(super) struct Pair<'m> {
    pub(super) ram: &'m GuestRam,
    pub(super) receiver: Receiver<'m>,
    pub(super) transmitter: Transmitter<'m>,
    /// That of the device, which is the first pair's to serve.
    pub(super) control: Option<Queue>,
    pub(super) ports: Arc<Ports>,
    pub(super) stopping: Arc<AtomicBool>,
    pub(super) readable: bool,
    pub(super) writable: bool,
}

impl Pair<'_> {
    /// Serves the queues until it is to stop.
    pub(super) fn run(&mut self, port: &Port) -> Result<(), DeviceError> {
        self.watch_doorbells(port, || ControlOperation::Add)?;
        let mut served = Ok(());
        while served.is_ok() && !self.stopping.load(Ordering::SeqCst) {
            served = self.turn(port, FOREVER);
        }
        self.watch_doorbells(port, || ControlOperation::Delete)?;
        served
    }

    pub(super) fn into_queues(self) -> PairQueues {
        PairQueues {
            receive: self.receiver.into_queue(),
            transmit: self.transmitter.into_queue(),
            control: self.control,
        }
    }

    fn watch_doorbells(
        &self,
        port: &Port,
        operation: fn() -> ControlOperation,
    ) -> Result<(), DeviceError> {
        let queues = [self.receiver.queue(), self.transmitter.queue()];
        for queue in queues.into_iter().chain(&self.control) {
            // Watched for its edge and never read: all queues are looked at anyway, and each ring is an edge.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, DOORBELL);
            let doorbell = queue.doorbell().as_raw_fd();
            let watched = port.epoll.ctl(operation(), doorbell, event);
            watched.map_err(host("epoll_ctl"))?;
        }
        Ok(())
    }

    /// Looks at the queues once; where that leaves nothing to be done, waits up to `patience` milliseconds for a
    /// doorbell or the tap.
    pub(super) fn turn(&mut self, port: &Port, patience: i32) -> Result<(), DeviceError> {
        let mut more = match &mut self.control {
            Some(queue) => control::turn(self.ram, queue, &self.ports)?,
            None => false,
        };
        more |= self.transmitter.turn(&port.tap, &mut self.writable)?;
        more |= self.receiver.turn(&port.tap, &mut self.readable)?;
        let mut events = [EpollEvent::default(); EVENTS];
        let timeout = if more { 0 } else { patience };
        let ready = match port.epoll.wait(timeout, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            other => other.map_err(host("epoll_wait"))?,
        };
        for event in events.iter().take(ready) {
            if event.data() == TAP {
                // The tap's edges come once: what it is ready for is remembered until it is not.
                let trouble = EventSet::ERROR | EventSet::HANG_UP;
                let set = event.event_set();
                self.readable |= set.intersects(EventSet::IN | trouble);
                self.writable |= set.intersects(EventSet::OUT | trouble);
            }
        }
        Ok(())
    }
}
