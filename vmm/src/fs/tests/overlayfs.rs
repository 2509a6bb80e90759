//! Image layers: overlayfs as containerd mounts it.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

/// A detached overlay mount, as containerd makes them (index=off), over `dir`/lower.
fn overlay(dir: &Path) -> OwnedFd {
    for name in ["upper", "work"] {
        fs::create_dir(dir.join(name)).unwrap();
    }
    const SET_STRING: u32 = 1;
    const CREATE: u32 = 6;
    // SAFETY: NUL-terminated strings throughout; the descriptors are ours alone.
    unsafe {
        let context = libc::syscall(libc::SYS_fsopen, c"overlay".as_ptr(), 1);
        assert!(
            context >= 0,
            "overlayfs: {}",
            std::io::Error::last_os_error()
        );
        let context = OwnedFd::from_raw_fd(context as i32);
        for (key, value) in [
            (c"lowerdir", "lower"),
            (c"upperdir", "upper"),
            (c"workdir", "work"),
        ] {
            let value = c_path(&dir.join(value));
            let (fd, key, value) = (context.as_raw_fd(), key.as_ptr(), value.as_ptr());
            assert_eq!(
                libc::syscall(libc::SYS_fsconfig, fd, SET_STRING, key, value, 0),
                0
            );
        }
        let (fd, none) = (context.as_raw_fd(), 0);
        let key = (c"index".as_ptr(), c"off".as_ptr());
        assert_eq!(
            libc::syscall(libc::SYS_fsconfig, fd, SET_STRING, key.0, key.1, 0),
            0
        );
        assert_eq!(
            libc::syscall(libc::SYS_fsconfig, fd, CREATE, none, none, 0),
            0
        );
        let mount = libc::syscall(libc::SYS_fsmount, fd, 1, 0);
        assert!(mount >= 0, "fsmount: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(mount as i32)
    }
}

struct Image {
    host: Host,
    root: u64,
}

fn image(fill: impl FnOnce(&Path)) -> Image {
    let host = Host::new();
    let lower = host.path("lower");
    fs::create_dir(&lower).unwrap();
    fill(&lower);
    host.server
        .share("image", overlay(&host.dir), true)
        .unwrap();
    let root = host.client().walk(ROOT_ID, "image").unwrap();
    Image { host, root }
}

/// busybox: 400 names of one file. A change of one must not change another.
#[test]
fn hard_links_of_an_image_layer_change_one_by_one() {
    let image = image(|lower| {
        fs::write(lower.join("sh"), "busybox").unwrap();
        fs::set_permissions(lower.join("sh"), fs::Permissions::from_mode(0o644)).unwrap();
        for name in ["ping", "wget"] {
            fs::hard_link(lower.join("sh"), lower.join(name)).unwrap();
        }
    });
    let (client, root) = (image.host.client(), image.root);
    let sh = client.walk(root, "sh").unwrap();
    let ping = client.walk(root, "ping").unwrap();
    let wget = client.walk(root, "wget").unwrap();
    assert!(sh != ping && ping != wget && sh != wget);
    // Looked up again they are who they were.
    for (name, node) in [("wget", wget), ("ping", ping), ("sh", sh), ("wget", wget)] {
        assert_eq!(client.walk(root, name).unwrap(), node, "{name}");
    }
    let ask = SetattrIn {
        valid: fattr::MODE,
        mode: 0o4755,
        ..Default::default()
    };
    client.setattr(ping, ask).unwrap();
    let mode = |name| client.lookup(root, name).unwrap().attr.mode & 0o7777;
    assert_eq!(
        (mode("sh"), mode("ping"), mode("wget")),
        (0o644, 0o4755, 0o644)
    );
    // Copied up, it has a number of its own and is still the same to the guest.
    assert_eq!(client.walk(root, "ping").unwrap(), ping);
    let upper: Vec<_> = fs::read_dir(image.host.path("upper")).unwrap().collect();
    assert_eq!(upper.len(), 1);
    assert!(fs::metadata(image.host.path("upper/ping")).unwrap().mode() & 0o4000 != 0);
    // The one that holds the number goes; the others stay who they are.
    client.unlink(root, "sh").unwrap();
    client.forget(sh, 10);
    assert_eq!(client.walk(root, "wget").unwrap(), wget);
}

/// Links made in the container are one file, before and after they are forgotten.
#[test]
fn hard_links_made_in_the_container_are_one_inode() {
    let image = image(|lower| fs::write(lower.join("file"), "content").unwrap());
    let (client, root) = (image.host.client(), image.root);
    let file = client.walk(root, "file").unwrap();
    assert_eq!(client.link(file, root, "link").unwrap().nodeid, file);
    assert_eq!(client.walk(root, "link").unwrap(), file);
    assert_eq!(client.walk(root, "file").unwrap(), file);
    client.forget(file, 100);
    let link = client.walk(root, "link").unwrap();
    assert_eq!(client.walk(root, "file").unwrap(), link);
    let fh = client.open(link, libc::O_RDWR).unwrap().fh;
    client.write(link, fh, 0, b"C").unwrap();
    assert_eq!(client.walk(root, "file").unwrap(), link);
}

#[test]
fn hard_links_of_a_fifo_made_in_the_container_are_one_inode() {
    let image = image(|_| {});
    let (client, root) = (image.host.client(), image.root);
    let fifo = client
        .mknod(root, "fifo", libc::S_IFIFO | 0o644, 0)
        .unwrap()
        .nodeid;
    client.link(fifo, root, "link").unwrap();
    assert_eq!(client.walk(root, "link").unwrap(), fifo);
    client.unlink(root, "link").unwrap();
    assert_eq!(client.getattr(fifo).unwrap().nlink, 1);
}

/// A reader that was there before the first writer sees what the writer writes: the guest has one
/// page cache for both.
#[test]
fn a_file_opened_before_it_was_copied_up_shows_new_data() {
    let image = image(|lower| fs::write(lower.join("file"), "old data").unwrap());
    let (client, root) = (image.host.client(), image.root);
    let node = client.walk(root, "file").unwrap();
    let reader = client.open(node, libc::O_RDONLY).unwrap().fh;
    assert_eq!(client.read(node, reader, 0, 100).unwrap(), b"old data");
    let writer = client.open(node, libc::O_WRONLY).unwrap().fh;
    client.write(node, writer, 0, b"new").unwrap();
    assert_eq!(client.read(node, reader, 0, 100).unwrap(), b"new data");
    assert_eq!(client.walk(root, "file").unwrap(), node);
    assert_eq!(
        fs::read(image.host.path("lower/file")).unwrap(),
        b"old data"
    );
}

#[test]
fn an_image_layer_is_changed_only_on_top() {
    let image = image(|lower| {
        fs::create_dir(lower.join("dir")).unwrap();
        fs::write(lower.join("dir/file"), "x").unwrap();
    });
    let (client, root) = (image.host.client(), image.root);
    let dir = client.walk(root, "dir").unwrap();
    client.unlink(dir, "file").unwrap();
    assert_eq!(client.lookup(dir, "file").unwrap().nodeid, 0);
    let user = image.host.user(1000, 1000);
    let (entry, _) = user.create(dir, "file", libc::O_RDWR, (0o644, 0)).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.size), (1000, 0));
    let node = client.walk(root, "dir/file").unwrap();
    assert_eq!(node, entry.nodeid);
    assert_eq!(fs::read(image.host.path("lower/dir/file")).unwrap(), b"x");
}

