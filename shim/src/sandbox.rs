//! containerd's sandbox service: a pod without a pause container. What holds its namespaces is a container of the guest's own
//! ([`husk_proto::PAUSE_ROOT`]) under the sandbox's id, of which containerd hears nothing but the sandbox's state; everything
//! else of it goes the way of any container. Its specification comes from what Kubernetes says of the pod, see `pod_config`.
//!
//! Stopped, the sandbox's guest ends with its last container; the shim stays to say so until it is told to shut down.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    sync::{Arc, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::CreateTaskRequest,
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::{Sandbox as SandboxApi, create_sandbox},
    types::platform::Platform,
};
use husk_proto::cri::PodSandboxConfig;
use protobuf::{Message, MessageField};
use tokio::time::timeout;
use ttrpc::{
    Code,
    r#async::{Service, TtrpcContext},
};

use crate::{
    cgroup,
    events::timestamp,
    fault::Fault,
    pod::Pod,
    pod_config::{self, SharedFile},
    process::Exit,
    stats,
    task::{carry, patience},
};

/// CRI's names of a sandbox's states.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// The message that says what a pod shall be like, by the end of its type's name.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";
/// For a sandbox to stop where its client does not say.
const STOP: Duration = Duration::from_secs(60);

/// What is known of a sandbox beside its container.
pub(crate) struct Sandbox {
    created: SystemTime,
    files: Vec<SharedFile>,
    /// Once its container is deleted.
    exit: Option<Exit>,
}

struct SandboxService(Arc<Pod>);

/// The service under its name.
pub fn services(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService(pod.clone())))
}

impl Pod {
    pub(crate) fn sandbox(&self) -> MutexGuard<'_, Option<Sandbox>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `id` is a sandbox that is served here, and so no task of containerd's.
    pub(crate) fn is_sandbox(&self, id: &str) -> bool {
        id == self.identity.id && self.sandbox().is_some()
    }

    /// The files that the containers of a sandbox share; none where containerd sees to them.
    pub(crate) fn shared_files(&self) -> Option<Vec<SharedFile>> {
        Some(self.sandbox().as_ref()?.files.clone())
    }

    fn check(&self, id: &str) -> Result<(), Fault> {
        match self.is_sandbox(id) {
            true => Ok(()),
            false => Err(Fault::not_found(format_args!("no sandbox {id}"))),
        }
    }

    async fn create_sandbox(
        self: &Arc<Self>,
        request: CreateSandboxRequest,
        patience: Duration,
    ) -> Result<(), Fault> {
        let id = &request.sandbox_id;
        if *id != self.identity.id {
            let own = &self.identity.id;
            let message = format!("sandbox_id {id:?}: this is the shim of {own}");
            return Err(Fault::invalid(message));
        }
        if !request.rootfs.is_empty() {
            return Err(Fault::invalid("rootfs: husk's sandboxes have none"));
        }
        let mut config = PodSandboxConfig::default();
        if let Some(options) = request.options.as_ref() {
            if !options.type_url.ends_with(CONFIG) {
                let found = &options.type_url;
                let message = format!("options of type {found:?}: husk takes {CONFIG}");
                return Err(Fault::invalid(message));
            }
            config = PodSandboxConfig::parse_from_bytes(&options.value)
                .map_err(|e| Fault::invalid(format_args!("options: {CONFIG}: {e}")))?;
        }
        config.annotations.extend(request.annotations);
        let spec =
            pod_config::specification(id, &config, &request.netns_path).map_err(Fault::invalid)?;
        let bundle = Path::new(&request.bundle_path);
        let files = pod_config::share_files(bundle, &config).map_err(Fault::internal)?;
        fs::write(bundle.join("config.json"), spec.to_string())
            .map_err(|e| Fault::internal(format_args!("write the sandbox's config.json: {e}")))?;
        {
            let mut sandbox = self.sandbox();
            if sandbox.is_some() {
                let message = format!("sandbox {id} already exists");
                return Err(Fault::new(Code::ALREADY_EXISTS, message));
            }
            *sandbox = Some(Sandbox {
                created: SystemTime::now(),
                files,
                exit: None,
            });
        }
        let create = CreateTaskRequest {
            id: id.clone(),
            bundle: request.bundle_path.clone(),
            ..CreateTaskRequest::default()
        };
        let options = self.told.clone().unwrap_or_default();
        let created = self.create_with(create, options, patience).await;
        if created.is_err() {
            *self.sandbox() = None;
        }
        created.map(drop)
    }

