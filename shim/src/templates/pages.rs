//! Which pages of guest memory a start writes: what a clone's VMM has copied once its agent has
//! answered and started a container, read from `/proc/<pid>/maps` and `pagemap`. Written down beside the
//! memory, so that the VMM of every later clone maps them at once instead of fault by fault
//! (machine.proto, `pages_fd`). Pages that are only read are left to faults: the kernel maps sixteen for
//! each one that was asked for, so page tables do not tell which they are.

use std::{
    collections::BTreeSet,
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
/// In a run's length: its pages will be written, and so before the agent has answered.
const WRITTEN: u64 = 1;
const EARLY: u64 = 2;
/// Entries that are read at a time.
const CHUNK: u64 = 1024;

/// Pages that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// In the memory file, bytes.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) length: u64,
}

impl Run {
    fn end(&self) -> u64 {
        self.offset + self.length
    }
}

/// Where a part of guest memory is mapped.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    /// Of `start`, in the file.
    offset: u64,
}

/// What of the memory file the process `pid` has mapped and written to, in the file's order.
pub(super) fn written(pid: u32, memory: &Stamp) -> io::Result<Vec<Run>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut runs: Vec<Run> = Vec::new();
    for mapping in mappings(&maps, memory) {
        let mut at = mapping.start;
        while at < mapping.end {
            let count = ((mapping.end - at) / PAGE).clamp(1, CHUNK);
            let mut entries = vec![0; (count * ENTRY) as usize];
            pagemap.read_exact_at(&mut entries, at / PAGE * ENTRY)?;
            for entry in entries.chunks_exact(ENTRY as usize) {
                let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                if entry & PRESENT != 0 && entry & OF_FILE == 0 {
                    add(&mut runs, mapping.offset + (at - mapping.start));
                }
                at += PAGE;
            }
        }
    }
    Ok(runs)
}

fn add(runs: &mut Vec<Run>, offset: u64) {
    match runs.last_mut() {
        Some(last) if last.end() == offset => last.length += PAGE,
        _ => runs.push(Run {
            offset,
            length: PAGE,
        }),
    }
}

/// Where guest memory is, in the file's order: private mappings of the file, and anonymous ones that
/// follow upon them, which stand for parts of the file without data.
fn mappings(maps: &str, memory: &Stamp) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in maps.lines() {
        let Some((start, end, offset)) = mapping(line, memory.inode) else {
            continue;
        };
        let before = found.last();
        let before = before.map(|last| (last.end, last.offset + (last.end - last.start)));
        let offset = match (offset, before) {
            (Some(offset), _) => offset,
            (None, Some((at, offset))) if at == start => offset,
            _ => continue,
        };
        let length = (end - start).min(memory.size.saturating_sub(offset));
        if length > 0 {
            found.push(Mapping {
                start,
                end: start + length,
                offset,
            });
        }
    }
    found.sort_by_key(|mapping| mapping.offset);
    found
}

/// Start, end and offset of a line of maps (proc(5)), if it is a private mapping of this file, or an
/// anonymous one, which has no offset. The device is not compared: on some file systems it is another
/// one there than in stat(2).
fn mapping(line: &str, inode: u64) -> Option<(u64, u64, Option<u64>)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let private = fields.next()?.ends_with('p');
    let offset = fields.next()?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let (start, end, offset) = (hex(start)?, hex(end)?, hex(offset)?);
    let found: u64 = fields.nth(1)?.parse().ok()?;
    let sound = private && start < end && offset.checked_add(end - start).is_some();
    match (sound, found) {
        (true, 0) => Some((start, end, None)),
        (true, found) if found == inode => Some((start, end, Some(offset))),
        _ => None,
    }
}

/// As machine.proto has it, of all runs and those of them that were there when the agent had answered: 16
/// bytes per run, offset and length, little-endian. The early ones come first.
pub(super) fn encode(early: &[Run], all: &[Run]) -> Vec<u8> {
    let pages = |runs: &[Run]| -> BTreeSet<u64> {
        let pages = |run: &Run| (run.offset..run.end()).step_by(PAGE as usize);
        runs.iter().flat_map(pages).collect()
    };
    let early = pages(early);
    let later = &pages(all) - &early;
    let mut bytes = Vec::new();
    for (pages, flags) in [(early, WRITTEN | EARLY), (later, WRITTEN)] {
        let mut runs = Vec::new();
        pages.into_iter().for_each(|page| add(&mut runs, page));
        for run in runs {
            bytes.extend(run.offset.to_le_bytes());
            bytes.extend((run.length | flags).to_le_bytes());
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, ptr};

    use super::*;

    #[test]
    fn what_was_written_is_told_from_what_was_read() {
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
        let runs = written(std::process::id(), &stamp).unwrap();
        let run = |first: u64, count: u64| Run {
            offset: first * PAGE,
            length: count * PAGE,
        };
        assert_eq!(runs, [run(3, 2), run(200, 1)]);
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(at.cast(), length) };
    }

    #[test]
    fn runs_are_written_as_the_contract_has_it() {
        let run = |offset, length| Run { offset, length };
        let mut expected = vec![0, 0x30, 0, 0, 0, 0, 0, 0];
        expected.extend([1, 0x20, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode(&[], &[run(0x3000, 0x2000)]), expected);

        let early = [
            run(0x1000, 0x1000),
            run(0x4000, 0x2000),
            run(0x9000, 0x1000),
        ];
        let all = [
            run(0x1000, 0x1000),
            run(0x3000, 0x4000),
            run(0x9000, 0x2000),
        ];
        let words: Vec<u64> = encode(&early, &all)
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let runs: Vec<_> = words.chunks(2).map(|run| (run[0], run[1])).collect();
        let expected = [
            (0x1000, 0x1003),
            (0x4000, 0x2003),
            (0x9000, 0x1003),
            (0x3000, 0x1001),
            (0x6000, 0x1001),
            (0xa000, 0x1001),
        ];
        assert_eq!(runs, expected);
    }

    #[test]
    fn lines_of_other_files_are_passed_over() {
        let line = "7f00-9f00 rw-p 00001000 fe:00 42 /memory (deleted)";
        let expected = (0x7f00, 0x9f00, Some(0x1000));
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

    #[test]
    fn memory_without_data_is_found_behind_the_data() {
        let maps = "1000-3000 rw-p 00000000 00:00 0
5000-7000 rw-p 00000000 fe:00 42 /memory
7000-9000 rw-p 00000000 00:00 0
9000-a000 rw-p 00004000 fe:00 42 /memory
a000-f000 rw-p 00000000 00:00 0
";
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x6000).unwrap();
        let mut stamp = Stamp::from(&file.metadata().unwrap());
        stamp.inode = 42;
        let found: Vec<_> = mappings(maps, &stamp)
            .iter()
            .map(|mapping| (mapping.start, mapping.end, mapping.offset))
            .collect();
        let expected = [
            (0x5000, 0x7000, 0),
            (0x7000, 0x9000, 0x2000),
            (0x9000, 0xa000, 0x4000),
            (0xa000, 0xb000, 0x5000),
        ];
        assert_eq!(found, expected);
    }
}
