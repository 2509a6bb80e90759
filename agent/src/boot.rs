//! From the kernel's first jump into `/init` to serving the host: what PID 1 has to set up.
//!
//! As little as possible before the host is dialled, the rest while it answers, and what only
//! containers need when the first one is created: the time to the first answer is paid by every pod.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use husk_proto::{PAUSE_ROOT, SHARES, SHARES_TAG, SHM};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, mount, move_mount, open_tree};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use tokio::task::{LocalSet, spawn_local};

use crate::connection;
use crate::container::Ground;
use crate::events::Events;
use crate::kmsg;
use crate::launch;
use crate::pause;
use crate::pod::Pod;
use crate::reaper::Reaper;
use crate::service::Service;
use crate::streams::Arrivals;
use crate::sys;

/// What a container without limits of its own may have open; the kernel's own bound.
const OPEN_FILES: u64 = 1 << 20;
/// What one that asks may have (fs.nr_open), as systemd has it on a host: clients pass on the host's limit.
const OPEN_FILES_ASKED_FOR: &str = "1073741816";

/// The whole life of PID 1.
pub fn run() -> ! {
    let error = match live() {
        Ok(()) => "PID 1 came to an end".into(),
        Err(error) => error.to_string(),
    };
    kmsg::fatal(&error)
}

fn live() -> io::Result<()> {
    let began = uptime();
    // Without this no message can be seen, so its own failure is the exit status alone.
    cover_root().map_err(|error| named("cover the root file system", error))?;
    mount_at("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, None)?;
    // The kernel found no console to open: the lowest free numbers are 0, 1 and 2.
    loop {
        let null = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        if null.as_raw_fd() > 2 {
            break;
        }
        let _standard = null.into_raw_fd();
    }
    kmsg::start().map_err(|error| named("open /dev/kmsg", error))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .build()
        .map_err(|error| named("start the runtime", error))?;
    LocalSet::new().block_on(&runtime, serve(began))
}

async fn serve(began: Duration) -> io::Result<()> {
    let arrivals = Rc::new(Arrivals::default());
    spawn_local(
        connection::accept_streams(Rc::clone(&arrivals))
            .map_err(|error| named("listen for streams", error))?,
    );
    let dialling = spawn_local(connection::dial());
    // Lets it send its request; the rest is done while the host takes it.
    tokio::task::yield_now().await;
    let dialled = uptime();

    settle()?;
    let reaper = Rc::new(Reaper::default());
    spawn_local({
        let reaper = Rc::clone(&reaper);
        async move {
            if let Err(error) = reaper.run().await {
                kmsg::fatal(&format!("receive SIGCHLD: {error}"));
            }
        }
    });
    let events = Arc::new(Events::default());
    let ground = Ground {
        program: launch::program(Path::new("/proc/self/exe"))
            .map_err(|error| named("open the agent's program", error))?,
        path: "/init".into(),
        cgroups: "/sys/fs/cgroup".into(),
        reaper,
        arrivals,
        events: Arc::clone(&events),
    };
    let door = Pod::open(ground, prepare_for_containers);
    let service = Arc::new(Service { door, events });

    let settled = uptime();
    let socket = dialling
        .await
        .map_err(io::Error::other)?
        .map_err(|error| named("dial the host", error))?;
    log::debug!(
        "since the guest's boot: PID 1 {began:?}, dialling {dialled:?}, settled {settled:?}, answered {:?}",
        uptime()
    );
    Err(io::Error::other(connection::serve(socket, service).await))
}

/// Puts a mount of the root over itself: the initial root file system has no parent, and pivot_root,
/// which every container needs, refuses to leave such a root.
fn cover_root() -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = open_tree(rustix::fs::CWD, "/", flags)?;
    move_mount(
        &root,
        "",
        rustix::fs::CWD,
        "/",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    rustix::process::fchdir(&root)?;
    rustix::process::chroot(".")?;
    Ok(())
}

/// What a process may expect of its guest, and the host does not wait for.
fn settle() -> io::Result<()> {
    mount_at(
        "proc",
        "/proc",
        "proc",
        MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
        None,
    )?;
    kmsg::obey(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    // When memory runs out, the workload is to blame.
    fs::write("/proc/self/oom_score_adj", "-999")
        .map_err(|error| named("write /proc/self/oom_score_adj", error))?;
    fs::write("/proc/sys/fs/nr_open", OPEN_FILES_ASKED_FOR)
        .map_err(|error| named("write /proc/sys/fs/nr_open", error))?;
    // What a container without limits of its own gets: as under containerd's service file.
    for (resource, limit) in [
        (Resource::Nofile, Some(OPEN_FILES)),
        (Resource::Nproc, None),
        (Resource::Core, None),
    ] {
        setrlimit(
            resource,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        )
        .map_err(|error| named("raise the limits", error.into()))?;
    }
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    );
    let up = socket
        .map_err(io::Error::from)
        .and_then(|socket| sys::interface_up(socket.as_fd(), c"lo"));
    if let Err(error) = up {
        log::warn!("bring up lo: {error}");
    }
    Ok(())
}

/// What only containers need; asked for again when it failed, so what is there already is fine.
fn prepare_for_containers() -> io::Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at("sysfs", "/sys", "sysfs", quiet, None)?;
    mount_at(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        quiet,
        Some(c"nsdelegate,memory_recursiveprot"),
    )?;
    mount_at(SHARES_TAG, SHARES, "virtiofs", MountFlags::empty(), None)?;
    // As large as everybody makes it who does not say how large.
    let size = Some(c"mode=1777,size=65536k");
    mount_at("shm", SHM, "tmpfs", quiet, size)?;
    pause::set_up(Path::new(PAUSE_ROOT), Path::new("/init"))
        .map_err(|error| named(&format!("set up {PAUSE_ROOT}"), error))
}

fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: Option<&CStr>,
) -> io::Result<()> {
    let exists = |error: &io::Error| error.kind() == io::ErrorKind::AlreadyExists;
    fs::create_dir_all(target)
        .or_else(|error| if exists(&error) { Ok(()) } else { Err(error) })
        .map_err(|error| named(&format!("make {target}"), error))?;
    match mount(source, target, kind, flags, data) {
        Err(Errno::BUSY) => Ok(()),
        other => other.map_err(|error| named(&format!("mount {kind} at {target}"), error.into())),
    }
}

/// Since the guest's boot.
fn uptime() -> Duration {
    Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default()
}

fn named(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
