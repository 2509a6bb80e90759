//! What is written down of a pod, and when: for whoever has to clean up, should its shim not live to do so. What a
//! record is, is in `record`.

use std::{
    io,
    path::{Path, PathBuf},
    process,
};

use crate::{
    cgroup,
    launch::Setup,
    pod::Pod,
    record::{self, ProcessId, RECORDS, Record},
    spec::Network,
    vm::Vm,
};

impl Pod {
    /// Notes the VM that the pod has.
    pub(crate) fn note(&self, vm: &Vm) {
        if let Err(e) = self.write_record(Some(vm)) {
            log::warn!("write the pod's record: {e}");
        }
    }

    /// As [`Self::note`], of a VM that is about to be made: its cgroup may be there before anybody could note it.
    /// One that is there already is somebody else's.
    pub(crate) fn note_start(&self, setup: &Setup) {
        let cgroup = cgroup::root().map(|root| root.join(&setup.cgroup));
        let cgroups = cgroup.filter(|path| !path.exists()).into_iter().collect();
        let network = match &setup.network {
            Network::Existing(path) => Some(path.clone()),
            Network::New => None,
        };
        if let Err(e) = self.write_record_with(None, cgroups, network) {
            log::warn!("write the pod's record: {e}");
        }
    }

    /// Replaces the record by one of this shim, and of its VM if there is one.
    pub(crate) fn write_record(&self, vm: Option<&Vm>) -> io::Result<()> {
        let cgroups = vm.map(|vm| vm.cgroups().to_vec()).unwrap_or_default();
        let network = vm.and_then(Vm::network_namespace).map(Path::to_owned);
        self.write_record_with(vm, cgroups, network)
    }

    fn write_record_with(
        &self,
        vm: Option<&Vm>,
        cgroups: Vec<PathBuf>,
        network: Option<PathBuf>,
    ) -> io::Result<()> {
        let record = Record {
            pod: self.identity.id.clone(),
            socket: self.identity.socket.clone(),
            shim: ProcessId::of(process::id())?,
            vmm: vm.and_then(|vm| ProcessId::of(vm.pid).ok()),
            cgroups,
            network,
        };
        record.write(&self.record_of(&self.identity.id))
    }

    pub(crate) fn record_of(&self, id: &str) -> PathBuf {
        record::directory(Path::new(RECORDS), &self.identity.namespace, id)
    }
}
