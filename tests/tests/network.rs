//! An interface that is plugged into a machine: packets go both ways by its tap, until it is pulled out. The guest is
//! the probe.

use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use husk_proto::machine::AttachRequest;
use husk_tests::{
    command,
    machine::{self, ECHO_PORT, Guest, KERNEL, Machine, block_on, probe_initrd},
    tap,
};
use ttrpc::Code;

const PATIENCE: Duration = Duration::from_secs(60);
const MAC: [u8; 6] = [0x02, 0x68, 0x75, 0x73, 0x6b, 0x01];
/// Bytes that a TCP stream carries each way.
const STREAM: usize = 4 << 20;

#[track_caller]
fn run(test: impl Future<Output = Result<()>>) {
    if let Err(error) = block_on(test) {
        panic!("{error:#}");
    }
}

async fn boot_probe(vcpus: u32) -> Result<(Machine, Guest)> {
    let mut machine = Machine::spawn()?;
    let guest = machine
        .boot(
            Path::new(KERNEL),
            &probe_initrd(),
            128,
            vcpus,
            "husk_probe=serve",
        )
        .await?;
    let mut guest = Guest::new(guest)?;
    guest.report().await.context("the first answer")?;
    Ok((machine, guest))
}

/// A tap on the network `10.77.N.0/24`, of which the host has .1 and a guest .2.
struct Network {
    name: String,
    number: u8,
    queues: Vec<OwnedFd>,
}

/// Who moves the packets between the guest and the tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mover {
    Vmm,
    /// The host's kernel (vhost-net).
    Kernel,
}

const MOVERS: [Mover; 2] = [Mover::Vmm, Mover::Kernel];

fn vhosts(count: usize) -> Result<Vec<OwnedFd>> {
    let open = |_| {
        let mut options = File::options();
        let file = options.read(true).write(true).open("/dev/vhost-net");
        Ok(file.context("open /dev/vhost-net")?.into())
    };
    (0..count).map(open).collect()
}

impl Network {
    fn new(number: u8, queues: usize, mtu: u32) -> Result<Self> {
        let name = format!("husk-tap{number}");
        let queues = tap::make(&name, queues)?;
        let ip = |args: &str| {
            let mut ip = Command::new("ip");
            ip.args(args.split(' '));
            command::run(&mut ip, b"").ok()
        };
        ip(&format!("link set {name} mtu {mtu} up"));
        ip(&format!("address add 10.77.{number}.1/24 dev {name}"));
        Ok(Self {
            name,
            number,
            queues,
        })
    }

    async fn attach(&self, machine: &mut Machine, mover: Mover, mtu: u32) -> Result<u8> {
        let vhosts = match mover {
            Mover::Vmm => Vec::new(),
            Mover::Kernel => vhosts(self.queues.len())?,
        };
        let attached = machine.attach_by(&self.queues, &vhosts, MAC, mtu).await;
        attached.with_context(|| format!("attach, moved by {mover:?}"))
    }

    fn guest(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, self.number, 2)
    }

    fn echo(&self) -> SocketAddrV4 {
        SocketAddrV4::new(self.guest(), ECHO_PORT)
    }

    /// Has the guest take up the interface in a slot.
    async fn set_up(&self, guest: &mut Guest, slot: u8) -> Result<()> {
        let mut command = vec![b'n', slot];
        command.extend(self.guest().octets());
        let done = guest.ask::<1>(&command).await;
        done.context("the guest sets its interface up")?;
        Ok(())
    }

    /// Sends a datagram of so many bytes, in as many fragments as it takes, and has it back.
    fn datagram(&self, length: usize) -> Result<()> {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let sent: Vec<u8> = (0..length).map(|at| at as u8).collect();
        socket.send_to(&sent, self.echo()).context("send")?;
        let mut got = vec![0; 1 << 16];
        let length = socket.recv(&mut got).context("receive")?;
        ensure!(got[..length] == sent, "{length} other bytes came back");
        Ok(())
    }

    /// Sends a stream, and has it back. How many bytes the longest frame had, either way.
    fn stream(&self) -> Result<tap::Longest> {
        let watch = tap::Watch::new(&self.name)?;
        let mut stream = TcpStream::connect_timeout(&self.echo().into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let sent: Vec<u8> = (0..STREAM).map(|at| (at ^ at >> 8) as u8).collect();
        let expected = sent.clone();
        let mut writing = stream.try_clone()?;
        let writer = thread::spawn(move || writing.write_all(&sent));
        let mut got = vec![0; STREAM];
        stream.read_exact(&mut got).context("read it back")?;
        writer.join().expect("the writer")?;
        ensure!(got == expected, "other bytes came back");
        Ok(watch.stop())
    }
}

