//! What a process sees of itself and of its container, as lines `key<TAB>value` of which no two have the same key. Two
//! runtimes that start the same specification are compared by these lines; nothing here is left out or made equal,
//! but numbers that the kernel draws (pids, inodes, peer groups) are said as what they mean.
//!
//! Ends with the line `END`, and then waits for a line or the end of its input.

mod calls;
mod files;
mod process;

use std::{
    fmt::Display,
    fs,
    io::{self, Write},
    path::Path,
};

use anyhow::Result;

/// The lines so far.
pub struct Report(String);

impl Report {
    fn say(&mut self, key: impl Display, value: impl Display) {
        let value = value.to_string().replace('\n', "\\n");
        self.0.push_str(&format!("{key}\t{value}\n"));
    }

    /// A file's content, or why there is none.
    fn say_file(&mut self, key: impl Display, path: impl AsRef<Path>) {
        self.say(key, content(path));
    }
}

fn content(path: impl AsRef<Path>) -> String {
    match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).trim_end().to_owned(),
        Err(error) => said(&error),
    }
}

fn named(error: rustix::io::Errno) -> String {
    let text = error.to_string();
    text.split(" (os").next().unwrap_or_default().to_owned()
}

fn said(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => named(rustix::io::Errno::from_raw_os_error(number)),
        None => error.kind().to_string(),
    }
}

/// A system call with what it answers, or its error.
fn call(number: libc::c_long, args: [usize; 6]) -> io::Result<i64> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: callers pass calls that write nowhere but into buffers of theirs that they name, or that fail.
    let answer = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    match answer {
        -1 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}

/// What a call answers, as text.
fn answer(number: libc::c_long, args: [usize; 6]) -> String {
    call(number, args).map_or_else(|error| said(&error), |answer| answer.to_string())
}

/// `files` are looked at beside those that every container has.
pub fn run(files: &[String]) -> Result<()> {
    let mut report = Report(String::new());
    process::look(&mut report);
    files::look(&mut report, files);
    calls::look(&mut report);
    report.0.push_str("END\n");
    let mut out = io::stdout().lock();
    out.write_all(report.0.as_bytes())?;
    out.flush()?;
    let mut line = String::new();
    io::stdin().read_line(&mut line)?;
    Ok(())
}
