//! The lab's init: sets the machine up, starts containerd, does what the plan of this run asks, reports.
//!
//! PID 1 only reaps and powers off; a child of it does the work. Everything the host should keep goes to `/results`.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use husk_tests::containerd::{self, Version};
use husk_tests::cri;
use husk_tests::settings::{CLONES, COLD};
use husk_tests::wire::{Case, Job, OUTPUT, PLAN, Plan, REPORTS, Report, Verdict};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitOptions};

/// Makes a VM with one vCPU that never runs and stays until the lab ends.
///
/// With the first VM and after the last one the kernel patches its scheduler and KVM (the static keys of preempt
/// notifiers and of local APICs). QEMU's translator can miss such a patch on a CPU that translates the same page at that
/// moment: seen as an `int3` oops in `__schedule`, and otherwise as vCPU threads that are switched without KVM's knowledge.
fn keep_a_vm() -> Result<()> {
    let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
    vm.create_irq_chip()?;
    std::mem::forget((vm.create_vcpu(0)?, vm));
    Ok(())
}

/// Bytes kept of one core dump.
const CORE_LIMIT: u64 = 256 << 20;

fn main() -> ExitCode {
    if env::args().nth(1).as_deref() == Some("core") {
        return keep_core();
    }
    if std::process::id() == 1 {
        reap_until_done();
        return ExitCode::FAILURE;
    }
    let reports = match Reports::open() {
        Ok(reports) => reports,
        Err(error) => {
            eprintln!("husk-lab-init: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let status = match work(&reports) {
        Ok(status) => status,
        Err(error) => {
            reports.note(&format!("the lab could not be set up: {error:#}"));
            125
        }
    };
    keep_results(&reports);
    reports.send(&Report::Exit { status });
    ExitCode::SUCCESS
}

/// As the kernel's core handler, `core NAME PID` with the dump on stdin: a crashed process may have an empty root, in
/// which no file could be written, and no limit for cores.
fn keep_core() -> ExitCode {
    let name: Vec<String> = env::args()
        .skip(2)
        .map(|word| word.replace('/', "-"))
        .collect();
    let path = format!("/results/core.{}", name.join("."));
    let copied = File::create(path)
        .and_then(|mut file| std::io::copy(&mut std::io::stdin().take(CORE_LIMIT), &mut file));
    ExitCode::from(u8::from(copied.is_err()))
}

/// As PID 1: starts the worker, waits for it and for every orphan, and switches the machine off.
fn reap_until_done() {
    let worker = Command::new("/lab/husk-lab-init").spawn();
    match worker {
        Ok(worker) => {
            let worker = Pid::from_child(&worker);
            while let Ok(Some((pid, _))) = rustix::process::wait(WaitOptions::empty()) {
                if pid == worker {
                    break;
                }
            }
        }
        Err(error) => eprintln!("husk-lab-init: start the worker: {error}"),
    }
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
}

fn work(reports: &Reports) -> Result<i32> {
    let plan: Plan =
        serde_json::from_slice(&fs::read(PLAN).with_context(|| format!("read {PLAN}"))?)
            .with_context(|| format!("understand {PLAN}"))?;
    reports.beat_forever();
    set_up(&plan)?;
    let containerd = plan.containerd.map(start_containerd).transpose()?;
    reports.send(&Report::Ready {
        uptime: uptime(),
        containerd,
    });

    let status = match &plan.job {
        Job::Shell => shell(&plan)?,
        Job::Run { command } => run(command, &plan)?,
        Job::Test { cases } => test(cases, &plan, reports),
    };
    if plan.containerd.is_some() {
        match containerd::pid() {
            Some(_) => containerd::kill()?,
            None => reports.note("containerd has died"),
        }
    }
    Ok(status)
}

// ---------------------------------------------------------------------------------------------------------------
// The machine

fn set_up(plan: &Plan) -> Result<()> {
    if plan.results_in_memory {
        quick("mount", &["-t", "tmpfs", "tmpfs", "/results"])?;
    } else {
        quick("mount", &["-o", "noatime", "/dev/vdc", "/results"])?;
    }
    // As systemd mounts it.
    quick(
        "mount",
        &[
            "-o",
            "remount,nsdelegate,memory_recursiveprot",
            "/sys/fs/cgroup",
        ],
    )?;
    // Shared, as systemd makes it: what runtimes do to propagation must be seen.
    quick("mount", &["--make-rshared", "/"])?;
    // containerd's directories in memory: fast, and tmpfs carries overlay upper directories.
    fs::create_dir_all("/var/lib/containerd")?;
    quick(
        "mount",
        &[
            "-t",
            "tmpfs",
            "-o",
            "mode=711,size=75%",
            "tmpfs",
            "/var/lib/containerd",
        ],
    )?;
    quick(
        "mount",
        &[
            "-t",
            "tmpfs",
            "-o",
            "mode=1777,size=75%",
            "tmpfs",
            "/var/tmp",
        ],
    )?;
    quick("mount", &["-t", "debugfs", "debugfs", "/sys/kernel/debug"])?;
    let vendor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if vendor.contains("AuthenticAMD") {
        quick("modprobe", &["kvm_amd", "nested=1", "npt=1"])?;
    } else {
        quick("modprobe", &["kvm_intel", "nested=1"])?;
    }
    keep_a_vm().context("make a VM that stays")?;
    quick(
        "modprobe",
        &[
            "-a",
            "overlay",
            "loop",
            "vhost_vsock",
            "vhost_net",
            "tun",
            "veth",
            "bridge",
            "erofs",
            "fuse",
        ],
    )?;
    quick("ip", &["link", "set", "lo", "up"])?;
    fs::write(
        "/proc/sys/kernel/core_pattern",
        "|/lab/husk-lab-init core %e %P",
    )?;
    fs::write("/proc/sys/kernel/hostname", "husk-lab")?;
    for controller in ["cpu", "cpuset", "memory", "pids", "io", "hugetlb"] {
        let _ = fs::write(
            "/sys/fs/cgroup/cgroup.subtree_control",
            format!("+{controller}"),
        );
    }
    if Path::new("/lab/root").is_dir() {
        quick("cp", &["-a", "/lab/root/.", "/"])?;
    }
    Ok(())
}

/// Starts it with the demo image in it; returns what it says it is.
fn start_containerd(version: Version) -> Result<String> {
    containerd::select(version)?;
    containerd::start()?;
    if Path::new("/lab/demo.tar").exists() {
        quick("ctr", &["image", "import", "/lab/demo.tar"])?;
    }
    containerd::served()
}

fn keep_results(reports: &Reports) {
    for entry in fs::read_dir("/results").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("core.") {
            reports.note(&format!("a process crashed: {name}"));
        }
    }
    let dmesg = Command::new("dmesg")
        .output()
        .map(|out| out.stdout)
        .unwrap_or_default();
    let _ = fs::write("/results/dmesg", dmesg);
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    if mounts
        .lines()
        .any(|line| line.starts_with("tmpfs /results "))
    {
        let _ = fs::create_dir_all("/run/results-disk");
        let _ = quick("mount", &["/dev/vdc", "/run/results-disk"]);
        let _ = quick("cp", &["-a", "/results/.", "/run/results-disk/"]);
        let _ = quick("umount", &["/run/results-disk"]);
    } else if quick("umount", &["/results"]).is_err() {
        // Somebody still writes there: what is written by now is enough.
        rustix::fs::sync();
        let _ = quick("mount", &["-o", "remount,ro", "/results"]);
    }
}

fn uptime() -> f64 {
    fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|text| text.split(' ').next()?.parse().ok())
        .unwrap_or_default()
}

