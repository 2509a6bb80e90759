//! Makes a container's shares: its root file system and bind mounts as detached mounts, which the
//! VMM is handed as descriptors. Nothing of it is ever seen in the host's mount table.

use std::{
    env, fs,
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use containerd_shim_protos::api::Mount;
use thiserror::Error;
use tokio::{sync::oneshot, time::timeout};

use crate::{
    idmap::{self, IdMaps},
    mount::{self, Attributes},
    spec::{Bind, Plan, Root},
};

/// For all mounts of a container.
const LIMIT: Duration = Duration::from_secs(20);
/// Bytes of stack for the thread that mounts.
const STACK: usize = 128 << 10;
/// mount(2) copies one page of options.
const DATA_LIMIT: usize = 4095;

#[derive(Debug, Error)]
pub enum ShareError {
    #[error("start a thread to mount in: {0}")]
    Thread(io::Error),
    #[error("make a mount namespace: {0}")]
    Namespace(io::Error),
    #[error("the host's file systems did not answer within {0:?}")]
    Silent(Duration),
    #[error("rootfs {path}: {cause}")]
    Root { path: PathBuf, cause: io::Error },
    #[error("mount rootfs: {kind} from {source_path:?} on {target} ({options}): {cause}")]
    Mount {
        kind: String,
        source_path: String,
        target: PathBuf,
        options: String,
        cause: io::Error,
    },
    #[error("mount rootfs: {0}")]
    Unsupported(String),
    #[error("{field}: bind mount {path}: {cause}")]
    Bind {
        field: String,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("{field}: bind mount {path}: map its ids, which not every file system can: {cause}")]
    IdMap {
        field: String,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("{field}: bind mount {path}: a {kind} cannot be shared with a microVM")]
    Kind {
        field: String,
        path: PathBuf,
        kind: &'static str,
    },
}

/// A detached mount and the name the guest knows it by.
#[derive(Debug)]
pub struct Share {
    pub name: String,
    pub tree: OwnedFd,
    /// Nobody but the guest writes to it.
    pub exclusive: bool,
}

/// All shares of a container, its root file system first, where that is the host's. Made by a thread of their own: a source
/// may be on a file system that does not answer, which must not stop the shim, and the mount
/// namespace that root file systems are mounted in is this thread's and ends with it.
pub async fn prepare(plan: Plan, rootfs: Vec<Mount>) -> Result<Vec<Share>, ShareError> {
    let (answer, answered) = oneshot::channel();
    thread::Builder::new()
        .name("husk-mount".into())
        .stack_size(STACK)
        .spawn(move || answer.send(all(&plan, &rootfs)))
        .map_err(ShareError::Thread)?;
    match timeout(LIMIT, answered).await {
        Ok(Ok(shares)) => shares,
        _ => Err(ShareError::Silent(LIMIT)),
    }
}

fn all(plan: &Plan, rootfs: &[Mount]) -> Result<Vec<Share>, ShareError> {
    let mut shares = Vec::new();
    if let Some(Root { path, share }) = &plan.root {
        shares.push(Share {
            name: share.clone(),
            tree: root(path, rootfs)?,
            exclusive: true,
        });
    }
    for bind in &plan.binds {
        shares.push(Share {
            name: bind.share.clone(),
            tree: self::bind(bind)?,
            exclusive: false,
        });
    }
    Ok(shares)
}

fn bind(bind: &Bind) -> Result<OwnedFd, ShareError> {
    let failed = |cause| ShareError::Bind {
        field: bind.field.clone(),
        path: bind.source.clone(),
        cause,
    };
    let tree = mount::open_tree(&bind.source, bind.recursive).map_err(failed)?;
    // The type is taken from what we hold, not from what has that name meanwhile.
    let tree = File::from(tree);
    let kind = tree.metadata().map_err(failed)?.file_type();
    let special = [
        (kind.is_socket(), "unix socket"),
        (kind.is_fifo(), "FIFO"),
        (kind.is_block_device(), "block device"),
        (kind.is_char_device(), "character device"),
    ];
    if let Some((_, kind)) = special.into_iter().find(|(is, _)| *is) {
        return Err(ShareError::Kind {
            field: bind.field.clone(),
            path: bind.source.clone(),
            kind,
        });
    }
    mount::seal(&tree, bind.attributes).map_err(failed)?;
    if let Some(maps) = &bind.idmap {
        let unmapped = |cause| ShareError::IdMap {
            field: bind.field.clone(),
            path: bind.source.clone(),
            cause,
        };
        let namespace = idmap::user_namespace(maps).map_err(unmapped)?;
        mount::map_ids(&tree, maps.recursive, namespace).map_err(unmapped)?;
    }
    Ok(tree.into())
}

/// The root file system: what containerd wants mounted, or what lies at `path` already.
fn root(path: &Path, mounts: &[Mount]) -> Result<OwnedFd, ShareError> {
    let failed = |path: &Path, cause| ShareError::Root {
        path: path.to_owned(),
        cause,
    };
    let (tree, attributes) = match mounts {
        [] => {
            let tree = mount::open_tree(path, true).map_err(|e| failed(path, e))?;
            (tree, Attributes::default())
        }
        // One directory: nothing needs to be mounted to share it.
        [only] if is_bind(only) && only.target.is_empty() => {
            let options = Options::parse(&only.options)?;
            let source = Path::new(&only.source);
            let recursive = options.flags & libc::MS_REC != 0;
            let tree = mount::open_tree(source, recursive).map_err(|e| failed(source, e))?;
            if let Some(maps) = &options.idmap {
                idmap::user_namespace(maps)
                    .and_then(|namespace| mount::map_ids(&tree, false, namespace))
                    .map_err(|e| failed(source, e))?;
            }
            (tree, options.attributes())
        }
        mounts => {
            mount_all(path, mounts)?;
            let tree = mount::open_tree(path, true).map_err(|e| failed(path, e))?;
            (tree, Attributes::default())
        }
    };
    let tree = File::from(tree);
    let found = tree.metadata().map_err(|e| failed(path, e))?;
    if !found.is_dir() {
        return Err(failed(path, io::ErrorKind::NotADirectory.into()));
    }
    mount::seal(&tree, attributes).map_err(|e| failed(path, e))?;
    Ok(tree.into())
}

fn is_bind(mount: &Mount) -> bool {
    mount.type_ == "bind" || mount.options.iter().any(|o| o == "bind" || o == "rbind")
}

/// Mounts the root file system in a mount namespace that ends with this thread.
fn mount_all(root: &Path, mounts: &[Mount]) -> Result<(), ShareError> {
    mount::leave_host_namespace().map_err(ShareError::Namespace)?;
    fs::create_dir_all(root).map_err(|cause| ShareError::Root {
        path: root.to_owned(),
        cause,
    })?;
    for mount in mounts {
        let target = match mount.target.trim_start_matches('/') {
            "" => root.to_owned(),
            below => root.join(below),
        };
        let options = Options::parse(&mount.options)?;
        options
            .mount(mount, &target)
            .map_err(|cause| ShareError::Mount {
                kind: mount.type_.clone(),
                source_path: mount.source.clone(),
                target: target.clone(),
                options: mount.options.join(","),
                cause,
            })?;
    }
    Ok(())
}

/// fstab-style options, split into what mount(2) takes as flags and what the file system reads.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    flags: u64,
    data: Vec<String>,
    /// Other owners than the files have.
    idmap: Option<IdMaps>,
}

