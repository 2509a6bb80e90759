//! Many clones: at once, and one after the other without end.

use std::{
    fs,
    ops::Range,
    path::Path,
    time::{Duration, Instant},
};

use husk_tests::{
    census::Census,
    command::{self, Running},
    ctr::{Container, IMAGE, Run, Runtime, ctr, fresh_id},
    templates::{self, Log, Templates},
};

/// Starts so many pods at once from one template, which stay, and ends them.
#[track_caller]
fn all_at_once(count: usize) {
    let _templates = Templates::built();
    Run::husk(&["true"]).go().ok();
    let census = Census::take();
    let log = Log::from_now();
    let begun = Instant::now();
    let starting: Vec<(Container, Running)> = (0..count)
        .map(|_| {
            let id = fresh_id("crowd");
            let mut run = ctr(&["run", "-d", "--null-io", "--runtime", Runtime::Husk.name()]);
            run.args([IMAGE, &id, "sleep", "86400"]);
            (Container { id }, command::start(&mut run, b""))
        })
        .collect();
    let mut pods = Vec::new();
    for (pod, running) in starting {
        running.finish().ok();
        pods.push(pod);
    }
    println!("{count} started after {:?}", begun.elapsed());
    let list = command::run(&mut ctr(&["task", "ls"]), b"").ok();
    assert_eq!(list.matches(" RUNNING").count(), count, "{list}");
    for pod in &pods {
        assert!(log.is_clone(&pod.id), "{} has booted", pod.id);
    }
    // Each of them works, and not only runs.
    for pod in [pods.first(), pods.last()].into_iter().flatten() {
        assert_eq!(pod.exec(&["echo", &pod.id]).ok(), format!("{}\n", pod.id));
    }
    let ending: Vec<Running> = pods
        .iter()
        .map(|pod| command::start(&mut ctr(&["task", "kill", "-s", "KILL", &pod.id]), b""))
        .collect();
    ending.into_iter().for_each(|kill| drop(kill.finish().ok()));
    for pod in pods {
        pod.wait_stopped();
        pod.remove();
    }
    census.assert_restored();
    println!("{count} ended after {:?}", begun.elapsed());
}

#[test]
fn sixteen_at_once_from_one_template() {
    all_at_once(16);
}

#[test]
#[ignore = "long: part of make test-long"]
fn fifty_at_once_from_one_template() {
    all_at_once(50);
}

/// Starts so many at once that end by themselves.
#[test]
fn all_that_start_at_once_say_their_own_word() {
    let _templates = Templates::built();
    let running = [(); 12].map(|()| {
        let id = fresh_id("word");
        let run = Run::husk(&["sh", "-c", "echo $0; exit 7", &id]).start(&id);
        (id, run)
    });
    for (id, running) in running {
        let outcome = running.finish();
        assert_eq!(
            (outcome.code(), outcome.out()),
            (7, format!("{id}\n")),
            "{outcome:?}"
        );
    }
}

/// What a host has less of with each pod that leaves something behind.
#[derive(Debug)]
struct Usage {
    /// kB that can be had.
    memory: u64,
    /// Open files of the whole host.
    files: u64,
    processes: usize,
    /// Descriptors of containerd.
    descriptors: usize,
    /// In husk's store.
    store: Vec<String>,
}

impl Usage {
    fn take() -> Self {
        fs::write("/proc/sys/vm/drop_caches", "3").expect("drop caches");
        let memory = fs::read_to_string("/proc/meminfo").expect("meminfo");
        let memory = memory
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"));
        let memory = memory.and_then(|rest| rest.trim().strip_suffix(" kB")?.parse().ok());
        let files = fs::read_to_string("/proc/sys/fs/file-nr").expect("file-nr");
        let files = files
            .split_whitespace()
            .next()
            .and_then(|files| files.parse().ok());
        let (mut processes, mut descriptors) = (0, 0);
        for process in fs::read_dir("/proc").expect("/proc").flatten() {
            let path = process.path();
            // Without the kernel's own threads.
            if fs::read(path.join("cmdline")).is_ok_and(|line| !line.is_empty()) {
                processes += 1;
            }
            if name(&path) == "containerd" {
                descriptors += fs::read_dir(path.join("fd")).map_or(0, Iterator::count);
            }
        }
        let mut store = templates::names();
        store.sort();
        Usage {
            memory: memory.expect("MemAvailable"),
            files: files.expect("a number"),
            processes,
            descriptors,
            store,
        }
    }
}

fn name(process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    name.trim().to_owned()
}

fn middle(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Starts so many pods one after the other, each beside a container of runc's: the last `part` of them
/// take as long as the first, and leave no more.
#[track_caller]
fn one_after_the_other(count: usize, part: usize) {
    /// kB that one start may leave in use: containerd's own database and log grow.
    const LEFT: u64 = 64;
    let _templates = Templates::built();
    for _ in 0..3 {
        Run::husk(&["true"]).go().ok();
    }
    let census = Census::take();
    let (mut times, mut runcs) = (Vec::new(), Vec::new());
    let mut early = None;
    for number in 1..=count {
        let log = Log::from_now();
        let id = fresh_id("next");
        let outcome = Run::husk(&["echo", &id]).start(&id).finish();
        times.push(outcome.took);
        assert_eq!(outcome.ok(), format!("{id}\n"), "number {number}");
        assert!(log.is_clone(&id), "number {number} has booted");
        // What the machine has to do besides slows both down.
        let runc = Run::husk(&["echo", &id]).runtime(Runtime::Runc).go();
        runcs.push(runc.took);
        runc.ok();
        if number == part {
            census.assert_restored();
            early = Some(Usage::take());
        }
    }
    census.assert_restored();
    let (early, late) = (early.expect("more than a part"), Usage::take());
    let beside = |part: Range<usize>| {
        let (husk, runc) = (middle(&times[part.clone()]), middle(&runcs[part]));
        println!("{husk:?}, runc {runc:?}");
        husk.as_secs_f64() / runc.as_secs_f64()
    };
    let (first, last) = (beside(0..part), beside(count - part..count));
    println!("{early:?} at first, {late:?} at last");
    assert!(
        last < first * 1.25,
        "{first} times runc's time at first, {last} at last"
    );
    let gone = early.memory.saturating_sub(late.memory);
    let allowed = (8 << 10) + LEFT * (count - part) as u64;
    assert!(gone <= allowed, "{gone} kB less, of {allowed}");
    assert!(late.files <= early.files + 64, "open files");
    assert!(late.processes <= early.processes, "processes");
    assert!(
        late.descriptors <= early.descriptors + 4,
        "containerd's descriptors"
    );
    assert_eq!(late.store, early.store);
}

#[test]
#[ignore = "long: part of make test-long"]
fn three_hundred_one_after_the_other_without_drift() {
    one_after_the_other(300, 50);
}
