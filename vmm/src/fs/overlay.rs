//! Telling hard links on overlayfs apart.
//!
//! Without its inode index (containerd turns it off) overlayfs shows two hard links of a *lower*
//! layer with one device and inode number, and yet they are two files: a change copies up only the
//! name it was made through, which then gets a number of its own. Keyed by number alone, `chmod`
//! of one busybox applet would change whichever applet was looked up first.
//!
//! Links of the *upper* layer are one file with one number, as anywhere. The two cases never share
//! a number, so one comparison decides: a flock(2) taken through one name is in the way of the
//! other only when they are one inode. The lock lives for microseconds, between descriptors of our
//! own, and the guest's locks never get to the host. What is no regular file cannot be locked: each
//! name of it counts as a file of its own, known by that name, unless this server has made the link.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::inode::{Key, Node, NodeTable};
use super::self_fd::SelfFd;
use super::share::Share;
use super::sys::{self, Stat};

/// The key for what was found as `name` in `parent`: by its number, or by its place where the
/// number does not tell. True beside it when the number may change: see [`settle`].
pub(super) fn key(
    nodes: &NodeTable,
    links: &SelfFd,
    share: &Share,
    (parent, name): (u64, &CStr),
    place: BorrowedFd<'_>,
    stat: &Stat,
) -> (Key, bool) {
    let by_number = Key::inode(share, stat);
    if !may_be_twins(place, stat) {
        return (by_number, false);
    }
    let is_file = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFREG;
    let same = |known: &Node| known.was_linked() || same_file(links, known.place(), place);
    let known = nodes.by_key(&by_number);
    if known.as_deref().is_some_and(same) {
        return (by_number, true);
    }
    let by_name = Key::name(parent, name);
    let same = |namesake: &Node| match is_file {
        true => same_file(links, namesake.place(), place),
        false => sys::statx(namesake.place())
            .is_ok_and(|stat| Key::inode(&namesake.share, &stat) == by_number),
    };
    match (known, nodes.by_key(&by_name)) {
        (_, Some(namesake)) if same(&namesake) => (by_name, true),
        (None, _) if is_file => (by_number, true),
        (_, None) => (by_name, true),
        (_, Some(gone)) => {
            nodes.set_key(gone.id, None);
            (by_name, true)
        }
    }
}

/// The nodes that `name` in `parent` may be known as, for [`settle`] after a change by name.
pub(super) fn namesakes(nodes: &NodeTable, parent: &Node, name: &CStr) -> [Option<Arc<Node>>; 2] {
    let by_number = || {
        let place = sys::open_place(parent.place(), name).ok()?;
        let stat = sys::statx(place.as_fd()).ok()?;
        nodes.by_key(&Key::inode(&parent.share, &stat))
    };
    [nodes.by_key(&Key::name(parent.id, name)), by_number()]
}

/// Gives `node` the key it has now, after a change that may have copied it up.
pub(super) fn settle(nodes: &NodeTable, node: &Node) {
    if !node.twin {
        return;
    }
    let Ok(stat) = sys::statx(node.place()) else {
        return;
    };
    if stat.stx_nlink > 1 && !node.is_file() && !node.was_linked() {
        // Its number does not tell yet.
        return;
    }
    let key = Key::inode(&node.share, &stat);
    if nodes.by_key(&key).is_none() {
        nodes.set_key(node.id, Some(key));
    }
}

/// True when another name could show the same number and be another file.
fn may_be_twins(place: BorrowedFd<'_>, stat: &Stat) -> bool {
    let is_dir = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
    stat.stx_nlink > 1
        && !is_dir
        && sys::fstatfs(place).is_ok_and(|fs| fs.f_type == libc::OVERLAYFS_SUPER_MAGIC)
}

/// True when both places are one inode of one file system; false when it cannot be told.
fn same_file(links: &SelfFd, a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let open = |place| {
        let mode = sys::statx(place).map(|stat| u32::from(stat.stx_mode) & libc::S_IFMT);
        match mode {
            Ok(libc::S_IFREG) => links.open(place, libc::O_RDONLY).ok(),
            _ => None,
        }
    };
    let (Some(a), Some(b)) = (open(a), open(b)) else {
        return false;
    };
    // Closing the descriptors releases what was taken.
    sys::try_flock(a.as_fd(), libc::LOCK_EX) && !sys::try_flock(b.as_fd(), libc::LOCK_SH)
}
