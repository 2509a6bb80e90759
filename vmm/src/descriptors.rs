//! The descriptors that the client sends beside its requests, over fd 4, each under a token.
//!
//! Owned by the service. It never waits: a request names a descriptor that was sent before it.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// Descriptors that may wait for the requests that name them.
const WAITING_MAX: usize = 1024;
/// Space for the control message of one descriptor, and more, so that a second one shows.
const CONTROL_SIZE: usize = 64;

/// Why there is no descriptor for a token.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    #[error("{field}: no descriptor was sent as token {token}")]
    Unknown { field: &'static str, token: u64 },
    #[error("receive a descriptor: {0}")]
    Receive(#[source] io::Error),
}

/// The receiving end of the descriptor channel.
pub struct Descriptors {
    channel: OwnedFd,
    waiting: HashMap<u64, OwnedFd>,
}

impl Descriptors {
    pub fn new(channel: OwnedFd) -> Self {
        Self {
            channel,
            waiting: HashMap::new(),
        }
    }

    /// The descriptor that was sent as `token`, which request field `field` names.
    pub fn take(&mut self, field: &'static str, token: u64) -> Result<OwnedFd, DescriptorError> {
        self.receive_all().map_err(DescriptorError::Receive)?;
        self.waiting
            .remove(&token)
            .ok_or(DescriptorError::Unknown { field, token })
    }

    fn receive_all(&mut self) -> io::Result<()> {
        while let Some((token, descriptor)) = receive(self.channel.as_raw_fd())? {
            match (token, descriptor) {
                (Some(token), Some(descriptor)) if self.waiting.len() < WAITING_MAX => {
                    self.waiting.insert(token, descriptor);
                }
                _ => log::warn!("a message on the descriptor channel was dropped"),
            }
        }
        Ok(())
    }
}

type Message = (Option<u64>, Option<OwnedFd>);

/// The next message: its token and its descriptor, as far as it has them. None when there is no
/// message now.
fn receive(channel: RawFd) -> io::Result<Option<Message>> {
    let mut token = [0u8; 8];
    // Aligned as control messages must be.
    let mut control = [0u64; CONTROL_SIZE / 8];
    let mut iovec = libc::iovec {
        iov_base: token.as_mut_ptr().cast(),
        iov_len: token.len(),
    };
    // SAFETY: all-zero is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut iovec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_SIZE;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    let received = loop {
        // SAFETY: the message points at live buffers of the lengths it states.
        let received = unsafe { libc::recvmsg(channel, &mut message, flags) };
        if received >= 0 {
            break received;
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            _ => return Err(error),
        }
    };
    let mut descriptors = descriptors_of(&message);
    if received == 0 && descriptors.is_empty() {
        // The client closed the channel.
        return Ok(None);
    }
    let whole = usize::try_from(received) == Ok(token.len());
    let token = whole.then(|| u64::from_le_bytes(token));
    let descriptor = match descriptors.len() {
        1 => descriptors.pop(),
        _ => None,
    };
    Ok(Some((token, descriptor)))
}

/// Every descriptor in a received message, so that none is left open by accident.
fn descriptors_of(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut descriptors = Vec::new();
    // SAFETY: the kernel filled the control buffer and set its length; the macros stay within it.
    // Each descriptor is new to this process and owned by nobody else.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while let Some(control) = header.as_ref() {
            if control.cmsg_level == libc::SOL_SOCKET && control.cmsg_type == libc::SCM_RIGHTS {
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                let bytes = control.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                for index in 0..bytes / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    descriptors
}

/// A client's side, for tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn pair() -> (OwnedFd, Descriptors) {
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors, which are new and ours.
        unsafe {
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
            assert_eq!(
                libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()),
                0
            );
            (
                OwnedFd::from_raw_fd(fds[0]),
                Descriptors::new(OwnedFd::from_raw_fd(fds[1])),
            )
        }
    }

    pub(crate) fn send(channel: &OwnedFd, bytes: &[u8], descriptors: &[RawFd]) {
        let mut control = [0u64; 8];
        let mut iovec = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        // SAFETY: live buffers of the lengths stated.
        unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            message.msg_iov = &mut iovec;
            message.msg_iovlen = 1;
            if !descriptors.is_empty() {
                let length = size_of_val(descriptors) as u32;
                message.msg_control = control.as_mut_ptr().cast();
                message.msg_controllen = libc::CMSG_SPACE(length) as usize;
                let header = libc::CMSG_FIRSTHDR(&message);
                (*header).cmsg_level = libc::SOL_SOCKET;
                (*header).cmsg_type = libc::SCM_RIGHTS;
                (*header).cmsg_len = libc::CMSG_LEN(length) as usize;
                libc::CMSG_DATA(header)
                    .cast::<RawFd>()
                    .copy_from_nonoverlapping(descriptors.as_ptr(), descriptors.len());
            }
            assert!(libc::sendmsg(channel.as_raw_fd(), &message, 0) >= 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::*, *};

    #[test]
    fn descriptors_are_found_by_token_once() {
        let (client, mut descriptors) = pair();
        let fd = client.as_raw_fd();
        send(&client, &7u64.to_le_bytes(), &[fd]);
        send(&client, &8u64.to_le_bytes(), &[fd]);
        assert!(descriptors.take("kvm_fd", 8).is_ok());
        assert!(descriptors.take("kvm_fd", 7).is_ok());
        let again = descriptors.take("kvm_fd", 7).unwrap_err();
        assert_eq!(
            again.to_string(),
            "kvm_fd: no descriptor was sent as token 7"
        );
    }

    #[test]
    fn malformed_messages_are_dropped() {
        let (client, mut descriptors) = pair();
        let fd = client.as_raw_fd();
        send(&client, b"short", &[fd]);
        send(&client, &1u64.to_le_bytes(), &[]);
        send(&client, &2u64.to_le_bytes(), &[fd, fd]);
        for token in [1, 2] {
            assert!(descriptors.take("fd", token).is_err());
        }
        drop(client);
        assert!(descriptors.take("fd", 3).is_err());
    }
}
