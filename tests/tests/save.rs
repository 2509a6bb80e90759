//! A machine that was saved and restored goes on as if nothing had happened. The guest is the probe,
//! which answers its test, or the agent.

use std::{
    fs::{self, File},
    os::unix::{fs::FileExt, net::UnixStream},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use husk_proto::{
    agent::{GrowRequest, PrepareRequest},
    agent_ttrpc::AgentClient,
    machine::{ConnectRequest, Connection, ShareRequest},
};
use husk_tests::machine::{
    self, Guest, INITRD, KERNEL, Machine, Report, Saved, block_on, probe_initrd,
};

const MEMORY_MIB: u64 = 128;

#[track_caller]
fn run(test: impl Future<Output = Result<()>>) {
    if let Err(error) = block_on(test) {
        panic!("{error:#}");
    }
}

/// A booted probe with so many vCPUs, each with a worker, if any work.
async fn boot_probe(vcpus: u32, workers: u32) -> Result<(Machine, Guest)> {
    let mut machine = Machine::spawn()?;
    let cmdline = format!("husk_probe=serve husk_workers={workers}");
    let guest = machine
        .boot(
            Path::new(KERNEL),
            &probe_initrd(),
            MEMORY_MIB,
            vcpus,
            &cmdline,
        )
        .await?;
    let mut guest = Guest::new(guest)?;
    guest.report().await.context("the first answer")?;
    Ok((machine, guest))
}

async fn restore_probe(saved: &Saved) -> Result<(Machine, Guest)> {
    let mut machine = Machine::spawn()?;
    let guest = machine.restore(saved, None).await?;
    Ok((machine, Guest::new(guest)?))
}

/// Pauses the machine, saves it and ends it.
async fn save_and_stop(mut machine: Machine) -> Result<Saved> {
    machine.pause().await?;
    let saved = machine.save().await?;
    machine.stop().await?;
    Ok(saved)
}

async fn saved_probe() -> Result<Saved> {
    let (machine, _guest) = boot_probe(1, 0).await?;
    save_and_stop(machine).await
}

/// A saved machine whose agent has said hello.
async fn saved_agent() -> Result<Saved> {
    let mut machine = Machine::spawn()?;
    let agent = machine
        .boot(Path::new(KERNEL), Path::new(INITRD), MEMORY_MIB, 1, "")
        .await?;
    let _agent = machine::hello(agent).await?;
    save_and_stop(machine).await
}

/// Nothing was computed wrong, and no clock ran backwards, not even since `before`.
fn check(now: Report, before: Report) -> Result<()> {
    ensure!(now.wrong == 0, "{now:?}");
    ensure!(now.backwards == 0, "{now:?}");
    ensure!(
        now.monotonic_ns >= before.monotonic_ns,
        "{now:?} after {before:?}"
    );
    Ok(())
}

#[test]
fn a_restored_machine_answers_where_its_agent_was() {
    run(async {
        let saved = saved_agent().await?;
        for _ in 0..3 {
            clone_and_say_hello(&saved, None).await?;
        }
        Ok(())
    });
}

/// Restores a machine and waits for its agent's answer. The guest ends with the connection to it.
async fn clone_and_say_hello(
    saved: &Saved,
    pages: Option<&File>,
) -> Result<(Machine, AgentClient)> {
    let began = Instant::now();
    let mut machine = Machine::spawn()?;
    let agent = machine.restore(saved, pages).await?;
    let restored = began.elapsed();
    let agent = machine::hello(agent).await?;
    let answered = began.elapsed();
    let faults = machine::page_faults(machine.pid())?;
    println!("restored after {restored:?}, answered after {answered:?}, {faults} page faults");
    Ok((machine, agent))
}

/// Pages that one clone has written are mapped before the next one runs. A list of nonsense harms
/// nobody.
#[test]
fn pages_listed_are_there_before_the_guest_asks() {
    run(async {
        let saved = saved_agent().await?;
        let (first, agent) = clone_and_say_hello(&saved, None).await?;
        let pages = machine::pages_written(first.pid(), &saved.memory)?;
        let without = machine::page_faults(first.pid())?;
        drop((first, agent));
        let (second, _agent) = clone_and_say_hello(&saved, Some(&pages)).await?;
        let with = machine::page_faults(second.pid())?;
        ensure!(
            with < without,
            "{with} page faults with the list, {without} without"
        );
        let nonsense = machine::scratch_file()?;
        nonsense.write_all_at(&[0xff; 1001], 0)?;
        clone_and_say_hello(&saved, Some(&nonsense)).await?;
        Ok(())
    });
}

#[test]
fn a_saved_machine_goes_on_after_resume() {
    run(async {
        let (mut machine, mut guest) = boot_probe(2, 2).await?;
        let mut before = guest.report().await?;
        for _ in 0..2 {
            machine.pause().await?;
            machine.save().await?;
            machine.resume().await?;
            let now = guest.report().await?;
            check(now, before)?;
            before = now;
        }
        Ok(())
    });
}

#[test]
fn a_write_in_one_clone_is_never_seen_in_another() {
    const CLONES: u8 = 8;
    run(async {
        let (machine, mut guest) = boot_probe(1, 0).await?;
        guest.ask::<1>(b"w\xaa").await?;
        let saved = save_and_stop(machine).await?;
        let mut clones = Vec::new();
        for _ in 0..CLONES {
            clones.push(restore_probe(&saved).await?);
        }
        for ((_, guest), byte) in clones.iter_mut().zip(0..) {
            ensure!(guest.ask(b"r").await? == [0xaa, 1], "clone {byte}");
            guest.ask::<1>(&[b'w', byte]).await?;
        }
        for ((_, guest), byte) in clones.iter_mut().zip(0..) {
            ensure!(guest.ask(b"r").await? == [byte, 1], "clone {byte}");
        }
        let (_machine, mut guest) = restore_probe(&saved).await?;
        ensure!(guest.ask(b"r").await? == [0xaa, 1], "the image has changed");
        Ok(())
    });
}

/// Saved, restored and saved again, working on four processors all the time.
async fn chain(rounds: u32) -> Result<()> {
    let (mut machine, mut guest) = boot_probe(4, 4).await?;
    let mut before = guest.report().await?;
    for round in 0..rounds {
        let started = Instant::now();
        let saved = save_and_stop(machine).await?;
        let saving = started.elapsed();
        (machine, guest) = restore_probe(&saved).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = guest.report().await?;
        check(now, before).with_context(|| format!("round {round}"))?;
        println!("{round}: saved in {saving:?}, {now:?}");
        before = now;
    }
    // It still works, and not only answers.
    let mut worked = async || -> Result<()> {
        while guest.report().await?.rounds < before.rounds + 4 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    tokio::time::timeout(Duration::from_secs(60), worked()).await??;
    check(guest.report().await?, before)
}

#[test]
fn four_loaded_vcpus_survive_being_saved_again_and_again() {
    run(chain(3));
}

#[test]
#[ignore = "long: part of make test-long"]
fn four_loaded_vcpus_survive_being_saved_fifty_times() {
    run(chain(50));
}

#[test]
fn time_stands_still_for_a_saved_guest() {
    run(async {
        let (mut machine, mut guest) = boot_probe(1, 0).await?;
        let began = Instant::now();
        let before = guest.report().await?;
        machine.pause().await?;
        let ran = began.elapsed();
        let saved = machine.save().await?;
        machine.stop().await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let began = Instant::now();
        let (_machine, mut guest) = restore_probe(&saved).await?;
        let now = guest.report().await?;
        let ran = ran + began.elapsed();
        check(now, before)?;
        let passed = Duration::from_nanos(now.monotonic_ns - before.monotonic_ns);
        // Between pausing and reading the clock lies the time it takes to stop the devices.
        ensure!(
            passed < ran + Duration::from_millis(500),
            "{passed:?} of {ran:?}"
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = guest.report().await?;
        // A lab in real time may be kept waiting that long by its own host.
        let patience = match std::env::var("HUSK_LAB_CLOCK").as_deref() {
            Ok("virtual") => Duration::from_millis(20),
            _ => Duration::from_secs(10),
        };
        ensure!(Duration::from_nanos(now.late_ns) < patience, "{now:?}");
        println!("{now:?}");
        Ok(())
    });
}

/// A guest watches its time stamp counter by KVM's clock, and gives it up when they drift apart.
#[test]
fn a_clones_clocks_go_on_together() {
    const APART_NS: i64 = 3_000_000;
    run(async {
        let mut machine = Machine::spawn()?;
        let cmdline = "husk_probe=serve clocksource=kvm-clock";
        let guest = machine
            .boot(Path::new(KERNEL), &probe_initrd(), MEMORY_MIB, 4, cmdline)
            .await?;
        let mut guest = Guest::new(guest)?;
        let first = guest.clocks().await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let before = guest.clocks().await?;
        let ticks_per_ns = (before.tsc - first.tsc) as f64 / (before.raw_ns - first.raw_ns) as f64;
        let saved = save_and_stop(machine).await?;
        for _ in 0..3 {
            let (_machine, mut guest) = restore_probe(&saved).await?;
            let now = guest.clocks().await?;
            let counted = (now.tsc - before.tsc) as f64 / ticks_per_ns;
            let ahead = counted as i64 - (now.raw_ns - before.raw_ns) as i64;
            println!("the counter is {ahead} ns ahead of the clock");
            ensure!(ahead.abs() < APART_NS, "{ahead} ns apart");
        }
        Ok(())
    });
}

/// The template's guest has mounted the shares before there are any.
#[test]
fn shares_come_to_a_clone_that_has_mounted_them() {
    run(async {
        let (machine, mut guest) = boot_probe(1, 0).await?;
        guest.ask::<1>(b"m").await?;
        let saved = save_and_stop(machine).await?;
        let (mut machine, mut guest) = restore_probe(&saved).await?;
        let directory = "/var/tmp/save-share";
        fs::create_dir_all(directory)?;
        fs::write(format!("{directory}/probe"), b"shared")?;
        let share = ShareRequest {
            name: "probe".to_owned(),
            fd: machine.pass(File::open(directory)?)?,
            ..Default::default()
        };
        machine.client().share(machine::patience(), &share).await?;
        ensure!(guest.ask(b"f").await? == *b"\x06shared");
        Ok(())
    });
}

#[track_caller]
fn refused<T>(result: Result<T>, why: &str) {
    match result {
        Ok(_) => panic!("was not refused: {why}"),
        Err(error) => {
            let text = format!("{error:#}");
            assert!(text.contains(why), "{text:?} does not say {why:?}");
        }
    }
}

#[test]
fn what_is_in_the_way_of_saving_is_named() {
    run(async {
        let (mut machine, mut guest) = boot_probe(1, 0).await?;
        refused(machine.save().await, "not paused");

        let (_ours, theirs) = UnixStream::pair()?;
        let dial = ConnectRequest {
            connections: vec![Connection {
                fd: machine.pass(theirs)?,
                port: 1025,
                ..Default::default()
            }],
            ..Default::default()
        };
        machine.pause().await?;
        machine.client().connect(machine::patience(), &dial).await?;
        refused(machine.save().await, "1025");
        machine.resume().await?;
        // Nobody listens there: the guest refuses, and nothing is left of it.
        guest.report().await?;

        let share = ShareRequest {
            name: "rootfs".to_owned(),
            fd: machine.pass(File::open("/var/tmp")?)?,
            ..Default::default()
        };
        machine.client().share(machine::patience(), &share).await?;
        machine.pause().await?;
        refused(machine.save().await, "rootfs");
        machine.resume().await?;
        guest.report().await?;
        Ok(())
    });
}

/// An agent's machine of 256 MiB and one vCPU, of eight that it knows of.
async fn saved_template() -> Result<Saved> {
    let mut machine = Machine::spawn()?;
    machine.possible_vcpus = 8;
    let agent = machine
        .boot(Path::new(KERNEL), Path::new(INITRD), 256, 1, "")
        .await?;
    let agent = machine::hello(agent).await?;
    let request = PrepareRequest::default();
    agent.prepare(machine::patience(), &request).await?;
    save_and_stop(machine).await
}

#[test]
fn a_restored_machine_may_be_larger_and_is_not_saved_again() {
    run(async {
        let saved = saved_template().await?;
        for (memory_mib, vcpus) in [(256, 2), (384, 1), (2048, 1), (4096, 8)] {
            let mut machine = Machine::spawn()?;
            let (agent, restored) = machine.restore_as(&saved, None, memory_mib, vcpus).await?;
            let added = (memory_mib - 256) << 20;
            ensure!(restored.added_bytes == added, "{restored:?}");
            let agent = machine::hello(agent).await?;
            let request = GrowRequest {
                memory_start: restored.added_start,
                memory_bytes: restored.added_bytes,
                vcpus,
                ..Default::default()
            };
            let began = Instant::now();
            agent.grow(machine::patience(), &request).await?;
            println!(
                "{memory_mib} MiB, {vcpus} vCPUs: grown in {:?}",
                began.elapsed()
            );
            machine.pause().await?;
            refused(
                machine.save().await,
                "more memory or vCPUs than it was restored from",
            );
            machine.resume().await?;
            agent
                .grow(
                    machine::patience(),
                    &GrowRequest {
                        vcpus,
                        ..Default::default()
                    },
                )
                .await?;
        }
        Ok(())
    });
}

#[test]
fn a_size_that_cannot_be_had_is_refused_and_the_next_one_given() {
    run(async {
        let saved = saved_template().await?;
        let mut machine = Machine::spawn()?;
        for (memory_mib, vcpus, why) in [
            (0, 9, "vcpus: 9 is not between 1, as were saved, and 8"),
            (0, 1 << 20, "vcpus: 1048576 is not"),
            (
                254,
                1,
                "memory_bytes: 266338304 is not 268435456, as was saved",
            ),
            (258, 1, "memory_bytes: 270532608 is not"),
            (256 + (1 << 30), 1, "memory_bytes: "),
        ] {
            let asked = machine.restore_as(&saved, None, memory_mib, vcpus).await;
            refused(asked, why);
        }
        let (agent, restored) = machine.restore_as(&saved, None, 384, 2).await?;
        let agent = machine::hello(agent).await?;
        let grow = |memory_start, memory_bytes, vcpus| {
            let request = GrowRequest {
                memory_start,
                memory_bytes,
                vcpus,
                ..Default::default()
            };
            let agent = agent.clone();
            async move { Ok(agent.grow(machine::patience(), &request).await?) }
        };
        let (start, bytes) = (restored.added_start, restored.added_bytes);
        refused(grow(start, bytes + 4096, 2).await, "are not blocks");
        refused(grow(start, bytes, 65).await, "vcpus: 65 are more");
        // What the guest has already cannot be added once more.
        refused(grow(0, bytes, 2).await, "add memory at 0x0");
        grow(start, bytes, 2).await?;
        refused(grow(start, bytes, 2).await, "add memory at 0x100000000");
        // One that the guest knows of, and that does not exist.
        refused(
            grow(0, 0, 3).await,
            "start a processor: /sys/devices/system/cpu/cpu2/online",
        );
        Ok(())
    });
}

/// A file like `file`, less what `damage` does to it.
fn damaged(file: &File, damage: impl Fn(&mut Vec<u8>)) -> Result<File> {
    let mut bytes = vec![0; file.metadata()?.len().try_into()?];
    file.read_exact_at(&mut bytes, 0)?;
    damage(&mut bytes);
    let copy = machine::scratch_file()?;
    copy.write_all_at(&bytes, 0)?;
    Ok(copy)
}

#[test]
fn a_machine_that_cannot_be_restored_can_still_be_booted() {
    run(async {
        let saved = saved_probe().await?;
        let mut machine = Machine::spawn()?;
        let with_state = |state: File| -> Result<Saved> {
            Ok(Saved {
                memory: saved.memory.try_clone()?,
                state,
            })
        };
        let cut = damaged(&saved.state, |bytes| bytes.truncate(bytes.len() / 2))?;
        refused(
            machine.restore(&with_state(cut)?, None).await,
            "its header says",
        );
        let flipped = damaged(&saved.state, |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 4;
        })?;
        refused(
            machine.restore(&with_state(flipped)?, None).await,
            "damaged",
        );
        let newer = damaged(&saved.state, |bytes| bytes[8] = 77)?;
        refused(
            machine.restore(&with_state(newer)?, None).await,
            "format 77",
        );
        let short = Saved {
            memory: machine::scratch_file()?,
            state: saved.state.try_clone()?,
        };
        refused(machine.restore(&short, None).await, "memory file");

        let cmdline = "husk_probe=serve";
        let guest = machine
            .boot(Path::new(KERNEL), &probe_initrd(), MEMORY_MIB, 1, cmdline)
            .await?;
        Guest::new(guest)?.report().await?;
        refused(machine.restore(&saved, None).await, "booted before");
        Ok(())
    });
}

/// Devices take their state over, the agent's connection with it, before they find empty memory.
#[test]
fn a_restore_that_fails_late_leaves_the_agents_socket_for_a_boot() {
    run(async {
        let saved = saved_probe().await?;
        let empty = Saved {
            memory: machine::scratch_file()?,
            state: saved.state.try_clone()?,
        };
        empty.memory.set_len(saved.memory.metadata()?.len())?;
        let mut machine = Machine::spawn()?;
        let (agent, theirs) = UnixStream::pair()?;
        refused(
            machine.restore_with(&theirs, &empty, None, 0, 0).await,
            "queue",
        );
        let (kernel, initrd) = (Path::new(KERNEL), probe_initrd());
        machine
            .boot_with(&theirs, kernel, &initrd, MEMORY_MIB, 1, "husk_probe=serve")
            .await?;
        drop(theirs);
        Guest::new(agent)?.report().await?;
        Ok(())
    });
}
