//! One container of a pod: its processes, and the order in which their ends are told. Plain state,
//! owned by the pod; nothing here waits or calls anybody.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::events::task::TaskExit;

use crate::{
    events::{TaskEvent, timestamp},
    fault::Fault,
    hooks::{Hooks, Subject},
    process::{Exit, KILLED_STATUS, Process},
    timeline::Timeline,
};

/// Between two events of one container that it was out of memory.
const OOM_PAUSE: Duration = Duration::from_secs(1);

/// A container that containerd knows, or is about to.
#[derive(Debug)]
pub struct Container {
    pub id: String,
    pub bundle: String,
    /// Of the VMM: what containerd takes for the pid of every process of the pod.
    pub pid: u32,
    pub init: Process,
    pub execs: HashMap<String, Process>,
    /// The agent was asked to create it.
    pub in_guest: bool,
    /// Names of its shares at the VMM.
    pub shares: Vec<String>,
    pub paused: bool,
    /// A `Delete` is on its way.
    pub deleting: bool,
    /// Nothing of it is left in the guest.
    pub gone: bool,
    /// Those of the host that are to be run for it, from the moment on at which the first is.
    pub hooks: Arc<Hooks>,
    /// Of its start.
    pub timeline: Arc<Timeline>,
    /// When containerd was last told that it was out of memory.
    oom_told: Option<Instant>,
    /// The init's end, kept until every exec has ended: containerd hears of it last.
    held: Option<Exit>,
}

