//! containerd through Kubernetes' CRI, as a kubelet asks for pods and their containers.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result};
use husk_proto::cri as api;
use protobuf::{Message, MessageField};

use crate::{
    command::{PATIENCE, eventually},
    containerd,
    ctr::{IMAGE, fresh_id},
    grpc::{self, Status},
    streaming::{Forwarded, Streams},
};

/// containerd's namespace for what comes through CRI.
pub const NAMESPACE: &str = "k8s.io";
/// Where the pods of the tests are, as `husk template build` has it: containerd's namespace, and Kubernetes'.
pub const PODS: &str = "k8s.io/default";

/// What containerd is configured to begin pods with.
const PAUSE: &str = "docker.io/library/husk-pause:latest";

/// How a pod is run: the handler's name of a RuntimeClass, as the lab's containerd is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// husk, whose pods begin with a pause container.
    Husk,
    /// husk by the sandbox API (containerd 2.1).
    HuskShim,
    Runc,
}

impl Handler {
    pub fn name(self) -> &'static str {
        match self {
            Handler::Husk => "husk",
            Handler::HuskShim => "husk-shim",
            Handler::Runc => "runc",
        }
    }
}

/// Asks, and says what came of it.
pub fn ask<A: Message>(method: &str, request: &impl Message) -> Result<A> {
    let socket = Path::new(containerd::SOCKET);
    grpc::call(socket, "runtime.v1.RuntimeService", method, request)
}

