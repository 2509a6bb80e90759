//! Everything a vCPU's accesses reach: configuration space, BARs, the virtio transport, MSI-X tables, serial and reset
//! ports. And what is saved of it at any moment is taken by another machine, which then saves the same.

use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use husk_vmm::{
    devices::{
        console::{self, Console},
        pvpanic::{self, Pvpanic},
        reset_port::ResetPort,
        rng::Rng,
    },
    memory::{GuestRam, MMIO_START},
    pci::{PciBus, config::HostBridge, msix::MessageSink},
    virtio::{
        Kind, VirtioDevice,
        pci::{BAR_SIZE, VirtioPci},
    },
    vm::ending::Ending,
};

use crate::driver::{Deed, Nowhere, Tap, ram};

#[derive(Arbitrary, Debug)]
enum Step {
    /// Slot and register of configuration space, and what is written there.
    Config(u8, u8, Data),
    ReadConfig(u8, u8, u8),
    /// Ports 0xcf8 to 0xcff as they are.
    Port(u8, Data),
    ReadPort(u8, u8),
    /// Device, offset in its BAR.
    Bar(u8, u16, Data),
    ReadBar(u8, u16, u8),
    /// Device, common register, value.
    Common(u8, u8, u32),
    /// A good driver's start of a device.
    BringUp(u8, bool),
    Doorbell(u8, u8),
    Vector(u8, u8, u64, u32, bool),
    Mmio(u64, Data),
    ReadMmio(u64, u8),
    Memory(u8, Deed),
    Serial(u8, Data),
    Reset(Data),
    StopAndStart,
    Save,
}

#[derive(Arbitrary, Debug)]
enum Data {
    One(u8),
    Two(u16),
    Four(u32),
    Eight(u64),
    Odd([u8; 3]),
}

impl Data {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Data::One(value) => vec![*value],
            Data::Two(value) => value.to_le_bytes().to_vec(),
            Data::Four(value) => value.to_le_bytes().to_vec(),
            Data::Eight(value) => value.to_le_bytes().to_vec(),
            Data::Odd(bytes) => bytes.to_vec(),
        }
    }
}

const SIZES: [u16; 3] = [128, 16, 128];

struct Machine {
    bus: PciBus,
    console: Arc<Mutex<Console>>,
    reset_port: ResetPort,
    bars: Vec<u64>,
}

fn machine(ram: &GuestRam) -> Machine {
    let ending = Ending::default();
    let console: Arc<Mutex<Console>> = Arc::default();
    let mut bus = PciBus::default();
    let mut bars = Vec::new();
    bus.add(Box::new(HostBridge::default())).expect("a slot");
    let tap = Tap {
        kind: Kind {
            name: "tap",
            id: 19,
            class: 0,
            queues: &SIZES,
            features: 0x5,
            doorbells: true,
        },
        taken: Arc::default(),
    };
    let devices: [Box<dyn VirtioDevice>; 2] = [Box::new(Rng::default()), Box::new(tap)];
    for device in devices {
        let bar = bus.place_bar(BAR_SIZE).expect("room");
        let sink: Arc<dyn MessageSink> = Arc::new(Nowhere);
        let device = VirtioPci::new(device, bar, ram.clone(), sink, ending.clone());
        bars.push(bar.address);
        bus.add(Box::new(device.expect("a transport")))
            .expect("a slot");
    }
    let bar = bus.place_bar(pvpanic::BAR_SIZE).expect("room");
    bars.push(bar.address);
    let pvpanic = Pvpanic::new(bar, ending.clone(), Arc::clone(&console));
    bus.add(Box::new(pvpanic)).expect("a slot");
    let reset_port = ResetPort {
        ending,
        console: Arc::clone(&console),
    };
    Machine {
        bus,
        console,
        reset_port,
        bars,
    }
}

impl Machine {
    fn bar(&self, device: u8) -> u64 {
        self.bars[usize::from(device) % self.bars.len()]
    }

    fn select(&mut self, slot: u8, register: u8) {
        let address = 1 << 31 | u32::from(slot % 6) << 11 | u32::from(register & 0xfc);
        self.bus.write_port(0, &address.to_le_bytes());
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        self.bus.write_mmio(address, bytes);
    }

    fn read(&mut self, address: u64, length: u8) {
        let mut data = [0xff; 8];
        let length = usize::from(length % 8) + 1;
        self.bus.read_mmio(address, &mut data[..length]);
        assert!(data[length..].iter().all(|byte| *byte == 0xff));
    }

