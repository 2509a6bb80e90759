//! A stand-in for husk-vmm and the guest in it, so that the whole shim can be tried without KVM: it
//! speaks both contracts, and runs "containers" as plain processes of the host. What the kernel file
//! says is how its boot goes: `silent`, `panic`, `die`, or anything else for well. Words in it say how
//! templates go: `save-fails`, `prepare-fails`, `save-hangs`, `try-fails` for their making, and `clone-unfit`,
//! `clone-fails`, `clone-dies`, `clone-silent`, `clone-vanishes`, `clone-cannot-grow` for what is made of them.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt, process::ExitStatusExt},
    },
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use husk_proto::{agent, agent_ttrpc, machine, machine_ttrpc};
use tokio::sync::mpsc;
use ttrpc::{
    Code,
    r#async::{Server, ServerStreamSender, TtrpcContext, transport::Listener},
};

type Answer<T> = ttrpc::Result<T>;

/// Bytes of a template's memory, and where more of it is put.
const TEMPLATE: u64 = 256 << 20;
const ADDED: u64 = 1 << 32;

fn refuse<T>(code: Code, message: impl Into<String>) -> Answer<T> {
    Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
        code,
        message.into(),
    )))
}

/// Serves on the inherited sockets until the machine socket closes.
pub(crate) fn run() -> ! {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let vmm = Arc::new(Vmm::default());
        // SAFETY: the shim hands over both descriptors by these numbers.
        let (machine, descriptors) = unsafe {
            (
                UnixStream::from_raw_fd(husk_proto::MACHINE_FD),
                OwnedFd::from_raw_fd(husk_proto::DESCRIPTOR_FD),
            )
        };
        let gone = machine.try_clone().unwrap();
        let receiver = vmm.clone();
        thread::spawn(move || receive_all(&descriptors, &receiver.tokens));
        let _server = serve(machine, machine_ttrpc::create_machine(vmm)).await;
        loop {
            let mut poll = libc::pollfd {
                fd: gone.as_raw_fd(),
                events: 0,
                revents: 0,
            };
            // SAFETY: one pollfd, no waiting.
            if unsafe { libc::poll(&raw mut poll, 1, 0) } > 0 {
                std::process::exit(0);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
}

async fn serve(socket: UnixStream, service: HashMap<String, ttrpc::r#async::Service>) -> Server {
    socket.set_nonblocking(true).unwrap();
    let socket = tokio::net::UnixStream::from_std(socket).unwrap();
    let once = stream::iter([io::Result::Ok(socket)]).chain(stream::pending());
    let mut server = Server::new()
        .add_listener(Listener::new(once))
        .register_service(service);
    server.start().await.unwrap();
    server
}

type Tokens = Mutex<HashMap<u64, OwnedFd>>;

fn receive_all(socket: &OwnedFd, tokens: &Tokens) {
    #[repr(C, align(8))]
    struct Control([u8; 64]);
    loop {
        let mut token = [0; 8];
        let mut part = libc::iovec {
            iov_base: token.as_mut_ptr().cast(),
            iov_len: 8,
        };
        let mut control = Control([0; 64]);
        // SAFETY: plain data; all buffers are on this stack.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = 64;
        // SAFETY: as above.
        if unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) }
            != 8
        {
            return;
        }
        // SAFETY: one control message with one descriptor was received.
        let fd = unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            OwnedFd::from_raw_fd(std::ptr::read_unaligned(libc::CMSG_DATA(header).cast()))
        };
        tokens.lock().unwrap().insert(u64::from_le_bytes(token), fd);
    }
}

#[derive(Default)]
struct Vmm {
    tokens: Tokens,
    guest: Arc<Guest>,
    panicked: tokio::sync::Notify,
    /// What the kernel file said.
    kernel: Mutex<String>,
    paused: AtomicBool,
}

/// What the memory of a saved machine holds.
const MEMORY: &[u8] = b"guest memory";

