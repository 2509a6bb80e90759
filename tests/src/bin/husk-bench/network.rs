//! What goes over a pod's network: a veth's other end in a bridge of the host's, with runc's pods directly at it.

use std::{
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use husk_tests::{
    ctr::{Container, PROBE_MOUNT, Run, Runtime, fresh_id},
    netns::{Namespace, POD},
    settings::Settings,
    traffic,
};

use crate::{
    host::pss_mib,
    report::Measure,
    settings,
    starts::{self, REST, finish, milliseconds},
    timeline::{Log, Steps},
};

const MIB: u64 = 1 << 20;
/// What goes through at a time, and what goes first to warm things.
const BYTES: u64 = 16 * MIB;
const WARM: u64 = 2 * MIB;
/// Of each way.
const STREAMS: usize = 3;
/// Trips of a byte, and how many are not counted.
const TRIPS: usize = 220;
const WARM_TRIPS: usize = 20;
/// Pods that are weighed together.
const PODS: usize = 8;

/// Who moves the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Runc,
    /// With vhost-net.
    Kernel,
    Vmm,
}

/// Of one side.
#[derive(Default)]
struct Traffic {
    to_pod: Vec<f64>,
    from_pod: Vec<f64>,
    trips: Vec<f64>,
}

pub fn network(log: &mut Log, timeline: &mut Steps) -> Result<Vec<Measure>> {
    let runc = traffic(Side::Runc)?;
    let kernel = traffic(Side::Kernel)?;
    let vmm = traffic(Side::Vmm)?;
    let mut measures = Vec::new();
    for (names, husk) in [
        (["tcp-stream", "tcp-stream-out", "tcp-rtt"], &kernel),
        (
            ["tcp-stream-vmm", "tcp-stream-vmm-out", "tcp-rtt-vmm"],
            &vmm,
        ),
    ] {
        let [to_pod, from_pod, trips] = names;
        let pair = |name, unit, of: fn(&Traffic) -> &Vec<f64>| Measure {
            name,
            unit,
            runc: of(&runc).clone(),
            husk: of(husk).clone(),
        };
        measures.push(pair(to_pod, "MiB/s", |traffic| &traffic.to_pod));
        measures.push(pair(from_pod, "MiB/s", |traffic| &traffic.from_pod));
        measures.push(pair(trips, "us", |traffic| &traffic.trips));
    }
    measures.extend(weights());
    measures.push(runs(log, timeline)?);
    Ok(measures)
}

fn traffic(side: Side) -> Result<Traffic> {
    let off = format!("{}vhost_net = \"off\"\n", settings(true));
    let _settings = (side == Side::Vmm).then(|| Settings::write(&off));
    let namespace = Namespace::new("bench", 1500);
    let flag = namespace.flag();
    let flags = ["--null-io", "--with-ns", &flag];
    let runtime = match side {
        Side::Runc => Runtime::Runc,
        Side::Kernel | Side::Vmm => Runtime::Husk,
    };
    let mut traffic = Traffic::default();
    let flags = [&flags[..], &["--mount", PROBE_MOUNT]].concat();
    let _pod = Container::detached(runtime, &flags, &["/probe", "traffic"]);
    let address: IpAddr = POD.parse()?;
    traffic::send_bulk(address, WARM).context("warm up")?;
    traffic::receive_bulk(address, WARM).context("warm up")?;
    let speed = |took: Duration| BYTES as f64 / MIB as f64 / took.as_secs_f64();
    for _ in 0..STREAMS {
        let sent = traffic::send_bulk(address, BYTES).context("send")?;
        traffic.to_pod.push(speed(sent));
        let received = traffic::receive_bulk(address, BYTES).context("receive")?;
        traffic.from_pod.push(speed(received));
    }
    let trips = traffic::round_trips(address, TRIPS).context("round trips")?;
    let trips = trips.into_iter().skip(WARM_TRIPS);
    traffic.trips = trips.map(|trip| trip.as_secs_f64() * 1e6).collect();
    Ok(traffic)
}

/// What an interface adds to an idle pod, beside others of its template.
fn weights() -> [Measure; 2] {
    let weigh = |flags: &[Vec<&str>]| {
        let pod = |flags| Container::detached(Runtime::Husk, flags, &["sleep", "86400"]);
        let _pods: Vec<Container> = flags.iter().map(|flags| pod(flags)).collect();
        thread::sleep(REST);
        let mean = |mib: f64| mib / PODS as f64;
        [mean(pss_mib("containerd-shim")), mean(pss_mib("husk-vmm"))]
    };
    let [shim, vmm] = weigh(&vec![vec!["--null-io"]; PODS]);
    let namespaces = (0..PODS).map(|number| Namespace::new(&format!("bench{number}"), 1500));
    let namespaces: Vec<Namespace> = namespaces.collect();
    let flags: Vec<String> = namespaces.iter().map(Namespace::flag).collect();
    let flags = flags
        .iter()
        .map(|flag| vec!["--null-io", "--with-ns", flag]);
    let [shim_with, vmm_with] = weigh(&flags.collect::<Vec<_>>());
    let shim = vec![shim_with - shim];
    let vmm = vec![vmm_with - vmm];
    [
        Measure::of_husk("pss-of-net-shim", "MiB", shim),
        Measure::of_husk("pss-of-net-vmm", "MiB", vmm),
    ]
}

/// `ctr run --rm … true` in a namespace with an interface.
fn runs(log: &mut Log, timeline: &mut Steps) -> Result<Measure> {
    let namespace = Namespace::new("bench", 1500);
    let flag = namespace.flag();
    let mut all: [Vec<f64>; 2] = Default::default();
    log.starts(&mut Steps::default())?;
    for round in 0..=starts::SAMPLES {
        for (runtime, samples) in [Runtime::Runc, Runtime::Husk].into_iter().zip(&mut all) {
            let flags = ["--with-ns", &flag];
            let run = Run::husk(&["true"]).runtime(runtime).flags(&flags);
            let began = Instant::now();
            finish(&mut run.command(&fresh_id("run")))?;
            let took = milliseconds(began);
            let mut first = Steps::default();
            log.starts(if round > 0 { timeline } else { &mut first })?;
            if round > 0 {
                samples.push(took);
            }
        }
    }
    let [runc, husk] = all;
    Ok(Measure {
        name: "ctr-run-network",
        unit: "ms",
        runc,
        husk,
    })
}
