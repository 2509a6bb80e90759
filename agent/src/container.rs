//! A container: its cgroup, its init, the processes added to it, from creation to deletion.
//!
//! Owned by `pod`. What happens inside the container's namespaces is `oci_init`'s; here is what the
//! agent does from outside. No method holds a borrow across an await, so a slow one (a start, a
//! removal) never keeps another (a signal) waiting.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use husk_proto::agent::Stdio;
use tokio::io::Interest;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_local};

use crate::cgroup::Cgroup;
use crate::control::{ContainerPlan, Order, ProcessPlan};
use crate::events::Events;
use crate::fault::Fault;
use crate::launch::{Launch, LaunchError, Start};
use crate::oci_init::seccomp::Filter;
use crate::plan::{cgroup_owner, files_of_new_namespaces, user_maps};
use crate::process::{Added, Process, Stage};
use crate::reaper::{Reaper, Status};
use crate::spec::namespaces::Maps;
use crate::spec::resources::Resources;
use crate::spec::{self, NamespaceKind, Spec};
use crate::streams::{Arrivals, Ends};
use crate::sys;

/// What containers stand on; the same for all of them.
pub struct Ground {
    /// The agent's own program, see [`crate::launch::program`].
    pub program: OwnedFd,
    /// Where that program is.
    pub path: PathBuf,
    /// Where cgroup v2 is mounted.
    pub cgroups: PathBuf,
    pub reaper: Rc<Reaper>,
    pub arrivals: Rc<Arrivals>,
    pub events: Arc<Events>,
}

pub struct Container {
    id: String,
    ground: Rc<Ground>,
    cgroup: Cgroup,
    /// As the specification has it, for what added processes do not say.
    spec: Spec,
    /// Of its user namespace.
    maps: Option<Maps>,
    /// Of system calls, for added processes.
    filter: Option<Filter>,
    init: Rc<Process>,
    added: RefCell<HashMap<String, Rc<Process>>>,
    /// OOM kills that the shim knows of.
    oom_kills: Cell<u64>,
    oom_watch: RefCell<Option<JoinHandle<()>>>,
}

/// A container whose namespaces another one is to join, of the kinds of `flags` (`CLONE_NEW…`).
pub struct Joined {
    pub container: Rc<Container>,
    pub flags: i32,
}

/// One line for all that was asked for in vain.
fn notice(id: &str, without_effect: &[String]) {
    if !without_effect.is_empty() {
        log::warn!(
            "container {id}: accepted, and without effect in a guest: {}",
            without_effect.join(", ")
        );
    }
}

impl Container {
    /// Prepares a container up to the gate of its init. Leaves nothing behind when it fails.
    pub async fn create(
        ground: Rc<Ground>,
        id: &str,
        spec: Spec,
        joined: &[Joined],
        stdio: &Stdio,
    ) -> Result<Rc<Self>, Fault> {
        let maps = user_maps(&spec, joined)?;
        let path = if spec.linux.cgroups_path.is_empty() {
            id
        } else {
            &spec.linux.cgroups_path
        };
        notice(id, &spec.without_effect());
        let cgroup = Cgroup::create(&ground.cgroups, path)?;
        let plan = ContainerPlan {
            id: id.into(),
            spec,
            cgroups: ground.cgroups.clone(),
            joined: joined.iter().map(|other| other.flags).collect(),
            maps,
        };
        match Self::launch(&ground, &cgroup, &plan, joined, stdio).await {
            Ok((init, exit, filter)) => {
                let container = Rc::new(Self {
                    id: id.into(),
                    ground,
                    cgroup,
                    spec: plan.spec,
                    maps: plan.maps,
                    filter,
                    init,
                    added: RefCell::default(),
                    oom_kills: Cell::new(0),
                    oom_watch: RefCell::default(),
                });
                container.init.announce();
                container.watch(&container.init, exit);
                container.watch_memory();
                Ok(container)
            }
            Err(fault) => {
                if let Err(error) = cgroup.remove().await {
                    log::error!("container {id}: after a failed creation: {error}");
                }
                Err(fault)
            }
        }
    }

