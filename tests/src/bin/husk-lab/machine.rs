//! One boot of the lab: QEMU, the two ports it talks by, and the judgement whether it is still alive.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use husk_tests::wire::{Job, OUTPUT, Plan, REPORTS, Report};

use crate::{Options, assets, stage::Stage};

/// Wall time without a heartbeat after which the lab counts as dead. The host may be very busy.
const SILENCE: Duration = Duration::from_secs(120);
/// Wall time that one test may take. The lab's own limit ends it earlier, if the lab's clock goes:
/// a lab was seen that sent heartbeats while its clock stood nearly still.
const STANDSTILL: Duration = Duration::from_secs(1500);

/// Of this process, so that each has names of its own.
static MACHINES: AtomicU32 = AtomicU32::new(0);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    Wall,
    /// Each instruction takes 1 ns, idle time none: the same work takes the same time on any host.
    Virtual,
}

impl Clock {
    /// As the benchmark's report names it.
    pub fn name(self) -> &'static str {
        match self {
            Clock::Wall => "wall",
            Clock::Virtual => "virtual",
        }
    }
}

/// How a boot ended.
#[derive(Debug)]
pub enum End {
    Done {
        status: i32,
    },
    /// Not the job's failure: the machine under it went away, or went silent.
    Died {
        why: String,
    },
}

pub struct Machine<'a> {
    stage: &'a Stage,
    qemu: Child,
    reports: Receiver<Report>,
    monitor: PathBuf,
    /// Short names for sockets, which have 108 bytes: the run's directory may be deep.
    sockets: PathBuf,
}

impl<'a> Machine<'a> {
    pub fn boot(stage: &'a Stage, plan: &Plan, options: &Options) -> Result<Self> {
        let qemu = assets::qemu(options.stock_qemu)?;
        let image = assets::image()?;
        let (run, results) = stage.make_disks(plan)?;

        let number = MACHINES.fetch_add(1, Ordering::Relaxed);
        let name = format!("husk-lab-{}-{number}", std::process::id());
        let sockets = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&sockets);
        fs::create_dir_all(&sockets).with_context(|| format!("create {}", sockets.display()))?;
        let monitor = sockets.join("monitor");
        let (reports_path, output_path) = (sockets.join("reports"), sockets.join("output"));
        let reports_socket = UnixListener::bind(&reports_path).context("listen for reports")?;
        let output_socket = UnixListener::bind(&output_path).context("listen for output")?;

