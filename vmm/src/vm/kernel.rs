//! Reads the guest kernel, an uncompressed x86-64 ELF vmlinux, into guest memory.
//!
//! The file comes from the user and may be anything: every number in it is checked before use, and
//! a refusal says what the file is not. Shapes are those of the System V ABI, "Object Files".

use std::{fs::File, io, os::unix::fs::FileExt};

use crate::memory::{self, GuestRam, MMIO_START};

/// The first address a kernel may be loaded at: below lie the boot structures and the legacy hole.
const LOAD_MIN: u64 = 1 << 20;

const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
/// More program headers than any kernel has.
const PHDRS_MAX: u16 = 64;

const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ET_EXEC: u16 = 2;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;

/// A loaded kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Guest physical address of its 64-bit entry.
    pub entry: u64,
    /// First guest physical address behind it.
    pub end: u64,
}

/// Why a kernel was refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("kernel: not an ELF file")]
    NotElf,
    #[error("kernel: not an executable for x86-64 (class {class}, type {kind}, machine {machine})")]
    NotX86 { class: u8, kind: u16, machine: u16 },
    #[error("kernel: truncated: {what} reaches to byte {end} of a file of {size}")]
    Truncated {
        what: &'static str,
        end: u64,
        size: u64,
    },
    #[error("kernel: malformed: {0}")]
    Malformed(&'static str),
    #[error("kernel: reaches to {end:#x}, the guest's memory only to {ram:#x}")]
    DoesNotFit { end: u64, ram: u64 },
    #[error("kernel: {call}: {cause}")]
    Io {
        call: &'static str,
        cause: io::Error,
    },
    #[error("kernel: {0}")]
    Load(#[from] memory::ReadFileError),
}

/// One PT_LOAD segment.
struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

/// Loads the kernel in `file` at the physical addresses its program headers name. `ram_end` is the
/// end of guest memory below the MMIO hole. Memory behind a segment's file part is zero already.
pub fn load(file: &File, ram: &GuestRam, ram_end: u64) -> Result<Kernel, KernelError> {
    let size = file
        .metadata()
        .map_err(|cause| KernelError::Io {
            call: "fstat",
            cause,
        })?
        .len();
    let (entry, segments) = parse(file, size)?;
    let ram_end = ram_end.min(MMIO_START);
    let mut end = 0;
    for segment in &segments {
        let segment_end = segment
            .address
            .checked_add(segment.memory_size)
            .ok_or(KernelError::Malformed("a segment's end overflows"))?;
        if segment_end > ram_end {
            return Err(KernelError::DoesNotFit {
                end: segment_end,
                ram: ram_end,
            });
        }
        end = end.max(segment_end);
    }
    for segment in &segments {
        let (address, length) = (segment.address, segment.file_size);
        memory::read_file(ram, address, file, segment.offset, length)?;
    }
    let inside = |s: &Segment| entry >= s.address && entry - s.address < s.file_size;
    if !segments.iter().any(inside) {
        return Err(KernelError::Malformed("the entry lies in no segment"));
    }
    Ok(Kernel { entry, end })
}

/// The physical entry address and the segments to load, each within the file of `size` bytes.
fn parse(file: &File, size: u64) -> Result<(u64, Vec<Segment>), KernelError> {
    let mut header = [0; EHDR_SIZE];
    read(file, size, "the ELF header", 0, &mut header).map_err(|e| match e {
        KernelError::Truncated { .. } => KernelError::NotElf,
        other => other,
    })?;
    if !header.starts_with(b"\x7fELF") {
        return Err(KernelError::NotElf);
    }
    let (class, kind, machine) = (header[4], u16_at(&header, 16), u16_at(&header, 18));
    if class != ELFCLASS64 || header[5] != ELFDATA2LSB || kind != ET_EXEC || machine != EM_X86_64 {
        return Err(KernelError::NotX86 {
            class,
            kind,
            machine,
        });
    }
    let entry = u64_at(&header, 24);
    let table = u64_at(&header, 32);
    let (entry_size, count) = (u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(entry_size) != PHDR_SIZE || count > PHDRS_MAX {
        return Err(KernelError::Malformed(
            "the program header table has an unknown shape",
        ));
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let mut phdr = [0; PHDR_SIZE];
        let offset = table
            .checked_add(index * PHDR_SIZE as u64)
            .ok_or(KernelError::Malformed("the program header table overflows"))?;
        read(file, size, "a program header", offset, &mut phdr)?;
        if u32_at(&phdr, 0) != PT_LOAD {
            continue;
        }
        let segment = Segment {
            offset: u64_at(&phdr, 8),
            address: u64_at(&phdr, 24),
            file_size: u64_at(&phdr, 32),
            memory_size: u64_at(&phdr, 40),
        };
        if segment.file_size > segment.memory_size {
            return Err(KernelError::Malformed(
                "a segment is larger in the file than in memory",
            ));
        }
        if segment.address < LOAD_MIN {
            return Err(KernelError::Malformed("a segment lies below 1 MiB"));
        }
        check_extent("a segment", segment.offset, segment.file_size, size)?;
        segments.push(segment);
    }
    Ok((entry, segments))
}

fn read(
    file: &File,
    size: u64,
    what: &'static str,
    offset: u64,
    into: &mut [u8],
) -> Result<(), KernelError> {
    check_extent(what, offset, into.len() as u64, size)?;
    file.read_exact_at(into, offset)
        .map_err(|cause| KernelError::Io {
            call: "pread",
            cause,
        })
}

fn check_extent(
    what: &'static str,
    offset: u64,
    length: u64,
    size: u64,
) -> Result<(), KernelError> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        end => Err(KernelError::Truncated {
            what,
            end: end.unwrap_or(u64::MAX),
            size,
        }),
    }
}

