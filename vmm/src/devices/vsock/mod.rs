//! virtio-vsock (virtio 1.2 §5.10): the streams between guest and shim, without any listening socket.
//!
//! One thread owns the queues and the [`Muxer`] while the device is active. Sockets to join to guest
//! ports come through the [`Dialer`], from the service's thread.
//!
//! `packet` is the wire format, `socket` the host's end, `connection` one stream's life, `muxer` all
//! of them, `saved` what of it a clone takes over; here are the device and its thread.

mod connection;
mod muxer;
mod packet;
mod saved;
mod socket;
#[cfg(test)]
mod tests;
#[cfg(feature = "fuzzing")]
mod turns;

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use husk_proto::GUEST_CID;
use protobuf::Message;
use vmm_sys_util::{
    epoll::{ControlOperation, EpollEvent, EventSet},
    eventfd::EventFd,
};

#[cfg(feature = "fuzzing")]
pub use self::turns::Turns;
use self::{
    muxer::{CONNECTIONS_MAX, Muxer},
    packet::{HEADER_SIZE, Header},
};
use crate::{
    jail::{self, Role},
    memory::GuestRam,
    state::{self, StateError},
    virtio::{
        Activation, DeviceError, ID_VSOCK, InTheWay, Kind, VirtioDevice,
        queue::{Queue, QueueError, fill, split},
    },
    vm::ending::{Cause, Ending},
};

const NAME: &str = "vsock";
/// Queues (§5.10.2): receive (to the guest), transmit, event. The guest keeps the first filled with
/// buffers of a page each, which it pays for.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
const RECEIVE: &str = "receive";
const TRANSMIT: &str = "transmit";

/// Chains taken from a queue before the thread looks at the other queue and the sockets again.
const BATCH: usize = 64;
const EVENTS: usize = 64;
/// For epoll: no limit.
const FOREVER: i32 = -1;

/// Epoll data of what is no connection.
const WAKE: u64 = CONNECTIONS_MAX as u64;
const DOORBELL: u64 = WAKE + 1;

/// Hands sockets to the device, from any thread, at any time.
#[derive(Clone)]
pub struct Dialer(Arc<Doorway>);

struct Doorway {
    /// Sockets not yet taken up by the device, with the guest ports they are for.
    waiting: Mutex<Vec<(OwnedFd, u32)>>,
    stopping: AtomicBool,
    wake: EventFd,
}

impl Dialer {
    /// Joins `socket` to the guest's `port`. What the guest refuses is closed, and so is what comes
    /// while too many sockets wait for a guest that has no driver yet.
    pub fn dial(&self, socket: OwnedFd, port: u32) {
        let mut waiting = self
            .0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if waiting.len() < CONNECTIONS_MAX {
            waiting.push((socket, port));
        }
        drop(waiting);
        self.0.wake();
    }
}

impl Doorway {
    fn wake(&self) {
        // Fails only when the counter is full: then the thread is awake already.
        let _ = self.wake.write(1);
    }
}

/// The device.
pub struct Vsock {
    doorway: Arc<Doorway>,
    ending: Ending,
    state: State,
}

/// Who owns the connections.
enum State {
    Inactive(Box<Muxer>),
    Active(JoinHandle<Option<Thread>>),
    /// The thread has panicked: the device cannot be used again.
    Lost,
}

impl Vsock {
    /// A device whose guest may dial the shim once; it is joined to `agent`.
    pub fn new(agent: OwnedFd, ending: Ending) -> Result<(Self, Dialer), DeviceError> {
        let muxer = Muxer::new(agent).map_err(host("epoll_create1"))?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host("eventfd"))?;
        let watched = muxer.epoll().ctl(
            ControlOperation::Add,
            wake.as_raw_fd(),
            EpollEvent::new(EventSet::IN, WAKE),
        );
        watched.map_err(host("epoll_ctl"))?;
        let doorway = Arc::new(Doorway {
            waiting: Mutex::default(),
            stopping: AtomicBool::new(false),
            wake,
        });
        let dialer = Dialer(Arc::clone(&doorway));
        let state = State::Inactive(Box::new(muxer));
        let vsock = Self {
            doorway,
            ending,
            state,
        };
        Ok((vsock, dialer))
    }
}

