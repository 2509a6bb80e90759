//! Limits, capabilities, groups, user and directory of the program, in runc's order.
//!
//! Each step may need a privilege that a later one gives up; the order is the point of this file.
//! Called inside the container's root.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::BorrowedFd;

use rustix::fs::{Gid, Mode, OFlags, Uid, fchown, fstat, open};
use rustix::process::{Pid, Rlimit, chdir, getrlimit, prlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, set_capabilities, set_keep_capabilities, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::failure::{Explain, Failure};
use crate::spec::process::{Process, bits};
use crate::sys;

/// A larger /etc/passwd is not searched to its end.
const PASSWD_LIMIT: u64 = 1 << 20;

/// Resource limits and no_new_privs, which need no particular user.
pub(super) fn limit(process: &Process) -> Result<(), Failure> {
    for limit in &process.rlimits {
        let Some(resource) = limit.resource() else {
            return Err(Failure::request(format!(
                "process.rlimits: {:?} is no limit of Linux",
                limit.kind
            )));
        };
        let value = |number: u64| (number != u64::MAX).then_some(number);
        let new = Rlimit {
            current: value(limit.soft),
            maximum: value(limit.hard),
        };
        prlimit(None::<Pid>, resource, new).request(|| {
            format!(
                "process.rlimits: set {} to {}:{}",
                limit.kind, limit.soft, limit.hard
            )
        })?;
    }
    if process.no_new_privileges == Some(true) {
        set_no_new_privs(true).guest(|| "process.noNewPrivileges".into())?;
    }
    Ok(())
}

/// Raises the hard limits that the process is to have above those of this one: in a user namespace nobody may.
pub(super) fn raise_limits(process: &Process) -> Result<(), Failure> {
    for limit in &process.rlimits {
        let Some(resource) = limit.resource() else {
            continue; // Named by `limit`.
        };
        let now = getrlimit(resource);
        let wanted = (limit.hard != u64::MAX).then_some(limit.hard);
        let above = now
            .maximum
            .is_some_and(|now| wanted.is_none_or(|hard| hard > now));
        if above {
            let new = Rlimit {
                current: now.current,
                maximum: wanted,
            };
            prlimit(None::<Pid>, resource, new)
                .request(|| format!("process.rlimits: raise {} to {}", limit.kind, limit.hard))?;
        }
    }
    Ok(())
}

/// Becomes the user with its capabilities, in its directory; the environment for the program.
pub(super) fn become_user(process: &Process) -> Result<Vec<String>, Failure> {
    let entered = enter(&process.cwd, true)?;
    let wanted = process.capabilities.clone().unwrap_or_default();
    bound(bits(&wanted.bounding))?;
    set_keep_capabilities(true).guest(|| "keep capabilities".into())?;
    own_streams(process.user.uid)?;
    let user = &process.user;
    let groups: Vec<Gid> = user
        .additional_gids
        .iter()
        .map(|&gid| Gid::from_raw(gid))
        .collect();
    set_thread_groups(&groups).request(|| {
        format!(
            "process.user.additionalGids: set {:?}",
            user.additional_gids
        )
    })?;
    let gid = Gid::from_raw(user.gid);
    set_thread_res_gid(gid, gid, gid).request(|| format!("process.user.gid: set {}", user.gid))?;
    let uid = Uid::from_raw(user.uid);
    set_thread_res_uid(uid, uid, uid).request(|| format!("process.user.uid: set {}", user.uid))?;
    if !entered {
        enter(&process.cwd, false)?;
    }
    set_keep_capabilities(false).guest(|| "stop keeping capabilities".into())?;
    take(
        &CapabilitySets {
            effective: bits(&wanted.effective),
            permitted: bits(&wanted.permitted),
            inheritable: bits(&wanted.inheritable),
        },
        bits(&wanted.ambient),
    )?;
    Ok(environment(process))
}

/// As root first; a directory that only the user may enter (on a share that does not trust root) is
/// left for later: false.
fn enter(cwd: &str, as_root: bool) -> Result<bool, Failure> {
    match chdir(cwd).map_err(io::Error::from) {
        Ok(()) => Ok(true),
        Err(error) if as_root && error.kind() == io::ErrorKind::PermissionDenied => Ok(false),
        Err(error) => {
            Err(error).request(|| format!("chdir to cwd ({cwd:?}) set in config.json failed"))
        }
    }
}

fn bound(keep: CapabilitySet) -> Result<(), Failure> {
    for number in 0..64 {
        let wanted = 1u64
            .checked_shl(number)
            .is_some_and(|bit| keep.bits() & bit != 0);
        if wanted {
            continue;
        }
        match sys::drop_bounding(number) {
            // Past the last that this kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            other => other
                .guest(|| format!("process.capabilities.bounding: drop capability {number}"))?,
        }
    }
    Ok(())
}

fn take(sets: &CapabilitySets, ambient: CapabilitySet) -> Result<(), Failure> {
    set_capabilities(None, *sets).request(|| "process.capabilities: set".into())?;
    clear_ambient_capability_set().guest(|| "process.capabilities.ambient: clear".into())?;
    for capability in ambient.iter() {
        match configure_capability_in_ambient_set(capability, true).map_err(io::Error::from) {
            // Not inheritable and permitted: runc goes on, and the agent has put it into the log.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
            other => {
                other.request(|| format!("process.capabilities.ambient: raise {capability:?}"))?
            }
        }
    }
    Ok(())
}

/// The user must be able to open its own /dev/stdout again. /dev/null belongs to everybody.
pub(super) fn own_streams(uid: u32) -> Result<(), Failure> {
    let null = rustix::fs::stat("/dev/null").map(|null| null.st_rdev).ok();
    for number in 0..3 {
        // SAFETY: descriptors 0, 1 and 2 are open in every process that `launch` starts.
        let stream = unsafe { BorrowedFd::borrow_raw(number) };
        let found = fstat(stream).guest(|| format!("look at descriptor {number}"))?;
        let is_device = found.st_mode & libc::S_IFMT == libc::S_IFCHR;
        if found.st_uid == uid || (is_device && Some(found.st_rdev) == null) {
            continue;
        }
        match fchown(stream, Some(Uid::from_raw(uid)), None).map_err(io::Error::from) {
            // A pipe cannot refuse; what else is there may, and runc lets it.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINVAL | libc::EPERM | libc::EROFS)
                ) => {}
            other => other.guest(|| format!("give descriptor {number} to user {uid}"))?,
        }
    }
    Ok(())
}

