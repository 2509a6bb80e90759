//! A guest without a kernel: instructions that touch the processor's registers, one after the other, and a
//! letter on the serial port for each.
//!
//! A system of its own in a few instructions: it starts where a Linux kernel would (64-bit mode, flat
//! segments, its memory mapped as it is), has a table for interrupts with one entry, for the general
//! protection fault, and ends by a fault that nobody handles.

use std::arch::global_asm;

/// What to do to a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Act {
    /// RDMSR.
    Read = 0,
    /// WRMSR of zero.
    Write = 1,
    /// RDPMC.
    ReadCounter = 2,
}

/// The letter for what was done.
pub const DONE: char = '+';
/// The letter for what met a general protection fault.
pub const REFUSED: char = '-';

/// Where it is loaded and starts; its stack ends so much further up.
const ADDRESS: u64 = 0x10_0000;
const SIZE: u64 = 0x2_0000;
/// Bytes of the file before it: the ELF headers.
const OFFSET: u64 = 0x1000;

// All three instructions are two bytes long, which the fault's handler passes over. ESI walks over the list
// behind the code: act and register, both 32 bits, the end of it an act of all ones.
global_asm!(
    ".pushsection .rodata.husk_bare, \"a\"",
    "husk_bare_start:",
    "lea rsp, [rip + husk_bare_start + 0x20000]",
    "lea rdi, [rip + 90f]",
    "lea rax, [rip + 80f]",
    // Entry 13: an interrupt gate of ring 0, for the code segment that a kernel starts with.
    "mov word ptr [rdi + 13 * 16], ax",
    "mov word ptr [rdi + 13 * 16 + 2], 0x10",
    "mov word ptr [rdi + 13 * 16 + 4], 0x8e00",
    "shr rax, 16",
    "mov word ptr [rdi + 13 * 16 + 6], ax",
    "push rdi",
    "sub rsp, 2",
    "mov word ptr [rsp], 14 * 16 - 1",
    "lidt [rsp]",
    "lea rsi, [rip + husk_bare_end]",
    "20:",
    "mov edi, dword ptr [rsi]",
    "mov ecx, dword ptr [rsi + 4]",
    "add rsi, 8",
    "mov bl, 43",
    "xor eax, eax",
    "xor edx, edx",
    "cmp edi, 1",
    "jb 30f",
    "je 40f",
    "cmp edi, 2",
    "jne 70f",
    "rdpmc",
    "jmp 50f",
    "30:",
    "rdmsr",
    "jmp 50f",
    "40:",
    "wrmsr",
    "50:",
    "mov al, bl",
    "mov dx, 0x3f8",
    "out dx, al",
    "jmp 20b",
    "70:",
    "mov word ptr [rsp], 0",
    "lidt [rsp]",
    "ud2",
    // A fault: its error code, then where it was.
    "80:",
    "mov bl, 45",
    "add qword ptr [rsp + 8], 2",
    "add rsp, 8",
    "iretq",
    ".balign 16",
    "90:",
    ".zero 14 * 16",
    "husk_bare_end:",
    ".popsection",
);

unsafe extern "C" {
    static husk_bare_start: u8;
    static husk_bare_end: u8;
}

/// An ELF file that [`Machine::boot`](crate::machine::Machine::boot) takes for a kernel, and that does all of
/// `acts` in their order.
pub fn kernel(acts: &[(Act, u32)]) -> Vec<u8> {
    let (start, end) = (&raw const husk_bare_start, &raw const husk_bare_end);
    // SAFETY: both are ends of the code above, which is read-only data of this program.
    let code = unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) };
    let acts = acts
        .iter()
        .flat_map(|(act, register)| [*act as u32, *register]);
    let acts = acts.chain([u32::MAX; 2]).flat_map(u32::to_le_bytes);
    let body: Vec<u8> = code.iter().copied().chain(acts).collect();

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // An executable for x86-64, and where it starts; one program header, right behind this one.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend([ADDRESS, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    // To be loaded, all of it, and to be run.
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let length = body.len() as u64;
    let header = [OFFSET, ADDRESS, ADDRESS, length, SIZE, OFFSET];
    file.extend(header.into_iter().flat_map(u64::to_le_bytes));
    file.resize(OFFSET as usize, 0);
    file.extend(body);
    file
}
