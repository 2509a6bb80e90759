//! Pods as a kubelet starts them: from `RunPodSandbox` to the first word of the first container, and commands in them.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use husk_tests::{
    containerd::{self, Version},
    cri::{Handler, Pod, pod_config},
    ctr::fresh_id,
    settings::Settings,
};
use rustix::fs::inotify;

use crate::{
    report::Measure,
    settings,
    starts::{SAMPLES, milliseconds},
    timeline::{Log, Steps},
};

/// Who runs a pod, whether clones may be started, and the measure's name.
type Side = (Handler, bool, &'static str);

const RUNC: Side = (Handler::Runc, true, "runc");
const HUSK: [Side; 2] = [
    (Handler::Husk, true, "cri-pod"),
    (Handler::Husk, false, "cri-pod-cold"),
];
/// Where containerd has it.
const BY_SANDBOX_API: Side = (Handler::HuskShim, true, "cri-pod-sandbox");

/// With containerd's CRI switched on for as long as it takes.
pub fn pods(log: &mut Log, timelines: &mut BTreeMap<&'static str, Steps>) -> Result<Vec<Measure>> {
    containerd::serve_cri(true)?;
    let measures = measure(log, timelines);
    containerd::serve_cri(false)?;
    measures
}

fn measure(log: &mut Log, timelines: &mut BTreeMap<&'static str, Steps>) -> Result<Vec<Measure>> {
    let mut sides = vec![RUNC];
    sides.extend(HUSK);
    if containerd::selected() == Version::V2_1 {
        sides.push(BY_SANDBOX_API);
    }
    let mut started: Vec<Vec<f64>> = vec![Vec::new(); sides.len()];
    // The first round warms the page cache and is not counted.
    for round in 0..=SAMPLES {
        for ((handler, clones, name), samples) in sides.iter().zip(&mut started) {
            let _cold = (!clones).then(|| Settings::write(&settings(false)));
            let took = first_word(*handler)?;
            let mut steps = Steps::default();
            let steps = match (round, handler) {
                (0, _) | (_, Handler::Runc) => &mut steps,
                _ => timelines.entry(name).or_default(),
            };
            log.starts(steps)?;
            if round > 0 {
                samples.push(took);
            }
        }
    }
    let mut started = sides.iter().map(|side| side.2).zip(started);
    let (_, runc) = started.next().context("runc is measured")?;
    let mut measures: Vec<Measure> = started
        .map(|(name, husk)| Measure {
            name,
            unit: "ms",
            runc: runc.clone(),
            husk,
        })
        .collect();
    measures.push(exec()?);
    Ok(measures)
}

/// Milliseconds until the log of the pod's first container has a word.
fn first_word(handler: Handler) -> Result<f64> {
    let config = pod_config(&fresh_id("pod"));
    let logs = PathBuf::from(&config.log_directory);
    fs::create_dir_all(&logs).with_context(|| format!("make {}", logs.display()))?;
    let words = Words::watch(&logs)?;
    let began = Instant::now();
    let pod = Pod::of(handler, config)?;
    let container = pod.create(pod.container(&["sh", "-c", "echo word; exec sleep 86400"]))?;
    container.start()?;
    words.wait()?;
    let took = milliseconds(began);
    ensure!(container.logs() == "word\n", "{:?}", container.raw_log());
    pod.stop()?;
    pod.remove()?;
    Ok(took)
}

/// What is written into the files of a directory.
struct Words(rustix::fd::OwnedFd);

impl Words {
    fn watch(directory: &Path) -> Result<Self> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&watch, directory, inotify::WatchFlags::MODIFY)?;
        Ok(Words(watch))
    }

    /// Blocks until there is some.
    fn wait(&self) -> Result<()> {
        rustix::io::read(&self.0, &mut [0; 4096]).context("wait for a word")?;
        Ok(())
    }
}

fn exec() -> Result<Measure> {
    let pods = [Handler::Runc, Handler::Husk].map(Pod::run);
    let containers = pods.iter().map(Pod::idle);
    let containers: Vec<_> = containers.collect();
    let mut all: [Vec<f64>; 2] = Default::default();
    for round in 0..=SAMPLES {
        for (container, samples) in containers.iter().zip(&mut all) {
            let began = Instant::now();
            container.try_exec(&["true"]);
            if round > 0 {
                samples.push(milliseconds(began));
            }
        }
    }
    let [runc, husk] = all;
    Ok(Measure {
        name: "cri-exec",
        unit: "ms",
        runc,
        husk,
    })
}
