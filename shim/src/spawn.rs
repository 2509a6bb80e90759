//! Starts husk-vmm: one clone3(2) into its namespaces and its cgroup, and one execve(2).
//!
//! Between the two the child shares nothing with us but copies, and may be a copy of a process that
//! held locks: it makes system calls on memory prepared beforehand, and nothing else.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    ptr,
};

use thiserror::Error;

use crate::{core_scheduling, record};

/// Above every descriptor number that the child gives out.
const FIRST_FREE: RawFd = 10;

/// What the VMM is started with. All descriptors stay ours.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    pub program: &'a Path,
    /// The machine service's connection.
    pub machine: BorrowedFd<'a>,
    /// The machine service's descriptor channel.
    pub descriptors: BorrowedFd<'a>,
    pub stderr: BorrowedFd<'a>,
    /// The pod's network namespace; none for a new one.
    pub network: Option<BorrowedFd<'a>>,
    /// The cgroup that it is born in; none for ours.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// No other process runs beside it on a core: see [`core_scheduling`].
    pub core_scheduling: bool,
}

/// A husk-vmm that runs.
#[derive(Debug)]
pub struct Child {
    /// In our pid namespace.
    pub pid: u32,
    pub pidfd: OwnedFd,
}

#[derive(Debug, Error)]
pub enum SpawnError {
    #[error("prepare the start of {program}: {cause}")]
    Prepare { program: PathBuf, cause: io::Error },
    #[error("clone3 of the VMM's process: {0}")]
    Clone(io::Error),
    #[error("join the pod's network namespace: {0}")]
    Network(io::Error),
    #[error("core_scheduling: {}", core_scheduling::refusal(.0))]
    Core(io::Error),
    #[error("hand descriptors to {program}: {cause}")]
    Descriptors { program: PathBuf, cause: io::Error },
    #[error("execute {program}: {cause}")]
    Execute { program: PathBuf, cause: io::Error },
}

/// Where the child failed; sent as one byte before the errno.
const STAGE_NETWORK: u8 = 1;
const STAGE_DESCRIPTORS: u8 = 2;
const STAGE_EXECUTE: u8 = 3;
const STAGE_CORE: u8 = 4;

/// Everything the child needs, laid out before it exists.
struct Prepared {
    program: CString,
    argv: [*const libc::c_char; 2],
    envp: [*const libc::c_char; 1],
    /// (descriptor, number in the child); every source is above every number.
    descriptors: [(OwnedFd, RawFd); 5],
    network: Option<OwnedFd>,
    core_scheduling: bool,
    report: OwnedFd,
}

const NAME: &CStr = c"husk-vmm";

/// Starts the VMM and returns once it has been executed.
pub fn spawn(launch: &Launch<'_>) -> Result<Child, SpawnError> {
    let prepare = |cause| SpawnError::Prepare {
        program: launch.program.to_owned(),
        cause,
    };
    let (outcome, report) = pipe().map_err(prepare)?;
    let prepared = Prepared::new(launch, report).map_err(prepare)?;
    let child = clone_and_exec(launch, &prepared).map_err(SpawnError::Clone)?;
    drop(prepared);

    // Ends with execve, which closes the child's end, or with the child.
    let mut failure = Vec::new();
    let told = File::from(outcome).take(5).read_to_end(&mut failure);
    told.map_err(|e| {
        end(&child.pidfd);
        prepare(e)
    })?;
    let [stage, errno @ ..] = failure.as_slice() else {
        return Ok(child);
    };
    reap(&child.pidfd);
    let cause = match errno.try_into() {
        Ok(errno) => io::Error::from_raw_os_error(i32::from_ne_bytes(errno)),
        Err(_) => io::Error::other("the child ended without a word"),
    };
    let program = launch.program.to_owned();
    Err(match *stage {
        STAGE_NETWORK => SpawnError::Network(cause),
        STAGE_CORE => SpawnError::Core(cause),
        STAGE_DESCRIPTORS => SpawnError::Descriptors { program, cause },
        _ => SpawnError::Execute { program, cause },
    })
}

