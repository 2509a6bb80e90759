//! KVM's structures as bytes, for the state file.

use crate::state::StateError;

/// A structure that is whole as bytes: no padding, no pointers, every pattern of bits a value.
///
/// # Safety
/// Only for such types.
pub(super) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($name:ident),*) => {
        $(
            // SAFETY: part of KVM's interface, laid out without implicit padding, integers alone.
            unsafe impl Plain for kvm_bindings::$name {}
        )*
    };
}
// SAFETY: an integer.
unsafe impl Plain for u32 {}
plain!(
    kvm_cpuid_entry2,
    kvm_regs,
    kvm_sregs,
    kvm_xcrs,
    kvm_debugregs,
    kvm_lapic_state,
    kvm_msr_entry,
    kvm_vcpu_events
);

pub(super) fn to_bytes<T: Plain>(values: &[T]) -> Vec<u8> {
    // SAFETY: all bytes of a plain value are initialized, and `u8` has no alignment.
    let bytes =
        unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) };
    bytes.to_vec()
}

/// The one value in `bytes`, which `what` names.
pub(super) fn one<T: Plain>(bytes: &[u8], what: &'static str) -> Result<T, StateError> {
    match many(bytes, what)?.as_slice() {
        [value] => Ok(*value),
        _ => Err(StateError::Content(what)),
    }
}

/// All values in `bytes`, which `what` names.
pub(super) fn many<T: Plain>(bytes: &[u8], what: &'static str) -> Result<Vec<T>, StateError> {
    let chunks = bytes.chunks_exact(size_of::<T>());
    if !chunks.remainder().is_empty() {
        return Err(StateError::Content(what));
    }
    // SAFETY: each chunk has the size of a value, and every pattern of bits is one.
    let read = |chunk: &[u8]| unsafe { chunk.as_ptr().cast::<T>().read_unaligned() };
    Ok(chunks.map(read).collect())
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_msr_entry, kvm_regs};

    use super::*;

    #[test]
    fn values_survive_as_bytes_of_their_exact_length() {
        let regs = kvm_regs {
            rip: 7,
            ..Default::default()
        };
        let bytes = to_bytes(&[regs]);
        assert_eq!(one::<kvm_regs>(&bytes, "regs").unwrap(), regs);
        for length in 0..bytes.len() {
            assert!(one::<kvm_regs>(&bytes[..length], "regs").is_err());
        }
        assert!(one::<kvm_regs>(&bytes.repeat(2), "regs").is_err());
        assert!(many::<kvm_msr_entry>(&[], "msrs").unwrap().is_empty());
        assert!(many::<kvm_msr_entry>(&[0; 17], "msrs").is_err());
    }
}
