//! virtio-rng (virtio 1.2 §5.4): the host's randomness.
//!
//! Served on the thread of the vCPU that asks: a request costs microseconds, and the guest pays for
//! it with its own time. No thread, no lock.

use std::io;

use crate::{
    memory::GuestRam,
    virtio::{
        Activation, DeviceError, ID_RNG, Kind, VirtioDevice,
        queue::{Queue, fill, split, total},
    },
};

const NAME: &str = "rng";
const QUEUE: &str = "request";
/// Bytes answered per request at most. A driver that wants more asks again.
const ANSWER_MAX: usize = 256;
/// Requests that the queue holds, and that one ring of the doorbell is answered.
const REQUESTS: u16 = 16;

#[derive(Default)]
pub struct Rng {
    active: Option<(GuestRam, Queue)>,
}

impl VirtioDevice for Rng {
    fn kind(&self) -> Kind {
        Kind {
            name: NAME,
            id: ID_RNG,
            class: 0xff_0000,
            queues: &[REQUESTS],
            features: 0,
            doorbells: false,
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        self.active = queues.next().map(|queue| (activation.ram, queue));
        Ok(())
    }

    fn notify(&mut self, _: u16) -> Result<(), DeviceError> {
        let Some((ram, queue)) = &mut self.active else {
            return Ok(());
        };
        let failed = DeviceError::queue(NAME, QUEUE);
        // Not until there are none: the bus is locked, and another vCPU could offer more for ever.
        for _ in 0..REQUESTS {
            let Some(chain) = queue.pop_or_arm(ram).map_err(failed)? else {
                break;
            };
            let mut random = [0; ANSWER_MAX];
            let wanted = total(&chain.writable).min(ANSWER_MAX);
            let random = random_bytes(&mut random, wanted)?;
            let (target, _) = split(&chain.writable, random.len()).map_err(failed)?;
            fill(&target, random);
            let (head, written) = (chain.head(), random.len());
            queue.push(ram, head, written).map_err(failed)?;
        }
        // A driver that had more than these waiting rings with its next request; Linux' has one at a time.
        queue.arm(ram).map_err(failed)?;
        queue.signal(ram).map_err(failed)
    }

    fn stop(&mut self) -> Vec<Queue> {
        self.active
            .take()
            .map(|(_, queue)| queue)
            .into_iter()
            .collect()
    }
}

/// Up to `wanted` fresh bytes.
fn random_bytes(buffer: &mut [u8; ANSWER_MAX], wanted: usize) -> Result<&[u8], DeviceError> {
    let wanted = wanted.min(buffer.len());
    // SAFETY: `wanted` bytes lie within the buffer.
    let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), wanted, 0) };
    let got = usize::try_from(got).map_err(|_| io::Error::last_os_error());
    let got = got.map_err(DeviceError::host(NAME, "getrandom"))?;
    Ok(buffer.get(..got).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::queue::testing::{BUFFERS, NEXT, WRITE, offer, queue, ram};

    #[test]
    fn requests_are_answered_and_bounded() {
        let ram = ram();
        let (driver, queue) = queue(&ram, 0);
        offer(
            &driver,
            0,
            &[
                (BUFFERS, 64, WRITE, 0),
                (BUFFERS, 100, WRITE | NEXT, 2),
                (BUFFERS + 4096, 4096, WRITE, 0),
            ],
        );
        let mut rng = Rng {
            active: Some((ram.clone(), queue)),
        };
        rng.notify(0).unwrap();
        let used = driver.used();
        assert_eq!(u16::from_le(used.idx().load()), 2);
        assert_eq!(used.ring().ref_at(0).unwrap().load().len(), 64);
        assert_eq!(used.ring().ref_at(1).unwrap().load().len(), 256);
        assert_eq!(rng.stop().len(), 1);
    }

    #[test]
    fn a_hostile_request_is_an_error() {
        let ram = ram();
        let (driver, queue) = queue(&ram, 0);
        offer(&driver, 0, &[(u64::MAX - 10, 64, WRITE, 0)]);
        let mut rng = Rng {
            active: Some((ram.clone(), queue)),
        };
        assert!(matches!(rng.notify(0), Err(DeviceError::Queue { .. })));
    }
}
