//! The pod's network: what is in its namespace on the host is the guest's, and every packet gets there.

use std::{
    fs,
    io::Read,
    net::{TcpListener, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use husk_tests::{
    census::Census,
    cni::Cni,
    command::{self, Outcome, PATIENCE, eventually, signal_by_name},
    ctr::{Container, PROBE_MOUNT, Runtime},
    machine::ECHO_PORT,
    netns::{HOST, HOST6, MAC, Namespace, POD, POD6, host},
    settings::Settings,
    traffic,
};

fn idle_in(namespace: &Namespace, runtime: Runtime) -> Container {
    let flag = namespace.flag();
    Container::detached(
        runtime,
        &["--null-io", "--with-ns", &flag],
        &["sleep", "86400"],
    )
}

fn shell(container: &Container, script: &str) -> Outcome {
    container.exec(&["sh", "-c", script])
}

#[test]
fn a_pod_and_its_host_reach_each_other() {
    let namespace = Namespace::new("reach", 1500);
    let pod = idle_in(&namespace, Runtime::Husk);
    for address in [HOST, HOST6] {
        shell(&pod, &format!("ping -c 2 -W 60 {address}")).ok();
    }
    for address in [POD, POD6] {
        host(&format!("busybox ping -c 2 -W 60 {address}")).ok();
    }
    // Servers on both sides.
    shell(
        &pod,
        "mkdir /tmp/www; echo of the pod >/tmp/www/page; httpd -p 80 -h /tmp/www",
    )
    .ok();
    for address in [POD.to_owned(), format!("[{POD6}]")] {
        let page = host(&format!("busybox wget -T 60 -qO- http://{address}/page"));
        assert_eq!(page.ok(), "of the pod\n");
    }
    host("mkdir -p /tmp/www; echo of the host >/tmp/www/page; busybox httpd -p 8099 -h /tmp/www")
        .ok();
    for address in [HOST.to_owned(), format!("[{HOST6}]")] {
        let page = shell(&pod, &format!("wget -T 60 -qO- http://{address}:8099/page"));
        assert_eq!(page.ok(), "of the host\n");
    }
    host("kill $(pidof busybox)");
    // And the network's own answer comes from the guest: nobody listens there.
    let refused = host(&format!("busybox wget -T 60 -qO- http://{POD}:81/")).err();
    assert!(refused.contains("refused"), "{refused}");
}

/// Lines of `ip`, without what is the other end's and what the driver queues with.
fn network(container: &Container) -> Vec<String> {
    let script = "ip address show dev eth0; ip route show table all; ip -6 route show table all; cat /sys/class/net/eth0/mtu /sys/class/net/eth0/address";
    let text = shell(container, script).ok();
    let mut lines: Vec<String> = text
        .lines()
        .filter(|line| !line.contains("mtu ") || line.contains(" via "))
        .map(|line| line.trim().replace(" flags 02", ""))
        .filter(|line| !line.starts_with("link/netnsid"))
        .map(|line| {
            line.split(" link-netnsid")
                .next()
                .unwrap_or_default()
                .to_owned()
        })
        .collect();
    lines.sort();
    lines
}

#[test]
fn the_guest_has_what_a_container_of_runc_has() {
    let namespace = Namespace::new("same", 1500);
    namespace
        .run(&format!(
            "ip address add 10.98.0.2/32 dev eth0; ip route add 10.97.0.0/16 via {HOST} src 10.98.0.2 metric 7
             ip route add 10.96.0.1 dev eth0 scope link; ip route add 10.95.0.0/16 via 10.96.0.1
             ip route add 10.94.0.0/16 via 10.93.0.1 dev eth0 onlink; ip route add table 100 10.92.0.0/16 dev eth0
             ip address add 10.90.0.1 peer 10.90.0.2/32 dev eth0; ip route add blackhole 10.91.0.0/16; ip -6 route add fd98::/64 via {HOST6}
             ip neighbour add 10.99.0.77 lladdr 02:99:00:00:00:77 dev eth0 nud permanent"
        ))
        .ok();
    let runc = idle_in(&namespace, Runtime::Runc);
    let theirs = network(&runc);
    let neighbours = "ip neigh | grep -i permanent";
    let their_neighbours = shell(&runc, neighbours).ok();
    runc.remove();
    assert!(theirs.iter().any(|line| line.contains(MAC)), "{theirs:#?}");
    let husk = idle_in(&namespace, Runtime::Husk);
    assert_eq!(network(&husk), theirs);
    assert_eq!(shell(&husk, neighbours).ok(), their_neighbours);
}

const BYTES: usize = 16 << 20;
/// What goes to the pod and back, and each byte is what it was.
const LONG: u64 = 256 << 20;

/// A pod that answers whatever is sent to it.
fn answering_in(namespace: &Namespace) -> Container {
    let flag = namespace.flag();
    let flags = ["--null-io", "--with-ns", &flag, "--mount", PROBE_MOUNT];
    Container::detached(Runtime::Husk, &flags, &["/probe", "traffic"])
}

/// Those of the host's vhost-net that the pod's VMM has.
fn vhosts(pod: &Container) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", pod.pid())).expect("its descriptors");
    let paths = descriptors.flatten().map(|fd| fs::read_link(fd.path()));
    let vhosts = paths.filter(|path| path.as_ref().is_ok_and(|path| path == "/dev/vhost-net"));
    vhosts.count()
}

/// Of both families: datagrams that fit and that are sent in fragments, and a stream.
fn everything_comes_back(bytes: u64) {
    for address in [POD, POD6] {
        let address = address.parse().expect("an address");
        traffic::connect(address, ECHO_PORT).expect("the pod answers");
        for length in [1, 1452, 1473, 9000, 60_000] {
            let back = traffic::echo_datagram(address, length);
            back.unwrap_or_else(|e| panic!("{length} bytes to {address}: {e}"));
        }
    }
    traffic::echo_stream(POD6.parse().expect("an address"), BYTES as u64).expect("a stream");
    traffic::echo_stream(POD.parse().expect("an address"), bytes).expect("a long stream");
}

#[test]
fn everything_arrives_where_the_hosts_kernel_moves_packets() {
    let namespace = Namespace::new("kernel", 1500);
    let pod = answering_in(&namespace);
    everything_comes_back(LONG);
    assert_eq!(vhosts(&pod), 1);
}

#[test]
fn everything_arrives_where_the_vmm_moves_packets() {
    let _settings = Settings::write("vhost_net = \"off\"\n");
    let namespace = Namespace::new("moved", 1500);
    let pod = answering_in(&namespace);
    everything_comes_back(LONG);
    assert_eq!(vhosts(&pod), 0);
}

/// A name server on the host's side, by the pod's resolv.conf.
#[test]
fn names_are_looked_up() {
    let namespace = Namespace::new("names", 1500);
    let server = UdpSocket::bind((HOST, 53)).expect("bind");
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = server.recv_from(&mut query) {
            let _ = server.send_to(&answer(&query[..length]), from);
        }
    });
    fs::write("/tmp/resolv.conf", format!("nameserver {HOST}\n")).expect("write");
    let flag = namespace.flag();
    let mount = "type=bind,src=/tmp/resolv.conf,dst=/etc/resolv.conf,options=rbind:ro";
    let flags = ["--null-io", "--with-ns", &flag, "--mount", mount];
    let pod = Container::detached(Runtime::Husk, &flags, &["sleep", "86400"]);
    let found = shell(&pod, "nslookup -type=a server.husk.test").ok();
    assert!(
        found.contains("server.husk.test\nAddress: 10.1.2.3\n"),
        "{found}"
    );
}

