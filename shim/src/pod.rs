//! The pod: one microVM and the containers in it, from the first `Create` to `Shutdown`.
//!
//! What containerd may ask of a container that exists is in `control`. State is behind one lock,
//! which is taken for lines and never across a wait; events are queued under it, so containerd hears
//! of things in the order in which they became true here.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, DeleteResponse},
    events::task::{TaskCreate, TaskDelete, TaskIO, TaskOOM},
};
use husk_proto::agent as api;
use protobuf::MessageField;
use tokio::{
    sync::{Notify, OnceCell, mpsc},
    time::{sleep, timeout},
};
use ttrpc::{Code, context};

use crate::{
    args::is_identifier,
    cgroup,
    config::{CONFIG, Config},
    container::Container,
    events::{Publisher, TaskEvent, timestamp},
    fault::Fault,
    options::Options,
    process::{Exit, Process},
    record::{self, ProcessId, RECORDS, Record},
    shares,
    spec::{self, Plan},
    stdio::{self, Paths},
    vm::{GuestEvent, Setup, Vm},
};

/// For the agent to answer anything.
pub const ANSWER: Duration = Duration::from_secs(60);
/// Output may take this long to be read once its process has ended (as with runc).
pub(crate) const DRAIN: Duration = Duration::from_secs(10);
/// Execs get this long to end after their init.
const STRAGGLERS: Duration = Duration::from_secs(5);
/// A shim without containers waits this long to be told to shut down.
const LINGER: Duration = Duration::from_secs(20);

/// Who this pod is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub namespace: String,
    /// The group's id, which is its first container's.
    pub id: String,
    /// Our own socket.
    pub socket: PathBuf,
}

/// Everything this shim serves.
pub struct Pod {
    identity: Identity,
    containers: Mutex<HashMap<String, Container>>,
    vm: OnceCell<Arc<Vm>>,
    events: Publisher,
    next_stream: AtomicU64,
    next_container: AtomicU64,
    /// The shim may go.
    pub over: Notify,
}

impl Pod {
    pub fn new(identity: Identity, events: Publisher) -> Arc<Self> {
        Arc::new(Self {
            identity,
            containers: Mutex::default(),
            vm: OnceCell::new(),
            events,
            next_stream: AtomicU64::new(1),
            next_container: AtomicU64::new(0),
            over: Notify::new(),
        })
    }

    pub(crate) fn containers(&self) -> MutexGuard<'_, HashMap<String, Container>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `act` on a container, under the lock.
    pub(crate) fn with<T>(
        &self,
        id: &str,
        act: impl FnOnce(&mut Container) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        match self.containers().get_mut(id) {
            Some(container) => act(container),
            None => Err(Fault::not_found(format_args!("no container {id}"))),
        }
    }

    pub(crate) fn publish(&self, news: impl IntoIterator<Item = TaskEvent>) {
        for event in news {
            self.events.publish(event);
        }
    }

