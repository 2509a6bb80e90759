//! Ways out of a share and of the jail, none of which may exist.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::*;
use crate::fs::self_fd::SelfFd;

#[test]
fn symbolic_links_are_never_followed() {
    let host = Host::new();
    let client = host.client();
    for text in ["/etc/passwd", "../../../../etc", "/proc/self/root", "."] {
        let node = client.symlink(host.root, "link", text).unwrap().nodeid;
        let attr = client.getattr(node).unwrap();
        assert_eq!(attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(
            client.call(opcode::READLINK, node, &[], 4095).unwrap(),
            text.as_bytes()
        );
        assert_eq!(client.open(node, libc::O_RDWR).unwrap_err(), libc::ENXIO);
        assert_eq!(client.opendir(node).unwrap_err(), libc::ENOTDIR);
        assert!(client.lookup(node, "passwd").is_err());
        let made = client.create(host.root, "link", libc::O_WRONLY, (0o644, 0));
        assert_eq!(made.unwrap_err(), libc::ESTALE);
        client.unlink(host.root, "link").unwrap();
    }
}

/// While another keeps swapping a directory for a symbolic link out of the share, no walk of the
/// guest's ever gets outside.
#[test]
fn a_directory_that_turns_into_a_link_leads_nowhere() {
    let host = Host::sharing(false);
    let outside = scratch();
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::create_dir(host.path("real")).unwrap();
    fs::write(host.path("real/secret"), "decoy").unwrap();
    std::os::unix::fs::symlink(&outside, host.path("link")).unwrap();
    let (real, link) = (c_path(&host.path("real")), c_path(&host.path("link")));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: AT_FDCWD is a constant that renameat2 knows.
            let here = unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) };
            while !stop.load(Ordering::Relaxed) {
                sys::renameat2(here, &real, here, &link, libc::RENAME_EXCHANGE).unwrap();
            }
        });
        let client = host.client();
        let end = Instant::now() + Duration::from_secs(1);
        let mut found = 0;
        while Instant::now() < end {
            let Ok(dir) = client.lookup(host.root, "real") else {
                continue;
            };
            if let Ok(secret) = client.lookup(dir.nodeid, "secret") {
                let fh = client.open(secret.nodeid, libc::O_RDONLY).unwrap().fh;
                assert_eq!(client.read(secret.nodeid, fh, 0, 100).unwrap(), b"decoy");
                client.release(secret.nodeid, fh).unwrap();
                found += 1;
            }
            let made = client.create(dir.nodeid, "new", libc::O_WRONLY, (0o644, 0));
            if let Ok((entry, open)) = made {
                client.release(entry.nodeid, open.fh).unwrap();
            }
            let _ = client.unlink(dir.nodeid, "new");
        }
        stop.store(true, Ordering::Relaxed);
        assert!(found > 0);
    });
    assert_eq!(
        fs::read_dir(&outside).unwrap().count(),
        1,
        "nothing was made outside"
    );
    fs::remove_dir_all(outside).unwrap();
}

/// What somebody has bind-mounted of procfs: its links lead anywhere, by magic and not by their text.
#[test]
fn magic_links_in_a_share_are_links_like_others() {
    let host = Host::new();
    let outside = scratch();
    fs::write(outside.join("secret"), "secret").unwrap();
    let open = fs::File::open(outside.join("secret")).unwrap();
    let look = || {
        let now = fs::metadata(outside.join("secret")).unwrap();
        (now.mode(), now.uid(), now.nlink(), now.len(), now.mtime())
    };
    let before = look();
    let proc = Path::new("/proc").join(std::process::id().to_string());
    host.server.share("proc", clone_of(&proc), false).unwrap();
    let client = host.client();
    let root = client.walk(ROOT_ID, "proc").unwrap();
    let number = format!("fd/{}", open.as_raw_fd());
    for (path, below) in [
        ("root", "etc"),
        ("cwd", "src"),
        ("exe", "x"),
        (&*number, "x"),
    ] {
        let node = client.walk(root, path).unwrap();
        let attr = client.getattr(node).unwrap();
        assert_eq!(attr.mode & libc::S_IFMT, libc::S_IFLNK, "{path}");
        assert_eq!(client.lookup(node, below).unwrap_err(), libc::ENOTDIR);
        assert_eq!(client.open(node, libc::O_RDONLY).unwrap_err(), libc::ENXIO);
        assert_eq!(client.opendir(node).unwrap_err(), libc::ENOTDIR);
        // Neither does a change of it change what it leads to.
        for valid in [fattr::MODE, fattr::UID, fattr::SIZE, fattr::MTIME] {
            let ask = SetattrIn {
                valid,
                uid: 4321,
                ..Default::default()
            };
            let _ = client.setattr(node, ask);
        }
        assert!(client.link(node, root, "link").is_err());
        assert!(client.link(node, host.root, "link").is_err());
    }
    assert_eq!(look(), before);
    fs::remove_dir_all(outside).unwrap();
}

