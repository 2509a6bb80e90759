//! The memory file of a saved machine: written once, then mapped by every machine restored from it.
//!
//! It has the length of guest memory, without the hole for device registers: what the guest has from
//! [`HIGH_RAM`](super::HIGH_RAM) on follows at once. Pages of zeroes are holes of the file.
//!
//! Only blocks of 2 MiB that hold any data are mapped from the file; the rest is anonymous memory as
//! after a boot. A page of a hole would cost twice when the guest first writes it: one in the page
//! cache, and its private copy.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
};

use vm_memory::{GuestMemory, GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use crate::state::Run;

use super::{GuestRam, MemoryError, PAGE, RAM_GRANULE, advise, anonymous, layout, map, region};

/// What blocks of the file are mapped or not.
const BLOCK: usize = RAM_GRANULE as usize;
/// Runs of a prefetch list that are looked at; a list of more is cut off.
const PREFETCH_RUNS_MAX: usize = 1 << 16;
/// Bytes of one run in a prefetch list.
const PREFETCH_RUN: usize = 16;
/// Bytes mapped at a time beside the running vCPUs: some 50 us, for which no request is looked at.
const LATER_STEP: u64 = 16 * PAGE as u64;

/// Bytes of the memory file: offset and length, multiples of 2 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub offset: u64,
    pub length: u64,
}

impl From<Span> for Run {
    fn from(span: Span) -> Self {
        Self {
            offset: span.offset,
            length: span.length,
            ..Default::default()
        }
    }
}

impl From<&Run> for Span {
    fn from(run: &Run) -> Self {
        Self {
            offset: run.offset,
            length: run.length,
        }
    }
}

/// Bytes of `ram`, and of its memory file.
pub fn length(ram: &GuestRam) -> u64 {
    ram.iter().map(GuestMemoryRegion::len).sum()
}