async fn refused(machine: &mut Machine, request: AttachRequest, code: Code, says: &str) {
    let answer = machine.client().attach(machine::patience(), &request).await;
    let Err(ttrpc::Error::RpcStatus(status)) = answer else {
        panic!("{says:?}: not refused");
    };
    let said = status.message();
    assert!(
        status.code() == code && said.starts_with(says),
        "{status:?}"
    );
}

/// Frames are longer than any wire takes: neither side cuts up what the other can take whole.
#[test]
fn packets_go_both_ways_and_whole() {
    run(async {
        let (mut machine, mut guest) = boot_probe(1).await?;
        for mover in MOVERS {
            let network = Network::new(1, 1, 1500)?;
            let slot = network.attach(&mut machine, mover, 1500).await?;
            network.set_up(&mut guest, slot).await?;
            network.datagram(1)?;
            let before = machine.sleeps("net-0")?;
            for length in [1472, 60_000] {
                network.datagram(length)?;
            }
            let longest = network.stream()?;
            // How many segments go together is the sender's choice, and depends on the time.
            ensure!(longest.to_guest > 2 * 1514, "{longest:?}");
            ensure!(longest.from_guest > 2 * 1514, "{longest:?}");
            // Where the kernel moves them, nobody in the VMM wakes up for a packet.
            let sleeps = machine.sleeps("net-0")? - before;
            ensure!(
                (sleeps == 0) == (mover == Mover::Kernel),
                "{mover:?}: {sleeps}"
            );

            guest.ask::<1>(&[b'x', slot]).await?;
            machine.detach(slot).await?;
            guest
                .report()
                .await
                .context("an answer after the removal")?;
        }
        Ok(())
    });
}

/// Each processor of the guest has a queue each way, and what the guest does not use of the tap is not waited for.
#[test]
fn several_queues_carry_several_streams() {
    run(async {
        for (number, queues) in [(2, 2), (3, 4)] {
            let (mut machine, mut guest) = boot_probe(2).await?;
            for mover in MOVERS {
                let network = Network::new(number, queues, 9000)?;
                let slot = network.attach(&mut machine, mover, 9000).await?;
                network.set_up(&mut guest, slot).await?;
                network.datagram(8900)?;
                thread::scope(|scope| {
                    let streams = [(); 4].map(|()| scope.spawn(|| network.stream()));
                    for stream in streams {
                        stream.join().expect("a stream")?;
                    }
                    Ok::<_, anyhow::Error>(())
                })?;
                guest.ask::<1>(&[b'x', slot]).await?;
                machine.detach(slot).await?;
            }
        }
        Ok(())
    });
}

#[test]
fn a_clone_gets_its_interface_while_it_is_paused() {
    run(async {
        let (mut machine, _guest) = boot_probe(1).await?;
        machine.pause().await?;
        let saved = machine.save().await?;
        machine.stop().await?;
        let mut clone = Machine::spawn()?;
        let mut guest = Guest::new(clone.restore(&saved, None).await?)?;
        guest.report().await?;

        for mover in MOVERS {
            let network = Network::new(4, 1, 1500)?;
            clone.pause().await?;
            let slot = network.attach(&mut clone, mover, 1500).await?;
            clone.resume().await?;
            network.set_up(&mut guest, slot).await?;
            network.stream()?;

            // It cannot be saved with it, and works on; without it, it can.
            clone.pause().await?;
            let Err(refused) = clone.save().await else {
                anyhow::bail!("it was saved with an interface");
            };
            let says = format!("net: it is plugged into slot {slot} of the PCI bus");
            ensure!(refused.to_string().contains(&says), "{refused}");
            clone.resume().await?;
            network.stream()?;
            guest.ask::<1>(&[b'x', slot]).await?;
            clone.detach(slot).await?;
        }
        clone.pause().await?;
        clone.save().await?;
        Ok(())
    });
}

/// As if a cable and its card had been pulled: the guest works on, and gets another one.
#[test]
fn an_interface_in_use_can_be_pulled_out() {
    run(async {
        let (mut machine, mut guest) = boot_probe(1).await?;
        let first = Network::new(5, 1, 1500)?;
        let pulled = machine.attach(&first.queues, MAC, 1500).await?;
        first.set_up(&mut guest, pulled).await?;
        first.datagram(100)?;
        machine.detach(pulled).await?;
        guest.report().await.context("an answer without it")?;
        let removed = guest.ask::<1>(&[b'x', pulled]).await;
        removed.context("it lets go of what is gone")?;
        let Err(error) = machine.detach(pulled).await else {
            anyhow::bail!("it was pulled out twice");
        };
        let says = format!("slot: nothing was plugged into slot {pulled} of the PCI bus");
        ensure!(error.to_string().contains(&says), "{error}");

        // The next one is pulled from a guest that does not notice, and another one comes all the same.
        for (number, mover) in [(6, Mover::Kernel), (7, Mover::Vmm), (8, Mover::Kernel)] {
            let network = Network::new(number, 1, 1500)?;
            let slot = network.attach(&mut machine, mover, 1500).await?;
            network.set_up(&mut guest, slot).await?;
            network.datagram(100)?;
            machine.detach(slot).await?;
        }
        guest.report().await.context("an answer at the end")?;
        Ok(())
    });
}

