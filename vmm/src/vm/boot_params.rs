//! What the kernel finds in memory when it starts: the "zero page", command line, initrd, and the
//! page tables and descriptors of its 64-bit entry (Linux `Documentation/arch/x86/boot.rst`,
//! `zero-page.rst`).
//!
//! Everything is written once, before the first vCPU runs.

use std::{fs::File, io};

use crate::memory::{self, Bytes, GuestAddress, GuestRam, MMIO_START, RAM_GRANULE};

/// Guest physical addresses of the boot structures, all in the first 640 KiB.
pub const GDT: u64 = 0x500;
pub const ZERO_PAGE: u64 = 0x7000;
const RNG_SEED: u64 = 0x8000;
pub const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const CMDLINE: u64 = 0x2_0000;
/// End of what the kernel may use below 1 MiB; the MP table lies behind it.
const LOW_RAM_END: u64 = 0x9_fc00;
const ONE_MIB: u64 = 1 << 20;

/// Bytes of the longest command line, with its final zero (the kernel's COMMAND_LINE_SIZE).
const CMDLINE_MAX: usize = 2048;

/// The VMM's own part of the kernel command line.
///
/// * `quiet` first, or all that was printed before it was read would be printed.
/// * `earlyprintk`: the console is the early serial port and stays it: no tty driver, see
///   `devices::console`.
/// * `reboot=k`: a reset comes by port 0x64. `panic=-1`: at once, for nobody will look.
/// * `pci=conf1,noearly`: no search for other ways to reach the configuration space, and none for
///   the quirks of chipsets.
/// * `retain_initrd`: its pages stay those of the file, shared with other pods; to free them the
///   kernel would write each.
/// * `numdummies`, `numifbs`: interfaces that nobody has asked for.
const OWN_CMDLINE: &str = "quiet earlyprintk=serial,ttyS0,115200,keep reboot=k panic=-1 pci=conf1,noearly \
     retain_initrd dummy.numdummies=0 ifb.numifbs=0";

/// Offsets in the zero page (`struct boot_params`).
mod offset {
    pub(super) const E820_ENTRIES: u64 = 0x1e8;
    pub(super) const BOOT_FLAG: u64 = 0x1fe;
    pub(super) const HEADER: u64 = 0x202;
    pub(super) const VERSION: u64 = 0x206;
    pub(super) const TYPE_OF_LOADER: u64 = 0x210;
    pub(super) const LOADFLAGS: u64 = 0x211;
    pub(super) const RAMDISK_IMAGE: u64 = 0x218;
    pub(super) const RAMDISK_SIZE: u64 = 0x21c;
    pub(super) const CMD_LINE_PTR: u64 = 0x228;
    pub(super) const CMDLINE_SIZE: u64 = 0x238;
    pub(super) const SETUP_DATA: u64 = 0x250;
    pub(super) const E820_TABLE: u64 = 0x2d0;
}

const E820_RAM: u32 = 1;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_PROTOCOL: u16 = 0x020f;
const LOADER_UNDEFINED: u8 = 0xff;
/// Load flags: a kernel above 1 MiB, and leave to place its memory regions at random.
const LOADED_HIGH: u8 = 1 << 0;
const KASLR: u8 = 1 << 1;
/// `struct setup_data` of type SETUP_RNG_SEED.
const SETUP_RNG_SEED: u32 = 9;
const RNG_SEED_SIZE: usize = 32;

