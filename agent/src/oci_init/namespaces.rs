//! Into a container's namespaces where being born into them does not do: one is joined, or belongs to a user
//! namespace, or wants a word from outside before anybody is in it.
//!
//! Order matters: what needs the guest's own privileges comes first ([`prepare`]), joining before making,
//! and everything that is made after the user namespace belongs to it. Only a child is in new pid and time
//! namespaces, so the process that began ends here, and its child goes on in its place.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Gid, Uid};
use rustix::net::{AddressFamily, SocketType};
use rustix::thread::{
    ThreadNameSpaceType, move_into_thread_name_spaces, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use super::failure::{Explain, Failure};
use super::mounts;
use super::{OTHERS, become_user, wait_for_go};
use crate::control::{ContainerPlan, Helper, ProcessPlan, Report};
use crate::spec::namespaces::{Maps, outside};
use crate::spec::process::Process;
use crate::spec::{NamespaceKind, Spec};
use crate::sys::{self, Forked};

/// Only a child is inside some namespaces. It is the agent's child, not this process's.
const CLONE_PARENT: u64 = 0x8000;

/// Mounts that only the guest's own root can make, by their index in the specification.
pub(super) type Prepared = BTreeMap<usize, OwnedFd>;

/// Does what cannot be done from inside a user namespace.
pub(super) fn prepare(plan: &ContainerPlan) -> Result<Prepared, Failure> {
    let mut prepared = Prepared::new();
    let Some(maps) = &plan.maps else {
        return Ok(prepared);
    };
    leave_behind(&plan.spec.process, maps)?;
    for (index, mount) in plan.spec.mounts.iter().enumerate() {
        // It shows the network namespace, which is the guest's.
        if mount.kind == "sysfs" && !plan.spec.makes(NamespaceKind::Network) {
            prepared.insert(index, mounts::of_filesystem(index, mount)?);
        }
    }
    Ok(prepared)
}

/// What a process in a user namespace has of the guest: limits that may be high, streams of its own.
fn leave_behind(process: &Process, maps: &Maps) -> Result<(), Failure> {
    become_user::raise_limits(process)?;
    match outside(&maps.uid, process.user.uid) {
        Some(uid) => become_user::own_streams(uid),
        // The kernel refuses it where it is to become that user, in its own words.
        None => Ok(()),
    }
}

/// The init of a container: returns in the process that goes on.
pub(super) fn enter(helper: &mut Helper, plan: &ContainerPlan) -> Result<(), Failure> {
    use NamespaceKind::{Time, User};
    let spec = &plan.spec;
    let mut inits = Vec::new();
    for (number, &flags) in (OTHERS..).zip(&plan.joined) {
        // SAFETY: `launch` has put the pidfds there, and nothing in this process owns them yet.
        inits.push((unsafe { sys::inherited(number) }, flags));
    }
    // The guest's privileges count for all of them, those of a user namespace for its own alone.
    let user = User.flag();
    for (init, flags) in &inits {
        join(init, flags & !user)?;
    }
    for (init, flags) in &inits {
        join(init, flags & user)?;
    }
    drop(inits);
    let make = |kind: NamespaceKind| {
        let flags = if spec.makes(kind) { kind.flag() } else { 0 };
        sys::unshare(flags).request(|| format!("linux.namespaces: make a {kind:?} namespace"))
    };
    make(User)?;
    make(Time)?;
    if spec.makes(User) || spec.makes(Time) {
        helper.report(&Report::Unshared)?;
        wait_for_go(helper)?;
    }
    if spec.has(User) {
        become_root()?;
    }
    go_on_in_child(helper, spec.born_into())
}

/// An added process: returns in the process that goes on, in the namespaces of the container's init.
pub(super) fn follow(helper: &mut Helper, plan: &ProcessPlan) -> Result<(), Failure> {
    if let Some(maps) = &plan.maps {
        leave_behind(&plan.process, maps)?;
    }
    // SAFETY: `launch` has put the pidfd there, and nothing in this process owns it yet.
    let init = unsafe { sys::inherited(OTHERS) };
    join(&init, plan.namespaces)?;
    drop(init);
    if plan.maps.is_some() {
        become_root()?;
    }
    go_on_in_child(helper, 0)
}

fn join(init: &OwnedFd, flags: i32) -> Result<(), Failure> {
    if flags == 0 {
        return Ok(());
    }
    let flags = ThreadNameSpaceType::from_bits_retain(flags.unsigned_abs());
    move_into_thread_name_spaces(init.as_fd(), flags)
        .guest(|| "join the container's namespaces".into())
}

/// The root of the user namespace, which this process has all capabilities in and no user of.
fn become_root() -> Result<(), Failure> {
    let at = || "linux.uidMappings: become root in the user namespace".to_string();
    set_thread_groups(&[]).request(at)?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    set_thread_res_gid(gid, gid, gid).request(at)?;
    set_thread_res_uid(uid, uid, uid).request(at)
}

fn go_on_in_child(helper: &mut Helper, namespaces: i32) -> Result<(), Failure> {
    let flags = CLONE_PARENT | u64::from(namespaces.unsigned_abs());
    // SAFETY: this process has a single thread.
    match unsafe { sys::fork(flags, None) }.guest(|| "fork into the container".into())? {
        Forked::Parent { pid, .. } => {
            helper.report(&Report::Spawned { pid })?;
            sys::exit(0)
        }
        Forked::Child => wait_for_go(helper),
    }
}

/// A network namespace of the container's own has a loopback and nothing else, as with runc.
pub(super) fn loopback_up(spec: &Spec) -> Result<(), Failure> {
    if !spec.makes(NamespaceKind::Network) {
        return Ok(());
    }
    let at = || "linux.namespaces: bring up the loopback of the new network".to_string();
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).guest(at)?;
    sys::interface_up(socket.as_fd(), c"lo").guest(at)
}
