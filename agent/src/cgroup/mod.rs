//! A container's cgroup: made before its first process, removed after its last.
//!
//! Owned by `container`. Version 2 only. The agent itself stays in the root cgroup, which alone may
//! have both processes and controlled children; containers get a directory at their `cgroupsPath`
//! below it. Everything here is short and synchronous, but for what is documented to wait, and never
//! leaves the directory.

pub mod settings;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, openat};
use settings::{Refused, Setting};
use thiserror::Error;
use tokio::time::{Instant, sleep};

use crate::device_filter::{self, FilterError};
use crate::spec::Problem;
use crate::spec::resources::{DeviceRule, Resources};

/// Of a file read from a cgroup (agent.proto, `StatsResponse`).
const FILE_LIMIT: u64 = 64 << 10;
/// How deep a container may nest cgroups of its own before the agent stops looking.
const DEPTH_LIMIT: usize = 16;
/// How long the kernel gets to freeze, or to end killed processes.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(2);

#[derive(Debug, Error)]
pub enum CgroupError {
    #[error(transparent)]
    Spec(#[from] Problem),
    #[error("linux.cgroupsPath: cgroup {0} is in use already")]
    Exists(PathBuf),
    #[error("{action} {path}: {cause}")]
    File {
        action: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("write {value:?} to {path}: {cause}")]
    Write {
        value: String,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("cgroup {path}: {0}", path = .1.display())]
    Filter(FilterError, PathBuf),
    #[error("linux.resources.memory: rejecting {what} limit {limit} <= usage {used}")]
    BelowUse {
        what: &'static str,
        limit: i64,
        used: i64,
    },
    #[error(
        "linux.resources.blockIO: {0:?}: the guest has no such device, and its limit cannot be kept"
    )]
    NoDevice(String),
    #[error("unified resource {file:?} can't be set: controller {controller:?} not available")]
    NoController { file: String, controller: String },
    #[error("cgroup {path} is not {state} after {patience:?}", patience = PATIENCE)]
    Impatient { path: PathBuf, state: &'static str },
}

/// The cgroup of one container.
#[derive(Debug)]
pub struct Cgroup {
    root: PathBuf,
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the cgroup at `path` below `root` (ancestors included, with all controllers that there are).
    pub fn create(root: &Path, path: &str) -> Result<Self, CgroupError> {
        let mut at = root.to_path_buf();
        let mut made = false;
        for part in path
            .split('/')
            .filter(|part| !part.is_empty() && *part != ".")
        {
            hand_down_controllers(&at)?;
            at.push(part);
            made = match fs::create_dir(&at) {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                Err(cause) => {
                    return Err(CgroupError::File {
                        action: "make cgroup",
                        path: at,
                        cause,
                    });
                }
            };
        }
        if !made {
            return Err(CgroupError::Exists(at));
        }
        let directory = File::open(&at).map_err(|cause| CgroupError::File {
            action: "open cgroup",
            path: at.clone(),
            cause,
        })?;
        Ok(Self {
            root: root.to_path_buf(),
            path: at,
            directory: directory.into(),
        })
    }

