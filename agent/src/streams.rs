//! Streams: connections from the host on one side, pipes or a terminal of a process on the other (`forward` has servers there).
//!
//! [`Arrivals`] matches connections, which say their id in their first 8 bytes, with the requests
//! that name the ids, whichever comes first. [`Attached`] is what a process has claimed;
//! [`Copying`] moves the bytes until their end and closes everything when dropped. A host that does
//! not read stops the copy, never the process's exit; nothing here outlives [`Copying`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::time::Duration;

use husk_proto::agent::Stdio;
use rustix::pipe::{PipeFlags, pipe_with};
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{sleep, timeout};

use crate::channel::Channel;

/// How long a connection may take to say its id.
const HEADER_PATIENCE: Duration = Duration::from_secs(10);
/// How long a request waits for its streams, and a stream for its request.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many connections may wait for their request, or have not said their id.
const WAITING_LIMIT: usize = 256;
/// How long the host may take to close a stream after its end.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// How often a terminal's stream is looked at after the end of typing.
const HANGUP_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Error)]
pub enum StreamError {
    #[error("{0}: stream {1} is named twice")]
    Id(&'static str, u64),
    #[error("stdio: {0}")]
    Terminal(&'static str),
    #[error("{0}: no connection for stream {1} within {PATIENCE:?}")]
    Missing(&'static str, u64),
    #[error("stdio: {0}: {1}")]
    Call(&'static str, io::Error),
}

/// A stream that one side has shown up for.
enum Side {
    Connection(Channel),
    Request(oneshot::Sender<Channel>),
}

/// Connections that wait for requests, and the other way round.
#[derive(Default)]
pub struct Arrivals {
    waiting: RefCell<HashMap<u64, Side>>,
    nameless: RefCell<usize>,
}

impl Arrivals {
    /// Takes a fresh connection from the host. One too many is closed.
    pub fn connection(self: &Rc<Self>, socket: OwnedFd) {
        let unclaimed = self
            .waiting
            .borrow()
            .values()
            .filter(|side| matches!(side, Side::Connection(_)))
            .count();
        if unclaimed.saturating_add(*self.nameless.borrow()) >= WAITING_LIMIT {
            log::warn!("stream refused: {WAITING_LIMIT} wait for their request already");
            return;
        }
        let arrivals = Rc::clone(self);
        *arrivals.nameless.borrow_mut() += 1;
        spawn_local(async move {
            let named = timeout(HEADER_PATIENCE, header(socket)).await;
            *arrivals.nameless.borrow_mut() -= 1;
            match named {
                Ok(Ok((id, channel))) => arrivals.arrive(id, channel).await,
                Ok(Err(error)) => log::warn!("stream without an id: {error}"),
                Err(_) => log::warn!("stream without an id: none within {HEADER_PATIENCE:?}"),
            }
        });
    }

    async fn arrive(&self, id: u64, channel: Channel) {
        let met = self.waiting.borrow_mut().remove(&id);
        match met {
            Some(Side::Request(request)) => {
                request.send(channel).ok();
                return;
            }
            Some(Side::Connection(_)) => {
                log::warn!("stream {id} came twice: both are closed");
                return;
            }
            None => self
                .waiting
                .borrow_mut()
                .insert(id, Side::Connection(channel)),
        };
        sleep(PATIENCE).await;
        let mut waiting = self.waiting.borrow_mut();
        if let Some(Side::Connection(_)) = waiting.get(&id) {
            waiting.remove(&id);
            log::warn!("stream {id} closed: no request named it within {PATIENCE:?}");
        }
    }

    /// The stream with this id, when it has arrived; none for 0. `name` is the request's field that says it.
    pub async fn claim(&self, name: &'static str, id: u64) -> Result<Option<Channel>, StreamError> {
        if id == 0 {
            return Ok(None);
        }
        let arrival = {
            let mut waiting = self.waiting.borrow_mut();
            match waiting.remove(&id) {
                Some(Side::Connection(channel)) => return Ok(Some(channel)),
                Some(other) => {
                    waiting.insert(id, other);
                    return Err(StreamError::Id(name, id));
                }
                None => {}
            }
            let (sender, receiver) = oneshot::channel();
            waiting.insert(id, Side::Request(sender));
            receiver
        };
        match timeout(PATIENCE, arrival).await {
            Ok(Ok(channel)) => Ok(Some(channel)),
            _ => {
                self.waiting.borrow_mut().remove(&id);
                Err(StreamError::Missing(name, id))
            }
        }
    }

    /// The streams that a request names, when all of them have arrived.
    pub async fn attach(&self, stdio: &Stdio, terminal: bool) -> Result<Attached, StreamError> {
        let pipes = stdio.stdin != 0 || stdio.stdout != 0 || stdio.stderr != 0;
        if terminal {
            if pipes {
                return Err(StreamError::Terminal(
                    "a process with a terminal has one stream, .terminal",
                ));
            }
            return Ok(Attached::Terminal(
                self.claim("stdio.terminal", stdio.terminal).await?,
            ));
        }
        if stdio.terminal != 0 {
            return Err(StreamError::Terminal(
                ".terminal is set, and process.terminal is not",
            ));
        }
        let (stdin, stdout, stderr) = tokio::join!(
            self.claim("stdio.stdin", stdio.stdin),
            self.claim("stdio.stdout", stdio.stdout),
            self.claim("stdio.stderr", stdio.stderr)
        );
        Ok(Attached::Pipes {
            stdin: stdin?,
            stdout: stdout?,
            stderr: stderr?,
        })
    }
}

async fn header(socket: OwnedFd) -> io::Result<(u64, Channel)> {
    let channel = Channel::new(socket)?;
    let mut header = [0; 8];
    let mut filled = 0;
    while let Some(rest) = header.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match channel.read(rest).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled = filled.saturating_add(count),
        }
    }
    match u64::from_le_bytes(header) {
        0 => Err(io::Error::other("0 is no id")),
        id => Ok((id, channel)),
    }
}

/// The streams of a process, `None` being /dev/null.
#[derive(Debug)]
pub enum Attached {
    Pipes {
        stdin: Option<Channel>,
        stdout: Option<Channel>,
        stderr: Option<Channel>,
    },
    Terminal(Option<Channel>),
}

/// What a process is started with: descriptors 0, 1 and 2. They are pipes, never sockets, so that
/// `/dev/stdout` can be opened again.
pub struct Ends {
    pub child: [OwnedFd; 3],
    pipes: Vec<(Channel, Channel, Direction)>,
}

#[derive(Clone, Copy)]
enum Direction {
    In,
    Out,
}

impl Ends {
    /// Makes the pipes for `attached`; a terminal is opened later, inside the container.
    pub fn new(attached: Attached) -> Result<(Self, Option<Channel>), StreamError> {
        let null = || {
            let file = std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/null");
            file.map(OwnedFd::from)
                .map_err(|error| StreamError::Call("open /dev/null", error))
        };
        let (stdin, stdout, stderr) = match attached {
            Attached::Terminal(stream) => {
                return Ok((
                    Self {
                        child: [null()?, null()?, null()?],
                        pipes: Vec::new(),
                    },
                    stream,
                ));
            }
            Attached::Pipes {
                stdin,
                stdout,
                stderr,
            } => (stdin, stdout, stderr),
        };
        let mut pipes = Vec::new();
        let mut end = |stream: Option<Channel>, direction| {
            let Some(stream) = stream else { return null() };
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)
                .map_err(|error| StreamError::Call("make a pipe", error.into()))?;
            let (theirs, ours) = match direction {
                Direction::In => (read, write),
                Direction::Out => (write, read),
            };
            let ours =
                Channel::new(ours).map_err(|error| StreamError::Call("watch a pipe", error))?;
            match direction {
                Direction::In => pipes.push((stream, ours, direction)),
                Direction::Out => pipes.push((ours, stream, direction)),
            }
            Ok(theirs)
        };
        let child = [
            end(stdin, Direction::In)?,
            end(stdout, Direction::Out)?,
            end(stderr, Direction::Out)?,
        ];
        Ok((Self { child, pipes }, None))
    }

    /// Closes the process's ends on this side and begins to copy.
    pub fn copy(self) -> Copying {
        let tasks = self
            .pipes
            .into_iter()
            .map(|(from, to, direction)| match direction {
                Direction::In => spawn_local(feed(from, to)),
                Direction::Out => spawn_local(drain(from, to)),
            });
        Copying {
            tasks: tasks.collect(),
            terminal: Weak::new(),
        }
    }
}

/// The running copies of one process. Dropping it closes all streams.
#[derive(Default)]
pub struct Copying {
    tasks: Vec<JoinHandle<()>>,
    /// The copying alone keeps it open: its end is the terminal's hang-up.
    terminal: Weak<Channel>,
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Copying {
    /// Adds a terminal: its master, and the stream it is shown on. Without one its output is dropped.
    pub fn terminal(&mut self, master: OwnedFd, stream: Option<Channel>) -> io::Result<()> {
        let master = Rc::new(Channel::new(master)?);
        self.terminal = Rc::downgrade(&master);
        self.tasks.push(spawn_local(async move {
            match stream {
                Some(stream) => {
                    let typing = async {
                        // The end of typing is not the end of the session: the output goes on, unless
                        // the stream is gone as a whole.
                        note("terminal input", stream.copy_to(&master).await);
                        while !stream.hung_up() {
                            sleep(HANGUP_PAUSE).await;
                        }
                    };
                    tokio::select! {
                        shown = master.copy_to(&stream) => note("terminal output", shown),
                        () = typing => {}
                    }
                    drop(master);
                    close(&stream).await;
                }
                None => {
                    let mut buffer = [0; 4096];
                    while master.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
                }
            }
        }));
        Ok(())
    }

    /// The terminal's master, for its size.
    pub fn master(&self) -> Option<Rc<Channel>> {
        self.terminal.upgrade()
    }
}

/// Host to process. Its end closes the pipe; so does the last reader, or nothing would end the copy
/// when a process ends that never read.
async fn feed(stream: Channel, pipe: Channel) {
    tokio::select! {
        copied = stream.copy_to(&pipe) => note("stdin", copied),
        broken = pipe.broken() => note("stdin", broken),
    }
}

/// Process to host. An error means that the reader is gone: closing the pipe tells the process.
async fn drain(pipe: Channel, stream: Channel) {
    let copied = pipe.copy_to(&stream).await;
    let whole = copied.is_ok();
    note("output", copied);
    drop(pipe);
    if whole {
        close(&stream).await;
    }
}

/// Ends a stream and lets the host take what is under way: a reset could overtake it.
async fn close(stream: &Channel) {
    if stream.shutdown_write().is_err() {
        return;
    }
    let mut rest = [0; 512];
    let gone = async { while stream.read(&mut rest).await.is_ok_and(|count| count > 0) {} };
    timeout(CLOSE_PATIENCE, gone).await.ok();
}

fn note(what: &str, result: io::Result<()>) {
    match result {
        Ok(()) => log::debug!("{what} ended"),
        Err(error) => log::debug!("{what} broke off: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use tokio::task::LocalSet;

    use super::*;

    fn connect(arrivals: &Rc<Arrivals>, id: u64) -> UnixStream {
        let (mut host, guest) = UnixStream::pair().unwrap();
        arrivals.connection(guest.into());
        // One too many is closed at once.
        host.write_all(&id.to_le_bytes()).ok();
        host
    }

    fn stdio(stdin: u64, stdout: u64) -> Stdio {
        Stdio {
            stdin,
            stdout,
            ..Stdio::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn streams_meet_their_request_in_either_order() {
        LocalSet::new()
            .run_until(async {
                let arrivals = Rc::new(Arrivals::default());
                let _first = connect(&arrivals, 5);
                tokio::task::yield_now().await;
                let late = Rc::clone(&arrivals);
                let second = spawn_local(async move { connect(&late, 6) });
                match arrivals.attach(&stdio(5, 6), false).await.unwrap() {
                    Attached::Pipes {
                        stdin: Some(_),
                        stdout: Some(_),
                        stderr: None,
                    } => {}
                    other => panic!("{other:?}"),
                }
                second.await.unwrap();
                assert!(arrivals.waiting.borrow().is_empty());
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn neither_side_waits_for_ever() {
        LocalSet::new()
            .run_until(async {
                let arrivals = Rc::new(Arrivals::default());
                let error = arrivals
                    .attach(&stdio(9, 0), false)
                    .await
                    .unwrap_err()
                    .to_string();
                assert!(
                    error.contains("stdio.stdin") && error.contains("stream 9"),
                    "{error}"
                );
                let _lonely = connect(&arrivals, 10);
                sleep(PATIENCE * 2).await;
                assert!(arrivals.waiting.borrow().is_empty());
                let (_silent, guest) = UnixStream::pair().unwrap();
                arrivals.connection(guest.into());
                sleep(HEADER_PATIENCE * 2).await;
                assert_eq!(*arrivals.nameless.borrow(), 0);
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_connections_is_bounded() {
        LocalSet::new()
            .run_until(async {
                let arrivals = Rc::new(Arrivals::default());
                let hosts: Vec<_> = (1..=300).map(|id| connect(&arrivals, id)).collect();
                assert_eq!(*arrivals.nameless.borrow(), WAITING_LIMIT);
                drop(hosts);
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn many_requests_do_not_keep_their_own_connections_out() {
        LocalSet::new()
            .run_until(async {
                let arrivals = Rc::new(Arrivals::default());
                let mut requests: Vec<_> = (1..=WAITING_LIMIT as u64)
                    .map(|id| {
                        let arrivals = Rc::clone(&arrivals);
                        spawn_local(async move { arrivals.attach(&stdio(id, 0), false).await })
                    })
                    .collect();
                while arrivals.waiting.borrow().len() < WAITING_LIMIT {
                    tokio::task::yield_now().await;
                }
                let _host = connect(&arrivals, 1);
                requests.remove(0).await.unwrap().unwrap();
            })
            .await;
    }
}
