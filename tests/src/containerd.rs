//! The lab's containerd: which version of it serves, and how it is started, stopped, killed and upgraded. The lab's init
//! starts it through this module; a test that takes it away brings it back, in the version that it found.
//!
//! The version in use is a fact of the file system: links in `/usr/local/bin`, which come first in everybody's PATH, or
//! none of them for Debian's own in `/usr/bin`. So `ctr` and runc's shim are always of containerd's version.

use std::{
    fs::{self, File},
    io,
    os::unix::{fs::symlink, net::UnixStream, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::{cni, command::eventually, cri};

pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// Where the directories of tasks are, of the namespace that `ctr` uses.
pub const TASKS: &str = "/run/containerd/io.containerd.runtime.v2.task/default";
/// Of every start, one after another.
pub const LOG: &str = "/results/containerd.log";
/// containerd and what shims leave in it, as under systemd.
const CGROUP: &str = "/sys/fs/cgroup/containerd.service";
const LINKS: &str = "/usr/local/bin";
const PROGRAMS: [&str; 3] = ["containerd", "ctr", "containerd-shim-runc-v2"];
const PID: &str = "/run/husk-lab-containerd.pid";
/// A configuration of somebody's own, for either version.
const OWN_CONFIG: &str = "/etc/containerd/husk-lab.toml";
/// There when CRI is served.
const CRI: &str = "/run/husk-lab-cri";
/// Where CRI looks for the pods' network.
const CNI: &str = "/etc/cni/net.d";
/// As long as a start or an end may take before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// Debian trixie's.
    V1_7,
    /// Debian forky's.
    V2_1,
}

impl Version {
    /// As the option, the variable and containerd itself name it.
    pub fn name(self) -> &'static str {
        match self {
            Version::V1_7 => "1.7",
            Version::V2_1 => "2.1",
        }
    }

    /// The one that is not this.
    pub fn other(self) -> Self {
        match self {
            Version::V1_7 => Version::V2_1,
            Version::V2_1 => Version::V1_7,
        }
    }

    /// Without snapshotters that the lab has nothing for, and with CRI only where it is wanted: it takes most of
    /// containerd's start.
    fn config(self, cri: bool) -> String {
        let (version, named, of_cri) = match self {
            Version::V1_7 => (2, "io.containerd.snapshotter.v1.aufs", CRI_1_7),
            Version::V2_1 => (3, "io.containerd.cri.v1.images", CRI_2_1),
        };
        let mut disabled = vec![
            "io.containerd.snapshotter.v1.btrfs",
            "io.containerd.snapshotter.v1.zfs",
            "io.containerd.snapshotter.v1.devmapper",
            "io.containerd.nri.v1.nri",
        ];
        if self == Version::V1_7 || !cri {
            disabled.push(named);
        }
        if !cri {
            disabled.push("io.containerd.grpc.v1.cri");
            disabled.push("io.containerd.cri.v1.runtime");
        }
        let of_cri = if cri { of_cri } else { "" };
        format!(
            "version = {version}\ndisabled_plugins = {disabled:?}\n[debug]\nlevel = \"info\"\n{of_cri}"
        )
    }
}

/// CRI with the handlers that tests name ([`crate::cri::Handler`]), for 1.7.
const CRI_1_7: &str = r#"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "docker.io/library/husk-pause:latest"
stream_server_address = "127.0.0.1"
enable_cdi = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.husk]
runtime_type = "io.containerd.husk.v2"
privileged_without_host_devices = true
"#;

/// The same for 2.1, with husk by the sandbox API beside it.
const CRI_2_1: &str = r#"
[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "127.0.0.1"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "docker.io/library/husk-pause:latest"
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dir = "/usr/lib/cni"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk]
runtime_type = "io.containerd.husk.v2"
privileged_without_host_devices = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.husk-shim]
runtime_type = "io.containerd.husk.v2"
sandboxer = "shim"
privileged_without_host_devices = true
"#;

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "1.7" => Ok(Version::V1_7),
            "2.1" => Ok(Version::V2_1),
            other => bail!("containerd {other}: the lab has 1.7 and 2.1"),
        }
    }
}

/// The version that the next [`start`] starts and that `ctr` has.
pub fn selected() -> Version {
    match fs::symlink_metadata(Path::new(LINKS).join("containerd")) {
        Ok(_) => Version::V2_1,
        Err(_) => Version::V1_7,
    }
}

/// Has `containerd`, `ctr` and runc's shim be of that version from now on; what runs goes on running.
pub fn select(version: Version) -> Result<()> {
    for program in PROGRAMS {
        let link = Path::new(LINKS).join(program);
        match fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", link.display()));
            }
            _ => {}
        }
        if version == Version::V2_1 {
            let target = Path::new("/opt/containerd-2.1/usr/bin").join(program);
            symlink(&target, &link).with_context(|| format!("link {}", link.display()))?;
        }
    }
    Ok(())
}

/// Whether the next [`start`] starts one with CRI.
pub fn serves_cri() -> bool {
    Path::new(CRI).exists()
}

