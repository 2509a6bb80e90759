//! The probe as PID 1 of a guest that serves its test: it dials the agent port, works on every
//! processor as it is told on the kernel's command line, and answers one command at a time.
//!
//! | command | answer |
//! |---|---|
//! | `c` | what the workers have found, see [`Report`](husk_tests::machine::Report) |
//! | `t` | the time stamp counter and the clock that cannot be set, see [`Clocks`](husk_tests::machine::Clocks) |
//! | `w` and a byte | `w`, when a block of memory is full of that byte |
//! | `r` | the byte that fills the block, and 1 when it fills all of it |
//! | `m` | 0, when the shares are mounted |
//! | `f` | length (one byte) and content of the file `probe` in the share `probe` |
//! | `n`, a slot and an IPv4 address | `n`, when the interface that was plugged in there has the address, and an echo answers |
//! | `x` and a slot | `x`, when the device there is removed |

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use husk_proto::{AGENT_PORT, HOST_CID, SHARES_TAG};
use husk_tests::machine::{Clocks, Report};
use rustix::mount::{MountFlags, mount};

use crate::network;

/// Bytes of memory that a worker fills and sums up, again and again.
const WORK: usize = 256 << 10;
const BLOCK: usize = 1 << 20;
const SHARES: &str = "/shares";

static ROUNDS: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);
static LATEST: AtomicU64 = AtomicU64::new(0);
static BACKWARDS: AtomicU64 = AtomicU64::new(0);
static LATE: AtomicU64 = AtomicU64::new(0);

/// How often both clocks are read; the quickest time counts.
const LOOKS: usize = 100;

/// How long a nap is.
const NAP: Duration = Duration::from_millis(50);

/// Serves until the host hangs up; `workers` is how many threads work meanwhile.
pub fn serve(workers: u64) -> Result<()> {
    for seed in 0..workers {
        thread::spawn(move || work(seed));
    }
    thread::spawn(nap);
    let mut host = dial()?;
    let mut block = vec![0_u8; BLOCK];
    let mut echoes = false;
    loop {
        let [command] = read(&mut host)?;
        match command {
            b'c' => host.write_all(&report().to_bytes())?,
            b't' => host.write_all(&clocks().to_bytes())?,
            b'w' => {
                let [byte] = read(&mut host)?;
                block.fill(byte);
                host.write_all(b"w")?;
            }
            b'r' => {
                let whole = block.iter().all(|byte| *byte == block[0]);
                host.write_all(&[block[0], whole.into()])?;
            }
            b'm' => {
                fs::create_dir_all(SHARES)?;
                mount(SHARES_TAG, SHARES, "virtiofs", MountFlags::empty(), None)
                    .context("mount the shares")?;
                host.write_all(&[0])?;
            }
            b'f' => {
                let content = fs::read(format!("{SHARES}/probe/probe")).context("read a share")?;
                host.write_all(&[content.len() as u8])?;
                host.write_all(&content)?;
            }
            b'n' => {
                let [slot, address @ ..] = read::<5>(&mut host)?;
                network::set_up(slot, address.into())?;
                if !echoes {
                    network::echo()?;
                    echoes = true;
                }
                host.write_all(b"n")?;
            }
            b'x' => {
                let [slot] = read(&mut host)?;
                network::remove(slot)?;
                host.write_all(b"x")?;
            }
            other => bail!("unknown command {other}"),
        }
    }
}

fn read<const N: usize>(host: &mut UnixStream) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    host.read_exact(&mut bytes).context("read a command")?;
    Ok(bytes)
}

fn report() -> Report {
    look_at_clock();
    Report {
        rounds: ROUNDS.load(Ordering::SeqCst),
        wrong: WRONG.load(Ordering::SeqCst),
        monotonic_ns: LATEST.load(Ordering::SeqCst),
        backwards: BACKWARDS.load(Ordering::SeqCst),
        late_ns: LATE.load(Ordering::SeqCst),
    }
}

/// Fills memory with a sequence and sums up what is there, in integers and in floating point.
fn work(seed: u64) {
    let mut memory = vec![0_u64; WORK / 8];
    for round in 0.. {
        let start = seed << 32 | round;
        let (mut sum, mut scaled) = (0_u64, 0.0_f64);
        let mut value = start;
        for place in &mut memory {
            value = next(value);
            *place = value;
            sum = sum.wrapping_add(value);
            scaled = scaled * 0.5 + value as f64;
        }
        look_at_clock();
        let (mut found, mut found_scaled) = (0_u64, 0.0_f64);
        for place in std::hint::black_box(&memory) {
            found = found.wrapping_add(*place);
            found_scaled = found_scaled * 0.5 + *place as f64;
        }
        if found != sum || found_scaled.to_bits() != scaled.to_bits() {
            WRONG.fetch_add(1, Ordering::SeqCst);
        }
        ROUNDS.fetch_add(1, Ordering::SeqCst);
        look_at_clock();
    }
}

/// Sleeps and looks how much too long: a timer that a clone forgot shows here.
fn nap() {
    loop {
        let began = Instant::now();
        thread::sleep(NAP);
        let late = began.elapsed().saturating_sub(NAP);
        LATE.fetch_max(late.as_nanos() as u64, Ordering::SeqCst);
    }
}

/// xorshift64, never zero.
fn next(value: u64) -> u64 {
    let mut value = value | 1;
    value ^= value << 13;
    value ^= value >> 7;
    value ^ value << 17
}

/// No processor may see an earlier time than any has seen before.
fn look_at_clock() {
    let latest = LATEST.load(Ordering::SeqCst);
    // `Instant` would hide a step back.
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
    if now < latest {
        BACKWARDS.fetch_max(latest - now, Ordering::SeqCst);
    }
    LATEST.fetch_max(now, Ordering::SeqCst);
}

/// Both clocks at one moment, or as near to it as any of many looks came.
fn clocks() -> Clocks {
    // SAFETY: every x86-64 CPU has the instruction. (Newer compilers know.)
    #[allow(unused_unsafe)]
    let counter = || unsafe { std::arch::x86_64::_rdtsc() };
    let looks = (0..LOOKS).map(|_| {
        let before = counter();
        let raw = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
        let took = counter().saturating_sub(before);
        let clocks = Clocks {
            tsc: before + took / 2,
            raw_ns: raw.tv_sec as u64 * 1_000_000_000 + raw.tv_nsec as u64,
        };
        (took, clocks)
    });
    let shortest = looks.min_by_key(|(took, _)| *took);
    shortest.map_or(Clocks::default(), |(_, clocks)| clocks)
}

fn dial() -> Result<UnixStream> {
    connect(HOST_CID, AGENT_PORT).context("dial the host")
}

/// A vsock stream is read and written like any other.
pub fn connect(cid: u32, port: u32) -> io::Result<UnixStream> {
    // SAFETY: no pointers; a descriptor returned is new and ours.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_port = port;
    address.svm_cid = cid;
    // SAFETY: the address is live and as long as stated.
    let connected = unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    match connected {
        0 => Ok(socket.into()),
        _ => Err(io::Error::last_os_error()),
    }
}
