//! The one test that every device must pass: activate, work, save, go on, restore, work, reset, work.
//!
//! A device joins by an implementation of [`Subject`] and a line at the end.

use std::{
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use husk_proto::{AGENT_PORT, GUEST_CID, HOST_CID};
use protobuf::Message;
use virtio_queue::mock::MockSplitQueue;

use super::{
    F_EVENT_IDX, VirtioDevice,
    pci::{BAR_SIZE, VirtioPci},
    queue::testing::{BUFFERS, Count, NEXT, WRITE, offer, ram},
};
use crate::{
    devices::{
        fs::FsDevice,
        net::{Net, Tap, tests as net},
        pvpanic::Pvpanic,
        rng::Rng,
        vsock::Vsock,
    },
    fs::{FileServer, worker_init},
    memory::{Bytes, GuestAddress, GuestRam},
    pci::{Bar, PciDevice, config::HostBridge},
    state::PciFunction,
    vm::ending::Ending,
};

/// Registers of the transport.
const FEATURE_SELECT: u64 = 0x08;
const FEATURES: u64 = 0x0c;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_ADDRESSES: u64 = 0x20;
const DOORBELLS: u64 = 0x1000;
const MSIX_TABLE: u64 = 0x2000;

const BAR: Bar = Bar {
    address: 0xc000_0000,
    size: BAR_SIZE,
};
/// Bytes of memory for the rings of one queue.
const RINGS: u64 = 0x4000;

/// A device under test and what drives it.
trait Subject {
    /// A new device, as in a new process.
    fn device(&mut self) -> Box<dyn VirtioDevice>;
    /// Has the device do something that shows that it works.
    fn work(&mut self, guest: &mut Guest<'_>, transport: &mut VirtioPci);
    /// The driver has reset the device.
    fn was_reset(&mut self) {}
}

/// The driver's side of the queues.
struct Guest<'m> {
    ram: &'m GuestRam,
    sizes: &'static [u16],
    queues: Vec<MockSplitQueue<'m, GuestRam>>,
    seen: Vec<u16>,
}

impl<'m> Guest<'m> {
    fn new(ram: &'m GuestRam, sizes: &'static [u16]) -> Self {
        let zeroes = vec![0; RINGS as usize * sizes.len()];
        ram.write_slice(&zeroes, GuestAddress(0)).unwrap();
        let starts = (0..).step_by(RINGS as usize);
        let queues = starts.zip(sizes);
        Self {
            ram,
            sizes,
            queues: queues
                .map(|(start, size)| MockSplitQueue::create(ram, GuestAddress(start), *size))
                .collect(),
            seen: vec![0; sizes.len()],
        }
    }

    /// Brings the device to life as a driver does.
    fn set_up(&self, transport: &mut VirtioPci) {
        transport.write_bar(STATUS, &[3]);
        for (select, features) in [(0u32, F_EVENT_IDX as u32), (1, 1)] {
            transport.write_bar(FEATURE_SELECT, &select.to_le_bytes());
            transport.write_bar(FEATURES, &features.to_le_bytes());
        }
        transport.write_bar(STATUS, &[11]);
        for (index, queue) in (0u16..).zip(&self.queues) {
            let vector = u64::from(index) * 16;
            transport.write_bar(MSIX_TABLE + vector, &0xfee0_0000u64.to_le_bytes());
            transport.write_bar(MSIX_TABLE + vector + 12, &0u32.to_le_bytes());
            transport.write_bar(QUEUE_SELECT, &index.to_le_bytes());
            let size = self.sizes[usize::from(index)];
            transport.write_bar(QUEUE_SIZE, &size.to_le_bytes());
            transport.write_bar(QUEUE_VECTOR, &index.to_le_bytes());
            let addresses = [
                queue.desc_table_addr(),
                queue.avail_addr(),
                queue.used_addr(),
            ];
            for (at, address) in (QUEUE_ADDRESSES..).step_by(8).zip(addresses) {
                transport.write_bar(at, &(address.0 as u32).to_le_bytes());
                transport.write_bar(at + 4, &0u32.to_le_bytes());
            }
            transport.write_bar(QUEUE_ENABLE, &1u16.to_le_bytes());
        }
        transport.write_config(MSIX_CONTROL, &0x8000u16.to_le_bytes());
        transport.write_bar(STATUS, &[15]);
        let mut status = [0];
        transport.read_bar(STATUS, &mut status);
        assert_eq!(status, [15]);
    }

    fn offer(&self, queue: usize, descriptors: &[(u64, u32, u16, u16)]) {
        offer(&self.queues[queue], 0, descriptors);
    }

    fn ring(&self, transport: &mut VirtioPci, queue: usize) {
        let doorbell = transport.doorbells().nth(queue).map(|(_, doorbell)| {
            doorbell.write(1).unwrap();
        });
        if doorbell.is_none() {
            transport.write_bar(DOORBELLS + 4 * queue as u64, &[0, 0]);
        }
    }

    /// The length of the next answer in a queue.
    fn answer(&mut self, queue: usize) -> u32 {
        let used = self.queues[queue].used();
        let deadline = Instant::now() + Duration::from_secs(10);
        while u16::from_le(used.idx().load()) == self.seen[queue] {
            assert!(Instant::now() < deadline, "queue {queue} is not served");
            std::thread::yield_now();
        }
        let entry = self.seen[queue] % self.sizes[queue];
        self.seen[queue] += 1;
        used.ring().ref_at(entry.into()).unwrap().load().len()
    }
}

/// Message Control of the first capability.
const MSIX_CONTROL: u8 = 0x42;

fn transport(device: Box<dyn VirtioDevice>, ram: &GuestRam, sent: &Arc<Count>) -> VirtioPci {
    VirtioPci::new(
        device,
        BAR,
        ram.clone(),
        Arc::clone(sent) as Arc<_>,
        Ending::default(),
    )
    .unwrap()
}

/// All of a device that a guest can read without a side effect.
fn face(device: &mut dyn PciDevice) -> Vec<u8> {
    let mut bytes = Vec::new();
    for offset in (0..=0xfc).step_by(4) {
        let mut dword = [0; 4];
        device.read_config(offset, &mut dword);
        bytes.extend(dword);
    }
    for offset in (0..u64::from(BAR_SIZE)).step_by(4) {
        let mut dword = [0; 4];
        device.read_bar(offset, &mut dword);
        bytes.extend(dword);
    }
    bytes
}

fn keeps_the_contract(mut subject: impl Subject) {
    let ram = ram();
    let sent = Arc::<Count>::default();
    let device = subject.device();
    let sizes = device.kind().queues;
    let mut before = transport(device, &ram, &sent);
    let mut guest = Guest::new(&ram, sizes);
    guest.set_up(&mut before);
    subject.work(&mut guest, &mut before);

    // It goes on after it was saved, and can be saved again.
    before.stop();
    before.save().unwrap();
    before.start().unwrap();
    subject.work(&mut guest, &mut before);
    before.stop();
    let saved = before.save().unwrap();
    let shown = face(&mut before);

    // A clone looks the same, does the same, and tells the driver to look.
    let clone = subject.device();
    let mut after = transport(clone, &ram, &sent);
    after.restore(&saved).unwrap();
    assert!(face(&mut after) == shown);
    assert_eq!(after.save().unwrap(), saved);
    *sent.0.lock().unwrap() = 0;
    after.start().unwrap();
    assert!(*sent.0.lock().unwrap() >= sizes.len());
    subject.work(&mut guest, &mut after);

    // As does the same device after its driver has started anew.
    after.write_bar(STATUS, &[0]);
    subject.was_reset();
    let mut guest = Guest::new(&ram, sizes);
    guest.set_up(&mut after);
    subject.work(&mut guest, &mut after);
    after.stop();

    refuses_damage(&mut subject, &saved, &ram, &sent);
}

/// Whatever is in a state file: an error, or a device that can be started and stopped.
fn refuses_damage(
    subject: &mut impl Subject,
    saved: &PciFunction,
    ram: &GuestRam,
    sent: &Arc<Count>,
) {
    let bytes = saved.write_to_bytes().unwrap();
    let cut = (0..bytes.len()).map(|length| bytes[..length].to_vec());
    let flipped = (0..bytes.len()).map(|at| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        bytes
    });
    for damaged in cut.chain(flipped) {
        let Ok(state) = PciFunction::parse_from_bytes(&damaged) else {
            continue;
        };
        let mut device = transport(subject.device(), ram, sent);
        if device.restore(&state).is_ok() && device.start().is_ok() {
            device.stop();
        }
    }
    let mut other = saved.clone();
    let virtio = other.virtio.as_mut().unwrap();
    virtio.id ^= 1;
    let mut device = transport(subject.device(), ram, sent);
    assert!(device.restore(&other).is_err());
}

