//! Standard streams: between containerd's FIFOs and one socket per stream, which the VMM joins to
//! the agent. The kernel moves the bytes (splice(2)): there is no buffer here, so a full FIFO whose
//! reader went away holds its writer back exactly as a pipe would.
//!
//! Both ends of every FIFO are held, so a client that comes and goes makes neither end of file nor
//! EPIPE. Only `CloseIO` is the end of stdin. A stream may wait for ever; who deletes the process
//! waits for a while and then drops it.
//!
//! stdin is opened when its process starts, and not before: a client's first write goes through at
//! that moment, and `ctr` sends no `CloseIO` for an input that ends while it waits for `Create`.

use std::{
    fs::{DirBuilder, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt},
            net::UnixStream,
        },
    },
    path::{Path, PathBuf},
    ptr,
    sync::Arc,
    time::Duration,
};

use husk_proto::agent;
use thiserror::Error;
use tokio::{
    io::{Interest, unix::AsyncFd},
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep, timeout_at},
};

use crate::{
    log_program::{Inputs, LogError, LogProgram, Owner},
    ready,
    stream_uri::{Place, Program},
};

/// Bytes moved at once; a FIFO holds 64 KiB unless told otherwise.
const CHUNK: usize = 64 << 10;

/// What containerd asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

#[derive(Debug, Error)]
pub enum StdioError {
    #[error("open {stream} {path}: {cause}")]
    Open {
        stream: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("{stream} {uri:?}: {cause}")]
    Uri {
        stream: &'static str,
        uri: String,
        cause: &'static str,
    },
    #[error("{stream}: {cause}")]
    Logger {
        stream: &'static str,
        cause: LogError,
    },
    #[error("{stream}: choose an id: {cause}")]
    Id {
        stream: &'static str,
        cause: io::Error,
    },
    #[error("{stream}: make a socket pair: {cause}")]
    Socket {
        stream: &'static str,
        cause: io::Error,
    },
}

/// The open streams of a process. Dropping them ends them at once, whatever they still carry.
#[derive(Debug, Default)]
pub struct Streams {
    stdin: Stdin,
    outputs: Vec<JoinHandle<()>>,
    /// Who takes the output, if it is a program.
    logger: Option<LogProgram>,
}

/// The life of a stdin.
#[derive(Debug, Default)]
enum Stdin {
    /// There is none, or nobody reads it any more.
    #[default]
    None,
    /// The process has yet to start.
    Waiting {
        path: PathBuf,
        near: Arc<End>,
        /// `CloseIO` came already.
        closed: bool,
    },
    Open {
        /// Our own writing end: while it is open there is no end of file.
        hold: Option<OwnedFd>,
        task: JoinHandle<()>,
    },
}

/// Streams that were just opened.
#[derive(Debug)]
pub struct Opened {
    pub streams: Streams,
    /// What the agent is told.
    pub ids: agent::Stdio,
    /// The far ends, for the VMM to join to the agent.
    pub remote: Vec<OwnedFd>,
}

/// One end of a stream: AsyncFd's readiness and the kernel's own are kept apart by `transfer`.
type End = AsyncFd<OwnedFd>;

