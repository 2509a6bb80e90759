//! The machine's devices, a file each. None of them knows the others.

pub mod console;
pub mod fs;
pub mod net;
pub mod pvpanic;
pub mod reset_port;
pub mod rng;
pub mod vsock;
