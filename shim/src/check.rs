//! `husk check`: what this host lacks to run pods, one line each, with the mend. It changes nothing.

mod containerd;

use std::{
    env,
    ffi::CString,
    fmt,
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use crate::{
    cgroup,
    config::{CONFIG, Config, Sharing},
    core_scheduling, network,
    options::Options,
    record::RECORDS,
    templates::Store,
};

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    pub subject: String,
    pub verdict: Verdict,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Good(String),
    /// Pods run, with less than there could be.
    Advice {
        what: String,
        mend: String,
    },
    /// No pod can run.
    Bad {
        what: String,
        mend: String,
    },
}

impl Finding {
    fn good(subject: &str, what: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            verdict: Verdict::Good(what.into()),
        }
    }

    fn advice(subject: &str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            verdict: Verdict::Advice {
                what: what.into(),
                mend: mend.into(),
            },
        }
    }

    fn bad(subject: &str, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self {
            subject: subject.into(),
            verdict: Verdict::Bad {
                what: what.into(),
                mend: mend.into(),
            },
        }
    }

    pub fn is_bad(&self) -> bool {
        matches!(self.verdict, Verdict::Bad { .. })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject = &self.subject;
        match &self.verdict {
            Verdict::Good(what) => write!(f, "ok      {subject}: {what}"),
            Verdict::Advice { what, mend } => write!(f, "advice  {subject}: {what}; {mend}"),
            Verdict::Bad { what, mend } => write!(f, "bad     {subject}: {what}; {mend}"),
        }
    }
}

/// Looks at everything that a pod needs.
pub fn findings() -> Vec<Finding> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    // SAFETY: geteuid(2) cannot fail.
    let user = unsafe { libc::geteuid() };
    let mut findings = vec![root(user), kernel(&release), virtualization(&cpu), kvm()];
    findings.extend(huge_pages(
        &release,
        &fs::read_to_string("/sys/module/kvm/parameters/nx_huge_pages").unwrap_or_default(),
        &fs::read_to_string("/proc/self/mounts").unwrap_or_default(),
    ));
    findings.push(user_namespaces(
        &fs::read_to_string("/proc/sys/user/max_user_namespaces").unwrap_or_default(),
    ));
    findings.push(seccomp(
        &fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default(),
    ));
    findings.push(landlock(landlock_abi()));
    findings.push(pods_network(network::trial()));
    findings.push(port_forward(network::forwarding_trial()));
    let path = env::var_os("PATH").unwrap_or_default();
    let found = containerd::find(Path::new("/proc"), &path);
    findings.extend(containerd::findings(found.as_ref(), containerd::ask));
    findings.push(writable("state", Path::new(RECORDS)));
    match Config::load(Path::new(CONFIG), &Options::default()) {
        Ok(config) => {
            findings.push(Finding::good("configuration", CONFIG));
            findings.push(file("VMM", "vmm", &config.vmm, b"\x7fELF"));
            findings.push(file("guest kernel", "kernel", &config.kernel, b"\x7fELF"));
            findings.push(file("guest initrd", "initrd", &config.initrd, b"070701"));
            if config.templates != Sharing::Off {
                findings.push(template_directory(&config.template_dir));
            }
            findings.extend(memory(
                config.memory_mib,
                &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
                &fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default(),
            ));
            if config.core_scheduling {
                findings.push(others_off_cores(core_scheduling::on_this_host()));
            }
        }
        Err(e) => {
            let mend = format!("correct or remove {CONFIG}");
            findings.push(Finding::bad("configuration", e.to_string(), mend));
        }
    }
    findings.push(match cgroup::root() {
        Some(root) => Finding::good("cgroup v2", root.display().to_string()),
        None => Finding::advice(
            "cgroup v2",
            "not mounted, so pods are not in cgroups of their own",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
    });
    findings
}

fn root(user: libc::uid_t) -> Finding {
    match user {
        0 => Finding::good("user", "root"),
        user => Finding::bad(
            "user",
            format!("uid {user}, while containerd starts pods as root"),
            "run husk check as root",
        ),
    }
}