/// A link of a link is another name of the link, and of a directory there is none: no name in the share
/// ever stands for what is outside of it.
#[test]
fn hard_links_are_made_within_the_share_and_of_what_is_named() {
    let host = Host::new();
    let outside = scratch();
    fs::write(outside.join("secret"), "secret").unwrap();
    let text = outside.join("secret");
    let client = host.client();
    let link = client.symlink(host.root, "link", text.to_str().unwrap());
    let again = client
        .link(link.unwrap().nodeid, host.root, "again")
        .unwrap();
    assert_eq!(again.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(fs::metadata(&text).unwrap().nlink(), 1);
    let dir = client.mkdir(host.root, "dir", 0o755, 0).unwrap().nodeid;
    for node in [dir, host.root] {
        assert_eq!(client.link(node, dir, "loop").unwrap_err(), libc::EPERM);
    }
    assert_eq!(client.link(ROOT_ID, dir, "loop").unwrap_err(), libc::ESTALE);
    // Another share of the very same directory is another share.
    host.server
        .share("twin", clone_of(&host.dir), true)
        .unwrap();
    let twin = client.walk(ROOT_ID, "twin").unwrap();
    fs::write(host.path("file"), "x").unwrap();
    let file = client.walk(host.root, "file").unwrap();
    assert_eq!(client.link(file, twin, "two").unwrap_err(), libc::EXDEV);
    assert_eq!(fs::metadata(host.path("file")).unwrap().nlink(), 1);
    fs::remove_dir_all(outside).unwrap();
}

/// The guest's kernel has devices of its own. The host's must not hear of it, whatever lies in a share.
#[test]
fn devices_fifos_and_sockets_are_never_opened() {
    let host = Host::new();
    let client = host.client();
    // The second partition of a disk, a terminal, the kernel's log, an end of a pipe, a socket.
    let null = (1 << 8) | 3;
    for (name, mode, number) in [
        ("disk", libc::S_IFBLK, (8 << 8) | 2),
        ("terminal", libc::S_IFCHR, (5 << 8) | 2),
        ("null", libc::S_IFCHR, null),
        ("pipe", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
    ] {
        let made = client.mknod(host.root, name, mode | 0o666, number);
        let node = made.unwrap().nodeid;
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            assert_eq!(client.open(node, flags).unwrap_err(), libc::ENXIO, "{name}");
        }
        assert_eq!(client.opendir(node).unwrap_err(), libc::ENOTDIR);
        let made = client.create(host.root, name, libc::O_RDWR, (0o644, 0));
        assert_eq!(made.unwrap_err(), libc::ESTALE);
        let ask = SetattrIn {
            valid: fattr::SIZE,
            ..Default::default()
        };
        assert_eq!(client.setattr(node, ask).unwrap_err(), libc::EINVAL);
        client.done(opcode::SYNCFS, node, &[&[0; 8]]).unwrap_err();
    }
}

/// Root of the guest can give a file root's set-user-id bit, as it can under runc. It gets nothing by it here:
/// nothing of a share is ever executed, and no bit outlives a change by somebody else.
#[test]
fn a_set_user_id_file_gives_nobody_more_than_it_says() {
    let host = Host::new();
    let root = host.client();
    let made = root.create(host.root, "tool", libc::O_RDWR, (0o4755, 0));
    let (tool, fh) = made.map(|(entry, open)| (entry.nodeid, open.fh)).unwrap();
    assert_eq!(root.getattr(tool).unwrap().mode & 0o7777, 0o4755);
    // Another's write, as the guest's kernel asks for it.
    let ask = WriteIn {
        fh,
        write_flags: WRITE_KILL_SUIDGID,
        ..Default::default()
    };
    let user = host.user(1000, 1000);
    user.write_with(tool, ask, b"#!evil").unwrap();
    assert_eq!(root.getattr(tool).unwrap().mode & 0o7777, 0o755);
    // A file of one's own is not root's, nor by making it root's does it keep the bit.
    let made = user.create(host.root, "mine", libc::O_RDWR, (0o6755, 0));
    let mine = made.unwrap().0;
    assert_eq!((mine.attr.uid, mine.attr.mode & 0o7777), (1000, 0o6755));
    let ask = SetattrIn {
        valid: fattr::UID | fattr::GID,
        ..Default::default()
    };
    let given = root.setattr(mine.nodeid, ask).unwrap();
    assert_eq!((given.uid, given.mode & 0o7777), (0, 0o755));
    // The thread that did all that is who it was.
    // SAFETY: takes no memory; -1 is no id, so nothing changes.
    let ids = unsafe { [libc::setfsuid(u32::MAX), libc::setfsgid(u32::MAX)] };
    assert_eq!(ids, [0, 0]);
}

/// Every operation with everything there is to name, as often as a guest likes: what it costs the host is
/// what the budget says, and nothing when it has forgotten. In a process of its own, whose descriptors
/// are its own.
#[test]
fn descriptors_are_bounded_under_any_load_and_all_come_back() {
    const NAME: &str = "descriptors_are_bounded_under_any_load_and_all_come_back";
    if std::env::var_os("HUSK_FS_ALONE").is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--nocapture", "--test-threads", "1", NAME])
            .env("HUSK_FS_ALONE", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{output:?}"
        );
        return;
    }
    const LEFT: usize = 500;
    let open = || fs::read_dir("/proc/self/fd").unwrap().count();
    let host = Host::new();
    for number in 0..2 * LEFT {
        fs::write(host.path(&number.to_string()), "x").unwrap();
    }
    let mut permits = Vec::new();
    while let Ok(permit) = host.server.budget.take() {
        permits.push(permit);
    }
    permits.truncate(permits.len() - LEFT);
    let before = open();
    let client = host.client();
    let names: Vec<String> = (0..2 * LEFT).map(|number| number.to_string()).collect();
    let mut handles = Vec::new();
    for round in 0..3 {
        for name in &names {
            // Told again and again, and opened as often as there is room.
            if let Ok(entry) = client.lookup(host.root, name) {
                handles.extend(client.open(entry.nodeid, libc::O_RDWR).map(|open| open.fh));
            }
            handles.extend(client.opendir(host.root).map(|open| open.fh));
            let own = format!("{name}-{round}");
            let _ = client.mkdir(host.root, &own, 0o755, 0);
            let made = client.create(host.root, &own, libc::O_RDWR, (0o644, 0));
            handles.extend(made.map(|(_, open)| open.fh));
            let made = client.make_open(opcode::TMPFILE, host.root, "", libc::O_RDWR, (0o644, 0));
            handles.extend(made.map(|(_, open)| open.fh));
        }
        let held = open() - before;
        assert!(held <= LEFT, "{held} descriptors for a budget of {LEFT}");
        assert!(held > LEFT * 9 / 10, "{held}: the load is none");
        // It gives some back, and takes others.
        for fh in handles.drain(handles.len() / 2..) {
            client.release(host.root, fh).unwrap();
        }
    }
    client.done(opcode::DESTROY, 0, &[]).unwrap();
    assert_eq!(open(), before);
    let left: Vec<_> = std::iter::from_fn(|| host.server.budget.take().ok()).collect();
    assert_eq!(left.len(), LEFT, "permits are lost");
}

