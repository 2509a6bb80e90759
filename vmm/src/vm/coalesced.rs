//! Port writes that KVM collects in a ring instead of leaving the guest for each
//! (KVM_CAP_COALESCED_PIO).
//!
//! Meant for writes that mean nothing until a later access: the PCI configuration address, and the
//! serial port's characters. The ring belongs to the whole VM; whoever handles an exit empties it
//! first, under the lock, so that the order of one CPU's accesses is kept.

use std::{
    io,
    os::fd::AsRawFd,
    ptr::{self, NonNull},
    sync::{Mutex, PoisonError},
};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::VcpuFd;

const PAGE: usize = 4096;
/// Entries that fit in the ring's page behind its header (`KVM_COALESCED_MMIO_MAX`).
const ENTRIES: u32 =
    ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring, mapped.
pub(super) struct CoalescedWrites(Mutex<Ring>);

struct Ring(NonNull<kvm_coalesced_mmio_ring>);

// SAFETY: the page is shared memory, not tied to a thread.
unsafe impl Send for Ring {}

impl CoalescedWrites {
    /// Maps the VM's ring, which every vCPU's descriptor shows at the same offset.
    pub(super) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let offset = KVM_COALESCED_MMIO_PAGE_OFFSET as usize * PAGE;
        // SAFETY: a new shared mapping of one page, which KVM has at this offset.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        match NonNull::new(page) {
            Some(page) if page.as_ptr() != libc::MAP_FAILED => {
                Ok(Self(Mutex::new(Ring(page.cast()))))
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Hands every collected write to `write` as port and data, oldest first.
    pub(super) fn drain(&self, mut write: impl FnMut(u16, &[u8])) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(entry) = ring.pop() {
            let length = usize::try_from(entry.len).unwrap_or(0);
            if let (Ok(port), Some(data)) =
                (u16::try_from(entry.phys_addr), entry.data.get(..length))
            {
                write(port, data);
            }
        }
    }
}

impl Ring {
    fn pop(&mut self) -> Option<kvm_coalesced_mmio> {
        let ring = self.0.as_ptr();
        // SAFETY: `ring` is a mapped page. KVM alone writes `last` and the entries before it, we alone
        // `first`; both are checked against the page's size before they are used as an index.
        unsafe {
            let first = (&raw const (*ring).first).read_volatile();
            let last = (&raw const (*ring).last).read_volatile();
            if first == last || first >= ENTRIES {
                return None;
            }
            std::sync::atomic::fence(std::sync::atomic::Ordering::Acquire);
            let entries: *const kvm_coalesced_mmio = (&raw const (*ring).coalesced_mmio).cast();
            let entry = entries.add(first as usize).read();
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
            (&raw mut (*ring).first).write_volatile((first + 1) % ENTRIES);
            Some(entry)
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nobody refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}
