//! husk's two contracts and the constants both of their sides share. No logic.
//!
//! * [`machine`]: shim to VMM, see `protos/machine.proto`.
//! * [`agent`]: shim to agent, see `protos/agent.proto`.
//! * [`cri`]: what Kubernetes' interface says a pod shall be like, see `protos/cri.proto`.

macro_rules! generated {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[allow(warnings, clippy::all, missing_docs)]
        pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", stringify!($name), ".rs"));
        }
    };
}

generated!(
    /// The machine contract: messages.
    machine
);
generated!(
    /// The machine contract: client and service trait.
    machine_ttrpc
);
generated!(
    /// The agent contract: messages.
    agent
);
generated!(
    /// The agent contract: client and service trait.
    agent_ttrpc
);
generated!(
    /// Kubernetes' Container Runtime Interface, as far as it is read here: messages.
    cri
);

/// Descriptor of the machine service's ttrpc connection, inherited by the VMM.
pub const MACHINE_FD: i32 = 3;
/// Descriptor of the machine service's descriptor channel, inherited by the VMM.
pub const DESCRIPTOR_FD: i32 = 4;

/// The vsock context id of the host (virtio 1.2 §5.10.4).
pub const HOST_CID: u32 = 2;
/// The vsock context id of every guest: the muxer is per pod, so no two ever meet.
pub const GUEST_CID: u32 = 3;
/// The host port the agent dials to serve its contract.
pub const AGENT_PORT: u32 = 1024;
/// The guest port the agent listens on for standard streams.
pub const STREAM_PORT: u32 = 1025;

/// The tag of the pod's virtio-fs device (virtio 1.2 §5.11.4).
pub const SHARES_TAG: &str = "husk";
/// Where the agent mounts the shares; each share is an entry of this directory.
pub const SHARES: &str = "/run/husk/shares";
/// Where, in a specification for the agent, the namespaces of other containers seem to be: `<id>/ns/<type>`
/// below. Nothing is there: the agent knows what is meant.
pub const CONTAINERS: &str = "/run/husk/containers";
/// A root file system of the guest's own, for a container that has none on the host: its one program, [`PAUSE`], waits to be
/// told to end, and buries who has no parent.
pub const PAUSE_ROOT: &str = "/run/husk/pause";
/// The program in [`PAUSE_ROOT`], by its path in there.
pub const PAUSE: &str = "/pause";
/// The source of a bind mount that is the pod's shared memory: a file system in the guest's memory, empty at the pod's start.
pub const SHM: &str = "/run/husk/shm";
