//! What the end-to-end tests are written with. They run as root inside the lab, one at a time, beside
//! a real containerd; see `docs/lab.md`.

pub mod bare;
pub mod bundle;
pub mod census;
pub mod cni;
pub mod command;
pub mod containerd;
pub mod cpio;
pub mod cri;
pub mod ctr;
pub mod events;
pub mod grpc;
pub mod machine;
pub mod netns;
pub mod settings;
pub mod steady;
pub mod streaming;
pub mod tap;
pub mod templates;
pub mod terminal;
pub mod traffic;
pub mod wire;
