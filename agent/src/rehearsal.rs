//! One container, from creation to deletion, in a guest that is to become a template.
//!
//! The first container of a guest is dear: the kernel patches itself for cgroups and device filters,
//! fills its caches, and the agent meets its own code for the first time. In a template that is done
//! once for all clones. The container has the specification that containerd's own client writes, so
//! the rehearsal goes where real ones go; its program is the agent's, which does nothing by that name.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use husk_proto::agent::Stdio;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::cgroup::Cgroup;
use crate::container::Ground;
use crate::fault::Fault;
use crate::pod::Pod;

/// The name by which the program knows that it has nothing to do.
pub const NAME: &CStr = c"/husk-rehearsal";
const ID: &str = "husk-rehearsal";
/// A cgroup without processes that every clone has from its template.
const KEPT: &str = "/husk-template";
/// The container's root; gone afterwards.
const ROOT: &str = "/run/husk-rehearsal";
/// What the kernel puts off (RCU callbacks, release of cgroups) is done by then.
const SETTLED: Duration = Duration::from_millis(100);

/// Runs it up to its start, and leaves everything where it is.
pub async fn begin(pod: &Pod, ground: &Ground) -> Result<(), Fault> {
    let spec = set_the_stage(&ground.path)?;
    pod.create(ID, &spec, &Stdio::default()).await?;
    pod.container(ID)?.start("").await.map(drop)
}

/// Runs it. Leaves nothing behind but [`KEPT`].
pub async fn run(pod: &Pod, ground: &Ground) -> Result<(), Fault> {
    keep_kernel_patched(&ground.cgroups)?;
    let spec = set_the_stage(&ground.path)?;
    let done = perform(pod, &spec).await;
    let removed = fs::remove_dir_all(ROOT).map_err(|error| broken(ROOT, error));
    done.and(removed)?;
    sleep(SETTLED).await;
    Ok(())
}

/// Keeps a cgroup with controllers and a device filter. The kernel patches its own code when the first of
/// each comes and when the last goes: some 40 places on 27 pages, which each clone would copy.
fn keep_kernel_patched(cgroups: &Path) -> Result<(), Fault> {
    let cgroup = Cgroup::create(cgroups, KEPT)?;
    Ok(cgroup.filter_devices(&[])?)
}

fn broken(what: &str, error: io::Error) -> Fault {
    Fault::Broken(format!("rehearse: {what}: {error}"))
}

/// Makes the container's root; returns its specification.
fn set_the_stage(program: &Path) -> Result<Vec<u8>, Fault> {
    let spec = specification(program).map_err(|error| broken("its specification", error))?;
    fs::create_dir_all(ROOT).map_err(|error| broken(ROOT, error))?;
    Ok(spec)
}

async fn perform(pod: &Pod, spec: &[u8]) -> Result<(), Fault> {
    pod.create(ID, spec, &Stdio::default()).await?;
    let container = pod.container(ID)?;
    let started = container.start("").await;
    let ended = container.gone().await;
    if ended.is_err() {
        container
            .signal("", libc::SIGKILL.unsigned_abs(), true)
            .await
            .ok();
        container.gone().await.ok();
    }
    pod.delete(ID, "").await?;
    started.map(drop).and(ended)
}

fn specification(program: &Path) -> io::Result<Vec<u8>> {
    let mut spec: Value = serde_json::from_str(include_str!("spec/ctr-1.7.json"))?;
    let name = NAME.to_string_lossy();
    let bind = json!({
        "destination": name, "type": "bind", "source": program, "options": ["bind", "ro"],
    });
    for (at, value) in [
        ("/root/path", json!(ROOT)),
        ("/process/args", json!([name])),
        ("/linux/cgroupsPath", json!(format!("/{ID}"))),
    ] {
        if let Some(field) = spec.pointer_mut(at) {
            *field = value;
        }
    }
    if let Some(mounts) = spec.pointer_mut("/mounts").and_then(Value::as_array_mut) {
        mounts.push(bind);
    }
    Ok(serde_json::to_vec(&spec)?)
}
