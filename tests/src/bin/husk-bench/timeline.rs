//! The shim's own account of its starts: its lines `start of ID, in ms since the shim: vmm=5.4 create=6.3 …`
//! in containerd's log.

use std::{
    fmt,
    fs::File,
    io::{Read, Seek, SeekFrom},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

const LOG: &str = "/results/containerd.log";
const BEFORE_STEPS: &str = "in ms since the shim: ";
/// containerd copies a shim's log to its own when it gets round to it.
const COPIED: Duration = Duration::from_millis(20);

/// containerd's log, read on from where it was left.
pub struct Log(File);

/// Steps of starts with their times, in the order in which they mostly happen.
#[derive(Default)]
pub struct Steps(Vec<(String, Vec<f64>)>);

impl Log {
    /// From its end on.
    pub fn open() -> Result<Self> {
        let mut file = File::open(LOG).with_context(|| format!("open {LOG}"))?;
        file.seek(SeekFrom::End(0))?;
        Ok(Log(file))
    }

    /// Adds the starts that were logged since the last call.
    pub fn starts(&mut self, steps: &mut Steps) -> Result<()> {
        thread::sleep(COPIED);
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes)?;
        for line in String::from_utf8_lossy(&bytes).lines() {
            if let Some((_, found)) = line.split_once(BEFORE_STEPS) {
                steps.add(found);
            }
        }
        Ok(())
    }
}

impl Steps {
    fn add(&mut self, line: &str) {
        let line = line.split('"').next().unwrap_or(line);
        for word in line.split_whitespace() {
            let Some((name, time)) = word.split_once('=') else {
                continue;
            };
            let Ok(time) = time.parse() else { continue };
            match self.0.iter_mut().find(|(known, _)| known == name) {
                Some((_, times)) => times.push(time),
                None => self.0.push((name.to_owned(), vec![time])),
            }
        }
    }

    fn means(&self) -> Vec<(&str, f64)> {
        let mean = |times: &[f64]| times.iter().sum::<f64>() / times.len().max(1) as f64;
        let mut means: Vec<_> = self
            .0
            .iter()
            .map(|(name, times)| (name.as_str(), mean(times)))
            .collect();
        means.sort_by(|one, other| one.1.total_cmp(&other.1));
        means
    }

    /// `[{"step", "ms"}]`, by time.
    pub fn json(&self) -> Value {
        let step = |(name, mean)| json!({"step": name, "ms": mean});
        self.means().into_iter().map(step).collect()
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, mean)) in self.means().iter().enumerate() {
            let separator = if index == 0 { "" } else { " " };
            write!(f, "{separator}{name}={mean:.1}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_averaged_and_shown_by_time() {
        let mut steps = Steps::default();
        steps.add("vmm=5.0 agent=21.0 create=6.0\" runtime=x");
        steps.add("vmm=6.0 create=8.0 agent=22.0");
        assert_eq!(steps.to_string(), "vmm=5.5 create=7.0 agent=21.5");
    }
}
