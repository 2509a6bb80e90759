//! The end-to-end tests: built by cargo here, run in the lab, judged and counted here.
//!
//! Pods that boot have one lab, under [`BOOTS_ON`], and pods that are clones another, under [`CLONES_ON`], at the same time
//! where there is room for two: so every test that has a pod runs under both versions of containerd.
//! Where a lab dies, the tests that are left get a fresh one, and the test that it was running comes last
//! there: if it is to blame, the others have had their turn.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use husk_tests::{
    containerd::Version,
    wire::{Case, Job, Report, Verdict},
};

use crate::{
    Options, assets,
    machine::{End, Machine},
    stage::{Needs, Stage},
};

/// Tests that have no pod that containerd starts, that see to templates themselves, or whose long work is the guest's
/// however it has started.
const WITHOUT_CLONES: [&str; 6] = [
    "machine",
    "save",
    "network",
    "clones",
    "hostile",
    "processes",
];
/// What takes long, runs in one half each time and in the other one in `make test-long`. Comparisons: nothing of them
/// depends on how the guest has started, and little on which containerd it is. Sandboxes: where pods boot, those of CRI
/// have pause containers, and the rest is the same.
const WITH_BOOTS_ALONE: [&str; 2] = ["compared::namespaces::", "compared::process::the_rest"];
const WITH_CLONES_ALONE: [&str; 3] = [
    "compared::devices::",
    "compared::process::capabilities",
    "cri::shim::",
];
/// The containerd that pods boot under, and the one that clones start under.
const BOOTS_ON: Version = Version::V2_1;
const CLONES_ON: Version = Version::V1_7;
/// How often a new lab is booted after one has died.
const FRESH_LABS: u32 = 3;

#[derive(Default)]
struct Tally {
    passed: u32,
    failed: u32,
    ignored: u32,
    filtered: u32,
}

pub fn run(options: &Options) -> Result<u8> {
    let binaries = build()?;
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    let mut cases = Vec::new();
    for clones in [false, true] {
        for (target, binary) in &binaries {
            let once = WITHOUT_CLONES.contains(&target.as_str());
            if clones && (options.cold || once) || target == "clones" && options.cold {
                continue;
            }
            let ignored = list(binary, true)?;
            for name in list(binary, false)? {
                let case = Case {
                    target: target.clone(),
                    name,
                    clones,
                };
                let tally = tallies.entry(tally_name(&case)).or_default();
                let title = case.title();
                let chosen = |word: &String| title.contains(word);
                let wanted = options.words.is_empty() || options.words.iter().any(chosen);
                let long = ignored.contains(&case.name) || is_the_other_halfs(&case, options);
                if !wanted || (options.ignored && !long) {
                    tally.filtered += 1;
                } else if long && !options.ignored {
                    tally.ignored += 1;
                } else {
                    cases.push(case);
                }
            }
        }
    }
    if cases.is_empty() {
        bail!("no test matches {:?}", options.words);
    }

    let begin = Instant::now();
    assets::prepare(options.stock_qemu)?;
    println!("running {} tests in the lab", cases.len());
    let (clones, boots): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(has_clones);
    let half = |name, on, cases| run_in_labs(name, on, cases, &binaries, options);
    let halves = if room_for_two_labs(options.memory_mib) {
        thread::scope(|scope| {
            let clones = scope.spawn(|| half("clones", CLONES_ON, clones));
            [
                half("test", BOOTS_ON, boots),
                clones.join().expect("no panic"),
            ]
        })
    } else {
        [
            half("test", BOOTS_ON, boots),
            half("clones", CLONES_ON, clones),
        ]
    };

    let (mut failures, mut deaths, mut directories) = (Vec::new(), 0, Vec::new());
    for half in halves {
        let half = half?;
        for (case, passed) in half.verdicts {
            let tally = tallies.entry(tally_name(&case)).or_default();
            match passed {
                true => tally.passed += 1,
                false => tally.failed += 1,
            }
        }
        failures.extend(half.failures);
        deaths += half.deaths;
        directories.extend(half.directories);
    }
    let mut total = Tally::default();
    println!();
    for (target, tally) in &tallies {
        total.passed += tally.passed;
        total.failed += tally.failed;
        println!("     Ran {target}\n{}", tally.line());
    }
    if !failures.is_empty() {
        println!("\nfailures:\n    {}", failures.join("\n    "));
    }
    println!(
        "\nlab: {} passed, {} failed, {deaths} lab deaths, {:.0} s; logs in {}",
        total.passed,
        total.failed,
        begin.elapsed().as_secs_f64(),
        directories.join(", ")
    );
    Ok(u8::from(total.failed > 0))
}

