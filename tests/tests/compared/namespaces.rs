//! `linux.namespaces` and what belongs to them: mappings, offsets, names, sysctls.

use serde_json::{Value, json};

use crate::compare::{Case, Known, compare, known, mount, push};

fn without(spec: &mut Value, kind: &str) {
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != kind);
    }
}

fn with(spec: &mut Value, kind: &str) {
    push(&mut spec["linux"]["namespaces"], json!({ "type": kind }));
}

fn sysctl(spec: &mut Value, name: &str, value: &str) {
    spec["linux"]["sysctl"][name] = json!(value);
}

fn mapped(spec: &mut Value, host: u32, size: u32) {
    with(spec, "user");
    let mapping = json!([{ "containerID": 0, "hostID": host, "size": size }]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
}

#[test]

fn namespaces_are_runcs() {
    const CASES: &[Case] = &[
        ("no pid namespace", |s| without(s, "pid")),
        ("no ipc namespace", |s| without(s, "ipc")),
        ("no uts namespace", |s| {
            without(s, "uts");
            s.as_object_mut().map(|spec| spec.remove("hostname"));
        }),
        ("a hostname without a namespace", |s| without(s, "uts")),
        ("no cgroup namespace", |s| without(s, "cgroup")),
        ("no mount namespace", |s| without(s, "mount")),
        ("no pid, ipc, uts and cgroup namespace", |s| {
            for kind in ["pid", "ipc", "uts", "cgroup"] {
                without(s, kind);
            }
            s.as_object_mut().map(|spec| spec.remove("hostname"));
        }),
        ("no hostname", |s| {
            s.as_object_mut().map(|spec| spec.remove("hostname"));
        }),
        ("a domain name", |s| s["domainname"] = json!("example.org")),
        ("a user namespace as it is", |s| mapped(s, 0, 4_294_967_295)),
        ("a user namespace", |s| mapped(s, 0, 65536)),
        ("a user namespace of nobody's", |s| {
            mapped(s, 100_000, 65536);
            mount(s, "/mnt", "tmpfs", "tmpfs", &["uid=0", "gid=0"]);
        }),
        ("a user namespace without mappings", |s| with(s, "user")),
        ("a time namespace", |s| {
            with(s, "time");
            s["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 86400, "nanosecs": 5 }, "boottime": { "secs": 172_800 } });
        }),
        ("a time namespace without offsets", |s| with(s, "time")),
        ("offsets without a namespace", |s| {
            s["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 1 } })
        }),
        ("a namespace twice", |s| with(s, "pid")),
        ("an unknown namespace", |s| with(s, "husk")),
        ("sysctls of ipc", |s| {
            sysctl(s, "kernel.shmmax", "1048576");
            sysctl(s, "kernel.msgmax", "4096");
            sysctl(s, "kernel.sem", "100 200 30 40");
            sysctl(s, "fs.mqueue.msg_max", "20");
        }),
        ("sysctls of the network", |s| {
            sysctl(s, "net.core.somaxconn", "77");
            sysctl(s, "net.ipv4.ip_forward", "1");
            sysctl(s, "net.ipv4.ip_unprivileged_port_start", "0");
            sysctl(s, "net.ipv4.ping_group_range", "0 2147483647");
        }),
        ("a domain name by sysctl", |s| {
            sysctl(s, "kernel.domainname", "example.net")
        }),
        ("a hostname by sysctl", |s| {
            sysctl(s, "kernel.hostname", "other")
        }),
        ("a sysctl of everybody", |s| sysctl(s, "vm.swappiness", "1")),
        ("a sysctl that is not there", |s| sysctl(s, "net.husk", "1")),
        ("a sysctl without its namespace", |s| {
            without(s, "ipc");
            sysctl(s, "kernel.shmmax", "1048576");
        }),
    ];
    const NONE: &str = "no cgroup namespace";
    const FOUR: &str = "no pid, ipc, uts and cgroup namespace";
    const TREE: &str = "`/sys/fs/cgroup` without";
    const PARENT: &str = "the parent of processes";
    const USER: &str = "a user namespace*";
    const NODES: &str = "device nodes that are bound";
    const KNOWN: &[Known] = &[
        known(NONE, "cgroup *", TREE),
        known(NONE, "self/cgroup", "`/proc/self/cgroup` seen"),
        known(FOUR, "cgroup *", TREE),
        known(FOUR, "self/cgroup", "`/proc/self/cgroup` seen"),
        known(FOUR, "parent", PARENT),
        known("no pid namespace", "parent", PARENT),
        known(USER, "mount /dev/full *", NODES),
        known(USER, "mount /dev/null *", NODES),
        known(USER, "mount /dev/random *", NODES),
        known(USER, "mount /dev/tty *", NODES),
        known(USER, "mount /dev/urandom *", NODES),
        known(USER, "mount /dev/zero *", NODES),
        known(USER, "mount /proc/keys *", NODES),
        known(USER, "mount /proc/timer_list *", NODES),
        known(
            "a user namespace of nobody's",
            "path /dev/mqueue",
            "group of `/dev/mqueue`",
        ),
    ];
    compare(CASES, KNOWN);
}
