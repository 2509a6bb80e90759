//! The server itself: what it owns, how shares come and go, and which operation a request is.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vm_memory::VolatileSlice;

use super::dirs::KEPT_AHEAD;
use super::handle::HandleTable;
use super::inode::{Found, Key, Node, NodeTable};
use super::limits::{self, Budget, Permit};
use super::message::{Answer, Reply, Request};
use super::overlay;
use super::self_fd::SelfFd;
use super::share::Share;
use super::sys::{self, Errno, Stat};
use super::wire::{
    self, AttrOut, EntryOut, InitOut, OpenOut, ROOT_ID, StatfsOut, StatxOut, opcode,
};
use super::{BadRequest, FsError, ShareError};
use crate::jail::{self, Role};

/// The largest WRITE and READ: 256 pages, the most the guest's kernel makes of one request. It
/// makes less of it when the virtqueue is shorter than 260 entries.
const PAGES_PER_REQUEST: u16 = 256;
pub(super) const MAX_TRANSFER: u32 = PAGES_PER_REQUEST as u32 * 4096;
/// Requests the guest's kernel may have under way without anyone waiting (readahead).
const MAX_BACKGROUND: u16 = 64;

/// A virtio-fs file server over any number of shares. See the [module](super) for its rules.
pub struct FileServer {
    pub(super) links: SelfFd,
    pub(super) nodes: NodeTable,
    pub(super) handles: HandleTable,
    pub(super) budget: Arc<Budget>,
    /// For directories that keep what was read ahead.
    pub(super) read_ahead: Arc<Budget>,
    /// The entries of the root directory: the roots of the shares.
    pub(super) shares: RwLock<BTreeMap<String, Arc<Node>>>,
    pub(super) next_share: AtomicU64,
    /// The guest shows each share as a file system of its own (FUSE_SUBMOUNTS).
    pub(super) submounts: AtomicBool,
}

impl FileServer {
    /// Raises this process's limit of open files (each inode the guest knows costs one), makes its
    /// descriptor table large, and takes a clone of /proc/self/fd. To be called before the process
    /// has a second thread: see `limits.rs`.
    ///
    /// # Errors
    /// /proc cannot be cloned (it is not mounted, or CAP_SYS_ADMIN is missing).
    pub fn new() -> Result<FileServer, FsError> {
        let budget = limits::prepare().map_err(FsError::OpenFiles)?;
        let links = SelfFd::take().map_err(|cause| FsError::SelfFd(cause.into()))?;
        Ok(FileServer {
            links,
            nodes: NodeTable::new(),
            handles: HandleTable::new(),
            budget,
            read_ahead: Budget::new(KEPT_AHEAD),
            shares: RwLock::default(),
            next_share: AtomicU64::new(1),
            submounts: AtomicBool::new(false),
        })
    }

    /// Adds `root`, a place (O_PATH) or an open file, as entry `name` of the root directory.
    /// `exclusive`: nothing but this guest changes it while it is shared; see `share.rs` for what
    /// that buys.
    ///
    /// # Errors
    /// The name is taken or cannot be one; the root is neither directory nor regular file.
    pub fn share(&self, name: &str, root: OwnedFd, exclusive: bool) -> Result<(), ShareError> {
        let valid =
            !matches!(name, "" | "." | "..") && name.len() <= 255 && !name.contains(['/', '\0']);
        if !valid {
            return Err(ShareError::InvalidName(name.to_owned()));
        }
        let failed = |cause: Errno| ShareError::Root {
            name: name.to_owned(),
            cause: cause.into(),
        };
        // The caller may have no time for a server that does not answer.
        let stat = sys::statx_known(root.as_fd()).map_err(failed)?;
        let mode = u32::from(stat.stx_mode);
        if !matches!(mode & libc::S_IFMT, libc::S_IFDIR | libc::S_IFREG) {
            return Err(ShareError::NotDirOrFile(name.to_owned()));
        }
        let id = self.next_share.fetch_add(1, Ordering::Relaxed);
        let share = Arc::new(Share::new(id, exclusive));
        let key = Key::inode(&share, &stat);
        let mount = stat.stx_mnt_id;
        let submount = mode & libc::S_IFMT == libc::S_IFDIR;
        let found = Found {
            share,
            place: root,
            permit: None,
            mode,
            mount,
            submount,
            twin: false,
        };
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        if shares.contains_key(name) {
            return Err(ShareError::AlreadyExists(name.to_owned()));
        }
        shares.insert(name.to_owned(), self.nodes.add_root(key, found));
        Ok(())
    }

    /// Takes the share away. When this returns, no new request finds anything of it (ESTALE), and
    /// its descriptors are closed but for those of requests that are under way: that can take as long
    /// as the host takes to close them.
    ///
    /// # Errors
    /// There is no share of that name.
    pub fn unshare(&self, name: &str) -> Result<(), ShareError> {
        let mut shares = self.shares.write().unwrap_or_else(PoisonError::into_inner);
        let root = shares
            .remove(name)
            .ok_or_else(|| ShareError::NotFound(name.to_owned()))?;
        drop(shares);
        self.nodes.revoke(&root.share);
        self.handles.revoke(root.share.id);
        Ok(())
    }