/// To a query (RFC 1035 §4.1): the one address that this server knows.
fn answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    // An answer, with one record, and nothing else behind the question.
    answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    // The question's name, A, IN, a minute, four bytes.
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 1, 2, 3]);
    answer
}

#[test]
fn packets_of_9000_bytes_go_both_ways() {
    let namespace = Namespace::new("jumbo", 9000);
    let pod = idle_in(&namespace, Runtime::Husk);
    assert_eq!(shell(&pod, "cat /sys/class/net/eth0/mtu").ok(), "9000\n");
    // In one piece: what is larger than the interface's MTU would be cut.
    let before = shell(&pod, "grep ^Ip: /proc/net/snmp | tail -1").ok();
    shell(&pod, &format!("ping -c 2 -W 60 -s 8900 {HOST}")).ok();
    host(&format!("busybox ping -c 2 -W 60 -s 8900 {POD}")).ok();
    let after = shell(&pod, "grep ^Ip: /proc/net/snmp | tail -1").ok();
    // ReasmReqds to FragCreates; the last counts all that was sent.
    let cut = |line: &str| -> Vec<String> {
        let words = line.split_whitespace().rev().skip(1).take(6);
        words.map(str::to_owned).collect()
    };
    assert_eq!(cut(&after), cut(&before));
    // And 4000 bytes more are.
    shell(&pod, &format!("ping -c 1 -W 60 -s 13000 {HOST}")).ok();
    let listener = TcpListener::bind((HOST, 0)).expect("listen");
    let port = listener.local_addr().expect("address").port();
    let client = command::start(
        &mut pod.exec_command(
            &[],
            &[
                "sh",
                "-c",
                &format!("head -c 16777216 /dev/zero | nc {HOST} {port}"),
            ],
        ),
        b"",
    );
    let (mut stream, _) = listener.accept().expect("accept");
    let mut got = Vec::new();
    stream.set_read_timeout(Some(PATIENCE)).expect("limit");
    stream.read_to_end(&mut got).expect("receive");
    drop(stream);
    client.finish().ok();
    assert_eq!(got.len(), BYTES);
}

