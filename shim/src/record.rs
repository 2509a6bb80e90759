//! What `delete` needs to know when the shim is gone: one small file per container under
//! `/run/husk/<namespace>/<id>`. The pod's own names its processes; a process is known by pid and
//! start time, as a pid alone may be somebody else's by now.

use std::{
    fs,
    io::{self, Write},
    os::fd::{AsFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process,
};

use serde::{Deserialize, Serialize};

/// The directory of all records.
pub const RECORDS: &str = "/run/husk";

/// A process, for as long as the host is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    /// Clock ticks since boot, field 22 of `/proc/<pid>/stat` (proc(5)).
    pub started: u64,
}

/// The record of one container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The group whose shim runs this container; the pod's own record has its own id here.
    pub pod: String,
    pub socket: PathBuf,
    /// Until the shim has noted itself, the `start` that leaves it behind.
    pub shim: ProcessId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<ProcessId>,
    /// cgroups made for the VMM, outermost first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroups: Vec<PathBuf>,
    /// The pod's network namespace, where it was there before the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<PathBuf>,
}

/// Where the record of container `id` lies.
pub fn directory(records: &Path, namespace: &str, id: &str) -> PathBuf {
    records.join(namespace).join(id)
}

impl Record {
    pub fn read(directory: &Path) -> io::Result<Self> {
        let text = fs::read(directory.join("record.json"))?;
        serde_json::from_slice(&text).map_err(io::Error::other)
    }

    /// Replaces the record as a whole: a reader sees the old one or the new one.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        write(directory, "record.json", &serde_json::to_vec(self)?)
    }
}

/// Puts a file into the directory of a record, which is made if it is not there.
pub fn write(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let mut attempts = 0..8;
    loop {
        match fs::create_dir_all(directory).and_then(|()| replace(&directory.join(name), bytes)) {
            // The end of another pod may remove an empty parent under our feet.
            Err(e) if e.kind() == io::ErrorKind::NotFound && attempts.next().is_some() => {}
            outcome => return outcome,
        }
    }
}

/// Replaces a file as a whole, also for who looks after the host has lost its power: written aside, brought to the
/// disk, and renamed.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".{name}.{}", process::id()));
    let write = || {
        let mut file = fs::File::create(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&aside);
    })
}

/// Removes a record, and the directories above with the last one. A missing one is fine.
pub fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    for above in directory.ancestors().skip(1).take(2) {
        // Fails while other containers have records, which is what is wanted.
        if fs::remove_dir(above).is_err() {
            break;
        }
    }
    Ok(())
}

impl ProcessId {
    /// The process that now has this pid.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name, field 2, may hold anything; the last parenthesis ends it.
        let started = stat
            .rsplit_once(')')
            .and_then(|(_, fields)| fields.split_whitespace().nth(19))
            .and_then(|field| field.parse().ok());
        match started {
            Some(started) => Ok(Self { pid, started }),
            None => Err(io::Error::other(format!(
                "/proc/{pid}/stat has no start time"
            ))),
        }
    }

    /// A descriptor of this very process; none if it is gone, whoever has its pid now.
    pub fn open(self) -> io::Result<Option<OwnedFd>> {
        let Ok(pid) = libc::pid_t::try_from(self.pid) else {
            return Ok(None);
        };
        // SAFETY: pidfd_open(2) takes no pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::ESRCH) => Ok(None),
                _ => Err(error),
            };
        }
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        // SAFETY: the kernel just made this descriptor for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
        // Only now does the pid stay what it is: look whose it is.
        match Self::of(self.pid) {
            Ok(found) if found == self => Ok(Some(pidfd)),
            _ => Ok(None),
        }
    }
}

/// Sends SIGKILL to the process behind `pidfd`; one that is gone is fine.
pub fn kill(pidfd: impl AsFd) -> io::Result<()> {
    signal(pidfd, libc::SIGKILL)
}

/// Sends any signal, as [`kill`] does.
pub fn signal(pidfd: impl AsFd, signal: libc::c_int) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: pidfd_send_signal(2) with no siginfo takes no pointers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            signal,
            std::ptr::null::<()>(),
            0,
        )
    };
    let error = io::Error::last_os_error();
    if result == 0 || error.raw_os_error() == Some(libc::ESRCH) {
        Ok(())
    } else {
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, id};

    use super::*;

    #[test]
    fn comes_back_as_written() {
        let top = tempfile::tempdir().unwrap();
        let directory = directory(&top.path().join("husk"), "default", "x");
        let record = Record {
            pod: "x".into(),
            socket: "/s".into(),
            shim: ProcessId::of(id()).unwrap(),
            vmm: None,
            cgroups: vec!["/c".into()],
            network: Some("/run/netns/a".into()),
        };
        record.write(&directory).unwrap();
        assert_eq!(Record::read(&directory).unwrap(), record);
        remove(&directory).unwrap();
        remove(&directory).unwrap();
        assert!(!top.path().join("husk").exists() && top.path().exists());
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_or_not_at_all() {
        let top = tempfile::tempdir().unwrap();
        let path = top.path().join("file");
        replace(&path, b"a long first text").unwrap();
        // Who has opened it goes on reading what it was.
        let mut old = fs::File::open(&path).unwrap();
        replace(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        let mut text = String::new();
        io::Read::read_to_string(&mut old, &mut text).unwrap();
        assert_eq!(text, "a long first text");
        let taken = top.path().join("directory");
        fs::create_dir(&taken).unwrap();
        assert!(replace(&taken, b"").is_err());
        assert_eq!(fs::read_dir(top.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_process_is_known_by_its_start_time() {
        let mut child = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let known = ProcessId::of(child.id()).unwrap();
        let other = ProcessId {
            started: known.started.wrapping_add(1),
            ..known
        };
        assert!(other.open().unwrap().is_none());
        let pidfd = known.open().unwrap().unwrap();
        kill(&pidfd).unwrap();
        assert!(!child.wait().unwrap().success());
        kill(&pidfd).unwrap();
        assert!(known.open().unwrap().is_none());
    }
}
