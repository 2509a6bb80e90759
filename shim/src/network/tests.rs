//! In network namespaces of this machine, made with ip(8). Needs root: `make test` runs as root.

use std::{fs::File, process::Command, sync::mpsc};

use super::*;

/// A namespace, held by a thread that waits in it; its commands run there.
pub(super) struct Place {
    tell: mpsc::Sender<String>,
    told: mpsc::Receiver<Result<String, String>>,
    pub(super) namespace: OwnedFd,
    pub(super) path: PathBuf,
}

const SERVING: Serving = Serving {
    queues: 1,
    vhost: false,
};

impl Place {
    pub(super) fn new() -> Self {
        let (tell, asked) = mpsc::channel::<String>();
        let (answer, told) = mpsc::channel();
        let (give, given) = mpsc::channel();
        thread::spawn(move || {
            // SAFETY: unshare(2) takes numbers only.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "as root");
            // SAFETY: gettid(2) takes nothing.
            let thread = unsafe { libc::gettid() };
            let path = format!("/proc/{}/task/{thread}/ns/net", std::process::id());
            let namespace = File::open(&path).unwrap();
            give.send((OwnedFd::from(namespace), path.into())).unwrap();
            for script in asked {
                let done = Command::new("sh").arg("-ec").arg(script).output().unwrap();
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let _ = answer.send(match done.status.success() {
                    true => Ok(text(&done.stdout)),
                    false => Err(text(&done.stderr)),
                });
            }
        });
        let (namespace, path) = given.recv().expect("a namespace");
        let place = Self {
            tell,
            told,
            namespace,
            path,
        };
        place.ok("ip link set lo up");
        place
    }

    pub(super) fn run(&self, script: &str) -> Result<String, String> {
        self.tell.send(script.to_owned()).unwrap();
        self.told.recv().unwrap()
    }

    #[track_caller]
    pub(super) fn ok(&self, script: &str) -> String {
        self.run(script).unwrap_or_else(|e| panic!("{script}: {e}"))
    }

    pub(super) fn begin(&self) -> Network {
        Network::begin(self.namespace.try_clone().unwrap(), &self.path, SERVING)
    }
}

