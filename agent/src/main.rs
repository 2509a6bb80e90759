//! The entry point of both programs: PID 1, and by its other name the helper `oci-init`. By a third name it
//! is a program that does nothing, for [`husk_agent::rehearsal`], and by a fourth one that waits, [`husk_agent::pause`].
//!
//! There is no Rust `main`, because Rust's start-up aborts a process that has no descriptors 0 to 2
//! and cannot open `/dev/null`: that is how the kernel starts PID 1 of a guest without a console.

#![no_main]

use std::ffi::{CStr, c_char, c_int};

/// # Safety
/// Called by the C runtime, with its arguments.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(argc: c_int, argv: *const *const c_char) -> c_int {
    let name = if argc > 0 {
        // SAFETY: with argc above 0, argv[0] is a string that lives as long as the process.
        unsafe { CStr::from_ptr(*argv) }
    } else {
        c""
    };
    if name == husk_agent::launch::NAME {
        husk_agent::oci_init::run()
    }
    if name == husk_agent::rehearsal::NAME {
        return 0;
    }
    if name == husk_agent::pause::NAME {
        return husk_agent::pause::run();
    }
    if !rustix::process::getpid().is_init() {
        eprintln!("husk-agent: is PID 1 of a husk guest, and nothing else");
        return 2;
    }
    husk_agent::boot::run()
}
