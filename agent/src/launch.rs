//! Starts `oci-init` and brings it to the point where the container's program runs.
//!
//! Owned by `container` and `process`, which keep what comes out. A launch that fails leaves no
//! process behind, and every step of it has an end.

use std::ffi::CStr;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::fcntl_dupfd_cloexec;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::control::{Blame, Control, ControlError, Order, Report};
use crate::fault::Fault;
use crate::oci_init::seccomp::Filter;
use crate::reaper::{Reaper, Status};
use crate::sys::{self, Forked, Program};

/// The name by which the program knows that it is the helper.
pub const NAME: &CStr = c"oci-init";
/// Above all numbers that descriptors have in the child.
const FIRST_FREE: i32 = 16;
/// How long all steps of one request may take; the slowest is reading the program over the file share.
/// Less than the minute that the shim waits for an answer, so that nothing runs that it has given up.
const PATIENCE: Duration = Duration::from_secs(50);

#[derive(Debug, Error)]
pub enum LaunchError {
    #[error("start oci-init: {0}")]
    Fork(io::Error),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("oci-init does not answer within {PATIENCE:?}")]
    Silent,
    #[error("oci-init answers {0:?} out of turn")]
    Report(Report),
    /// As `oci-init` words it.
    #[error("{reason}")]
    Failed { reason: String, blame: Blame },
    #[error("the process was killed before it ran its program")]
    Killed,
    /// runc's words.
    #[error("container init was OOM-killed (memory limit too low?)")]
    OutOfMemory,
}

impl LaunchError {
    /// It died without a word, or was never born: the kernel may have had no memory for it.
    pub fn may_be_memory(&self) -> bool {
        match self {
            Self::Killed | Self::Control(ControlError::Ended | ControlError::Socket(_)) => true,
            Self::Fork(error) => error.raw_os_error() == Some(libc::ENOMEM),
            _ => false,
        }
    }

    /// The cgroup takes no processes: its children have controllers.
    pub fn is_full_cgroup(&self) -> bool {
        matches!(self, Self::Fork(error) if error.raw_os_error() == Some(libc::EBUSY))
    }
}

impl From<LaunchError> for Fault {
    fn from(error: LaunchError) -> Self {
        match error {
            LaunchError::Failed {
                reason,
                blame: Blame::Request,
            } => Fault::Invalid(reason),
            LaunchError::OutOfMemory => Fault::Invalid(error.to_string()),
            other => Fault::Broken(other.to_string()),
        }
    }
}

/// A living process. Dropping it does nothing to the process.
#[derive(Debug)]
pub struct Alive {
    /// In the guest's pid namespace.
    pub pid: i32,
    pub pidfd: OwnedFd,
}

impl Alive {
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        sys::signal(self.pidfd.as_fd(), signal)
    }
}

/// A process under way; killed unless it is taken over.
pub struct Launch {
    alive: Option<Alive>,
    /// Of the request that is being served.
    deadline: Instant,
    control: Control,
    terminal: Option<OwnedFd>,
}

impl Drop for Launch {
    fn drop(&mut self) {
        if let Some(alive) = &self.alive {
            alive.signal(libc::SIGKILL).ok();
        }
    }
}

/// What `oci-init` is started with.
#[derive(Clone, Copy)]
pub struct Start<'a> {
    /// The agent's own program.
    pub program: BorrowedFd<'a>,
    pub cgroup: BorrowedFd<'a>,
    /// `CLONE_NEW…` of the namespaces it is born into.
    pub namespaces: i32,
    pub stdio: &'a [OwnedFd; 3],
    /// The pidfds of those whose namespaces it joins.
    pub others: &'a [BorrowedFd<'a>],
}

impl Launch {
    /// Starts `oci-init` with its first order.
    pub async fn begin(
        start: Start<'_>,
        reaper: &Reaper,
        order: &Order,
    ) -> Result<(Self, oneshot::Receiver<Status>), LaunchError> {
        let (control, theirs) = Control::pair().map_err(LaunchError::Fork)?;
        let alive = fork(start, theirs).map_err(LaunchError::Fork)?;
        let exit = reaper.claim(alive.pid);
        let launch = Self {
            alive: Some(alive),
            deadline: Instant::now() + PATIENCE,
            control,
            terminal: None,
        };
        timely(launch.deadline, launch.control.order(order)).await??;
        Ok((launch, exit))
    }

    /// Sets what only somebody outside may set of the process's new namespaces: files of its directory in
    /// /proc and their contents. Lets it go on.
    pub async fn set(&mut self, files: &[(&str, String)]) -> Result<(), LaunchError> {
        match self.report().await? {
            Report::Unshared => {}
            other => return Err(LaunchError::Report(other)),
        }
        let pid = self.alive.as_ref().map_or(0, |alive| alive.pid);
        for (name, contents) in files {
            let path = format!("/proc/{pid}/{name}");
            std::fs::write(&path, contents).map_err(|error| LaunchError::Failed {
                reason: format!("write {contents:?} to {name} of the new namespace: {error}"),
                blame: Blame::Request,
            })?;
        }
        Ok(timely(self.deadline, self.control.order(&Order::Go)).await??)
    }