fn try_open(dir: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, i32> {
    let path = CString::new(path).unwrap();
    sys::openat(dir, &path, libc::O_PATH, 0).map_err(|error| error.0)
}

/// The clone of /proc/self/fd leads to this process's descriptors and nowhere else in procfs.
fn assert_closed(links: BorrowedFd<'_>) {
    let at = |fd: BorrowedFd<'_>| {
        let stat = sys::statx(fd).unwrap();
        (stat.stx_mnt_id, stat.stx_ino)
    };
    for up in ["..", "../..", "../../..", "./../.", "../../../../../.."] {
        assert_eq!(at(try_open(links, up).unwrap().as_fd()), at(links), "{up}");
    }
    for path in [
        "../sys",
        "../../sys/kernel/core_pattern",
        "../status",
        "../root",
        "sys",
        "self",
    ] {
        assert_eq!(try_open(links, path).unwrap_err(), libc::ENOENT, "{path}");
    }
    // A number is a descriptor here, never a process.
    assert_ne!(try_open(links, "../1/root").map(drop), Ok(()));
    // By way of its own magic link it is no more than itself.
    let again = format!("{}/../../sys", links.as_raw_fd());
    assert_eq!(try_open(links, &again).unwrap_err(), libc::ENOENT);
}

#[test]
fn the_clone_of_self_fd_has_no_way_out() {
    assert_closed(SelfFd::take().unwrap().as_fd());
}

