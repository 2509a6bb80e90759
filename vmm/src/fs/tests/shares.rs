//! Shares that come and go, and the root directory they are entries of.

use std::fs;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::*;
use crate::fs::ShareError;

#[test]
fn names_of_shares_are_checked() {
    let host = Host::new();
    let server = &host.server;
    for name in ["", ".", "..", "a/b", "a\0b", &"x".repeat(256)] {
        let refused = server.share(name, clone_of(&host.dir), true);
        assert!(matches!(refused, Err(ShareError::InvalidName(_))));
    }
    let again = server.share("data", clone_of(&host.dir), true);
    assert!(matches!(again, Err(ShareError::AlreadyExists(_))));
    assert!(matches!(
        server.unshare("none"),
        Err(ShareError::NotFound(_))
    ));
    host.client()
        .mknod(host.root, "fifo", libc::S_IFIFO | 0o644, 0)
        .unwrap();
    let fifo = server.share("fifo", clone_of(&host.path("fifo")), true);
    assert!(matches!(fifo, Err(ShareError::NotDirOrFile(_))));
}

#[test]
fn a_share_may_be_a_single_file() {
    let host = Host::new();
    fs::write(host.path("config"), "key = value").unwrap();
    host.server
        .share("config", clone_of(&host.path("config")), false)
        .unwrap();
    let client = host.client();
    let entry = client.lookup(ROOT_ID, "config").unwrap();
    assert_eq!(
        (entry.attr.mode & libc::S_IFMT, entry.entry_valid),
        (libc::S_IFREG, 0)
    );
    assert_eq!(entry.attr.flags & ATTR_SUBMOUNT, 0);
    let fh = client.open(entry.nodeid, libc::O_RDONLY).unwrap().fh;
    assert_eq!(
        client.read(entry.nodeid, fh, 0, 100).unwrap(),
        b"key = value"
    );
    assert_eq!(client.lookup(entry.nodeid, "x").unwrap_err(), libc::ENOTDIR);
}

#[test]
fn the_root_directory_cannot_be_changed() {
    let host = Host::new();
    let client = host.client();
    assert_eq!(client.getattr(ROOT_ID).unwrap().mode, libc::S_IFDIR | 0o555);
    assert_eq!(client.lookup(ROOT_ID, "none").unwrap_err(), libc::ENOENT);
    assert_eq!(
        client.mkdir(ROOT_ID, "x", 0o755, 0).unwrap_err(),
        libc::EROFS
    );
    assert_eq!(client.unlink(ROOT_ID, "data").unwrap_err(), libc::EROFS);
    let made = client.create(ROOT_ID, "x", libc::O_RDWR, (0o644, 0));
    assert_eq!(made.unwrap_err(), libc::EROFS);
    let renamed = client.rename((ROOT_ID, "data"), (ROOT_ID, "x"), 0);
    assert_eq!(renamed.unwrap_err(), libc::EROFS);
    let ask = SetattrIn {
        valid: fattr::MODE,
        mode: 0o777,
        ..Default::default()
    };
    assert_eq!(client.setattr(ROOT_ID, ask).unwrap_err(), libc::EROFS);
}

#[test]
fn a_directory_shared_is_a_file_system_of_its_own() {
    let host = Host::new();
    let entry = host.client().lookup(ROOT_ID, "data").unwrap();
    assert_eq!(entry.attr.flags, ATTR_SUBMOUNT);
    assert_eq!(entry.entry_valid, 0);
}

#[test]
fn nothing_moves_between_shares() {
    let host = Host::new();
    let other = scratch();
    host.server.share("other", clone_of(&other), true).unwrap();
    let client = host.client();
    let to = client.walk(ROOT_ID, "other").unwrap();
    fs::write(host.path("file"), "").unwrap();
    let file = client.walk(host.root, "file").unwrap();
    assert_eq!(
        client
            .rename((host.root, "file"), (to, "file"), 0)
            .unwrap_err(),
        libc::EXDEV
    );
    assert_eq!(client.link(file, to, "file").unwrap_err(), libc::EXDEV);
    fs::remove_dir_all(other).unwrap();
}

