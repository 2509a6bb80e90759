//! What every run of the lab uses: built once by the scripts beside it, cached by content, only read here.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// The work tree this runner was built in.
pub fn repository() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// Where cargo puts release binaries: the target is named in `.cargo/config.toml`.
pub fn release_directory() -> PathBuf {
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    target.join("x86_64-unknown-linux-gnu/release")
}

/// A QEMU and how to call it.
pub struct Qemu {
    pub program: PathBuf,
    /// Firmware, where it is not the program's own.
    pub firmware: Option<PathBuf>,
    pub kvm: bool,
}

/// The host's own QEMU where its KVM is usable or it is asked for; else the patched one.
pub fn qemu(stock: bool) -> Result<Qemu> {
    let kvm = kvm_usable();
    if stock || kvm {
        return Ok(Qemu {
            program: "qemu-system-x86_64".into(),
            firmware: None,
            kvm,
        });
    }
    let directory = script("tests/lab/qemu/build", &[])?;
    Ok(Qemu {
        program: directory.join("qemu-system-x86_64"),
        firmware: Some(directory.join("share")),
        kvm,
    })
}

/// Whether some patched QEMU has been built on this host.
pub fn patched_qemu_cached() -> bool {
    let cache = env::var_os("HUSK_CACHE").map_or_else(|| "/var/cache/husk".into(), PathBuf::from);
    let entries = std::fs::read_dir(cache).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("qemu-") && path.join("qemu-system-x86_64").exists()
    })
}

/// `/dev/kvm` alone says nothing: a paravirtual KVM has it and cannot boot a stock kernel.
pub fn kvm_usable() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let virtualizes = flags
        .split_whitespace()
        .any(|flag| flag == "svm" || flag == "vmx");
    let device = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    virtualizes && device.is_ok()
}

/// Directory with the lab's `root.img`, `vmlinuz`, `initrd.img`.
pub fn image() -> Result<PathBuf> {
    script("tests/lab/image/build", &[])
}

/// The container image of the demo and the tests, as `ctr image import` takes it.
pub fn demo_image() -> Result<PathBuf> {
    script("tests/lab/demo-image/build", &[])
}

/// Directory with the guest's `vmlinux`.
pub fn kernel() -> Result<PathBuf> {
    Ok(script("deploy/kernel/build", &[])?.join("vmlinux"))
}

/// Has all that a lab needs built, where it is not cached.
pub fn prepare(stock_qemu: bool) -> Result<()> {
    qemu(stock_qemu)?;
    image()?;
    demo_image()?;
    Ok(())
}

/// Packs the agent into the guest's initrd.
pub fn initrd(agent: &Path, out: &Path) -> Result<()> {
    script("deploy/initrd/build", &[agent, out]).map(|_| ())
}

/// Runs one of the repository's scripts; its progress goes to the terminal, its last line is a path.
fn script(name: &str, args: &[&Path]) -> Result<PathBuf> {
    let path = repository().join(name);
    let output = Command::new(&path)
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {}", path.display()))?;
    if !output.status.success() {
        bail!("{name}: {}", output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(PathBuf::from(text.lines().last().unwrap_or_default()))
}
