//! husk-vmm: the microVM of one pod. It knows KVM and devices; it knows nothing of containers.
//!
//! A process serves one machine, in this order:
//!
//! ```text
//! jail      leaves everything behind that the machine does not need     (once, before any thread)
//! service   the machine contract on fd 3: Boot, Share, Connect, Wait …  (main thread, tokio)
//!   vm      builds the VM and runs its vCPUs                            (a thread per vCPU)
//!     pci     what the guest's configuration and MMIO accesses reach    (on the vCPUs' threads)
//!     virtio  the device trait, queues, and the PCI transport
//!     devices vsock, net, rng, pvpanic, the fs device's queues, serial port, reset port
//!     fs      the file server behind the virtio-fs device               (a thread per queue)
//! ```
//!
//! Every byte the guest can write is hostile. What a device cannot accept ends the pod with
//! `DEVICE_ERROR`; it never panics and never touches memory outside the guest's.

mod connection;
pub mod descriptors;
pub mod devices;
pub mod fs;
pub mod jail;
pub mod log;
pub mod memory;
pub mod pci;
pub mod service;
pub mod state;
pub mod virtio;
pub mod vm;