/// A command that must work and has nothing to say when it does.
fn quick(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} {}: {} {}",
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------------
// Jobs

fn command(program: &str, plan: &Plan) -> Command {
    let mut command = Command::new(program);
    command
        .env("HUSK_LAB", "1")
        .env(
            "HUSK_LAB_CONTAINERD",
            plan.containerd.map_or("none", Version::name),
        )
        .envs(plan.env.iter().cloned())
        .current_dir("/root");
    command
}

fn shell(plan: &Plan) -> Result<i32> {
    let tty = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/ttyS0")
        .context("open /dev/ttyS0")?;
    let (rows, columns) = (env_or(plan, "LINES", "40"), env_or(plan, "COLUMNS", "120"));
    let script = format!("stty sane rows {rows} cols {columns} < /dev/ttyS0; exec bash -l");
    let status = command("setsid", plan)
        .args(["-c", "sh", "-c", &script])
        .env("TERM", env_or(plan, "TERM", "linux"))
        .env("PS1", "husk-lab:\\w# ")
        .stdin(tty.try_clone()?)
        .stdout(tty.try_clone()?)
        .stderr(tty)
        .status()
        .context("start a shell")?;
    Ok(status.code().unwrap_or(1))
}

fn env_or(plan: &Plan, name: &str, default: &str) -> String {
    let found = plan.env.iter().find(|(key, _)| key == name);
    found
        .map_or(default, |(_, value)| value.as_str())
        .to_owned()
}

