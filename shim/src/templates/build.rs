//! Makes a template: boots a microVM without a pod, has its agent prepare what is the same for all
//! clones, stops it and writes it down. Whatever fails, and whenever, leaves nothing behind.

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    ptr,
    time::Duration,
};

use husk_proto::agent::PrepareRequest;
use thiserror::Error;
use tokio::{io::Interest, time::timeout};
use ttrpc::context;

use super::{
    draft::Draft,
    gc::Limits,
    key::{Ingredients, Key, Scope},
    manifest::{MEMORY, STATE},
    store::Store,
};
use crate::{
    cgroup,
    config::Config,
    fault::Fault,
    launch::{self, Images},
    ready,
    vm::Vm,
};

/// For a booted machine to be prepared and written down.
const SAVED: Duration = Duration::from_secs(60);
/// Where builders' cgroups are, below the root of cgroup v2.
const CGROUPS: &str = "husk-template";
/// Under memory pressure a build goes before any pod.
const OOM_SCORE: i64 = 900;

/// How a build came out.
#[derive(Debug, PartialEq, Eq)]
pub enum Built {
    Made(Key),
    /// There was a fit one already.
    There(Key),
    /// Somebody else is making it.
    Busy(Key),
}

#[derive(Debug, Error)]
pub enum BuildError {
    #[error("template store {path}: {cause}")]
    Store { path: PathBuf, cause: io::Error },
    #[error("{0}")]
    Ingredients(io::Error),
    #[error("{0}")]
    Machine(Fault),
    #[error("the template's microVM was not saved within {0:?}")]
    Slow(Duration),
    #[error("interrupted")]
    Interrupted,
    #[error("kernel, initrd or husk-vmm changed while the template was made")]
    Changed,
    #[error("set up a builder: {0}")]
    Setup(io::Error),
}

/// Builds in a runtime of its own, until done or told to end (SIGINT, SIGTERM, SIGHUP).
pub fn run(config: &Config, scope: Scope) -> Result<Built, BuildError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(BuildError::Setup)?;
    runtime.block_on(build(config, scope))
}

async fn build(config: &Config, scope: Scope) -> Result<Built, BuildError> {
    let store = Store::new(&config.template_dir);
    let in_store = |cause| BuildError::Store {
        path: config.template_dir.clone(),
        cause,
    };
    let gather = || Ingredients::gather(config, scope.clone()).map_err(BuildError::Ingredients);
    let made_of = gather()?;
    let key = made_of.key();
    let Some(draft) = Draft::begin(&store, &key).map_err(in_store)? else {
        return Ok(Built::Busy(key));
    };
    // Looked for under the lock: whoever had it may have made this very one.
    match store.open(&made_of) {
        Ok(Some(_)) => return Ok(Built::There(key)),
        Ok(None) => {}
        Err(unfit) => {
            let removed = store.remove(&key, Some(unfit.identity));
            removed.map_err(in_store)?;
        }
    }
    save(config, &draft, &key).await?;
    if gather()?.key() != key {
        return Err(BuildError::Changed);
    }
    draft.publish(made_of).map_err(in_store)?;
    let limits = Limits {
        space: config.template_space_mib << 20,
        keep: Some(&key),
        verify: false,
    };
    store.gc(limits).map_err(in_store)?;
    Ok(Built::Made(key))
}

/// Writes a prepared machine into the draft. Its VMM is gone when this returns.
async fn save(config: &Config, draft: &Draft<'_>, key: &Key) -> Result<(), BuildError> {
    let store = |cause| BuildError::Store {
        path: config.template_dir.clone(),
        cause,
    };
    let memory = draft.file(MEMORY).map_err(store)?;
    let state = draft.file(STATE).map_err(store)?;
    let interrupted = interruption().map_err(BuildError::Setup)?;
    let cgroup = Path::new(CGROUPS).join(key.as_str());
    let kvm = launch::open("KVM", Path::new("/dev/kvm"), true).map_err(BuildError::Machine)?;
    let (vm, agent) = Vm::start(config, None, &cgroup, OOM_SCORE).map_err(BuildError::Machine)?;
    let limit = config.agent_timeout + SAVED;
    let outcome = tokio::select! {
        saved = timeout(limit, prepare_and_save(&vm, config, &kvm, agent, &memory, &state)) => {
            match saved {
                Ok(Ok(())) => Ok(()),
                Ok(Err(fault)) => {
                    vm.fail(fault.message).await;
                    let why = vm.ready().await.err();
                    let why = why.unwrap_or_else(|| Fault::internal("the microVM does not end"));
                    Err(BuildError::Machine(why))
                }
                Err(_) => Err(BuildError::Slow(limit)),
            }
        }
        _ = interrupted.readable() => Err(BuildError::Interrupted),
    };
    vm.stop().await;
    remove_cgroup(key);
    outcome
}

async fn prepare_and_save(
    vm: &Vm,
    config: &Config,
    kvm: &OwnedFd,
    agent: OwnedFd,
    memory: &File,
    state: &File,
) -> Result<(), Fault> {
    let images = Images::open(config)?;
    launch::boot_vm(vm, config, kvm, &images, &agent).await?;
    drop(images);
    drop(agent);
    let limit = config.agent_timeout;
    let request = PrepareRequest::default();
    let prepared = vm.agent.prepare(context::Context::default(), &request);
    match timeout(limit, prepared).await {
        Ok(prepared) => prepared.map_err(|e| Fault::of_call("prepare the guest", e))?,
        Err(_) => return Err(Fault::internal(crate::vm::unanswered("agent", limit))),
    };
    vm.machine.pause().await?;
    vm.machine.save(memory, state).await
}

/// Removes the cgroup that a template's VMM was in, if none is left in it.
pub(super) fn remove_cgroup(key: &Key) {
    if let Some(root) = cgroup::root() {
        let all = root.join(CGROUPS);
        let one = all.join(key.as_str());
        cgroup::remove(&[all, one]);
    }
}

/// Becomes readable when somebody wants us to end. They are not delivered otherwise any more.
fn interruption() -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    let mut signals = MaybeUninit::uninit();
    // SAFETY: sigemptyset(3) makes the set that the others add to and read; nothing else is touched.
    let fd = unsafe {
        libc::sigemptyset(signals.as_mut_ptr());
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            libc::sigaddset(signals.as_mut_ptr(), signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, signals.as_ptr(), ptr::null_mut());
        libc::signalfd(-1, signals.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    ready::watch(unsafe { OwnedFd::from_raw_fd(fd) }, Interest::READABLE)
}
