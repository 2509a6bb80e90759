//! `husk inspect POD`: the jail of a pod's VMM as the kernel shows it, one fact a line. It changes nothing.
//!
//! It prints to a string. What a VMM chooses, such as the names of its threads, is escaped: it may have been
//! taken over.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::record::{self, ProcessId, RECORDS, Record};

#[derive(Debug, Error)]
pub enum InspectError {
    #[error("pod {0:?}: no such pod")]
    Unknown(String),
    #[error("pod {id:?} is in more than one namespace; say which: {}", .found.join(" or "))]
    Ambiguous { id: String, found: Vec<String> },
    #[error("pod {pod}: {path}: {cause}")]
    Record {
        pod: String,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("pod {0}: it has no VMM")]
    NoVmm(String),
    #[error("pod {pod}: look at {path}: {cause}")]
    Process {
        pod: String,
        path: String,
        cause: io::Error,
    },
}

/// Describes the jail of `pod`, which is an id, of the pod or of a container in it, or NAMESPACE/ID.
///
/// # Errors
/// There is no such pod, or it ends meanwhile, or the caller is not root.
pub fn inspect(pod: &str) -> Result<String, InspectError> {
    let (name, vmm) = find(Path::new(RECORDS), pod)?;
    describe(&name, vmm.pid).map_err(|(path, cause)| InspectError::Process {
        pod: name,
        path,
        cause,
    })
}

/// The pod's name, with its namespace, and its VMM.
fn find(records: &Path, pod: &str) -> Result<(String, ProcessId), InspectError> {
    let unknown = || InspectError::Unknown(pod.to_owned());
    let places: Vec<(String, String)> = match pod.split_once('/') {
        Some((namespace, id)) => vec![(namespace.to_owned(), id.to_owned())],
        None => fs::read_dir(records)
            .map_err(|_| unknown())?
            .flatten()
            .map(|entry| {
                (
                    entry.file_name().to_string_lossy().into_owned(),
                    pod.to_owned(),
                )
            })
            .collect(),
    };
    // A name is no path.
    let plain = |name: &str| !matches!(name, "" | "." | "..") && !name.contains('/');
    let read = |namespace: &str, id: &str| {
        let directory = record::directory(records, namespace, id);
        match Record::read(&directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(InspectError::Record {
                pod: format!("{namespace}/{id}"),
                path: directory,
                cause,
            }),
            Ok(record) => Ok(Some(record)),
        }
    };
    let mut found = Vec::new();
    for (namespace, id) in places {
        if plain(&namespace) && plain(&id) {
            if let Some(record) = read(&namespace, &id)? {
                found.push((namespace, id, record));
            }
        }
    }
    let (namespace, id, record) = match found.len() {
        0 => return Err(unknown()),
        1 => found.swap_remove(0),
        _ => {
            let found = found.iter().map(|(ns, id, _)| format!("{ns}/{id}"));
            return Err(InspectError::Ambiguous {
                id: pod.to_owned(),
                found: found.collect(),
            });
        }
    };
    // The pod's own record names the VMM, those of its further containers name the pod.
    let (name, record) = match record.pod == id {
        true => (format!("{namespace}/{id}"), Some(record)),
        false => {
            let name = format!("{namespace}/{}", record.pod);
            (name, read(&namespace, &record.pod)?)
        }
    };
    let vmm = record.and_then(|record| record.vmm);
    // Its pid may be another process's by now.
    match vmm.filter(|vmm| ProcessId::of(vmm.pid).is_ok_and(|now| now == *vmm)) {
        Some(vmm) => Ok((name, vmm)),
        None => Err(InspectError::NoVmm(name)),
    }
}

/// What could not be looked at, and why.
type Failure = (String, io::Error);

fn describe(pod: &str, pid: u32) -> Result<String, Failure> {
    let process = format!("/proc/{pid}");
    let mut text = format!("pod: {pod}\nprocess: {pid}\n");
    let mut say = |line: String| text.extend([line.as_str(), "\n"]);
    namespaces(&process, &mut say)?;
    say(format!("user ids: {}", maps(&process)?));
    say(format!("root: {}", root(&process)?));
    let environment = read(&format!("{process}/environ"))?;
    say(match environment.bytes().all(|byte| byte == 0) {
        true => "environment: empty".to_owned(),
        false => "environment: not empty".to_owned(),
    });
    limits(&process, &mut say)?;
    let status = read(&format!("{process}/status"))?;
    let set = |name| capabilities(field(&status, name));
    say(format!("capabilities it can ever have: {}", set("CapBnd")));
    say(format!(
        "capabilities of what it executes: {}",
        set("CapAmb")
    ));
    say(landlock());
    for thread in numbers(&format!("{process}/task"))? {
        match describe_thread(&process, thread) {
            Ok(line) => say(line),
            // It may have ended meanwhile.
            Err((_, e))
                if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            }
            Err(e) => return Err(e),
        }
    }
    for fd in numbers(&format!("{process}/fd"))? {
        // It may have been closed meanwhile.
        if let Some(what) = describe_descriptor(&process, fd) {
            say(format!("fd {fd}: {what}"));
        }
    }
    Ok(text)
}

