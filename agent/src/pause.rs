//! The first process of a pod whose client has none for it (containerd's sandbox API): it holds the namespaces that the
//! containers share, buries who has no parent there, and ends when it is told to. The program is the agent's by another name,
//! so it costs the guest no memory but its stack.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::Path;

/// The name by which the program knows what it is: its path in its root.
pub const NAME: &CStr = c"/pause";

/// Makes the root file system that [`husk_proto::PAUSE_ROOT`] names, with `program` in it.
pub fn set_up(root: &Path, program: &Path) -> io::Result<()> {
    fs::create_dir_all(root)?;
    let link = root.join(husk_proto::PAUSE.trim_start_matches('/'));
    match fs::hard_link(program, link) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Waits for SIGTERM or SIGINT, with which it ends well. Returns the exit status.
pub fn run() -> i32 {
    let mut wanted = empty();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCHLD] {
        // SAFETY: a set that was initialised, and signals that exist.
        unsafe { libc::sigaddset(&raw mut wanted, signal) };
    }
    // SAFETY: a valid set; the old one is not asked for. Blocked, they are waited for below, and PID 1 gets them too.
    unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const wanted, std::ptr::null_mut()) };
    loop {
        // SAFETY: a valid set; no details are asked for.
        match unsafe { libc::sigwaitinfo(&raw const wanted, std::ptr::null_mut()) } {
            libc::SIGTERM | libc::SIGINT => return 0,
            // Also when interrupted: then there is nobody to bury, which costs nothing.
            _ => bury(),
        }
    }
}

fn empty() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data, and sigemptyset(3) initialises it.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        set
    }
}

fn bury() {
    // SAFETY: no status is asked for.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_name_is_its_path() {
        assert_eq!(NAME.to_str().unwrap(), husk_proto::PAUSE);
    }

    #[test]
    fn its_root_is_made_once() {
        let root = std::env::temp_dir().join(format!("husk-pause-{}", std::process::id()));
        let program = root.join("program");
        fs::create_dir_all(&root).unwrap();
        fs::write(&program, "words").unwrap();
        for _ in 0..2 {
            set_up(&root.join("root"), &program).unwrap();
            assert_eq!(fs::read(root.join("root/pause")).unwrap(), b"words");
        }
        fs::remove_dir_all(&root).unwrap();
    }
}
