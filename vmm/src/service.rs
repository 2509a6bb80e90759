//! The machine service (`machine.proto`), for one client on one connection.
//!
//! Runs on the main thread alone. Everything long happens elsewhere: requests only start, ask or
//! wait. Save alone is long, and nothing else may happen meanwhile. When the client closes the
//! connection the process ends, whatever the guest is doing.

use std::{
    fs::File,
    io,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
};

use async_trait::async_trait;
use husk_proto::{
    DESCRIPTOR_FD, MACHINE_FD,
    machine::{
        AttachRequest, AttachResponse, BootRequest, BootResponse, ConnectRequest, ConnectResponse,
        DetachRequest, DetachResponse, PauseRequest, PauseResponse, RestoreRequest,
        RestoreResponse, ResumeRequest, ResumeResponse, SaveRequest, SaveResponse, ShareRequest,
        ShareResponse, StatusRequest, StatusResponse, StopRequest, StopResponse, UnshareRequest,
        UnshareResponse, WaitRequest, WaitResponse, status_response, wait_response::Reason,
    },
    machine_ttrpc::{Machine, create_machine},
};
use tokio::{
    net::UnixStream,
    sync::{Notify, oneshot},
};
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext, transport::Listener},
    get_status,
};

use crate::{
    connection::{Connection, Once},
    descriptors::{DescriptorError, Descriptors},
    fs::{FileServer, ShareError},
    jail::{self, Role},
    memory::{self, image::Later},
    pci::PciError,
    vm::{AttachError, BuildError, Config, Interface, RestoreConfig, SaveError, Vm, ending::Cause},
};

/// The longest name of a share, in bytes.
const SHARE_NAME_MAX: usize = 64;

