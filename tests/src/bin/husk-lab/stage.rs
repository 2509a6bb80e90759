//! The disk of one run: husk's files in their installed places under `root/`, tests, the plan. And where results go.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use husk_tests::{settings::CLONES, wire::Plan};

use crate::{Options, assets};

/// Room for logs and cores of one run; the file is sparse.
const RESULTS_MIB: u64 = 2048;

/// Runs whose logs are kept.
const KEPT_RUNS: usize = 40;

/// Whether a run makes sense without husk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// What is built is installed, what is not is named.
    Available,
    Everything,
}

/// `target/lab/<name>-<time>/`: `stage/` becomes the run's disk, `results/` is what comes back.
pub struct Stage {
    directory: PathBuf,
}

impl Stage {
    pub fn new(name: &str, options: &Options, needs: Needs) -> Result<Self> {
        let lab = assets::repository().join("target/lab");
        forget_old_runs(&lab);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        let directory = lab.join(format!("{name}-{now}-{}", std::process::id()));
        fs::create_dir_all(directory.join("stage/root"))
            .with_context(|| format!("create {}", directory.display()))?;
        let _ = fs::remove_file(lab.join("latest"));
        let _ = std::os::unix::fs::symlink(&directory, lab.join("latest"));
        let stage = Stage { directory };
        stage.install_husk(options, needs)?;
        stage.install_lab()?;
        for (from, to) in &options.copies {
            stage.copy(
                from,
                &Path::new("root").join(to.strip_prefix("/").unwrap_or(to)),
            )?;
        }
        Ok(stage)
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn results(&self) -> PathBuf {
        self.directory.join("results")
    }

    /// The places of `make install PREFIX=/usr/local`.
    fn install_husk(&self, options: &Options, needs: Needs) -> Result<()> {
        let binaries = options
            .husk
            .clone()
            .unwrap_or_else(assets::release_directory);
        let mut missing = Vec::new();
        let mut install = |from: PathBuf, to: &str| -> Result<()> {
            if !from.exists() {
                missing.push(from.display().to_string());
                return Ok(());
            }
            self.copy(&from, &Path::new("root/usr/local").join(to))
        };
        install(
            binaries.join("containerd-shim-husk-v2"),
            "bin/containerd-shim-husk-v2",
        )?;
        install(binaries.join("husk"), "bin/husk")?;
        install(binaries.join("husk-vmm"), "lib/husk/husk-vmm")?;
        let kernel = match &options.kernel {
            Some(kernel) => kernel.clone(),
            None => assets::kernel()?,
        };
        install(kernel, "lib/husk/vmlinux")?;
        let initrd = match &options.initrd {
            Some(initrd) => initrd.clone(),
            None => {
                let agent = binaries.join("husk-agent");
                let made = self.directory.join("initrd.img");
                if agent.exists() {
                    assets::initrd(&agent, &made)?;
                    made
                } else {
                    agent
                }
            }
        };
        install(initrd, "lib/husk/initrd.img")?;
        if !missing.is_empty() && needs == Needs::Everything {
            bail!("not built: {} (make build)", missing.join(", "));
        }
        if !missing.is_empty() {
            eprintln!("husk-lab: without {}", missing.join(", "));
        }
        Ok(())
    }

    /// The lab's own programs, which lie beside this one, and husk's configuration.
    fn install_lab(&self) -> Result<()> {
        self.write("root/etc/husk/config.toml", CLONES.as_bytes())?;
        let me = std::env::current_exe().context("find this program")?;
        let beside = me.parent().context("find this program's directory")?;
        self.copy(&beside.join("husk-lab-init"), Path::new("husk-lab-init"))?;
        for (name, to) in [
            ("husk-bench", "husk-bench"),
            ("husk-probe", "root/usr/local/lib/husk-tests/husk-probe"),
            (
                "husk-jailbreak",
                "root/usr/local/lib/husk-tests/husk-jailbreak",
            ),
        ] {
            if beside.join(name).exists() {
                self.copy(&beside.join(name), Path::new(to))?;
            }
        }
        self.copy(
            &assets::repository().join("tests/lab/demo.sh"),
            Path::new("demo.sh"),
        )?;
        self.copy(&assets::demo_image()?, Path::new("demo.tar"))
    }

    /// Copies a file or a directory to `to` on the run's disk.
    pub fn copy(&self, from: &Path, to: &Path) -> Result<()> {
        let target = self.directory.join("stage").join(to);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        let status = Command::new("cp")
            .arg("-aL")
            .arg(from)
            .arg(&target)
            .status()
            .context("start cp")?;
        if !status.success() {
            bail!("copy {} into the lab: cp: {status}", from.display());
        }
        Ok(())
    }

    pub fn write(&self, to: &str, content: &[u8]) -> Result<()> {
        let target = self.directory.join("stage").join(to);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&target, content).with_context(|| format!("write {}", target.display()))
    }