    async fn start_sandbox(
        self: &Arc<Self>,
        id: &str,
        patience: Duration,
    ) -> Result<StartSandboxResponse, Fault> {
        self.check(id)?;
        let pid = self.start(id, "", patience).await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: self.sandbox_created(),
            ..StartSandboxResponse::default()
        })
    }

    fn sandbox_created(&self) -> MessageField<protobuf::well_known_types::timestamp::Timestamp> {
        let sandbox = self.sandbox();
        let created = sandbox.as_ref().map(|sandbox| sandbox.created);
        created.map_or(MessageField::none(), timestamp)
    }

    /// Ends the sandbox's container and takes it out of the guest. One that is stopped already stays so.
    async fn stop_sandbox(self: &Arc<Self>, id: &str, limit: Duration) -> Result<(), Fault> {
        self.check(id)?;
        let Ok(mut exited) = self.with(id, |container| Ok(container.init.subscribe())) else {
            return Ok(());
        };
        let killed = self.kill(id, "", libc::SIGKILL.unsigned_abs(), true).await;
        match timeout(limit, exited.wait_for(Option::is_some)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Ok(()),
            Err(_) => {
                killed?;
                let message = format!("sandbox {id} does not end within {limit:?}");
                return Err(Fault::new(Code::DEADLINE_EXCEEDED, message));
            }
        }
        let exit = self.with(id, |container| Ok(container.init.exit()))?;
        if let Some(sandbox) = self.sandbox().as_mut() {
            sandbox.exit = sandbox.exit.or(exit);
        }
        match self.delete(id, limit).await {
            Err(fault) if fault.code != Code::NOT_FOUND => Err(fault),
            _ => Ok(()),
        }
    }

    /// The sandbox's end, if it has come.
    fn sandbox_exit(&self, id: &str) -> Option<Exit> {
        let kept = self.sandbox().as_ref().and_then(|sandbox| sandbox.exit);
        let own = || {
            self.with(id, |container| Ok(container.init.exit()))
                .ok()
                .flatten()
        };
        kept.or_else(own)
    }

    async fn wait_sandbox(&self, id: &str) -> Result<Exit, Fault> {
        self.check(id)?;
        match self.sandbox_exit(id) {
            Some(exit) => Ok(exit),
            None => self.wait(id, "").await,
        }
    }

    fn sandbox_status(&self, id: &str) -> Result<SandboxStatusResponse, Fault> {
        self.check(id)?;
        let exit = self.sandbox_exit(id);
        let active = self.with(id, |container| {
            Ok((container.init.is_active(), container.pid))
        });
        let (active, pid) = active.unwrap_or_default();
        let ready = active && self.running_vm().is_ok();
        Ok(SandboxStatusResponse {
            sandbox_id: id.to_owned(),
            pid,
            state: if ready { READY } else { NOT_READY }.to_owned(),
            created_at: self.sandbox_created(),
            exited_at: exit.map_or(MessageField::none(), |exit| timestamp(exit.at)),
            ..SandboxStatusResponse::default()
        })
    }

    async fn shutdown_sandbox(self: &Arc<Self>, id: &str) -> Result<(), Fault> {
        if self.is_sandbox(id) {
            self.stop_sandbox(id, STOP).await?;
            *self.sandbox() = None;
        }
        match self.shutdown().await {
            true => Ok(()),
            false => Err(Fault::precondition(format_args!(
                "sandbox {id} has containers: delete them first"
            ))),
        }
    }

    /// What the pod takes of the host: its VMM's cgroup.
    fn sandbox_metrics(&self, id: &str) -> Result<SandboxMetricsResponse, Fault> {
        self.check(id)?;
        let vm = self.running_vm()?;
        let path = vm.cgroup().ok_or_else(|| {
            Fault::unimplemented("metrics of a sandbox: this host has no cgroup v2")
        })?;
        let mut answer = SandboxMetricsResponse::default();
        let metrics = answer.metrics.mut_or_insert_default();
        metrics.timestamp = timestamp(SystemTime::now());
        metrics.id = id.to_owned();
        metrics.data = MessageField::some(stats::to_any(&cgroup::files(path))?);
        Ok(answer)
    }
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        context: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let pod = self.0.clone();
        let patience = patience(context);
        carry("create the sandbox", async move {
            pod.create_sandbox(r, patience).await
        })
        .await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        context: &TtrpcContext,
        r: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let pod = self.0.clone();
        let patience = patience(context);
        carry("start the sandbox", async move {
            pod.start_sandbox(&r.sandbox_id, patience).await
        })
        .await
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        _: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        Ok(PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".into(),
                architecture: "amd64".into(),
                ..Platform::default()
            }),
            ..PlatformResponse::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let pod = self.0.clone();
        let limit = match r.timeout_secs {
            0 => STOP,
            seconds => Duration::from_secs(seconds.into()).min(STOP),
        };
        carry("stop the sandbox", async move {
            pod.stop_sandbox(&r.sandbox_id, limit).await
        })
        .await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let exit = self.0.wait_sandbox(&r.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        Ok(self.0.sandbox_status(&r.sandbox_id)?)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, r: PingRequest) -> ttrpc::Result<PingResponse> {
        self.0.check(&r.sandbox_id)?;
        self.0.running_vm()?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let pod = self.0.clone();
        carry("shut the sandbox down", async move {
            pod.shutdown_sandbox(&r.sandbox_id).await
        })
        .await?;
        // The shim goes a moment later by itself: containerd takes an answer whose connection ends with it for none, now and
        // then, and of this one it wants to know.
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        Ok(self.0.sandbox_metrics(&r.sandbox_id)?)
    }
}
