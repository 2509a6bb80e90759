//! A tap as a test has it: made in the network namespace of the calling thread, with what passes by it to be seen.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};

/// Makes a tap with so many queues; the interface goes with the last of their descriptors.
///
/// # Errors
/// What the host says.
pub fn make(name: &str, queues: usize) -> Result<Vec<OwnedFd>> {
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    (0..queues).map(|_| queue(name, flags)).collect()
}

/// A queue of a tap that is made with `flags`, if it is not there yet.
///
/// # Errors
/// What the host says.
pub fn queue(name: &str, flags: libc::c_int) -> Result<OwnedFd> {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("open /dev/net/tun")?;
    // SAFETY: all-zero is a valid ifreq.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in interface.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    interface.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: a live ifreq.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw mut interface) };
    match made {
        0.. => Ok(tap.into()),
        _ => Err(io::Error::last_os_error()).context("TUNSETIFF"),
    }
}

/// Looks at what passes by an interface.
pub struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Longest>,
}

/// Bytes of the longest frames, as the host's kernel has them: longer than the MTU where they are cut up later.
#[derive(Debug, Default, Clone, Copy)]
pub struct Longest {
    pub to_guest: usize,
    pub from_guest: usize,
}

impl Watch {
    /// Begins to look at interface `name`.
    ///
    /// # Errors
    /// What the host says.
    pub fn new(name: &str) -> Result<Self> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no pointers; a descriptor returned is new and ours.
        let socket = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            let fd = libc::socket(libc::AF_PACKET, kind, all.into());
            match fd {
                0.. => OwnedFd::from_raw_fd(fd),
                _ => return Err(io::Error::last_os_error()).context("make a packet socket"),
            }
        };
        let index = std::fs::read_to_string(format!("/sys/class/net/{name}/ifindex"))?;
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = index.trim().parse()?;
        // SAFETY: the address is live and as long as stated.
        let bound = unsafe {
            let length = size_of_val(&address) as libc::socklen_t;
            libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length)
        };
        if bound < 0 {
            return Err(io::Error::last_os_error()).context("bind a packet socket");
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || watch(&socket, &stopped));
        Ok(Self { stop, thread })
    }

    /// What has passed.
    ///
    /// # Panics
    /// When the thread did.
    pub fn stop(self) -> Longest {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the watching thread")
    }
}

fn watch(socket: &OwnedFd, stop: &AtomicBool) -> Longest {
    let mut longest = Longest::default();
    loop {
        let stopping = stop.load(Ordering::SeqCst);
        // SAFETY: all-zero is a valid address.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut size = size_of_val(&from) as libc::socklen_t;
        let mut start = [0u8; 64];
        // SAFETY: live buffers of the lengths stated.
        let length = unsafe {
            libc::recvfrom(
                socket.as_raw_fd(),
                start.as_mut_ptr().cast(),
                start.len(),
                libc::MSG_TRUNC,
                (&raw mut from).cast(),
                &raw mut size,
            )
        };
        match usize::try_from(length) {
            Ok(length) if from.sll_pkttype == libc::PACKET_OUTGOING => {
                longest.to_guest = longest.to_guest.max(length);
            }
            Ok(length) => longest.from_guest = longest.from_guest.max(length),
            Err(_) if stopping => return longest,
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
}
