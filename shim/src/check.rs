//! `husk check`: what this host lacks to run pods, one line each, with the mend. It changes nothing.

use std::{
    fmt,
    fs::{self, File},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use crate::{
    cgroup,
    config::{CONFIG, Config},
    options::Options,
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
    let mut findings = vec![virtualization(), kvm()];
    match Config::load(Path::new(CONFIG), &Options::default()) {
        Ok(config) => {
            findings.push(Finding::good("configuration", CONFIG));
            findings.push(file("VMM", "vmm", &config.vmm, b"\x7fELF"));
            findings.push(file("guest kernel", "kernel", &config.kernel, b"\x7fELF"));
            findings.push(file("guest initrd", "initrd", &config.initrd, b"070701"));
        }
        Err(e) => {
            let mend = format!("correct or remove {CONFIG}");
            findings.push(Finding::bad("configuration", e.to_string(), mend));
        }
    }
    findings.push(match cgroup::root() {
        Some(root) => Finding::good("cgroup v2", root.display().to_string()),
        None => Finding {
            subject: "cgroup v2".into(),
            verdict: Verdict::Advice {
                what: "not mounted, so pods are not in cgroups of their own".into(),
                mend: "boot with systemd.unified_cgroup_hierarchy=1".into(),
            },
        },
    });
    findings
}

fn virtualization() -> Finding {
    let subject = "CPU";
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flag = flags
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .find(|flag| matches!(*flag, "svm" | "vmx"));
    match flag {
        Some(flag) => Finding::good(subject, format!("has {flag}")),
        None => Finding::bad(
            subject,
            "neither svm nor vmx in /proc/cpuinfo: no hardware virtualization",
            "switch it on in the firmware, or nested virtualization on the machine this one runs in",
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
        Err(e) => {
            let mend = "load kvm_amd or kvm_intel (modprobe), and see to its permissions";
            return Finding::bad(path, format!("open: {e}"), mend);
        }
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

/// An ioctl(2) whose argument is 0.
fn request(fd: &impl AsRawFd, request: libc::c_ulong) -> std::io::Result<i32> {
    // SAFETY: none of the requests used here takes a pointer.
    match unsafe { libc::ioctl(fd.as_raw_fd(), request, 0) } {
        -1 => Err(std::io::Error::last_os_error()),
        value => Ok(value),
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
    fn every_finding_is_one_line() {
        for finding in findings() {
            assert_eq!(finding.to_string().lines().count(), 1);
        }
    }
}