impl Drop for Vsock {
    /// A machine that ran keeps its devices until the process ends. So this one never ran, and another
    /// one may be booted with the same agent's socket.
    fn drop(&mut self) {
        self.stop();
        if let State::Inactive(muxer) = &mut self.state {
            muxer.leave();
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> Kind {
        Kind {
            name: NAME,
            id: ID_VSOCK,
            class: 0x02_8000,
            queues: &QUEUE_SIZES,
            features: 0,
            doorbells: true,
        }
    }

    /// The guest's context id (§5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(GUEST_CID).to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, source) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *source;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let Ok([receive, transmit, event]) = <[Queue; 3]>::try_from(activation.queues) else {
            return Ok(());
        };
        let muxer = match std::mem::replace(&mut self.state, State::Lost) {
            State::Inactive(muxer) => muxer,
            other => {
                self.state = other;
                return Ok(());
            }
        };
        self.doorway.stopping.store(false, Ordering::SeqCst);
        let owned = Thread {
            ram: activation.ram,
            receive,
            transmit,
            event,
            muxer,
            doorway: Arc::clone(&self.doorway),
        };
        let ending = self.ending.clone();
        // Handed over once there is a thread: one that cannot be started must not take it along.
        let (hand_over, handed_over) = mpsc::channel::<Thread>();
        let thread = thread::Builder::new().name(NAME.to_string());
        let thread = jail::spawn(thread, Role::Vsock, move || {
            let mut owned = handed_over.recv().ok()?;
            if let Err(e) = owned.run() {
                ending.report(Cause::DeviceError, e);
            }
            Some(owned)
        });
        match thread {
            Ok(thread) => {
                // It waits for it.
                let _ = hand_over.send(owned);
                self.state = State::Active(thread);
                Ok(())
            }
            Err(cause) => {
                self.state = State::Inactive(owned.muxer);
                Err(host("start a thread")(cause))
            }
        }
    }

    fn stop(&mut self) -> Vec<Queue> {
        match std::mem::replace(&mut self.state, State::Lost) {
            State::Active(thread) => {
                self.doorway.stopping.store(true, Ordering::SeqCst);
                self.doorway.wake();
                let Ok(Some(owned)) = thread.join() else {
                    return Vec::new();
                };
                self.state = State::Inactive(owned.muxer);
                vec![owned.receive, owned.transmit, owned.event]
            }
            other => {
                self.state = other;
                Vec::new()
            }
        }
    }

    fn reset(&mut self) {
        if let State::Inactive(muxer) = &mut self.state {
            muxer.reset();
        }
    }

    fn save(&mut self) -> Result<Vec<u8>, InTheWay> {
        let in_the_way = |what| InTheWay { device: NAME, what };
        let State::Inactive(muxer) = &self.state else {
            return Err(in_the_way("it has failed".to_owned()));
        };
        let waiting = self
            .doorway
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((_, port)) = waiting.first() {
            return Err(in_the_way(format!("port {port} is being dialled")));
        }
        let saved = muxer.save().map_err(in_the_way)?;
        saved
            .write_to_bytes()
            .map_err(|e| in_the_way(e.to_string()))
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), StateError> {
        let saved = state::Vsock::parse_from_bytes(saved)?;
        match &mut self.state {
            State::Inactive(muxer) => muxer.restore(&saved),
            _ => Err(StateError::Content("a vsock device in use")),
        }
    }
}

/// What the device's thread owns.
struct Thread {
    ram: GuestRam,
    receive: Queue,
    transmit: Queue,
    /// Only ever used to tell the guest that it was moved to another host.
    event: Queue,
    muxer: Box<Muxer>,
    doorway: Arc<Doorway>,
}

impl Thread {
    fn run(&mut self) -> Result<(), DeviceError> {
        self.watch_doorbells(|| ControlOperation::Add)?;
        let result = self.serve();
        self.watch_doorbells(|| ControlOperation::Delete)?;
        result
    }

