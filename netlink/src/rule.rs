//! Policy rules (`RTM_*RULE`): which table of routes is looked at for which packet.

use crate::{
    message::{self, Attributes, Request},
    socket::{Refusal, Socket},
};

const FRA_PRIORITY: u16 = 6;
/// Of those that every namespace has: for the tables local, main and default.
const EVERYBODYS: [u32; 3] = [0, 32766, 32767];

/// Priorities of the rules that somebody has made.
pub fn made(socket: &mut Socket) -> Result<Vec<u32>, Refusal> {
    let mut all = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut fields = [0; 12];
        fields[0] = family as u8;
        let found = socket.list(|| Request::new(libc::RTM_GETRULE, 0).fixed(&fields))?;
        all.extend(found.iter().filter_map(|(_, body)| priority(body)));
    }
    all.retain(|priority| !EVERYBODYS.contains(priority));
    Ok(all)
}

fn priority(body: &[u8]) -> Option<u32> {
    let mut attributes = Attributes(body.get(12..)?);
    match attributes.find(|(kind, _)| *kind == FRA_PRIORITY) {
        Some((_, value)) => message::u32(value),
        None => Some(0),
    }
}
