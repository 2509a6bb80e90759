//! Files around the process: mounts, what may be read and written, devices, cgroup files, sysctls, files it makes.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Read,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use super::{Report, answer, content, said};

/// Those that specifications mask or make read-only by default, and those that containers usually have.
const PATHS: [&str; 36] = [
    "/",
    "/dev",
    "/dev/mqueue",
    "/dev/pts",
    "/dev/shm",
    "/etc",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/proc",
    "/proc/acpi",
    "/proc/asound",
    "/proc/bus",
    "/proc/cmdline",
    "/proc/fs",
    "/proc/interrupts",
    "/proc/irq",
    "/proc/kcore",
    "/proc/keys",
    "/proc/kmsg",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sys/kernel/hostname",
    "/proc/sys/vm/drop_caches",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/run",
    "/sys",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/cgroup",
    "/sys/kernel",
    "/tmp",
];

const CGROUP: [&str; 34] = [
    "cgroup.controllers",
    "cgroup.max.depth",
    "cgroup.max.descendants",
    "cgroup.subtree_control",
    "cgroup.type",
    "cpu.idle",
    "cpu.max",
    "cpu.max.burst",
    "cpu.weight",
    "cpu.weight.nice",
    "cpuset.cpus",
    "cpuset.cpus.partition",
    "cpuset.mems",
    "hugetlb.2MB.max",
    "hugetlb.2MB.rsvd.max",
    "hugetlb.1GB.max",
    "io.bfq.weight",
    "io.max",
    "io.weight",
    "memory.high",
    "memory.low",
    "memory.max",
    "memory.min",
    "memory.oom.group",
    "memory.swap.high",
    "memory.swap.max",
    "memory.zswap.max",
    "memory.zswap.writeback",
    "misc.max",
    "pids.max",
    "rdma.max",
    "cpu.uclamp.min",
    "cpu.uclamp.max",
    "cgroup.freeze",
];

const SYSCTLS: [&str; 27] = [
    "kernel/domainname",
    "kernel/hostname",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
    "kernel/auto_msgmni",
    "fs/mqueue/msg_default",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_default",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/queues_max",
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv4/ping_group_range",
    "net/ipv4/tcp_keepalive_time",
    "net/ipv4/tcp_syncookies",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv6/conf/all/disable_ipv6",
    "kernel/pid_max",
    "user/max_user_namespaces",
];

pub fn look(report: &mut Report, more: &[String]) {
    mounts(report);
    for path in PATHS.iter().copied().chain(more.iter().map(String::as_str)) {
        report.say(format!("path {path}"), path_line(Path::new(path)));
    }
    devices(report);
    report.say_file("self/cgroup", "/proc/self/cgroup");
    for name in CGROUP {
        report.say_file(format!("cgroup {name}"), format!("/sys/fs/cgroup/{name}"));
    }
    for name in SYSCTLS {
        let words = content(format!("/proc/sys/{name}"));
        let words: Vec<_> = words.split_whitespace().collect();
        report.say(format!("sysctl {name}"), words.join(" "));
    }
    let mut links: Vec<_> = fs::read_dir("/sys/class/net")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    links.sort();
    report.say("network", links.join(" "));
    report.say_file("network lo flags", "/sys/class/net/lo/flags");
    created(report);
}

fn mounts(report: &mut Report) {
    let mut seen: BTreeMap<String, u32> = BTreeMap::new();
    let mut order = Vec::new();
    for line in content("/proc/self/mountinfo").lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let before: Vec<_> = before.split(' ').collect();
        let after: Vec<_> = after.split(' ').collect();
        let (Some([_, _, _, root, destination, options]), Some([kind, source, of_kind])) =
            (before.get(..6), after.get(..3))
        else {
            continue;
        };
        let count = seen.entry((*destination).to_owned()).or_default();
        *count += 1;
        let name = if *count > 1 {
            format!("{destination} ({count})")
        } else {
            (*destination).to_owned()
        };
        let propagation: Vec<_> = before
            .get(6..)
            .unwrap_or_default()
            .iter()
            .map(|field| field.split(':').next().unwrap_or_default())
            .collect();
        let propagation = if propagation.is_empty() {
            "private".to_owned()
        } else {
            propagation.join(" ")
        };
        report.say(format!("mount {name} options"), options);
        report.say(format!("mount {name} propagation"), propagation);
        report.say(format!("mount {name} root"), root);
        report.say(format!("mount {name} source"), source);
        report.say(format!("mount {name} type"), format!("{kind} {of_kind}"));
        order.push(name);
    }
    report.say("mounts", order.join(" "));
}

