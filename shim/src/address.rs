//! The shim's ttrpc socket: where it lies, and who gets to listen on it. Owned by `start`; the
//! socket's file is removed by `serve` at its end, or by `delete`.

use std::{
    fs, io,
    os::unix::{
        fs::DirBuilderExt,
        net::{UnixListener, UnixStream},
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
    if let Some(directory) = path.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(directory)
            .map_err(|e| failed("create the directory of", e))?;
    }
    // Twice: between our look at a dead socket and the second bind another `start` may win.
    for _ in 0..2 {
        match bind_private(path) {
            Ok(listener) => return Ok(Bound::Ours(listener)),
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
            Err(e) => return Err(failed("bind", e)),
        }
        if UnixStream::connect(path).is_ok() {
            return Ok(Bound::Running);
        }
        if let Err(e) = fs::remove_file(path) {
            if e.kind() != io::ErrorKind::NotFound {
                return Err(failed("remove the dead socket", e));
            }
        }
    }
    match UnixStream::connect(path) {
        Ok(_) => Ok(Bound::Running),
        Err(e) => Err(failed("connect to", e)),
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
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

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
}
