//! The pod: one microVM and the containers in it, from the first `Create` to `Shutdown`.
//!
//! What containerd may ask of a container that exists is in `control`, its end in `ending`. State is behind one lock,
//! which is taken for lines and never across a wait; events are queued under it, so containerd hears
//! of things in the order in which they became true here.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO, TaskOOM},
};
use husk_proto::agent as api;
use protobuf::MessageField;
use tokio::{
    sync::{Notify, OnceCell, mpsc},
    task::JoinHandle,
    time::{sleep, timeout},
};
use ttrpc::{Code, context};

use crate::{
    ahead::Ahead,
    args::is_identifier,
    cgroup,
    config::{CONFIG, Config, Sharing},
    container::Container,
    events::{Publisher, TaskEvent},
    fault::Fault,
    identity,
    launch::{Launched, Setup, launch},
    log_program::Owner,
    options::Options,
    pod_config,
    process::{Exit, Process},
    sandbox::Sandbox,
    shares,
    spec::{self, Plan, Running},
    stdio::{self, Opened, Paths},
    templates::{Ingredients, Scope, background},
    timeline::Timeline,
    vm::{GuestEvent, Vm},
};

/// For the agent to answer anything.
pub const ANSWER: Duration = Duration::from_secs(60);
/// Output may take this long to be read once its process has ended (as with runc).
pub(crate) const DRAIN: Duration = Duration::from_secs(10);
/// Execs get this long to end after their init.
const STRAGGLERS: Duration = Duration::from_secs(5);

/// Who this pod is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub namespace: String,
    /// The group's id, which is its first container's.
    pub id: String,
    /// Our own socket.
    pub socket: PathBuf,
    /// When the shim was executed, nanoseconds of CLOCK_MONOTONIC.
    pub since_ns: u64,
}

/// The containers of a pod.
#[derive(Default)]
pub(crate) struct Containers {
    pub(crate) by_id: HashMap<String, Container>,
    /// The pod's end is decided: none is created any more.
    pub(crate) closed: bool,
}

/// Everything this shim serves.
pub struct Pod {
    pub(crate) identity: Identity,
    containers: Mutex<Containers>,
    vm: OnceCell<Arc<Vm>>,
    /// The first container's VM, as long as nobody has asked for it.
    ahead: Mutex<Option<Ahead>>,
    /// Of the first container's start.
    first: Arc<Timeline>,
    /// The template that its VM could not start from, to be built once there is time for it.
    wanted: Mutex<Option<(Config, Ingredients)>>,
    events: Publisher,
    next_container: AtomicU64,
    /// If containerd has the pod by its sandbox API.
    pub(crate) sandbox: Mutex<Option<Sandbox>>,
    /// The runtime options that came with the shim's start, if they could be read.
    pub(crate) told: Option<Options>,
    /// The shim may go.
    pub over: Notify,
}

impl Pod {
    pub fn new(identity: Identity, told: Option<Options>, events: Publisher) -> Arc<Self> {
        Arc::new(Self {
            first: Arc::new(Timeline::since(identity.since_ns)),
            ahead: Mutex::default(),
            identity,
            containers: Mutex::default(),
            vm: OnceCell::new(),
            wanted: Mutex::default(),
            events,
            next_container: AtomicU64::new(0),
            sandbox: Mutex::default(),
            told,
            over: Notify::new(),
        })
    }

