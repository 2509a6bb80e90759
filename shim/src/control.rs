//! What containerd may ask of a container that exists: start, kill, exec, wait and the like. Each
//! request looks at the state under the pod's lock, asks the agent without it, and looks again.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    api::{DeleteResponse, ExecProcessRequest, StateResponse},
    events::task::{TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart},
    types::task::Status as TaskStatus,
};
use husk_proto::agent as api;
use protobuf::MessageField;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use ttrpc::{Code, context};

use crate::{
    args::is_identifier,
    events::{TaskEvent, timestamp},
    fault::Fault,
    pod::{ANSWER, DRAIN, Pod},
    process::{Exit, Process, UNKNOWN_STATUS},
    size::Demand,
    stdio::{self, Paths},
    vm::Vm,
};

/// Signals are 1 to 64 on Linux.
const LAST_SIGNAL: u32 = 64;

/// How often a process that was given up is tried to be killed, a second apart: on its way to its
/// program it has no pid for a while.
const CALL_OFF: u32 = 60;

/// A guest that answers nothing for so long to whoever would kill a container of it hangs.
const HUNG: Duration = Duration::from_secs(10);
/// For a guest that answers to end a container that was killed. Long enough for a slow disk to take
/// what a process was writing.
const KILL: Duration = Duration::from_secs(20);
/// Between two attempts to kill.
const AGAIN: Duration = Duration::from_secs(1);

/// Returns at the end of a process, or when it is forgotten.
async fn ended(exited: &mut watch::Receiver<Option<Exit>>) {
    let _ = exited.wait_for(Option::is_some).await;
}

/// Sees to it that a container which was killed ends, whatever the guest does and says: containerd
/// deletes none that has not ended. The guest gets some time and is reminded, as on its way to its
/// program a process cannot be killed; then it goes as a whole.
async fn see_killed(
    vm: Arc<Vm>,
    kill: api::SignalRequest,
    mut exited: watch::Receiver<Option<Exit>>,
) {
    let deadline = Instant::now() + KILL;
    while timeout(AGAIN, ended(&mut exited)).await.is_err() {
        let reminder = timeout(HUNG, vm.agent.signal(limited(), &kill));
        let hangs = tokio::select! {
            biased;
            () = ended(&mut exited) => return,
            answer = reminder => answer.is_err(),
        };
        if hangs || Instant::now() >= deadline {
            let (id, what) = (
                &kill.container_id,
                if hangs { "hangs" } else { "does not end" },
            );
            vm.fail(format!(
                "container {id} was killed, and {what} in the guest"
            ))
            .await;
            return;
        }
    }
}

/// Whether a request that failed so may be carried out all the same.
fn may_still_happen(error: &ttrpc::Error) -> bool {
    match error {
        ttrpc::Error::RpcStatus(status) => status.code() == Code::DEADLINE_EXCEEDED,
        _ => true,
    }
}

/// Sees to it that a process which containerd was told has not started does not run.
async fn call_off(vm: Arc<Vm>, start: api::StartRequest) {
    let request = api::SignalRequest {
        container_id: start.container_id,
        exec_id: start.exec_id,
        signal: libc::SIGKILL.unsigned_abs(),
        ..api::SignalRequest::default()
    };
    for _ in 0..CALL_OFF {
        match vm.agent.signal(limited(), &request).await {
            Ok(_) => return,
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => return,
            Err(_) if vm.has_ended() => return,
            Err(e) => log::debug!("kill a process that was given up: {e}"),
        }
        sleep(Duration::from_secs(1)).await;
    }
}

fn limited() -> context::Context {
    context::with_duration(ANSWER)
}

impl Pod {
    /// `Start` of the init (`""`) or an exec. Returns the pid that containerd is told. Hooks get `patience`.
    pub async fn start(
        self: &Arc<Self>,
        id: &str,
        exec: &str,
        patience: Duration,
    ) -> Result<u32, Fault> {
        let pid = self.start_process(id, exec).await?;
        if exec.is_empty() {
            self.run_poststart(id, patience).await?;
        }
        Ok(pid)
    }