    /// As [`Self::adopt`], for an init, which goes on at once.
    pub async fn adopt_init(
        &mut self,
        reaper: &Reaper,
    ) -> Result<oneshot::Receiver<Status>, LaunchError> {
        let exit = self.adopt(reaper).await?;
        timely(self.deadline, self.control.order(&Order::Go)).await??;
        Ok(exit)
    }

    /// Waits until a process that is in its namespaces has its pid, and claims it. It is a child of the agent.
    pub async fn adopt(
        &mut self,
        reaper: &Reaper,
    ) -> Result<oneshot::Receiver<Status>, LaunchError> {
        match self.report().await? {
            Report::Spawned { pid } => {
                let wrong = || LaunchError::Fork(io::Error::other(format!("{pid} is no pid")));
                let known = rustix::process::Pid::from_raw(pid).ok_or_else(wrong)?;
                let exit = reaper.claim(pid);
                let pidfd =
                    rustix::process::pidfd_open(known, rustix::process::PidfdFlags::empty());
                let pidfd = pidfd.map_err(|error| LaunchError::Fork(error.into()))?;
                // Its predecessor has done its part, and ends by itself.
                self.alive = Some(Alive { pid, pidfd });
                Ok(exit)
            }
            other => Err(LaunchError::Report(other)),
        }
    }

    /// Waits until a container's init is prepared; its filter of system calls.
    pub async fn ready(&mut self) -> Result<Option<Filter>, LaunchError> {
        match self.report().await? {
            Report::Ready { filter } => Ok(filter),
            other => Err(LaunchError::Report(other)),
        }
    }

    /// Another request goes on with it.
    pub fn renew(&mut self) {
        self.deadline = Instant::now() + PATIENCE;
    }

    /// Lets the process go on until its program runs.
    pub async fn go(&mut self) -> Result<(), LaunchError> {
        match timely(self.deadline, self.control.order(&Order::Go)).await? {
            // Whoever is dead cannot be ordered about, but may have said what of.
            Err(ControlError::Socket(_)) => {
                return Err(match self.report().await {
                    Err(failed @ LaunchError::Failed { .. }) => failed,
                    _ => LaunchError::Killed,
                });
            }
            other => other?,
        }
        match self.report().await? {
            Report::Executing => {}
            other => return Err(LaunchError::Report(other)),
        }
        match timely(self.deadline, self.control.report()).await?? {
            None => Ok(()),
            Some(Report::Failed { reason, blame }) => Err(LaunchError::Failed { reason, blame }),
            Some(other) => Err(LaunchError::Report(other)),
        }
    }

    async fn report(&mut self) -> Result<Report, LaunchError> {
        loop {
            match timely(self.deadline, self.control.report()).await?? {
                Some(Report::Terminal) => self.terminal = self.control.terminal(),
                Some(Report::Failed { reason, blame }) => {
                    return Err(LaunchError::Failed { reason, blame });
                }
                Some(report) => return Ok(report),
                None => return Err(LaunchError::Killed),
            }
        }
    }

    /// The master of the terminal, once.
    pub fn terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }

    /// A second handle on the process.
    pub fn alive(&self) -> io::Result<Alive> {
        let alive = self
            .alive
            .as_ref()
            .ok_or_else(|| io::Error::other("no process"))?;
        Ok(Alive {
            pid: alive.pid,
            pidfd: alive.pidfd.try_clone()?,
        })
    }

    /// Takes the process over: from here on it is not killed with this value.
    pub fn keep(&mut self) {
        self.alive = None;
    }
}

/// Closes this side's copies of what it gives, so that ends of streams are seen.
fn fork(start: Start<'_>, control: OwnedFd) -> io::Result<Alive> {
    let given = start
        .stdio
        .iter()
        .map(AsFd::as_fd)
        .chain([control.as_fd()])
        .chain(start.others.iter().copied());
    let given = given
        .map(|fd| fcntl_dupfd_cloexec(fd, FIRST_FREE))
        .collect::<Result<Vec<_>, _>>()?;
    let program = Program::new(start.program, NAME, &given);
    // SAFETY: the child does nothing but execute another program.
    match unsafe {
        sys::fork(
            u64::from(start.namespaces.unsigned_abs()),
            Some(start.cgroup),
        )
    }? {
        Forked::Child => program.execute(),
        Forked::Parent { pid, pidfd } => Ok(Alive { pid, pidfd }),
    }
}

async fn timely<T>(deadline: Instant, step: impl Future<Output = T>) -> Result<T, LaunchError> {
    timeout_at(deadline, step)
        .await
        .map_err(|_| LaunchError::Silent)
}

/// The agent's own program, in a mount of its own that nothing can write through: a container that
/// gets hold of `oci-init`'s `/proc/…/exe` must not be able to change the agent (CVE-2019-5736).
pub fn program(path: &std::path::Path) -> io::Result<OwnedFd> {
    use rustix::mount::{OpenTreeFlags, open_tree};
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(rustix::fs::CWD, path, flags)?;
    let read_only = sys::MountAttributes {
        set: libc::MOUNT_ATTR_RDONLY,
        ..Default::default()
    };
    sys::mount_setattr(tree.as_fd(), false, &read_only)?;
    // The child puts what it is given in place before it executes this.
    Ok(fcntl_dupfd_cloexec(&tree, FIRST_FREE)?)
}
