//! The `start` action: finds or leaves behind the shim of a container's group, and says where it
//! listens. It reads the annotations, and nothing else that a start does not need.

use std::{
    env, fs,
    os::fd::OwnedFd,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result};

use crate::{
    address::{self, Bound, SOCKETS},
    ahead,
    args::Invocation,
    cgroup, cleanup,
    record::{self, ProcessId, RECORDS, Record},
    spec,
};

/// Annotations that name the group a container belongs to, the strongest first.
const GROUPS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// Returns the address for containerd. The working directory is the bundle.
pub fn start(invocation: &Invocation) -> Result<String> {
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
    write_address(&answer).context("write the file address in the bundle")?;

    let directory = |id: &str| record::directory(Path::new(RECORDS), &invocation.namespace, id);
    let write = |record: &Record| {
        let directory = directory(&invocation.id);
        let written = record.write(&directory);
        written.with_context(|| format!("write the record in {}", directory.display()))
    };
    match address::bind(&socket)? {
        Bound::Running => {
            if let Ok(record) = Record::read(&directory(&group)) {
                write(&record)?;
            }
        }
        Bound::Ours(listener) => {
            let started = leave_behind(invocation, &group, listener.into());
            let mut child = started.inspect_err(|_| drop(fs::remove_file(&socket)))?;
            let written = ProcessId::of(child.id())
                .context("look at the shim's process")
                .and_then(|shim| {
                    write(&Record {
                        pod: group.clone(),
                        socket: socket.clone(),
                        shim,
                        vmm: None,
                        cgroups: Vec::new(),
                    })
                });
            if let Err(e) = written {
                take_back(&mut child, &group, &socket, &directory(&group));
                return Err(e);
            }
        }
    }
    Ok(answer)
}

/// Ends the shim that was just left behind: containerd will not hear of it, so it would stay for ever.
/// It may have started the pod's VM by now.
fn take_back(child: &mut Child, group: &str, socket: &Path, directory: &Path) {
    let _ = child.kill();
    let _ = child.wait();
    let _ = fs::remove_file(socket);
    // What it has written down itself, if it could.
    if let Ok(record) = Record::read(directory) {
        cleanup::end_pod(&record);
        let _ = record::remove(directory);
    }
    // The VMM dies with it, and leaves the cgroup.
    if let (Some(root), Some(cgroup)) = (cgroup::root(), pods_cgroup(group)) {
        cgroup::remove_marked(&root.join(cgroup));
    }
}

fn pods_cgroup(group: &str) -> Option<PathBuf> {
    let mut spec = spec::read(Path::new("")).ok()?;
    let plan = spec::rewrite(&mut spec, &env::current_dir().ok()?, group, ahead::FIRST).ok()?;
    cgroup::of_pod(plan.cgroups_path.as_deref(), group).ok()
}

fn write_address(answer: &str) -> std::io::Result<()> {
    fs::write(".address", answer)?;
    fs::rename(".address", "address")
}

/// Executes ourselves in serve mode, with the socket as stdin, the runtime options to be read from
/// stdout, and nothing of `start`'s output.
fn leave_behind(invocation: &Invocation, group: &str, listener: OwnedFd) -> Result<Child> {
    let name = env::args_os()
        .next()
        .unwrap_or_else(|| "containerd-shim-husk-v2".into());
    let options = ahead::pass_options().context("pass on the runtime options")?;
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
    command
        .arg("serve")
        .spawn()
        .context("execute /proc/self/exe")
}
