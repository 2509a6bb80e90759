//! Names as a user of the guest makes, moves and removes them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use super::*;

/// Whose it is, by user and group, and its mode without the type.
fn owner_and_mode(EntryOut { attr, .. }: &EntryOut) -> (u32, u32, u32) {
    (attr.uid, attr.gid, attr.mode & 0o7777)
}

#[test]
fn what_the_caller_makes_belongs_to_the_caller() {
    let host = Host::new();
    fs::set_permissions(&host.dir, fs::Permissions::from_mode(0o700)).unwrap();
    let user = host.user(1234, 5678);
    // 0700 and owned by root: the guest's kernel has allowed it, the host must not ask again.
    let made = user.mkdir(host.root, "dir", 0o777, 0o027).unwrap();
    assert_eq!(
        (made.attr.uid, made.attr.gid, made.attr.mode),
        (1234, 5678, libc::S_IFDIR | 0o750)
    );
    let (file, _) = user
        .create(host.root, "file", libc::O_RDWR, (0o666, 0o022))
        .unwrap();
    assert_eq!(owner_and_mode(&file), (1234, 5678, 0o644));
    let link = user.symlink(host.root, "link", "/etc/passwd").unwrap();
    assert_eq!(
        (link.attr.uid, link.attr.mode),
        (1234, libc::S_IFLNK | 0o777)
    );
    // And the thread is itself again.
    let root = host.client().mkdir(host.root, "root", 0o777, 0).unwrap();
    assert_eq!(owner_and_mode(&root), (0, 0, 0o777));
}

#[test]
fn a_failed_creation_leaves_the_thread_as_it_was() {
    let host = Host::new();
    let user = host.user(1234, 5678);
    user.mkdir(host.root, "dir", 0o755, 0).unwrap();
    assert_eq!(
        user.mkdir(host.root, "dir", 0o755, 0o77).unwrap_err(),
        libc::EEXIST
    );
    assert_eq!(
        host.user(u32::MAX, 0)
            .mkdir(host.root, "x", 0o755, 0)
            .unwrap_err(),
        libc::EPERM
    );
    let made = host.client().mkdir(host.root, "mine", 0o777, 0).unwrap();
    assert_eq!(owner_and_mode(&made), (0, 0, 0o777));
}

#[test]
fn a_setgid_directory_hands_its_group_down() {
    let host = Host::new();
    std::os::unix::fs::chown(&host.dir, Some(0), Some(77)).unwrap();
    fs::set_permissions(&host.dir, fs::Permissions::from_mode(0o2777)).unwrap();
    let user = host.user(1000, 1000);
    let dir = user.mkdir(host.root, "dir", 0o755, 0).unwrap();
    assert_eq!(owner_and_mode(&dir), (1000, 77, 0o2755));
    // The guest's kernel has dropped set-gid where the caller is not in the group, and knows the
    // caller's groups; the host must leave it where it is still set.
    let (file, _) = user
        .create(host.root, "file", libc::O_WRONLY, (0o2755, 0))
        .unwrap();
    assert_eq!((file.attr.gid, file.attr.mode & 0o7777), (77, 0o2755));
}

#[test]
fn every_kind_of_file_can_be_made_and_only_files_opened() {
    let host = Host::new();
    let client = host.client();
    let fifo = client
        .mknod(host.root, "fifo", libc::S_IFIFO | 0o644, 0)
        .unwrap();
    let socket = client
        .mknod(host.root, "socket", libc::S_IFSOCK | 0o644, 0)
        .unwrap();
    // 259 = 0x103: minor 259 does not fit 8 bits.
    let rdev = (259 & 0xff) | (8 << 8) | ((259 & !0xff) << 12);
    let device = client
        .mknod(host.root, "device", libc::S_IFBLK | 0o600, rdev)
        .unwrap();
    assert_eq!(device.attr.rdev, rdev);
    let meta = fs::metadata(host.path("device")).unwrap();
    assert!(meta.file_type().is_block_device());
    assert_eq!(
        (libc::major(meta.rdev()), libc::minor(meta.rdev())),
        (8, 259)
    );
    for node in [fifo.nodeid, socket.nodeid, device.nodeid] {
        assert_eq!(client.open(node, libc::O_RDONLY).unwrap_err(), libc::ENXIO);
        assert_eq!(client.opendir(node).unwrap_err(), libc::ENOTDIR);
    }
    assert_eq!(
        client.open(host.root, libc::O_RDONLY).unwrap_err(),
        libc::EISDIR
    );
    assert_eq!(
        client
            .mknod(host.root, "dir", libc::S_IFDIR | 0o755, 0)
            .unwrap_err(),
        libc::EINVAL
    );
}

#[test]
fn a_fifo_in_the_way_of_create_is_not_opened() {
    let host = Host::sharing(false);
    let client = host.client();
    client
        .mknod(host.root, "fifo", libc::S_IFIFO | 0o644, 0)
        .unwrap();
    let made = client.create(host.root, "fifo", libc::O_WRONLY, (0o644, 0));
    assert_eq!(made.unwrap_err(), libc::ESTALE);
    fs::write(host.path("there"), "12345").unwrap();
    let (entry, open) = client
        .create(host.root, "there", libc::O_RDWR, (0o644, 0))
        .unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, 0, 10).unwrap(), b"12345");
    let flags = libc::O_RDWR | libc::O_EXCL;
    let again = client.create(host.root, "there", flags, (0o644, 0));
    assert_eq!(again.unwrap_err(), libc::EEXIST);
}

