//! Commands whose every wait has an end: run one, feed it, collect what it says.

use std::{
    fmt, fs,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Generous: the lab is a software CPU, and its host may be busy. Whatever takes this long hangs.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// What a finished command left behind.
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub took: Duration,
}

/// As a person reads it: the beginning of each stream as text.
impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} after {:.2} s", self.status, self.took.as_secs_f64())?;
        for (name, bytes) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let start = &bytes[..bytes.len().min(2000)];
            let text = String::from_utf8_lossy(start);
            writeln!(f, "{name} ({} bytes): {}", bytes.len(), text.trim_end())?;
        }
        Ok(())
    }
}

impl Outcome {
    /// The exit code; 128 + n for a death by signal n, as a shell would say.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// With what a task has ended, if `ctr task delete` says so, which it does of all but 0.
    pub fn status_of_task(&self) -> Option<u32> {
        let text = self.err();
        let (_, rest) = text.split_once("exit code ")?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    }

    /// The output of a command that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "failed: {self:?}");
        self.out()
    }
}

/// Runs `command` with `stdin` to its end.
///
/// # Panics
/// When it cannot be started, or has not ended after [`PATIENCE`] (it is killed then).
#[track_caller]
pub fn run(command: &mut Command, stdin: &[u8]) -> Outcome {
    start(command, stdin).finish()
}

/// A command under way; killed when dropped.
pub struct Running {
    what: String,
    child: Child,
    began: Instant,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
}

/// Starts `command`, feeding it `stdin` and then end of file, and collecting its output.
#[track_caller]
pub fn start(command: &mut Command, stdin: &[u8]) -> Running {
    let what = format!("{command:?}");
    let began = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("start {what}: {error}"));
    let mut sink = child.stdin.take().expect("piped");
    let stdin = stdin.to_vec();
    // A command that ends without reading all of it is no failure of ours.
    thread::spawn(move || sink.write_all(&stdin));
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    Running {
        what,
        child,
        began,
        stdout,
        stderr,
    }
}

fn collect(mut source: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = source.read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    receiver
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().is_ok_and(|status| status.is_some())
    }

    #[track_caller]
    pub fn finish(mut self) -> Outcome {
        let deadline = self.began + PATIENCE;
        let status = eventually(deadline, || self.child.try_wait().ok().flatten());
        let took = self.began.elapsed();
        let Some(status) = status else {
            let _ = self.child.kill();
            let out = self.stdout.recv_timeout(Duration::from_secs(1));
            let err = self.stderr.recv_timeout(Duration::from_secs(1));
            panic!(
                "{} still runs after {PATIENCE:?}; stdout {:?}, stderr {:?}",
                self.what,
                out.map(|bytes| tail(&bytes)),
                err.map(|bytes| tail(&bytes)),
            );
        };
        let rest = Duration::from_secs(10);
        Outcome {
            status,
            stdout: self.stdout.recv_timeout(rest).unwrap_or_default(),
            stderr: self.stderr.recv_timeout(rest).unwrap_or_default(),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(2000);
    String::from_utf8_lossy(&bytes[from..]).into_owned()
}

/// Asks until there is an answer, or the deadline has passed.
pub fn eventually<T>(deadline: Instant, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        // What asks is often a command, and takes the CPU that the answer waits for.
        thread::sleep(Duration::from_millis(50));
    }
}

/// The processes that call themselves so (`/proc/<pid>/comm`).
pub fn processes_named(comm: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        let found = fs::read_to_string(format!("/proc/{pid}/comm"));
        found.is_ok_and(|found| found.trim_end() == comm)
    })
    .collect()
}

/// SIGKILL, to one that may have ended by itself.
pub fn kill(pid: u32) {
    let _ = Command::new("kill").args(["-9", &pid.to_string()]).output();
}

/// Signals every process of this name: these tests run one at a time, alone in their lab.
///
/// # Panics
/// When there is none.
#[track_caller]
pub fn signal_by_name(signal: &str, name: &str) {
    let mut signalled = 0;
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let path = entry.path();
        let exe = fs::read_link(path.join("exe")).unwrap_or_default();
        if exe.file_name().is_some_and(|file| file == name) {
            let pid = entry.file_name();
            let pid = pid.to_str().expect("a pid");
            run(Command::new("kill").args([signal, pid]), b"").ok();
            signalled += 1;
        }
    }
    assert!(signalled > 0, "no process runs {name}");
}