impl Vmm {
    async fn take(&self, token: u64) -> OwnedFd {
        // Sent before the request, but received by another thread here.
        for _ in 0..1000 {
            if let Some(fd) = self.tokens.lock().unwrap().remove(&token) {
                return fd;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("no descriptor with token {token}");
    }
}

#[async_trait]
impl machine_ttrpc::Machine for Vmm {
    async fn boot(
        &self,
        _: &TtrpcContext,
        r: machine::BootRequest,
    ) -> Answer<machine::BootResponse> {
        let _kvm = self.take(r.kvm_fd).await;
        let mut kernel = String::new();
        std::fs::File::from(self.take(r.kernel_fd).await)
            .read_to_string(&mut kernel)
            .unwrap();
        let _initrd = self.take(r.initrd_fd).await;
        let agent = UnixStream::from(self.take(r.agent_fd).await);
        // Every template has the usual size.
        let booted = (r.memory_bytes, r.vcpus);
        assert!(r.possible_vcpus == 0 || (r.possible_vcpus, booted) == (8, (TEMPLATE, 1)));
        *self.kernel.lock().unwrap() = kernel.clone();
        *self.guest.kernel.lock().unwrap() = kernel.clone();
        match kernel.trim() {
            "no elf" => return refuse(Code::INVALID_ARGUMENT, "kernel_fd: not an ELF file"),
            "die" => {
                eprintln!("husk-vmm: out of ideas");
                std::process::exit(9);
            }
            "silent" => std::mem::forget(agent),
            "panic" => {
                std::mem::forget(agent);
                self.panicked.notify_one();
            }
            _ => {
                let server = serve(agent, agent_ttrpc::create_agent(self.guest.clone())).await;
                std::mem::forget(server);
            }
        }
        Ok(machine::BootResponse::default())
    }

    async fn status(
        &self,
        _: &TtrpcContext,
        _: machine::StatusRequest,
    ) -> Answer<machine::StatusResponse> {
        Ok(machine::StatusResponse {
            console: b"Linux version 6.12-fake\nlast words\n".to_vec(),
            ..machine::StatusResponse::default()
        })
    }

    async fn share(
        &self,
        _: &TtrpcContext,
        r: machine::ShareRequest,
    ) -> Answer<machine::ShareResponse> {
        let tree = self.take(r.fd).await;
        self.guest.shares.lock().unwrap().insert(r.name, tree);
        Ok(machine::ShareResponse::default())
    }

    async fn unshare(
        &self,
        _: &TtrpcContext,
        r: machine::UnshareRequest,
    ) -> Answer<machine::UnshareResponse> {
        match self.guest.shares.lock().unwrap().remove(&r.name) {
            Some(_) => Ok(machine::UnshareResponse::default()),
            None => refuse(Code::NOT_FOUND, r.name),
        }
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        r: machine::ConnectRequest,
    ) -> Answer<machine::ConnectResponse> {
        for connection in r.connections {
            let mut stream = UnixStream::from(self.take(connection.fd).await);
            let mut id = [0; 8];
            stream.read_exact(&mut id).unwrap();
            self.guest
                .streams
                .lock()
                .unwrap()
                .insert(u64::from_le_bytes(id), stream);
        }
        Ok(machine::ConnectResponse::default())
    }

    async fn restore(
        &self,
        _: &TtrpcContext,
        r: machine::RestoreRequest,
    ) -> Answer<machine::RestoreResponse> {
        let _kvm = self.take(r.kvm_fd).await;
        let mut memory = std::fs::File::from(self.take(r.memory_fd).await);
        let mut state = std::fs::File::from(self.take(r.state_fd).await);
        let agent = UnixStream::from(self.take(r.agent_fd).await);
        let place = std::fs::read_link(format!("/proc/self/fd/{}", state.as_raw_fd()));
        let place = place.unwrap().parent().unwrap().to_owned();
        // A template that is tried before it is published; what is wrong shows later.
        let tried = place.to_str().unwrap().contains("/.new-");
        if tried {
            assert_eq!(r.pages_fd, 0);
            touch(&memory);
        } else {
            // Touched before the agent answered.
            let mut pages = [0; 16];
            let mut file = std::fs::File::from(self.take(r.pages_fd).await);
            file.read_exact(&mut pages).unwrap();
            assert_eq!(
                pages,
                [0, 0x30, 0, 0, 0, 0, 0, 0, 3, 0x10, 0, 0, 0, 0, 0, 0]
            );
        }
        if !tried && peek(&state).contains("clone-vanishes") {
            // Under our feet: whoever holds the descriptors has the template all the same.
            std::fs::remove_file(place.join("state")).unwrap();
            std::fs::rename(&place, place.with_file_name(".old-by-test")).unwrap();
        }
        let (mut pages, mut said) = (Vec::new(), String::new());
        memory.read_to_end(&mut pages).unwrap();
        state.read_to_string(&mut said).unwrap();
        assert!(pages.starts_with(MEMORY));
        if tried && !said.contains("try-fails") {
            said.clear();
        }
        if said.contains("try-fails") {
            return refuse(Code::INVALID_ARGUMENT, "state_fd: of another machine");
        }
        if said.contains("clone-unfit") {
            return refuse(Code::INVALID_ARGUMENT, "state_fd: wrong checksum");
        }
        if said.contains("clone-fails") {
            return refuse(Code::INTERNAL, "KVM_SET_CPUID2: no");
        }
        if said.contains("clone-dies") {
            eprintln!("husk-vmm: bus error");
            std::process::exit(9);
        }
        *self.guest.kernel.lock().unwrap() = said.clone();
        let added = match r.memory_bytes {
            0 => 0,
            bytes => bytes - TEMPLATE,
        };
        if r.vcpus > 8 {
            return refuse(Code::OUT_OF_RANGE, "vcpus: too many");
        }
        *self.guest.added.lock().unwrap() = added;
        if said.contains("clone-silent") {
            std::mem::forget(agent);
        } else {
            let server = serve(agent, agent_ttrpc::create_agent(self.guest.clone())).await;
            std::mem::forget(server);
        }
        Ok(machine::RestoreResponse {
            added_start: if added > 0 { ADDED } else { 0 },
            added_bytes: added,
            ..machine::RestoreResponse::default()
        })
    }

    async fn save(
        &self,
        _: &TtrpcContext,
        r: machine::SaveRequest,
    ) -> Answer<machine::SaveResponse> {
        let memory = std::fs::File::from(self.take(r.memory_fd).await);
        let state = std::fs::File::from(self.take(r.state_fd).await);
        let kernel = self.kernel.lock().unwrap().clone();
        if kernel.contains("save-hangs") {
            std::future::pending::<()>().await;
        }
        if kernel.contains("save-fails") {
            return refuse(Code::INTERNAL, "pwrite: No space left on device");
        }
        if !self.paused.load(Ordering::SeqCst) || !self.guest.prepared.load(Ordering::SeqCst) {
            return refuse(Code::FAILED_PRECONDITION, "not paused, or not prepared");
        }
        if self.guest.greeted.load(Ordering::SeqCst) {
            return refuse(Code::FAILED_PRECONDITION, "the guest has an identity");
        }
        memory.set_len(1 << 20).unwrap();
        (&memory).write_all(MEMORY).unwrap();
        (&state).write_all(kernel.as_bytes()).unwrap();
        Ok(machine::SaveResponse::default())
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        _: machine::PauseRequest,
    ) -> Answer<machine::PauseResponse> {
        self.paused.store(true, Ordering::SeqCst);
        Ok(machine::PauseResponse::default())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        _: machine::ResumeRequest,
    ) -> Answer<machine::ResumeResponse> {
        refuse(Code::UNIMPLEMENTED, "resume")
    }

    async fn stop(
        &self,
        _: &TtrpcContext,
        _: machine::StopRequest,
    ) -> Answer<machine::StopResponse> {
        std::process::exit(0)
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        _: machine::WaitRequest,
    ) -> Answer<machine::WaitResponse> {
        self.panicked.notified().await;
        Ok(machine::WaitResponse {
            reason: machine::wait_response::Reason::PANICKED.into(),
            detail: "not syncing: no init".into(),
            console: b"line one\nKernel panic - not syncing: no init\n".to_vec(),
            ..machine::WaitResponse::default()
        })
    }
}

/// Writes to the fourth page of guest memory, and reads nothing.
fn touch(memory: &std::fs::File) {
    // SAFETY: a new mapping of a file of 1 MiB, kept for as long as this process lives.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let (fd, private) = (memory.as_raw_fd(), libc::MAP_PRIVATE);
        let at = libc::mmap(std::ptr::null_mut(), 1 << 20, protection, private, fd, 0);
        assert_ne!(at, libc::MAP_FAILED);
        at.cast::<u8>().add(3 * 4096).write_volatile(1);
    }
}

fn peek(file: &std::fs::File) -> String {
    let mut text = [0; 256];
    let length = std::os::unix::fs::FileExt::read_at(file, &mut text, 0).unwrap();
    String::from_utf8_lossy(&text[..length]).into_owned()
}

/// A process of the "guest".
struct Running {
    args: Vec<String>,
    stdio: agent::Stdio,
    /// 0 before its start.
    pid: i32,
}

#[derive(Default)]
struct Guest {
    shares: Mutex<HashMap<String, OwnedFd>>,
    streams: Mutex<HashMap<u64, UnixStream>>,
    processes: Mutex<HashMap<(String, String), Running>>,
    events: Mutex<Option<mpsc::UnboundedSender<agent::Event>>>,
    kernel: Mutex<String>,
    /// Bytes of memory that were added.
    added: Mutex<u64>,
    prepared: AtomicBool,
    greeted: AtomicBool,
}

impl Guest {
    async fn stdio(&self, id: u64) -> Stdio {
        if id == 0 {
            return Stdio::null();
        }
        for _ in 0..1000 {
            if let Some(stream) = self.streams.lock().unwrap().remove(&id) {
                return OwnedFd::from(stream).into();
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("no stream {id}");
    }

    /// Whether the last argument of a process is `word`.
    fn is_told(&self, key: &(String, String), word: &str) -> bool {
        let processes = self.processes.lock().unwrap();
        let process = processes.get(key);
        process.is_some_and(|process| process.args.last().is_some_and(|arg| arg == word))
    }

    fn tell_exit(&self, container: &str, exec: &str, status: u32) {
        let exit = agent::ProcessExit {
            container_id: container.into(),
            exec_id: exec.into(),
            status,
            ..agent::ProcessExit::default()
        };
        let event = agent::Event {
            event: Some(agent::event::Event::Exit(exit)),
            ..agent::Event::default()
        };
        if let Some(events) = &*self.events.lock().unwrap() {
            events.send(event).unwrap();
        }
    }

    fn add(&self, container: &str, exec: &str, process: &serde_json::Value, stdio: agent::Stdio) {
        let args = process["args"].as_array().unwrap().iter();
        let args = args.map(|arg| arg.as_str().unwrap().to_owned()).collect();
        let running = Running {
            args,
            stdio,
            pid: 0,
        };
        self.processes
            .lock()
            .unwrap()
            .insert((container.into(), exec.into()), running);
    }
}

#[async_trait]
impl agent_ttrpc::Agent for Guest {
    async fn hello(
        &self,
        _: &TtrpcContext,
        r: agent::HelloRequest,
    ) -> Answer<agent::HelloResponse> {
        assert!(r.entropy.len() >= 32 && r.wall_clock_ns > 0);
        self.greeted.store(true, Ordering::SeqCst);
        Ok(agent::HelloResponse {
            version: "fake".into(),
            kernel_release: "6.12-fake".into(),
            ..agent::HelloResponse::default()
        })
    }

    async fn grow(&self, _: &TtrpcContext, r: agent::GrowRequest) -> Answer<agent::GrowResponse> {
        assert!(self.greeted.load(Ordering::SeqCst));
        if self.kernel.lock().unwrap().contains("clone-cannot-grow") {
            return refuse(Code::INTERNAL, "memory/probe: ENOMEM");
        }
        let added = *self.added.lock().unwrap();
        let start = if added > 0 { ADDED } else { 0 };
        match (r.memory_start, r.memory_bytes, r.vcpus) {
            (_, 0, 0 | 1) => refuse(Code::INVALID_ARGUMENT, "nothing to grow by"),
            (at, bytes, _) if (at, bytes) == (start, added) => Ok(agent::GrowResponse::default()),
            other => refuse(
                Code::INVALID_ARGUMENT,
                format!("not what was added: {other:?}"),
            ),
        }
    }

    async fn set_clock(
        &self,
        _: &TtrpcContext,
        _: agent::SetClockRequest,
    ) -> Answer<agent::SetClockResponse> {
        Ok(agent::SetClockResponse::default())
    }

    async fn prepare(
        &self,
        _: &TtrpcContext,
        _: agent::PrepareRequest,
    ) -> Answer<agent::PrepareResponse> {
        if self.kernel.lock().unwrap().contains("prepare-fails") {
            return refuse(Code::INTERNAL, "mount /sys/fs/cgroup: EINVAL");
        }
        self.prepared.store(true, Ordering::SeqCst);
        Ok(agent::PrepareResponse::default())
    }

    async fn events(
        &self,
        _: &TtrpcContext,
        _: agent::EventsRequest,
        sender: ServerStreamSender<agent::Event>,
    ) -> Answer<()> {
        let (events, mut queue) = mpsc::unbounded_channel();
        *self.events.lock().unwrap() = Some(events);
        while let Some(event) = queue.recv().await {
            sender.send(&event).await?;
        }
        Ok(())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        r: agent::CreateContainerRequest,
    ) -> Answer<agent::CreateContainerResponse> {
        let spec: serde_json::Value = serde_json::from_slice(&r.spec).unwrap();
        let root = spec["root"]["path"].as_str().unwrap();
        let share = root.strip_prefix("/run/husk/shares/").unwrap();
        if !self.shares.lock().unwrap().contains_key(share) {
            return refuse(
                Code::INVALID_ARGUMENT,
                format!("root.path: no share {share}"),
            );
        }
        if spec["unknown"].is_object() {
            return refuse(Code::INVALID_ARGUMENT, "unknown: not supported");
        }
        self.add(
            &r.container_id,
            "",
            &spec["process"],
            r.stdio.unwrap_or_default(),
        );
        Ok(agent::CreateContainerResponse::default())
    }

    async fn exec(&self, _: &TtrpcContext, r: agent::ExecRequest) -> Answer<agent::ExecResponse> {
        let process = serde_json::from_slice(&r.process).unwrap();
        self.add(
            &r.container_id,
            &r.exec_id,
            &process,
            r.stdio.unwrap_or_default(),
        );
        Ok(agent::ExecResponse::default())
    }

    async fn start(
        &self,
        _: &TtrpcContext,
        r: agent::StartRequest,
    ) -> Answer<agent::StartResponse> {
        let key = (r.container_id.clone(), r.exec_id.clone());
        let (args, stdio) = {
            let processes = self.processes.lock().unwrap();
            let process = &processes[&key];
            (process.args.clone(), process.stdio.clone())
        };
        let child = Command::new(&args[0])
            .args(&args[1..])
            .process_group(0)
            .stdin(self.stdio(stdio.stdin).await)
            .stdout(self.stdio(stdio.stdout).await)
            .stderr(self.stdio(stdio.stderr).await)
            .spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(e) => return refuse(Code::INVALID_ARGUMENT, format!("exec {}: {e}", args[0])),
        };
        let pid = i32::try_from(child.id()).unwrap();
        self.processes.lock().unwrap().get_mut(&key).unwrap().pid = pid;
        // The exit may well overtake the answer to this request, as in a real guest.
        let events = self.events.lock().unwrap().clone();
        thread::spawn(move || {
            let status = child.wait().unwrap();
            let code = status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap());
            let exit = agent::ProcessExit {
                container_id: key.0,
                exec_id: key.1,
                status: u32::try_from(code).unwrap(),
                ..agent::ProcessExit::default()
            };
            let event = agent::Event {
                event: Some(agent::event::Event::Exit(exit)),
                ..agent::Event::default()
            };
            let _ = events.unwrap().send(event);
        });
        if args.last().is_some_and(|arg| arg == "slow-start") {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        if args.last().is_some_and(|arg| arg == "start-times-out") {
            return refuse(Code::DEADLINE_EXCEEDED, "timeout");
        }
        Ok(agent::StartResponse::default())
    }

    async fn signal(
        &self,
        _: &TtrpcContext,
        r: agent::SignalRequest,
    ) -> Answer<agent::SignalResponse> {
        if self.is_told(&(r.container_id.clone(), String::new()), "unkillable") {
            return Ok(agent::SignalResponse::default());
        }
        let processes = self.processes.lock().unwrap();
        for ((container, exec), process) in &*processes {
            if *container != r.container_id || !(r.all || *exec == r.exec_id) {
                continue;
            }
            if process.pid == 0 {
                self.tell_exit(container, exec, 128 + r.signal);
            } else {
                // SAFETY: kill(2) takes numbers.
                unsafe { libc::kill(-process.pid, i32::try_from(r.signal).unwrap()) };
            }
        }
        Ok(agent::SignalResponse::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        _: agent::ResizePtyRequest,
    ) -> Answer<agent::ResizePtyResponse> {
        Ok(agent::ResizePtyResponse::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        r: agent::DeleteRequest,
    ) -> Answer<agent::DeleteResponse> {
        let key = (r.container_id, r.exec_id);
        if self.is_told(&key, "slow-delete") {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        match self.processes.lock().unwrap().remove(&key) {
            Some(_) => Ok(agent::DeleteResponse::default()),
            None => refuse(Code::NOT_FOUND, "no such process"),
        }
    }

    async fn pause(
        &self,
        _: &TtrpcContext,
        _: agent::PauseRequest,
    ) -> Answer<agent::PauseResponse> {
        Ok(agent::PauseResponse::default())
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        _: agent::ResumeRequest,
    ) -> Answer<agent::ResumeResponse> {
        Ok(agent::ResumeResponse::default())
    }

    async fn update(
        &self,
        _: &TtrpcContext,
        _: agent::UpdateRequest,
    ) -> Answer<agent::UpdateResponse> {
        Ok(agent::UpdateResponse::default())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        _: agent::StatsRequest,
    ) -> Answer<agent::StatsResponse> {
        let files = HashMap::from([("memory.current".to_owned(), "4096\n".to_owned())]);
        Ok(agent::StatsResponse {
            files,
            ..agent::StatsResponse::default()
        })
    }
}
