//! husk-vmm says how a guest ended. The guest here is no agent but a probe that ends as it is told.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use husk_proto::machine::{
    PauseRequest, ResumeRequest, StopRequest, status_response::State, wait_response::Reason,
};
use husk_tests::machine::{self, INITRD, KERNEL, Machine, block_on, probe_initrd};

/// Boots the probe with this on its command line: it must end so. The answer is the detail and the
/// console.
#[track_caller]
fn assert_end(cmdline: &str, vcpus: u32, reason: Reason) -> (String, String) {
    let initrd = probe_initrd();
    let ended = block_on(async {
        let mut machine = Machine::spawn()?;
        let _agent = machine
            .boot(Path::new(KERNEL), &initrd, 128, vcpus, cmdline)
            .await?;
        machine.wait().await
    })
    .unwrap_or_else(|error| panic!("{cmdline}: {error:#}"));
    let console = String::from_utf8_lossy(&ended.console).into_owned();
    assert_eq!(ended.reason.enum_value_or_default(), reason, "{console}");
    (ended.detail, console)
}

#[test]
fn a_power_off_is_told() {
    assert_end("husk_probe=power-off", 1, Reason::POWERED_OFF);
}

#[test]
fn a_reset_is_told() {
    assert_end("husk_probe=reset", 1, Reason::RESET);
}

#[test]
fn a_panic_is_told_with_its_line() {
    let (detail, console) = assert_end("husk_probe=exit", 1, Reason::PANICKED);
    assert!(detail.contains("Attempted to kill init"), "{detail}");
    assert!(console.contains("Kernel panic - not syncing"), "{console}");
}

/// Before any driver is there to tell: the console alone knows.
#[test]
fn an_early_panic_is_told_with_its_line() {
    let (detail, _) = assert_end("rdinit=/nowhere init=/nowhere", 1, Reason::PANICKED);
    assert!(detail.contains("Kernel panic"), "{detail}");
}

#[test]
fn a_triple_fault_is_told() {
    assert_end("husk_probe=reset reboot=t", 1, Reason::TRIPLE_FAULT);
}

#[test]
fn two_processors_end_as_one() {
    assert_end("husk_probe=power-off", 2, Reason::POWERED_OFF);
}

/// Whether a process uses the processor: a guest that spins does while any of its vCPUs runs. Of
/// half a second, what the kernel may still be charging it for (proc_pid_stat(5): utime, stime, in
/// hundredths of a second) does not count.
fn works(pid: u32) -> bool {
    let ticks = || -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its stat");
        let (_, fields) = stat.rsplit_once(") ").expect("a name in parentheses");
        let times = fields.split(' ').skip(11).take(2);
        times.map(|time| time.parse::<u64>().expect("a time")).sum()
    };
    let before = ticks();
    thread::sleep(Duration::from_millis(500));
    ticks() - before > 3
}

#[test]
fn stop_pause_and_resume() {
    let initrd = probe_initrd();
    block_on(async {
        let mut machine = Machine::spawn().expect("spawn");
        let status = machine.status().await.expect("status");
        assert_eq!(status.state.enum_value_or_default(), State::WAITING);
        let _agent = machine
            .boot(Path::new(KERNEL), &initrd, 128, 2, "husk_probe=spin")
            .await
            .expect("boot");
        let state = async || {
            let status = machine.status().await.expect("status");
            status.state.enum_value_or_default()
        };
        assert_eq!(state().await, State::RUNNING);
        assert!(works(machine.pid()), "the guest does not run");
        let client = machine.client();
        client
            .pause(machine::patience(), &PauseRequest::new())
            .await
            .expect("pause");
        assert_eq!(state().await, State::PAUSED);
        assert!(!works(machine.pid()), "a paused guest computes on");
        client
            .resume(machine::patience(), &ResumeRequest::new())
            .await
            .expect("resume");
        assert_eq!(state().await, State::RUNNING);
        assert!(works(machine.pid()), "a resumed guest stands still");
        client
            .stop(machine::patience(), &StopRequest::new())
            .await
            .expect("stop");
        let ended = machine.wait().await.expect("wait");
        assert_eq!(ended.reason.enum_value_or_default(), Reason::STOPPED);
        assert_eq!(state().await, State::ENDED);
        assert!(!works(machine.pid()), "a stopped guest computes on");
    });
}

#[test]
fn the_agent_answers() {
    block_on(async {
        let mut machine = Machine::spawn().expect("spawn");
        let agent = machine
            .boot(Path::new(KERNEL), Path::new(INITRD), 128, 1, "")
            .await
            .expect("boot");
        machine::hello(agent).await.expect("hello");
    });
}

/// The VMM has no path to its host: its root is empty, and so is every directory it holds.
#[test]
fn the_vmm_lives_in_an_empty_root() {
    block_on(async {
        let mut machine = Machine::spawn().expect("spawn");
        let agent = machine
            .boot(Path::new(KERNEL), Path::new(INITRD), 128, 1, "")
            .await
            .expect("boot");
        let _agent = machine::hello(agent).await.expect("hello");
        let proc = PathBuf::from(format!("/proc/{}", machine.pid()));
        let root: Vec<_> = fs::read_dir(proc.join("root")).expect("its root").collect();
        assert!(root.is_empty(), "{root:?}");
        let cwd: Vec<_> = fs::read_dir(proc.join("cwd")).expect("its cwd").collect();
        assert!(cwd.is_empty(), "{cwd:?}");
        let mounts = fs::read_to_string(proc.join("mounts")).expect("its mounts");
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        for entry in fs::read_dir(proc.join("fd")).expect("its fds").flatten() {
            let target = entry.path().join("sys");
            assert!(
                !target.exists(),
                "{} leads to {target:?}",
                entry.path().display()
            );
        }
        let environment = fs::read(proc.join("environ")).expect("its environment");
        assert!(
            environment.is_empty(),
            "{}",
            String::from_utf8_lossy(&environment)
        );
    });
}

/// It dies with the shim: when its machine socket closes.
#[test]
fn the_vmm_dies_when_its_socket_closes() {
    let initrd = probe_initrd();
    // The socket closes with the runtime, which must not be waited in.
    let mut process = block_on(async {
        let mut machine = Machine::spawn().expect("spawn");
        let agent = machine
            .boot(Path::new(KERNEL), &initrd, 128, 1, "")
            .await
            .expect("boot");
        drop(agent);
        machine.hang_up()
    });
    process.wait_gone().expect("it ends by itself");
}
