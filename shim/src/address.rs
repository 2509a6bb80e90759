//! The shim's ttrpc socket: where it lies, and who gets to listen on it. Owned by `start`; the
//! socket's file is removed by `serve` at its end, or by `delete`.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Where containerd's shims have their sockets: short, as `sun_path` has 108 bytes.
pub const SOCKETS: &str = "/run/containerd/s";

#[derive(Debug, Error)]
#[error("{call} {path}: {cause}")]
pub struct AddressError {
    call: &'static str,
    path: PathBuf,
    cause: io::Error,
}

/// What `bind` found.
#[derive(Debug)]
pub enum Bound {
    /// Nobody had it: we listen now.
    Ours(UnixListener),
    /// A shim of the same group answers there.
    Running,
}

/// The socket of one group of containers, the same in every call for it.
pub fn socket_path(sockets: &Path, containerd: &str, namespace: &str, group: &str) -> PathBuf {
    let name = Path::new(containerd).join(namespace).join(group);
    let digest = hmac_sha256::Hash::hash(name.as_os_str().as_encoded_bytes());
    let mut hex = String::with_capacity(64);
    for byte in digest {
        for nibble in [byte >> 4, byte & 15] {
            hex.push(char::from_digit(nibble.into(), 16).unwrap_or('0'));
        }
    }
    sockets.join(hex)
}

/// Listens on `path`, mode 0600. A socket that nobody answers on is a dead shim's and is replaced.
pub fn bind(path: &Path) -> Result<Bound, AddressError> {
    let failed = |call, cause| AddressError {
        call,
        path: path.to_owned(),
        cause,
    };
    // Without the lock, which all starts on this host share: a shim that hangs would keep it.
    if UnixStream::connect(path).is_ok() {
        return Ok(Bound::Running);
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(directory)
        .map_err(|e| failed("create the directory of", e))?;
    // Looking at a dead socket and replacing it are one step: else the second of two starts removes
    // the first one's new socket. The directory is what is locked, so nothing is left behind.
    let lock = lock(directory).map_err(|e| failed("lock the directory of", e))?;
    let bound = match bind_private(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            if UnixStream::connect(path).is_ok() {
                return Ok(Bound::Running);
            }
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove the dead socket", e));
                }
                _ => bind_private(path),
            }
        }
        bound => bound,
    };
    drop(lock);
    Ok(Bound::Ours(bound.map_err(|e| failed("bind", e))?))
}

/// Locks a directory until the file is closed.
fn lock(directory: &Path) -> io::Result<File> {
    let directory = File::open(directory)?;
    loop {
        // SAFETY: flock(2) takes numbers only.
        if unsafe { libc::flock(directory.as_raw_fd(), libc::LOCK_EX) } == 0 {
            return Ok(directory);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn bind_private(path: &Path) -> io::Result<UnixListener> {
    // SAFETY: umask(2) has no memory effects; `start` has one thread, so nobody else creates files
    // while it is changed.
    let before = unsafe { libc::umask(0o177) };
    let listener = UnixListener::bind(path);
    // SAFETY: as above.
    unsafe { libc::umask(before) };
    listener
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::PermissionsExt;

    use std::sync::{PoisonError, RwLock};

    use super::*;

    /// Binding changes what others of this process create: to be held for writing by who binds, and for reading
    /// by who looks at modes.
    pub(crate) static UMASK: RwLock<()> = RwLock::new(());

    #[test]
    fn is_the_sha256_of_address_namespace_and_group() {
        let path = socket_path(
            Path::new(SOCKETS),
            "/run/containerd/containerd.sock",
            "default",
            "x",
        );
        // printf %s /run/containerd/containerd.sock/default/x | sha256sum
        assert_eq!(
            path.to_str().unwrap(),
            "/run/containerd/s/5e250b13f984a15f73216d143af1bf3c64171aa56c781ba9d4040c75b2c1eee2"
        );
        assert!(path.as_os_str().len() <= 106);
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_living_one_returned() {
        let _alone = UMASK.write().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/socket");

        let Bound::Ours(first) = bind(&path).unwrap() else {
            panic!("nobody listens yet");
        };
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(bind(&path).unwrap(), Bound::Running));

        drop(first);
        assert!(matches!(bind(&path).unwrap(), Bound::Ours(_)));
    }

    #[test]
    fn of_many_starts_at_once_one_gets_a_dead_socket() {
        let _alone = UMASK.write().unwrap_or_else(PoisonError::into_inner);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for _ in 0..50 {
            drop(UnixListener::bind(&path).unwrap());
            // A child that another test is just making may have a copy for a moment.
            while UnixStream::connect(&path).is_ok() {
                std::thread::yield_now();
            }
            let bound: Vec<Bound> = std::thread::scope(|scope| {
                let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| bind(&path))).collect();
                starts
                    .into_iter()
                    .map(|start| start.join().unwrap().unwrap())
                    .collect()
            });
            let ours = |bound: &&Bound| matches!(bound, Bound::Ours(_));
            assert_eq!(bound.iter().filter(ours).count(), 1);
            UnixStream::connect(&path).unwrap();
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