    /// Lets `owner` make cgroups below, and move its processes between them: what the kernel says may be
    /// delegated, and no limit (Documentation/admin-guide/cgroup-v2.rst, "Delegation").
    pub fn give_to(&self, owner: u32) -> Result<(), CgroupError> {
        const DEFAULT: &str = "cgroup.procs\ncgroup.subtree_control\ncgroup.threads\n";
        let files = fs::read_to_string("/sys/kernel/cgroup/delegate");
        let files = files.unwrap_or_else(|_| DEFAULT.into());
        for name in std::iter::once("").chain(files.lines()) {
            let path = self.path.join(name);
            match std::os::unix::fs::lchown(&path, Some(owner), None) {
                // Not every kernel and every cgroup has all of them.
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                    return Err(CgroupError::File {
                        action: "change the owner of",
                        path,
                        cause,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A second handle on the same cgroup, for another thread.
    pub fn second(&self) -> io::Result<Self> {
        Ok(Self {
            root: self.root.clone(),
            path: self.path.clone(),
            directory: self.directory.try_clone()?,
        })
    }

    /// For `CLONE_INTO_CGROUP`.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Writes the limits of `resources`, at creation and for an update. Device rules are not among
    /// them: runc does not change those of a running container either.
    pub fn apply(&self, resources: &Resources) -> Result<(), CgroupError> {
        let settings = settings::settings(resources)?;
        let memory = &resources.memory;
        if memory.check_before_update == Some(true) {
            let used = self.number("memory.current").unwrap_or(0);
            for (what, limit) in [("memory+swap", memory.swap), ("memory", memory.limit)] {
                if let Some(limit) = limit.filter(|&limit| limit > 0 && limit <= used) {
                    return Err(CgroupError::BelowUse { what, limit, used });
                }
            }
        }
        for setting in settings {
            if let Err(error) = self.write(&setting.file, &setting.value) {
                self.judge(&setting, error)?;
            }
        }
        Ok(())
    }

    /// What a refusal of the kernel means.
    fn judge(&self, setting: &Setting, error: CgroupError) -> Result<(), CgroupError> {
        let CgroupError::Write { cause, .. } = &error else {
            return Err(error);
        };
        let number = cause.raw_os_error();
        let missing = matches!(number, Some(libc::ENOENT | libc::EPERM | libc::EACCES));
        match setting.refused {
            Refused::Harmless(harmless) if number == Some(harmless) => Ok(()),
            Refused::Unified if missing => {
                let controller = setting.file.split('.').next().unwrap_or_default();
                let there = self.read("cgroup.controllers").unwrap_or_default();
                if controller == "cgroup" || there.split_whitespace().any(|one| one == controller) {
                    return Err(error);
                }
                Err(CgroupError::NoController {
                    file: setting.file.clone(),
                    controller: controller.into(),
                })
            }
            _ if setting.file == "io.max" && number == Some(libc::ENODEV) => {
                Err(CgroupError::NoDevice(setting.value.clone()))
            }
            _ => Err(error),
        }
    }

    /// To be called once, before the first process.
    pub fn filter_devices(&self, rules: &[DeviceRule]) -> Result<(), CgroupError> {
        device_filter::attach(self.as_fd(), rules)
            .map_err(|error| CgroupError::Filter(error, self.path.clone()))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        // No O_CREAT: a file that the kernel does not have is an error that names it.
        let written = openat(
            &self.directory,
            file,
            OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        )
        .map_err(io::Error::from)
        .and_then(|fd| File::from(fd).write_all(value.as_bytes()));
        written.map_err(|cause| CgroupError::Write {
            value: value.into(),
            path: self.path.join(file),
            cause,
        })
    }

    /// The first 64 KiB of one file; `None` when there is no such file or it cannot be read.
    pub fn read(&self, file: &str) -> Option<String> {
        let fd = openat(
            &self.directory,
            file,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
        )
        .ok()?;
        let mut bytes = Vec::new();
        File::from(fd)
            .take(FILE_LIMIT)
            .read_to_end(&mut bytes)
            .ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn number(&self, file: &str) -> Option<i64> {
        self.read(file)?.trim().parse().ok()
    }

    /// How many processes the kernel has killed for want of memory, ever.
    pub fn oom_kills(&self) -> u64 {
        self.read("memory.events")
            .and_then(|text| value(&text, "oom_kill"))
            .unwrap_or(0)
    }

    /// All processes, those in cgroups that the container made for itself included.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        collect(&self.path, DEPTH_LIMIT, &mut |directory| {
            let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            // 0 stands for a process of another pid namespace: there is none outside the agent's.
            pids.extend(
                text.lines()
                    .filter_map(|line| line.parse().ok())
                    .filter(|&pid: &u32| pid != 0),
            );
        });
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// The cgroup that a process of this container is in now, which may be one that the container made
    /// for itself: this one holds no processes any more once its children have controllers
    /// (cgroup-v2, "No Internal Process Constraint").
    pub fn of_process(&self, pid: i32) -> Option<OwnedFd> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let path = self.root.join(path);
        // Whatever became of the process, nobody is put outside of the container.
        let outside = path.components().any(|part| part == Component::ParentDir);
        if outside || !path.starts_with(&self.path) {
            return None;
        }
        File::open(path).ok().map(OwnedFd::from)
    }

    pub fn kill_all(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Returns when every process stands still, or runs again. If not all of them can be made to stand
    /// still, all run again.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        if !frozen {
            self.write("cgroup.freeze", "0")?;
            return self.wait_for("frozen", 0, "thawed").await;
        }
        self.write("cgroup.freeze", "1")?;
        let done = self.wait_for("frozen", 1, "frozen").await;
        if done.is_err() {
            // The caller takes the container for running, and would refuse to resume it.
            self.write("cgroup.freeze", "0")?;
        }
        done
    }

    /// Whether the container is paused.
    pub fn is_frozen(&self) -> bool {
        self.number("cgroup.freeze") == Some(1)
    }

    async fn wait_for(
        &self,
        key: &str,
        wanted: u64,
        state: &'static str,
    ) -> Result<(), CgroupError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let events = self.read("cgroup.events").unwrap_or_default();
            if value(&events, key) == Some(wanted) {
                return Ok(());
            }
            if Instant::now() >= end {
                return Err(CgroupError::Impatient {
                    path: self.path.clone(),
                    state,
                });
            }
            sleep(POLL).await;
        }
    }