struct RngSubject;

impl Subject for RngSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Rng::default())
    }

    fn work(&mut self, guest: &mut Guest<'_>, transport: &mut VirtioPci) {
        guest.offer(0, &[(BUFFERS, 64, WRITE, 0)]);
        guest.ring(transport, 0);
        assert_eq!(guest.answer(0), 64);
    }
}

struct FsSubject(Arc<FileServer>);

impl Subject for FsSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(FsDevice::new(Arc::clone(&self.0), Ending::default()))
    }

    /// GETATTR of the root directory.
    fn work(&mut self, guest: &mut Guest<'_>, transport: &mut VirtioPci) {
        const REQUEST: usize = 1;
        const LENGTH: u32 = 40 + 16;
        const REPLY: u32 = 16 + 104;
        let mut request = [0; LENGTH as usize];
        request[..4].copy_from_slice(&LENGTH.to_le_bytes());
        request[4] = 3;
        request[16] = 1;
        guest
            .ram
            .write_slice(&request, GuestAddress(BUFFERS))
            .unwrap();
        let reply = BUFFERS + 0x1000;
        guest.offer(
            REQUEST,
            &[(BUFFERS, LENGTH, NEXT, 1), (reply, REPLY, WRITE, 0)],
        );
        guest.ring(transport, REQUEST);
        assert_eq!(guest.answer(REQUEST), REPLY);
    }
}

