//! seccomp filters, made of the lists in [`syscalls`](super::syscalls).
//!
//! The kernel runs all filters that a thread has, and the strictest answer counts. A call that is not
//! allowed kills the process (SIGSYS), and leaves a line in the kernel's log that names the call.
//!
//! A filter finds its call by halving, since the kernel tries each filter on every number there is when
//! it is installed: by one comparison after the other, that took a start 2.3 ms more.

use std::{collections::BTreeMap, process};

use libc::{c_long, sock_filter, sock_fprog};

use super::{
    JailError, check,
    syscalls::{self, Allowed, Condition},
    threads::Role,
};

/// AUDIT_ARCH_X86_64.
const ARCHITECTURE: u32 = 0xc000_003e;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
/// As on a kernel that does not know the call.
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

type Program = Vec<sock_filter>;

/// For the process: what any of its threads needs.
pub(super) fn process() -> Program {
    compile(&syscalls::all())
}

/// For one thread.
pub(super) fn thread(role: Role) -> Program {
    compile(&syscalls::of(role))
}

/// Confines the calling thread, and those that it will make, to `program` and what confined it before.
pub(super) fn install(mut program: Program) -> Result<(), JailError> {
    let program = sock_fprog {
        // All of them have less than the 4096 that the kernel takes.
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: a live program of the length given, which the kernel copies.
    check("install a seccomp filter", unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    })?;
    Ok(())
}

/// By number: what may be asked of the call, each a list of conditions; none for anything.
type Rules = BTreeMap<c_long, Vec<&'static [Condition]>>;

fn compile(lists: &[&'static [Allowed]]) -> Program {
    let mut rules = Rules::new();
    for Allowed(call, conditions) in lists.iter().copied().flatten() {
        rules.entry(*call).or_default().push(conditions);
    }
    // struct seccomp_data: the call's number, the ABI's architecture, the instruction, the arguments.
    let mut program = vec![load(4), equals(ARCHITECTURE, 1, 0), answer(KILL), load(0)];
    program.extend(among(&leaves(&rules)));
    program
}

/// The answers to one call each, or to calls in a row that are allowed whatever is asked of them; with the
/// lowest number, ascending.
fn leaves(rules: &Rules) -> Vec<(u32, Program)> {
    let mut leaves = Vec::new();
    let mut rules = rules.iter().peekable();
    while let Some((call, asked)) = rules.next() {
        let first = *call as u32;
        if !is_free(*call, asked) {
            leaves.push((first, one(*call, asked)));
            continue;
        }
        let mut last = *call;
        while let Some((next, _)) =
            rules.next_if(|(next, asked)| **next == last + 1 && is_free(**next, asked))
        {
            last = *next;
        }
        leaves.push((first, row(first, last as u32)));
    }
    leaves
}

/// Finds the number among those of the leaves.
fn among(leaves: &[(u32, Program)]) -> Program {
    match leaves {
        [] => vec![answer(KILL)],
        [(_, only)] => only.clone(),
        _ => {
            let (lower, upper) = leaves.split_at(leaves.len() / 2);
            let first = upper.first().map_or(0, |(call, _)| *call);
            let lower = among(lower);
            let mut program = match u8::try_from(lower.len()) {
                Ok(near) => vec![at_least(first, near, 0)],
                Err(_) => vec![at_least(first, 0, 1), skip(lower.len())],
            };
            program.extend(lower);
            program.extend(among(upper));
            program
        }
    }
}

/// One without conditions is allowed whatever other lists ask for.
fn is_free(call: c_long, asked: &[&'static [Condition]]) -> bool {
    call != libc::SYS_clone3 && asked.iter().any(|conditions| conditions.is_empty())
}

/// The answer to calls from `first` to `last`, if it is one of them.
fn row(first: u32, last: u32) -> Program {
    vec![
        at_least(first, 0, 1),
        at_least(last + 1, 0, 1),
        answer(KILL),
        answer(libc::SECCOMP_RET_ALLOW),
    ]
}

/// The answer to one call with conditions, if it is that.
fn one(call: c_long, asked: &[&'static [Condition]]) -> Program {
    let mut program = vec![equals(call as u32, 1, 0), answer(KILL)];
    if call == libc::SYS_clone3 {
        program.push(answer(UNKNOWN));
        return program;
    }
    // ioctl(2) has dozens of requests: its argument is looked at once for all of them.
    let mut values: BTreeMap<u8, Vec<u32>> = BTreeMap::new();
    for conditions in asked {
        match conditions {
            [Condition::Is(index, value)] => values.entry(*index).or_default().push(*value),
            conditions => program.extend(when(conditions)),
        }
    }
    for (index, values) in values {
        program.push(load_argument(index));
        for (value, behind) in values.iter().zip((1..=values.len()).rev()) {
            program.push(equals(*value, behind as u8, 0));
        }
        program.extend([skip(1), answer(libc::SECCOMP_RET_ALLOW)]);
    }
    program.push(answer(KILL));
    program
}

/// Allows the call if all conditions hold, and goes on behind if not.
fn when(conditions: &[Condition]) -> Program {
    let mut program = vec![answer(libc::SECCOMP_RET_ALLOW)];
    for condition in conditions.iter().rev() {
        let (index, mask, value) = match *condition {
            Condition::Is(index, value) => (index, u32::MAX, value),
            Condition::Lacks(index, bits) => (index, bits, 0),
            Condition::OwnPid(index) => (index, u32::MAX, process::id()),
        };
        let mut test = vec![load_argument(index)];
        if mask != u32::MAX {
            test.push(instruction(libc::BPF_ALU | libc::BPF_AND, 0, 0, mask));
        }
        test.extend([equals(value, 1, 0), skip(program.len())]);
        test.extend(program);
        program = test;
    }
    program
}

/// Its lower half.
fn load_argument(index: u8) -> sock_filter {
    load(16 + 8 * u32::from(index))
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

/// Skips so many instructions if what was loaded is `value`, and so many if not.
fn equals(value: u32, then: u8, otherwise: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JEQ, then, otherwise, value)
}

fn at_least(value: u32, then: u8, otherwise: u8) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JGE, then, otherwise, value)
}

fn skip(instructions: usize) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, instructions as u32)
}