/// Serves the machine on the inherited descriptors, until the client closes the connection.
///
/// Must be called once: it takes the descriptors over.
pub fn serve(files: FileServer) -> io::Result<()> {
    // SAFETY: both were inherited for this purpose; nothing else in the process owns them.
    let (machine, channel) = unsafe {
        (
            StdUnixStream::from_raw_fd(MACHINE_FD),
            OwnedFd::from_raw_fd(DESCRIPTOR_FD),
        )
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    runtime.block_on(async {
        serve_client(machine, channel, Arc::new(files)).await?;
        // The client is gone and with it every purpose of this process. Nothing is torn down: the
        // kernel does it faster, and there is nobody to wait for.
        std::process::exit(0)
    })
}

/// Serves a machine on `machine`, with descriptors from `channel`, until the client closes `machine`. To be called
/// in a runtime.
///
/// # Errors
/// The sockets cannot be watched.
pub async fn serve_client(
    machine: StdUnixStream,
    channel: OwnedFd,
    files: Arc<FileServer>,
) -> io::Result<()> {
    machine.set_nonblocking(true)?;
    let closed = Arc::new(Notify::new());
    let connection = Connection::new(UnixStream::from_std(machine)?, Arc::clone(&closed));
    let service = Arc::new(MachineService {
        descriptors: Mutex::new(Descriptors::new(channel)),
        files,
        vm: OnceLock::new(),
    });
    let mut server = Server::new()
        .add_listener(Listener::new(Once::new(connection)))
        .register_service(create_machine(service));
    server.start().await.map_err(io::Error::other)?;
    closed.notified().await;
    Ok(())
}

/// The service's state. The VM is set by Boot or Restore and stays, also after its end.
struct MachineService {
    descriptors: Mutex<Descriptors>,
    files: Arc<FileServer>,
    vm: OnceLock<Arc<Vm>>,
}

impl MachineService {
    fn receive(&self, field: &'static str, token: u64) -> Result<OwnedFd, DescriptorError> {
        let descriptors = self.descriptors.lock();
        let mut descriptors = descriptors.unwrap_or_else(PoisonError::into_inner);
        descriptors.take(field, token)
    }

    fn take(&self, field: &'static str, token: u64) -> ttrpc::Result<OwnedFd> {
        self.receive(field, token).map_err(|e| {
            let code = match &e {
                DescriptorError::Unknown { .. } => Code::INVALID_ARGUMENT,
                DescriptorError::Receive(_) => Code::INTERNAL,
            };
            status(code, e)
        })
    }

    /// The VM, once booted.
    fn vm(&self) -> ttrpc::Result<&Arc<Vm>> {
        self.vm
            .get()
            .ok_or_else(|| status(Code::FAILED_PRECONDITION, "the machine was not booted"))
    }

    fn no_vm_yet(&self) -> ttrpc::Result<()> {
        match self.vm.get() {
            None => Ok(()),
            Some(_) => {
                let message = "the machine was booted before";
                Err(status(Code::FAILED_PRECONDITION, message))
            }
        }
    }

    /// Takes charge of a machine that runs.
    fn keep(&self, vm: Vm) {
        if let Err(e) = jail::limit_memory(memory::mapped()) {
            log::error!("{e}");
        }
        let vm = self.vm.get_or_init(|| Arc::new(vm));
        tokio::spawn(stop_at_end(Arc::clone(vm)));
    }

    /// The VM, booted and not ended.
    fn live_vm(&self) -> ttrpc::Result<&Arc<Vm>> {
        let vm = self.vm()?;
        match vm.ending().has_come() {
            true => Err(status(Code::FAILED_PRECONDITION, "the machine has ended")),
            false => Ok(vm),
        }
    }

    fn config(&self, request: BootRequest) -> ttrpc::Result<Config> {
        // All are taken before anything is looked at: what a refused request leaves lies there for good.
        let kvm = self.take("kvm_fd", request.kvm_fd);
        let kernel = self.take("kernel_fd", request.kernel_fd);
        let initrd = self.take("initrd_fd", request.initrd_fd);
        let agent = self.take("agent_fd", request.agent_fd);
        self.no_vm_yet()?;
        let vcpus = u8::try_from(request.vcpus)
            .ok()
            .filter(|vcpus| (1..=crate::vm::VCPUS_MAX).contains(vcpus))
            .ok_or_else(|| status(Code::INVALID_ARGUMENT, BuildError::Vcpus(request.vcpus)))?;
        let possible_vcpus = match request.possible_vcpus {
            0 => vcpus,
            possible => u8::try_from(possible)
                .ok()
                .filter(|possible| (vcpus..=crate::vm::VCPUS_MAX).contains(possible))
                .ok_or_else(|| {
                    let error = BuildError::PossibleVcpus { possible, vcpus };
                    status(Code::INVALID_ARGUMENT, error)
                })?,
        };
        Ok(Config {
            kvm: kvm?,
            kernel: kernel?.into(),
            initrd: initrd?.into(),
            agent: agent?,
            memory_bytes: request.memory_bytes,
            vcpus,
            possible_vcpus,
            cmdline: request.cmdline,
        })
    }
}

#[async_trait]
impl Machine for MachineService {
    async fn boot(&self, _: &TtrpcContext, request: BootRequest) -> ttrpc::Result<BootResponse> {
        // Built right here: nothing else can be asked for before it is.
        let vm = Vm::boot(self.config(request)?, Arc::clone(&self.files))
            .map_err(|e| status(fault(e.is_clients()), e))?;
        self.keep(vm);
        Ok(BootResponse::new())
    }

    async fn restore(
        &self,
        _: &TtrpcContext,
        request: RestoreRequest,
    ) -> ttrpc::Result<RestoreResponse> {
        // The client throws a saved machine away for an INVALID_ARGUMENT. A descriptor that did not
        // come is no fault of it.
        let take = |field, token| {
            let taken = self.receive(field, token).map(File::from);
            taken.map_err(|e| status(Code::INTERNAL, e))
        };
        let kvm = take("kvm_fd", request.kvm_fd);
        let memory = take("memory_fd", request.memory_fd);
        let state = take("state_fd", request.state_fd);
        let agent = take("agent_fd", request.agent_fd);
        let pages = match request.pages_fd {
            0 => None,
            token => Some(take("pages_fd", token)),
        };
        self.no_vm_yet()?;
        let config = RestoreConfig {
            kvm: kvm?.into(),
            memory: memory?,
            state: state?,
            agent: agent?.into(),
            pages: pages.transpose()?,
            memory_bytes: request.memory_bytes,
            vcpus: request.vcpus,
        };
        let restored = Vm::restore(config, Arc::clone(&self.files)).map_err(|e| {
            let code = match e.is_of_size() {
                true => Code::OUT_OF_RANGE,
                false => fault(e.is_the_images()),
            };
            status(code, e)
        })?;
        self.keep(restored.vm);
        tokio::spawn(prefetch(restored.later));
        Ok(RestoreResponse {
            added_start: restored.added.start,
            added_bytes: restored.added.bytes,
            ..Default::default()
        })
    }

    async fn save(&self, _: &TtrpcContext, request: SaveRequest) -> ttrpc::Result<SaveResponse> {
        let memory = self.take("memory_fd", request.memory_fd);
        let state = self.take("state_fd", request.state_fd);
        let vm = self.live_vm()?;
        let (memory, state) = (File::from(memory?), File::from(state?));
        vm.save(&memory, &state).map_err(|e| {
            let code = match &e {
                SaveError::NotPaused | SaveError::Grown | SaveError::InTheWay(_) => {
                    Code::FAILED_PRECONDITION
                }
                SaveError::NotEmpty { .. } => Code::INVALID_ARGUMENT,
                _ => Code::INTERNAL,
            };
            status(code, e)
        })?;
        Ok(SaveResponse::new())
    }

    async fn status(&self, _: &TtrpcContext, _: StatusRequest) -> ttrpc::Result<StatusResponse> {
        use status_response::State;
        let (state, console, exits) = match self.vm.get() {
            None => (State::WAITING, Vec::new(), 0),
            Some(vm) => {
                let state = match (vm.ending().has_come(), vm.paused()) {
                    (true, _) => State::ENDED,
                    (false, true) => State::PAUSED,
                    (false, false) => State::RUNNING,
                };
                (state, vm.console(), vm.exits().total())
            }
        };
        Ok(StatusResponse {
            state: state.into(),
            console,
            exits,
            ..Default::default()
        })
    }

    async fn share(&self, _: &TtrpcContext, request: ShareRequest) -> ttrpc::Result<ShareResponse> {
        let root = self.take("fd", request.fd);
        self.live_vm()?;
        if !is_share_name(&request.name) {
            let message = format!(
                "name: {:?} is not 1 to {SHARE_NAME_MAX} of [a-z0-9-]",
                request.name
            );
            return Err(status(Code::INVALID_ARGUMENT, message));
        }
        self.files
            .share(&request.name, root?, request.exclusive)
            .map_err(|e| share_status(&e))?;
        Ok(ShareResponse::new())
    }

    async fn unshare(
        &self,
        _: &TtrpcContext,
        request: UnshareRequest,
    ) -> ttrpc::Result<UnshareResponse> {
        self.vm()?;
        // Closes files, which can take the host its time (NFS).
        let files = Arc::clone(&self.files);
        let (tell, told) = oneshot::channel();
        let thread = thread::Builder::new().name("fs-unshare".to_owned());
        jail::spawn(thread, Role::Files, move || {
            // Whoever asked may be gone.
            let _ = tell.send(files.unshare(&request.name));
        })
        .map_err(|e| status(Code::INTERNAL, e))?;
        told.await
            .map_err(|e| status(Code::INTERNAL, e))?
            .map_err(|e| share_status(&e))?;
        Ok(UnshareResponse::new())
    }

    async fn attach(
        &self,
        _: &TtrpcContext,
        request: AttachRequest,
    ) -> ttrpc::Result<AttachResponse> {
        let taken = |field, tokens: &[u64]| -> Vec<_> {
            tokens
                .iter()
                .map(|token| self.take(field, *token))
                .collect()
        };
        let taps = taken("tap_fds", &request.tap_fds);
        let vhosts = taken("vhost_fds", &request.vhost_fds);
        let vm = self.live_vm()?;
        let all = |taken: Vec<_>| taken.into_iter().collect::<ttrpc::Result<Vec<OwnedFd>>>();
        let interface = Interface {
            taps: all(taps)?,
            vhosts: all(vhosts)?,
            mac: request.mac,
            mtu: request.mtu,
        };
        let slot = vm.attach(interface).map_err(|e| {
            let code = match &e {
                AttachError::Bus(_) => Code::RESOURCE_EXHAUSTED,
                e => fault(e.is_clients()),
            };
            status(code, e)
        })?;
        Ok(AttachResponse {
            slot,
            ..Default::default()
        })
    }

    async fn detach(
        &self,
        _: &TtrpcContext,
        request: DetachRequest,
    ) -> ttrpc::Result<DetachResponse> {
        self.vm()?.detach(request.slot).map_err(|e| {
            let code = match &e {
                PciError::NotPlugged(_) => Code::NOT_FOUND,
                _ => Code::INTERNAL,
            };
            status(code, e)
        })?;
        Ok(DetachResponse::new())
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let connections: Vec<_> = request
            .connections
            .iter()
            .map(|connection| Ok((self.take("fd", connection.fd)?, connection.port)))
            .collect();
        let vm = self.live_vm()?;
        // All or none: no connection is made of a request that is wrong.
        let connections: Vec<_> = connections.into_iter().collect::<ttrpc::Result<_>>()?;
        for (socket, port) in connections {
            vm.dialer().dial(socket, port);
        }
        Ok(ConnectResponse::new())
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> ttrpc::Result<PauseResponse> {
        let vm = self.live_vm()?;
        vm.pause().await.map_err(|e| status(Code::INTERNAL, e))?;
        Ok(PauseResponse::new())
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> ttrpc::Result<ResumeResponse> {
        self.live_vm()?.resume();
        Ok(ResumeResponse::new())
    }

    async fn stop(&self, _: &TtrpcContext, _: StopRequest) -> ttrpc::Result<StopResponse> {
        let vm = self.vm()?;
        vm.ending().report(Cause::Stopped, "");
        vm.quit().await.map_err(|e| status(Code::INTERNAL, e))?;
        Ok(StopResponse::new())
    }

    async fn wait(&self, _: &TtrpcContext, _: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let vm = self.vm()?;
        let end = vm.ending().wait().await;
        Ok(WaitResponse {
            reason: reason(end.cause).into(),
            detail: end.detail,
            console: vm.console(),
            ..Default::default()
        })
    }
}

/// Maps what is left, between the requests, and while nobody else has a use for the processor.
async fn prefetch(mut later: Later) {
    loop {
        // Whoever waits for an answer comes first, and then the vCPUs.
        tokio::task::yield_now().await;
        std::thread::yield_now();
        if !later.step() {
            break;
        }
    }
}

/// However the machine ends, none of its vCPUs runs on.
async fn stop_at_end(vm: Arc<Vm>) {
    vm.ending().wait().await;
    log::debug!("{:?}", vm.exits());
    if let Err(e) = vm.quit().await {
        log::error!("{e}");
    }
}

/// Who is to blame for a machine that was not built: the client, or the host.
fn fault(clients: bool) -> Code {
    match clients {
        true => Code::INVALID_ARGUMENT,
        false => Code::INTERNAL,
    }
}

fn reason(cause: Cause) -> Reason {
    match cause {
        Cause::PoweredOff => Reason::POWERED_OFF,
        Cause::Reset => Reason::RESET,
        Cause::Panicked => Reason::PANICKED,
        Cause::TripleFault => Reason::TRIPLE_FAULT,
        Cause::KvmError => Reason::KVM_ERROR,
        Cause::Stopped => Reason::STOPPED,
        Cause::DeviceError => Reason::DEVICE_ERROR,
    }
}

fn is_share_name(name: &str) -> bool {
    let allowed = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    (1..=SHARE_NAME_MAX).contains(&name.len()) && name.bytes().all(allowed)
}

fn share_status(error: &ShareError) -> ttrpc::Error {
    let code = match error {
        ShareError::AlreadyExists(_) => Code::ALREADY_EXISTS,
        ShareError::NotFound(_) => Code::NOT_FOUND,
        ShareError::InvalidName(_) | ShareError::NotDirOrFile(_) => Code::INVALID_ARGUMENT,
        ShareError::Root { .. } => Code::INTERNAL,
    };
    status(code, error)
}

fn status(code: Code, message: impl ToString) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, message))
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, pin::Pin};

    use super::*;
    use crate::descriptors::testing::{pair, send};

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    }

    /// The client goes on after a refusal. Were its descriptors kept, they would stay open for good, and
    /// in the end there would be no room for others.
    #[test]
    fn a_refused_request_leaves_no_descriptor_behind() {
        let (client, descriptors) = pair();
        let service = MachineService {
            descriptors: Mutex::new(descriptors),
            files: Arc::new(FileServer::new().unwrap()),
            vm: OnceLock::new(),
        };
        let context = TtrpcContext::default();
        // Token 9 does not come, and there is no machine to share with.
        let boot = |kvm_fd, vcpus| BootRequest {
            kvm_fd,
            kernel_fd: 2,
            initrd_fd: 3,
            agent_fd: 4,
            vcpus,
            ..Default::default()
        };
        let restore = RestoreRequest {
            kvm_fd: 9,
            memory_fd: 1,
            state_fd: 2,
            agent_fd: 3,
            pages_fd: 4,
            ..Default::default()
        };
        let save = SaveRequest {
            memory_fd: 9,
            state_fd: 1,
            ..Default::default()
        };
        let share = ShareRequest {
            fd: 1,
            ..Default::default()
        };
        let connection = |fd| husk_proto::machine::Connection {
            fd,
            ..Default::default()
        };
        let connect = ConnectRequest {
            connections: [9, 1].map(connection).to_vec(),
            ..Default::default()
        };
        let attach = AttachRequest {
            tap_fds: vec![9, 1],
            vhost_fds: vec![8, 2],
            ..Default::default()
        };
        type Asked<'a> = Pin<Box<dyn Future<Output = bool> + 'a>>;
        let (s, c) = (&service, &context);
        let requests: [(u64, Asked<'_>); 7] = [
            (4, Box::pin(async { s.boot(c, boot(1, 0)).await.is_err() })),
            (4, Box::pin(async { s.boot(c, boot(9, 1)).await.is_err() })),
            (4, Box::pin(async { s.restore(c, restore).await.is_err() })),
            (1, Box::pin(async { s.save(c, save).await.is_err() })),
            (1, Box::pin(async { s.share(c, share).await.is_err() })),
            (1, Box::pin(async { s.connect(c, connect).await.is_err() })),
            (2, Box::pin(async { s.attach(c, attach).await.is_err() })),
        ];
        for (at, (sent, refused)) in requests.into_iter().enumerate() {
            for token in 1..=sent {
                send(&client, &token.to_le_bytes(), &[client.as_raw_fd()]);
            }
            assert!(runtime().block_on(refused));
            let mut descriptors = service.descriptors.lock().unwrap();
            for token in 1..=sent {
                let kept = descriptors.take("fd", token).is_ok();
                // The second Boot was sent one more than it names.
                assert_eq!(kept, (at, token) == (1, 1), "request {at}, token {token}");
            }
        }
    }

    #[test]
    fn share_names_are_plain() {
        assert!(is_share_name("rootfs-0"));
        for name in ["", "..", "a/b", "A", "a b", &"x".repeat(65)] {
            assert!(!is_share_name(name), "{name:?}");
        }
    }
}
