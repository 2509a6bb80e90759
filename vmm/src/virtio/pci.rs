//! The PCI transport (virtio 1.2 §4.1), modern devices only, one memory BAR:
//!
//! ```text
//! 0x0000  common configuration      0x0100  ISR      0x0200  device configuration
//! 0x1000  doorbells, 4 bytes apart  0x2000  MSI-X table      0x3000  MSI-X pending bits
//! ```
//!
//! It holds what the driver negotiates and turns it into a device's life. Everything here runs on a
//! vCPU's thread with the bus locked. The alternative access through configuration space (§4.1.4.9)
//! is left out: it serves firmware that cannot map the BAR, and costs each boot its exits.

use std::{io, sync::Arc};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use virtio_queue::{Queue as Ring, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Activation, DeviceError, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, InTheWay, Kind,
    VirtioDevice,
    queue::{Interrupt, Queue, QueueError},
};
use crate::{
    memory::GuestRam,
    pci::{
        Bar, PciDevice,
        config::{ConfigSpace, Identity},
        msix::{self, MessageSink, Msix},
    },
    state::{PciFunction, StateError},
    vm::ending::{Cause, Ending},
};

/// Bytes of the BAR.
pub const BAR_SIZE: u32 = 0x4000;
const COMMON: u64 = 0x0000;
const COMMON_SIZE: u64 = 0x40;
const ISR: u64 = 0x0100;
const ISR_SIZE: u64 = 4;
const DEVICE: u64 = 0x0200;
const DEVICE_SIZE: u64 = 0x100;
const DOORBELLS: u64 = 0x1000;
const DOORBELL_STEP: u64 = 4;
const MSIX_TABLE: u64 = 0x2000;
const MSIX_PENDING: u64 = 0x3000;

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const MODERN_REVISION: u8 = 1;

/// PCI capability "vendor specific", and the kinds of virtio structures in it (§4.1.4).
const CAPABILITY_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;

/// Device status (§2.1).
const STATUS_FEATURES_OK: u8 = 8;
pub(super) const STATUS_DRIVER_OK: u8 = 4;
pub(super) const STATUS_NEEDS_RESET: u8 = 64;

const NO_VECTOR: u16 = 0xffff;
const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

/// A queue while the driver configures it, and while the device is stopped.
pub(super) struct QueueSetup {
    pub(super) ring: Ring,
    pub(super) vector: u16,
    pub(super) doorbell: EventFd,
}

/// Has writes to guest physical addresses signal eventfds, with no exit to this process.
pub trait Doorbells: Send + Sync {
    fn watch(&self, address: u64, doorbell: &EventFd) -> io::Result<()>;
    fn forget(&self, address: u64, doorbell: &EventFd) -> io::Result<()>;
}

impl Doorbells for VmFd {
    fn watch(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.register_ioevent(doorbell, &address, NoDatamatch)?)
    }

    fn forget(&self, address: u64, doorbell: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.unregister_ioevent(doorbell, &address, NoDatamatch)?)
    }
}

/// Where the doorbells of a device are watched whose BAR the guest places.
struct Watch {
    kvm: Arc<dyn Doorbells>,
    /// The BAR that they are watched in.
    bar: Option<Bar>,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    pub(super) config: ConfigSpace,
    pub(super) msix: Arc<Msix>,
    pub(super) msix_capability: u8,
    pub(super) ram: GuestRam,
    pub(super) ending: Ending,
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) kind: Kind,
    pub(super) queues: Vec<QueueSetup>,
    pub(super) status: u8,
    pub(super) device_feature_select: u32,
    pub(super) driver_feature_select: u32,
    pub(super) driver_features: u64,
    pub(super) config_vector: u16,
    pub(super) queue_select: u16,
    /// None where the BAR does not move: then whoever placed it has the doorbells watched.
    watch: Option<Watch>,
    /// The device was stopped and gave all its queues back.
    pub(super) stopped_whole: bool,
}

