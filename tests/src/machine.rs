//! husk-vmm driven by its contract alone, with no shim: what boots is whatever initrd a test gives it.

use std::{
    fs::{self, File},
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            fs::{FileExt, MetadataExt, OpenOptionsExt},
            net::UnixStream,
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Once,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use husk_proto::{
    DESCRIPTOR_FD, MACHINE_FD,
    agent::HelloRequest,
    agent_ttrpc::AgentClient,
    machine::{
        AttachRequest, BootRequest, DetachRequest, PauseRequest, RestoreRequest, RestoreResponse,
        ResumeRequest, SaveRequest, StatusRequest, StatusResponse, StopRequest, WaitRequest,
        WaitResponse,
    },
    machine_ttrpc::MachineClient,
};
use rustix::{
    io::{FdFlags, dup2, fcntl_setfd},
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
        SocketType, sendmsg, socketpair,
    },
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

use crate::{command::eventually, cpio, ctr::PROBE};

/// Where `make install` puts them in the lab.
pub const VMM: &str = "/usr/local/lib/husk/husk-vmm";
pub const KERNEL: &str = "/usr/local/lib/husk/vmlinux";
pub const INITRD: &str = "/usr/local/lib/husk/initrd.img";

/// What a hostile guest says on its console when its act is over and the machine still there.
pub const HOSTILE_DONE: &str = "hostile: done\n";
/// What it says when it could not even begin, or go on: a test that tried nothing.
pub const HOSTILE_FAILED: &str = "hostile: could not fight: ";

/// Where a guest that was given an interface answers with what it is sent, by TCP and UDP.
pub const ECHO_PORT: u16 = 7;

/// A saved machine: two files without a name.
pub struct Saved {
    pub memory: File,
    pub state: File,
}

/// What a guest that serves its test has found.
#[derive(Debug, Clone, Copy)]
pub struct Report {
    /// Rounds of work done, and how many of them came out wrong.
    pub rounds: u64,
    pub wrong: u64,
    /// The latest time that the guest has seen, and how far it ever went back.
    pub monotonic_ns: u64,
    pub backwards: u64,
    /// How much longer than asked for the guest ever slept.
    pub late_ns: u64,
}

impl Report {
    pub const SIZE: usize = 40;

    pub fn to_bytes(self) -> Vec<u8> {
        let Report {
            rounds,
            wrong,
            monotonic_ns,
            backwards,
            late_ns,
        } = self;
        to_bytes(&[rounds, wrong, monotonic_ns, backwards, late_ns])
    }

    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let [rounds, wrong, monotonic_ns, backwards, late_ns] = from_bytes(bytes);
        Report {
            rounds,
            wrong,
            monotonic_ns,
            backwards,
            late_ns,
        }
    }
}

/// What two clocks of such a guest show at one moment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clocks {
    /// Ticks of the time stamp counter.
    pub tsc: u64,
    /// CLOCK_MONOTONIC_RAW, which is the kernel's clock source as it runs.
    pub raw_ns: u64,
}

impl Clocks {
    pub const SIZE: usize = 16;

    pub fn to_bytes(self) -> Vec<u8> {
        to_bytes(&[self.tsc, self.raw_ns])
    }

    pub fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let [tsc, raw_ns] = from_bytes(bytes);
        Clocks { tsc, raw_ns }
    }
}

fn to_bytes(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn from_bytes<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    let mut numbers = bytes.chunks_exact(8).map(number);
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}

/// The host's end of the connection to such a guest.
pub struct Guest(tokio::net::UnixStream);

impl Guest {
    /// # Errors
    /// When the socket cannot be watched.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream).context("watch a socket")?;
        Ok(Guest(stream))
    }

    /// Sends a command and reads an answer of `N` bytes.
    ///
    /// # Errors
    /// When the guest does not answer in the time all calls have.
    pub async fn ask<const N: usize>(&mut self, command: &[u8]) -> Result<[u8; N]> {
        let mut answer = [0; N];
        let asked = async {
            self.0.write_all(command).await?;
            self.0.read_exact(&mut answer).await
        };
        let asked = tokio::time::timeout(PATIENCE, asked).await;
        asked.context("the guest does not answer")??;
        Ok(answer)
    }

    /// # Errors
    /// As [`Self::ask`].
    pub async fn report(&mut self) -> Result<Report> {
        Ok(Report::from_bytes(&self.ask(b"c").await?))
    }

    /// # Errors
    /// As [`Self::ask`].
    pub async fn clocks(&mut self) -> Result<Clocks> {
        Ok(Clocks::from_bytes(&self.ask(b"t").await?))
    }
}

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
    /// vCPUs that what is restored from this machine may have, for [`Machine::boot`]; 0: as many as it has.
    pub possible_vcpus: u32,
}

