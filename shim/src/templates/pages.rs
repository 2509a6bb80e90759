//! Which pages of guest memory a start touches: what a clone's VMM has mapped once its agent has
//! answered, read from `/proc/<pid>/maps` and `pagemap`. Written down beside the memory, so that the
//! VMM of every later clone maps them at once instead of fault by fault (machine.proto, `pages_fd`).

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
};

use super::key::Stamp;

/// Bytes of a page, and of an entry of pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PAGE: u64 = 4096;
const ENTRY: u64 = 8;
/// The page is present; it is a page of the file, as nobody has written to it.
const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;
/// In a run's length: its pages will be written.
const WRITTEN: u64 = 1;
/// Entries that are read at a time.
const CHUNK: u64 = 1024;

/// Pages that follow each other and were used alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// In the memory file, bytes.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) length: u64,
    pub(super) written: bool,
}

/// Where a part of the file is mapped.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Of `start`, in the file.
    offset: u64,
}

/// What of the memory file the process `pid` has mapped and used, in the file's order.
pub(super) fn touched(pid: u32, memory: &Stamp) -> io::Result<Vec<Run>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut mappings: Vec<Mapping> = maps
        .lines()
        .filter_map(|line| mapping(line, memory.inode))
        .collect();
    mappings.sort_by_key(|mapping| mapping.offset);
    let mut runs: Vec<Run> = Vec::new();
    for mapping in mappings {
        let mut at = mapping.start;
        while at < mapping.end {
            let count = ((mapping.end - at) / PAGE).clamp(1, CHUNK);
            let mut entries = vec![0; (count * ENTRY) as usize];
            pagemap.read_exact_at(&mut entries, at / PAGE * ENTRY)?;
            for entry in entries.chunks_exact(ENTRY as usize) {
                let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                if entry & PRESENT != 0 {
                    let offset = mapping.offset + (at - mapping.start);
                    add(&mut runs, offset, entry & OF_FILE == 0);
                }
                at += PAGE;
            }
        }
    }
    Ok(runs)
}

fn add(runs: &mut Vec<Run>, offset: u64, written: bool) {
    match runs.last_mut() {
        Some(last) if last.offset + last.length == offset && last.written == written => {
            last.length += PAGE;
        }
        _ => runs.push(Run {
            offset,
            length: PAGE,
            written,
        }),
    }
}

/// A line of maps (proc(5)), if it is a private mapping of this file. The device is not compared: on
/// some file systems it is another one there than in stat(2).
fn mapping(line: &str, inode: u64) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let private = fields.next()?.ends_with('p');
    let offset = fields.next()?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
    let found: u64 = fields.nth(1)?.parse().ok()?;
    let fits =
        private && found == inode && start < end && offset.checked_add(end - start).is_some();
    fits.then_some(Mapping { start, end, offset })
}

/// As machine.proto has it: 16 bytes per run, offset and length, little-endian.
pub(super) fn encode(runs: &[Run]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(runs.len() * 16);
    for run in runs {
        bytes.extend(run.offset.to_le_bytes());
        let length = run.length | if run.written { WRITTEN } else { 0 };
        bytes.extend(length.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, ptr};

    use super::*;

    #[test]
    fn what_was_touched_is_found_and_told_apart() {
        let file = tempfile::tempfile().unwrap();
        let pages = 256;
        file.write_all_at(&vec![1; pages * PAGE as usize], 0)
            .unwrap();
        let length = pages * PAGE as usize;
        // SAFETY: a new mapping, which only this test knows.
        let at = unsafe {
            let at = libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            );
            assert_ne!(at, libc::MAP_FAILED);
            // Without this a read maps its neighbours too.
            libc::madvise(at, length, libc::MADV_RANDOM);
            at.cast::<u8>()
        };
        let page = PAGE as usize;
        // SAFETY: all within the mapping.
        unsafe {
            for written in [3, 4, 200] {
                at.add(written * page).write_volatile(2);
            }
            at.add(100 * page).read_volatile();
        }
        let stamp = Stamp::from(&file.metadata().unwrap());
        let runs = touched(std::process::id(), &stamp).unwrap();
        let written: Vec<_> = runs.iter().filter(|run| run.written).copied().collect();
        let run = |first: u64, count: u64| Run {
            offset: first * PAGE,
            length: count * PAGE,
            written: true,
        };
        assert_eq!(written, [run(3, 2), run(200, 1)]);
        let holds = |run: &Run| (run.offset..run.offset + run.length).contains(&(100 * PAGE));
        assert!(
            runs.iter().any(|run| !run.written && holds(run)),
            "{runs:?}"
        );
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(at.cast(), length) };
    }

    #[test]
    fn runs_are_written_as_the_contract_has_it() {
        let run = Run {
            offset: 0x3000,
            length: 0x2000,
            written: true,
        };
        let mut expected = vec![0, 0x30, 0, 0, 0, 0, 0, 0];
        expected.extend([1, 0x20, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode(&[run]), expected);
    }

    #[test]
    fn lines_of_other_files_are_passed_over() {
        let line = "7f00-9f00 rw-p 00001000 fe:00 42 /memory (deleted)";
        let expected = Mapping {
            start: 0x7f00,
            end: 0x9f00,
            offset: 0x1000,
        };
        assert_eq!(mapping(line, 42), Some(expected));
        assert_eq!(mapping(line, 43), None);
        for line in [
            "",
            "x",
            "1-2 rw-p",
            "2-1 rw-p 0 fe:00 42",
            "7f00-9f00 rw-s 0 fe:00 42 /m",
        ] {
            assert_eq!(mapping(line, 42), None, "{line}");
        }
    }
}
