//! Every TCP connection that is made within a network namespace comes to one socket of ours, whatever its address and port:
//! a BPF program that the kernel asks who listens (Documentation/bpf/prog_sk_lookup.rst), and a map with that socket.
//!
//! Descriptors hold all of it: when they are closed, also by the end of this process, the namespace is as it was.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// What is to be accepted by whoever carries it on, and what brings it there.
#[derive(Debug)]
pub(super) struct Steered {
    /// Listens, and does not block.
    pub(super) listener: OwnedFd,
    /// The program, attached to the namespace.
    pub(super) link: OwnedFd,
}

/// What has failed, and why.
pub(super) type Refused = (&'static str, io::Error);

/// In this thread's network namespace, which is also `namespace`.
pub(super) fn begin(namespace: &OwnedFd) -> Result<Steered, Refused> {
    let listener = listen()?;
    let map = make_map().map_err(|e| ("make a map of sockets (BPF_MAP_TYPE_SOCKMAP)", e))?;
    put(&map, &listener).map_err(|e| ("put a socket into a map (BPF_MAP_UPDATE_ELEM)", e))?;
    let program = load(&program(&map)).map_err(|e| ("load a BPF program (SK_LOOKUP)", e))?;
    let link = attach(&program, namespace);
    let link = link.map_err(|e| ("attach it to the network namespace (BPF_LINK_CREATE)", e))?;
    Ok(Steered { listener, link })
}

/// Connections that wait to be accepted; beyond, the kernel lets those wait who ask.
const BACKLOG: libc::c_int = 128;
/// Seconds of silence after which the kernel asks whether the other side is still there.
const KEEPALIVE: libc::c_int = 60;

/// At a port of the kernel's choice, which nobody has to know. Of both families, where there are both.
fn listen() -> Result<OwnedFd, Refused> {
    let listener = match socket(libc::AF_INET6) {
        Err(e) if e.raw_os_error() == Some(libc::EAFNOSUPPORT) => socket(libc::AF_INET),
        made => made.and_then(|made| {
            let both: libc::c_int = 0;
            set(&made, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, both)?;
            Ok(made)
        }),
    };
    let listener = listener.map_err(|e| ("make a socket", e))?;
    // What is accepted inherits it: a client that is gone without a word does not keep its place.
    set(&listener, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)
        .and_then(|()| set(&listener, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE))
        .map_err(|e| ("set a socket's options", e))?;
    // What has no port yet is given one.
    // SAFETY: listen(2) takes numbers only.
    match unsafe { libc::listen(listener.as_raw_fd(), BACKLOG) } {
        0 => Ok(listener),
        _ => Err(("listen", io::Error::last_os_error())),
    }
}

fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket(2) takes numbers only.
    owned(unsafe { libc::socket(family, kind, 0) }.into())
}

fn set(fd: &OwnedFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is as long as is said, and outlives the call.
    let set = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            length,
        )
    };
    match set {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

// Instruction codes: class, size or operation, and whether the operand is immediate (K) or a register (X).
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const STORE_WORD_K: u8 = 0x62; // BPF_ST | BPF_MEM | BPF_W
const LOAD_IMMEDIATE: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW, two instructions long
const MOVE_X: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const MOVE_K: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const ADD_K: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const IF_EQUAL_K: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const UNLESS_EQUAL_K: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const CALL: u8 = 0x85; // BPF_JMP | BPF_CALL
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

const RESULT: u8 = 0;
/// Arguments of a call, which takes them away, and of the program.
const FIRST: u8 = 1;
const SECOND: u8 = 2;
const THIRD: u8 = 3;
/// Kept over calls.
const CONTEXT: u8 = 6;
const SOCKET: u8 = 7;
const FRAME: u8 = 10;

/// `BPF_PSEUDO_MAP_FD`, in the place of a register: the immediate is a map's descriptor.
const IS_A_MAP: u8 = 1;
/// Of `struct bpf_sk_lookup`.
const PROTOCOL: i16 = 12;
/// `BPF_FUNC_*`.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
/// Goes on with the socket that was assigned, or with whoever listens.
const SK_PASS: i32 = 1;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: (from << 4) | to,
        offset,
        immediate,
    }
}

/// The only key of the map.
static KEY: i32 = 0;

