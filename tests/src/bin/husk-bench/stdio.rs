//! How fast bytes go through a process of a container: into its stdin and out of its stdout, as `ctr task exec`
//! carries them.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
    process::Stdio,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use husk_tests::ctr::{Container, Runtime};

use crate::report::Measure;

const MIB: u64 = 1 << 20;
/// What goes through, and what goes first to warm things.
const BYTES: u64 = 1024 * MIB;
const WARM: u64 = 16 * MIB;
/// Of each runtime, a sample being long enough to be steady.
const SAMPLES: usize = 2;

pub fn stdio() -> Result<Measure> {
    let pods = [Runtime::Runc, Runtime::Husk].map(Container::idle);
    // In memory, and where nothing was ever written there is nothing to be read from anywhere else.
    let path = Path::new("/var/tmp/husk-bench-stdin");
    let source = File::create(path).context("make a file in /var/tmp")?;
    let mut all: [Vec<f64>; 2] = Default::default();
    for round in 0..=SAMPLES {
        let bytes = if round == 0 { WARM } else { BYTES };
        source.set_len(bytes).context("set a file's length")?;
        for (pod, samples) in pods.iter().zip(&mut all) {
            let seconds = cat(pod, path, bytes)?;
            if round > 0 {
                samples.push(bytes as f64 / MIB as f64 / seconds);
            }
        }
    }
    fs::remove_file(path).context("remove a file of /var/tmp")?;
    let [runc, husk] = all;
    Ok(Measure {
        name: "stdio",
        unit: "MiB/s",
        runc,
        husk,
    })
}

/// Seconds that the bytes of a file take through `cat`.
fn cat(pod: &Container, source: &Path, bytes: u64) -> Result<f64> {
    let mut command = pod.exec_command(&[], &["cat"]);
    command.stdin(File::open(source).context("open the source")?);
    command.stdout(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().context("start ctr")?;
    let mut stdout = child.stdout.take().context("ctr's stdout")?;
    let mut buffer = vec![0; 64 << 10];
    let mut got = 0;
    loop {
        match stdout.read(&mut buffer).context("read what cat says")? {
            0 => break,
            read => got += read as u64,
        }
    }
    let status = child.wait().context("wait for ctr")?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(
        status.success() && got == bytes,
        "{got} of {bytes} bytes came through cat, which ended with {status}"
    );
    Ok(seconds)
}
