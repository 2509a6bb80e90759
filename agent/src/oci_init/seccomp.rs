//! The system call filter: `linux.seccomp` compiled by libseccomp, patched as runc does, and loaded.
//!
//! Compiled by the container's init while everything is allowed still, once, as it takes milliseconds: the
//! agent keeps the program for added processes. Loaded by [`Filter::load`] when `oci_init` says so.

use std::fs::File;
use std::io::{Read, Seek};

use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use rustix::fs::{MemfdFlags, memfd_create};

use serde::{Deserialize, Serialize};

use super::failure::{Explain, Failure};
use crate::spec::seccomp::{Action, Architecture, Argument, Flag, Operator, Rule, Seccomp};
use crate::sys::{self, FilterInstruction};

/// EPERM, where a profile does not say which error.
const DEFAULT_ERRNO: u32 = libc::EPERM.unsigned_abs();
/// From so many rules on a tree is worth its while; with none libseccomp before 2.5.5 makes a wrong one.
const TREE_FROM: usize = 33;

/// A program for the kernel, and how to load it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Filter {
    program: Vec<FilterInstruction>,
    flags: u64,
}

impl Filter {
    /// From here on the filter counts. Without no_new_privs it takes CAP_SYS_ADMIN.
    pub(super) fn load(&self) -> Result<(), Failure> {
        sys::filter_calls(&self.program, self.flags)
            .guest(|| "linux.seccomp: load the filter".into())
    }
}

/// `None` where the profile filters nothing.
pub(super) fn compile(seccomp: &Seccomp) -> Result<Option<Filter>, Failure> {
    let Some(default) = seccomp.default_action else {
        return Ok(None);
    };
    let wrong = |what: &str| {
        let what = format!("linux.seccomp: {what}");
        move |error: SeccompError| Failure::request(format!("{what}: {error}"))
    };
    let fallback = action(default, seccomp.default_errno_ret)?;
    let mut context = ScmpFilterContext::new(fallback).map_err(wrong("make a filter"))?;
    for &named in &seccomp.architectures {
        context
            .add_arch(architecture(named))
            .map_err(wrong(&format!("architectures: add {named:?}")))?;
    }
    // A rule of runc's holds one name.
    let count = seccomp
        .syscalls
        .iter()
        .map(|rule| rule.names.len())
        .sum::<usize>();
    if count >= TREE_FROM {
        context.set_ctl_optimize(2).map_err(wrong("make a tree"))?;
    }
    for (i, rule) in seccomp.syscalls.iter().enumerate() {
        let action = action(rule.action, rule.errno_ret)?;
        // What the default does anyway, libseccomp refuses.
        if action != fallback {
            add(&mut context, rule, action).map_err(wrong(&format!("syscalls[{i}]")))?;
        }
    }
    let mut program = stub(seccomp);
    program.extend(export(&context)?);
    let flags = seccomp.flags().iter().fold(0, |flags, flag| {
        flags
            | match flag {
                Flag::Tsync => 0,
                Flag::Log => libc::SECCOMP_FILTER_FLAG_LOG,
                Flag::SpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            }
    });
    Ok(Some(Filter { program, flags }))
}

fn add(
    context: &mut ScmpFilterContext,
    rule: &Rule,
    action: ScmpAction,
) -> Result<(), SeccompError> {
    let comparisons: Vec<ScmpArgCompare> = rule.args.iter().map(comparison).collect();
    // libseccomp takes one comparison of each argument; profiles with more mean any of them (as runc).
    let twice = rule.args.iter().enumerate().any(|(i, argument)| {
        let others = rule.args.iter().skip(i.saturating_add(1));
        others
            .into_iter()
            .any(|other| other.index == argument.index)
    });
    for name in &rule.names {
        // Of another kernel, or of another architecture.
        let Ok(call) = ScmpSyscall::from_name(name) else {
            continue;
        };
        if twice {
            for comparison in &comparisons {
                context.add_rule_conditional(action, call, &[*comparison])?;
            }
        } else {
            context.add_rule_conditional(action, call, &comparisons)?;
        }
    }
    Ok(())
}