/// Whether the other half has this one. Whoever names a test, or wants one half alone, gets it as it is.
fn is_the_other_halfs(case: &Case, options: &Options) -> bool {
    let others = match case.clones {
        true => &WITH_BOOTS_ALONE[..],
        false => &WITH_CLONES_ALONE,
    };
    let title = case.title();
    !options.cold && options.words.is_empty() && others.iter().any(|one| title.starts_with(one))
}

fn has_clones(case: &Case) -> bool {
    case.clones || case.target == "clones"
}

/// Most tests wait for one processor of their lab: two labs use a host of two much better than one.
fn room_for_two_labs(memory_mib: u32) -> bool {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    let wanted = 2 * u64::from(memory_mib) + 2048;
    processors > 1 && available.unwrap_or(0) / 1024 >= wanted
}

/// What came of the tests that one lab had after another.
#[derive(Default)]
struct Outcome {
    /// Each test, and whether it has passed.
    verdicts: Vec<(Case, bool)>,
    failures: Vec<String>,
    deaths: u32,
    directories: Vec<String>,
}

fn run_in_labs(
    name: &str,
    containerd: Version,
    mut cases: Vec<Case>,
    binaries: &[(String, PathBuf)],
    options: &Options,
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    while !cases.is_empty() {
        let stage = Stage::new(name, options, Needs::Everything)?;
        for (target, binary) in binaries {
            stage.copy(binary, &Path::new("tests").join(target))?;
        }
        let plan = options.plan_with(
            containerd,
            Job::Test {
                cases: cases.clone(),
            },
        );
        let mut done = vec![false; cases.len()];
        let mut running = None;
        let end = Machine::boot(&stage, &plan, options)?.wait(
            options.timeout_secs.or(Some(4500)),
            &mut |report| match report {
                Report::Ready { uptime, containerd } => {
                    let version = containerd.as_deref().unwrap_or("none");
                    println!(
                        "the lab ({name}) is up after {uptime:.1} s of its time, with containerd {version}"
                    );
                }
                Report::Start { index } => running = Some(*index),
                Report::End {
                    index,
                    verdict,
                    secs,
                    output,
                } => {
                    running = None;
                    let Some(case) = cases.get(*index) else {
                        return;
                    };
                    done[*index] = true;
                    let word = match verdict {
                        Verdict::Passed => "ok",
                        Verdict::Failed => "FAILED",
                        Verdict::TimedOut => "FAILED (no end in sight; see hang-* in the results)",
                    };
                    let passed = *verdict == Verdict::Passed;
                    let said = if passed { "" } else { &*indent(output) };
                    print!("test {} ... {word} <{secs:.1}s>\n{said}", case.title());
                    if !passed {
                        outcome.failures.push(case.title());
                    }
                    outcome.verdicts.push((case.clone(), passed));
                }
                _ => {}
            },
        )?;
        outcome
            .directories
            .push(stage.results().display().to_string());
        let died = match end {
            End::Done { status: 0 | 1 } => false,
            End::Done { status } => bail!(
                "the lab's init ended with status {status}; see {}",
                stage.results().display()
            ),
            End::Died { why } => {
                println!("THE LAB DIED, which is not a verdict on husk: {why}");
                if let Some(case) = running.and_then(|index: usize| cases.get(index)) {
                    println!("while running {}", case.title());
                }
                outcome.deaths += 1;
                true
            }
        };
        cases = left(cases, &done, running);
        if outcome.deaths > FRESH_LABS {
            break;
        }
        if !died && !cases.is_empty() {
            bail!(
                "{} tests were not run though the lab ended well",
                cases.len()
            );
        }
    }
    // What no lab lived long enough for is not known to work.
    for case in cases {
        let failure = format!("{} (not run: the lab died)", case.title());
        outcome.failures.push(failure);
        outcome.verdicts.push((case, false));
    }
    Ok(outcome)
}

