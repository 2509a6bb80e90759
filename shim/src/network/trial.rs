//! Whether this host's kernel has what carrying a network takes: tried in a network namespace of its own, which ends with
//! the thread that is in it.

use std::{io, thread};

use husk_netlink::{Refusal, Socket};
use husk_proto::agent::Interface;

use super::{redirect, tap::Tap};

/// The loopback's index, in every namespace.
const LO: u32 = 1;

/// Makes a tap, and redirects the loopback's packets to it.
pub fn trial() -> Result<(), (&'static str, Refusal)> {
    let tried = thread::spawn(|| {
        // SAFETY: unshare(2) takes numbers only, and moves this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let cause = io::Error::last_os_error();
            return Err(("make a network namespace", cause.into()));
        }
        let socket = Socket::open();
        let mut socket = socket.map_err(|e| ("open a rtnetlink socket", e.into()))?;
        let interface = Interface {
            name: "lo".into(),
            mtu: 1500,
            ..Interface::default()
        };
        let tap = Tap::make(&mut socket, "husk-trial", &interface, 1);
        let tap = tap.map_err(|e| ("make a tap", e))?;
        redirect::join(&mut socket, LO, tap.index).map_err(|e| ("redirect packets by tc", e))
    });
    let gone = |_| Err(("start a thread", io::Error::other("it has panicked").into()));
    tried.join().unwrap_or_else(gone)
}