fn run(words: &[String], plan: &Plan) -> Result<i32> {
    let output = port(OUTPUT)?;
    let Some((program, args)) = words.split_first() else {
        bail!("no command to run")
    };
    let mut child = command(program, plan);
    child
        .args(args)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?);
    match child.status() {
        Ok(status) => Ok(code_of(status)),
        Err(error) => {
            let _ = writeln!(&output, "husk-lab: {program}: {error}");
            Ok(127)
        }
    }
}

fn code_of(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn test(cases: &[Case], plan: &Plan, reports: &Reports) -> i32 {
    let mut failed = false;
    for (index, case) in cases.iter().enumerate() {
        reports.send(&Report::Start { index });
        let begin = Instant::now();
        let (verdict, output) = configure(case, plan)
            .and_then(|()| one_test(case, plan))
            .unwrap_or_else(|error| (Verdict::Failed, format!("{error:#}")));
        failed |= verdict != Verdict::Passed;
        // Also of those that passed: some measure.
        let name = case.name.replace("::", "-");
        let _ = fs::write(format!("/results/{}-{name}.out", case.target), &output);
        reports.send(&Report::End {
            index,
            verdict,
            secs: begin.elapsed().as_secs_f64(),
            output,
        });
    }
    i32::from(failed)
}

/// Has pods boot, or start as clones of a template that is there; the tests of templates begin without one.
/// The sandbox API is containerd 2's: its tests have that in both halves.
fn configure(case: &Case, plan: &Plan) -> Result<()> {
    let settings = if case.clones || case.target == "clones" {
        CLONES
    } else {
        COLD
    };
    fs::write("/etc/husk/config.toml", settings).context("write /etc/husk/config.toml")?;
    let cri = case.target == "cri";
    let by_sandbox_api = cri && case.name.starts_with("shim::");
    match plan.containerd {
        Some(_) if by_sandbox_api => containerd::serve_by(Version::V2_1)?,
        Some(version) => containerd::serve_by(version)?,
        None => {}
    }
    containerd::serve_cri(cri)?;
    if case.clones {
        let namespace = if cri { cri::PODS } else { "default" };
        quick("husk", &["template", "build", "--namespace", namespace])?;
    }
    Ok(())
}

/// A test in its own process and process group, so that a hanging or crashing one takes no other with it.
fn one_test(case: &Case, plan: &Plan) -> Result<(Verdict, String)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).context("make a pipe")?;
    let mut reader = File::from(reader);
    let mut child = command(&format!("/lab/tests/{}", case.target), plan)
        .args([
            "--exact",
            &case.name,
            "--include-ignored",
            "--show-output",
            "--test-threads=1",
        ])
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0)
        .spawn()
        .with_context(|| format!("start /lab/tests/{}", case.target))?;
    let output = Arc::new(Mutex::new(Vec::new()));
    let copy = Arc::clone(&output);
    // Not joined: a background process of the test may hold the pipe for as long as it likes.
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            if let Ok(mut output) = copy.lock() {
                output.extend_from_slice(&buffer[..count]);
            }
        }
    });

    let limit = Instant::now() + Duration::from_secs(plan.limit_secs);
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > limit {
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let verdict = match status {
        Some(status) if status.success() => Verdict::Passed,
        Some(_) => Verdict::Failed,
        None => {
            diagnose(case);
            let _ = rustix::process::kill_process_group(Pid::from_child(&child), Signal::KILL);
            let _ = child.wait();
            Verdict::TimedOut
        }
    };
    // The last words are in the pipe by now; the copying thread needs a moment for them.
    thread::sleep(Duration::from_millis(20));
    let output = output
        .lock()
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    Ok((verdict, output))
}

