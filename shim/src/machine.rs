//! The shim's side of the machine contract (proto/protos/machine.proto): requests over ttrpc, and
//! the descriptors they name over a second socket. It knows the contract and nothing of pods.

use std::{
    io, mem,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream as StdUnixStream,
    },
    ptr,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use husk_proto::{machine as api, machine_ttrpc::MachineClient};
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::UnixStream,
    time::timeout,
};
use ttrpc::{
    Code,
    r#async::{Client, transport::Socket},
    context,
};

use crate::{
    config::Config,
    fault::Fault,
    network::{Tap, vhost},
    ration::Rationed,
    ready,
    shares::Share,
    untrusted,
};

/// For any request that the VMM can answer by itself.
const ANSWER: Duration = Duration::from_secs(10);

/// A VMM we can speak to.
pub struct Machine {
    client: MachineClient,
    descriptors: AsyncFd<OwnedFd>,
    next_token: AtomicU64,
}

/// The VMM's ends of both sockets, for it to inherit.
pub struct RemoteEnds {
    pub machine: OwnedFd,
    pub descriptors: OwnedFd,
}

/// What the VMM boots from. It keeps none of the paths.
#[derive(Clone, Copy)]
pub struct BootImage<'a> {
    pub kvm: BorrowedFd<'a>,
    pub kernel: BorrowedFd<'a>,
    pub initrd: BorrowedFd<'a>,
    /// Joined to the agent's connection.
    pub agent: BorrowedFd<'a>,
    /// vCPUs that its clones may have; 0 where there will be none.
    pub possible_vcpus: u32,
}

/// What the VMM restores a saved machine from.
#[derive(Clone, Copy)]
pub struct SavedImage<'a> {
    pub kvm: BorrowedFd<'a>,
    pub memory: BorrowedFd<'a>,
    pub state: BorrowedFd<'a>,
    pub pages: Option<BorrowedFd<'a>>,
    /// Joined to the agent's connection.
    pub agent: BorrowedFd<'a>,
    /// What it is to have; 0: as saved.
    pub memory_bytes: u64,
    /// How many it is to have; 0: as saved.
    pub vcpus: u32,
}

/// Memory that a restored machine has beyond what was saved: guest-physical address and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Added {
    pub start: u64,
    pub bytes: u64,
}

/// Why a saved machine was not restored.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// It is damaged, or not for this host.
    #[error("the VMM refuses it: {0}")]
    Unfit(String),
    /// Nothing is known against it.
    #[error("{0}")]
    Failed(Fault),
    /// The VMM has not survived it, or at least not answered.
    #[error("{0}")]
    Lost(Fault),
}

impl Machine {
    /// Makes both sockets. To be called in a tokio runtime.
    pub fn new() -> io::Result<(Self, RemoteEnds)> {
        let (ours, machine) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (channel, descriptors) = seqpacket_pair()?;
        let client = Client::new(Socket::new(Rationed::new(UnixStream::from_std(ours)?)));
        let this = Self {
            client: MachineClient::new(client),
            descriptors: ready::watch(channel, Interest::WRITABLE)?,
            next_token: AtomicU64::new(1),
        };
        let remote = RemoteEnds {
            machine: machine.into(),
            descriptors,
        };
        Ok((this, remote))
    }

    /// Boots; returns once the vCPUs run. The caller sets the limit.
    pub async fn boot(&self, config: &Config, image: BootImage<'_>) -> Result<(), Fault> {
        let request = api::BootRequest {
            kvm_fd: self.send(&image.kvm).await?,
            kernel_fd: self.send(&image.kernel).await?,
            initrd_fd: self.send(&image.initrd).await?,
            agent_fd: self.send(&image.agent).await?,
            memory_bytes: config.memory_mib << 20,
            vcpus: config.vcpus,
            possible_vcpus: image.possible_vcpus,
            cmdline: config.cmdline.clone(),
            ..api::BootRequest::default()
        };
        let answer = self
            .client
            .boot(context::Context::default(), &request)
            .await;
        answer.map_err(|e| Fault::of_call("boot the microVM", e))?;
        Ok(())
    }

    /// Restores what [`Self::save`] wrote; returns once the vCPUs run. The caller sets the limit.
    /// After a failure the VMM may still boot.
    pub async fn restore(&self, image: SavedImage<'_>) -> Result<Added, RestoreError> {
        let request = self.restore_request(image).await;
        let request = request.map_err(RestoreError::Failed)?;
        let answer = self
            .client
            .restore(context::Context::default(), &request)
            .await;
        match answer {
            Ok(restored) => Ok(Added {
                start: restored.added_start,
                bytes: restored.added_bytes,
            }),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::INVALID_ARGUMENT => {
                let reason = untrusted::message(status.message());
                Err(RestoreError::Unfit(reason))
            }
            Err(e @ ttrpc::Error::RpcStatus(_)) => {
                Err(RestoreError::Failed(Fault::of_call("restore it", e)))
            }
            Err(e) => Err(RestoreError::Lost(Fault::of_call("restore it", e))),
        }
    }

