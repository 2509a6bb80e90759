//! The probe as PID 1 of a guest that fights its VMM. It takes the devices away from the kernel's drivers, makes
//! rings of its own in memory whose physical addresses it looks up, and does one act to one device, as the kernel's
//! command line says: `husk_probe=hostile husk_act=ACT husk_device=DEVICE husk_seed=N`.
//!
//! When it is through, it says [`DONE`] on the serial port and does nothing more. Most acts do not get that far.

use std::{
    arch::asm,
    fs::{self, File},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    ptr,
    sync::atomic::{Ordering, fence},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use husk_tests::machine::HOSTILE_DONE as DONE;
use rustix::mount::{MountFlags, mount};

const PAGE: usize = 4096;
/// Pages of memory for rings and buffers: one for each queue's rings, then buffers.
const PAGES: usize = 64;
const BUFFERS: usize = 8;
/// Entries of a queue here.
const SIZE: u16 = 64;
/// Offsets of the rings in their page.
const AVAILABLE: usize = 0x800;
const USED: usize = 0xa00;
/// How long a flood lasts.
const FLOOD: Duration = Duration::from_secs(2);

/// Requests that wait for the VMM at one time.
const IN_FLIGHT: u16 = 8;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Slot, sizes of the BAR and number of queues, in the order of the VMM's bus.
const DEVICES: [(&str, u8, u16); 3] = [("vsock", 1, 3), ("fs", 2, 2), ("rng", 3, 1)];
const PVPANIC: u8 = 4;
const BAR: usize = 0x4000;

/// Registers of the common configuration (virtio 1.2 §4.1.4.3), and where doorbells and the MSI-X table begin.
const FEATURE_SELECT: usize = 0x08;
const FEATURE: usize = 0x0c;
const STATUS: usize = 0x14;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_RINGS: usize = 0x20;
const DOORBELLS: usize = 0x1000;
const VECTORS: usize = 0x2000;

pub fn run() -> Result<()> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let seed = variable("husk_seed").parse().unwrap_or(1);
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(place)?;
        mount(kind, place, kind, MountFlags::empty(), None).context(place)?;
    }
    // SAFETY: no pointers. From here on every port is this process's.
    ensure!(unsafe { libc::iopl(3) } == 0, "iopl");
    let mut stage = Stage {
        memory: Memory::new()?,
        random: Random(seed | 1),
    };
    let device = variable("husk_device");
    let act = variable("husk_act");
    let (_, slot, queues) = DEVICES
        .into_iter()
        .find(|(name, ..)| *name == device)
        .with_context(|| format!("no device {device:?}"))?;
    let device = Device::take(slot, queues)?;
    stage.perform(&act, &device)?;
    // The VMM has its time to trip over it.
    thread::sleep(Duration::from_millis(300));
    print(DONE);
    Ok(())
}

struct Stage {
    memory: Memory,
    random: Random,
}

