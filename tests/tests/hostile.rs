//! A guest that owns its rings and fights its VMM: every act ends in a reason, or in nothing. What it costs the host
//! is bounded, it leaves nothing behind, and its neighbours go on as before.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use husk_proto::machine::{ShareRequest, status_response::State, wait_response::Reason};
use husk_tests::{
    census::Census,
    command::{PATIENCE, eventually},
    ctr::{Container, PROBE_MOUNT, Run, Runtime},
    machine::{
        self, HOSTILE_DONE, HOSTILE_FAILED, KERNEL, Machine, Process, block_on, probe_initrd,
    },
    steady::Steady,
};

const MEMORY_MIB: u64 = 128;
/// What the VMM itself may use beside its guest's memory, in KiB: its program, its stacks, 1,024 connections' worth of
/// buffers would be more, but nobody on the host reads slowly here.
const OWN_KIB: u64 = 48 << 10;
const DESCRIPTORS: usize = 128;
const THREADS: usize = 16;
/// Of its log: a burst, and a line per second.
const LOG_LINES: usize = 64 + PATIENCE.as_secs() as usize / 2 + 5;

/// Of steady work, before the guest is let loose.
const ROUNDS: u64 = 200;

/// Of what the guest makes up.
const SEED: u64 = 0x5eed;

/// How an act ended.
#[derive(Debug)]
enum End {
    /// The machine is there, and the guest is through.
    Nothing,
    Reason(Reason, String),
}

/// A directory for the guest to do its worst in.
fn playground() -> PathBuf {
    let path = PathBuf::from("/run/husk-hostile");
    fs::create_dir_all(&path).expect("create a directory");
    fs::write(path.join("hostile"), [b'x'; 5000]).expect("write a file");
    path
}

/// Has a guest perform `act` on `device`, and looks at its VMM.
fn perform(initrd: &Path, act: &str, device: &str, seed: u64) -> Result<End> {
    let (path, log) = log_file()?;
    let cmdline =
        format!("husk_probe=hostile husk_act={act} husk_device={device} husk_seed={seed}");
    // The machine's socket closes with the runtime.
    let (end, mut process) = block_on(fight(initrd, &cmdline, log))?;
    process.wait_gone()?;
    let said = fs::read_to_string(&path)?;
    fs::remove_file(&path)?;
    ensure!(!said.contains("panicked"), "{said}");
    let lines = said.lines().count();
    ensure!(lines <= LOG_LINES, "{lines} lines of log");
    match &end {
        End::Reason(Reason::DEVICE_ERROR, detail) => {
            ensure!(said.contains(detail.as_str()), "{detail:?} was not logged");
        }
        End::Reason(reason @ (Reason::REASON_UNSPECIFIED | Reason::KVM_ERROR), detail) => {
            bail!("{reason:?}: {detail}")
        }
        _ => {}
    }
    Ok(end)
}

async fn fight(initrd: &Path, cmdline: &str, log: File) -> Result<(End, Process)> {
    let mut machine = Machine::spawn_with(Stdio::from(log))?;
    // The host's end of the agent's connection: nobody reads it.
    let agent = machine
        .boot(Path::new(KERNEL), initrd, MEMORY_MIB, 1, cmdline)
        .await?;
    let share = ShareRequest {
        name: "playground".to_owned(),
        fd: machine.pass(File::open(playground())?)?,
        ..Default::default()
    };
    machine.client().share(machine::patience(), &share).await?;
    let deadline = Instant::now() + PATIENCE / 2;
    let end = loop {
        let status = machine.status().await.context("the VMM does not answer")?;
        let console = String::from_utf8_lossy(&status.console).into_owned();
        if status.state.enum_value_or_default() == State::ENDED {
            let ended = machine.wait().await?;
            let last = String::from_utf8_lossy(&ended.console);
            ensure!(!last.contains(HOSTILE_FAILED), "{last}");
            break End::Reason(ended.reason.enum_value_or_default(), ended.detail);
        }
        if console.contains(HOSTILE_DONE.trim_end()) {
            break End::Nothing;
        }
        ensure!(Instant::now() < deadline, "no end: {console}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    bounded(machine.pid())?;
    drop(agent);
    Ok((end, machine.hang_up()))
}

fn log_file() -> Result<(PathBuf, File)> {
    let path = PathBuf::from("/var/tmp/hostile.log");
    let file = File::create(&path)?;
    Ok((path, file))
}

/// What the VMM holds.
fn bounded(pid: u32) -> Result<()> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let number = |name: &str| -> Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let word = line.and_then(|line| line.split_whitespace().next());
        Ok(word.with_context(|| name.to_owned())?.parse()?)
    };
    let most = number("VmHWM:")?;
    ensure!(most <= MEMORY_MIB * 1024 + OWN_KIB, "{most} KiB of memory");
    let threads = number("Threads:")?;
    ensure!(threads <= THREADS as u64, "{threads} threads");
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    ensure!(descriptors <= DESCRIPTORS, "{descriptors} descriptors");
    Ok(())
}

