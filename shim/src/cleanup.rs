//! The `delete` action: removes whatever a container's shim left behind. containerd runs it after
//! every lost connection, also when all is well; so it expects to find nothing, may be run any number
//! of times, and ends in time whatever it finds.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Result;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use crate::{
    args::Invocation,
    cgroup,
    events::timestamp,
    hooks, mount, network,
    process::KILLED_STATUS,
    record::{self, ProcessId, RECORDS, Record},
};

/// For both processes to end, of the 5 s that containerd allows.
const LIMIT: Duration = Duration::from_secs(3);
/// For the hooks that a container's shim has left to be run.
const HOOKS: Duration = Duration::from_millis(1500);

/// Cleans up and returns what to print: a protobuf `DeleteResponse`.
pub fn delete(invocation: &Invocation) -> Result<Vec<u8>> {
    delete_in(Path::new(RECORDS), invocation)
}

fn delete_in(records: &Path, invocation: &Invocation) -> Result<Vec<u8>> {
    let directory = record::directory(records, &invocation.namespace, &invocation.id);
    let mut pid = 0;
    match Record::read(&directory) {
        Ok(record) => {
            pid = record.vmm.map_or(0, |vmm| vmm.pid);
            if record.pod == invocation.id {
                end_pod(&record);
            } else {
                end_if_dead(&record::directory(
                    records,
                    &invocation.namespace,
                    &record.pod,
                ));
            }
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => eprintln!("record in {}: {e}", directory.display()),
    }
    hooks::run_due(&directory, HOOKS);
    record::remove(&directory)?;
    let bundle = invocation.bundle.as_deref().unwrap_or(Path::new(""));
    unmount_rootfs(&bundle.join("rootfs"));
    let response = DeleteResponse {
        pid,
        exit_status: KILLED_STATUS,
        exited_at: timestamp(SystemTime::now()),
        ..DeleteResponse::default()
    };
    Ok(response.write_to_bytes()?)
}

/// A member of a pod goes with it. But what is left of a pod whose shim is gone has to go with its
/// members: it may have the name of none of them, and then nobody is told to delete it.
fn end_if_dead(directory: &Path) {
    let Ok(record) = Record::read(directory) else {
        return;
    };
    // Nobody may have collected it yet.
    let is_dead = match record.shim.open() {
        Ok(shim) => shim.is_none_or(|shim| wait(&shim, Duration::ZERO).is_ok()),
        Err(_) => false,
    };
    // Whoever is just being left behind has its socket, and has yet to note itself.
    if is_dead && UnixStream::connect(&record.socket).is_err() {
        end_pod(&record);
        if let Err(e) = record::remove(directory) {
            eprintln!("remove the record in {}: {e}", directory.display());
        }
    }
}

/// The shim first, as it would otherwise go on using what is removed.
fn end_pod(record: &Record) {
    let deadline = Instant::now() + LIMIT;
    for process in [Some(record.shim), record.vmm].into_iter().flatten() {
        if let Err(e) = end(process, deadline) {
            eprintln!("end process {}: {e}", process.pid);
        }
    }
    if let (None, Some(cgroup)) = (record.vmm, record.cgroups.last()) {
        // The shim was lost before it could note who is in there, and this one ends with it.
        cgroup::kill_all(cgroup, deadline.saturating_duration_since(Instant::now()));
    }
    cgroup::remove(&record.cgroups);
    if let Some(namespace) = &record.network {
        network::sweep(namespace);
    }
    let _ = fs::remove_file(&record.socket);
}

fn end(process: ProcessId, deadline: Instant) -> io::Result<()> {
    let Some(pidfd) = process.open()? else {
        return Ok(());
    };
    record::kill(&pidfd)?;
    wait(&pidfd, deadline.saturating_duration_since(Instant::now()))
}

/// Waits for the end of a process that need not be our child.
fn wait(pidfd: &OwnedFd, limit: Duration) -> io::Result<()> {
    let mut poll = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: `poll` is one pollfd.
    match unsafe { libc::poll(&raw mut poll, 1, limit) } {
        -1 => Err(io::Error::last_os_error()),
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// Ours are made where nobody sees them; this is for a host where that was not so.
fn unmount_rootfs(rootfs: &Path) {
    while mount::unmount(rootfs).is_ok() {}
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, process::Command};

    use super::*;
    use crate::args::Action;

    fn invocation(id: &str, bundle: &Path) -> Invocation {
        Invocation {
            action: Action::Delete,
            namespace: "default".into(),
            id: id.into(),
            address: String::new(),
            bundle: Some(bundle.to_owned()),
            debug: false,
            since_ns: 0,
        }
    }

    #[test]
    fn finds_nothing_any_number_of_times() {
        let top = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let answer = delete_in(&top.path().join("husk"), &invocation("x", top.path())).unwrap();
            let answer = DeleteResponse::parse_from_bytes(&answer).unwrap();
            assert_eq!(answer.exit_status, KILLED_STATUS);
            assert!(answer.exited_at.seconds > 0);
        }
    }

    #[test]
    fn the_members_of_a_dead_pod_take_what_is_left_of_it_with_them() {
        let top = tempfile::tempdir().unwrap();
        let records = top.path().join("husk");
        let mut vmm = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let mut shim = Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let socket = top.path().join("socket");
        // Nobody listens there any more.
        drop(UnixListener::bind(&socket).unwrap());
        let record = Record {
            pod: "group".into(),
            socket: socket.clone(),
            shim: ProcessId::of(shim.id()).unwrap(),
            vmm: Some(ProcessId::of(vmm.id()).unwrap()),
            cgroups: Vec::new(),
            network: None,
        };
        let place = |id| record::directory(&records, "default", id);
        for id in ["group", "one", "other"] {
            record.write(&place(id)).unwrap();
        }
        let delete = |id| delete_in(&records, &invocation(id, top.path())).unwrap();
        // The shim lives: a member is not to end it.
        delete("one");
        assert!(vmm.try_wait().unwrap().is_none() && place("group").exists());
        shim.kill().unwrap();
        wait(&record.shim.open().unwrap().unwrap(), LIMIT).unwrap();
        // Somebody answers who has yet to say that it is the shim.
        fs::remove_file(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        record.write(&place("one")).unwrap();
        delete("one");
        assert!(vmm.try_wait().unwrap().is_none() && place("group").exists());
        drop(listener);
        // A child that another test is just making may have a copy for a moment.
        while UnixStream::connect(&socket).is_ok() {
            std::thread::yield_now();
        }
        delete("other");
        assert!(!vmm.wait().unwrap().success());
        assert!(!socket.exists() && !records.exists());
        delete("one");
        shim.wait().unwrap();
    }

    #[test]
    fn ends_what_is_left_of_a_pod_and_spares_strangers() {
        let top = tempfile::tempdir().unwrap();
        let sleeper = || Command::new("/bin/sleep").arg("60").spawn().unwrap();
        let (mut shim, mut stranger) = (sleeper(), sleeper());
        let socket = top.path().join("socket");
        fs::write(&socket, "").unwrap();
        let reused = ProcessId::of(stranger.id()).unwrap();
        let record = Record {
            pod: "x".into(),
            socket: socket.clone(),
            shim: ProcessId::of(shim.id()).unwrap(),
            // A pid that was the VMM's once.
            vmm: Some(ProcessId {
                started: reused.started.wrapping_sub(1),
                ..reused
            }),
            cgroups: Vec::new(),
            network: None,
        };
        let directory = record::directory(&top.path().join("husk"), "default", "x");
        record.write(&directory).unwrap();
        record
            .write(&record::directory(
                &top.path().join("husk"),
                "default",
                "member",
            ))
            .unwrap();

        // Deleting a member leaves the pod alone.
        delete_in(&top.path().join("husk"), &invocation("member", top.path())).unwrap();
        assert!(shim.try_wait().unwrap().is_none());

        let begun = Instant::now();
        delete_in(&top.path().join("husk"), &invocation("x", top.path())).unwrap();
        assert!(begun.elapsed() < LIMIT);
        assert!(!shim.wait().unwrap().success());
        assert!(stranger.try_wait().unwrap().is_none());
        assert!(!socket.exists() && !directory.exists());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        delete_in(&top.path().join("husk"), &invocation("x", top.path())).unwrap();
    }
}
