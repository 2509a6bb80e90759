//! In the VMM's place, with a guest's will: tries one thing that the jail must refuse, and tells what came of it.
//!
//! ```text
//! husk-jailbreak ATTEMPT OUTSIDER     as an ordinary process of root's; the answer goes to stdout
//! husk-jailbreak                      started as the VMM is: LAYER ROLE ATTEMPT OUTSIDER is read from the machine's
//!                                     socket, where the answer goes, too
//! ```
//!
//! LAYER is `jailed`, or `unfiltered` for the jail without what seccomp and single threads give up. OUTSIDER is the pid of a
//! process that is none of the pod's. The answer is `done` or `refused: CAUSE`; who is killed gives none.

use std::{
    ffi::CStr,
    fs::{self, File},
    io::{self, BufRead, BufReader, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    thread,
};

use anyhow::{Context, Result, bail};
use husk_shim::mount;
use husk_vmm::{
    fs::FileServer,
    jail::{self, Role},
};
use libc::c_long;

/// What the test has made ready: a directory to share, an abstract socket, a TCP port, a socket's path.
const SHARE: &str = "/var/tmp/husk-jail/share";
const ABSTRACT: &[u8] = b"\0husk-jail";
const PORT: u16 = 4711;
const SOCKET: &CStr = c"/var/tmp/husk-jail/socket";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [attempt, outsider] = args.as_slice() {
        // What a VMM without a jail would hold on to.
        let _procfs = File::open("/proc")?;
        let share = File::open(SHARE)?.into();
        println!("{}", answer(attempt, outsider.parse()?, &share));
        return Ok(());
    }
    // SAFETY: inherited for this purpose, and nobody else's here.
    let mut machine = unsafe { UnixStream::from_raw_fd(husk_proto::MACHINE_FD) };
    let mut line = String::new();
    BufReader::new(&machine).read_line(&mut line)?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let [layer, role, attempt, outsider] = words.as_slice() else {
        bail!("LAYER ROLE ATTEMPT OUTSIDER, not {line:?}");
    };
    let role = match *role {
        "service" => Role::Service,
        "vcpu" => Role::Vcpu,
        "vsock" => Role::Vsock,
        "net" => Role::Net,
        "files" => Role::Files,
        _ => bail!("role {role}"),
    };
    let outsider = outsider.parse()?;

    let outside = jail::prepare()?;
    let _files = FileServer::new()?;
    let share = detached(SHARE).context("clone the share")?;
    match *layer {
        "jailed" => outside.enter()?,
        "unfiltered" => outside.leave_host()?,
        _ => bail!("layer {layer}"),
    }
    let attempt = (*attempt).to_owned();
    let answer = match role {
        Role::Service => answer(&attempt, outsider, &share),
        _ => {
            let tries = move || {
                if role == Role::Files {
                    let _ = husk_vmm::fs::worker_init();
                }
                answer(&attempt, outsider, &share)
            };
            let tried = jail::spawn(thread::Builder::new(), role, tries)?;
            tried.join().unwrap_or_else(|_| "panicked".to_owned())
        }
    };
    writeln!(machine, "{answer}")?;
    Ok(())
}

fn answer(attempt: &str, outsider: usize, share: &OwnedFd) -> String {
    match tries(attempt, outsider, share.as_raw_fd() as usize) {
        Ok(_) => "done".to_owned(),
        Err(e) => format!("refused: {e}"),
    }
}

/// A directory as the shim hands it over.
fn detached(path: &str) -> io::Result<OwnedFd> {
    let tree = mount::open_tree(Path::new(path), true)?;
    mount::seal(&tree, mount::Attributes::default())?;
    Ok(tree)
}

const HERE: usize = libc::AT_FDCWD as usize;

/// A system call, with arguments as the kernel takes them.
fn call(number: c_long, args: &[usize]) -> io::Result<c_long> {
    let at = |index| args.get(index).copied().unwrap_or(0);
    // SAFETY: callers pass numbers, and addresses of live values of the shapes that the call has.
    let result = unsafe { libc::syscall(number, at(0), at(1), at(2), at(3), at(4), at(5)) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(result),
    }
}

fn open(path: &CStr, flags: i32) -> io::Result<c_long> {
    open_at(HERE, path, flags)
}

