//! Extended attributes, ACLs and file capabilities among them.
//!
//! No operation here may ever answer ENOSYS: the guest's kernel would not ask again, for any file.

use std::ffi::CStr;

use super::message::{Answer, Reply, Request};
use super::overlay;
use super::server::FileServer;
use super::sys::{self, Errno};
use super::wire::{self, GetxattrIn, GetxattrOut, SETXATTR_ACL_KILL_SGID};

/// XATTR_SIZE_MAX and XATTR_LIST_MAX.
const MAX: usize = 64 << 10;
const ACCESS_ACL: &CStr = c"system.posix_acl_access";

impl FileServer {
    pub(super) fn getxattr(
        &self,
        request: &Request<'_>,
        reply: &Reply<'_>,
    ) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: GetxattrIn = args.take()?;
        let name = args.xattr()?;
        let node = self.nodes.get(request.header.nodeid)?;
        sized(&asked, reply, |value| {
            self.links
                .with_path(node.place(), |path| sys::getxattr(path, name, value))
        })
    }

    pub(super) fn listxattr(
        &self,
        request: &Request<'_>,
        reply: &Reply<'_>,
    ) -> Result<Answer, Errno> {
        let asked: GetxattrIn = request.args().take()?;
        let node = self.nodes.get(request.header.nodeid)?;
        let mut all = vec![0; MAX];
        let len = self
            .links
            .with_path(node.place(), |path| sys::listxattr(path, &mut all))?;
        all.truncate(len);
        let shown = without_trusted(&all);
        sized(&asked, reply, |names| {
            if !names.is_empty() {
                let room = names.get_mut(..shown.len()).ok_or(Errno(libc::ERANGE))?;
                room.copy_from_slice(&shown);
            }
            Ok(shown.len())
        })
    }

    pub(super) fn setxattr(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let mut args = request.args();
        let asked: wire::SetxattrIn = args.take()?;
        let name = args.xattr()?;
        let value = args.bytes(asked.size as usize)?;
        let node = self.nodes.get(request.header.nodeid)?;
        may_change(name)?;
        let flags = asked.flags as libc::c_int;
        self.links
            .with_path(node.place(), |path| sys::setxattr(path, name, value, flags))?;
        node.note_change();
        if name == ACCESS_ACL && asked.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0 {
            let mode = u32::from(sys::statx(node.place())?.stx_mode) & 0o7777;
            if mode & libc::S_ISGID != 0 {
                self.links.chmod(node.place(), mode & !libc::S_ISGID)?;
            }
        }
        overlay::settle(&self.nodes, &node);
        Ok(Answer::Empty)
    }

    pub(super) fn removexattr(&self, request: &Request<'_>) -> Result<Answer, Errno> {
        let name = request.args().xattr()?;
        let node = self.nodes.get(request.header.nodeid)?;
        may_change(name)?;
        self.links
            .with_path(node.place(), |path| sys::removexattr(path, name))?;
        node.note_change();
        overlay::settle(&self.nodes, &node);
        Ok(Answer::Empty)
    }
}

/// The labels of the host's security modules (`security.selinux`, `.ima`, `.evm`) are the host's;
/// file capabilities belong to the container.
fn may_change(name: &CStr) -> Result<(), Errno> {
    let name = name.to_bytes();
    match name.starts_with(b"security.") && name != b"security.capability" {
        true => Err(Errno(libc::EPERM)),
        false => Ok(()),
    }
}

/// A list of names, each ended by a NUL, without those of the `trusted` class: natively only
/// CAP_SYS_ADMIN is shown them, which the server, asked by the guest's kernel, would always have.
fn without_trusted(names: &[u8]) -> Vec<u8> {
    names
        .split_inclusive(|&byte| byte == 0)
        .filter(|name| !name.starts_with(b"trusted."))
        .flatten()
        .copied()
        .collect()
}

/// GETXATTR and LISTXATTR are two operations each: size 0 asks for the length, any other for that
/// many bytes at most.
fn sized(
    asked: &GetxattrIn,
    reply: &Reply<'_>,
    get: impl FnOnce(&mut [u8]) -> Result<usize, Errno>,
) -> Result<Answer, Errno> {
    if asked.size == 0 {
        let size = u32::try_from(get(&mut [])?).unwrap_or(u32::MAX);
        return Ok(Answer::of(&GetxattrOut { size, padding: 0 }));
    }
    let size = asked.size as usize;
    if size > reply.room() {
        return Err(Errno(libc::EINVAL));
    }
    let mut bytes = vec![0; size.min(MAX)];
    let len = get(&mut bytes)?;
    bytes.truncate(len);
    Ok(Answer::Bytes(bytes))
}

/// LISTXATTR of what has none.
pub(super) fn no_names(request: &Request<'_>) -> Result<Answer, Errno> {
    let asked: GetxattrIn = request.args().take()?;
    match asked.size {
        0 => Ok(Answer::of(&GetxattrOut::default())),
        _ => Ok(Answer::Empty),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trusted_names_are_not_listed() {
        assert_eq!(
            without_trusted(b"user.a\0trusted.b\0security.capability\0"),
            b"user.a\0security.capability\0"
        );
        assert!(without_trusted(b"trusted.only\0").is_empty());
    }
}
