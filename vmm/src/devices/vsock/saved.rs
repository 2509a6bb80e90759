//! The agent's connection in a saved machine: it goes on at another socket, and the guest notices
//! nothing.
//!
//! Only a connection at rest is saved: open in both directions, with every byte of the host's read
//! and every byte of the guest's written. What remains are counters. Any other connection is in the
//! way, for nobody could go on with it.

use husk_proto::AGENT_PORT;

use super::{
    connection::{Connection, Ports},
    muxer::{FIRST_HOST_PORT, Muxer},
    socket::HostSocket,
};
use crate::state::{self, StateError};

impl Muxer {
    /// What the guest relies on, or what is in the way, in words.
    pub(super) fn save(&self) -> Result<state::Vsock, String> {
        let mut agent = None;
        for connection in self.connections() {
            let Ports { host, guest } = connection.ports;
            match host {
                AGENT_PORT => agent = Some(connection.save()?),
                _ => return Err(format!("a connection to port {guest} is open")),
            }
        }
        if !self.resets_owed().is_empty() {
            return Err("the guest is owed a reset".to_owned());
        }
        Ok(state::Vsock {
            dialled: self.agent().is_none(),
            agent: agent.into(),
            next_host_port: self.next_host_port(),
            ..Default::default()
        })
    }

    /// Goes on where another machine's connections were saved, with this machine's agent socket.
    pub(super) fn restore(&mut self, saved: &state::Vsock) -> Result<(), StateError> {
        if saved.next_host_port < FIRST_HOST_PORT {
            return Err(StateError::Content("a host port that is not for dialling"));
        }
        self.set_next_host_port(saved.next_host_port);
        if !saved.dialled {
            return Ok(());
        }
        let agent = saved.agent.as_ref();
        if agent.is_some_and(|agent| agent.host_port != AGENT_PORT) {
            return Err(StateError::Content("a connection that is not the agent's"));
        }
        // Without a connection any more the socket is closed here, as it was there.
        if let (Some(socket), Some(agent)) = (self.take_agent(), agent) {
            self.add(Connection::restore(HostSocket::new(socket), agent));
        }
        Ok(())
    }
}