impl Options {
    fn parse(options: &[String]) -> Result<Self, ShareError> {
        let mut parsed = Self::default();
        for option in options {
            let (flag, on) = match option.as_str() {
                "defaults" | "" => continue,
                "ro" => (libc::MS_RDONLY, true),
                "rw" => (libc::MS_RDONLY, false),
                "nosuid" => (libc::MS_NOSUID, true),
                "suid" => (libc::MS_NOSUID, false),
                "nodev" => (libc::MS_NODEV, true),
                "dev" => (libc::MS_NODEV, false),
                "noexec" => (libc::MS_NOEXEC, true),
                "exec" => (libc::MS_NOEXEC, false),
                "noatime" => (libc::MS_NOATIME, true),
                "atime" => (libc::MS_NOATIME, false),
                "nodiratime" => (libc::MS_NODIRATIME, true),
                "diratime" => (libc::MS_NODIRATIME, false),
                "relatime" => (libc::MS_RELATIME, true),
                "norelatime" => (libc::MS_RELATIME, false),
                "strictatime" => (libc::MS_STRICTATIME, true),
                "sync" => (libc::MS_SYNCHRONOUS, true),
                "async" => (libc::MS_SYNCHRONOUS, false),
                "dirsync" => (libc::MS_DIRSYNC, true),
                "bind" => (libc::MS_BIND, true),
                "rbind" => (libc::MS_BIND | libc::MS_REC, true),
                // What every mount of ours is.
                "private" | "rprivate" => continue,
                "loop" => {
                    let reason = "option loop: a file system in an image file is not supported yet";
                    return Err(ShareError::Unsupported(reason.into()));
                }
                _ => {
                    parsed.data.push(option.clone());
                    continue;
                }
            };
            if on {
                parsed.flags |= flag;
            } else {
                parsed.flags &= !flag;
            }
        }
        parsed.idmap = idmap::of_snapshot(&mut parsed.data).map_err(ShareError::Unsupported)?;
        Ok(parsed)
    }