/// Opens all streams of a process, which is `owner`'s; `next_id` gives fresh stream ids. To be called in a runtime.
pub async fn open(
    paths: &Paths,
    owner: Owner<'_>,
    mut next_id: impl FnMut() -> io::Result<u64>,
) -> Result<Opened, StdioError> {
    let mut streams = Streams::default();
    let mut ids = agent::Stdio::default();
    let mut remote = Vec::new();
    let mut connect = |stream| -> Result<(u64, End), StdioError> {
        let id = next_id().map_err(|cause| StdioError::Id { stream, cause })?;
        let (near, far) = socket(id).map_err(|cause| StdioError::Socket { stream, cause })?;
        remote.push(far);
        Ok((id, near))
    };
    // What may be refused comes before what has to be undone.
    let stdin = find_stdin(&paths.stdin)?;
    let (mut stdout, mut stderr) = (place("stdout", &paths.stdout)?, Place::None);
    if !paths.terminal {
        stderr = place("stderr", &paths.stderr)?;
    }
    let mut to_logger = None;
    if let Place::Program(program) = &stdout {
        // Both streams are its: where stdout goes decides, for containerd.
        let (logger, inputs) = start_logger("stdout", program, owner).await?;
        streams.logger = Some(logger);
        to_logger = Some(inputs);
        (stdout, stderr) = (Place::None, Place::None);
    }
    let (mut out, mut err) = (
        Sink::open("stdout", &stdout)?,
        Sink::open("stderr", &stderr)?,
    );
    if let Some(Inputs { stdout, stderr }) = to_logger {
        out = Some(Sink::pipe("stdout", stdout)?);
        // A terminal's logger sees its stderr end at once.
        err = match paths.terminal {
            true => None,
            false => Some(Sink::pipe("stderr", stderr)?),
        };
    }
    if paths.terminal {
        let (id, near) = connect("terminal")?;
        ids.terminal = id;
        let near = Arc::new(near);
        if let Some(sink) = out {
            streams.outputs.push(tokio::spawn(sink.fill(near.clone())));
        } else {
            streams.outputs.push(tokio::spawn(discard(near.clone())));
        }
        if let Some(path) = stdin {
            streams.stdin = Stdin::Waiting {
                path,
                near,
                closed: false,
            };
        }
    } else {
        if let Some(path) = stdin {
            let (id, near) = connect("stdin")?;
            ids.stdin = id;
            streams.stdin = Stdin::Waiting {
                path,
                near: Arc::new(near),
                closed: false,
            };
        }
        for (stream, sink, to) in [
            ("stdout", out, &mut ids.stdout),
            ("stderr", err, &mut ids.stderr),
        ] {
            if let Some(sink) = sink {
                let (id, near) = connect(stream)?;
                *to = id;
                streams
                    .outputs
                    .push(tokio::spawn(sink.fill(Arc::new(near))));
            }
        }
    }
    Ok(Opened {
        streams,
        ids,
        remote,
    })
}

fn place(stream: &'static str, uri: &str) -> Result<Place, StdioError> {
    Place::parse(uri).map_err(|cause| StdioError::Uri {
        stream,
        uri: uri.to_owned(),
        cause,
    })
}

async fn start_logger(
    stream: &'static str,
    program: &Program,
    owner: Owner<'_>,
) -> Result<(LogProgram, Inputs), StdioError> {
    let started = LogProgram::start(program, owner).await;
    started.map_err(|cause| StdioError::Logger { stream, cause })
}

impl Streams {
    /// The process is about to start: opens stdin. Other streams are open since [`open`].
    pub fn begin(&mut self) -> Result<(), StdioError> {
        let Stdin::Waiting { path, near, closed } = std::mem::take(&mut self.stdin) else {
            return Ok(());
        };
        // A client that waits in open(2) counts as a writer: even without our hold, what it has to
        // say comes before the end of file.
        let (source, hold) = open_stdin(&path)?;
        let task = tokio::spawn(async move {
            report("stdin", transfer(&source, &near).await);
            // Dropping the socket is the end of file; a terminal's has another owner, as a terminal
            // has no half-close: what ends there is the client's typing.
        });
        let hold = (!closed).then_some(hold);
        self.stdin = Stdin::Open { hold, task };
        Ok(())
    }

    /// `CloseIO`: the end of file follows what the FIFO still holds, once the client has closed it.
    pub fn close_stdin(&mut self) {
        match &mut self.stdin {
            Stdin::None => {}
            Stdin::Waiting { closed, .. } => *closed = true,
            Stdin::Open { hold, .. } => *hold = None,
        }
    }

    /// Nobody reads stdin any more.
    pub fn process_ended(&mut self) {
        if let Stdin::Open { task, .. } = std::mem::take(&mut self.stdin) {
            task.abort();
        }
    }

