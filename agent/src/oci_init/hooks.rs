//! Hooks that run inside the container: each a program of its root filesystem, which gets the container's state on its
//! standard input. The first that fails ends the container, in runc's words.
//!
//! Input and outputs are files in memory, so that no hook, whatever it leaves running, can hold anything up but by not
//! ending; who waits for all of it is the agent, which has a deadline.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{PidfdFlags, pidfd_open};
use serde_json::json;

use super::failure::{Failure, words};
use super::seccomp::Filter;
use crate::spec::Spec;
use crate::spec::hooks::Hook;

/// Of each output in an error.
const OUTPUT: u64 = 4 << 10;

/// Which hooks, and what they are told about the container.
pub(super) struct Stage<'a> {
    pub(super) kind: &'static str,
    pub(super) status: &'static str,
    pub(super) hooks: &'a [Hook],
    /// One that is not in force yet, and is for hooks too.
    pub(super) filter: Option<&'a Filter>,
}

pub(super) fn run(id: &str, spec: &Spec, stage: &Stage<'_>) -> Result<(), Failure> {
    if stage.hooks.is_empty() {
        return Ok(());
    }
    let state = json!({
        "ociVersion": spec.oci_version,
        "id": id,
        "status": stage.status,
        // As in the container, like runc.
        "pid": std::process::id(),
        // The bundle is the host's; this is what the guest has of it.
        "bundle": spec.root.path,
        "annotations": spec.annotations,
    });
    for (i, hook) in stage.hooks.iter().enumerate() {
        let at = format!("error running {} hook #{i}", stage.kind);
        run_one(hook, state.to_string().as_bytes(), stage.filter)
            .map_err(|what| Failure::request(format!("{at}: {what}")))?;
    }
    Ok(())
}

fn run_one(hook: &Hook, state: &[u8], filter: Option<&Filter>) -> Result<(), String> {
    let file = || -> io::Result<File> { Ok(memfd_create("hook", MemfdFlags::CLOEXEC)?.into()) };
    let prepare = || -> io::Result<(File, File, File)> {
        let mut input = file()?;
        input.write_all(state)?;
        input.rewind()?;
        Ok((input, file()?, file()?))
    };
    let (input, mut out, mut err) = prepare().map_err(|error| words(&error))?;
    let start = || -> io::Result<Child> {
        let mut command = Command::new(&hook.path);
        let (name, args) = hook.args.split_first().unwrap_or((&hook.path, &[]));
        command.arg0(name).args(args).env_clear();
        command.envs(hook.env.iter().filter_map(|entry| entry.split_once('=')));
        command
            .stdin(input)
            .stdout(out.try_clone()?)
            .stderr(err.try_clone()?);
        if let Some(filter) = filter.cloned() {
            let load = move || {
                let loaded = filter.load();
                loaded.map_err(|failure| io::Error::other(failure.reason))
            };
            // SAFETY: this process has a single thread, so its child may do what it may do itself.
            unsafe { command.pre_exec(load) };
        }
        command.spawn()
    };
    let mut child =
        start().map_err(|error| format!("fork/exec {}: {}", hook.path, words(&error)))?;
    let ended = wait(&mut child, hook.timeout).map_err(|error| words(&error))?;
    let Some(status) = ended else {
        let timeout = hook.timeout.unwrap_or_default();
        return Err(format!("hook ran past specified timeout of {timeout}.0s"));
    };
    if status.success() {
        return Ok(());
    }
    Err(format!(
        "{}, stdout: {}, stderr: {}",
        ending(status),
        beginning(&mut out),
        beginning(&mut err)
    ))
}

/// `None` when it took too long, and was killed.
fn wait(child: &mut Child, timeout: Option<u32>) -> io::Result<Option<ExitStatus>> {
    let Some(timeout) = timeout else {
        return child.wait().map(Some);
    };
    let pid = i32::try_from(child.id()).ok();
    let pid = pid.and_then(rustix::process::Pid::from_raw);
    let pidfd = pidfd_open(pid.ok_or(io::ErrorKind::NotFound)?, PidfdFlags::empty())?;
    let timeout = Timespec::try_from(Duration::from_secs(timeout.into()));
    let timeout = timeout.map_err(io::Error::other)?;
    let mut ready = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    if poll(&mut ready, Some(&timeout))? == 0 {
        child.kill()?;
        child.wait()?;
        return Ok(None);
    }
    child.wait().map(Some)
}

/// Go's names, by number.
const SIGNALS: [&str; 16] = [
    "signal 0",
    "hangup",
    "interrupt",
    "quit",
    "illegal instruction",
    "trace/breakpoint trap",
    "aborted",
    "bus error",
    "floating point exception",
    "killed",
    "user defined signal 1",
    "segmentation fault",
    "user defined signal 2",
    "broken pipe",
    "alarm clock",
    "terminated",
];

/// As Go says it.
fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => match usize::try_from(signal).ok().and_then(|at| SIGNALS.get(at)) {
            Some(name) => format!("signal: {name}"),
            None => format!("signal: signal {signal}"),
        },
        (None, None) => "no status".into(),
    }
}

fn beginning(output: &mut File) -> String {
    let mut bytes = Vec::new();
    let read = output
        .rewind()
        .and_then(|()| output.take(OUTPUT).read_to_end(&mut bytes));
    match read {
        Ok(_) => String::from_utf8_lossy(&bytes).trim_end().into(),
        Err(error) => words(&error),
    }
}
