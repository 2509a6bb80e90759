//! Attributes: what is seen, what is changed, and when set-id bits go.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

#[test]
fn attributes_are_those_of_the_host() {
    let host = Host::new();
    fs::write(host.path("file"), vec![7; 10_000]).unwrap();
    std::os::unix::fs::chown(host.path("file"), Some(4321), Some(8765)).unwrap();
    fs::set_permissions(host.path("file"), fs::Permissions::from_mode(0o6751)).unwrap();
    let meta = fs::metadata(host.path("file")).unwrap();
    let attr = host.client().lookup(host.root, "file").unwrap().attr;
    assert_eq!((attr.uid, attr.gid, attr.mode), (4321, 8765, meta.mode()));
    assert_eq!(
        (attr.size, attr.blocks, attr.ino),
        (10_000, meta.blocks(), meta.ino())
    );
    assert_eq!(
        (attr.mtime as i64, attr.mtimensec as i64),
        (meta.mtime(), meta.mtime_nsec())
    );
}

#[test]
fn statx_knows_the_time_of_birth() {
    let host = Host::new();
    fs::write(host.path("file"), "x").unwrap();
    let client = host.client();
    let node = client.walk(host.root, "file").unwrap();
    // fuse_statx_in ends with the mask.
    let mask = libc::STATX_BTIME.to_ne_bytes();
    let out: StatxOut = client.get(opcode::STATX, node, &[&[0; 20], &mask]).unwrap();
    assert_eq!(
        (
            out.stat.size,
            out.stat.nlink,
            u32::from(out.stat.mode) & libc::S_IFMT
        ),
        (1, 1, libc::S_IFREG)
    );
    let born = fs::metadata(host.path("file")).unwrap().created();
    if let Ok(born) = born {
        let born = born.duration_since(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(out.stat.btime.sec as u64, born.as_secs());
    }
}

#[test]
fn times_are_set_kept_or_now() {
    let host = Host::new();
    fs::write(host.path("file"), "x").unwrap();
    let client = host.client();
    let node = client.walk(host.root, "file").unwrap();
    let (atime, mtime) = (fattr::ATIME, fattr::MTIME);
    let before_epoch = (-5_i64) as u64;
    let ask = SetattrIn {
        valid: mtime,
        mtime: before_epoch,
        mtimensec: 7,
        ..Default::default()
    };
    let attr = client.setattr(node, ask).unwrap();
    assert_eq!((attr.mtime as i64, attr.mtimensec), (-5, 7));
    let ask = SetattrIn {
        valid: atime,
        atime: 1000,
        ..Default::default()
    };
    let attr = client.setattr(node, ask).unwrap();
    assert_eq!((attr.atime, attr.mtime as i64), (1000, -5));
    let ask = SetattrIn {
        valid: mtime | fattr::MTIME_NOW,
        ..Default::default()
    };
    let attr = client.setattr(node, ask).unwrap();
    assert!(attr.atime == 1000 && attr.mtime > 1_600_000_000);
    let ask = SetattrIn {
        valid: mtime,
        mtimensec: 1_000_000_000,
        ..Default::default()
    };
    assert_eq!(client.setattr(node, ask).unwrap_err(), libc::EINVAL);
    // A symbolic link has times of its own.
    let link = client.symlink(host.root, "link", "file").unwrap().nodeid;
    let ask = SetattrIn {
        valid: mtime,
        mtime: 99,
        ..Default::default()
    };
    assert_eq!(client.setattr(link, ask).unwrap().mtime, 99);
    assert_ne!(fs::metadata(host.path("file")).unwrap().mtime(), 99);
}

#[test]
fn a_change_of_owner_drops_set_id_bits() {
    let host = Host::new();
    fs::write(host.path("file"), "x").unwrap();
    fs::set_permissions(host.path("file"), fs::Permissions::from_mode(0o6755)).unwrap();
    let client = host.client();
    let node = client.walk(host.root, "file").unwrap();
    let ask = SetattrIn {
        valid: fattr::UID,
        uid: 42,
        gid: 43,
        ..Default::default()
    };
    let attr = client.setattr(node, ask).unwrap();
    assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (42, 0, 0o755));
    let ask = SetattrIn {
        valid: fattr::MODE,
        mode: 0o4711,
        ..Default::default()
    };
    assert_eq!(client.setattr(node, ask).unwrap().mode & 0o7777, 0o4711);
    // A link's own owner, not its target's.
    let link = client.symlink(host.root, "link", "file").unwrap().nodeid;
    let ask = SetattrIn {
        valid: fattr::UID | fattr::GID,
        uid: 7,
        gid: 8,
        ..Default::default()
    };
    let attr = client.setattr(link, ask).unwrap();
    assert_eq!((attr.uid, attr.gid), (7, 8));
    assert_eq!(fs::metadata(host.path("file")).unwrap().uid(), 42);
    let ask = SetattrIn {
        valid: fattr::MODE,
        mode: 0o777,
        ..Default::default()
    };
    assert_eq!(client.setattr(link, ask).unwrap_err(), libc::EOPNOTSUPP);
}

