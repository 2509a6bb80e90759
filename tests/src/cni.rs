//! Debian's CNI plugins as containerd's CRI and `ctr run --cni` call them: bridge with host-local addresses of both families and masquerading,
//! and portmap; in a network namespace of the test's. Deleted with this value.

use std::process::Command;

use serde_json::{Value, json};

use crate::command;

const PLUGINS: &str = "/usr/lib/cni";

pub struct Cni {
    /// The namespace's, and the container's as far as CNI knows it.
    pub name: String,
    network: Value,
    ports: Value,
    result: Value,
}

/// The bridge that pods are at.
fn bridge() -> Value {
    json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd88::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    })
}

/// The same network as containerd's CRI is configured for it.
pub(crate) fn conflist() -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "lab",
        "plugins": [bridge(), {"type": "portmap", "capabilities": {"portMappings": true}}],
    })
}

impl Cni {
    /// A namespace that the plugins have made eth0 in; the host's port leads to the pod's port 80.
    ///
    /// # Panics
    /// When a plugin says no.
    #[track_caller]
    pub fn add(name: &str, host_port: u16) -> Self {
        // As runtimes do, before any plugin.
        let made = format!("ip netns add {name}; ip -n {name} link set lo up");
        command::run(Command::new("sh").args(["-ec", &made]), b"").ok();
        let mut network = bridge();
        network["cniVersion"] = json!("1.0.0");
        network["name"] = json!("lab");
        let ports = json!({
            "cniVersion": "1.0.0", "name": "lab", "type": "portmap", "capabilities": {"portMappings": true},
            "runtimeConfig": {"portMappings": [{"hostPort": host_port, "containerPort": 80, "protocol": "tcp"}]},
        });
        let mut cni = Self {
            name: name.into(),
            network,
            ports,
            result: Value::Null,
        };
        cni.result = serde_json::from_str(&cni.call("ADD", &cni.network)).expect("a result");
        let chained = serde_json::from_str(&cni.call("ADD", &cni.chained(&cni.ports)));
        cni.result = chained.expect("a result");
        cni
    }

    /// The pod's address of this family.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn address(&self, six: bool) -> String {
        let addresses = self.result["ips"].as_array().into_iter().flatten();
        let mut plain = addresses.filter_map(|ip| ip["address"].as_str()?.split('/').next());
        let found = plain.find(|ip| ip.contains(':') == six);
        found.unwrap_or_else(|| panic!("{}", self.result)).into()
    }

    /// What a kubelet asks of a network that it does not trust.
    #[track_caller]
    pub fn check(&self) {
        self.call("CHECK", &self.chained(&self.network));
    }

    /// As a runtime does, in the other order.
    #[track_caller]
    pub fn delete(self) {
        self.call("DEL", &self.chained(&self.ports));
        self.call("DEL", &self.chained(&self.network));
    }

    fn chained(&self, plugin: &Value) -> Value {
        let mut plugin = plugin.clone();
        plugin["prevResult"] = self.result.clone();
        plugin
    }

    #[track_caller]
    fn call(&self, verb: &str, plugin: &Value) -> String {
        let kind = plugin["type"].as_str().unwrap_or_default();
        let mut command = Command::new(format!("{PLUGINS}/{kind}"));
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &self.name)
            .env("CNI_NETNS", format!("/run/netns/{}", self.name))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", PLUGINS);
        let outcome = command::run(&mut command, plugin.to_string().as_bytes());
        assert_eq!(
            outcome.code(),
            0,
            "{kind} {verb}: {} {}",
            outcome.out(),
            outcome.err()
        );
        outcome.out()
    }
}

impl Drop for Cni {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .output();
    }
}