    /// Serves one FUSE request: `request` are the device-readable slices of a descriptor chain,
    /// `reply` its device-writable ones. Returns the number of bytes written to `reply`; 0 when the
    /// request has no reply (FORGET). The calling thread has called [`worker_init`].
    ///
    /// # Errors
    /// The chain is no FUSE request; nothing was done and nothing was written.
    ///
    /// [`worker_init`]: super::worker_init
    pub fn handle(
        &self,
        request: &[VolatileSlice<'_>],
        reply: &[VolatileSlice<'_>],
    ) -> Result<usize, BadRequest> {
        let request = Request::read(request)?;
        let (opcode, unique) = (request.header.opcode, request.header.unique);
        if matches!(opcode, opcode::FORGET | opcode::BATCH_FORGET) {
            self.forget(&request);
            return Ok(0);
        }
        let room = reply
            .iter()
            .fold(0_usize, |sum, slice| sum.saturating_add(slice.len()));
        let reply = Reply::new(reply).ok_or(BadRequest::NoRoom { opcode, room })?;
        // Before anything is done that could not be told about.
        let answer = match reply.room() < fixed_reply(opcode) {
            true => Err(Errno(libc::EIO)),
            false => self.dispatch(&request, &reply),
        };
        Ok(reply.finish(unique, answer))
    }

    fn dispatch(&self, request: &Request<'_>, reply: &Reply<'_>) -> Result<Answer, Errno> {
        match request.header.opcode {
            opcode::INIT => return self.init(request),
            opcode::DESTROY => {
                self.forget_guest();
                return Ok(Answer::Empty);
            }
            _ if request.header.nodeid == ROOT_ID => return self.root_op(request, reply),
            _ => {}
        }
        match request.header.opcode {
            opcode::LOOKUP => self.lookup(request),
            opcode::GETATTR => self.getattr(request),
            opcode::STATX => self.statx(request),
            opcode::SETATTR => self.setattr(request),
            opcode::STATFS => self.statfs(request),
            opcode::READLINK => self.readlink(request),
            opcode::SYMLINK => self.symlink(request),
            opcode::MKNOD => self.mknod(request),
            opcode::MKDIR => self.mkdir(request),
            opcode::UNLINK => self.unlink(request, 0),
            opcode::RMDIR => self.unlink(request, libc::AT_REMOVEDIR),
            opcode::RENAME => self.rename(request),
            opcode::RENAME2 => self.rename2(request),
            opcode::LINK => self.link(request),
            opcode::CREATE => self.create(request),
            opcode::TMPFILE => self.tmpfile(request),
            opcode::OPEN => self.open(request),
            opcode::READ => self.read(request, reply),
            opcode::WRITE => self.write(request),
            opcode::FLUSH => self.flush(request),
            opcode::RELEASE | opcode::RELEASEDIR => self.release(request),
            opcode::FSYNC => self.fsync(request),
            opcode::LSEEK => self.lseek(request),
            opcode::FALLOCATE => self.fallocate(request),
            opcode::COPY_FILE_RANGE => self.copy_file_range(request),
            opcode::SYNCFS => self.syncfs(request),
            opcode::OPENDIR => self.opendir(request),
            opcode::READDIR => self.readdir(request, reply, false),
            opcode::READDIRPLUS => self.readdir(request, reply, true),
            opcode::FSYNCDIR => self.fsyncdir(request),
            opcode::GETXATTR => self.getxattr(request, reply),
            opcode::LISTXATTR => self.listxattr(request, reply),
            opcode::SETXATTR => self.setxattr(request),
            opcode::REMOVEXATTR => self.removexattr(request),
            _ => Err(Errno(libc::ENOSYS)),
        }
    }

    /// INIT: what both sides can do.
    fn init(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        use wire::init::*;
        let mut args = request.args();
        let asked: wire::InitIn = args.take()?;
        if asked.major > wire::MAJOR {
            // The guest asks again, with our version.
            return Ok(Answer::of(&InitOut {
                major: wire::MAJOR,
                ..Default::default()
            }));
        }
        if asked.major < wire::MAJOR || asked.minor < wire::OLDEST_MINOR {
            return Err(Errno(libc::EPROTO));
        }
        let mut offered = u64::from(asked.flags);
        if offered & INIT_EXT != 0 {
            offered |= u64::from(args.take::<wire::InitInExt>()?.flags2) << 32;
        }
        // Not taken, and why: POSIX_LOCKS and FLOCK_LOCKS, so that locks work inside the guest;
        // WRITEBACK_CACHE, so that the host sees data when write(2) returns; AUTO_INVAL_DATA, which
        // throws a file's cache away after every write of the guest's own; EXPORT_SUPPORT.
        const WANTED: u64 = ASYNC_READ
            | ATOMIC_O_TRUNC
            | BIG_WRITES
            | DONT_MASK
            | DO_READDIRPLUS
            | READDIRPLUS_AUTO
            | ASYNC_DIO
            | PARALLEL_DIROPS
            | POSIX_ACL
            | MAX_PAGES
            | CACHE_SYMLINKS
            | SUBMOUNTS
            | HANDLE_KILLPRIV_V2
            | SETXATTR_EXT
            | INIT_EXT;
        let taken = offered & WANTED;
        if taken & SETXATTR_EXT == 0 {
            return Err(Errno(libc::EPROTO));
        }
        self.forget_guest();
        self.submounts
            .store(taken & SUBMOUNTS != 0, Ordering::Relaxed);
        Ok(Answer::of(&InitOut {
            major: wire::MAJOR,
            minor: asked.minor.min(wire::MINOR),
            max_readahead: MAX_TRANSFER,
            flags: taken as u32,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: MAX_TRANSFER,
            time_gran: 1,
            max_pages: PAGES_PER_REQUEST,
            flags2: (taken >> 32) as u32,
            ..Default::default()
        }))
    }

    /// The guest's file system is gone or starts anew: it knows nothing and has nothing open.
    fn forget_guest(&self) {
        drop((self.handles.take_all(), self.nodes.take_all()));
    }

    /// The guest's driver is gone, without a word of its file system's. Never waits for the host: what
    /// was open is closed on a thread of its own.
    pub fn reset(&self) {
        let gone = (self.handles.take_all(), self.nodes.take_all());
        if gone.0.is_empty() && gone.1.is_empty() {
            return;
        }
        // Where there can be no thread, the closure is dropped right here.
        let thread = std::thread::Builder::new().name("fs-close".to_owned());
        let _ = jail::spawn(thread, Role::Files, move || drop(gone));
    }

    /// The root of the share of that name.
    pub(super) fn share_root(&self, name: &CStr) -> Option<Arc<Node>> {
        let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
        shares.get(name.to_str().ok()?).cloned()
    }

    /// All shares by name.
    pub(super) fn share_roots(&self) -> Vec<(String, Arc<Node>)> {
        let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
        shares
            .iter()
            .map(|(name, root)| (name.clone(), root.clone()))
            .collect()
    }

    /// The guest shows roots of mounts as file systems of their own.
    pub(super) fn has_submounts(&self) -> bool {
        self.submounts.load(Ordering::Relaxed)
    }

    /// The directory that a request which changes it names.
    pub(super) fn parent(&self, id: u64) -> Result<Arc<Node>, Errno> {
        match id {
            ROOT_ID => Err(Errno(libc::EROFS)),
            _ => self.nodes.get(id),
        }
    }

    /// Looks `name` up in `parent`; the guest is going to be told.
    pub(super) fn enter(&self, parent: &Node, name: &CStr) -> Result<(Arc<Node>, Stat), Errno> {
        self.enter_with(parent, name, None)
    }

    /// The same, and if it is new with a permit that was taken before.
    pub(super) fn enter_with(
        &self,
        parent: &Node,
        name: &CStr,
        permit: Option<Permit>,
    ) -> Result<(Arc<Node>, Stat), Errno> {
        let place = sys::open_place(parent.place(), name)?;
        self.admit(parent, name, place, permit)
    }

    /// Makes `place`, which was found as `name` in `parent`, an inode the guest is told of. Only a new
    /// one takes a permit: what the guest knows it can go on with when it has used them up.
    pub(super) fn admit(
        &self,
        parent: &Node,
        name: &CStr,
        place: OwnedFd,
        permit: Option<Permit>,
    ) -> Result<(Arc<Node>, Stat), Errno> {
        let stat = sys::statx(place.as_fd())?;
        let at = (parent.id, name);
        let share = parent.share.clone();
        let (key, twin) = overlay::key(&self.nodes, &self.links, &share, at, place.as_fd(), &stat);
        if let Some(known) = self.nodes.by_key(&key) {
            if self.nodes.tell_again(known.id).is_ok() {
                return Ok((known, stat));
            }
        }
        let permit = match permit {
            Some(permit) => permit,
            None => self.budget.take()?,
        };
        let mode = u32::from(stat.stx_mode);
        let mount = stat.stx_mnt_id;
        let submount = mount != parent.mount && mode & libc::S_IFMT == libc::S_IFDIR;
        let found = Found {
            share,
            place,
            permit: Some(permit),
            mode,
            mount,
            submount,
            twin,
        };
        Ok((self.nodes.enter(key, found)?, stat))
    }
}

/// What the reply to an operation needs behind its header, at least.
fn fixed_reply(opcode: u32) -> usize {
    match opcode {
        opcode::LOOKUP | opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => {
            size_of::<EntryOut>()
        }
        opcode::GETATTR | opcode::SETATTR => size_of::<AttrOut>(),
        opcode::STATX => size_of::<StatxOut>(),
        opcode::STATFS => size_of::<StatfsOut>(),
        opcode::CREATE | opcode::TMPFILE => size_of::<EntryOut>() + size_of::<OpenOut>(),
        opcode::OPEN | opcode::OPENDIR => size_of::<OpenOut>(),
        opcode::WRITE | opcode::COPY_FILE_RANGE => size_of::<wire::WriteOut>(),
        opcode::LSEEK => size_of::<wire::LseekOut>(),
        opcode::INIT => size_of::<InitOut>(),
        _ => 0,
    }
}