/// `process.env`, each name once, and HOME from the image when it does not say.
fn environment(process: &Process) -> Vec<String> {
    let mut env = last_of_each(&process.env);
    let set = env
        .iter()
        .any(|entry| entry.starts_with("HOME=") && entry.len() > "HOME=".len());
    if !set {
        env.retain(|entry| !entry.starts_with("HOME="));
        env.push(format!(
            "HOME={}",
            home(process.user.uid).unwrap_or_else(|| "/".into())
        ));
    }
    env
}

/// Of several entries with one name the last, as with runc from 1.2 on: programs read the first they find, and clients
/// append theirs to the image's.
fn last_of_each(env: &[String]) -> Vec<String> {
    let name = |entry: &str| {
        entry
            .split_once('=')
            .map_or(entry, |(name, _)| name)
            .to_owned()
    };
    let mut seen = HashSet::new();
    let mut kept: Vec<_> = env
        .iter()
        .rev()
        .filter(|entry| seen.insert(name(entry)))
        .cloned()
        .collect();
    kept.reverse();
    kept
}

fn home(uid: u32) -> Option<String> {
    // An image may have anything there: a device or FIFO must not hang the start.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(open("/etc/passwd", flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = Vec::new();
    file.take(PASSWD_LIMIT).read_to_end(&mut text).ok()?;
    home_in(&String::from_utf8_lossy(&text), uid)
}

/// name:password:uid:gid:gecos:home:shell (passwd(5)).
fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        (fields.nth(2)?.parse() == Ok(uid)).then(|| fields.nth(2).map(String::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_a_name_counts() {
        let env = ["A=1", "B=2", "A=3", "AB=4", "B=", "A=5=6"].map(String::from);
        assert_eq!(last_of_each(&env), ["AB=4", "B=", "A=5=6"]);
    }

    #[test]
    fn home_is_the_images_unless_the_last_word_is_another() {
        let home = |env: &[&str]| {
            let process = Process {
                env: env.iter().map(|&entry| entry.into()).collect(),
                user: crate::spec::process::User {
                    uid: u32::MAX - 1,
                    ..Default::default()
                },
                ..Process::default()
            };
            environment(&process)
        };
        assert_eq!(home(&["HOME=/a", "HOME=/b"]), ["HOME=/b"]);
        assert_eq!(home(&["HOME=/a", "X=y", "HOME="]), ["X=y", "HOME=/"]);
        assert_eq!(home(&[]), ["HOME=/"]);
    }

    #[test]
    fn the_home_of_a_user() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken:x\nu:x:1000:1000::/home/u:/bin/sh\n";
        assert_eq!(home_in(passwd, 0).unwrap(), "/root");
        assert_eq!(home_in(passwd, 1000).unwrap(), "/home/u");
        assert_eq!(home_in(passwd, 5), None);
    }
}
