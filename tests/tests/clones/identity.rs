//! Clones wake up alike, and are themselves before anything runs in them: randomness, name and time.

use std::{
    collections::BTreeSet,
    fs,
    process::Command,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use husk_tests::{
    command::{self, PATIENCE, Running, eventually},
    ctr::{Container, Run, Runtime, fresh_id},
    templates::{Log, Templates},
};

/// As far as a busy lab lets a guest's clock and ours be read at one time.
const NEARLY: u64 = 5;
const HOUR: u64 = 3600;

/// What a pod knows of itself, a line each.
const WHO: &str = "cat /proc/sys/kernel/random/boot_id; head -c 32 /dev/urandom | md5sum; hostname; \
                   date +%s; cut -d' ' -f1 /proc/uptime";

/// Seconds since the epoch.
fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.expect("after 1970").as_secs()
}

fn hostname() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").expect("the host's name");
    name.trim().to_owned()
}

/// Seconds of CLOCK_MONOTONIC that passed in the template before it was saved, at the least: the
/// time of the last line that the kernels of two clones have in common.
#[track_caller]
fn template_age() -> f64 {
    let logs = [(); 2].map(|()| {
        let log = Run::husk(&["dmesg"]).flags(&["--privileged"]).go().ok();
        // How a kernel's complaint of itself begins: a stall, a lockup, a lost interrupt.
        assert!(!log.contains("[ cut here ]"), "{log}");
        let times: Vec<f64> = log.lines().filter_map(stamp).collect();
        assert!(times.is_sorted(), "{log}");
        log
    });
    let common = logs[0].lines().zip(logs[1].lines());
    let common = common.take_while(|(one, other)| one == other);
    let last = common.filter_map(|(line, _)| stamp(line)).last();
    last.unwrap_or_else(|| panic!("nothing in common: {logs:?}"))
}

/// `[    1.234567] …`
fn stamp(line: &str) -> Option<f64> {
    let (stamp, _) = line.strip_prefix('[')?.split_once(']')?;
    stamp.trim().parse().ok()
}

/// Starts so many clones, `at_once` beside each other, and looks at each.
#[track_caller]
fn all_are_themselves(count: usize, at_once: usize) {
    let _templates = Templates::built();
    let age = template_age();
    let name = hostname();
    let mut seen = BTreeSet::new();
    let mut left = count;
    while left > 0 {
        let log = Log::from_now();
        let begun = now();
        let started: Vec<(String, Running)> = (0..at_once.min(left))
            .map(|_| {
                let id = fresh_id("who");
                let run = Run::husk(&["sh", "-c", WHO]);
                (id.clone(), run.start(&id))
            })
            .collect();
        left -= started.len();
        for (id, running) in started {
            let text = running.finish().ok();
            let lines: Vec<&str> = text.lines().collect();
            let [boot_id, random, host, time, uptime] = lines.as_slice() else {
                panic!("{id}: {text}");
            };
            assert!(log.is_clone(&id));
            assert!(
                seen.insert((*boot_id).to_owned()),
                "{id} and another: {boot_id}"
            );
            assert!(
                seen.insert((*random).to_owned()),
                "{id} and another: {random}"
            );
            assert_eq!(*host, name, "{id}");
            let time: u64 = time.parse().expect("seconds");
            assert!(
                (begun - NEARLY..=now() + NEARLY).contains(&time),
                "{id}: {time}, not from {begun} to {}",
                now()
            );
            let uptime: f64 = uptime.parse().expect("seconds");
            assert!(uptime >= age, "{id}: {uptime} s, its template {age} s");
            // Nor has it aged with its template.
            assert!(uptime <= age + PATIENCE.as_secs_f64(), "{id}: {uptime} s");
        }
    }
    assert_eq!(seen.len(), count * 2);
}

#[test]
fn clones_are_themselves() {
    all_are_themselves(12, 4);
}

#[test]
#[ignore = "long: part of make test-long"]
fn a_thousand_clones_are_themselves() {
    all_are_themselves(1000, 4);
}

