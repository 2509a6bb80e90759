//! The shim as containerd meets it: the real binary, started, spoken to over its socket, and deleted,
//! with a stand-in for husk-vmm and the guest (`fake_vmm`). Needs root and an openable `/dev/kvm`.
//!
//! This program is the stand-in too: the shim executes it under the name `husk-vmm`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod beginning;
mod fake_vmm;
mod host_programs;
mod templates;

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{Read, Write},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse,
        ExecProcessRequest, ForwardRequest, KillRequest, Mount, PidsRequest, ShutdownRequest,
        StartRequest, StateRequest, StatsRequest, WaitRequest,
    },
    events::task::TaskExit,
    shim_async::{Client, Events, TaskClient, create_events},
};
use protobuf::{
    Message, MessageField,
    well_known_types::{any::Any, empty::Empty},
};
use serde_json::json;
use ttrpc::{
    Code,
    r#async::{Server, TtrpcContext},
    context,
};

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-husk-v2");

fn main() {
    if std::env::args().next().as_deref() == Some("husk-vmm") {
        fake_vmm::run();
    }
    // SAFETY: geteuid(2) cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    if !root
        || File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
    {
        println!("skipped: needs root and /dev/kvm");
        return;
    }
    let filter = std::env::args()
        .skip(1)
        .find(|arg| !arg.starts_with('-'))
        .unwrap_or_default();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (mut passed, mut filtered) = (0, 0);
    macro_rules! run {
        ($($test:path)*) => {$(
            let name = stringify!($test).replace(' ', "");
            if !name.contains(&filter) {
                filtered += 1;
            } else {
                let begun = Instant::now();
                runtime.block_on(async {
                    tokio::time::timeout(Duration::from_secs(60), $test()).await.expect("in time")
                });
                println!("test {name} ... ok ({} ms)", begun.elapsed().as_millis());
                passed += 1;
            }
        )*};
    }
    run! {
        a_container_runs_from_start_to_shutdown
        events_come_in_order
        stdin_reaches_stdout_and_ends_with_close_io
        execs_run_beside_the_init
        errors_have_the_codes_clients_look_for
        a_boot_that_fails_says_why_and_leaves_nothing
        a_vmm_that_dies_ends_everything_once
        a_shim_that_was_killed_is_cleaned_up_after
        a_group_with_a_name_of_its_own_is_cleaned_up_after
        two_containers_of_a_group_share_a_shim
        a_vm_started_ahead_and_not_wanted_leaves_nothing
        a_start_that_fails_leaves_no_shim
        a_container_created_while_the_last_goes_has_a_vm
        two_containers_deleted_at_once_leave_no_vm
        a_start_that_was_given_up_runs_nothing
        a_guest_that_does_not_end_what_is_killed_goes
        beginning::each_containerd_is_answered_in_its_own_way
        beginning::it_says_what_it_is
        host_programs::hooks_are_run_in_their_time
        host_programs::a_hook_that_fails_ends_the_creation
        host_programs::a_poststart_hook_that_fails_ends_the_container
        host_programs::a_hook_that_hangs_holds_up_nobody_else
        host_programs::hooks_that_a_lost_shim_has_left_are_run
        host_programs::a_logger_takes_the_output_of_init_and_exec
        templates::the_second_pod_is_a_clone
        templates::pods_at_once_have_one_template_built
        templates::what_is_wrong_with_a_template_costs_no_pod
        templates::a_store_that_is_open_to_others_is_left_alone
        templates::a_template_that_vanishes_in_use_is_used
        templates::pods_of_other_sizes_are_clones_of_the_same
        templates::a_clone_that_cannot_grow_costs_no_pod
        templates::a_damaged_template_is_replaced
        templates::a_build_that_fails_leaves_nothing_and_is_not_repeated
        templates::a_build_that_is_interrupted_leaves_nothing
        templates::templates_are_seen_to_by_hand
        templates::namespaces_share_no_template
    }
    // In cargo's words, for who counts; a test that fails has ended all by then.
    println!(
        "test result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; {filtered} filtered out"
    );
}

