//! A terminal for the program: opened in the container's own devpts, its master given to the agent.
//!
//! Called inside the container's root. The image may have put anything at these paths, so what is
//! opened must prove to be a devpts.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstatfs, mknodat, open};
use rustix::io::Errno;
use rustix::process::ioctl_tiocsctty;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::termios::{Winsize, tcsetwinsize};

use super::failure::{Explain, Failure};
use super::mounts;
use crate::control::Helper;
use crate::spec::process::Process;

const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Opens the terminal, makes it the controlling one and descriptors 0, 1 and 2. Init's is /dev/console, too.
pub(super) fn open_terminal(
    helper: &mut Helper,
    process: &Process,
    console: bool,
) -> Result<(), Failure> {
    let at = || "process.terminal: open /dev/ptmx".to_string();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = open("/dev/ptmx", flags, Mode::empty()).request(at)?;
    if fstatfs(&master).request(at)?.f_type as i64 != DEVPTS_SUPER_MAGIC {
        return Err(Failure::request(
            "process.terminal: /dev/ptmx of the container is not in a devpts",
        ));
    }
    unlockpt(&master).request(at)?;
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, peer).request(at)?;
    if let Some(size) = process.console_size {
        let size = Winsize {
            ws_row: size.height,
            ws_col: size.width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&master, size).request(|| "process.consoleSize".into())?;
    }
    if console {
        mount_console(slave.as_fd()).request(|| "process.terminal: mount /dev/console".into())?;
    }
    helper.hand_over_terminal(master.as_fd())?;
    let put = |result: rustix::io::Result<()>| {
        result.guest(|| "process.terminal: descriptors 0, 1, 2".into())
    };
    put(dup2_stdin(&slave))?;
    put(dup2_stdout(&slave))?;
    put(dup2_stderr(&slave))?;
    ioctl_tiocsctty(&slave).guest(|| "process.terminal: make it the controlling terminal".into())
}

fn mount_console(slave: std::os::fd::BorrowedFd) -> io::Result<()> {
    match mknodat(
        CWD,
        "/dev/console",
        FileType::RegularFile,
        Mode::from_raw_mode(0o666),
        0,
    ) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let target = open(
        "/dev/console",
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    mounts::attach(mounts::clone_of(slave, false)?.as_fd(), target.as_fd())
}
