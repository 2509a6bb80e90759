//! The root directory (node id 1): synthetic, read-only, its entries are the shares.
//!
//! Its names and attributes are believed for no time at all: shares come and go without the guest
//! being told.

use std::sync::Arc;

use super::dirs::Listing;
use super::handle::Handle;
use super::limits::Permit;
use super::message::{Answer, Reply, Request};
use super::server::FileServer;
use super::sys::{self, Errno};
use super::wire::{self, Attr, AttrOut, EntryOut, ROOT_ID, StatfsOut, StatxOut, opcode};

const MODE: u32 = libc::S_IFDIR | 0o555;

/// The root directory as it was when it was opened.
pub(super) struct RootListing {
    entries: Vec<(String, u32)>,
    _permit: Permit,
}

impl FileServer {
    /// Any operation on the root directory.
    pub(super) fn root_op(
        &self,
        request: &Request<'_>,
        reply: &Reply<'_>,
    ) -> Result<Answer, Errno> {
        match request.header.opcode {
            opcode::LOOKUP => self.root_lookup(request),
            opcode::GETATTR => Ok(Answer::of(&AttrOut {
                attr: root_attr(),
                ..Default::default()
            })),
            opcode::STATX => Ok(Answer::of(&root_statx())),
            opcode::STATFS => Ok(Answer::of(&StatfsOut {
                bsize: 4096,
                frsize: 4096,
                namelen: 255,
                ..Default::default()
            })),
            opcode::OPENDIR => self.root_open(),
            opcode::READDIR => self.root_read(request, reply, false),
            opcode::READDIRPLUS => self.root_read(request, reply, true),
            opcode::RELEASEDIR => self.release(request),
            opcode::FSYNCDIR => Ok(Answer::Empty),
            opcode::SYNCFS => {
                for (_, root) in self.share_roots() {
                    self.sync_share(&root)?;
                }
                Ok(Answer::Empty)
            }
            opcode::GETXATTR => Err(Errno(libc::ENODATA)),
            opcode::LISTXATTR => super::xattrs::no_names(request),
            opcode::SETATTR
            | opcode::SETXATTR
            | opcode::REMOVEXATTR
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::SYMLINK
            | opcode::LINK
            | opcode::CREATE
            | opcode::TMPFILE
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2 => Err(Errno(libc::EROFS)),
            opcode::OPEN => Err(Errno(libc::EISDIR)),
            opcode::READLINK => Err(Errno(libc::EINVAL)),
            opcode::READ
            | opcode::WRITE
            | opcode::FLUSH
            | opcode::RELEASE
            | opcode::FSYNC
            | opcode::LSEEK
            | opcode::FALLOCATE
            | opcode::COPY_FILE_RANGE => Err(Errno(libc::EBADF)),
            _ => Err(Errno(libc::ENOSYS)),
        }
    }

    fn root_lookup(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let name = request.args().name()?;
        let root = self.share_root(name).ok_or(Errno(libc::ENOENT))?;
        let stat = sys::statx(root.place())?;
        let entry = self.entry(&root, &stat);
        Ok(Answer::of(&EntryOut {
            entry_valid: 0,
            entry_valid_nsec: 0,
            ..entry
        }))
    }

    fn root_open(&self) -> Result<Answer, Errno> {
        // No descriptor, but as much memory.
        let permit = self.budget.take()?;
        let entries = self.share_roots().into_iter().map(|(name, root)| {
            let kind = if root.is_dir() {
                libc::DT_DIR
            } else {
                libc::DT_REG
            };
            (name, u32::from(kind))
        });
        let listing = RootListing {
            entries: entries.collect(),
            _permit: permit,
        };
        let fh = self.handles.add(Handle::Root(Arc::new(listing)))?;
        Ok(Answer::of(&wire::OpenOut {
            fh,
            ..Default::default()
        }))
    }

    fn root_read(
        &self,
        request: &Request<'_>,
        reply: &Reply<'_>,
        plus: bool,
    ) -> Result<Answer, Errno> {
        let asked: wire::ReadIn = request.args().take()?;
        let listing = self.handles.root(asked.fh)?;
        let mut out = Listing::new(asked.size, reply, plus)?;
        let skip = usize::try_from(asked.offset).unwrap_or(usize::MAX);
        for (at, (name, kind)) in listing.entries.iter().enumerate().skip(skip) {
            let off = at as u64 + 1;
            // The number is of no use before the entry is looked up.
            if !out.push(name.as_bytes(), ROOT_ID, off, *kind, EntryOut::default()) {
                break;
            }
        }
        Ok(out.answer())
    }
}

fn root_attr() -> Attr {
    Attr {
        ino: ROOT_ID,
        mode: MODE,
        nlink: 2,
        blksize: 4096,
        ..Default::default()
    }
}

fn root_statx() -> StatxOut {
    let stat = wire::Statx {
        mask: libc::STATX_BASIC_STATS,
        blksize: 4096,
        nlink: 2,
        mode: MODE as u16,
        ino: ROOT_ID,
        ..Default::default()
    };
    StatxOut {
        stat,
        ..Default::default()
    }
}