fn comparison(argument: &Argument) -> ScmpArgCompare {
    let (operator, datum) = match argument.op {
        Operator::NotEqual => (ScmpCompareOp::NotEqual, argument.value),
        Operator::Less => (ScmpCompareOp::Less, argument.value),
        Operator::LessOrEqual => (ScmpCompareOp::LessOrEqual, argument.value),
        Operator::Equal => (ScmpCompareOp::Equal, argument.value),
        Operator::GreaterOrEqual => (ScmpCompareOp::GreaterEqual, argument.value),
        Operator::Greater => (ScmpCompareOp::Greater, argument.value),
        Operator::MaskedEqual => (
            ScmpCompareOp::MaskedEqual(argument.value),
            argument.value_two,
        ),
    };
    ScmpArgCompare::new(argument.index, operator, datum)
}

/// The kernel has 16 bits for the number.
fn action(action: Action, number: Option<u32>) -> Result<ScmpAction, Failure> {
    let number = (number.unwrap_or(DEFAULT_ERRNO) & 0xffff) as u16;
    Ok(match action {
        Action::Kill | Action::KillThread => ScmpAction::KillThread,
        Action::KillProcess => ScmpAction::KillProcess,
        Action::Trap => ScmpAction::Trap,
        Action::Errno => ScmpAction::Errno(number.into()),
        Action::Trace => ScmpAction::Trace(number),
        Action::Allow => ScmpAction::Allow,
        Action::Log => ScmpAction::Log,
        Action::Notify => {
            return Err(Failure::request(
                "linux.seccomp: SCMP_ACT_NOTIFY is not supported",
            ));
        }
    })
}

fn architecture(architecture: Architecture) -> ScmpArch {
    match architecture {
        Architecture::X86 => ScmpArch::X86,
        Architecture::X86_64 => ScmpArch::X8664,
        Architecture::X32 => ScmpArch::X32,
        Architecture::Arm => ScmpArch::Arm,
        Architecture::Aarch64 => ScmpArch::Aarch64,
        Architecture::Mips => ScmpArch::Mips,
        Architecture::Mips64 => ScmpArch::Mips64,
        Architecture::Mips64N32 => ScmpArch::Mips64N32,
        Architecture::Mipsel => ScmpArch::Mipsel,
        Architecture::Mipsel64 => ScmpArch::Mipsel64,
        Architecture::Mipsel64N32 => ScmpArch::Mipsel64N32,
        Architecture::Ppc => ScmpArch::Ppc,
        Architecture::Ppc64 => ScmpArch::Ppc64,
        Architecture::Ppc64Le => ScmpArch::Ppc64Le,
        Architecture::Riscv64 => ScmpArch::Riscv64,
        Architecture::S390 => ScmpArch::S390,
        Architecture::S390X => ScmpArch::S390X,
        Architecture::Loongarch64 => ScmpArch::Loongarch64,
    }
}

/// libseccomp writes its program to a file.
fn export(context: &ScmpFilterContext) -> Result<Vec<FilterInstruction>, Failure> {
    let at = || "linux.seccomp: export the filter".to_string();
    let mut file = File::from(memfd_create("seccomp", MemfdFlags::CLOEXEC).guest(at)?);
    context
        .export_bpf(&file)
        .map_err(|error| Failure::request(format!("{}: {error}", at())))?;
    let mut bytes = Vec::new();
    file.rewind().guest(at)?;
    file.read_to_end(&mut bytes).guest(at)?;
    let instructions = bytes.chunks_exact(8);
    Ok(instructions
        .filter_map(|bytes| bytes.first_chunk().map(FilterInstruction::from))
        .collect())
}