/// Two ends of the agent's connection, which moves from socket to socket.
#[derive(Default)]
struct VsockSubject {
    host: Option<UnixStream>,
    connected: bool,
    refused: bool,
}

impl VsockSubject {
    const OP_REQUEST: u16 = 1;
    const OP_RESPONSE: u16 = 2;
    const OP_RST: u16 = 3;
    const OP_RW: u16 = 5;
    const HEADER: usize = 44;
    const ROOM: u64 = BUFFERS + 0x4000;

    fn send(guest: &mut Guest<'_>, transport: &mut VirtioPci, op: u16, payload: &[u8]) {
        let mut packet = Vec::new();
        packet.extend(u64::from(GUEST_CID).to_le_bytes());
        packet.extend(u64::from(HOST_CID).to_le_bytes());
        for number in [
            5000,
            AGENT_PORT,
            payload.len() as u32,
            1 | u32::from(op) << 16,
        ] {
            packet.extend(number.to_le_bytes());
        }
        for number in [0u32, 1 << 16, 0] {
            packet.extend(number.to_le_bytes());
        }
        packet.extend(payload);
        guest
            .ram
            .write_slice(&packet, GuestAddress(BUFFERS))
            .unwrap();
        guest.offer(1, &[(BUFFERS, packet.len() as u32, 0, 0)]);
        guest.ring(transport, 1);
        guest.answer(1);
    }

    /// The operation and the payload of the next packet.
    fn receive(guest: &mut Guest<'_>, transport: &mut VirtioPci) -> (u16, Vec<u8>) {
        guest.offer(0, &[(Self::ROOM, 4096, WRITE, 0)]);
        guest.ring(transport, 0);
        let mut packet = vec![0; guest.answer(0) as usize];
        guest
            .ram
            .read_slice(&mut packet, GuestAddress(Self::ROOM))
            .unwrap();
        let op = u16::from_le_bytes([packet[30], packet[31]]);
        (op, packet.split_off(Self::HEADER))
    }
}

impl Subject for VsockSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (host, agent) = UnixStream::pair().unwrap();
        self.host = Some(host);
        let (vsock, _) = Vsock::new(agent.into(), Ending::default()).unwrap();
        Box::new(vsock)
    }

    /// Dials once; then bytes travel both ways.
    fn work(&mut self, guest: &mut Guest<'_>, transport: &mut VirtioPci) {
        if !self.connected {
            Self::send(guest, transport, Self::OP_REQUEST, b"");
            let expected = match self.refused {
                true => Self::OP_RST,
                false => Self::OP_RESPONSE,
            };
            let answer = Self::receive(guest, transport);
            assert_eq!(answer, (expected, Vec::new()));
            self.connected = !self.refused;
        }
        if self.connected {
            let host = self.host.as_mut().unwrap();
            Self::send(guest, transport, Self::OP_RW, b"to the host");
            let mut bytes = [0; 11];
            host.read_exact(&mut bytes).unwrap();
            assert_eq!(&bytes, b"to the host");
            host.write_all(b"to the guest").unwrap();
            let (op, payload) = Self::receive(guest, transport);
            assert_eq!((op, payload), (Self::OP_RW, b"to the guest".to_vec()));
        }
    }

    /// The agent may connect once in the life of a machine.
    fn was_reset(&mut self) {
        self.connected = false;
        self.refused = true;
    }
}

