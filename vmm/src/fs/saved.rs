//! A mounted file server in a saved machine: what the guest agreed on at INIT, and no share yet.
//!
//! What the guest knows of a share are places on this host, which no other process has. So there is
//! nothing to be saved but the numbers that may not be used again, and the root directory, which is
//! the same everywhere.

use std::sync::{PoisonError, atomic::Ordering};

use super::{FileServer, wire::ROOT_ID};
use crate::state;

impl FileServer {
    /// What the guest relies on, for [`Self::restore`].
    ///
    /// # Errors
    /// What the guest holds on to, in words.
    pub fn save(&self) -> Result<state::Fs, String> {
        let shares = self.shares.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(name) = shares.keys().next() {
            return Err(format!("share {name:?} exists"));
        }
        let open = self.handles.len();
        if open > 0 {
            return Err(format!("the guest has {open} files or directories open"));
        }
        Ok(state::Fs {
            submounts: self.submounts.load(Ordering::Relaxed),
            next_node: self.nodes.next(),
            next_handle: self.handles.next(),
            next_share: self.next_share.load(Ordering::Relaxed),
            ..Default::default()
        })
    }

    /// Goes on where another machine's server was saved. Called before anything is shared or served.
    pub fn restore(&self, saved: &state::Fs) {
        self.submounts.store(saved.submounts, Ordering::Relaxed);
        self.nodes.skip_to(saved.next_node.max(ROOT_ID + 1));
        self.handles.skip_to(saved.next_handle);
        let next_share = saved.next_share.max(1);
        self.next_share.store(next_share, Ordering::Relaxed);
    }
}