fn open_at(directory: usize, path: &CStr, flags: i32) -> io::Result<c_long> {
    let path = path.as_ptr() as usize;
    call(libc::SYS_openat, &[directory, path, flags as usize, 0o600])
}

/// A fork whose child is gone at once.
fn clone(flags: i32) -> io::Result<c_long> {
    let child = call(libc::SYS_clone, &[(flags | libc::SIGCHLD) as usize])?;
    if child == 0 {
        let _ = call(libc::SYS_exit_group, &[0]);
    }
    Ok(child)
}

fn socket(family: i32, kind: i32) -> io::Result<usize> {
    Ok(call(libc::SYS_socket, &[family as usize, kind as usize])? as usize)
}

/// An address of AF_UNIX: its bytes.
fn unix(name: &[u8]) -> Vec<u8> {
    let family = (libc::AF_UNIX as u16).to_ne_bytes();
    [&family[..], name].concat()
}

/// 127.0.0.1 and a port.
fn loopback(port: u16) -> Vec<u8> {
    let family = (libc::AF_INET as u16).to_ne_bytes();
    [&family[..], &port.to_be_bytes(), &[127, 0, 0, 1], &[0; 8]].concat()
}

fn with_address(number: c_long, socket: usize, address: &[u8]) -> io::Result<c_long> {
    call(number, &[socket, address.as_ptr() as usize, address.len()])
}

/// The first of all descriptors that leads to one of these paths.
fn by_any_descriptor(paths: &[&CStr]) -> io::Result<c_long> {
    let mut refused = io::Error::from_raw_os_error(libc::ENOENT);
    for fd in 0..64 {
        for path in paths {
            match open_at(fd, path, libc::O_RDONLY) {
                Ok(found) => return Ok(found),
                // There is no such descriptor.
                Err(e) if e.raw_os_error() == Some(libc::EBADF) => {}
                Err(e) => refused = e,
            }
        }
    }
    Err(refused)
}

