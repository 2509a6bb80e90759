//! Containers whose containerd, shim, VMM or agent goes away under them, again and again: what is left to a race does
//! not show at the first. Twice in every run, and ten times in `make test-long`.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    process::Command,
    sync::mpsc,
    thread,
    time::Instant,
};

use husk_tests::{
    census::Census,
    command::{self, PATIENCE, eventually},
    containerd::{self, Restored, Version},
    ctr::{Container, Run, Runtime, ctr},
    events::Events,
};

/// A container that answers each line, and a client at its FIFOs, which needs no containerd.
struct Talker {
    container: Container,
    stdin: File,
    answers: mpsc::Receiver<String>,
}

impl Talker {
    #[track_caller]
    fn start() -> Self {
        let script = "while read line; do echo \"got $line\"; test \"$line\" = end && exit 7; done";
        let container = Container::detached(Runtime::Husk, &[], &["sh", "-c", script]);
        let fifo = |stream: &str| {
            let name = format!("{}-{stream}", container.id);
            let entries = fs::read_dir("/run/containerd/fifo").expect("list the FIFOs");
            let found = entries
                .flatten()
                .map(|entry| entry.path().join(&name))
                .find(|path| path.exists());
            found.unwrap_or_else(|| panic!("no FIFO {name}"))
        };
        let out = File::open(fifo("stdout")).expect("open stdout");
        let stdin = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(fifo("stdin"));
        let (sender, answers) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let stdin = stdin.expect("open stdin");
        Talker {
            container,
            stdin,
            answers,
        }
    }

    fn say(&mut self, line: &str) {
        self.stdin
            .write_all(format!("{line}\n").as_bytes())
            .expect("write to stdin");
    }

    #[track_caller]
    fn assert_answers(&mut self, line: &str) {
        self.say(line);
        let answer = self.answers.recv_timeout(PATIENCE / 8);
        assert_eq!(answer.ok(), Some(format!("got {line}")));
    }
}

/// A container that writes to a log file all the time.
struct Logged {
    container: Container,
    log: PathBuf,
}

impl Logged {
    #[track_caller]
    fn start() -> Self {
        let log = PathBuf::from(format!("/var/tmp/restarts-{}/of/log", std::process::id()));
        let uri = format!("file://{}", log.display());
        let script = "n=0; while :; do n=$((n+1)); echo line $n; sleep 0.1; done";
        let container =
            Container::detached(Runtime::Husk, &["--log-uri", &uri], &["sh", "-c", script]);
        Logged { container, log }
    }

    #[track_caller]
    fn assert_grows(&self) {
        let length = || fs::metadata(&self.log).map_or(0, |found| found.len());
        let before = length();
        let grew = eventually(Instant::now() + PATIENCE / 8, || {
            (length() > before).then_some(())
        });
        assert!(grew.is_some(), "the log stays at {before} bytes");
    }

    /// Nothing is missing, and nothing there twice.
    #[track_caller]
    fn assert_whole(self) {
        self.container.remove();
        let text = fs::read_to_string(&self.log).expect("read the log");
        for (number, line) in (1..).zip(text.lines()) {
            assert_eq!(line, format!("line {number}"));
        }
        let top = self.log.ancestors().nth(2).expect("a directory");
        fs::remove_dir_all(top).expect("remove the log");
    }
}

/// What a running container shows before, while and after containerd is away.
#[track_caller]
fn assert_containers_go_on(rounds: u32, mut take_away: impl FnMut(), mut bring_back: impl FnMut()) {
    let _restored = Restored::when_dropped();
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let mut talker = Talker::start();
    let logged = Logged::start();
    let (id, pid) = (talker.container.id.clone(), talker.container.pid());
    for round in 0..rounds {
        take_away();
        talker.assert_answers(&format!("away {round}"));
        logged.assert_grows();
        bring_back();
        assert_eq!(
            talker.container.state().as_deref(),
            Some("RUNNING"),
            "round {round}"
        );
        assert_eq!(talker.container.pid(), pid);
        talker.assert_answers(&format!("back {round}"));
        let said = talker.container.exec(&["sh", "-c", "echo exec; exit 3"]);
        assert_eq!(
            (said.code(), said.out().as_str()),
            (3, "exec\n"),
            "{said:?}"
        );
    }
    logged.assert_grows();
    let events = Events::subscribe();
    talker.assert_answers("end");
    events.wait_for(&id, "exit");
    let deleted = talker.container.task("delete", &[]);
    assert_eq!(deleted.status_of_task(), Some(7), "{deleted:?}");
    events.wait_for(&id, "delete");
    assert_eq!(events.exits(&id), [7]);
    talker.container.remove();
    logged.assert_whole();
    // FIFOs of a ctr that ends before its container stay: these are its, and not ours to remove.
    sweep_fifos();
    before.assert_restored();
}

fn sweep_fifos() {
    let swept = Command::new("sh")
        .args(["-c", "rm -rf /run/containerd/fifo/*"])
        .status();
    assert!(swept.is_ok_and(|status| status.success()));
}

fn containers_go_on_while_containerd_is_stopped_and_started(rounds: u32) {
    assert_containers_go_on(
        rounds,
        || containerd::stop().expect("stop"),
        || containerd::start().expect("start"),
    );
}

fn containers_go_on_while_containerd_is_killed_and_started(rounds: u32) {
    assert_containers_go_on(
        rounds,
        || containerd::kill().expect("kill"),
        || containerd::start().expect("start"),
    );
}

