//! The pod's microVM: the husk-vmm process, the guest in it, and the agent in the guest, as one
//! life: `Starting` → `Booting` → `Ready` → `Ended`.
//!
//! One task, `watch`, owns the process: it alone kills it, collects it, removes its cgroup, and says
//! `Ended`. Whoever finds fault with the VM tells that task. Nothing here knows of containers.

use std::{
    fmt,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use husk_proto::{
    agent as api,
    agent_ttrpc::AgentClient,
    machine::{WaitResponse, wait_response::Reason},
};
use tokio::{
    net::UnixStream,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

use crate::{
    cgroup::{self, PodCgroup},
    config::Config,
    fault::Fault,
    identity::{self, ClockSteps},
    machine::{Added, Machine},
    network::{self, Dial, Network, Serving},
    ration::Rationed,
    size::Demand,
    timeline::Timeline,
    untrusted,
    vmm::{Place, Vmm},
};

/// How long the kernel may take to end a killed process.
const KILLED: Duration = Duration::from_secs(5);
/// How long to wait for a better explanation once something has gone wrong.
const EXPLANATION: Duration = Duration::from_millis(300);
/// For the agent to find a stream, and its server, each of which takes it 10 s at most.
const DIALLED: Duration = Duration::from_secs(30);
/// Lines of the guest's console that an error shows.
const CONSOLE_LINES: usize = 8;
/// Events that may wait for the pod to look at them; the agent waits beyond.
const EVENTS: usize = 64;

/// Where the VM stands. It only ever moves forward.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The VMM process runs.
    Starting,
    /// The vCPUs run.
    Booting,
    /// The agent answers.
    Ready,
    /// The process is gone, and so is its cgroup. Says why, for people.
    Ended(Arc<str>),
}

/// What the guest tells of itself.
#[derive(Debug)]
pub enum GuestEvent {
    Exit {
        container: String,
        exec: String,
        status: u32,
    },
    OutOfMemory {
        container: String,
    },
}

/// What a clone's guest has to take into use beyond its template's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    pub memory: Added,
    pub vcpus: u32,
}

impl Growth {
    /// Of a clone that was restored for a pod with this configuration; none where it has its template's size.
    pub fn of_clone(config: &Config, memory: Added) -> Option<Self> {
        let vcpus = config.vcpus;
        (memory.bytes > 0 || vcpus > 1).then_some(Self { memory, vcpus })
    }

    fn request(self) -> api::GrowRequest {
        api::GrowRequest {
            memory_start: self.memory.start,
            memory_bytes: self.memory.bytes,
            vcpus: self.vcpus,
            ..api::GrowRequest::default()
        }
    }
}

/// A reason for `watch` to end the VM.
enum Verdict {
    /// Nobody needs it any more.
    Stopped,
    /// It cannot be worked with.
    Fault(String),
}

/// A VMM process, and the guest in it once it has one. It ends with [`Vm::stop`], or with this
/// process. How it comes to run is decided in `launch`.
pub struct Vm {
    /// The VMM's process on the host, in the pod's network namespace.
    pub pid: u32,
    pub machine: Machine,
    pub agent: AgentClient,
    cgroups: Vec<PathBuf>,
    cgroup: Option<PathBuf>,
    /// The pod's network namespace.
    namespace: Option<OwnedFd>,
    /// What it has for the guest; none where it is new, and empty.
    network: OnceLock<Network>,
    memory_mib: u64,
    vcpus: u32,
    serving: Serving,
    /// What it boots from, for errors.
    images: String,
    phase: watch::Sender<Phase>,
    verdicts: mpsc::Sender<Verdict>,
    begun: Instant,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// Starts the VMM's process, which waits for a guest. The descriptor is what the guest's agent
    /// is to be joined to: when all copies of it are gone, so is the agent.
    pub fn start(
        config: &Config,
        network: Option<(&Path, &OwnedFd)>,
        place: Place<'_>,
        oom_score_adj: i64,
    ) -> Result<(Arc<Self>, OwnedFd), Fault> {
        let begun = Instant::now();
        let (host_end, agent) = std::os::unix::net::UnixStream::pair().map_err(Fault::internal)?;
        host_end.set_nonblocking(true).map_err(Fault::internal)?;
        let agent_socket = UnixStream::from_std(host_end).map_err(Fault::internal)?;
        let (machine, remote) = Machine::new().map_err(Fault::internal)?;

        let cgroup = match cgroup::root() {
            Some(root) => Some(PodCgroup::create(root, place.cgroup).map_err(Fault::internal)?),
            None => None,
        };
        // May fail, so it comes before anything that would have to be undone.
        let given = network
            .map(|(path, fd)| Ok((path, fd.try_clone()?, fd.try_clone()?)))
            .transpose()
            .map_err(|e: io::Error| Fault::internal(e))?;
        let namespace = network.map(|(_, fd)| fd);
        let vmm = Vmm::start(config, remote, namespace, cgroup, place.with_shim)?;
        let network = OnceLock::new();
        let namespace = match given {
            Some((path, namespace, carried)) => {
                let _ = network.set(Network::begin(carried, path, config.serving()));
                Some(namespace)
            }
            None => {
                let own = File::open(own_namespace(vmm.pid));
                own.map(OwnedFd::from)
                    .inspect_err(|e| log::warn!("its network namespace: {e}"))
                    .ok()
            }
        };
        vmm.adjust_oom_score(oom_score_adj);
        let (verdicts, verdict_receiver) = mpsc::channel(4);
        let vm = Arc::new(Self {
            pid: vmm.pid,
            machine,
            agent: AgentClient::new(Client::new(Socket::new(Rationed::new(agent_socket)))),
            cgroups: vmm.cgroups.clone(),
            cgroup: vmm.cgroup.clone(),
            namespace,
            network,
            memory_mib: config.memory_mib,
            vcpus: config.vcpus,
            serving: config.serving(),
            images: format!(
                "kernel {}, initrd {}",
                config.kernel.display(),
                config.initrd.display()
            ),
            phase: watch::Sender::new(Phase::Starting),
            verdicts,
            begun,
        });
        tokio::spawn(watch(vm.clone(), vmm, verdict_receiver));
        Ok((vm, agent.into()))
    }