    /// Waits until all output has been handed over, or until `deadline`.
    pub async fn drain(mut self, deadline: Instant) {
        for output in &mut self.outputs {
            if timeout_at(deadline, output).await.is_err() {
                log::warn!("output that nobody reads is dropped");
                return;
            }
        }
        // With the last output has gone what its logger reads.
        if let Some(logger) = self.logger.take() {
            logger.stop().await;
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.process_ended();
        for output in &self.outputs {
            output.abort();
        }
    }
}

fn report(stream: &str, outcome: io::Result<()>) {
    match outcome {
        // The process ended before its input did.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => log::warn!("{stream}: {e}"),
        _ => {}
    }
}

/// A socket pair, whose far end already carries the stream's header. The near one does not block.
pub(crate) fn pair(id: u64) -> io::Result<(UnixStream, OwnedFd)> {
    let (mut near, far) = UnixStream::pair()?;
    near.write_all(&id.to_le_bytes())?;
    near.set_nonblocking(true)?;
    Ok((near, far.into()))
}

fn socket(id: u64) -> io::Result<(End, OwnedFd)> {
    let (near, far) = pair(id)?;
    let near = ready::watch(near.into(), Interest::READABLE | Interest::WRITABLE)?;
    Ok((near, far))
}

/// The FIFO of stdin, if there is to be a stdin.
fn find_stdin(uri: &str) -> Result<Option<PathBuf>, StdioError> {
    let path = match place("stdin", uri)? {
        Place::None => return Ok(None),
        Place::Path(path) => path,
        Place::File(_) | Place::Program(_) => {
            return Err(StdioError::Uri {
                stream: "stdin",
                uri: uri.to_owned(),
                cause: "husk reads FIFOs only",
            });
        }
    };
    let found = match path.metadata() {
        Ok(found) if found.file_type().is_fifo() => Ok(Some(path)),
        Ok(_) => Err((path, io::Error::other("not a FIFO"))),
        Err(cause) => Err((path, cause)),
    };
    found.map_err(|(path, cause)| StdioError::Open {
        stream: "stdin",
        path,
        cause,
    })
}

/// Both ends of a FIFO for stdin.
fn open_stdin(path: &Path) -> Result<(End, OwnedFd), StdioError> {
    let failed = |cause| StdioError::Open {
        stream: "stdin",
        path: path.to_owned(),
        cause,
    };
    let open = |write: bool| {
        let mut options = File::options();
        options.read(!write).write(write);
        options
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
    };
    let source = open(false).map_err(failed)?;
    let hold = open(true).map_err(failed)?;
    let source = ready::watch(source.into(), Interest::READABLE).map_err(failed)?;
    Ok((source, hold.into()))
}

/// Where output goes.
enum Sink {
    /// A FIFO open for reading and writing, so that there is always a reader; or a logger's pipe.
    Fifo(End),
    File(File),
}

impl Sink {
    fn open(stream: &'static str, place: &Place) -> Result<Option<Self>, StdioError> {
        let Some(path) = place.path() else {
            return Ok(None);
        };
        let failed = |cause| StdioError::Open {
            stream,
            path: path.to_owned(),
            cause,
        };
        let to_file = matches!(place, Place::File(_));
        let is_fifo = !to_file && path.metadata().map_err(failed)?.file_type().is_fifo();
        if is_fifo {
            let fifo = File::options()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(path)
                .map_err(failed)?;
            let fifo = ready::watch(fifo.into(), Interest::WRITABLE).map_err(failed)?;
            return Ok(Some(Self::Fifo(fifo)));
        }
        if let (true, Some(parent)) = (to_file, path.parent()) {
            let made = DirBuilder::new().recursive(true).mode(0o755).create(parent);
            made.map_err(failed)?;
        }
        let file = File::options()
            .create(true)
            .append(true)
            .mode(0o644)
            .open(path)
            .map_err(failed)?;
        Ok(Some(Self::File(file)))
    }

