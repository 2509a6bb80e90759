//! virtio 1.2: what a device is to its transport, and the life it leads.
//!
//! ```text
//!            activate            stop              activate (same or restored positions)
//!  inactive ─────────► active ─────────► stopped ─────────► active
//!      ▲                                    │
//!      └────────────── reset ───────────────┘
//! ```
//!
//! A device is owned by its transport, which calls it on a vCPU's thread with the bus locked. Work on
//! queues happens on threads of the device's own, which report what they cannot accept to the
//! machine's [`Ending`](crate::vm::ending::Ending) and return.
//!
//! A machine is saved in three steps, devices first: `stop`, which hands the queues back; then `save`
//! of transport and device; then it goes on with the same queues. A new machine's device takes the
//! other way in, `restore` and `activate`, and notices no difference.

#[cfg(test)]
mod contract;
pub mod pci;
pub mod queue;
mod saved;

use std::io;

use crate::{memory::GuestRam, state::StateError};
use queue::{Queue, QueueError};

/// Feature bits (§6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

/// Device ids (§5).
pub const ID_NET: u16 = 1;
pub const ID_RNG: u16 = 4;
pub const ID_VSOCK: u16 = 19;
pub const ID_FS: u16 = 26;

/// What a device is, for its whole life.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name in messages.
    pub name: &'static str,
    /// Device id, one of `ID_*`.
    pub id: u16,
    /// PCI class, subclass and programming interface.
    pub class: u32,
    /// The largest size of each queue; powers of two.
    pub queues: &'static [u16],
    /// Feature bits of the device type; the transport adds those of queues and of the transport.
    pub features: u64,
    /// Whether doorbells are eventfds that the device's threads wait for. Otherwise the transport
    /// calls [`VirtioDevice::notify`], on the thread of the vCPU that rang.
    pub doorbells: bool,
}

/// What an activated device works with. It keeps all of it until it is stopped.
pub struct Activation {
    pub ram: GuestRam,
    /// What device and driver have agreed on: of [`Kind::features`], and of the transport's.
    pub features: u64,
    /// One for each of [`Kind::queues`], in order, ready.
    pub queues: Vec<Queue>,
}

/// Why a device cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("{device}: {queue} queue: {cause}")]
    Queue {
        device: &'static str,
        queue: &'static str,
        cause: QueueError,
    },
    #[error("{device}: the driver sent {what}")]
    Driver {
        device: &'static str,
        what: &'static str,
    },
    #[error("{device}: {call}: {cause}")]
    Host {
        device: &'static str,
        call: &'static str,
        cause: io::Error,
    },
}

impl DeviceError {
    /// Of a system call that failed.
    pub fn host(device: &'static str, call: &'static str) -> impl Fn(io::Error) -> Self + Copy {
        move |cause| Self::Host {
            device,
            call,
            cause,
        }
    }

    /// Of one of the device's queues.
    pub fn queue(device: &'static str, queue: &'static str) -> impl Fn(QueueError) -> Self + Copy {
        move |cause| Self::Queue {
            device,
            queue,
            cause,
        }
    }
}

/// What keeps a machine from being saved.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {what}")]
pub struct InTheWay {
    pub device: &'static str,
    pub what: String,
}

/// A virtio device.
pub trait VirtioDevice: Send {
    fn kind(&self) -> Kind;

    /// Reads the device's configuration (§2.5) at `offset`. May be called in any state. What lies
    /// outside leaves `data`, which is zeroed, as it is.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// Starts to serve the queues, from the positions they have. Called while inactive or stopped.
    /// On an error the device stays as it was.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// The driver rang queue `index`, one of the activation's. Called while active, and only without
    /// [`Kind::doorbells`].
    fn notify(&mut self, index: u16) -> Result<(), DeviceError> {
        let _ = index;
        Ok(())
    }

    /// Stops serving; returns once no thread of the device touches guest memory. The queues come
    /// back with the positions they stopped at; none when it was not active.
    fn stop(&mut self) -> Vec<Queue>;

    /// Forgets what the driver has made it remember. Called while stopped or inactive.
    fn reset(&mut self) {}

    /// What the device remembers beside its queues, for [`Self::restore`]. Called while stopped or
    /// inactive; changes nothing.
    ///
    /// # Errors
    /// Something is under way that no other machine could go on with.
    fn save(&mut self) -> Result<Vec<u8>, InTheWay> {
        Ok(Vec::new())
    }

    /// Remembers what [`Self::save`] of another machine's device has written. Called on a new device.
    ///
    /// # Errors
    /// The bytes are none that `save` writes; the device must be dropped.
    fn restore(&mut self, saved: &[u8]) -> Result<(), StateError> {
        match saved {
            [] => Ok(()),
            _ => Err(StateError::Content("a device remembers what it cannot")),
        }
    }
}
