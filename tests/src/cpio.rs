//! An initramfs for a test, in the kernel's format
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{self, Write};

/// One entry; the mode carries the file's type.
pub struct Entry<'a> {
    pub name: &'a str,
    pub mode: u32,
    /// Major and minor number of a device, else zeroes.
    pub device: (u32, u32),
    pub content: &'a [u8],
}

/// An archive with `init` as its `/init`, and the one device a Rust program cannot start without.
///
/// # Errors
/// Of `out`; an `init` of 4 GiB or more is `InvalidInput`.
pub fn write_init(out: impl Write, init: &[u8]) -> io::Result<()> {
    let entry = |name, mode, device, content| Entry {
        name,
        mode,
        device,
        content,
    };
    write(
        out,
        &[
            entry("dev", 0o040_755, (0, 0), &[]),
            entry("dev/null", 0o020_666, (1, 3), &[]),
            entry("init", 0o100_755, (0, 0), init),
        ],
    )
}

/// Writes a newc archive.
///
/// # Errors
/// Of `out`; a content of 4 GiB or more is `InvalidInput`.
pub fn write(mut out: impl Write, entries: &[Entry<'_>]) -> io::Result<()> {
    let trailer = Entry {
        name: "TRAILER!!!",
        mode: 0,
        device: (0, 0),
        content: &[],
    };
    for (inode, entry) in (1_u32..).zip(entries.iter().chain([&trailer])) {
        let size = u32::try_from(entry.content.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (major, minor) = entry.device;
        // Owner, group and the time of change are 0, the links 1.
        write!(
            out,
            "070701{inode:08x}{:08x}{2:08x}{2:08x}{1:08x}{2:08x}",
            entry.mode, 1, 0
        )?;
        write!(out, "{size:08x}{0:08x}{0:08x}{major:08x}{minor:08x}", 0)?;
        write!(out, "{:08x}{:08x}{}\0", entry.name.len() + 1, 0, entry.name)?;
        // The header is 110 bytes; names and contents are padded to 4.
        let padding = |length: usize| &[0_u8; 3][..(4 - length % 4) % 4];
        out.write_all(padding(110 + entry.name.len() + 1))?;
        out.write_all(entry.content)?;
        out.write_all(padding(entry.content.len()))?;
    }
    out.flush()
}
