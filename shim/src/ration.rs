//! What a guest, and a VMM that its guest has taken over, may say to the shim per second.
//!
//! The shim has one thread, of the host's and not of the pod's cgroup, and ttrpc queues what it has read without a
//! bound. An honest agent says little: an answer to a question, an event for an exit. So a connection is read as fast
//! as anybody speaks only for a while; more waits in its socket, and so with its sender.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

/// Bytes that may come at once: two of the longest messages (ttrpc's 4 MiB), which are longer than any that is due.
const BURST: i64 = 8 << 20;
/// Bytes per second after that.
const RATE: i64 = 1 << 20;
/// What a read costs at least, in bytes: a message takes two, and the work that it makes is no less for being short.
const READ: i64 = 512;
/// How long nothing is read when all is spent.
const PAUSE: Duration = Duration::from_millis(20);

/// A stream that is read at a bounded rate.
pub struct Rationed<S> {
    socket: S,
    /// What may be read now; below 0 after a read of more, until that is earned.
    left: i64,
    earned_at: Instant,
    pause: Option<Pin<Box<Sleep>>>,
}

impl<S> Rationed<S> {
    /// To be called in a tokio runtime with a clock.
    pub fn new(socket: S) -> Self {
        Self {
            socket,
            left: BURST,
            earned_at: Instant::now(),
            pause: None,
        }
    }

    /// Adds what was earned since the last time.
    fn earn(&mut self) {
        let passed = self.earned_at.elapsed();
        let earned = i64::try_from(passed.as_micros()).unwrap_or(i64::MAX);
        let earned = earned.saturating_mul(RATE) / 1_000_000;
        if earned > 0 {
            self.left = self.left.saturating_add(earned).min(BURST);
            self.earned_at = Instant::now();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Rationed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            self.earn();
            if self.left > 0 {
                break;
            }
            self.pause = Some(Box::pin(sleep(PAUSE)));
        }
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.socket).poll_read(context, buffer))?;
        let got = buffer.filled().len().saturating_sub(before) as i64;
        self.left = self.left.saturating_sub(got.max(READ));
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Rationed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use husk_proto::{
        agent::{Event, EventsRequest, OutOfMemory, StatsRequest, event},
        agent_ttrpc::AgentClient,
    };
    use protobuf::Message;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
        time::timeout,
    };
    use ttrpc::{
        r#async::{Client, transport::Socket},
        context,
        proto::{MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE, MessageHeader},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_due_is_not_held_up() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ours = Rationed::new(ours);
        let message = vec![7; 1 << 20];
        let mut got = vec![0; message.len()];
        let began = Instant::now();
        let (sent, read) = tokio::join!(theirs.write_all(&message), ours.read_exact(&mut got));
        sent.unwrap();
        read.unwrap();
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert!(got == message);
        drop(theirs);
        assert_eq!(ours.read(&mut got).await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_read_at_the_rate_it_may_have() {
        const FOR: Duration = Duration::from_secs(1);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut ours = Rationed::new(ours);
        let flood = async { while theirs.write_all(&[0; 4096]).await.is_ok() {} };
        let mut bytes = [0; 64];
        let (mut reads, mut most) = (0_i64, Duration::ZERO);
        let read = async {
            loop {
                let began = Instant::now();
                ours.read_exact(&mut bytes).await.unwrap();
                most = most.max(began.elapsed());
                reads += 1;
            }
        };
        let both = async { tokio::join!(flood, read) };
        let began = Instant::now();
        assert!(timeout(FOR, both).await.is_err());
        let passed = began.elapsed().as_millis() as i64;
        let due = (BURST + RATE * passed / 1000) / READ + 1;
        assert!(
            reads > BURST / READ && reads <= due,
            "{reads} of {due} reads"
        );
        // It never stops for long.
        assert!(most <= PAUSE * 2, "{most:?}");
    }

    /// Events that nobody takes out of ttrpc's queue, which has no bound: no more of them come than may.
    #[tokio::test(start_paused = true)]
    async fn an_agent_cannot_fill_the_shim_with_events() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = AgentClient::new(Client::new(Socket::new(Rationed::new(ours))));
        let event = Event {
            event: Some(event::Event::Oom(OutOfMemory::new())),
            ..Event::new()
        };
        let payload = event.write_to_bytes().unwrap();
        let mut frame = Vec::from(MessageHeader {
            length: payload.len() as u32,
            stream_id: 1,
            type_: MESSAGE_TYPE_DATA,
            flags: 0,
        });
        frame.extend(payload);
        let flood: Vec<u8> = frame.repeat(4096 / frame.len());
        let request = EventsRequest::new();
        let stream = client.events(context::Context::default(), &request).await;
        let mut stream = stream.unwrap();
        let mut sent = 0;
        let flooded = timeout(Duration::from_secs(1), async {
            while theirs.write_all(&flood).await.is_ok() {
                sent += flood.len() / frame.len();
            }
        });
        assert!(flooded.await.is_err());
        // A socket's buffer full, and what was read: two reads each.
        let most = (BURST + RATE) / READ / 2 + (1 << 20) / frame.len() as i64;
        assert!((sent as i64) < most, "{sent} events of {most}");
        assert!(stream.recv().await.unwrap().is_some());
    }

    /// Half a frame and silence; one of 4 GiB that goes on and on; one for a stream that there is not.
    #[tokio::test(start_paused = true)]
    async fn an_answer_that_never_ends_ends_its_request() {
        const LIMIT: Duration = Duration::from_millis(200);
        let header = |length, stream_id| {
            Vec::from(MessageHeader {
                length,
                stream_id,
                type_: MESSAGE_TYPE_RESPONSE,
                flags: 0,
            })
        };
        let half = header(100, 1)[..5].to_vec();
        let long = [header(u32::MAX, 1), vec![0; 100_000]].concat();
        let stray = [header(3, 77), vec![0; 3]].concat();
        for answer in [half, long, stray] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let client = AgentClient::new(Client::new(Socket::new(Rationed::new(ours))));
            theirs.write_all(&answer).await.unwrap();
            let began = Instant::now();
            let request = StatsRequest::new();
            let answered = client.stats(context::with_duration(LIMIT), &request).await;
            assert!(answered.is_err());
            assert!(began.elapsed() <= LIMIT + PAUSE, "{:?}", began.elapsed());
        }
    }
}
