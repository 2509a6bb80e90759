//! What the driver asks of the device by the control queue (virtio 1.2 §5.1.6.5): how many pairs of queues are used.
//! Everything else is refused.

use super::ports::Ports;
use crate::{
    memory::GuestRam,
    virtio::{
        DeviceError,
        queue::{Chain, Queue, QueueError, fill},
    },
};

const QUEUE: &str = "control";
/// Commands that one turn answers: the driver sends one and waits.
const BATCH: usize = 8;

/// Class and command.
const MQ_VQ_PAIRS_SET: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

/// Answers commands. True when there are more.
pub(super) fn turn(ram: &GuestRam, queue: &mut Queue, ports: &Ports) -> Result<bool, DeviceError> {
    let failed = super::in_queue(QUEUE);
    let mut more = true;
    for _ in 0..BATCH {
        let Some(mut chain) = queue.pop_or_arm(ram).map_err(failed)? else {
            more = false;
            break;
        };
        let answer = chain.take_writable(1).map_err(failed)?;
        let done = obey(&mut chain, ports).map_err(failed)?;
        fill(&answer, &[if done { OK } else { ERR }]);
        queue.push(ram, chain.head(), 1).map_err(failed)?;
    }
    queue.signal(ram).map_err(failed)?;
    Ok(more)
}

fn obey(chain: &mut Chain<'_>, ports: &Ports) -> Result<bool, QueueError> {
    if chain.read_header::<2>()? != MQ_VQ_PAIRS_SET {
        return Ok(false);
    }
    let Ok(pairs) = chain.read_header::<2>() else {
        return Ok(false);
    };
    let used = ports.use_first(u16::from_le_bytes(pairs));
    if let Err(e) = &used {
        log::debug!("net: use another number of queues: {e}");
    }
    Ok(used.is_ok())
}