    /// The writing end of a pipe.
    fn pipe(stream: &'static str, end: OwnedFd) -> Result<Self, StdioError> {
        let end = ready::watch(end, Interest::WRITABLE);
        Ok(Self::Fifo(
            end.map_err(|cause| StdioError::Socket { stream, cause })?,
        ))
    }

    async fn fill(self, from: Arc<End>) {
        let outcome = match self {
            Self::Fifo(fifo) => transfer(&from, &fifo).await,
            Self::File(file) => copy(&from, file).await,
        };
        report("output", outcome);
    }
}

async fn discard(from: Arc<End>) {
    let mut buffer = vec![0; CHUNK / 4];
    let outcome = loop {
        match ready::read(&from, &mut buffer).await {
            Ok(0) => break Ok(()),
            Ok(_) => {}
            Err(e) => break Err(e),
        }
    };
    report("output", outcome);
}

/// Copies until end of file. Writing to a file may take long, or for ever, and the whole pod waits for
/// this thread: others write.
async fn copy(from: &End, mut to: File) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK / 4];
    loop {
        let count = ready::read(from, &mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        let written = spawn_blocking(move || {
            to.write_all(buffer.get(..count).unwrap_or_default())?;
            Ok::<_, io::Error>((to, buffer))
        });
        (to, buffer) = written.await.map_err(io::Error::other)??;
    }
}

/// Moves bytes until end of file. One of both ends must be a FIFO.
async fn transfer(from: &End, to: &End) -> io::Result<()> {
    loop {
        let mut readable = from.readable().await?;
        let mut writable = to.writable().await?;
        match splice(from, to) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                // It does not say which end; forgetting the wrong readiness would wait for ever.
                let (can_read, can_write) =
                    (is_ready(from, libc::POLLIN), is_ready(to, libc::POLLOUT));
                if !can_read {
                    readable.clear_ready();
                }
                if !can_write {
                    writable.clear_ready();
                }
                if can_read && can_write {
                    sleep(Duration::from_millis(1)).await;
                }
            }
            Err(e) => return Err(e),
        }
    }
}

fn splice(from: &End, to: &End) -> io::Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    // SAFETY: no offsets are passed, so splice(2) takes descriptors and numbers only.
    let moved = unsafe {
        libc::splice(
            from.as_raw_fd(),
            ptr::null_mut(),
            to.as_raw_fd(),
            ptr::null_mut(),
            CHUNK,
            flags,
        )
    };
    usize::try_from(moved).map_err(|_| io::Error::last_os_error())
}