    async fn launch(
        ground: &Ground,
        cgroup: &Cgroup,
        plan: &ContainerPlan,
        joined: &[Joined],
        stdio: &Stdio,
    ) -> Result<(Rc<Process>, oneshot::Receiver<Status>, Option<Filter>), Fault> {
        let spec = &plan.spec;
        cgroup.apply(&spec.linux.resources)?;
        cgroup.filter_devices(&spec.linux.resources.devices)?;
        if let Some(owner) = cgroup_owner(spec, plan.maps.as_ref()) {
            cgroup.give_to(owner)?;
        }
        let attached = ground.arrivals.attach(stdio, spec.process.terminal).await?;
        let (ends, terminal) = Ends::new(attached)?;
        let mut inits = Vec::new();
        for other in joined {
            let container = &other.container;
            let init = container.init.alive();
            inits.push(init.ok_or_else(|| container.stopped("join the namespaces of"))?);
        }
        let others: Vec<_> = inits.iter().map(|init| init.pidfd.as_fd()).collect();
        let born = spec.is_born_into_namespaces();
        let start = Start {
            program: ground.program.as_fd(),
            cgroup: cgroup.as_fd(),
            namespaces: if born { spec.born_into() } else { 0 },
            stdio: &ends.child,
            others: &others,
        };
        let explain = |error: LaunchError| match cgroup.oom_kills() {
            1.. if error.may_be_memory() => LaunchError::OutOfMemory,
            _ => error,
        };
        let order = Order::Container(Box::new(plan.clone()));
        let begun = Launch::begin(start, &ground.reaper, &order).await;
        let (mut launch, mut exit) = begun.map_err(explain)?;
        if !born {
            let files = files_of_new_namespaces(plan);
            if !files.is_empty() {
                launch.set(&files).await.map_err(explain)?;
            }
            // The first process makes the second and ends; nobody needs to know when.
            exit = launch.adopt_init(&ground.reaper).await.map_err(explain)?;
        }
        // From here on, so that what the process holds alone is closed with it.
        let mut copying = ends.copy();
        let filter = launch.ready().await.map_err(explain)?;
        if let Some(master) = launch.terminal() {
            copying
                .terminal(master, terminal)
                .map_err(|error| Fault::Broken(format!("watch the terminal: {error}")))?;
        }
        let init = Process::new("", Stage::Gated(Box::new(launch)));
        init.stream(copying);
        Ok((init, exit, filter))
    }

    /// Sees a process's end, whenever it comes.
    fn watch(self: &Rc<Self>, process: &Rc<Process>, exit: oneshot::Receiver<Status>) {
        let (container, process) = (Rc::clone(self), Rc::clone(process));
        spawn_local(async move {
            let Ok(status) = exit.await else { return };
            // A client that hears of 137 wants to have heard why.
            container.report_oom_kills();
            if process.exec_id.is_empty() && !container.spec.makes(NamespaceKind::Pid) {
                // No pid namespace dies with this init.
                container.cgroup.kill_all().ok();
            }
            if process.end() {
                container
                    .ground
                    .events
                    .exit(&container.id, &process.exec_id, status);
            }
            log::debug!(
                "container {}: process {:?} ended: {status}",
                container.id,
                process.exec_id
            );
        });
    }

    fn report_oom_kills(&self) {
        let kills = self.cgroup.oom_kills();
        if kills > self.oom_kills.replace(kills) {
            self.ground.events.out_of_memory(&self.id);
        }
    }

    fn watch_memory(self: &Rc<Self>) {
        let Ok(file) = File::open(self.cgroup.path().join("memory.events")) else {
            return;
        };
        let container = Rc::downgrade(self);
        let task = spawn_local(async move {
            // The kernel signals a change as priority data until the file is read again.
            let Ok(file) = sys::watched(file.into(), Interest::PRIORITY) else {
                return;
            };
            while let Ok(mut changed) = file.ready(Interest::PRIORITY).await {
                changed.clear_ready();
                let mut text = [0; 512];
                rustix::io::pread(file.get_ref(), &mut text, 0).ok();
                let Some(container) = container.upgrade() else {
                    return;
                };
                container.report_oom_kills();
            }
        });
        *self.oom_watch.borrow_mut() = Some(task);
    }