/// Taps with several queues, all in one namespace: one for each device that works, and one for all that only start.
#[derive(Default)]
struct NetSubject {
    taps: Vec<(net::Network, Vec<OwnedFd>)>,
}

impl NetSubject {
    const PAIRS: usize = 3;
    const CONTROL: usize = 2 * Self::PAIRS;
    const HEADER: usize = 12;

    fn use_pairs(guest: &mut Guest<'_>, transport: &mut VirtioPci, pairs: u8) {
        let command = [4, 0, pairs, 0, 9];
        let place = GuestAddress(BUFFERS);
        guest.ram.write_slice(&command, place).unwrap();
        let answer = BUFFERS + 4;
        guest.offer(
            Self::CONTROL,
            &[(BUFFERS, 4, NEXT, 1), (answer, 1, WRITE, 0)],
        );
        guest.ring(transport, Self::CONTROL);
        assert_eq!(guest.answer(Self::CONTROL), 1);
        let answer: u8 = guest.ram.read_obj(GuestAddress(answer)).unwrap();
        assert_eq!(answer, 0);
    }
}

impl Subject for NetSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (network, mut queues) = match self.taps.len() {
            0 => net::Network::new(Self::PAIRS),
            1 => net::Network::another(Self::PAIRS, "tap1"),
            // To make and end an interface takes its time.
            _ => net::Network::another(Self::PAIRS + 1, "tap2"),
        };
        let taps = Tap::all(queues.drain(..Self::PAIRS).collect()).unwrap();
        self.taps.truncate(2);
        self.taps.push((network, queues));
        Box::new(Net::new(taps, vec![], net::MAC, 1500, Ending::default()).unwrap())
    }

    /// A frame comes by the first pair, where it is the only one, and one goes by the second.
    fn work(&mut self, guest: &mut Guest<'_>, transport: &mut VirtioPci) {
        let (network, _) = self.taps.last().unwrap();
        let room = BUFFERS + 0x4000;
        Self::use_pairs(guest, transport, 1);
        guest.offer(0, &[(room, 2048, WRITE, 0)]);
        guest.ring(transport, 0);
        network.send(&net::frame(400, 4));
        assert_eq!(guest.answer(0), 412);
        let mut got = vec![0; 400];
        let place = GuestAddress(room + Self::HEADER as u64);
        guest.ram.read_slice(&mut got, place).unwrap();
        assert!(got == net::frame(400, 4));

        Self::use_pairs(guest, transport, 2);
        let mut packet = vec![0; Self::HEADER];
        packet.extend(net::frame(300, 3));
        let place = GuestAddress(BUFFERS);
        guest.ram.write_slice(&packet, place).unwrap();
        guest.offer(3, &[(BUFFERS, packet.len() as u32, 0, 0)]);
        guest.ring(transport, 3);
        assert_eq!(guest.answer(3), 0);
        assert!(network.receive() == net::frame(300, 3));
    }
}

#[test]
fn the_net_device_keeps_the_contract() {
    keeps_the_contract(NetSubject::default());
}

#[test]
fn the_rng_device_keeps_the_contract() {
    keeps_the_contract(RngSubject);
}

#[test]
fn the_fs_device_keeps_the_contract() {
    worker_init().unwrap();
    keeps_the_contract(FsSubject(Arc::new(FileServer::new().unwrap())));
}

#[test]
fn the_vsock_device_keeps_the_contract() {
    keeps_the_contract(VsockSubject::default());
}

/// Devices that are no virtio: what the guest wrote is what it reads.
#[test]
fn plain_devices_keep_the_contract() {
    let bridge = || Box::new(HostBridge::default()) as Box<dyn PciDevice>;
    let pvpanic = || {
        let console = Arc::<Mutex<_>>::default();
        Box::new(Pvpanic::new(BAR, Ending::default(), console)) as Box<dyn PciDevice>
    };
    let makers: [&dyn Fn() -> Box<dyn PciDevice>; 2] = [&bridge, &pvpanic];
    for make in makers {
        let mut before = make();
        before.write_config(0x04, &[6, 0]);
        before.write_config(0x10, &[0xff; 4]);
        before.stop();
        let saved = before.save().unwrap();
        let mut after = make();
        after.restore(&saved).unwrap();
        after.start().unwrap();
        assert!(face(&mut *after) == face(&mut *before));
        assert!(make().restore(&PciFunction::default()).is_err());
    }
}
