//! The nodes and links of the container's /dev: those every container has, and `linux.devices`.
//!
//! Called while the guest's own tree is still the root, so that a device can be bound from it where
//! none can be made.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid, chownat, fstat, makedev, mknodat, open,
    openat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr, stdin, stdout};

use super::failure::{Explain, Failure};
use super::inside::{Root, clean};
use super::mounts;
use crate::spec::{Device, Spec};

const DEFAULT: [(&str, i64, i64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("/proc/kcore", "core"),
];

/// Whether the specification binds a /dev, which is left as it is.
fn is_bound(spec: &Spec) -> bool {
    spec.mounts.iter().any(|mount| {
        let bind = mount.kind == "bind"
            || mount
                .options
                .iter()
                .any(|option| option == "bind" || option == "rbind");
        bind && clean(&mount.destination) == "/dev"
    })
}

/// Standard streams that are the guest's /dev/null become the container's, whose path means something in it.
pub(super) fn reopen_null(spec: &Spec) -> Result<(), Failure> {
    if is_bound(spec) {
        return Ok(());
    }
    let at = || "open /dev/null again".to_string();
    let null = open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).request(at)?;
    let is_null = |found: &Stat| {
        FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
            && found.st_rdev == makedev(1, 3)
    };
    if !is_null(&fstat(&null).guest(at)?) {
        return Ok(());
    }
    if is_null(&fstat(stdin()).guest(at)?) {
        dup2_stdin(&null).guest(at)?;
    }
    if is_null(&fstat(stdout()).guest(at)?) {
        dup2_stdout(&null).guest(at)?;
    }
    if is_null(&fstat(stderr()).guest(at)?) {
        dup2_stderr(&null).guest(at)?;
    }
    Ok(())
}

/// Fills /dev, unless the specification binds one.
pub(super) fn make(root: &Root, spec: &Spec) -> Result<(), Failure> {
    if is_bound(spec) {
        return Ok(());
    }
    let wanted = |path: &str| {
        spec.linux
            .devices
            .iter()
            .any(|device| clean(&device.path) == path)
    };
    for (path, major, minor) in DEFAULT.into_iter().filter(|(path, ..)| !wanted(path)) {
        let device = Device {
            path: path.into(),
            kind: "c".into(),
            major,
            minor,
            ..Device::default()
        };
        node(root, &device).request(|| format!("make {path}"))?;
    }
    for (i, device) in spec.linux.devices.iter().enumerate() {
        node(root, device).request(|| format!("linux.devices[{i}]: make {}", device.path))?;
    }
    links(root).request(|| "make the links of /dev".into())
}

fn node(root: &Root, device: &Device) -> io::Result<()> {
    let path = clean(&device.path);
    let (parent, name) = root.parent(&path)?;
    let kind = match device.kind.as_str() {
        "b" => FileType::BlockDevice,
        "p" => FileType::Fifo,
        _ => FileType::CharacterDevice,
    };
    let number = match kind {
        FileType::Fifo => 0,
        // Bounds are checked with the specification.
        _ => makedev(device.major as u32, device.minor as u32),
    };
    // The mode may come with the bits of the file's type; there is no umask here (`rootfs::build`).
    let mode = Mode::from_raw_mode(device.file_mode.unwrap_or(0o666) & 0o7777);
    match mknodat(&parent, name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(()),
        // A share may not carry device nodes: show the guest's own.
        Err(Errno::PERM) => {
            let tree = mounts::clone(&path, false)?;
            return mounts::attach(tree.as_fd(), root.file(&path)?.as_fd());
        }
        Err(error) => return Err(error.into()),
    }
    let (uid, gid) = (
        Uid::from_raw(device.uid.unwrap_or(0)),
        Gid::from_raw(device.gid.unwrap_or(0)),
    );
    Ok(chownat(
        &parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn links(root: &Root) -> io::Result<()> {
    let dev = root.directory("/dev")?;
    // O_PATH descriptors do for all of these; a real one says early when it is no directory.
    let dev = openat(
        &dev,
        ".",
        OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    match unlinkat(&dev, "ptmx", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    symlinkat("pts/ptmx", &dev, "ptmx")?;
    for (target, name) in LINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
