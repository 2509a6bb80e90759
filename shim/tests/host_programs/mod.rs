//! Programs of the host that a container brings with it: hooks, and loggers (`binary://`).

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, ExecProcessRequest, StateRequest,
};
use protobuf::{MessageField, well_known_types::any::Any};
use serde_json::{Value, json};
use ttrpc::{Code, context};

use crate::{Host, Task, code, soon};

fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]})
}

fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

async fn appears(path: &Path) {
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn status(task: &Task) -> i32 {
    let request = StateRequest {
        id: task.id.clone(),
        ..StateRequest::default()
    };
    let state = task.client.state(soon(), &request).await.unwrap();
    state.status.value()
}

/// The state on its stdin is kept under its name; its line in `order` says what it found.
fn noting(name: &str) -> Value {
    hook(&format!("cat >{name}; echo {name} >>order"))
}

pub(crate) async fn hooks_are_run_in_their_time() {
    let mut host = Host::new().await;
    host.hooks = json!({
        "createRuntime": [noting("runtime")],
        "prestart": [noting("first"), noting("second")],
        "poststart": [noting("started")],
        "poststop": [noting("stopped"), hook("exit 1"), noting("last")],
    });
    let task = host.start("c1", &["sleep", "60"], &[("a", "b")]).await;
    let order = task.bundle.join("order");
    let pid = host.create(&task).await;
    assert_eq!(lines(&order), ["first", "second", "runtime"]);
    let state = |name: &str| -> Value {
        serde_json::from_str(&fs::read_to_string(task.bundle.join(name)).unwrap()).unwrap()
    };
    let told = |status: &str, pid: Option<u32>| {
        let mut told = json!({"ociVersion": "1.0.2", "id": "c1", "status": status,
            "bundle": task.bundle, "annotations": {"a": "b"}});
        if let Some(pid) = pid {
            told["pid"] = pid.into();
        }
        told
    };
    assert_eq!(state("first"), told("creating", Some(pid)));
    task.run("").await.unwrap();
    assert_eq!(lines(&order)[3..], ["started"]);
    assert_eq!(state("started"), told("running", Some(pid)));
    task.kill("", libc::SIGKILL).await.unwrap();
    assert_eq!(task.wait("").await, 137);
    assert_eq!(lines(&order).len(), 4);
    task.delete("").await.unwrap();
    assert_eq!(lines(&order)[4..], ["stopped", "last"]);
    assert_eq!(state("stopped"), told("stopped", None));
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
    // containerd asks for it after every lost connection: none is run again.
    assert!(host.shim("c1", "delete").status.success());
    assert_eq!(lines(&order).len(), 6);
}

pub(crate) async fn a_hook_that_fails_ends_the_creation() {
    let mut host = Host::new().await;
    host.hooks = json!({
        "prestart": [noting("first"), hook("echo no room >&2; exit 3"), noting("late")],
        "createRuntime": [noting("runtime")],
        "poststop": [noting("stopped")],
    });
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    let (code, message) = code(
        task.client
            .create(soon(), &host.create_request(&task))
            .await,
    );
    assert_eq!(code, Code::UNKNOWN);
    assert_eq!(
        message,
        "error running prestart hook #1: exit status 3, stdout: , stderr: no room\n"
    );
    // What the first hook has done may have to be undone.
    assert_eq!(lines(&task.bundle.join("order")), ["first", "stopped"]);
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

pub(crate) async fn a_poststart_hook_that_fails_ends_the_container() {
    let mut host = Host::new().await;
    host.hooks = json!({"poststart": [hook("exit 4")]});
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    host.create(&task).await;
    let (_, message) = code(task.run("").await);
    assert_eq!(
        message,
        "error running poststart hook #0: exit status 4, stdout: , stderr: "
    );
    assert_eq!(task.wait("").await, 137);
    task.delete("").await.unwrap();
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

pub(crate) async fn a_hook_that_hangs_holds_up_nobody_else() {
    let mut host = Host::new().await;
    host.hooks = json!({"createRuntime": [hook("echo $$ >pid; mv pid hangs; exec sleep 60")]});
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    let request = host.create_request(&task);
    let create = |patience: Duration, request: CreateTaskRequest| {
        let client = task.client.clone();
        async move {
            client
                .create(context::with_duration(patience), &request)
                .await
        }
    };
    let hangs = tokio::spawn(create(Duration::from_secs(2), request));
    appears(&task.bundle.join("hangs")).await;
    // CREATED: as long as it is on its way.
    assert_eq!(status(&task).await, 1);
    assert!(hangs.await.unwrap().is_err());
    let pid = lines(&task.bundle.join("hangs")).remove(0);
    while Path::new("/proc").join(&pid).exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    while code(task.run("").await).0 != Code::NOT_FOUND {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}

pub(crate) async fn hooks_that_a_lost_shim_has_left_are_run() {
    let mut host = Host::new().await;
    host.hooks = json!({"poststop": [noting("stopped"), hook("exec sleep 60"), noting("late")]});
    let task = host.start("c1", &["sleep", "60"], &[]).await;
    host.create(&task).await;
    let request = ConnectRequest {
        id: "c1".into(),
        ..ConnectRequest::default()
    };
    let shim = task
        .client
        .connect(soon(), &request)
        .await
        .unwrap()
        .shim_pid;
    // SAFETY: kill(2) takes numbers.
    unsafe { libc::kill(i32::try_from(shim).unwrap(), libc::SIGKILL) };
    let begun = std::time::Instant::now();
    for _ in 0..2 {
        assert!(host.shim("c1", "delete").status.success());
        // One that hangs does not keep the others from being tried, nor containerd waiting.
        assert_eq!(lines(&task.bundle.join("order")), ["stopped"]);
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
    host.nothing_is_left(&task.address()).await;
}

/// A program that writes down what it gets, beside itself.
fn logger(directory: &Path) -> PathBuf {
    let path = directory.join("logger");
    let text = format!(
        "#!/bin/sh\ncd {}\nPATH=/usr/bin:/bin\necho $CONTAINER_NAMESPACE \"$@\" >of-$CONTAINER_ID\nexec 5>&-\n\
         cat <&4 >err-$CONTAINER_ID & cat <&3 >out-$CONTAINER_ID\nwait\n",
        directory.display()
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

pub(crate) async fn a_logger_takes_the_output_of_init_and_exec() {
    let host = Host::new().await;
    let uri = format!("binary://{}?--tag=a+b", logger(host.top.path()).display());
    let script = "echo to out; echo to err >&2; exec sleep 60";
    let task = host.start("c1", &["sh", "-c", script], &[]).await;
    let request = CreateTaskRequest {
        stdin: String::new(),
        stdout: uri.clone(),
        stderr: uri.clone(),
        ..host.create_request(&task)
    };
    task.client.create(soon(), &request).await.unwrap();
    task.run("").await.unwrap();
    let exec = ExecProcessRequest {
        id: "c1".into(),
        exec_id: "e1".into(),
        stdout: uri.clone(),
        stderr: uri,
        spec: MessageField::some(Any {
            value: json!({"args": ["echo", "exec"]}).to_string().into_bytes(),
            ..Any::default()
        }),
        ..ExecProcessRequest::default()
    };
    task.client.exec(soon(), &exec).await.unwrap();
    task.run("e1").await.unwrap();
    assert_eq!(task.wait("e1").await, 0);
    task.delete("e1").await.unwrap();
    assert_eq!(lines(&host.at("out-e1")), ["exec"]);
    task.kill("", libc::SIGKILL).await.unwrap();
    assert_eq!(task.wait("").await, 137);
    task.delete("").await.unwrap();
    assert_eq!(
        lines(&host.at("of-c1")),
        [format!("{} --tag a b", host.namespace)]
    );
    assert_eq!(lines(&host.at("out-c1")), ["to out"]);
    assert_eq!(lines(&host.at("err-c1")), ["to err"]);
    task.shutdown().await;
    host.nothing_is_left(&task.address()).await;
}