/// Asks what must be answered.
#[track_caller]
pub fn get<A: Message>(method: &str, request: &impl Message) -> A {
    ask(method, request).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Asks what must be refused: the server's words.
#[track_caller]
pub fn refused(method: &str, request: &impl Message) -> Status {
    let answer = ask::<api::Empty>(method, request);
    let error = answer.err().unwrap_or_else(|| panic!("{method} was done"));
    error.downcast().unwrap_or_else(|error| panic!("{error:#}"))
}

/// A pod that a test asked for; stopped and removed when dropped.
pub struct Pod {
    pub id: String,
    pub config: api::PodSandboxConfig,
}

/// What a kubelet would say of a pod without wishes.
pub fn pod_config(name: &str) -> api::PodSandboxConfig {
    let logs = format!("/var/log/pods/{name}");
    api::PodSandboxConfig {
        metadata: MessageField::some(api::PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "default".into(),
            ..Default::default()
        }),
        hostname: "a-pod".into(),
        log_directory: logs,
        dns_config: MessageField::some(api::DNSConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["default.svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
            ..Default::default()
        }),
        linux: MessageField::some(api::LinuxPodSandboxConfig {
            cgroup_parent: format!("/kubepods/{name}"),
            security_context: MessageField::some(api::LinuxSandboxSecurityContext {
                namespace_options: MessageField::some(api::NamespaceOption {
                    pid: api::NamespaceMode::CONTAINER.into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

impl Pod {
    /// A pod as most are.
    #[track_caller]
    pub fn run(handler: Handler) -> Self {
        Self::with(handler, |_| {})
    }

    /// A pod with wishes.
    #[track_caller]
    pub fn with(handler: Handler, wishes: impl FnOnce(&mut api::PodSandboxConfig)) -> Self {
        let mut config = pod_config(&fresh_id("pod"));
        wishes(&mut config);
        Self::of(handler, config).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// A pod with this configuration, if it can be had. Its cgroup and logs are made before, as a kubelet does.
    pub fn of(handler: Handler, config: api::PodSandboxConfig) -> Result<Self> {
        fs::create_dir_all(&config.log_directory)?;
        make_cgroup(&config.linux.cgroup_parent)?;
        let request = api::RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: handler.name().into(),
            ..Default::default()
        };
        let answer = ask::<api::RunPodSandboxResponse>("RunPodSandbox", &request);
        match answer {
            Ok(answer) => Ok(Self {
                id: answer.pod_sandbox_id,
                config,
            }),
            Err(error) => {
                forget(&config);
                Err(error)
            }
        }
    }

    #[track_caller]
    pub fn status(&self) -> api::PodSandboxStatus {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer: api::PodSandboxStatusResponse = get("PodSandboxStatus", &request);
        answer.status.unwrap_or_default()
    }

    pub fn is_ready(&self) -> bool {
        self.status().state == api::PodSandboxState::SANDBOX_READY.into()
    }

    /// The address that the network gave it.
    #[track_caller]
    pub fn ip(&self) -> String {
        self.status().network.ip.clone()
    }

    pub fn stop(&self) -> Result<()> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        ask::<api::Empty>("StopPodSandbox", &request).map(drop)
    }

    /// Also of one that runs: it is stopped then.
    pub fn remove(&self) -> Result<()> {
        let removed = remove_pod(&self.id);
        forget(&self.config);
        removed
    }

    /// Its end, in order, which must succeed.
    #[track_caller]
    pub fn end(self) {
        self.stop().unwrap_or_else(|error| panic!("{error:#}"));
        self.remove().unwrap_or_else(|error| panic!("{error:#}"));
        std::mem::forget(self);
    }

    /// Where a port of its localhost can be had.
    #[track_caller]
    pub fn forward(&self, port: u16) -> Forwarded {
        let request = api::PortForwardRequest {
            pod_sandbox_id: self.id.clone(),
            port: vec![port.into()],
            ..Default::default()
        };
        let answer: api::StreamingResponse = get("PortForward", &request);
        Forwarded::open(&answer.url, port).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// A container of the demo image that runs these words, not yet created.
    pub fn container(&self, words: &[&str]) -> api::ContainerConfig {
        let name = fresh_id("container");
        api::ContainerConfig {
            log_path: format!("{name}.log"),
            metadata: MessageField::some(api::ContainerMetadata {
                name,
                ..Default::default()
            }),
            image: MessageField::some(api::ImageSpec {
                image: IMAGE.into(),
                ..Default::default()
            }),
            command: words.iter().map(|word| (*word).to_owned()).collect(),
            linux: MessageField::some(api::LinuxContainerConfig {
                security_context: MessageField::some(api::LinuxContainerSecurityContext {
                    namespace_options: self.config.linux.security_context.namespace_options.clone(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Created, if it can be.
    pub fn create(&self, config: api::ContainerConfig) -> Result<Container> {
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config.clone()),
            sandbox_config: MessageField::some(self.config.clone()),
            ..Default::default()
        };
        let answer: api::CreateContainerResponse = ask("CreateContainer", &request)?;
        Ok(Container {
            id: answer.container_id,
            log: Path::new(&self.config.log_directory).join(config.log_path),
        })
    }

    /// Created and started.
    #[track_caller]
    pub fn start(&self, config: api::ContainerConfig) -> Container {
        let created = self.create(config);
        let container = created.unwrap_or_else(|error| panic!("{error:#}"));
        container
            .start()
            .unwrap_or_else(|error| panic!("{error:#}"));
        container
    }

    /// One that stays.
    #[track_caller]
    pub fn idle(&self) -> Container {
        self.start(self.container(&["sleep", "86400"]))
    }

    /// What a container with these words prints, and its end.
    #[track_caller]
    pub fn try_words(&self, words: &[&str]) -> String {
        let container = self.start(self.container(words));
        assert_eq!(container.exit_code(), 0, "{}", container.logs());
        let logs = container.logs();
        container
            .remove()
            .unwrap_or_else(|error| panic!("{error:#}"));
        logs
    }

    #[track_caller]
    pub fn stats(&self) -> api::LinuxPodSandboxStats {
        let request = api::PodSandboxStatsRequest {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let answer: api::PodSandboxStatsResponse = get("PodSandboxStats", &request);
        answer.stats.linux.clone().unwrap_or_default()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.stop();
        let _ = self.remove();
    }
}

/// A container of a pod, which ends it.
pub struct Container {
    pub id: String,
    log: PathBuf,
}

impl Container {
    pub fn start(&self) -> Result<()> {
        let request = api::StartContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        ask::<api::Empty>("StartContainer", &request).map(drop)
    }

    /// SIGTERM, and SIGKILL after so many seconds.
    pub fn stop(&self, timeout: i64) -> Result<()> {
        let request = api::StopContainerRequest {
            container_id: self.id.clone(),
            timeout,
            ..Default::default()
        };
        ask::<api::Empty>("StopContainer", &request).map(drop)
    }

    pub fn remove(&self) -> Result<()> {
        let request = api::RemoveContainerRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        ask::<api::Empty>("RemoveContainer", &request).map(drop)
    }

    #[track_caller]
    pub fn status(&self) -> api::ContainerStatus {
        let request = api::ContainerStatusRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let answer: api::ContainerStatusResponse = get("ContainerStatus", &request);
        answer.status.unwrap_or_default()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn exit_code(&self) -> i32 {
        let exited = api::ContainerState::CONTAINER_EXITED.into();
        let ended = eventually(Instant::now() + PATIENCE, || {
            let status = self.status();
            (status.state == exited).then_some(status.exit_code)
        });
        ended.unwrap_or_else(|| panic!("{} runs on after {PATIENCE:?}", self.id))
    }

    /// What it has printed so far, as the kubelet takes it from CRI's log: without times, and both streams in one.
    pub fn logs(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let mut logs = String::new();
        for line in text.lines() {
            // 2026-11-22T03:00:00.0Z stdout F words, where P stands for a line that goes on.
            let mut fields = line.splitn(4, ' ').skip(2);
            let tag = fields.next().unwrap_or_default();
            logs.push_str(fields.next().unwrap_or_default());
            if tag == "F" {
                logs.push('\n');
            }
        }
        logs
    }

    /// Its log as containerd wrote it.
    pub fn raw_log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    #[track_caller]
    pub fn exec(&self, words: &[&str]) -> api::ExecSyncResponse {
        let request = api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: words.iter().map(|word| (*word).to_owned()).collect(),
            ..Default::default()
        };
        get("ExecSync", &request)
    }

    /// A process in it, connected with us.
    #[track_caller]
    pub fn exec_streams(&self, words: &[&str], wanted: Wanted) -> Streams {
        let request = api::ExecRequest {
            container_id: self.id.clone(),
            cmd: words.iter().map(|word| (*word).to_owned()).collect(),
            tty: wanted.tty,
            stdin: true,
            stdout: true,
            stderr: wanted.stderr,
            ..Default::default()
        };
        streams(&get("Exec", &request))
    }

    /// Its own streams.
    #[track_caller]
    pub fn attach(&self, wanted: Wanted) -> Streams {
        let request = api::AttachRequest {
            container_id: self.id.clone(),
            tty: wanted.tty,
            stdin: true,
            stdout: true,
            stderr: wanted.stderr,
            ..Default::default()
        };
        streams(&get("Attach", &request))
    }

    /// What an exec prints that must succeed.
    #[track_caller]
    pub fn try_exec(&self, words: &[&str]) -> String {
        let answer = self.exec(words);
        let (out, err) = (
            String::from_utf8_lossy(&answer.stdout),
            String::from_utf8_lossy(&answer.stderr),
        );
        assert_eq!(answer.exit_code, 0, "{words:?}: {out}{err}");
        out.into_owned()
    }

    pub fn update(&self, resources: api::LinuxContainerResources) -> Result<()> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: self.id.clone(),
            linux: MessageField::some(resources),
            ..Default::default()
        };
        ask::<api::Empty>("UpdateContainerResources", &request).map(drop)
    }

    #[track_caller]
    pub fn stats(&self) -> api::ContainerStats {
        let request = api::ContainerStatsRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        let answer: api::ContainerStatsResponse = get("ContainerStats", &request);
        answer.stats.unwrap_or_default()
    }
}

#[track_caller]
fn streams(answer: &api::StreamingResponse) -> Streams {
    Streams::open(&answer.url).unwrap_or_else(|error| panic!("{error:#}"))
}

/// Which streams a process is asked for, beside stdin and stdout.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    tty: bool,
    stderr: bool,
}

impl Wanted {
    pub const STREAMS: Self = Self {
        tty: false,
        stderr: true,
    };
    /// A terminal has one stream for both.
    pub const TERMINAL: Self = Self {
        tty: true,
        stderr: false,
    };
}

/// Returns once CRI answers: containerd's socket is there before it.
pub(crate) fn wait_until_served() -> Result<()> {
    let request = api::ListPodSandboxRequest::default();
    let mut answer = None;
    let served = eventually(Instant::now() + PATIENCE, || {
        let asked = ask::<api::ListPodSandboxResponse>("ListPodSandbox", &request);
        answer.insert(asked).is_ok().then_some(())
    });
    match (served, answer) {
        (None, Some(Err(error))) => Err(error).context("CRI is not served"),
        _ => Ok(()),
    }
}

/// Returns once CRI knows the images of pods: it hears of what is imported a moment later.
pub(crate) fn wait_for_images() -> Result<()> {
    for image in [IMAGE, PAUSE] {
        let request = api::ImageStatusRequest {
            image: MessageField::some(api::ImageSpec {
                image: image.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let known = eventually(Instant::now() + PATIENCE, || {
            let socket = Path::new(containerd::SOCKET);
            let service = "runtime.v1.ImageService";
            let answer = grpc::call(socket, service, "ImageStatus", &request);
            let known = |answer: api::ImageStatusResponse| answer.image.is_some();
            answer.is_ok_and(known).then_some(())
        });
        known.with_context(|| format!("CRI does not know {image} after {PATIENCE:?}"))?;
    }
    Ok(())
}

/// Removes a pod by its id, whatever it is at.
pub fn remove_pod(id: &str) -> Result<()> {
    let request = api::RemovePodSandboxRequest {
        pod_sandbox_id: id.into(),
        ..Default::default()
    };
    ask::<api::Empty>("RemovePodSandbox", &request).map(drop)
}

/// Every pod that containerd knows of, by its id, and whether it is ready.
#[track_caller]
pub fn pods() -> HashMap<String, bool> {
    let answer: api::ListPodSandboxResponse =
        get("ListPodSandbox", &api::ListPodSandboxRequest::default());
    let ready = api::PodSandboxState::SANDBOX_READY.into();
    let pods = answer.items.into_iter();
    pods.map(|pod| (pod.id, pod.state == ready)).collect()
}

/// As a kubelet makes the cgroup of a pod before it asks for it, with the controllers that it has itself.
fn make_cgroup(parent: &str) -> Result<()> {
    let mut path = PathBuf::from("/sys/fs/cgroup");
    for name in parent.split('/').filter(|name| !name.is_empty()) {
        path.push(name);
        if !path.is_dir() {
            fs::create_dir(&path)?;
        }
        let controllers = fs::read_to_string(path.join("cgroup.controllers"))?;
        for controller in controllers.split_whitespace() {
            fs::write(
                path.join("cgroup.subtree_control"),
                format!("+{controller}"),
            )?;
        }
    }
    Ok(())
}

/// What a kubelet removes after a pod.
fn forget(config: &api::PodSandboxConfig) {
    let _ = fs::remove_dir_all(&config.log_directory);
    let cgroup = config.linux.cgroup_parent.trim_start_matches('/');
    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(cgroup));
}