#[test]
fn hard_links_are_one_inode() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("one"), "x").unwrap();
    fs::hard_link(host.path("one"), host.path("two")).unwrap();
    let one = client.lookup(host.root, "one").unwrap();
    let two = client.lookup(host.root, "two").unwrap();
    assert_eq!((one.nodeid, one.attr.nlink), (two.nodeid, 2));
    let three = client.link(one.nodeid, host.root, "three").unwrap();
    assert_eq!((three.nodeid, three.attr.nlink), (one.nodeid, 3));
    // Links of a symbolic link link the link.
    let link = client.symlink(host.root, "symlink", "nowhere").unwrap();
    assert_eq!(
        client.link(link.nodeid, host.root, "again").unwrap().nodeid,
        link.nodeid
    );
    assert_eq!(
        fs::read_link(host.path("again")).unwrap().to_str(),
        Some("nowhere")
    );
    // Told four times, forgotten four times.
    client.forget(one.nodeid, 2);
    assert!(client.getattr(one.nodeid).is_ok());
    client.forget(one.nodeid, 1);
    assert_eq!(client.getattr(one.nodeid).unwrap_err(), libc::ESTALE);
    let known_anew = client.lookup(host.root, "one").unwrap().nodeid;
    assert!(known_anew > one.nodeid, "node ids are never used again");
}

#[test]
fn renames_replace_exchange_or_refuse() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("a"), "a").unwrap();
    fs::write(host.path("b"), "b").unwrap();
    let (root, read) = (host.root, |name| {
        fs::read_to_string(host.path(name)).unwrap()
    });
    let refused = client.rename((root, "a"), (root, "b"), libc::RENAME_NOREPLACE);
    assert_eq!(refused.unwrap_err(), libc::EEXIST);
    client
        .rename((root, "a"), (root, "b"), libc::RENAME_EXCHANGE)
        .unwrap();
    assert_eq!((read("a"), read("b")), ("b".into(), "a".into()));
    client.rename((root, "a"), (root, "b"), 0).unwrap();
    assert_eq!(read("b"), "b");
    assert_eq!(
        client.rename((root, "a"), (root, "b"), 1 << 7).unwrap_err(),
        libc::EINVAL
    );
    let into_root = client.rename((root, "b"), (ROOT_ID, "b"), 0);
    assert_eq!(into_root.unwrap_err(), libc::EROFS);
    let ask = RenameIn { newdir: root };
    client
        .done(opcode::RENAME, root, &[wire::as_bytes(&ask), b"b\0c\0"])
        .unwrap();
    assert_eq!(read("c"), "b");
}

#[test]
fn names_may_hold_newlines_and_255_bytes() {
    let host = Host::new();
    let client = host.client();
    let long = "x".repeat(255);
    for name in [
        "a\nb",
        "\u{e4} \t\"",
        long.as_str(),
        "...",
        ".hidden",
        "-rf",
    ] {
        client.mkdir(host.root, name, 0o755, 0).unwrap();
        assert!(host.path(name).is_dir());
        assert_ne!(client.lookup(host.root, name).unwrap().nodeid, 0);
    }
    let seen: Vec<_> = client
        .list_all(host.root, true)
        .into_iter()
        .map(|e| e.name)
        .collect();
    assert!(seen.contains(&b"a\nb".to_vec()) && seen.contains(&long.clone().into_bytes()));
    let longer = "x".repeat(256);
    assert_eq!(
        client.lookup(host.root, &longer).unwrap_err(),
        libc::ENAMETOOLONG
    );
    client
        .done(opcode::RMDIR, host.root, &[long.as_bytes(), b"\0"])
        .unwrap();
    assert!(!host.path(&long).exists());
}

#[test]
fn a_missing_name_is_believed_where_nobody_else_makes_it() {
    let host = Host::new();
    let absent = host.client().lookup(host.root, "absent").unwrap();
    assert_eq!((absent.nodeid, absent.entry_valid), (0, 86_400));
    let host = Host::sharing(false);
    assert_eq!(
        host.client().lookup(host.root, "absent").unwrap_err(),
        libc::ENOENT
    );
}

#[test]
fn an_unnamed_file_gets_its_name_later() {
    let host = Host::new();
    let client = host.client();
    let (entry, open) = client
        .make_open(
            opcode::TMPFILE,
            host.root,
            "/",
            libc::O_RDWR,
            (0o640, 0o022),
        )
        .unwrap();
    assert_eq!((entry.attr.nlink, entry.attr.mode & 0o7777), (0, 0o640));
    client.write(entry.nodeid, open.fh, 0, b"content").unwrap();
    assert_eq!(fs::read_dir(&host.dir).unwrap().count(), 0);
    let named = client.link(entry.nodeid, host.root, "named").unwrap();
    assert_eq!((named.nodeid, named.attr.nlink), (entry.nodeid, 1));
    assert_eq!(fs::read(host.path("named")).unwrap(), b"content");
}
