//! In network namespaces of this machine, made with ip(8). Needs root: `make test` runs as root.

use std::process::Command;

use husk_proto::agent as api;

use super::*;

fn run(script: &str) -> Result<String, String> {
    let done = Command::new("sh")
        .args(["-ec", script])
        .output()
        .map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match done.status.success() {
        true => Ok(text(&done.stdout)),
        false => Err(text(&done.stderr)),
    }
}

#[track_caller]
fn ok(script: &str) -> String {
    run(script).unwrap_or_else(|e| panic!("{script}: {e}"))
}

/// Runs the test on a thread that has a namespace of its own.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: unshare(2) takes numbers only.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "as root");
        ok("ip link set lo up");
        test();
    });
    thread.join().unwrap();
}

fn bytes(ip: &str) -> Vec<u8> {
    match ip {
        "" => Vec::new(),
        ip => husk_netlink::octets(ip.parse().unwrap()),
    }
}

fn interface(slot: u32, name: &str, addresses: &[(&str, u32, &str)]) -> api::Interface {
    let addresses = addresses
        .iter()
        .map(|(ip, prefix, broadcast)| api::Address {
            ip: bytes(ip),
            prefix: *prefix,
            broadcast: bytes(broadcast),
            scope: if ip.starts_with("fe80") { 253 } else { 0 },
            ..api::Address::default()
        });
    api::Interface {
        slot,
        name: name.into(),
        mac: vec![2, 0, 0, 0, 0, slot as u8],
        mtu: 1400,
        addresses: addresses.collect(),
        ..api::Interface::default()
    }
}

fn route(destination: &str, prefix: u32, gateway: &str, interface: &str) -> api::Route {
    let v6 = destination.contains(':');
    api::Route {
        destination: bytes(destination),
        prefix,
        gateway: bytes(gateway),
        interface: interface.into(),
        scope: if gateway.is_empty() && !v6 { 253 } else { 0 },
        metric: if v6 { 1024 } else { 0 },
        kind: 1,
        table: 254,
        ..api::Route::default()
    }
}

fn request() -> api::SetNetworkRequest {
    let on_link = api::Route {
        source: bytes("10.9.0.2"),
        ..route("10.9.0.0", 24, "", "eth0")
    };
    let of_the_kernel = api::Route {
        metric: 256,
        ..route("fd09::", 64, "", "eth0")
    };
    let nowhere = api::Route {
        kind: 6,
        scope: 0,
        ..route("172.31.0.0", 16, "", "")
    };
    let hinted = api::Route {
        source: bytes("10.9.0.2"),
        onlink: true,
        metric: 7,
        mtu: 1300,
        ..route("10.8.0.0", 16, "10.8.0.1", "eth0")
    };
    let of_table_100 = api::Route {
        table: 100,
        ..route("192.168.7.0", 24, "", "net1")
    };
    api::SetNetworkRequest {
        interfaces: vec![
            interface(
                7,
                "eth0",
                &[
                    ("10.9.0.2", 24, "10.9.0.255"),
                    ("fd09::2", 64, ""),
                    ("fe80::7", 64, ""),
                ],
            ),
            interface(8, "net1", &[("10.10.0.2", 24, "")]),
        ],
        routes: vec![
            on_link,
            of_the_kernel,
            nowhere,
            of_table_100,
            route("10.10.0.1", 32, "", "net1"),
            hinted,
            route("0.0.0.0", 0, "10.9.0.1", "eth0"),
            route("::", 0, "fd09::1", "eth0"),
            route("10.11.0.0", 16, "10.10.0.1", "net1"),
        ],
        neighbours: vec![api::Neighbour {
            interface: "eth0".into(),
            ip: bytes("10.9.0.9"),
            mac: vec![2, 0, 0, 0, 0, 9],
            ..api::Neighbour::default()
        }],
        ..api::SetNetworkRequest::default()
    }
}

fn apply(
    network: &mut Network,
    request: &api::SetNetworkRequest,
    found: &[&str],
) -> Result<(), Fault> {
    let found: Vec<String> = found.iter().map(|name| (*name).to_owned()).collect();
    network.apply(&mut Socket::open().unwrap(), Wanted::read(request)?, &found)
}

const STATE: &str = "ip -o link show dev eth0 | sed 's/.*link.ether/mac/'; ip -o address; ip route show table all type unicast; \
    ip route show type blackhole; ip -6 route show table main; ip neighbour show nud permanent";

