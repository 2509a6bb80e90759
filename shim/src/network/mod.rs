//! The pod's network: what CNI has left in the pod's network namespace is carried into the guest.
//!
//! Each interface there gets a tap beside it, and every packet goes from the one to the other (`redirect`); the tap
//! becomes the guest's interface, with the same name, hardware address, addresses and routes (`survey`). In the
//! namespace everything stays as CNI made it, for CNI to check and delete, but nothing there sees a packet any more:
//! docs/decisions/0015.
//!
//! Who dials from within the namespace is carried to the guest as well (`steer`, `forward`): docs/decisions/0016.
//!
//! The namespace is entered by a thread of its own; what it has opened there goes on belonging to it wherever it is used.

mod carry;
mod forward;
mod redirect;
mod steer;
mod survey;
mod tap;
mod trial;
pub mod vhost;

use std::{
    convert::Infallible,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use husk_netlink::{Refusal, Socket, news};
use husk_proto::{agent as api, agent_ttrpc::AgentClient};
use thiserror::Error;
use tokio::{
    io::Interest,
    sync::{Mutex, MutexGuard, OnceCell, oneshot, watch},
    task::JoinHandle,
    time::timeout,
};
use ttrpc::context;

use crate::{fault::Fault, machine::Machine, ready};

use carry::Made;
pub use forward::Dial;
use steer::Steered;
pub use tap::Tap;
pub use trial::{forwarding_trial, trial};

/// For the kernel to make, or to take away, all of a pod's taps.
const LIMIT: Duration = Duration::from_secs(20);
/// For the agent to find its interfaces and to set them.
const ANSWER: Duration = Duration::from_secs(30);
/// Bytes of stack for the thread that enters the namespace.
const STACK: usize = 128 << 10;

#[derive(Clone, Debug, Error)]
pub enum NetworkError {
    #[error("network namespace {path}: {cause}")]
    Namespace {
        path: PathBuf,
        cause: Arc<io::Error>,
    },
    #[error("network namespace {0}: it is the host's own, which a microVM cannot share")]
    Hosts(PathBuf),
    #[error("network namespace {path}: {what}: {cause}")]
    Kernel {
        path: PathBuf,
        what: String,
        cause: Arc<Refusal>,
    },
    #[error("network namespace {path}: interface {interface}: {what}: {cause}")]
    Interface {
        path: PathBuf,
        interface: String,
        what: &'static str,
        cause: Arc<Refusal>,
    },
    #[error("network namespace {path}: {subject}: {reason}")]
    Unfit {
        path: PathBuf,
        subject: String,
        reason: String,
    },
    #[error("network namespace {path}: nothing was heard of it within {LIMIT:?}")]
    Silent { path: PathBuf },
}

/// How an interface is served.
#[derive(Clone, Copy, Debug)]
pub struct Serving {
    pub queues: u32,
    /// By the host's kernel, where it can.
    pub vhost: bool,
}

/// Empty once it is undone. A thread has it while the kernel looks or unmakes, so that tasks wait for it as they do for
/// the kernel.
type Shared = Arc<Mutex<Option<Made>>>;
type Outcome = Result<Shared, NetworkError>;

/// A pod's network, from the moment that its namespace is looked at. [`Network::undo`] ends it.
#[derive(Debug)]
pub struct Network {
    path: PathBuf,
    namespace: Arc<OwnedFd>,
    /// Each interface.
    serving: Serving,
    outcome: watch::Receiver<Option<Outcome>>,
    set: OnceCell<()>,
    forwarding: std::sync::Mutex<Forwarding>,
}

/// What becomes of connections made within the namespace.
#[derive(Debug)]
enum Forwarding {
    Never,
    Now(JoinHandle<()>),
    Over,
}

impl Network {
    /// Begins to carry the namespace. `path` is its name in errors.
    pub fn begin(namespace: OwnedFd, path: &Path, serving: Serving) -> Self {
        let (path, namespace) = (path.to_owned(), Arc::new(namespace));
        let (tell, outcome) = watch::channel(None);
        let make = {
            let (path, namespace) = (path.clone(), namespace.clone());
            move || {
                let made =
                    enter(&namespace, &path).and_then(|()| Made::make(&path, serving.queues));
                tell.send_replace(Some(made.map(|made| Arc::new(Mutex::new(Some(made))))));
            }
        };
        let outcome = match spawn(make) {
            Ok(()) => outcome,
            Err(cause) => {
                let cause = Arc::new(cause);
                let failed = NetworkError::Namespace {
                    path: path.clone(),
                    cause,
                };
                watch::channel(Some(Err(failed))).1
            }
        };
        Self {
            path,
            namespace,
            serving,
            outcome,
            set: OnceCell::new(),
            forwarding: std::sync::Mutex::new(Forwarding::Never),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    async fn made(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        let told = timeout(LIMIT, outcome.wait_for(Option::is_some)).await;
        let told = told
            .map_err(|_| self.silent())?
            .map_err(|_| self.silent())?;
        told.clone().unwrap_or_else(|| Err(self.silent()))
    }

    async fn lock<'a>(
        &self,
        made: &'a Mutex<Option<Made>>,
    ) -> Result<MutexGuard<'a, Option<Made>>, Fault> {
        let locked = timeout(LIMIT, made.lock()).await;
        locked.map_err(|_| Fault::internal(self.silent()))
    }

    fn silent(&self) -> NetworkError {
        NetworkError::Silent {
            path: self.path.clone(),
        }
    }

    /// Plugs every interface into a machine that runs.
    pub async fn plug(&self, machine: &Machine) -> Result<(), Fault> {
        let made = self.made().await.map_err(Fault::invalid)?;
        self.plug_what_is_not(&made, machine).await
    }

    async fn plug_what_is_not(&self, made: &Shared, machine: &Machine) -> Result<(), Fault> {
        let taps: Vec<(u32, Tap)> = {
            let mut made = self.lock(made).await?;
            let carried = made.iter_mut().flat_map(|made| &mut made.carried);
            let taps = carried.map(|carried| Some((carried.index, carried.tap.take()?)));
            taps.flatten().collect()
        };
        for (index, tap) in taps {
            let attached = machine.attach(tap, self.serving.vhost).await;
            let mut made = self.lock(made).await?;
            let Some(made) = made.as_mut() else {
                return Err(self.is_gone());
            };
            let slot = attached.inspect_err(|_| made.forget(index))?;
            let mut carried = made.carried.iter_mut();
            if let Some(carried) = carried.find(|carried| carried.index == index) {
                carried.interface.slot = slot;
            }
        }
        Ok(())
    }

    /// Has the guest set them, once: the first caller does it, the others wait for it.
    pub async fn set(&self, agent: &AgentClient) -> Result<(), Fault> {
        let set = self.set.get_or_try_init(|| async {
            let made = self.made().await.map_err(Fault::invalid)?;
            let request = self.lock(&made).await?.as_ref().map(Made::request);
            let request = request.ok_or_else(|| self.is_gone())?;
            if request.interfaces.is_empty() && request.routes.is_empty() {
                return Ok(());
            }
            tell(agent, &request).await
        });
        set.await.copied()
    }

    /// Carries what comes into the namespace later, and takes out of the guest what goes. Returns when that is no longer
    /// possible, and says why.
    pub async fn follow(&self, machine: &Machine, agent: &AgentClient) -> Fault {
        match self.follow_news(machine, agent).await {
            Err(fault) => fault,
            Ok(never) => match never {},
        }
    }

    async fn follow_news(
        &self,
        machine: &Machine,
        agent: &AgentClient,
    ) -> Result<Infallible, Fault> {
        let made = self.made().await.map_err(Fault::invalid)?;
        let take = |made: &mut Made| made.news.take();
        let news = self.lock(&made).await?.as_mut().and_then(take);
        let news = news.ok_or_else(|| self.is_gone())?;
        let news = ready::watch(news.into(), Interest::READABLE).map_err(Fault::internal)?;
        loop {
            let mut ready = news.readable().await.map_err(Fault::internal)?;
            ready.clear_ready();
            let taps = |made: &Made| made.carried.iter().map(|c| c.tap_index).collect();
            // However long a look takes that was given up: until the VM's end.
            let ours: Option<Vec<u32>> = made.lock().await.as_ref().map(taps);
            let Some(ours) = ours else {
                // Undone: the VM has ended, or is about to be said to have.
                return std::future::pending().await;
            };
            if !news::take(news.get_ref(), &ours).map_err(Fault::internal)? {
                continue;
            }
            if let Err(fault) = self.catch_up(&made, machine, agent).await {
                log::warn!("what has changed there is not carried into the guest: {fault}");
            }
        }
    }

    /// Makes the guest's network what the namespace's is by now.
    async fn catch_up(
        &self,
        made: &Shared,
        machine: &Machine,
        agent: &AgentClient,
    ) -> Result<(), Fault> {
        if !self.look(made.clone()).await? {
            return Ok(());
        }
        self.plug_what_is_not(made, machine).await?;
        let (request, gone) = {
            let mut made = self.lock(made).await?;
            let made = made.as_mut().ok_or_else(|| self.is_gone())?;
            (made.request(), std::mem::take(&mut made.gone))
        };
        // The guest first: it is told of an interface's end before the interface is pulled.
        let told = tell(agent, &request).await;
        for slot in gone {
            machine.detach(slot).await?;
        }
        told
    }

    /// Begins to carry to the guest who dials from within the namespace, until all is undone. May be called again.
    pub fn forward(&self, guest: Arc<impl Dial>) {
        let mut forwarding = self.forwarding();
        if let Forwarding::Never = *forwarding {
            let (path, namespace) = (self.path.clone(), self.namespace.clone());
            *forwarding = Forwarding::Now(tokio::spawn(async move {
                let why = match steer(namespace, path.clone()).await {
                    Ok(Steered { listener, link }) => {
                        let why = forward::serve(listener, guest).await;
                        drop(link);
                        why.to_string()
                    }
                    Err(why) => why,
                };
                let path = path.display();
                log::warn!(
                    "network namespace {path}: who dials the pod's localhost there does not reach it (port-forward): {why}"
                );
            }));
        }
    }

    fn forwarding(&self) -> std::sync::MutexGuard<'_, Forwarding> {
        let forwarding = self.forwarding.lock();
        forwarding.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Looks at the namespace again, on a thread that is in it. Whether anything has changed.
    async fn look(&self, made: Shared) -> Result<bool, Fault> {
        let (answer, answered) = oneshot::channel();
        let (namespace, path) = (self.namespace.clone(), self.path.clone());
        let queues = self.serving.queues;
        let look = move || {
            let looked =
                enter(&namespace, &path).and_then(|()| match made.blocking_lock().as_mut() {
                    Some(made) => made.look(queues),
                    None => Ok(false),
                });
            // Whoever asked may be gone.
            let _ = answer.send(looked);
        };
        spawn(look).map_err(Fault::internal)?;
        match timeout(LIMIT, answered).await {
            Ok(Ok(looked)) => looked.map_err(Fault::invalid),
            _ => Err(Fault::internal(self.silent())),
        }
    }

    fn is_gone(&self) -> Fault {
        Fault::precondition(format_args!(
            "network namespace {}: its pod has gone",
            self.path.display()
        ))
    }

    /// Leaves nothing of it in the namespace. The VMM, which has the taps, is gone by then. Bounded.
    pub async fn undo(&self) {
        let forwarding = std::mem::replace(&mut *self.forwarding(), Forwarding::Over);
        if let Forwarding::Now(task) = forwarding {
            task.abort();
            let _ = task.await;
        }
        let made = match self.made().await {
            Ok(made) => made,
            // Whoever could not make it has taken it back.
            Err(NetworkError::Silent { path }) => {
                return log::error!("network namespace {}: left as it is", path.display());
            }
            Err(_) => return,
        };
        let (tell, done) = oneshot::channel();
        let undone = spawn(move || {
            let made = made.blocking_lock().take();
            if let Some(made) = made {
                made.unmake();
            }
            // Its end may be waited for by nobody.
            let _ = tell.send(());
        });
        if undone.is_err() || timeout(LIMIT, done).await.is_err() {
            log::error!("network namespace {}: left as it is", self.path.display());
        }
    }
}

/// On a thread that is in the namespace. Says what the host refuses.
async fn steer(namespace: Arc<OwnedFd>, path: PathBuf) -> Result<Steered, String> {
    let (answer, answered) = oneshot::channel();
    let begin = move || {
        let entered = enter(&namespace, &path).map_err(|e| e.to_string());
        let steered = entered.and_then(|()| {
            let steered = steer::begin(&namespace);
            steered.map_err(|(what, cause)| format!("{what}: {cause}"))
        });
        // If nobody wants it any more, it is closed.
        let _ = answer.send(steered);
    };
    spawn(begin).map_err(|e| e.to_string())?;
    let steered = timeout(LIMIT, answered).await.map(Result::ok);
    let silent = || Err(format!("the kernel did not answer within {LIMIT:?}"));
    steered.ok().flatten().unwrap_or_else(silent)
}

async fn tell(agent: &AgentClient, request: &api::SetNetworkRequest) -> Result<(), Fault> {
    let limited = context::with_duration(ANSWER);
    let answer = agent.set_network(limited, request).await;
    answer.map_err(|e| Fault::of_call("set the pod's network", e))?;
    Ok(())
}

/// Whether a process' network namespace has more than its loopback.
pub fn has_interfaces(pid: u32) -> bool {
    // Two lines of headings.
    let list = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    let mut names = list
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next());
    names.any(|name| name.trim() != "lo")
}