    fn save_and_restore(&mut self, ram: &GuestRam) {
        self.bus.stop();
        if let Ok(saved) = self.bus.save() {
            let mut other = machine(ram);
            other
                .bus
                .restore(&saved)
                .expect("what was saved is restored");
            let again = other.bus.save().expect("what was restored is saved");
            assert_eq!(again, saved);
            let _ = other.bus.start();
        }
        let _ = self.bus.start();
        let console = self.console.lock().expect("the lock");
        let mut other = Console::default();
        other.restore(&console.save());
        assert_eq!(other.contents(), console.contents());
        assert!(other.contents().len() <= console::KEPT);
    }
}

pub(crate) fn run(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let ram = ram();
    let mut machine = machine(&ram);
    for step in steps {
        match step {
            Step::Config(slot, register, data) => {
                machine.select(slot, register);
                machine
                    .bus
                    .write_port(4 + u16::from(register & 3), &data.bytes());
            }
            Step::ReadConfig(slot, register, length) => {
                machine.select(slot, register);
                let mut data = [0xff; 8];
                let length = usize::from(length % 8) + 1;
                let port = 4 + u16::from(register & 3);
                machine.bus.read_port(port, &mut data[..length]);
            }
            Step::Port(port, data) => machine.bus.write_port((port % 8).into(), &data.bytes()),
            Step::ReadPort(port, length) => {
                let mut data = [0xff; 8];
                let length = usize::from(length % 8) + 1;
                machine
                    .bus
                    .read_port((port % 8).into(), &mut data[..length]);
            }
            Step::Bar(device, offset, data) => {
                let address = machine.bar(device) + u64::from(offset % 0x4100);
                machine.write(address, &data.bytes());
            }
            Step::ReadBar(device, offset, length) => {
                let address = machine.bar(device) + u64::from(offset % 0x4100);
                machine.read(address, length);
            }
            Step::Common(device, register, value) => {
                let address = machine.bar(device) + u64::from(register % 0x3c);
                machine.write(address, &value.to_le_bytes());
            }
            Step::BringUp(device, event_idx) => {
                let start = machine.bar(device);
                let mut through = Through(&mut machine, start);
                crate::driver::bring_up(&mut through, &SIZES, event_idx);
            }
            Step::Doorbell(device, queue) => {
                let address = machine.bar(device) + 0x1000 + 4 * u64::from(queue % 5);
                machine.write(address, &[queue, 0]);
            }
            Step::Vector(device, vector, address, data, masked) => {
                let entry = machine.bar(device) + 0x2000 + 16 * u64::from(vector % 5);
                machine.write(entry, &address.to_le_bytes());
                machine.write(entry + 8, &data.to_le_bytes());
                machine.write(entry + 12, &u32::from(masked).to_le_bytes());
            }
            Step::Mmio(address, data) => {
                machine.write(MMIO_START.wrapping_add(address), &data.bytes());
            }
            Step::ReadMmio(address, length) => machine.read(address, length),
            Step::Memory(queue, deed) => deed.act(&ram, queue),
            Step::Serial(register, data) => {
                let mut console = machine.console.lock().expect("the lock");
                console.write((register % 8).into(), &data.bytes());
                console.read((register % 8).into(), &mut [0; 4]);
                console.panic_line();
            }
            Step::Reset(data) => machine.reset_port.write(&data.bytes()),
            Step::StopAndStart => {
                machine.bus.stop();
                let _ = machine.bus.start();
            }
            Step::Save => machine.save_and_restore(&ram),
        }
    }
}

/// A BAR as the driver's functions take it.
struct Through<'a>(&'a mut Machine, u64);

impl husk_vmm::pci::PciDevice for Through<'_> {
    fn read_config(&self, _: u8, _: &mut [u8]) {}
    fn write_config(&mut self, _: u8, _: &[u8]) {}
    fn bar(&self) -> Option<husk_vmm::pci::Bar> {
        None
    }
    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        self.0.bus.read_mmio(self.1 + offset, data);
    }
    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        self.0.bus.write_mmio(self.1 + offset, data);
    }
    fn save(&mut self) -> Result<husk_vmm::state::PciFunction, husk_vmm::virtio::InTheWay> {
        Ok(Default::default())
    }
    fn restore(
        &mut self,
        _: &husk_vmm::state::PciFunction,
    ) -> Result<(), husk_vmm::state::StateError> {
        Ok(())
    }
}
