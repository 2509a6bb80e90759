//! Packets from the guest: from the driver's buffers into the tap, without a copy between.

use super::{
    BATCH, IOVECS_MAX, PACKET_MAX,
    tap::{Given, HEADER_SIZE, Tap},
};
use crate::{
    memory::GuestRam,
    virtio::{
        DeviceError,
        queue::{Queue, total},
    },
};

pub(super) const QUEUE: &str = "transmit";

/// The transmit queue.
pub(super) struct Transmitter<'m> {
    ram: &'m GuestRam,
    queue: Queue,
}

impl<'m> Transmitter<'m> {
    pub(super) fn new(ram: &'m GuestRam, queue: Queue) -> Self {
        Self { ram, queue }
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    pub(super) fn into_queue(self) -> Queue {
        self.queue
    }

    /// Gives packets to the tap, as long as `ready` says that it may take some. True when there are more to be given
    /// at once; else the tap becomes ready, or the driver rings, when there are.
    ///
    /// What the tap does not take, for what it is or because the interface is down, is lost, as on a wire.
    pub(super) fn turn(&mut self, tap: &Tap, ready: &mut bool) -> Result<bool, DeviceError> {
        let failed = super::in_queue(QUEUE);
        let (ram, queue) = (self.ram, &mut self.queue);
        queue.disarm(ram).map_err(failed)?;
        let mut more = *ready;
        for _ in 0..BATCH {
            if !*ready {
                more = false;
                break;
            }
            let Some(chain) = queue.pop_or_arm(ram).map_err(failed)? else {
                more = false;
                break;
            };
            let length = total(&chain.readable);
            let buffers = chain.readable.iter().filter(|buffer| !buffer.is_empty());
            let vectors: Vec<libc::iovec> = buffers.map(super::vector).collect();
            let possible = (HEADER_SIZE..=PACKET_MAX).contains(&length);
            if possible && vectors.len() <= IOVECS_MAX && tap.give(&vectors) == Given::Full {
                queue.unpop();
                *ready = false;
                continue;
            }
            queue.push(ram, chain.head(), 0).map_err(failed)?;
        }
        queue.signal(ram).map_err(failed)?;
        Ok(more)
    }
}
