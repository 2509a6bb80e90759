//! The machine contract, by a client that is no shim: requests with descriptors that are none, or not what they
//! should be, and frames that are none. No machine ever runs here: /dev/null is no KVM.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, OnceLock},
    time::Duration,
};

use arbitrary::{Arbitrary, Unstructured};
use husk_proto::{
    machine::{
        AttachRequest, BootRequest, ConnectRequest, Connection, DetachRequest, PauseRequest,
        RestoreRequest, ResumeRequest, SaveRequest, ShareRequest, StatusRequest, StopRequest,
        UnshareRequest, WaitRequest,
    },
    machine_ttrpc::MachineClient,
};
use husk_vmm::{fs::FileServer, service};
use tokio::{runtime, time::timeout};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

#[derive(Arbitrary, Debug)]
enum Step {
    /// A descriptor under a token: of a file, a directory, a socket.
    Pass(u8, u8),
    /// A message on the descriptors' socket that carries none.
    Garbage(Vec<u8>),
    Boot([u8; 4], u64, u32, u32, String),
    Restore([u8; 5], u64, u32),
    Save(u8, u8),
    Share(u8, String, bool),
    Unshare(String),
    Connect(Vec<(u8, u32)>),
    Attach(Vec<u8>, Vec<u8>, Vec<u8>, u32),
    Detach(u32),
    Status,
    Pause,
    Resume,
    Stop,
    Wait,
    /// Bytes in the place of a request: nothing that comes after them can be understood.
    Raw(Vec<u8>),
}

/// For an answer; no request waits for anything here.
const ANSWER: Duration = Duration::from_secs(5);

fn files() -> Arc<FileServer> {
    static FILES: OnceLock<Arc<FileServer>> = OnceLock::new();
    let files = FILES.get_or_init(|| Arc::new(FileServer::new().expect("a file server: as root")));
    Arc::clone(files)
}

pub(crate) fn run(data: &[u8]) {
    let Ok(steps) = Vec::<Step>::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        let (channel, their_channel) = seqpacket_pair();
        let service = tokio::spawn(service::serve_client(theirs, their_channel, files()));
        let raw = ours.try_clone().expect("a second descriptor");
        ours.set_nonblocking(true).expect("a flag");
        let stream = tokio::net::UnixStream::from_std(ours).expect("a watched socket");
        let client = MachineClient::new(Client::new(Socket::new(stream)));
        for step in steps.into_iter().take(16) {
            if act(&client, &channel, &raw, step).await {
                break;
            }
        }
        raw.shutdown(std::net::Shutdown::Both).expect("a shutdown");
        drop((client, raw));
        let served = timeout(ANSWER, service).await;
        assert!(served.is_ok(), "the service outlives its client");
    });
}

/// True when nothing more will be understood.
async fn act(client: &MachineClient, channel: &OwnedFd, mut raw: &UnixStream, step: Step) -> bool {
    let wait = || context::with_duration(ANSWER);
    let token = |token: u8| u64::from(token % 8);
    let refused = match step {
        Step::Pass(at, kind) => {
            pass(channel, token(at), kind);
            true
        }
        Step::Garbage(bytes) => {
            let _ = send(channel, &bytes, None);
            true
        }
        Step::Boot([kvm, kernel, initrd, agent], memory, vcpus, possible, cmdline) => {
            let request = BootRequest {
                kvm_fd: token(kvm),
                kernel_fd: token(kernel),
                initrd_fd: token(initrd),
                agent_fd: token(agent),
                // Of a size that no guest has: what guests have is mapped until the process ends.
                memory_bytes: memory | 1,
                vcpus,
                possible_vcpus: possible,
                cmdline,
                ..Default::default()
            };
            client.boot(wait(), &request).await.is_err()
        }
        Step::Restore([kvm, memory, state, agent, pages], bytes, vcpus) => {
            let request = RestoreRequest {
                kvm_fd: token(kvm),
                memory_fd: token(memory),
                state_fd: token(state),
                agent_fd: token(agent),
                pages_fd: token(pages),
                memory_bytes: bytes,
                vcpus,
                ..Default::default()
            };
            client.restore(wait(), &request).await.is_err()
        }
        Step::Save(memory, state) => {
            let request = SaveRequest {
                memory_fd: token(memory),
                state_fd: token(state),
                ..Default::default()
            };
            client.save(wait(), &request).await.is_err()
        }
        Step::Share(at, name, exclusive) => {
            let request = ShareRequest {
                name,
                fd: token(at),
                exclusive,
                ..Default::default()
            };
            client.share(wait(), &request).await.is_err()
        }
        Step::Unshare(name) => {
            let request = UnshareRequest {
                name,
                ..Default::default()
            };
            client.unshare(wait(), &request).await.is_err()
        }
        Step::Connect(connections) => {
            let connections = connections.into_iter().map(|(at, port)| Connection {
                fd: token(at),
                port,
                ..Default::default()
            });
            let request = ConnectRequest {
                connections: connections.collect(),
                ..Default::default()
            };
            client.connect(wait(), &request).await.is_err()
        }
        Step::Attach(taps, vhosts, mac, mtu) => {
            let request = AttachRequest {
                tap_fds: taps.into_iter().map(token).collect(),
                vhost_fds: vhosts.into_iter().map(token).collect(),
                mac,
                mtu,
                ..Default::default()
            };
            client.attach(wait(), &request).await.is_err()
        }
        Step::Detach(slot) => {
            let request = DetachRequest {
                slot,
                ..Default::default()
            };
            client.detach(wait(), &request).await.is_err()
        }
        Step::Status => client.status(wait(), &StatusRequest::new()).await.is_ok(),
        Step::Pause => client.pause(wait(), &PauseRequest::new()).await.is_err(),
        Step::Resume => client.resume(wait(), &ResumeRequest::new()).await.is_err(),
        Step::Stop => client.stop(wait(), &StopRequest::new()).await.is_err(),
        Step::Wait => client.wait(wait(), &WaitRequest::new()).await.is_err(),
        Step::Raw(bytes) => {
            let _ = raw.write_all(&bytes);
            tokio::task::yield_now().await;
            return true;
        }
    };
    assert!(refused, "a machine came to life");
    false
}

fn seqpacket_pair() -> (OwnedFd, OwnedFd) {
    let mut pair = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: room for two descriptors, which are new and ours.
    unsafe {
        let made = libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr());
        assert_eq!(made, 0, "a socket pair");
        (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1]))
    }
}

fn pass(channel: &OwnedFd, token: u64, kind: u8) {
    let file = match kind % 4 {
        0 => File::open("/dev/null").expect("/dev/null").into(),
        1 => File::open("/").expect("/").into(),
        2 => OwnedFd::from(UnixStream::pair().expect("a socket pair").0),
        _ => crate::image::memory_file(b"no image"),
    };
    let _ = send(channel, &token.to_le_bytes(), Some(&file));
}

fn send(channel: &OwnedFd, bytes: &[u8], descriptor: Option<&OwnedFd>) -> isize {
    let mut control = [0u64; 4];
    let mut iovec = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: all-zero is a valid msghdr; its pointers are to live buffers of the lengths stated, and the control
    // buffer has room for one descriptor.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iovec;
        message.msg_iovlen = 1;
        if let Some(descriptor) = descriptor {
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(4) as usize;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
            let data = libc::CMSG_DATA(header).cast::<libc::c_int>();
            data.write_unaligned(descriptor.as_raw_fd());
        }
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        libc::sendmsg(channel.as_raw_fd(), &message, flags)
    }
}