/// As CNI's bridge plugin leaves it: eth0, whose other end is in a namespace of its own.
fn pod() -> (Place, Place) {
    let (pod, host) = (Place::new(), Place::new());
    host.ok("ip link add br0 address 02:00:00:00:00:01 type bridge; ip link set br0 up; ip address add 10.9.0.1/24 dev br0; \
        ip address add fd09::1/64 nodad dev br0");
    host.ok(&format!(
        "ip link add v0 type veth peer name eth0 netns {}; ip link set v0 master br0 up",
        pod.path.display()
    ));
    pod.ok("ip link set eth0 address 02:00:00:00:00:02 mtu 1400 addrgenmode none up; ip address add fe80::ff:fe00:2/64 nodad dev eth0; \
        ip address add 10.9.0.2/24 brd + dev eth0; ip address add 10.6.0.1 peer 10.6.0.2/31 dev eth0; ip address add fd09::2/64 nodad dev eth0; \
        ip route add default via 10.9.0.1 mtu 1300; ip -6 route add default via fd09::1; \
        ip route add 10.8.0.0/16 via 10.8.0.1 onlink dev eth0 src 10.9.0.2 metric 7; \
        ip route add table 100 192.168.7.0/24 dev eth0 scope link; ip route add blackhole 172.31.0.0/16; \
        ip neighbour add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
    (pod, host)
}

async fn made(network: &Network) -> Arc<Mutex<Option<Made>>> {
    network.made().await.unwrap()
}

fn show(bytes: &[u8]) -> String {
    husk_netlink::ip(bytes)
        .map(|ip| ip.to_string())
        .unwrap_or_default()
}

#[tokio::test]
async fn all_that_cni_has_left_is_told() {
    let (pod, _host) = pod();
    let network = pod.begin();
    let made = made(&network).await;
    let made = made.try_lock().unwrap();
    let made = made.as_ref().unwrap();
    let [carried] = &made.carried[..] else {
        panic!("{made:?}")
    };
    let eth0 = &carried.interface;
    assert_eq!((eth0.name.as_str(), eth0.mtu), ("eth0", 1400));
    assert_eq!(eth0.mac, [2, 0, 0, 0, 0, 2]);
    let addresses: Vec<_> = eth0
        .addresses
        .iter()
        .map(|a| (show(&a.ip), a.prefix, show(&a.broadcast), a.scope))
        .collect();
    let link_local = "fe80::ff:fe00:2".to_owned();
    for wanted in [
        ("10.9.0.2".into(), 24, "10.9.0.255".into(), 0),
        ("fd09::2".into(), 64, String::new(), 0),
        (link_local, 64, String::new(), 253),
    ] {
        assert!(addresses.contains(&wanted), "{wanted:?} in {addresses:?}");
    }
    let mut peers = eth0.addresses.iter().filter(|a| !a.peer.is_empty());
    let peer = peers.next().unwrap();
    let said = (show(&peer.ip), show(&peer.peer), peer.prefix);
    assert_eq!(said, ("10.6.0.1".into(), "10.6.0.2".into(), 31));
    assert!(peers.next().is_none());
    let routes: Vec<_> = made
        .routes
        .iter()
        .map(|r| {
            let mut line = format!("{}/{} dev {}", show(&r.destination), r.prefix, r.interface);
            if !r.gateway.is_empty() {
                line += &format!(" via {}", show(&r.gateway));
            }
            if !r.source.is_empty() {
                line += &format!(" src {}", show(&r.source));
            }
            if r.onlink {
                line += " onlink";
            }
            line + &format!(
                " kind {} scope {} metric {} table {} mtu {}",
                r.kind, r.scope, r.metric, r.table, r.mtu
            )
        })
        .collect();
    for wanted in [
        "10.9.0.0/24 dev eth0 src 10.9.0.2 kind 1 scope 253 metric 0 table 254 mtu 0",
        "10.6.0.2/31 dev eth0 src 10.6.0.1 kind 1 scope 253 metric 0 table 254 mtu 0",
        "192.168.7.0/24 dev eth0 kind 1 scope 253 metric 0 table 100 mtu 0",
        "172.31.0.0/16 dev  kind 6 scope 0 metric 0 table 254 mtu 0",
        "fd09::/64 dev eth0 kind 1 scope 0 metric 256 table 254 mtu 0",
        "fe80::/64 dev eth0 kind 1 scope 0 metric 256 table 254 mtu 0",
        "0.0.0.0/0 dev eth0 via 10.9.0.1 kind 1 scope 0 metric 0 table 254 mtu 1300",
        "10.8.0.0/16 dev eth0 via 10.8.0.1 src 10.9.0.2 onlink kind 1 scope 0 metric 7 table 254 mtu 0",
        "::/0 dev eth0 via fd09::1 kind 1 scope 0 metric 1024 table 254 mtu 0",
    ] {
        assert!(
            routes.iter().any(|route| route == wanted),
            "{wanted} in {routes:#?}"
        );
    }
    assert_eq!(routes.len(), 9, "{routes:#?}");
    let first_gateway = made
        .routes
        .iter()
        .position(|r| !r.gateway.is_empty())
        .unwrap();
    assert!(
        made.routes[first_gateway..]
            .iter()
            .all(|r| !r.gateway.is_empty()),
        "{routes:#?}"
    );
    let [neighbour] = &made.neighbours[..] else {
        panic!("{:?}", made.neighbours)
    };
    assert_eq!(
        (neighbour.interface.as_str(), show(&neighbour.ip).as_str()),
        ("eth0", "10.9.0.9")
    );
}

/// Reads frames until one is `wanted`.
fn hears(tap: &OwnedFd, wanted: impl Fn(&[u8]) -> bool) -> bool {
    let mut frame = [0; 2048];
    for _ in 0..200 {
        let mut poll = libc::pollfd {
            fd: tap.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, and a buffer of the length that is said.
        let got = unsafe {
            if libc::poll(&raw mut poll, 1, 10_000) != 1 {
                return false;
            }
            libc::read(tap.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len())
        };
        let Ok(got) = usize::try_from(got) else {
            return false;
        };
        // Behind the header for offloads.
        if frame[..got].get(10..).is_some_and(&wanted) {
            return true;
        }
    }
    false
}

/// ARP, ping, a port that nobody listens at: the guest is asked, and nobody answers in its stead.
#[tokio::test]
async fn packets_go_to_the_guest_and_nobody_answers_for_it() {
    let (pod, host) = pod();
    // Nobody listens there: who is there refuses.
    let knock = |seconds: u32| {
        format!(
            "ip neighbour flush dev br0; for ip in 10.9.0.2 fd09::2; do \
            timeout {seconds} bash -c \"exec 3<>/dev/tcp/$ip/7\" 2>&1 || true; done"
        )
    };
    let said = host.ok(&knock(60));
    assert_eq!(
        said.matches("connect: Connection refused").count(),
        2,
        "without a guest the namespace answers: {said}"
    );
    let network = pod.begin();
    let made = made(&network).await;
    let tap = made.try_lock().unwrap().as_ref().unwrap().carried[0]
        .tap
        .as_ref()
        .unwrap()
        .queues[0]
        .try_clone()
        .unwrap();
    let knocked = thread::spawn({
        move || {
            let text = host.ok(&knock(2));
            (host, text)
        }
    });
    // A request for the pod's hardware address.
    assert!(hears(&tap, |frame| frame.get(12..14) == Some(&[8, 6])
        && frame.get(38..42) == Some(&[10, 9, 0, 2])));
    let (host, said) = knocked.join().unwrap();
    assert!(!said.contains("refused"), "{said}");
    assert!(!host.ok("ip neighbour").contains("10.9.0.2 dev br0 lladdr"));

    // The host knows the guest now, which still does not run.
    host.ok("ip neighbour replace 10.9.0.2 lladdr 02:00:00:00:00:02 dev br0 nud permanent");
    let connect = host
        .run("timeout 1 bash -c 'exec 3<>/dev/tcp/10.9.0.2/7'")
        .unwrap_err();
    assert!(!connect.contains("refused"), "{connect}");
    assert!(hears(&tap, |frame| frame.get(12..14) == Some(&[8, 0])
        && frame.get(36..38) == Some(&[0, 7])));

    // What the guest sends goes out at its interface, and not into the namespace.
    let mut frame = vec![0; 10];
    frame.extend([0xff; 6]);
    frame.extend([
        2, 0, 0, 0, 0, 2, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 2, 10, 9, 0, 77, 0, 0, 0, 0,
        0, 0, 10, 9, 0, 1,
    ]);
    // SAFETY: the frame is as long as is said.
    assert!(unsafe { libc::write(tap.as_raw_fd(), frame.as_ptr().cast(), frame.len()) } > 0);
    assert!(hears(&tap, |frame| frame.get(20..22) == Some(&[0, 2])
        && frame.get(28..32) == Some(&[10, 9, 0, 1])));
}

#[tokio::test]
async fn everything_is_as_it_was_when_the_pod_has_gone() {
    let (pod, host) = pod();
    // But for counters.
    let state = "ip -d address; ip route show table all; ip -6 route show table all; ip neighbour show nud permanent; tc qdisc; tc filter show dev eth0 ingress";
    let before = pod.ok(state);
    let network = pod.begin();
    let made = made(&network).await;
    let during = pod.ok(state);
    assert!(
        during.contains("husk-") && during.contains("ingress"),
        "{during}"
    );
    // The pod's own addresses stay: CNI's DEL and CHECK look at them.
    assert!(during.contains("inet 10.9.0.2/24"), "{during}");
    drop(made);
    network.undo().await;
    network.undo().await;
    drop(network);
    assert_eq!(pod.ok(state), before);
    let said = host
        .run("timeout 60 bash -c 'exec 3<>/dev/tcp/10.9.0.2/7'")
        .unwrap_err();
    assert!(said.contains("refused"), "{said}");
}

#[tokio::test]
async fn what_a_lost_shim_has_left_is_swept_and_what_is_in_use_is_not() {
    let (pod, _host) = pod();
    let qdiscs = || pod.ok("tc qdisc show dev eth0 ingress");
    let network = pod.begin();
    let in_use = made(&network).await;
    sweep(&pod.path);
    assert!(qdiscs().contains("ingress"));
    let second = pod.begin();
    let error = second.made().await.unwrap_err().to_string();
    assert!(
        error.contains("interface eth0: ") && error.contains("another pod"),
        "{error}"
    );
    second.undo().await;
    assert!(qdiscs().contains("ingress"));
    // As if its shim had been killed, and the VMM with it.
    in_use.try_lock().unwrap().as_mut().unwrap().carried.clear();
    sweep(&pod.path);
    assert_eq!(qdiscs(), "");
    // Somebody else's are left alone, and named.
    pod.ok("tc qdisc add dev eth0 ingress");
    sweep(&pod.path);
    assert!(qdiscs().contains("ingress"));
    let third = pod.begin();
    let error = third.made().await.unwrap_err().to_string();
    assert!(
        error.contains("interface eth0: redirect its packets: "),
        "{error}"
    );
    assert!(!pod.ok("ip link").contains("husk-"));
}

#[tokio::test]
async fn what_cannot_be_carried_is_named() {
    let (pod, _host) = pod();
    let error = async || pod.begin().made().await.unwrap_err().to_string();
    pod.ok("ip route add 10.7.0.0/16 nexthop via 10.9.0.1 nexthop via 10.9.0.3");
    assert!(
        error()
            .await
            .contains(": route to 10.7.0.0/16: nexthop cannot")
    );
    pod.ok("ip route del 10.7.0.0/16; ip tuntap add mode tun name tun5; ip link set tun5 up");
    assert!(
        error()
            .await
            .contains(": interface tun5: its hardware is no ethernet")
    );
    pod.ok("ip link del tun5; ip link add link eth0 name m0 type macvlan; ip link set m0 up");
    assert!(
        error()
            .await
            .contains(": interface m0: it is on top of eth0")
    );
    pod.ok("ip link del m0; ip link add b0 type bridge; ip link set eth0 master b0");
    assert!(
        error()
            .await
            .contains(": interface eth0: it is a part of b0")
    );
    pod.ok("ip link del b0; ip link set eth0 arp off");
    assert!(error().await.contains(": interface eth0: it asks nobody"));
    assert!(!pod.ok("ip link").contains("husk-"));
    let own = File::open("/proc/self/ns/net").unwrap();
    let hosts = Network::begin(own.into(), Path::new("/proc/1/ns/net"), SERVING);
    let error = hosts.made().await.unwrap_err().to_string();
    assert!(error.contains("the host's own"), "{error}");
}

#[tokio::test]
async fn a_namespace_without_interfaces_is_no_work() {
    let pod = Place::new();
    let network = pod.begin();
    let made = made(&network).await;
    let made = made.try_lock().unwrap();
    let made = made.as_ref().unwrap();
    assert!(
        made.carried.is_empty() && made.routes.is_empty(),
        "{made:?}"
    );
}

#[tokio::test]
async fn what_comes_later_is_carried_and_what_goes_is_pulled() {
    let (pod, _host) = pod();
    let network = pod.begin();
    let made = made(&network).await;
    let news = made
        .try_lock()
        .unwrap()
        .as_mut()
        .unwrap()
        .news
        .take()
        .unwrap();
    let ours = |made: &Shared| -> Vec<u32> {
        let made = made.try_lock().unwrap();
        made.as_ref()
            .unwrap()
            .carried
            .iter()
            .map(|c| c.tap_index)
            .collect()
    };
    // Our own taps are no news.
    news::take(&news, &ours(&made)).unwrap();
    assert!(!network.look(made.clone()).await.unwrap());
    assert!(!news::take(&news, &ours(&made)).unwrap());

    pod.ok("ip link add net1 type veth peer name p1; ip address add 10.5.0.2/24 dev net1; ip link set net1 up");
    assert!(news::take(&news, &ours(&made)).unwrap());
    assert!(network.look(made.clone()).await.unwrap());
    let names = |made: &Shared| -> Vec<String> {
        let made = made.try_lock().unwrap();
        made.as_ref()
            .unwrap()
            .carried
            .iter()
            .map(|c| c.interface.name.clone())
            .collect()
    };
    assert_eq!(names(&made), ["eth0", "net1"]);
    assert!(pod.ok("tc qdisc show dev net1 ingress").contains("ingress"));

    pod.ok("ip address add 10.4.0.2/24 dev eth0; ip link set eth0 mtu 1450; ip link set net1 down");
    made.try_lock().unwrap().as_mut().unwrap().carried[1]
        .interface
        .slot = 9;
    assert!(network.look(made.clone()).await.unwrap());
    // One that is down is still there.
    assert_eq!(names(&made), ["eth0", "net1"]);
    {
        let made = made.try_lock().unwrap();
        let eth0 = &made.as_ref().unwrap().carried[0].interface;
        assert_eq!((eth0.mtu, eth0.addresses.len()), (1450, 5));
    }
    assert!(
        pod.ok("ip -o link").contains("mtu 1450 qdisc fq_codel")
            || pod.ok("ip -o link").matches("mtu 1450").count() == 2
    );

    pod.ok("ip link del net1");
    assert!(network.look(made.clone()).await.unwrap());
    assert_eq!(names(&made), ["eth0"]);
    assert_eq!(made.try_lock().unwrap().as_ref().unwrap().gone, [9]);
    network.undo().await;
    assert!(network.look(made).await.is_ok_and(|changed| !changed));
    assert!(has_interfaces(std::process::id()));
}

/// As a look does that waits for the kernel, and that nobody waits for any more.
#[tokio::test]
async fn who_has_it_holds_up_no_task() {
    let pod = Place::new();
    let network = pod.begin();
    let made = made(&network).await;
    let held = made.clone().lock_owned().await;
    tokio::time::pause();
    let locked = network.lock(&made).await.map(drop);
    let error = locked.unwrap_err().message;
    assert!(error.contains("nothing was heard of it"), "{error}");
    drop(held);
    assert!(network.lock(&made).await.is_ok());
}