type Seen = Arc<Mutex<Vec<(String, String)>>>;

/// containerd's event service, which notes topic and process.
struct Noted(Seen);

#[async_trait]
impl Events for Noted {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap();
        let mut about = String::new();
        if envelope.topic == "/tasks/exit" {
            let exit = TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
            about = format!("{}={}", exit.id, exit.exit_status);
        }
        self.0.lock().unwrap().push((envelope.topic, about));
        Ok(Empty::new())
    }
}

/// One containerd, with a bundle per container.
struct Host {
    top: tempfile::TempDir,
    namespace: String,
    seen: Seen,
    /// More of the configuration, one line each.
    settings: Vec<String>,
    /// More of it that only `start` is told.
    told_ahead: String,
    /// Of the specifications to come.
    hooks: serde_json::Value,
    _events: Server,
}

struct Task {
    id: String,
    bundle: PathBuf,
    client: TaskClient,
}

fn soon() -> context::Context {
    context::with_duration(Duration::from_secs(30))
}

fn code<T>(answer: ttrpc::Result<T>) -> (Code, String) {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("expected an error"),
    }
}

impl Host {
    async fn new() -> Self {
        let top = tempfile::tempdir().unwrap();
        let seen = Seen::default();
        let mut events = Server::new()
            .bind(&format!("unix://{}/events", top.path().display()))
            .unwrap()
            .register_service(create_events(Arc::new(Noted(seen.clone()))));
        events.start().await.unwrap();
        for (name, text) in [("vmlinux", "boots"), ("initrd", "")] {
            fs::write(top.path().join(name), text).unwrap();
        }
        let namespace = format!("husk-test-{}", std::process::id());
        Self {
            top,
            namespace,
            seen,
            told_ahead: String::new(),
            hooks: json!({}),
            settings: vec!["templates = \"off\"".into()],
            _events: events,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.top.path().join(name)
    }

    fn shim(&self, id: &str, action: &str) -> Output {
        let options = self.options(&self.told_ahead).write_to_bytes().unwrap();
        fs::write(self.at("options"), options).unwrap();
        Command::new(SHIM)
            .args(["-namespace", &self.namespace, "-id", id])
            .args(["-address", self.at("containerd.sock").to_str().unwrap()])
            .arg(action)
            .env("TTRPC_ADDRESS", self.at("events"))
            .current_dir(self.at(id))
            .stdin(File::open(self.at("options")).unwrap())
            .output()
            .unwrap()
    }

    /// A bundle whose process is `args`.
    fn bundle(&self, id: &str, args: &[&str], annotations: &[(&str, &str)]) -> PathBuf {
        let bundle = self.at(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let annotations: HashMap<_, _> = annotations.iter().copied().collect();
        let spec = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"args": args},
            "annotations": annotations,
            "hooks": self.hooks,
            "linux": {
                "cgroupsPath": format!("/{}/{id}", self.namespace),
                "namespaces": [{"type": "mount"}, {"type": "network"}]
            }
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        for name in ["log", "in", "out", "err"] {
            let status = Command::new("mkfifo")
                .arg(bundle.join(name))
                .status()
                .unwrap();
            assert!(status.success());
        }
        bundle
    }

    /// A bundle whose process is `args`, and its shim.
    async fn start(&self, id: &str, args: &[&str], annotations: &[(&str, &str)]) -> Task {
        let bundle = self.bundle(id, args, annotations);
        let started = self.shim(id, "start");
        let address = String::from_utf8(started.stdout).unwrap();
        assert!(
            started.status.success(),
            "{}",
            String::from_utf8_lossy(&started.stderr)
        );
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        let client = TaskClient::new(Client::connect(&address).await.unwrap());
        Task {
            id: id.to_owned(),
            bundle,
            client,
        }
    }

    fn configuration(&self) -> String {
        format!(
            "vmm = {:?}\nkernel = {:?}\ninitrd = {:?}\nagent_timeout_ms = 1500\n{}\n",
            std::env::current_exe().unwrap(),
            self.at("vmlinux"),
            self.at("initrd"),
            self.settings.join("\n"),
        )
    }

    /// The runtime options, which containerd hands to `start` and sends with Create.
    fn options(&self, more: &str) -> Any {
        let body = self.configuration() + more;
        // Field 3 of runtimeoptions.v1.Options, with a length of two bytes.
        let mut options = vec![
            0x1a,
            (body.len() & 0x7f | 0x80) as u8,
            (body.len() >> 7) as u8,
        ];
        options.extend(body.bytes());
        Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: options,
            ..Any::default()
        }
    }

