//! containerd's task service, versions 2 and 3: the same methods and messages under two names, from
//! one implementation. It translates; what happens is in `pod` and `control`.
//!
//! Every method is spelled out, as the generated defaults answer NOT_FOUND where containerd's
//! fallbacks look for UNIMPLEMENTED. A request that changes something runs in a task of its own:
//! when containerd goes away in the middle, it is carried to its end all the same.

use std::{collections::HashMap, future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::{Task, create_task},
};
use protobuf::{MessageField, well_known_types::empty::Empty};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::{events::timestamp, fault::Fault, hooks, pod::Pod, stats};

struct TaskService(Arc<Pod>);

/// The service under both of its names.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let mut services = HashMap::new();
    for name in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let service = create_task(Arc::new(TaskService(pod.clone())));
        services.extend(
            service
                .into_values()
                .map(|methods| (name.to_owned(), methods)),
        );
    }
    services
}

/// Carries a request to its end, whether or not anybody still waits for the answer.
pub(crate) async fn carry<T: Send + 'static>(
    request: &'static str,
    work: impl Future<Output = Result<T, Fault>> + Send + 'static,
) -> ttrpc::Result<T> {
    let outcome = tokio::spawn(work).await;
    let outcome = outcome.unwrap_or_else(|e| Err(Fault::internal(e)));
    if let Err(fault) = &outcome {
        log::warn!("{request}: {fault}");
    }
    Ok(outcome?)
}

/// How long hooks may take: as long as whoever asks waits for the answer.
pub(crate) fn patience(context: &TtrpcContext) -> Duration {
    match u64::try_from(context.timeout_nano) {
        Ok(nanoseconds @ 1..) => Duration::from_nanos(nanoseconds).min(hooks::PATIENCE),
        _ => hooks::PATIENCE,
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> ttrpc::Result<StateResponse> {
        Ok(self.0.state(&r.id, &r.exec_id)?)
    }

    async fn create(
        &self,
        context: &TtrpcContext,
        r: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pod = self.0.clone();
        let patience = patience(context);
        let pid = carry("create", async move { pod.create(r, patience).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, context: &TtrpcContext, r: StartRequest) -> ttrpc::Result<StartResponse> {
        let pod = self.0.clone();
        let patience = patience(context);
        let pid = carry("start", async move {
            pod.start(&r.id, &r.exec_id, patience).await
        })
        .await?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn delete(
        &self,
        context: &TtrpcContext,
        r: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let pod = self.0.clone();
        let patience = patience(context);
        carry("delete", async move {
            match r.exec_id.as_str() {
                "" => pod.delete(&r.id, patience).await,
                exec => pod.delete_exec(&r.id, exec).await,
            }
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> ttrpc::Result<PidsResponse> {
        // Never empty for a container that exists: containerd would take it for leaked.
        let pid = self.0.with(&r.id, |container| Ok(container.pid))?;
        Ok(PidsResponse {
            processes: vec![ProcessInfo {
                pid,
                ..ProcessInfo::default()
            }],
            ..PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> ttrpc::Result<Empty> {
        let pod = self.0.clone();
        carry("pause", async move { pod.set_paused(&r.id, true).await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> ttrpc::Result<Empty> {
        let pod = self.0.clone();
        carry("resume", async move { pod.set_paused(&r.id, false).await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(Fault::unimplemented("checkpoint: husk cannot save processes").into())
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> ttrpc::Result<Empty> {
        let pod = self.0.clone();
        carry("kill", async move {
            pod.kill(&r.id, &r.exec_id, r.signal, r.all).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let pod = self.0.clone();
        carry("exec", async move { pod.exec(r).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> ttrpc::Result<Empty> {
        self.0.resize(&r.id, &r.exec_id, r.width, r.height).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> ttrpc::Result<Empty> {
        if r.stdin {
            self.0.close_stdin(&r.id, &r.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = self.0.clone();
        let resources = r.resources.value.clone();
        carry("update", async move { pod.update(&r.id, resources).await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let exit = self.0.wait(&r.id, &r.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let answer = self.0.stats(&r.id).await?;
        Ok(StatsResponse {
            stats: MessageField::some(stats::to_any(&answer.files)?),
            ..StatsResponse::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Also for ids we do not know: it is asked of a shim before anything exists in it.
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.0.host_pid(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        let pod = self.0.clone();
        if carry("shutdown", async move { Ok(pod.shutdown().await) }).await? {
            self.0.over.notify_one();
        }
        Ok(Empty::new())
    }
}
