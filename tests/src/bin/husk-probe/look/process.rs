//! The process itself: identity, privileges, limits, signals, scheduling, descriptors, terminal, namespaces.

use std::{
    env, fs,
    mem::MaybeUninit,
    sync::atomic::{AtomicI64, Ordering},
};

use super::{Report, answer, call, content, said};

/// How SIGPIPE was handled before Rust's runtime ignored it: 0 default, 1 ignored, -1 not known.
static SIGPIPE: AtomicI64 = AtomicI64::new(-1);

// SAFETY: a function of C's calling convention, run before main, which makes one system call.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = {
    extern "C" fn before_main() {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: asks only, into a structure of ours; zeroes are valid for it.
        let action = unsafe {
            libc::sigaction(libc::SIGPIPE, std::ptr::null(), action.as_mut_ptr());
            action.assume_init()
        };
        let ignored = i64::from(action.sa_sigaction == libc::SIG_IGN);
        SIGPIPE.store(ignored, Ordering::Relaxed);
    }
    before_main
};

pub fn look(report: &mut Report) {
    status(report);
    for line in content("/proc/self/limits").lines().skip(1) {
        let (name, values) = line.split_at_checked(26).unwrap_or((line, ""));
        let values: Vec<_> = values.split_whitespace().take(2).collect();
        report.say(format!("rlimit {}", name.trim()), values.join(" "));
    }
    flags(report);
    scheduling(report);
    around(report);
    descriptors(report);
    namespaces(report);
}

fn status(report: &mut Report) {
    const KEPT: [&str; 20] = [
        "Umask",
        "Uid",
        "Gid",
        "Groups",
        "SigBlk",
        "SigIgn",
        "SigCgt",
        "SigPnd",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
        "Seccomp_filters",
        "TracerPid",
        "Cpus_allowed_list",
        "Mems_allowed_list",
        "THP_enabled",
    ];
    for line in content("/proc/self/status").lines() {
        if let Some((key, value)) = line.split_once(':') {
            if KEPT.contains(&key) {
                let words: Vec<_> = value.split_whitespace().collect();
                report.say(format!("status {key}"), words.join(" "));
            }
        }
    }
    report.say("SIGPIPE ignored", SIGPIPE.load(Ordering::Relaxed));
}

/// What prctl(2) and small files of /proc say.
fn flags(report: &mut Report) {
    for (name, option) in [
        ("securebits", libc::PR_GET_SECUREBITS),
        ("dumpable", libc::PR_GET_DUMPABLE),
        ("keepcaps", libc::PR_GET_KEEPCAPS),
        ("timerslack", libc::PR_GET_TIMERSLACK),
        ("thp-disable", libc::PR_GET_THP_DISABLE),
        ("io-flusher", 58),
        ("mce-kill", libc::PR_MCE_KILL_GET),
    ] {
        let option = usize::try_from(option).unwrap_or_default();
        report.say(
            format!("prctl {name}"),
            answer(libc::SYS_prctl, [option, 0, 0, 0, 0, 0]),
        );
    }
    for (name, option) in [
        ("subreaper", libc::PR_GET_CHILD_SUBREAPER),
        ("pdeathsig", libc::PR_GET_PDEATHSIG),
    ] {
        let mut value = 0_i32;
        let option = usize::try_from(option).unwrap_or_default();
        let place = &raw mut value as usize;
        let outcome = call(libc::SYS_prctl, [option, place, 0, 0, 0, 0]);
        report.say(
            format!("prctl {name}"),
            format!("{:?}", outcome.map(|_| value).ok()),
        );
    }
    report.say(
        "personality",
        answer(libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0]),
    );
    for name in [
        "oom_score_adj",
        "coredump_filter",
        "loginuid",
        "setgroups",
        "uid_map",
        "gid_map",
        "timens_offsets",
        "attr/current",
        "attr/exec",
        "comm",
        "wchan",
    ] {
        let text = content(format!("/proc/self/{name}"));
        let words: Vec<_> = text.split_whitespace().collect();
        report.say(format!("self/{name}"), words.join(" "));
    }
    // KEYCTL_DESCRIBE of the session's keyring: type;uid;gid;permissions;name.
    let mut name = [0_u8; 128];
    let place = name.as_mut_ptr() as usize;
    let session = usize::MAX - 2;
    let described = match call(libc::SYS_keyctl, [6, session, place, name.len(), 0, 0]) {
        Ok(length) => {
            let length = usize::try_from(length).unwrap_or(0).saturating_sub(1);
            String::from_utf8_lossy(name.get(..length).unwrap_or_default()).into_owned()
        }
        Err(error) => said(&error),
    };
    report.say("session keyring", described);
}

