//! The pod's cgroup on the host: made before the VMM, which is born in it, and removed after it.
//! Only cgroup v2 is used; on a host without it the VMM stays in the shim's own cgroup.
//!
//! Pods share parents, and whoever made one may be gone before the others. So what husk makes has a
//! mark, and whoever leaves a marked parent empty removes it.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::OpenOptionsExt},
    },
    path::{Component, Path, PathBuf},
    process,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use thiserror::Error;

/// What `files` reads.
const STATS: [&str; 12] = [
    "cpu.stat",
    "io.stat",
    "memory.current",
    "memory.events",
    "memory.max",
    "memory.peak",
    "memory.stat",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "pids.current",
    "pids.max",
];

/// The extended attribute of a cgroup that husk has made. Its value says nothing.
const MARK: &CStr = c"trusted.husk";

#[derive(Debug, Error)]
pub enum CgroupError {
    #[error("linux.cgroupsPath {0:?}: leads out of the cgroup tree")]
    Path(String),
    #[error("create cgroup {path}: {cause}")]
    Create { path: PathBuf, cause: io::Error },
}

/// A cgroup that exists, and how much of its path is ours to remove.
#[derive(Debug)]
pub struct PodCgroup {
    directory: OwnedFd,
    path: PathBuf,
    /// Directories that we made, outermost first.
    made: Vec<PathBuf>,
}

/// Where cgroup v2 is mounted on this host, also where v1 is in use beside it.
pub fn root() -> Option<&'static Path> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(Path::new)
        .find(|path| is_cgroup2(path))
}

fn is_cgroup2(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: statfs is plain data, for which zeroes are a value.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends in NUL and `found` has room for what statfs(2) writes.
    let result = unsafe { libc::statfs(path.as_ptr(), &raw mut found) };
    result == 0 && found.f_type == libc::CGROUP2_SUPER_MAGIC
}

/// `cgroupsPath` of the OCI specification as a path below the root of the hierarchy: a plain path,
/// or systemd's `slice:prefix:name`.
pub fn relative_path(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let mut parts = cgroups_path.split(':');
    let path = match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(slice), Some(prefix), Some(name), None) => {
            slice_path(slice).join(if prefix.is_empty() {
                format!("{name}.scope")
            } else {
                format!("{prefix}-{name}.scope")
            })
        }
        _ => PathBuf::from(cgroups_path.trim_start_matches('/')),
    };
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    if path.as_os_str().is_empty() || !path.components().all(plain) {
        return Err(CgroupError::Path(cgroups_path.to_owned()));
    }
    Ok(path)
}

/// Where the cgroup of pod `id` is, below the root of the hierarchy.
pub fn of_pod(cgroups_path: Option<&str>, id: &str) -> Result<PathBuf, CgroupError> {
    match cgroups_path {
        Some(path) => relative_path(path),
        None => Ok(PathBuf::from(format!("husk-{id}"))),
    }
}

/// systemd nests `a-b.slice` in `a.slice` (systemd.slice(5)).
fn slice_path(slice: &str) -> PathBuf {
    let slice = if slice.is_empty() {
        "system.slice"
    } else {
        slice
    };
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    for (end, _) in name.match_indices('-') {
        path.push(format!("{}.slice", name.get(..end).unwrap_or(name)));
    }
    path.push(format!("{name}.slice"));
    path
}