impl Stage {
    fn perform(&mut self, act: &str, device: &Device) -> Result<()> {
        match act {
            "loops" => self.chains(device, |m, _| {
                vec![(m.at(BUFFERS), 8, NEXT, 1), (m.at(BUFFERS), 8, NEXT, 0)]
            }),
            "overlaps" => self.chains(device, |m, rings| {
                vec![
                    (rings, 0x600, NEXT, 1),
                    (rings + 0x300, 0x800, NEXT | WRITE, 2),
                    (m.at(0), 4096, WRITE, 0),
                ]
            }),
            "outside" => {
                let places = [
                    1 << 40,
                    u64::MAX - 7,
                    0xc000_0000,
                    0xfee0_0000,
                    (128 << 20) - 4,
                ];
                let place = places[self.random.below(places.len() as u64) as usize];
                self.chains(device, |_, _| vec![(place, 64, WRITE, 0)]);
            }
            "lengths" => self.chains(device, |m, _| {
                vec![
                    (m.at(BUFFERS), u32::MAX, NEXT, 1),
                    (m.at(BUFFERS), u32::MAX, WRITE, 0),
                ]
            }),
            "order" => self.chains(device, |m, _| {
                vec![
                    (m.at(BUFFERS), 8, WRITE | NEXT, 1),
                    (m.at(BUFFERS), 64, 0, 0),
                ]
            }),
            "nothing" => self.chains(device, |m, _| vec![(m.at(BUFFERS), 0, 0, 0)]),
            "indirect" => self.indirect(device),
            "available" => {
                device.start(&self.memory, true);
                for queue in 0..device.queues {
                    self.memory.put(queue.into(), AVAILABLE + 2, 0x4000_u16);
                    device.ring(queue);
                }
            }
            "heads" => {
                device.start(&self.memory, true);
                for queue in 0..device.queues {
                    self.memory.offer(queue, 0xfff0);
                    device.ring(queue);
                }
            }
            "rings" => self.rings(device),
            "resets" => self.resets(device),
            "doorbells" => self.doorbells(device),
            "requests" => self.requests(device),
            "registers" => self.registers(device),
            "ports" => self.ports(),
            "console" => {
                let line = [b'!'; 200];
                let end = Instant::now() + FLOOD;
                while Instant::now() < end {
                    print(std::str::from_utf8(&line)?);
                }
            }
            _ => bail!("no act {act:?}"),
        }
        Ok(())
    }

    /// Offers the same bad chain on every queue, and rings.
    fn chains(
        &mut self,
        device: &Device,
        chain: impl Fn(&Memory, u64) -> Vec<(u64, u32, u16, u16)>,
    ) {
        device.start(&self.memory, true);
        for queue in 0..device.queues {
            let rings = self.memory.at(queue.into());
            let chain = chain(&self.memory, rings);
            self.memory.describe(queue, &chain);
            self.memory.offer(queue, 0);
            device.ring(queue);
        }
    }

    /// Tables within tables, of a broken size, outside of memory, and the longest that there is, of nothing.
    fn indirect(&mut self, device: &Device) {
        let table = BUFFERS + 1;
        let (inner, outside) = (self.memory.at(table), 1 << 40);
        self.memory
            .put(table, 0, descriptor(inner, 16, INDIRECT, 0));
        let kinds = [
            (inner, 16),
            (inner, 15),
            (inner, 0),
            (outside, 64),
            (inner, u32::MAX),
            (inner, 65535 * 16),
        ];
        let kind = kinds[self.random.below(kinds.len() as u64) as usize];
        self.chains(device, |_, _| vec![(kind.0, kind.1, INDIRECT, 0)]);
    }

    /// Rings anywhere: at addresses that are none, in each other, in the table of interrupts; of any size. Many times.
    fn rings(&mut self, device: &Device) {
        let end = Instant::now() + FLOOD;
        while Instant::now() < end {
            device.agree(true);
            for queue in 0..device.queues {
                device.write16(QUEUE_SELECT, queue);
                device.write16(QUEUE_SIZE, self.random.next() as u16);
                for ring in 0..3 {
                    let address = match self.random.below(4) {
                        0 => self.random.next(),
                        1 => self.memory.at(0),
                        2 => (128 << 20) - self.random.below(4096),
                        _ => self.memory.at(usize::from(queue)) + self.random.below(4096),
                    };
                    device.write32(QUEUE_RINGS + 8 * ring, address as u32);
                    device.write32(QUEUE_RINGS + 8 * ring + 4, (address >> 32) as u32);
                }
                device.write16(QUEUE_ENABLE, 1);
            }
            device.write8(STATUS, 15);
            for queue in 0..device.queues {
                device.ring(queue);
            }
            device.write8(STATUS, 0);
        }
    }

