//! Writes a paused machine down: devices first, since they may still raise an interrupt; then the
//! vCPUs, each with the clocks as it shows them, and memory, which by then nobody changes.
//!
//! All of it happens on the caller's thread, and nothing else may be asked of the machine meanwhile.

use std::{
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    sync::{Arc, PoisonError},
};

use super::{
    KvmError, Vm, clock,
    vcpu_state::{self, Shape},
};
use crate::{
    memory::image,
    pci::PciBus,
    state::{self, StateError},
    virtio::InTheWay,
    vm::ending::Cause,
};

/// Why a machine was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("the machine is not paused")]
    NotPaused,
    #[error("the machine has more memory or vCPUs than it was restored from")]
    Grown,
    #[error("{field}: not an empty regular file")]
    NotEmpty { field: &'static str },
    #[error(transparent)]
    InTheWay(#[from] InTheWay),
    #[error("a vCPU does not answer")]
    Stuck,
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Memory(#[from] image::WriteError),
    #[error("write the state file: {0}")]
    Write(#[source] io::Error),
}

impl Vm {
    /// Writes the machine to two empty files. It is paused before and after; its devices work on.
    ///
    /// # Errors
    /// It cannot be saved as it is, or a file cannot be written. What is in the files then is of no
    /// use.
    pub fn save(&self, memory: &File, state: &File) -> Result<(), SaveError> {
        for (field, file) in [("memory_fd", memory), ("state_fd", state)] {
            let empty =
                |file: &File| Ok(file.metadata()?.is_file() && file.metadata()?.size() == 0);
            if !empty(file).map_err(SaveError::Write)? {
                return Err(SaveError::NotEmpty { field });
            }
        }
        if !self.vcpus.paused() {
            return Err(SaveError::NotPaused);
        }
        if self.grown {
            return Err(SaveError::Grown);
        }
        let mut pci = self.pci.lock().unwrap_or_else(PoisonError::into_inner);
        pci.stop();
        let saved = self.save_stopped(&mut pci, memory, state);
        if let Err(e) = pci.start() {
            self.ending.report(Cause::DeviceError, e);
        }
        saved
    }

    fn save_stopped(&self, pci: &mut PciBus, memory: &File, state: &File) -> Result<(), SaveError> {
        let bus = pci.save()?;
        let shape = Arc::new(Shape::of_host(&self.kvm, &self.fd)?);
        let vm = Arc::clone(&self.fd);
        let read = move |vcpu: &super::Vcpu| {
            let saved = vcpu_state::save(&vcpu.fd, &vcpu.cpuid, &shape)?;
            Ok((saved, clock::save(&vm, &vcpu.fd)?))
        };
        let read = self.vcpus.on_each(read).ok_or(SaveError::Stuck)?;
        let read = read.into_iter().collect::<Result<Vec<_>, KvmError>>()?;
        let (vcpus, clocks): (Vec<_>, Vec<_>) = read.into_iter().unzip();
        // No vCPU has seen a later one.
        let clock = clocks.into_iter().max_by_key(|clock| clock.tsc);
        let console = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        let console = console.save();
        let data = image::write(&self.ram, memory)?;
        let machine = state::Machine {
            husk: state::HUSK.to_owned(),
            memory_bytes: image::length(&self.ram),
            data: data.into_iter().map(Into::into).collect(),
            clock: clock.into(),
            vcpus,
            bus: Some(bus).into(),
            console: Some(console).into(),
            possible_vcpus: self.possible_vcpus.into(),
            ..Default::default()
        };
        state::write(state, &machine).map_err(SaveError::Write)
    }
}
