//! The streams of containerd's CRI server, over WebSocket as `kubectl` asks an API server for them: each message begins with
//! the number of its channel (the protocol `v4.channel.k8s.io`).

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tungstenite::{
    Message, WebSocket,
    client::{IntoClientRequest, client},
    http::HeaderValue,
};

use crate::command::PATIENCE;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// Of exec and attach.
const STDIN: u8 = 0;
pub const STDOUT: u8 = 1;
pub const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
/// How long a read waits before whoever reads may look at the time.
const READ: Duration = Duration::from_millis(100);

/// A connection, and what has come by it.
pub struct Streams {
    socket: WebSocket<TcpStream>,
    seen: BTreeMap<u8, Vec<u8>>,
    ended: bool,
}

/// How the process of an exec, or of a container, has ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

impl Streams {
    /// At the address that CRI has answered with.
    pub fn open(url: &str) -> Result<Self> {
        let address = url.strip_prefix("http://").context(url.to_owned())?;
        let host = address.split('/').next().unwrap_or_default();
        let stream = TcpStream::connect(host).with_context(|| format!("connect to {host}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut request = format!("ws://{address}").into_client_request()?;
        let protocol = HeaderValue::from_static(PROTOCOL);
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", protocol);
        let (socket, _) = client(request, stream).map_err(|e| anyhow::anyhow!("{url}: {e}"))?;
        socket.get_ref().set_read_timeout(Some(READ))?;
        Ok(Self {
            socket,
            seen: BTreeMap::new(),
            ended: false,
        })
    }

    #[track_caller]
    pub fn send(&mut self, channel: u8, bytes: &[u8]) {
        let message = [&[channel], bytes].concat();
        let sent = self.socket.send(Message::Binary(message.into()));
        sent.unwrap_or_else(|error| panic!("channel {channel}: {error}"));
    }

    /// To the process' stdin. The protocol has no word for its end.
    #[track_caller]
    pub fn say(&mut self, words: &str) {
        self.send(STDIN, words.as_bytes());
    }

    #[track_caller]
    pub fn resize(&mut self, columns: u16, rows: u16) {
        let size = json!({"Width": columns, "Height": rows});
        self.send(RESIZE, size.to_string().as_bytes());
    }

    /// Takes the next message, if there is one in a moment.
    fn read(&mut self) -> Result<()> {
        match self.socket.read() {
            Ok(Message::Binary(message)) => {
                let (channel, bytes) = message.split_first().context("an empty message")?;
                self.seen.entry(*channel).or_default().extend(bytes);
            }
            Ok(Message::Close(_)) => self.ended = true,
            Ok(_) => {}
            Err(tungstenite::Error::Io(e))
                if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(tungstenite::Error::ConnectionClosed | tungstenite::Error::Protocol(_)) => {
                self.ended = true;
            }
            Err(error) => bail!("read: {error}"),
        }
        Ok(())
    }

    /// What has come by a channel so far.
    pub fn seen(&self, channel: u8) -> &[u8] {
        self.seen.get(&channel).map_or(&[], Vec::as_slice)
    }

    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(self.seen(channel)).into_owned()
    }

    /// Reads until `done` says so.
    #[track_caller]
    pub fn read_until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(
                !self.ended,
                "{what}: the end comes before: {:?}",
                self.texts()
            );
            assert!(Instant::now() < deadline, "{what}: {:?}", self.texts());
            self.read()
                .unwrap_or_else(|error| panic!("{what}: {error:#}"));
        }
    }

    /// Reads until these words have come by a channel.
    #[track_caller]
    pub fn wait_for(&mut self, channel: u8, words: &str) {
        self.read_until(words, |streams| streams.text(channel).contains(words));
    }

    fn texts(&self) -> Vec<(u8, String)> {
        let channels = self.seen.keys();
        channels
            .map(|channel| (*channel, self.text(*channel)))
            .collect()
    }

    /// Reads to the end.
    #[track_caller]
    pub fn finish(mut self) -> Ended {
        self.read_until("the end", |streams| streams.ended);
        let status = self.text(STATUS);
        let told: Value = serde_json::from_str(&status).unwrap_or_default();
        let causes = told["details"]["causes"].as_array().into_iter().flatten();
        let mut codes = causes.filter(|cause| cause["reason"] == "ExitCode");
        let code = match told["status"].as_str() {
            Some("Success") => Some(0),
            _ => codes.find_map(|cause| cause["message"].as_str()?.parse().ok()),
        };
        Ended {
            stdout: self.text(STDOUT),
            stderr: self.text(STDERR),
            code: code.unwrap_or_else(|| panic!("no exit code: {status:?}")),
        }
    }
}

/// A port of a pod's localhost, forwarded: channel 0 is its data, channel 1 what went wrong.
pub struct Forwarded(Streams);

impl Forwarded {
    /// At the address that CRI has answered a PortForward with, for this port alone.
    pub fn open(url: &str, port: u16) -> Result<Self> {
        let mut streams = Streams::open(url)?;
        let announced = port.to_le_bytes();
        let deadline = Instant::now() + PATIENCE;
        while [0, 1]
            .iter()
            .any(|channel| streams.seen(*channel).len() < 2)
        {
            if streams.ended || Instant::now() > deadline {
                bail!("the port is not announced: {:?}", streams.texts());
            }
            streams.read()?;
        }
        for channel in [0, 1] {
            if streams.seen(channel).get(..2) != Some(&announced) {
                bail!("another port is announced: {:?}", streams.seen(channel));
            }
        }
        Ok(Self(streams))
    }

    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.send(0, bytes);
    }

    /// Reads until the pod has sent these words.
    #[track_caller]
    pub fn wait_for(&mut self, words: &str) {
        self.0.read_until(words, |streams| {
            streams.text(0).contains(words) || streams.seen(1).len() > 2
        });
        assert!(self.0.seen(1).len() <= 2, "{}", self.error());
    }

    /// Reads until the connection has ended, or something has gone wrong.
    #[track_caller]
    pub fn wait_for_end(&mut self) {
        self.0.read_until("the end", |streams| {
            streams.ended || streams.seen(1).len() > 2
        });
    }

    /// What the pod has sent so far.
    pub fn received(&self) -> String {
        String::from_utf8_lossy(self.0.seen(0).get(2..).unwrap_or_default()).into_owned()
    }

    fn error(&self) -> String {
        String::from_utf8_lossy(self.0.seen(1).get(2..).unwrap_or_default()).into_owned()
    }
}
