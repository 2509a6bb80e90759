//! Takes into use what a clone has beyond its template: memory that the host has put behind the guest's own, and
//! processors that wait to be started. There is no ACPI that would tell the kernel; the agent does, through sysfs
//! (Linux `Documentation/admin-guide/mm/memory-hotplug.rst`, `Documentation/core-api/cpu_hotplug.rst`).
//!
//! Before any container. It takes the kernel milliseconds, on a thread that may wait.

use std::fs;
use std::path::Path;

use rustix::system::sysinfo;

use crate::fault::Fault;

/// The kernel's memory blocks on x86-64 (`MIN_MEMORY_BLOCK_SIZE`).
const BLOCK: u64 = 128 << 20;
/// As much as anybody may ask for.
const MEMORY_MAX: u64 = 1 << 40;
const VCPUS_MAX: u32 = 64;

const SYSFS: &str = "/sys/devices/system";
/// What the kernel has sized by its memory at boot, and does not look at again: bounds on what a workload may have.
/// The kernel's own tables (dentries, sockets) stay as small as they were.
const SIZED_AT_BOOT: [&str; 14] = [
    "kernel/threads-max",
    "fs/file-max",
    "fs/epoll/max_user_watches",
    "fs/inotify/max_user_watches",
    "net/ipv4/tcp_mem",
    "net/ipv4/udp_mem",
    "user/max_cgroup_namespaces",
    "user/max_ipc_namespaces",
    "user/max_mnt_namespaces",
    "user/max_net_namespaces",
    "user/max_pid_namespaces",
    "user/max_time_namespaces",
    "user/max_user_namespaces",
    "user/max_uts_namespaces",
];

/// What the guest shall have.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Further memory: guest-physical address and length in bytes; 0 and 0 for none.
    pub memory_start: u64,
    pub memory_bytes: u64,
    /// Processors on-line; 0 leaves them as they are.
    pub vcpus: u32,
}

/// Adds what is missing. sysfs and /proc are mounted.
///
/// # Errors
/// The size is none; or the kernel refuses, and has part of it.
pub fn grow(size: Size) -> Result<(), Fault> {
    let blocks = blocks(size.memory_start, size.memory_bytes)?;
    if size.vcpus > VCPUS_MAX {
        return Err(Fault::Invalid(format!(
            "vcpus: {} are more than {VCPUS_MAX}",
            size.vcpus
        )));
    }
    let sysfs = Path::new(SYSFS);
    if !blocks.is_empty() {
        let before = memory();
        add(sysfs, &blocks)?;
        let after = memory();
        // A block is known before it is in use, and what the second takes is no error of the first.
        if after.saturating_sub(before) < size.memory_bytes {
            return Err(Fault::Broken(format!(
                "memory_bytes: {} were added to {before}, and the kernel has {after}",
                size.memory_bytes
            )));
        }
        raise_limits(before, after);
    }
    start_processors(sysfs, size.vcpus)
}

/// The blocks that a range of memory is made of, by address.
fn blocks(start: u64, bytes: u64) -> Result<Vec<u64>, Fault> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let end = start.checked_add(bytes);
    match end {
        Some(end) if start % BLOCK == 0 && bytes % BLOCK == 0 && bytes <= MEMORY_MAX => {
            Ok((start..end).step_by(BLOCK as usize).collect())
        }
        _ => Err(Fault::Invalid(format!(
            "memory: {bytes} bytes at {start:#x} are not blocks of {BLOCK}, or more than {MEMORY_MAX}"
        ))),
    }
}

/// Tells the kernel of blocks, which it takes into use at once. In their order: each has room for what the kernel
/// must know of the next.
fn add(sysfs: &Path, blocks: &[u64]) -> Result<(), Fault> {
    let probe = sysfs.join("memory/probe");
    for block in blocks {
        fs::write(&probe, format!("{block:#x}")).map_err(|error| {
            Fault::of_call(
                &format!("add memory at {block:#x}: {}", probe.display()),
                error,
            )
        })?;
    }
    Ok(())
}