fn scheduling(report: &mut Report) {
    let mut attr = [0_u32; 14];
    let place = attr.as_mut_ptr() as usize;
    let outcome = call(libc::SYS_sched_getattr, [0, place, 56, 0, 0, 0]);
    // size, policy, flags (64), nice, priority, runtime, deadline, period (64 each).
    let text = outcome.map_or_else(|error| said(&error), |_| format!("{:?}", &attr[1..12]));
    report.say("scheduler", text);
    report.say(
        "io priority",
        answer(libc::SYS_ioprio_get, [1, 0, 0, 0, 0, 0]),
    );
    let group = content("/proc/self/autogroup");
    // Its number is drawn.
    let nice = group
        .split_once(" nice ")
        .map_or(group.as_str(), |(_, nice)| nice);
    report.say("autogroup", nice);
}

/// Working directory, environment, arguments, names, session, terminal.
fn around(report: &mut Report) {
    let said_path = |path: std::io::Result<std::path::PathBuf>| {
        path.map_or_else(|error| said(&error), |path| path.display().to_string())
    };
    report.say("cwd", said_path(env::current_dir()));
    report.say("exe", said_path(fs::read_link("/proc/self/exe")));
    report.say("root", said_path(fs::read_link("/proc/self/root")));
    let list = |path: &str| content(path).trim_end_matches('\0').replace('\0', " | ");
    report.say("arguments", list("/proc/self/cmdline"));
    report.say("environment", list("/proc/self/environ"));
    let uname = rustix::system::uname();
    report.say("hostname", uname.nodename().to_string_lossy());
    report.say("domainname", uname.domainname().to_string_lossy());

    let pid = std::process::id();
    report.say("is process 1", pid == 1);
    let stat = content("/proc/self/stat");
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
        .collect();
    let number = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<i64>().ok())
    };
    let me = Some(i64::from(pid));
    report.say(
        "parent",
        match number(1) {
            Some(0) => "outside",
            Some(1) => "1",
            _ => "another",
        },
    );
    let whose = |leader: Option<i64>| match leader {
        leader if leader == me => "own",
        Some(0) => "outside",
        _ => "another",
    };
    report.say("process group", whose(number(2)));
    report.say("session", whose(number(3)));
    let terminal = number(4).map(|tty| tty >> 8);
    report.say("terminal's major", format!("{terminal:?}"));
    for fd in 0..3 {
        let link = fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
        let link = link.display().to_string();
        report.say(
            format!("terminal {fd}"),
            if link.starts_with("/dev/") {
                &link
            } else {
                "no"
            },
        );
    }
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout());
    report.say(
        "terminal size",
        size.map_or_else(super::named, |size| {
            format!("{}x{}", size.ws_col, size.ws_row)
        }),
    );
    let modes = rustix::termios::tcgetattr(rustix::stdio::stdout());
    report.say(
        "terminal modes",
        modes.map_or_else(super::named, |modes| {
            format!(
                "{:?} {:?} {:?} {:?}",
                modes.input_modes, modes.output_modes, modes.control_modes, modes.local_modes
            )
        }),
    );
    let mut seen: Vec<String> = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().parse::<u32>().is_ok() {
            seen.push(content(entry.path().join("comm")));
        }
    }
    seen.sort();
    // The host's, or the guest's, without a namespace.
    report.say(
        "processes",
        if seen.len() < 5 {
            seen.join(" ")
        } else {
            "many".to_owned()
        },
    );
}

fn descriptors(report: &mut Report) {
    let mut open: Vec<u32> = fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect();
    open.sort_unstable();
    for fd in open {
        let Ok(link) = fs::read_link(format!("/proc/self/fd/{fd}")) else {
            // The one that the list was read by.
            continue;
        };
        let link = link.display().to_string();
        let kind = link
            .split_once(':')
            .map_or(link.as_str(), |(kind, _)| kind)
            .to_owned();
        let info = content(format!("/proc/self/fdinfo/{fd}"));
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        report.say(
            format!("fd {fd}"),
            format!("{kind} {}", flags.unwrap_or("?").trim()),
        );
    }
}

/// The first namespaces of a kernel have numbers that never change.
fn namespaces(report: &mut Report) {
    const FIRST: [(&str, u64); 6] = [
        ("ipc", 4_026_531_839),
        ("uts", 4_026_531_838),
        ("user", 4_026_531_837),
        ("pid", 4_026_531_836),
        ("cgroup", 4_026_531_835),
        ("time", 4_026_531_834),
    ];
    for name in [
        "ipc",
        "uts",
        "user",
        "pid",
        "cgroup",
        "time",
        "time_for_children",
        "mnt",
        "net",
    ] {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/{name}"));
        let Ok(own) = of("self") else {
            report.say(format!("namespace {name}"), "unknown");
            continue;
        };
        let number = own
            .to_string_lossy()
            .split(['[', ']'])
            .nth(1)
            .and_then(|text| text.parse().ok());
        let first = FIRST
            .iter()
            .any(|(kind, first)| name.starts_with(kind) && number == Some(*first));
        let as_process_1 = match of("1") {
            Ok(other) => (own == other).to_string(),
            Err(error) => said(&error),
        };
        let kind = if first { "the first" } else { "its own" };
        report.say(
            format!("namespace {name}"),
            format!("{kind}, as process 1: {as_process_1}"),
        );
    }
}
