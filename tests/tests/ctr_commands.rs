//! What `ctr` can do with a container, with husk and with runc side by side: where nothing else is said, both must
//! answer alike.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Instant,
};

use husk_tests::{
    bundle::Bundle,
    census::Census,
    command::{self, Outcome, PATIENCE, eventually},
    ctr::{Container, IMAGE, Run, Runtime, ctr, fresh_id},
    events::Events,
};
use serde_json::{Value, json};

const BOTH: [Runtime; 2] = [Runtime::Runc, Runtime::Husk];

/// What both runtimes show, which must be the same.
#[track_caller]
fn assert_alike<T: PartialEq + std::fmt::Debug>(show: impl Fn(Runtime) -> T) -> T {
    let (runc, husk) = (show(Runtime::Runc), show(Runtime::Husk));
    assert_eq!(husk, runc, "husk, and runc");
    husk
}

/// What `script` prints in a container with these flags, the same with both.
#[track_caller]
fn alike(flags: &[&str], script: &str) -> String {
    assert_alike(|runtime| {
        let args = ["sh", "-c", script];
        Run::husk(&args).runtime(runtime).flags(flags).go().ok()
    })
}

/// What is there when both runtimes have made what they make once.
fn census() -> Census {
    for runtime in BOTH {
        Run::husk(&["true"]).runtime(runtime).go().ok();
    }
    Census::take()
}

/// A directory of the host, gone with this value.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let path = Path::new("/var/tmp").join(fresh_id("commands"));
        fs::create_dir_all(&path).expect("create a directory");
        Self(path)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap_or_else(|e| panic!("read {name}: {e}"))
    }

    fn script(&self, name: &str, text: &str) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("chmod");
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn environment_directory_and_user_are_those_asked_for() {
    let flags = [
        "--env",
        "A=b c",
        "--env",
        "PATH=/usr/bin:/bin",
        "--cwd",
        "/opt",
        "--user",
        "1000:1001",
    ];
    let said = alike(
        &flags,
        "echo \"$A\"; echo $PATH; pwd; id; env | sort; touch /new || echo refused",
    );
    assert!(said.starts_with("b c\n/usr/bin:/bin\n/opt\n"), "{said}");
    assert!(
        said.contains("uid=1000") && said.contains("refused"),
        "{said}"
    );
}

#[test]
fn a_read_only_root_takes_nothing_and_volumes_what_they_say() {
    let directory = Directory::new();
    fs::write(directory.at("file"), "of the host\n").expect("write");
    let source = directory.0.display();
    let read_only = format!("type=bind,src={source},dst=/ro,options=rbind:ro");
    let writable = format!("type=bind,src={source},dst=/rw,options=rbind:rw");
    let flags = [
        "--read-only",
        "--mount",
        &read_only,
        "--mount",
        &writable,
        "--mount",
        "type=tmpfs,dst=/scratch,options=size=1m:mode=1777",
    ];
    let script = "for d in / /ro /rw /scratch; do touch $d/new 2>&1 && echo $d taken; done; cat /ro/file; ls /ro";
    let said = alike(&flags, script);
    for line in ["/rw taken", "/scratch taken", "of the host"] {
        assert!(
            said.lines().any(|found| found == line),
            "no {line:?}: {said}"
        );
    }
    assert_eq!(said.matches("Read-only file system").count(), 2, "{said}");
}

#[test]
fn limits_are_in_the_containers_cgroup() {
    let flags = [
        "--privileged",
        "--memory-limit",
        "67108864",
        "--cpu-quota",
        "50000",
        "--cpu-period",
        "100000",
        // In between, old and new runcs have their own curves.
        "--cpu-shares",
        "2",
    ];
    let script = "mkdir /tmp/all && mount -t cgroup2 none /tmp/all && cd /tmp/all$(cut -d: -f3 /proc/self/cgroup) && \
        for f in memory.max cpu.max cpu.weight; do echo $f $(cat $f); done";
    let said = alike(&flags, script);
    assert!(
        said.contains("memory.max 67108864\ncpu.max 50000 100000\n"),
        "{said}"
    );
    let killed = assert_alike(|runtime| {
        let args = [
            "sh",
            "-c",
            "head -c 40000000 /dev/zero | tail -c 39000000 | wc -c",
        ];
        let flags = ["--memory-limit", "16777216"];
        let outcome = Run::husk(&args).runtime(runtime).flags(&flags).go();
        outcome.out().trim() == "39000000"
    });
    assert!(!killed);
}

