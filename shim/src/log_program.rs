//! A program of the host that takes the output of one process (`binary://`): it finds stdout and stderr at its
//! descriptors 3 and 4, and says at 5 that it is ready. It ends with the output, or is ended.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    process::{Command, Stdio},
    time::Duration,
};

use thiserror::Error;
use tokio::{io::Interest, time::timeout};

use crate::{
    host_program::{HostProgram, cause_in_words, give},
    ready,
    spawn::pipe,
    stream_uri::Program,
};

/// To say that it is ready.
const READY: Duration = Duration::from_secs(30);
/// To end by itself when there is no more output: SIGTERM may cut it short.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// To end after SIGTERM, as with runc's shim.
const TERMINATION: Duration = Duration::from_secs(12);

#[derive(Debug, Error)]
pub enum LogError {
    #[error("start the logger {program}: {cause}")]
    Start { program: String, cause: String },
    #[error("the logger {0} is not ready after {READY:?}")]
    NotReady(String),
}

/// Whose output it is.
#[derive(Clone, Copy, Debug)]
pub struct Owner<'a> {
    pub namespace: &'a str,
    /// Of the process: a container, or an exec.
    pub id: &'a str,
}

/// A logger that runs.
#[derive(Debug)]
pub struct LogProgram(HostProgram);

/// Where its two streams are written to. The ends do not block.
#[derive(Debug)]
pub struct Inputs {
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

impl LogProgram {
    /// Returns when it is ready: it has written there, or closed that descriptor.
    pub async fn start(program: &Program, owner: Owner<'_>) -> Result<(Self, Inputs), LogError> {
        let name = program.path.display().to_string();
        let failed = |cause: io::Error| LogError::Start {
            program: name.clone(),
            cause: cause_in_words(&cause),
        };
        let (started, inputs, is_ready) = start(program, owner).map_err(failed)?;
        match timeout(READY, ready::read(&is_ready, &mut [0])).await {
            Err(_) => Err(LogError::NotReady(name)),
            Ok(Err(cause)) => Err(failed(cause)),
            Ok(Ok(_)) => Ok((Self(started), inputs)),
        }
    }

    /// To be called when its inputs are closed. Bounded.
    pub async fn stop(mut self) {
        if self.has_ended(LAST_WORDS).await {
            return;
        }
        if let Err(e) = self.0.signal(libc::SIGTERM) {
            log::warn!("end a logger: {e}");
        }
        if !self.has_ended(TERMINATION).await {
            log::warn!("a logger does not end: it is killed");
        }
    }

    async fn has_ended(&mut self, limit: Duration) -> bool {
        match self.0.ended(limit).await {
            Ok(status) => status.is_some(),
            Err(e) => {
                log::warn!("wait for a logger: {e}");
                true
            }
        }
    }
}

fn start(
    program: &Program,
    owner: Owner<'_>,
) -> io::Result<(HostProgram, Inputs, tokio::io::unix::AsyncFd<OwnedFd>)> {
    let (from_stdout, stdout) = pipe()?;
    let (from_stderr, stderr) = pipe()?;
    let (is_ready, says_ready) = pipe()?;
    for ours in [&stdout, &stderr, &is_ready] {
        // SAFETY: F_SETFL takes a number; the other status flags of a new pipe are clear.
        if unsafe { libc::fcntl(ours.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let is_ready = ready::watch(is_ready, Interest::READABLE)?;
    let mut command = Command::new(&program.path);
    command
        .args(&program.args)
        .env_clear()
        .env("CONTAINER_ID", owner.id)
        .env("CONTAINER_NAMESPACE", owner.namespace)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    give(&mut command, [from_stdout, from_stderr, says_ready])?;
    let started = HostProgram::start(&mut command)?;
    // Our copies of its ends go with the command.
    Ok((started, Inputs { stdout, stderr }, is_ready))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, path::Path, sync::OnceLock};

    use super::*;
    use crate::host_program::LowDescriptors;

    const OWNER: Owner<'_> = Owner {
        namespace: "ns",
        id: "c",
    };

    /// A logger that runs this, below the directory that it is told.
    fn script(directory: &Path, text: &str) -> Program {
        // As in `serve`. These tests share their process.
        static LOW: OnceLock<LowDescriptors> = OnceLock::new();
        LOW.get_or_init(|| LowDescriptors::reserve().unwrap());
        let path = directory.join("logger");
        fs::write(
            &path,
            format!("#!/bin/sh\ncd {}\n{text}\n", directory.display()),
        )
        .unwrap();
        assert!(
            Command::new("/bin/chmod")
                .arg("755")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        Program {
            path,
            args: vec!["--tag".into(), "a b".into()],
        }
    }

    fn write(to: &OwnedFd, text: &str) {
        fs::File::from(to.try_clone().unwrap())
            .write_all(text.as_bytes())
            .unwrap();
    }

    #[tokio::test]
    async fn it_gets_both_streams_and_knows_whose_they_are() {
        let top = tempfile::tempdir().unwrap();
        let text = "/usr/bin/env >env; echo \"$@\" >args; printf x >&5; /bin/cat <&4 >err & /bin/cat <&3 >out; wait";
        let program = script(top.path(), text);
        let (logger, inputs) = LogProgram::start(&program, OWNER).await.unwrap();
        write(&inputs.stdout, "to out\n");
        write(&inputs.stderr, "to err\n");
        drop(inputs);
        logger.stop().await;
        let read = |name: &str| fs::read_to_string(top.path().join(name)).unwrap();
        assert_eq!(
            (read("out"), read("err")),
            ("to out\n".into(), "to err\n".into())
        );
        assert_eq!(read("args"), "--tag a b\n");
        let env = read("env");
        assert!(env.contains("CONTAINER_ID=c\n") && env.contains("CONTAINER_NAMESPACE=ns\n"));
        assert!(!env.contains("HOME="), "{env}");
    }

    #[tokio::test]
    async fn closing_is_as_good_as_saying_and_one_that_stays_is_ended() {
        let top = tempfile::tempdir().unwrap();
        let text = "exec 5>&-; trap 'echo ended >end; exit' TERM; while :; do /bin/sleep 0.1; done";
        let program = script(top.path(), text);
        let (logger, inputs) = LogProgram::start(&program, OWNER).await.unwrap();
        drop(inputs);
        logger.stop().await;
        assert_eq!(
            fs::read_to_string(top.path().join("end")).unwrap(),
            "ended\n"
        );
    }

    #[tokio::test]
    async fn one_that_cannot_be_executed_is_named() {
        let program = Program {
            path: "/no/such/logger".into(),
            args: Vec::new(),
        };
        let error = LogProgram::start(&program, OWNER).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "start the logger /no/such/logger: no such file or directory"
        );
    }
}