#[test]
fn a_clones_uptime_only_grows() {
    let _templates = Templates::built();
    let script = "for i in $(seq 200); do cut -d' ' -f1 /proc/uptime; done";
    let log = Log::from_now();
    let id = fresh_id("uptime");
    let text = Run::husk(&["sh", "-c", script]).start(&id).finish().ok();
    assert!(log.is_clone(&id));
    let times: Vec<f64> = text.lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(times.len(), 200, "{text}");
    assert!(times.is_sorted(), "{text}");
}

/// The lab's clock, right again when this is dropped.
struct Clock {
    begun: Instant,
    wall: SystemTime,
}

impl Clock {
    fn keep() -> Self {
        Clock {
            begun: Instant::now(),
            wall: SystemTime::now(),
        }
    }

    /// Sets it to so many seconds ahead of what is right.
    #[track_caller]
    fn set(&self, ahead: u64) {
        let right = self.wall + self.begun.elapsed() + Duration::from_secs(ahead);
        let right = right.duration_since(UNIX_EPOCH).expect("after 1970");
        let at = format!("@{}.{:09}", right.as_secs(), right.subsec_nanos());
        command::run(Command::new("date").args(["-s", &at]), b"").ok();
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let right = self.wall + self.begun.elapsed();
        let right = right.duration_since(UNIX_EPOCH).unwrap_or_default();
        let at = format!("@{}", right.as_secs());
        let _ = Command::new("date").args(["-s", &at]).output();
    }
}

/// Waits until the pod's clock shows what the host's does.
#[track_caller]
fn wait_for_right_time(pod: &Container) {
    let mut last = String::new();
    let right = eventually(Instant::now() + PATIENCE / 4, || {
        let before = now();
        last = pod.exec(&["date", "+%s"]).ok();
        let time: u64 = last.trim().parse().ok()?;
        (before - NEARLY..=now() + NEARLY)
            .contains(&time)
            .then_some(())
    });
    assert!(right.is_some(), "{last} in {}, here {}", pod.id, now());
}

fn uptime(pod: &Container) -> f64 {
    let text = pod.exec(&["cut", "-d ", "-f1", "/proc/uptime"]).ok();
    text.trim().parse().expect("seconds")
}

#[test]
fn a_pods_clock_follows_the_hosts() {
    let templates = Templates::none();
    let log = Log::from_now();
    let booted = Container::idle(Runtime::Husk);
    templates.wait_for_another(None);
    let cloned = Container::idle(Runtime::Husk);
    assert!(!log.is_clone(&booted.id) && log.is_clone(&cloned.id));
    let pods = [booted, cloned];
    let clock = Clock::keep();
    let before = pods.each_ref().map(uptime);
    for ahead in [HOUR, 0] {
        clock.set(ahead);
        for pod in &pods {
            wait_for_right_time(pod);
        }
        // One that starts now is right from the start.
        let begun = now();
        let time = Run::husk(&["date", "+%s"]).go().ok();
        let time: u64 = time.trim().parse().expect("seconds");
        assert!(
            (begun - NEARLY..=now() + NEARLY).contains(&time),
            "{time}, {begun}"
        );
    }
    for (pod, before) in pods.iter().zip(before) {
        let now = uptime(pod);
        let passed = clock.begun.elapsed().as_secs_f64() + 1.0;
        assert!((before..=before + passed).contains(&now), "{before}, {now}");
    }
}

/// The second step comes while the first one is on its way into the guest.
#[test]
fn a_pods_clock_follows_the_hosts_however_fast_that_steps() {
    let _templates = Templates::built();
    let pods = [(); 2].map(|()| Container::idle(Runtime::Husk));
    let clock = Clock::keep();
    for _ in 0..5 {
        for ahead in [HOUR, 2 * HOUR, 0] {
            clock.set(ahead);
        }
        for pod in &pods {
            wait_for_right_time(pod);
        }
    }
}
