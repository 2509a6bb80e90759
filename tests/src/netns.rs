//! A pod's network namespace as CNI's bridge plugin leaves it: eth0, whose other end is in a bridge of the lab; made by hand, so that
//! a test knows every bit of it. Gone with this value.

use std::{
    fs::File,
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd,
    process::Command,
    thread,
};

use crate::command::{self, Outcome, PATIENCE};

/// Runs a script on the lab's host.
pub fn host(script: &str) -> Outcome {
    command::run(Command::new("sh").args(["-ec", script]), b"")
}

/// Connects from within a network namespace, on the lab's host. Who reads waits for a while.
///
/// # Panics
/// When there is no such namespace.
#[track_caller]
pub fn dial(namespace: &str, to: &str) -> io::Result<TcpStream> {
    let file = File::open(format!("/run/netns/{namespace}")).expect("a network namespace");
    let to: SocketAddr = to.parse().expect("an address");
    // A thread goes there for good.
    let dials = thread::spawn(move || {
        // SAFETY: setns(2) takes numbers only.
        if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    });
    dials.join().expect("a thread that dials")
}

pub struct Namespace {
    pub name: String,
}

/// Of the host in the bridge, and of the pod.
pub const HOST: &str = "10.99.0.1";
pub const HOST6: &str = "fd99::1";
pub const POD: &str = "10.99.0.2";
pub const POD6: &str = "fd99::2";
pub const MAC: &str = "02:99:00:00:00:02";

impl Namespace {
    /// With addresses, an on-link and a default route of both families, and this MTU.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn new(name: &str, mtu: u32) -> Self {
        host(&format!(
            "ip link add br-{name} mtu {mtu} type bridge; ip link set br-{name} up
             ip address add {HOST}/24 dev br-{name}; ip address add {HOST6}/64 nodad dev br-{name}
             ip netns add {name}; ip netns exec {name} ip link set lo up
             ip link add v-{name} mtu {mtu} type veth peer name eth0 address {MAC} mtu {mtu} netns {name}
             ip link set v-{name} master br-{name} up"
        ))
        .ok();
        let namespace = Self { name: name.into() };
        namespace
            .run(&format!(
                // Its own making would be in doubt for a while.
                "ip link set eth0 addrgenmode none up; ip address add fe80::99:ff:fe00:2/64 nodad dev eth0
                 ip address add {POD}/24 brd + dev eth0; ip address add {POD6}/64 nodad dev eth0
                 ip route add default via {HOST}; ip -6 route add default via {HOST6}"
            ))
            .ok();
        namespace
    }

    /// What `ctr run` is told.
    pub fn flag(&self) -> String {
        format!("network:/run/netns/{}", self.name)
    }

    /// Runs a script on the host, in this namespace.
    #[track_caller]
    pub fn run(&self, script: &str) -> Outcome {
        let args = ["netns", "exec", &self.name, "sh", "-ec", script];
        command::run(Command::new("ip").args(args), b"")
    }

    /// All that is set in it, but for counters.
    #[track_caller]
    pub fn state(&self) -> String {
        let script = "ip -o link; ip -o address; ip route show table all; ip -6 route show table all; \
            ip neighbour show nud permanent; tc qdisc; tc filter show dev eth0 ingress";
        self.run(script).ok()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let name = &self.name;
        // With the namespace goes its veth; the bridge may be gone already.
        host(&format!(
            "ip netns delete {name}; ip link delete v-{name} 2>/dev/null || true; ip link delete br-{name}"
        ));
    }
}