    fn watch_doorbells(&self, operation: fn() -> ControlOperation) -> Result<(), DeviceError> {
        for queue in [&self.receive, &self.transmit] {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, DOORBELL);
            let epoll = self.muxer.epoll();
            epoll
                .ctl(operation(), queue.doorbell().as_raw_fd(), event)
                .map_err(host("epoll_ctl"))?;
        }
        Ok(())
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let mut events = vec![EpollEvent::default(); EVENTS];
        // Not earlier: the sockets' events come once.
        while !self.turn(&mut events, FOREVER)? {}
        self.leave()
    }

    /// Looks at the queues once, then at the sockets and the doorway, which are waited for where nothing is left
    /// to do for the queues: `patience` milliseconds. True when the thread is to end.
    fn turn(&mut self, events: &mut [EpollEvent], patience: i32) -> Result<bool, DeviceError> {
        let taking = self.take_packets()?;
        let giving = self.give_packets()?;
        let timeout = if taking || giving { 0 } else { patience };
        let ready = match self.muxer.epoll().wait(timeout, events) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            other => other.map_err(host("epoll_wait"))?,
        };
        let mut stopping = false;
        for event in events.iter().take(ready) {
            match event.data() {
                WAKE => stopping = self.awake()?,
                // A doorbell is watched for its edge and never read: both queues are looked at
                // anyway, and each ring is an edge.
                DOORBELL => {}
                place => self.muxer.socket_ready(place as usize, event.event_set()),
            }
        }
        Ok(stopping)
    }

    /// Takes what the guest had sent before the device was stopped: at most a whole queue, for a guest
    /// that still runs may send on.
    fn leave(&mut self) -> Result<(), DeviceError> {
        for _ in 0..=usize::from(self.transmit.state().size) / BATCH {
            if !self.take_packets()? {
                break;
            }
        }
        Ok(())
    }

    /// Someone came to the doorway; true when the thread is to end.
    fn awake(&mut self) -> Result<bool, DeviceError> {
        self.doorway.wake.read().map_err(host("read an eventfd"))?;
        let waiting = {
            let mut waiting = self
                .doorway
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *waiting)
        };
        for (socket, port) in waiting {
            self.muxer.dial(socket, port);
        }
        Ok(self.doorway.stopping.load(Ordering::SeqCst))
    }

    /// Takes packets from the guest. True when there are more to be taken at once.
    fn take_packets(&mut self) -> Result<bool, DeviceError> {
        let failed = in_queue(TRANSMIT);
        let (ram, queue) = (&self.ram, &mut self.transmit);
        queue.disarm(ram).map_err(failed)?;
        let mut more = true;
        for _ in 0..BATCH {
            // Otherwise the packets wait until resets have been given, which needs the guest's room.
            if !self.muxer.takes_packets() {
                more = false;
                break;
            }
            let Some(mut chain) = queue.pop_or_arm(ram).map_err(failed)? else {
                more = false;
                break;
            };
            let header = Header::from_bytes(&chain.read_header::<HEADER_SIZE>().map_err(failed)?);
            let length = usize::try_from(header.len).unwrap_or(usize::MAX);
            let (payload, _) = split(&chain.readable, length).map_err(|_| DeviceError::Driver {
                device: NAME,
                what: "a packet shorter than its header says",
            })?;
            self.muxer.take(&header, &payload);
            queue.push(ram, chain.head(), 0).map_err(failed)?;
        }
        queue.signal(ram).map_err(failed)?;
        Ok(more)
    }

    /// Gives packets to the guest. True when there are more to be given at once.
    fn give_packets(&mut self) -> Result<bool, DeviceError> {
        let failed = in_queue(RECEIVE);
        let (ram, queue) = (&self.ram, &mut self.receive);
        let stalled = !self.muxer.takes_packets();
        let mut more = false;
        for turn in 0.. {
            if !self.muxer.has_packet() {
                break;
            }
            if turn == BATCH {
                more = true;
                break;
            }
            let Some(mut chain) = queue.pop_or_arm(ram).map_err(failed)? else {
                // The guest rings when it has room again.
                break;
            };
            let room = chain.take_writable(HEADER_SIZE).map_err(failed)?;
            if chain.writable.is_empty() {
                return Err(failed(QueueError::NoHeader));
            }
            let Some(header) = self.muxer.make(&chain.writable) else {
                queue.unpop();
                break;
            };
            fill(&room, &header.to_bytes());
            let written = HEADER_SIZE + header.len as usize;
            queue.push(ram, chain.head(), written).map_err(failed)?;
        }
        queue.signal(ram).map_err(failed)?;
        // Room for resets is room for the packets that were left.
        Ok(more || (stalled && self.muxer.takes_packets()))
    }
}

fn host(call: &'static str) -> impl Fn(io::Error) -> DeviceError + Copy {
    DeviceError::host(NAME, call)
}

fn in_queue(queue: &'static str) -> impl Fn(QueueError) -> DeviceError + Copy {
    DeviceError::queue(NAME, queue)
}