/// Each VMM lives in a user namespace of its own. `most` is how many there may be.
fn user_namespaces(most: &str) -> Finding {
    let subject = "user namespaces";
    match most.trim() {
        "" => Finding::bad(
            subject,
            "not in this kernel, and the VMM's jail needs one",
            "boot a kernel with CONFIG_USER_NS",
        ),
        "0" => Finding::bad(
            subject,
            "the host allows none, and the VMM's jail needs one",
            "sysctl user.max_user_namespaces=10000",
        ),
        most => Finding::good(subject, format!("up to {most}")),
    }
}

/// `tried` is what has failed of a trial, and why.
fn pods_network<E: fmt::Display>(tried: Result<(), (&'static str, E)>) -> Finding {
    let subject = "network";
    match tried {
        Ok(()) => Finding::good(subject, "taps, and packets redirected to them"),
        Err((what, cause)) => Finding::advice(
            subject,
            format!("{what}: {cause}; pods with a network do not start"),
            "modprobe tun sch_ingress cls_u32 act_mirred, or boot a kernel that has them",
        ),
    }
}

/// As [`pods_network`].
fn port_forward<E: fmt::Display>(tried: Result<(), (&'static str, E)>) -> Finding {
    let subject = "port-forward";
    match tried {
        Ok(()) => Finding::good(
            subject,
            "connections within a network namespace can be taken",
        ),
        Err((what, cause)) => Finding::advice(
            subject,
            format!("{what}: {cause}; who dials a pod's localhost on this host does not reach it"),
            "boot a kernel with CONFIG_BPF_SYSCALL",
        ),
    }
}

fn seccomp(actions: &str) -> Finding {
    let subject = "seccomp";
    match actions
        .split_whitespace()
        .any(|action| action == "kill_process")
    {
        true => Finding::good(subject, "filters that kill"),
        false => Finding::bad(
            subject,
            "not in this kernel, and the VMM's jail needs it",
            "boot a kernel with CONFIG_SECCOMP_FILTER",
        ),
    }
}

/// The ABI of Landlock in this kernel; an error where it is not there, or not switched on.
fn landlock_abi() -> std::io::Result<i64> {
    /// LANDLOCK_CREATE_RULESET_VERSION.
    const VERSION: u32 = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag landlock_create_ruleset(2) takes no structure, and only answers a number.
    match unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) } {
        -1 => Err(std::io::Error::last_os_error()),
        abi => Ok(abi),
    }
}

/// The jail holds without it, and better with it.
fn landlock(abi: std::io::Result<i64>) -> Finding {
    let subject = "Landlock";
    let mend = match &abi {
        Ok(abi) => return Finding::good(subject, format!("ABI {abi}")),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => "boot with landlock in lsm=",
        Err(_) => "boot a kernel with CONFIG_SECURITY_LANDLOCK",
    };
    Finding::advice(
        subject,
        "not on this host, and the VMM's jail has one wall less",
        mend,
    )
}