#[test]
fn a_share_taken_away_is_gone_at_once() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("file"), "x").unwrap();
    let node = client.walk(host.root, "file").unwrap();
    let fh = client.open(node, libc::O_RDWR).unwrap().fh;
    let dir = client.opendir(host.root).unwrap().fh;
    host.server.unshare("data").unwrap();
    assert_eq!(client.lookup(ROOT_ID, "data").unwrap_err(), libc::ENOENT);
    for answer in [
        client.getattr(node).map(drop),
        client.getattr(host.root).map(drop),
        client.open(node, libc::O_RDONLY).map(drop),
        client.lookup(host.root, "file").map(drop),
        client.mkdir(host.root, "x", 0o755, 0).map(drop),
    ] {
        assert_eq!(answer.unwrap_err(), libc::ESTALE);
    }
    assert_eq!(client.read(node, fh, 0, 1).unwrap_err(), libc::EBADF);
    assert_eq!(client.write(node, fh, 0, b"y").unwrap_err(), libc::EBADF);
    assert!(client.list(host.root, dir, 0, 4096, true).is_err());
    assert_eq!(host.server.nodes.len(), 0);
    // The same name again is another share.
    host.server
        .share("data", clone_of(&host.dir), true)
        .unwrap();
    assert!(client.walk(ROOT_ID, "data").unwrap() > node);
}

#[test]
fn a_share_can_go_while_requests_are_under_way() {
    let host = Host::new();
    fs::write(host.path("file"), vec![1; 1 << 16]).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let client = host.client();
                while !stop.load(Ordering::Relaxed) {
                    // Every step may fail; none may hang, or find what it should not.
                    let Ok(root) = client.walk(ROOT_ID, "data") else {
                        continue;
                    };
                    let Ok(entry) = client.lookup(root, "file") else {
                        continue;
                    };
                    if let Ok(open) = client.open(entry.nodeid, libc::O_RDONLY) {
                        if let Ok(data) = client.read(entry.nodeid, open.fh, 0, 1 << 16) {
                            assert_eq!(data.len(), 1 << 16);
                        }
                        let _ = client.release(entry.nodeid, open.fh);
                    }
                    client.forget(entry.nodeid, 1);
                }
            });
        }
        let end = Instant::now() + Duration::from_millis(500);
        while Instant::now() < end {
            host.server.unshare("data").unwrap();
            host.server
                .share("data", clone_of(&host.dir), true)
                .unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    host.server.unshare("data").unwrap();
    assert_eq!(host.server.nodes.len(), 0, "no inode outlives its share");
}

#[test]
fn a_guest_that_starts_anew_has_nothing_open() {
    let host = Host::new();
    fs::write(host.path("file"), "x").unwrap();
    let client = host.client();
    let node = client.walk(host.root, "file").unwrap();
    let fh = client.open(node, libc::O_RDONLY).unwrap().fh;
    client.done(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(client.getattr(node).unwrap_err(), libc::ESTALE);
    assert_eq!(client.read(node, fh, 0, 1).unwrap_err(), libc::EBADF);
    // Shares stay.
    assert_eq!(client.init().walk(ROOT_ID, "data").unwrap(), host.root);
}

/// The tree at `dir` with a tmpfs mounted on its `inner`, as a volume with mounts below comes.
fn tree_with_a_mount(dir: &Path) -> OwnedFd {
    use std::os::fd::FromRawFd;
    let (top, inner) = (c_path(dir), c_path(&dir.join("inner")));
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as u32;
    // SAFETY: NUL-terminated strings or null; the descriptor is new and ours.
    unsafe {
        let (kind, none) = (c"tmpfs".as_ptr(), std::ptr::null());
        assert_eq!(libc::mount(kind, inner.as_ptr(), kind, 0, none), 0);
        let tree = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, top.as_ptr(), flags);
        assert_eq!(libc::umount2(inner.as_ptr(), libc::MNT_DETACH), 0);
        assert!(tree >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(tree as i32)
    }
}

/// sync(2) in the guest asks for each mount by itself.
#[test]
fn syncing_one_mount_of_a_share_is_not_syncing_another() {
    let host = Host::new();
    fs::create_dir_all(host.path("tree/inner")).unwrap();
    let tree = tree_with_a_mount(&host.path("tree"));
    host.server.share("tree", tree, true).unwrap();
    let client = host.client();
    let outer = client.walk(ROOT_ID, "tree").unwrap();
    let entry = client.lookup(outer, "inner").unwrap();
    assert_eq!(entry.attr.flags, ATTR_SUBMOUNT);
    for dir in [outer, entry.nodeid] {
        client.mkdir(dir, "new", 0o755, 0).unwrap();
    }
    let node = host.server.nodes.get(entry.nodeid).unwrap();
    let sync = |dir| client.done(opcode::SYNCFS, dir, &[&[0; 8]]).unwrap();
    sync(outer);
    assert!(node.share.take_written(node.mount), "it was not asked for");
    node.note_change();
    sync(entry.nodeid);
    assert!(!node.share.take_written(node.mount));
}
