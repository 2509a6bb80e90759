//! `husk-lab`: boots the lab, a Debian machine with a real, nested KVM and a real containerd, and does something in it.
//!
//! This file knows the command line only; see `assets` (what is built and cached), `stage` (the disk of one run),
//! `machine` (QEMU and whether it lives) and `suite` (tests).

mod assets;
mod machine;
mod stage;
mod suite;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, Result, bail};
use husk_tests::{
    containerd::Version,
    wire::{Job, Plan, Report},
};

use crate::{
    machine::{Clock, End, Machine},
    stage::{Needs, Stage},
};

const USAGE: &str = "\
usage: husk-lab shell [OPTIONS]              a shell in a freshly booted lab
       husk-lab run [OPTIONS] -- CMD...      one command in it; its output, its exit status
       husk-lab test [OPTIONS] [FILTER...]   the end-to-end tests whose TARGET::NAME contains a FILTER
       husk-lab demo [OPTIONS]               a container in a microVM, with explanations
       husk-lab bench [OPTIONS] [-- ARGS...] husk beside runc in virtual time -> target/bench/report.json
       husk-lab prepare                      build and cache what the lab needs

options:
  --husk DIR        directory of husk's binaries [target/x86_64-unknown-linux-gnu/release]
  --kernel FILE     guest kernel [deploy/kernel/build]
  --initrd FILE     guest initrd [made from husk-agent]
  --copy SRC:DST    put a file or a directory into the lab (again and again)
  --env NAME=VALUE  environment of the job
  --memory MIB      memory of the lab [6144]
  --cpus N          processors of the lab [2]
  --timeout SECS    give the whole run up after so much wall time [run: 900, test: 3000]
  --limit SECS      lab time that one test may take [600]
  --cold            no tests of clones, and none of pods with clones
  --ignored         the tests that are ignored otherwise, and no others: they take long
  --virtual-time    the clock counts instructions (as in bench)
  --containerd 1.7|2.1  the containerd [1.7; test: 2.1 for pods that boot, 1.7 for clones]
  --no-containerd   do not start containerd
  --stock-qemu      use the host's QEMU instead of building the patched one
";

/// What the options say; defaults depend on the verb.
struct Options {
    husk: Option<PathBuf>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    copies: Vec<(PathBuf, PathBuf)>,
    env: Vec<(String, String)>,
    memory_mib: u32,
    cpus: u32,
    timeout_secs: Option<u64>,
    limit_secs: u64,
    clock: Clock,
    /// `None`: the verb's default.
    containerd: Option<Version>,
    no_containerd: bool,
    stock_qemu: bool,
    ignored: bool,
    cold: bool,
    words: Vec<String>,
}

