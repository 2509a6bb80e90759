//! What containers and pods use, and may use.

use std::time::Instant;

use husk_proto::cri as api;
use husk_tests::{
    command::{PATIENCE, eventually},
    cri::{Container, Handler, Pod},
};

use crate::exec::wait_for_log;

const HELD: u64 = 20 << 20;

fn cpu_ns(usage: &api::CpuUsage) -> u64 {
    usage.usage_core_nano_seconds.value
}

/// What the container's own cgroup says, which only it can touch.
fn own_cpu_ns(container: &Container) -> u64 {
    let text = container.try_exec(&["cat", "/sys/fs/cgroup/cpu.stat"]);
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    line.and_then(|number| number.parse::<u64>().ok())
        .expect("usage_usec")
        * 1000
}

pub fn stats_are_the_containers(handler: Handler) {
    let pod = Pod::run(handler);
    let script = format!(
        "held=$(head -c {HELD} /dev/zero | tr '\\0' x)
         i=0; while [ $i -lt 5000 ]; do i=$((i+1)); done; echo ready; sleep 86400; :"
    );
    let busy = pod.start(pod.container(&["sh", "-c", &script]));
    let idle = pod.idle();
    wait_for_log(&busy, "ready");

    // CRI may have what it says from a moment ago.
    let low = own_cpu_ns(&busy);
    let stats = eventually(Instant::now() + PATIENCE, || {
        let stats = busy.stats();
        (cpu_ns(&stats.cpu) >= low).then_some(stats)
    });
    let stats = stats.unwrap_or_else(|| panic!("at least {low}: {}", busy.stats()));
    let high = own_cpu_ns(&busy);
    assert!(
        low > 0 && cpu_ns(&stats.cpu) <= high,
        "{low}..{high}: {stats}"
    );
    for bytes in [&stats.memory.working_set_bytes, &stats.memory.usage_bytes] {
        assert!((HELD..5 * HELD).contains(&bytes.value), "{stats}");
    }
    let other = idle.stats();
    assert!(cpu_ns(&other.cpu) < cpu_ns(&stats.cpu), "{other}");
    assert!(
        (1..HELD).contains(&other.memory.working_set_bytes.value),
        "{other}"
    );

    // The pod's are at least those of its containers, and of its network.
    idle.try_exec(&["ping", "-c", "1", "-W", "60", "10.88.0.1"]);
    let whole = pod.stats();
    assert!(cpu_ns(&whole.cpu) >= cpu_ns(&stats.cpu), "{whole}");
    assert!(whole.memory.working_set_bytes.value >= HELD, "{whole}");
    let eth0 = &whole.network.default_interface;
    assert_eq!(eth0.name, "eth0", "{whole}");
    assert!(
        eth0.rx_bytes.value > 0 && eth0.tx_bytes.value > 0,
        "{whole}"
    );
    pod.end();
}

/// Live, in the guest, and what is not named stays.
pub fn an_update_changes_the_guests_cgroup(handler: Handler) {
    let pod = Pod::run(handler);
    let container = pod.idle();
    let files = |container: &Container| {
        let script = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight";
        container.try_exec(&["sh", "-c", script])
    };
    let updated = container.update(api::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        ..Default::default()
    });
    updated.expect("update");
    assert_eq!(files(&container), "67108864\n50000 100000\n59\n");
    let updated = container.update(api::LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        ..Default::default()
    });
    updated.expect("update again");
    assert_eq!(files(&container), "100663296\n50000 100000\n59\n");
    pod.end();
}
