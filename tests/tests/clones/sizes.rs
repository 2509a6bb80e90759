//! Pods of all sizes are clones of one template, and have what they ask for.

use husk_tests::{
    ctr::{Container, Runtime},
    settings::Settings,
    templates::{self, Log, Templates},
};

/// What a workload finds out about the size of its pod.
#[derive(Debug)]
struct Seen {
    nproc: String,
    listed: usize,
    allowed: String,
    online: String,
    memory_kib: u64,
    threads: u64,
}

impl Seen {
    #[track_caller]
    fn by(pod: &Container) -> Self {
        let said = |command: &str| pod.exec(&["sh", "-c", command]).ok().trim().to_owned();
        Seen {
            nproc: said("nproc"),
            listed: said("grep -c ^processor /proc/cpuinfo")
                .parse()
                .expect("a number"),
            allowed: said("grep Cpus_allowed_list /proc/self/status"),
            online: said("cat /sys/devices/system/cpu/online"),
            memory_kib: said("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")
                .parse()
                .expect("a number"),
            threads: said("cat /proc/sys/kernel/threads-max")
                .parse()
                .expect("a number"),
        }
    }
}

/// A pod of that size, which is a clone or not.
#[track_caller]
fn pod(memory_mib: u64, vcpus: u32, templates: &str) -> (Container, Settings) {
    let settings = Settings::write(&format!(
        "memory_mib = {memory_mib}\nvcpus = {vcpus}\ntemplates = \"{templates}\"\n"
    ));
    let log = Log::from_now();
    let flags = [
        "--null-io",
        "--mount",
        "type=tmpfs,src=tmpfs,dst=/big,options=size=90%",
    ];
    let pod = Container::detached(Runtime::Husk, &flags, &["sleep", "86400"]);
    assert_eq!(log.is_clone(&pod.id), templates != "off", "{}", log.text());
    (pod, settings)
}

#[test]
fn a_clone_of_any_size_looks_like_a_pod_that_has_booted_with_it() {
    let _templates = Templates::built();
    for (memory_mib, vcpus) in [(384, 2), (2048, 4)] {
        let (clone, settings) = pod(memory_mib, vcpus, "namespace");
        let cloned = Seen::by(&clone);
        drop((clone, settings));
        let (cold, settings) = pod(memory_mib, vcpus, "off");
        let booted = Seen::by(&cold);
        drop((cold, settings));
        println!("{memory_mib} MiB, {vcpus} vCPUs: {cloned:?}, {booted:?}");
        assert_eq!(cloned.nproc, vcpus.to_string());
        assert_eq!(cloned.listed, booted.listed);
        assert_eq!(
            (&cloned.nproc, &cloned.allowed, &cloned.online),
            (&booted.nproc, &booted.allowed, &booted.online)
        );
        // The one counts what the kernel needs to know of its memory as used, the other as gone.
        for (one, other) in [
            (cloned.memory_kib, booted.memory_kib),
            (cloned.threads, booted.threads),
        ] {
            assert!(one.abs_diff(other) * 100 <= other * 5, "{one}, not {other}");
        }
    }
    assert_eq!(templates::keys().len(), 1);
}

#[test]
fn added_memory_holds_what_is_written_to_it() {
    let _templates = Templates::built();
    let (pod, _settings) = pod(640, 1, "namespace");
    // More than the template has.
    let fill = "set -e; head -c 33554432 /dev/urandom >/big/0; \
                for n in 1 2 3 4 5 6 7 8 9 10 11 12; do cp /big/0 /big/$n; done; \
                for n in 1 2 3 4 5 6 7 8 9 10 11 12; do cmp /big/0 /big/$n; done; \
                du -sm /big | cut -f1";
    assert_eq!(pod.exec(&["sh", "-c", fill]).ok(), "416\n");
}

#[test]
fn added_processors_work_at_once() {
    let _templates = Templates::built();
    let (pod, _settings) = pod(256, 4, "namespace");
    let work = "head -c 4000000 /dev/zero >/big/0; \
                for n in 0 1 2 3; do \
                    (taskset -c $n md5sum /big/0; sed -n 's/^processor.*/one/p' /proc/cpuinfo | wc -l) & \
                done; wait";
    let said = pod.exec(&["sh", "-c", work]).ok();
    let sums: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("/big/0"))
        .collect();
    assert_eq!(sums.len(), 4, "{said}");
    assert!(sums.iter().all(|sum| sum == &sums[0]), "{said}");
    // One that the pod was not given is not to be had.
    assert_ne!(pod.exec(&["taskset", "-c", "4", "true"]).code(), 0);
    // Time is one on all of them.
    let read = "for n in 0 1 2 3 0 1 2 3; do taskset -c $n cut -d' ' -f1 /proc/uptime; done";
    let times: Vec<f64> = pod
        .exec(&["sh", "-c", read])
        .ok()
        .lines()
        .map(|line| line.parse().expect("seconds"))
        .collect();
    assert!(times.is_sorted() && times[7] - times[0] < 60.0, "{times:?}");
}

#[test]
fn a_pod_with_more_processors_than_others_may_have_gets_a_template_of_its_own() {
    let _templates = Templates::built();
    {
        let _settings = Settings::write("vcpus = 9\n");
        templates::husk_template(&["build"]).ok();
    }
    assert_eq!(templates::keys().len(), 2);
    let (pod, _settings) = pod(256, 9, "namespace");
    assert_eq!(pod.exec(&["nproc"]).ok(), "9\n");
}