/// From 1.7 to 2.1 and, as an upgrade may have to be taken back, from 2.1 to 1.7.
fn containers_go_on_while_containerd_is_upgraded_and_downgraded(rounds: u32) {
    let _restored = Restored::when_dropped();
    if containerd::selected() != Version::V1_7 {
        containerd::change_to(Version::V1_7).expect("begin with 1.7");
    }
    assert_containers_go_on(
        rounds,
        || containerd::stop().expect("stop"),
        || {
            containerd::select(containerd::selected().other()).expect("select");
            containerd::start().expect("start");
        },
    );
}

/// It is kept for containerd, and for whoever asks it.
fn an_end_while_containerd_is_away_is_known_when_it_is_back(rounds: u32) {
    let _restored = Restored::when_dropped();
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    for round in 0..rounds {
        let mut talker = Talker::start();
        let id = talker.container.id.clone();
        if round % 2 == 0 {
            containerd::stop().expect("stop");
        } else {
            containerd::kill().expect("kill");
        }
        talker.assert_answers("end");
        // Of stdout: the process is gone, and all that it has said is here.
        let end = talker.answers.recv_timeout(PATIENCE / 8);
        assert_eq!(end, Err(mpsc::RecvTimeoutError::Disconnected));
        containerd::start().expect("start");
        let events = Events::subscribe();
        assert_eq!(
            talker.container.state().as_deref(),
            Some("STOPPED"),
            "round {round}"
        );
        let deleted = talker.container.task("delete", &[]);
        assert_eq!(
            deleted.status_of_task(),
            Some(7),
            "round {round}: {deleted:?}"
        );
        events.wait_for(&id, "delete");
        // It may have come before we listened, and must not come again.
        assert!(events.exits(&id).len() <= 1, "{:?}", events.of(&id));
        talker.container.remove();
        sweep_fifos();
    }
    before.assert_restored();
}

/// The shim's process: the parent of the VMM, which containerd knows the task by.
fn shim_of(container: &Container) -> u32 {
    let status =
        fs::read_to_string(format!("/proc/{}/status", container.pid())).expect("read status");
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let parent = parent.expect("a parent").trim().parse().expect("a number");
    let name = fs::read_to_string(format!("/proc/{parent}/comm")).expect("read comm");
    assert_eq!(name, "husk-shim\n");
    parent
}

fn kill(pid: u32) {
    command::run(Command::new("kill").args(["-9", &pid.to_string()]), b"").ok();
}

/// Something of a pod is killed: the end is told once, as 137, and nothing is left.
#[track_caller]
fn assert_end_is_told_once(rounds: u32, flags: &[&str], end: impl Fn(&Container)) {
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    let events = Events::subscribe();
    for round in 0..rounds {
        let flags = [&["--null-io"], flags].concat();
        let container = Container::detached(Runtime::Husk, &flags, &["sleep", "86400"]);
        let id = container.id.clone();
        end(&container);
        events.wait_for(&id, "exit");
        container.wait_stopped();
        container.remove();
        events.wait_for(&id, "delete");
        assert_eq!(
            events.exits(&id),
            [137],
            "round {round}: {:#?}",
            events.of(&id)
        );
        before.assert_restored();
    }
}

fn a_shim_that_is_killed_is_told_once_and_leaves_nothing(rounds: u32) {
    assert_end_is_told_once(rounds, &[], |container| kill(shim_of(container)));
}

fn a_vmm_that_is_killed_is_told_once_and_leaves_nothing(rounds: u32) {
    assert_end_is_told_once(rounds, &[], |container| kill(container.pid()));
}

/// The agent is the guest's first process: it goes with its kernel, and the kernel with it.
fn an_agent_that_dies_is_told_once_and_leaves_nothing(rounds: u32) {
    assert_end_is_told_once(rounds, &["--privileged"], |container| {
        // Nobody is left to say how it went.
        drop(container.exec(&["sh", "-c", "echo c >/proc/sysrq-trigger"]));
    });
}

/// Nobody is left who could say how the shim's containers are.
fn a_shim_that_dies_with_containerd_is_cleaned_up_after(rounds: u32) {
    let _restored = Restored::when_dropped();
    Run::husk(&["true"]).go().ok();
    let before = Census::take();
    for _ in 0..rounds {
        let container = Container::idle(Runtime::Husk);
        let shim = shim_of(&container);
        containerd::kill().expect("kill");
        kill(shim);
        containerd::start().expect("start");
        let gone = eventually(Instant::now() + PATIENCE / 4, || {
            container.state().is_none().then_some(())
        });
        assert!(gone.is_some(), "{:?}", container.state());
        command::run(&mut ctr(&["container", "delete", &container.id]), b"").ok();
        std::mem::forget(container);
        before.assert_restored();
    }
}

macro_rules! again_and_again {
    ($($name:ident)*) => {
        mod twice {$(
            #[test]
            fn $name() {
                super::$name(2);
            }
        )*}
        mod ten_times {$(
            #[test]
            #[ignore = "takes minutes"]
            fn $name() {
                super::$name(10);
            }
        )*}
    };
}

again_and_again! {
    containers_go_on_while_containerd_is_stopped_and_started
    containers_go_on_while_containerd_is_killed_and_started
    containers_go_on_while_containerd_is_upgraded_and_downgraded
    an_end_while_containerd_is_away_is_known_when_it_is_back
    a_shim_that_is_killed_is_told_once_and_leaves_nothing
    a_vmm_that_is_killed_is_told_once_and_leaves_nothing
    an_agent_that_dies_is_told_once_and_leaves_nothing
    a_shim_that_dies_with_containerd_is_cleaned_up_after
}
