//! What a pod sees of its processor, and what others see of it on theirs.

use std::{collections::BTreeMap, fs, io, path::Path, process::Command};

use husk_proto::machine::wait_response::Reason;
use husk_tests::{
    bare::{self, Act},
    command,
    ctr::{Container, PROBE_MOUNT, Run, Runtime},
    machine::{Machine, block_on},
    settings::Settings,
};

/// CPUID as a container sees it: registers by function and index.
#[track_caller]
fn cpuid() -> BTreeMap<(u32, u32), [u32; 4]> {
    let said = Run::husk(&["/probe", "cpuid"])
        .flags(&["--mount", PROBE_MOUNT])
        .go()
        .ok();
    let number = |word: &str| u32::from_str_radix(word, 16).expect("a number");
    let line = |line: &str| {
        let words: Vec<u32> = line.split(' ').map(number).collect();
        let [function, index, eax, ebx, ecx, edx] = words.try_into().expect("six words");
        ((function, index), [eax, ebx, ecx, edx])
    };
    said.lines().map(line).collect()
}

#[test]
fn no_leaf_speaks_of_virtualization_counters_or_serials() {
    let leaves = cpuid();
    let [_, _, ecx, edx] = leaves[&(1, 0)];
    assert_eq!(ecx & (1 << 5 | 1 << 6 | 1 << 15), 0, "VMX, SMX, PDCM");
    assert_eq!(edx & (1 << 18 | 1 << 21), 0, "serial number, debug store");
    let counters = 1 << 10 | 1 << 23 | 1 << 24 | 1 << 27 | 1 << 28;
    let [_, _, ecx, _] = leaves[&(0x8000_0001, 0)];
    assert_eq!(ecx & (1 << 2 | counters), 0, "SVM, counters");
    // Where they end, KVM on Intel answers with the last basic leaf, as the processors do.
    let last = leaves[&(leaves[&(0, 0)][0], 0)];
    let hidden = [3, 5, 9, 0xa, 0xf, 0x10, 0x12, 0x14, 0x15, 0x16];
    let extended = [0xa, 0x1b, 0x1c, 0x1f, 0x20, 0x22, 0x26].map(|leaf| 0x8000_0000 + leaf);
    for function in hidden.into_iter().chain(extended) {
        let leaf = leaves[&(function, 0)];
        assert!(leaf == [0; 4] || leaf == last, "{function:#x}: {leaf:x?}");
    }
    // KVM signs, and says nothing more than what it can do.
    let [eax, ebx, ecx, edx] = leaves[&(0x4000_0000, 0)];
    let signature = [ebx, ecx, edx].map(u32::to_le_bytes).concat();
    assert_eq!((eax, &*signature), (0x4000_0001, &b"KVMKVMKVM\0\0\0"[..]));
    let more = (0x4000_0002..0x4000_0030).map(|leaf| leaves[&(leaf, 0)]);
    assert!({ more }.all(|leaf| leaf == [0; 4] || leaf == last));
}

/// What the guest's kernel makes of it, in a pod of one processor.
#[test]
fn the_guests_kernel_finds_none_of_it_either() {
    let script = "cat /proc/cpuinfo; dmesg";
    let said = Run::husk(&["sh", "-c", script])
        .flags(&["--privileged"])
        .go()
        .ok();
    let line = |name: &str| {
        let line = said.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(": "));
        value.unwrap_or_else(|| panic!("no {name} in {said}")).1
    };
    let flags: Vec<&str> = line("flags").split(' ').collect();
    let unwanted = [
        "svm",
        "vmx",
        "smx",
        "pn",
        "ds_cpl",
        "dtes64",
        "pdcm",
        "ibs",
        "arch_perfmon",
        "perfctr_core",
        "perfctr_nb",
        "perfctr_llc",
        "bts",
        "pebs",
        "intel_pt",
        "arch_lbr",
        "sgx",
        "cqm",
        "rdt_a",
        "mwaitx",
        "monitor",
        "skinit",
        "sev",
        "rdpru",
        "aperfmperf",
    ];
    let shown: Vec<_> = unwanted
        .iter()
        .filter(|flag| flags.contains(flag))
        .collect();
    assert!(shown.is_empty(), "{shown:?} in {flags:?}");
    assert_eq!((line("siblings"), line("cpu cores")), ("1", "1"));
    // It did not ask for a register in vain, and found no counters.
    assert!(!said.contains("unchecked MSR"), "{said}");
    assert!(
        said.contains("PMU not available") || said.contains("software events only"),
        "{said}"
    );
}

/// A guest that asks the processor itself, with no kernel between. In order: what it does, and what of.
#[track_caller]
fn answers(acts: &[(Act, u32)]) -> String {
    let files = ["bare-kernel", "bare-initrd"].map(|name| Path::new("/var/tmp").join(name));
    fs::write(&files[0], bare::kernel(acts)).expect("write a kernel");
    fs::write(&files[1], "none").expect("write an initrd");
    let ended = block_on(async {
        let mut machine = Machine::spawn()?;
        let _agent = machine.boot(&files[0], &files[1], 64, 1, "").await?;
        machine.wait().await
    });
    let ended = ended.expect("it boots and ends");
    let reason = ended.reason.enum_value_or_default();
    assert_eq!(reason, Reason::TRIPLE_FAULT, "{}", ended.detail);
    String::from_utf8(ended.console).expect("letters")
}