/// Has containerd serve CRI, or not, from now on: with the network that pods get (bridge, portmap) and the images of the
/// lab in CRI's namespace. One that runs and is otherwise is started again.
pub fn serve_cri(wanted: bool) -> Result<()> {
    if serves_cri() == wanted {
        return Ok(());
    }
    let runs = pid().is_some();
    if runs {
        stop()?;
    }
    if wanted {
        fs::create_dir_all(CNI).with_context(|| format!("create {CNI}"))?;
        let network = Path::new(CNI).join("10-lab.conflist");
        let text = cni::conflist().to_string();
        fs::write(&network, text).with_context(|| format!("write {}", network.display()))?;
        fs::write(CRI, "").with_context(|| format!("write {CRI}"))?;
    } else {
        fs::remove_file(CRI).with_context(|| format!("remove {CRI}"))?;
    }
    if runs {
        start()?;
    }
    if wanted && runs {
        let imported = Command::new("ctr")
            .args(["-n", cri::NAMESPACE, "image", "import", "/lab/demo.tar"])
            .output()
            .context("start ctr")?;
        if !imported.status.success() {
            let error = String::from_utf8_lossy(&imported.stderr);
            bail!("import the lab's images for CRI: {error}");
        }
        cri::wait_for_images()?;
    }
    Ok(())
}

/// Starts the selected version and waits until it answers. It belongs to nobody: the lab's PID 1 reaps it.
pub fn start() -> Result<()> {
    if let Some(pid) = pid() {
        bail!(
            "containerd runs already, as process {}",
            pid.as_raw_nonzero()
        );
    }
    let config = if Path::new(OWN_CONFIG).exists() {
        OWN_CONFIG.to_owned()
    } else {
        let path = format!("/run/husk-lab-containerd-{}.toml", selected().name());
        fs::write(&path, selected().config(serves_cri()))
            .with_context(|| format!("write {path}"))?;
        path
    };
    // Of one that has died: nothing of it may be taken for the new one's.
    let _ = fs::remove_file(PID);
    fs::create_dir_all(CGROUP).with_context(|| format!("create {CGROUP}"))?;
    let log = File::options().create(true).append(true).open(LOG);
    let log = log.with_context(|| format!("open {LOG}"))?;
    // A shell between us and it, which ends at once, makes it an orphan.
    let script = format!(
        "echo $$ > {CGROUP}/cgroup.procs; ulimit -c unlimited; \
         sh -c 'echo $$ > {PID}.new; mv {PID}.new {PID}; exec containerd --config {config}' &"
    );
    let started = Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .status()
        .context("start containerd")?;
    if !started.success() {
        bail!("start containerd: {started}");
    }
    let deadline = Instant::now() + PATIENCE;
    let answers = eventually(deadline, || {
        let answers = UnixStream::connect(SOCKET).is_ok();
        (answers || (Path::new(PID).exists() && pid().is_none())).then_some(answers)
    });
    match answers {
        Some(true) if serves_cri() => cri::wait_until_served(),
        Some(true) => Ok(()),
        Some(false) => bail!("containerd ended at once; see containerd.log"),
        None => {
            bail!("containerd does not answer on {SOCKET} after {PATIENCE:?}; see containerd.log")
        }
    }
}

/// Ends it as systemd would, and waits for its end. Containers and their shims stay.
pub fn stop() -> Result<()> {
    end_by(Signal::TERM)
}

/// Ends it as a crash would.
pub fn kill() -> Result<()> {
    end_by(Signal::KILL)
}

fn end_by(signal: Signal) -> Result<()> {
    let pid = pid().context("containerd does not run")?;
    kill_process(pid, signal).context("signal containerd")?;
    let ended = eventually(Instant::now() + PATIENCE, || {
        self::pid().is_none().then_some(())
    });
    ended.with_context(|| format!("containerd lives {PATIENCE:?} after {signal:?}"))
}

/// Stops it and starts the other version, which finds what the first one has left.
pub fn change_to(version: Version) -> Result<()> {
    stop()?;
    select(version)?;
    start()
}

/// Has that version serve from now on, if another one does.
pub fn serve_by(version: Version) -> Result<()> {
    match selected() == version {
        true => Ok(()),
        false => change_to(version),
    }
}

/// The process, while there is one.
pub fn pid() -> Option<Pid> {
    let text = fs::read_to_string(PID).ok()?;
    let number = text.trim();
    let stat = fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
    // A number of somebody else's by now, or a process that has ended and is not reaped yet.
    let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
    if !["containerd", "sh"].contains(&name) || rest.trim_start().starts_with(['Z', 'X']) {
        return None;
    }
    Pid::from_raw(number.parse().ok()?)
}

/// What the server that answers says it is: `2.1.9+unknown`.
pub fn served() -> Result<String> {
    let output = Command::new("ctr")
        .arg("version")
        .output()
        .context("start ctr")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let server = text.split_once("Server:").map(|(_, server)| server);
    let version = server.and_then(|server| {
        let line = server
            .lines()
            .find(|line| line.trim().starts_with("Version:"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    version.with_context(|| {
        let error = String::from_utf8_lossy(&output.stderr);
        format!("ctr version says no server's: {text}{error}")
    })
}

/// Brings containerd back, in the version that was there, when a test that took it away ends; also when it fails.
pub struct Restored(Version);

impl Restored {
    pub fn when_dropped() -> Self {
        Restored(selected())
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if selected() == self.0 && pid().is_some() {
            return;
        }
        let brought = (|| {
            if pid().is_some() {
                kill()?;
            }
            select(self.0)?;
            start()
        })();
        if let Err(error) = brought {
            eprintln!("containerd {} is not back: {error:#}", self.0.name());
        }
    }
}
