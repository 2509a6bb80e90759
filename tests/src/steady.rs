//! A container's steady work: a checksum over and over, and a look at how late a short sleep ends. What its
//! neighbours do must not change the first, and shows in the second.

use std::{
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// Bytes that are summed up each round.
const WORK: usize = 64 << 10;
const NAP: Duration = Duration::from_millis(2);
/// Rounds between two words.
const WORD: usize = 64;
/// The latest naps, of which a word tells.
const TOLD: usize = 2048;

/// How it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steady {
    /// Rounds since the start, and how many of them came to another sum.
    pub rounds: u64,
    pub wrong: u64,
    /// How much later than asked for a sleep ended: median, 99th percentile and most, of the last [`TOLD`] sleeps.
    pub late_us: [u64; 3],
}

impl Steady {
    /// # Errors
    /// The text is none that [`run`] writes.
    pub fn parse(text: &str) -> Result<Self> {
        let numbers: Vec<u64> = text
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [rounds, wrong, half, most, all] = <[u64; 5]>::try_from(numbers)
            .map_err(|numbers| anyhow::anyhow!("{} numbers", numbers.len()))?;
        Ok(Steady {
            rounds,
            wrong,
            late_us: [half, most, all],
        })
    }
}

/// Works until it is killed. With each word, `file` says anew how it went since the one before.
///
/// # Errors
/// The file cannot be written.
pub fn run(file: &Path) -> Result<()> {
    let (mut rounds, mut wrong) = (0, 0);
    let expected = sum();
    let next = file.with_extension("next");
    let mut late = Vec::new();
    loop {
        let began = Instant::now();
        thread::sleep(NAP);
        late.push(began.elapsed().saturating_sub(NAP).as_micros() as u64);
        rounds += 1;
        wrong += u64::from(sum() != expected);
        if late.len() % WORD == 0 {
            let mut sorted = late.clone();
            sorted.sort_unstable();
            let at = |percent: usize| sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)];
            let text = format!("{rounds} {wrong} {} {} {}\n", at(50), at(99), at(100));
            fs::write(&next, text).context("write")?;
            fs::rename(&next, file).context("rename")?;
            if late.len() >= TOLD {
                late.drain(..WORD);
            }
        }
    }
}

/// FNV-1a over memory that is written before.
fn sum() -> u64 {
    let memory: Vec<u8> = (0..WORK).map(|index| (index * 7) as u8).collect();
    let memory = std::hint::black_box(memory);
    memory.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}