/// The VMM's way: a pid namespace of its own below the procfs of the host, then an empty root.
#[test]
fn the_clone_of_self_fd_works_in_a_new_pid_namespace_and_an_empty_root() {
    if std::env::var_os("HUSK_FS_IN_NAMESPACE").is_none() {
        let temporary = scratch();
        let name = "the_clone_of_self_fd_works_in_a_new_pid_namespace_and_an_empty_root";
        let output = Command::new("unshare")
            .args(["--pid", "--fork"])
            .arg(std::env::current_exe().unwrap())
            .args(["--nocapture", "--test-threads", "1", name])
            .env("HUSK_FS_IN_NAMESPACE", "1")
            .env("TMPDIR", &temporary)
            .output()
            .expect("run unshare (util-linux)");
        fs::remove_dir_all(temporary).unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{output:?}"
        );
        return;
    }
    // Not the test's thread alone is PID 1's: the whole process is in the namespace.
    assert!(std::process::id() < 10, "in a pid namespace of its own");
    let dir = scratch();
    fs::write(dir.join("file"), "content").unwrap();
    let root = clone_of(&dir);
    fs::remove_file(dir.join("file")).unwrap();
    fs::write(dir.join("file"), "content").unwrap();
    let server = server();
    empty_root();
    assert!(fs::read_dir("/").unwrap().next().is_none());
    assert!(fs::metadata("/proc").is_err());
    server.share("data", root, true).unwrap();
    let client = Client::new(&server).init();
    let node = client.walk(ROOT_ID, "data/file").unwrap();
    let fh = client.open(node, libc::O_RDWR).unwrap().fh;
    client.write(node, fh, 0, b"C").unwrap();
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"Content");
    client
        .done(opcode::REMOVEXATTR, node, &[b"user.x\0"])
        .unwrap_err();
    assert_closed(server.links.as_fd());
}

/// Makes an empty tmpfs the root of this process. It is mounted nowhere, so that this works in a
/// chroot too (deploy/build-root), which pivot_root refuses to leave.
fn empty_root() {
    const CREATE: u32 = 6;
    // SAFETY: NUL-terminated strings throughout; the descriptors are ours alone.
    unsafe {
        let context = libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 1);
        assert_eq!(
            libc::syscall(libc::SYS_fsconfig, context, CREATE, 0, 0, 0),
            0
        );
        let tmpfs = libc::syscall(libc::SYS_fsmount, context, 1, 0) as i32;
        assert_eq!(libc::fchdir(tmpfs), 0);
        assert_eq!(libc::chroot(c".".as_ptr()), 0);
        libc::close(tmpfs);
        libc::close(context as i32);
    }
}
