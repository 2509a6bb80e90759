//! `ctr`, as a user types it, with husk or runc behind it.

use std::{
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::command::{self, Outcome, PATIENCE, Running, eventually};

/// The image the lab imports before the tests begin.
pub const IMAGE: &str = "docker.io/library/husk-demo:latest";

/// The tests' helper, which is static, so that it runs in any root.
pub const PROBE: &str = "/usr/local/lib/husk-tests/husk-probe";

/// Shows it to a container.
pub const PROBE_MOUNT: &str =
    "type=bind,src=/usr/local/lib/husk-tests/husk-probe,dst=/probe,options=rbind:ro";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Husk,
    Runc,
}

impl Runtime {
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Husk => "io.containerd.husk.v2",
            Runtime::Runc => "io.containerd.runc.v2",
        }
    }
}

/// A container id no other test uses.
pub fn fresh_id(what: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{what}-{}-{number}", std::process::id())
}

pub fn ctr(args: &[&str]) -> Command {
    let mut command = Command::new("ctr");
    command.args(args);
    command
}

/// What `ctr task ls` says of a task: RUNNING, STOPPED, ... `None`: there is no such task.
///
/// # Panics
/// When it says nothing at all: a list that cannot be had must not pass for an empty one.
#[track_caller]
pub fn state(id: &str) -> Option<String> {
    let list = command::run(&mut ctr(&["task", "ls"]), b"").ok();
    let line = list
        .lines()
        .find(|line| line.split_whitespace().next() == Some(id))?;
    line.split_whitespace().last().map(str::to_owned)
}

/// `ctr run` with its flags and, when it is long gone, what it left.
pub struct Run<'a> {
    pub runtime: Runtime,
    pub flags: &'a [&'a str],
    pub image: &'a str,
    pub args: &'a [&'a str],
}

impl<'a> Run<'a> {
    /// `ctr run --rm --runtime io.containerd.husk.v2 IMAGE ID args…`
    pub fn husk(args: &'a [&'a str]) -> Self {
        Run {
            runtime: Runtime::Husk,
            flags: &[],
            image: IMAGE,
            args,
        }
    }

    pub fn runtime(mut self, runtime: Runtime) -> Self {
        self.runtime = runtime;
        self
    }

    pub fn flags(mut self, flags: &'a [&'a str]) -> Self {
        self.flags = flags;
        self
    }

    pub fn image(mut self, image: &'a str) -> Self {
        self.image = image;
        self
    }

    pub fn command(&self, id: &str) -> Command {
        let mut command = ctr(&["run", "--rm", "--runtime", self.runtime.name()]);
        command.args(self.flags).arg(self.image).arg(id);
        command.args(self.args);
        command
    }

    #[track_caller]
    pub fn feed(&self, stdin: &[u8]) -> Outcome {
        command::run(&mut self.command(&fresh_id("run")), stdin)
    }

    #[track_caller]
    pub fn go(&self) -> Outcome {
        self.feed(b"")
    }

    /// Starts it, and waits for nothing.
    #[track_caller]
    pub fn start(&self, id: &str) -> Running {
        command::start(&mut self.command(id), b"")
    }

    /// Starts it and waits until its task runs.
    #[track_caller]
    pub fn start_and_see(&self, id: &str) -> Running {
        let mut running = self.start(id);
        let seen = eventually(Instant::now() + PATIENCE / 2, || {
            // Each look is a process on the processors that the guest boots on.
            thread::sleep(Duration::from_millis(250));
            let runs = state(id).as_deref() == Some("RUNNING");
            (runs || running.has_ended()).then_some(runs)
        });
        match seen {
            Some(true) => running,
            Some(false) => panic!("{id} never ran: {:?}", running.finish()),
            None => panic!(
                "{id} does not run after {:?}: {:?}",
                PATIENCE / 2,
                state(id)
            ),
        }
    }
}

/// A detached container; killed and deleted when dropped.
pub struct Container {
    pub id: String,
}

impl Container {
    /// One that stays: `sleep` for longer than any test.
    #[track_caller]
    pub fn idle(runtime: Runtime) -> Self {
        Self::detached(runtime, &["--null-io"], &["sleep", "86400"])
    }

    #[track_caller]
    pub fn detached(runtime: Runtime, flags: &[&str], args: &[&str]) -> Self {
        let id = fresh_id("box");
        let mut command = ctr(&["run", "-d", "--runtime", runtime.name()]);
        command.args(flags).arg(IMAGE).arg(&id).args(args);
        let container = Container { id };
        command::run(&mut command, b"").ok();
        container
    }

    pub fn exec_command(&self, flags: &[&str], args: &[&str]) -> Command {
        let exec_id = fresh_id("exec");
        let mut command = ctr(&["task", "exec", "--exec-id", &exec_id]);
        command.args(flags).arg(&self.id).args(args);
        command
    }

    #[track_caller]
    pub fn exec(&self, args: &[&str]) -> Outcome {
        command::run(&mut self.exec_command(&[], args), b"")
    }

    /// `ctr task <verb> <flags> ID`
    #[track_caller]
    pub fn task(&self, verb: &str, flags: &[&str]) -> Outcome {
        let mut command = ctr(&["task", verb]);
        command.args(flags).arg(&self.id);
        command::run(&mut command, b"")
    }

    /// The task's line in `ctr task ls`: RUNNING, STOPPED, …
    pub fn state(&self) -> Option<String> {
        state(&self.id)
    }

    /// The host's process that is its pod: the VMM, with husk.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        let list = command::run(&mut ctr(&["task", "ls"]), b"").ok();
        list.lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                (words.next() == Some(&self.id)).then(|| words.next()?.parse().ok())?
            })
            .next()
            .unwrap_or_else(|| panic!("{} is not in {list}", self.id))
    }

    #[track_caller]
    pub fn wait_stopped(&self) {
        let stopped = eventually(Instant::now() + PATIENCE, || {
            (self.state().as_deref() != Some("RUNNING")).then_some(())
        });
        assert!(stopped.is_some(), "{} still runs", self.id);
    }

    /// Kills and deletes; what a user does to be rid of it.
    #[track_caller]
    pub fn remove(self) {
        self.task("delete", &["--force"]);
        command::run(&mut ctr(&["container", "delete", &self.id]), b"").ok();
        std::mem::forget(self);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = ctr(&["task", "delete", "--force", &self.id]).output();
        let _ = ctr(&["container", "delete", &self.id]).output();
    }
}