/// Bytes that the kernel manages (`MemTotal`).
fn memory() -> u64 {
    let info = sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

fn start_processors(sysfs: &Path, vcpus: u32) -> Result<(), Fault> {
    // The first is always on-line, and has no such file.
    for index in 1..vcpus {
        let switch = sysfs.join(format!("cpu/cpu{index}/online"));
        let done = fs::read(&switch).and_then(|now| match now.trim_ascii() {
            b"1" => Ok(()),
            _ => fs::write(&switch, "1"),
        });
        done.map_err(|error| {
            Fault::of_call(&format!("start a processor: {}", switch.display()), error)
        })?;
    }
    Ok(())
}

/// Makes what was sized for `before` bytes of memory what it would be for `after`.
fn raise_limits(before: u64, after: u64) {
    for name in SIZED_AT_BOOT {
        let path = Path::new("/proc/sys").join(name);
        let raised = fs::read_to_string(&path)
            .and_then(|values| fs::write(&path, scaled(&values, before, after)));
        if let Err(error) = raised {
            log::warn!("{}: {error}", path.display());
        }
    }
}

fn scaled(values: &str, before: u64, after: u64) -> String {
    let scale = |value: &str| match value.parse::<u64>() {
        Ok(value) => {
            let scaled = u128::from(value) * u128::from(after) / u128::from(before.max(1));
            // What is without a bound stays so.
            u64::try_from(scaled)
                .unwrap_or(value)
                .min(i64::MAX as u64)
                .to_string()
        }
        Err(_) => value.to_owned(),
    };
    let values: Vec<String> = values.split_whitespace().map(scale).collect();
    values.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_whole_blocks_and_not_without_end() {
        assert!(blocks(7, 0).unwrap().is_empty());
        assert_eq!(
            blocks(1 << 32, 2 * BLOCK).unwrap(),
            [1 << 32, (1 << 32) + BLOCK]
        );
        assert_eq!(blocks(1 << 32, MEMORY_MAX).unwrap().len(), 8192);
        for (start, bytes) in [
            (1 << 32, BLOCK + 4096),
            ((1 << 32) + 4096, BLOCK),
            (1 << 32, MEMORY_MAX + BLOCK),
            (u64::MAX - BLOCK + 1, BLOCK),
            (0, u64::MAX),
        ] {
            let error = blocks(start, bytes).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("memory: {bytes} bytes")),
                "{error}"
            );
        }
    }

    #[test]
    fn only_processors_that_are_off_line_are_started() {
        let sysfs = std::env::temp_dir().join(format!("husk-grow-{}", std::process::id()));
        let switch = |index| sysfs.join(format!("cpu/cpu{index}/online"));
        for (index, now) in [(1, "1\n"), (2, "0\n"), (3, "0\n")] {
            fs::create_dir_all(switch(index).parent().unwrap()).unwrap();
            fs::write(switch(index), now).unwrap();
        }
        start_processors(&sysfs, 0).unwrap();
        start_processors(&sysfs, 3).unwrap();
        let states = [1, 2, 3].map(|index| fs::read_to_string(switch(index)).unwrap());
        assert_eq!(states, ["1\n", "1", "0\n"]);
        let error = start_processors(&sysfs, 5).unwrap_err().to_string();
        fs::remove_dir_all(&sysfs).unwrap();
        assert!(error.contains("cpu4/online: No such file"), "{error}");
    }

    #[test]
    fn a_size_that_is_none_is_refused_before_anything_is_done() {
        let size = |memory_bytes, vcpus| Size {
            memory_start: 1 << 32,
            memory_bytes,
            vcpus,
        };
        for (size, named) in [(size(1, 2), "memory: 1 bytes"), (size(0, 65), "vcpus: 65")] {
            let error = grow(size).unwrap_err().to_string();
            assert!(error.starts_with(named), "{error}");
        }
    }

    #[test]
    fn limits_grow_with_the_memory() {
        assert_eq!(scaled("1900\n", 256, 2048), "15200");
        assert_eq!(scaled("3\t4\t6\n", 2, 3), "4 6 9");
        assert_eq!(scaled("9223372036854775807\n", 1, 8), "9223372036854775807");
    }
}