    /// The flags of a bind mount, which mount(2) would ignore in one step.
    fn attributes(&self) -> Attributes {
        let set = [
            (libc::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
            (libc::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
            (libc::MS_NODEV, libc::MOUNT_ATTR_NODEV),
            (libc::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
        ]
        .into_iter()
        .filter(|(flag, _)| self.flags & flag != 0)
        .fold(0, |set, (_, bit)| set | bit);
        Attributes {
            set,
            set_recursive: 0,
        }
    }

    fn mount(&self, mount: &Mount, target: &Path) -> io::Result<()> {
        if mount.type_.starts_with("format/") || mount.type_.starts_with("mkdir/") {
            let reason = "containerd was to resolve this kind of mount itself";
            return Err(io::Error::other(reason));
        }
        let mut options = self.data.clone();
        match &self.idmap {
            None => {}
            Some(maps) if mount.type_ == "overlay" => {
                idmap::map_layers(&mut options, target, maps)?;
            }
            Some(_) => {
                let reason = "options uidmap and gidmap: of an overlay or of one directory only";
                return Err(io::Error::other(reason));
            }
        }
        let data = options.join(",");
        if is_bind(mount) {
            mount::mount(&mount.source, target, "", self.flags, &data)?;
            let remount = self.flags | libc::MS_REMOUNT | libc::MS_BIND;
            return match self.attributes().set {
                0 => Ok(()),
                _ => mount::mount("none", target, "", remount & !libc::MS_REC, ""),
            };
        }
        if data.len() <= DATA_LIMIT {
            return mount::mount(&mount.source, target, &mount.type_, self.flags, &data);
        }
        let (directory, data) = shorten(&options).ok_or_else(|| {
            io::Error::other(format!(
                "{} bytes of options, and no way to shorten",
                data.len()
            ))
        })?;
        // This thread's alone, as its mount namespace is: see `mount::leave_host_namespace`.
        env::set_current_dir(&directory)?;
        mount::mount(&mount.source, target, &mount.type_, self.flags, &data)
    }
}

/// Makes an overlay's options shorter: paths relative to the directory that holds all the layers.
fn shorten(options: &[String]) -> Option<(PathBuf, String)> {
    let lower = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let mut common = Path::new(lower.split(':').next()?).parent()?;
    while !lower
        .split(':')
        .all(|layer| Path::new(layer).starts_with(common))
    {
        common = common.parent()?;
    }
    let relative = |path: &str| -> Option<String> {
        let path = Path::new(path).strip_prefix(common).ok()?;
        Some(path.to_str()?.to_owned())
    };
    let mut short = Vec::new();
    for option in options {
        short.push(match option.strip_prefix("lowerdir=") {
            Some(layers) => {
                let layers: Option<Vec<_>> = layers.split(':').map(relative).collect();
                format!("lowerdir={}", layers?.join(":"))
            }
            None => option.clone(),
        });
    }
    let data = short.join(",");
    (data.len() <= DATA_LIMIT).then(|| (common.to_owned(), data))
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::CString,
        os::{
            fd::AsRawFd,
            unix::{fs::PermissionsExt, net::UnixListener},
        },
    };

    use super::*;
    use crate::idmap::Range;

    fn strings(options: &[&str]) -> Vec<String> {
        options.iter().map(|o| (*o).to_owned()).collect()
    }

    fn mount_of(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.to_str().unwrap().into(),
            options: strings(options),
            ..Mount::default()
        }
    }

    fn names(tree: &OwnedFd) -> Vec<String> {
        let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
        let mut names: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn mounts_below(path: &Path) -> usize {
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        table.matches(path.to_str().unwrap()).count()
    }

    #[test]
    fn options_are_flags_and_data() {
        let options = Options::parse(&strings(&["ro", "lowerdir=/a:/b", "nosuid", "index=off"]));
        let options = options.unwrap();
        assert_eq!(options.flags, libc::MS_RDONLY | libc::MS_NOSUID);
        assert_eq!(options.data, ["lowerdir=/a:/b", "index=off"]);
        assert!(Options::parse(&strings(&["loop"])).is_err());
    }

    #[test]
    fn long_lists_of_layers_get_shorter() {
        let layers: Vec<String> = (0..120)
            .map(|n| {
                format!(
                    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/{n}/fs"
                )
            })
            .collect();
        let options = strings(&["workdir=/w", &format!("lowerdir={}", layers.join(":"))]);
        assert!(options.join(",").len() > DATA_LIMIT);
        let (directory, data) = shorten(&options).unwrap();
        assert!(directory.ends_with("snapshots"));
        assert!(data.starts_with("workdir=/w,lowerdir=0/fs:1/fs:"));
    }

    #[test]
    fn an_overlay_is_shared_and_leaves_no_mount() {
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = |name: &str| top.path().join(name);
        for name in ["lower1", "lower2", "upper", "work", "rootfs"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("lower1/one"), "").unwrap();
        fs::write(at("lower2/two"), "").unwrap();
        let lower = format!(
            "lowerdir={}:{}",
            at("lower1").display(),
            at("lower2").display()
        );
        let upper = format!("upperdir={}", at("upper").display());
        let work = format!("workdir={}", at("work").display());
        let overlay = mount_of("overlay", Path::new("overlay"), &[&work, &upper, &lower]);
        // As `prepare` does: the thread's mount namespace ends with it.
        let rootfs = at("rootfs");
        let tree = thread::spawn(move || root(&rootfs, &[overlay]).unwrap());
        let tree = tree.join().unwrap();
        assert_eq!(names(&tree), ["one", "two"]);
        assert_eq!(mounts_below(&at("rootfs")), 0);
        fs::write(format!("/proc/self/fd/{}/new", tree.as_raw_fd()), "x").unwrap();
        assert!(at("upper/new").exists());
    }

    /// `ctr run --remap-labels`: the layers belong to the host's root, the container's root is another.
    #[test]
    fn an_overlay_can_have_other_owners_than_its_layers() {
        use std::os::unix::fs::{MetadataExt, chown};
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        let at = |name: &str| top.path().join(name);
        for name in ["lower1", "lower2", "upper", "work", "rootfs"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("lower1/one"), "").unwrap();
        fs::write(at("lower2/two"), "").unwrap();
        chown(at("lower2/two"), Some(3), Some(4)).unwrap();
        let lower = format!(
            "lowerdir={}:{}",
            at("lower1").display(),
            at("lower2").display()
        );
        let upper = format!("upperdir={}", at("upper").display());
        let work = format!("workdir={}", at("work").display());
        let maps = ["uidmap=0:1000:100", "gidmap=0:2000:100"];
        let overlay = mount_of(
            "overlay",
            Path::new("overlay"),
            &[&work, &upper, &lower, maps[0], maps[1]],
        );
        let rootfs = at("rootfs");
        let tree = thread::spawn(move || root(&rootfs, &[overlay]).unwrap());
        let tree = tree.join().unwrap();
        assert_eq!(names(&tree), ["one", "two"]);
        let owner = |name: &str| {
            let found = fs::metadata(format!("/proc/self/fd/{}/{name}", tree.as_raw_fd())).unwrap();
            (found.uid(), found.gid())
        };
        assert_eq!((owner("one"), owner("two")), ((1000, 2000), (1003, 2004)));
        assert_eq!(mounts_below(top.path()), 0);
    }

    #[test]
    fn a_read_only_bind_is_read_only() {
        let top = tempfile::tempdir().unwrap();
        fs::write(top.path().join("file"), "").unwrap();
        let tree = root(
            Path::new("/nowhere"),
            &[mount_of("bind", top.path(), &["rbind", "ro"])],
        );
        let tree = tree.unwrap();
        assert_eq!(names(&tree), ["file"]);
        let error = fs::write(format!("/proc/self/fd/{}/new", tree.as_raw_fd()), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }

    /// What a guest puts into a share, or finds there, must be of no use on the host.
    #[test]
    fn nothing_of_a_share_is_executed_or_a_device_on_the_host() {
        let top = tempfile::tempdir().unwrap();
        let script = top.path().join("script");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o4755)).unwrap();
        let device = CString::new(top.path().join("null").to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        let made = unsafe { libc::mknod(device.as_ptr(), libc::S_IFCHR | 0o666, 0x103) };
        assert_eq!(made, 0, "mknod needs root");
        let tree = root(
            Path::new("/nowhere"),
            &[mount_of("bind", top.path(), &["rbind"])],
        )
        .unwrap();
        let inside = |name: &str| format!("/proc/self/fd/{}/{name}", tree.as_raw_fd());
        let denied = Some(libc::EACCES);
        let opened = fs::File::open(inside("null")).unwrap_err();
        assert_eq!(opened.raw_os_error(), denied);
        let executed = std::process::Command::new(inside("script")).spawn();
        assert_eq!(executed.unwrap_err().raw_os_error(), denied);
    }

    #[test]
    fn a_vanished_rootfs_is_named() {
        let gone = Path::new("/nowhere/rootfs");
        let error = root(gone, &[]).unwrap_err().to_string();
        assert!(
            error.starts_with("rootfs /nowhere/rootfs: No such file"),
            "{error}"
        );
        let overlay = mount_of(
            "overlay",
            Path::new("overlay"),
            &["lowerdir=/nowhere/1:/nowhere/2"],
        );
        let top = tempfile::tempdir().unwrap();
        let error = root(&top.path().join("rootfs"), &[overlay])
            .unwrap_err()
            .to_string();
        assert!(error.contains("lowerdir=/nowhere/1:/nowhere/2"), "{error}");
    }

    #[test]
    fn a_socket_is_refused_by_name() {
        let top = tempfile::tempdir().unwrap();
        let source = top.path().join("docker.sock");
        let _listener = UnixListener::bind(&source).unwrap();
        let error = bind(&Bind {
            field: "mounts[3]".into(),
            source,
            share: "c0-m3".into(),
            recursive: true,
            attributes: Attributes::default(),
            idmap: None,
        })
        .unwrap_err()
        .to_string();
        assert!(error.starts_with("mounts[3]: bind mount "), "{error}");
        assert!(
            error.ends_with("docker.sock: a unix socket cannot be shared with a microVM"),
            "{error}"
        );
    }

    #[test]
    fn a_single_file_is_shared() {
        let top = tempfile::tempdir().unwrap();
        let source = top.path().join("hosts");
        fs::write(&source, "127.0.0.1 localhost\n").unwrap();
        let tree = bind(&Bind {
            field: "mounts[0]".into(),
            source,
            share: "c0-m0".into(),
            recursive: false,
            attributes: Attributes {
                set: libc::MOUNT_ATTR_RDONLY,
                set_recursive: 0,
            },
            idmap: None,
        })
        .unwrap();
        let path = format!("/proc/self/fd/{}", tree.as_raw_fd());
        assert_eq!(fs::read_to_string(path).unwrap(), "127.0.0.1 localhost\n");
    }

    /// What the guest is shown, and what comes back from it.
    #[test]
    fn a_mapped_bind_has_other_owners() {
        use std::os::unix::fs::{MetadataExt, chown};
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(top.path().join("roots"), "").unwrap();
        fs::write(top.path().join("others"), "").unwrap();
        chown(top.path().join("others"), Some(5000), Some(5000)).unwrap();
        let range = |host_id, size| Range {
            container_id: 0,
            host_id,
            size,
        };
        let tree = bind(&Bind {
            field: "mounts[0]".into(),
            source: top.path().to_owned(),
            share: "c0-m0".into(),
            recursive: true,
            attributes: Attributes::default(),
            idmap: Some(IdMaps {
                uid: vec![range(1000, 10)],
                gid: vec![range(2000, 10)],
                recursive: true,
            }),
        })
        .unwrap();
        let inside = |name: &str| format!("/proc/self/fd/{}/{name}", tree.as_raw_fd());
        let owner = |path: &Path| {
            let found = path.metadata().unwrap();
            (found.uid(), found.gid())
        };
        assert_eq!(owner(Path::new(&inside("roots"))), (1000, 2000));
        assert_eq!(owner(Path::new(&inside("others"))), (65534, 65534));
        chown(inside("roots"), Some(1003), Some(2004)).unwrap();
        assert_eq!(owner(&top.path().join("roots")), (3, 4));
        // procfs is one of those that cannot.
        let error = bind(&Bind {
            field: "mounts[1]".into(),
            source: "/proc/sys".into(),
            share: "c0-m1".into(),
            recursive: false,
            attributes: Attributes::default(),
            idmap: Some(IdMaps {
                uid: vec![range(1000, 10)],
                gid: vec![range(2000, 10)],
                recursive: false,
            }),
        })
        .unwrap_err()
        .to_string();
        assert!(
            error.starts_with("mounts[1]: bind mount /proc/sys: map its ids"),
            "{error}"
        );
    }
}
