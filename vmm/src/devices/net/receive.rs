//! Packets to the guest: from the tap into buffers that the driver has offered, without a copy between.
//!
//! A tap does not tell how long its next packet is. So a packet is taken only when the buffers at hand have room for
//! any that can come, and what a packet leaves of them waits for the next.

use std::collections::VecDeque;

use super::{
    BATCH, IOVECS_MAX,
    tap::{HEADER_SIZE, Taken, Tap},
};
use crate::{
    memory::{GuestRam, VolatileSlice},
    virtio::{
        DeviceError,
        queue::{Queue, QueueError},
    },
};

pub(super) const QUEUE: &str = "receive";
/// Where the header says how many chains hold the packet (virtio 1.2 §5.1.6.1).
const NUM_BUFFERS: usize = 10;

/// The receive queue, and the chains of it that were taken and hold no packet yet.
pub(super) struct Receiver<'m> {
    ram: &'m GuestRam,
    queue: Queue,
    /// A packet may lie in several chains (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// Bytes of the longest packet that can come, its header included.
    longest: usize,
    free: VecDeque<Free<'m>>,
    /// Bytes and buffers of all of them.
    room: usize,
    buffers: usize,
}

/// A chain without a packet.
struct Free<'m> {
    head: u16,
    buffers: Vec<VolatileSlice<'m>>,
    room: usize,
}

impl<'m> Receiver<'m> {
    pub(super) fn new(ram: &'m GuestRam, queue: Queue, mergeable: bool, longest: usize) -> Self {
        Self {
            ram,
            queue,
            mergeable,
            longest,
            free: VecDeque::new(),
            room: 0,
            buffers: 0,
        }
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// The queue, whose chains without a packet were never taken.
    pub(super) fn into_queue(mut self) -> Queue {
        for _ in &self.free {
            self.queue.unpop();
        }
        self.queue
    }

    /// Takes packets from the tap, as long as `ready` says that it may have some. True when there are more that can
    /// be taken at once; else the tap becomes ready, or the driver rings, when there are.
    pub(super) fn turn(&mut self, tap: &Tap, ready: &mut bool) -> Result<bool, DeviceError> {
        let failed = super::in_queue(QUEUE);
        let mut more = *ready;
        for _ in 0..BATCH {
            if !*ready || !self.find_room().map_err(failed)? {
                more = false;
                break;
            }
            match self.take(tap)? {
                Taken::Packet(length) => self.deliver(length).map_err(failed)?,
                Taken::Lost => {}
                Taken::Nothing => *ready = false,
            }
        }
        self.queue.signal(self.ram).map_err(failed)?;
        Ok(more)
    }

    /// True when there is room for any packet, or as much as there can be. Else the driver rings.
    fn find_room(&mut self) -> Result<bool, QueueError> {
        while !self.has_room() {
            let Some(chain) = self.queue.pop_or_arm(self.ram)? else {
                return Ok(false);
            };
            let head = chain.head();
            let mut buffers = chain.writable;
            buffers.retain(|buffer| !buffer.is_empty());
            // One is for what does not fit.
            buffers.truncate(IOVECS_MAX - 1);
            let room = buffers.iter().map(VolatileSlice::len).sum();
            if room < HEADER_SIZE {
                return Err(QueueError::NoHeader);
            }
            self.room += room;
            self.buffers += buffers.len();
            self.free.push_back(Free {
                head,
                buffers,
                room,
            });
        }
        Ok(true)
    }

    fn has_room(&self) -> bool {
        if !self.mergeable {
            return !self.free.is_empty();
        }
        self.room >= self.longest
            || self.buffers >= IOVECS_MAX - 1
            // The driver can offer no more.
            || self.free.len() >= usize::from(self.queue.state().size)
    }

    /// What is at hand is bounded by what a driver can offer, and counted.
    #[cfg(feature = "fuzzing")]
    pub(super) fn check(&self) {
        assert!(self.free.len() <= usize::from(self.queue.state().size));
        let room: usize = self.free.iter().map(|free| free.room).sum();
        let buffers: usize = self.free.iter().map(|free| free.buffers.len()).sum();
        assert_eq!((self.room, self.buffers), (room, buffers));
    }

    fn take(&self, tap: &Tap) -> Result<Taken, DeviceError> {
        let mut vectors = Vec::with_capacity(self.buffers.min(IOVECS_MAX));
        let mut room = 0;
        let chains = if self.mergeable { self.free.len() } else { 1 };
        for chain in self.free.iter().take(chains) {
            if vectors.len() + chain.buffers.len() >= IOVECS_MAX {
                break;
            }
            room += chain.room;
            vectors.extend(chain.buffers.iter().map(super::vector));
        }
        // Where a packet reaches that is longer than the room for it.
        let mut excess = 0u8;
        vectors.push(libc::iovec {
            iov_base: (&raw mut excess).cast(),
            iov_len: 1,
        });
        Ok(
            match tap
                .take(&vectors)
                .map_err(super::host("readv from the tap"))?
            {
                // A part of a packet is none.
                Taken::Packet(length) if length < HEADER_SIZE || length > room => Taken::Lost,
                taken => taken,
            },
        )
    }

    /// Gives the driver the chains that a packet was put into.
    fn deliver(&mut self, length: usize) -> Result<(), QueueError> {
        let mut left = length;
        let mut used = Vec::new();
        let mut first = None;
        while left > 0 {
            let Some(chain) = self.free.pop_front() else {
                break;
            };
            self.room -= chain.room;
            self.buffers -= chain.buffers.len();
            let written = left.min(chain.room);
            left -= written;
            used.push((chain.head, written));
            first.get_or_insert(chain);
        }
        if let Some(first) = first {
            // Of no more chains than a queue has entries.
            let chains = used.len() as u16;
            put(&first.buffers, NUM_BUFFERS, chains.to_le_bytes());
        }
        self.queue.push_all(self.ram, &used)
    }
}

/// Writes `bytes` behind the first `offset` bytes of `buffers`, where there is room.
fn put(buffers: &[VolatileSlice<'_>], offset: usize, bytes: [u8; 2]) {
    let mut start = 0;
    for buffer in buffers {
        for (place, byte) in (offset..).zip(bytes) {
            if let Some(slice) = place
                .checked_sub(start)
                .and_then(|at| buffer.offset(at).ok())
            {
                if !slice.is_empty() {
                    slice.copy_from(&[byte]);
                }
            }
        }
        start += buffer.len();
        if start >= offset + bytes.len() {
            break;
        }
    }
}