fn main() -> ExitCode {
    match try_main() {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("husk-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn try_main() -> Result<u8> {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let options = parse(args)?;
    match verb.as_str() {
        "shell" => shell(&options),
        "run" => run(&options),
        "test" => suite::run(&options),
        "demo" => demo(options),
        "bench" => bench(options),
        "prepare" => {
            assets::prepare(options.stock_qemu)?;
            Ok(0)
        }
        _ => {
            eprint!("{USAGE}");
            Ok(2)
        }
    }
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options {
        husk: None,
        kernel: None,
        initrd: None,
        copies: Vec::new(),
        env: Vec::new(),
        memory_mib: 6144,
        cpus: 2,
        timeout_secs: None,
        limit_secs: 600,
        clock: Clock::Wall,
        containerd: None,
        no_containerd: false,
        stock_qemu: std::env::var_os("HUSK_STOCK_QEMU").is_some(),
        ignored: false,
        cold: false,
        words: Vec::new(),
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--husk" => options.husk = Some(value()?.into()),
            "--kernel" => options.kernel = Some(value()?.into()),
            "--initrd" => options.initrd = Some(value()?.into()),
            "--copy" => {
                let pair = value()?;
                let (from, to) = pair.split_once(':').context("--copy needs SRC:DST")?;
                options.copies.push((from.into(), to.into()));
            }
            "--env" => {
                let pair = value()?;
                let (name, value) = pair.split_once('=').context("--env needs NAME=VALUE")?;
                options.env.push((name.to_owned(), value.to_owned()));
            }
            "--memory" => options.memory_mib = value()?.parse().context("--memory")?,
            "--cpus" => options.cpus = value()?.parse().context("--cpus")?,
            "--timeout" => options.timeout_secs = Some(value()?.parse().context("--timeout")?),
            "--limit" => options.limit_secs = value()?.parse().context("--limit")?,
            "--virtual-time" => options.clock = Clock::Virtual,
            "--containerd" => options.containerd = Some(value()?.parse()?),
            "--no-containerd" => options.no_containerd = true,
            "--ignored" => options.ignored = true,
            "--cold" => options.cold = true,
            "--stock-qemu" => options.stock_qemu = true,
            "--" => options.words.extend(args.by_ref()),
            _ if arg.starts_with('-') => bail!("unknown option {arg}\n{USAGE}"),
            _ => options.words.push(arg),
        }
    }
    Ok(options)
}

impl Options {
    fn plan(&self, job: Job) -> Plan {
        self.plan_with(Version::V1_7, job)
    }

    /// With that containerd, where the options ask for no other.
    fn plan_with(&self, containerd: Version, job: Job) -> Plan {
        let mut env = self.env.clone();
        env.push(("HUSK_LAB_CLOCK".to_owned(), self.clock.name().to_owned()));
        Plan {
            job,
            containerd: (!self.no_containerd).then_some(self.containerd.unwrap_or(containerd)),
            results_in_memory: self.clock == Clock::Virtual,
            limit_secs: self.limit_secs,
            env,
        }
    }
}

fn shell(options: &Options) -> Result<u8> {
    let mut plan = options.plan(Job::Shell);
    for name in ["TERM", "LINES", "COLUMNS"] {
        if let Ok(value) = std::env::var(name) {
            plan.env.push((name.to_owned(), value));
        }
    }
    let stage = Stage::new("shell", options, Needs::Available)?;
    eprintln!("husk-lab: leave with `exit`; Ctrl-A x switches the lab off");
    let end = Machine::boot(&stage, &plan, options)?.wait(None, &mut |_| {})?;
    eprintln!(
        "husk-lab: what was in /results is in {}",
        stage.results().display()
    );
    Ok(status_of(&end))
}

fn run(options: &Options) -> Result<u8> {
    if options.words.is_empty() {
        bail!("husk-lab run: no command\n{USAGE}");
    }
    one_command("run", options, Needs::Available, options.words.clone(), 900)
}

fn one_command(
    name: &str,
    options: &Options,
    needs: Needs,
    command: Vec<String>,
    timeout: u64,
) -> Result<u8> {
    let plan = options.plan(Job::Run { command });
    let stage = Stage::new(name, options, needs)?;
    let end = Machine::boot(&stage, &plan, options)?
        .wait(options.timeout_secs.or(Some(timeout)), &mut say_ready)?;
    if let End::Died { why } = &end {
        eprintln!("husk-lab: the lab died: {why}");
    }
    eprintln!("husk-lab: logs are in {}", stage.results().display());
    Ok(status_of(&end))
}

/// A first demo does not wait for the patched QEMU to be compiled: one guest at a time runs well on the stock one.
fn demo(mut options: Options) -> Result<u8> {
    options.stock_qemu |= !assets::patched_qemu_cached();
    let words = ["sh", "/lab/demo.sh"].map(str::to_owned).to_vec();
    one_command("demo", &options, Needs::Everything, words, 600)
}

fn bench(mut options: Options) -> Result<u8> {
    options.clock = Clock::Virtual;
    let mut words = vec![
        "/lab/husk-bench".to_owned(),
        "/results/report.json".to_owned(),
    ];
    words.append(&mut options.words);
    let plan = options.plan(Job::Run { command: words });
    let stage = Stage::new("bench", &options, Needs::Everything)?;
    let machine = Machine::boot(&stage, &plan, &options)?;
    let end = machine.wait(options.timeout_secs.or(Some(1500)), &mut |_| {})?;
    if let End::Died { why } = &end {
        bail!("the lab died: {why}; see {}", stage.results().display());
    }
    let report = stage.results().join("report.json");
    if report.exists() {
        let target = assets::repository().join("target/bench");
        std::fs::create_dir_all(&target)?;
        std::fs::copy(&report, target.join("report.json")).context("copy report.json")?;
        eprintln!(
            "husk-lab: report in {}",
            target.join("report.json").display()
        );
    }
    Ok(status_of(&end))
}

/// On the error stream: what is in the lab's output belongs to its command.
fn say_ready(report: &Report) {
    if let Report::Ready {
        containerd: Some(version),
        ..
    } = report
    {
        eprintln!("husk-lab: containerd {version}");
    }
}

fn status_of(end: &End) -> u8 {
    match end {
        End::Done { status } => u8::try_from(*status).unwrap_or(1),
        End::Died { .. } => 126,
    }
}