fn is_ready(end: &End, events: libc::c_short) -> bool {
    let mut poll = libc::pollfd {
        fd: end.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: `poll` is one pollfd, and a timeout of 0 does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}

/// Makes a FIFO for a test.
#[cfg(test)]
pub(crate) fn make_fifo(path: &Path) {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends in NUL.
    assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
}

#[cfg(test)]
mod tests {
    use std::{io::Read, thread};

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);
    const OWNER: Owner<'_> = Owner {
        namespace: "default",
        id: "c",
    };

    struct Fifos {
        _directory: tempfile::TempDir,
        paths: Paths,
    }

    fn fifos(terminal: bool) -> Fifos {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = directory.path().join(name);
            make_fifo(&path);
            path.to_str().unwrap().to_owned()
        };
        let paths = Paths {
            stdin: make("in"),
            stdout: make("out"),
            stderr: if terminal { String::new() } else { make("err") },
            terminal,
        };
        Fifos {
            _directory: directory,
            paths,
        }
    }

    /// Streams of a process that has started, and the guest's ends.
    async fn opened(paths: &Paths) -> (Opened, Vec<UnixStream>) {
        let mut id = 0;
        let mut opened = open(paths, OWNER, || {
            id += 1;
            Ok(id)
        })
        .await
        .unwrap();
        opened.streams.begin().unwrap();
        let mut far = Vec::new();
        for (index, fd) in opened.remote.drain(..).enumerate() {
            let mut stream = UnixStream::from(fd);
            let mut header = [0; 8];
            stream.read_exact(&mut header).unwrap();
            assert_eq!(u64::from_le_bytes(header), index as u64 + 1);
            far.push(stream);
        }
        (opened, far)
    }

    fn pattern(length: usize) -> Vec<u8> {
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..length).map(|_| next()).collect()
    }

    /// The exit of a process may be told long before a reader has its last words.
    #[tokio::test]
    async fn the_end_of_the_process_drops_no_output() {
        let fifos = fifos(false);
        let (mut opened, mut far) = opened(&fifos.paths).await;
        let mut reader = File::open(&fifos.paths.stdout).unwrap();
        // More than a FIFO takes, also by splice: the guest still has some of it.
        let data = pattern(8 << 20);
        let (mut stdout, said) = (far.remove(1), data.clone());
        let guest = thread::spawn(move || {
            // Fails when the other end is dropped.
            let _ = stdout.write_all(&said);
        });
        drop(far);
        sleep(Duration::from_millis(50)).await;
        opened.streams.process_ended();
        let reader = thread::spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            got
        });
        opened.streams.drain(Instant::now() + SOON).await;
        guest.join().unwrap();
        let got = reader.join().unwrap();
        assert!(got == data, "{} of {} bytes", got.len(), data.len());
    }

    #[tokio::test]
    async fn sixteen_mib_pass_both_ways_unchanged() {
        let fifos = fifos(false);
        let (opened, mut far) = opened(&fifos.paths).await;
        assert_eq!(
            (opened.ids.stdin, opened.ids.stdout, opened.ids.stderr),
            (1, 2, 3)
        );
        let (out, input) = (fifos.paths.stdout.clone(), fifos.paths.stdin.clone());
        let data = pattern(16 << 20);

        // The guest: echoes stdin to stdout until end of file.
        let (mut stdin, mut stdout) = (far.remove(0), far.remove(0));
        drop(far);
        let guest = thread::spawn(move || io::copy(&mut stdin, &mut stdout).unwrap());
        // The client.
        let expected = data.clone();
        let reader = thread::spawn(move || {
            let mut got = Vec::new();
            File::open(out).unwrap().read_to_end(&mut got).unwrap();
            assert!(got == expected);
        });
        let writer = thread::spawn(move || {
            File::options()
                .write(true)
                .open(input)
                .unwrap()
                .write_all(&data)
                .unwrap();
        });
        let mut streams = opened.streams;
        while !writer.is_finished() {
            sleep(Duration::from_millis(5)).await;
        }
        streams.close_stdin();
        timeout(SOON, streams.drain(Instant::now() + SOON))
            .await
            .unwrap();
        assert_eq!(guest.join().unwrap(), 16 << 20);
        reader.join().unwrap();
    }

    #[tokio::test]
    async fn only_close_io_ends_stdin() {
        let fifos = fifos(false);
        let (opened, mut far) = opened(&fifos.paths).await;
        let mut streams = opened.streams;
        let mut stdin = far.remove(0);
        stdin.set_nonblocking(true).unwrap();
        for _ in 0..2 {
            // A client that comes, writes and goes.
            File::options()
                .write(true)
                .open(&fifos.paths.stdin)
                .unwrap()
                .write_all(b"x")
                .unwrap();
            sleep(Duration::from_millis(20)).await;
            assert_eq!(stdin.read(&mut [0; 8]).unwrap(), 1);
            let error = stdin.read(&mut [0; 8]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        }
        streams.close_stdin();
        sleep(Duration::from_millis(20)).await;
        assert_eq!(stdin.read(&mut [0; 8]).unwrap(), 0);
    }

    #[tokio::test]
    async fn close_io_before_any_input_loses_none() {
        let fifos = fifos(false);
        let (opened, mut far) = opened(&fifos.paths).await;
        let mut streams = opened.streams;
        let mut client = File::options()
            .write(true)
            .open(&fifos.paths.stdin)
            .unwrap();
        streams.close_stdin();
        sleep(Duration::from_millis(20)).await;
        client.write_all(b"late").unwrap();
        drop(client);
        sleep(Duration::from_millis(20)).await;
        let mut got = String::new();
        far.remove(0).read_to_string(&mut got).unwrap();
        assert_eq!(got, "late");
    }

    #[tokio::test]
    async fn many_unread_processes_cost_the_limit_once() {
        let processes: Vec<_> = (0..4).map(|_| fifos(false)).collect();
        let mut all = Vec::new();
        for one in &processes {
            all.push(opened(&one.paths).await);
        }
        let begun = Instant::now();
        for (opened, _far) in all {
            opened.streams.drain(begun + Duration::from_secs(1)).await;
        }
        assert!(begun.elapsed() >= Duration::from_secs(1));
        assert!(begun.elapsed() < Duration::from_secs(3));
    }

    #[tokio::test]
    async fn a_reader_that_never_comes_costs_the_limit_and_no_more() {
        let fifos = fifos(false);
        let (opened, mut far) = opened(&fifos.paths).await;
        let mut stdout = far.remove(1);
        drop(far);
        let guest = thread::spawn(move || {
            let _ = stdout.write_all(&pattern(4 << 20));
        });
        let begun = std::time::Instant::now();
        opened
            .streams
            .drain(Instant::now() + Duration::from_millis(200))
            .await;
        assert!(begun.elapsed() >= Duration::from_millis(200));
        assert!(begun.elapsed() < Duration::from_secs(5));
        // The guest's writer is let go: its far end is closed.
        timeout(SOON, async {
            while !guest.is_finished() {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn a_reader_that_goes_and_comes_back_misses_nothing() {
        let fifos = fifos(false);
        let (opened, mut far) = opened(&fifos.paths).await;
        let mut stdout = far.remove(1);
        drop(far);
        let data = pattern(1 << 20);
        let expected = data.clone();
        let guest = thread::spawn(move || stdout.write_all(&data).unwrap());
        let path = fifos.paths.stdout.clone();
        let reader = thread::spawn(move || {
            let mut got = vec![0; 1000];
            File::open(&path).unwrap().read_exact(&mut got).unwrap();
            thread::sleep(Duration::from_millis(50));
            File::open(&path).unwrap().read_to_end(&mut got).unwrap();
            assert!(got == expected);
        });
        opened.streams.drain(Instant::now() + SOON).await;
        guest.join().unwrap();
        reader.join().unwrap();
    }

    #[tokio::test]
    async fn a_terminal_is_one_stream_both_ways() {
        let fifos = fifos(true);
        let (opened, mut far) = opened(&fifos.paths).await;
        assert_eq!(
            (opened.ids.terminal, opened.ids.stdin, opened.ids.stdout),
            (1, 0, 0)
        );
        assert_eq!(far.len(), 1);
        let mut tty = far.remove(0);
        File::options()
            .write(true)
            .open(&fifos.paths.stdin)
            .unwrap()
            .write_all(b"in")
            .unwrap();
        sleep(Duration::from_millis(20)).await;
        let mut got = [0; 2];
        tty.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"in");
        let mut reader = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&fifos.paths.stdout)
            .unwrap();
        tty.write_all(b"out").unwrap();
        drop(tty);
        opened.streams.drain(Instant::now() + SOON).await;
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "out");
    }

    #[tokio::test]
    async fn null_files_and_what_is_neither() {
        let (none, far) = opened(&Paths::default()).await;
        assert_eq!(none.ids, agent::Stdio::default());
        assert!(far.is_empty());

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("of/many pods/log");
        let uri = format!("file://{}", path.display()).replace(' ', "%20");
        let paths = Paths {
            stdout: uri.clone(),
            stderr: uri,
            ..Paths::default()
        };
        let (to_file, mut far) = opened(&paths).await;
        far.remove(0).write_all(b"line\n").unwrap();
        drop(far);
        to_file.streams.drain(Instant::now() + SOON).await;
        assert_eq!(std::fs::read(&path).unwrap(), b"line\n");
        // The next one goes on where this one ended.
        let (to_file, mut far) = opened(&paths).await;
        far.remove(1).write_all(b"more\n").unwrap();
        drop(far);
        to_file.streams.drain(Instant::now() + SOON).await;
        assert_eq!(std::fs::read(path).unwrap(), b"line\nmore\n");

        for (stdout, words) in [
            (
                "ttrpc+unix:///x",
                "stdout \"ttrpc+unix:///x\": husk takes FIFOs, file:// and binary://",
            ),
            (
                "binary:///no/such",
                "stdout: start the logger /no/such: no such file",
            ),
            ("/nowhere/out", "open stdout /nowhere/out: No such file"),
        ] {
            let paths = Paths {
                stdout: stdout.into(),
                ..Paths::default()
            };
            let error = open(&paths, OWNER, || Ok(1)).await.unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
        }
    }

    #[tokio::test]
    async fn a_file_that_takes_nothing_holds_nobody_up() {
        // Stands for a file on a server that hangs.
        let fifos = fifos(false);
        let mut server = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&fifos.paths.stdout)
            .unwrap();
        let paths = Paths {
            stdout: format!("file://{}", fifos.paths.stdout),
            ..Paths::default()
        };
        let (to_file, mut far) = opened(&paths).await;
        let mut far = far.remove(0);
        let guest = thread::spawn(move || {
            let _ = far.write_all(&pattern(4 << 20));
        });
        let begun = Instant::now();
        sleep(Duration::from_millis(50)).await;
        to_file
            .streams
            .drain(begun + Duration::from_millis(200))
            .await;
        assert!(begun.elapsed() < Duration::from_secs(5));
        // The thread that writes is let go, as this runtime waits for it.
        let mut buffer = vec![0; CHUNK];
        while begun.elapsed() < Duration::from_millis(600) {
            let _ = server.read(&mut buffer);
            sleep(Duration::from_millis(5)).await;
        }
        guest.join().unwrap();
    }

    #[tokio::test]
    async fn stdin_is_not_open_before_the_start() {
        let fifos = fifos(false);
        let mut opened = open(&fifos.paths, OWNER, || Ok(1)).await.unwrap();
        let client = || {
            File::options()
                .write(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&fifos.paths.stdin)
        };
        assert_eq!(client().unwrap_err().raw_os_error(), Some(libc::ENXIO));

        // An input that came and ended before the start, with its CloseIO, is read all the same.
        let path = fifos.paths.stdin.clone();
        let early = thread::spawn(move || {
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .write_all(b"early")
                .unwrap();
        });
        thread::sleep(Duration::from_millis(50));
        opened.streams.close_stdin();
        opened.streams.begin().unwrap();
        let mut stdin = UnixStream::from(opened.remote.remove(0));
        let mut got = Vec::new();
        while !early.is_finished() {
            sleep(Duration::from_millis(2)).await;
        }
        sleep(Duration::from_millis(20)).await;
        stdin.read_to_end(&mut got).unwrap();
        assert_eq!(&got[8..], b"early");
        opened.streams.process_ended();
    }

    #[tokio::test]
    async fn what_is_no_fifo_is_refused_at_once() {
        let fifos = fifos(false);
        for (stdin, expected) in [("/nowhere", "No such file"), ("/dev/null", "not a FIFO")] {
            let paths = Paths {
                stdin: stdin.into(),
                ..fifos.paths.clone()
            };
            let error = open(&paths, OWNER, || Ok(1)).await.unwrap_err().to_string();
            assert!(error.contains(stdin) && error.contains(expected), "{error}");
        }
    }
}
