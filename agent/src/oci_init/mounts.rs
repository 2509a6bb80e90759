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
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    fspick, move_mount, open_tree,
};

use super::copy_up::copy_up;
use super::failure::{Explain, Failure, words};
use super::inside::{Root, clean};
use super::mount_options::Options;
use crate::spec::Mount;
use crate::sys::{MountAttributes, mount_setattr};

pub(super) const READ_ONLY: MountAttributes = MountAttributes {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
    propagation: 0,
    userns_fd: 0,
};

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

/// Mounts the `index`th mount; `prepared` is its file system, if that had to be made outside. `cgroups` is where
/// the guest has cgroup v2. A mount to be made read-only when the root is complete comes back: until then, others
/// may need a directory in it.
pub(super) fn mount(
    root: &Root,
    index: usize,
    mount: &Mount,
    cgroups: &Path,
    prepared: Option<OwnedFd>,
) -> Result<Option<OwnedFd>, Failure> {
    let at = || place(index, mount);
    let mut options = options(index, mount)?;
    let destination = clean(&mount.destination);
    if destination == "/" {
        return Err(Failure::request(format!(
            "{}: the root itself cannot be covered",
            at()
        )));
    }
    if options.remount {
        return remount(root, &destination, mount, &options)
            .request(at)
            .map(|()| None);
    }
    // `finish` does it at the end, as runc does.
    let late =
        (mount.kind == "tmpfs" || destination == "/dev") && options.attributes.is_read_only();
    if late {
        options.attributes.set &= !libc::MOUNT_ATTR_RDONLY;
    }
    let bind = options.bind || mount.kind == "bind";
    let (tree, target) = if bind {
        self::bind(root, index, mount, &destination, &options)?
    } else {
        let made = match prepared {
            Some(tree) => {
                target_of(root, mount, &destination, &mut options).map(|target| (tree, target))
            }
            None => filesystem(root, mount, &destination, &mut options, cgroups),
        };
        made.map_err(|failure| failure.at(at))?
    };
    check_proc(&target, &destination, &mount.kind).request(at)?;
    if options.copy_up && mount.kind == "tmpfs" {
        copy_up(target.as_fd(), tree.as_fd())
            .request(|| format!("{}: tmpcopyup: copy what is there", at()))?;
    }
    change(tree.as_fd(), false, &options.attributes).request(at)?;
    change(tree.as_fd(), true, &options.deep).request(at)?;
    for (propagation, deep) in &options.propagation {
        let kind = MountAttributes {
            propagation: *propagation,
            ..MountAttributes::default()
        };
        change(tree.as_fd(), *deep, &kind).request(at)?;
    }
    attach(tree.as_fd(), target.as_fd()).request(at)?;
    Ok(late.then_some(tree))
}

fn place(index: usize, mount: &Mount) -> String {
    format!("mounts[{index}] ({} at {})", mount.kind, mount.destination)
}

fn options(index: usize, mount: &Mount) -> Result<Options, Failure> {
    Options::parse(&mount.options).map_err(|option| {
        let reason = format!("mounts[{index}].options: {option:?} is for bind mounts only");
        Failure::request(reason)
    })
}