/// What the kernel calls eth0 shall be net1, and the other way round.
fn two_interfaces() {
    ok(
        "ip link add eth0 type veth peer name p0; ip link add eth1 type veth peer name p1; ip link set p0 up; ip link set p1 up",
    );
}

#[test]
fn the_network_becomes_what_is_said() {
    in_a_namespace(|| {
        two_interfaces();
        let mut network = Network::default();
        apply(&mut network, &request(), &["eth1", "eth0"]).unwrap();
        let state = ok(STATE);
        for wanted in [
            "mac 02:00:00:00:00:07",
            "eth0    inet 10.9.0.2/24 brd 10.9.0.255 scope global eth0",
            "eth0    inet6 fd09::2/64 scope global \\",
            "eth0    inet6 fe80::7/64 scope link \\",
            "net1    inet 10.10.0.2/24 scope global net1",
            "10.9.0.0/24 dev eth0 proto kernel scope link src 10.9.0.2",
            "192.168.7.0/24 dev net1 table 100 scope link",
            "blackhole 172.31.0.0/16",
            "10.8.0.0/16 via 10.8.0.1 dev eth0 src 10.9.0.2 metric 7 onlink mtu 1300",
            "default via 10.9.0.1 dev eth0",
            "10.10.0.1 dev net1 scope link",
            "10.11.0.0/16 via 10.10.0.1 dev net1",
            "fd09::/64 dev eth0 proto kernel metric 256",
            "default via fd09::1 dev eth0 metric 1024",
            "10.9.0.9 dev eth0 lladdr 02:00:00:00:00:09 PERMANENT",
        ] {
            assert!(state.contains(wanted), "{wanted} in {state}");
        }
        // The host's net1 is without it, so that everything goes through its gateway; and no address is made up.
        assert!(!state.contains("10.10.0.0/24"), "{state}");
        assert_eq!(
            state.matches("inet6 fe80").count(),
            3,
            "its own, and those of p0 and p1: {state}"
        );
        assert!(ok("ip -o link show dev eth0").contains("mtu 1400"));
    });
}

#[test]
fn said_again_it_changes_what_differs_and_nothing_of_others() {
    in_a_namespace(|| {
        two_interfaces();
        let mut network = Network::default();
        let mut request = request();
        apply(&mut network, &request, &["eth0", "eth1"]).unwrap();
        ok(
            "ip address add 10.77.0.1/24 dev eth0; ip route add 10.78.0.0/16 via 10.77.0.9; ip neighbour add 10.9.0.8 lladdr 02:00:00:00:00:08 dev eth0",
        );
        let state = ok(STATE);
        apply(&mut network, &request, &["eth0", "net1"]).unwrap();
        assert_eq!(ok(STATE), state);

        request.interfaces[0].addresses[0].ip = bytes("10.9.0.3");
        request.interfaces[0].mtu = 1450;
        request
            .routes
            .retain(|route| route.prefix != 16 && route.source.is_empty());
        request.neighbours.clear();
        apply(&mut network, &request, &["eth0", "net1"]).unwrap();
        let state = ok(STATE);
        for gone in [
            "10.9.0.2/",
            "src 10.9.0.2",
            "10.8.0.0",
            "10.11.0.0",
            "172.31",
            "10.9.0.9",
            "10.9.0.0/24",
        ] {
            assert!(!state.contains(gone), "{gone} in {state}");
        }
        for kept in [
            "10.9.0.3/24",
            "10.77.0.1/24",
            "10.77.0.0/24",
            "10.78.0.0/16",
            "10.9.0.8",
            "default via fd09::1",
            "10.10.0.1 dev net1",
        ] {
            assert!(state.contains(kept), "{kept} in {state}");
        }
        assert!(ok("ip -o link show dev eth0").contains("mtu 1450"));
    });
}

