//! virtio-net (virtio 1.2 §5.1) on a tap: packets go straight between guest memory and the tap.
//!
//! A thread for each pair of queues, with a queue of the tap of its own; the first also answers the control queue.
//! The header of a packet is the tap's affair: it has the same one, and checks it. Or the host's kernel does all of it,
//! by vhost-net: then one thread is there for the control queue and to have the kernel begin and end.
//!
//! `tap` is a descriptor of the tap, `ports` all of them, `receive`, `transmit` and `control` a queue each, `pair` the
//! thread; `vhost` is a descriptor of vhost-net, `kernel` the thread beside it; here is the device.

mod control;
mod kernel;
mod pair;
mod ports;
mod receive;
mod tap;
#[cfg(test)]
pub(crate) mod tests;
mod transmit;
#[cfg(feature = "fuzzing")]
mod turns;
pub(crate) mod vhost;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use vmm_sys_util::eventfd::EventFd;

pub use self::tap::{Tap, TapError};
#[cfg(feature = "fuzzing")]
pub use self::turns::Turns;
pub use self::vhost::{Vhost, VhostError};
use self::{
    kernel::Served, pair::Pair, ports::Ports, receive::Receiver, tap::HEADER_SIZE,
    transmit::Transmitter,
};
use crate::{
    jail::{self, Role},
    memory::{GuestRam, VolatileSlice},
    state::StateError,
    virtio::{
        Activation, DeviceError, ID_NET, InTheWay, Kind, VirtioDevice,
        queue::{Queue, QueueError},
    },
    vm::ending::{Cause, Ending},
};

/// Its name in messages.
pub const NAME: &str = "net";
/// The most pairs of queues of a device, and so queues of its tap.
pub const PAIRS_MAX: usize = 8;
/// What a packet to or from the guest may carry at least and at most, in bytes.
pub const MTU: std::ops::RangeInclusive<u32> = 68..=65535;

/// Entries of each queue: Linux keeps the receive queues filled, with about 1.5 KiB each.
const QUEUE_SIZE: u16 = 256;
/// Receive and transmit, in turns, then control (§5.1.2).
static QUEUE_SIZES: [u16; 2 * PAIRS_MAX + 1] = [QUEUE_SIZE; 2 * PAIRS_MAX + 1];

/// Feature bits (§5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
const FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_MTU
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_MRG_RXBUF
    | F_STATUS;

/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

/// Bytes of an Ethernet header with a VLAN's tag.
const FRAME: usize = 14 + 4;
/// Bytes of the longest packet there is, one of those that are cut up later, with the device's header.
const PACKET_MAX: usize = HEADER_SIZE + FRAME + (1 << 16);

/// Packets that one turn takes of a queue.
const BATCH: usize = 64;
/// The most buffers one call takes (UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;
/// Of a thread, in bytes: it has no deep calls, and there may be many.
const STACK: usize = 256 << 10;

/// The device.
pub struct Net {
    mac: [u8; 6],
    mtu: u16,
    ports: Arc<Ports>,
    ending: Ending,
    workers: Vec<Worker>,
}

/// A thread, that of a pair or of all.
struct Worker {
    stopping: Arc<AtomicBool>,
    doorbell: EventFd,
    thread: JoinHandle<Vec<PairQueues>>,
}

impl Net {
    /// A device with a pair of queues for each of the tap's, of which there are 1 to [`PAIRS_MAX`]; with as many vhosts,
    /// the host's kernel serves them.
    ///
    /// # Errors
    /// The host refuses.
    pub fn new(
        taps: Vec<Tap>,
        vhosts: Vec<Vhost>,
        mac: [u8; 6],
        mtu: u16,
        ending: Ending,
    ) -> Result<Self, DeviceError> {
        let net = Self {
            mac,
            mtu,
            ports: Arc::new(Ports::new(taps, vhosts).map_err(host("watch the tap"))?),
            ending,
            workers: Vec::new(),
        };
        net.ports.use_first(1).map_err(host("TUNSETQUEUE"))?;
        Ok(net)
    }