/// Kind, mode, owner; whether it opens for reading and writing, and whether a directory has entries and takes new ones.
fn path_line(path: &Path) -> String {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) => return said(&error),
    };
    let mut line = format!("{} {}:{}", kind(&meta), meta.uid(), meta.gid());
    if meta.is_dir() {
        let read = fs::read_dir(path).map(|entries| entries.take(1).count());
        line += &read.map_or_else(
            |error| said(&error),
            |count| {
                if count == 0 {
                    " empty".into()
                } else {
                    " has entries".into()
                }
            },
        );
        let new = path.join(".husk-probe");
        let made = File::create_new(&new);
        line += &made.map_or_else(
            |error| format!(", create: {}", said(&error)),
            |_| ", create: yes".into(),
        );
        let _ = fs::remove_file(new);
    } else if meta.is_file() || meta.file_type().is_char_device() {
        let read = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        line += &match read {
            Ok(mut file) => match file.read(&mut [0; 1]) {
                Ok(0) => ", read: empty".to_owned(),
                Ok(_) => ", read: yes".to_owned(),
                Err(error) => format!(", read: {}", said(&error)),
            },
            Err(error) => format!(", open: {}", said(&error)),
        };
        let write = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path);
        line += &write.map_or_else(
            |error| format!(", write: {}", said(&error)),
            |_| ", write: yes".into(),
        );
    } else if meta.is_symlink() {
        line += &fs::read_link(path)
            .map_or_else(|error| said(&error), |to| format!(" -> {}", to.display()));
    }
    line
}

fn kind(meta: &fs::Metadata) -> String {
    let file = meta.file_type();
    let kind = match () {
        () if file.is_dir() => "directory",
        () if file.is_file() => "file",
        () if file.is_symlink() => "link",
        () if file.is_char_device() => "char",
        () if file.is_block_device() => "block",
        () if file.is_fifo() => "fifo",
        () => "socket",
    };
    let mut text = format!("{kind} {:04o}", meta.mode() & 0o7777);
    if file.is_char_device() || file.is_block_device() {
        let (major, minor) = (
            rustix::fs::major(meta.rdev()),
            rustix::fs::minor(meta.rdev()),
        );
        text += &format!(" {major}:{minor}");
    }
    text
}

fn devices(report: &mut Report) {
    let mut names: Vec<_> = fs::read_dir("/dev")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    names.sort();
    for path in names {
        let line = match fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_dir() => continue,
            Ok(meta) if meta.file_type().is_char_device() || meta.file_type().is_block_device() => {
                let open = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                    .open(&path);
                let open = open.map_or_else(|error| said(&error), |_| "yes".into());
                format!(
                    "{} {}:{}, open: {open}",
                    kind(&meta),
                    meta.uid(),
                    meta.gid()
                )
            }
            _ => path_line(&path),
        };
        report.say(format!("device {}", path.display()), line);
    }
    // What the rules let it make and open, wherever a node may lie at all.
    let place = ["/dev/shm", "/dev", "/tmp"]
        .iter()
        .map(Path::new)
        .find(|path| path.is_dir());
    let path = place.unwrap_or(Path::new("/tmp")).join(".husk-probe-node");
    for (name, letter, major, minor) in [
        ("mem", 'c', 1, 1),
        ("null", 'c', 1, 3),
        ("port", 'c', 1, 4),
        ("full", 'c', 1, 7),
        ("kmsg", 'c', 1, 11),
        ("ttyS0", 'c', 4, 64),
        ("console", 'c', 5, 1),
        ("ptmx", 'c', 5, 2),
        ("tun", 'c', 10, 200),
        ("fuse", 'c', 10, 229),
        ("loop0", 'b', 7, 0),
        ("vda", 'b', 254, 0),
        ("none", 'c', 240, 7),
    ] {
        let mode = if letter == 'c' {
            libc::S_IFCHR
        } else {
            libc::S_IFBLK
        } | 0o600;
        let text = path.display().to_string() + "\0";
        let number = rustix::fs::makedev(major, minor);
        let made = answer(
            libc::SYS_mknod,
            [
                text.as_ptr() as usize,
                mode as usize,
                usize::try_from(number).unwrap_or(0),
                0,
                0,
                0,
            ],
        );
        let how = |read, write| {
            let open = OpenOptions::new()
                .read(read)
                .write(write)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path);
            open.map_or_else(|error| said(&error), |_| "yes".into())
        };
        let line = match made.as_str() {
            "0" => format!(
                "made, read: {}, write: {}",
                how(true, false),
                how(false, true)
            ),
            error => error.to_owned(),
        };
        let _ = fs::remove_file(&path);
        report.say(format!("mknod {letter} {name}"), line);
    }
}

fn created(report: &mut Report) {
    let (file, directory) = (
        Path::new("/tmp/.husk-probe-file"),
        Path::new("/tmp/.husk-probe-directory"),
    );
    let mode = |path: &Path| {
        fs::symlink_metadata(path).map_or_else(
            |error| said(&error),
            |meta| format!("{} {}:{}", kind(&meta), meta.uid(), meta.gid()),
        )
    };
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o777)
        .open(file);
    report.say(
        "new file",
        made.map_or_else(|error| said(&error), |_| mode(file)),
    );
    let made = fs::create_dir(directory);
    report.say(
        "new directory",
        made.map_or_else(|error| said(&error), |()| mode(directory)),
    );
    let _ = fs::remove_file(file);
    let _ = fs::remove_dir(directory);
}