fn answer(answer: u32) -> sock_filter {
    instruction(libc::BPF_RET, 0, 0, answer)
}

/// Of classic BPF (Linux `Documentation/networking/filter.rst`), with a constant operand.
fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    let code = (code | libc::BPF_K) as u16;
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLES: [Role; 4] = [Role::Service, Role::Vcpu, Role::Vsock, Role::Files];

    /// What the kernel would answer.
    fn run(program: &Program, architecture: u32, call: u32, args: [u32; 6]) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match code {
                0x20 => {
                    loaded = match k {
                        0 => call,
                        4 => architecture,
                        _ => args[(k as usize - 16) / 8],
                    }
                }
                0x54 => loaded &= k,
                0x05 => at += k as usize,
                0x15 => at += usize::from(if loaded == k { jt } else { jf }),
                0x35 => at += usize::from(if loaded >= k { jt } else { jf }),
                0x06 => return k,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    /// Arguments that meet the conditions.
    fn fitting(conditions: &[Condition]) -> [u32; 6] {
        let mut args = [0; 6];
        for condition in conditions {
            match *condition {
                Condition::Is(index, value) => args[usize::from(index)] = value,
                Condition::Lacks(index, bits) => args[usize::from(index)] = !bits,
                Condition::OwnPid(index) => args[usize::from(index)] = process::id(),
            }
        }
        args
    }

    #[test]
    fn what_is_listed_is_allowed_and_nothing_else() {
        for role in ROLES {
            let (own, all) = (thread(role), process());
            assert!(own.len() < 4096 && all.len() < 4096);
            for call in 0..1024 {
                let listed: Vec<_> = syscalls::of(role)
                    .into_iter()
                    .flatten()
                    .filter(|allowed| allowed.0 == c_long::from(call))
                    .collect();
                for Allowed(_, conditions) in &listed {
                    for program in [&own, &all] {
                        let answer = run(program, ARCHITECTURE, call, fitting(conditions));
                        assert_eq!(answer, libc::SECCOMP_RET_ALLOW, "{role:?} {call}");
                    }
                }
                let odd = run(&own, ARCHITECTURE, call, [0xdead_beef; 6]);
                let any = listed.iter().any(|allowed| allowed.1.is_empty());
                assert_eq!(odd == libc::SECCOMP_RET_ALLOW, any, "{role:?} {call}");
                assert_eq!(run(&own, 0x4000_0003, call, [0; 6]), KILL);
                assert_eq!(run(&all, ARCHITECTURE, call | 1 << 30, [0; 6]), KILL);
            }
        }
    }

    #[test]
    fn clone3_is_unknown_and_clone_makes_threads_only() {
        let all = process();
        let clone = |number: c_long, flags| run(&all, ARCHITECTURE, number as u32, [flags; 6]);
        assert_eq!(clone(libc::SYS_clone3, 0), UNKNOWN);
        assert_eq!(clone(libc::SYS_clone, libc::SIGCHLD as u32), KILL);
        assert_eq!(clone(libc::SYS_clone, libc::CLONE_NEWUSER as u32), KILL);
    }
}
