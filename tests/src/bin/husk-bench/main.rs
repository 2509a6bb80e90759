//! husk beside runc, in one run: `husk-bench REPORT.json [MEASURE...]`, inside the lab, whose clock it trusts.
//!
//! Samples of the two runtimes alternate, so that whatever drifts, drifts for both. Templates lie in
//! memory, as everything else does there, and are built before the first sample. This file knows what is
//! measured in which order; see `starts` (containers), `stdio`, `network`, `cri` (pods of Kubernetes), `machines` (husk-vmm alone), `host` (what the
//! kernel counts), `timeline` (the shim's own account of a start) and `report`.

mod cri;
mod host;
mod machines;
mod network;
mod report;
mod starts;
mod stdio;
mod timeline;

use std::{
    env, fs,
    path::Path,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use husk_tests::settings::Settings;

use crate::{report::Report, starts::Side, timeline::Log};

/// The guest's memory in every measure.
const MEMORY_MIB: u64 = 128;
/// Where this run's templates are: /var/tmp is memory in the lab.
const TEMPLATES: &str = "/var/tmp/husk-bench-templates";

fn main() -> ExitCode {
    let mut args = env::args().skip(1);
    let Some(report) = args.next() else {
        eprintln!("usage: husk-bench REPORT.json [starts|exec|stdio|network|machines|pods|cri...]");
        return ExitCode::from(2);
    };
    let wanted: Vec<String> = args.collect();
    match bench(Path::new(&report), &wanted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// husk's configuration: with templates, or without.
fn settings(templates: bool) -> String {
    let templates = if templates { "namespace" } else { "off" };
    format!("memory_mib = {MEMORY_MIB}\ntemplate_dir = {TEMPLATES:?}\ntemplates = {templates:?}\n")
}

fn bench(path: &Path, wanted: &[String]) -> Result<()> {
    let began = Instant::now();
    let wants = |what: &str| wanted.is_empty() || wanted.iter().any(|word| word == what);
    let progress = |what: &str| {
        println!("[{:>6.1} s] {what}", began.elapsed().as_secs_f64());
    };
    let _settings = Settings::write(&settings(true));
    progress("template build");
    for namespace in ["default", husk_tests::cri::PODS] {
        let mut build = Command::new("husk");
        build.args(["template", "build", "--namespace", namespace]);
        let built = build.output().context("start husk template build")?;
        ensure!(
            built.status.success(),
            "husk template build: {}",
            String::from_utf8_lossy(&built.stderr)
        );
    }

    let mut report = Report::new();
    let mut log = Log::open()?;
    if wants("starts") {
        progress("ctr-run, ctr-run-cold, cpu-per-start");
        let measures = starts::ctr_run(&mut log, &mut report.timelines)?;
        report.add(measures);
    }
    if wants("exec") {
        progress("exec");
        report.add([starts::exec()?]);
    }
    if wants("stdio") {
        progress("stdio");
        report.add([stdio::stdio()?]);
    }
    if wants("network") {
        progress("tcp-stream, tcp-rtt, ctr-run-network");
        let timeline = report.timelines.entry("ctr-run-network").or_default();
        let measures = network::network(&mut log, timeline)?;
        report.add(measures);
    }
    if wants("machines") {
        progress("vmm-boot, vmm-clone");
        report.add(machines::boots_and_clones(Path::new(TEMPLATES))?);
    }
    if wants("pods") {
        progress("start-50, pss-per-pod: runc");
        let runc = starts::crowd(Side::Runc)?;
        progress("start-50, pss-per-pod: husk");
        let husk = starts::crowd(Side::Husk)?;
        report.add(starts::crowds(runc, husk));
    }
    if wants("cri") {
        progress("cri-pod, cri-pod-cold, cri-exec");
        let measures = cri::pods(&mut log, &mut report.timelines)?;
        report.add(measures);
    }
    progress("done");
    report.write(path)?;
    report.print();
    let _ = fs::remove_dir_all(TEMPLATES);
    Ok(())
}