/// Whether a pod's memory can be had. husk locks none, so that limits of that do not matter.
fn memory(pods_mib: u64, meminfo: &str, overcommit: &str) -> Option<Finding> {
    let subject = "memory";
    let available = meminfo.lines().find_map(|line| {
        let line = line.strip_prefix("MemAvailable:")?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    let available = available? >> 10;
    if available < pods_mib {
        let what = format!("{available} MiB are left, and a pod may take {pods_mib}");
        let mend = format!("free some, or set memory_mib in {CONFIG}");
        return Some(Finding::advice(subject, what, mend));
    }
    if overcommit.trim() == "2" {
        let what = "vm.overcommit_memory = 2 counts all that a pod may ever take";
        return Some(Finding::advice(
            subject,
            what,
            "sysctl vm.overcommit_memory=0",
        ));
    }
    Some(Finding::good(subject, format!("{available} MiB are left")))
}

/// A directory that is made where it is missing.
fn writable(subject: &str, directory: &Path) -> Finding {
    let there = directory.ancestors().find(|path| path.exists());
    let there = there.unwrap_or(Path::new("/"));
    let shown = directory.display();
    match kind_of(there) {
        _ if !there.is_dir() => {
            let what = format!("{}: not a directory", there.display());
            Finding::bad(subject, what, format!("remove it: {shown} has to be one"))
        }
        Err(e) => Finding::bad(subject, format!("{}: {e}", there.display()), "see to it"),
        Ok(kind) if kind.read_only => {
            let what = format!("{shown}: on a read-only file system");
            Finding::bad(
                subject,
                what,
                "mount a writable one there, as a tmpfs on /run",
            )
        }
        Ok(_) => Finding::good(subject, shown.to_string()),
    }
}

/// The least Linux that husk runs on.
const LEAST: (u32, u32) = (6, 1);

/// Major and minor number of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn kernel(release: &str) -> Finding {
    let release = release.trim();
    match version(release) {
        Some(version) if version >= LEAST => Finding::good("kernel", format!("Linux {release}")),
        _ => Finding::bad(
            "kernel",
            format!("Linux {release:?}, older than {}.{}", LEAST.0, LEAST.1),
            "boot a later one",
        ),
    }
}

/// On Linux 6.1 the making of a VM waits until KVM's thread against a fault of huge pages has joined
/// the maker's cgroups: an RCU grace period, unless cgroups are mounted to be changed often.
fn huge_pages(release: &str, workaround: &str, mounts: &str) -> Option<Finding> {
    if version(release) != Some((6, 1)) {
        return None;
    }
    let subject = "KVM's nx_huge_pages";
    let often = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(2);
        fields.next() == Some("cgroup2")
            && fields
                .next()
                .is_some_and(|o| o.split(',').any(|o| o == "favordynmods"))
    });
    Some(match (workaround.trim(), often) {
        ("Y", false) => Finding::advice(
            subject,
            "on, which slows down the start of pods on Linux 6.1",
            "boot with kvm.nx_huge_pages=never if all guests are trusted with the CPU's fault, or \
             mount -o remount,favordynmods the cgroup2 file system",
        ),
        ("Y", true) => Finding::good(subject, "on, with favordynmods"),
        _ => Finding::good(subject, "off"),
    })
}

/// File systems that a template's memory should not be mapped from: (f_type of statfs(2), name).
const UNFIT: [(libc::c_long, &str); 8] = [
    (
        0x0102_1994,
        "tmpfs, where templates take memory and end with the host",
    ),
    (
        0x8584_58f6,
        "ramfs, where templates take memory and end with the host",
    ),
    (0x6969, "NFS, whose server every clone would depend on"),
    (
        0xff53_4d42,
        "CIFS, whose server every clone would depend on",
    ),
    (0xfe53_4d42, "SMB, whose server every clone would depend on"),
    (
        0x6573_5546,
        "FUSE, whose server every clone would depend on",
    ),
    (0x0102_1997, "9p, whose server every clone would depend on"),
    (0x794c_7630, "overlayfs, which hides how much space is left"),
];

fn template_directory(directory: &Path) -> Finding {
    let subject = "template_dir";
    let shown = directory.display();
    let mend = format!("set template_dir in {CONFIG} to a local disk, or templates to \"off\"");
    if let Err(what) = Store::new(directory).check_place() {
        let mend = format!("chown root and chmod 700 {shown}, or {mend}");
        return Finding::advice(
            subject,
            format!("no pod starts from a template: {what}"),
            mend,
        );
    }
    // It is made when the first template is.
    let Some(there) = directory.ancestors().find(|path| path.is_dir()) else {
        return Finding::bad(subject, format!("{shown}: not an absolute path"), mend);
    };
    match kind_of(there) {
        Err(e) => Finding::advice(subject, format!("{}: {e}", there.display()), mend),
        Ok(kind) if kind.read_only => Finding::advice(
            subject,
            format!("{shown}: on a read-only file system"),
            mend,
        ),
        Ok(kind) => match UNFIT.iter().find(|(number, _)| *number == kind.number) {
            Some((_, what)) => Finding::advice(subject, format!("{shown}: on {what}"), mend),
            None => Finding::good(subject, shown.to_string()),
        },
    }
}

/// What statfs(2) and statvfs(3) say of a file system.
struct FileSystem {
    number: libc::c_long,
    read_only: bool,
}

