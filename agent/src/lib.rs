//! husk-agent, PID 1 of a husk guest: runs the pod's containers for the shim on the host.
//!
//! ```text
//! boot ── connection ── service ──(Door)── pod ── container ── process
//!                          │                         ├── cgroup, device_filter
//!                       events                       ├── launch ── control ══ oci_init (another process)
//!                                                    └── streams ── channel
//! ```
//!
//! The program is two: under its own name it is PID 1, started by the kernel; as `oci-init` it is the
//! short-lived, single-threaded first process of a container, which PID 1 starts and which becomes
//! the container's program ([`oci_init`]). A library, so that tests can run both parts on a host.

pub mod boot;
pub mod cgroup;
pub mod channel;
pub mod connection;
pub mod container;
pub mod control;
pub mod device_filter;
pub mod events;
pub mod fault;
pub mod forward;
pub mod grow;
pub mod identity;
pub mod kmsg;
pub mod launch;
pub mod network;
pub mod oci_init;
pub mod pause;
pub mod plan;
pub mod pod;
pub mod process;
pub mod reaper;
pub mod rehearsal;
pub mod service;
pub mod spec;
pub mod streams;
pub mod sys;