#[test]
fn what_is_no_interface_is_refused_by_name() {
    run(async {
        let mut machine = Machine::spawn()?;
        let early = "the machine was not booted";
        let request = AttachRequest::new();
        refused(&mut machine, request, Code::FAILED_PRECONDITION, early).await;
        let agent = UnixStream::pair()?;
        let (kernel, initrd) = (Path::new(KERNEL), probe_initrd());
        machine
            .boot_with(&agent.1, kernel, &initrd, 128, 1, "")
            .await?;
        let taps = tap::make("husk-tap8", 2)?;
        let null = OwnedFd::from(File::open("/dev/null")?);
        let (mac, mtu) = (MAC.to_vec(), 1500);
        let not_tap = "tap_fds: not an attached queue of a tap (TUNGETIFF: Inappropriate ioctl for device (os error 25))";
        let mac_of_all = vec![0xff; 6];
        for (fds, mac, mtu, says) in [
            (vec![], mac.clone(), mtu, "tap_fds: 0 queues, not 1 to 8"),
            (
                vec![&taps[0]; 9],
                mac.clone(),
                mtu,
                "tap_fds: 9 queues, not 1 to 8",
            ),
            (vec![&null], mac.clone(), mtu, not_tap),
            (vec![&taps[0]], vec![2; 5], mtu, "mac: 5 bytes, not 6"),
            (
                vec![&taps[0]],
                mac_of_all,
                mtu,
                "mac: not that of one interface",
            ),
            (
                vec![&taps[0]],
                mac.clone(),
                67,
                "mtu: 67 is not between 68 and 65535",
            ),
            (
                vec![&taps[0]],
                mac.clone(),
                65536,
                "mtu: 65536 is not between 68 and 65535",
            ),
        ] {
            let mut request = AttachRequest {
                mac,
                mtu,
                ..Default::default()
            };
            for fd in fds {
                request.tap_fds.push(machine.pass(fd)?);
            }
            refused(&mut machine, request, Code::INVALID_ARGUMENT, says).await;
        }
        let request = AttachRequest {
            tap_fds: vec![999],
            mac: mac.clone(),
            mtu,
            ..Default::default()
        };
        let says = "tap_fds: no descriptor was sent as token 999";
        refused(&mut machine, request, Code::INVALID_ARGUMENT, says).await;
        let mut vhosts = vhosts(2)?;
        let not_vhost = "vhost_fds: not /dev/vhost-net (VHOST_GET_FEATURES: Inappropriate ioctl for device (os error 25))";
        let vsock = OwnedFd::from(File::open("/dev/vhost-vsock")?);
        for (fds, says) in [
            (vec![&null], not_vhost),
            (vec![&vhosts[0], &vhosts[1]], "vhost_fds: 2 for 1 queues"),
            (
                vec![&vsock],
                "vhost_fds: not a /dev/vhost-net that knows all of 0x130008000 (VHOST_GET_FEATURES: ",
            ),
        ] {
            let mut request = AttachRequest {
                tap_fds: vec![machine.pass(&taps[0])?],
                mac: mac.clone(),
                mtu,
                ..Default::default()
            };
            for fd in fds {
                request.vhost_fds.push(machine.pass(fd)?);
            }
            let code = Code::INVALID_ARGUMENT;
            refused(&mut machine, request, code, says).await;
        }
        // One that somebody has already.
        let used = vec![vhosts.remove(0)];
        let one = tap::make("husk-one", 1)?;
        let slot = machine.attach_by(&one, &used, MAC, mtu).await?;
        let Err(error) = machine.attach_by(&one, &used, MAC, mtu).await else {
            anyhow::bail!("it has two owners");
        };
        let says = "vhost_fds: in use already (VHOST_SET_OWNER)";
        ensure!(error.to_string().contains(says), "{error}");
        machine.detach(slot).await?;

        // As many as there are slots; one that is taken out makes room when there is no other.
        let mut slots = Vec::new();
        for number in 0.. {
            let tap = tap::make(&format!("husk-many{number}"), 1)?;
            match machine.attach(&tap, MAC, 1500).await {
                Ok(slot) => slots.push(slot),
                Err(error) => {
                    ensure!(error.to_string().contains("has no slot left"), "{error}");
                    break;
                }
            }
        }
        // Those that were never used come first.
        let expected: Vec<u8> = (6..32).chain([slot]).collect();
        ensure!(slots == expected, "{slots:?}");
        machine.detach(17).await?;
        ensure!(machine.attach(&taps, MAC, 1500).await? == 17);
        Ok(())
    });
}
