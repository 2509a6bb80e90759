//! husk beside runc, in one run: `husk-bench REPORT.json`, inside the lab, whose clock it trusts.
//!
//! Samples of the two runtimes alternate, so that whatever drifts, drifts for both.

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use husk_tests::{
    ctr::{Container, Run, Runtime},
    machine::{self, INITRD, KERNEL, Machine},
    settings::Settings,
};
use serde_json::{Value, json};

/// Samples of each measure and runtime.
const SAMPLES: usize = 10;
/// Idle pods whose memory is averaged.
const PODS: usize = 10;
/// The guest's memory in every measure.
const MEMORY_MIB: u64 = 128;
/// What one exit of a vCPU costs on real hardware, which the lab's clock does not see (docs/lab.md).
const EXIT_MICROSECONDS: f64 = 1.5;

fn main() -> ExitCode {
    let report = match env::args().nth(1) {
        Some(path) => path,
        None => {
            eprintln!("usage: husk-bench REPORT.json");
            return ExitCode::from(2);
        }
    };
    match bench(Path::new(&report)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One line of the table. A measure that has no meaning for runc has no samples of it.
struct Measure {
    name: &'static str,
    unit: &'static str,
    runc: Vec<f64>,
    husk: Vec<f64>,
}

fn bench(report: &Path) -> Result<()> {
    let _settings = Settings::write(&format!("memory_mib = {MEMORY_MIB}\n"));
    let clock = env::var("HUSK_LAB_CLOCK").unwrap_or_else(|_| "wall".to_owned());
    let mut measures = vec![ctr_run()?, exec()?];
    measures.extend(vmm_boot()?);
    measures.push(pss_per_pod()?);
    let text = json!({
        "clock": clock,
        "environment": environment(),
        "measures": measures.iter().map(Measure::json).collect::<Vec<_>>(),
    });
    fs::write(report, serde_json::to_string_pretty(&text)?)
        .with_context(|| format!("write {}", report.display()))?;
    println!("\nclock: {clock}; medians (90th percentile)");
    println!(
        "{:<16} {:>5} {:>20} {:>20} {:>7}",
        "measure", "unit", "runc", "husk", "ratio"
    );
    for measure in &measures {
        println!("{}", measure.line());
    }
    if let Some(exits) = measures
        .iter()
        .find(|measure| measure.name == "exits-per-boot")
    {
        let price = median(&exits.husk).unwrap_or(0.0) * EXIT_MICROSECONDS / 1000.0;
        println!(
            "exits at {EXIT_MICROSECONDS} us each would add {price:.1} ms to vmm-boot on real hardware"
        );
    }
    Ok(())
}

fn ctr_run() -> Result<Measure> {
    println!("ctr-run");
    alternate("ctr-run", |runtime| {
        let began = Instant::now();
        let outcome = Run::husk(&["true"]).runtime(runtime).go();
        ensure!(outcome.code() == 0, "ctr run: {}", outcome.err());
        Ok(milliseconds(began))
    })
}

fn exec() -> Result<Measure> {
    println!("exec");
    let [runc, husk] = [Runtime::Runc, Runtime::Husk].map(Container::idle);
    alternate("exec", |runtime| {
        let pod = if runtime == Runtime::Runc {
            &runc
        } else {
            &husk
        };
        let began = Instant::now();
        let outcome = pod.exec(&["true"]);
        ensure!(outcome.code() == 0, "ctr task exec: {}", outcome.err());
        Ok(milliseconds(began))
    })
}

/// A first round warms the page cache and is not counted.
fn alternate(name: &'static str, sample: impl Fn(Runtime) -> Result<f64>) -> Result<Measure> {
    let (mut runc, mut husk) = (Vec::new(), Vec::new());
    for round in 0..=SAMPLES {
        let pair = (sample(Runtime::Runc)?, sample(Runtime::Husk)?);
        if round > 0 {
            runc.push(pair.0);
            husk.push(pair.1);
        }
    }
    Ok(Measure {
        name,
        unit: "ms",
        runc,
        husk,
    })
}

/// From the start of husk-vmm to the agent's answer, and the exits it took, in the host's kernel
/// and to user space alike.
fn vmm_boot() -> Result<[Measure; 2]> {
    println!("vmm-boot");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut times, mut exits) = (Vec::new(), Vec::new());
    for round in 0..=SAMPLES {
        let before = kvm_exits()?;
        let began = Instant::now();
        let machine = runtime.block_on(async {
            let mut machine = Machine::spawn()?;
            let agent = machine
                .boot(Path::new(KERNEL), Path::new(INITRD), MEMORY_MIB, 1, "")
                .await?;
            machine::hello(agent).await?;
            anyhow::Ok(machine)
        })?;
        let took = milliseconds(began);
        let count = kvm_exits()? - before;
        drop(machine);
        if round > 0 {
            times.push(took);
            exits.push(count);
        }
    }
    Ok([
        Measure {
            name: "vmm-boot",
            unit: "ms",
            runc: Vec::new(),
            husk: times,
        },
        Measure {
            name: "exits-per-boot",
            unit: "1",
            runc: Vec::new(),
            husk: exits,
        },
    ])
}

/// Exits of the VMs that are there now.
fn kvm_exits() -> Result<f64> {
    let path = "/sys/kernel/debug/kvm/exits";
    let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
    text.trim()
        .parse()
        .with_context(|| format!("{path}: {text}"))
}

/// What each further idle pod costs in shim and VMM, guest included; the container's own process,
/// which runc's pods have on the host, is not counted.
fn pss_per_pod() -> Result<Measure> {
    println!("pss-per-pod");
    let mean = |runtime| {
        let pods: Vec<_> = (0..PODS).map(|_| Container::idle(runtime)).collect();
        let kib: u64 = ["containerd-shim", "husk-vmm"]
            .iter()
            .map(|name| pss_kib(name))
            .sum();
        for pod in pods {
            pod.remove();
        }
        kib as f64 / 1024.0 / PODS as f64
    };
    Ok(Measure {
        name: "pss-per-pod",
        unit: "MiB",
        runc: vec![mean(Runtime::Runc)],
        husk: vec![mean(Runtime::Husk)],
    })
}

/// Proportional set size of all processes whose program's name begins so.
fn pss_kib(program: &str) -> u64 {
    let Ok(entries) = fs::read_dir("/proc") else {
        return 0;
    };
    entries
        .flatten()
        .filter(|entry| {
            let exe = fs::read_link(entry.path().join("exe")).unwrap_or_default();
            exe.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(program))
        })
        .filter_map(|entry| {
            let rollup = fs::read_to_string(entry.path().join("smaps_rollup")).ok()?;
            let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        })
        .sum()
}

fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1000.0
}

impl Measure {
    fn json(&self) -> Value {
        let side = |samples: &[f64]| {
            median(samples).map(|median| {
                json!({"median": median, "p90": percentile(samples, 0.9), "samples": samples})
            })
        };
        json!({
            "name": self.name,
            "unit": self.unit,
            "runc": side(&self.runc),
            "husk": side(&self.husk),
            "ratio": self.ratio(),
        })
    }

    fn ratio(&self) -> Option<f64> {
        Some(median(&self.husk)? / median(&self.runc)?)
    }

    fn line(&self) -> String {
        let side = |samples: &[f64]| match (median(samples), percentile(samples, 0.9)) {
            (Some(median), Some(high)) => format!("{median:.1} ({high:.1})"),
            _ => "-".to_owned(),
        };
        let ratio = self
            .ratio()
            .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let (runc, husk) = (side(&self.runc), side(&self.husk));
        format!(
            "{:<16} {:>5} {runc:>20} {husk:>20} {ratio:>7}",
            self.name, self.unit
        )
    }
}

fn median(samples: &[f64]) -> Option<f64> {
    percentile(samples, 0.5)
}

/// By the nearest rank; the mean of the two middle ones for an even count's median.
fn percentile(samples: &[f64], share: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if share == 0.5 && sorted.len() % 2 == 0 {
        return Some((sorted.get(middle.checked_sub(1)?)? + sorted.get(middle)?) / 2.0);
    }
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.checked_sub(1)?).copied()
}

fn environment() -> Value {
    let read = |path: &str| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let version = |program: &str| {
        let output = Command::new(program).arg("--version").output();
        output.map_or(String::new(), |output| {
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .next()
                .unwrap_or("")
                .to_owned()
        })
    };
    json!({
        "kernel": read("/proc/sys/kernel/osrelease"),
        "containerd": version("containerd"),
        "runc": version("runc"),
        "transparent_hugepage": read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "processors": std::thread::available_parallelism().map_or(0, |count| count.get()),
        "guest_memory_mib": MEMORY_MIB,
        "exit_price_us": EXIT_MICROSECONDS,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_lies_between() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[2.0, 9.0, 1.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn the_ninetieth_of_ten_is_the_ninth() {
        let samples: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!(percentile(&samples, 0.9), Some(9.0));
    }
}
