//! The conversation between the agent and one `oci-init`, over a socket pair.
//!
//! Frames: length (u32, little-endian), then JSON. The agent gives orders; `oci-init` reports, and a
//! terminal travels with its report as a descriptor. The end of `oci-init` is close-on-exec: after
//! [`Report::Executing`], the end of the stream means that the container's program runs.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::Interest;

use crate::oci_init::seccomp::Filter;
use crate::spec::Spec;
use crate::spec::namespaces::Maps;
use crate::spec::personality::Personality;
use crate::spec::process::Process;

/// An order holds a whole specification; one in a ttrpc message is below 4 MiB.
const ORDER_LIMIT: usize = 16 << 20;
/// A report is a few words, or a filter of at most 4096 instructions.
const REPORT_LIMIT: usize = 128 << 10;

/// What the agent tells `oci-init`.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// The first order to the init of a container.
    Container(Box<ContainerPlan>),
    /// The first order to an added process; the container's init is the pidfd beside the socket.
    Process(Box<ProcessPlan>),
    /// The next order: go on, to the next report or to execve.
    Go,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerPlan {
    pub id: String,
    pub spec: Spec,
    /// Where the guest has cgroup v2.
    pub cgroups: PathBuf,
    /// `CLONE_NEW…` of the namespaces to join, of each pidfd beside the socket.
    pub joined: Vec<i32>,
    /// Of its user namespace, a new or a joined one.
    pub maps: Option<Maps>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Its id.
    pub container: String,
    pub process: Process,
    /// `CLONE_NEW…` of the namespaces to join.
    pub namespaces: i32,
    /// As the container's init has reported it.
    pub filter: Option<Filter>,
    /// Of the container's user namespace.
    pub maps: Option<Maps>,
    /// As init has it.
    pub personality: Option<Personality>,
}

/// What `oci-init` tells the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// New namespaces are there, whose maps and clocks are to be set from outside; it waits for [`Order::Go`].
    Unshared,
    /// This is the pid of the process that goes on, in all namespaces; it waits for [`Order::Go`].
    Spawned {
        pid: i32,
    },
    /// The terminal's master comes along.
    Terminal,
    /// Init: all is prepared; it waits for [`Order::Go`].
    Ready {
        /// Of its system calls, for added processes.
        filter: Option<Filter>,
    },
    /// The next thing is execve.
    Executing,
    Failed {
        reason: String,
        blame: Blame,
    },
}

/// Who is at fault when `oci-init` fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Blame {
    /// The specification or the image: missing program, wrong directory, impossible mount.
    Request,
    Guest,
}

#[derive(Debug, Error)]
pub enum ControlError {
    #[error("control socket of oci-init: {0}")]
    Socket(#[from] io::Error),
    #[error("control socket of oci-init: frame of {0} bytes")]
    Size(usize),
    #[error("control socket of oci-init: {0}")]
    Json(#[from] serde_json::Error),
    #[error("oci-init ended without a word")]
    Ended,
}

fn frame(message: &impl Serialize) -> Result<Vec<u8>, ControlError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = bytes.len().saturating_sub(4);
    let header = u32::try_from(length).map_err(|_| ControlError::Size(length))?;
    bytes.splice(..4, header.to_le_bytes());
    Ok(bytes)
}

/// The end of `oci-init`: blocking, single-threaded. A file, so that the calls are read and write: a seccomp
/// profile may be in force that allows these and not those of sockets.
pub struct Helper(File);

impl Helper {
    pub fn new(socket: OwnedFd) -> Self {
        Self(socket.into())
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Waits for the next order. The end of the stream is [`ControlError::Ended`]: the agent gave up.
    pub fn order(&mut self) -> Result<Order, ControlError> {
        let mut header = [0; 4];
        match self.0.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ControlError::Ended);
            }
            other => other?,
        }
        let length = u32::from_le_bytes(header) as usize;
        if length > ORDER_LIMIT {
            return Err(ControlError::Size(length));
        }
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    pub fn report(&mut self, report: &Report) -> Result<(), ControlError> {
        Ok(self.0.write_all(&frame(report)?)?)
    }

    /// Reports [`Report::Terminal`] with the master.
    pub fn hand_over_terminal(&mut self, master: BorrowedFd) -> Result<(), ControlError> {
        let bytes = frame(&Report::Terminal)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [master];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let sent = sendmsg(
            &self.0,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
        .map_err(io::Error::from)?;
        Ok(self.0.write_all(bytes.get(sent..).unwrap_or_default())?)
    }
}

/// The end of the agent.
pub struct Control {
    socket: tokio::net::UnixStream,
    /// Bytes read and not yet understood.
    pending: Vec<u8>,
    terminal: Option<OwnedFd>,
}

impl Control {
    /// Both ends; the second is for `oci-init`.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let socket = tokio::net::UnixStream::from_std(ours)?;
        Ok((
            Self {
                socket,
                pending: Vec::new(),
                terminal: None,
            },
            theirs.into(),
        ))
    }

    pub async fn order(&self, order: &Order) -> Result<(), ControlError> {
        let bytes = frame(order)?;
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            self.socket.writable().await?;
            match self.socket.try_write(left) {
                Ok(written) => left = left.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next report; `None` at the end of the stream.
    pub async fn report(&mut self) -> Result<Option<Report>, ControlError> {
        loop {
            if let Some(report) = self.take()? {
                return Ok(Some(report));
            }
            if self.receive().await? == 0 {
                return Ok(None);
            }
        }
    }

    /// The master that came with [`Report::Terminal`].
    pub fn terminal(&mut self) -> Option<OwnedFd> {
        self.terminal.take()
    }

    fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ControlError> {
        let Some((header, rest)) = self.pending.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > REPORT_LIMIT {
            return Err(ControlError::Size(length));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let report = serde_json::from_slice(body)?;
        self.pending.drain(..length.saturating_add(4));
        Ok(Some(report))
    }

    async fn receive(&mut self) -> Result<usize, ControlError> {
        let mut bytes = [0; 4096];
        loop {
            self.socket.readable().await?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = self.socket.try_io(Interest::READABLE, || {
                let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
                Ok(recvmsg(
                    &self.socket,
                    &mut [IoSliceMut::new(&mut bytes)],
                    &mut ancillary,
                    flags,
                )?
                .bytes)
            });
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                    self.terminal = descriptors.next().or(self.terminal.take());
                }
            }
            match received {
                Ok(count) => {
                    self.pending
                        .extend_from_slice(bytes.get(..count).unwrap_or_default());
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A helper that died with orders unread resets the connection: its end, too.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(0),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn orders_and_reports_cross_whole() {
        let (mut control, theirs) = Control::pair().unwrap();
        let mut helper = Helper::new(theirs);
        control.order(&Order::Go).await.unwrap();
        assert!(matches!(helper.order().unwrap(), Order::Go));
        let null = std::fs::File::open("/dev/null").unwrap();
        helper.hand_over_terminal(null.as_fd()).unwrap();
        helper.report(&Report::Spawned { pid: 7 }).unwrap();
        assert!(matches!(
            control.report().await.unwrap(),
            Some(Report::Terminal)
        ));
        assert!(control.terminal().is_some());
        assert!(matches!(
            control.report().await.unwrap(),
            Some(Report::Spawned { pid: 7 })
        ));
        drop(helper);
        assert!(control.report().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn a_huge_frame_is_refused() {
        let (mut control, theirs) = Control::pair().unwrap();
        UnixStream::from(theirs)
            .write_all(&u32::MAX.to_le_bytes())
            .unwrap();
        assert!(matches!(control.report().await, Err(ControlError::Size(_))));
    }
}