    async fn restore_request(&self, image: SavedImage<'_>) -> Result<api::RestoreRequest, Fault> {
        Ok(api::RestoreRequest {
            kvm_fd: self.send(&image.kvm).await?,
            memory_fd: self.send(&image.memory).await?,
            state_fd: self.send(&image.state).await?,
            agent_fd: self.send(&image.agent).await?,
            pages_fd: match &image.pages {
                Some(pages) => self.send(pages).await?,
                None => 0,
            },
            memory_bytes: image.memory_bytes,
            vcpus: image.vcpus,
            ..api::RestoreRequest::default()
        })
    }

    /// Stops the vCPUs.
    pub async fn pause(&self) -> Result<(), Fault> {
        let answer = self
            .client
            .pause(limited(), &api::PauseRequest::default())
            .await;
        answer.map_err(|e| Fault::of_call("pause the microVM", e))?;
        Ok(())
    }

    /// Writes a paused machine to two empty files. The caller sets the limit.
    pub async fn save(&self, memory: impl AsFd, state: impl AsFd) -> Result<(), Fault> {
        let request = api::SaveRequest {
            memory_fd: self.send(memory).await?,
            state_fd: self.send(state).await?,
            ..api::SaveRequest::default()
        };
        let answer = self
            .client
            .save(context::Context::default(), &request)
            .await;
        answer.map_err(|e| Fault::of_call("save the microVM", e))?;
        Ok(())
    }

    /// Exports a mount to the guest.
    pub async fn share(&self, share: Share) -> Result<(), Fault> {
        let request = api::ShareRequest {
            name: share.name,
            fd: self.send(&share.tree).await?,
            exclusive: share.exclusive,
            ..api::ShareRequest::default()
        };
        drop(share.tree);
        let answer = self.client.share(limited(), &request).await;
        answer.map_err(|e| Fault::of_call(&format!("share {}", request.name), e))?;
        Ok(())
    }

    pub async fn unshare(&self, name: String) -> Result<(), Fault> {
        let request = api::UnshareRequest {
            name,
            ..api::UnshareRequest::default()
        };
        let answer = self.client.unshare(limited(), &request).await;
        answer.map_err(|e| Fault::of_call(&format!("unshare {}", request.name), e))?;
        Ok(())
    }

    /// Plugs a tap in as a network interface, whose packets the host's kernel moves where `vhost` says so and it can; the
    /// slot on the guest's PCI bus that it has there.
    pub async fn attach(&self, tap: Tap, vhost: bool) -> Result<u32, Fault> {
        let mut request = api::AttachRequest {
            mac: tap.mac,
            mtu: tap.mtu,
            ..api::AttachRequest::default()
        };
        for queue in &tap.queues {
            request.tap_fds.push(self.send(queue).await?);
        }
        if vhost {
            // The VMM moves them itself where the host has none, or has no more of them.
            let opened = vhost::open(tap.queues.len());
            let opened = opened.inspect_err(|e| log::info!("the VMM moves the packets: {e}"));
            for vhost in opened.unwrap_or_default() {
                request.vhost_fds.push(self.send(vhost).await?);
            }
        }
        drop(tap.queues);
        let answer = self.client.attach(limited(), &request).await;
        let what = format!("plug in interface {}", tap.interface);
        Ok(answer.map_err(|e| Fault::of_call(&what, e))?.slot)
    }

    /// Pulls the network interface in this slot out.
    pub async fn detach(&self, slot: u32) -> Result<(), Fault> {
        let request = api::DetachRequest {
            slot,
            ..api::DetachRequest::default()
        };
        let answer = self.client.detach(limited(), &request).await;
        answer.map_err(|e| Fault::of_call(&format!("pull out the interface in slot {slot}"), e))?;
        Ok(())
    }

    /// Joins sockets to the agent's stream port.
    pub async fn connect_streams(&self, streams: Vec<OwnedFd>) -> Result<(), Fault> {
        if streams.is_empty() {
            return Ok(());
        }
        let mut request = api::ConnectRequest::default();
        for stream in streams {
            request.connections.push(api::Connection {
                fd: self.send(&stream).await?,
                port: husk_proto::STREAM_PORT,
                ..api::Connection::default()
            });
        }
        let answer = self.client.connect(limited(), &request).await;
        answer.map_err(|e| Fault::of_call("connect streams", e))?;
        Ok(())
    }

