//! The container's session keyring, which all of its processes share and which no other container inherits (keyrings(7)).

use std::{ffi::CString, io};

use super::failure::{Explain, Failure};

/// The owner of the keyring may search it, whatever session it is in (keyctl_setperm(3)): added processes find it so.
const OWNER_MAY_SEARCH: u32 = 0x0008_0000;
/// In a user namespace its owner may be another to those who look.
const ALL_MAY_SEARCH: u32 = 0x0000_0008;

/// Makes the keyring that container `id` is known by, and makes it this process's.
pub(super) fn make(id: &str, in_user_namespace: bool) -> Result<(), Failure> {
    let keyring = join(id)?;
    let more = if in_user_namespace {
        ALL_MAY_SEARCH
    } else {
        OWNER_MAY_SEARCH
    };
    permissions(keyring)
        .and_then(|now| keyctl(libc::KEYCTL_SETPERM, [keyring, (now | more).into(), 0]))
        .map(drop)
        .guest(|| "let the session keyring be searched".into())
}

/// Makes the keyring of container `id` this process's; answers its serial number.
pub(super) fn join(id: &str) -> Result<libc::c_long, Failure> {
    let name = CString::new(format!("_ses.{id}"))
        .map_err(|_| Failure::request("the container's id contains a NUL byte"))?;
    keyctl(
        libc::KEYCTL_JOIN_SESSION_KEYRING,
        [name.as_ptr() as libc::c_long, 0, 0],
    )
    .guest(|| format!("join the session keyring {name:?}"))
}

/// From its description: type;uid;gid;permissions;name (keyctl_describe(3)).
fn permissions(keyring: libc::c_long) -> io::Result<u32> {
    let mut description = [0_u8; 512];
    let place = description.as_mut_ptr() as libc::c_long;
    let room = description.len() as libc::c_long;
    keyctl(libc::KEYCTL_DESCRIBE, [keyring, place, room])?;
    let text = String::from_utf8_lossy(&description);
    let field = text.split(';').nth(3);
    field
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or_else(|| io::Error::other("the kernel describes it in no known way"))
}

fn keyctl(operation: u32, [a, b, c]: [libc::c_long; 3]) -> io::Result<libc::c_long> {
    // SAFETY: pointers among the arguments are of live strings and buffers, whose lengths go with them.
    let answer = unsafe { libc::syscall(libc::SYS_keyctl, libc::c_long::from(operation), a, b, c) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(answer)
}
