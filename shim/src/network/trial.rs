//! Whether this host's kernel has what carrying a network takes: tried in a network namespace of its own, which ends with
//! the thread that is in it.

use std::{fs::File, io, thread};

use husk_netlink::{Refusal, Socket};
use husk_proto::agent::Interface;

use super::{redirect, steer, tap::Tap};

/// The loopback's index, in every namespace.
const LO: u32 = 1;

/// What has failed, and why.
type Failed = (&'static str, Refusal);

/// Makes a tap, and redirects the loopback's packets to it.
pub fn trial() -> Result<(), Failed> {
    in_a_namespace(|| {
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
    })
}

/// Has its connections come to one socket.
pub fn forwarding_trial() -> Result<(), Failed> {
    in_a_namespace(|| {
        let namespace = File::open("/proc/thread-self/ns/net");
        let namespace = namespace.map_err(|e| ("open a network namespace", e.into()))?;
        let steered = steer::begin(&namespace.into());
        steered.map(drop).map_err(|(what, e)| (what, e.into()))
    })
}

fn in_a_namespace(act: impl FnOnce() -> Result<(), Failed> + Send + 'static) -> Result<(), Failed> {
    let tried = thread::spawn(|| {
        // SAFETY: unshare(2) takes numbers only, and moves this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            let cause = io::Error::last_os_error();
            return Err(("make a network namespace", cause.into()));
        }
        act()
    });
    let gone = |_| Err(("start a thread", io::Error::other("it has panicked").into()));
    tried.join().unwrap_or_else(gone)
}
