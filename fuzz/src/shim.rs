//! The shim before a lying agent, and a VMM that a guest has taken over: whatever they answer, a request ends, and
//! what people are shown is bounded and printable.

use std::{collections::HashMap, io::Write, os::unix::net::UnixStream, time::Duration};

use arbitrary::{Arbitrary, Unstructured};
use husk_proto::{
    agent::{
        Event, EventsRequest, HelloResponse, OutOfMemory, ProcessExit, StartRequest, StatsRequest,
        StatsResponse, event,
    },
    agent_ttrpc::AgentClient,
};
use husk_shim::{fault::Fault, identity, ration::Rationed, stats, untrusted, vmm_log::VmmLog};
use protobuf::Message;
use tokio::{io::AsyncWriteExt, runtime, time::timeout};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
    proto::{Code, MessageHeader, Request, Response, Status},
};

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Agent(Vec<Frame<'a>>),
    Text(&'a str),
    Console(&'a [u8], u8),
    Files(Vec<(u8, &'a str)>),
    VmmLog(Vec<&'a [u8]>),
}

#[derive(Arbitrary, Debug)]
enum Frame<'a> {
    /// Stream, kind, flags, and what it carries.
    Sent(u8, u8, u8, Payload<'a>),
    /// A header that says something else of its length.
    Lie(u8, u8, u32, &'a [u8]),
    Raw(&'a [u8]),
}

#[derive(Arbitrary, Debug)]
enum Payload<'a> {
    Hello(&'a str, &'a str),
    Stats(Vec<(u8, &'a str)>),
    Exit(&'a str, &'a str, u32),
    OutOfMemory(&'a str),
    Refusal(i32, &'a str),
    Bytes(&'a [u8]),
}

/// More than any of this takes: a request that is not answered ends with its connection.
const SOON: Duration = Duration::from_secs(5);

const FILES: [&str; 8] = [
    "cpu.stat",
    "memory.current",
    "memory.max",
    "memory.stat",
    "memory.events",
    "io.stat",
    "pids.current",
    "pids.max",
];

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    match input {
        Input::Agent(frames) => agent(&frames),
        Input::Text(text) => assert_printable(&untrusted::message(text)),
        Input::Console(bytes, lines) => {
            let tail = untrusted::console_tail(bytes, lines.into());
            assert!(tail.len() <= lines.into());
            tail.iter().for_each(|line| assert_printable(line));
        }
        Input::Files(files) => {
            let metrics = stats::to_any(&named(&files)).expect("metrics");
            assert!(
                metrics.value.len() < 16 << 10,
                "{} bytes",
                metrics.value.len()
            );
        }
        Input::VmmLog(parts) => vmm_log(&parts),
    }
}

fn assert_printable(text: &str) {
    assert!(text.len() <= 1100, "{} bytes", text.len());
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

fn named(files: &[(u8, &str)]) -> HashMap<String, String> {
    let name = |index: &u8| FILES[usize::from(*index) % FILES.len()].to_owned();
    let files = files.iter();
    files
        .map(|(index, text)| (name(index), (*text).to_owned()))
        .collect()
}

fn block_on(future: impl Future<Output = ()>) {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        assert!(timeout(SOON, future).await.is_ok(), "it does not end");
    });
}

/// The calls that the shim makes, and an agent that says what it likes and hangs up.
fn agent(frames: &[Frame<'_>]) {
    let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
    block_on(async {
        let (ours, theirs) = tokio::net::UnixStream::pair().expect("a socket pair");
        let client = AgentClient::new(Client::new(Socket::new(Rationed::new(ours))));
        let says = async {
            let mut theirs = theirs;
            // The shim may have hung up.
            let _ = theirs.write_all(&bytes).await;
        };
        let asks = async {
            match identity::greet(&client).await {
                Ok(hello) => {
                    assert_printable(&untrusted::message(&hello.version));
                    assert_printable(&untrusted::message(&hello.kernel_release));
                }
                Err(e) => assert_fault("greet", e),
            }
            let forever = context::Context::default;
            match client.events(forever(), &EventsRequest::new()).await {
                Ok(mut stream) => {
                    while let Ok(Some(event)) = stream.recv().await {
                        drop(event);
                    }
                }
                Err(e) => assert_fault("events", e),
            }
        };
        let more = async {
            let forever = context::Context::default;
            match client.stats(forever(), &StatsRequest::new()).await {
                Ok(answer) => drop(stats::to_any(&answer.files).expect("metrics")),
                Err(e) => assert_fault("stats", e),
            }
            if let Err(e) = client.start(forever(), &StartRequest::new()).await {
                assert_fault("start", e);
            }
        };
        tokio::join!(says, asks, more);
    });
}

fn assert_fault(what: &str, error: ttrpc::Error) {
    assert_printable(&Fault::of_call(what, error).message);
}

impl Frame<'_> {
    fn bytes(&self) -> Vec<u8> {
        let header = |length: u32, stream: u8, kind: u8, flags: u8| {
            Vec::from(MessageHeader {
                length,
                stream_id: u32::from(stream % 16),
                type_: kind % 5,
                flags: flags % 8,
            })
        };
        match self {
            Frame::Sent(stream, kind, flags, payload) => {
                let payload = payload.bytes(*kind % 5);
                let mut bytes = header(payload.len() as u32, *stream, *kind, *flags);
                bytes.extend(payload);
                bytes
            }
            Frame::Lie(stream, kind, length, payload) => {
                let mut bytes = header(*length, *stream, *kind, 0);
                bytes.extend(*payload);
                bytes
            }
            Frame::Raw(bytes) => bytes.to_vec(),
        }
    }
}

const RESPONSE: u8 = 2;
const REQUEST: u8 = 1;

impl Payload<'_> {
    fn bytes(&self, kind: u8) -> Vec<u8> {
        let message = match self {
            Payload::Hello(version, release) => HelloResponse {
                version: (*version).into(),
                kernel_release: (*release).into(),
                ..Default::default()
            }
            .write_to_bytes(),
            Payload::Stats(files) => StatsResponse {
                files: named(files),
                ..Default::default()
            }
            .write_to_bytes(),
            Payload::Exit(container, exec, status) => Event {
                event: Some(event::Event::Exit(ProcessExit {
                    container_id: (*container).into(),
                    exec_id: (*exec).into(),
                    status: *status,
                    ..Default::default()
                })),
                ..Default::default()
            }
            .write_to_bytes(),
            Payload::OutOfMemory(container) => Event {
                event: Some(event::Event::Oom(OutOfMemory {
                    container_id: (*container).into(),
                    ..Default::default()
                })),
                ..Default::default()
            }
            .write_to_bytes(),
            Payload::Refusal(code, text) => {
                let mut status = Status::new();
                status.code = protobuf::EnumOrUnknown::<Code>::from_i32(*code);
                status.message = (*text).into();
                let mut response = Response::new();
                response.status = Some(status).into();
                return response.write_to_bytes().expect("encoded");
            }
            Payload::Bytes(bytes) => Ok(bytes.to_vec()),
        };
        let payload = message.expect("encoded");
        match kind {
            RESPONSE => {
                let mut response = Response::new();
                response.payload = payload;
                response.write_to_bytes().expect("encoded")
            }
            REQUEST => {
                let mut request = Request::new();
                request.payload = payload;
                request.write_to_bytes().expect("encoded")
            }
            _ => payload,
        }
    }
}

fn vmm_log(parts: &[&[u8]]) {
    block_on(async {
        let (read, mut write) = UnixStream::pair().expect("a socket pair");
        let log = VmmLog::drain(read.into()).expect("a log");
        for part in parts {
            write.write_all(part).expect("a log that is read");
            tokio::task::yield_now().await;
        }
        drop(write);
        tokio::task::yield_now().await;
        let log = log.lock().expect("the lock");
        assert_printable(log.last_line());
    });
}