    /// Good requests, and a reset in the middle of each.
    fn resets(&mut self, device: &Device) {
        let end = Instant::now() + FLOOD;
        let mut count = 0;
        while Instant::now() < end {
            device.start(&self.memory, count % 2 == 0);
            for queue in 0..device.queues {
                self.good_request(device, queue);
                device.ring(queue);
            }
            if count % 3 == 0 {
                thread::sleep(Duration::from_micros(self.random.below(500)));
            }
            device.write8(STATUS, 0);
            count += 1;
        }
        print(&format!("{count} resets\n"));
    }

    /// Rings every doorbell, and those that are none, as fast as it goes.
    fn doorbells(&mut self, device: &Device) {
        device.start(&self.memory, false);
        let end = Instant::now() + FLOOD;
        let mut count = 0_u64;
        while Instant::now() < end {
            for _ in 0..1000 {
                device.ring((count % 8) as u16);
                count += 1;
            }
        }
        print(&format!("{count} doorbells\n"));
    }

    /// Well-formed chains that say anything: packets of connections that there are and that there are not, FUSE
    /// requests, wishes for randomness.
    fn requests(&mut self, device: &Device) {
        device.start(&self.memory, true);
        let end = Instant::now() + FLOOD;
        let mut count = 0_u64;
        while Instant::now() < end {
            for queue in 0..device.queues {
                self.good_request(device, queue);
                device.ring(queue);
            }
            count += 1;
        }
        print(&format!("{count} requests\n"));
    }

    /// A request in two buffers, readable and writable, or for vsock's receive queue in one.
    fn good_request(&mut self, device: &Device, queue: u16) {
        // A driver that offers more than fits would be shown the door at once.
        if self.memory.in_flight(queue) >= IN_FLIGHT {
            return;
        }
        // One after the other, so that none is written over while it waits.
        let place = self.memory.index(queue, AVAILABLE) % IN_FLIGHT * 2;
        let page = BUFFERS + usize::from(queue * IN_FLIGHT * 2 + place);
        let (readable, writable) = (self.memory.at(page), self.memory.at(page + 1));
        let (bytes, chain) = match (device.slot, queue) {
            (1, 1) => (self.packet(), vec![(readable, 0, 0)]),
            (1, _) => (Vec::new(), vec![(writable, 4096, WRITE)]),
            (2, _) => (self.fuse(), vec![(readable, 0, 0), (writable, 4096, WRITE)]),
            _ => (Vec::new(), vec![(writable, 4096, WRITE)]),
        };
        self.memory.put_bytes(page, 0, &bytes);
        let count = chain.len();
        for (index, (address, length, flags)) in (0..).zip(chain) {
            let length = if length == 0 {
                bytes.len() as u32
            } else {
                length
            };
            let at = place + index;
            let flags = if usize::from(index) + 1 < count {
                flags | NEXT
            } else {
                flags
            };
            self.memory.put(
                queue.into(),
                16 * usize::from(at),
                descriptor(address, length, flags, at + 1),
            );
        }
        self.memory.offer(queue, place);
    }

    /// A packet as virtio 1.2 §5.10.6 has it, of a guest that keeps to nothing else.
    fn packet(&mut self) -> Vec<u8> {
        let mut bytes = vec![0; 44];
        let payload = self.random.below(3000) as u32;
        let op = 1 + self.random.below(7) as u16;
        let payload = if op == 5 { payload } else { 0 };
        let from = 1 << 20 | self.random.below(2000) as u32;
        let ports = [1024, 1025, 1 << 30, self.random.next() as u32];
        let to = ports[self.random.below(4) as usize];
        bytes[0..8].copy_from_slice(&3_u64.to_le_bytes());
        bytes[8..16].copy_from_slice(&2_u64.to_le_bytes());
        bytes[16..20].copy_from_slice(&from.to_le_bytes());
        bytes[20..24].copy_from_slice(&to.to_le_bytes());
        bytes[24..28].copy_from_slice(&payload.to_le_bytes());
        bytes[28..30].copy_from_slice(&1_u16.to_le_bytes());
        bytes[30..32].copy_from_slice(&op.to_le_bytes());
        bytes[36..40].copy_from_slice(&(self.random.next() as u32).to_le_bytes());
        bytes[40..44].copy_from_slice(&(self.random.next() as u32).to_le_bytes());
        bytes.resize(44 + payload as usize, 0x5a);
        bytes
    }

