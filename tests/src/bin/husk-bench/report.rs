//! What was measured, as a table for people and as report.json. Names of measures stay for good.

use std::{collections::BTreeMap, env, fs, path::Path, process::Command};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{MEMORY_MIB, timeline::Steps};

/// What one exit of a vCPU costs on real hardware, which the lab's clock does not see (docs/lab.md).
const EXIT_MICROSECONDS: f64 = 1.5;
/// Exits of a measure, and the time that they would add to.
const PRICED: [(&str, &str); 2] = [
    ("exits-per-boot", "vmm-boot"),
    ("exits-per-clone", "vmm-clone"),
];

/// One line of the table. A measure that has no meaning for runc has no samples of it.
pub struct Measure {
    pub name: &'static str,
    pub unit: &'static str,
    pub runc: Vec<f64>,
    pub husk: Vec<f64>,
}

impl Measure {
    /// One of husk alone.
    pub fn of_husk(name: &'static str, unit: &'static str, husk: Vec<f64>) -> Self {
        Measure {
            name,
            unit,
            runc: Vec::new(),
            husk,
        }
    }
}

pub struct Report {
    clock: String,
    measures: Vec<Measure>,
    /// Of the starts that a measure took, by its name.
    pub timelines: BTreeMap<&'static str, Steps>,
}

impl Report {
    pub fn new() -> Self {
        Report {
            clock: env::var("HUSK_LAB_CLOCK").unwrap_or_else(|_| "wall".to_owned()),
            measures: Vec::new(),
            timelines: BTreeMap::new(),
        }
    }

    /// Shows them, too: a run takes minutes.
    pub fn add(&mut self, measures: impl IntoIterator<Item = Measure>) {
        for measure in measures {
            println!("{}", measure.line());
            self.measures.push(measure);
        }
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let timelines: BTreeMap<_, _> = self
            .timelines
            .iter()
            .map(|(name, steps)| (name, steps.json()))
            .collect();
        let text = json!({
            "clock": self.clock,
            "environment": environment(),
            "measures": self.measures.iter().map(Measure::json).collect::<Vec<_>>(),
            "timelines": timelines,
        });
        fs::write(path, serde_json::to_string_pretty(&text)?)
            .with_context(|| format!("write {}", path.display()))
    }

    pub fn print(&self) {
        println!("\nclock: {}; medians (90th percentile)", self.clock);
        println!(
            "{:<18} {:>5} {:>20} {:>20} {:>7}",
            "measure", "unit", "runc", "husk", "ratio"
        );
        for measure in &self.measures {
            println!("{}", measure.line());
        }
        for (exits, time) in PRICED {
            let measure = self.measures.iter().find(|measure| measure.name == exits);
            if let Some(median) = measure.and_then(|measure| median(&measure.husk)) {
                let price = median * EXIT_MICROSECONDS / 1000.0;
                println!(
                    "exits at {EXIT_MICROSECONDS} us each would add {price:.1} ms to {time} on real hardware"
                );
            }
        }
        println!("timelines of husk's starts, mean ms since the shim was executed:");
        for (name, steps) in &self.timelines {
            println!("{name:<18} {steps}");
        }
    }
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
            (Some(median), Some(high)) => format!("{median:.2} ({high:.2})"),
            _ => "-".to_owned(),
        };
        let ratio = self
            .ratio()
            .map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let (runc, husk) = (side(&self.runc), side(&self.husk));
        format!(
            "{:<18} {:>5} {runc:>20} {husk:>20} {ratio:>7}",
            self.name, self.unit
        )
    }
}

pub fn median(samples: &[f64]) -> Option<f64> {
    percentile(samples, 0.5)
}

/// By the nearest rank; the mean of the two middle ones for an even count's median.
pub fn percentile(samples: &[f64], share: f64) -> Option<f64> {
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

    #[test]
    fn the_ninety_ninth_of_fifty_is_the_last() {
        let samples: Vec<f64> = (1..=50).map(f64::from).collect();
        assert_eq!(percentile(&samples, 0.99), Some(50.0));
    }
}
