//! A queue of a tap, by its descriptor: what makes it one that the device can use, and packets out of and into it,
//! straight to and from guest memory, never waiting (Linux `Documentation/networking/tuntap.rst`).

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

/// Bytes of the header before each packet, the device's (virtio 1.2 §5.1.6).
pub(super) const HEADER_SIZE: usize = 12;

/// What a tap must have been made with. IFF_NO_PI as well, which no request tells: its bit is IFF_NOFILTER's there.
const FLAGS: [(libc::c_int, &str); 2] = [
    (libc::IFF_TAP, "IFF_TAP"),
    (libc::IFF_VNET_HDR, "IFF_VNET_HDR"),
];

/// Why a descriptor is not a tap's queue that can be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("tap_fds: not an attached queue of a tap (TUNGETIFF: {0})")]
    NotTap(#[source] io::Error),
    #[error("tap_fds: the tap was made without {0}")]
    Lacks(&'static str),
    #[error("tap_fds: the queues are not all of one tap")]
    Mixed,
    #[error("{call} on a tap: {cause}")]
    Host {
        call: &'static str,
        cause: io::Error,
    },
}

/// A queue of a tap.
pub struct Tap(OwnedFd);

/// What came of taking a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// This many bytes, the header included, or as many as there was room for.
    Packet(usize),
    /// There is none: it will become ready.
    Nothing,
    /// There was one that cannot be told of.
    Lost,
}

/// What came of giving a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Given {
    Sent,
    /// It is full: it will become ready.
    Full,
    /// It takes no such packet, or none at all.
    Lost,
}

impl Tap {
    /// Takes the queues of one tap, and has them speak as the device does.
    ///
    /// # Errors
    /// They are none, or the host refuses.
    pub fn all(fds: Vec<OwnedFd>) -> Result<Vec<Self>, TapError> {
        let several = fds.len() > 1;
        let mut taps = Vec::new();
        let mut first = None;
        for fd in fds {
            let tap = Self(fd);
            let name = tap.check(several)?;
            if *first.get_or_insert(name) != name {
                return Err(TapError::Mixed);
            }
            tap.prepare()?;
            taps.push(tap);
        }
        Ok(taps)
    }

    /// The interface's name.
    fn check(&self, several: bool) -> Result<[libc::c_char; libc::IFNAMSIZ], TapError> {
        // SAFETY: all-zero is a valid ifreq.
        let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: a live ifreq, which the kernel fills.
        let answer = unsafe { libc::ioctl(self.fd(), libc::TUNGETIFF, &raw mut interface) };
        if answer < 0 {
            return Err(TapError::NotTap(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has set the flags, and any bytes are some.
        let flags = libc::c_int::from(unsafe { interface.ifr_ifru.ifru_flags });
        let mut wanted = FLAGS.to_vec();
        if several {
            wanted.push((libc::IFF_MULTI_QUEUE, "IFF_MULTI_QUEUE"));
        }
        match wanted.iter().find(|(flag, _)| flags & flag == 0) {
            Some((_, name)) => Err(TapError::Lacks(name)),
            None => Ok(interface.ifr_name),
        }
    }

    fn prepare(&self) -> Result<(), TapError> {
        let host = |call| move |cause| TapError::Host { call, cause };
        for (call, request, value) in [
            ("FIONBIO", libc::FIONBIO, 1),
            (
                "TUNSETVNETHDRSZ",
                libc::TUNSETVNETHDRSZ,
                HEADER_SIZE as libc::c_int,
            ),
            ("TUNSETVNETLE", libc::TUNSETVNETLE, 1),
        ] {
            // SAFETY: requests that read an int, which is live.
            check(unsafe { libc::ioctl(self.fd(), request, &raw const value) })
                .map_err(host(call))?;
        }
        Ok(())
    }

    /// Says which packets the driver takes as they are: `TUN_F_*`.
    pub(super) fn set_offload(&self, offload: libc::c_uint) -> io::Result<()> {
        // SAFETY: a request that takes a number.
        check(unsafe { libc::ioctl(self.fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) })
    }

    /// Lets the tap use this one of several queues, or no more.
    pub(super) fn use_queue(&self, used: bool) -> io::Result<()> {
        // SAFETY: all-zero is a valid ifreq.
        let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
        let flag = match used {
            true => libc::IFF_ATTACH_QUEUE,
            false => libc::IFF_DETACH_QUEUE,
        };
        interface.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: a live ifreq, which the kernel reads.
        check(unsafe { libc::ioctl(self.fd(), libc::TUNSETQUEUE, &raw mut interface) })
    }

    /// Takes a packet and its header into memory that `vectors` describe, which the caller keeps mapped. What there
    /// is no room for is cut off.
    ///
    /// # Errors
    /// The host's, of a kind that says nothing of a packet.
    pub(super) fn take(&self, vectors: &[libc::iovec]) -> io::Result<Taken> {
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the vectors point at memory that stays mapped for the call; the guest may write there too, and
        // nothing is assumed about the contents.
        let got = unsafe { libc::readv(self.fd(), vectors.as_ptr(), count) };
        if let Ok(bytes) = usize::try_from(got) {
            return Ok(Taken::Packet(bytes));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Ok(Taken::Nothing),
            // The interface is gone, or this queue of it is not used.
            Some(libc::EBADFD) => Ok(Taken::Nothing),
            Some(libc::EINTR | libc::EINVAL) => Ok(Taken::Lost),
            _ => Err(error),
        }
    }

    /// Gives a packet and its header from memory that `vectors` describe, which the caller keeps mapped. The tap
    /// checks both.
    pub(super) fn give(&self, vectors: &[libc::iovec]) -> Given {
        let count = libc::c_int::try_from(vectors.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: as for `take`.
        let given = unsafe { libc::writev(self.fd(), vectors.as_ptr(), count) };
        if given >= 0 {
            return Given::Sent;
        }
        match io::Error::last_os_error().raw_os_error() {
            Some(libc::EAGAIN) => Given::Full,
            _ => Given::Lost,
        }
    }

    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl From<OwnedFd> for Tap {
    /// Anything that gives and takes one packet at a call, in the place of a tap.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd()
    }
}

fn check(answer: libc::c_int) -> io::Result<()> {
    match answer {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
