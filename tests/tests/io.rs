//! Standard streams: whole, in order, apart, and never a reason to hang.

use std::{process::Command, time::Instant};

use husk_tests::{
    command::{self, PATIENCE, Running, eventually},
    ctr::{Container, Run, Runtime, ctr, fresh_id},
    terminal::Terminal,
};

const MIB: usize = 1 << 20;

/// Bytes without a period that a lost or swapped block could hide in.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // Knuth's MMIX generator.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Without printing 64 MiB when it is not.
#[track_caller]
fn assert_same(got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "length");
    if let Some(at) = (0..want.len()).find(|&at| got[at] != want[at]) {
        panic!("differs from byte {at} on");
    }
}

#[test]
fn sixty_four_mib_come_back_identical() {
    let sent = noise(64 * MIB, 1);
    let outcome = Run::husk(&["cat"]).feed(&sent);
    assert_eq!(outcome.code(), 0, "{}", outcome.err());
    assert_same(&outcome.stdout, &sent);
}

#[test]
fn three_execs_at_once_keep_their_bytes_apart() {
    let pod = Container::idle(Runtime::Husk);
    let sent: Vec<_> = (2..5).map(|seed| noise(64 * MIB, seed)).collect();
    let running: Vec<Running> = sent
        .iter()
        .map(|bytes| command::start(&mut pod.exec_command(&[], &["cat"]), bytes))
        .collect();
    for (exec, sent) in running.into_iter().zip(&sent) {
        let outcome = exec.finish();
        assert_eq!(outcome.code(), 0, "{}", outcome.err());
        assert_same(&outcome.stdout, sent);
    }
}

#[test]
fn what_is_printed_right_before_exit_arrives_whole() {
    let script = "head -c 20971520 /dev/zero | tr '\\0' x; exit 3";
    let outcome = Run::husk(&["sh", "-c", script]).go();
    assert_eq!(outcome.code(), 3, "{}", outcome.err());
    assert_eq!(outcome.stdout.len(), 20 * MIB);
    assert!(outcome.stdout.iter().all(|&byte| byte == b'x'));
}

#[test]
fn stderr_is_apart_from_stdout() {
    let outcome = Run::husk(&["sh", "-c", "echo out; echo err >&2; echo more"]).go();
    assert_eq!(outcome.out(), "out\nmore\n");
    assert_eq!(outcome.err(), "err\n");
}

#[test]
fn end_of_input_reaches_the_process() {
    let outcome = Run::husk(&["sh", "-c", "cat; echo and then"]).feed(b"first\n");
    assert_eq!(outcome.out(), "first\nand then\n");
}

/// Resizes ctr's terminal; the shell in the container must see the same size.
#[track_caller]
fn assert_follows(terminal: &mut Terminal, columns: u16, rows: u16) {
    // The size travels beside the text: ask until it is there. ctr begins to listen for changes after the process has
    // started, and of one that comes before it says nothing: so there is another change, and another.
    let followed = eventually(Instant::now() + PATIENCE / 4, || {
        terminal.resize(columns, rows + 1);
        terminal.resize(columns, rows);
        terminal.type_in("stty size\n");
        std::thread::sleep(std::time::Duration::from_millis(200));
        terminal
            .text()
            .contains(&format!("{rows} {columns}"))
            .then_some(())
    });
    assert!(
        followed.is_some(),
        "never {columns}x{rows}: {:?}",
        terminal.text()
    );
}

#[test]
fn a_terminal_has_the_size_of_ctrs_and_follows_it() {
    let id = fresh_id("tty");
    let mut run = Run::husk(&["sh"]).flags(&["-t"]).command(&id);
    let mut terminal = Terminal::start(&mut run, 101, 37);
    terminal.type_in("tty; stty size; echo ready-$((6*7))\n");
    terminal.wait_for("ready-42");
    assert!(terminal.text().contains("/dev/"), "{:?}", terminal.text());
    assert!(terminal.text().contains("37 101"), "{:?}", terminal.text());
    assert_follows(&mut terminal, 93, 29);
    terminal.type_in("exit 5\n");
    assert_eq!(terminal.finish().code(), Some(5), "{:?}", terminal.text());
}

#[test]
fn an_exec_has_a_terminal_of_its_own_size() {
    let pod = Container::idle(Runtime::Husk);
    let mut terminal = Terminal::start(&mut pod.exec_command(&["-t"], &["sh"]), 80, 24);
    terminal.type_in("test -t 0 && test -t 1 && test -t 2 && echo all-$((1+2))\n");
    terminal.wait_for("all-3");
    assert_follows(&mut terminal, 111, 33);
    terminal.type_in("exit 0\n");
    assert!(terminal.finish().success());
}

#[test]
fn interrupt_from_the_terminal_reaches_the_foreground() {
    let id = fresh_id("intr");
    let mut run = Run::husk(&["sh"]).flags(&["-t"]).command(&id);
    let mut terminal = Terminal::start(&mut run, 80, 24);
    terminal.type_in("echo go-$((1+1)); sleep 86400\n");
    terminal.wait_for("go-2");
    // The shell starts `sleep` a moment later; an early ^C only gives another prompt.
    let interrupted = eventually(Instant::now() + PATIENCE, || {
        terminal.type_in("\x03");
        terminal.type_in("echo back-$((2+2))\n");
        std::thread::sleep(std::time::Duration::from_millis(200));
        terminal.text().contains("back-4").then_some(())
    });
    assert!(interrupted.is_some(), "{:?}", terminal.text());
    terminal.type_in("exit 0\n");
    terminal.finish();
}

#[test]
fn detached_and_attached_again() {
    let script = "read line; echo \"got $line\"; exit 9";
    let pod = Container::detached(Runtime::Husk, &[], &["sh", "-c", script]);
    assert_eq!(pod.state().as_deref(), Some("RUNNING"));
    let attached = command::start(&mut ctr(&["task", "attach", &pod.id]), b"hello\n");
    let outcome = attached.finish();
    assert_eq!(outcome.out(), "got hello\n", "{outcome:?}");
    assert_eq!(outcome.code(), 9, "{outcome:?}");
}

/// The client dies while the container prints without end: the pod can still be ended and removed.
#[test]
fn a_reader_that_goes_away_blocks_nothing() {
    let before = husk_tests::census::Census::take();
    let id = fresh_id("gone");
    let mut running = Run::husk(&["sh", "-c", "while :; do echo line; done"]).start_and_see(&id);
    running.kill();
    drop(running);
    let pod = Container { id };
    assert_eq!(pod.state().as_deref(), Some("RUNNING"));
    assert_eq!(pod.exec(&["echo", "alive"]).ok(), "alive\n");
    pod.task("kill", &["-s", "KILL"]).ok();
    pod.wait_stopped();
    pod.remove();
    // The killed ctr could not remove its own FIFOs: those, and only those, are its.
    Command::new("sh")
        .args(["-c", "rm -rf /run/containerd/fifo/*"])
        .status()
        .expect("rm");
    before.assert_restored();
}

/// `head` closes its end early; the writer in the container ends as it would in a pipe.
#[test]
fn a_closed_output_inside_the_container_is_a_broken_pipe() {
    let outcome = Run::husk(&["sh", "-c", "yes | head -n 2; echo done"]).go();
    assert_eq!(outcome.out(), "y\ny\ndone\n");
}
