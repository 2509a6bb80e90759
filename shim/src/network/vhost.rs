//! /dev/vhost-net, by which the host's kernel moves a pod's packets instead of the VMM.

use std::{fs::File, io, os::fd::OwnedFd};

const PATH: &str = "/dev/vhost-net";

/// One for each of so many queues.
pub fn open(queues: usize) -> io::Result<Vec<OwnedFd>> {
    let open = |_| File::options().read(true).write(true).open(PATH);
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{PATH}: {e}"));
    let opened: io::Result<Vec<File>> = (0..queues).map(open).collect();
    Ok(opened
        .map_err(named)?
        .into_iter()
        .map(OwnedFd::from)
        .collect())
}
