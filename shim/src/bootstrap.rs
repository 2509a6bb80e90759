//! The `start` action: finds or leaves behind the shim of a container's group, and says where it
//! listens. It reads the annotations, and nothing else that a start does not need.

use std::{
    env, fs,
    os::fd::OwnedFd,
    os::unix::process::CommandExt,
    path::Path,
    process::{self, Command, Stdio},
};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    address::{self, Bound, SOCKETS},
    ahead,
    args::Invocation,
    config::{CONFIG, Config},
    record::{self, ProcessId, RECORDS, Record},
    serve::EVENTS,
    spec,
    told::Told,
};

/// Annotations that name the group a container belongs to, the strongest first.
const GROUPS: [&str; 2] = ["io.containerd.runc.v2.group", spec::SANDBOX];

/// Returns the answer for containerd. The working directory is the bundle.
pub fn start(invocation: &Invocation) -> Result<String> {
    let stdin = ahead::read_stdin().context("read what containerd writes to stdin")?;
    let told = Told::read(&stdin, &invocation.id, &invocation.namespace);
    let mut invocation = invocation.clone();
    invocation.debug |= told.debug;
    if invocation.address.is_empty() {
        invocation.address.clone_from(&told.grpc_address);
    }
    let address = find_or_leave_behind(&invocation, &told)?;
    Ok(answer(address, &told))
}

/// What is printed: the address alone, which every containerd understands as a shim of version 2; or, if the
/// configuration says so, what containerd 2 has instead.
fn answer(address: String, told: &Told) -> String {
    let options = ahead::decode(&told.options).unwrap_or_default();
    // What is wrong with it is said when the container is created, where more can be said.
    match Config::load(Path::new(CONFIG), &options) {
        Ok(Config { task_api: 3, .. }) => {
            json!({"version": 3, "address": address, "protocol": "ttrpc"}).to_string()
        }
        _ => address,
    }
}

fn find_or_leave_behind(invocation: &Invocation, told: &Told) -> Result<String> {
    let mut annotations = spec::annotations(Path::new(""))?;
    let group = GROUPS
        .iter()
        .find_map(|name| annotations.remove(*name))
        .filter(|group| !group.is_empty())
        .unwrap_or_else(|| invocation.id.clone());
    anyhow::ensure!(
        crate::args::is_identifier(&group),
        "annotation for the group: {group:?} is not an identifier"
    );
    let socket = address::socket_path(
        Path::new(SOCKETS),
        &invocation.address,
        &invocation.namespace,
        &group,
    );
    let answer = format!("unix://{}", socket.display());
    // containerd 1.7 reads it after a restart, in grouped bundles too.
    record::replace(Path::new("address"), answer.as_bytes())
        .context("write the file address in the bundle")?;

    let directory = |id: &str| record::directory(Path::new(RECORDS), &invocation.namespace, id);
    let write = |id: &str, record: &Record| {
        let directory = directory(id);
        let written = record.write(&directory);
        written.with_context(|| format!("write the record in {}", directory.display()))
    };
    match address::bind(&socket)? {
        // The group's own record is its shim's to write.
        Bound::Running if group == invocation.id => {}
        Bound::Running => {
            if let Ok(record) = Record::read(&directory(&group)) {
                write(&invocation.id, &record)?;
            }
        }
        Bound::Ours(listener) => {
            let started = note(&group, &socket).and_then(|record| {
                write(&group, &record)?;
                if group != invocation.id {
                    write(&invocation.id, &record)?;
                }
                leave_behind(invocation, told, &group, listener.into())
            });
            if let Err(e) = started {
                let _ = fs::remove_file(&socket);
                for id in [&group, &invocation.id] {
                    let _ = record::remove(&directory(id));
                }
                return Err(e);
            }
        }
    }
    Ok(answer)
}

/// What is written down before there is a shim, which replaces it as soon as it runs: of two that
/// write at the same time nobody would know who is the later.
fn note(group: &str, socket: &Path) -> Result<Record> {
    Ok(Record {
        pod: group.to_owned(),
        socket: socket.to_owned(),
        shim: ProcessId::of(process::id()).context("look at this process")?,
        vmm: None,
        cgroups: Vec::new(),
        network: None,
    })
}

/// Executes ourselves in serve mode, with the socket as stdin, the runtime options to be read from
/// stdout, and nothing of `start`'s output.
fn leave_behind(
    invocation: &Invocation,
    told: &Told,
    group: &str,
    listener: OwnedFd,
) -> Result<()> {
    let name = env::args_os()
        .next()
        .unwrap_or_else(|| "containerd-shim-husk-v2".into());
    let options = ahead::in_memory(&told.options).context("pass on the runtime options")?;
    // Not by path: an upgrade may be replacing the file right now.
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(name)
        .args(["-namespace", &invocation.namespace, "-id", group])
        .args(["-address", &invocation.address])
        .args(["-since", &invocation.since_ns.to_string()])
        .stdin(Stdio::from(listener))
        .stdout(Stdio::from(options))
        .stderr(Stdio::null());
    if invocation.debug {
        command.arg("-debug");
    }
    if env::var_os(EVENTS).is_none_or(|address| address.is_empty())
        && !told.ttrpc_address.is_empty()
    {
        command.env(EVENTS, &told.ttrpc_address);
    }
    command
        .arg("serve")
        .spawn()
        .context("execute /proc/self/exe")?;
    Ok(())
}
