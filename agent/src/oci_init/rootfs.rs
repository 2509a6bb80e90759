//! The container's view of files: built beside the guest's, entered, and closed.
//!
//! Steps, because each needs the one before: [`build`] still sees the guest's tree (sources of binds);
//! [`enter`] leaves it for good; [`make_directory`] still may write; [`finish`] takes away what was
//! needed until then.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat, makedev, open};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::process::{chdir, fchdir, pivot_root};

use super::failure::{Explain, Failure};
use super::inside::Root;
use super::mounts::READ_ONLY;
use super::namespaces::Prepared;
use super::{devices, mount_options, mounts};
use crate::control::ContainerPlan;
use crate::spec::Spec;
use crate::sys::{MountAttributes, mount_setattr};

pub(super) struct Rootfs {
    root: Root,
    /// Mounts to be made read-only at the end.
    late: Vec<OwnedFd>,
}

/// Makes the tree at `root.path` with all mounts and devices.
pub(super) fn build(plan: &ContainerPlan, mut prepared: Prepared) -> Result<Rootfs, Failure> {
    let spec = &plan.spec;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .guest(|| "make all mounts private".into())?;
    let path = &spec.root.path;
    let at = || format!("root.path {path}");
    let tree = mounts::clone(path, true).request(at)?;
    if FileType::from_raw_mode(fstat(&tree).guest(at)?.st_mode) != FileType::Directory {
        return Err(io::Error::from_raw_os_error(libc::ENOTDIR)).request(at);
    }
    // Over itself: the new root of pivot_root must be a mount.
    let below = open(path.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    mounts::attach(tree.as_fd(), below.request(at)?.as_fd()).guest(at)?;
    let root = Root::new(tree);

    rustix::process::umask(Mode::from_raw_mode(0o022));
    let mut late = Vec::new();
    for (index, mount) in spec.mounts.iter().enumerate() {
        late.extend(mounts::mount(
            &root,
            index,
            mount,
            &plan.cgroups,
            prepared.remove(&index),
        )?);
    }
    rustix::process::umask(Mode::empty());
    devices::make(&root, spec)?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    Ok(Rootfs { root, late })
}

/// Makes the tree the root, and the guest's tree unreachable.
pub(super) fn enter(rootfs: &Rootfs) -> Result<(), Failure> {
    let at = || "enter the root (pivot_root)".to_string();
    fchdir(&rootfs.root).guest(at)?;
    // Over itself, the old root needs no directory of the image, and comes off at once (pivot_root(2)).
    pivot_root(".", ".").guest(at)?;
    unmount(".", UnmountFlags::DETACH).guest(at)?;
    chdir("/").guest(at)
}

/// `linux.rootfsPropagation`: of the root and, with the kinds that begin with r, of what is mounted in it. Private is
/// what all of it is.
pub(super) fn propagate(spec: &Spec) -> Result<(), Failure> {
    let name = &spec.linux.rootfs_propagation;
    let at = || format!("linux.rootfsPropagation: {name:?}");
    if matches!(name.as_str(), "" | "private" | "rprivate") {
        return Ok(());
    }
    let Some((propagation, deep)) = mount_options::propagation(name) else {
        return Err(Failure::request(format!("{} is no propagation", at())));
    };
    let kind = MountAttributes {
        propagation,
        ..MountAttributes::default()
    };
    let root = open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).guest(at)?;
    mount_setattr(root.as_fd(), deep, &kind).guest(at)
}

/// Makes the working directory of the container's init where the image lacks it, as runc does: before the
/// root becomes read-only, and not for added processes.
pub(super) fn make_directory(rootfs: &Rootfs, cwd: &str) -> Result<(), Failure> {
    match rootfs.root.directory(cwd) {
        // Only its user may look there, and finds out later.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other.map(drop).request(|| format!("mkdir {cwd}")),
    }
}

/// Read-only and masked paths, as the last thing that needs the mounts writable.
pub(super) fn finish(spec: &Spec, rootfs: &Rootfs) -> Result<(), Failure> {
    for tree in &rootfs.late {
        mount_setattr(tree.as_fd(), false, &READ_ONLY).guest(|| "make a tmpfs read-only".into())?;
    }
    if spec.root.readonly {
        mount_setattr(rootfs.root.as_fd(), false, &READ_ONLY).guest(|| "root.readonly".into())?;
    }
    for path in &spec.linux.readonly_paths {
        unless_missing(make_read_only(&rootfs.root, path))
            .request(|| format!("linux.readonlyPaths: {path}"))?;
    }
    mask(spec, &rootfs.root)
}

fn make_read_only(root: &Root, path: &str) -> io::Result<()> {
    let target = root.open(path)?;
    let tree = mounts::clone_of(target.as_fd(), true)?;
    mount_setattr(tree.as_fd(), false, &READ_ONLY)?;
    mounts::attach(tree.as_fd(), target.as_fd())
}

/// Files are covered by /dev/null, directories by one empty, read-only tmpfs that all of them share.
fn mask(spec: &Spec, root: &Root) -> Result<(), Failure> {
    let mut empty: Option<OwnedFd> = None;
    for path in &spec.linux.masked_paths {
        let at = || format!("linux.maskedPaths: {path}");
        let target = match root.open(path) {
            Err(error) if is_missing(&error) => continue,
            other => other.request(at)?,
        };
        if FileType::from_raw_mode(fstat(&target).guest(at)?.st_mode) != FileType::Directory {
            let null = null_device(root).request(at)?;
            mounts::attach(null.as_fd(), target.as_fd()).request(at)?;
            continue;
        }
        let tree = match &empty {
            Some(first) => mounts::clone_of(first.as_fd(), false).guest(at)?,
            None => {
                // Room for its root and nothing else, as runc has it.
                let options = ["ro", "nr_blocks=1", "nr_inodes=1"].map(String::from);
                mounts::new("tmpfs", "tmpfs", &options)?
            }
        };
        mount_setattr(tree.as_fd(), false, &READ_ONLY).guest(at)?;
        mounts::attach(tree.as_fd(), target.as_fd()).request(at)?;
        empty.get_or_insert(tree);
    }
    Ok(())
}

/// A mount of the container's /dev/null. What an image or a volume has put there instead would show
/// through the mask (CVE-2025-31133).
fn null_device(root: &Root) -> io::Result<OwnedFd> {
    let null = root.open("/dev/null")?;
    let found = fstat(&null)?;
    let is_null = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice
        && found.st_rdev == makedev(1, 3);
    if !is_null {
        return Err(io::Error::other("/dev/null is not the null device"));
    }
    mounts::clone_of(null.as_fd(), false)
}

/// As with runc, a file in the place of a directory is no missing one.
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| {
        if is_missing(&error) {
            Ok(())
        } else {
            Err(error)
        }
    })
}