    /// The vCPUs run.
    pub fn booting(&self) {
        self.advance(Phase::Booting);
    }

    /// Greets the agent, has it take `growth` into use, and carries what it says to the receiver, which
    /// closes at the VM's end. If it has not done so within `limit` of the VMM's start, the VM ends.
    pub fn bring_up(
        self: &Arc<Self>,
        limit: Duration,
        timeline: Arc<Timeline>,
        growth: Option<Growth>,
    ) -> mpsc::Receiver<GuestEvent> {
        let (events, receiver) = mpsc::channel(EVENTS);
        let greeting = self.clone().greet(events, limit, timeline, growth);
        tokio::spawn(greeting);
        receiver
    }

    /// The network namespace that the pod was given.
    pub fn network_namespace(&self) -> Option<&Path> {
        self.network.get().map(Network::path)
    }

    /// Plugs the pod's network in, while the guest boots or its agent is greeted. For a machine that runs.
    pub async fn plug_network(&self) -> Result<(), Fault> {
        match self.network.get() {
            Some(network) => network.plug(&self.machine).await,
            None => Ok(()),
        }
    }

    /// Has the guest set the pod's network, once its agent is ready. May be called again, and does it once.
    pub async fn set_network(&self) -> Result<(), Fault> {
        self.ready().await?;
        match self.network.get() {
            Some(network) => network.set(&self.agent).await,
            None => Ok(()),
        }
    }

    /// Carries what somebody has put into a network namespace that was new (`ctr run --cni`, hooks).
    pub async fn look_for_network(self: &Arc<Self>) -> Result<(), Fault> {
        let is_new = self.network.get().is_none();
        let (true, Some(namespace)) = (is_new, &self.namespace) else {
            return Ok(());
        };
        if !network::has_interfaces(self.pid) {
            return Ok(());
        }
        let namespace = namespace.try_clone().map_err(Fault::internal)?;
        let own = own_namespace(self.pid);
        self.network
            .get_or_init(|| Network::begin(namespace, &own, self.serving));
        self.plug_network().await?;
        self.set_network().await?;
        self.follow_network();
        Ok(())
    }

    /// Carries what comes into the pod's network namespace from now on, until the VM's end.
    pub fn follow_network(self: &Arc<Self>) {
        let vm = self.clone();
        tokio::spawn(async move {
            let Some(network) = vm.network.get() else {
                return;
            };
            tokio::select! {
                _ = vm.ended() => {}
                fault = network.follow(&vm.machine, &vm.agent) => {
                    log::warn!("what becomes of the pod's network is not followed: {fault}");
                }
            }
        });
    }

    /// Says in the log what container `id` is promised and cannot have: a VM does not grow once it runs.
    pub fn note_limits(&self, id: &str, demand: Demand) {
        if let Some(what) = demand.beyond(self.memory_mib, self.vcpus) {
            log::warn!("container {id}: {what}");
        }
    }

