//! The process's threads: who makes them, and what each gives up before it works.

use std::{
    io,
    sync::{OnceLock, mpsc},
    thread::{self, JoinHandle},
};

use super::{JailError, landlock, seccomp, user};

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The machine service, on the main thread: builds, saves and restores the machine.
    Service,
    /// Runs a vCPU, and on it those of the guest's requests that are answered at once.
    Vcpu,
    /// Moves the bytes of the guest's connections.
    Vsock,
    /// Moves the guest's packets.
    Net,
    /// Serves files.
    Files,
}

type Birth = Box<dyn FnOnce() + Send>;

/// The thread that makes all others.
static NURSERY: OnceLock<mpsc::Sender<Birth>> = OnceLock::new();

/// Its stack, in bytes.
const STACK: usize = 128 << 10;

/// Whether this process has entered the jail. One that has not, such as a unit test's, confines nothing.
pub(super) fn in_jail() -> bool {
    NURSERY.get().is_some()
}

/// Starts a thread with a role, from any thread. Outside of the jail it is an ordinary one.
///
/// # Errors
/// Those of [`thread::Builder::spawn`]. `work` is dropped then, on some thread.
pub fn spawn<T: Send + 'static>(
    thread: thread::Builder,
    role: Role,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let Some(nursery) = NURSERY.get() else {
        return thread.spawn(work);
    };
    let (tell, told) = mpsc::sync_channel(1);
    let birth = move || {
        let born = thread.spawn(move || {
            confine_or_die(role);
            work()
        });
        // Whoever asked waits for it.
        let _ = tell.send(born);
    };
    let gone = || io::Error::other("the thread that makes threads is gone");
    nursery.send(Box::new(birth)).map_err(|_| gone())?;
    told.recv().map_err(|_| gone())?
}

/// Starts the nursery, which may do what any thread may.
pub(super) fn start_nursery() -> Result<(), JailError> {
    let (nursery, births) = mpsc::channel::<Birth>();
    let work = move || births.iter().for_each(|birth| birth());
    thread::Builder::new()
        .name("nursery".to_owned())
        .stack_size(STACK)
        .spawn(work)
        .map_err(JailError::of("start a thread"))?;
    // Called once.
    let _ = NURSERY.set(nursery);
    Ok(())
}

/// Takes from the calling thread what its role does not need.
pub(super) fn confine(role: Role) -> Result<(), JailError> {
    if role != Role::Files {
        user::drop_capabilities()?;
        landlock::leave_files()?;
    }
    seccomp::install(seccomp::thread(role))
}

/// A thread that cannot be confined must not work.
fn confine_or_die(role: Role) {
    if let Err(e) = confine(role) {
        log::error!("confine a thread ({role:?}): {e}");
        std::process::abort();
    }
}