/// All of TCP to the socket in `map`, the rest as ever. Jumps count from the instruction behind them.
fn program(map: &OwnedFd) -> [Instruction; 19] {
    [
        instruction(MOVE_X, CONTEXT, FIRST, 0, 0),
        instruction(LOAD_WORD, SECOND, CONTEXT, PROTOCOL, 0),
        instruction(UNLESS_EQUAL_K, SECOND, 0, 14, libc::IPPROTO_TCP),
        instruction(STORE_WORD_K, FRAME, 0, -4, KEY),
        instruction(LOAD_IMMEDIATE, FIRST, IS_A_MAP, 0, map.as_raw_fd()),
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE_X, SECOND, FRAME, 0, 0),
        instruction(ADD_K, SECOND, 0, 0, -4),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        instruction(IF_EQUAL_K, RESULT, 0, 7, 0),
        instruction(MOVE_X, SOCKET, RESULT, 0, 0),
        instruction(MOVE_X, FIRST, CONTEXT, 0, 0),
        instruction(MOVE_X, SECOND, SOCKET, 0, 0),
        instruction(MOVE_K, THIRD, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SK_ASSIGN),
        instruction(MOVE_X, FIRST, SOCKET, 0, 0),
        instruction(CALL, 0, 0, 0, SK_RELEASE),
        instruction(MOVE_K, RESULT, 0, 0, SK_PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// How often a program is offered: the kernel does not go on with its check when a signal comes (EAGAIN).
const ATTEMPTS: u32 = 10;

/// For one socket.
fn make_map() -> io::Result<OwnedFd> {
    const BPF_MAP_CREATE: libc::c_int = 0;
    const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
    #[repr(C)]
    struct Create {
        kind: u32,
        key_bytes: u32,
        value_bytes: u32,
        entries: u32,
    }
    let create = Create {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_bytes: size_of_val(&KEY) as u32,
        value_bytes: size_of::<u64>() as u32,
        entries: 1,
    };
    // SAFETY: this is the head of a bpf_attr for this command, and has no pointers.
    owned(unsafe { bpf(BPF_MAP_CREATE, &create) })
}

fn put(map: &OwnedFd, socket: &OwnedFd) -> io::Result<()> {
    const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
    #[repr(C)]
    struct Update {
        map: u32,
        unused: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let value = u64::from(number(socket));
    let update = Update {
        map: number(map),
        unused: 0,
        key: (&raw const KEY) as u64,
        value: (&raw const value) as u64,
        flags: 0,
    };
    // SAFETY: this is the head of a bpf_attr for this command; key and value are as long as the map has them, and
    // outlive the call.
    match unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
    const LICENSE: &CStr = c"Apache-2.0";
    /// As bpftool(8) shows it.
    const NAME: [u8; 16] = *b"husk_forward\0\0\0\0";
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_bytes: u32,
        log: u64,
        kernel: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attach_type: u32,
    }
    let load = Load {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: 0,
        log_bytes: 0,
        log: 0,
        kernel: 0,
        flags: 0,
        name: NAME,
        interface: 0,
        attach_type: BPF_SK_LOOKUP,
    };
    let mut left = ATTEMPTS;
    loop {
        // SAFETY: this is the head of a bpf_attr for this command; program and license outlive the call.
        let loaded = owned(unsafe { bpf(BPF_PROG_LOAD, &load) });
        left = left.saturating_sub(1);
        match loaded {
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && left > 0 => {}
            loaded => return loaded,
        }
    }
}

/// An attach type.
const BPF_SK_LOOKUP: u32 = 36;

fn attach(program: &OwnedFd, namespace: &OwnedFd) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    #[repr(C)]
    struct Create {
        program: u32,
        target: u32,
        attach_type: u32,
        flags: u32,
    }
    let create = Create {
        program: number(program),
        target: number(namespace),
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: this is the head of a bpf_attr for this command, and has no pointers.
    owned(unsafe { bpf(BPF_LINK_CREATE, &create) })
}

/// # Safety
/// `attributes` is the head of the `union bpf_attr` that the command takes, and what it points to is as the command
/// takes it. The kernel takes the rest as zeroes.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> libc::c_long {
    let attributes: *const T = attributes;
    // SAFETY: by the contract above.
    unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) }
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// The descriptor that a call has returned, if it has.
fn owned(returned: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(returned) {
        // SAFETY: it is new, and nobody else's.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