    /// A FUSE request with the right length, and little else that is right.
    fn fuse(&mut self) -> Vec<u8> {
        let body = self.random.below(300) as usize;
        let mut bytes = Vec::new();
        bytes.extend((40 + body as u32).to_le_bytes());
        let opcode = match self.random.below(8) {
            0 => 26,
            1 => 1,
            2 => 27,
            _ => self.random.below(60) as u32,
        };
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(self.random.next().to_le_bytes());
        bytes.extend((1 + self.random.below(8)).to_le_bytes());
        bytes.extend([0; 16]);
        match opcode {
            1 => {
                bytes.extend(b"hostile\0");
                bytes[0..4].copy_from_slice(&48_u32.to_le_bytes());
            }
            26 => {
                for word in [7, 41, 4096, u32::MAX, u32::MAX] {
                    bytes.extend(u32::to_le_bytes(word));
                }
                bytes.resize(40 + 64, 0);
                bytes[0..4].copy_from_slice(&104_u32.to_le_bytes());
            }
            _ => {
                for _ in 0..body {
                    let byte = match self.random.below(3) {
                        0 => 0,
                        1 => self.random.below(8) as u8,
                        _ => self.random.next() as u8,
                    };
                    bytes.push(byte);
                }
            }
        }
        bytes
    }

    /// Anything, anywhere in configuration space and BARs, of all devices.
    fn registers(&mut self, device: &Device) {
        device.start(&self.memory, true);
        let end = Instant::now() + FLOOD;
        let mut count = 0_u64;
        while Instant::now() < end {
            let (place, value) = (self.random.next(), self.random.next());
            match self.random.below(6) {
                0 => {
                    let slot = self.random.below(6) as u32;
                    out32(0xcf8, 1 << 31 | slot << 11 | (place as u32 & 0xfc));
                    out32(0xcfc, value as u32);
                }
                1 => {
                    out32(0xcf8, place as u32);
                    out8(0xcf8 + (value & 7) as u16, place as u8);
                    in8(0xcf8 + (place & 7) as u16);
                }
                2 => device.write32((place as usize % BAR) & !3, value as u32),
                3 => device.write8(place as usize % BAR, value as u8),
                4 => {
                    device.write32((place as usize % 0x40) & !3, value as u32);
                    device.ring(value as u16);
                }
                // The table of interrupts: messages to anywhere, unmasked, and the function switched on.
                _ => {
                    let entry = VECTORS + 16 * (place as usize % 5);
                    device.write32(entry, value as u32);
                    device.write32(entry + 4, (value >> 32) as u32 & 1);
                    device.write32(entry + 8, place as u32);
                    device.write32(entry + 12, 0);
                }
            }
            count += 1;
            if count % 500 == 0 {
                device.start(&self.memory, true);
                self.good_request(device, 0);
            }
        }
        print(&format!("{count} registers\n"));
    }

    /// Anything to any port, but for those by which a guest ends itself.
    fn ports(&mut self) {
        let end = Instant::now() + FLOOD;
        let mut count = 0_u64;
        while Instant::now() < end {
            let (port, value) = (self.random.next() as u16, self.random.next());
            if port != 0x64 {
                match value & 3 {
                    0 => out8(port, (value >> 8) as u8),
                    1 if port & 3 == 0 => out32(port, (value >> 8) as u32),
                    _ => drop(in8(port)),
                }
            }
            count += 1;
        }
        // The other bytes of the register that reports a panic, and what lies behind it.
        if let Ok(bar) = Bar::map(PVPANIC, PAGE) {
            for offset in 1..PAGE {
                bar.write8(offset, value_of(offset));
            }
        }
        // Whatever was set there, what is printed now must be seen.
        out8(0x3fb, 3);
        print(&format!("{count} ports\n"));
    }
}