/// Every one of `acts` on every device, with a word of how it ended.
fn assert_survived(acts: &[&str], devices: &[&str]) {
    let initrd = probe_initrd();
    let mut failures = Vec::new();
    for act in acts {
        for device in devices {
            let began = Instant::now();
            let outcome = perform(&initrd, act, device, SEED);
            println!(
                "{act} on {device}, {:.1} s: {outcome:?}",
                began.elapsed().as_secs_f32()
            );
            if let Err(error) = outcome {
                failures.push(format!("{act} on {device}: {error:#}"));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

const ALL: [&str; 3] = ["vsock", "fs", "rng"];

#[test]
fn broken_chains_end_in_a_reason_or_in_nothing() {
    let acts = [
        "loops", "overlaps", "outside", "lengths", "order", "nothing",
    ];
    assert_survived(&acts, &ALL);
}

#[test]
fn broken_rings_end_in_a_reason_or_in_nothing() {
    assert_survived(&["indirect", "available", "heads", "rings"], &ALL);
}

#[test]
fn floods_end_in_a_reason_or_in_nothing() {
    assert_survived(&["doorbells", "requests", "resets"], &ALL);
}

#[test]
fn registers_of_all_kinds_end_in_a_reason_or_in_nothing() {
    assert_survived(&["registers"], &ALL);
    assert_survived(&["ports", "console"], &["rng"]);
}

/// Three pods beside a guest that fights: their sums are right, and they go on. How late their sleeps end is told,
/// with and without it.
#[test]
fn neighbours_do_not_notice() {
    // The first of its kind may create directories that stay for good.
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let args = ["/probe", "steady", "/tmp/steady"];
    let flags = ["--null-io", "--mount", PROBE_MOUNT];
    let pods: Vec<_> = (0..3)
        .map(|_| Container::detached(Runtime::Husk, &flags, &args))
        .collect();
    // Nothing until each has said something.
    let look = || -> Option<Vec<Steady>> {
        let script = "cat /tmp/steady 2>/dev/null || true";
        let look = |pod: &Container| pod.exec(&["sh", "-c", script]).ok();
        let texts = pods.iter().map(look);
        texts.map(|text| Steady::parse(&text).ok()).collect()
    };
    // Long enough for a latency that says something.
    let deadline = Instant::now() + PATIENCE;
    let steady = || look().filter(|pods| pods.iter().all(|pod| pod.rounds >= ROUNDS));
    let quiet = eventually(deadline, steady).expect("three steady pods");
    let initrd = probe_initrd();
    let acts = [
        ("loops", "vsock"),
        ("requests", "vsock"),
        ("requests", "fs"),
        ("resets", "vsock"),
        ("rings", "fs"),
    ];
    for (act, device) in acts {
        let end = perform(&initrd, act, device, SEED).expect(act);
        println!("{act} on {device}: {end:?}");
    }
    let loud = look().expect("three steady pods");
    for (quiet, loud) in quiet.iter().zip(&loud) {
        println!("before: {quiet:?}, beside the hostile guest: {loud:?}");
        assert_eq!((quiet.wrong, loud.wrong), (0, 0), "a sum came out wrong");
        assert!(loud.rounds > quiet.rounds, "a pod stands still");
    }
    for pod in pods {
        pod.remove();
    }
    before.assert_restored();
}