    fn process(&self, exec_id: &str) -> Result<Rc<Process>, Fault> {
        if exec_id.is_empty() {
            return Ok(Rc::clone(&self.init));
        }
        let added = self.added.borrow().get(exec_id).cloned();
        added.ok_or_else(|| {
            Fault::NotFound(format!("process {exec_id:?} in container {:?}", self.id))
        })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Of its user namespace, if that is not the guest's.
    pub fn maps(&self) -> Option<&Maps> {
        self.maps.as_ref()
    }

    pub fn pid(&self) -> u32 {
        self.init
            .alive()
            .and_then(|alive| u32::try_from(alive.pid).ok())
            .unwrap_or(0)
    }

    /// Adds a process, not yet started.
    pub async fn exec(
        &self,
        exec_id: &str,
        mut process: spec::process::Process,
        stdio: &Stdio,
    ) -> Result<(), Fault> {
        if self.init.has_ended() {
            return Err(self.stopped("exec in"));
        }
        if self.added.borrow().contains_key(exec_id) {
            return Err(Fault::Exists(format!(
                "process {exec_id:?} in container {:?}",
                self.id
            )));
        }
        notice(&self.id, &process.without_effect());
        process.inherit(&self.spec.process);
        // Takes the id while the streams arrive.
        let record = Process::new(exec_id, Stage::Adding);
        self.added
            .borrow_mut()
            .insert(exec_id.into(), Rc::clone(&record));
        match self.ground.arrivals.attach(stdio, process.terminal).await {
            Ok(attached) => {
                record.enter(Stage::Added(Box::new(Added { process, attached })));
                Ok(())
            }
            Err(error) => {
                self.added.borrow_mut().remove(exec_id);
                Err(error.into())
            }
        }
    }

    fn stopped(&self, verb: &str) -> Fault {
        Fault::State(format!(
            "cannot {verb} container {:?}: it is stopped",
            self.id
        ))
    }

    /// Runs init or an added process; its pid.
    pub async fn start(self: &Rc<Self>, exec_id: &str) -> Result<u32, Fault> {
        let process = self.process(exec_id)?;
        if self.cgroup.is_frozen() {
            return Err(Fault::State(format!(
                "cannot start a process in container {:?}: it is paused",
                self.id
            )));
        }
        let pid = if exec_id.is_empty() {
            self.start_init(&process).await?
        } else {
            let added = process.leave_added()?;
            let started = self.start_added(&process, added).await;
            if started.is_err() {
                process.end();
                process.close_streams();
            }
            started?
        };
        u32::try_from(pid).map_err(|_| Fault::Broken(format!("{pid} is no pid")))
    }

    async fn start_init(&self, init: &Process) -> Result<i32, Fault> {
        let (mut launch, alive) = init.leave_gate()?;
        launch.renew();
        if let Err(error) = launch.go().await {
            drop(launch);
            // A client may delete the container as soon as it knows.
            init.gone().await?;
            return Err(error.into());
        }
        launch.keep();
        init.run(Rc::clone(&alive));
        Ok(alive.pid)
    }

    async fn start_added(
        self: &Rc<Self>,
        process: &Rc<Process>,
        added: Added,
    ) -> Result<i32, Fault> {
        let init = self.init.alive().ok_or_else(|| self.stopped("exec in"))?;
        let (ends, terminal) = Ends::new(added.attached)?;
        let start = Start {
            program: self.ground.program.as_fd(),
            cgroup: self.cgroup.as_fd(),
            namespaces: 0,
            stdio: &ends.child,
            others: &[init.pidfd.as_fd()],
        };
        let plan = ProcessPlan {
            container: self.id.clone(),
            process: added.process,
            namespaces: self.spec.namespace_flags(),
            maps: self.maps.clone(),
            personality: self.spec.linux.personality.clone(),
            filter: self.filter.clone(),
        };
        let order = Order::Process(Box::new(plan));
        // The error of a process that dies with its container is the container's end.
        let explain = |error: LaunchError| {
            if self.init.has_ended() {
                self.stopped("exec in")
            } else {
                error.into()
            }
        };
        // The first process makes the second and ends; nobody needs to know when.
        let reaper = &self.ground.reaper;
        let mut begun = Launch::begin(start, reaper, &order).await;
        if matches!(&begun, Err(error) if error.is_full_cgroup()) {
            // A container that manages cgroups of its own (Docker, systemd): beside its init, as with runc.
            if let Some(cgroup) = self.cgroup.of_process(init.pid) {
                let cgroup = cgroup.as_fd();
                begun = Launch::begin(Start { cgroup, ..start }, reaper, &order).await;
            }
        }
        let (mut launch, _) = begun.map_err(explain)?;
        let mut copying = ends.copy();
        let exit = launch.adopt(&self.ground.reaper).await.map_err(explain)?;
        let alive = Rc::new(
            launch
                .alive()
                .map_err(|error| Fault::Broken(error.to_string()))?,
        );
        process.enter(Stage::Starting(Some(Rc::clone(&alive))));
        launch.go().await.map_err(explain)?;
        if let Some(master) = launch.terminal() {
            copying
                .terminal(master, terminal)
                .map_err(|error| Fault::Broken(format!("watch the terminal: {error}")))?;
        }
        launch.keep();
        process.stream(copying);
        process.run(Rc::clone(&alive));
        self.watch(process, exit);
        Ok(alive.pid)
    }

    /// Waits for the end of init, which must be near.
    pub async fn gone(&self) -> Result<(), Fault> {
        self.init.gone().await
    }

    /// A signal to one process, or to every one in the container.
    pub async fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Fault> {
        let number = i32::try_from(signal)
            .ok()
            .filter(|number| (0..=64).contains(number));
        let number =
            number.ok_or_else(|| Fault::Invalid(format!("signal: {signal} is no signal")))?;
        let process = self.process(exec_id)?;
        if !all {
            return process.signal(number);
        }
        if self.cgroup.pids().is_empty() {
            // All have ended; or, where there is no cgroup namespace, have gone elsewhere.
            return process.signal(number);
        }
        if number == libc::SIGKILL {
            self.cgroup.kill_all()?;
            // Wherever it is; the rest of its pid namespace dies with it.
            process.signal(number).ok();
            return Ok(());
        }
        // Standing still, nobody can fork past the list.
        let paused = self.cgroup.is_frozen();
        if !paused {
            if let Err(error) = self.cgroup.freeze(true).await {
                log::warn!("container {}: signal to all: {error}", self.id);
            }
        }
        for pid in self.cgroup.pids() {
            if let Ok(pid) = i32::try_from(pid) {
                sys::kill(pid, number).ok();
            }
        }
        if !paused {
            self.cgroup.freeze(false).await?;
        }
        Ok(())
    }

    pub fn resize(&self, exec_id: &str, columns: u32, rows: u32) -> Result<(), Fault> {
        let narrow = |name: &str, value: u32| {
            u16::try_from(value)
                .map_err(|_| Fault::Invalid(format!("{name}: {value} is above {}", u16::MAX)))
        };
        self.process(exec_id)?
            .resize(narrow("columns", columns)?, narrow("rows", rows)?)
    }

    /// Forgets an added process.
    pub async fn forget(&self, exec_id: &str) -> Result<(), Fault> {
        let process = self.process(exec_id)?;
        process.finish().await?;
        process.close_streams();
        self.added.borrow_mut().remove(exec_id);
        Ok(())
    }

    /// Ends what is left and removes the cgroup. To be called before the container is dropped.
    pub async fn delete(&self) -> Result<(), Fault> {
        self.init.finish().await?;
        self.cgroup.remove().await?;
        self.init.close_streams();
        self.added
            .borrow()
            .values()
            .for_each(|process| process.close_streams());
        if let Some(watch) = self.oom_watch.borrow_mut().take() {
            watch.abort();
        }
        Ok(())
    }

    pub async fn pause(&self, pause: bool) -> Result<(), Fault> {
        if self.init.has_ended() {
            return Err(self.stopped(if pause { "pause" } else { "resume" }));
        }
        if self.cgroup.is_frozen() == pause {
            let state = if pause {
                "paused already"
            } else {
                "not paused"
            };
            return Err(Fault::State(format!("container {:?} is {state}", self.id)));
        }
        Ok(self.cgroup.freeze(pause).await?)
    }

    pub async fn update(&self, resources: Resources) -> Result<(), Fault> {
        notice(&self.id, &resources.without_effect());
        Ok(self
            .aside("update", move |cgroup| cgroup.apply(&resources))
            .await??)
    }

    pub async fn statistics(&self) -> Result<HashMap<String, String>, Fault> {
        self.aside("statistics", |cgroup| {
            crate::cgroup::statistics(cgroup).collect()
        })
        .await
    }

    /// Works on the cgroup's files off this thread, where they take the kernel long: some statistics
    /// have to be summed up, and a lower memory limit waits until enough is reclaimed.
    async fn aside<T: Send + 'static>(
        &self,
        what: &str,
        work: impl FnOnce(&Cgroup) -> T + Send + 'static,
    ) -> Result<T, Fault> {
        let broken = |error| Fault::Broken(format!("{what}: {error}"));
        let cgroup = self.cgroup.second().map_err(broken)?;
        tokio::task::spawn_blocking(move || work(&cgroup))
            .await
            .map_err(|error| broken(io::Error::from(error)))
    }
}