/// A mount of what is at `source` in the guest.
fn bind(
    root: &Root,
    index: usize,
    mount: &Mount,
    destination: &str,
    options: &Options,
) -> Result<(OwnedFd, OwnedFd), Failure> {
    let at = || place(index, mount);
    if let Some(option) = options.data.first() {
        return Err(Failure::request(format!(
            "mounts[{index}].options: {option:?}: bind mounts cannot have any filesystem-specific options applied"
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
        root.directory(destination)
    } else {
        root.file(destination)
    };
    Ok((tree, target.request(at)?))
}

fn change(tree: BorrowedFd, deep: bool, attributes: &MountAttributes) -> io::Result<()> {
    if *attributes == MountAttributes::default() {
        Ok(())
    } else {
        mount_setattr(tree, deep, attributes)
    }
}

/// Changes the mount that is there: as mount(2) has it, to exactly these attributes, and the file system unless only
/// the bind is meant.
fn remount(root: &Root, destination: &str, mount: &Mount, options: &Options) -> io::Result<()> {
    const ALL: u64 = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC
        | libc::MOUNT_ATTR_NODIRATIME
        | libc::MOUNT_ATTR_NOSYMFOLLOW;
    let target = root.open(destination)?;
    let mut attributes = options.attributes;
    attributes.clear |= ALL & !attributes.set;
    if !options.bind {
        // A tmpfs stays as it is, and is read-only where it is mounted, as with runc.
        let whole = attributes.is_read_only() && mount.kind != "tmpfs";
        let access = if whole { "ro" } else { "rw" };
        let data = [access.to_string()].into_iter();
        let data = data.chain(options.superblock.iter().cloned());
        let data: Vec<_> = data.chain(options.data.iter().cloned()).collect();
        reconfigure(target.as_fd(), &data)?;
    }
    mount_setattr(target.as_fd(), false, &attributes)?;
    change(target.as_fd(), true, &options.deep)
}

/// Changes the file system that `mount` shows.
fn reconfigure(mount: BorrowedFd, data: &[String]) -> io::Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(mount, "", flags)?;
    for option in data {
        set_option(&context, option)?;
    }
    Ok(fsconfig_reconfigure(&context)?)
}

/// The directory that a file system is mounted on.
fn target_of(
    root: &Root,
    mount: &Mount,
    destination: &str,
    options: &mut Options,
) -> Result<OwnedFd, Failure> {
    // Over a link, the kernel's own files would appear at a place of the image's choice (CVE-2019-19921).
    let target = if matches!(mount.kind.as_str(), "proc" | "sysfs") {
        root.directory(destination)
            .and_then(|_| root.open_plain(destination))
    } else {
        let existing = root.open(destination);
        if let (Ok(found), "tmpfs") = (&existing, mount.kind.as_str()) {
            // It keeps the mode of the directory it covers, unless options say otherwise.
            let mode = fstat(found)
                .guest(|| "look at the destination".into())?
                .st_mode
                & 0o7777;
            options.data.insert(0, format!("mode={mode:o}"));
        }
        existing.or_else(|_| root.directory(destination))
    };
    target.request(|| "destination".into())
}

/// A mount of a file system, made of nothing but its type, source and options.
fn filesystem(
    root: &Root,
    mount: &Mount,
    destination: &str,
    options: &mut Options,
    cgroups: &Path,
) -> Result<(OwnedFd, OwnedFd), Failure> {
    let target = target_of(root, mount, destination, options)?;
    let tree = match of_options(mount, options) {
        // In a user namespace without a cgroup namespace of its own, what the guest has is shown, as with runc.
        Err(refused) if mount.kind.starts_with("cgroup") => {
            clone(&cgroups.to_string_lossy(), false).map_err(|_| refused)
        }
        made => made,
    };
    Ok((tree?, target))
}

/// A detached mount of the `index`th mount's file system, without its attributes.
pub(super) fn of_filesystem(index: usize, mount: &Mount) -> Result<OwnedFd, Failure> {
    let options = options(index, mount)?;
    of_options(mount, &options).map_err(|failure| failure.at(|| place(index, mount)))
}

fn of_options(mount: &Mount, options: &Options) -> Result<OwnedFd, Failure> {
    // Version 1 is a thing of the past: no guest has it.
    let (kind, none) = match mount.kind.as_str() {
        "" => return Err(Failure::request("the type is missing")),
        "cgroup" | "cgroup2" => ("cgroup2", true),
        kind => (kind, false),
    };
    let read_only = options.attributes.is_read_only().then(|| "ro".to_string());
    let mut data: Vec<_> = read_only.into_iter().collect();
    data.extend(options.superblock.iter().cloned());
    if !none {
        data.extend(options.data.iter().cloned());
    }
    new(kind, &mount.source, &data)
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
        told(set_option(&context, option), &format!("option {option:?}"))?;
    }
    told(fsconfig_create(&context), "mount")?;
    fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .guest(|| "mount".into())
}

fn set_option(context: &OwnedFd, option: &str) -> rustix::io::Result<()> {
    match option.split_once('=') {
        Some((name, value)) => fsconfig_set_string(context, name, value),
        None => fsconfig_set_flag(context, option),
    }
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
