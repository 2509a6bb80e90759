//! The inodes the guest knows: node ids, their places on the host (O_PATH), and how often the
//! guest has been told of each.
//!
//! The table owns every place. A node id is never used twice in a server's lifetime, so a late or
//! invented one finds nothing (ESTALE) instead of something else. The lock is held for lines and
//! never across a system call; what is removed is closed after it is released.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::limits::Permit;
use super::share::Share;
use super::sys::{Errno, Stat};
use super::wire::ROOT_ID;

/// What makes two lookups the same inode.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// The inode itself. The mount belongs to it: one directory reached by two mounts of a share
    /// may have other things mounted on top.
    Inode {
        share: u64,
        mount: u64,
        device: (u32, u32),
        inode: u64,
    },
    /// The place it was found at: see [`super::overlay`].
    Name { parent: u64, name: CString },
}

impl Key {
    pub(super) fn inode(share: &Share, stat: &Stat) -> Key {
        Key::Inode {
            share: share.id,
            mount: stat.stx_mnt_id,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
        }
    }

    pub(super) fn name(parent: u64, name: &CStr) -> Key {
        Key::Name {
            parent,
            name: name.to_owned(),
        }
    }
}

/// A place on the host that is about to become an inode.
pub(super) struct Found {
    pub(super) share: Arc<Share>,
    pub(super) place: OwnedFd,
    /// None for the root of a share: that is not the guest's.
    pub(super) permit: Option<Permit>,
    pub(super) mode: u32,
    pub(super) mount: u64,
    /// The guest is to see it as the root of a file system of its own.
    pub(super) submount: bool,
    /// Another file may show the same number: see [`super::overlay`].
    pub(super) twin: bool,
}

/// An inode the guest knows.
pub(super) struct Node {
    pub(super) id: u64,
    pub(super) share: Arc<Share>,
    pub(super) mount: u64,
    pub(super) submount: bool,
    pub(super) twin: bool,
    kind: u32,
    place: OwnedFd,
    written: AtomicBool,
    linked: AtomicBool,
    _permit: Option<Permit>,
}

impl Node {
    pub(super) fn place(&self) -> BorrowedFd<'_> {
        self.place.as_fd()
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Notes that the file's data may have been changed, by way of this server, since the node
    /// became known: see [`super::handle::FileHandle`].
    pub(super) fn note_write(&self) {
        self.written.store(true, Ordering::Release);
        self.note_change();
    }

    /// Notes that something was changed where the node is: see [`Share::note_write`].
    pub(super) fn note_change(&self) {
        self.share.note_write(self.mount);
    }

    pub(super) fn was_written(&self) -> bool {
        self.written.load(Ordering::Acquire)
    }

    /// Notes that this server gave the inode another name: all names with its number are its own,
    /// see [`super::overlay`].
    pub(super) fn note_link(&self) {
        self.linked.store(true, Ordering::Relaxed);
    }

    pub(super) fn was_linked(&self) -> bool {
        self.linked.load(Ordering::Relaxed)
    }
}

struct Entry {
    node: Arc<Node>,
    key: Option<Key>,
    /// How often the guest has been told, less what it has forgotten. `None`: the root of a share,
    /// which stays until it is unshared.
    lookups: Option<u64>,
}

struct State {
    nodes: HashMap<u64, Entry>,
    ids: HashMap<Key, u64>,
    next: u64,
}

impl State {
    fn add(&mut self, key: Key, found: Found, lookups: Option<u64>) -> Arc<Node> {
        let id = self.next;
        // At a billion a second it takes centuries to get to the end.
        self.next = self.next.wrapping_add(1);
        let node = Arc::new(Node {
            id,
            share: found.share,
            mount: found.mount,
            submount: found.submount,
            twin: found.twin,
            kind: found.mode & libc::S_IFMT,
            place: found.place,
            written: AtomicBool::new(false),
            linked: AtomicBool::new(false),
            _permit: found.permit,
        });
        self.ids.insert(key.clone(), id);
        self.nodes.insert(
            id,
            Entry {
                node: node.clone(),
                key: Some(key),
                lookups,
            },
        );
        node
    }

    fn remove(&mut self, id: u64) -> Option<Arc<Node>> {
        let entry = self.nodes.remove(&id)?;
        self.drop_key(entry.key, id);
        Some(entry.node)
    }