#[test]
fn privileges_are_given_and_taken() {
    let script = "grep ^Cap /proc/self/status; mkdir /tmp/m; mount -t tmpfs none /tmp/m 2>&1 && echo mounted; \
        for f in /proc/sys /sys; do touch $f/kernel 2>/dev/null; grep \" $f \" /proc/mounts | cut -d' ' -f4 | cut -d, -f1; done";
    let said = alike(&["--privileged"], script);
    assert!(said.contains("mounted"), "{said}");
    let said = alike(
        &["--cap-drop", "CAP_CHOWN", "--cap-add", "CAP_SYS_TIME"],
        script,
    );
    assert!(!said.contains("mounted"), "{said}");
}

/// `ctr container create`, and then the tasks' own commands.
#[test]
fn a_task_is_started_looked_at_and_deleted_by_its_commands() {
    let seen = assert_alike(|runtime| {
        let id = fresh_id("task");
        let container = [
            "container",
            "create",
            "--runtime",
            runtime.name(),
            IMAGE,
            &id,
            "sleep",
            "86400",
        ];
        command::run(&mut ctr(&container), b"").ok();
        let events = Events::subscribe();
        let task = |args: &[&str]| -> Outcome {
            let mut command = ctr(&["task"]);
            command.args(args);
            command::run(&mut command, b"")
        };
        let mut seen = Vec::new();
        let mut note = |what: &str, outcome: Outcome| {
            seen.push((
                what.to_owned(),
                outcome.code() == 0,
                husk_tests::ctr::state(&id),
            ));
        };
        note("start", task(&["start", "-d", "--null-io", &id]));
        note("start again", task(&["start", "-d", "--null-io", &id]));
        note("exec", task(&["exec", "--exec-id", "one", &id, "true"]));
        note("pause", task(&["pause", &id]));
        note("pause again", task(&["pause", &id]));
        let exec = ["exec", "--exec-id", "frozen", &id, "true"];
        let refused = task(&exec);
        assert!(
            refused.err().contains("cannot exec in a paused state"),
            "{refused:?}"
        );
        note("exec in what is paused", refused);
        note("resume", task(&["resume", &id]));
        note("resume again", task(&["resume", &id]));
        note("delete what runs", task(&["delete", &id]));
        note(
            "kill by an unknown signal",
            task(&["kill", "-s", "SIGNONE", &id]),
        );
        note(
            "kill an unknown exec",
            task(&["kill", "--exec-id", "none", &id]),
        );
        note("kill", task(&["kill", "-s", "SIGTERM", &id]));
        note("kill for good", task(&["kill", "-s", "SIGKILL", &id]));
        let stopped = eventually(Instant::now() + PATIENCE / 4, || {
            (husk_tests::ctr::state(&id).as_deref() == Some("STOPPED")).then_some(())
        });
        assert!(stopped.is_some(), "{runtime:?}");
        note(
            "exec in what has ended",
            task(&["exec", "--exec-id", "two", &id, "true"]),
        );
        note("pause what has ended", task(&["pause", &id]));
        note("kill what has ended", task(&["kill", "-s", "SIGKILL", &id]));
        let deleted = task(&["delete", &id]);
        let code = deleted.status_of_task();
        note("delete", deleted);
        note("delete again", task(&["delete", &id]));
        // runc's shim may be gone before it has told of this one.
        if runtime == Runtime::Husk {
            events.wait_for(&id, "delete");
        }
        command::run(&mut ctr(&["container", "delete", &id]), b"").ok();
        let mut topics = events.topics(&id);
        topics.retain(|topic| topic != "delete");
        (seen, code, topics, events.exits(&id))
    });
    assert_eq!(seen.1, Some(137));
    let told = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
    ];
    assert_eq!(seen.2, told);
}