/// What a person would look at first when something hangs.
fn diagnose(case: &Case) {
    let directory = PathBuf::from(format!(
        "/results/hang-{}-{}",
        case.target,
        case.name.replace("::", "-")
    ));
    let _ = fs::create_dir_all(&directory);
    let save = |name: &str, script: &str| {
        let output = Command::new("timeout")
            .args(["20", "sh", "-c", script])
            .output();
        let _ = fs::write(
            directory.join(name),
            output.map(|out| out.stdout).unwrap_or_default(),
        );
    };
    save(
        "processes",
        "ps axwwfo pid,ppid,pgid,stat,wchan:24,etime,args",
    );
    save(
        "stacks",
        "for p in /proc/[0-9]*; do echo \"== $p $(tr '\\0' ' ' < $p/cmdline)\"; cat $p/task/*/stack; done 2>&1",
    );
    save(
        "containers",
        "ctr c ls; ctr task ls; find /run/containerd /run/husk 2>/dev/null",
    );
    save(
        "sysrq",
        "echo w > /proc/sysrq-trigger; echo t > /proc/sysrq-trigger; dmesg",
    );
    save("containerd.log", "cat /results/containerd.log");
}

// ---------------------------------------------------------------------------------------------------------------
// Reports

#[derive(Clone)]
struct Reports(Arc<Mutex<File>>);

impl Reports {
    fn open() -> Result<Self> {
        quick("modprobe", &["virtio_console"])?;
        Ok(Reports(Arc::new(Mutex::new(port(REPORTS)?))))
    }

    /// A host that no longer listens is about to switch us off: nothing can be done about it.
    fn send(&self, report: &Report) {
        if let (Ok(mut file), Ok(mut line)) = (self.0.lock(), serde_json::to_string(report)) {
            line.push('\n');
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn note(&self, text: &str) {
        self.send(&Report::Note {
            text: text.to_owned(),
        });
    }

    fn beat_forever(&self) {
        let reports = self.clone();
        thread::spawn(move || {
            loop {
                reports.send(&Report::Beat);
                thread::sleep(Duration::from_secs(1));
            }
        });
    }
}

/// Opens the virtio-serial port of that name.
fn port(name: &str) -> Result<File> {
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports")
            .into_iter()
            .flatten()
            .flatten()
        {
            let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if found.trim() == name {
                let device = Path::new("/dev").join(entry.file_name());
                return OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(&device)
                    .with_context(|| format!("open {}", device.display()));
            }
        }
        if Instant::now() > patience {
            bail!(
                "no virtio-serial port is called {name} ({:?})",
                env::current_exe()
            );
        }
        thread::sleep(Duration::from_millis(10));
    }
}