/// Why a memory file was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error("set the length of the memory file: {0}")]
    Length(#[source] io::Error),
    #[error("write the memory file: {0}")]
    Write(#[source] io::Error),
    #[error("read guest memory: {0}")]
    Memory(String),
}

/// Writes all of `ram` to `file`, which must be empty. Returns where there is data, ascending.
///
/// Nobody may write guest memory meanwhile.
///
/// # Errors
/// Those of writing.
pub fn write(ram: &GuestRam, file: &File) -> Result<Vec<Span>, WriteError> {
    file.set_len(length(ram)).map_err(WriteError::Length)?;
    let mut spans: Vec<Span> = Vec::new();
    let mut offset = 0;
    let mut buffer = vec![0; BLOCK];
    for region in ram.iter() {
        for start in (0..region.len()).step_by(BLOCK) {
            let block = region
                .get_slice(MemoryRegionAddress(start), BLOCK)
                .map_err(|e| WriteError::Memory(e.to_string()))?;
            if write_block(&block, &mut buffer, file, offset)? {
                match spans.last_mut() {
                    Some(span) if span.offset + span.length == offset => {
                        span.length += RAM_GRANULE;
                    }
                    _ => spans.push(Span {
                        offset,
                        length: RAM_GRANULE,
                    }),
                }
            }
            offset += RAM_GRANULE;
        }
    }
    Ok(spans)
}

/// Writes the pages of a block that are not zero; true when there are any.
fn write_block(
    block: &VolatileSlice<'_>,
    buffer: &mut [u8],
    file: &File,
    offset: u64,
) -> Result<bool, WriteError> {
    block.copy_to(buffer);
    let mut any = false;
    let mut pages = buffer.chunks(PAGE).zip((offset..).step_by(PAGE)).peekable();
    while let Some((page, start)) = pages.next() {
        if is_zero(page) {
            continue;
        }
        // As many pages as follow each other, in one call.
        let mut length = page.len();
        while pages.next_if(|(page, _)| !is_zero(page)).is_some() {
            length += PAGE;
        }
        let at = (start - offset) as usize;
        let run = buffer.get(at..at + length).unwrap_or_default();
        file.write_all_at(run, start).map_err(WriteError::Write)?;
        any = true;
    }
    Ok(any)
}

fn is_zero(page: &[u8]) -> bool {
    let (head, words, tail) = {
        // SAFETY: every pattern of bits is a number.
        unsafe { page.align_to::<u64>() }
    };
    head.iter().chain(tail).all(|byte| *byte == 0) && words.iter().all(|word| *word == 0)
}

/// Maps memory for a guest of `bytes` bytes, copy on write from `file`, until the process ends.
/// `spans` are those that [`write`] returned. `added` is a region of zeroes behind it, as
/// [`addition`](super::addition) has it: first address and length in bytes.
///
/// # Errors
/// The file is none that [`write`] could have written for `bytes` and `spans`, or the host refuses.
pub fn map_image(
    bytes: u64,
    file: &File,
    spans: &[Span],
    added: Option<(u64, u64)>,
) -> Result<GuestRam, MemoryError> {
    let metadata = file.metadata().map_err(MemoryError::Image)?;
    if !metadata.is_file() || metadata.size() != bytes {
        return Err(MemoryError::ImageSize {
            got: metadata.size(),
            wanted: bytes,
        });
    }
    let regions = layout(bytes)?;
    let mut mapped = Vec::new();
    let mut first = 0;
    for (start, length) in regions {
        let mapping = map(length)?;
        let end = first + length;
        for span in spans {
            let span_end = span.offset.checked_add(span.length);
            let span_end = span_end.ok_or(MemoryError::Span)?;
            if span_end > bytes || span.offset % RAM_GRANULE != 0 || span.length % RAM_GRANULE != 0
            {
                return Err(MemoryError::Span);
            }
            // The part of the span that lies in this region.
            let (from, to) = (span.offset.max(first), span_end.min(end));
            if from < to {
                map_span(mapping.as_ptr(), from - first, to - from, file, from)?;
            }
        }
        advise(&mapping, 0, mapping.size(), libc::MADV_DONTDUMP)?;
        mapped.push(region(start, mapping)?);
        first = end;
    }
    if let Some(added) = added {
        mapped.push(anonymous(added)?);
    }
    GuestRam::from_regions(mapped).map_err(|e| MemoryError::map(bytes, e))
}

/// Maps `length` bytes of `file` at `offset` over anonymous memory, `at` bytes behind `start`.
fn map_span(
    start: *mut u8,
    at: u64,
    length: u64,
    file: &File,
    offset: u64,
) -> Result<(), MemoryError> {
    let failed = |e: io::Error| MemoryError::map(length, e);
    let target = start.wrapping_add(at as usize);
    let offset = libc::off_t::try_from(offset).map_err(|_| MemoryError::Span)?;
    // SAFETY: the range lies within a mapping of ours to which there are no references yet; what
    // replaces it is as readable and writable as before.
    let result = unsafe {
        libc::mmap(
            target.cast(),
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
            file.as_raw_fd(),
            offset,
        )
    };
    match result {
        libc::MAP_FAILED => Err(failed(io::Error::last_os_error())),
        _ => Ok(()),
    }
}

/// A run of guest memory that is mapped before it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetch {
    /// In the memory file, and in bytes; multiples of 4 KiB.
    pub span: Span,
    /// The guest will write it.
    pub write: bool,
    /// Wanted before the vCPUs run; the others are, beside them.
    pub early: bool,
}

/// The runs listed in `file`, as the machine contract has them, no more than `ram` holds together. What
/// cannot be read is left out.
pub fn read_prefetch(file: &File, ram: &GuestRam) -> Vec<Prefetch> {
    let size = file.metadata().map_or(0, |metadata| metadata.size());
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    let mut bytes = vec![0; size.min(PREFETCH_RUNS_MAX * PREFETCH_RUN)];
    if let Err(e) = file.read_exact_at(&mut bytes, 0) {
        log::warn!("read the list of pages to prefetch: {e}");
        return Vec::new();
    }
    let total = length(ram);
    let run = |bytes: &[u8]| {
        let (offset, rest) = bytes.split_first_chunk()?;
        let (length, _) = rest.split_first_chunk()?;
        let (offset, length) = (u64::from_le_bytes(*offset), u64::from_le_bytes(*length));
        let (write, early) = (length & 1 != 0, length & 2 != 0);
        let length = length & !3;
        let whole = offset % PAGE as u64 == 0 && length % PAGE as u64 == 0 && length > 0;
        let inside = offset.checked_add(length).is_some_and(|end| end <= total);
        let span = Span { offset, length };
        (whole && inside).then_some(Prefetch { span, write, early })
    };
    // Overlapping runs must not keep the machine busy for ever.
    let mut listed = 0;
    let within = |run: &Prefetch| {
        listed += run.span.length;
        listed <= total
    };
    bytes
        .chunks_exact(PREFETCH_RUN)
        .filter_map(run)
        .take_while(within)
        .collect()
}

