//! What people rely on of processes under runc, whether they know it or not.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use husk_tests::{
    census::Census,
    command::{self, Outcome, PATIENCE, eventually},
    ctr::{Container, PROBE, Run, Runtime, ctr, fresh_id},
    events::Events,
};
use serde_json::{Value, json};

const BOTH: [Runtime; 2] = [Runtime::Runc, Runtime::Husk];

/// The same script in a container of each; what runc's says and ends with is right.
#[track_caller]
fn assert_as_under_runc(flags: &[&str], script: &str) -> Outcome {
    let [runc, husk] = BOTH.map(|runtime| {
        let args = ["sh", "-c", script];
        Run::husk(&args).flags(flags).runtime(runtime).go()
    });
    let told = |outcome: &Outcome| (outcome.code(), outcome.out(), outcome.err());
    assert_eq!(told(&husk), told(&runc), "husk's and runc's of {script:?}");
    husk
}

#[test]
fn the_first_process_cannot_be_killed_from_inside() {
    let script = "kill -9 1; echo $?; kill -STOP 1; echo $?; sh -c 'kill -9 1'; echo still here";
    let outcome = assert_as_under_runc(&[], script);
    assert_eq!(outcome.out(), "0\n0\nstill here\n", "{outcome:?}");
}

/// Whoever adds processes leaves none behind that has ended; a child that the container's own first process never
/// asks for stays, as it does under runc.
#[test]
fn what_has_ended_is_a_zombie_only_where_it_is_one_under_runc() {
    let zombies = |runtime| {
        let pod = Container::idle(runtime);
        for _ in 0..5 {
            assert_eq!(pod.exec(&["sh", "-c", "exit 9"]).code(), 9);
        }
        // Its child outlives it, and becomes the first process's.
        pod.exec(&["sh", "-c", "sleep 0 & exit 0"]).ok();
        let count = || pod.exec(&["ps", "-o", "stat,comm"]).ok();
        let list = eventually(Instant::now() + PATIENCE, || {
            Some(count()).filter(|list| list.contains('Z'))
        });
        let list = list.expect("the orphan never became a zombie");
        list.lines().filter(|line| line.starts_with('Z')).count()
    };
    assert_eq!(BOTH.map(zombies), [1, 1]);
}

#[test]
fn a_broken_pipe_kills_who_writes_to_it() {
    let outcome = assert_as_under_runc(&[], "(yes; echo $? >&2) | head -n 1");
    assert_eq!((&*outcome.out(), &*outcome.err()), ("y\n", "141\n"));
}

#[test]
fn a_process_may_close_its_streams_and_go_on() {
    let script = "exec <&- >&- 2>&-; i=0; while [ $i -lt 50 ]; do i=$((i+1)); true; done; exit $i";
    assert_eq!(assert_as_under_runc(&[], script).code(), 50);
    // Nor does it matter who holds them when the first process ends.
    let outcome = assert_as_under_runc(&[], "sleep 86400 & echo started; exit 3");
    assert_eq!((outcome.code(), &*outcome.out()), (3, "started\n"));
}

/// An exec whose child outlives it and holds its streams.
#[test]
fn an_exec_ends_although_its_child_goes_on() {
    for runtime in BOTH {
        let pod = Container::idle(runtime);
        let script = "sleep 86399 >/dev/null 2>&1 </dev/null & echo started; exit 4";
        let outcome = pod.exec(&["sh", "-c", script]);
        assert_eq!((outcome.code(), &*outcome.out()), (4, "started\n"));
        let list = pod.exec(&["ps", "-o", "args"]).ok();
        assert!(list.contains("sleep 86399"), "{runtime:?}: {list}");
    }
}

#[test]
fn five_thousand_short_processes() {
    // Each fifth one is another program, too.
    let script = "i=0; while [ $i -lt 5000 ]; do \
        if [ $((i%5)) = 0 ]; then /bin/true; else (:); fi || exit 1; i=$((i+1)); done; echo $i";
    let pod = Container::idle(Runtime::Husk);
    let before = free_kib(&pod);
    assert_eq!(pod.exec(&["sh", "-c", script]).ok(), "5000\n");
    assert_eq!(pod.exec(&["ps", "-o", "stat"]).ok().matches('Z').count(), 0);
    let after = free_kib(&pod);
    assert!(after + 4096 > before, "{before} KiB were free, now {after}");
}