fn value_of(offset: usize) -> u8 {
    (offset % 251) as u8
}

/// A device without its driver.
struct Device {
    slot: u8,
    queues: u16,
    bar: Bar,
}

impl Device {
    fn take(slot: u8, queues: u16) -> Result<Self> {
        let address = format!("0000:00:{slot:02x}.0");
        let unbind = format!("/sys/bus/pci/devices/{address}/driver/unbind");
        if fs::exists(&unbind)? {
            fs::write(&unbind, &address).context(unbind)?;
        }
        let bar = Bar::map(slot, BAR)?;
        // What the driver has switched off: memory space and bus master.
        out32(0xcf8, 1 << 31 | u32::from(slot) << 11 | 4);
        out32(0xcfc, 6);
        Ok(Device { slot, queues, bar })
    }

    fn write8(&self, at: usize, value: u8) {
        self.bar.write8(at, value);
    }
    fn write16(&self, at: usize, value: u16) {
        self.bar.write(at, value);
    }
    fn write32(&self, at: usize, value: u32) {
        self.bar.write(at, value);
    }

    fn ring(&self, queue: u16) {
        fence(Ordering::SeqCst);
        self.write16(DOORBELLS + 4 * (usize::from(queue) % 256), queue);
    }

    /// From a reset to the features that all devices offer.
    fn agree(&self, event_idx: bool) {
        self.write8(STATUS, 0);
        self.write8(STATUS, 3);
        for (select, features) in [(0, u32::from(event_idx) << 29 | 1 << 28), (1, 1)] {
            self.write32(FEATURE_SELECT, select);
            self.write32(FEATURE, features);
        }
        self.write8(STATUS, 11);
    }

    /// Brings the device up on rings of ours, which are empty.
    fn start(&self, memory: &Memory, event_idx: bool) {
        self.agree(event_idx);
        for queue in 0..self.queues {
            memory.put_bytes(queue.into(), 0, &[0; PAGE]);
            self.write16(QUEUE_SELECT, queue);
            self.write16(
                QUEUE_SIZE,
                if self.slot == 1 && queue < 2 || queue == 1 {
                    SIZE
                } else {
                    16
                },
            );
            let start = memory.at(queue.into());
            let rings = [start, start + AVAILABLE as u64, start + USED as u64];
            for (ring, address) in rings.into_iter().enumerate() {
                self.write32(QUEUE_RINGS + 8 * ring, address as u32);
                self.write32(QUEUE_RINGS + 8 * ring + 4, (address >> 32) as u32);
            }
            self.write16(QUEUE_ENABLE, 1);
        }
        self.write8(STATUS, 15);
    }
}

/// A BAR, mapped.
struct Bar(*mut u8, usize);

impl Bar {
    fn map(slot: u8, length: usize) -> Result<Self> {
        let path = format!("/sys/bus/pci/devices/0000:00:{slot:02x}.0/resource0");
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_SYNC)
            .open(&path)
            .context(path)?;
        Ok(Bar(map(length, libc::MAP_SHARED, Some(&file))?, length))
    }

    fn write8(&self, at: usize, value: u8) {
        self.write(at, value);
    }

    fn write<T>(&self, at: usize, value: T) {
        if at + size_of::<T>() <= self.1 {
            // SAFETY: within the mapping; nobody else refers to it. A device bears unaligned access.
            unsafe { self.0.add(at).cast::<T>().write_volatile(value) };
        }
    }
}

/// Memory that stays where it is, and where that is.
struct Memory {
    start: *mut u8,
    addresses: Vec<u64>,
}

