//! Names: looking them up, making them, moving and removing them.
//!
//! What is made is made as the guest's caller ([`AsCaller`]); what is found is opened as a place.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::creds::{AsCaller, WithoutFsetid};
use super::data::host_flags;
use super::handle::{FileHandle, Handle, writes};
use super::inode::Node;
use super::limits::Permit;
use super::message::{Answer, Request};
use super::overlay;
use super::server::FileServer;
use super::sys::{self, Errno, Stat};
use super::wire::{self, CreateIn, EntryOut, OPEN_KILL_SUIDGID, OpenOut};

impl FileServer {
    pub(super) fn lookup(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let name = request.args().name()?;
        let parent = self.nodes.get(request.header.nodeid)?;
        match (self.enter(&parent, name), parent.share.absence_valid()) {
            (Ok((node, stat)), _) => Ok(Answer::of(&self.entry(&node, &stat))),
            // Node id 0: the name does not exist, and may be believed not to for a while.
            (Err(Errno(libc::ENOENT)), Some((entry_valid, entry_valid_nsec))) => {
                Ok(Answer::of(&EntryOut {
                    entry_valid,
                    entry_valid_nsec,
                    ..Default::default()
                }))
            }
            (Err(error), _) => Err(error),
        }
    }

    /// FORGET and BATCH_FORGET, which have no reply; nonsense is passed over.
    pub(super) fn forget(&self, request: &Request<'_>) {
        let mut args = request.args();
        if request.header.opcode == wire::opcode::FORGET {
            if let Ok(forget) = args.take::<wire::ForgetIn>() {
                self.nodes.forget(request.header.nodeid, forget.nlookup);
            }
            return;
        }
        let count = args
            .take::<wire::BatchForgetIn>()
            .map_or(0, |batch| batch.count);
        for _ in 0..count {
            let Ok(one) = args.take::<wire::ForgetOne>() else {
                return;
            };
            self.nodes.forget(one.nodeid, one.nlookup);
        }
    }

    pub(super) fn mkdir(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: wire::MkdirIn = args.take()?;
        let name = args.name()?;
        self.make(request, name, asked.umask, |parent| {
            sys::mkdirat(parent.place(), name, asked.mode & 0o7777)
        })
    }

    pub(super) fn mknod(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: wire::MknodIn = args.take()?;
        let name = args.name()?;
        let kind = asked.mode & libc::S_IFMT;
        if !matches!(
            kind,
            libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR | libc::S_IFBLK
        ) {
            return Err(Errno(libc::EINVAL));
        }
        let mode = kind | (asked.mode & 0o7777);
        self.make(request, name, asked.umask, |parent| {
            sys::mknodat(parent.place(), name, mode, decode_device(asked.rdev))
        })
    }

    pub(super) fn symlink(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let name = args.name()?;
        let text = args.link_text()?;
        self.make(request, name, 0, |parent| {
            sys::symlinkat(text, parent.place(), name)
        })
    }

    /// Makes `name` with `act` and tells the guest of it.
    fn make(
        &self,
        request: &Request<'_>,
        name: &CStr,
        umask: u32,
        act: impl FnOnce(&Node) -> Result<(), Errno>,
    ) -> Result<Answer, Errno> {
        let parent = self.parent(request.header.nodeid)?;
        // Taken first: what is made must be possible to tell of.
        let permit = self.budget.take()?;
        {
            let _caller = AsCaller::enter(request.header.uid, request.header.gid, umask)?;
            act(&parent)?;
        }
        parent.note_change();
        let (node, stat) = self.enter_with(&parent, name, Some(permit))?;
        Ok(Answer::of(&self.entry(&node, &stat)))
    }