#[test]
fn a_write_drops_set_id_bits_only_of_callers_that_cannot_keep_them() {
    let host = Host::new();
    fs::write(host.path("file"), "0123456789").unwrap();
    let suid = || {
        fs::set_permissions(host.path("file"), fs::Permissions::from_mode(0o4755)).unwrap();
    };
    let is_suid = || fs::metadata(host.path("file")).unwrap().mode() & 0o4000 != 0;
    let client = host.client();
    let node = client.walk(host.root, "file").unwrap();
    let fh = client.open(node, libc::O_RDWR).unwrap().fh;
    suid();
    client.write(node, fh, 0, b"x").unwrap();
    assert!(is_suid(), "CAP_FSETID keeps it");
    let ask = WriteIn {
        fh,
        write_flags: WRITE_KILL_SUIDGID,
        ..Default::default()
    };
    client.write_with(node, ask, b"x").unwrap();
    assert!(!is_suid());
    suid();
    client.write(node, fh, 0, b"x").unwrap();
    assert!(is_suid(), "the thread has got CAP_FSETID back");
    let ask = SetattrIn {
        valid: fattr::SIZE,
        size: 5,
        ..Default::default()
    };
    client.setattr(node, ask).unwrap();
    assert!(is_suid());
    let kill = fattr::SIZE | fattr::KILL_SUIDGID | fattr::FH;
    let ask = SetattrIn {
        valid: kill,
        fh,
        size: 3,
        ..Default::default()
    };
    assert_eq!(client.setattr(node, ask).unwrap().size, 3);
    assert!(!is_suid());
    suid();
    let ask = OpenIn {
        flags: (libc::O_WRONLY | libc::O_TRUNC) as u32,
        open_flags: OPEN_KILL_SUIDGID,
    };
    client
        .get::<OpenOut>(opcode::OPEN, node, &[wire::as_bytes(&ask)])
        .unwrap();
    assert!(!is_suid() && client.getattr(node).unwrap().size == 0);
}

#[test]
fn set_id_files_are_asked_about_each_time() {
    let host = Host::new();
    fs::write(host.path("file"), "").unwrap();
    let client = host.client();
    assert_eq!(client.lookup(host.root, "file").unwrap().attr_valid, 86_400);
    fs::set_permissions(host.path("file"), fs::Permissions::from_mode(0o4755)).unwrap();
    assert_eq!(client.lookup(host.root, "file").unwrap().attr_valid, 0);
    let shared = Host::sharing(false);
    fs::write(shared.path("file"), "").unwrap();
    let entry = shared.client().lookup(shared.root, "file").unwrap();
    assert_eq!((entry.attr_valid, entry.entry_valid), (0, 0));
}

#[test]
fn truncation_is_for_files_and_sane_sizes() {
    let host = Host::new();
    fs::write(host.path("file"), "x").unwrap();
    let client = host.client();
    let node = client.walk(host.root, "file").unwrap();
    let size = |size| SetattrIn {
        valid: fattr::SIZE,
        size,
        ..Default::default()
    };
    assert_eq!(client.setattr(node, size(1 << 30)).unwrap().size, 1 << 30);
    assert_eq!(
        client.setattr(node, size(u64::MAX)).unwrap_err(),
        libc::EFBIG
    );
    assert_eq!(
        client.setattr(host.root, size(0)).unwrap_err(),
        libc::EINVAL
    );
}

#[test]
fn statfs_is_that_of_the_share() {
    let host = Host::new();
    let out: StatfsOut = host.client().get(opcode::STATFS, host.root, &[]).unwrap();
    assert!(out.blocks > 0 && out.namelen == 255 && out.bsize >= 512);
    let root: StatfsOut = host.client().get(opcode::STATFS, ROOT_ID, &[]).unwrap();
    assert_eq!(root.blocks, 0);
}
