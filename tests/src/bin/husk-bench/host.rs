//! What the lab's kernel counts: processor time, memory, exits.

use std::{fs, io, path::Path, thread, time::Duration};

use anyhow::{Context, Result, ensure};

/// Where containerd is, and every shim that it starts, with the shims' children.
const CONTAINERD: &str = "/sys/fs/cgroup/containerd.service";
/// Where `ctr` puts its containers: runc's processes, and the VMMs.
const CONTAINERS: &str = "/sys/fs/cgroup/default";
const POLL: Duration = Duration::from_millis(2);

/// Processor time of starts, exact to the microsecond: what the cgroups of containerd and of its
/// containers have used (`usage_usec` counts each switch of the scheduler, cgroups that are gone
/// included), less the CPU clock of containerd's own process. So it holds shims, runc, VMMs with the
/// guests in them, and the containers themselves; it leaves out containerd, `ctr` and kernel threads.
pub struct CpuMeter {
    containerd: libc::pid_t,
}

impl CpuMeter {
    pub fn new() -> Result<Self> {
        // Made here, it stays, and with it what was used below it.
        fs::create_dir_all(CONTAINERS).with_context(|| format!("make {CONTAINERS}"))?;
        let containerd = processes()?
            .into_iter()
            .find(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm"))
                    .is_ok_and(|name| name.trim() == "containerd")
            })
            .context("containerd is not in its cgroup")?;
        Ok(CpuMeter { containerd })
    }

    /// Milliseconds until now.
    pub fn read(&self) -> Result<f64> {
        Ok(usage(CONTAINERD)? + usage(CONTAINERS)? - self.clock()?)
    }

    /// Waits until nothing is left of the containers of before.
    pub fn settle(&self) -> Result<()> {
        for _ in 0..5000 {
            if processes()?.len() == 1 {
                return Ok(());
            }
            thread::sleep(POLL);
        }
        anyhow::bail!("shims still run: {:?}", processes()?)
    }

    /// clock_getcpuclockid(3): all threads, also those that are gone.
    fn clock(&self) -> Result<f64> {
        let mut clock = 0;
        // SAFETY: it writes a number.
        let error = unsafe { libc::clock_getcpuclockid(self.containerd, &raw mut clock) };
        ensure!(
            error == 0,
            "clock_getcpuclockid: {}",
            io::Error::from_raw_os_error(error)
        );
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: `time` has room for what is written.
        let result = unsafe { libc::clock_gettime(clock, &raw mut time) };
        ensure!(result == 0, "clock_gettime: {}", io::Error::last_os_error());
        Ok(time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6)
    }
}

fn processes() -> Result<Vec<libc::pid_t>> {
    let path = format!("{CONTAINERD}/cgroup.procs");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

/// Milliseconds.
fn usage(cgroup: &str) -> Result<f64> {
    let path = format!("{cgroup}/cpu.stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    let microseconds: f64 = line
        .with_context(|| format!("usage_usec in {path}"))?
        .parse()?;
    Ok(microseconds / 1e3)
}

/// Exits of the VMs that are there now. The one that the lab keeps never runs, and has none.
pub fn kvm_exits() -> Result<f64> {
    number("/sys/kernel/debug/kvm/exits")
}

fn number(path: &str) -> Result<f64> {
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{path}: {text}"))
}

/// Proportional set size in MiB of all processes whose program's name begins so.
pub fn pss_mib(program: &str) -> f64 {
    rollup(program, "Pss:")
}

/// What no other process shares, in MiB, of all such processes.
pub fn private_mib(program: &str) -> f64 {
    rollup(program, "Private_Dirty:") + rollup(program, "Private_Clean:")
}

fn rollup(program: &str, field: &str) -> f64 {
    let Ok(entries) = fs::read_dir("/proc") else {
        return 0.0;
    };
    let is_one = |path: &Path| {
        let exe = fs::read_link(path.join("exe")).unwrap_or_default();
        exe.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(program))
    };
    let kib: u64 = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| is_one(path))
        .filter_map(|path| {
            let rollup = fs::read_to_string(path.join("smaps_rollup")).ok()?;
            let line = rollup.lines().find_map(|line| line.strip_prefix(field))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        })
        .sum();
    kib as f64 / 1024.0
}
