//! Every packet that comes in at an interface goes out at its tap, and the other way round: an ingress qdisc on each, with one
//! filter that matches everything and redirects it (tc-u32(8), tc-mirred(8)). This is before the namespace's own
//! network stack, which therefore sees, and answers, nothing.

use std::io;

use husk_netlink::{
    Refusal, Socket, link,
    message::{self, Attributes, Request},
};

use super::tap;

const TC_H_INGRESS: u32 = 0xffff_fff1;
/// The ingress qdisc's handle, there being one.
const INGRESS: u32 = 0xffff_0000;
const ETH_P_ALL: u16 = 3;
/// The filter's priority, by which ours is known.
const OURS: u16 = 0x6873;

const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TC_U32_TERMINAL: u8 = 1;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_ACT_STOLEN: i32 = 4;
const TCA_EGRESS_REDIR: i32 = 1;

/// `struct tcmsg`.
fn head(interface: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut fields = [0; 20];
    fields[4..8].copy_from_slice(&interface.to_ne_bytes());
    fields[8..12].copy_from_slice(&handle.to_ne_bytes());
    fields[12..16].copy_from_slice(&parent.to_ne_bytes());
    fields[16..20].copy_from_slice(&info.to_ne_bytes());
    fields
}

/// Joins two interfaces, by index.
pub(super) fn join(socket: &mut Socket, interface: u32, tap: u32) -> Result<(), Refusal> {
    for (from, to) in [(tap, interface), (interface, tap)] {
        socket.ask(ingress(libc::RTM_NEWQDISC, from))?;
        if let Err(e) = socket.ask(redirect(from, to)) {
            // Without its filter nobody would know whose it is.
            let _ = socket.ask(ingress(libc::RTM_DELQDISC, from));
            return Err(e);
        }
    }
    Ok(())
}

/// Undoes [`join`] on the interface; with the tap its own goes. Nothing to undo is fine, also no interface.
pub(super) fn part(socket: &mut Socket, interface: u32) -> Result<(), Refusal> {
    if !is_ours(socket, interface)? {
        return Ok(());
    }
    match socket.ask(ingress(libc::RTM_DELQDISC, interface)) {
        Err(e) if !e.is(libc::ENODEV) => Err(e),
        _ => Ok(()),
    }
}

/// Makes sure that the interface is nobody's: neither another pod's nor redirected by others. What a pod that was
/// lost has left is removed.
pub(super) fn clear(socket: &mut Socket, interface: u32) -> Result<(), Refusal> {
    let name = tap::name(interface);
    if link::links(socket)?.iter().any(|link| link.name == name) {
        let used = format!("{name} is there already: another pod has this interface");
        return Err(io::Error::other(used).into());
    }
    part(socket, interface)
}

/// Removes from all interfaces what leads to a tap that is gone.
pub(super) fn sweep(socket: &mut Socket) -> Result<(), Refusal> {
    let links = link::links(socket)?;
    for link in links.iter().filter(|link| !tap::is_ours(link)) {
        let name = tap::name(link.index);
        if !links.iter().any(|link| link.name == name) {
            part(socket, link.index)?;
        }
    }
    Ok(())
}

/// Whether the interface has a filter of ours.
fn is_ours(socket: &mut Socket, interface: u32) -> Result<bool, Refusal> {
    let list = || {
        let head = head(interface, 0, INGRESS, 0);
        Request::new(libc::RTM_GETTFILTER, 0).fixed(&head)
    };
    let filters = match socket.list(list) {
        // No qdisc, or no interface.
        Err(e) if e.is(libc::EINVAL) || e.is(libc::ENODEV) || e.is(libc::ENOENT) => {
            return Ok(false);
        }
        filters => filters?,
    };
    Ok(filters.iter().any(|(_, body)| {
        let info = body.get(16..).and_then(message::u32);
        let kind = body
            .get(20..)
            .and_then(|rest| Attributes(rest).find(|(kind, _)| *kind == TCA_KIND));
        info.is_some_and(|info| info >> 16 == u32::from(OURS))
            && kind.is_some_and(|(_, kind)| message::string(kind) == "u32")
    }))
}

fn ingress(kind: u16, interface: u32) -> Request {
    let flags = match kind {
        libc::RTM_NEWQDISC => libc::NLM_F_CREATE | libc::NLM_F_EXCL,
        _ => 0,
    };
    Request::new(kind, flags)
        .fixed(&head(interface, INGRESS, TC_H_INGRESS, 0))
        .string(TCA_KIND, "ingress")
}

fn redirect(from: u32, to: u32) -> Request {
    let info = u32::from(OURS) << 16 | u32::from(ETH_P_ALL.to_be());
    // `struct tc_u32_sel` without any key: all match.
    let mut everything = [0; 16];
    everything[0] = TC_U32_TERMINAL;
    // `struct tc_mirred`.
    let mut mirred = [0; 28];
    mirred[8..12].copy_from_slice(&TC_ACT_STOLEN.to_ne_bytes());
    mirred[20..24].copy_from_slice(&TCA_EGRESS_REDIR.to_ne_bytes());
    mirred[24..28].copy_from_slice(&to.to_ne_bytes());
    Request::new(libc::RTM_NEWTFILTER, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
        .fixed(&head(from, 0, INGRESS, info))
        .string(TCA_KIND, "u32")
        .nested(TCA_OPTIONS, |options| {
            options
                .attribute(TCA_U32_SEL, &everything)
                .nested(TCA_U32_ACT, |actions| {
                    actions.nested(1, |action| {
                        action
                            .string(TCA_ACT_KIND, "mirred")
                            .nested(TCA_ACT_OPTIONS, |options| {
                                options.attribute(TCA_MIRRED_PARMS, &mirred)
                            })
                    })
                })
        })
}
