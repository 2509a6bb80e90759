//! One mount of the specification into the container's root.
//!
//! A mount is made detached, with its attributes, and then attached to a descriptor of its
//! destination: there is no moment at which it can be seen without them, and no path between check
//! and use. Sources are paths of the guest; destinations are the image's business (see `inside`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, fstat, fstatfs};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use super::failure::{Explain, Failure, words};
use super::inside::{Root, clean};
use super::mount_options::Options;
use crate::spec::Mount;
use crate::sys::{MountAttributes, mount_setattr};

const PROC_SUPER_MAGIC: i64 = 0x9fa0;
/// What may be mounted inside /proc, as with runc: files that tools like lxcfs replace.
const WITHIN_PROC: [&str; 11] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/net/dev",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Mounts the `index`th mount. A mount to be made read-only when the root is complete comes back: until
/// then, others may need a directory in it.
pub(super) fn mount(
    root: &Root,
    index: usize,
    mount: &Mount,
    own_cgroup: Option<&Path>,
) -> Result<Option<OwnedFd>, Failure> {
    let at = || format!("mounts[{index}] ({} at {})", mount.kind, mount.destination);
    let mut options = Options::parse(&mount.options).map_err(|option| {
        Failure::request(format!(
            "mounts[{index}].options: {option:?} is not supported by husk yet"
        ))
    })?;
    let destination = clean(&mount.destination);
    if destination == "/" {
        return Err(Failure::request(format!(
            "{}: the root itself cannot be covered",
            at()
        )));
    }
    let cgroup_of_ours = own_cgroup.filter(|_| matches!(mount.kind.as_str(), "cgroup" | "cgroup2"));
    let (tree, target) = if let Some(path) = cgroup_of_ours {
        options.data.clear();
        (
            clone(&path.to_string_lossy(), false).guest(at)?,
            root.directory(&destination).request(at)?,
        )
    } else if options.bind || mount.kind == "bind" {
        if let Some(option) = options.data.first() {
            return Err(Failure::request(format!(
                "mounts[{index}].options: {option:?} is no option of a bind mount"
            )));
        }
        if !mount.source.starts_with('/') {
            return Err(Failure::request(format!(
                "mounts[{index}].source: {:?} is not an absolute path",
                mount.source
            )));
        }
        let tree = clone(&mount.source, options.recursive)
            .request(|| format!("{}: source {}", at(), mount.source))?;
        let is_directory =
            FileType::from_raw_mode(fstat(&tree).guest(at)?.st_mode) == FileType::Directory;
        let target = if is_directory {
            root.directory(&destination)
        } else {
            root.file(&destination)
        };
        (tree, target.request(at)?)
    } else {
        filesystem(root, mount, &destination, &mut options).map_err(|failure| Failure {
            reason: format!("{}: {}", at(), failure.reason),
            blame: failure.blame,
        })?
    };
    check_proc(&target, &destination, &mount.kind).request(at)?;

    let later = (mount.kind == "tmpfs" && options.attributes.is_read_only()).then(|| {
        options.attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    });
    change(tree.as_fd(), false, &options.attributes).request(at)?;
    change(tree.as_fd(), true, &options.deep).request(at)?;
    if let Some((propagation, deep)) = options.propagation {
        let kind = MountAttributes {
            propagation,
            ..MountAttributes::default()
        };
        change(tree.as_fd(), deep, &kind).request(at)?;
    }
    attach(tree.as_fd(), target.as_fd()).request(at)?;
    Ok(later.map(|()| tree))
}

fn change(tree: BorrowedFd, deep: bool, attributes: &MountAttributes) -> io::Result<()> {
    if *attributes == MountAttributes::default() {
        Ok(())
    } else {
        mount_setattr(tree, deep, attributes)
    }
}

/// A mount of a file system, made of nothing but its type, source and options.
fn filesystem(
    root: &Root,
    mount: &Mount,
    destination: &str,
    options: &mut Options,
) -> Result<(OwnedFd, OwnedFd), Failure> {
    let words_of = |what: &str| what.to_string();
    let kind = if mount.kind == "cgroup" {
        "cgroup2"
    } else {
        mount.kind.as_str()
    };
    if kind.is_empty() {
        return Err(Failure::request("the type is missing"));
    }
    // Over a link, the kernel's own files would appear at a place of the image's choice (CVE-2019-19921).
    let target = if matches!(kind, "proc" | "sysfs") {
        root.directory(destination)
            .and_then(|_| root.open_plain(destination))
    } else {
        let existing = root.open(destination);
        if let (Ok(found), "tmpfs") = (&existing, kind) {
            // It keeps the mode of the directory it covers, unless options say otherwise.
            let mode = fstat(found)
                .guest(|| words_of("look at the destination"))?
                .st_mode
                & 0o7777;
            options.data.insert(0, format!("mode={mode:o}"));
        }
        existing.or_else(|_| root.directory(destination))
    };
    let target = target.request(|| words_of("destination"))?;
    let new = new(kind, &mount.source, &options.data)?;
    Ok((new, target))
}

/// A detached mount of a new file system.
pub(super) fn new(kind: &str, source: &str, data: &[String]) -> Result<OwnedFd, Failure> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)
        .request(|| format!("file system type {kind:?}"))?;
    let told = |result: rustix::io::Result<()>, what: &str| {
        result.map_err(|error| {
            // The kernel explains itself in the context ("e tmpfs: Bad value for 'size'").
            let mut text = [0; 256];
            let length = rustix::io::read(&context, &mut text).unwrap_or(0);
            let said = String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned();
            let reason = format!("{what}: {}", words(&error.into()));
            Failure::request(if said.is_empty() {
                reason
            } else {
                format!("{reason} ({})", said.trim())
            })
        })
    };
    if !source.is_empty() {
        told(fsconfig_set_string(&context, "source", source), "source")?;
    }
    for option in data {
        let set = match option.split_once('=') {
            Some((name, value)) => fsconfig_set_string(&context, name, value),
            None => fsconfig_set_flag(&context, option.as_str()),
        };
        told(set, &format!("option {option:?}"))?;
    }
    told(fsconfig_create(&context), "mount")?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .guest(|| "mount".into())
}

/// A detached copy of the mount of `path`, from there down.
pub(super) fn clone(path: &str, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, path, flags)?)
}

/// A detached copy of the mount that an opened file is seen through.
pub(super) fn clone_of(file: BorrowedFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(file, "", flags)?)
}

/// Attaches a detached mount over `target`.
pub(super) fn attach(tree: BorrowedFd, target: BorrowedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", target, "", flags)?)
}

/// A mount inside /proc could hide from runtimes and security modules what they rely on.
fn check_proc(target: &OwnedFd, destination: &str, kind: &str) -> io::Result<()> {
    if kind == "proc" || WITHIN_PROC.contains(&destination) {
        return Ok(());
    }
    if fstatfs(target)?.f_type as i64 == PROC_SUPER_MAGIC {
        return Err(io::Error::other(format!(
            "{destination:?} cannot be mounted because it is inside /proc"
        )));
    }
    Ok(())
}
