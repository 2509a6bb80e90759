//! husk-vmm driven by its contract alone, with no shim: what boots is whatever initrd a test gives it.

use std::{
    fs::File,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use husk_proto::{
    DESCRIPTOR_FD, MACHINE_FD,
    agent::HelloRequest,
    agent_ttrpc::AgentClient,
    machine::{BootRequest, StatusRequest, StatusResponse, WaitRequest, WaitResponse},
    machine_ttrpc::MachineClient,
};
use rustix::{
    io::{FdFlags, dup2, fcntl_setfd},
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
        SocketType, sendmsg, socketpair,
    },
};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

use crate::command::eventually;

/// Where `make install` puts them in the lab.
pub const VMM: &str = "/usr/local/lib/husk/husk-vmm";
pub const KERNEL: &str = "/usr/local/lib/husk/vmlinux";
pub const INITRD: &str = "/usr/local/lib/husk/initrd.img";

/// The longest any call may take: the lab is a software CPU.
const PATIENCE: Duration = Duration::from_secs(60);

/// A husk-vmm process; killed when dropped.
pub struct Process(Child);

impl Process {
    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// When it does not, in the time all calls have.
    pub fn wait_gone(&mut self) -> Result<()> {
        eventually(Instant::now() + PATIENCE, || {
            self.0.try_wait().ok().flatten()
        })
        .with_context(|| format!("husk-vmm {} still runs", self.0.id()))?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// husk-vmm with the shim's ends of its sockets.
pub struct Machine {
    process: Process,
    client: MachineClient,
    descriptors: OwnedFd,
    next_token: u64,
}

impl Machine {
    /// Starts husk-vmm. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn() -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
        let (descriptors, their_descriptors) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .context("make a socket pair")?;
        // Above the two numbers they are to get, so that neither dup2 hits the other's source.
        let theirs = rustix::io::fcntl_dupfd_cloexec(&theirs, 10)?;
        let their_descriptors = rustix::io::fcntl_dupfd_cloexec(&their_descriptors, 10)?;
        let mut command = Command::new(VMM);
        // The shim starts it with nothing of its own; this parent is careless, for the VMM does not
        // rely on that.
        let forgotten = OwnedFd::from(File::open("/").context("open /")?);
        let forgotten = rustix::io::fcntl_dupfd_cloexec(&forgotten, 10)?;
        command
            .env("FORGOTTEN", "by the parent")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        // SAFETY: only dup2 and fcntl, allowed between fork and exec; the numbers are the contract's,
        // and nothing in this child owns them.
        unsafe {
            command.pre_exec(move || {
                inherit(&theirs, MACHINE_FD)?;
                inherit(&their_descriptors, DESCRIPTOR_FD)?;
                Ok(fcntl_setfd(&forgotten, FdFlags::empty())?)
            });
        }
        let child = command.spawn().with_context(|| format!("start {VMM}"))?;
        Ok(Machine {
            process: Process(child),
            client: MachineClient::new(connect(ours)?),
            descriptors,
            next_token: 1,
        })
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Hands over a descriptor; the answer is the token that names it.
    ///
    /// # Errors
    /// When the VMM is gone.
    pub fn pass(&mut self, descriptor: impl AsFd) -> Result<u64> {
        let token = self.next_token;
        self.next_token += 1;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor.as_fd()];
        ensure!(
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)),
            "no space for a descriptor"
        );
        let bytes = token.to_le_bytes();
        sendmsg(
            &self.descriptors,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .context("pass a descriptor")?;
        Ok(token)
    }

    /// Boots kernel and initrd; the answer is the host's end of the agent's connection.
    ///
    /// # Errors
    /// What the VMM answers, or a file that cannot be opened.
    pub async fn boot(
        &mut self,
        kernel: &Path,
        initrd: &Path,
        memory_mib: u64,
        vcpus: u32,
        cmdline: &str,
    ) -> Result<UnixStream> {
        let open =
            |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .context("open /dev/kvm")?;
        let (agent, theirs) = UnixStream::pair().context("make a socket pair")?;
        let request = BootRequest {
            kvm_fd: self.pass(kvm)?,
            kernel_fd: self.pass(open(kernel)?)?,
            initrd_fd: self.pass(open(initrd)?)?,
            agent_fd: self.pass(theirs)?,
            memory_bytes: memory_mib << 20,
            vcpus,
            cmdline: cmdline.to_owned(),
            ..Default::default()
        };
        self.client.boot(patience(), &request).await?;
        Ok(agent)
    }

    /// # Errors
    /// What the VMM answers.
    pub async fn status(&self) -> Result<StatusResponse> {
        Ok(self
            .client
            .status(patience(), &StatusRequest::new())
            .await?)
    }

    /// # Errors
    /// What the VMM answers, or that the guest did not end in time.
    pub async fn wait(&self) -> Result<WaitResponse> {
        Ok(self.client.wait(patience(), &WaitRequest::new()).await?)
    }

    /// Up to [`Machine::hang_up`].
    pub fn client(&self) -> &MachineClient {
        &self.client
    }

    /// Closes the machine's socket, as a shim does that dies.
    pub fn hang_up(self) -> Process {
        self.process
    }
}

/// Says hello to the agent at the other end: the moment a pod could start.
///
/// # Errors
/// When it does not answer, or not well.
pub async fn hello(agent: UnixStream) -> Result<AgentClient> {
    let client = AgentClient::new(connect(agent)?);
    let request = HelloRequest {
        wall_clock_ns: 1_800_000_000_000_000_000,
        entropy: vec![7; 64],
        ..Default::default()
    };
    client.hello(patience(), &request).await?;
    Ok(client)
}

pub fn patience() -> context::Context {
    context::with_duration(PATIENCE)
}

fn connect(stream: UnixStream) -> Result<Client> {
    stream.set_nonblocking(true)?;
    let stream = tokio::net::UnixStream::from_std(stream).context("watch a socket")?;
    Ok(Client::new(Socket::new(stream)))
}

/// Makes `number` another name of `descriptor` that survives exec.
fn inherit(descriptor: &OwnedFd, number: i32) -> io::Result<()> {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: the number is only named as dup2's target, and released again at once: whatever it
    // was before belonged to the parent's image, which exec is about to end.
    let mut target = unsafe { OwnedFd::from_raw_fd(number) };
    let result = dup2(descriptor, &mut target);
    let _ = target.into_raw_fd();
    result.map_err(Into::into)
}
