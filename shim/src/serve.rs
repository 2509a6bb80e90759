//! Serve mode: the process of the pod. It listens on the socket it inherits as its stdin, in a
//! session of its own, starts the pod's VM ahead, and ends when the pod is over.

use std::{
    env,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};
use log::LevelFilter;
use tokio::time::timeout;
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    ahead,
    args::Invocation,
    events::Publisher,
    host_program::LowDescriptors,
    logger,
    pod::{Identity, Pod},
    sandbox, task,
};

/// The variable that says where containerd takes events.
pub const EVENTS: &str = "TTRPC_ADDRESS";
/// For containerd to take the last events.
const FLUSH: Duration = Duration::from_secs(2);
/// For containerd to ask for the first container. It may have lost interest, or its life.
const FIRST: Duration = Duration::from_secs(120);
/// For clients to take the last answers.
const FAREWELL: Duration = Duration::from_secs(2);

/// Serves the pod until it is over.
pub fn run(invocation: &Invocation) -> Result<()> {
    let level = if invocation.debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    };
    let low = LowDescriptors::reserve();
    // Without containerd at the other end there is nobody to read a log.
    let _ = logger::to_fifo(Path::new("log"), level);
    let outcome = low
        .context("reserve descriptors")
        .and_then(|_low| serve(invocation));
    if let Err(e) = &outcome {
        log::error!("{e:#}");
    }
    outcome
}

fn serve(invocation: &Invocation) -> Result<()> {
    detach();
    let options = ahead::take_options();
    let listener = take_listener().context("take the inherited socket")?;
    let socket = listener
        .local_addr()
        .context("name of the inherited socket")?;
    let socket = socket
        .as_pathname()
        .context("the inherited socket has no path")?
        .to_owned();

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        let events = Publisher::start(&invocation.namespace, events_socket(invocation));
        let identity = Identity {
            namespace: invocation.namespace.clone(),
            id: invocation.id.clone(),
            socket,
            since_ns: invocation.since_ns,
        };
        let pod = Pod::new(identity, options.clone(), events.clone());
        // Before anything that would have to be cleaned up after.
        pod.write_record(None).context("write the pod's record")?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        let mut server = Server::new()
            .add_listener(Listener::from(listener))
            .register_service(task::services(&pod))
            .register_service(sandbox::services(&pod));
        server.start().await?;
        pod.start_ahead(options);
        pod.linger(FIRST);
        pod.over.notified().await;
        events.flush(FLUSH).await;
        // Returns when the answers that are under way, Shutdown's among them, have been written.
        if timeout(FAREWELL, server.shutdown()).await.is_err() {
            log::warn!("the last answers did not reach their clients");
        }
        Ok(())
    });
    // Not by dropping it: that waits for threads which write to files.
    runtime.shutdown_background();
    outcome
}

/// Where containerd takes events.
fn events_socket(invocation: &Invocation) -> String {
    match env::var(EVENTS) {
        Ok(address) if !address.is_empty() => address,
        _ => format!("{}.ttrpc", invocation.address),
    }
}

/// Leaves the session of `start`; the name in ps(1) is otherwise that of /proc/self/exe.
fn detach() {
    // SAFETY: setsid(2) takes nothing, and PR_SET_NAME a string that ends in NUL.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"husk-shim".as_ptr());
    }
}

/// Stdin is the listening socket. It moves out of the way of whoever thinks that 0 is stdin.
fn take_listener() -> io::Result<UnixListener> {
    let listener: OwnedFd = io::stdin().as_fd().try_clone_to_owned()?;
    let null = File::open("/dev/null")?;
    // SAFETY: both descriptors are open; 0 is not owned by anything but the standard library,
    // which allows it to be replaced.
    if unsafe { libc::dup2(null.as_raw_fd(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(listener.into())
}