    /// Kills what is left inside and removes the cgroup, its descendants, and ancestors left empty.
    pub async fn remove(&self) -> Result<(), CgroupError> {
        // A frozen cgroup does kill, but pausing must not outlive the container either way.
        self.kill_all().ok();
        self.wait_for("populated", 0, "empty").await?;
        let mut inside = Vec::new();
        collect(&self.path, DEPTH_LIMIT, &mut |directory| {
            inside.push(directory.to_path_buf())
        });
        for directory in inside.iter().rev() {
            remove_directory(directory).await?;
        }
        for ancestor in self
            .path
            .ancestors()
            .skip(1)
            .take_while(|ancestor| **ancestor != *self.root)
        {
            if fs::remove_dir(ancestor).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// The kernel may hold a cgroup for a moment after its last process was reaped.
async fn remove_directory(path: &Path) -> Result<(), CgroupError> {
    let end = Instant::now() + PATIENCE;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                sleep(POLL).await
            }
            Err(cause) => {
                return Err(CgroupError::File {
                    action: "remove cgroup",
                    path: path.into(),
                    cause,
                });
            }
        }
    }
}

/// Calls `visit` for a directory and all below it, parents first.
fn collect(directory: &Path, depth: usize, visit: &mut dyn FnMut(&Path)) {
    visit(directory);
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), depth, visit);
        }
    }
}

/// Lets the children of `directory` have every controller that it has itself.
fn hand_down_controllers(directory: &Path) -> Result<(), CgroupError> {
    let read = |file: &str| {
        let path = directory.join(file);
        fs::read_to_string(&path).map_err(|cause| CgroupError::File {
            action: "read",
            path,
            cause,
        })
    };
    let enabled = read("cgroup.subtree_control")?;
    let missing: Vec<String> = read("cgroup.controllers")?
        .split_whitespace()
        .filter(|controller| !enabled.split_whitespace().any(|other| other == *controller))
        .map(|controller| format!("+{controller}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let (path, value) = (directory.join("cgroup.subtree_control"), missing.join(" "));
    fs::write(&path, &value).map_err(|cause| CgroupError::Write { value, path, cause })
}

/// The number after `key` in a flat keyed file.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, number) = line.split_once(' ')?;
        (name == key).then(|| number.trim().parse().ok())?
    })
}

