//! One process of a container, init or added: its stages, its streams, its end.
//!
//! Owned by `container`. The stage is the whole truth about it; it is borrowed for lines and never
//! across an await. A process is never looked up by pid after its end: signals go through its pidfd.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::fault::Fault;
use crate::launch::{Alive, Launch};
use crate::spec;
use crate::streams::{Attached, Copying};

/// How long a killed process may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(10);

pub enum Stage {
    /// Added; its streams have not all come.
    Adding,
    /// Added; nothing is started for it.
    Added(Box<Added>),
    /// Init, prepared, waits to be let go.
    Gated(Box<Launch>),
    /// On its way to its program; an added process has no pid yet.
    Starting(Option<Rc<Alive>>),
    Running(Rc<Alive>),
    Ended,
}

pub struct Added {
    pub process: spec::process::Process,
    pub attached: Attached,
}

pub struct Process {
    /// Empty for init.
    pub exec_id: String,
    stage: RefCell<Stage>,
    copying: RefCell<Copying>,
    ended: Notify,
    /// Whether its end is told to the shim.
    announced: Cell<bool>,
}

impl Process {
    pub fn new(exec_id: &str, stage: Stage) -> Rc<Self> {
        Rc::new(Self {
            exec_id: exec_id.into(),
            stage: RefCell::new(stage),
            copying: RefCell::default(),
            ended: Notify::new(),
            announced: Cell::new(false),
        })
    }

    /// Puts the next stage in place and gives back the last. The end is final.
    pub fn enter(&self, next: Stage) -> Stage {
        let mut stage = self.stage.borrow_mut();
        match (&*stage, next) {
            (Stage::Ended, _) => Stage::Ended,
            (_, next) => std::mem::replace(&mut stage, next),
        }
    }

    /// From `Starting` to `Running`, unless it has ended meanwhile.
    pub fn run(&self, alive: Rc<Alive>) {
        self.announced.set(true);
        self.enter(Stage::Running(alive));
    }

    /// Takes init from its gate.
    pub fn leave_gate(&self) -> Result<(Box<Launch>, Rc<Alive>), Fault> {
        let mut stage = self.stage.borrow_mut();
        let alive = match &*stage {
            Stage::Gated(launch) => Rc::new(
                launch
                    .alive()
                    .map_err(|error| Fault::Broken(error.to_string()))?,
            ),
            _ => return Err(self.wrong_stage(&stage, "start")),
        };
        match std::mem::replace(&mut *stage, Stage::Starting(Some(Rc::clone(&alive)))) {
            Stage::Gated(launch) => Ok((launch, alive)),
            // Seen to be gated above, under the same borrow.
            other => Err(self.wrong_stage(&other, "start")),
        }
    }

    /// Takes what an added process is to be started from.
    pub fn leave_added(&self) -> Result<Added, Fault> {
        let mut stage = self.stage.borrow_mut();
        match std::mem::replace(&mut *stage, Stage::Starting(None)) {
            Stage::Added(added) => Ok(*added),
            other => {
                let fault = self.wrong_stage(&other, "start");
                *stage = other;
                Err(fault)
            }
        }
    }

    fn wrong_stage(&self, stage: &Stage, verb: &str) -> Fault {
        let state = match stage {
            Stage::Adding | Stage::Added(_) | Stage::Gated(_) => "created",
            Stage::Starting(_) => "starting",
            Stage::Running(_) => "running",
            Stage::Ended => "stopped",
        };
        let name = if self.exec_id.is_empty() {
            "init"
        } else {
            &self.exec_id
        };
        Fault::State(format!("cannot {verb} process {name:?}: it is {state}"))
    }

    /// The process, while it has a pid and has not been reaped.
    pub fn alive(&self) -> Option<Rc<Alive>> {
        match &*self.stage.borrow() {
            Stage::Gated(launch) => launch.alive().ok().map(Rc::new),
            Stage::Starting(alive) => alive.clone(),
            Stage::Running(alive) => Some(Rc::clone(alive)),
            Stage::Adding | Stage::Added(_) | Stage::Ended => None,
        }
    }

    pub fn has_ended(&self) -> bool {
        matches!(&*self.stage.borrow(), Stage::Ended)
    }

    /// Its end is to be told to the shim. Set once it runs, or waits at its gate.
    pub fn announce(&self) {
        self.announced.set(true);
    }

    /// Records the end; true when it is to be told.
    pub fn end(&self) -> bool {
        self.stage.replace(Stage::Ended);
        self.ended.notify_waiters();
        self.announced.get()
    }

    pub fn signal(&self, signal: i32) -> Result<(), Fault> {
        let finished = || Fault::NotFound("process already finished".into());
        let Some(alive) = self.alive() else {
            return Err(if self.has_ended() {
                finished()
            } else {
                self.wrong_stage(&self.stage.borrow(), "signal")
            });
        };
        match alive.signal(signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(finished()),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Err(Fault::Invalid(format!("signal: {signal} is no signal")))
            }
            other => other.map_err(|error| {
                Fault::Broken(format!("signal {signal} to process {}: {error}", alive.pid))
            }),
        }
    }

    /// Makes sure that nothing of it runs: an added process that was never started, or an init at its
    /// gate, simply ends here. What runs has to be ended by its owner.
    pub async fn finish(&self) -> Result<(), Fault> {
        {
            let stage = self.stage.borrow();
            match &*stage {
                Stage::Ended | Stage::Added(_) => return Ok(()),
                Stage::Gated(_) => {}
                other => return Err(self.wrong_stage(other, "delete")),
            }
        }
        self.signal(libc::SIGKILL).ok();
        self.gone().await
    }

    /// Waits for the end of a process that has been killed.
    pub async fn gone(&self) -> Result<(), Fault> {
        let ended = self.ended.notified();
        tokio::pin!(ended);
        ended.as_mut().enable();
        if self.has_ended() {
            return Ok(());
        }
        timeout(DEATH_PATIENCE, ended).await.map_err(|_| {
            Fault::Broken(format!(
                "init is not gone {DEATH_PATIENCE:?} after it was killed"
            ))
        })
    }

    /// Keeps its running streams.
    pub fn stream(&self, copying: Copying) {
        *self.copying.borrow_mut() = copying;
    }

    pub fn close_streams(&self) {
        *self.copying.borrow_mut() = Copying::default();
    }

    /// The size of its terminal in characters; before the terminal is there, the size to open it with.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<(), Fault> {
        if let Stage::Added(added) = &mut *self.stage.borrow_mut() {
            if !added.process.terminal {
                return Err(no_terminal());
            }
            added.process.console_size = Some(spec::process::ConsoleSize {
                height: rows,
                width: columns,
            });
            return Ok(());
        }
        let copying = self.copying.borrow();
        let master = copying.master().ok_or_else(no_terminal)?;
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(master.as_fd(), size).map_err(|error| {
            let error = io::Error::from(error);
            Fault::Broken(format!("resize the terminal to {columns}x{rows}: {error}"))
        })
    }
}

fn no_terminal() -> Fault {
    Fault::State("the process has no terminal".into())
}