    pub(crate) fn next_stream(&self) -> u64 {
        self.next_stream.fetch_add(1, Ordering::Relaxed)
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
    /// is the pod's first. What fails leaves nothing behind.
    pub async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, Fault> {
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
        {
            let mut containers = self.containers();
            if containers.contains_key(&request.id) {
                let message = format!("container {} already exists", request.id);
                return Err(Fault::new(Code::ALREADY_EXISTS, message));
            }
            let init = Process::creating(paths.clone());
            let container = Container::new(&request.id, &request.bundle, init);
            containers.insert(request.id.clone(), container);
        }
        let created = self.create_reserved(&request, &paths).await;
        if created.is_err() {
            self.abandon(&request.id).await;
        }
        created
    }

    async fn create_reserved(
        self: &Arc<Self>,
        request: &CreateTaskRequest,
        paths: &Paths,
    ) -> Result<u32, Fault> {
        let begun = Instant::now();
        let options = Options::decode(request.options.as_ref()).map_err(Fault::invalid)?;
        let config = Config::load(Path::new(CONFIG), &options).map_err(Fault::invalid)?;
        if let Some(level) = config.log_level {
            log::set_max_level(level);
        }
        let bundle = Path::new(&request.bundle);
        let mut spec = spec::read(bundle).map_err(Fault::invalid)?;
        let prefix = format!("c{}", self.next_container.fetch_add(1, Ordering::Relaxed));
        let plan =
            spec::rewrite(&mut spec, bundle, &request.id, &prefix).map_err(Fault::invalid)?;
        let opened = stdio::open(paths, || self.next_stream()).map_err(Fault::invalid)?;

        let (vm, shares) = tokio::join!(self.start_vm(config, &plan), async {
            shares::prepare(plan.clone(), request.rootfs.clone())
                .await
                .map_err(Fault::invalid)
        });
        let (vm, shares) = (vm?, shares?);
        let mounted = begun.elapsed();
        for share in shares {
            self.with(&request.id, |container| {
                container.shares.push(share.name.clone());
                Ok(())
            })?;
            if let Err(fault) = vm.machine.share(share).await {
                return Err(self.explained(vm, fault).await);
            }
        }
        vm.ready().await?;
        let ready = begun.elapsed();

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
            self.events.publish(event);
            if let Some(early) = container.init.created(opened.streams) {
                self.publish(container.exited("", early));
            }
            Ok(())
        })?;
        log::info!(
            "container {} created: mounts after {} ms, agent after {} ms, all after {} ms",
            request.id,
            mounted.as_millis(),
            ready.as_millis(),
            begun.elapsed().as_millis()
        );
        Ok(vm.pid)
    }

    /// The pod's VM, started if this is the first container.
    async fn start_vm(self: &Arc<Self>, config: Config, plan: &Plan) -> Result<&Arc<Vm>, Fault> {
        let vm = self.vm.get_or_try_init(|| async {
            let cgroup = match &plan.cgroups_path {
                Some(path) => cgroup::relative_path(path).map_err(Fault::invalid)?,
                None => PathBuf::from(format!("husk-{}", self.identity.id)),
            };
            let (vm, events) = Vm::launch(Setup {
                config,
                network: plan.network.clone(),
                cgroup,
                oom_score_adj: plan.oom_score_adj.unwrap_or(0),
            })
            .await?;
            if let Err(e) = self.write_record(&vm) {
                log::warn!("write the pod's record: {e}");
            }
            tokio::spawn(self.clone().follow(vm.clone(), events));
            Ok(vm)
        });
        let vm = vm.await?;
        if vm.has_ended() {
            return Err(Fault::precondition(vm.ended().await));
        }
        Ok(vm)
    }

    fn write_record(&self, vm: &Vm) -> std::io::Result<()> {
        let record = Record {
            pod: self.identity.id.clone(),
            socket: self.identity.socket.clone(),
            shim: ProcessId::of(process::id())?,
            vmm: ProcessId::of(vm.pid).ok(),
            cgroups: vm.cgroups().to_vec(),
        };
        record.write(&self.record_of(&self.identity.id))
    }

    fn record_of(&self, id: &str) -> PathBuf {
        record::directory(Path::new(RECORDS), &self.identity.namespace, id)
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
                    let known = self.with(&container, |known| Ok(known.id.clone()));
                    if let Ok(container_id) = known {
                        self.events.publish(TaskEvent::Oom(TaskOOM {
                            container_id,
                            ..TaskOOM::default()
                        }));
                    }
                }
            }
        }
        vm.ended().await;
        for container in self.containers().values_mut() {
            self.publish(container.all_exited(true));
        }
    }

    fn guest_exit(self: &Arc<Self>, id: &str, exec: &str, exit: Exit) {
        let held = self.with(id, |container| {
            self.publish(container.exited(exec, exit));
            Ok(container.is_held())
        });
        if matches!(held, Ok(true)) {
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

    /// Takes back a `Create` that failed.
    async fn abandon(self: &Arc<Self>, id: &str) {
        if let Some(vm) = self.vm() {
            self.remove_from_guest(vm, id).await;
        }
        self.containers().remove(id);
        self.linger();
    }

    /// Takes a container out of the guest, or the guest away if it was the last.
    async fn remove_from_guest(&self, vm: &Vm, id: &str) {
        let (last, in_guest, shares) = {
            let mut containers = self.containers();
            let last = containers.len() == 1;
            let Some(container) = containers.get_mut(id) else {
                return;
            };
            let shares = std::mem::take(&mut container.shares);
            (last, container.in_guest, shares)
        };
        if in_guest && !vm.has_ended() {
            // Also brings what the guest has written to the host.
            let request = api::DeleteRequest {
                container_id: id.to_owned(),
                ..api::DeleteRequest::default()
            };
            match vm
                .agent
                .delete(context::with_duration(ANSWER), &request)
                .await
            {
                Ok(_) => {}
                Err(e) => match Fault::of_call("delete the container in the guest", e) {
                    fault if fault.code == Code::NOT_FOUND => {}
                    fault => log::warn!("{fault}"),
                },
            }
        }
        if last {
            vm.stop().await;
        } else if !vm.has_ended() {
            for share in shares {
                if let Err(fault) = vm.machine.unshare(share).await {
                    log::warn!("{fault}");
                }
            }
        }
    }

    /// `Delete` of a container whose init has ended.
    pub async fn delete(self: &Arc<Self>, id: &str) -> Result<DeleteResponse, Fault> {
        self.end_if_never_started(id).await?;
        let (pid, exit, streams) = self.with(id, |container| {
            if container.deleting {
                return Err(Fault::precondition(format_args!(
                    "container {id} is being deleted"
                )));
            }
            let exit = container.init.exit().ok_or_else(|| {
                Fault::precondition(format_args!("container {id} is running: kill it first"))
            })?;
            container.deleting = true;
            let mut streams = vec![std::mem::take(&mut container.init.streams)];
            for exec in container.execs.values_mut() {
                streams.push(std::mem::take(&mut exec.streams));
            }
            Ok((container.pid, exit, streams))
        })?;
        for stream in streams {
            stream.drain(DRAIN).await;
        }
        if let Some(vm) = self.vm() {
            self.remove_from_guest(vm, id).await;
        }
        {
            let mut containers = self.containers();
            containers.remove(id);
            self.events.publish(TaskEvent::Delete(TaskDelete {
                container_id: id.to_owned(),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..TaskDelete::default()
            }));
        }
        if id != self.identity.id {
            if let Err(e) = record::remove(&self.record_of(id)) {
                log::warn!("remove the record of container {id}: {e}");
            }
        }
        self.linger();
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    /// A container that was created and never started is killed by its deletion.
    async fn end_if_never_started(&self, id: &str) -> Result<(), Fault> {
        let waiter = self.with(id, |container| {
            let created = container.init.is_created();
            Ok(created.then(|| container.init.subscribe()))
        })?;
        let Some(mut exited) = waiter else {
            return Ok(());
        };
        self.kill(id, "", libc::SIGKILL as u32, true).await?;
        let end = timeout(STRAGGLERS, exited.wait_for(Option::is_some)).await;
        match end {
            Ok(Ok(_)) => Ok(()),
            _ => Err(Fault::internal(format_args!("container {id} does not end"))),
        }
    }

    /// `Shutdown`: everything of the pod goes, if nothing runs in it. The caller answers, and the
    /// shim ends.
    pub async fn shutdown(&self) -> bool {
        if !self.containers().is_empty() {
            return false;
        }
        if let Some(vm) = self.vm() {
            vm.stop().await;
        }
        if let Err(e) = record::remove(&self.record_of(&self.identity.id)) {
            log::warn!("remove the pod's record: {e}");
        }
        let _ = std::fs::remove_file(&self.identity.socket);
        self.over.notify_one();
        true
    }

    /// Sees to it that a shim which nobody remembers does not stay.
    fn linger(self: &Arc<Self>) {
        let pod = self.clone();
        tokio::spawn(async move {
            sleep(LINGER).await;
            if pod.shutdown().await {
                log::info!("no container and no request to shut down: leaving");
            }
        });
    }
}
