//! seccomp filters, made of the lists in [`syscalls`](super::syscalls).
//!
//! The kernel runs all filters that a thread has, and the strictest answer counts. A call that is not
//! allowed kills the process (SIGSYS), and leaves a line in the kernel's log that names the call.
//!
//! A filter finds its call by halving, since the kernel tries each filter on every number there is when
//! it is installed: by one comparison after the other, that took a start 2.3 ms more.

use std::{
    collections::{BTreeMap, BTreeSet},
    process,
};

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

/// Instructions in the order of their running. Those of a part that is not [`finish`]ed may jump to
/// [`ALLOW`] and [`DENY`].
type Program = Vec<sock_filter>;

/// Places of conditional jumps that a part does not have yet: the answers, which many jumps share. A
/// program of 400 instructions took the kernel 0.8 ms to make machine code of, one of 200 half of it.
const ALLOW: u8 = 254;
const DENY: u8 = 255;
/// Instructions of a part, so that its answers are within reach of all its jumps.
const PART: usize = 200;

/// For the process: what any of its threads needs.
pub(super) fn process() -> Program {
    compile(rules(&syscalls::all()))
}

/// For one thread. What is asked of the calls that all threads make is the process's filter to see.
pub(super) fn thread(role: Role) -> Program {
    let [common, own] = syscalls::of(role);
    let mut rules = rules(&[own]);
    for Allowed(call, _) in common {
        rules.insert(*call, vec![&[]]);
    }
    compile(rules)
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

fn rules(lists: &[&'static [Allowed]]) -> Rules {
    let mut rules = Rules::new();
    for Allowed(call, conditions) in lists.iter().copied().flatten() {
        rules.entry(*call).or_default().push(conditions);
    }
    rules
}

fn compile(rules: Rules) -> Program {
    // struct seccomp_data: the call's number, the ABI's architecture, the instruction, the arguments.
    let mut program = vec![load(4), equals(ARCHITECTURE, 1, 0), answer(KILL), load(0)];
    find(&leaves(&rules), &mut program);
    program
}

/// The answers to one call each, or to calls in a row that are allowed whatever is asked of them, when the
/// number is not below the first; with that, ascending from 0.
fn leaves(rules: &Rules) -> Vec<(u32, Program)> {
    let mut leaves = Vec::new();
    if !rules.contains_key(&0) {
        leaves.push((0, vec![answer(KILL)]));
    }
    let mut rules = rules.iter().peekable();
    while let Some((call, asked)) = rules.next() {
        let mut last = *call;
        if is_free(*call, asked) {
            while let Some((next, _)) =
                rules.next_if(|(next, asked)| **next == last + 1 && is_free(**next, asked))
            {
                last = *next;
            }
            leaves.push((*call as u32, vec![at_least(last as u32 + 1, DENY, ALLOW)]));
        } else {
            leaves.push((*call as u32, one(*call, asked)));
        }
    }
    leaves
}

/// Finds the number among those of the leaves.
fn find(leaves: &[(u32, Program)], program: &mut Program) {
    let size: usize = leaves.iter().map(|(_, leaf)| leaf.len() + 1).sum();
    if size <= PART || leaves.len() < 2 {
        let start = program.len();
        find_near(leaves, program);
        finish(program, start);
        return;
    }
    let (lower, upper) = leaves.split_at(leaves.len() / 2);
    let first = upper.first().map_or(0, |(call, _)| *call);
    program.extend([at_least(first, 0, 1), skip(0)]);
    let from = program.len();
    find(lower, program);
    let over = program.len() - from;
    if let Some(jump) = program.get_mut(from - 1) {
        *jump = skip(over);
    }
    find(upper, program);
}

/// As [`find`], in one part.
fn find_near(leaves: &[(u32, Program)], program: &mut Program) {
    match leaves {
        [] => program.push(answer(KILL)),
        [(_, only)] => program.extend_from_slice(only),
        _ => {
            let (lower, upper) = leaves.split_at(leaves.len() / 2);
            let first = upper.first().map_or(0, |(call, _)| *call);
            let at = program.len();
            program.push(at_least(first, 0, 0));
            find_near(lower, program);
            let over = program.len() - at - 1;
            if let Some(jump) = program.get_mut(at) {
                jump.jt = near(over);
            }
            find_near(upper, program);
        }
    }
}

/// Adds the answers that the part from `start` on jumps to.
fn finish(program: &mut Program, start: usize) {
    let allow = program.len();
    for (at, instruction) in program.iter_mut().enumerate().skip(start) {
        for jump in [&mut instruction.jt, &mut instruction.jf] {
            // From behind the instruction.
            match *jump {
                ALLOW => *jump = near(allow - at - 1),
                DENY => *jump = near(allow - at),
                _ => {}
            }
        }
    }
    program.extend([answer(libc::SECCOMP_RET_ALLOW), answer(KILL)]);
}

/// A distance within a part. One that is too far would let a call through that it should not: no VMM runs then.
fn near(instructions: usize) -> u8 {
    assert!(
        instructions < usize::from(ALLOW),
        "a seccomp filter's part is too long"
    );
    instructions as u8
}

/// One without conditions is allowed whatever other lists ask for.
fn is_free(call: c_long, asked: &[&'static [Condition]]) -> bool {
    call != libc::SYS_clone3 && asked.iter().any(|conditions| conditions.is_empty())
}

/// The answer to one call with conditions, if it is that.
fn one(call: c_long, asked: &[&'static [Condition]]) -> Program {
    let mut program = vec![at_least(call as u32 + 1, DENY, 0)];
    if call == libc::SYS_clone3 {
        program.push(answer(UNKNOWN));
        return program;
    }
    // ioctl(2) has dozens of requests: its argument is looked at once for all of them.
    let mut values: BTreeMap<u8, BTreeSet<u32>> = BTreeMap::new();
    for conditions in asked {
        match conditions {
            [Condition::Is(index, value)] => {
                values.entry(*index).or_default().insert(*value);
            }
            conditions => program.extend(when(conditions)),
        }
    }
    for (index, values) in values {
        program.push(load_argument(index));
        program.extend(values.iter().map(|value| equals(*value, ALLOW, 0)));
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
                let odd = [&own, &all].map(|program| {
                    let answer = run(program, ARCHITECTURE, call, [0xdead_beef; 6]);
                    answer == libc::SECCOMP_RET_ALLOW
                });
                let any = listed.iter().any(|allowed| allowed.1.is_empty());
                assert_eq!(odd == [true; 2], any, "{role:?} {call}");
                if listed.is_empty() {
                    assert!(!odd[0], "{role:?} {call}");
                }
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