impl Memory {
    fn new() -> Result<Self> {
        let length = PAGES * PAGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE | libc::MAP_LOCKED;
        let start = map(length, flags, None)?;
        let pagemap = File::open("/proc/self/pagemap").context("open pagemap")?;
        let mut addresses = Vec::new();
        for page in 0..PAGES {
            // SAFETY: within the mapping; so the page is this process's own, not the one of zeroes.
            unsafe { start.add(page * PAGE).write_volatile(1) };
            let mut entry = [0; 8];
            let index = start.addr() / PAGE + page;
            pagemap.read_exact_at(&mut entry, index as u64 * 8)?;
            // Documentation/admin-guide/mm/pagemap.rst: bits 0 to 54 are the frame.
            let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
            ensure!(frame != 0, "no physical address");
            addresses.push(frame * PAGE as u64);
        }
        Ok(Memory { start, addresses })
    }

    /// Physical address of a page.
    fn at(&self, page: usize) -> u64 {
        self.addresses[page % PAGES]
    }

    fn put<T>(&self, page: usize, offset: usize, value: T) {
        let at = (page % PAGES) * PAGE + offset;
        assert!(offset + size_of::<T>() <= PAGE);
        // SAFETY: within the mapping, whose other readers and writers are devices.
        unsafe { self.start.add(at).cast::<T>().write_unaligned(value) };
        fence(Ordering::SeqCst);
    }

    fn put_bytes(&self, page: usize, offset: usize, bytes: &[u8]) {
        let length = bytes.len().min(PAGE - offset);
        // SAFETY: as above.
        unsafe {
            let target = self.start.add((page % PAGES) * PAGE + offset);
            ptr::copy_nonoverlapping(bytes.as_ptr(), target, length);
        }
        fence(Ordering::SeqCst);
    }

    fn describe(&self, queue: u16, chain: &[(u64, u32, u16, u16)]) {
        for (index, (address, length, flags, next)) in chain.iter().enumerate() {
            let bytes = descriptor(*address, *length, *flags, *next);
            self.put(queue.into(), 16 * index, bytes);
        }
    }

    fn index(&self, queue: u16, at: usize) -> u16 {
        let place = usize::from(queue) * PAGE + at + 2;
        // SAFETY: within the mapping.
        unsafe { self.start.add(place).cast::<u16>().read_volatile() }
    }

    /// Chains that were offered and not given back.
    fn in_flight(&self, queue: u16) -> u16 {
        let (offered, used) = (self.index(queue, AVAILABLE), self.index(queue, USED));
        offered.wrapping_sub(used)
    }

    /// Offers the chain at `head`.
    fn offer(&self, queue: u16, head: u16) {
        let index = self.index(queue, AVAILABLE);
        // Queues of 16 entries wrap earlier: both places say the same.
        for size in [SIZE, 16] {
            let entry = AVAILABLE + 4 + 2 * usize::from(index % size);
            self.put(queue.into(), entry, head);
        }
        self.put(queue.into(), AVAILABLE + 2, index.wrapping_add(1));
    }
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
    let value = u128::from(address)
        | u128::from(length) << 64
        | u128::from(flags) << 96
        | u128::from(next) << 112;
    value.to_le_bytes()
}

fn map(length: usize, flags: libc::c_int, file: Option<&File>) -> Result<*mut u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let descriptor = file.map_or(-1, AsRawFd::as_raw_fd);
    // SAFETY: a new mapping, anywhere.
    let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, descriptor, 0) };
    ensure!(
        start != libc::MAP_FAILED,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    Ok(start.cast())
}

/// xorshift64 (Marsaglia, 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// To the kernel's early console, which no driver holds.
pub fn print(text: &str) {
    for byte in text.bytes() {
        out8(0x3f8, byte);
    }
    // KVM collects what is printed until the guest wants an answer.
    in8(0x3fd);
}

fn out8(port: u16, value: u8) {
    // SAFETY: the port was asked for, and no device reads memory for it.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) };
}

fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}