/// What a test is counted under.
fn tally_name(case: &Case) -> String {
    format!("tests/tests/{}.rs{}", case.target, case.suffix())
}

/// The tests that are not done, the one that was running when the lab died last.
fn left(cases: Vec<Case>, done: &[bool], running: Option<usize>) -> Vec<Case> {
    let mut left = Vec::new();
    let mut suspect = None;
    for (index, case) in cases.into_iter().enumerate() {
        if running == Some(index) {
            suspect = Some(case);
        } else if done.get(index) != Some(&true) {
            left.push(case);
        }
    }
    left.extend(suspect);
    left
}

impl Tally {
    /// In cargo's own form, for people and for scripts that count.
    fn line(&self) -> String {
        format!(
            "test result: {}. {} passed; {} failed; {} ignored; 0 measured; {} filtered out",
            if self.failed == 0 { "ok" } else { "FAILED" },
            self.passed,
            self.failed,
            self.ignored,
            self.filtered
        )
    }
}

/// What a failed test said, without libtest's own frame: its summary line would be counted twice.
fn indent(text: &str) -> String {
    let frame = ["running 1 test", "test result:", "failures:"];
    text.lines()
        .filter(|line| {
            !line.trim().is_empty() && !frame.iter().any(|start| line.starts_with(start))
        })
        .map(|line| format!("    {line}\n"))
        .collect()
}

/// Compiles the test targets; returns their names and binaries.
fn build() -> Result<Vec<(String, PathBuf)>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "test",
            "--no-run",
            "--quiet",
            "-p",
            "husk-tests",
            "--features",
            "lab",
            "--test",
            "*",
        ])
        .arg("--message-format=json-render-diagnostics")
        .current_dir(assets::repository())
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo")?;
    if !output.status.success() {
        bail!("the tests do not compile");
    }
    let mut binaries = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line).context("understand cargo")?;
        let is_test =
            message["reason"] == "compiler-artifact" && message["target"]["kind"][0] == "test";
        if let (true, Some(name), Some(binary)) = (
            is_test,
            message["target"]["name"].as_str(),
            message["executable"].as_str(),
        ) {
            binaries.push((name.to_owned(), PathBuf::from(binary)));
        }
    }
    binaries.sort();
    Ok(binaries)
}

/// The names of a binary's tests; it runs nothing.
fn list(binary: &Path, ignored: bool) -> Result<Vec<String>> {
    let mut command = Command::new(binary);
    command.args(["--list", "--format", "terse"]);
    if ignored {
        command.arg("--ignored");
    }
    let output = command
        .output()
        .with_context(|| format!("start {}", binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_that_a_lab_died_of_comes_last() {
        let case = |name: &str| Case {
            target: "run".to_owned(),
            name: name.to_owned(),
            clones: false,
        };
        let cases = || vec![case("done"), case("running"), case("not begun")];
        assert_eq!(
            left(cases(), &[true, false, false], Some(1)),
            [case("not begun"), case("running")]
        );
        assert_eq!(
            left(cases(), &[true, true, false], None),
            [case("not begun")]
        );
    }
}
