//! `oci-init`: from a fresh process to the container's program, in the order in which runc does it.
//!
//! A process of its own, single-threaded, started by `launch`. It gets its orders over the control
//! socket (descriptor 3) and reports every failure there. Its memory is a container's soon: it must
//! hold no secrets, and must leave nothing open that the program could use.

mod become_user;
mod console;
mod copy_up;
mod devices;
mod failure;
mod find;
mod hooks;
mod inside;
mod keyring;
mod mount_options;
mod mounts;
mod namespaces;
mod rootfs;
mod scheduling;
pub mod seccomp;

use std::ffi::CString;
use std::fs;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};

use crate::control::{Blame, ContainerPlan, Helper, Order, ProcessPlan, Report};
use crate::spec::personality::Personality;
use crate::spec::process::Process;
use crate::spec::{NamespaceKind, Spec};
use crate::sys;

use failure::{Explain, Failure};
use seccomp::Filter;

/// Descriptors beside 0, 1 and 2 that `launch` gives.
const CONTROL: i32 = 3;
/// The first of the pidfds.
const OTHERS: i32 = 4;

/// The whole life of the helper.
pub fn run() -> ! {
    // SAFETY: `launch` has put the socket there, and nothing in this process owns it yet.
    let mut helper = Helper::new(unsafe { sys::inherited(CONTROL) });
    std::panic::set_hook(Box::new(|panic| {
        let report = Report::Failed {
            reason: format!("oci-init: {panic}"),
            blame: Blame::Guest,
        };
        // SAFETY: its first owner does nothing more: the process ends here.
        Helper::new(unsafe { sys::inherited(CONTROL) })
            .report(&report)
            .ok();
        sys::exit(101);
    }));
    let Err(failure) = obey(&mut helper);
    helper
        .report(&Report::Failed {
            reason: failure.reason,
            blame: failure.blame,
        })
        .ok();
    sys::exit(1)
}

/// Never succeeds in returning: success is another program.
fn obey(helper: &mut Helper) -> Result<std::convert::Infallible, Failure> {
    rustix::io::fcntl_setfd(helper.as_fd(), rustix::io::FdFlags::CLOEXEC)
        .guest(|| "keep the control socket".into())?;
    // Nobody inside the container may look into this process, or through its /proc entries.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).guest(|| "become undumpable".into())?;
    match helper.order()? {
        Order::Container(plan) => container(helper, &plan),
        Order::Process(plan) => process(helper, &plan),
        Order::Go => Err(Failure::guest("order Go before any plan")),
    }
}

/// The init of a container. It was born into its cgroup, and into its namespaces if that does.
fn container(
    helper: &mut Helper,
    plan: &ContainerPlan,
) -> Result<std::convert::Infallible, Failure> {
    let ContainerPlan { id, spec, .. } = plan;
    score_oom(&spec.process)?;
    // The guest's network is not a user namespace's to change.
    let own_network = spec.makes(NamespaceKind::Network);
    set_sysctls(spec, |key| !own_network && is_networks(key))?;
    let prepared = namespaces::prepare(plan)?;
    if !spec.is_born_into_namespaces() {
        namespaces::enter(helper, plan)?;
    }
    keyring::make(id, spec.has(NamespaceKind::User))?;
    rustix::process::setsid().guest(|| "make a session".into())?;
    if spec.makes(NamespaceKind::Cgroup) {
        // From inside the cgroup, so that it becomes the namespace's root.
        sys::unshare(libc::CLONE_NEWCGROUP).guest(|| "make a cgroup namespace".into())?;
    }
    namespaces::loopback_up(spec)?;
    name_host(spec)?;
    set_sysctls(spec, |key| own_network || !is_networks(key))?;
    let root = rootfs::build(plan, prepared)?;
    rootfs::enter(&root)?;
    rootfs::propagate(spec)?;
    devices::reopen_null(spec)?;
    let creating = hooks::Stage {
        kind: "createContainer",
        status: "creating",
        hooks: &spec.hooks.create_container,
        filter: None,
    };
    hooks::run(id, spec, &creating)?;
    rootfs::make_directory(&root, &spec.process.cwd)?;
    if spec.process.terminal {
        console::open_terminal(helper, &spec.process, true)?;
    }
    rootfs::finish(spec, &root)?;
    drop(root);
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(
        spec.process.user.umask.unwrap_or(0o022),
    ));
    let filter = spec.linux.seccomp.as_ref().map(seccomp::compile);
    let filter = filter.transpose()?.flatten();
    let personality = spec.linux.personality.as_ref();
    let program = confine(&spec.process, personality, filter.as_ref())?;
    helper.report(&Report::Ready {
        filter: filter.clone(),
    })?;
    wait_for_go(helper)?;
    let starting = hooks::Stage {
        kind: "startContainer",
        status: "created",
        hooks: &spec.hooks.start_container,
        filter: program.filter,
    };
    hooks::run(id, spec, &starting)?;
    execute(helper, program)
}