// The callers' offsets are constants within fixed arrays.
fn u16_at<const N: usize>(bytes: &[u8; N], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::{Bytes, GuestAddress};

    const RAM: u64 = 64 << 20;

    fn file_of(bytes: &[u8]) -> File {
        // SAFETY: the name is a C string; the descriptor is new and owned by the file alone.
        let mut file = unsafe {
            use std::os::fd::FromRawFd;
            File::from_raw_fd(libc::memfd_create(c"kernel".as_ptr(), 0))
        };
        file.write_all(bytes).unwrap();
        file
    }

    /// A vmlinux of one segment: `code` at `address`, with `zeroes` bytes behind it.
    fn elf(address: u64, code: &[u8], zeroes: u64) -> Vec<u8> {
        let mut image = vec![0; EHDR_SIZE + PHDR_SIZE];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[16..18].copy_from_slice(&ET_EXEC.to_le_bytes());
        image[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        image[24..32].copy_from_slice(&address.to_le_bytes());
        image[32..40].copy_from_slice(&(EHDR_SIZE as u64).to_le_bytes());
        image[54..56].copy_from_slice(&(PHDR_SIZE as u16).to_le_bytes());
        image[56..58].copy_from_slice(&1u16.to_le_bytes());
        let phdr = &mut image[EHDR_SIZE..];
        phdr[0] = 1;
        phdr[8..16].copy_from_slice(&((EHDR_SIZE + PHDR_SIZE) as u64).to_le_bytes());
        phdr[24..32].copy_from_slice(&address.to_le_bytes());
        phdr[32..40].copy_from_slice(&(code.len() as u64).to_le_bytes());
        phdr[40..48].copy_from_slice(&(code.len() as u64 + zeroes).to_le_bytes());
        image.extend_from_slice(code);
        image
    }

    fn try_load(image: &[u8]) -> Result<Kernel, KernelError> {
        load(&file_of(image), &memory::allocate(RAM).unwrap(), RAM)
    }

    #[test]
    fn a_kernel_lands_where_its_headers_say() {
        let code: Vec<u8> = (0..100_000).map(|i| i as u8).collect();
        let ram = memory::allocate(RAM).unwrap();
        let kernel = load(&file_of(&elf(16 << 20, &code, 4096)), &ram, RAM).unwrap();
        assert_eq!(kernel.entry, 16 << 20);
        assert_eq!(kernel.end, (16 << 20) + code.len() as u64 + 4096);
        let mut seen = vec![0; code.len()];
        ram.read_slice(&mut seen, GuestAddress(16 << 20)).unwrap();
        assert_eq!(seen, code);
    }

    #[test]
    fn a_file_that_is_no_kernel_is_refused_by_name() {
        assert!(matches!(try_load(b""), Err(KernelError::NotElf)));
        assert!(matches!(try_load(&[b'#'; 4096]), Err(KernelError::NotElf)));
        let mut arm = elf(16 << 20, b"code", 0);
        arm[18] = 183;
        assert!(matches!(
            try_load(&arm),
            Err(KernelError::NotX86 { machine: 183, .. })
        ));
    }

    #[test]
    fn a_truncated_kernel_is_refused() {
        let whole = elf(16 << 20, &[1; 1000], 0);
        for length in [70, 300, whole.len() - 1] {
            let result = try_load(&whole[..length]);
            assert!(
                matches!(result, Err(KernelError::Truncated { .. })),
                "{length}: {result:?}"
            );
        }
    }

    #[test]
    fn hostile_headers_are_refused() {
        let fits_not = try_load(&elf(16 << 20, b"code", RAM));
        assert!(matches!(fits_not, Err(KernelError::DoesNotFit { .. })));
        let low = try_load(&elf(0x1000, b"code", 0));
        assert!(matches!(low, Err(KernelError::Malformed(_))));
        let mut overflow = elf(16 << 20, b"code", 0);
        overflow[EHDR_SIZE + 40..EHDR_SIZE + 48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(
            try_load(&overflow),
            Err(KernelError::Malformed(_))
        ));
        let mut table = elf(16 << 20, b"code", 0);
        table[32..40].copy_from_slice(&(u64::MAX - 3).to_le_bytes());
        assert!(try_load(&table).is_err());
        let mut entry = elf(16 << 20, b"code", 0);
        entry[24] = 200;
        assert!(matches!(try_load(&entry), Err(KernelError::Malformed(_))));
    }
}