/// As many as the pod has processors, with a queue of the tap each.
#[test]
fn a_pod_of_several_processors_has_as_many_queues() {
    let _settings = Settings::write("vcpus = 2\n");
    let namespace = Namespace::new("queues", 1500);
    let pod = answering_in(&namespace);
    let script = "ls -d /sys/class/net/eth0/queues/rx-* | wc -l; ls -d /sys/class/net/eth0/queues/tx-* | wc -l";
    assert_eq!(shell(&pod, script).ok(), "2\n2\n");
    let tap = "ls -d /sys/class/net/husk-*/queues/rx-* | wc -l";
    let tap = namespace.run(&format!("mount -t sysfs sysfs /sys; {tap}"));
    assert_eq!(tap.ok(), "2\n");
    assert_eq!(vhosts(&pod), 2);
    let address = POD.parse().expect("an address");
    thread::scope(|scope| {
        let streams =
            [(); 4].map(|()| scope.spawn(|| traffic::echo_stream(address, BYTES as u64 / 4)));
        for stream in streams {
            stream.join().expect("a thread").expect("a stream");
        }
    });
}

/// As Kubernetes has it: both name the namespace that CNI has filled.
#[test]
fn containers_of_a_pod_share_its_network() {
    let namespace = Namespace::new("shared", 1500);
    let first = idle_in(&namespace, Runtime::Husk);
    let flag = namespace.flag();
    let sandbox = format!("io.kubernetes.cri.sandbox-id={}", first.id);
    let flags = ["--null-io", "--with-ns", &flag, "--annotation", &sandbox];
    let second = Container::detached(Runtime::Husk, &flags, &["sleep", "86400"]);
    shell(
        &first,
        "mkdir /tmp/www; echo shared >/tmp/www/page; httpd -p 127.0.0.1:80 -h /tmp/www",
    )
    .ok();
    assert_eq!(
        shell(&second, "wget -T 60 -qO- http://127.0.0.1/page").ok(),
        "shared\n"
    );
    shell(&second, &format!("ping -c 1 -W 60 {HOST}")).ok();
    // It leaves, and the network stays.
    second.remove();
    shell(&first, &format!("ping -c 1 -W 60 {HOST}")).ok();
}

/// Neither in the namespace, which is CNI's, nor anywhere else; also when the shim is killed.
#[test]
fn nothing_is_left_in_the_namespace() {
    let namespace = Namespace::new("left", 1500);
    let state = namespace.state();
    let before = Census::take();
    for end in ["", "husk-vmm", "containerd-shim-husk-v2"] {
        let pod = idle_in(&namespace, Runtime::Husk);
        shell(&pod, &format!("ping -c 1 -W 60 {HOST}")).ok();
        let during = namespace.state();
        assert!(
            during.contains("husk-") && during.contains("ingress"),
            "{during}"
        );
        // CNI's DEL and CHECK look at what they have made.
        assert!(during.contains(&format!("{POD}/24")), "{during}");
        if !end.is_empty() {
            signal_by_name("-9", end);
            pod.wait_stopped();
        }
        pod.remove();
        before.assert_restored();
        assert_eq!(namespace.state(), state, "after the end of {end:?}");
    }
    // Who looks after the namespace finds it as it was.
    let runc = idle_in(&namespace, Runtime::Runc);
    shell(&runc, &format!("ping -c 1 -W 60 {HOST}")).ok();
}

/// One namespace is one pod's.
#[test]
fn what_cannot_be_carried_is_refused_by_name() {
    let namespace = Namespace::new("refuse", 1500);
    let pod = idle_in(&namespace, Runtime::Husk);
    let before = Census::take();
    let refused = |flag: &str| {
        let run = husk_tests::ctr::Run::husk(&["true"])
            .flags(&["--with-ns", flag])
            .go();
        assert_ne!(run.code(), 0, "{run:?}");
        run.err()
    };
    let said = refused(&namespace.flag());
    assert!(
        said.contains("interface eth0") && said.contains("another pod"),
        "{said}"
    );
    let said = refused("network:/proc/1/ns/net");
    assert!(said.contains("the host's own"), "{said}");
    before.assert_restored();
    shell(&pod, &format!("ping -c 1 -W 60 {HOST}")).ok();
    pod.remove();
    namespace
        .run("ip tuntap add mode tun name tun0; ip link set tun0 up")
        .ok();
    let said = refused(&namespace.flag());
    assert!(
        said.contains("interface tun0: its hardware is no ethernet"),
        "{said}"
    );
    assert!(
        !namespace.state().contains("husk-"),
        "{}",
        namespace.state()
    );
}