/// Moving a name copies it up: it has another number then, and is the same file yet.
#[test]
fn a_hard_link_of_an_image_layer_stays_itself_when_it_is_moved() {
    let image = image(|lower| {
        fs::write(lower.join("sh"), "busybox").unwrap();
        for name in ["ping", "wget"] {
            fs::hard_link(lower.join("sh"), lower.join(name)).unwrap();
        }
        fs::write(lower.join("file"), "").unwrap();
    });
    let (client, root) = (image.host.client(), image.root);
    let [sh, ping, wget, file] = ["sh", "ping", "wget", "file"].map(|name| {
        let node = client.walk(root, name).unwrap();
        let number = client.getattr(node).unwrap().ino;
        (node, number)
    });
    assert!(sh.1 == ping.1 && ping.1 == wget.1);
    client.rename((root, "ping"), (root, "pong"), 0).unwrap();
    client.rename((root, "sh"), (root, "bash"), 0).unwrap();
    let exchange = libc::RENAME_EXCHANGE;
    client
        .rename((root, "file"), (root, "wget"), exchange)
        .unwrap();
    for (name, (node, number)) in [("pong", ping), ("bash", sh), ("file", wget)] {
        assert_eq!(client.walk(root, name).unwrap(), node, "{name}");
        assert_ne!(client.getattr(node).unwrap().ino, number, "{name}");
    }
    assert_eq!(client.walk(root, "wget").unwrap(), file.0);
}

/// What cannot be locked is told apart by its name.
#[test]
fn hard_links_of_symbolic_links_are_known_again() {
    let image = image(|lower| {
        std::os::unix::fs::symlink("target", lower.join("a")).unwrap();
        fs::hard_link(lower.join("a"), lower.join("b")).unwrap();
    });
    let (client, root) = (image.host.client(), image.root);
    let [a, b] = ["a", "b"].map(|name| client.walk(root, name).unwrap());
    assert_ne!(a, b);
    let all_known = || {
        for _ in 0..2 {
            for (name, node) in [("b", b), ("a", a)] {
                assert_eq!(client.walk(root, name).unwrap(), node, "{name}");
            }
        }
    };
    all_known();
    let ask = SetattrIn {
        valid: fattr::UID,
        uid: 1000,
        ..Default::default()
    };
    client.setattr(a, ask).unwrap();
    assert_eq!(client.getattr(b).unwrap().uid, 0);
    all_known();
    client.rename((root, "b"), (root, "c"), 0).unwrap();
    assert_eq!(client.walk(root, "c").unwrap(), b);
}