    fn pairs(&self) -> usize {
        self.ports.count().into()
    }

    /// The tap's part of what was agreed on.
    fn set_offload(&self, features: u64) -> io::Result<()> {
        match self.ports.get(0) {
            Some(port) => port.tap.set_offload(offload(features)),
            None => Ok(()),
        }
    }

    /// Starts a thread that serves `queues` by `serve` until it is to stop, and then returns them.
    fn start(
        &self,
        index: usize,
        doorbell: &EventFd,
        queues: Vec<PairQueues>,
        serve: impl FnOnce(Vec<PairQueues>, Arc<AtomicBool>) -> Vec<PairQueues> + Send + 'static,
    ) -> io::Result<Worker> {
        let doorbell = doorbell.try_clone()?;
        let stopping = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stopping);
        // Handed over once there is a thread: one that cannot be started must not take them along.
        let (hand_over, handed_over) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("{NAME}-{index}"))
            .stack_size(STACK);
        let thread = jail::spawn(thread, Role::Net, move || match handed_over.recv() {
            Ok(queues) => serve(queues, told),
            Err(_) => Vec::new(),
        })?;
        // It waits for it.
        let _ = hand_over.send(queues);
        Ok(Worker {
            stopping,
            doorbell,
            thread,
        })
    }

    /// The thread of a pair.
    fn start_pair(
        &self,
        index: usize,
        ram: &GuestRam,
        features: u64,
        queues: PairQueues,
    ) -> io::Result<Worker> {
        let doorbell = queues.receive.doorbell().try_clone()?;
        let (ram, ports, ending) = (ram.clone(), Arc::clone(&self.ports), self.ending.clone());
        let mergeable = features & F_MRG_RXBUF != 0;
        let longest = self.longest(features);
        self.start(index, &doorbell, vec![queues], move |queues, stopping| {
            let served = queues
                .into_iter()
                .zip(ports.get(index))
                .map(|(queues, port)| {
                    let mut pair = Pair {
                        ram: &ram,
                        receiver: Receiver::new(&ram, queues.receive, mergeable, longest),
                        transmitter: Transmitter::new(&ram, queues.transmit),
                        control: queues.control,
                        ports: Arc::clone(&ports),
                        stopping: Arc::clone(&stopping),
                        readable: true,
                        writable: true,
                    };
                    if let Err(e) = pair.run(port) {
                        ending.report(Cause::DeviceError, e);
                    }
                    pair.into_queues()
                });
            served.collect()
        })
    }

    /// The thread beside the host's kernel, which serves all pairs.
    fn start_kernel(
        &self,
        broken: &EventFd,
        ram: &GuestRam,
        features: u64,
        pairs: Vec<PairQueues>,
    ) -> io::Result<Worker> {
        let (ram, ports, ending) = (ram.clone(), Arc::clone(&self.ports), self.ending.clone());
        self.start(0, broken, pairs, move |pairs, stopping| {
            let mut served = Served {
                ram,
                features,
                pairs,
                ports,
                stopping,
                serving: 0,
            };
            if let Err(e) = served.run() {
                ending.report(Cause::DeviceError, e);
            }
            served.into_queues()
        })
    }

    /// Bytes of the longest packet that the tap has for the driver.
    fn longest(&self, features: u64) -> usize {
        match offload(features) & (libc::TUN_F_TSO4 | libc::TUN_F_TSO6) {
            0 => HEADER_SIZE + FRAME + usize::from(self.mtu),
            _ => PACKET_MAX,
        }
    }
}