fn namespaces(process: &str, say: &mut impl FnMut(String)) -> Result<(), Failure> {
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"] {
        let link = |of: &str| {
            let path = format!("{of}/ns/{kind}");
            fs::read_link(&path).map_err(|e| (path, e))
        };
        // A kernel without this kind has nothing to share.
        let Ok(hosts) = link("/proc/self") else {
            continue;
        };
        say(match link(process)? == hosts {
            true => format!("namespace {kind}: the host's"),
            false => format!("namespace {kind}: not the host's"),
        });
    }
    Ok(())
}

/// The maps of user and group ids, each as "inside outside count".
fn maps(process: &str) -> Result<String, Failure> {
    let map = |name| {
        let text = read(&format!("{process}/{name}"))?;
        let lines = text.lines().map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.join(" ")
        });
        Ok(lines.collect::<Vec<_>>().join(", "))
    };
    let (users, groups): (String, String) = (map("uid_map")?, map("gid_map")?);
    Ok(match users == "0 0 4294967295" && users == groups {
        true => "all mapped to themselves".to_owned(),
        false => format!("users {users}; groups {groups}"),
    })
}

fn root(process: &str) -> Result<String, Failure> {
    let path = format!("{process}/root/");
    let entries = fs::read_dir(&path).map_err(|e| (path, e))?.count();
    let mounts = read(&format!("{process}/mountinfo"))?;
    let mounts: Vec<&str> = mounts.lines().collect();
    // proc_pid_mountinfo(5): the options of the mount are field 6.
    let read_only = mounts.iter().all(|mount| {
        let options = mount.split(' ').nth(5).unwrap_or_default();
        options.split(',').any(|option| option == "ro")
    });
    let access = if read_only { "read-only" } else { "writable" };
    Ok(match (entries, mounts.len()) {
        (0, 1) => format!("empty, {access}, the only mount"),
        (entries, mounts) => format!("{entries} entries, {access}, {mounts} mounts"),
    })
}

fn limits(process: &str, say: &mut impl FnMut(String)) -> Result<(), Failure> {
    let text = read(&format!("{process}/limits"))?;
    for (name, shown) in [
        ("Max core file size", "core dump"),
        ("Max data size", "writable memory"),
        ("Max open files", "open files"),
        ("Max locked memory", "locked memory"),
        ("Max msgqueue size", "message queues"),
    ] {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let mut fields = line.unwrap_or_default().split_whitespace();
        // Soft limit, hard limit, unit.
        if let (Some(_), Some(hard)) = (fields.next(), fields.next()) {
            let unit = fields.next().filter(|_| hard != "unlimited");
            let unit = unit.map(|unit| format!(" {unit}")).unwrap_or_default();
            say(format!("limit of {shown}: {hard}{unit}"));
        }
    }
    Ok(())
}

/// Nobody can ask for the domains of another process.
fn landlock() -> String {
    // SAFETY: with this flag (LANDLOCK_CREATE_RULESET_VERSION), the call takes neither memory nor size.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<()>(),
            0,
            1,
        )
    };
    match version {
        1.. => {
            format!("landlock: version {version} in this kernel; domains show to nobody outside")
        }
        _ => "landlock: not in this kernel".to_owned(),
    }
}

fn describe_thread(process: &str, thread: u64) -> Result<String, Failure> {
    let status = read(&format!("{process}/task/{thread}/status"))?;
    let name = field(&status, "Name").escape_debug();
    let filters = field(&status, "Seccomp_filters");
    let seccomp = match field(&status, "Seccomp") {
        "0" => "none".to_owned(),
        "2" => format!("{filters} filters"),
        other => format!("mode {other}"),
    };
    let held = capabilities(field(&status, "CapPrm"));
    let privileges = match field(&status, "NoNewPrivs") {
        "1" => "no new privileges",
        _ => "may gain privileges",
    };
    Ok(format!(
        "thread {thread} {name}: seccomp {seccomp}; capabilities {held}; {privileges}"
    ))
}

/// What a descriptor is; none if it is gone.
fn describe_descriptor(process: &str, fd: u64) -> Option<String> {
    let path = format!("{process}/fd/{fd}");
    let target = fs::read_link(&path).ok()?;
    let target = target.to_string_lossy().escape_debug().to_string();
    let number = i32::try_from(fd).unwrap_or(i32::MAX);
    Some(match (number, file_system(&path)) {
        (2, _) => format!("its log ({target})"),
        (husk_proto::MACHINE_FD, _) => format!("the machine service ({target})"),
        (husk_proto::DESCRIPTOR_FD, _) => format!("where descriptors come from ({target})"),
        (_, Some("procfs")) => {
            let inode = |path: &str| fs::metadata(path).map(|m| (m.dev(), m.ino())).ok();
            match inode(&path) == inode(&format!("{process}/fd")) {
                true => "its own descriptors as a directory, cut out of procfs".to_owned(),
                false => format!("{target} on procfs"),
            }
        }
        (_, Some(kind)) => format!("{target} on {kind}"),
        (_, None) => target,
    })
}