#[allow(clippy::too_many_lines)] // A table.
fn tries(attempt: &str, outsider: usize, share: usize) -> io::Result<c_long> {
    let namespace = |flag: i32| call(libc::SYS_unshare, &[flag as usize]);
    let page = |protection: i32| {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
        call(
            libc::SYS_mmap,
            &[0, 4096, protection as usize, flags, usize::MAX, 0],
        )
    };
    match attempt {
        // What the file server is for; the only thing that may be done.
        "serve-files" => serve(share),

        "open-host-file" => open(c"/etc/passwd", libc::O_RDONLY),
        "make-host-file" => open(c"/var/tmp/husk-jail/made", libc::O_CREAT | libc::O_WRONLY),
        "open-proc-sys" => open(c"/proc/sys/kernel/core_pattern", libc::O_RDONLY),
        "open-sysfs" => open(c"/sys/kernel", libc::O_RDONLY),
        "open-cgroupfs" => open(c"/sys/fs/cgroup/cgroup.procs", libc::O_RDONLY),
        "open-kvm" => open(c"/dev/kvm", libc::O_RDWR),
        "proc-sys-by-descriptor" => by_any_descriptor(&[
            c"sys/kernel/core_pattern",
            c"../sys/kernel/core_pattern",
            c"../../sys/kernel/core_pattern",
            c"../../proc/sys/kernel/core_pattern",
            c"../../../../proc/sys/kernel/core_pattern",
            c"0/../../sys/kernel/core_pattern",
        ]),
        "out-of-share" => open_at(share, c"../../../../etc/passwd", libc::O_RDONLY),
        "out-of-share-by-link" => open_at(share, c"link", libc::O_RDONLY),
        "device-node" => {
            let mode = (libc::S_IFCHR | 0o600) as usize;
            let null = libc::makedev(1, 3) as usize;
            let name = c"device".as_ptr() as usize;
            call(libc::SYS_mknodat, &[share, name, mode, null])
        }
        "open-device" => open_at(share, c"null", libc::O_RDWR),
        "file-handle" => file_handle(share),
        "file-flags" => {
            let directory = open_at(share, c"a", libc::O_RDONLY)? as usize;
            let mut flags: c_long = 0;
            call(
                libc::SYS_ioctl,
                &[directory, 0x8008_6601, &raw mut flags as usize],
            )
        }

        "socket" => socket(libc::AF_INET, libc::SOCK_STREAM).map(|_| 0),
        "socket-unix" => socket(libc::AF_UNIX, libc::SOCK_STREAM).map(|_| 0),
        "socket-packet" => socket(libc::AF_PACKET, libc::SOCK_RAW).map(|_| 0),
        "connect-tcp" => {
            let socket = socket(libc::AF_INET, libc::SOCK_STREAM)?;
            with_address(libc::SYS_connect, socket, &loopback(PORT))
        }
        "bind-tcp" => {
            let socket = socket(libc::AF_INET, libc::SOCK_STREAM)?;
            with_address(libc::SYS_bind, socket, &loopback(PORT + 1))
        }
        "connect-abstract" => {
            let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
            with_address(libc::SYS_connect, socket, &unix(ABSTRACT))
        }
        "connect-path" => {
            let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
            with_address(libc::SYS_connect, socket, &unix(SOCKET.to_bytes_with_nul()))
        }

        "mount" => {
            let tmpfs = c"tmpfs".as_ptr() as usize;
            let context = call(libc::SYS_fsopen, &[tmpfs, 0])? as usize;
            call(libc::SYS_fsconfig, &[context, 6, 0, 0, 0])?;
            call(libc::SYS_fsmount, &[context, 0, 0])
        }
        "clone-mount" => detached("/").map(|_| 0),
        "chroot" => call(libc::SYS_chroot, &[c"/".as_ptr() as usize]),
        "new-mount-namespace" => namespace(libc::CLONE_NEWNS),
        "new-net-namespace" => namespace(libc::CLONE_NEWNET),
        "new-pid-namespace" => namespace(libc::CLONE_NEWPID),
        "born-in-user-namespace" => clone(libc::CLONE_NEWUSER),
        "join-namespace" => {
            let uts = open(c"/proc/1/ns/uts", libc::O_RDONLY)? as usize;
            call(libc::SYS_setns, &[uts, libc::CLONE_NEWUTS as usize])
        }

        "execve" => {
            let program = c"/bin/echo".as_ptr() as usize;
            let argv = [program, c"done".as_ptr() as usize, 0];
            call(libc::SYS_execve, &[program, argv.as_ptr() as usize, 0])
        }
        "code-without-file" => call(libc::SYS_memfd_create, &[c"x".as_ptr() as usize, 0]),
        "new-code" => page(libc::PROT_READ | libc::PROT_EXEC),
        "changed-code" => {
            let memory = page(libc::PROT_READ | libc::PROT_WRITE)? as usize;
            let protection = (libc::PROT_READ | libc::PROT_EXEC) as usize;
            call(libc::SYS_mprotect, &[memory, 4096, protection])
        }
        "fork" => clone(0),
        "ptrace-me" => call(libc::SYS_ptrace, &[libc::PTRACE_TRACEME as usize]),
        "ptrace-outsider" => {
            let seize = libc::PTRACE_SEIZE as usize;
            call(libc::SYS_ptrace, &[seize, outsider, 0, 0])
        }
        "read-outsider" => {
            let mut byte = 0_u8;
            let own = [&raw mut byte as usize, 1];
            // An address that is not mapped is no refusal: it was looked at.
            let args = [
                outsider,
                own.as_ptr() as usize,
                1,
                own.as_ptr() as usize,
                1,
                0,
            ];
            match call(libc::SYS_process_vm_readv, &args) {
                Err(e) if e.raw_os_error() == Some(libc::EFAULT) => Ok(0),
                other => other,
            }
        }
        "kill-outsider" => call(libc::SYS_kill, &[outsider, 0]),
        "kill-itself" => call(libc::SYS_kill, &[std::process::id() as usize, 0]),
        "kill-outsiders-thread" => call(libc::SYS_tgkill, &[outsider, outsider, 0]),
        "watch-outsider" => call(libc::SYS_pidfd_open, &[outsider, 0]),
        "limit-outsider" => call(libc::SYS_prlimit64, &[outsider, 0, 0, 0]),
        "raise-limit" => {
            let limit = [u64::MAX; 2];
            let core = libc::RLIMIT_CORE as usize;
            call(libc::SYS_prlimit64, &[0, core, limit.as_ptr() as usize, 0])
        }
        "another-user" => call(libc::SYS_setresuid, &[1, 1, 1]),
        "regain-capabilities" => {
            let header = [0x2008_0522_u32, 0];
            let all = [[0xffff_ffff_u32, 0xffff_ffff, 0], [0x1ff, 0x1ff, 0]];
            let args = [header.as_ptr() as usize, all.as_ptr() as usize];
            call(libc::SYS_capset, &args)
        }
        "real-time" => {
            let priority = 1_i32;
            let fifo = libc::SCHED_FIFO as usize;
            call(
                libc::SYS_sched_setscheduler,
                &[0, fifo, &raw const priority as usize],
            )
        }
        "raise-priority" => call(libc::SYS_setpriority, &[0, 0, -5_isize as usize]),

        "ioperm" => call(libc::SYS_ioperm, &[0x80, 1, 1]),
        "iopl" => call(libc::SYS_iopl, &[3]),
        "bpf" => {
            // BPF_MAP_CREATE of an array: type, size of key and value, entries.
            let map = [2_u32, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0];
            call(
                libc::SYS_bpf,
                &[0, map.as_ptr() as usize, size_of_val(&map)],
            )
        }
        "keyctl" => call(libc::SYS_keyctl, &[0, -3_isize as usize, 1]),
        "io-uring" => {
            let parameters = [0_u64; 15];
            call(libc::SYS_io_uring_setup, &[1, parameters.as_ptr() as usize])
        }
        "userfaultfd" => call(libc::SYS_userfaultfd, &[0]),
        "fanotify" => call(libc::SYS_fanotify_init, &[4, 0]),
        "set-hostname" => {
            let name = fs::read("/proc/sys/kernel/hostname").unwrap_or_default();
            let length = name.trim_ascii().len();
            call(libc::SYS_sethostname, &[name.as_ptr() as usize, length])
        }
        "set-clock" => {
            let mut now = [0_i64; 2];
            call(libc::SYS_clock_gettime, &[0, now.as_mut_ptr() as usize])?;
            call(libc::SYS_clock_settime, &[0, now.as_ptr() as usize])
        }
        "kernel-log" => {
            let mut text = [0_u8; 64];
            call(libc::SYS_syslog, &[3, text.as_mut_ptr() as usize, 64])
        }
        "accounting" => call(libc::SYS_acct, &[0]),
        "another-abi" => another_abi(),
        _ => Err(io::Error::other(format!("unknown attempt {attempt}"))),
    }
}