impl Machine {
    /// Starts husk-vmm. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn() -> Result<Self> {
        Self::spawn_with(Stdio::inherit())
    }

    /// The same, with another place for its log.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn spawn_with(log: Stdio) -> Result<Self> {
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
            .stdout(Stdio::null())
            .stderr(log);
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
            possible_vcpus: 0,
        })
    }

    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// How often a thread of the VMM has gone to sleep.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn sleeps(&self, thread: &str) -> Result<u64> {
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let status = fs::read_to_string(task?.path().join("status"))?;
            let field = |name: &str| {
                let mut lines = status.lines();
                lines.find_map(|line| Some(line.strip_prefix(name)?.trim()))
            };
            if field("Name:") == Some(thread) {
                let times = field("voluntary_ctxt_switches:").context("no count")?;
                return Ok(times.parse()?);
            }
        }
        bail!("the VMM has no thread {thread}")
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
        let (agent, theirs) = UnixStream::pair().context("make a socket pair")?;
        self.boot_with(&theirs, kernel, initrd, memory_mib, vcpus, cmdline)
            .await?;
        Ok(agent)
    }

    /// Boots kernel and initrd with a socket for the agent's connection.
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub async fn boot_with(
        &mut self,
        agent: &UnixStream,
        kernel: &Path,
        initrd: &Path,
        memory_mib: u64,
        vcpus: u32,
        cmdline: &str,
    ) -> Result<()> {
        let open =
            |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
        let request = BootRequest {
            kvm_fd: self.pass(kvm()?)?,
            kernel_fd: self.pass(open(kernel)?)?,
            initrd_fd: self.pass(open(initrd)?)?,
            agent_fd: self.pass(agent)?,
            memory_bytes: memory_mib << 20,
            vcpus,
            possible_vcpus: self.possible_vcpus,
            cmdline: cmdline.to_owned(),
            ..Default::default()
        };
        self.client.boot(patience(), &request).await?;
        Ok(())
    }

    /// Restores a machine; the answer is the host's end of the agent's connection.
    ///
    /// # Errors
    /// What the VMM answers.
    pub async fn restore(&mut self, saved: &Saved, pages: Option<&File>) -> Result<UnixStream> {
        let (agent, _) = self.restore_as(saved, pages, 0, 0).await?;
        Ok(agent)
    }

    /// The same with so much memory and so many vCPUs, or with 0 as many as were saved.
    ///
    /// # Errors
    /// What the VMM answers.
    pub async fn restore_as(
        &mut self,
        saved: &Saved,
        pages: Option<&File>,
        memory_mib: u64,
        vcpus: u32,
    ) -> Result<(UnixStream, RestoreResponse)> {
        let (agent, theirs) = UnixStream::pair().context("make a socket pair")?;
        let restored = self
            .restore_with(&theirs, saved, pages, memory_mib, vcpus)
            .await?;
        Ok((agent, restored))
    }

    /// The same with a socket for the agent's connection.
    ///
    /// # Errors
    /// What the VMM answers.
    pub async fn restore_with(
        &mut self,
        agent: &UnixStream,
        saved: &Saved,
        pages: Option<&File>,
        memory_mib: u64,
        vcpus: u32,
    ) -> Result<RestoreResponse> {
        let request = RestoreRequest {
            kvm_fd: self.pass(kvm()?)?,
            memory_fd: self.pass(&saved.memory)?,
            state_fd: self.pass(&saved.state)?,
            agent_fd: self.pass(agent)?,
            pages_fd: pages.map_or(Ok(0), |pages| self.pass(pages))?,
            memory_bytes: memory_mib << 20,
            vcpus,
            ..Default::default()
        };
        Ok(self.client.restore(patience(), &request).await?)
    }

    /// Saves the machine, which must be paused, to files on the lab's disk.
    ///
    /// # Errors
    /// What the VMM answers.
    pub async fn save(&mut self) -> Result<Saved> {
        let saved = Saved {
            memory: scratch_file()?,
            state: scratch_file()?,
        };
        let request = SaveRequest {
            memory_fd: self.pass(&saved.memory)?,
            state_fd: self.pass(&saved.state)?,
            ..Default::default()
        };
        self.client.save(patience(), &request).await?;
        Ok(saved)
    }

    /// Plugs an interface in; the answer is its slot.
    ///
    /// # Errors
    /// What the VMM answers.
    pub async fn attach(&mut self, taps: &[OwnedFd], mac: [u8; 6], mtu: u32) -> Result<u8> {
        self.attach_by(taps, &[], mac, mtu).await
    }

    /// The same, with the host's kernel to move the packets where there are `vhosts`.
    ///
    /// # Errors
    /// What the VMM answers.
    pub async fn attach_by(
        &mut self,
        taps: &[OwnedFd],
        vhosts: &[OwnedFd],
        mac: [u8; 6],
        mtu: u32,
    ) -> Result<u8> {
        let mut request = AttachRequest {
            mac: mac.to_vec(),
            mtu,
            ..Default::default()
        };
        for tap in taps {
            request.tap_fds.push(self.pass(tap)?);
        }
        for vhost in vhosts {
            request.vhost_fds.push(self.pass(vhost)?);
        }
        let attached = self.client.attach(patience(), &request).await?;
        attached.slot.try_into().context("a slot")
    }

    /// # Errors
    /// What the VMM answers.
    pub async fn detach(&self, slot: u8) -> Result<()> {
        let request = DetachRequest {
            slot: slot.into(),
            ..Default::default()
        };
        self.client.detach(patience(), &request).await?;
        Ok(())
    }

    /// # Errors
    /// What the VMM answers.
    pub async fn pause(&self) -> Result<()> {
        self.client.pause(patience(), &PauseRequest::new()).await?;
        Ok(())
    }

    /// # Errors
    /// What the VMM answers.
    pub async fn resume(&self) -> Result<()> {
        self.client
            .resume(patience(), &ResumeRequest::new())
            .await?;
        Ok(())
    }

    /// # Errors
    /// What the VMM answers.
    pub async fn stop(&self) -> Result<()> {
        self.client.stop(patience(), &StopRequest::new()).await?;
        Ok(())
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

/// An initrd whose `/init` is the probe.
///
/// # Panics
/// When it cannot be written.
pub fn probe_initrd() -> PathBuf {
    static WRITTEN: Once = Once::new();
    let path = PathBuf::from("/var/tmp/probe-initrd.img");
    WRITTEN.call_once(|| {
        let probe = std::fs::read(PROBE).expect("read the probe");
        let file = File::create(&path).expect("create the initrd");
        cpio::write_init(file, &probe).expect("write the initrd");
    });
    path
}

/// Runs what a test asks of machines.
///
/// # Panics
/// When there can be no runtime.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future)
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

/// The pages of the memory file that the VMM `pid` has copied, as a prefetch list: to be written, before
/// the vCPUs run.
///
/// # Errors
/// When /proc does not tell.
pub fn pages_written(pid: u32, memory: &File) -> Result<File> {
    const PAGE: u64 = 4096;
    const PRESENT: u64 = 1 << 63;
    const OF_FILE: u64 = 1 << 61;
    const TO_BE_WRITTEN: u64 = 1;
    const BEFORE_ALL: u64 = 2;
    let inode = memory.metadata()?.ino();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut list = Vec::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [range, _, offset, _, number, ..] = fields.as_slice() else {
            continue;
        };
        if number.parse() != Ok(inode) {
            continue;
        }
        let hex = |text| u64::from_str_radix(text, 16);
        let (start, end) = range.split_once('-').context("a range")?;
        let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
        let mut entries = vec![0; ((end - start) / PAGE * 8) as usize];
        pagemap.read_exact_at(&mut entries, start / PAGE * 8)?;
        for (page, entry) in (offset..)
            .step_by(PAGE as usize)
            .zip(entries.chunks_exact(8))
        {
            let entry = u64::from_le_bytes(entry.try_into()?);
            if entry & PRESENT != 0 && entry & OF_FILE == 0 {
                match list.last_mut() {
                    Some((first, length)) if *first + *length == page => *length += PAGE,
                    _ => list.push((page, PAGE)),
                }
            }
        }
    }
    let file = scratch_file()?;
    let bytes: Vec<u8> = list
        .iter()
        .flat_map(|(offset, length)| [*offset, *length | TO_BE_WRITTEN | BEFORE_ALL])
        .flat_map(u64::to_le_bytes)
        .collect();
    file.write_all_at(&bytes, 0)?;
    Ok(file)
}

/// Page faults of process `pid`, those that needed a disk included, and those that KVM took for its guest.
///
/// # Errors
/// When /proc does not tell.
pub fn page_faults(pid: u32) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let behind_name = stat.rsplit(") ").next().context("a stat line")?;
    // proc_pid_stat(5): minflt is field 10, majflt field 12; the name is the second.
    let field = |number: usize| behind_name.split(' ').nth(number - 3).context("a field");
    let (minor, major): (u64, u64) = (field(10)?.parse()?, field(12)?.parse()?);
    Ok(minor + major)
}

/// A file without a name, on the lab's disk.
///
/// # Errors
/// When it cannot be made.
pub fn scratch_file() -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::TMPFILE.bits() as i32)
        .open("/var/tmp")
        .context("make a file in /var/tmp")
}

fn kvm() -> Result<File> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .context("open /dev/kvm")
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