#[test]
fn what_the_kernel_refuses_is_named() {
    in_a_namespace(|| {
        two_interfaces();
        let mut request = request();
        request
            .routes
            .push(route("10.66.0.0", 16, "10.67.0.1", "eth0"));
        let mut network = Network::default();
        let error = apply(&mut network, &request, &["eth0", "eth1"])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("add route 10.66.0.0/16 via 10.67.0.1 dev eth0: "),
            "{error}"
        );
        // The rest is as it was set until then, and it may be said again.
        request.routes.pop();
        apply(&mut network, &request, &["eth0", "net1"]).unwrap();
        request.interfaces[1].mtu = 65535;
        request.interfaces[1].name = "eth0".into();
        let error = apply(&mut network, &request, &["eth0", "net1"])
            .unwrap_err()
            .to_string();
        assert_eq!(error, "interfaces[1].name: \"eth0\" is another one's");
        request.interfaces[1].name = "p0".into();
        let error = apply(&mut network, &request, &["eth0", "net1"])
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("interface p0: name it so: "), "{error}");
    });
}

#[test]
fn what_is_malformed_is_refused_by_its_field() {
    let broken = |change: fn(&mut api::SetNetworkRequest)| {
        let mut request = request();
        change(&mut request);
        Wanted::read(&request).unwrap_err().to_string()
    };
    for (error, start) in [
        (
            broken(|r| r.interfaces[1].slot = 7),
            "interfaces[1].slot: 7 is another",
        ),
        (
            broken(|r| r.interfaces[0].slot = 32),
            "interfaces[0].slot: 32 ",
        ),
        (
            broken(|r| r.interfaces[0].name = "a/b".into()),
            "interfaces[0].name: \"a/b\"",
        ),
        (
            broken(|r| r.interfaces[0].name = "lo".into()),
            "interfaces[0].name: \"lo\"",
        ),
        (
            broken(|r| r.interfaces[0].name = "n".repeat(16)),
            "interfaces[0].name: ",
        ),
        (
            broken(|r| r.interfaces[0].mac = vec![1]),
            "interfaces[0].mac: 1 bytes",
        ),
        (
            broken(|r| r.interfaces[0].mtu = 67),
            "interfaces[0].mtu: 67 ",
        ),
        (
            broken(|r| r.interfaces[0].addresses[0].ip = vec![1]),
            "interfaces[0].addresses[0].ip: 1 bytes",
        ),
        (
            broken(|r| r.interfaces[0].addresses[0].prefix = 33),
            "interfaces[0].addresses[0].prefix: 33 ",
        ),
        (
            broken(|r| r.routes[0].destination = vec![]),
            "routes[0].destination: 0 bytes",
        ),
        (
            broken(|r| r.routes[0].source = vec![0; 16]),
            "routes[0].source: not of",
        ),
        (broken(|r| r.routes[0].scope = 256), "routes[0].scope: 256 "),
        (
            broken(|r| r.routes[0].interface = String::new()),
            "routes[0].interface: is empty",
        ),
        (
            broken(|r| r.neighbours[0].mac = vec![]),
            "neighbours[0].mac: 0 bytes",
        ),
    ] {
        assert!(error.starts_with(start), "{error}");
    }
}

#[test]
fn an_address_with_a_peer_leads_to_its_peers_network() {
    in_a_namespace(|| {
        two_interfaces();
        let mut request = request();
        let with_a_peer = api::Address {
            ip: bytes("10.6.0.1"),
            prefix: 31,
            peer: bytes("10.6.0.2"),
            ..api::Address::default()
        };
        request.interfaces[0].addresses.push(with_a_peer);
        let mut network = Network::default();
        let theirs = api::Route {
            source: bytes("10.6.0.1"),
            scope: 253,
            ..route("10.6.0.2", 31, "", "eth0")
        };
        let mut told = request.clone();
        told.routes.insert(0, theirs);
        apply(&mut network, &told, &["eth1", "eth0"]).unwrap();
        let state = ok(STATE);
        let address = "inet 10.6.0.1 peer 10.6.0.2/31 scope global eth0";
        let route = "10.6.0.2/31 dev eth0 proto kernel scope link src 10.6.0.1";
        assert!(state.contains(address) && state.contains(route), "{state}");
        // Where the host has the address and not the kernel's route of it.
        apply(&mut network, &request, &["eth0", "net1"]).unwrap();
        let state = ok(STATE);
        assert!(
            state.contains(address) && !state.contains("10.6.0.2/31 dev"),
            "{state}"
        );
        request.interfaces[0].addresses[3].peer = bytes("fd06::2");
        let error = apply(&mut network, &request, &["eth0", "net1"]).unwrap_err();
        let said = "interfaces[0].addresses[3].peer: not of the address' family";
        assert_eq!(error.to_string(), said);
    });
}