    fn create_request(&self, task: &Task) -> CreateTaskRequest {
        CreateTaskRequest {
            id: task.id.clone(),
            bundle: task.bundle.to_str().unwrap().into(),
            rootfs: vec![Mount {
                type_: "bind".into(),
                source: task.bundle.join("rootfs").to_str().unwrap().into(),
                options: vec!["rbind".into(), "rw".into()],
                ..Mount::default()
            }],
            stdin: task.fifo("in"),
            stdout: task.fifo("out"),
            stderr: task.fifo("err"),
            options: MessageField::some(self.options("")),
            ..CreateTaskRequest::default()
        }
    }

    async fn create(&self, task: &Task) -> u32 {
        task.client
            .create(soon(), &self.create_request(task))
            .await
            .unwrap()
            .pid
    }

    /// What a pod could have left: processes, cgroup, record, socket.
    fn leavings(&self, address: &str) -> Vec<String> {
        let mut left = Vec::new();
        for path in [
            PathBuf::from(format!("/run/husk/{}", self.namespace)),
            PathBuf::from(format!("/sys/fs/cgroup/{}", self.namespace)),
            PathBuf::from(format!("/sys/fs/cgroup/unified/{}", self.namespace)),
            PathBuf::from(address.trim_start_matches("unix://")),
        ] {
            if path.exists() {
                left.push(path.display().to_string());
            }
        }
        let top = self.top.path().to_str().unwrap();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&cmdline).contains(top) {
                left.push(format!("process {:?}", entry.file_name()));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        left.extend(
            mounts
                .lines()
                .filter(|line| line.contains(top))
                .map(str::to_owned),
        );
        left
    }

    async fn nothing_is_left(&self, address: &str) {
        for _ in 0..100 {
            if self.leavings(address).is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("left behind: {:?}", self.leavings(address));
    }
}

impl Task {
    fn fifo(&self, name: &str) -> String {
        self.bundle.join(name).to_str().unwrap().into()
    }

    fn address(&self) -> String {
        fs::read_to_string(self.bundle.join("address")).unwrap()
    }

    /// Reads a stream to its end.
    fn reader(&self, name: &str) -> thread::JoinHandle<Vec<u8>> {
        let path = self.bundle.join(name);
        thread::spawn(move || {
            let mut bytes = Vec::new();
            File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        })
    }

    async fn run(&self, exec: &str) -> ttrpc::Result<u32> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..StartRequest::default()
        };
        Ok(self.client.start(soon(), &request).await?.pid)
    }

    async fn wait(&self, exec: &str) -> u32 {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..WaitRequest::default()
        };
        self.client
            .wait(soon(), &request)
            .await
            .unwrap()
            .exit_status
    }

    async fn kill(&self, exec: &str, signal: i32) -> ttrpc::Result<Empty> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            signal: signal as u32,
            all: exec.is_empty(),
            ..KillRequest::default()
        };
        self.client.kill(soon(), &request).await
    }

    async fn delete(&self, exec: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..DeleteRequest::default()
        };
        self.client.delete(soon(), &request).await
    }

    async fn exec(&self, exec: &str, args: &[&str], streams: bool) -> ttrpc::Result<Empty> {
        let stream = |name: &str| {
            if streams {
                self.fifo(name)
            } else {
                String::new()
            }
        };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            stdin: stream("in"),
            stdout: stream("out"),
            stderr: stream("err"),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: json!({"args": args}).to_string().into_bytes(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        self.client.exec(soon(), &request).await
    }

    async fn close_stdin(&self, exec: &str) {
        let request = CloseIORequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.client.close_io(soon(), &request).await.unwrap();
    }

    async fn shutdown(&self) {
        let request = ShutdownRequest {
            id: self.id.clone(),
            ..ShutdownRequest::default()
        };
        self.client.shutdown(soon(), &request).await.unwrap();
    }
}

