//! seccomp filters: made of the lists in [`syscalls`](super::syscalls), by seccompiler.
//!
//! The kernel runs all filters that a thread has, and the strictest answer counts. A call that is not
//! allowed kills the process (SIGSYS), and leaves a line in the kernel's log that names the call.

use std::{collections::BTreeMap, io, process};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen::Dword, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::{
    JailError,
    syscalls::{self, Allowed, Condition},
    threads::Role,
};

/// For the process: what any of its threads needs.
pub(super) fn process() -> Result<BpfProgram, JailError> {
    compile(&syscalls::all())
}

/// For one thread.
pub(super) fn thread(role: Role) -> Result<BpfProgram, JailError> {
    compile(&syscalls::of(role))
}

/// Has clone3 fail as on a kernel that does not know it.
pub(super) fn without_clone3() -> Result<BpfProgram, JailError> {
    program(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )
}

/// Confines the calling thread, and those that it will make, to `program` and what confined it before.
pub(super) fn install(program: BpfProgram) -> Result<(), JailError> {
    seccompiler::apply_filter(&program).map_err(failed("install a seccomp filter"))
}

fn compile(lists: &[&[Allowed]]) -> Result<BpfProgram, JailError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let calls = || lists.iter().copied().flatten();
    for Allowed(call, conditions) in calls() {
        let alternatives = rules.entry(*call).or_default();
        if !conditions.is_empty() {
            alternatives.push(rule(conditions)?);
        }
    }
    // One without conditions is allowed whatever other lists ask for: no alternatives, for seccompiler.
    for Allowed(call, _) in calls().filter(|allowed| allowed.1.is_empty()) {
        rules.insert(*call, Vec::new());
    }
    program(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

fn rule(conditions: &[Condition]) -> Result<SeccompRule, JailError> {
    let conditions = conditions.iter().map(|condition| {
        let (index, operation, value) = match *condition {
            Condition::Is(index, value) => (index, SeccompCmpOp::Eq, value),
            Condition::Lacks(index, bits) => (index, SeccompCmpOp::MaskedEq(bits.into()), 0),
            Condition::OwnPid(index) => (index, SeccompCmpOp::Eq, process::id()),
        };
        SeccompCondition::new(index, Dword, operation, value.into())
    });
    let conditions = conditions.collect::<Result<_, _>>();
    conditions
        .and_then(SeccompRule::new)
        .map_err(failed("make a seccomp rule"))
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, JailError> {
    SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(failed("make a seccomp filter"))
}

fn failed<E: std::error::Error + Send + Sync + 'static>(
    step: &'static str,
) -> impl FnOnce(E) -> JailError {
    move |e| JailError::of(step)(io::Error::other(e))
}