/// Why the kernel's surroundings could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum BootParamsError {
    #[error("cmdline: {length} bytes with the VMM's own; at most {}", CMDLINE_MAX - 1)]
    CmdlineTooLong { length: usize },
    #[error("cmdline: has a byte that is not printable ASCII")]
    CmdlineByte,
    #[error("initrd: {size} bytes do not fit between the kernel's end {start:#x} and {end:#x}")]
    InitrdDoesNotFit { size: u64, start: u64, end: u64 },
    #[error("initrd: is empty")]
    InitrdEmpty,
    #[error("initrd: fstat: {0}")]
    Initrd(#[source] io::Error),
    #[error("initrd: mmap: {0}")]
    MapInitrd(#[source] io::Error),
    #[error("getrandom: {0}")]
    Random(io::Error),
    #[error("boot parameters: write to guest memory: {0}")]
    Memory(#[from] crate::memory::GuestMemoryError),
}

/// Where the initrd lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    address: u64,
    size: u64,
}

/// The whole command line: the VMM's part, then the client's. `vcpus` is set for a guest that knows of more
/// vCPUs than it starts with.
///
/// `noreplace-smp` then: a kernel on one CPU takes the bus locks out of itself, and would put them back
/// when the second comes, in thousands of places of pages that all clones share.
pub fn cmdline(extra: &str, vcpus: Option<u8>) -> Result<String, BootParamsError> {
    if !extra.bytes().all(|b| (b' '..=b'~').contains(&b)) {
        return Err(BootParamsError::CmdlineByte);
    }
    let mut line = OWN_CMDLINE.to_string();
    if let Some(vcpus) = vcpus {
        line.push_str(&format!(" maxcpus={vcpus} noreplace-smp"));
    }
    match extra.trim() {
        "" => {}
        extra => line.extend([" ", extra]),
    }
    if line.len() >= CMDLINE_MAX {
        return Err(BootParamsError::CmdlineTooLong { length: line.len() });
    }
    Ok(line)
}

/// Maps the initrd behind the kernel. The end of memory, where others put it, is left to the kernel's
/// own first allocations, which fill huge pages there.
pub fn load_initrd(
    file: &File,
    ram: &GuestRam,
    kernel_end: u64,
    ram_end: u64,
) -> Result<Initrd, BootParamsError> {
    let metadata = file.metadata().map_err(BootParamsError::Initrd)?;
    let size = metadata.len();
    if size == 0 {
        return Err(BootParamsError::InitrdEmpty);
    }
    let address = kernel_end.next_multiple_of(RAM_GRANULE);
    let end = ram_end.min(MMIO_START);
    if address.checked_add(size).is_none_or(|behind| behind > end) {
        return Err(BootParamsError::InitrdDoesNotFit {
            size,
            start: address,
            end,
        });
    }
    memory::map_file(ram, address, file, size).map_err(BootParamsError::MapInitrd)?;
    Ok(Initrd { address, size })
}

/// Writes zero page, command line, page tables and descriptors. `regions` is the memory's layout.
pub fn write(
    ram: &GuestRam,
    regions: &[(u64, u64)],
    cmdline: &str,
    initrd: Initrd,
) -> Result<(), BootParamsError> {
    ram.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    write_zero_page(ram, regions, cmdline, initrd)?;
    write_rng_seed(ram)?;
    write_page_tables(ram)?;
    write_descriptors(ram)
}

fn write_zero_page(
    ram: &GuestRam,
    regions: &[(u64, u64)],
    cmdline: &str,
    initrd: Initrd,
) -> Result<(), BootParamsError> {
    let put8 = |at: u64, value: u8| ram.write_obj(value, GuestAddress(ZERO_PAGE + at));
    let put16 = |at: u64, value: u16| ram.write_obj(value, GuestAddress(ZERO_PAGE + at));
    let put32 = |at: u64, value: u64| ram.write_obj(value as u32, GuestAddress(ZERO_PAGE + at));
    let put64 = |at: u64, value: u64| ram.write_obj(value, GuestAddress(ZERO_PAGE + at));

    put16(offset::BOOT_FLAG, 0xaa55)?;
    put32(offset::HEADER, HEADER_MAGIC.into())?;
    put16(offset::VERSION, BOOT_PROTOCOL)?;
    put8(offset::TYPE_OF_LOADER, LOADER_UNDEFINED)?;
    put8(offset::LOADFLAGS, LOADED_HIGH | KASLR)?;
    put32(offset::CMD_LINE_PTR, CMDLINE)?;
    put32(offset::CMDLINE_SIZE, cmdline.len() as u64)?;
    put32(offset::RAMDISK_IMAGE, initrd.address)?;
    put32(offset::RAMDISK_SIZE, initrd.size)?;
    put64(offset::SETUP_DATA, RNG_SEED)?;

    let mut usable = vec![(0, LOW_RAM_END)];
    for (start, length) in regions {
        let skipped = if *start == 0 { ONE_MIB } else { 0 };
        usable.push((start + skipped, length - skipped));
    }
    put8(offset::E820_ENTRIES, usable.len() as u8)?;
    for (index, (start, length)) in usable.into_iter().enumerate() {
        let entry = offset::E820_TABLE + 20 * index as u64;
        put64(entry, start)?;
        put64(entry + 8, length)?;
        put32(entry + 16, E820_RAM.into())?;
    }
    Ok(())
}

/// Randomness for the kernel's first moments: without it, its first readers would wait for jitter.
fn write_rng_seed(ram: &GuestRam) -> Result<(), BootParamsError> {
    let mut seed = [0u8; RNG_SEED_SIZE];
    // SAFETY: the pointer and length are those of `seed`.
    let got = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), 0) };
    if got != seed.len() as isize {
        return Err(BootParamsError::Random(io::Error::last_os_error()));
    }
    ram.write_obj(0u64, GuestAddress(RNG_SEED))?;
    ram.write_obj(SETUP_RNG_SEED, GuestAddress(RNG_SEED + 8))?;
    ram.write_obj(RNG_SEED_SIZE as u32, GuestAddress(RNG_SEED + 12))?;
    ram.write_slice(&seed, GuestAddress(RNG_SEED + 16))?;
    Ok(())
}

