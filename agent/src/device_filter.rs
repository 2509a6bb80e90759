//! Which device nodes a container may open or make: rules of the specification to an eBPF program.
//!
//! The rules mean what they meant to cgroup v1's devices controller, as runc and its users expect: a
//! rule for all devices sets the default and forgets the rest; any other adds to the exceptions or
//! takes from them. Pure but for [`attach`], called by `cgroup` before any process is inside.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;

use crate::spec::Problem;
use crate::spec::resources::DeviceRule;
use crate::sys::{Instruction, attach_device_program};

/// Block or character device, by the value in the program's context (`bpf_cgroup_dev_ctx`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Block = 1,
    Character = 2,
}

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// `None` is any number.
type Node = (Kind, Option<u32>, Option<u32>);

/// What runc allows to every container, after the rules of the specification.
const ALWAYS: [(Node, u32); 10] = [
    ((Kind::Character, None, None), MKNOD),
    ((Kind::Block, None, None), MKNOD),
    ((Kind::Character, Some(1), Some(3)), ALL), // null
    ((Kind::Character, Some(1), Some(5)), ALL), // zero
    ((Kind::Character, Some(1), Some(7)), ALL), // full
    ((Kind::Character, Some(1), Some(8)), ALL), // random
    ((Kind::Character, Some(1), Some(9)), ALL), // urandom
    ((Kind::Character, Some(5), Some(0)), ALL), // tty
    ((Kind::Character, Some(5), Some(2)), ALL), // ptmx
    ((Kind::Character, Some(136), None), ALL),  // pts/*
];

/// A default, and the nodes for which the contrary holds, with the ways of access it holds for.
#[derive(Debug, PartialEq, Eq)]
struct Policy {
    allow: bool,
    exceptions: BTreeMap<Node, u32>,
}

impl Policy {
    fn change(&mut self, node: Node, access: u32, allow: bool) {
        if allow != self.allow {
            *self.exceptions.entry(node).or_default() |= access;
        } else if let Some(left) = self.exceptions.get_mut(&node) {
            *left &= !access;
            if *left == 0 {
                self.exceptions.remove(&node);
            }
        }
    }

    fn of(rules: &[DeviceRule]) -> Result<Self, Problem> {
        // No rule at all is no restriction in cgroup v2, but runc's is a deny-all below its own rules.
        let mut policy = Self {
            allow: false,
            exceptions: BTreeMap::new(),
        };
        for (i, rule) in rules.iter().enumerate() {
            let at = |name| format!("linux.resources.devices[{i}].{name}");
            let number = |name, value: Option<i64>| match value {
                None | Some(-1) => Ok(None),
                Some(number) => u32::try_from(number)
                    .map(Some)
                    .map_err(|_| Problem::new(at(name), format!("{number} is no device number"))),
            };
            let (major, minor) = (number("major", rule.major)?, number("minor", rule.minor)?);
            let access = access(&rule.access).ok_or_else(|| {
                Problem::new(at("access"), format!("{:?} is not of r, w, m", rule.access))
            })?;
            let kind = match rule.kind.as_str() {
                "c" | "u" => Kind::Character,
                "b" => Kind::Block,
                "" | "a" if major.is_none() && minor.is_none() && access == ALL => {
                    policy = Self {
                        allow: rule.allow,
                        exceptions: BTreeMap::new(),
                    };
                    continue;
                }
                "" | "a" => {
                    return Err(Problem::new(
                        at("type"),
                        "a rule for all types must be for all devices and all access",
                    ));
                }
                other => {
                    return Err(Problem::new(
                        at("type"),
                        format!("{other:?} is none of a, c, b"),
                    ));
                }
            };
            policy.change((kind, major, minor), access, rule.allow);
        }
        for (node, access) in ALWAYS {
            policy.change(node, access, true);
        }
        Ok(policy)
    }
}

fn access(text: &str) -> Option<u32> {
    if text.is_empty() {
        return Some(ALL);
    }
    text.chars().try_fold(0, |bits, letter| match letter {
        'r' => Some(bits | READ),
        'w' => Some(bits | WRITE),
        'm' => Some(bits | MKNOD),
        _ => None,
    })
}