    async fn start_process(self: &Arc<Self>, id: &str, exec: &str) -> Result<u32, Fault> {
        self.with(id, |container| {
            if !exec.is_empty() && container.init.exit().is_some() {
                return Err(Fault::precondition(format_args!(
                    "container {id} has ended"
                )));
            }
            if exec.is_empty() {
                container.timeline.mark("start");
            }
            container.process_mut(exec)?.start()
        })?;
        let request = api::StartRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..api::StartRequest::default()
        };
        let vm = self.running_vm();
        let looked = match &vm {
            Ok(vm) if exec.is_empty() => vm.look_for_network().await,
            _ => Ok(()),
        };
        let answer = match looked.and(vm) {
            Ok(vm) => match vm.agent.start(limited(), &request).await {
                Ok(_) => Ok(()),
                Err(e) => {
                    if may_still_happen(&e) {
                        tokio::spawn(call_off(vm.clone(), request));
                    }
                    let what = if exec.is_empty() {
                        "start the container"
                    } else {
                        "start the exec"
                    };
                    Err(self.explained(vm, Fault::of_call(what, e)).await)
                }
            },
            Err(fault) => Err(fault),
        };
        self.with(id, |container| {
            let pid = container.pid;
            let container_id = id.to_owned();
            if exec.is_empty() && answer.is_ok() {
                container.timeline.mark("started");
                log::info!(
                    "start of {id}, in ms since the shim: {}",
                    container.timeline
                );
                self.order_template();
                if let Some(vm) = self.vm() {
                    vm.forward_connections();
                }
            }
            if let Err(fault) = answer {
                self.publish(container.start_failed(exec)?);
                return Err(fault);
            }
            let early = container.process_mut(exec)?.started();
            self.publish([if exec.is_empty() {
                TaskEvent::Start(TaskStart {
                    container_id,
                    pid,
                    ..TaskStart::default()
                })
            } else {
                TaskEvent::ExecStarted(TaskExecStarted {
                    container_id,
                    exec_id: exec.to_owned(),
                    pid,
                    ..TaskExecStarted::default()
                })
            }]);
            if let Some(early) = early {
                self.publish(container.exited(exec, early));
            }
            Ok(pid)
        })
    }

    /// `Exec`: adds a process, not yet started.
    pub async fn exec(self: &Arc<Self>, request: ExecProcessRequest) -> Result<(), Fault> {
        let (id, exec) = (&request.id, &request.exec_id);
        if !is_identifier(exec) {
            return Err(Fault::invalid(format_args!(
                "exec_id {exec:?}: not an identifier"
            )));
        }
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        self.with(id, |container| {
            if container.init.exit().is_some() || container.init.is_creating() {
                return Err(Fault::precondition(format_args!(
                    "container {id} does not run"
                )));
            }
            if container.paused {
                // It would be frozen before its first step, and its start without an end.
                return Err(Fault::new(Code::UNKNOWN, "cannot exec in a paused state"));
            }
            if container.execs.contains_key(exec) {
                let message = format!("container {id} already has a process {exec}");
                return Err(Fault::new(Code::ALREADY_EXISTS, message));
            }
            container
                .execs
                .insert(exec.clone(), Process::creating(paths.clone()));
            Ok(())
        })?;
        let added = self.add_process(&request, &paths).await;
        self.with(id, |container| match added {
            Ok(streams) => {
                self.publish([TaskEvent::ExecAdded(TaskExecAdded {
                    container_id: id.clone(),
                    exec_id: exec.clone(),
                    ..TaskExecAdded::default()
                })]);
                if let Some(early) = container.process_mut(exec)?.created(streams) {
                    self.publish(container.exited(exec, early));
                }
                Ok(())
            }
            Err(fault) => {
                container.execs.remove(exec);
                Err(fault)
            }
        })
    }

    async fn add_process(
        &self,
        request: &ExecProcessRequest,
        paths: &Paths,
    ) -> Result<stdio::Streams, Fault> {
        let vm = self.running_vm()?;
        let opened = self.open_streams(paths, &request.exec_id).await?;
        let add = api::ExecRequest {
            container_id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            process: request.spec.value.clone(),
            stdio: MessageField::some(opened.ids),
            ..api::ExecRequest::default()
        };
        let (connected, added) = tokio::join!(
            vm.machine.connect_streams(opened.remote),
            vm.agent.exec(limited(), &add),
        );
        let added = added.map_err(|e| Fault::of_call("add the exec", e));
        match (connected, added) {
            (Ok(()), Ok(_)) => Ok(opened.streams),
            (_, Err(fault)) | (Err(fault), _) => Err(self.explained(vm, fault).await),
        }
    }

    /// `Delete` of an exec that has ended, or never ran.
    pub async fn delete_exec(&self, id: &str, exec: &str) -> Result<DeleteResponse, Fault> {
        let (pid, exit, streams) = self.with(id, |container| {
            let pid = container.pid;
            let process = container.process_mut(exec)?;
            let exit = match process.exit() {
                Some(exit) => exit,
                None if process.is_created() => {
                    process.start_failed();
                    Exit::now(UNKNOWN_STATUS)
                }
                None => {
                    let message = format!("process {exec} is running: kill it first");
                    return Err(Fault::precondition(message));
                }
            };
            Ok((pid, exit, std::mem::take(&mut process.streams)))
        })?;
        streams.drain(Instant::now() + DRAIN).await;
        if let Ok(vm) = self.running_vm() {
            let request = api::DeleteRequest {
                container_id: id.to_owned(),
                exec_id: exec.to_owned(),
                ..api::DeleteRequest::default()
            };
            if let Err(e) = vm.agent.delete(limited(), &request).await {
                let fault = Fault::of_call("delete the exec in the guest", e);
                if fault.code != Code::NOT_FOUND {
                    log::warn!("{fault}");
                }
            }
        }
        self.with(id, |container| {
            container.execs.remove(exec);
            Ok(())
        })?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    /// `Kill`. With `all`, every process of the container.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Result<(), Fault> {
        if !(1..=LAST_SIGNAL).contains(&signal) {
            return Err(Fault::invalid(format_args!(
                "signal {signal}: not 1 to {LAST_SIGNAL}"
            )));
        }
        let mut exited = self.with(id, |container| {
            let process = container.process(exec)?;
            if process.exit().is_some() {
                return Err(Fault::not_found("process already finished"));
            }
            if process.is_creating() {
                return Err(Fault::precondition("process is not created yet"));
            }
            Ok(process.subscribe())
        })?;
        let vm = self
            .running_vm()
            .map_err(|_| Fault::not_found("process already finished"))?;
        let request = api::SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..api::SignalRequest::default()
        };
        let is_final = exec.is_empty() && signal == libc::SIGKILL.unsigned_abs();
        if is_final {
            tokio::spawn(see_killed(vm.clone(), request.clone(), exited.clone()));
        }
        let answer = tokio::select! {
            biased;
            answer = vm.agent.signal(limited(), &request) => answer.map(drop),
            // Which is what was wanted: the guest need not say that it heard.
            () = ended(&mut exited), if is_final => Ok(()),
        };
        match answer {
            Ok(()) => Ok(()),
            Err(e) => {
                let fault = self
                    .explained(vm, Fault::of_call("send the signal", e))
                    .await;
                match is_final && vm.has_ended() {
                    true => Ok(()),
                    false => Err(fault),
                }
            }
        }
    }

    /// `Wait`: returns with the end of a process.
    pub async fn wait(&self, id: &str, exec: &str) -> Result<Exit, Fault> {
        let mut exited = self.with(id, |container| Ok(container.process(exec)?.subscribe()))?;
        let end = exited.wait_for(Option::is_some).await;
        match end.as_deref() {
            Ok(Some(exit)) => Ok(*exit),
            // Its creation failed.
            _ => Err(Fault::not_found(format_args!("container {id} is gone"))),
        }
    }

    pub fn state(&self, id: &str, exec: &str) -> Result<StateResponse, Fault> {
        self.with(id, |container| {
            let process = container.process(exec)?;
            let status = match process.status() {
                TaskStatus::RUNNING if container.paused => TaskStatus::PAUSED,
                status => status,
            };
            let exit = process.exit();
            Ok(StateResponse {
                id: id.to_owned(),
                bundle: container.bundle.clone(),
                pid: container.pid,
                status: status.into(),
                stdin: process.paths.stdin.clone(),
                stdout: process.paths.stdout.clone(),
                stderr: process.paths.stderr.clone(),
                terminal: process.paths.terminal,
                exit_status: exit.map_or(0, |exit| exit.status),
                exited_at: exit.map_or(MessageField::none(), |exit| timestamp(exit.at)),
                exec_id: exec.to_owned(),
                ..StateResponse::default()
            })
        })
    }

    /// `ResizePty`.
    pub async fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Result<(), Fault> {
        self.with(id, |container| {
            match container.process(exec)?.paths.terminal {
                true => Ok(()),
                false => Err(Fault::precondition("the process has no terminal")),
            }
        })?;
        let request = api::ResizePtyRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            columns,
            rows,
            ..api::ResizePtyRequest::default()
        };
        let answer = self
            .running_vm()?
            .agent
            .resize_pty(limited(), &request)
            .await;
        answer.map_err(|e| Fault::of_call("resize the terminal", e))?;
        Ok(())
    }

    /// `CloseIO` of stdin.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Result<(), Fault> {
        self.with(id, |container| {
            container.process_mut(exec)?.close_stdin();
            Ok(())
        })
    }

    /// `Pause`, or with `false` `Resume`.
    pub async fn set_paused(&self, id: &str, paused: bool) -> Result<(), Fault> {
        self.with(id, |container| {
            match (container.init.status(), container.paused) {
                (TaskStatus::RUNNING, was) if was != paused => Ok(()),
                _ if paused => Err(Fault::precondition("the container does not run")),
                _ => Err(Fault::precondition("the container is not paused")),
            }
        })?;
        let vm = self.running_vm()?;
        let container_id = id.to_owned();
        let (answer, what) = if paused {
            let request = api::PauseRequest {
                container_id: container_id.clone(),
                ..api::PauseRequest::default()
            };
            (
                vm.agent.pause(limited(), &request).await.map(drop),
                "pause the container",
            )
        } else {
            let request = api::ResumeRequest {
                container_id: container_id.clone(),
                ..api::ResumeRequest::default()
            };
            (
                vm.agent.resume(limited(), &request).await.map(drop),
                "resume the container",
            )
        };
        answer.map_err(|e| Fault::of_call(what, e))?;
        self.with(id, |container| {
            container.paused = paused;
            self.publish([if paused {
                TaskEvent::Paused(TaskPaused {
                    container_id,
                    ..TaskPaused::default()
                })
            } else {
                TaskEvent::Resumed(TaskResumed {
                    container_id,
                    ..TaskResumed::default()
                })
            }]);
            Ok(())
        })
    }

    /// `Update`: `resources` is an OCI `linux.resources` object as JSON.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<(), Fault> {
        self.with(id, |_| Ok(()))?;
        // The agent says what is wrong with it.
        let demand = serde_json::from_slice(&resources)
            .map(|resources| Demand::of_resources(&resources))
            .unwrap_or_default();
        let request = api::UpdateRequest {
            container_id: id.to_owned(),
            resources,
            ..api::UpdateRequest::default()
        };
        let vm = self.running_vm()?;
        let answer = vm.agent.update(limited(), &request).await;
        answer.map_err(|e| Fault::of_call("update the container", e))?;
        vm.note_limits(id, demand);
        Ok(())
    }

    /// The cgroup files of a container, for `Stats`.
    pub async fn stats(&self, id: &str) -> Result<api::StatsResponse, Fault> {
        self.with(id, |_| Ok(()))?;
        let request = api::StatsRequest {
            container_id: id.to_owned(),
            ..api::StatsRequest::default()
        };
        let answer = self.running_vm()?.agent.stats(limited(), &request).await;
        answer.map_err(|e| Fault::of_call("statistics of the container", e))
    }

    /// The pid that containerd takes for every process of the pod; 0 before there is one.
    pub fn host_pid(&self) -> u32 {
        self.vm().map_or(0, |vm| vm.pid)
    }
}
