//! What `start` is told and answers, by each version of containerd.

use std::{
    fs::{self, File},
    process::{Command, Output},
};

use containerd_shim_protos::{
    api::{ConnectRequest, ConnectResponse},
    types::introspection::RuntimeInfo,
};
use protobuf::Message;
use serde_json::{Value, json};
use ttrpc::{r#async::Client, proto::Request};

use crate::{Host, SHIM};

/// `start`, with this on its stdin.
fn start(host: &Host, stdin: &[u8]) -> Output {
    let options = host.at("stdin");
    fs::write(&options, stdin).unwrap();
    Command::new(SHIM)
        .args(["-namespace", &host.namespace, "-id", "c1"])
        .args([
            "-address",
            host.at("containerd.sock").to_str().unwrap(),
            "start",
        ])
        .env_remove("TTRPC_ADDRESS")
        .current_dir(host.at("c1"))
        .stdin(File::open(options).unwrap())
        .output()
        .unwrap()
}

/// Asks for the shim's process by a name of the service.
async fn connect(client: &Client, service: &str) -> u32 {
    let request = ConnectRequest {
        id: "c1".into(),
        ..ConnectRequest::default()
    };
    let request = Request {
        service: service.into(),
        method: "Connect".into(),
        timeout_nano: 10_000_000_000,
        payload: request.write_to_bytes().unwrap(),
        ..Request::default()
    };
    let answer = client.request(request).await.unwrap();
    ConnectResponse::parse_from_bytes(&answer.payload)
        .unwrap()
        .shim_pid
}

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let length = [
        u8::try_from(bytes.len() & 0x7f).unwrap() | 0x80,
        u8::try_from(bytes.len() >> 7).unwrap(),
    ];
    [&[number << 3 | 2][..], &length, bytes].concat()
}

pub(crate) async fn each_containerd_is_answered_in_its_own_way() {
    let host = Host::new().await;
    host.bundle("c1", &["true"], &[]);
    let options = |more: &str| host.options(more).write_to_bytes().unwrap();
    let parameters = |more: &str| {
        let extension = field(8, &field(1, &options(more)));
        let events = host.at("events");
        let own = [field(1, b"c1"), field(2, host.namespace.as_bytes())].concat();
        [
            own,
            field(5, events.to_str().unwrap().as_bytes()),
            extension,
        ]
        .concat()
    };
    for (stdin, version) in [
        (Vec::new(), 2),
        (options(""), 2),
        (options("task_api = 3\n"), 3),
        (parameters(""), 2),
        (parameters("task_api = 3\n"), 3),
    ] {
        let started = start(&host, &stdin);
        let said = String::from_utf8(started.stdout).unwrap();
        assert!(
            started.status.success(),
            "{}",
            String::from_utf8_lossy(&started.stderr)
        );
        let address = fs::read_to_string(host.at("c1/address")).unwrap();
        match version {
            2 => assert_eq!(said, address),
            _ => {
                let expected = json!({"version": 3, "address": address, "protocol": "ttrpc"});
                assert_eq!(serde_json::from_str::<Value>(&said).unwrap(), expected);
            }
        }
        // Whatever was answered, it speaks both.
        let client = Client::connect(&address).await.unwrap();
        let pid = connect(&client, "containerd.task.v2.Task").await;
        assert!(pid > 0);
        assert_eq!(connect(&client, "containerd.task.v3.Task").await, pid);
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
        let told = String::from_utf8_lossy(&environment).contains("TTRPC_ADDRESS=");
        assert_eq!(told, stdin.starts_with(b"\x0a\x82\x00c1"));
        assert!(host.shim("c1", "delete").status.success());
        host.nothing_is_left(&address).await;
    }
}

pub(crate) async fn it_says_what_it_is() {
    let host = Host::new().await;
    fs::write(
        host.at("options"),
        host.options("").write_to_bytes().unwrap(),
    )
    .unwrap();
    let ask = |flag: &str| {
        let options = File::open(host.at("options")).unwrap();
        let output = Command::new(SHIM)
            .arg(flag)
            .stdin(options)
            .output()
            .unwrap();
        assert!(output.status.success());
        output.stdout
    };
    let info = RuntimeInfo::parse_from_bytes(&ask("-info")).unwrap();
    assert_eq!(info.name, "io.containerd.husk.v2");
    assert_eq!(*info.options, host.options(""));
    let features: Value = serde_json::from_slice(&info.features.value).unwrap();
    assert_eq!(features["hooks"][0], "prestart");
    assert!(
        String::from_utf8(ask("-v"))
            .unwrap()
            .contains("Version:  0.")
    );
}