        let mut command = Command::new(&qemu.program);
        if let Some(firmware) = &qemu.firmware {
            command.arg("-L").arg(firmware);
        }
        command.args([
            "-M",
            "q35",
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        match (qemu.kvm, options.clock) {
            (true, Clock::Wall) => command.args(["-accel", "kvm", "-cpu", "host"]),
            (false, Clock::Wall) => command.args(["-accel", "tcg,thread=multi", "-cpu", "EPYC-v3"]),
            (_, Clock::Virtual) => {
                command.args(["-accel", "tcg,thread=single", "-cpu", "EPYC-v3"]);
                command.args(["-icount", "shift=0,sleep=off"])
            }
        };
        let cpus = if options.clock == Clock::Virtual {
            1
        } else {
            options.cpus
        };
        command.args([
            "-smp",
            &cpus.to_string(),
            "-m",
            &options.memory_mib.to_string(),
        ]);
        command
            .arg("-kernel")
            .arg(image.join("vmlinuz"))
            .arg("-initrd")
            .arg(image.join("initrd.img"));
        command.args([
            "-append",
            "console=ttyS0 reboot=t panic=-1 quiet transparent_hugepage=madvise",
        ]);
        for (file, mode) in [
            (image.join("root.img"), "snapshot=on"),
            (run, "readonly=on"),
            (results, "snapshot=off"),
        ] {
            let drive = format!(
                "file={},if=virtio,format=raw,cache=unsafe,{mode}",
                file.display()
            );
            command.args(["-drive", &drive]);
        }
        command.args(["-device", "virtio-serial-pci"]);
        for (id, name, path) in [("r", REPORTS, &reports_path), ("o", OUTPUT, &output_path)] {
            command.args([
                "-chardev",
                &format!("socket,id={id},path={}", path.display()),
            ]);
            command.args([
                "-device",
                &format!("virtserialport,chardev={id},name={name}"),
            ]);
        }
        command.args([
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ]);
        if matches!(plan.job, Job::Shell) {
            command.args(["-serial", "mon:stdio"]);
        } else {
            let log = format!("file:{}", stage.directory().join("console.log").display());
            command.args(["-serial", &log]).stdin(Stdio::null());
        }
        let log = File::create(stage.directory().join("qemu.log")).context("create qemu.log")?;
        command.stderr(log);
        // SAFETY: prctl is a plain system call; nothing of this process' state is touched between fork and exec.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(
                    rustix::process::Signal::KILL,
                ))?;
                Ok(())
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("start {}", qemu.program.display()))?;

        let (sender, reports) = mpsc::channel();
        thread::spawn(move || read_reports(&reports_socket, &sender));
        thread::spawn(move || copy_output(&output_socket));
        Ok(Machine {
            stage,
            qemu: child,
            reports,
            monitor,
            sockets,
        })
    }

    /// Waits for the end of the job, showing each report to `see`.
    pub fn wait(mut self, timeout_secs: Option<u64>, see: &mut dyn FnMut(&Report)) -> Result<End> {
        let begin = Instant::now();
        let mut last_beat = Instant::now();
        let mut gone_since = None;
        let mut test_began = None;
        let mut end = loop {
            match self.reports.recv_timeout(Duration::from_millis(100)) {
                Ok(Report::Exit { status }) => break End::Done { status },
                Ok(Report::Note { text }) => eprintln!("husk-lab: {text}"),
                Ok(report) => {
                    last_beat = Instant::now();
                    match report {
                        Report::Start { .. } => test_began = Some(last_beat),
                        Report::End { .. } => test_began = None,
                        _ => {}
                    }
                    see(&report);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    if let Some(status) = self.qemu.try_wait().context("wait for QEMU")? {
                        // Its last reports may still be on their way to us.
                        let since = *gone_since.get_or_insert_with(Instant::now);
                        if since.elapsed() > Duration::from_secs(1) {
                            break End::Died {
                                why: format!("QEMU ended ({status})"),
                            };
                        }
                    }
                    thread::sleep(Duration::from_millis(10));
                }
            }
            if last_beat.elapsed() > SILENCE {
                break End::Died {
                    why: format!("no heartbeat for {} s", SILENCE.as_secs()),
                };
            }
            if test_began.is_some_and(|began| began.elapsed() > STANDSTILL) {
                break End::Died {
                    why: format!("one test took more than {} s", STANDSTILL.as_secs()),
                };
            }
            if timeout_secs.is_some_and(|limit| begin.elapsed().as_secs() > limit) {
                break End::Died {
                    why: format!("not done after {} s", begin.elapsed().as_secs()),
                };
            }
        };
        match &mut end {
            End::Done { .. } => self.let_power_off(),
            End::Died { why } => {
                self.post_mortem();
                let console = self.stage.directory().join("console.log");
                if let Some(panic) = last_panic(&console) {
                    why.push_str(": ");
                    why.push_str(&panic);
                }
                why.push_str(&format!("; see {}", self.stage.directory().display()));
            }
        }
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        self.stage.collect()?;
        Ok(end)
    }

    fn let_power_off(&mut self) {
        let patience = Instant::now() + Duration::from_secs(20);
        while Instant::now() < patience {
            if matches!(self.qemu.try_wait(), Ok(Some(_)) | Err(_)) {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Saves the registers of all processors: where a silent lab hangs.
    fn post_mortem(&self) {
        let mut text = String::new();
        for command in ["info status", "info registers -a", "info lapic", "info jit"] {
            match human_monitor(&self.monitor, command) {
                Ok(answer) => text.push_str(&format!("== {command}\n{answer}\n")),
                Err(error) => text.push_str(&format!("== {command}: {error:#}\n")),
            }
        }
        let _ = fs::write(self.stage.directory().join("registers.txt"), text);
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        let _ = fs::remove_dir_all(&self.sockets);
    }
}

fn read_reports(socket: &UnixListener, sender: &Sender<Report>) {
    let Ok((stream, _)) = socket.accept() else {
        return;
    };
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return };
        match serde_json::from_str(&line) {
            Ok(report) => {
                if sender.send(report).is_err() {
                    return;
                }
            }
            Err(error) => eprintln!("husk-lab: strange report {line:?}: {error}"),
        }
    }
}

fn copy_output(socket: &UnixListener) {
    let Ok((mut stream, _)) = socket.accept() else {
        return;
    };
    let mut buffer = [0; 65536];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(&buffer[..count]).and_then(|()| out.flush());
    }
}

fn human_monitor(socket: &Path, command: &str) -> Result<String> {
    let stream = UnixStream::connect(socket).context("connect to QEMU's monitor")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut writer = stream.try_clone()?;
    let lines = BufReader::new(stream).lines();
    let ask = serde_json::json!({"execute": "human-monitor-command", "arguments": {"command-line": command}, "id": "answer"});
    writeln!(writer, "{{\"execute\": \"qmp_capabilities\"}}\n{ask}")?;
    for line in lines {
        let value: serde_json::Value = serde_json::from_str(&line?)?;
        if value["id"] == "answer" {
            return Ok(value["return"]
                .as_str()
                .unwrap_or_default()
                .replace("\r\n", "\n"));
        }
    }
    anyhow::bail!("the monitor closed")
}

/// The line with which a kernel says that it died.
fn last_panic(console: &Path) -> Option<String> {
    let text = fs::read(console).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text
        .lines()
        .rev()
        .find(|line| line.contains("Kernel panic") || line.contains("BUG:"))?;
    Some(line.trim().to_owned())
}