#[test]
fn registers_that_are_not_listed_are_not_there() {
    let listed = [
        0x10,
        0x1b,
        0x8b,
        0xfe,
        0x174,
        0x1a0,
        0x277,
        0x2ff,
        0x4b56_4d00,
        0x4b56_4d03,
        0xc000_0080,
        0xc000_0081,
        0xc000_0100,
        0xc000_0102,
    ];
    let acts: Vec<_> = listed.map(|register| (Act::Read, register)).into();
    let said = answers(&acts);
    assert_eq!(
        said,
        String::from(bare::DONE).repeat(acts.len()),
        "{acts:x?}"
    );

    // Counters; VMX and SVM; inventory numbers; frequency, energy; page faults and migration of KVM's; Hyper-V.
    let others = [
        0xc1,
        0x186,
        0x309,
        0x38d,
        0x38f,
        0x3f1,
        0xc001_0000,
        0xc001_0004,
        0xc001_0200,
        0xc000_0300,
        0x3a,
        0x480,
        0xc001_0114,
        0xc001_0117,
        0x4e,
        0x4f,
        0xc001_02f0,
        0xc001_02f1,
        0x198,
        0x199,
        0x606,
        0x611,
        0x34,
        0x9b,
        0x4b56_4d02,
        0x4b56_4d06,
        0x4b56_4d08,
        0x4000_0000,
        0x4000_0001,
    ];
    let acts = others.map(|register| [(Act::Read, register), (Act::Write, register)]);
    let counters = [0, 1, 2, 3, 1 << 30].map(|counter| (Act::ReadCounter, counter));
    let acts: Vec<_> = acts.into_iter().flatten().chain(counters).collect();
    let said = answers(&acts);
    assert_eq!(said.len(), acts.len(), "{said}");
    let there = acts.iter().zip(said.chars());
    let there: Vec<_> = there.filter(|(_, said)| *said != bare::REFUSED).collect();
    assert!(there.is_empty(), "{there:x?}");
}

/// Each weakness of the processor is as well cured in the guest as on the host, and known to it.
#[test]
fn mitigations_are_those_of_the_host() {
    const DIRECTORY: &str = "/sys/devices/system/cpu/vulnerabilities";
    let script = format!("cd {DIRECTORY} && grep . *");
    let inside = Run::husk(&["sh", "-c", &script]).go().ok();
    let inside: BTreeMap<&str, &str> = inside.lines().filter_map(|l| l.split_once(':')).collect();
    // What depends on threads of a core is not the guest's to know: it has one thread to a core.
    let cure = |said: &str| {
        let parts = said.split(';').map(str::trim);
        let parts = parts.filter(|part| !part.contains("SMT") && !part.starts_with("STIBP"));
        parts.collect::<Vec<_>>().join("; ")
    };
    let mut compared = 0;
    for entry in fs::read_dir(DIRECTORY).expect("the host's list").flatten() {
        let name = entry.file_name().into_string().expect("a name");
        let host = fs::read_to_string(entry.path()).expect("the host's word");
        // A kernel of another version may not know of it.
        let Some(guest) = inside.get(&*name) else {
            continue;
        };
        println!("{name}: host {}, guest {guest}", host.trim());
        assert_eq!(cure(guest), cure(host.trim()), "{name}");
        compared += 1;
    }
    assert!(compared >= 10, "{inside:?}");
}

/// The core-scheduling cookie of a thread, 0 being our own (prctl(2), PR_SCHED_CORE).
fn cookie(tid: u32) -> io::Result<u64> {
    const PR_SCHED_CORE: libc::c_int = 62;
    const PR_SCHED_CORE_GET: libc::c_ulong = 0;
    const SCOPE_THREAD: libc::c_ulong = 0;
    let (tid, mut cookie) = (libc::c_ulong::from(tid), 0_u64);
    // SAFETY: room for one cookie.
    let got = unsafe {
        let cookie = &raw mut cookie;
        libc::prctl(PR_SCHED_CORE, PR_SCHED_CORE_GET, tid, SCOPE_THREAD, cookie)
    };
    match got {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Those of all threads of a process.
#[track_caller]
fn cookies(pid: u32) -> Vec<u64> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let tid = |task: fs::DirEntry| task.file_name().to_str()?.parse().ok();
    let tids = tasks.map(|task| tid(task.expect("a thread")).expect("a number"));
    tids.map(|tid| cookie(tid).expect("its cookie")).collect()
}

/// Debian's kernels have no core scheduling: there, a pod that asks for it is refused by name.
#[test]
fn a_pod_shares_its_cores_with_nobody_when_asked() {
    let before = Container::idle(Runtime::Husk);
    let _settings = Settings::write("core_scheduling = true\n");
    if let Err(e) = cookie(0) {
        let outcome = Run::husk(&["echo", "runs"]).go();
        // Without a second thread on any core there is nobody to be kept off.
        if e.raw_os_error() == Some(libc::ENODEV) {
            assert_eq!(outcome.ok(), "runs\n");
            return;
        }
        assert_ne!(outcome.code(), 0);
        let checked = command::run(Command::new("husk").arg("check"), b"");
        assert_ne!(checked.code(), 0);
        for said in [outcome, checked] {
            let said = format!("{said:?}");
            assert!(said.contains("core_scheduling: "), "{said}");
            assert!(said.contains("built without CONFIG_SCHED_CORE"), "{said}");
        }
        return;
    }
    let pods = [(); 2].map(|()| Container::idle(Runtime::Husk));
    for pod in &pods {
        assert_eq!(pod.exec(&["echo", "runs"]).ok(), "runs\n");
    }
    let [one, two] = [0, 1].map(|pod: usize| cookies(pods[pod].pid()));
    for all in [&one, &two] {
        assert!(all.len() > 2, "{all:?}");
        assert!(all.iter().all(|one| *one == all[0] && *one != 0), "{all:?}");
    }
    assert_ne!(one[0], two[0]);
    assert!(cookies(before.pid()).iter().all(|cookie| *cookie == 0));
}
