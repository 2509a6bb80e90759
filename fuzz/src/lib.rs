//! husk's fuzz targets: each feeds one surface with what somebody hostile can say there.
//!
//! ```text
//! queue      a split virtqueue: rings, chains and indirect tables that the guest writes      vmm
//! pci        configuration, BARs, MSI-X, ports; the transport; saving all of it              vmm
//! vsock      packets, receive buffers and the host's sockets                                 vmm
//! net        packets, receive buffers, commands, and what comes from the tap             vmm
//! fs         FUSE requests against a real directory                                          vmm
//! machine    the machine contract: requests, descriptors, raw frames                         vmm
//! image      what is read from files: a saved machine's state, its page list, a kernel       vmm
//! agent      what the agent parses: specifications, and its helper's orders                  agent
//! shim       a lying agent: frames, answers, events, statistics, the console                 shim
//! ```
//!
//! A target takes any bytes and must return: it panics where something holds that must never hold. The
//! bytes are made into structured input by `arbitrary`, so that most of them reach deep. Targets are
//! deterministic, so their corpora (`corpus/TARGET`) are tests: `tests/corpus.rs` runs them all.

mod agent;
mod driver;
mod fs;
mod image;
mod machine;
mod net;
mod pci;
mod queue;
mod shim;
mod vsock;

/// Runs one input.
pub type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 9] = [
    ("queue", queue::run),
    ("pci", pci::run),
    ("vsock", vsock::run),
    ("net", net::run),
    ("fs", fs::run),
    ("machine", machine::run),
    ("image", image::run),
    ("agent", agent::run),
    ("shim", shim::run),
];

/// The names of all targets.
pub fn names() -> Vec<&'static str> {
    TARGETS.iter().map(|(name, _)| *name).collect()
}

/// The target of that name.
pub fn target(name: &str) -> Option<Target> {
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    found.map(|(_, run)| *run)
}