    /// Makes the two disks of a boot: the run's and the one for its results.
    pub fn make_disks(&self, plan: &Plan) -> Result<(PathBuf, PathBuf)> {
        self.write("plan.json", &serde_json::to_vec_pretty(plan)?)?;
        let staged = self.directory.join("stage");
        let init = staged.join("husk-lab-init");
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        let run = self.directory.join("run.img");
        let used = du_mib(&staged)?;
        make_ext4(&run, used + used / 8 + 16, Some(&staged))?;
        let results = self.directory.join("results.img");
        make_ext4(&results, RESULTS_MIB, None)?;
        Ok((run, results))
    }

    /// Unpacks what the lab left on the results disk, and removes both disks.
    pub fn collect(&self) -> Result<()> {
        let (run, results) = (
            self.directory.join("run.img"),
            self.directory.join("results.img"),
        );
        let into = self.results();
        fs::create_dir_all(&into)?;
        // A lab that died left the journal behind: replay it first.
        let _ = Command::new("e2fsck").args(["-p"]).arg(&results).output();
        let dump = format!("rdump / {}", into.display());
        let output = Command::new("debugfs")
            .args(["-R", &dump])
            .arg(&results)
            .output()
            .context("start debugfs")?;
        if !output.status.success() {
            bail!(
                "unpack {}: {}",
                results.display(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let _ = fs::remove_dir(into.join("lost+found"));
        let _ = fs::remove_file(run);
        let _ = fs::remove_file(results);
        let _ = fs::remove_file(self.directory.join("initrd.img"));
        let _ = fs::remove_dir_all(self.directory.join("stage"));
        Ok(())
    }
}

/// Logs of old runs go when there are many; a run still going on has its disk there.
fn forget_old_runs(lab: &Path) {
    let mut finished: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(lab).into_iter().flatten().flatten() {
        let path = entry.path();
        let modified = fs::symlink_metadata(&path).and_then(|meta| meta.modified());
        if let (Ok(modified), true, false) = (
            modified,
            path.join("console.log").exists(),
            path.join("run.img").exists(),
        ) {
            finished.push((modified, path));
        }
    }
    finished.sort();
    let excess = finished.len().saturating_sub(KEPT_RUNS);
    for (_, path) in finished.into_iter().take(excess) {
        let _ = fs::remove_dir_all(path);
    }
}

fn du_mib(directory: &Path) -> Result<u64> {
    let output = Command::new("du")
        .args(["-sm", "--apparent-size"])
        .arg(directory)
        .output()
        .context("start du")?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .context("understand du")
}

fn make_ext4(image: &Path, mib: u64, from: Option<&Path>) -> Result<()> {
    let _ = fs::remove_file(image);
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args([
        "-q",
        "-t",
        "ext4",
        "-m",
        "0",
        "-E",
        "lazy_itable_init=1,root_owner=0:0",
    ]);
    if let Some(from) = from {
        mke2fs.arg("-d").arg(from);
    }
    let output = mke2fs
        .arg(image)
        .arg(format!("{mib}M"))
        .output()
        .context("start mke2fs (package e2fsprogs)")?;
    if !output.status.success() {
        bail!(
            "make {}: {}",
            image.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