// Instruction codes: class, size or operation, and whether the operand is immediate (K) or a register (X).
const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const AND_K: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K, 32 bits
const SHIFT_RIGHT_K: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const MOVE_X: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const MOVE_K: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const UNLESS_EQUAL_K: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const UNLESS_EQUAL_X: u8 = 0x5e; // BPF_JMP32 | BPF_JNE | BPF_X
const IF_EQUAL_K: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: (from << 4) | to,
        offset,
        immediate,
    }
}

/// The program for `rules`: 1 in register 0 allows, 0 denies.
fn program(rules: &[DeviceRule]) -> Result<Vec<Instruction>, Problem> {
    let policy = Policy::of(rules)?;
    let mut code = vec![
        // access_type: kind in the low, ways of access in the high 16 bits; then major and minor.
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_X, ACCESS, KIND, 0, 0),
        instruction(AND_K, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT_K, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for (&(kind, major, minor), &ways) in &policy.exceptions {
        let mut block = vec![instruction(UNLESS_EQUAL_K, KIND, 0, 0, kind as i32)];
        if ways != ALL {
            block.push(instruction(MOVE_X, SCRATCH, ACCESS, 0, 0));
            block.push(instruction(AND_K, SCRATCH, 0, 0, ways as i32));
            block.push(if policy.allow {
                // Denied: one forbidden way is enough.
                instruction(IF_EQUAL_K, SCRATCH, 0, 0, 0)
            } else {
                // Allowed: every way asked for must be among them.
                instruction(UNLESS_EQUAL_X, SCRATCH, ACCESS, 0, 0)
            });
        }
        for (register, number) in [(MAJOR, major), (MINOR, minor)] {
            if let Some(number) = number {
                block.push(instruction(UNLESS_EQUAL_K, register, 0, 0, number as i32));
            }
        }
        block.push(instruction(MOVE_K, RESULT, 0, 0, i32::from(!policy.allow)));
        block.push(instruction(EXIT, 0, 0, 0, 0));
        // A jump counts from the instruction after it, and leads to the next block.
        let length = i16::try_from(block.len()).unwrap_or(i16::MAX);
        for (next, step) in (1..).zip(&mut block) {
            if matches!(step.code, UNLESS_EQUAL_K | UNLESS_EQUAL_X | IF_EQUAL_K) {
                step.offset = length.saturating_sub(next);
            }
        }
        code.append(&mut block);
    }
    code.push(instruction(MOVE_K, RESULT, 0, 0, i32::from(policy.allow)));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    Ok(code)
}

/// The kernel stops checking a program (EAGAIN) when a signal comes meanwhile, and every child that
/// ends sends PID 1 one.
const ATTEMPTS: usize = 64;

/// Why a filter is not in place.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error(transparent)]
    Rules(#[from] Problem),
    #[error("attach the device filter to the cgroup: {0}")]
    Attach(io::Error),
}

/// Puts the filter for `rules` on a cgroup.
pub fn attach(cgroup: BorrowedFd, rules: &[DeviceRule]) -> Result<(), FilterError> {
    let program = program(rules)?;
    let mut again = 1..ATTEMPTS;
    loop {
        match attach_device_program(cgroup, &program) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && again.next().is_some() => {}
            other => return other.map_err(FilterError::Attach),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(
        allow: bool,
        kind: &str,
        major: Option<i64>,
        minor: Option<i64>,
        access: &str,
    ) -> DeviceRule {
        DeviceRule {
            allow,
            kind: kind.into(),
            major,
            minor,
            access: access.into(),
        }
    }

    /// Runs a program as the kernel would.
    fn run(code: &[Instruction], kind: Kind, access: u32, major: u32, minor: u32) -> bool {
        let context = [kind as u32 | access << 16, major, minor];
        let mut registers = [0u32; 11];
        let mut at = 0usize;
        loop {
            let step = code[at];
            let (to, from) = (
                usize::from(step.registers & 15),
                usize::from(step.registers >> 4),
            );
            at += 1;
            let immediate = step.immediate as u32;
            let jump = match step.code {
                LOAD_WORD => {
                    registers[to] = context[step.offset as usize / 4];
                    false
                }
                AND_K => {
                    registers[to] &= immediate;
                    false
                }
                SHIFT_RIGHT_K => {
                    registers[to] >>= immediate;
                    false
                }
                MOVE_X => {
                    registers[to] = registers[from];
                    false
                }
                MOVE_K => {
                    registers[to] = immediate;
                    false
                }
                UNLESS_EQUAL_K => registers[to] != immediate,
                UNLESS_EQUAL_X => registers[to] != registers[from],
                IF_EQUAL_K => registers[to] == immediate,
                EXIT => return registers[0] == 1,
                other => panic!("code {other:#x}"),
            };
            if jump {
                at = at.checked_add_signed(isize::from(step.offset)).unwrap();
            }
        }
    }

    #[test]
    fn deny_all_leaves_the_usual_devices() {
        let code = program(&[rule(false, "", None, None, "rwm")]).unwrap();
        assert!(run(&code, Kind::Character, READ | WRITE, 1, 3));
        assert!(run(&code, Kind::Character, READ, 136, 7));
        assert!(run(&code, Kind::Block, MKNOD, 8, 0));
        assert!(!run(&code, Kind::Block, READ, 8, 0));
        assert!(!run(&code, Kind::Block, MKNOD | READ, 8, 0));
        assert!(!run(&code, Kind::Character, WRITE, 1, 1));
        assert!(!run(&code, Kind::Block, READ, 1, 3));
    }

    #[test]
    fn rules_add_up_and_take_away() {
        let code = program(&[
            rule(false, "a", None, None, ""),
            rule(true, "b", Some(8), None, "r"),
            rule(true, "b", Some(8), None, "w"),
            rule(false, "b", Some(8), None, "w"),
            rule(true, "c", Some(10), Some(200), "rwm"),
        ])
        .unwrap();
        assert!(run(&code, Kind::Block, READ, 8, 1));
        assert!(!run(&code, Kind::Block, READ | WRITE, 8, 1));
        assert!(run(&code, Kind::Character, ALL, 10, 200));
        assert!(!run(&code, Kind::Character, READ, 10, 201));
    }

    #[test]
    fn allow_all_with_an_exception() {
        let code = program(&[
            rule(true, "a", Some(-1), Some(-1), "rwm"),
            rule(false, "b", Some(8), Some(0), "w"),
        ])
        .unwrap();
        assert!(run(&code, Kind::Block, READ, 8, 0));
        assert!(!run(&code, Kind::Block, READ | WRITE, 8, 0));
        assert!(run(&code, Kind::Block, WRITE, 8, 1));
    }

    #[test]
    fn wrong_rules_name_the_field() {
        for (wrong, field) in [
            (rule(true, "x", None, None, ""), "type"),
            (rule(true, "a", Some(1), None, ""), "type"),
            (rule(true, "c", Some(-2), None, ""), "major"),
            (rule(true, "c", None, None, "q"), "access"),
        ] {
            let error = program(&[wrong]).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("linux.resources.devices[0].{field}")),
                "{error}"
            );
        }
    }

    #[test]
    fn the_kernel_accepts_the_program() {
        let root = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"]
            .into_iter()
            .find(|path| std::path::Path::new(path).join("cgroup.procs").exists());
        let Some(root) = root.filter(|_| rustix::process::geteuid().is_root()) else {
            eprintln!("SKIPPED: needs root and cgroup v2");
            return;
        };
        let path = format!("{root}/husk-device-filter-{}", std::process::id());
        std::fs::create_dir(&path).unwrap();
        let directory = std::os::fd::OwnedFd::from(std::fs::File::open(&path).unwrap());
        let rules = [
            rule(false, "", None, None, "rwm"),
            rule(true, "b", Some(8), None, "r"),
        ];
        let attached = attach(std::os::fd::AsFd::as_fd(&directory), &rules);
        drop(directory);
        std::fs::remove_dir(&path).unwrap();
        attached.unwrap();
    }
}
