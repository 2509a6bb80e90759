//! The agent contract as ttrpc wants it: each request to its owner, and nothing else.
//!
//! Every method is implemented; none decides anything. What takes long is a task of the pod's, so a
//! request that is given up never leaves work half done.

use std::sync::Arc;

use async_trait::async_trait;
use husk_proto::agent::*;
use husk_proto::agent_ttrpc::Agent;
use ttrpc::r#async::{ServerStreamSender, TtrpcContext};

use crate::events::Events;
use crate::fault::Fault;
use crate::grow::Size;
use crate::identity;
use crate::pod::Door;
use crate::spec;

pub struct Service {
    pub door: Door,
    pub events: Arc<Events>,
}

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> Answer<HelloResponse> {
        identity::assume(request.wall_clock_ns, &request.entropy, &request.hostname)?;
        Ok(HelloResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            ..HelloResponse::default()
        })
    }

    async fn grow(&self, _: &TtrpcContext, request: GrowRequest) -> Answer<GrowResponse> {
        let size = Size {
            memory_start: request.memory_start,
            memory_bytes: request.memory_bytes,
            vcpus: request.vcpus,
        };
        self.door
            .ask(move |pod| async move { pod.grow(size).await })
            .await?;
        Ok(GrowResponse::default())
    }

    async fn prepare(&self, _: &TtrpcContext, request: PrepareRequest) -> Answer<PrepareResponse> {
        self.door
            .ask(move |pod| async move { pod.rehearse(request.leave).await })
            .await?;
        Ok(PrepareResponse::default())
    }

    async fn set_clock(
        &self,
        _: &TtrpcContext,
        request: SetClockRequest,
    ) -> Answer<SetClockResponse> {
        identity::follow(request.wall_clock_ns, request.at_once)?;
        Ok(SetClockResponse::default())
    }

    async fn set_network(
        &self,
        _: &TtrpcContext,
        request: SetNetworkRequest,
    ) -> Answer<SetNetworkResponse> {
        self.door
            .ask(move |pod| async move { pod.set_network(request).await })
            .await?;
        Ok(SetNetworkResponse::default())
    }

    async fn dial(&self, _: &TtrpcContext, request: DialRequest) -> Answer<DialResponse> {
        self.door
            .ask(move |pod| async move { pod.dial(&request).await })
            .await?;
        Ok(DialResponse::default())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: EventsRequest,
        stream: ServerStreamSender<Event>,
    ) -> Answer<()> {
        let listener = self.events.listen();
        while let Some(event) = listener.next().await {
            stream.send(&event).await?;
            listener.taken();
        }
        Ok(())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<CreateContainerResponse> {
        let create = move |pod: std::rc::Rc<crate::pod::Pod>| async move {
            let stdio = request.stdio.unwrap_or_default();
            pod.create(&request.container_id, &request.spec, &stdio)
                .await
        };
        let pid = self.door.ask(create).await?;
        Ok(CreateContainerResponse {
            pid,
            ..CreateContainerResponse::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> Answer<ExecResponse> {
        self.door
            .ask(move |pod| async move {
                let container = pod.container(&request.container_id)?;
                if request.exec_id.is_empty() {
                    return Err(Fault::Invalid("exec_id: is empty".into()));
                }
                let process: spec::process::Process = spec::parse(&request.process)?;
                process.validate("")?;
                container
                    .exec(
                        &request.exec_id,
                        process,
                        &request.stdio.unwrap_or_default(),
                    )
                    .await
            })
            .await?;
        Ok(ExecResponse::default())
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let pid = self
            .door
            .ask(move |pod| async move {
                pod.container(&request.container_id)?
                    .start(&request.exec_id)
                    .await
            })
            .await?;
        Ok(StartResponse {
            pid,
            ..StartResponse::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Answer<SignalResponse> {
        self.door
            .ask(move |pod| async move {
                let container = pod.container(&request.container_id)?;
                container
                    .signal(&request.exec_id, request.signal, request.all)
                    .await
            })
            .await?;
        Ok(SignalResponse::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> Answer<ResizePtyResponse> {
        self.door
            .ask(move |pod| async move {
                let container = pod.container(&request.container_id)?;
                container.resize(&request.exec_id, request.columns, request.rows)
            })
            .await?;
        Ok(ResizePtyResponse::default())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        self.door
            .ask(
                move |pod| async move { pod.delete(&request.container_id, &request.exec_id).await },
            )
            .await?;
        Ok(DeleteResponse::default())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<PauseResponse> {
        self.door
            .ask(move |pod| async move { pod.container(&request.container_id)?.pause(true).await })
            .await?;
        Ok(PauseResponse::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<ResumeResponse> {
        self.door
            .ask(move |pod| async move { pod.container(&request.container_id)?.pause(false).await })
            .await?;
        Ok(ResumeResponse::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> Answer<UpdateResponse> {
        self.door
            .ask(move |pod| async move {
                let container = pod.container(&request.container_id)?;
                container.update(spec::parse(&request.resources)?).await
            })
            .await?;
        Ok(UpdateResponse::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let files = self
            .door
            .ask(move |pod| async move { pod.container(&request.container_id)?.statistics().await })
            .await?;
        Ok(StatsResponse {
            files,
            ..StatsResponse::default()
        })
    }
}
