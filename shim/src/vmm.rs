//! husk-vmm's process: started, killed and collected, with its cgroup and what it says. Owned by the
//! one task in `vm` that decides when it ends.

use std::{
    fs,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};

use crate::{
    cgroup::{self, PodCgroup},
    config::Config,
    fault::Fault,
    machine::RemoteEnds,
    ready, record,
    spawn::{self, Launch},
    vmm_log::VmmLog,
};

/// The VMM's process, until it is collected.
pub struct Vmm {
    /// On the host.
    pub pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    log: Arc<Mutex<VmmLog>>,
    /// cgroups that were made for it, outermost first.
    pub cgroups: Vec<PathBuf>,
    /// The one that it is in.
    pub cgroup: Option<PathBuf>,
    /// The shim is in there, too.
    joined: bool,
}

/// Where a VMM's process belongs.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Below the root of cgroup v2.
    pub cgroup: &'a Path,
    /// Whether the shim goes there with it: to a pod of Kubernetes is charged what it takes.
    pub with_shim: bool,
}

impl Vmm {
    /// Starts it in its cgroup, which goes again if it does not start.
    pub fn start(
        config: &Config,
        remote: RemoteEnds,
        network: Option<&OwnedFd>,
        cgroup: Option<PodCgroup>,
        with_shim: bool,
    ) -> Result<Self, Fault> {
        let cgroups = cgroup
            .as_ref()
            .map(|c| c.made().to_vec())
            .unwrap_or_default();
        let start = || {
            let (stderr, remote_stderr) = spawn::pipe().map_err(Fault::internal)?;
            let log = VmmLog::drain(stderr).map_err(Fault::internal)?;
            let child = spawn::spawn(&Launch {
                program: &config.vmm,
                machine: remote.machine.as_fd(),
                descriptors: remote.descriptors.as_fd(),
                stderr: remote_stderr.as_fd(),
                network: network.map(|fd| fd.as_fd()),
                cgroup: cgroup.as_ref().map(PodCgroup::directory),
                core_scheduling: config.core_scheduling,
            })
            .map_err(Fault::internal)?;
            // Last, as what is started has to be ended if anything fails from here on.
            let pidfd = ready::try_watch(child.pidfd, Interest::READABLE);
            let pidfd = pidfd.map_err(|(pidfd, cause)| {
                spawn::end(&pidfd);
                Fault::internal(format_args!("watch husk-vmm: {cause}"))
            })?;
            let joined = cgroup.as_ref().filter(|_| with_shim).is_some_and(|cgroup| {
                let joined = cgroup.join();
                joined
                    .inspect_err(|e| log::warn!("join {}: {e}", cgroup.path().display()))
                    .is_ok()
            });
            Ok(Self {
                joined,
                pid: child.pid,
                pidfd,
                log,
                cgroups: cgroups.clone(),
                cgroup: cgroup.as_ref().map(|cgroup| cgroup.path().to_owned()),
            })
        };
        start().inspect_err(|_| cgroup::remove(&cgroups))
    }

    /// Returns when the process has ended, without collecting it.
    pub async fn ended(&self) {
        if let Err(e) = self.pidfd.readable().await {
            log::error!("wait for husk-vmm, process {}: {e}", self.pid);
            std::future::pending::<()>().await;
        }
    }

    /// What it complained of last, after a colon; empty if nothing.
    pub fn last_words(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        match log.last_line() {
            "" => String::new(),
            line => format!(": {line}"),
        }
    }

    /// Gives it an OOM score of its own: it inherited containerd's, which is meant for containerd.
    pub fn adjust_oom_score(&self, score: i64) {
        let path = format!("/proc/{}/oom_score_adj", self.pid);
        if let Err(e) = fs::write(&path, score.to_string()) {
            log::warn!("write {path}: {e}");
        }
    }

    pub fn kill(&self) {
        if let Err(e) = record::kill(self.pidfd.get_ref()) {
            log::error!("kill husk-vmm, process {}: {e}", self.pid);
        }
    }

    /// Collects it once it has ended, and removes its cgroup. Says how it ended, if it has in time.
    pub async fn collect(&self, limit: Duration) -> Option<String> {
        if timeout(limit, self.ended()).await.is_err() {
            log::error!(
                "husk-vmm, process {}, was killed and does not end",
                self.pid
            );
            return None;
        }
        let status = spawn::reap(self.pidfd.get_ref());
        if self.joined {
            cgroup::leave();
        }
        cgroup::remove(&self.cgroups);
        status
    }
}