/// Bridge, host-local and portmap: what they have made works, and they find it again when it is to go.
#[test]
fn cni_plugins_carry_pods_and_find_all_of_theirs_again() {
    let rules = || {
        host("iptables-save | grep -v -e '^#' -e '^:' | sort; ip6tables-save | grep -v -e '^#' -e '^:' | sort").ok()
    };
    // The first pod makes chains and a bridge that stay.
    Cni::add("first", 8087).delete();
    let before = rules();
    let (one, two) = (Cni::add("one", 8088), Cni::add("two", 8089));
    let place = |cni: &Cni| {
        let flag = format!("network:/run/netns/{}", cni.name);
        Container::detached(
            Runtime::Husk,
            &["--null-io", "--with-ns", &flag],
            &["sleep", "86400"],
        )
    };
    let (first, second) = (place(&one), place(&two));
    shell(
        &first,
        "mkdir /tmp/www; echo the first >/tmp/www/page; httpd -p 80 -h /tmp/www",
    )
    .ok();
    for url in [one.address(false), format!("[{}]", one.address(true))] {
        let page = format!("busybox wget -T 60 -qO- http://{url}/page");
        assert_eq!(host(&page).ok(), "the first\n");
        let page = format!("wget -T 60 -qO- http://{url}/page");
        assert_eq!(shell(&second, &page).ok(), "the first\n");
    }
    // hostPort, from the host and from another pod.
    assert_eq!(
        host("busybox wget -T 60 -qO- http://10.88.0.1:8088/page").ok(),
        "the first\n"
    );
    assert_eq!(
        shell(&second, "wget -T 60 -qO- http://10.88.0.1:8088/page").ok(),
        "the first\n"
    );
    one.check();
    two.check();
    first.remove();
    second.remove();
    one.check();
    one.delete();
    two.delete();
    assert_eq!(rules(), before);
    let leases = host("ls /var/lib/cni/networks/lab").ok();
    assert!(
        leases
            .lines()
            .all(|file| !file.starts_with("10.") && !file.starts_with("fd88")),
        "{leases}"
    );
}

/// Waits for the guest to say what a script is to see there.
fn sees(container: &Container, script: &str) -> bool {
    let seen = eventually(Instant::now() + PATIENCE / 2, || {
        thread::sleep(Duration::from_millis(250));
        (shell(container, script).code() == 0).then_some(())
    });
    seen.is_some()
}

#[test]
fn what_comes_later_comes_into_the_guest_and_goes_again() {
    let namespace = Namespace::new("later", 1500);
    let pod = idle_in(&namespace, Runtime::Husk);
    let add = "ip link add v-net1 type veth peer name net1 netns later; ip address add 10.55.0.1/24 dev v-net1; ip link set v-net1 up";
    host(add).ok();
    namespace
        .run("ip address add 10.55.0.2/24 dev net1; ip link set net1 up; ip route add 10.56.0.0/16 via 10.55.0.1")
        .ok();
    assert!(sees(
        &pod,
        "ip route | grep -q '10.56.0.0/16 via 10.55.0.1 dev net1'"
    ));
    shell(&pod, "ping -c 1 -W 60 10.55.0.1").ok();
    host("busybox ping -c 1 -W 60 10.55.0.2").ok();
    namespace
        .run("ip address add 10.57.0.2/24 dev eth0; ip link set eth0 mtu 1400")
        .ok();
    assert!(sees(
        &pod,
        "ip address show eth0 | grep -q 10.57.0.2/24 && ip link show eth0 | grep -q 'mtu 1400'"
    ));
    namespace.run("ip link delete net1").ok();
    assert!(sees(&pod, "! ip link show net1"));
    shell(&pod, &format!("ping -c 1 -W 60 {HOST}")).ok();
    pod.remove();
    assert!(!namespace.state().contains("husk-"));
}

/// `ctr` makes the network between the task's creation and its start, in a namespace that was the pod's own.
#[test]
fn ctr_run_cni_has_a_network() {
    let list = r#"{"cniVersion": "1.0.0", "name": "ctr", "plugins": [{"type": "bridge", "bridge": "cni1", "isGateway": true,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.87.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}"#;
    host(&format!("mkdir -p /etc/cni/net.d /opt/cni; echo '{list}' >/etc/cni/net.d/10-ctr.conflist; ln -sfn /usr/lib/cni /opt/cni/bin")).ok();
    let script = "ip address show dev eth0 | grep -c 'inet 10.87'; ping -c 1 -W 60 10.87.0.1 >/dev/null && echo answered";
    let run = husk_tests::ctr::Run::husk(&["sh", "-c", script])
        .flags(&["--cni"])
        .go();
    host("rm /etc/cni/net.d/10-ctr.conflist").ok();
    assert_eq!(run.ok(), "1\nanswered\n");
}
