//! Containers as `ctr` starts them: one at a time, fifty at once, and what they weigh when idle.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use husk_tests::{
    ctr::{Container, Run, Runtime, fresh_id},
    settings::Settings,
};

use crate::{
    host::{CpuMeter, private_mib, pss_mib},
    report::{Measure, percentile},
    settings,
    timeline::{Log, Steps},
};

/// Samples of each measure and runtime.
pub const SAMPLES: usize = 10;
/// Pods started at once.
const CROWD: usize = 50;
/// Idle pods whose memory is averaged.
const PODS: usize = 20;
/// For pods to come to rest.
pub const REST: Duration = Duration::from_millis(500);

/// Who starts a container.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Runc,
    /// With templates.
    Husk,
    /// Without.
    HuskCold,
}

impl Side {
    fn runtime(self) -> Runtime {
        match self {
            Side::Runc => Runtime::Runc,
            Side::Husk | Side::HuskCold => Runtime::Husk,
        }
    }
}

/// Time and processor time of `ctr run --rm … true`.
#[derive(Default)]
struct Runs {
    took: Vec<f64>,
    cpu: Vec<f64>,
}

pub fn ctr_run(
    log: &mut Log,
    timelines: &mut BTreeMap<&'static str, Steps>,
) -> Result<Vec<Measure>> {
    let meter = CpuMeter::new()?;
    let sides = [
        (Side::Runc, "runc"),
        (Side::Husk, "ctr-run"),
        (Side::HuskCold, "ctr-run-cold"),
    ];
    let mut all: [Runs; 3] = Default::default();
    // The first round warms the page cache and is not counted.
    for round in 0..=SAMPLES {
        for ((side, name), runs) in sides.iter().zip(&mut all) {
            let _cold = (*side == Side::HuskCold).then(|| Settings::write(&settings(false)));
            let before = meter.read()?;
            let began = Instant::now();
            finish(
                &mut Run::husk(&["true"])
                    .runtime(side.runtime())
                    .command(&fresh_id("run")),
            )?;
            let took = milliseconds(began);
            meter.settle()?;
            let cpu = meter.read()? - before;
            if round > 0 {
                runs.took.push(took);
                runs.cpu.push(cpu);
            }
            let mut steps = Steps::default();
            let steps = match (round, side) {
                (0, _) | (_, Side::Runc) => &mut steps,
                _ => timelines.entry(name).or_default(),
            };
            log.starts(steps)?;
        }
    }
    let [runc, husk, cold] = all;
    let pair = |name, runc: &Vec<f64>, husk| Measure {
        name,
        unit: "ms",
        runc: runc.clone(),
        husk,
    };
    Ok(vec![
        pair("ctr-run", &runc.took, husk.took),
        pair("ctr-run-cold", &runc.took, cold.took),
        pair("cpu-per-start", &runc.cpu, husk.cpu),
        pair("cpu-per-cold-start", &runc.cpu, cold.cpu),
    ])
}

pub fn exec() -> Result<Measure> {
    let pods = [Runtime::Runc, Runtime::Husk].map(Container::idle);
    let mut all: [Vec<f64>; 2] = Default::default();
    for round in 0..=SAMPLES {
        for (pod, samples) in pods.iter().zip(&mut all) {
            let began = Instant::now();
            finish(&mut pod.exec_command(&[], &["true"]))?;
            if round > 0 {
                samples.push(milliseconds(began));
            }
        }
    }
    let [runc, husk] = all;
    Ok(Measure {
        name: "exec",
        unit: "ms",
        runc,
        husk,
    })
}

/// What many pods at once took, and what some of them weigh.
#[derive(Default)]
pub struct Crowd {
    /// Of each start.
    took: Vec<f64>,
    /// Means of idle pods, in MiB. The container's own process, which runc's pods have on the host, is
    /// not counted.
    pss: f64,
    pss_shim: f64,
    private_shim: f64,
    pss_vmm: f64,
    private_vmm: f64,
}

/// Starts many pods at once, each by a `ctr run -d` of its own, and weighs those that stay.
pub fn crowd(side: Side) -> Result<Crowd> {
    // Warm, and out of the way.
    Container::idle(side.runtime()).remove();
    let starts: Vec<_> = (0..CROWD)
        .map(|_| {
            let id = fresh_id("crowd");
            let mut command = Command::new("ctr");
            command.args(["run", "-d", "--null-io", "--runtime", side.runtime().name()]);
            command.args([husk_tests::ctr::IMAGE, &id, "sleep", "86400"]);
            thread::spawn(move || {
                let began = Instant::now();
                let container = Container { id };
                let outcome = finish(&mut command);
                (container, outcome.map(|()| milliseconds(began)))
            })
        })
        .collect();
    let mut crowd = Crowd::default();
    let mut pods = Vec::new();
    for start in starts {
        let (pod, took) = start.join().ok().context("a start panicked")?;
        pods.push(pod);
        crowd.took.push(took?);
    }
    for pod in pods.drain(PODS..) {
        pod.remove();
    }
    thread::sleep(REST);
    let mean = |mib: f64| mib / PODS as f64;
    crowd.pss_shim = mean(pss_mib("containerd-shim"));
    crowd.private_shim = mean(private_mib("containerd-shim"));
    crowd.pss_vmm = mean(pss_mib("husk-vmm"));
    crowd.private_vmm = mean(private_mib("husk-vmm"));
    crowd.pss = crowd.pss_shim + crowd.pss_vmm;
    for pod in pods {
        pod.remove();
    }
    Ok(crowd)
}

pub fn crowds(runc: Crowd, husk: Crowd) -> Vec<Measure> {
    let pair = |name, unit, of: &dyn Fn(&Crowd) -> Vec<f64>| Measure {
        name,
        unit,
        runc: of(&runc),
        husk: of(&husk),
    };
    let p99 = |crowd: &Crowd| percentile(&crowd.took, 0.99).unwrap_or(f64::NAN);
    let p50 = |crowd: &Crowd| percentile(&crowd.took, 0.5).unwrap_or(f64::NAN);
    vec![
        pair("start-50", "ms", &|crowd| crowd.took.clone()),
        pair("start-50-p99", "ms", &|crowd| vec![p99(crowd)]),
        pair("start-50-spread", "1", &|crowd| {
            vec![p99(crowd) / p50(crowd)]
        }),
        pair("pss-per-pod", "MiB", &|crowd| vec![crowd.pss]),
        pair("pss-of-shim", "MiB", &|crowd| vec![crowd.pss_shim]),
        pair("private-of-shim", "MiB", &|crowd| vec![crowd.private_shim]),
        Measure::of_husk("pss-of-vmm", "MiB", vec![husk.pss_vmm]),
        Measure::of_husk("private-of-vmm", "MiB", vec![husk.private_vmm]),
    ]
}

/// Runs it to its end. Blocks for exactly as long: a look at it now and then would be measured, too.
pub fn finish(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

pub fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}