/// The queues that one thread serves.
struct PairQueues {
    receive: Queue,
    transmit: Queue,
    control: Option<Queue>,
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        let (several, count) = match self.pairs() {
            1 => (0, 2),
            pairs => (F_CTRL_VQ | F_MQ, 2 * pairs + 1),
        };
        Kind {
            name: NAME,
            id: ID_NET,
            class: 0x02_0000,
            queues: QUEUE_SIZES.get(..count).unwrap_or(&QUEUE_SIZES),
            features: FEATURES | several,
            doorbells: true,
        }
    }

    /// MAC, status, pairs, MTU (§5.1.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let words = [LINK_UP, self.ports.count(), self.mtu];
        let words = words.iter().flat_map(|word| word.to_le_bytes());
        let config = self.mac.into_iter().chain(words);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, source) in data.iter_mut().zip(config.skip(start)) {
            *byte = source;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Activation {
            ram,
            features,
            queues,
        } = activation;
        self.set_offload(features).map_err(host("TUNSETOFFLOAD"))?;
        let mut queues = queues.into_iter();
        let mut pairs = Vec::new();
        for _ in 0..self.pairs() {
            if let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) {
                pairs.push(PairQueues {
                    receive,
                    transmit,
                    control: None,
                });
            }
        }
        if let Some(first) = pairs.first_mut() {
            first.control = queues.next();
        }
        let started = match self.ports.vhosts().next() {
            Some(vhost) => vec![self.start_kernel(&vhost.broken, &ram, features, pairs)],
            None => {
                let pairs = pairs.into_iter().enumerate();
                pairs
                    .map(|(index, pair)| self.start_pair(index, &ram, features, pair))
                    .collect()
            }
        };
        for worker in started {
            match worker {
                Ok(worker) => self.workers.push(worker),
                Err(cause) => {
                    self.stop();
                    return Err(host("start a thread")(cause));
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<Queue> {
        for worker in &self.workers {
            worker.stopping.store(true, Ordering::SeqCst);
            // Fails only when the counter is full: then it has been rung.
            let _ = worker.doorbell.write(1);
        }
        let (mut queues, mut control) = (Vec::new(), None);
        for worker in self.workers.drain(..) {
            for pair in worker.thread.join().unwrap_or_default() {
                queues.extend([pair.receive, pair.transmit]);
                control = control.or(pair.control);
            }
        }
        queues.extend(control);
        queues
    }

    /// On a vCPU's thread, with the bus locked.
    fn reset(&mut self) {
        let reset = self.set_offload(0).and(self.ports.use_first(1));
        // The interface may be gone.
        if let Err(e) = reset {
            log::debug!("net: reset the tap: {e}");
        }
    }

    /// How many pairs are used.
    fn save(&mut self) -> Result<Vec<u8>, InTheWay> {
        Ok(self.ports.used().to_le_bytes().to_vec())
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), StateError> {
        let damaged = StateError::Content("a network device with other queues");
        let Ok(used) = <[u8; 2]>::try_from(saved) else {
            return Err(damaged);
        };
        let used = self.ports.use_first(u16::from_le_bytes(used));
        used.map_err(|_| damaged)
    }
}

/// What the tap may leave undone, in its own bits (§5.1.3.1 says what needs what).
fn offload(features: u64) -> libc::c_uint {
    let has = |feature, flag| if features & feature != 0 { flag } else { 0 };
    let segments = has(F_GUEST_TSO4, libc::TUN_F_TSO4) | has(F_GUEST_TSO6, libc::TUN_F_TSO6);
    match (features & F_GUEST_CSUM, segments) {
        (0, _) => 0,
        (_, 0) => libc::TUN_F_CSUM,
        _ => libc::TUN_F_CSUM | segments | has(F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    }
}

/// For readv and writev. Whoever calls them keeps the slice's memory mapped.
fn vector(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

fn host(call: &'static str) -> impl Fn(io::Error) -> DeviceError + Copy {
    DeviceError::host(NAME, call)
}

fn in_queue(queue: &'static str) -> impl Fn(QueueError) -> DeviceError + Copy {
    DeviceError::queue(NAME, queue)
}
