//! The transport of a saved device: what its driver negotiated, and where its queues stand.

use virtio_queue::{Queue as Ring, QueueState, QueueT};

use super::{
    DeviceError, InTheWay,
    pci::{STATUS_DRIVER_OK, STATUS_NEEDS_RESET, VirtioPci},
};
use crate::state::{self, PciFunction, StateError, VirtioTransport};

impl VirtioPci {
    /// The driver uses the device, and both still understand each other.
    pub(super) fn is_active(&self) -> bool {
        self.status & STATUS_DRIVER_OK != 0 && self.status & STATUS_NEEDS_RESET == 0
    }

    /// Stops the device and takes over where its queues stand.
    pub(super) fn stop_device(&mut self) {
        let queues = self.device.stop();
        self.stopped_whole = !self.is_active() || queues.len() == self.queues.len();
        for (setup, queue) in self.queues.iter_mut().zip(queues) {
            // The state of a queue in use is one that can be used.
            if let Ok(ring) = Ring::try_from(queue.state()) {
                setup.ring = ring;
            }
        }
    }

    /// Serves the queues from where they stand, beginning with what the driver has offered already.
    /// The driver is told to look too: an interrupt too many is none lost.
    pub(super) fn start_device(&mut self) -> Result<(), DeviceError> {
        if !self.is_active() {
            return Ok(());
        }
        self.activate()?;
        for (index, queue) in (0..).zip(&self.queues) {
            match self.kind.doorbells {
                // Fails only when the counter is full: then the doorbell is rung already.
                true => drop(queue.doorbell.write(1)),
                false => self.device.notify(index)?,
            }
            self.msix.signal(queue.vector);
        }
        Ok(())
    }

    pub(super) fn save_all(&mut self) -> Result<PciFunction, InTheWay> {
        if !self.stopped_whole {
            return Err(InTheWay {
                device: self.kind.name,
                what: "it has failed".to_owned(),
            });
        }
        let queues = self.queues.iter().map(|queue| {
            let ring = queue.ring.state();
            state::Queue {
                size: ring.size.into(),
                ready: ring.ready,
                descriptors: ring.desc_table,
                available: ring.avail_ring,
                used: ring.used_ring,
                next_available: ring.next_avail.into(),
                next_used: ring.next_used.into(),
                vector: queue.vector.into(),
                ..Default::default()
            }
        });
        let virtio = VirtioTransport {
            id: self.kind.id.into(),
            status: self.status.into(),
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            driver_features: self.driver_features,
            config_vector: self.config_vector.into(),
            queue_select: self.queue_select.into(),
            queues: queues.collect(),
            vectors: self.msix.save(),
            device: self.device.save()?,
            ..Default::default()
        };
        Ok(PciFunction {
            virtio: Some(virtio).into(),
            ..self.config.save()
        })
    }

    pub(super) fn restore_all(&mut self, saved: &PciFunction) -> Result<(), StateError> {
        let virtio = saved.virtio.as_ref();
        let virtio = virtio.filter(|virtio| virtio.id == u32::from(self.kind.id));
        let virtio = virtio.ok_or(StateError::Content("the transport of another device"))?;
        self.config.restore(saved)?;
        self.msix.restore(&virtio.vectors, self.msix_control())?;
        self.status = small(virtio.status)?;
        self.device_feature_select = virtio.device_feature_select;
        self.driver_feature_select = virtio.driver_feature_select;
        self.driver_features = virtio.driver_features;
        self.config_vector = self.existing_vector(virtio.config_vector);
        self.queue_select = small(virtio.queue_select)?;
        if self.is_active() && !self.features_acceptable() {
            return Err(StateError::Content("features that were never offered"));
        }
        if virtio.queues.len() != self.queues.len() {
            return Err(StateError::Content("the queues of another device"));
        }
        for (index, saved) in virtio.queues.iter().enumerate() {
            let vector = self.existing_vector(saved.vector);
            if let Some(queue) = self.queues.get_mut(index) {
                queue.vector = vector;
                queue.ring = Ring::try_from(QueueState {
                    max_size: queue.ring.max_size(),
                    next_avail: small(saved.next_available)?,
                    next_used: small(saved.next_used)?,
                    // Set from the features when the device is activated.
                    event_idx_enabled: false,
                    size: small(saved.size)?,
                    ready: saved.ready,
                    desc_table: saved.descriptors,
                    avail_ring: saved.available,
                    used_ring: saved.used,
                })
                .map_err(|_| StateError::Content("a queue that no driver can have"))?;
            }
        }
        self.device.restore(&virtio.device)
    }

    fn msix_control(&self) -> u16 {
        self.config.word(self.msix_capability + 2)
    }
}

/// A number that the state file has more room for than its meaning.
fn small<T: TryFrom<u32>>(value: u32) -> Result<T, StateError> {
    T::try_from(value).map_err(|_| StateError::Content("a number beyond its register"))
}