/// Its streams are the ones that it was started with, whoever comes.
#[test]
fn a_task_that_runs_is_attached_to() {
    let seen = assert_alike(|runtime| {
        let id = fresh_id("attached");
        // Nothing before the attach: `ctr run -d` may still be there to take it.
        let script = "read line; echo got $line; echo lost >&2; exit 7";
        let run = ["run", "-d", "--runtime", runtime.name(), IMAGE, &id];
        let mut run = ctr(&run);
        let container = Container { id };
        command::run(run.args(["sh", "-c", script]), b"").ok();
        let outcome = command::run(&mut ctr(&["task", "attach", &container.id]), b"word\n");
        container.wait_stopped();
        container.remove();
        (outcome.out(), outcome.err(), outcome.code())
    });
    assert_eq!(seen.0, "got word\n");
    assert_eq!(seen.2, 7);
}

#[test]
fn processes_and_metrics_are_shown() {
    let metrics = assert_alike(|runtime| {
        let pod = Container::idle(runtime);
        let said = pod.task("metrics", &[]).ok();
        let names = said
            .lines()
            .skip(2)
            .filter_map(|line| line.split_whitespace().next());
        let names: Vec<String> = names.map(str::to_owned).collect();
        let of = |name: &str| -> u64 {
            let line = said.lines().find(|line| line.starts_with(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1));
            value
                .and_then(|value| value.parse().ok())
                .unwrap_or_else(|| panic!("no {name} in {said}"))
        };
        assert_eq!(of("pids.current"), 1, "{said}");
        assert!(of("memory.usage ") > 0, "{said}");
        assert!(of("cpu.usage_usec") > 0, "{said}");
        let ps = pod.task("ps", &[]).ok();
        let pids: Vec<&str> = ps
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(pids, [pod.pid().to_string()], "{ps}");
        names
    });
    assert!(!metrics.is_empty());
}

#[test]
fn output_goes_to_a_file() {
    assert_alike(|runtime| {
        let directory = Directory::new();
        let uri = format!("file://{}/not/there yet/log", directory.0.display()).replace(' ', "%20");
        for round in 0..2 {
            let script = format!("echo out {round}; echo err {round} >&2");
            let id = fresh_id("logged");
            let mut run = ctr(&[
                "run",
                "-d",
                "--runtime",
                runtime.name(),
                "--log-uri",
                &uri,
                IMAGE,
                &id,
            ]);
            run.args(["sh", "-c", &script]);
            command::run(&mut run, b"").ok();
            let container = Container { id };
            container.wait_stopped();
            container.remove();
        }
        let text = directory.read("not/there yet/log");
        // Of two streams either may come first.
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        assert!(lines[..2].iter().all(|line| line.ends_with('0')), "{text}");
        lines.sort();
        lines
    });
}

#[test]
fn output_goes_to_a_program() {
    let before = census();
    let logged = assert_alike(|runtime| {
        let directory = Directory::new();
        let text = format!(
            "cd {}; export PATH=/usr/bin:/bin; env | grep ^CONTAINER_NAMESPACE >about; echo \"$@\" >>about; exec 5>&-; \
             cat <&4 >err & cat <&3 >out; wait; echo ended >end",
            directory.0.display()
        );
        let program = directory.script("logger", &text);
        let uri = format!("binary://{}?--tag=a+b", program.display());
        let script = "echo to out; echo to err >&2; exec sleep 86400";
        let container = Container::detached(runtime, &["--log-uri", &uri], &["sh", "-c", script]);
        let arrived = eventually(Instant::now() + PATIENCE / 8, || {
            let length = |name| fs::metadata(directory.at(name)).map_or(0, |found| found.len());
            (length("out") > 0 && length("err") > 0).then_some(())
        });
        assert!(arrived.is_some(), "{runtime:?}");
        container.remove();
        ["about", "out", "err"].map(|name| directory.read(name))
    });
    assert_eq!(logged[0], "CONTAINER_NAMESPACE=default\n--tag a b\n");
    assert_eq!(logged[1..], ["to out\n", "to err\n"]);
    before.assert_restored();

    // One that cannot be started is named, and leaves nothing.
    for runtime in BOTH {
        let id = fresh_id("no-logger");
        let uri = "binary:///no/such/logger";
        let mut run = ctr(&[
            "run",
            "-d",
            "--runtime",
            runtime.name(),
            "--log-uri",
            uri,
            IMAGE,
            &id,
            "true",
        ]);
        let outcome = command::run(&mut run, b"");
        assert!(
            outcome.code() != 0 && outcome.err().contains("/no/such/logger"),
            "{outcome:?}"
        );
        drop(Container { id });
    }
    before.assert_restored();
}

