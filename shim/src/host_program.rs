//! A program of the host that the shim runs: a hook, or whoever writes a container's log. Started here, waited
//! for by pidfd, and ended with this value: nothing that was started outlives who wanted it, unless it is let go.

use std::{
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    time::timeout,
};

use crate::{ready, record};

/// A running program, which is killed when this is dropped.
#[derive(Debug)]
pub struct HostProgram(Option<Running>);

#[derive(Debug)]
struct Running {
    child: Child,
    pidfd: AsyncFd<OwnedFd>,
}

impl HostProgram {
    /// Starts it. To be called in a tokio runtime.
    pub fn start(command: &mut Command) -> io::Result<Self> {
        let mut child = command.spawn()?;
        // Nobody has collected it, so the pid is its own.
        match pidfd_of(&child).and_then(|pidfd| ready::watch(pidfd, Interest::READABLE)) {
            Ok(pidfd) => Ok(Self(Some(Running { child, pidfd }))),
            Err(cause) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(cause)
            }
        }
    }

    /// Its end, if it comes in time. To be asked again where it did not.
    pub async fn ended(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let Some(running) = &mut self.0 else {
            return Err(io::Error::other("it was collected before"));
        };
        match timeout(limit, running.pidfd.readable()).await {
            Err(_) => return Ok(None),
            Ok(readable) => drop(readable?),
        }
        let status = running.child.wait()?;
        self.0 = None;
        Ok(Some(status))
    }

    pub fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        match &self.0 {
            Some(running) => record::signal(running.pidfd.get_ref(), signal),
            None => Ok(()),
        }
    }
}

impl Drop for HostProgram {
    fn drop(&mut self) {
        let Some(Running { mut child, pidfd }) = self.0.take() else {
            return;
        };
        if let Err(e) = child.kill() {
            log::error!("kill process {}: {e}", child.id());
        }
        // A process that was killed may take its time, and nobody is to wait for it here.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                if pidfd.readable().await.is_ok() {
                    let _ = child.wait();
                }
            });
        }
    }
}

fn pidfd_of(child: &Child) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How it ended, in Go's words, which runc's clients know.
pub fn in_words(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(libc::SIGKILL)) => "signal: killed".to_owned(),
        (None, Some(signal)) => format!("signal: {signal}"),
        (None, None) => "no exit status".to_owned(),
    }
}

/// What is wrong, in Go's words: without the number, and in small letters.
pub fn cause_in_words(cause: &io::Error) -> String {
    let text = cause.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// Descriptors 3, 4 and 5, kept from being used for anything else. See [`give`].
#[derive(Debug)]
pub struct LowDescriptors {
    _held: Vec<OwnedFd>,
}

/// The descriptors that [`give`] puts in place.
const LOW: [RawFd; 3] = [3, 4, 5];

impl LowDescriptors {
    /// Takes those that are free. To be called before there are threads, and kept.
    pub fn reserve() -> io::Result<Self> {
        let null: OwnedFd = std::fs::File::open("/dev/null")?.into();
        let mut held = vec![null];
        while let Some(last) = held.last().filter(|last| LOW.contains(&last.as_raw_fd())) {
            held.push(last.try_clone()?);
        }
        // The first that lies above.
        held.pop();
        Ok(Self { _held: held })
    }
}

/// Has `command` find these as its descriptors 3, 4 and 5. While [`LowDescriptors`] are reserved, nothing else
/// of the child has one of these numbers, in particular not the pipe by which it says that it cannot execute.
pub fn give(command: &mut Command, descriptors: [OwnedFd; 3]) -> io::Result<()> {
    // Above, so that none is overwritten by another.
    let mut above = Vec::with_capacity(LOW.len());
    for descriptor in &descriptors {
        // SAFETY: fcntl(2) with F_DUPFD_CLOEXEC takes numbers only.
        let fd = unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 16) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just made this descriptor for us.
        above.push(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let place = move || {
        for (from, to) in above.iter().zip(LOW) {
            // SAFETY: dup2(2) takes numbers only, and is one of the calls that are safe after fork(2).
            if unsafe { libc::dup2(from.as_raw_fd(), to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls on numbers that were chosen before, and allocates nothing.
    unsafe { command.pre_exec(place) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_program_ends_is_waited_for_or_is_killed() {
        let start = |script| HostProgram::start(Command::new("sh").args(["-c", script])).unwrap();
        let mut program = start("exit 3");
        let status = program.ended(SOON).await.unwrap().unwrap();
        assert_eq!(in_words(status), "exit status 3");
        assert!(program.ended(SOON).await.is_err());

        let mut program = start("exec sleep 60");
        assert!(
            program
                .ended(Duration::from_millis(5))
                .await
                .unwrap()
                .is_none()
        );
        program.signal(libc::SIGKILL).unwrap();
        let status = program.ended(SOON).await.unwrap().unwrap();
        assert_eq!(in_words(status), "signal: killed");

        let program = start("exec sleep 60");
        let pidfd = pidfd_of(&program.0.as_ref().unwrap().child).unwrap();
        let pidfd = ready::watch(pidfd, Interest::READABLE).unwrap();
        drop(program);
        drop(timeout(SOON, pidfd.readable()).await.unwrap().unwrap());
    }

    #[test]
    fn causes_are_told_as_go_does() {
        let cause = io::Error::from_raw_os_error(libc::ENOENT);
        assert_eq!(cause_in_words(&cause), "no such file or directory");
    }
}