async fn joined<T>(thread: thread::JoinHandle<T>) -> T {
    while !thread.is_finished() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    thread.join().unwrap()
}

async fn a_container_runs_from_start_to_shutdown() {
    let host = Host::new().await;
    let task = host
        .start("c1", &["sh", "-c", "echo out; echo err >&2; exit 42"], &[])
        .await;
    let (out, err) = (task.reader("out"), task.reader("err"));
    let pid = host.create(&task).await;
    assert!(Path::new(&format!("/proc/{pid}/ns/net")).exists());
    let ours = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(fs::read_link(format!("/proc/{pid}/ns/net")).unwrap(), ours);
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    if Path::new("/sys/fs/cgroup/cgroup.procs").exists() {
        assert!(
            cgroup.contains(&format!("/{}/c1", host.namespace)),
            "{cgroup}"
        );
    }
    assert_eq!(task.run("").await.unwrap(), pid);
    assert_eq!(task.wait("").await, 42);

    let pids = PidsRequest {
        id: "c1".into(),
        ..PidsRequest::default()
    };
    let pids = task.client.pids(soon(), &pids).await.unwrap().processes;
    assert_eq!((pids.len(), pids[0].pid), (1, pid));
    let state = StateRequest {
        id: "c1".into(),
        ..StateRequest::default()
    };
    let state = task.client.state(soon(), &state).await.unwrap();
    assert_eq!((state.exit_status, state.pid), (42, pid));

    let deleted = task.delete("").await.unwrap();
    assert_eq!((deleted.exit_status, deleted.pid), (42, pid));
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(joined(out).await, b"out\n");
    assert_eq!(joined(err).await, b"err\n");
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
    // containerd runs it all the same.
    let output = host.shim("c1", "delete");
    let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(answer.exit_status, 137);
}

async fn events_come_in_order() {
    let host = Host::new().await;
    let task = host
        .start("c1", &["sh", "-c", "exit 3", "slow-start"], &[])
        .await;
    host.create(&task).await;
    task.exec("e1", &["sleep", "60"], false).await.unwrap();
    task.run("e1").await.unwrap();
    task.run("").await.unwrap();
    // The init ends first, and is told last.
    tokio::time::sleep(Duration::from_millis(100)).await;
    task.kill("e1", libc::SIGTERM).await.unwrap();
    assert_eq!(task.wait("e1").await, 143);
    assert_eq!(task.wait("").await, 3);
    task.delete("e1").await.unwrap();
    task.delete("").await.unwrap();
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
    let seen = host.seen.lock().unwrap().clone();
    let seen: Vec<_> = seen
        .iter()
        .map(|(topic, about)| format!("{topic} {about}"))
        .collect();
    assert_eq!(
        seen,
        [
            "/tasks/create ",
            "/tasks/exec-added ",
            "/tasks/exec-started ",
            "/tasks/start ",
            "/tasks/exit e1=143",
            "/tasks/exit c1=3",
            "/tasks/delete ",
        ]
    );
}