/// Maps the pages of `run` into this process, and tells `mapped` of their guest addresses and bytes. A
/// hint: what lies outside of memory is left out.
///
/// # Errors
/// The host refuses, as it will refuse all others.
pub fn prefetch(
    ram: &GuestRam,
    run: &Prefetch,
    mut mapped: impl FnMut(u64, u64),
) -> io::Result<()> {
    let advice = match run.write {
        true => libc::MADV_POPULATE_WRITE,
        false => libc::MADV_POPULATE_READ,
    };
    let mut first = 0;
    for region in ram.iter() {
        let end = first + region.len();
        let from = run.span.offset.max(first);
        let to = run.span.offset.saturating_add(run.span.length).min(end);
        let start = region.get_host_address(MemoryRegionAddress(from - first));
        if let (true, Ok(start)) = (from < to, start) {
            // SAFETY: the range lies within guest memory; populating changes nothing in it.
            let result = unsafe { libc::madvise(start.cast(), (to - from) as usize, advice) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
            mapped(region.start_addr().0 + (from - first), to - from);
        }
        first = end;
    }
    Ok(())
}

/// Pages that are to be mapped beside the running vCPUs, a few at a time.
pub struct Later {
    ram: GuestRam,
    runs: VecDeque<Prefetch>,
}

impl Later {
    pub fn new(ram: GuestRam, runs: impl Iterator<Item = Prefetch>) -> Self {
        let runs = runs.collect();
        Self { ram, runs }
    }

    /// Maps the next 64 KiB at most; false when nothing is left to do.
    pub fn step(&mut self) -> bool {
        let Some(run) = self.runs.front_mut() else {
            return false;
        };
        let mut part = *run;
        part.span.length = part.span.length.min(LATER_STEP);
        run.span.offset += part.span.length;
        run.span.length -= part.span.length;
        if run.span.length == 0 {
            self.runs.pop_front();
        }
        prefetch(&self.ram, &part, |_, _| ())
            .inspect_err(|e| log::debug!("prefetch: {e}"))
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;
    use crate::memory::{Bytes, GuestAddress, RAM_MIN, allocate};

    fn memfd() -> File {
        // SAFETY: a C string; the descriptor is new and ours.
        unsafe { File::from_raw_fd(libc::memfd_create(c"image".as_ptr(), libc::MFD_CLOEXEC)) }
    }

    #[test]
    fn clones_see_what_was_written_and_not_each_other() {
        let ram = allocate(RAM_MIN).unwrap();
        let places = [0, 4096 * 7 + 5, (2 << 20) - 1, (40 << 20) + 123];
        for place in places {
            ram.write_obj(0xa5u8, GuestAddress(place)).unwrap();
        }
        let file = memfd();
        let spans = write(&ram, &file).unwrap();
        let block = |n: u64| n << 21;
        assert_eq!(
            spans,
            [
                Span {
                    offset: 0,
                    length: block(1)
                },
                Span {
                    offset: block(20),
                    length: block(1)
                },
            ]
        );
        assert_eq!(file.metadata().unwrap().blocks() * 512, 4 * 4096);
        let [one, two] = [0; 2].map(|_| map_image(RAM_MIN, &file, &spans, None).unwrap());
        for place in places {
            assert_eq!(one.read_obj::<u8>(GuestAddress(place)).unwrap(), 0xa5);
        }
        for place in [0, 4096, 30 << 20] {
            one.write_obj(0x11u8, GuestAddress(place)).unwrap();
        }
        assert_eq!(two.read_obj::<u8>(GuestAddress(0)).unwrap(), 0xa5);
        assert_eq!(two.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
        assert_eq!(two.read_obj::<u8>(GuestAddress(30 << 20)).unwrap(), 0);
    }

    #[test]
    fn files_that_do_not_fit_are_refused() {
        let file = memfd();
        assert!(map_image(RAM_MIN, &file, &[], None).is_err());
        file.set_len(RAM_MIN).unwrap();
        assert!(map_image(RAM_MIN, &file, &[], None).is_ok());
        for (offset, length) in [
            (1, 2 << 20),
            (0, 1),
            (RAM_MIN, 2 << 20),
            (u64::MAX, 2),
            (0, u64::MAX),
        ] {
            let span = Span { offset, length };
            assert!(
                map_image(RAM_MIN, &file, &[span], None).is_err(),
                "{span:?}"
            );
        }
        let directory = File::open("/").unwrap();
        assert!(map_image(RAM_MIN, &directory, &[], None).is_err());
    }

    /// Spans at every border: those within the file are taken, and no others.
    #[test]
    fn spans_are_within_the_file_or_refused() {
        let file = memfd();
        file.set_len(crate::memory::RAM_MIN).unwrap();
        let bytes = crate::memory::RAM_MIN;
        let ends = [
            0,
            1,
            4096,
            RAM_GRANULE,
            bytes - RAM_GRANULE,
            bytes - 1,
            bytes,
            bytes + RAM_GRANULE,
        ];
        let wrapping = [u64::MAX, u64::MAX - RAM_GRANULE + 1, 1 << 63];
        for offset in ends.into_iter().chain(wrapping) {
            for length in ends.into_iter().chain(wrapping) {
                let fits = offset.checked_add(length).is_some_and(|end| end <= bytes)
                    && offset % RAM_GRANULE == 0
                    && length % RAM_GRANULE == 0;
                let mapped = map_image(bytes, &file, &[Span { offset, length }], None);
                assert_eq!(mapped.is_ok(), fits, "{offset:#x} {length:#x}");
            }
        }
    }

    #[test]
    fn bad_runs_are_left_out_of_a_prefetch() {
        let file = memfd();
        let runs: [(u64, u64); 5] = [
            (4096, 8192),
            (8192, 4099),
            (1, 4096),
            (0, 0),
            (!4095, !4095),
        ];
        let bytes: Vec<u8> = runs
            .iter()
            .flat_map(|(offset, length)| [offset.to_le_bytes(), length.to_le_bytes()].concat())
            .chain([1, 2, 3])
            .collect();
        file.write_all_at(&bytes, 0).unwrap();
        let ram = allocate(RAM_MIN).unwrap();
        let runs = read_prefetch(&file, &ram);
        let run = |offset, length, write, early| Prefetch {
            span: Span { offset, length },
            write,
            early,
        };
        assert_eq!(
            runs,
            [run(4096, 8192, false, false), run(8192, 4096, true, true)]
        );
        let mut mapped = Vec::new();
        for run in &runs {
            prefetch(&ram, run, |address, length| mapped.push((address, length))).unwrap();
        }
        assert_eq!(mapped, [(4096, 8192), (8192, 4096)]);
    }

    #[test]
    fn overlapping_runs_end() {
        let file = memfd();
        let run = [0u64.to_le_bytes(), RAM_MIN.to_le_bytes()].concat();
        file.write_all_at(&run.repeat(100), 0).unwrap();
        let ram = allocate(RAM_MIN).unwrap();
        assert_eq!(read_prefetch(&file, &ram).len(), 1);
    }

    #[test]
    fn what_is_left_for_later_comes_in_small_steps() {
        let ram = allocate(RAM_MIN).unwrap();
        let run = |offset, length| Prefetch {
            span: Span { offset, length },
            write: true,
            early: false,
        };
        let runs = [run(0, LATER_STEP + 4096), run(40 << 20, 4096)];
        let mut later = Later::new(ram.clone(), runs.into_iter());
        let mut steps = 0;
        while later.step() {
            steps += 1;
        }
        assert_eq!(steps, 3);
        let region = ram.iter().next().unwrap();
        let start = region.get_host_address(MemoryRegionAddress(0)).unwrap();
        let resident = |offset: u64| {
            let mut page = 0;
            // SAFETY: the page lies within guest memory, and its answer is one byte.
            let result =
                unsafe { libc::mincore(start.add(offset as usize).cast(), 4096, &mut page) };
            assert_eq!(result, 0);
            page & 1 == 1
        };
        assert!(resident(0) && resident(LATER_STEP) && resident(40 << 20));
        assert!(!resident(LATER_STEP + 4096));
    }
}