    pub(super) fn create(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: CreateIn = args.take()?;
        let name = args.name()?;
        let parent = self.parent(request.header.nodeid)?;
        let (permit, file_permit) = (self.budget.take()?, self.budget.take()?);
        // Always exclusive: what has come into being meanwhile may be no regular file, and opening
        // that could wait or act.
        let flags = host_flags(asked.flags) | libc::O_CREAT | libc::O_EXCL;
        let made = {
            let _caller = AsCaller::enter(request.header.uid, request.header.gid, asked.umask)?;
            sys::openat(parent.place(), name, flags, asked.mode & 0o7777)
        };
        match made {
            Ok(file) => self.created(&parent, name, file, &asked, (permit, file_permit)),
            Err(Errno(libc::EEXIST)) if asked.flags & libc::O_EXCL as u32 == 0 => {
                let (node, stat) = self.enter_with(&parent, name, Some(permit))?;
                if !node.is_file() {
                    // The guest's kernel looks again, and goes about it the right way.
                    self.nodes.forget(node.id, 1);
                    return Err(Errno(libc::ESTALE));
                }
                let opened = {
                    let _ordinary =
                        WithoutFsetid::enter_if(asked.open_flags & OPEN_KILL_SUIDGID != 0)?;
                    self.links.open(node.place(), host_flags(asked.flags))
                };
                let opened = opened.inspect_err(|_| self.nodes.forget(node.id, 1))?;
                self.opened(node, &stat, opened, &asked, file_permit)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn tmpfile(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let asked: CreateIn = request.args().take()?;
        let parent = self.parent(request.header.nodeid)?;
        let permits = (self.budget.take()?, self.budget.take()?);
        let file = {
            let _caller = AsCaller::enter(request.header.uid, request.header.gid, asked.umask)?;
            let linkable = asked.flags as libc::c_int & libc::O_EXCL;
            let flags = host_flags(asked.flags) & !libc::O_TRUNC | linkable | libc::O_TMPFILE;
            sys::openat(parent.place(), c".", flags, asked.mode & 0o7777)?
        };
        self.created(&parent, c"", file, &asked, permits)
    }

    fn created(
        &self,
        parent: &Node,
        name: &CStr,
        file: OwnedFd,
        asked: &CreateIn,
        (permit, file_permit): (Permit, Permit),
    ) -> Result<Answer, Errno> {
        // By way of the file itself: the name may be another's by now.
        let place = self.links.open(file.as_fd(), libc::O_PATH)?;
        let (node, stat) = self.admit(parent, name, place, Some(permit))?;
        self.opened(node, &stat, file, asked, file_permit)
    }

    fn opened(
        &self,
        node: Arc<Node>,
        stat: &Stat,
        file: OwnedFd,
        asked: &CreateIn,
        permit: Permit,
    ) -> Result<Answer, Errno> {
        node.note_write();
        overlay::settle(&self.nodes, &node);
        let entry = self.entry(&node, stat);
        let flags = host_flags(asked.flags) & !libc::O_TRUNC;
        let open_flags = node.share.open_flags(writes(flags));
        let id = node.id;
        let handle = Handle::File(Arc::new(FileHandle::new(node, file, flags, permit)));
        let fh = self
            .handles
            .add(handle)
            .inspect_err(|_| self.nodes.forget(id, 1))?;
        let mut bytes = wire::as_bytes(&entry).to_vec();
        bytes.extend_from_slice(wire::as_bytes(&OpenOut {
            fh,
            open_flags,
            backing_id: 0,
        }));
        Ok(Answer::Bytes(bytes))
    }

    pub(super) fn link(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: wire::LinkIn = args.take()?;
        let name = args.name()?;
        let parent = self.parent(request.header.nodeid)?;
        let node = self.nodes.get(asked.oldnodeid)?;
        if node.share.id != parent.share.id {
            return Err(Errno(libc::EXDEV));
        }
        self.links.link(node.place(), parent.place(), name)?;
        node.note_change();
        node.note_link();
        overlay::settle(&self.nodes, &node);
        let stat = sys::statx(node.place())?;
        self.nodes.tell_again(node.id)?;
        Ok(Answer::of(&self.entry(&node, &stat)))
    }

    /// UNLINK and RMDIR (`flags`: AT_REMOVEDIR).
    pub(super) fn unlink(
        &self,
        request: &Request<'_>,
        flags: libc::c_int,
    ) -> Result<Answer, Errno> {
        let name = request.args().name()?;
        let parent = self.parent(request.header.nodeid)?;
        sys::unlinkat(parent.place(), name, flags)?;
        parent.note_change();
        Ok(Answer::Empty)
    }

    pub(super) fn rename(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: wire::RenameIn = args.take()?;
        let (name, new_name) = (args.name()?, args.name()?);
        self.move_name(request, name, asked.newdir, new_name, 0)
    }

    pub(super) fn rename2(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: wire::Rename2In = args.take()?;
        let (name, new_name) = (args.name()?, args.name()?);
        let known = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;
        if asked.flags & !known != 0 {
            return Err(Errno(libc::EINVAL));
        }
        self.move_name(request, name, asked.newdir, new_name, asked.flags)
    }

    fn move_name(
        &self,
        request: &Request<'_>,
        name: &CStr,
        new_dir: u64,
        new_name: &CStr,
        flags: u32,
    ) -> Result<Answer, Errno> {
        let from = self.parent(request.header.nodeid)?;
        let to = self.parent(new_dir)?;
        if from.share.id != to.share.id {
            return Err(Errno(libc::EXDEV));
        }
        let mut moved = overlay::namesakes(&self.nodes, &from, name).to_vec();
        if flags & libc::RENAME_EXCHANGE != 0 {
            moved.extend(overlay::namesakes(&self.nodes, &to, new_name));
        }
        // A whiteout is a new inode, and the caller's.
        let _caller = match flags & libc::RENAME_WHITEOUT {
            0 => None,
            _ => Some(AsCaller::enter(request.header.uid, request.header.gid, 0)?),
        };
        sys::renameat2(from.place(), name, to.place(), new_name, flags)?;
        from.note_change();
        for node in moved.iter().flatten() {
            overlay::settle(&self.nodes, node);
        }
        Ok(Answer::Empty)
    }
}

/// A device number as the kernel packs it into 32 bits (new_decode_dev).
fn decode_device(packed: u32) -> libc::dev_t {
    let major = (packed & 0xf_ff00) >> 8;
    let minor = (packed & 0xff) | ((packed >> 12) & 0xf_ff00);
    libc::makedev(major, minor)
}