async fn stdin_reaches_stdout_and_ends_with_close_io() {
    let host = Host::new().await;
    let task = host.start("c1", &["cat"], &[]).await;
    let out = task.reader("out");
    host.create(&task).await;
    task.run("").await.unwrap();
    let input = task.fifo("in");
    let data: Vec<u8> = (0..8u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let copy = data.clone();
    joined(thread::spawn(move || {
        File::options()
            .write(true)
            .open(input)
            .unwrap()
            .write_all(&copy)
            .unwrap();
    }))
    .await;
    task.close_stdin("").await;
    assert_eq!(task.wait("").await, 0);
    task.delete("").await.unwrap();
    assert!(joined(out).await == data);
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

async fn execs_run_beside_the_init() {
    let host = Host::new().await;
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    host.create(&task).await;
    task.run("").await.unwrap();
    for n in 0..10 {
        let exec = format!("e{n}");
        task.exec(&exec, &["sh", "-c", "exit $0", &n.to_string()], false)
            .await
            .unwrap();
        task.run(&exec).await.unwrap();
        assert_eq!(task.wait(&exec).await, n);
        assert_eq!(task.delete(&exec).await.unwrap().exit_status, n);
    }
    task.exec("bad", &["/nowhere/program"], false)
        .await
        .unwrap();
    let (_, message) = code(task.run("bad").await);
    assert!(
        message.contains("exec /nowhere/program: No such file"),
        "{message}"
    );
    assert_eq!(task.wait("bad").await, 255);
    task.delete("bad").await.unwrap();

    let stats = StatsRequest {
        id: "c1".into(),
        ..StatsRequest::default()
    };
    let stats = task
        .client
        .stats(soon(), &stats)
        .await
        .unwrap()
        .stats
        .unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");

    task.kill("", libc::SIGKILL).await.unwrap();
    assert_eq!(task.wait("").await, 137);
    task.delete("").await.unwrap();
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

async fn errors_have_the_codes_clients_look_for() {
    let host = Host::new().await;
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    let unknown = ConnectRequest {
        id: "other".into(),
        ..ConnectRequest::default()
    };
    assert!(
        task.client
            .connect(soon(), &unknown)
            .await
            .unwrap()
            .shim_pid
            > 0
    );
    assert_eq!(code(task.run("").await).0, Code::NOT_FOUND);
    host.create(&task).await;
    let again = host.create_request(&task);
    assert_eq!(
        code(task.client.create(soon(), &again).await).0,
        Code::ALREADY_EXISTS
    );
    assert_eq!(
        code(task.delete("").await.and(task.delete("").await)).0,
        Code::NOT_FOUND
    );
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;

    let task = host.start("c2", &["sleep", "60"], &[]).await;
    host.create(&task).await;
    task.run("").await.unwrap();
    assert_eq!(code(task.run("").await).0, Code::FAILED_PRECONDITION);
    assert_eq!(code(task.delete("").await).0, Code::FAILED_PRECONDITION);
    task.exec("e", &["true"], false).await.unwrap();
    assert_eq!(
        code(task.exec("e", &["true"], false).await).0,
        Code::ALREADY_EXISTS
    );
    assert_eq!(code(task.kill("x", 15).await).0, Code::NOT_FOUND);
    let checkpoint = Default::default();
    assert_eq!(
        code(task.client.checkpoint(soon(), &checkpoint).await).0,
        Code::UNIMPLEMENTED
    );
    // Shutdown is ignored while a container is there.
    task.shutdown().await;
    task.kill("", libc::SIGKILL).await.unwrap();
    assert_eq!(task.wait("").await, 137);
    assert_eq!(code(task.kill("", 9).await).0, Code::NOT_FOUND);
    assert_eq!(
        code(task.exec("f", &["true"], false).await).0,
        Code::FAILED_PRECONDITION
    );
    task.delete("").await.unwrap();
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

async fn a_boot_that_fails_says_why_and_leaves_nothing() {
    for (kernel, expected) in [
        (
            "die",
            "husk-vmm exited with status 9: husk-vmm: out of ideas (kernel ",
        ),
        ("no elf", "kernel_fd: not an ELF file"),
        (
            "panic",
            "the guest panicked: not syncing: no init; its console ended with: line one | ",
        ),
        (
            "silent",
            "the agent did not answer within 1500 ms (agent_timeout_ms); its console ended with: ",
        ),
    ] {
        let host = Host::new().await;
        fs::write(host.at("vmlinux"), kernel).unwrap();
        let task = host.start("c1", &["true"], &[]).await;
        let begun = Instant::now();
        let (_, message) = code(
            task.client
                .create(soon(), &host.create_request(&task))
                .await,
        );
        assert!(message.contains(expected), "{kernel}: {message}");
        assert!(
            begun.elapsed() < Duration::from_secs(3),
            "{kernel}: {:?}",
            begun.elapsed()
        );
        assert_eq!(code(task.delete("").await).0, Code::NOT_FOUND);
        task.shutdown().await;
        host.nothing_is_left(&task.address()).await;
    }
    let host = Host::new().await;
    let task = host.start("c1", &["true"], &[]).await;
    fs::remove_dir(task.bundle.join("rootfs")).unwrap();
    let (_, message) = code(
        task.client
            .create(soon(), &host.create_request(&task))
            .await,
    );
    assert!(message.contains("c1/rootfs: No such file"), "{message}");
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

async fn a_vmm_that_dies_ends_everything_once() {
    let host = Host::new().await;
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    let pid = host.create(&task).await;
    task.run("").await.unwrap();
    task.exec("e", &["sleep", "60"], false).await.unwrap();
    task.run("e").await.unwrap();
    // SAFETY: kill(2) takes numbers.
    unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGKILL) };
    assert_eq!((task.wait("e").await, task.wait("").await), (137, 137));
    assert_eq!(code(task.kill("", 9).await).0, Code::NOT_FOUND);
    task.delete("").await.unwrap();
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
    let seen = host.seen.lock().unwrap().clone();
    let exits: Vec<_> = seen
        .iter()
        .filter(|(t, _)| t == "/tasks/exit")
        .map(|(_, a)| a)
        .collect();
    assert_eq!(exits, ["e=137", "c1=137"]);
}

async fn a_shim_that_was_killed_is_cleaned_up_after() {
    let host = Host::new().await;
    let task = host.start("c1", &["sleep", "3"], &[]).await;
    let pid = host.create(&task).await;
    let connect = ConnectRequest {
        id: "c1".into(),
        ..ConnectRequest::default()
    };
    let shim = task
        .client
        .connect(soon(), &connect)
        .await
        .unwrap()
        .shim_pid;
    // SAFETY: kill(2) takes numbers.
    unsafe { libc::kill(i32::try_from(shim).unwrap(), libc::SIGKILL) };
    for _ in 0..2 {
        let begun = Instant::now();
        let output = host.shim("c1", "delete");
        assert!(output.status.success());
        assert!(begun.elapsed() < Duration::from_secs(5));
        let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
        assert_eq!(answer.exit_status, 137);
    }
    // Somebody else's child by now: a zombie at most, which has no command line.
    let cmdline = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(cmdline.is_empty());
    host.nothing_is_left(&task.address()).await;
}

async fn a_group_with_a_name_of_its_own_is_cleaned_up_after() {
    let host = Host::new().await;
    let group = [("io.containerd.runc.v2.group", "group")];
    let one = host.start("one", &["sleep", "60"], &group).await;
    let other = host.start("other", &["sleep", "60"], &group).await;
    host.create(&one).await;
    let connect = ConnectRequest::default();
    let shim = one.client.connect(soon(), &connect).await.unwrap().shim_pid;
    // Of a shim that lives, nothing is taken.
    assert!(host.shim("other", "delete").status.success());
    one.run("").await.unwrap();
    // SAFETY: kill(2) takes numbers.
    unsafe { libc::kill(i32::try_from(shim).unwrap(), libc::SIGKILL) };
    // Gone, or a zombie, which has no command line.
    while fs::read(format!("/proc/{shim}/cmdline")).is_ok_and(|line| !line.is_empty()) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(host.shim("one", "delete").status.success());
    host.nothing_is_left(&other.address()).await;
}

async fn two_containers_of_a_group_share_a_shim() {
    let host = Host::new().await;
    let group = [("io.kubernetes.cri.sandbox-id", "pod")];
    let pod = host.start("pod", &["sleep", "60"], &group).await;
    let member = host.start("member", &["true"], &group).await;
    assert_eq!(pod.address(), member.address());
    let pid = host.create(&pod).await;
    assert_eq!(host.create(&member).await, pid);
    pod.run("").await.unwrap();
    member.run("").await.unwrap();
    assert_eq!(member.wait("").await, 0);
    member.delete("").await.unwrap();
    // Ignored: the pod's own container is still there.
    member.shutdown().await;
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    assert!(fs::metadata(pod.fifo("log")).unwrap().file_type().is_fifo());
    pod.kill("", libc::SIGKILL).await.unwrap();
    assert_eq!(pod.wait("").await, 137);
    pod.delete("").await.unwrap();
    pod.shutdown().await;
    host.nothing_is_left(&pod.address()).await;
}

async fn a_vm_started_ahead_and_not_wanted_leaves_nothing() {
    // Nobody asks for a container.
    let mut host = Host::new().await;
    let task = host.start("c1", &["true"], &[]).await;
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;

    // Somebody asks for another one than was to be expected.
    host.told_ahead = "memory_mib = 128\n".into();
    let task = host.start("c2", &["sh", "-c", "exit 5"], &[]).await;
    let pid = host.create(&task).await;
    task.run("").await.unwrap();
    assert_eq!(task.wait("").await, 5);
    assert_eq!(task.delete("").await.unwrap().pid, pid);
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;

    // Somebody asks for one that cannot be.
    host.told_ahead.clear();
    let task = host.start("c4", &["true"], &[]).await;
    let mut request = host.create_request(&task);
    request.stdout = "binary:///nowhere".into();
    let (_, message) = code(task.client.create(soon(), &request).await);
    assert!(message.contains("start the logger /nowhere"), "{message}");
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;

    // The shim is killed before there is a container.
    let task = host.start("c3", &["true"], &[]).await;
    let connect = ConnectRequest::default();
    let shim = task.client.connect(soon(), &connect).await;
    let vm = || fs::read_to_string(format!("/run/husk/{}/c3/record.json", host.namespace));
    while !vm().is_ok_and(|record| record.contains("vmm")) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // SAFETY: kill(2) takes numbers.
    unsafe {
        libc::kill(
            i32::try_from(shim.unwrap().shim_pid).unwrap(),
            libc::SIGKILL,
        )
    };
    assert!(host.shim("c3", "delete").status.success());
    host.nothing_is_left(&task.address()).await;
}

async fn a_start_that_fails_leaves_no_shim() {
    let host = Host::new().await;
    host.bundle("c1", &["true"], &[]);
    // Where its record should be.
    let records = PathBuf::from(format!("/run/husk/{}", host.namespace));
    fs::create_dir_all(&records).unwrap();
    fs::write(records.join("c1"), "").unwrap();
    let started = host.shim("c1", "start");
    let complaint = String::from_utf8_lossy(&started.stderr).into_owned();
    assert!(!started.status.success());
    assert!(complaint.contains("write the record in"), "{complaint}");
    fs::remove_dir_all(&records).unwrap();
    let address = fs::read_to_string(host.at("c1").join("address")).unwrap();
    host.nothing_is_left(&address).await;
}

const GROUP: [(&str, &str); 1] = [("io.kubernetes.cri.sandbox-id", "pod")];
const SLOW_DELETE: [&str; 4] = ["sh", "-c", "exit 0", "slow-delete"];

async fn a_container_created_while_the_last_goes_has_a_vm() {
    let host = Host::new().await;
    let pod = host.start("pod", &SLOW_DELETE, &GROUP).await;
    let late = host.start("late", &["sh", "-c", "exit 6"], &GROUP).await;
    let pid = host.create(&pod).await;
    pod.run("").await.unwrap();
    assert_eq!(pod.wait("").await, 0);
    let (deleted, created) = tokio::join!(pod.delete(""), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        host.create(&late).await
    });
    assert_eq!((deleted.unwrap().pid, created), (pid, pid));
    late.run("").await.unwrap();
    assert_eq!(late.wait("").await, 6);
    late.delete("").await.unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    // Too late now.
    let refused = late
        .client
        .create(soon(), &host.create_request(&late))
        .await;
    assert_eq!(code(refused).0, Code::FAILED_PRECONDITION);
    pod.shutdown().await;
    host.nothing_is_left(&pod.address()).await;
}

async fn two_containers_deleted_at_once_leave_no_vm() {
    let host = Host::new().await;
    let pod = host.start("pod", &SLOW_DELETE, &GROUP).await;
    let member = host.start("member", &SLOW_DELETE, &GROUP).await;
    let pid = host.create(&pod).await;
    host.create(&member).await;
    for task in [&pod, &member] {
        task.run("").await.unwrap();
        assert_eq!(task.wait("").await, 0);
    }
    let (one, other) = tokio::join!(pod.delete(""), member.delete(""));
    one.and(other).unwrap();
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    pod.shutdown().await;
    host.nothing_is_left(&pod.address()).await;
}

async fn a_start_that_was_given_up_runs_nothing() {
    let host = Host::new().await;
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    host.create(&task).await;
    task.run("").await.unwrap();
    let args = ["sh", "-c", "exec sleep 61.0625", "start-times-out"];
    task.exec("e", &args, false).await.unwrap();
    assert!(task.run("e").await.is_err());
    assert_eq!(task.wait("e").await, 255);
    let runs = || {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
            .any(|cmdline| String::from_utf8_lossy(&cmdline).contains("61.0625"))
    };
    let begun = Instant::now();
    while runs() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    task.delete("e").await.unwrap();
    task.kill("", libc::SIGKILL).await.unwrap();
    assert_eq!(task.wait("").await, 137);
    task.delete("").await.unwrap();
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

async fn a_guest_that_does_not_end_what_is_killed_goes() {
    let host = Host::new().await;
    let sleeper = ["sh", "-c", "exec sleep 60"];
    let hung = host.start("hung", &sleeper, &[]).await;
    let hung_early = host.start("hung-early", &sleeper, &[]).await;
    // One whose agent says that all is well.
    let liar = [&sleeper[..], &["unkillable"]].concat();
    let liar = host.start("liar", &liar, &[]).await;
    let stop = |pid: u32| {
        // SAFETY: kill(2) takes numbers.
        unsafe { libc::kill(i32::try_from(pid).unwrap(), libc::SIGSTOP) };
        // Until its last thread is: one that still runs may say half of what it has to say.
        let runs = |thread: fs::DirEntry| {
            let status = fs::read_to_string(thread.path().join("status")).unwrap();
            !status.contains("State:\tT")
        };
        let threads = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        while threads().any(runs) {
            thread::sleep(Duration::from_millis(1));
        }
    };
    let ends = async |task: &Task, hangs: bool| {
        let pid = host.create(task).await;
        task.run("").await.unwrap();
        if hangs {
            stop(pid);
        }
        assert_eq!(code(task.delete("").await).0, Code::FAILED_PRECONDITION);
        task.kill("", libc::SIGKILL).await.unwrap();
        assert_eq!(task.wait("").await, 137);
        task.delete("").await.unwrap();
    };
    let never_started = async |task: &Task| {
        stop(host.create(task).await);
        assert_eq!(task.delete("").await.unwrap().exit_status, 137);
    };
    tokio::join!(
        ends(&hung, true),
        never_started(&hung_early),
        ends(&liar, false)
    );
    for task in [&hung, &hung_early, &liar] {
        task.shutdown().await;
    }
    for task in [&hung, &hung_early, &liar] {
        host.nothing_is_left(&task.address()).await;
    }
}