/// What could be had without reclaiming from anybody.
fn free_kib(pod: &Container) -> u64 {
    let text = pod.exec(&["grep", "MemAvailable", "/proc/meminfo"]).ok();
    let number = text.split_whitespace().nth(1);
    number.and_then(|word| word.parse().ok()).expect("a number")
}

/// A process that wants more than the container may have is killed, and nobody else: not the shell beside it, not what
/// is outside of it.
#[test]
fn a_memory_bomb_kills_itself_alone() {
    let script = "tail /dev/zero; echo $?; echo shell goes on";
    let outcome = assert_as_under_runc(&["--memory-limit", "33554432"], script);
    assert_eq!(outcome.out(), "137\nshell goes on\n", "{outcome:?}");
}

/// One whose first process is the bomb ends with 137, containerd hears why, and the pod's agent can tell it.
#[test]
fn a_container_out_of_memory_says_so() {
    for runtime in BOTH {
        let flags = ["--memory-limit", "33554432", "--null-io"];
        let events = Events::subscribe();
        let bomb = Container::detached(runtime, &flags, &["tail", "/dev/zero"]);
        bomb.wait_stopped();
        events.wait_for(&bomb.id, "oom");
        events.wait_for(&bomb.id, "exit");
        assert_eq!(events.exits(&bomb.id), [137], "{runtime:?}");
    }
}

/// What `ctr` makes of an image, which knows no limit of processes.
const SPEC: &str = include_str!("../../agent/src/spec/ctr-1.7.json");
const LIMIT: u64 = 32;

/// A bundle with a fork bomb that may have [`LIMIT`] processes; gone with this value.
struct Bomb(PathBuf);

impl Bomb {
    fn new() -> Self {
        let bundle = Bomb(Path::new("/var/tmp").join(fresh_id("bomb")));
        let root = bundle.0.join("root");
        for directory in ["proc", "sys", "dev", "run", "tmp"] {
            fs::create_dir_all(root.join(directory)).expect("create a directory");
        }
        fs::copy(PROBE, root.join("probe")).expect("copy the probe");
        let mut spec: Value = serde_json::from_str(SPEC).expect("JSON");
        spec["root"] = json!({ "path": root });
        spec["process"]["args"] = json!(["/probe", "bomb"]);
        spec["linux"]["resources"]["pids"] = json!({ "limit": LIMIT });
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({ "type": "network" }));
        }
        fs::write(bundle.config(), spec.to_string()).expect("write config.json");
        bundle
    }

    fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// It gets no further than it may, keeps nobody from asking, and goes as a whole.
#[test]
fn a_fork_bomb_is_limited_and_goes_as_a_whole() {
    // What each makes once.
    for runtime in BOTH {
        Run::husk(&["true"]).runtime(runtime).go().ok();
    }
    let before = Census::take();
    for runtime in BOTH {
        let bundle = Bomb::new();
        let id = fresh_id("bomb");
        let bomb = Container { id };
        let mut run = ctr(&["run", "-d", "--null-io", "--runtime", runtime.name()]);
        run.arg("--config").arg(bundle.config()).arg(&bomb.id);
        command::run(&mut run, b"").ok();
        let deadline = Instant::now() + PATIENCE;
        eventually(deadline, || (processes(&bomb) >= LIMIT).then_some(()))
            .unwrap_or_else(|| panic!("{runtime:?}: {} processes", processes(&bomb)));
        for _ in 0..3 {
            // The kernel counts each attempt for a moment.
            let count = processes(&bomb);
            assert!(count <= 2 * LIMIT, "{runtime:?}: {count} processes");
        }
        bomb.task("kill", &["-s", "KILL"]).ok();
        bomb.wait_stopped();
        bomb.remove();
    }
    before.assert_restored();
}

fn processes(container: &Container) -> u64 {
    let metrics = container.task("metrics", &["--format", "json"]).ok();
    let metrics: Value = serde_json::from_str(&metrics).expect("JSON");
    let current = &metrics["pids"]["current"];
    current.as_u64().unwrap_or_else(|| panic!("{metrics}"))
}
