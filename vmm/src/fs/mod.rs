//! The virtio-fs file server: answers FUSE requests of the guest from detached mounts.
//!
//! [`FileServer`] owns everything: the shares and their names in the synthetic root directory, the
//! inodes the guest knows, the files it has open. It knows neither virtio nor KVM; the device gives
//! it the two halves of a descriptor chain and takes a length back.
//!
//! What must hold, whatever the guest sends:
//! * Names are single components and every walk starts at a descriptor, so nothing outside a share
//!   can be named. The server never follows a symbolic link of a share.
//! * Only regular files and directories are opened; FIFOs, sockets and devices are the guest's
//!   kernel's own business and are places (O_PATH) here.
//! * Taking a share away takes every inode and open file under it away.
//!
//! Life cycle: [`FileServer::new`] in the VMM's last pid namespace, before its root is emptied and
//! before it has threads; [`worker_init`] once on each thread that serves; [`FileServer::handle`]
//! from any of them.
//!
//! Where to look: `wire` the protocol, `message` requests and replies in guest memory, `server`
//! dispatch; `names`, `attrs`, `data`, `dirs`, `xattrs`, `root` the operations; `inode`, `handle`,
//! `share` what is known, `limits` how much, `closing` how it goes, `saved` what outlives the process; `creds` acting as
//! the caller; `self_fd`, `sys` the way to the kernel.
//! Why a server of our own: `docs/decisions/0002-file-server.md`.

mod attrs;
mod closing;
mod creds;
mod data;
mod dirs;
mod handle;
mod inode;
mod limits;
mod message;
mod names;
mod overlay;
mod root;
mod saved;
mod self_fd;
mod server;
mod share;
mod sys;
#[cfg(test)]
mod tests;
mod wire;
mod xattrs;

use std::io;

pub use creds::worker_init;
pub use server::FileServer;

/// Why the file server or one of its threads cannot work.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("clone /proc/self/fd as a detached mount: {0}")]
    SelfFd(#[source] io::Error),
    #[error("raise the limit of open files: {0}")]
    OpenFiles(#[source] io::Error),
    #[error("prepare a file server thread: {tried}: {cause}")]
    Worker {
        tried: &'static str,
        cause: io::Error,
    },
}

/// Why a share was not added or taken away.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error("a share named {0:?} exists")]
    AlreadyExists(String),
    #[error("{0:?} cannot name a share: one path component of 1 to 255 bytes")]
    InvalidName(String),
    #[error("share {0:?} is neither a directory nor a regular file")]
    NotDirOrFile(String),
    #[error("no share is named {0:?}")]
    NotFound(String),
    #[error("look at the root of share {name:?}: {cause}")]
    Root { name: String, cause: io::Error },
}

/// A descriptor chain that is no FUSE request at all: nothing can be answered. The guest's driver
/// never makes one.
#[derive(Debug, thiserror::Error)]
pub enum BadRequest {
    #[error("FUSE request of {0} bytes is shorter than its header")]
    Short(usize),
    #[error("FUSE request says it has {said} bytes and has {got}")]
    Length { said: u32, got: usize },
    #[error("FUSE request {opcode} of {len} bytes is too long")]
    Long { opcode: u32, len: usize },
    #[error("FUSE request {opcode} leaves {room} bytes for the reply, too few for its header")]
    NoRoom { opcode: u32, room: usize },
}