/// A process added to a container. It was born into the agent's namespaces and the container's cgroup.
fn process(helper: &mut Helper, plan: &ProcessPlan) -> Result<std::convert::Infallible, Failure> {
    let affinity = plan.process.exec_cpu_affinity.clone().unwrap_or_default();
    scheduling::pin("initial", &affinity.initial)?;
    score_oom(&plan.process)?;
    namespaces::follow(helper, plan)?;
    keyring::join(&plan.container)?;
    scheduling::pin("final", &affinity.last)?;
    rustix::process::setsid().guest(|| "make a session".into())?;
    if plan.process.terminal {
        console::open_terminal(helper, &plan.process, false)?;
    }
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(
        plan.process.user.umask.unwrap_or(0o022),
    ));
    let (personality, filter) = (plan.personality.as_ref(), plan.filter.as_ref());
    let program = confine(&plan.process, personality, filter)?;
    execute(helper, program)
}

/// The agent gave up when it says nothing more; then so does this process.
fn wait_for_go(helper: &mut Helper) -> Result<(), Failure> {
    match helper.order()? {
        Order::Go => Ok(()),
        _ => Err(Failure::guest("another plan in place of Go")),
    }
}

/// Always written: the agent's own score, which children inherit, spares it.
fn score_oom(process: &Process) -> Result<(), Failure> {
    let score = process.oom_score_adj.unwrap_or(0);
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .guest(|| format!("process.oomScoreAdj: write {score}"))
}

fn name_host(spec: &Spec) -> Result<(), Failure> {
    if !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes())
            .request(|| format!("hostname: set {:?}", spec.hostname))?;
    }
    if !spec.domainname.is_empty() {
        rustix::system::setdomainname(spec.domainname.as_bytes())
            .request(|| format!("domainname: set {:?}", spec.domainname))?;
    }
    Ok(())
}

fn is_networks(key: &str) -> bool {
    key.starts_with("net.") || key.starts_with("net/")
}

fn set_sysctls(spec: &Spec, now: impl Fn(&str) -> bool) -> Result<(), Failure> {
    for (key, value) in spec.linux.sysctl.iter().filter(|(key, _)| now(key)) {
        // Through the guest's /proc, which shows the namespaces of whoever looks.
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        fs::write(&path, value).request(|| format!("linux.sysctl: write {value:?} to {path}"))?;
    }
    Ok(())
}

/// What is to be executed, when nothing can be allocated or looked up any more.
struct Program<'a> {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
    /// To be loaded as the last thing.
    filter: Option<&'a Filter>,
}

/// Limits, privileges, user and directory, in runc's order; the last of it finds the program as the
/// user it is for.
fn confine<'a>(
    process: &Process,
    personality: Option<&Personality>,
    mut filter: Option<&'a Filter>,
) -> Result<Program<'a>, Failure> {
    // Everything but the standard streams; the control socket until execve, which tells of success.
    sys::close_on_exec_from(3).guest(|| "mark descriptors close-on-exec".into())?;
    become_user::limit(process)?;
    scheduling::schedule(process)?;
    if process.no_new_privileges != Some(true) {
        // Loading takes a capability that goes next: the profile has to allow what is left to do here.
        if let Some(filter) = filter.take() {
            filter.load()?;
        }
    }
    let env = become_user::become_user(process)?;
    let path = find::program(&process.args, &env)?;
    if let Some(personality) = personality {
        sys::personality(personality.number()).guest(|| "linux.personality".into())?;
    }
    let strings = |list: &[String]| {
        list.iter()
            .map(|text| CString::new(text.as_str()))
            .collect::<Result<Vec<_>, _>>()
    };
    let nul = |_| Failure::request("process.args or process.env contains a NUL byte");
    Ok(Program {
        path: CString::new(path).map_err(nul)?,
        args: strings(&process.args).map_err(nul)?,
        env: strings(&env).map_err(nul)?,
        filter,
    })
}

fn execute(helper: &mut Helper, program: Program<'_>) -> Result<std::convert::Infallible, Failure> {
    helper.report(&Report::Executing)?;
    sys::reset_signals();
    if let Some(filter) = program.filter {
        filter.load()?;
    }
    let error = sys::execve(&program.path, &program.args, &program.env);
    Err::<std::convert::Infallible, _>(error)
        .request(|| format!("exec {}", program.path.to_string_lossy()))
}
