//! virtio-fs (virtio 1.2 §5.11): the queues between the guest's FUSE client and the file server.
//!
//! Each queue has a thread of its own, which takes a request, has the file server answer it in place,
//! and gives it back. What FUSE messages mean is the file server's business alone.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use husk_proto::SHARES_TAG;
use protobuf::Message;
use vmm_sys_util::eventfd::EventFd;

use crate::{
    fs::{self, FileServer},
    jail::{self, Role},
    memory::GuestRam,
    state::{self, StateError},
    virtio::{
        Activation, DeviceError, ID_FS, InTheWay, Kind, VirtioDevice,
        queue::{Queue, total},
    },
    vm::ending::{Cause, Ending},
};

const NAME: &str = "fs";
/// Queue 0 is the high priority queue; request queues follow.
const REQUEST_QUEUES: u32 = 1;
const QUEUE_NAMES: [&str; 1 + REQUEST_QUEUES as usize] = ["hiprio", "request"];
const QUEUE_SIZES: [u16; 1 + REQUEST_QUEUES as usize] = [16, 128];
const TAG_SIZE: usize = 36;
/// For the host to answer what is under way when the device is stopped. Whoever stops it holds the
/// PCI bus, which every vCPU may be waiting for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(7);

/// The device; its files are those of the server.
pub struct FsDevice {
    server: Arc<FileServer>,
    ending: Ending,
    workers: Vec<Worker>,
}

impl FsDevice {
    pub fn new(server: Arc<FileServer>, ending: Ending) -> Self {
        Self {
            server,
            ending,
            workers: Vec::new(),
        }
    }
}

impl VirtioDevice for FsDevice {
    fn kind(&self) -> Kind {
        Kind {
            name: NAME,
            id: ID_FS,
            class: 0x01_8000,
            queues: &QUEUE_SIZES,
            features: 0,
            doorbells: true,
        }
    }