/// A hook that does this in a directory of the host.
fn hook(directory: &Directory, script: &str) -> Value {
    let script = format!("cd {}; {script}", directory.0.display());
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin", "A=b"]})
}

/// Runs it; one that fails leaves its container, whatever the runtime.
#[track_caller]
fn run(bundle: &Bundle, runtime: Runtime) -> Outcome {
    let id = fresh_id("hooked");
    let outcome = command::run(&mut bundle.command(&["--rm"], runtime, &id), b"");
    let _ = ctr(&["container", "delete", &id]).output();
    outcome
}

#[test]
fn hooks_run_on_the_host() {
    let before = census();
    let seen = assert_alike(|runtime| {
        let directory = Directory::new();
        let mut bundle = Bundle::new(&["echo", "the program"]);
        let noting = |name: &str| {
            hook(
                &directory,
                &format!(
                    "cat >{name}; echo {name} >>order; env | grep -v -e PWD -e SHLVL -e '^_' | sort >env-{name}; \
                 pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/' {name}); \
                 test \"$(readlink /proc/$pid/ns/net)\" != \"$(readlink /proc/self/ns/net)\" && echo apart >net-{name}"
                ),
            )
        };
        let hooks = json!({
            "createRuntime": [noting("runtime")],
            "prestart": [noting("first"), noting("second")],
            "poststart": [noting("started")],
            // runc 1.1 leaves it at the first that fails.
            "poststop": [noting("stopped"), noting("last"), hook(&directory, "exit 1")],
        });
        bundle.spec["hooks"] = hooks;
        bundle.spec["annotations"] = json!({"a": "b"});
        let out = run(&bundle, runtime).ok();
        let states = ["first", "runtime", "stopped"].map(|name| {
            let mut state: Value = serde_json::from_str(&directory.read(name)).expect("a state");
            assert!(
                state["id"]
                    .as_str()
                    .is_some_and(|id| id.starts_with("hooked-")),
                "{state}"
            );
            let found = state["bundle"]
                .as_str()
                .map(|bundle| bundle.rsplit_once('/').map(|(up, _)| up.to_owned()));
            let status = state["status"].clone();
            // Each names the version of the specification that it keeps to.
            let keys: Vec<String> = state
                .as_object_mut()
                .expect("an object")
                .keys()
                .cloned()
                .collect();
            (
                found,
                status,
                keys,
                state["annotations"].clone(),
                directory.read(&format!("env-{name}")),
            )
        });
        (
            out,
            directory.read("order"),
            states,
            directory.read("net-first"),
        )
    });
    assert_eq!(seen.0, "the program\n");
    assert_eq!(seen.1, "first\nsecond\nruntime\nstarted\nstopped\nlast\n");
    assert_eq!(seen.2[0].1, "creating");
    assert_eq!(seen.2[0].4, "A=b\nPATH=/usr/bin:/bin\n");
    before.assert_restored();
}

#[test]
fn a_hook_that_fails_or_hangs_ends_the_run() {
    let before = census();
    for (kind, script, timeout, words) in [
        (
            "prestart",
            "echo no room >&2; exit 3",
            None,
            &["exit status 3", "no room"][..],
        ),
        (
            "createRuntime",
            "exec sleep 60",
            Some(1),
            &["hook ran past specified timeout of 1.0s"],
        ),
        (
            "poststart",
            "echo late >&2; exit 4",
            None,
            &["exit status 4", "late"],
        ),
    ] {
        for runtime in BOTH {
            let directory = Directory::new();
            let mut bundle = Bundle::new(&["sleep", "86400"]);
            let mut hook = hook(&directory, script);
            if let Some(seconds) = timeout {
                hook["timeout"] = seconds.into();
            }
            bundle.spec["hooks"] = json!({kind: [hook]});
            let outcome = run(&bundle, runtime);
            assert_ne!(outcome.code(), 0, "{kind} {runtime:?}: {outcome:?}");
            for word in words {
                assert!(
                    outcome.err().contains(word),
                    "{kind} {runtime:?}: {outcome:?}"
                );
            }
        }
    }
    before.assert_restored();
}