impl VirtioPci {
    /// Puts `device` behind `bar`, which must have [`BAR_SIZE`] bytes.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        bar: Bar,
        ram: GuestRam,
        sink: Arc<dyn MessageSink>,
        ending: Ending,
    ) -> Result<Self, DeviceError> {
        let config = |identity| ConfigSpace::new(identity, Some(bar));
        Self::with(device, config, ram, sink, ending)
    }

    /// The same, for a machine that runs: the guest places the BAR, and the doorbells are watched by `kvm` there.
    pub fn pluggable(
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        sink: Arc<dyn MessageSink>,
        kvm: Arc<dyn Doorbells>,
        ending: Ending,
    ) -> Result<Self, DeviceError> {
        let config = |identity| ConfigSpace::with_movable_bar(identity, BAR_SIZE);
        let mut transport = Self::with(device, config, ram, sink, ending)?;
        transport.watch = Some(Watch { kvm, bar: None });
        Ok(transport)
    }

    fn with(
        device: Box<dyn VirtioDevice>,
        config: impl FnOnce(Identity) -> ConfigSpace,
        ram: GuestRam,
        sink: Arc<dyn MessageSink>,
        ending: Ending,
    ) -> Result<Self, DeviceError> {
        let kind = device.kind();
        let identity = Identity {
            vendor: VENDOR,
            device: DEVICE_BASE + kind.id,
            revision: MODERN_REVISION,
            class: kind.class,
            subsystem: DEVICE_BASE + kind.id,
        };
        let mut queues = Vec::new();
        for size in kind.queues {
            queues.push(QueueSetup {
                ring: Ring::new(*size).map_err(|e| DeviceError::Queue {
                    device: kind.name,
                    queue: "new",
                    cause: e.into(),
                })?,
                vector: NO_VECTOR,
                doorbell: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                    .map_err(DeviceError::host(kind.name, "eventfd"))?,
            });
        }
        // A vector for each queue and one for configuration changes.
        let msix = Arc::new(Msix::new(queues.len() as u16 + 1, sink));
        let mut config = config(identity);
        // First what the kernel looks for most often.
        let msix_capability = config.add_capability(
            msix::CAPABILITY,
            &msix.capability(MSIX_TABLE as u32, MSIX_PENDING as u32),
            &msix::CAPABILITY_WRITABLE,
        );
        let doorbells_size = DOORBELL_STEP * queues.len() as u64;
        for (cfg, offset, size) in [
            (CFG_COMMON, COMMON, COMMON_SIZE),
            (CFG_NOTIFY, DOORBELLS, doorbells_size),
            (CFG_ISR, ISR, ISR_SIZE),
            (CFG_DEVICE, DEVICE, DEVICE_SIZE),
        ] {
            config.add_capability(
                CAPABILITY_VENDOR,
                &virtio_capability(cfg, offset, size),
                &[],
            );
        }
        Ok(Self {
            config,
            msix,
            msix_capability,
            ram,
            ending,
            device,
            kind,
            queues,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            watch: None,
            stopped_whole: true,
        })
    }

    /// The doorbells to register with KVM: guest physical address and eventfd.
    pub fn doorbells(&self) -> impl Iterator<Item = (u64, &EventFd)> {
        let bar = self.config.bar().into_iter();
        bar.flat_map(|bar| self.doorbells_in(bar))
    }

    fn doorbells_in(&self, bar: Bar) -> impl Iterator<Item = (u64, &EventFd)> {
        let wanted = self.kind.doorbells;
        (bar.address + DOORBELLS..)
            .step_by(DOORBELL_STEP as usize)
            .zip(&self.queues)
            .filter(move |_| wanted)
            .map(|(address, queue)| (address, &queue.doorbell))
    }

    /// The guest may have placed the BAR, or another one on the top of it, which is its own affair: a doorbell that
    /// is not watched is heard by [`Self::ring`].
    fn follow_bar(&mut self, bar: Option<Bar>) {
        let Some(Watch { kvm, bar: before }) = &self.watch else {
            return;
        };
        if *before == bar {
            return;
        }
        let doorbells = |bar: Option<Bar>| bar.into_iter().flat_map(|bar| self.doorbells_in(bar));
        for (address, doorbell) in doorbells(*before) {
            if let Err(e) = kvm.forget(address, doorbell) {
                log::debug!("forget the doorbell at {address:#x}: {e}");
            }
        }
        for (address, doorbell) in doorbells(bar) {
            if let Err(e) = kvm.watch(address, doorbell) {
                log::debug!("watch the doorbell at {address:#x}: {e}");
            }
        }
        if let Some(watch) = &mut self.watch {
            watch.bar = bar;
        }
    }

    fn offered_features(&self) -> u64 {
        FEATURES | self.kind.features
    }

    fn read_common(&self, offset: u64) -> u32 {
        let queue = self.queues.get(usize::from(self.queue_select));
        let ring = |value: fn(&Ring) -> u64| queue.map_or(0, |queue| value(&queue.ring));
        let low = |value: u64| value as u32;
        let high = |value: u64| (value >> 32) as u32;
        match offset {
            0x00 => self.device_feature_select,
            0x04 => match self.device_feature_select {
                0 => low(self.offered_features()),
                1 => high(self.offered_features()),
                _ => 0,
            },
            0x08 => self.driver_feature_select,
            0x0c => match self.driver_feature_select {
                0 => low(self.driver_features),
                1 => high(self.driver_features),
                _ => 0,
            },
            0x10 => self.config_vector.into(),
            0x12 => self.queues.len() as u32,
            0x14 => self.status.into(),
            // The configurations never change: their generation is always 0.
            0x15 => 0,
            0x16 => self.queue_select.into(),
            0x18 => low(ring(|ring| ring.size().into())),
            0x1a => queue.map_or(NO_VECTOR, |queue| queue.vector).into(),
            0x1c => low(ring(|ring| ring.ready().into())),
            0x1e => self.queue_select.into(),
            0x20 => low(ring(|ring| ring.desc_table())),
            0x24 => high(ring(|ring| ring.desc_table())),
            0x28 => low(ring(|ring| ring.avail_ring())),
            0x2c => high(ring(|ring| ring.avail_ring())),
            0x30 => low(ring(|ring| ring.used_ring())),
            0x34 => high(ring(|ring| ring.used_ring())),
            _ => 0,
        }
    }

    fn write_common(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.device_feature_select = value,
            0x08 => self.driver_feature_select = value,
            0x0c => self.accept_features(value),
            0x10 => self.config_vector = self.existing_vector(value),
            0x14 => self.set_status(value as u8),
            0x16 => self.queue_select = value as u16,
            _ => self.write_queue(offset, value),
        }
    }

    /// Registers of the selected queue. Its driver may only change them before DRIVER_OK.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let vector = self.existing_vector(value);
        if self.status & STATUS_DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return;
        };
        let ring = &mut queue.ring;
        match offset {
            0x18 => ring.set_size(value as u16),
            0x1a => queue.vector = vector,
            0x1c => ring.set_ready(value == 1),
            0x20 => ring.set_desc_table_address(Some(value), None),
            0x24 => ring.set_desc_table_address(None, Some(value)),
            0x28 => ring.set_avail_ring_address(Some(value), None),
            0x2c => ring.set_avail_ring_address(None, Some(value)),
            0x30 => ring.set_used_ring_address(Some(value), None),
            0x34 => ring.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    /// A vector reads back as "none" when the device does not have it (§4.1.5.1.3).
    pub(super) fn existing_vector(&self, value: u32) -> u16 {
        match u16::try_from(value) {
            Ok(vector) if usize::from(vector) <= self.queues.len() => vector,
            _ => NO_VECTOR,
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        self.driver_features = match self.driver_feature_select {
            0 => self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features & 0xffff_ffff | value << 32,
            _ => return,
        };
    }

    fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.reset();
            return;
        }
        let gained = status & !self.status;
        self.status |= status & !STATUS_NEEDS_RESET;
        if gained & STATUS_FEATURES_OK != 0 && !self.features_acceptable() {
            self.status &= !STATUS_FEATURES_OK;
        }
        if gained & STATUS_DRIVER_OK != 0 {
            if let Err(e) = self.activate() {
                log::warn!("{e}");
                self.status |= STATUS_NEEDS_RESET;
            }
        }
    }

    /// Only what was offered, and never a device from before virtio 1.
    pub(super) fn features_acceptable(&self) -> bool {
        let features = self.driver_features;
        features & F_VERSION_1 != 0 && features & !self.offered_features() == 0
    }

    pub(super) fn activate(&mut self) -> Result<(), DeviceError> {
        let device = self.kind.name;
        if self.status & STATUS_FEATURES_OK == 0 {
            let what = "DRIVER_OK before the features were agreed on";
            return Err(DeviceError::Driver { device, what });
        }
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for setup in &self.queues {
            let mut ring = Ring::try_from(setup.ring.state()).map_err(|e| DeviceError::Queue {
                device,
                queue: "configured",
                cause: QueueError::Ring(e),
            })?;
            ring.set_event_idx(event_idx);
            let interrupt = Interrupt {
                msix: Arc::clone(&self.msix),
                vector: setup.vector,
            };
            let doorbell = setup
                .doorbell
                .try_clone()
                .map_err(DeviceError::host(device, "dup of an eventfd"))?;
            let queue = Queue::new(ring, &self.ram, doorbell, interrupt);
            queues.push(queue.map_err(DeviceError::queue(device, "configured"))?);
        }
        self.device.activate(Activation {
            ram: self.ram.clone(),
            features: self.driver_features,
            queues,
        })
    }

    fn reset(&mut self) {
        self.device.stop();
        self.device.reset();
        self.msix.clear_pending();
        for queue in &mut self.queues {
            queue.ring.reset();
            queue.vector = NO_VECTOR;
        }
        self.status = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.config_vector = NO_VECTOR;
        self.queue_select = 0;
    }

    /// A doorbell that KVM has not taken.
    fn ring(&mut self, offset: u64) {
        let index = (offset / DOORBELL_STEP) as u16;
        let Some(queue) = self.queues.get(usize::from(index)) else {
            return;
        };
        if !self.is_active() {
            return;
        }
        if self.kind.doorbells {
            // Fails only when the counter is full: then the doorbell is rung already.
            let _ = queue.doorbell.write(1);
        } else if let Err(e) = self.device.notify(index) {
            self.ending.report(Cause::DeviceError, e);
        }
    }
}