impl Container {
    pub fn new(id: &str, bundle: &str, init: Process) -> Self {
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            pid: 0,
            init,
            execs: HashMap::new(),
            in_guest: false,
            shares: Vec::new(),
            paused: false,
            deleting: false,
            gone: false,
            hooks: Arc::default(),
            timeline: Arc::default(),
            oom_told: None,
            held: None,
        }
    }

    /// What its hooks are told of it.
    pub fn subject(&self) -> Subject {
        Subject {
            id: self.id.clone(),
            bundle: self.bundle.clone().into(),
            pid: self.pid,
        }
    }

    /// It was out of memory. Says whether containerd is to be told: what comes close upon another is
    /// told with it, as the guest may say so without end.
    pub fn out_of_memory(&mut self, now: Instant) -> bool {
        let told = self.oom_told;
        let due = told.is_none_or(|told| now.saturating_duration_since(told) >= OOM_PAUSE);
        if due {
            self.oom_told = Some(now);
        }
        due
    }

    /// The init (`""`), or an exec.
    pub fn process(&self, exec: &str) -> Result<&Process, Fault> {
        match exec {
            "" => Ok(&self.init),
            exec => self.execs.get(exec).ok_or_else(|| self.no_exec(exec)),
        }
    }

    pub fn process_mut(&mut self, exec: &str) -> Result<&mut Process, Fault> {
        if exec.is_empty() {
            return Ok(&mut self.init);
        }
        if !self.execs.contains_key(exec) {
            return Err(self.no_exec(exec));
        }
        let missing = self.no_exec(exec);
        self.execs.get_mut(exec).ok_or(missing)
    }

    fn no_exec(&self, exec: &str) -> Fault {
        Fault::not_found(format_args!("container {} has no process {exec}", self.id))
    }

    /// A process has ended. Returns what containerd is to be told now, in order.
    pub fn exited(&mut self, exec: &str, exit: Exit) -> Vec<TaskEvent> {
        let mut news = Vec::new();
        if exec.is_empty() {
            if self.execs.values().any(Process::is_active) && self.init.is_active() {
                self.held.get_or_insert(exit);
                return news;
            }
            if self.init.exited(exit) {
                news.push(self.exit_event("", exit));
            }
            return news;
        }
        if self
            .execs
            .get_mut(exec)
            .is_some_and(|process| process.exited(exit))
        {
            news.push(self.exit_event(exec, exit));
        }
        news.extend(self.release());
        news
    }

    /// A process was not started after all. Returns what containerd is to be told now.
    pub fn start_failed(&mut self, exec: &str) -> Result<Vec<TaskEvent>, Fault> {
        self.process_mut(exec)?.start_failed();
        Ok(self.release())
    }

    /// The init's end, if nothing it was kept for is left.
    fn release(&mut self) -> Vec<TaskEvent> {
        if self.execs.values().any(Process::is_active) {
            return Vec::new();
        }
        match self.held.take() {
            Some(held) => self.exited("", held),
            None => Vec::new(),
        }
    }

    /// Whether the init has ended and waits for its execs.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// Ends whatever is left: execs that outlived their init, or everything when the VM is gone.
    pub fn all_exited(&mut self, init_too: bool) -> Vec<TaskEvent> {
        let killed = Exit::now(KILLED_STATUS);
        let mut news = Vec::new();
        let execs: Vec<String> = self.execs.keys().cloned().collect();
        for exec in execs {
            news.extend(self.exited(&exec, killed));
        }
        if init_too {
            news.extend(self.exited("", killed));
        }
        news
    }

    fn exit_event(&self, exec: &str, exit: Exit) -> TaskEvent {
        let id = if exec.is_empty() { &self.id } else { exec };
        TaskEvent::Exit(TaskExit {
            container_id: self.id.clone(),
            id: id.to_string(),
            pid: self.pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..TaskExit::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::{Paths, Streams};

    fn running() -> Process {
        let mut process = Process::creating(Paths::default());
        process.created(Streams::default());
        process.start().unwrap();
        process.started();
        process
    }

    fn container() -> Container {
        let mut container = Container::new("c", "/b", running());
        container.pid = 42;
        container
    }

    fn told(news: &[TaskEvent]) -> Vec<(String, u32)> {
        let exit = |event: &TaskEvent| match event {
            TaskEvent::Exit(exit) => (exit.id.clone(), exit.exit_status),
            other => panic!("{other:?}"),
        };
        news.iter().map(exit).collect()
    }

    #[test]
    fn the_init_is_last_whatever_the_order_of_the_news() {
        let mut container = container();
        container.execs.insert("e1".into(), running());
        container.execs.insert("e2".into(), running());
        assert!(container.exited("", Exit::now(0)).is_empty());
        assert!(container.is_held() && container.init.exit().is_none());
        assert_eq!(
            told(&container.exited("e1", Exit::now(1))),
            [("e1".into(), 1)]
        );
        let news = container.exited("e2", Exit::now(2));
        assert_eq!(told(&news), [("e2".into(), 2), ("c".into(), 0)]);
        assert!(container.exited("", Exit::now(9)).is_empty());
    }

    #[test]
    fn execs_that_never_ran_hold_nothing_up() {
        let mut container = container();
        let mut created = Process::creating(Paths::default());
        created.created(Streams::default());
        container.execs.insert("e".into(), created);
        assert_eq!(told(&container.exited("", Exit::now(0))), [("c".into(), 0)]);
    }

    #[test]
    fn the_end_of_the_vm_ends_everything_once() {
        let mut container = container();
        container.execs.insert("e".into(), running());
        let news = container.all_exited(true);
        assert_eq!(told(&news), [("e".into(), 137), ("c".into(), 137)]);
        assert!(container.all_exited(true).is_empty());
    }

    #[test]
    fn a_held_end_comes_through_when_its_execs_are_given_up() {
        let mut container = container();
        container.execs.insert("e".into(), running());
        assert!(container.exited("", Exit::now(5)).is_empty());
        let news = container.all_exited(false);
        assert_eq!(told(&news), [("e".into(), 137), ("c".into(), 5)]);
    }

    #[test]
    fn an_exec_that_does_not_start_lets_the_end_of_its_init_through() {
        let starting = || {
            let mut process = Process::creating(Paths::default());
            process.created(Streams::default());
            process.start().unwrap();
            process
        };
        // The init ends, and the agent refuses to start anything more.
        let mut one = container();
        one.execs.insert("e".into(), starting());
        assert!(one.exited("", Exit::now(5)).is_empty() && one.is_held());
        assert_eq!(told(&one.start_failed("e").unwrap()), [("c".into(), 5)]);
        // The VM ends, and with it the request.
        let mut other = container();
        other.execs.insert("e".into(), starting());
        assert!(other.all_exited(true).is_empty());
        assert_eq!(told(&other.start_failed("e").unwrap()), [("c".into(), 137)]);
        assert!(other.init.exit().is_some() && !other.is_held());
        // Another exec that runs still holds it up.
        let mut third = container();
        third.execs.insert("e".into(), starting());
        third.execs.insert("f".into(), running());
        assert!(third.exited("", Exit::now(0)).is_empty());
        assert!(third.start_failed("e").unwrap().is_empty() && third.is_held());
    }

    #[test]
    fn out_of_memory_is_told_once_a_second() {
        let mut container = container();
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let told = [0, 1, 999, 1000, 1500, 2000].map(|ms| container.out_of_memory(at(ms)));
        assert_eq!(told, [true, false, false, true, false, true]);
    }

    #[test]
    fn unknown_processes_are_not_found() {
        let mut container = container();
        assert_eq!(
            container.process("x").unwrap_err().code,
            ttrpc::Code::NOT_FOUND
        );
        assert!(container.exited("x", Exit::now(1)).is_empty());
    }
}