    /// The last of the guest's console.
    pub async fn console(&self) -> Result<Vec<u8>, Fault> {
        let request = api::StatusRequest::default();
        let answer = self.client.status(limited(), &request).await;
        Ok(answer
            .map_err(|e| Fault::of_call("status of the microVM", e))?
            .console)
    }

    /// Returns when the guest has ended.
    pub async fn wait(&self) -> Result<api::WaitResponse, Fault> {
        let request = api::WaitRequest::default();
        let answer = self
            .client
            .wait(context::Context::default(), &request)
            .await;
        answer.map_err(|e| Fault::of_call("wait for the microVM", e))
    }

    /// Sends one descriptor; its token may then be used in one request.
    async fn send(&self, fd: impl AsFd) -> Result<u64, Fault> {
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        let fd = fd.as_fd().as_raw_fd();
        let sent = timeout(ANSWER, async {
            loop {
                let mut ready = self.descriptors.writable().await?;
                let attempt = ready.try_io(|socket| send_descriptor(socket.as_raw_fd(), token, fd));
                if let Ok(outcome) = attempt {
                    return outcome;
                }
            }
        });
        match sent.await {
            Ok(Ok(())) => Ok(token),
            Ok(Err(e)) => Err(Fault::internal(format_args!(
                "send a descriptor to the VMM: {e}"
            ))),
            Err(_) => Err(Fault::internal(
                "send a descriptor to the VMM: it takes none",
            )),
        }
    }
}

fn limited() -> context::Context {
    context::with_duration(ANSWER)
}

fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds: [RawFd; 2] = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socketpair(2) writes two descriptors into an array of two.
    if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new and nobody else's.
    let (ours, theirs) = unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) };
    // The VMM reads with a thread that waits.
    // SAFETY: F_SETFL takes a number; the other status flags of a new socket are clear.
    if unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFL, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((ours, theirs))
}

/// One message: a token and a descriptor.
fn send_descriptor(socket: RawFd, token: u64, fd: RawFd) -> io::Result<()> {
    /// Room for one control message with one descriptor, aligned as cmsg(3) wants it.
    #[repr(C, align(8))]
    struct Control([u8; 64]);

    let mut token = token.to_le_bytes();
    let mut part = libc::iovec {
        iov_base: token.as_mut_ptr().cast(),
        iov_len: token.len(),
    };
    let mut control = Control([0; 64]);
    let length = mem::size_of::<RawFd>() as u32;
    // SAFETY: msghdr is plain data, for which zeroes are a value.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE, CMSG_LEN and CMSG_DATA compute; the first header of a buffer of 64 bytes
    // is not null, and one descriptor behind it (24 bytes in all) fits.
    unsafe {
        message.msg_controllen = libc::CMSG_SPACE(length) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
        ptr::write_unaligned(libc::CMSG_DATA(header).cast::<RawFd>(), fd);
    }
    // SAFETY: `message` points to `part` and `control`, which outlive the call.
    let sent = unsafe { libc::sendmsg(socket, &raw const message, libc::MSG_NOSIGNAL) };
    match sent {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use super::*;

    /// Receives one descriptor as the VMM does.
    fn receive(socket: &OwnedFd) -> (u64, OwnedFd) {
        #[repr(C, align(8))]
        struct Control([u8; 64]);
        let mut token = [0; 8];
        let mut part = libc::iovec {
            iov_base: token.as_mut_ptr().cast(),
            iov_len: 8,
        };
        let mut control = Control([0; 64]);
        // SAFETY: plain data.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.0.as_mut_ptr().cast();
        message.msg_controllen = 64;
        // SAFETY: all buffers are on this stack.
        let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
        assert_eq!(got, 8);
        // SAFETY: one control message was received.
        let fd = unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            assert_eq!((*header).cmsg_type, libc::SCM_RIGHTS);
            OwnedFd::from_raw_fd(ptr::read_unaligned(libc::CMSG_DATA(header).cast()))
        };
        (u64::from_le_bytes(token), fd)
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_tokens() {
        let (machine, remote) = Machine::new().unwrap();
        let directory = tempfile::tempdir().unwrap();
        for text in ["one", "two"] {
            let path = directory.path().join(text);
            std::fs::write(&path, text).unwrap();
            let sent = machine.send(File::open(path).unwrap()).await.unwrap();
            let (token, fd) = receive(&remote.descriptors);
            let mut read = String::new();
            File::from(fd).read_to_string(&mut read).unwrap();
            assert_eq!((token, read.as_str()), (sent, text));
        }
    }
}
