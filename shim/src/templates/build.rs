//! Makes a template: boots a microVM without a pod, has its agent prepare what is the same for all
//! clones, stops it, writes it down, and tries whether it runs. Whatever fails, and whenever, leaves nothing behind.

use std::{
    fs::File,
    io::{self, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    ptr,
    sync::Arc,
    time::Duration,
};

use husk_proto::agent::PrepareRequest;
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::timeout,
};
use ttrpc::context;

use super::{
    draft::Draft,
    gc::Limits,
    key::{Ingredients, Key, Scope, Stamp},
    manifest::{MEMORY, PAGES, STATE},
    pages,
    size::Size,
    store::{Store, Unusable},
};
use crate::{
    cgroup,
    config::Config,
    fault::Fault,
    launch::{self, Images},
    machine::SavedImage,
    ready,
    vm::{Vm, unanswered},
    vmm::Place,
};

/// For a booted machine to be prepared and written down, and for a clone to answer.
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
        Err(Unusable::Place(why)) => return Err(in_store(io::Error::other(why))),
        Err(Unusable::Template(unfit)) => {
            let removed = store.remove(&key, Some(unfit.identity));
            removed.map_err(in_store)?;
        }
    }
    make(config, &draft, &key).await?;
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

/// The host's side of the microVMs that a template takes.
struct Builder<'a> {
    config: &'a Config,
    draft: &'a Draft<'a>,
    cgroup: PathBuf,
    kvm: OwnedFd,
}

/// Fills the draft: boots and saves a machine, then has a clone of it say hello, since what does not
/// run is better found here than by a pod. No VMM is left when this returns.
async fn make(config: &Config, draft: &Draft<'_>, key: &Key) -> Result<(), BuildError> {
    let interrupted = interruption().map_err(BuildError::Setup)?;
    let builder = Builder {
        config,
        draft,
        cgroup: Path::new(CGROUPS).join(key.as_str()),
        kvm: launch::open("KVM", Path::new("/dev/kvm"), true).map_err(BuildError::Machine)?,
    };
    let saved = builder.run(&interrupted, async |vm, agent| {
        builder.save(vm, agent).await
    });
    let outcome = match saved.await {
        Ok(()) => {
            let tried = builder.run(&interrupted, async |vm, agent| {
                builder.test(vm, agent).await
            });
            tried.await
        }
        Err(e) => Err(e),
    };
    remove_cgroup(key);
    outcome
}

impl Builder<'_> {
    /// Starts a VMM, and ends it once `work` is done with it, or when there is no more time.
    async fn run(
        &self,
        interrupted: &AsyncFd<OwnedFd>,
        work: impl AsyncFnOnce(&Arc<Vm>, OwnedFd) -> Result<(), Fault>,
    ) -> Result<(), BuildError> {
        let place = Place {
            cgroup: &self.cgroup,
            with_shim: false,
        };
        let started = Vm::start(self.config, None, place, OOM_SCORE);
        let (vm, agent) = started.map_err(BuildError::Machine)?;
        let limit = self.config.agent_timeout + SAVED;
        let outcome = tokio::select! {
            done = timeout(limit, work(&vm, agent)) => match done {
                Ok(Ok(())) => Ok(()),
                Ok(Err(fault)) => {
                    vm.fail(fault.message).await;
                    let why = vm.ready().await.err();
                    let why = why.unwrap_or_else(|| Fault::internal("the microVM does not end"));
                    Err(BuildError::Machine(why))
                }
                Err(_) => Err(BuildError::Slow(limit)),
            },
            _ = interrupted.readable() => Err(BuildError::Interrupted),
        };
        vm.stop().await;
        outcome
    }

    /// Boots, has the agent prepare, and writes the machine down.
    async fn save(&self, vm: &Vm, agent: OwnedFd) -> Result<(), Fault> {
        let file = |name| {
            self.draft
                .file(name)
                .map_err(|e| in_draft("create", name, &e))
        };
        let (memory, state) = (file(MEMORY)?, file(STATE)?);
        let images = Images::open(self.config)?;
        let size = Size::for_pod(self.config);
        let config = Config {
            memory_mib: size.memory_mib,
            vcpus: 1,
            ..self.config.clone()
        };
        let possible = size.possible_vcpus;
        launch::boot_vm(vm, &config, &self.kvm, &images, &agent, possible).await?;
        drop((images, agent));
        self.prepare(vm, false).await?;
        vm.machine.pause().await?;
        vm.machine.save(&memory, &state).await
    }

    /// Has the agent go through the life of a container, or through its start alone.
    async fn prepare(&self, vm: &Vm, leave: bool) -> Result<(), Fault> {
        let limit = self.config.agent_timeout;
        let request = PrepareRequest {
            leave,
            ..PrepareRequest::default()
        };
        let prepared = vm.agent.prepare(context::Context::default(), &request);
        match timeout(limit, prepared).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(e)) => Err(Fault::of_call("prepare the guest", e)),
            Err(_) => Err(Fault::internal(unanswered("agent", limit))),
        }
    }

    /// Restores what was saved, and notes the pages that it wrote to answer and to start a container.
    async fn test(&self, vm: &Arc<Vm>, agent: OwnedFd) -> Result<(), Fault> {
        let file = |name| {
            self.draft
                .open(name)
                .map_err(|e| in_draft("open", name, &e))
        };
        let (memory, state) = (file(MEMORY)?, file(STATE)?);
        let image = SavedImage {
            kvm: self.kvm.as_fd(),
            memory: memory.as_fd(),
            state: state.as_fd(),
            pages: None,
            agent: agent.as_fd(),
            memory_bytes: 0,
            vcpus: 0,
        };
        let restored = vm.machine.restore(image).await;
        restored.map_err(|e| Fault::internal(format_args!("try the new template: {e}")))?;
        drop(agent);
        vm.booting();
        let _events = vm.bring_up(self.config.agent_timeout, Arc::default(), None);
        vm.ready().await?;
        let written = || {
            let found = memory.metadata()?;
            pages::written(vm.pid, &Stamp::from(&found))
        };
        let early = written();
        self.prepare(vm, true).await?;
        vm.machine.pause().await?;
        match (early, written()) {
            (Ok(_), Ok(all)) if all.is_empty() => Ok(()),
            (Ok(early), Ok(all)) => {
                let mut file = file_of_pages(self.draft)?;
                let written = file.write_all(&pages::encode(&early, &all));
                written.map_err(|e| in_draft("write", PAGES, &e))
            }
            // Clones go without.
            (Err(e), _) | (_, Err(e)) => {
                log::debug!("the pages that a start writes: {e}");
                Ok(())
            }
        }
    }
}

fn file_of_pages(draft: &Draft<'_>) -> Result<File, Fault> {
    draft.file(PAGES).map_err(|e| in_draft("create", PAGES, &e))
}

fn in_draft(what: &str, name: &str, cause: &io::Error) -> Fault {
    Fault::internal(format_args!("{what} the template's {name}: {cause}"))
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
fn interruption() -> io::Result<AsyncFd<OwnedFd>> {
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