impl PodCgroup {
    /// Makes `relative` below `root`, or takes it as it is.
    pub fn create(root: &Path, relative: &Path) -> Result<Self, CgroupError> {
        let path = root.join(relative);
        let failed = |cause| CgroupError::Create {
            path: path.clone(),
            cause,
        };
        let mut last = None;
        // The end of another pod may remove an empty parent under our feet: then begin again.
        for _ in 0..8 {
            match make(root, relative) {
                Ok((directory, made)) => {
                    return Ok(Self {
                        directory,
                        path,
                        made,
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => last = Some(e),
                Err(e) => return Err(failed(e)),
            }
        }
        Err(failed(
            last.unwrap_or_else(|| io::ErrorKind::NotFound.into()),
        ))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For [`remove`], should we not live to call it.
    pub fn made(&self) -> &[PathBuf] {
        &self.made
    }

    /// Moves this process, the shim, into it; [`leave`] takes it out again, without which the cgroup cannot be removed.
    pub fn join(&self) -> io::Result<()> {
        // Looked up before it is another.
        home();
        move_to(&self.path, process::id())
    }

    /// The directory, for `CLONE_INTO_CGROUP`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

fn make(root: &Path, relative: &Path) -> io::Result<(OwnedFd, Vec<PathBuf>)> {
    let mut made = Vec::new();
    let directory = make_and_open(root, relative, &mut made);
    let directory = directory.inspect_err(|_| remove(&made))?;
    Ok((directory, made))
}

fn make_and_open(root: &Path, relative: &Path, made: &mut Vec<PathBuf>) -> io::Result<OwnedFd> {
    let mut path = root.to_owned();
    for part in relative.components() {
        path.push(part);
        match fs::create_dir(&path) {
            Ok(()) => {
                made.push(path.clone());
                mark(&path);
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    let directory = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_CLOEXEC)
        .open(&path)?;
    Ok(directory.into())
}

/// Without its mark it can still be removed by the pod that made it.
fn mark(path: &Path) {
    let Ok(name) = CString::new(path.as_os_str().as_bytes()) else {
        return;
    };
    // SAFETY: both strings end in NUL; the value is one byte of a live string.
    let result =
        unsafe { libc::setxattr(name.as_ptr(), MARK.as_ptr(), c"1".as_ptr().cast(), 1, 0) };
    if result != 0 {
        let e = io::Error::last_os_error();
        log::debug!("mark cgroup {}: {e}", path.display());
    }
}

fn is_marked(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: both strings end in NUL; a size of 0 asks for the length alone.
    unsafe { libc::getxattr(path.as_ptr(), MARK.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

/// Removes the cgroups that [`PodCgroup::create`] made, inmost first, and marked ones above them that
/// nobody uses any more; one that others use stays. Bounded: the last process of a cgroup may be on its
/// way out for a moment.
pub fn remove(made: &[PathBuf]) {
    let Some(inmost) = made.last() else {
        return;
    };
    for path in inmost.ancestors() {
        let ours = made.iter().any(|one| one == path) || is_marked(path);
        if !ours || !remove_one(path) {
            return;
        }
    }
}

/// Kills whoever is in a cgroup, of whom nobody knows more, and waits for their end.
pub fn kill_all(path: &Path, limit: Duration) {
    // Nobody has made it yet.
    if fs::write(path.join("cgroup.kill"), "1").is_err() {
        return;
    }
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        match fs::read(path.join("cgroup.procs")) {
            Ok(left) if !left.is_empty() => thread::sleep(Duration::from_millis(5)),
            _ => return,
        }
    }
}

/// The cgroup that this process was started in, absolute, on a host with cgroup v2.
fn home() -> Option<&'static Path> {
    static HOME: OnceLock<Option<PathBuf>> = OnceLock::new();
    let look = || {
        let text = fs::read_to_string("/proc/self/cgroup").ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
        Some(root()?.join(path.trim_start_matches('/')))
    };
    HOME.get_or_init(look).as_deref()
}

/// Moves this process back to where it was started.
pub fn leave() {
    send_home(process::id());
}

/// Moves a process to where this one was started: a child that has nothing to do with the pod.
pub fn send_home(pid: u32) {
    if let Some(Err(e)) = home().map(|home| move_to(home, pid)) {
        log::warn!("move process {pid} out of the pod's cgroup: {e}");
    }
}

fn move_to(cgroup: &Path, pid: u32) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string())
}

/// The files of a cgroup that say what is used, by name; those that are there.
pub fn files(path: &Path) -> HashMap<String, String> {
    let read = |name: &&str| {
        Some((
            (*name).to_owned(),
            fs::read_to_string(path.join(name)).ok()?,
        ))
    };
    STATS.iter().filter_map(read).collect()
}

/// Whether it is gone.
fn remove_one(path: &Path) -> bool {
    for attempt in 0..20 {
        match fs::remove_dir(path) {
            Ok(()) => return true,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return true,
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {
                // Another pod's cgroup below a parent of ours keeps it busy for good.
                if attempt == 0 && has_children(path) {
                    return false;
                }
                thread::sleep(Duration::from_millis(2));
            }
            Err(_) => return false,
        }
    }
    false
}

fn has_children(path: &Path) -> bool {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_type().ok())
        .any(|kind| kind.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_both_forms_of_path() {
        let path = |text| relative_path(text).unwrap();
        assert_eq!(path("/default/x"), Path::new("default/x"));
        assert_eq!(path("x"), Path::new("x"));
        assert_eq!(
            path("system.slice:docker:abc"),
            Path::new("system.slice/docker-abc.scope")
        );
        assert_eq!(
            path("kubepods-burstable-pod1.slice:cri-containerd:abc"),
            Path::new(
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/\
                 cri-containerd-abc.scope"
            )
        );
    }

    #[test]
    fn refuses_what_leads_out() {
        for text in ["", "/", "/../x", "a/../../b", "../x.slice:a:b"] {
            assert!(relative_path(text).is_err(), "{text}");
        }
    }

    #[test]
    fn removes_what_it_made_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("old")).unwrap();
        let first = PodCgroup::create(root.path(), Path::new("old/ns/a")).unwrap();
        let second = PodCgroup::create(root.path(), Path::new("old/ns/b")).unwrap();
        assert!(root.path().join("old/ns/a").is_dir());
        remove(first.made());
        assert!(!root.path().join("old/ns/a").exists());
        assert!(root.path().join("old/ns/b").exists());
        remove(second.made());
        assert!(root.path().join("old").exists());
        // Made by the first, and left empty by the second.
        assert!(!root.path().join("old/ns").exists());
    }

    #[test]
    fn a_shared_parent_goes_with_the_last_pod_whoever_made_it() {
        let Some(root) = root() else {
            return;
        };
        let parent = PathBuf::from(format!("husk-test-{}", std::process::id()));
        let first = PodCgroup::create(root, &parent.join("pods/a")).unwrap();
        let second = PodCgroup::create(root, &parent.join("pods/b")).unwrap();
        assert_eq!(second.made(), [root.join(&parent).join("pods/b")]);
        remove(first.made());
        assert!(second.path().exists());
        remove(second.made());
        assert!(!root.join(&parent).exists());

        // What somebody else made stays, however empty.
        fs::create_dir(root.join(&parent)).unwrap();
        let pod = PodCgroup::create(root, &parent.join("a")).unwrap();
        remove(pod.made());
        assert!(!pod.path().exists());
        fs::remove_dir(root.join(&parent)).unwrap();
    }

    #[test]
    fn a_shim_that_has_joined_leaves_before_the_end() {
        let Some(root) = root() else {
            return;
        };
        let name = PathBuf::from(format!("husk-test-join-{}", process::id()));
        let cgroup = PodCgroup::create(root, &name).unwrap();
        let is_in = |path: &Path| {
            let text = fs::read_to_string("/proc/self/cgroup").unwrap();
            text.lines()
                .any(|line| line == format!("0::/{}", path.display()))
        };
        cgroup.join().unwrap();
        assert!(is_in(&name));
        leave();
        assert!(!is_in(&name));
        remove(cgroup.made());
        assert!(!cgroup.path().exists());
    }

    #[test]
    fn what_cannot_be_opened_is_not_left() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("ns")).unwrap();
        fs::write(root.path().join("ns/a"), "").unwrap();
        assert!(PodCgroup::create(root.path(), Path::new("ns/a")).is_err());
        assert!(PodCgroup::create(root.path(), Path::new("ns/new/\0")).is_err());
        assert!(!root.path().join("ns/new").exists());
    }
}