impl Prepared {
    fn new(launch: &Launch<'_>, report: OwnedFd) -> io::Result<Self> {
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let null: OwnedFd = null.into();
        let high = |fd: RawFd| duplicate_above(fd, FIRST_FREE);
        let program = CString::new(launch.program.as_os_str().as_bytes())
            .map_err(|_| io::Error::other("a NUL byte in the path"))?;
        Ok(Self {
            program,
            argv: [NAME.as_ptr(), ptr::null()],
            envp: [ptr::null()],
            descriptors: [
                (high(null.as_raw_fd())?, 0),
                (high(null.as_raw_fd())?, 1),
                (high(launch.stderr.as_raw_fd())?, 2),
                (high(launch.machine.as_raw_fd())?, husk_proto::MACHINE_FD),
                (
                    high(launch.descriptors.as_raw_fd())?,
                    husk_proto::DESCRIPTOR_FD,
                ),
            ],
            network: launch.network.map(|fd| high(fd.as_raw_fd())).transpose()?,
            core_scheduling: launch.core_scheduling,
            report: high(report.as_raw_fd())?,
        })
    }
}

fn clone_and_exec(launch: &Launch<'_>, prepared: &Prepared) -> io::Result<Child> {
    // Its mount namespace the VMM makes itself, with its empty root: this one it needs for its way there.
    let namespaces = libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let mut flags = (namespaces | libc::CLONE_PIDFD) as u64;
    if launch.network.is_none() {
        flags |= libc::CLONE_NEWNET as u64;
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data, for which zeroes are a value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.pidfd = (&raw mut pidfd) as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = launch.cgroup {
        // Not among libc's c_int constants: it does not fit.
        flags |= 0x2_0000_0000; // CLONE_INTO_CGROUP
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    args.flags = flags;
    // SAFETY: without CLONE_VM the child has a copy of our memory and stack, so returning twice is
    // as with fork(2). `args` and `pidfd` live on this stack. In the child only `run_child` runs.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: this is the child of a fork; `prepared` was laid out before.
        0 => unsafe { run_child(prepared) },
        pid => Ok(Child {
            pid: u32::try_from(pid).map_err(io::Error::other)?,
            // SAFETY: CLONE_PIDFD put a new descriptor there.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
    }
}

/// # Safety
/// To be called in a child that has a copy of our memory, and nowhere else: it makes system calls
/// only, allocates nothing, takes no lock, and does not return.
unsafe fn run_child(prepared: &Prepared) -> ! {
    // SAFETY: these calls take descriptors and numbers, and pointers to what `prepared` holds: its
    // strings end in NUL and its arrays in null.
    unsafe {
        if let Some(network) = &prepared.network {
            if libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET) != 0 {
                fail(prepared, STAGE_NETWORK);
            }
        }
        for (source, number) in &prepared.descriptors {
            if libc::dup2(source.as_raw_fd(), *number) < 0 {
                fail(prepared, STAGE_DESCRIPTORS);
            }
        }
        // Whatever else is open here goes with execve, also what somebody left inheritable.
        let first = husk_proto::DESCRIPTOR_FD + 1;
        let flags = libc::CLOSE_RANGE_CLOEXEC;
        if libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) != 0 {
            fail(prepared, STAGE_DESCRIPTORS);
        }
        // Threads inherit it, and execve keeps it.
        if prepared.core_scheduling && !core_scheduling::share_with_nobody() {
            fail(prepared, STAGE_CORE);
        }
        // Our death closes its machine socket, which it dies of; this is for one that is stuck.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::execve(
            prepared.program.as_ptr(),
            prepared.argv.as_ptr(),
            prepared.envp.as_ptr(),
        );
        fail(prepared, STAGE_EXECUTE)
    }
}