/// The body of a `struct virtio_pci_cap` (§4.1.4) behind its id and next pointer.
fn virtio_capability(cfg: u8, offset: u64, size: u64) -> Vec<u8> {
    let multiplier = (cfg == CFG_NOTIFY).then_some(DOORBELL_STEP as u32);
    let length = if multiplier.is_some() { 20 } else { 16 };
    let bar = 0;
    let mut body = vec![length, cfg, bar, 0, 0, 0];
    body.extend_from_slice(&(offset as u32).to_le_bytes());
    body.extend_from_slice(&(size as u32).to_le_bytes());
    body.extend(multiplier.into_iter().flat_map(u32::to_le_bytes));
    body
}

impl PciDevice for VirtioPci {
    fn read_config(&self, offset: u8, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u8, data: &[u8]) {
        self.config.write(offset, data);
        if offset & 0xfc == self.msix_capability {
            self.msix
                .set_control(self.config.word(self.msix_capability + 2));
        }
        self.follow_bar(self.config.bar());
    }

    fn bar(&self) -> Option<Bar> {
        self.config.bar()
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR if offset % data.len().max(1) as u64 == 0 && data.len() <= 4 => {
                let value = self.read_common(offset).to_le_bytes();
                for (byte, source) in data.iter_mut().zip(value) {
                    *byte = source;
                }
            }
            DEVICE..DOORBELLS => self.device.read_config(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PENDING => self.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PENDING.. => self.msix.read_pending(offset - MSIX_PENDING, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR if data.len() <= 4 => {
                let mut value = [0; 4];
                for (byte, source) in value.iter_mut().zip(data) {
                    *byte = *source;
                }
                self.write_common(offset, u32::from_le_bytes(value));
            }
            DOORBELLS..MSIX_TABLE => self.ring(offset - DOORBELLS),
            MSIX_TABLE..MSIX_PENDING => self.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    fn stop(&mut self) {
        self.stop_device();
    }

    fn start(&mut self) -> Result<(), DeviceError> {
        self.start_device()
    }

    fn unplug(&mut self) {
        self.follow_bar(None);
    }

    fn save(&mut self) -> Result<PciFunction, InTheWay> {
        self.save_all()
    }

    fn restore(&mut self, saved: &PciFunction) -> Result<(), StateError> {
        self.restore_all(saved)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::virtio::queue::testing::{Count, ram};

    const STATUS: u64 = 0x14;
    const SELECT: u64 = 0x16;

    /// Records its life.
    #[derive(Default, Clone)]
    struct Diary(Arc<Mutex<Vec<String>>>);

    impl Diary {
        fn note(&self, what: String) {
            self.0.lock().unwrap().push(what);
        }
    }

    impl VirtioDevice for Diary {
        fn kind(&self) -> Kind {
            Kind {
                name: "diary",
                id: 4,
                class: 0xff_0000,
                queues: &[16, 8],
                features: 1,
                doorbells: false,
            }
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
            let sizes: Vec<u16> = activation.queues.iter().map(|q| q.state().size).collect();
            self.note(format!("activate {sizes:?}"));
            Ok(())
        }
        fn notify(&mut self, index: u16) -> Result<(), DeviceError> {
            self.note(format!("notify {index}"));
            Ok(())
        }
        fn stop(&mut self) -> Vec<Queue> {
            self.note("stop".to_string());
            Vec::new()
        }
    }

    fn transport() -> (Diary, VirtioPci) {
        let diary = Diary::default();
        let bar = Bar {
            address: 0xc000_0000,
            size: BAR_SIZE,
        };
        let transport = VirtioPci::new(
            Box::new(diary.clone()),
            bar,
            ram(),
            Arc::new(Count::default()),
            Ending::default(),
        );
        (diary, transport.unwrap())
    }

    fn read(transport: &mut VirtioPci, offset: u64, length: usize) -> u32 {
        let mut data = [0; 4];
        transport.read_bar(offset, &mut data[..length]);
        u32::from_le_bytes(data)
    }

    fn negotiate(transport: &mut VirtioPci, low: u32, high: u32) {
        transport.write_bar(STATUS, &[3]);
        for (select, value) in [(0u32, low), (1, high)] {
            transport.write_bar(0x08, &select.to_le_bytes());
            transport.write_bar(0x0c, &value.to_le_bytes());
        }
        transport.write_bar(STATUS, &[3 | STATUS_FEATURES_OK]);
    }

    fn set_up_queues(transport: &mut VirtioPci) {
        for queue in 0..2u16 {
            transport.write_bar(SELECT, &queue.to_le_bytes());
            transport.write_bar(0x18, &8u16.to_le_bytes());
            for (at, address) in [(0x20, 0x1000u32), (0x28, 0x2000), (0x30, 0x3000)] {
                transport.write_bar(at, &(address + u32::from(queue) * 0x4000).to_le_bytes());
            }
            transport.write_bar(0x1c, &1u16.to_le_bytes());
        }
    }

    #[test]
    fn a_driver_brings_a_device_to_life() {
        let (diary, mut transport) = transport();
        assert_eq!(read(&mut transport, 0x12, 2), 2);
        transport.write_bar(0, &1u32.to_le_bytes());
        assert_eq!(read(&mut transport, 4, 4), 1);
        negotiate(&mut transport, 1, 1);
        assert_eq!(read(&mut transport, STATUS, 1), 11);
        set_up_queues(&mut transport);
        transport.write_bar(STATUS, &[15]);
        transport.write_bar(DOORBELLS + 4, &1u16.to_le_bytes());
        transport.write_bar(DOORBELLS + 8, &1u16.to_le_bytes());
        transport.write_bar(STATUS, &[0]);
        assert_eq!(read(&mut transport, STATUS, 1), 0);
        assert_eq!(
            *diary.0.lock().unwrap(),
            ["activate [8, 8]", "notify 1", "stop"]
        );
    }

    #[test]
    fn features_never_offered_are_not_accepted() {
        let (_, mut transport) = transport();
        negotiate(&mut transport, 2, 1);
        assert_eq!(read(&mut transport, STATUS, 1), 3);
        transport.write_bar(STATUS, &[0]);
        // No VERSION_1.
        negotiate(&mut transport, 1, 0);
        assert_eq!(read(&mut transport, STATUS, 1), 3);
    }

    #[test]
    fn queues_outside_of_memory_fail_the_device() {
        let (diary, mut transport) = transport();
        negotiate(&mut transport, 0, 1);
        set_up_queues(&mut transport);
        transport.write_bar(0x34, &0xffff_ffffu32.to_le_bytes());
        transport.write_bar(STATUS, &[15]);
        assert_eq!(read(&mut transport, STATUS, 1), 15 | 64);
        assert!(diary.0.lock().unwrap().is_empty());
        // A doorbell of a failed device reaches nobody.
        transport.write_bar(DOORBELLS, &[0, 0]);
        assert!(diary.0.lock().unwrap().is_empty());
    }

    #[test]
    fn unready_queues_fail_the_device() {
        let (diary, mut transport) = transport();
        negotiate(&mut transport, 0, 1);
        transport.write_bar(STATUS, &[15]);
        assert_eq!(read(&mut transport, STATUS, 1), 15 | 64);
        assert!(diary.0.lock().unwrap().is_empty());
    }

    /// Says what it was asked to watch.
    #[derive(Default)]
    struct Watched(Mutex<Vec<u64>>);

    impl Doorbells for Watched {
        fn watch(&self, address: u64, _: &EventFd) -> io::Result<()> {
            self.0.lock().unwrap().push(address);
            Ok(())
        }
        fn forget(&self, address: u64, _: &EventFd) -> io::Result<()> {
            self.0.lock().unwrap().retain(|watched| *watched != address);
            Ok(())
        }
    }

    #[test]
    fn doorbells_are_where_the_guest_puts_the_bar() {
        const COMMAND: u8 = 4;
        const BAR0: u8 = 0x10;
        let (ring, kvm) = (Arc::<Count>::default(), Arc::<Watched>::default());
        struct Rung(Diary);
        impl VirtioDevice for Rung {
            fn kind(&self) -> Kind {
                Kind {
                    doorbells: true,
                    ..self.0.kind()
                }
            }
            fn activate(&mut self, _: Activation) -> Result<(), DeviceError> {
                Ok(())
            }
            fn stop(&mut self) -> Vec<Queue> {
                Vec::new()
            }
        }
        let device = Box::new(Rung(Diary::default()));
        let mut transport =
            VirtioPci::pluggable(device, ram(), ring, kvm.clone(), Ending::default()).unwrap();
        let register = |transport: &VirtioPci, offset| {
            let mut data = [0; 4];
            transport.read_config(offset, &mut data);
            u32::from_le_bytes(data)
        };
        let watched = || kvm.0.lock().unwrap().clone();
        assert_eq!(register(&transport, BAR0), 0);
        transport.write_config(COMMAND, &[2, 0]);
        assert_eq!((transport.bar(), watched()), (None, vec![]));
        transport.write_config(COMMAND, &[0, 0]);

        transport.write_config(BAR0, &[0xff; 4]);
        assert_eq!(register(&transport, BAR0), !(BAR_SIZE - 1));
        transport.write_config(BAR0, &0x0800_1234u32.to_le_bytes());
        assert_eq!(register(&transport, BAR0), 0x0800_0000);
        assert_eq!((transport.bar(), watched()), (None, vec![]));
        transport.write_config(COMMAND, &[6, 0]);
        assert_eq!(transport.bar().unwrap().address, 0x0800_0000);
        assert_eq!(watched(), [0x0800_1000, 0x0800_1004]);
        transport.write_config(BAR0, &0xffff_c000u32.to_le_bytes());
        assert_eq!(watched(), [0xffff_d000, 0xffff_d004]);
        transport.unplug();
        assert_eq!(watched(), [0; 0]);
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let (_, mut transport) = transport();
        for offset in (0..u64::from(BAR_SIZE)).step_by(3) {
            for length in 1..=8 {
                let mut data = [0xa5; 8];
                transport.read_bar(offset, &mut data[..length]);
                transport.write_bar(offset, &data[..length]);
            }
        }
        transport.write_bar(SELECT, &0xffffu16.to_le_bytes());
        assert_eq!(read(&mut transport, 0x18, 2), 0);
        transport.write_bar(0x1c, &1u16.to_le_bytes());
    }
}