    /// The cgroup that the VMM is in, on a host with cgroup v2.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// Carries who dials from within the pod's network namespace, on the host, to the guest's servers; for when a
    /// container has started. May be called again.
    pub fn forward_connections(self: &Arc<Self>) {
        if let Some(network) = self.network.get() {
            network.forward(self.clone());
        }
    }

    /// cgroups that were made for this VM, outermost first.
    pub fn cgroups(&self) -> &[PathBuf] {
        &self.cgroups
    }

    /// Returns once the agent answers, or says why it never will.
    pub async fn ready(&self) -> Result<(), Fault> {
        let mut phase = self.phase.subscribe();
        let reached = phase.wait_for(|phase| matches!(phase, Phase::Ready | Phase::Ended(_)));
        match reached.await.as_deref() {
            Ok(Phase::Ready) => Ok(()),
            Ok(Phase::Ended(why)) => Err(Fault::internal(format_args!("{why} ({})", self.images))),
            _ => Err(Fault::internal("the microVM's task is gone")),
        }
    }

    /// Returns why the VM ended, when it has. Never before the process is gone.
    pub async fn ended(&self) -> Arc<str> {
        let mut phase = self.phase.subscribe();
        let reached = phase.wait_for(|phase| matches!(phase, Phase::Ended(_)));
        match reached.await.as_deref() {
            Ok(Phase::Ended(why)) => why.clone(),
            _ => Arc::from("the microVM's task is gone"),
        }
    }

    pub fn has_ended(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Ended(_))
    }

    /// Ends the VM without asking it. Whoever wants its writes on disk has deleted its containers.
    /// Bounded.
    pub async fn stop(&self) {
        self.condemn();
        if timeout(KILLED * 2, self.ended()).await.is_err() {
            log::error!("husk-vmm, process {}, does not end", self.pid);
        }
    }

    /// Begins what [`Vm::stop`] waits for.
    pub fn condemn(&self) {
        // Full or closed means that its end is decided.
        let _ = self.verdicts.try_send(Verdict::Stopped);
    }

    /// Ends a VM that cannot be worked with. Bounded, as [`Self::stop`] is.
    pub async fn fail(&self, what: String) {
        let _ = self.verdicts.try_send(Verdict::Fault(what));
        let _ = timeout(KILLED * 2, self.ended()).await;
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|now| {
            let forward = !matches!(now, Phase::Ended(_));
            if forward {
                *now = to;
            }
            forward
        });
    }

    async fn greet(
        self: Arc<Self>,
        events: mpsc::Sender<GuestEvent>,
        limit: Duration,
        timeline: Arc<Timeline>,
        growth: Option<Growth>,
    ) {
        let left = limit.saturating_sub(self.begun.elapsed());
        let steps = ClockSteps::watch();
        let greeting = timeout(left, async {
            let context = context::Context::default;
            let answered = |e| Fault::of_call("the agent's first answer", e);
            let hello = identity::greet(&self.agent).await.map_err(answered)?;
            timeline.mark("agent");
            if let Some(growth) = growth {
                let grown = self.agent.grow(context(), &growth.request()).await;
                grown.map_err(|e| Fault::of_call("give the guest the pod's size", e))?;
                timeline.mark("grown");
            }
            let request = api::EventsRequest::default();
            let stream = self.agent.events(context(), &request).await;
            Ok::<_, Fault>((hello, stream.map_err(answered)?))
        });
        let (hello, mut stream) = match greeting.await {
            Ok(Ok(greeted)) => greeted,
            Ok(Err(fault)) => {
                self.fail(fault.message).await;
                return;
            }
            Err(_) => {
                self.fail(unanswered("agent", limit)).await;
                return;
            }
        };
        log::info!(
            "agent {} on Linux {} answered after {} ms",
            untrusted::message(&hello.version),
            untrusted::message(&hello.kernel_release),
            self.begun.elapsed().as_millis()
        );
        self.advance(Phase::Ready);
        // Ends with this task.
        let mut clock = JoinSet::new();
        clock.spawn(identity::lead_clock(self.agent.clone(), steps));
        loop {
            let event = match stream.recv().await {
                Ok(Some(event)) => event.event,
                Ok(None) => break,
                Err(e) => {
                    log::debug!("the agent's events: {e}");
                    break;
                }
            };
            let event = match event {
                Some(api::event::Event::Exit(exit)) => GuestEvent::Exit {
                    container: exit.container_id,
                    exec: exit.exec_id,
                    status: exit.status,
                },
                Some(api::event::Event::Oom(oom)) => GuestEvent::OutOfMemory {
                    container: oom.container_id,
                },
                _ => continue,
            };
            if events.send(event).await.is_err() {
                return;
            }
        }
        let fault = Verdict::Fault("the agent closed its connection".into());
        let _ = self.verdicts.try_send(fault);
    }
}