    fn drop_key(&mut self, key: Option<Key>, id: u64) {
        if let Some(key) = key {
            // A key taken over by another node is that one's.
            if self.ids.get(&key) == Some(&id) {
                self.ids.remove(&key);
            }
        }
    }
}

/// All inodes of a server.
pub(super) struct NodeTable(RwLock<State>);

impl NodeTable {
    pub(super) fn new() -> NodeTable {
        let (nodes, ids) = (HashMap::new(), HashMap::new());
        NodeTable(RwLock::new(State {
            nodes,
            ids,
            next: ROOT_ID + 1,
        }))
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id that the next new inode gets.
    pub(super) fn next(&self) -> u64 {
        self.read().next
    }

    /// Gives new inodes ids from `next` on, or higher ones.
    pub(super) fn skip_to(&self, next: u64) {
        let mut state = self.write();
        state.next = state.next.max(next);
    }

    /// The inode of that id; ESTALE when there is none, any more or ever.
    pub(super) fn get(&self, id: u64) -> Result<Arc<Node>, Errno> {
        self.read()
            .nodes
            .get(&id)
            .map(|entry| entry.node.clone())
            .ok_or(Errno(libc::ESTALE))
    }

    /// The inode known by that key.
    pub(super) fn by_key(&self, key: &Key) -> Option<Arc<Node>> {
        let state = self.read();
        let id = state.ids.get(key)?;
        state.nodes.get(id).map(|entry| entry.node.clone())
    }

    /// The inode of that key, `found` when it is new; the guest is told of it once more.
    pub(super) fn enter(&self, key: Key, found: Found) -> Result<Arc<Node>, Errno> {
        let mut state = self.write();
        if found.share.is_revoked() {
            return Err(Errno(libc::ESTALE));
        }
        if let Some(id) = state.ids.get(&key).copied() {
            if let Some(entry) = state.nodes.get_mut(&id) {
                entry.lookups = entry.lookups.map(|count| count.saturating_add(1));
                return Ok(entry.node.clone());
            }
        }
        Ok(state.add(key, found, Some(1)))
    }

    /// The root of a share.
    pub(super) fn add_root(&self, key: Key, found: Found) -> Arc<Node> {
        self.write().add(key, found, None)
    }

    /// Counts one more time that the guest is told of a known inode.
    pub(super) fn tell_again(&self, id: u64) -> Result<(), Errno> {
        let mut state = self.write();
        let entry = state.nodes.get_mut(&id).ok_or(Errno(libc::ESTALE))?;
        entry.lookups = entry.lookups.map(|count| count.saturating_add(1));
        Ok(())
    }

    /// Gives a known inode another key, or none.
    pub(super) fn set_key(&self, id: u64, key: Option<Key>) {
        let mut state = self.write();
        let Some(entry) = state.nodes.get_mut(&id) else {
            return;
        };
        let old = std::mem::replace(&mut entry.key, key.clone());
        state.drop_key(old, id);
        if let Some(key) = key {
            state.ids.insert(key, id);
        }
    }

    /// The guest forgets `times` of the times it was told.
    pub(super) fn forget(&self, id: u64, times: u64) {
        let mut state = self.write();
        let Some(entry) = state.nodes.get_mut(&id) else {
            return;
        };
        let Some(count) = entry.lookups else { return };
        let left = count.saturating_sub(times);
        entry.lookups = Some(left);
        let gone = (left == 0).then(|| state.remove(id));
        drop(state);
        // Closes the place, without the lock.
        drop(gone);
    }

    /// Takes away every inode of a share; none can be added to it any more.
    pub(super) fn revoke(&self, share: &Share) {
        let mut state = self.write();
        share.revoke();
        let ids: Vec<u64> = state
            .nodes
            .iter()
            .filter_map(|(id, entry)| (entry.node.share.id == share.id).then_some(*id))
            .collect();
        let gone: Vec<_> = ids.into_iter().map(|id| state.remove(id)).collect();
        drop(state);
        drop(gone);
    }

    /// Forgets all but the roots of shares: the guest has unmounted, or starts anew. They are for the
    /// caller to close.
    pub(super) fn take_all(&self) -> Vec<Arc<Node>> {
        let mut state = self.write();
        let ids: Vec<u64> = state
            .nodes
            .iter()
            .filter_map(|(id, entry)| entry.lookups.is_some().then_some(*id))
            .collect();
        ids.into_iter().filter_map(|id| state.remove(id)).collect()
    }

    /// Inodes known, share roots too.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.read().nodes.len()
    }
}
