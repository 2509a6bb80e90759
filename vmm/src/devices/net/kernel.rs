//! The thread of a device whose queues the host's kernel serves: it has the kernel begin and end, answers the control
//! queue, and hears of queues that the kernel cannot serve. Packets, doorbells and interrupts pass it by.

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
    NAME, PairQueues, control, host, in_queue,
    pair::FOREVER,
    ports::{Port, Ports},
    receive, transmit,
    vhost::{Addresses, Failed},
};
use crate::{memory::GuestRam, virtio::DeviceError};

/// Epoll data.
const CONTROL: u64 = 1;
const BROKEN: u64 = 2;
const EVENTS: usize = 4;

/// What the thread owns.
pub(super) struct Served {
    pub(super) ram: GuestRam,
    pub(super) features: u64,
    /// One for each port, all of which have a vhost.
    pub(super) pairs: Vec<PairQueues>,
    pub(super) ports: Arc<Ports>,
    pub(super) stopping: Arc<AtomicBool>,
    /// The kernel serves the first so many.
    pub(super) serving: usize,
}

impl Served {
    /// Has the queues served until it is to stop; nobody touches them when it returns.
    pub(super) fn run(&mut self) -> Result<(), DeviceError> {
        let ran = self.begin().and_then(|()| self.attend());
        let ended = self.end();
        ran.and(ended)
    }

    pub(super) fn into_queues(self) -> Vec<PairQueues> {
        self.pairs
    }

    fn begin(&self) -> Result<(), DeviceError> {
        for (pair, vhost) in self.pairs.iter().zip(self.ports.vhosts()) {
            vhost.prepare(&self.ram, self.features).map_err(failed)?;
            for (index, (queue, name)) in (0..).zip([
                (&pair.receive, receive::QUEUE),
                (&pair.transmit, transmit::QUEUE),
            ]) {
                let addresses = Addresses::of(queue, &self.ram).map_err(in_queue(name))?;
                vhost.set_up(index, queue, &addresses).map_err(failed)?;
                queue.interrupt().wire(vhost.call(index));
            }
        }
        Ok(())
    }

    /// Answers the driver, and waits.
    fn attend(&mut self) -> Result<(), DeviceError> {
        let ports = Arc::clone(&self.ports);
        let Some(port) = ports.get(0) else {
            return Ok(());
        };
        self.watch(port, || ControlOperation::Add)?;
        let mut attended = Ok(());
        while attended.is_ok() && !self.stopping.load(Ordering::SeqCst) {
            attended = self.turn(port);
        }
        self.watch(port, || ControlOperation::Delete)?;
        attended
    }

    fn turn(&mut self, port: &Port) -> Result<(), DeviceError> {
        let control = self
            .pairs
            .first_mut()
            .and_then(|pair| pair.control.as_mut());
        let more = match control {
            Some(queue) => control::turn(&self.ram, queue, &self.ports)?,
            None => false,
        };
        // What the guest sends meanwhile by a queue that it has just taken into use is found when it is served.
        self.serve(self.ports.used().into())?;
        let mut events = [EpollEvent::default(); EVENTS];
        let ready = match port.epoll.wait(if more { 0 } else { FOREVER }, &mut events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            other => other.map_err(host("epoll_wait"))?,
        };
        let mut events = events.iter().take(ready);
        let broken = events.any(|event| event.data() == BROKEN);
        match broken && !self.stopping.load(Ordering::SeqCst) {
            true => Err(DeviceError::Driver {
                device: NAME,
                what: "what the host's kernel cannot serve (vhost-net)",
            }),
            false => Ok(()),
        }
    }

    /// Has the kernel serve the first `wanted` pairs, and no others.
    fn serve(&mut self, wanted: usize) -> Result<(), DeviceError> {
        while self.serving != wanted {
            let more = self.serving < wanted;
            let at = if more {
                self.serving
            } else {
                self.serving.saturating_sub(1)
            };
            let port = self.ports.get(at);
            if let Some((port, vhost)) = port.and_then(|port| Some((port, port.vhost.as_ref()?))) {
                for index in [0, 1] {
                    vhost
                        .serve(index, more.then_some(&port.tap))
                        .map_err(failed)?;
                }
            }
            self.serving = if more { at.saturating_add(1) } else { at };
        }
        Ok(())
    }

    /// All that is under way is done, and the queues are where the kernel has left them.
    fn end(&mut self) -> Result<(), DeviceError> {
        let stopped = self.serve(0);
        for (pair, vhost) in self.pairs.iter_mut().zip(self.ports.vhosts()) {
            for (index, queue) in (0..).zip([&mut pair.receive, &mut pair.transmit]) {
                queue.interrupt().unwire(vhost.call(index));
                match vhost.take_back(index) {
                    Ok(next) => queue.go_to(next),
                    Err(e) => return Err(failed(e)),
                }
            }
        }
        stopped
    }

    fn watch(&self, port: &Port, operation: fn() -> ControlOperation) -> Result<(), DeviceError> {
        let control = self.pairs.first().and_then(|pair| pair.control.as_ref());
        let control = control.map(|queue| (queue.doorbell(), CONTROL));
        let broken = self.ports.vhosts().map(|vhost| (&vhost.broken, BROKEN));
        for (eventfd, data) in broken.chain(control) {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data);
            let watched = port.epoll.ctl(operation(), eventfd.as_raw_fd(), event);
            watched.map_err(host("epoll_ctl"))?;
        }
        Ok(())
    }
}

fn failed((call, cause): Failed) -> DeviceError {
    host(call)(cause)
}
