//! The template that a cold start has missed is built in the background, by a process of its own:
//! the pod waits for nothing, and may well be over first. A note in the store, `.tried-<key>`, sees
//! to it that one shim of many asks for a build, and that builds that fail are not repeated without
//! end.

use std::{
    env,
    fs::{self, File},
    io::{self, Read},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;

use super::{
    build::{self, Built},
    key::{Ingredients, Key, Scope},
    store::Store,
};
use crate::{
    ahead::in_memory,
    cgroup,
    config::{Config, ConfigError},
    options::Options,
    ready,
    record::ProcessId,
    untrusted,
};

/// What begins the name of a note.
pub(super) const TRIED: &str = ".tried-";
/// The least time between two builds of one template that nobody asked for by hand.
const BACK_OFF: Duration = Duration::from_secs(5 * 60);
/// Of the builder; it is nobody's first concern.
const NICENESS: libc::c_int = 10;
/// Bytes of a builder's complaint that are read, and of an order.
const LIMIT: u64 = 1 << 20;

/// What a builder is told, as JSON on its stdin.
#[derive(Deserialize, Serialize)]
struct Order {
    scope: Scope,
    /// [`Config::to_toml`].
    config: String,
}

/// Has a template built, unless that was tried a short time ago. Returns when the builder has ended,
/// and logs how; if this process ends before, the builder goes on.
pub async fn order(config: &Config, wanted: &Ingredients) {
    let store = Store::new(&config.template_dir);
    let key = wanted.key();
    match claim(&store, &key) {
        Ok(true) => {}
        Ok(false) => return,
        Err(e) => return log::warn!("template {key} is not built: {e}"),
    }
    let begun = Instant::now();
    let outcome = async {
        let mut builder = spawn(config, &wanted.scope)?;
        ended(&builder).await?;
        let status = builder.wait()?;
        let mut complaint = String::new();
        if let Some(stderr) = builder.stderr.take() {
            let _ = stderr.take(LIMIT).read_to_string(&mut complaint);
        }
        if status.success() {
            return Ok(());
        }
        let last = complaint.lines().last().unwrap_or_default();
        Err(io::Error::other(match last {
            "" => format!("the builder ended with {status}"),
            last => untrusted::message(last),
        }))
    };
    match outcome.await {
        Ok(()) => log::info!("template {key} built in {} ms", begun.elapsed().as_millis()),
        Err(e) => log::warn!(
            "template {key} was not built, pods go on booting: {e} (next attempt in {} min)",
            BACK_OFF.as_secs() / 60
        ),
    }
}

/// Whether a build may begin, which is then noted.
fn claim(store: &Store, key: &Key) -> io::Result<bool> {
    store.create()?;
    let note = store.path().join(format!("{TRIED}{key}"));
    let new = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&note);
    match new {
        Ok(_) => return Ok(true),
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        Err(_) => {}
    }
    let note = match File::options().write(true).open(&note) {
        Ok(note) => note,
        // Forgotten this moment, so somebody else sees to it.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    let tried = note.metadata()?.modified()?;
    // A note from the future is none: the clock was set.
    let age = SystemTime::now().duration_since(tried);
    if age.is_ok_and(|age| age < BACK_OFF) {
        return Ok(false);
    }
    note.set_modified(SystemTime::now())?;
    Ok(true)
}

/// Nobody is to build this template for a while: what comes out does not run.
pub fn postpone(store: &Store, key: &Key) {
    forget(store, key);
    let _ = claim(store, key);
}

/// The next one who wants this template may have it built at once.
pub fn forget(store: &Store, key: &Key) {
    let _ = fs::remove_file(store.path().join(format!("{TRIED}{key}")));
}

/// Executes ourselves: not by path, as an upgrade may be replacing the file right now.
fn spawn(config: &Config, scope: &Scope) -> io::Result<Child> {
    let order = Order {
        scope: scope.clone(),
        config: config.to_toml().map_err(io::Error::other)?,
    };
    let name = env::args_os().next();
    let builder = Command::new("/proc/self/exe")
        .arg0(name.unwrap_or_else(|| "containerd-shim-husk-v2".into()))
        .arg("build-template")
        .stdin(in_memory(&serde_json::to_vec(&order)?)?)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    // It is not the pod's, and may outlive it.
    cgroup::send_home(builder.id());
    Ok(builder)
}

/// Returns at the end of a child, which is then still to be collected.
async fn ended(child: &Child) -> io::Result<()> {
    if let Some(pidfd) = ProcessId::of(child.id())?.open()? {
        let _ = ready::watch(pidfd, Interest::READABLE)?.readable().await?;
    }
    Ok(())
}

/// The builder: takes an order from stdin and carries it out.
pub fn run() -> anyhow::Result<()> {
    // SAFETY: both take numbers only. Neither is worth failing for.
    unsafe {
        libc::setsid();
        libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS);
    }
    let _ = env::set_current_dir("/");
    let mut text = Vec::new();
    io::stdin().take(LIMIT).read_to_end(&mut text)?;
    let order: Order = serde_json::from_slice(&text).context("the order on stdin")?;
    let config = parse(&order.config)?;
    match build::run(&config, order.scope)? {
        Built::Made(_) | Built::There(_) | Built::Busy(_) => Ok(()),
    }
}

fn parse(config: &str) -> Result<Config, ConfigError> {
    let options = Options {
        config_body: config.to_owned(),
        ..Options::default()
    };
    Config::load(Path::new("/dev/null"), &options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::templates::key::tests::config;

    #[test]
    fn one_of_many_may_build_and_not_again_too_soon() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let store = Store::new(&config.template_dir);
        let key = Ingredients::gather(&config, Scope::Node).unwrap().key();
        assert!(claim(&store, &key).unwrap());
        assert!(!claim(&store, &key).unwrap());
        let note = store.path().join(format!("{TRIED}{key}"));
        for (when, may) in [
            (SystemTime::now() - BACK_OFF / 2, false),
            (SystemTime::now() - BACK_OFF, true),
            (SystemTime::now() + BACK_OFF, true),
        ] {
            let file = File::options().write(true).open(&note).unwrap();
            file.set_modified(when).unwrap();
            assert_eq!(claim(&store, &key).unwrap(), may);
            assert!(!claim(&store, &key).unwrap());
        }
        forget(&store, &key);
        assert!(claim(&store, &key).unwrap());
    }

    #[test]
    fn an_order_carries_the_whole_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        assert_eq!(parse(&config.to_toml().unwrap()).unwrap(), config);
    }
}
