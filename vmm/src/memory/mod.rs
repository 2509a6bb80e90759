//! Guest memory: its layout, its allocation, and the one place that names the vm-memory crate.
//!
//! Owned by the VM; devices hold clones of [`GuestRam`], which share the mapping. Nobody may keep a
//! reference into guest memory: the guest changes it at any time, so it is only copied in and out
//! through volatile slices.

pub mod image;

use std::{
    fs::File,
    io,
    num::NonZeroU64,
    os::fd::AsRawFd,
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

pub use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemory as GuestMemoryAccess, GuestMemoryError,
    GuestMemoryRegion, MemoryRegionAddress, VolatileSlice,
};
use vm_memory::{GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder};

/// The guest's memory. Clones share the mapping.
pub type GuestRam = GuestMemoryMmap<()>;

/// First address of the hole for device registers below 4 GiB; memory goes on at [`HIGH_RAM`].
pub const MMIO_START: u64 = 0xc000_0000;
/// Bytes of the hole that BARs may use; the local APIC and KVM's own pages lie above.
pub const MMIO_SIZE: u64 = 0x3000_0000;
/// Where memory goes on that does not fit below [`MMIO_START`].
pub const HIGH_RAM: u64 = 1 << 32;

/// Guest memory comes in multiples of this many bytes.
pub const RAM_GRANULE: u64 = 2 << 20;
/// The least guest memory that a kernel, its initrd and an agent fit in, in bytes.
pub const RAM_MIN: u64 = 64 << 20;

/// A guest that runs is given further memory in multiples of this many bytes, at multiples of it: Linux'
/// memory blocks on x86-64 (`MIN_MEMORY_BLOCK_SIZE`), up to 64 GiB of memory at boot.
pub const ADDED_GRANULE: u64 = 128 << 20;

/// From this address on memory comes in huge pages, where the host has some. Linux fills what it
/// takes: the kernel image, the page structs and the first slabs lie close together there. Measured
/// with a guest of 128 MiB, to the agent's answer: 3,500 faults and 20 of 129 ms less, for 2 MiB more
/// in use. Below, in the first DMA zone, it takes a page here and a page there.
const HUGE_PAGES: u64 = 8 << 20;

const PAGE: usize = 4096;

/// See [`mapped`].
static MAPPED: AtomicU64 = AtomicU64::new(0);

/// Bytes of address space that were taken for guest memory, also that of machines that could not be built: it
/// is never given back.
pub fn mapped() -> u64 {
    MAPPED.load(Ordering::Relaxed)
}

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("memory_bytes: {0} is not a multiple of 2 MiB of at least 64 MiB")]
    Size(u64),
    #[error("map {bytes} bytes of guest memory: {cause}")]
    Map { bytes: u64, cause: String },
    #[error("memory file: {0}")]
    Image(#[source] io::Error),
    #[error("memory file: a regular file of {wanted} bytes was saved, this one has {got}")]
    ImageSize { got: u64, wanted: u64 },
    #[error("memory file: it does not hold the data that the state speaks of")]
    Span,
    #[error("madvise({advice}) on guest memory: {cause}")]
    Advise {
        advice: libc::c_int,
        cause: io::Error,
    },
}

impl MemoryError {
    fn map(bytes: u64, cause: impl ToString) -> Self {
        Self::Map {
            bytes,
            cause: cause.to_string(),
        }
    }

    /// Whether what the client handed over cannot be; else the host failed.
    pub fn is_clients(&self) -> bool {
        matches!(self, Self::Size(_) | Self::ImageSize { .. } | Self::Span)
    }
}

