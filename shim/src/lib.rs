//! The shim: it knows containerd and the host, and drives the VMM and the agent by their contracts.
//!
//! The binary `containerd-shim-husk-v2` is exec'ed three times in the life of a pod, and once more
//! where there is no template for it yet:
//!
//! ```text
//! start   args, told, address,         binds the socket, leaves `serve` behind, prints the address
//!           bootstrap, info
//! serve   serve, task                  the process of the pod: speaks task v2 and v3 to containerd
//!           pod, control, ending         what runs in the pod, from its creation to its end
//!           process, stdio               its processes and their bytes
//!           stream_uri, log_program      where these go
//!           ahead, launch, templates     how its VM starts: before it is asked for, as a clone, or by
//!                                        booting
//!           vm, vmm, machine, spawn,     the husk-vmm process and the agent behind it
//!           core_scheduling
//!           ration, untrusted            how much of what they say is listened to, and shown
//!           spec, namespaces, devices,   what of the host the guest gets to see
//!           shares, idmap, mount
//!           network                      what CNI has left, made the guest's
//!           hooks, hook_times            what of the specification runs on the host
//!           host_program                 as a process
//!           events                       what containerd is told
//! delete  cleanup, record, pod_record  removes whatever a lost shim left behind
//! build-template  templates            makes the template that a cold start has missed
//! ```

pub mod address;
pub mod ahead;
pub mod args;
pub mod bootstrap;
pub mod cgroup;
pub mod check;
pub mod cleanup;
pub mod config;
pub mod container;
pub mod control;
mod core_scheduling;
pub mod devices;
pub mod ending;
pub mod events;
pub mod fault;
pub mod hook_times;
pub mod hooks;
pub mod host_program;
pub mod identity;
pub mod idmap;
pub mod info;
pub mod inspect;
pub mod launch;
pub mod log_program;
pub mod logger;
pub mod machine;
pub mod mount;
pub mod namespaces;
pub mod network;
pub mod options;
pub mod pod;
pub mod pod_config;
pub mod pod_record;
pub mod process;
pub mod ration;
pub mod ready;
pub mod record;
pub mod sandbox;
pub mod serve;
pub mod shares;
pub mod size;
pub mod spawn;
pub mod spec;
pub mod stats;
pub mod stdio;
pub mod stream_uri;
pub mod task;
pub mod templates;
pub mod timeline;
pub mod told;
pub mod untrusted;
pub mod vm;
pub mod vmm;
pub mod vmm_log;

/// The name under which containerd finds this runtime.
pub const RUNTIME: &str = "io.containerd.husk.v2";
/// Of the whole of husk, as in Cargo.toml.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