// Classic BPF (linux/bpf_common.h), as far as the stub needs it.
const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_BITS: u16 = 0x45;
const RETURN: u16 = 0x06;
// struct seccomp_data (linux/seccomp.h).
const NUMBER: u32 = 0;
const AUDIT_ARCH: u32 = 4;
// linux/audit.h.
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// In the number of a system call of x32.
const X32_BIT: u32 = 0x4000_0000;

/// What goes before a filter that denies by default: calls newer than all that the profile knows get ENOSYS, so
/// that libraries fall back to older ones, where EPERM would be an error to them. runc does the same.
fn stub(seccomp: &Seccomp) -> Vec<FilterInstruction> {
    let enosys = libc::ENOSYS.unsigned_abs();
    let permissive = matches!(
        seccomp.default_action,
        None | Some(Action::Allow | Action::Log | Action::Trace)
    );
    if permissive || seccomp.default_errno_ret == Some(enosys) {
        return Vec::new();
    }
    let listed = |wanted: Architecture| seccomp.architectures.contains(&wanted);
    let newest = |architecture: ScmpArch| {
        let names = seccomp.syscalls.iter().flat_map(|rule| &rule.names);
        let numbers = names.filter_map(|name| {
            let call = ScmpSyscall::from_name_by_arch(name, architecture).ok()?;
            u32::try_from(i32::from(call)).ok()
        });
        numbers.max()
    };
    // The guest's own architecture is always in the filter.
    let x86_64 = newest(ScmpArch::X8664);
    let x32 = listed(Architecture::X32)
        .then(|| newest(ScmpArch::X32))
        .flatten();
    let x86 = listed(Architecture::X86)
        .then(|| newest(ScmpArch::X86))
        .flatten();

    let op = |code, jt, jf, k| FilterInstruction { code, jt, jf, k };
    let deny = op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | enosys);
    // A number above the newest is answered here; three instructions that end by going on behind them.
    let above = |newest: Option<u32>| match newest {
        Some(newest) => [op(JUMP_IF_GREATER, 0, 1, newest), deny, op(JUMP, 0, 0, 0)],
        None => [op(JUMP, 0, 0, 0); 3],
    };
    let mut program = vec![op(LOAD_WORD, 0, 0, AUDIT_ARCH)];
    // load, bits?, 3 of x86_64, 3 of x32; the last jump of x86_64's goes over x32's.
    let mut section = vec![op(LOAD_WORD, 0, 0, NUMBER), op(JUMP_IF_BITS, 3, 0, X32_BIT)];
    section.extend(above(x86_64));
    if let Some(last) = section.last_mut() {
        last.k = 3;
    }
    section.extend(above(x32));
    program.push(op(JUMP_IF_EQUAL, 0, 8, AUDIT_ARCH_X86_64));
    program.extend(section);
    // The accumulator holds the architecture only where the section above was skipped.
    if x86.is_some() {
        program.push(op(LOAD_WORD, 0, 0, AUDIT_ARCH));
        program.push(op(JUMP_IF_EQUAL, 0, 4, AUDIT_ARCH_I386));
        program.push(op(LOAD_WORD, 0, 0, NUMBER));
        program.extend(above(x86));
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a classic BPF program says of one call: the machine of linux/filter.h, as far as filters use it.
    fn run(program: &[FilterInstruction], arch: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend(0u64.to_le_bytes());
        args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let op = program[at];
            at += 1;
            let mut branch = |yes: bool| at += usize::from(if yes { op.jt } else { op.jf });
            match op.code {
                0x20 => {
                    let k = op.k as usize;
                    a = u32::from_le_bytes(data[k..k + 4].try_into().unwrap());
                }
                0x05 => at += op.k as usize,
                0x15 => branch(a == op.k),
                0x25 => branch(a > op.k),
                0x35 => branch(a >= op.k),
                0x45 => branch(a & op.k != 0),
                0x54 => a &= op.k,
                0x06 => return op.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn filter(json: &str) -> Filter {
        let seccomp: Seccomp = crate::spec::parse(json.as_bytes()).unwrap();
        seccomp.validate("linux.seccomp").unwrap();
        compile(&seccomp).unwrap().unwrap()
    }

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000;
    const NO_ARGS: [u64; 6] = [0; 6];

    fn native(filter: &Filter, number: i64, args: [u64; 6]) -> u32 {
        run(
            &filter.program,
            AUDIT_ARCH_X86_64,
            u32::try_from(number).unwrap(),
            args,
        )
    }

    #[test]
    fn every_action_is_the_kernels() {
        for (action, errno, value) in [
            ("SCMP_ACT_KILL", "", 0),
            ("SCMP_ACT_KILL_THREAD", "", 0),
            ("SCMP_ACT_KILL_PROCESS", "", 0x8000_0000),
            ("SCMP_ACT_TRAP", "", 0x0003_0000),
            ("SCMP_ACT_ERRNO", "", ERRNO | 1),
            ("SCMP_ACT_ERRNO", r#","errnoRet":38"#, ERRNO | 38),
            ("SCMP_ACT_TRACE", "", 0x7ff0_0001),
            ("SCMP_ACT_TRACE", r#","errnoRet":5"#, 0x7ff0_0005),
            ("SCMP_ACT_LOG", "", 0x7ffc_0000),
        ] {
            let filter = filter(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[
                    {{"names":["chmod","no_such_call","uselib"],"action":"{action}"{errno}}},
                    {{"names":["mkdir"],"action":"SCMP_ACT_ALLOW"}}]}}"#
            ));
            assert_eq!(native(&filter, libc::SYS_chmod, NO_ARGS), value, "{action}");
            assert_eq!(native(&filter, libc::SYS_mkdir, NO_ARGS), ALLOW);
        }
    }

    #[test]
    fn every_operator_compares() {
        for (op, value, two, met, unmet) in [
            ("SCMP_CMP_NE", 5, 0, 6, 5),
            ("SCMP_CMP_LT", 5, 0, 4, 5),
            ("SCMP_CMP_LE", 5, 0, 5, 6),
            ("SCMP_CMP_EQ", 5, 0, 5, 5 | 1 << 40),
            ("SCMP_CMP_GE", 5, 0, 5, 4),
            ("SCMP_CMP_GT", 5, 0, 1 << 33, 5),
            (
                "SCMP_CMP_MASKED_EQ",
                0x7e02_0000,
                0x0002_0000,
                0x0002_00ff,
                0x0402_0000,
            ),
        ] {
            let filter = filter(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["chmod"],"action":"SCMP_ACT_ERRNO",
                    "args":[{{"index":3,"value":{value},"valueTwo":{two},"op":"{op}"}}]}}]}}"#
            ));
            let call = |arg| native(&filter, libc::SYS_chmod, [0, 0, 0, arg, 0, 0]);
            assert_eq!((call(met), call(unmet)), (ERRNO | 1, ALLOW), "{op}");
        }
    }

    #[test]
    fn comparisons_are_all_met_but_for_those_of_one_argument() {
        let rule = |second: u32| {
            filter(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["chmod"],"action":"SCMP_ACT_ERRNO","args":[
                    {{"index":0,"value":1,"op":"SCMP_CMP_EQ"}},{{"index":{second},"value":2,"op":"SCMP_CMP_EQ"}}]}}]}}"#
            ))
        };
        let both = rule(1);
        assert_eq!(
            native(&both, libc::SYS_chmod, [1, 2, 0, 0, 0, 0]),
            ERRNO | 1
        );
        assert_eq!(native(&both, libc::SYS_chmod, [1, 1, 0, 0, 0, 0]), ALLOW);
        let either = rule(0);
        assert_eq!(
            native(&either, libc::SYS_chmod, [1, 0, 0, 0, 0, 0]),
            ERRNO | 1
        );
        assert_eq!(
            native(&either, libc::SYS_chmod, [2, 0, 0, 0, 0, 0]),
            ERRNO | 1
        );
        assert_eq!(native(&either, libc::SYS_chmod, [3, 0, 0, 0, 0, 0]), ALLOW);
    }

    #[test]
    fn each_architecture_has_its_numbers_and_others_are_killed() {
        let filter = filter(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":13,
                "architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86","SCMP_ARCH_X32"],
                "syscalls":[{"names":["getpid","openat2","socketcall"],"action":"SCMP_ACT_ALLOW"}]}"#,
        );
        let call = |arch, number| run(&filter.program, arch, number, NO_ARGS);
        let enosys = ERRNO | 38;
        assert_eq!(call(AUDIT_ARCH_X86_64, 39), ALLOW);
        assert_eq!(call(AUDIT_ARCH_X86_64, 40), ERRNO | 13);
        assert_eq!(call(AUDIT_ARCH_X86_64, 437), ALLOW);
        assert_eq!(call(AUDIT_ARCH_X86_64, 438), enosys);
        assert_eq!(call(AUDIT_ARCH_X86_64, X32_BIT | 39), ALLOW);
        assert_eq!(call(AUDIT_ARCH_X86_64, X32_BIT | 438), enosys);
        assert_eq!(call(AUDIT_ARCH_I386, 20), ALLOW);
        assert_eq!(call(AUDIT_ARCH_I386, 102), ALLOW);
        assert_eq!(call(AUDIT_ARCH_I386, 39), ERRNO | 13);
        assert_eq!(call(AUDIT_ARCH_I386, 438), enosys);
        // AArch64: not listed.
        assert_eq!(call(0xc000_00b7, 172), 0);
    }

    #[test]
    fn an_unlisted_architecture_is_killed_and_a_default_of_enosys_has_no_stub() {
        let plain = r#""syscalls":[{"names":["getpid"],"action":"SCMP_ACT_ALLOW"}]}"#;
        let only = filter(&format!(
            r#"{{"defaultAction":"SCMP_ACT_KILL_PROCESS",{plain}"#
        ));
        assert_eq!(run(&only.program, AUDIT_ARCH_I386, 20, NO_ARGS), 0);
        assert_eq!(
            run(&only.program, AUDIT_ARCH_X86_64, X32_BIT | 39, NO_ARGS),
            0
        );
        assert_eq!(native(&only, 39, NO_ARGS), ALLOW);
        assert_eq!(native(&only, 38, NO_ARGS), 0x8000_0000);
        assert_eq!(native(&only, 40, NO_ARGS), ERRNO | 38);
        for default in [
            r#""SCMP_ACT_ERRNO","defaultErrnoRet":38"#,
            r#""SCMP_ACT_LOG""#,
        ] {
            let seccomp = format!(r#"{{"defaultAction":{default},{plain}"#);
            let seccomp: Seccomp = crate::spec::parse(seccomp.as_bytes()).unwrap();
            assert!(stub(&seccomp).is_empty());
        }
    }

    #[test]
    fn flags_are_runcs() {
        for (flags, bits) in [
            ("", 4),
            (r#","flags":[]"#, 0),
            (
                r#","flags":["SECCOMP_FILTER_FLAG_LOG","SECCOMP_FILTER_FLAG_TSYNC"]"#,
                2,
            ),
            (r#","flags":["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]"#, 4),
        ] {
            let json = format!(r#"{{"defaultAction":"SCMP_ACT_ALLOW"{flags}}}"#);
            assert_eq!(filter(&json).flags, bits, "{flags}");
        }
    }

    #[test]
    fn foreign_byte_orders_are_refused_by_name() {
        let json = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_S390X"]}"#;
        let seccomp: Seccomp = crate::spec::parse(json.as_bytes()).unwrap();
        let failure = compile(&seccomp).err().unwrap();
        assert!(failure.reason.contains("S390X"), "{}", failure.reason);
    }

    #[test]
    fn an_empty_profile_is_none() {
        assert!(compile(&Seccomp::default()).unwrap().is_none());
    }
}
