//! Ways out of a share and of the jail, none of which may exist.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
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
