//! The pod's VM, started before anybody asks for it: containerd takes a while from the answer of
//! `start` to its first `Create`, and everything that a VM needs is known by then. It is an offer
//! only: `Create` takes it if it is what it would have started itself, and what goes wrong here
//! before there is a VM is left for `Create` to find.

use std::{
    env,
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::{AsRawFd, FromRawFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use protobuf::{Message, well_known_types::any::Any};
use serde_json::Value;
use tokio::{task::JoinHandle, time::sleep};

use crate::{
    config::{CONFIG, Config},
    fault::Fault,
    launch::{Launched, launch},
    options::Options,
    pod::Pod,
    spec::{self, Plan},
};

/// For the first container to be created; then the VM goes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes of runtime options at most.
const OPTIONS: u64 = 1 << 20;
/// Prefix of the shares of a pod's first container.
const FIRST: &str = "c0";

/// What the first container is made of, read ahead, and its VM on the way.
pub(crate) struct Ahead {
    bundle: PathBuf,
    options: Options,
    pub(crate) config: Config,
    pub(crate) spec: Value,
    pub(crate) plan: Plan,
    pub(crate) vm: JoinHandle<Result<Launched, Fault>>,
}

impl Ahead {
    /// Whether a container in `bundle` with these options would be this one.
    pub(crate) fn is(&self, bundle: &Path, options: &Options) -> bool {
        self.bundle == bundle && self.options == *options
    }

    /// Ends the VM. Nothing of it is left when this returns.
    pub(crate) async fn cancel(self) {
        if let Ok(Ok(launched)) = self.vm.await {
            launched.vm.stop().await;
        }
    }
}

impl Pod {
    /// Starts the VM of the container whose bundle is the working directory, if its runtime options
    /// are known.
    pub fn start_ahead(self: &Arc<Self>, options: Option<Options>) {
        let Some(ahead) = options.and_then(|options| self.read_ahead(options)) else {
            return;
        };
        *self.ahead() = Some(ahead);
        let pod = self.clone();
        tokio::spawn(async move {
            sleep(PATIENCE).await;
            let ahead = pod.ahead().take();
            if let Some(ahead) = ahead {
                log::info!("no container within {PATIENCE:?}: the microVM started ahead goes");
                ahead.cancel().await;
            }
        });
    }

    fn read_ahead(self: &Arc<Self>, options: Options) -> Option<Ahead> {
        let bundle = env::current_dir().ok()?;
        let config = Config::load(Path::new(CONFIG), &options).ok()?;
        let mut spec = spec::read(&bundle).ok()?;
        let plan = spec::rewrite(&mut spec, &bundle, &self.identity.id, FIRST, None).ok()?;
        let timeline = self.timeline();
        let setup = self.setup(config.clone(), &plan, &timeline).ok()?;
        let pod = self.clone();
        self.note_start(&setup);
        let vm = tokio::spawn(async move {
            let launched = launch(&setup).await?;
            // Should the shim be killed before anybody asks for a container.
            pod.note(&launched.vm);
            Ok(launched)
        });
        Some(Ahead {
            bundle,
            options,
            config,
            spec,
            plan,
            vm,
        })
    }
}

/// What containerd writes to stdin; nothing if that is a terminal.
pub fn read_stdin() -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // SAFETY: isatty(3) takes a number.
    if unsafe { libc::isatty(0) } == 0 {
        io::stdin().take(OPTIONS).read_to_end(&mut bytes)?;
    }
    Ok(bytes)
}

/// In `serve`: the options that `start` passed on; none if they are of a kind that we do not know.
/// Stdout is /dev/null from then on.
pub fn take_options() -> Option<Options> {
    // SAFETY: whatever it is, 1 is open: `start` saw to that. A duplicate of it is ours.
    let passed = unsafe { libc::fcntl(1, libc::F_DUPFD_CLOEXEC, 3) };
    let null = File::options().write(true).open("/dev/null").ok()?;
    // SAFETY: both descriptors are open; the standard library allows 1 to be replaced.
    unsafe { libc::dup2(null.as_raw_fd(), 1) };
    if passed < 0 {
        return None;
    }
    // SAFETY: the kernel just made this descriptor for us.
    let passed = unsafe { File::from_raw_fd(passed) };
    // Of a shim run by hand it may be anything, also something that never ends.
    if !passed.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    passed.take(OPTIONS).read_to_end(&mut bytes).ok()?;
    decode(&bytes)
}

pub(crate) fn decode(bytes: &[u8]) -> Option<Options> {
    let any = Any::parse_from_bytes(bytes).ok()?;
    Options::decode(Some(&any)).ok()
}

/// A file without a name that nobody has to write to or wait for.
pub(crate) fn in_memory(bytes: &[u8]) -> io::Result<File> {
    // SAFETY: the name ends in NUL.
    let fd = unsafe { libc::memfd_create(c"husk".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    let mut file = unsafe { File::from_raw_fd(fd) };
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_known_or_not() {
        assert_eq!(decode(b""), Some(Options::default()));
        let any = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x1a\x04a = ".to_vec(),
            ..Any::default()
        };
        let known = decode(&any.write_to_bytes().unwrap()).unwrap();
        assert_eq!(known.config_body, "a = ");
        let other = Any {
            type_url: "kata.Options".into(),
            value: b"default".to_vec(),
            ..Any::default()
        };
        assert_eq!(decode(&other.write_to_bytes().unwrap()), None);
    }
}