    /// The tag, and how many request queues there are (§5.11.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; TAG_SIZE + 4];
        for (byte, source) in config.iter_mut().zip(SHARES_TAG.bytes()) {
            *byte = source;
        }
        for (byte, source) in config
            .iter_mut()
            .skip(TAG_SIZE)
            .zip(REQUEST_QUEUES.to_le_bytes())
        {
            *byte = source;
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, source) in data.iter_mut().zip(config.iter().skip(start)) {
            *byte = *source;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        for (queue, name) in activation.queues.into_iter().zip(QUEUE_NAMES) {
            let ram = activation.ram.clone();
            let server = Arc::clone(&self.server);
            match Worker::start(name, ram, queue, server, self.ending.clone()) {
                Ok(worker) => self.workers.push(worker),
                Err(cause) => {
                    self.stop();
                    return Err(DeviceError::host(NAME, "start a thread")(cause));
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<Queue> {
        let mut queues = Vec::new();
        for (name, stopped) in stop_all(std::mem::take(&mut self.workers), PATIENCE) {
            match stopped {
                Ok(queue) => queues.push(queue),
                // Its thread may yet write to guest memory, so there is no going on.
                Err(cause) => self
                    .ending
                    .report(Cause::DeviceError, DeviceError::host(NAME, name)(cause)),
            }
        }
        queues
    }

    /// On a vCPU's thread, with the bus locked.
    fn reset(&mut self) {
        self.server.reset();
    }

    fn save(&mut self) -> Result<Vec<u8>, InTheWay> {
        let in_the_way = |what| InTheWay { device: NAME, what };
        let saved = self.server.save().map_err(in_the_way)?;
        saved
            .write_to_bytes()
            .map_err(|e| in_the_way(e.to_string()))
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), StateError> {
        self.server.restore(&state::Fs::parse_from_bytes(saved)?);
        Ok(())
    }
}

/// A thread that serves one queue.
struct Worker {
    name: &'static str,
    stopping: Arc<AtomicBool>,
    doorbell: EventFd,
    /// Its queue, when it has ended.
    ended: Receiver<Queue>,
}

impl Worker {
    fn start(
        name: &'static str,
        ram: GuestRam,
        queue: Queue,
        server: Arc<FileServer>,
        ending: Ending,
    ) -> io::Result<Self> {
        let stopping = Arc::new(AtomicBool::new(false));
        let doorbell = queue.doorbell().try_clone()?;
        // Queues may come with requests that were offered before: look at them first.
        doorbell.write(1)?;
        let mut serving = Serving {
            name,
            ram,
            queue,
            server,
            stopping: Arc::clone(&stopping),
        };
        let (end, ended) = mpsc::sync_channel(1);
        let thread = thread::Builder::new().name(format!("fs-{name}"));
        jail::spawn(thread, Role::Files, move || {
            if let Err(e) = serving.run() {
                ending.report(Cause::DeviceError, e);
            }
            // Nobody waits for it any more where it took too long.
            let _ = end.send(serving.queue);
        })?;
        Ok(Self {
            name,
            stopping,
            doorbell,
            ended,
        })
    }

    /// Asks the thread to end.
    fn ask(&self) -> io::Result<()> {
        self.stopping.store(true, Ordering::SeqCst);
        self.doorbell.write(1)
    }
}

/// Has the threads end, and waits for all of them together no longer than `patience`.
fn stop_all(workers: Vec<Worker>, patience: Duration) -> Vec<(&'static str, io::Result<Queue>)> {
    let deadline = Instant::now() + patience;
    let asked: Vec<_> = workers.iter().map(Worker::ask).collect();
    let ended = workers.iter().zip(asked).map(|(worker, asked)| {
        let left = deadline.saturating_duration_since(Instant::now());
        let ended = asked.and_then(|()| {
            worker.ended.recv_timeout(left).map_err(|e| match e {
                RecvTimeoutError::Timeout => io::Error::other(format!(
                    "a file operation of the host has not returned for {patience:?}"
                )),
                RecvTimeoutError::Disconnected => io::Error::other("its thread died"),
            })
        });
        (worker.name, ended)
    });
    ended.collect()
}

/// What a worker's thread owns.
struct Serving {
    name: &'static str,
    ram: GuestRam,
    queue: Queue,
    server: Arc<FileServer>,
    stopping: Arc<AtomicBool>,
}

impl Serving {
    fn run(&mut self) -> Result<(), DeviceError> {
        let failed = DeviceError::host(NAME, "prepare a thread");
        fs::worker_init().map_err(|cause| failed(io::Error::other(cause)))?;
        loop {
            self.wait()?;
            if self.stopping.load(Ordering::SeqCst) {
                return Ok(());
            }
            self.serve_queue()?;
        }
    }

    /// Waits for the doorbell.
    fn wait(&self) -> Result<(), DeviceError> {
        let failed = |call| DeviceError::host(NAME, call);
        let mut poll = libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(self.queue.doorbell()),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&mut poll, 1, -1) };
        if ready < 0 {
            let cause = io::Error::last_os_error();
            if cause.kind() != io::ErrorKind::Interrupted {
                return Err(failed("poll")(cause));
            }
        }
        self.queue.quiet().map_err(failed("read a doorbell"))
    }

    /// Answers requests until there are none and the driver will ring for the next.
    fn serve_queue(&mut self) -> Result<(), DeviceError> {
        let failed = DeviceError::queue(NAME, self.name);
        let (ram, queue) = (&self.ram, &mut self.queue);
        loop {
            queue.disarm(ram).map_err(failed)?;
            while let Some(chain) = queue.pop(ram).map_err(failed)? {
                let written = self.server.handle(&chain.readable, &chain.writable);
                let written = written.map_err(|e| {
                    log::warn!("fs: {e}");
                    DeviceError::Driver {
                        device: NAME,
                        what: "a malformed FUSE request",
                    }
                })?;
                let written = written.min(total(&chain.writable));
                queue.push(ram, chain.head(), written).map_err(failed)?;
                queue.signal(ram).map_err(failed)?;
                if self.stopping.load(Ordering::Relaxed) {
                    return Ok(());
                }
            }
            if !queue.arm(ram).map_err(failed)? {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::VolatileSlice;

    use super::*;

    /// A guest's kernel that crashes, or is replaced by another, takes no leave of the file server.
    #[test]
    fn a_driver_that_resets_the_device_has_nothing_open() {
        let server = Arc::new(FileServer::new().unwrap());
        let mut device = FsDevice::new(Arc::clone(&server), Ending::default());
        // OPENDIR of the root directory.
        let mut request = [0_u8; 40 + 8];
        request[0] = 48;
        request[4] = 27;
        request[16] = 1;
        let mut reply = [0_u8; 16 + 16];
        let request = [VolatileSlice::from(&mut request[..])];
        let written = server.handle(&request, &[VolatileSlice::from(&mut reply[..])]);
        assert_eq!((written.unwrap(), reply[4..8] == [0; 4]), (32, true));
        assert!(device.save().is_err());
        device.reset();
        device.save().unwrap();
    }

    #[test]
    fn workers_that_the_host_holds_up_are_not_waited_for_for_ever() {
        const PATIENCE: Duration = Duration::from_millis(100);
        let (ends, workers): (Vec<_>, Vec<_>) = (0..20)
            .map(|_| {
                let (end, ended) = mpsc::sync_channel::<Queue>(1);
                let worker = Worker {
                    name: "request",
                    stopping: Arc::default(),
                    doorbell: EventFd::new(0).unwrap(),
                    ended,
                };
                (end, worker)
            })
            .unzip();
        let began = Instant::now();
        let stopped = stop_all(workers, PATIENCE);
        assert!(began.elapsed() < PATIENCE * 10, "one after the other");
        assert_eq!(stopped.len(), ends.len());
        for (_, stopped) in stopped {
            let error = stopped.err().unwrap();
            assert!(error.to_string().contains("has not returned"), "{error}");
        }
    }
}