/// The name of the file system that `path` is on, if it is one that lets root change the host.
fn file_system(path: &str) -> Option<&'static str> {
    let path = std::ffi::CString::new(path).ok()?;
    // SAFETY: statfs is plain data, for which zeroes are a value.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a C string, and room for one statfs.
    match unsafe { libc::statfs(path.as_ptr(), &raw mut found) } {
        0 => HOSTS.iter().find(|(magic, _)| *magic == found.f_type),
        _ => None,
    }
    .map(|(_, name)| *name)
}

/// Linux `include/uapi/linux/magic.h`.
const HOSTS: [(i64, &str); 8] = [
    (0x9fa0, "procfs"),
    (0x6265_6572, "sysfs"),
    (0x6367_7270, "cgroupfs"),
    (0x27_e0eb, "cgroupfs"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xcafe_4a11, "bpffs"),
];

/// capabilities(7), by number.
const CAPABILITIES: [&str; 41] = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

/// The names of a set that /proc shows in hexadecimal.
fn capabilities(set: &str) -> String {
    let Ok(set) = u64::from_str_radix(set, 16) else {
        return "unknown".to_owned();
    };
    let held = (0..64).filter(|number| set & 1_u64 << number != 0);
    let names = held.map(|number| match CAPABILITIES.get(number) {
        Some(name) => (*name).to_owned(),
        None => number.to_string(),
    });
    match set {
        0 => "none".to_owned(),
        _ => names.collect::<Vec<_>>().join(" "),
    }
}

/// A field of a status file (proc_pid_status(5)).
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let value = |line: &'a str| line.strip_prefix(name)?.strip_prefix(':');
    status.lines().find_map(value).unwrap_or_default().trim()
}

fn read(path: &str) -> Result<String, Failure> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(e) => Err((path.to_owned(), e)),
    }
}

/// The entries of a directory of numbers, ascending.
fn numbers(path: &str) -> Result<Vec<u64>, Failure> {
    let entries = fs::read_dir(path).map_err(|e| (path.to_owned(), e))?;
    let names = entries.flatten().map(|entry| entry.file_name());
    let mut numbers: Vec<u64> = names
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use super::*;

    fn record(pod: &str, vmm: Option<ProcessId>) -> Record {
        Record {
            pod: pod.to_owned(),
            socket: "/s".into(),
            shim: ProcessId { pid: 1, started: 1 },
            vmm,
            cgroups: Vec::new(),
            network: None,
        }
    }

    #[test]
    fn a_pod_is_found_by_any_of_its_names() {
        let records = tempfile::tempdir().unwrap();
        let own = ProcessId::of(std::process::id()).unwrap();
        let gone = ProcessId { started: 1, ..own };
        for (namespace, id, pod, vmm) in [
            ("default", "a", "a", Some(own)),
            ("default", "in-a", "a", None),
            ("k8s.io", "b", "b", Some(own)),
            ("default", "b", "b", Some(own)),
            ("default", "dead", "dead", Some(gone)),
            ("default", "early", "early", None),
        ] {
            let directory = record::directory(records.path(), namespace, id);
            record(pod, vmm).write(&directory).unwrap();
        }
        let find = |name| find(records.path(), name).map_err(|e| e.to_string());
        for (asked, found) in [
            ("a", "default/a"),
            ("in-a", "default/a"),
            ("default/a", "default/a"),
            ("k8s.io/b", "k8s.io/b"),
        ] {
            assert_eq!(find(asked), Ok((found.to_owned(), own)), "{asked}");
        }
        for (asked, error) in [
            ("c", "pod \"c\": no such pod"),
            ("default/c", "pod \"default/c\": no such pod"),
            ("../default/a", "pod \"../default/a\": no such pod"),
            ("", "pod \"\": no such pod"),
            ("dead", "pod default/dead: it has no VMM"),
            ("early", "pod default/early: it has no VMM"),
        ] {
            assert_eq!(find(asked), Err(error.to_owned()), "{asked}");
        }
        let error = find("b").unwrap_err();
        assert!(error.contains("default/b") && error.contains("k8s.io/b"));
    }

    #[test]
    fn a_process_without_a_jail_is_described_as_such() {
        let text = describe("default/x", std::process::id()).unwrap();
        for line in ["namespace mnt: the host's", "pod: default/x"] {
            assert!(text.lines().any(|found| found == line), "{text}");
        }
        assert!(!text.contains("root: empty"), "{text}");
        // Out of the way of the first descriptors, which are described by what they are for.
        let procfs = fs::File::open("/proc/sys").unwrap();
        // SAFETY: a descriptor of our own, and a new one that nobody else has.
        let procfs = unsafe {
            OwnedFd::from_raw_fd(libc::fcntl(procfs.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 64))
        };
        let text = describe("default/x", std::process::id()).unwrap();
        assert!(text.contains("/proc/sys on procfs"), "{text}");
        drop(procfs);
    }

    #[test]
    fn capabilities_have_names() {
        assert_eq!(capabilities("0000000000000000"), "none");
        assert_eq!(
            capabilities("0000000080000003"),
            "chown dac_override setfcap"
        );
        assert_eq!(capabilities("0000020000000000"), "41");
    }
}