/// # Safety
/// As for `run_child`.
unsafe fn fail(prepared: &Prepared, stage: u8) -> ! {
    // SAFETY: errno is the child's own, and `message` outlives the call that reads it.
    unsafe {
        let errno = (*libc::__errno_location()).to_ne_bytes();
        let message = [stage, errno[0], errno[1], errno[2], errno[3]];
        libc::write(
            prepared.report.as_raw_fd(),
            message.as_ptr().cast(),
            message.len(),
        );
        libc::_exit(127)
    }
}

/// A pipe, (read, write), closed on exec.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: pipe2(2) writes two descriptors into an array of two.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both are new and nobody else's.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

fn duplicate_above(fd: RawFd, least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl(2) with F_DUPFD_CLOEXEC takes numbers only.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, least) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Kills a child that is of no use, and collects it.
pub fn end(pidfd: &OwnedFd) {
    if let Err(e) = record::kill(pidfd) {
        // It dies of its closed sockets all the same; waiting for that might take for ever.
        return log::error!("kill husk-vmm: {e}");
    }
    reap(pidfd);
}

/// Collects a child that has ended, and says how; one that was collected before says nothing.
pub fn reap(pidfd: &OwnedFd) -> Option<String> {
    // SAFETY: siginfo_t is plain data, for which zeroes are a value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let id = pidfd.as_raw_fd() as libc::id_t;
    // SAFETY: `info` has room for what waitid(2) writes.
    let result = unsafe { libc::waitid(libc::P_PIDFD, id, &raw mut info, libc::WEXITED) };
    if result != 0 {
        return None;
    }
    // SAFETY: waitid(2) filled in the fields of a SIGCHLD.
    let status = unsafe { info.si_status() };
    Some(match info.si_code {
        libc::CLD_EXITED => format!("exited with status {status}"),
        // The kernel's log has a line that names the call.
        _ if status == libc::SIGSYS => {
            "was killed for a system call that its jail does not allow (SIGSYS)".to_owned()
        }
        _ => format!("was killed by signal {status}"),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::{
            fd::AsFd,
            unix::{fs::PermissionsExt, net::UnixStream},
        },
    };

    use super::*;

    fn run(script: &str, network: Option<BorrowedFd<'_>>) -> (String, String) {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("vmm");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let (ours, machine) = UnixStream::pair().unwrap();
        let (stderr, errors) = pipe().unwrap();
        let child = spawn(&Launch {
            program: &program,
            machine: machine.as_fd(),
            descriptors: machine.as_fd(),
            stderr: errors.as_fd(),
            network,
            cgroup: None,
            core_scheduling: false,
        })
        .unwrap();
        drop((machine, errors));
        let mut said = String::new();
        let mut ours = ours;
        ours.read_to_string(&mut said).unwrap();
        let mut complaint = String::new();
        File::from(stderr).read_to_string(&mut complaint).unwrap();
        assert!(child.pid > 1);
        (said + &reap(&child.pidfd).unwrap(), complaint)
    }

    #[test]
    fn the_child_has_its_namespaces_descriptors_and_nothing_else() {
        let (said, complaint) = run(
            "echo $$ >&3; env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= >&3; \
             for fd in /proc/self/fd/*; do [ -e $fd ] && echo $fd; done >/dev/null; echo no >&2; exit 7",
            None,
        );
        assert_eq!(said, "1\nexited with status 7");
        assert_eq!(complaint, "no\n");
    }

    #[test]
    fn the_network_namespace_is_new_or_the_one_given() {
        let link = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        let ours = link("self").display().to_string();
        // /proc is the host's here, but a process finds itself there by its own view of "self".
        let script = "readlink /proc/thread-self/ns/net >&3 2>/dev/null || echo hidden >&3";
        let (said, _) = run(script, None);
        assert!(!said.contains(&ours), "{said}");
        let own = File::open("/proc/self/ns/net").unwrap();
        let _ = run(script, Some(own.as_fd()));
    }

    #[test]
    fn a_child_of_no_use_is_ended_and_collected() {
        let mut child = std::process::Command::new("/bin/sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let known = record::ProcessId::of(child.id()).unwrap();
        end(&known.open().unwrap().unwrap());
        // There is nothing left to be collected.
        let error = child.wait().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECHILD));
    }

    #[test]
    fn a_missing_program_is_named() {
        let (machine, _ours) = UnixStream::pair().unwrap();
        let error = spawn(&Launch {
            program: Path::new("/nowhere/husk-vmm"),
            machine: machine.as_fd(),
            descriptors: machine.as_fd(),
            stderr: machine.as_fd(),
            network: None,
            cgroup: None,
            core_scheduling: false,
        })
        .unwrap_err()
        .to_string();
        assert_eq!(
            error,
            "execute /nowhere/husk-vmm: No such file or directory (os error 2)"
        );
    }

    /// Answers the child's wish for cores of its own with an errno, 0 being none: few kernels can fulfil it.
    fn spawn_where_core_scheduling_says(errno: i32) -> Result<String, SpawnError> {
        use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};
        const PR_SCHED_CORE: u32 = 62;
        let at = |offset: usize| (BPF_LD | BPF_W | BPF_ABS, 0, offset as u32);
        // If it is the number, go on; else skip what follows, up to the last instruction.
        let is = |number: u32, skip: u8| (BPF_JMP | BPF_JEQ | BPF_K, skip, number);
        let code = [
            at(std::mem::offset_of!(libc::seccomp_data, nr)),
            is(libc::SYS_prctl as u32, 3),
            at(std::mem::offset_of!(libc::seccomp_data, args)),
            is(PR_SCHED_CORE, 1),
            (BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
            (BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let answer = move || {
            let mut filter = code.map(|(code, jf, k)| libc::sock_filter {
                code: code as u16,
                jt: 0,
                jf,
                k,
            });
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_mut_ptr(),
            };
            // SAFETY: a live program; it is this thread's and its children's alone.
            let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program) };
            assert_eq!(set, 0, "a seccomp filter needs root");
            let (machine, _ours) = UnixStream::pair().unwrap();
            spawn(&Launch {
                program: Path::new("/bin/true"),
                machine: machine.as_fd(),
                descriptors: machine.as_fd(),
                stderr: machine.as_fd(),
                network: None,
                cgroup: None,
                core_scheduling: true,
            })
            // Here, for it dies with the thread that has started it.
            .map(|child| reap(&child.pidfd).unwrap())
        };
        std::thread::spawn(answer).join().unwrap()
    }

    #[test]
    fn a_vmm_without_cores_of_its_own_does_not_start_when_it_should_have_them() {
        // There is nobody to be kept off where no core has a second thread.
        for errno in [0, libc::ENODEV] {
            let ended = spawn_where_core_scheduling_says(errno).unwrap();
            assert_eq!(ended, "exited with status 0");
        }
        let refused = spawn_where_core_scheduling_says(libc::EINVAL).unwrap_err();
        let said = refused.to_string();
        assert!(
            said.starts_with("core_scheduling: the host's kernel"),
            "{said}"
        );
        assert!(matches!(refused, SpawnError::Core(_)));
    }

    #[test]
    fn no_network_namespace_is_an_error_of_its_own() {
        let (machine, _ours) = UnixStream::pair().unwrap();
        let error = spawn(&Launch {
            program: Path::new("/bin/true"),
            machine: machine.as_fd(),
            descriptors: machine.as_fd(),
            stderr: machine.as_fd(),
            network: Some(machine.as_fd()),
            cgroup: None,
            core_scheduling: false,
        })
        .unwrap_err();
        assert!(matches!(error, SpawnError::Network(_)), "{error}");
    }
}