/// Why a file was not read into guest memory.
#[derive(Debug, thiserror::Error)]
pub enum ReadFileError {
    #[error("pread: {0}")]
    Read(#[from] io::Error),
    #[error("write to guest memory: {0}")]
    Memory(#[source] GuestMemoryError),
}

/// The regions `bytes` of guest memory are laid out in: (first address, length in bytes).
///
/// # Errors
/// No guest has so much, or so odd an amount of memory.
pub fn layout(bytes: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
    if bytes < RAM_MIN || bytes % RAM_GRANULE != 0 {
        return Err(MemoryError::Size(bytes));
    }
    Ok(match NonZeroU64::new(bytes.saturating_sub(MMIO_START)) {
        None => vec![(0, bytes)],
        Some(high) => vec![(0, MMIO_START), (HIGH_RAM, high.get())],
    })
}

/// Guest memory cannot become as large as was asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "memory_bytes: {wanted} is not {saved}, as was saved, nor more by a multiple of 128 MiB that \
     ends below {end:#x}"
)]
pub struct Ungrowable {
    saved: u64,
    wanted: u64,
    end: u64,
}

/// Where the memory lies that a guest of `saved` bytes lacks to `wanted` bytes: (first address, length in
/// bytes), in the address space that ends at `end`; none when it lacks nothing. `wanted` may be 0: as saved.
///
/// It is all above [`HIGH_RAM`], whatever the guest has below: one region, and no hole to mind.
///
/// # Errors
/// There is no such memory, or `saved` is no guest's.
pub fn addition(saved: u64, wanted: u64, end: u64) -> Result<Option<(u64, u64)>, Ungrowable> {
    let ungrowable = || Ungrowable { saved, wanted, end };
    if wanted == 0 || wanted == saved {
        return Ok(None);
    }
    let length = wanted.checked_sub(saved).ok_or_else(ungrowable)?;
    let regions = layout(saved).map_err(|_| ungrowable())?;
    let used = regions.iter().map(|(start, length)| start + length).max();
    let start = used
        .unwrap_or(0)
        .max(HIGH_RAM)
        .checked_next_multiple_of(ADDED_GRANULE);
    let start = start.ok_or_else(ungrowable)?;
    let behind = start.checked_add(length).ok_or_else(ungrowable)?;
    match length % ADDED_GRANULE == 0 && behind <= end {
        true => Ok(Some((start, length))),
        false => Err(ungrowable()),
    }
}

/// Maps private, zeroed, unreserved memory for a guest of `bytes` bytes, until the process ends.
///
/// It never shows in a core dump. From [`HUGE_PAGES`] on the host may back it with huge pages.
pub fn allocate(bytes: u64) -> Result<GuestRam, MemoryError> {
    let regions = layout(bytes)?.into_iter().map(anonymous);
    let regions = regions.collect::<Result<_, _>>()?;
    GuestRam::from_regions(regions).map_err(|e| MemoryError::map(bytes, e))
}

/// A region of such memory.
fn anonymous((start, length): (u64, u64)) -> Result<GuestRegionMmap<()>, MemoryError> {
    let mapping = map(length)?;
    let length = mapping.size();
    advise(&mapping, 0, length, libc::MADV_DONTDUMP)?;
    let small = usize::try_from(HUGE_PAGES.saturating_sub(start)).unwrap_or(length);
    advise(&mapping, 0, small.min(length), libc::MADV_NOHUGEPAGE)?;
    advise(&mapping, small.min(length), length, libc::MADV_HUGEPAGE)?;
    region(start, mapping)
}

/// A mapping as guest memory from `start` on.
fn region(start: u64, mapping: MmapRegion<()>) -> Result<GuestRegionMmap<()>, MemoryError> {
    let bytes = mapping.size() as u64;
    GuestRegionMmap::new(mapping, GuestAddress(start))
        .ok_or_else(|| MemoryError::map(bytes, "the address space ends"))
}

/// Puts `length` bytes of `file` at the guest address `address`, a multiple of the page size, as a
/// private mapping: pages that the guest does not write are shared with every other guest.
///
/// For a file that the guest reads while it boots and that nobody writes meanwhile: a page that is
/// cut off the file meanwhile ends the guest.
pub fn map_file(ram: &GuestRam, address: u64, file: &File, length: u64) -> io::Result<()> {
    let length = usize::try_from(length)
        .ok()
        .and_then(|length| length.checked_next_multiple_of(PAGE))
        .ok_or(io::ErrorKind::InvalidInput)?;
    let target = ram
        .get_slice(GuestAddress(address), length)
        .map_err(io::Error::other)?;
    let start: *mut u8 = target.ptr_guard_mut().as_ptr();
    // SAFETY: the range is page-aligned guest memory, to which there are no references; what
    // replaces it is as readable and writable as before.
    let mapped = unsafe {
        libc::mmap(
            start.cast(),
            length,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            0,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the range was just mapped, and the advice does not change what is in it.
    match unsafe { libc::madvise(mapped, length, libc::MADV_DONTDUMP) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Fills guest memory from `address` on with `length` bytes of `file` from `offset` on.
pub fn read_file(
    ram: &GuestRam,
    address: u64,
    file: &File,
    offset: u64,
    length: u64,
) -> Result<(), ReadFileError> {
    let too_long = |_| ReadFileError::Read(io::ErrorKind::InvalidInput.into());
    let mut offset = libc::off_t::try_from(offset).map_err(too_long)?;
    let length = usize::try_from(length).map_err(too_long)?;
    for slice in ram.get_slices(GuestAddress(address), length) {
        let slice = slice.map_err(ReadFileError::Memory)?;
        let mut done = 0;
        while done < slice.len() {
            let rest = slice.offset(done).map_err(io::Error::other)?;
            let target = rest.ptr_guard_mut();
            // SAFETY: the target is guest memory of that length, mapped while `ram` is.
            let got = unsafe {
                libc::pread(
                    file.as_raw_fd(),
                    target.as_ptr().cast(),
                    target.len(),
                    offset,
                )
            };
            let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
            if got == 0 {
                return Err(ReadFileError::Read(io::ErrorKind::UnexpectedEof.into()));
            }
            done += got;
            offset = offset.saturating_add(got as libc::off_t);
        }
    }
    Ok(())
}

/// A mapping aligned so that huge pages of the guest's can be huge pages of the host's.
fn map(length: u64) -> Result<MmapRegion<()>, MemoryError> {
    const ALIGNMENT: usize = RAM_GRANULE as usize;
    const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
    const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let failed = |cause: String| MemoryError::map(length, cause);
    let length = usize::try_from(length).map_err(|e| failed(e.to_string()))?;
    let padded = length.checked_add(ALIGNMENT);
    let padded = padded.ok_or_else(|| failed("the address space ends".to_string()))?;
    // SAFETY: a new anonymous mapping, anywhere.
    let start = unsafe { libc::mmap(ptr::null_mut(), padded, PROTECTION, FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(failed(io::Error::last_os_error().to_string()));
    }
    MAPPED.fetch_add(padded as u64, Ordering::Relaxed);
    let aligned = start.map_addr(|address| address.next_multiple_of(ALIGNMENT));
    // SAFETY: `length` bytes from there lie within the mapping, which is never unmapped.
    let region = unsafe {
        MmapRegionBuilder::new(length)
            .with_mmap_prot(PROTECTION)
            .with_mmap_flags(FLAGS)
            .with_raw_mmap_pointer(aligned.cast())
            .build()
    };
    region.map_err(|e| failed(e.to_string()))
}

/// Gives `advice` for the bytes of a mapping from `from` to `to`.
fn advise(
    mapping: &MmapRegion<()>,
    from: usize,
    to: usize,
    advice: libc::c_int,
) -> Result<(), MemoryError> {
    let length = to.min(mapping.size()).saturating_sub(from);
    let start = mapping.as_ptr().wrapping_add(from);
    // SAFETY: the range lies within the mapping, and none of the advices given changes what is in it.
    let result = unsafe { libc::madvise(start.cast(), length, advice) };
    let cause = io::Error::last_os_error();
    match result {
        0 => Ok(()),
        // A kernel without transparent huge pages knows no advice about them.
        _ if cause.raw_os_error() == Some(libc::EINVAL) && advice != libc::MADV_DONTDUMP => Ok(()),
        _ => Err(MemoryError::Advise { advice, cause }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_leaves_the_hole_for_registers() {
        assert_eq!(layout(128 << 20).unwrap(), [(0, 128 << 20)]);
        assert_eq!(layout(MMIO_START).unwrap(), [(0, MMIO_START)]);
        assert_eq!(
            layout(4 << 30).unwrap(),
            [(0, MMIO_START), (HIGH_RAM, (4 << 30) - MMIO_START)]
        );
    }

    #[test]
    fn added_memory_lies_behind_all_else_in_whole_blocks() {
        const MIB: u64 = 1 << 20;
        let end = 1 << 36;
        let add = |saved: u64, wanted: u64| addition(saved * MIB, wanted * MIB, end);
        assert_eq!(add(256, 0), Ok(None));
        assert_eq!(add(256, 256), Ok(None));
        assert_eq!(add(258, 2306), Ok(Some((HIGH_RAM, 2048 * MIB))));
        assert_eq!(add(3072, 3200), Ok(Some((HIGH_RAM, 128 * MIB))));
        // Three GiB lie below the hole; what follows them ends where no block begins.
        let behind = HIGH_RAM + 128 * MIB;
        assert_eq!(add(3074, 3202), Ok(Some((behind, 128 * MIB))));
        assert_eq!(add(3200, 3328), Ok(Some((behind, 128 * MIB))));
        for (saved, wanted) in [(256, 128), (256, 320), (256, 258), (63, 191), (0, 128)] {
            let error = add(saved, wanted).unwrap_err().to_string();
            let (saved, wanted) = (saved * MIB, wanted * MIB);
            assert!(
                error.contains(&format!("{wanted} is not {saved}")),
                "{error}"
            );
        }
    }

    #[test]
    fn added_memory_ends_where_addresses_do() {
        let saved = 256 << 20;
        let most = (1 << 36) - HIGH_RAM;
        let found = addition(saved, saved + most, 1 << 36);
        assert_eq!(found, Ok(Some((HIGH_RAM, most))));
        assert!(addition(saved, saved + most + ADDED_GRANULE, 1 << 36).is_err());
        let all = u64::MAX - (u64::MAX - saved) % ADDED_GRANULE;
        assert!(addition(saved, all, u64::MAX).is_err());
    }

    /// Of sizes of all magnitudes.
    #[test]
    fn regions_neither_meet_nor_miss_a_byte() {
        for number in 0..20_000_u64 {
            let granules = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (24 + number % 40);
            let bytes = RAM_MIN + granules.min(1 << 40) * RAM_GRANULE;
            let regions = layout(bytes).unwrap();
            assert_eq!(regions.iter().map(|(_, length)| length).sum::<u64>(), bytes);
            let (start, length) = regions[0];
            assert!(start == 0 && length <= MMIO_START);
            for (start, length) in &regions[1..] {
                assert!(*start == HIGH_RAM && *length > 0);
            }
            let wanted = bytes + (number % 64) * ADDED_GRANULE;
            let end = 1 << (36 + number % 20);
            let Ok(Some((start, length))) = addition(bytes, wanted, end) else {
                continue;
            };
            assert_eq!(length, wanted - bytes);
            assert!(start >= HIGH_RAM && start % ADDED_GRANULE == 0 && start + length <= end);
            assert!(
                regions
                    .iter()
                    .all(|(first, length)| first + length <= start)
            );
        }
    }

    #[test]
    fn odd_or_small_sizes_are_refused() {
        for bytes in [0, 62 << 20, (64 << 20) + 4096] {
            assert!(matches!(allocate(bytes), Err(MemoryError::Size(_))));
        }
        assert!(allocate(RAM_MIN).is_ok());
    }
}
