//! The device without its thread, for fuzzing: whoever calls decides when it looks at its queues and sockets, so
//! that the same input always does the same. It panics where something holds that must never hold.

#![allow(clippy::expect_used)]

use std::os::fd::OwnedFd;

use vmm_sys_util::epoll::EpollEvent;

use super::{
    Dialer, EVENTS, State, Thread, Vsock, connection::BUFFER, host, muxer::CONNECTIONS_MAX,
};
use crate::{
    virtio::{Activation, DeviceError, queue::Queue},
    vm::ending::Ending,
};

/// What the thread owns.
pub struct Turns(Thread);

impl Turns {
    /// An active device whose guest may dial `agent`.
    ///
    /// # Errors
    /// The host's, or that the activation is not of this device's queues.
    pub fn new(agent: OwnedFd, activation: Activation) -> Result<(Self, Dialer), DeviceError> {
        let (mut vsock, dialer) = Vsock::new(agent, Ending::default())?;
        let State::Inactive(muxer) = std::mem::replace(&mut vsock.state, State::Lost) else {
            return Err(host("take the connections")(
                std::io::ErrorKind::Other.into(),
            ));
        };
        let Ok([receive, transmit, event]) = <[Queue; 3]>::try_from(activation.queues) else {
            return Err(host("take three queues")(std::io::ErrorKind::Other.into()));
        };
        let doorway = vsock.doorway.clone();
        let ram = activation.ram;
        let thread = Thread {
            ram,
            receive,
            transmit,
            event,
            muxer,
            doorway,
        };
        Ok((Self(thread), dialer))
    }

    /// One look at everything, without waiting.
    ///
    /// # Errors
    /// Those by which the thread ends the machine.
    pub fn turn(&mut self) -> Result<(), DeviceError> {
        self.0
            .turn(&mut [EpollEvent::default(); EVENTS], 0)
            .map(drop)
    }

    /// Connections that are not over, and bytes that wait for the host. Neither may pass its bound.
    pub fn held(&self) -> (usize, usize) {
        let connections = self.0.muxer.connections().count();
        let bytes: usize = self.0.muxer.connections().map(|c| c.backlog()).sum();
        assert!(connections <= CONNECTIONS_MAX, "{connections} connections");
        assert!(bytes <= connections * BUFFER as usize, "{bytes} bytes wait");
        (connections, bytes)
    }

    /// The device was saved, and another goes on with what was written: it must take it.
    pub fn save_and_restore(&mut self) {
        if let Ok(saved) = self.0.muxer.save() {
            let (ours, _theirs) = std::os::unix::net::UnixStream::pair().expect("a socket pair");
            let other = super::Muxer::new(ours.into());
            let mut other = other.expect("another device");
            other.restore(&saved).expect("what was saved is restored");
            if other.agent().is_none() && saved.agent.is_some() {
                let again = other.save().expect("what was restored is saved");
                assert_eq!(again, saved);
            }
        }
    }
}
