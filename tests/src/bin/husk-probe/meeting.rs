//! Two processes at one page of shared memory, by a file's name or by System V's key: each says that it is there, and waits
//! until it sees the other.

use std::{
    fs::File,
    io::Error,
    os::fd::AsRawFd,
    ptr,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

const PAGE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(60);

pub fn meet(place: &str) -> Result<()> {
    let page = match place.strip_prefix("key:") {
        Some(key) => by_key(key.parse().context("a key is a number")?),
        None => by_name(place),
    };
    let page = page.with_context(|| place.to_owned())?;
    // SAFETY: a page that is there until this process ends, and which all who have it use as this.
    let count = unsafe { AtomicU32::from_ptr(page) };
    count.fetch_add(1, Ordering::SeqCst);
    let deadline = Instant::now() + PATIENCE;
    while count.load(Ordering::SeqCst) < 2 {
        if Instant::now() > deadline {
            bail!("{place}: nobody else came");
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn by_name(path: &str) -> Result<*mut u32> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.set_len(PAGE as u64)?;
    let rights = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, which nobody else in this process has.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            PAGE,
            rights,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if page == libc::MAP_FAILED {
        bail!("mmap: {}", Error::last_os_error());
    }
    Ok(page.cast())
}

fn by_key(key: i32) -> Result<*mut u32> {
    // SAFETY: takes numbers alone.
    let id = unsafe { libc::shmget(key, PAGE, libc::IPC_CREAT | 0o600) };
    if id < 0 {
        bail!("shmget: {}", Error::last_os_error());
    }
    // SAFETY: a new mapping, which nobody else in this process has.
    let page = unsafe { libc::shmat(id, ptr::null(), 0) };
    if page as isize == -1 {
        bail!("shmat: {}", Error::last_os_error());
    }
    Ok(page.cast())
}