impl Dial for Vm {
    async fn dial(&self, request: api::DialRequest, stream: OwnedFd) -> Result<(), Fault> {
        let limited = context::with_duration(DIALLED);
        let (connected, dialled) = tokio::join!(
            self.machine.connect_streams(vec![stream]),
            self.agent.dial(limited, &request),
        );
        connected?;
        dialled.map_err(|e| Fault::of_call("dial", e))?;
        Ok(())
    }
}

/// By which the network namespace of the VMM's process is known.
fn own_namespace(pid: u32) -> PathBuf {
    format!("/proc/{pid}/ns/net").into()
}

/// Says that somebody was silent for too long.
pub fn unanswered(who: &str, limit: Duration) -> String {
    format!(
        "the {who} did not answer within {} ms (agent_timeout_ms)",
        limit.as_millis()
    )
}

/// Owns the process: waits for a reason to end it, ends it, and leaves nothing of it.
async fn watch(vm: Arc<Vm>, vmm: Vmm, mut verdicts: mpsc::Receiver<Verdict>) {
    let why = tokio::select! {
        biased;
        () = vmm.ended() => None,
        ended = guest_ended(&vm) => Some(ended),
        verdict = verdicts.recv() => match verdict {
            Some(Verdict::Fault(what)) => {
                // Often only the first sign of an end that somebody else can explain.
                let better = timeout(EXPLANATION, async {
                    tokio::select! {
                        biased;
                        () = vmm.ended() => None,
                        ended = guest_ended(&vm) => Some(ended),
                    }
                });
                match better.await {
                    Ok(why) => why,
                    Err(_) => {
                        let console = timeout(EXPLANATION, vm.machine.console()).await;
                        let console = console.ok().and_then(Result::ok).unwrap_or_default();
                        Some(what + &last_lines(&console))
                    }
                }
            }
            _ => Some("stopped".into()),
        },
    };
    vmm.kill();
    let status = vmm.collect(KILLED).await;
    if let Some(network) = vm.network.get() {
        network.undo().await;
    }
    let why = match why {
        Some(why) => why,
        None => {
            // Its last line may still be in the pipe.
            sleep(Duration::from_millis(5)).await;
            let status = status.as_deref().unwrap_or("ended");
            format!("husk-vmm {status}{}", vmm.last_words())
        }
    };
    if why != "stopped" {
        log::error!("the microVM ended: {why}");
    }
    vm.phase.send_replace(Phase::Ended(why.into()));
}

/// Returns when the VMM says that the guest has ended, once there is one.
async fn guest_ended(vm: &Vm) -> String {
    let mut phase = vm.phase.subscribe();
    let _ = phase.wait_for(|phase| *phase != Phase::Starting).await;
    match vm.machine.wait().await {
        Ok(answer) => explain(&answer),
        // The process' own end says more, and comes at once.
        Err(_) => {
            sleep(KILLED).await;
            "husk-vmm closed its connection".into()
        }
    }
}

fn explain(answer: &WaitResponse) -> String {
    let cause = match answer.reason.enum_value_or_default() {
        Reason::REASON_UNSPECIFIED => "ended for a reason it does not name",
        Reason::POWERED_OFF => "powered itself off",
        Reason::RESET => "reset itself",
        Reason::PANICKED => "panicked",
        Reason::TRIPLE_FAULT => "ended in a triple fault",
        Reason::KVM_ERROR => "was given up by KVM",
        Reason::STOPPED => "was stopped",
        Reason::DEVICE_ERROR => "lost a device",
    };
    let detail = untrusted::message(&answer.detail);
    let colon = if detail.is_empty() { "" } else { ": " };
    format!(
        "the guest {cause}{colon}{detail}{}",
        last_lines(&answer.console)
    )
}

fn last_lines(console: &[u8]) -> String {
    let lines = untrusted::console_tail(console, CONSOLE_LINES);
    if lines.is_empty() {
        return String::new();
    }
    format!("; its console ended with: {}", lines.join(" | "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_explained_in_one_line() {
        let answer = WaitResponse {
            reason: Reason::PANICKED.into(),
            detail: "not syncing: VFS\n".into(),
            console: b"one\n\x1b[0mtwo\n".to_vec(),
            ..WaitResponse::default()
        };
        assert_eq!(
            explain(&answer),
            "the guest panicked: not syncing: VFS; its console ended with: one |  [0mtwo"
        );
        assert!(explain(&WaitResponse::default()).starts_with("the guest ended"));
    }
}
