//! What is read from files: the state of a saved machine, which a bus of devices takes over; the list of its pages;
//! a kernel. Each is taken, or refused.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, OnceLock},
};

use arbitrary::{Arbitrary, Unstructured};
use husk_vmm::{
    devices::{console::Console, rng::Rng, vsock::Vsock},
    memory::{self, GuestRam, image},
    pci::{PciBus, config::HostBridge, msix::MessageSink},
    state::{self, Machine},
    virtio::{
        VirtioDevice,
        pci::{BAR_SIZE, VirtioPci},
    },
    vm::{ending::Ending, kernel},
};
use protobuf::Message;

use crate::driver::{Nowhere, ram};

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    /// A state file as it is.
    File(&'a [u8]),
    /// A state file's message, as protobuf has it.
    Body(&'a [u8]),
    /// The transports of new devices, changed as the guest who saved them might have had it.
    Transport {
        slot: u8,
        status: u32,
        features: u64,
        queues: Vec<[u64; 3]>,
        sizes: [u32; 3],
        positions: [u32; 2],
        vectors: [u32; 4],
        config: Option<(u8, u8)>,
        device: Option<&'a [u8]>,
    },
    /// Offsets and lengths of pages to prefetch.
    Pages(Vec<(u64, u64)>),
    PagesFile(&'a [u8]),
    /// An ELF header's numbers, and those of its segments.
    Kernel {
        entry: u64,
        table: u64,
        count: u16,
        segments: Vec<[u64; 4]>,
        more: &'a [u8],
    },
    KernelFile(&'a [u8]),
}

pub(crate) fn memory_file(bytes: &[u8]) -> OwnedFd {
    // SAFETY: a C string; the descriptor is new and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"fuzz".as_ptr(), 0)) };
    let mut file = File::from(fd);
    file.write_all(bytes).expect("write a memory file");
    file.into()
}

/// The guest memory that kernels are loaded into: bytes that it never gets are never touched.
fn large_ram() -> &'static GuestRam {
    static RAM: OnceLock<GuestRam> = OnceLock::new();
    RAM.get_or_init(|| memory::allocate(memory::RAM_MIN).expect("guest memory"))
}

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    match input {
        Input::File(bytes) => {
            if let Ok(machine) = state::decode(bytes) {
                take_over(&machine);
            }
        }
        Input::Body(bytes) => {
            if let Ok(machine) = Machine::parse_from_bytes(bytes) {
                let machine = Machine {
                    husk: state::HUSK.to_owned(),
                    ..machine
                };
                let encoded = state::encode(&machine).expect("encoded");
                take_over(&state::decode(&encoded).expect("decoded"));
            }
        }
        Input::Transport {
            slot,
            status,
            features,
            queues,
            sizes,
            positions,
            vectors,
            config,
            device,
        } => {
            let mut saved = bus(&ram()).save().expect("new devices are saved");
            let slot = usize::from(slot) % saved.functions.len();
            let Some(function) = saved.functions.get_mut(slot) else {
                return;
            };
            if let Some((at, value)) = config {
                if let Some(byte) = function.config.get_mut(usize::from(at)) {
                    *byte = value;
                }
            }
            if let Some(virtio) = function.virtio.as_mut() {
                virtio.status = status;
                virtio.driver_features = features;
                for (index, queue) in virtio.queues.iter_mut().enumerate() {
                    queue.size = sizes[index % sizes.len()];
                    queue.ready = true;
                    queue.next_available = positions[0];
                    queue.next_used = positions[1];
                    queue.vector = vectors[index % vectors.len()];
                    if let Some([descriptors, available, used]) = queues.get(index) {
                        queue.descriptors = *descriptors;
                        queue.available = *available;
                        queue.used = *used;
                    }
                }
                if let Some(device) = device {
                    virtio.device = device.to_vec();
                }
            }
            take_over(&Machine {
                bus: Some(saved).into(),
                ..Default::default()
            });
        }
        Input::Pages(runs) => {
            let bytes = runs.iter().flat_map(|(offset, length)| [*offset, *length]);
            pages(&bytes.flat_map(u64::to_le_bytes).collect::<Vec<u8>>());
        }
        Input::PagesFile(bytes) => pages(bytes),
        Input::Kernel {
            entry,
            table,
            count,
            segments,
            more,
        } => {
            let mut elf = vec![0; 64];
            elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
            elf[16] = 2;
            elf[18] = 62;
            elf[24..32].copy_from_slice(&entry.to_le_bytes());
            elf[32..40].copy_from_slice(&table.to_le_bytes());
            elf[54] = 56;
            elf[56..58].copy_from_slice(&count.to_le_bytes());
            for [offset, address, file, memory] in segments {
                let mut header = [0; 56];
                header[0] = 1;
                for (at, value) in [(8, offset), (24, address), (32, file), (40, memory)] {
                    header[at..at + 8].copy_from_slice(&value.to_le_bytes());
                }
                elf.extend(header);
            }
            elf.extend(more);
            load(&elf);
        }
        Input::KernelFile(bytes) => load(bytes),
    }
}

fn load(bytes: &[u8]) {
    let file = File::from(memory_file(bytes));
    if let Ok(loaded) = kernel::load(&file, large_ram(), memory::RAM_MIN) {
        assert!(loaded.entry < loaded.end && loaded.end <= memory::RAM_MIN);
    }
}

fn pages(bytes: &[u8]) {
    let ram = ram();
    let runs = image::read_prefetch(&File::from(memory_file(bytes)), &ram);
    let mut later = image::Later::new(ram.clone(), runs.into_iter());
    while later.step() {}
}

fn bus(ram: &GuestRam) -> PciBus {
    let ending = Ending::default();
    let (agent, _) = UnixStream::pair().expect("a socket pair");
    let (vsock, _) = Vsock::new(agent.into(), ending.clone()).expect("a device");
    let devices: [Box<dyn VirtioDevice>; 2] = [Box::new(vsock), Box::new(Rng::default())];
    let mut bus = PciBus::default();
    bus.add(Box::new(HostBridge::default())).expect("a slot");
    for device in devices {
        let bar = bus.place_bar(BAR_SIZE).expect("room");
        let sink: Arc<dyn MessageSink> = Arc::new(Nowhere);
        let device = VirtioPci::new(device, bar, ram.clone(), sink, ending.clone());
        bus.add(Box::new(device.expect("a transport")))
            .expect("a slot");
    }
    bus
}

/// Another machine goes on with this state, where it can.
fn take_over(machine: &Machine) {
    let mut console = Console::default();
    if let Some(saved) = machine.console.as_ref() {
        console.restore(saved);
        console.panic_line();
    }
    let ram = ram();
    let mut bus = bus(&ram);
    if let Some(saved) = machine.bus.as_ref() {
        if bus.restore(saved).is_ok() && bus.start().is_ok() {
            bus.stop();
            let _ = bus.save();
        }
    }
}