/// Files of [`Cgroup::read`] that make up a container's statistics.
pub fn statistics(cgroup: &Cgroup) -> impl Iterator<Item = (String, String)> + '_ {
    const FILES: [&str; 27] = [
        "cgroup.stat",
        "cpu.stat",
        "cpu.max",
        "cpu.weight",
        "cpu.pressure",
        "io.stat",
        "io.pressure",
        "memory.current",
        "memory.peak",
        "memory.min",
        "memory.low",
        "memory.high",
        "memory.max",
        "memory.stat",
        "memory.events",
        "memory.events.local",
        "memory.pressure",
        "memory.swap.current",
        "memory.swap.peak",
        "memory.swap.max",
        "memory.swap.events",
        "pids.current",
        "pids.peak",
        "pids.max",
        "pids.events",
        "rdma.current",
        "rdma.max",
    ];
    let huge = fs::read_dir(&cgroup.path).into_iter().flatten().flatten();
    let huge = huge
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("hugetlb."));
    FILES
        .into_iter()
        .map(String::from)
        .chain(huge)
        .filter_map(|file| {
            let text = cgroup.read(&file)?;
            Some((file, text))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_below_the_use_is_refused_where_that_is_asked_for() {
        let path = std::env::temp_dir().join(format!("husk-use-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        for (file, text) in [
            ("memory.current", "4096\n"),
            ("memory.max", ""),
            ("memory.swap.max", ""),
        ] {
            fs::write(path.join(file), text).unwrap();
        }
        let cgroup = Cgroup {
            root: path.clone(),
            directory: File::open(&path).unwrap().into(),
            path: path.clone(),
        };
        let apply = |memory: &str| {
            let resources = format!(r#"{{"memory":{memory}}}"#);
            let resources = crate::spec::parse(resources.as_bytes()).unwrap();
            cgroup.apply(&resources).map_err(|error| error.to_string())
        };
        let refused = apply(r#"{"limit":4096,"checkBeforeUpdate":true}"#).unwrap_err();
        let swap = apply(r#"{"limit":5000,"swap":4000,"checkBeforeUpdate":true}"#);
        let above = apply(r#"{"limit":4097,"swap":4098,"checkBeforeUpdate":true}"#);
        let unasked = apply(r#"{"limit":10}"#);
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(
            refused,
            "linux.resources.memory: rejecting memory limit 4096 <= usage 4096"
        );
        assert!(swap.is_err());
        assert_eq!((above, unasked), (Ok(()), Ok(())));
    }

    /// What cannot be frozen (a process in an uninterruptible sleep) must go on, or nothing would
    /// resume the rest.
    #[tokio::test(start_paused = true)]
    async fn a_freeze_in_vain_is_taken_back() {
        let path = std::env::temp_dir().join(format!("husk-freeze-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        for (file, text) in [
            ("cgroup.freeze", "0"),
            ("cgroup.events", "populated 1\nfrozen 0\n"),
        ] {
            fs::write(path.join(file), text).unwrap();
        }
        let cgroup = Cgroup {
            root: path.clone(),
            directory: File::open(&path).unwrap().into(),
            path: path.clone(),
        };
        let error = cgroup.freeze(true).await.unwrap_err().to_string();
        let left = cgroup.is_frozen();
        fs::remove_dir_all(path).unwrap();
        assert!(error.contains("is not frozen after"), "{error}");
        assert!(!left);
    }

    #[test]
    fn keyed_files() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(value(text, "oom_kill"), Some(2));
        assert_eq!(value(text, "oom_k"), None);
        assert_eq!(value("oom_kill x\n", "oom_kill"), None);
    }
}