fn spawn(act: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name("husk-network".into());
    thread.stack_size(STACK).spawn(act).map(drop)
}

/// Moves this thread into the namespace, for good.
fn enter(namespace: &OwnedFd, path: &Path) -> Result<(), NetworkError> {
    let failed = |cause: io::Error| NetworkError::Namespace {
        path: path.to_owned(),
        cause: Arc::new(cause),
    };
    let of = |file: fs::Metadata| (file.dev(), file.ino());
    let theirs = fs::File::from(namespace.try_clone().map_err(failed)?);
    let theirs = theirs.metadata().map(of).map_err(failed)?;
    for own in ["/proc/thread-self/ns/net", "/proc/1/ns/net"] {
        // Not everybody may look at the first process'.
        if fs::metadata(own).map(of).is_ok_and(|own| own == theirs) {
            return Err(NetworkError::Hosts(path.to_owned()));
        }
    }
    // SAFETY: setns(2) takes numbers only, and moves this thread alone.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(())
}

/// Takes out of a namespace what a shim that was lost has left in it. What is in use stays.
pub fn sweep(path: &Path) {
    let path = path.to_owned();
    let swept = thread::Builder::new().spawn(move || {
        let Ok(namespace) = fs::File::open(&path) else {
            return Ok(());
        };
        enter(&namespace.into(), &path)?;
        let failed = |cause| NetworkError::Kernel {
            path: path.clone(),
            what: "remove what redirects packets".into(),
            cause: Arc::new(cause),
        };
        let mut socket = Socket::open().map_err(|e| failed(e.into()))?;
        redirect::sweep(&mut socket).map_err(failed)
    });
    match swept.map(thread::JoinHandle::join) {
        Ok(Ok(Err(e))) => eprintln!("{e}"),
        Ok(Ok(Ok(()))) => {}
        _ => eprintln!("sweep a network namespace: no thread"),
    }
}

#[cfg(test)]
mod tests;