    pub(crate) fn containers(&self) -> MutexGuard<'_, Containers> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn ahead(&self) -> MutexGuard<'_, Option<Ahead>> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act` on a container, under the lock.
    pub(crate) fn with<T>(
        &self,
        id: &str,
        act: impl FnOnce(&mut Container) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        match self.containers().by_id.get_mut(id) {
            Some(container) => act(container),
            None => Err(Fault::not_found(format_args!("no container {id}"))),
        }
    }

    /// Tells containerd, but for what becomes of a sandbox's own container: that is no task of its.
    pub(crate) fn publish(&self, news: impl IntoIterator<Item = TaskEvent>) {
        for event in news {
            if !self.is_sandbox(event.container()) {
                self.events.publish(event);
            }
        }
    }

    /// The streams of a process, a container's init or an exec.
    pub(crate) async fn open_streams(&self, paths: &Paths, id: &str) -> Result<Opened, Fault> {
        let namespace = &self.identity.namespace;
        let opened = stdio::open(paths, Owner { namespace, id }, identity::stream_id).await;
        opened.map_err(Fault::invalid)
    }

    /// The VM, if it was ever started.
    pub(crate) fn vm(&self) -> Option<&Arc<Vm>> {
        self.vm.get()
    }

    /// The VM, which a container that exists has.
    pub(crate) fn running_vm(&self) -> Result<&Arc<Vm>, Fault> {
        let vm = self
            .vm()
            .ok_or_else(|| Fault::precondition("the pod has no microVM"))?;
        if vm.has_ended() {
            return Err(Fault::precondition("the pod's microVM has ended"));
        }
        Ok(vm)
    }

    /// `Create`: the container up to, but not including, the start of its init. Boots the VM if it
    /// is the pod's first. What fails leaves nothing behind. Hooks get `patience`.
    pub async fn create(
        self: &Arc<Self>,
        request: CreateTaskRequest,
        patience: Duration,
    ) -> Result<u32, Fault> {
        let options = Options::decode(request.options.as_ref()).map_err(Fault::invalid)?;
        self.create_with(request, options, patience).await
    }

    /// As [`Self::create`], with runtime options that did not come with the request.
    pub(crate) async fn create_with(
        self: &Arc<Self>,
        request: CreateTaskRequest,
        options: Options,
        patience: Duration,
    ) -> Result<u32, Fault> {
        if !is_identifier(&request.id) {
            return Err(Fault::invalid(format_args!(
                "id {:?}: not an identifier",
                request.id
            )));
        }
        if !request.checkpoint.is_empty() {
            return Err(Fault::unimplemented(
                "checkpoint: husk cannot restore processes",
            ));
        }
        let paths = Paths {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let timeline = self.timeline();
        timeline.mark("create");
        {
            let mut containers = self.containers();
            if containers.closed {
                return Err(Fault::precondition("the pod is at its end"));
            }
            if containers.by_id.contains_key(&request.id) {
                let message = format!("container {} already exists", request.id);
                return Err(Fault::new(Code::ALREADY_EXISTS, message));
            }
            let init = Process::creating(paths.clone());
            let mut container = Container::new(&request.id, &request.bundle, init);
            container.timeline = timeline.clone();
            containers.by_id.insert(request.id.clone(), container);
        }
        let created = self
            .create_reserved(&request, &options, &paths, &timeline, patience)
            .await;
        if created.is_err() {
            self.abandon(&request.id, patience).await;
        }
        created
    }

    async fn create_reserved(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        options: &Options,
        paths: &Paths,
        timeline: &Arc<Timeline>,
        patience: Duration,
    ) -> Result<u32, Fault> {
        let bundle = Path::new(&request.bundle);
        // May fail, so it comes before the VM started ahead is taken: whoever has that sees to its end.
        let opened = self.open_streams(paths, &request.id).await?;
        let index = self.next_container.fetch_add(1, Ordering::Relaxed);
        let ahead = self.ahead().take();
        let ahead = match ahead {
            Some(ahead) if request.id == self.identity.id && ahead.is(bundle, options) => {
                Some(ahead)
            }
            Some(other) => {
                log::info!("the microVM started ahead is not what is wanted: starting another");
                other.cancel().await;
                None
            }
            None => None,
        };
        let (config, spec, plan, vm) = match ahead {
            Some(ahead) => (ahead.config, ahead.spec, ahead.plan, Some(ahead.vm)),
            None => {
                let config = Config::load(Path::new(CONFIG), options).map_err(Fault::invalid)?;
                let mut spec = spec::read(bundle).map_err(Fault::invalid)?;
                if let Some(files) = self
                    .shared_files()
                    .filter(|_| request.id != self.identity.id)
                {
                    pod_config::complete(&mut spec, &files);
                }
                let prefix = format!("c{index}");
                let running = self.vm().map(|vm| Running {
                    pid: vm.pid,
                    sandbox: &self.identity.id,
                });
                let plan = spec::rewrite(&mut spec, bundle, &request.id, &prefix, running)
                    .map_err(Fault::invalid)?;
                (config, spec, plan, None)
            }
        };
        if let Some(level) = config.log_level {
            log::set_max_level(level);
        }

        // Mounts are made by a thread of their own, which begins before the VMM is started.
        let shares = shares::prepare(plan.clone(), request.rootfs.clone());
        let (shares, vm) = tokio::join!(
            async {
                let shares = shares.await.map_err(Fault::invalid);
                timeline.mark("rootfs");
                shares
            },
            self.start_vm(config, &plan, vm, timeline),
        );
        let (vm, shares) = (vm?, shares?);
        if !plan.hooks.is_empty() {
            // While the guest boots on: what they may act on is there.
            self.run_first_hooks(&request.id, vm, plan.hooks, patience)
                .await?;
        }
        for share in shares {
            self.with(&request.id, |container| {
                container.shares.push(share.name.clone());
                Ok(())
            })?;
            if let Err(fault) = vm.machine.share(share).await {
                return Err(self.explained(vm, fault).await);
            }
        }
        vm.set_network().await?;

        let create = api::CreateContainerRequest {
            container_id: request.id.clone(),
            spec: spec.to_string().into_bytes(),
            stdio: MessageField::some(opened.ids),
            ..api::CreateContainerRequest::default()
        };
        drop(spec);
        self.with(&request.id, |container| {
            container.in_guest = true;
            Ok(())
        })?;
        let (connected, created) = tokio::join!(
            vm.machine.connect_streams(opened.remote),
            vm.agent
                .create_container(context::with_duration(ANSWER), &create),
        );
        let created = created.map_err(|e| Fault::of_call("create the container", e));
        match (connected, created) {
            (Ok(()), Ok(_)) => {}
            (Err(fault), _) | (_, Err(fault)) => return Err(self.explained(vm, fault).await),
        }

        let event = TaskEvent::Create(TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(TaskIO {
                stdin: paths.stdin.clone(),
                stdout: paths.stdout.clone(),
                stderr: paths.stderr.clone(),
                terminal: paths.terminal,
                ..TaskIO::default()
            }),
            pid: vm.pid,
            ..TaskCreate::default()
        });
        self.with(&request.id, |container| {
            container.pid = vm.pid;
            self.publish([event]);
            if let Some(early) = container.init.created(opened.streams) {
                self.publish(container.exited("", early));
            }
            Ok(())
        })?;
        timeline.mark("created");
        vm.note_limits(&request.id, plan.demand);
        Ok(vm.pid)
    }

    /// Of a container's start: the first one's begins with the shim, another's with its creation.
    pub(crate) fn timeline(&self) -> Arc<Timeline> {
        let first = self.vm().is_none() && self.containers().by_id.is_empty();
        match first {
            true => self.first.clone(),
            false => Arc::default(),
        }
    }

    /// What the VM of a container with this plan is made of.
    pub(crate) fn setup(
        &self,
        mut config: Config,
        plan: &Plan,
        timeline: &Arc<Timeline>,
    ) -> Result<Setup, Fault> {
        plan.demand.enlarge(&mut config);
        let cgroup = cgroup::of_pod(plan.cgroups_path.as_deref(), &self.identity.id)
            .map_err(Fault::invalid)?;
        Ok(Setup {
            scope: self.scope(&config, plan),
            config,
            network: plan.network.clone(),
            cgroup,
            with_shim: plan.kubernetes_namespace.is_some(),
            oom_score_adj: plan.oom_score_adj.unwrap_or(0),
            timeline: timeline.clone(),
        })
    }

    /// The pod's VM, started if this is the first container; `ahead` is one on its way.
    async fn start_vm(
        self: &Arc<Self>,
        config: Config,
        plan: &Plan,
        ahead: Option<JoinHandle<Result<Launched, Fault>>>,
        timeline: &Arc<Timeline>,
    ) -> Result<&Arc<Vm>, Fault> {
        let vm = self.vm.get_or_try_init(|| async {
            let setup = self.setup(config, plan, timeline)?;
            let launched = match ahead {
                Some(ahead) => ahead.await.map_err(Fault::internal)?,
                None => {
                    self.note_start(&setup);
                    launch(&setup).await
                }
            };
            let Launched { vm, events, wanted } = launched?;
            *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) =
                wanted.map(|wanted| (setup.config, wanted));
            self.note(&vm);
            tokio::spawn(self.clone().follow(vm.clone(), events));
            Ok(vm)
        });
        let vm = vm.await?;
        if vm.has_ended() {
            return Err(Fault::precondition(vm.ended().await));
        }
        Ok(vm)
    }

    /// Whose templates this pod may start from.
    fn scope(&self, config: &Config, plan: &Plan) -> Option<Scope> {
        let namespace = &self.identity.namespace;
        match (config.templates, &plan.kubernetes_namespace) {
            (Sharing::Off, _) => None,
            (Sharing::Node, _) => Some(Scope::Node),
            (Sharing::Namespace, None) => Some(Scope::Namespace(namespace.clone())),
            (Sharing::Namespace, Some(inner)) if is_identifier(inner) => {
                Some(Scope::Namespace(format!("{namespace}/{inner}")))
            }
            (Sharing::Namespace, Some(_)) => None,
        }
    }

    /// Has the template built that this pod's start has missed; for when the start is over.
    pub(crate) fn order_template(&self) {
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((config, wanted)) = wanted.take() {
            tokio::spawn(async move { background::order(&config, &wanted).await });
        }
    }

    /// Carries what the guest says to containerd, until there is no guest.
    async fn follow(self: Arc<Self>, vm: Arc<Vm>, mut events: mpsc::Receiver<GuestEvent>) {
        while let Some(event) = events.recv().await {
            match event {
                GuestEvent::Exit {
                    container,
                    exec,
                    status,
                } => self.guest_exit(&container, &exec, Exit::now(status)),
                GuestEvent::OutOfMemory { container } => {
                    // The name is the guest's: only one that we know goes any further.
                    let due = self.with(&container, |known| {
                        let due = known.out_of_memory(Instant::now());
                        Ok(due.then(|| known.id.clone()))
                    });
                    if let Ok(Some(container_id)) = due {
                        self.publish([TaskEvent::Oom(TaskOOM {
                            container_id,
                            ..TaskOOM::default()
                        })]);
                    }
                }
            }
        }
        vm.ended().await;
        for container in self.containers().by_id.values_mut() {
            self.publish(container.all_exited(true));
        }
    }

    fn guest_exit(self: &Arc<Self>, id: &str, exec: &str, exit: Exit) {
        let begins = self.with(id, |container| {
            let was_held = container.is_held();
            self.publish(container.exited(exec, exit));
            Ok(container.is_held() && !was_held)
        });
        // Once, however often the guest says so.
        if matches!(begins, Ok(true)) {
            let (pod, id) = (self.clone(), id.to_owned());
            tokio::spawn(async move {
                sleep(STRAGGLERS).await;
                let _ = pod.with(&id, |container| {
                    if container.is_held() {
                        pod.publish(container.all_exited(false));
                    }
                    Ok(())
                });
            });
        }
    }

    /// `fault`, or why the VM ended if that is what it comes from: it says more than which call
    /// noticed.
    pub(crate) async fn explained(&self, vm: &Vm, fault: Fault) -> Fault {
        if fault.code != Code::INTERNAL {
            return fault;
        }
        match timeout(Duration::from_millis(500), vm.ended()).await {
            Ok(why) => Fault::internal(why),
            Err(_) => fault,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stdio::Streams;

    #[tokio::test]
    async fn an_end_that_is_told_again_and_again_costs_one_task() {
        let identity = Identity {
            namespace: "default".into(),
            id: "c".into(),
            socket: "/nowhere".into(),
            since_ns: 0,
        };
        let pod = Pod::new(
            identity,
            None,
            Publisher::start("default", "/nowhere/socket".into()),
        );
        let running = || {
            let mut process = Process::creating(Paths::default());
            process.created(Streams::default());
            process.start().unwrap();
            process.started();
            process
        };
        let mut container = Container::new("c", "/b", running());
        container.execs.insert("e".into(), running());
        pod.containers().by_id.insert("c".into(), container);
        let tasks = || {
            tokio::runtime::Handle::current()
                .metrics()
                .num_alive_tasks()
        };
        let before = tasks();
        for (exec, status) in [("", 0), ("", 1), ("x", 2), ("", 3)] {
            pod.guest_exit("c", exec, Exit::now(status));
        }
        assert_eq!(tasks(), before + 1);
    }
}