fn kind_of(path: &Path) -> std::io::Result<FileSystem> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(std::io::Error::other)?;
    // SAFETY: both are plain data, for which zeroes are a value.
    let (mut kind, mut flags): (libc::statfs, libc::statvfs) = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends in NUL, and there is room for what either call writes.
    let failed = unsafe {
        libc::statfs(path.as_ptr(), &raw mut kind) != 0
            || libc::statvfs(path.as_ptr(), &raw mut flags) != 0
    };
    if failed {
        return Err(std::io::Error::last_os_error());
    }
    Ok(FileSystem {
        number: kind.f_type,
        read_only: flags.f_flag & libc::ST_RDONLY != 0,
    })
}

fn virtualization(flags: &str) -> Finding {
    let subject = "CPU";
    let flag = flags
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .find(|flag| matches!(*flag, "svm" | "vmx"));
    match flag {
        Some(flag) => Finding::good(subject, format!("has {flag}")),
        None if flags.split_whitespace().any(|flag| flag == "hypervisor") => Finding::bad(
            subject,
            "neither svm nor vmx in /proc/cpuinfo of this virtual machine",
            "switch nested virtualization on where it runs: kvm_amd or kvm_intel nested=1, and the host's CPU model",
        ),
        None => Finding::bad(
            subject,
            "neither svm nor vmx in /proc/cpuinfo: no hardware virtualization",
            "switch it on in the firmware",
        ),
    }
}

// Requests of ioctl(2) on /dev/kvm and on a VM (linux/kvm.h).
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
const KVM_CREATE_VCPU: libc::c_ulong = 0xae41;
const KVM_API_VERSION: i32 = 12;

fn kvm() -> Finding {
    let path = "/dev/kvm";
    let kvm = match File::options().read(true).write(true).open(path) {
        Ok(kvm) => kvm,
        Err(e) => return unopened_kvm(&e, Path::new("/sys/module")),
    };
    let mend = "see dmesg(1) for what KVM says";
    match request(&kvm, KVM_GET_API_VERSION) {
        Ok(KVM_API_VERSION) => {}
        Ok(other) => return Finding::bad(path, format!("API version {other}, not 12"), mend),
        Err(e) => return Finding::bad(path, format!("KVM_GET_API_VERSION: {e}"), mend),
    }
    let vm = match request(&kvm, KVM_CREATE_VM) {
        // SAFETY: KVM_CREATE_VM returns a new descriptor.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
        Err(e) => return Finding::bad(path, format!("KVM_CREATE_VM: {e}"), mend),
    };
    match request(&vm, KVM_CREATE_VCPU) {
        Ok(fd) => {
            // SAFETY: KVM_CREATE_VCPU returns a new descriptor.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Finding::good(path, "creates VMs and vCPUs")
        }
        Err(e) => Finding::bad(path, format!("KVM_CREATE_VCPU: {e}"), mend),
    }
}

/// Why /dev/kvm cannot be opened, by what of KVM is loaded.
fn unopened_kvm(cause: &std::io::Error, modules: &Path) -> Finding {
    use std::io::ErrorKind::{NotFound, PermissionDenied};
    let has = |name: &str| modules.join(name).exists();
    let mend = match cause.kind() {
        PermissionDenied => {
            "chown root /dev/kvm, and let root use it where a container holds us (device cgroup)"
        }
        NotFound if has("kvm_amd") || has("kvm_intel") => "make the node: mknod /dev/kvm c 10 232",
        NotFound if has("kvm") => {
            "load kvm_amd or kvm_intel, the part of KVM that is the CPU's (modprobe)"
        }
        NotFound => "load kvm_amd or kvm_intel (modprobe); both need svm or vmx, see CPU",
        _ => "load kvm_amd or kvm_intel (modprobe), and see dmesg(1) for what it says",
    };
    Finding::bad("/dev/kvm", format!("open: {cause}"), mend)
}

/// An ioctl(2) whose argument is 0.
fn request(fd: &impl AsRawFd, request: libc::c_ulong) -> std::io::Result<i32> {
    // SAFETY: none of the requests used here takes a pointer.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) } {
        -1 => Err(std::io::Error::last_os_error()),
        value => Ok(value),
    }
}