/// Opens, makes, gives away and moves between directories, as a guest may in its share.
fn serve(share: usize) -> io::Result<c_long> {
    let name = |name: &'static CStr| name.as_ptr() as usize;
    let file = open_at(share, c"a/file", libc::O_CREAT | libc::O_RDWR)? as usize;
    let args = [file, name(c""), 4321, 4321, libc::AT_EMPTY_PATH as usize];
    call(libc::SYS_fchownat, &args)?;
    let moved = [share, name(c"a/file"), share, name(c"b/file"), 0];
    call(libc::SYS_renameat2, &moved)?;
    call(libc::SYS_unlinkat, &[share, name(c"b/file"), 0])
}

/// Opens the share by its handle, as nobody does who may not read every directory.
fn file_handle(share: usize) -> io::Result<c_long> {
    // struct file_handle, with room for 128 bytes.
    let mut handle = [0_u32; 2 + 32];
    handle[0] = 128;
    let mut mount = 0_i32;
    let place = handle.as_mut_ptr() as usize;
    let empty = libc::AT_EMPTY_PATH as usize;
    let args = [
        share,
        c"".as_ptr() as usize,
        place,
        &raw mut mount as usize,
        empty,
    ];
    call(libc::SYS_name_to_handle_at, &args)?;
    // The file system is named by an open file of it.
    let open = open_at(share, c"a", libc::O_RDONLY)? as usize;
    call(libc::SYS_open_by_handle_at, &[open, place, 0])
}

/// getpid by the 32 bit door: the numbers are others there, which a filter by number must not overlook.
fn another_abi() -> io::Result<c_long> {
    let answer: c_long;
    // SAFETY: getpid of the i386 ABI takes and writes no memory; the kernel may change r8 to r11.
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inlateout("rax") 20_i64 => answer,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    match answer {
        1.. => Ok(answer),
        _ => Err(io::Error::from_raw_os_error(-answer as i32)),
    }
}
