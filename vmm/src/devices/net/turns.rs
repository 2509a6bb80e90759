//! A pair of queues without its thread, for fuzzing: whoever calls decides when it looks at them and at the tap, so
//! that the same input always does the same. It panics where something holds that must never hold.

use std::{io, os::fd::OwnedFd, sync::Arc};

use super::{
    PACKET_MAX, Pair, Ports, Receiver, Tap, Transmitter, host, in_queue, receive::QUEUE as RECEIVE,
};
use crate::{
    memory::GuestRam,
    virtio::{
        DeviceError,
        queue::{Queue, QueueError},
    },
};

/// What a device's only thread owns.
pub struct Turns<'m>(Pair<'m>);

impl<'m> Turns<'m> {
    /// Of a receive, a transmit and a control queue. `tap` may be anything that gives and takes a packet at a call.
    ///
    /// # Errors
    /// The host's, or that the queues are others.
    pub fn new(
        ram: &'m GuestRam,
        queues: Vec<Queue>,
        tap: OwnedFd,
        mergeable: bool,
        longest: u16,
    ) -> Result<Self, DeviceError> {
        let Ok([receive, transmit, control]) = <[Queue; 3]>::try_from(queues) else {
            return Err(in_queue(RECEIVE)(QueueError::Rings));
        };
        let longest = PACKET_MAX.min(longest.into());
        let ports = Ports::new(vec![Tap::from(tap)], Vec::new()).map_err(host("watch the tap"))?;
        Ok(Self(Pair {
            ram,
            receiver: Receiver::new(ram, receive, mergeable, longest),
            transmitter: Transmitter::new(ram, transmit),
            control: Some(control),
            ports: Arc::new(ports),
            stopping: Arc::default(),
            readable: true,
            writable: true,
        }))
    }

    /// One look at everything, without waiting.
    ///
    /// # Errors
    /// Those by which the thread ends the machine.
    pub fn turn(&mut self) -> Result<(), DeviceError> {
        let ports = Arc::clone(&self.0.ports);
        let port = ports.get(0);
        let port = port.ok_or_else(|| host("look at the tap")(io::ErrorKind::NotFound.into()))?;
        let turned = self.0.turn(port, 0);
        self.0.receiver.check();
        turned
    }

    /// The device was stopped. What it had not used of the rings was never taken.
    pub fn stop(self) -> Vec<Queue> {
        let pair = self.0.into_queues();
        [pair.receive, pair.transmit]
            .into_iter()
            .chain(pair.control)
            .collect()
    }
}