fn others_off_cores(on_this_host: std::io::Result<bool>) -> Finding {
    let subject = "core_scheduling";
    match on_this_host {
        Ok(true) => Finding::good(subject, "keeps others off a pod's cores"),
        Ok(false) => Finding::good(subject, "no core has a second thread in use"),
        Err(e) => {
            let mend = "take another kernel, switch SMT off, or set core_scheduling = false";
            Finding::bad(
                subject,
                core_scheduling::refusal(&e),
                format!("{mend} in {CONFIG}"),
            )
        }
    }
}

fn file(subject: &str, key: &str, path: &Path, magic: &[u8]) -> Finding {
    use std::io::Read;
    let mend = format!("install it (make install), or set {key} in {CONFIG}");
    let mut head = vec![0; magic.len()];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut head));
    match read {
        Err(e) => Finding::bad(subject, format!("{}: {e}", path.display()), mend),
        Ok(()) if head != magic => {
            let what = format!("{}: not what it should be", path.display());
            Finding::bad(subject, what, mend)
        }
        Ok(()) => Finding::good(subject, path.display().to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_found_missing_or_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        let look = || file("guest kernel", "kernel", &path, b"\x7fELF").to_string();
        assert!(look().starts_with("bad     guest kernel: "), "{}", look());
        assert!(look().contains("No such file") && look().contains("set kernel in"));
        fs::write(&path, "MZ..").unwrap();
        assert!(look().contains("not what it should be"));
        fs::write(&path, b"\x7fELF\x02").unwrap();
        assert!(look().starts_with("ok "));
    }

    #[test]
    fn what_the_jail_needs_is_looked_for() {
        for (most, bad) in [("63000\n", false), ("0\n", true), ("", true)] {
            assert_eq!(user_namespaces(most).is_bad(), bad, "{most}");
        }
        for (actions, bad) in [
            ("kill_process errno allow\n", false),
            ("kill", true),
            ("", true),
        ] {
            assert_eq!(seccomp(actions).is_bad(), bad, "{actions}");
        }
    }

    #[test]
    fn kvm_is_told_from_what_is_loaded() {
        use std::io::ErrorKind::{NotFound, PermissionDenied};
        let modules = tempfile::tempdir().unwrap();
        let mend =
            |kind: std::io::ErrorKind| unopened_kvm(&kind.into(), modules.path()).to_string();
        assert!(
            mend(NotFound).contains("both need svm or vmx"),
            "{}",
            mend(NotFound)
        );
        fs::create_dir(modules.path().join("kvm")).unwrap();
        assert!(mend(NotFound).contains("the part of KVM that is the CPU's"));
        fs::create_dir(modules.path().join("kvm_amd")).unwrap();
        assert!(mend(NotFound).contains("mknod /dev/kvm"));
        assert!(
            mend(PermissionDenied).starts_with("bad     /dev/kvm: ")
                && mend(PermissionDenied).contains("chown")
        );
    }

    #[test]
    fn a_cpu_without_virtualization_is_told_where_to_switch_it_on() {
        for (flags, words) in [
            ("flags : fpu svm\n", "ok      CPU: has svm"),
            ("flags : fpu vmx hypervisor\n", "ok      CPU: has vmx"),
            ("flags : fpu hypervisor\n", "nested virtualization"),
            ("flags : fpu\n", "in the firmware"),
            ("", "in the firmware"),
        ] {
            let said = virtualization(flags).to_string();
            assert!(said.contains(words), "{said}");
        }
    }

    #[test]
    fn landlock_is_missed_and_not_needed() {
        let said = |answer| landlock(answer).to_string();
        assert_eq!(said(Ok(4)), "ok      Landlock: ABI 4");
        let lacks = |errno| Err(std::io::Error::from_raw_os_error(errno));
        assert!(
            said(lacks(libc::ENOSYS)).contains("; boot a kernel with CONFIG_SECURITY_LANDLOCK")
        );
        assert!(said(lacks(libc::EOPNOTSUPP)).starts_with("advice  Landlock: "));
        assert!(said(lacks(libc::EOPNOTSUPP)).contains("lsm="));
    }

    #[test]
    fn memory_that_is_short_is_advice() {
        let said = |kib: u64, overcommit| {
            let meminfo = format!("MemTotal: 9 kB\nMemAvailable:   {kib} kB\n");
            memory(256, &meminfo, overcommit).unwrap().to_string()
        };
        assert_eq!(said(1 << 20, "0\n"), "ok      memory: 1024 MiB are left");
        assert!(said(100 << 10, "0\n").starts_with("advice  memory: 100 MiB are left"));
        assert!(said(1 << 20, "2\n").contains("; sysctl vm.overcommit_memory=0"));
        assert_eq!(memory(256, "", ""), None);
    }

    #[test]
    fn state_wants_a_directory() {
        let top = tempfile::tempdir().unwrap();
        let said = |name: &str| writable("state", &top.path().join(name)).to_string();
        assert!(said("not/there/yet").starts_with("ok "));
        fs::write(top.path().join("file"), "").unwrap();
        assert!(
            said("file/below").contains("file: not a directory; remove it"),
            "{}",
            said("file/below")
        );
        let read_only = writable("state", Path::new("/proc/sys/kernel/husk"));
        assert!(!read_only.to_string().is_empty());
    }

    #[test]
    fn kernels_are_told_by_their_numbers() {
        assert_eq!(version("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(version("7.0-rc1"), Some((7, 0)));
        assert_eq!(version("six"), None);
        for (release, bad) in [
            ("6.1.0\n", false),
            ("10.2", false),
            ("5.19.17", true),
            ("", true),
        ] {
            assert_eq!(kernel(release).is_bad(), bad, "{release}");
        }
    }

    #[test]
    fn the_slow_start_of_vms_is_for_one_kernel_and_has_two_mends() {
        let line = |release, on, mounts: &str| {
            let finding = huge_pages(release, on, mounts)?;
            Some(finding.to_string().split(' ').next().unwrap().to_owned())
        };
        let plain = "cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0";
        let often = "cgroup2 /sys/fs/cgroup cgroup2 rw,favordynmods 0 0";
        assert_eq!(line("6.12.1", "Y\n", plain), None);
        assert_eq!(line("6.1.9", "Y\n", plain).unwrap(), "advice");
        assert_eq!(line("6.1.9", "Y\n", often).unwrap(), "ok");
        assert_eq!(line("6.1.9", "N\n", plain).unwrap(), "ok");
    }

    #[test]
    fn a_host_that_cannot_carry_a_network_is_told_what_is_missing() {
        assert!(
            pods_network(Ok::<(), (_, &str)>(()))
                .to_string()
                .starts_with("ok ")
        );
        let line = pods_network(Err(("make a tap", "no"))).to_string();
        assert!(
            line.starts_with("advice  network: make a tap: no; "),
            "{line}"
        );
        let line = port_forward(Err(("load", "no"))).to_string();
        assert!(
            line.starts_with("advice  port-forward: load: no; "),
            "{line}"
        );
        // This machine's tests of networks need the same.
        let said = port_forward(network::forwarding_trial()).to_string();
        assert!(said.starts_with("ok "), "{said}");
        let said = pods_network(network::trial()).to_string();
        assert!(
            said.starts_with("ok ") || said.contains("modprobe"),
            "{said}"
        );
    }

    #[test]
    fn core_scheduling_that_cannot_be_had_is_bad() {
        let line = |answer| others_off_cores(answer).to_string();
        assert!(line(Ok(true)).starts_with("ok ") && line(Ok(false)).starts_with("ok "));
        let lacks = std::io::Error::from_raw_os_error(libc::EINVAL);
        let said = line(Err(lacks));
        assert!(
            said.starts_with("bad ") && said.contains("CONFIG_SCHED_CORE"),
            "{said}"
        );
    }

    #[test]
    fn templates_want_a_local_disk() {
        assert!(root(1000).is_bad() && !root(0).is_bad());
        let line = |path: &str| template_directory(Path::new(path)).to_string();
        assert!(
            line("/dev/shm/not/made/yet").contains("on tmpfs"),
            "{}",
            line("/dev/shm")
        );
        assert!(line("relative").starts_with("bad "));
        let open = tempfile::tempdir().unwrap();
        fs::set_permissions(open.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let said = line(open.path().to_str().unwrap());
        assert!(
            said.starts_with("advice ")
                && said.contains("has mode 770: open to others; chown root"),
            "{said}"
        );
    }

    #[test]
    fn every_finding_is_one_line() {
        for finding in findings() {
            assert_eq!(finding.to_string().lines().count(), 1);
        }
    }
}