/// Maps the first GiB to itself with pages of 2 MiB.
fn write_page_tables(ram: &GuestRam) -> Result<(), BootParamsError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const PAGE_SIZE_2M: u64 = 0x80;
    ram.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    ram.write_obj(PAGE_DIRECTORY | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    for index in 0..512u64 {
        let entry = (index << 21) | PRESENT_WRITABLE | PAGE_SIZE_2M;
        ram.write_obj(entry, GuestAddress(PAGE_DIRECTORY + 8 * index))?;
    }
    Ok(())
}

/// The flat descriptors of the boot protocol: code at selector 0x10, data at 0x18.
fn write_descriptors(ram: &GuestRam) -> Result<(), BootParamsError> {
    const CODE: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    for (index, descriptor) in [0, 0, CODE, DATA].into_iter().enumerate() {
        ram.write_obj::<u64>(descriptor, GuestAddress(GDT + 8 * index as u64))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_bounded_and_printable() {
        assert_eq!(cmdline(" ", None).unwrap(), OWN_CMDLINE);
        let line = cmdline("husk.x=1", Some(1)).unwrap();
        assert!(line.ends_with(" maxcpus=1 noreplace-smp husk.x=1"));
        assert!(matches!(
            cmdline(&"x".repeat(CMDLINE_MAX), None),
            Err(BootParamsError::CmdlineTooLong { .. })
        ));
        let line = cmdline("a\nb", None);
        assert!(matches!(line, Err(BootParamsError::CmdlineByte)));
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused() {
        let ram = memory::allocate(memory::RAM_MIN).unwrap();
        // SAFETY: the name is a C string; the descriptor is new and owned by the file alone.
        let file = unsafe {
            use std::os::fd::FromRawFd;
            File::from_raw_fd(libc::memfd_create(c"initrd".as_ptr(), 0))
        };
        assert!(matches!(
            load_initrd(&file, &ram, 16 << 20, memory::RAM_MIN),
            Err(BootParamsError::InitrdEmpty)
        ));
        file.set_len(48 << 20).unwrap();
        assert!(load_initrd(&file, &ram, 16 << 20, memory::RAM_MIN).is_ok());
        file.set_len((48 << 20) + 1).unwrap();
        assert!(matches!(
            load_initrd(&file, &ram, 16 << 20, memory::RAM_MIN),
            Err(BootParamsError::InitrdDoesNotFit { .. })
        ));
    }

    #[test]
    fn the_memory_map_leaves_the_legacy_hole_out() {
        let ram = memory::allocate(memory::RAM_MIN).unwrap();
        let initrd = Initrd {
            address: 1,
            size: 1,
        };
        write(&ram, &[(0, memory::RAM_MIN)], "x", initrd).unwrap();
        let read = |at| -> u64 { ram.read_obj(GuestAddress(ZERO_PAGE + at)).unwrap() };
        assert_eq!(read(offset::E820_TABLE), 0);
        assert_eq!(read(offset::E820_TABLE + 8), LOW_RAM_END);
        assert_eq!(read(offset::E820_TABLE + 20), ONE_MIB);
        assert_eq!(read(offset::E820_TABLE + 28), memory::RAM_MIN - ONE_MIB);
    }
}
