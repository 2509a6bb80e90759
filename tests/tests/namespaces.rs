//! Namespaces as a user gets them: those that the containers of a pod share, user and time namespaces; and what is
//! mounted in that of mounts.

use husk_tests::{
    bundle::Bundle,
    census::Census,
    ctr::{Container, Run, Runtime},
};
use serde_json::json;

/// A further container of the pod, in those of its namespaces that CRI names.
fn beside(pod: &Container, kinds: &[&str]) -> Container {
    let flags = flags(pod, kinds);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Container::detached(Runtime::Husk, &flags, &["sleep", "86400"])
}

fn flags(pod: &Container, kinds: &[&str]) -> Vec<String> {
    let mut flags = vec![
        "--null-io".to_owned(),
        "--annotation".to_owned(),
        format!("io.kubernetes.cri.sandbox-id={}", pod.id),
    ];
    for kind in kinds {
        let file = if *kind == "network" { "net" } else { kind };
        flags.push("--with-ns".to_owned());
        flags.push(format!("{kind}:/proc/{}/ns/{file}", pod.pid()));
    }
    flags
}

fn links(container: &Container) -> Vec<String> {
    let script = "for kind in uts ipc pid net mnt; do readlink /proc/self/ns/$kind; done";
    let out = container.exec(&["sh", "-c", script]).ok();
    out.lines().map(str::to_owned).collect()
}

/// As the containers of a Kubernetes pod, with and without shareProcessNamespace.
#[test]
fn containers_of_a_pod_share_what_its_sandbox_has_made() {
    let sandbox = Container::idle(Runtime::Husk);
    let one = beside(&sandbox, &["network", "ipc", "uts"]);
    let two = beside(&sandbox, &["network", "ipc", "uts", "pid"]);
    let boot = |container: &Container| {
        let id = container.exec(&["cat", "/proc/sys/kernel/random/boot_id"]);
        id.ok()
    };
    assert_eq!(boot(&sandbox), boot(&one));
    let (theirs, of_one, of_two) = (links(&sandbox), links(&one), links(&two));
    let shared =
        |other: &[String]| -> Vec<bool> { theirs.iter().zip(other).map(|(a, b)| a == b).collect() };
    assert_eq!(shared(&of_one), [true, true, false, true, false]);
    assert_eq!(shared(&of_two), [true, true, true, true, false]);
    let count = "ps -o comm | grep -c sleep";
    assert_eq!(one.exec(&["sh", "-c", count]).ok(), "1\n");
    assert_eq!(two.exec(&["sh", "-c", count]).ok(), "2\n");
    // Its end is not the pod's.
    two.remove();
    assert_eq!(one.exec(&["true"]).code(), 0);
    one.remove();
    assert_eq!(sandbox.exec(&["true"]).code(), 0);
}

#[test]
fn namespaces_of_another_pod_are_refused_by_name() {
    let other = Container::idle(Runtime::Husk);
    let pod = Container::idle(Runtime::Husk);
    let before = Census::take();
    let foreign = format!("ipc:/proc/{}/ns/ipc", other.pid());
    let mut asked = vec![vec!["--with-ns".to_owned(), foreign.clone()]];
    asked.push(flags(&pod, &["network"]));
    asked[1].extend(["--with-ns".to_owned(), foreign]);
    for flags in asked {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let outcome = Run::husk(&["true"]).flags(&flags).go();
        let words = format!("].path: /proc/{}/ns/ipc: ", other.pid());
        assert!(
            outcome.code() != 0 && outcome.err().contains(&words),
            "{outcome:?}"
        );
    }
    before.assert_restored();
}

const MAPPED: [&str; 4] = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];

/// But for what only one of the kernels has in /proc, and the group of /dev/mqueue, which nobody has under runc.
#[test]
fn a_user_namespace_looks_as_under_runc() {
    let script = "id; cat /proc/self/uid_map /proc/self/gid_map; touch /made && ls -ln /made /etc/passwd | cut -d' ' -f1-8; \
        cat /proc/self/setgroups; ls -ln /dev | grep -v -e core -e mqueue | sed 's/ [A-Z][a-z]* *[0-9]* *[0-9]*:[0-9]* / /'; cat /proc/mounts | cut -d' ' -f2-3 | grep -v -e acpi -e kcore | sort; \
        grep Cap /proc/self/status; hostname other 2>&1; ulimit -n; echo here >/dev/stdout";
    let outcome = |runtime| {
        let args = ["sh", "-c", script];
        let run = Run::husk(&args).runtime(runtime);
        let out = run.flags(&MAPPED).go().ok();
        let lines = out
            .lines()
            .filter(|line| !line.starts_with("/ ") && !line.contains(" / "));
        let dates = |line: &str| match line.split_once(" 20") {
            Some((before, _)) => before.to_owned(),
            None => line.to_owned(),
        };
        lines.map(dates).collect::<Vec<_>>()
    };
    assert_eq!(outcome(Runtime::Husk), outcome(Runtime::Runc));
}

/// What is mounted where, how it may be used, and what is in it.
#[test]
fn mounts_look_as_under_runc() {
    let script = "while read -r id parent device root at options rest; do [ $at = / ] || echo $at $options; done \
        </proc/self/mountinfo; stat -c '%n %a %u:%g' /etc /etc/passwd /m /m/* /proc/keys; \
        echo x >/etc/new && cat /etc/new; echo x >/m/ro/new; ls /srv; echo x >/opt/closed";
    let mut bundle = Bundle::new(&["sh", "-c", script]);
    let mounts = bundle.spec["mounts"].as_array_mut().expect("mounts");
    for mount in [
        json!({"destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "noatime", "relatime"]}),
        json!({"destination": "/m", "type": "tmpfs", "source": "m", "options": ["ro", "mode=0711", "nodev"]}),
        json!({"destination": "/m/ro", "type": "tmpfs", "source": "m", "options": ["ro", "strictatime", "noatime"]}),
        json!({"destination": "/m/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]}),
        json!({"destination": "/m/hosts", "type": "bind", "source": "/etc/hostname", "options": ["bind", "ro", "noexec", "relatime", "rprivate"]}),
        json!({"destination": "/m/tree", "type": "bind", "source": "/usr/share", "options": ["rbind", "rro", "relatime"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["remount", "nosuid", "size=1m"]}),
    ] {
        mounts.push(mount);
    }
    bundle.spec["linux"]["maskedPaths"] = json!(["/proc/keys", "/srv", "/nosuch/path"]);
    bundle.spec["linux"]["readonlyPaths"] = json!(["/opt", "/proc/sys", "/nosuch"]);
    let outcome = bundle.assert_equals_runc();
    assert!(outcome.out().contains("/m/tree ro,"), "{outcome:?}");
}

#[test]
fn clocks_of_a_time_namespace_are_ahead() {
    let mut bundle = Bundle::new(&["cat", "/proc/uptime"]);
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
    namespaces
        .expect("namespaces")
        .push(json!({"type": "time"}));
    bundle.spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000}});
    let out = bundle.run(Runtime::Husk).ok();
    assert!(out.starts_with("10000"), "{out}");
}
