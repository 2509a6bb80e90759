//! `linux.resources` but for devices, as the container's cgroup shows them.

use serde_json::{Value, json};

use crate::compare::{Case, Known, compare, known};

fn set(spec: &mut Value, controller: &str, value: Value) {
    spec["linux"]["resources"][controller] = value;
}

#[test]
#[ignore = "long: make test-long"]
fn resources_are_runcs() {
    const CASES: &[Case] = &[
        ("memory", |s| {
            set(
                s,
                "memory",
                json!({ "limit": 33_554_432, "reservation": 16_777_216 }),
            )
        }),
        ("memory without a limit", |s| {
            set(s, "memory", json!({ "limit": -1 }))
        }),
        ("memory and swap", |s| {
            set(
                s,
                "memory",
                json!({ "limit": 33_554_432, "swap": 50_331_648 }),
            )
        }),
        ("memory and swap without limit", |s| {
            set(s, "memory", json!({ "limit": 33_554_432, "swap": -1 }))
        }),
        ("memory checked before", |s| {
            set(
                s,
                "memory",
                json!({ "limit": 33_554_432, "checkBeforeUpdate": true }),
            )
        }),
        ("memory of a kernel", |s| {
            set(
                s,
                "memory",
                json!({ "limit": 33_554_432, "kernel": 1_000_000, "kernelTCP": 1_000_000 }),
            )
        }),
        ("swappiness", |s| {
            set(s, "memory", json!({ "swappiness": 10 }))
        }),
        ("no oom killer", |s| {
            set(
                s,
                "memory",
                json!({ "limit": 33_554_432, "disableOOMKiller": true }),
            )
        }),
        ("use hierarchy", |s| {
            set(s, "memory", json!({ "useHierarchy": true }))
        }),
        ("cpu shares", |s| set(s, "cpu", json!({ "shares": 512 }))),
        ("cpu quota", |s| {
            set(
                s,
                "cpu",
                json!({ "quota": 50_000, "period": 100_000, "burst": 20_000 }),
            )
        }),
        ("cpu quota without period", |s| {
            set(s, "cpu", json!({ "quota": 30_000 }))
        }),
        ("cpu period without quota", |s| {
            set(s, "cpu", json!({ "period": 50_000 }))
        }),
        ("cpu idle", |s| set(s, "cpu", json!({ "idle": 1 }))),
        ("cpu real time", |s| {
            set(
                s,
                "cpu",
                json!({ "realtimeRuntime": 950_000, "realtimePeriod": 1_000_000 }),
            )
        }),
        ("cpu set", |s| {
            set(s, "cpu", json!({ "cpus": "0", "mems": "0" }))
        }),
        ("processes", |s| set(s, "pids", json!({ "limit": 77 }))),
        ("processes without limit", |s| {
            set(s, "pids", json!({ "limit": -1 }))
        }),
        ("no processes", |s| set(s, "pids", json!({ "limit": 0 }))),
        ("block io weight", |s| {
            set(s, "blockIO", json!({ "weight": 300 }))
        }),
        ("block io leaf weight", |s| {
            set(s, "blockIO", json!({ "leafWeight": 300 }))
        }),
        ("huge pages", |s| {
            set(
                s,
                "hugepageLimits",
                json!([{ "pageSize": "2MB", "limit": 4_194_304 }]),
            )
        }),
        ("huge pages of a strange size", |s| {
            set(
                s,
                "hugepageLimits",
                json!([{ "pageSize": "3MB", "limit": 1 }]),
            )
        }),
        ("network classes", |s| {
            set(s, "network", json!({ "classID": 1_048_577 }))
        }),
        ("remote memory", |s| {
            set(s, "rdma", json!({ "mlx5_1": { "hcaHandles": 3 } }))
        }),
        ("unified", |s| {
            set(
                s,
                "unified",
                json!({ "memory.high": "30000000", "pids.max": "66", "cpu.weight": "50", "memory.low": "1048576" }),
            );
        }),
        ("unified over the rest", |s| {
            set(s, "pids", json!({ "limit": 77 }));
            set(
                s,
                "unified",
                json!({ "pids.max": "55", "memory.oom.group": "1", "cgroup.max.depth": "3" }),
            );
        }),
        ("unified that is not there", |s| {
            set(s, "unified", json!({ "husk.max": "1" }))
        }),
        ("a place below another", |s| {
            s["linux"]["cgroupsPath"] = json!(
                s["linux"]["cgroupsPath"]
                    .as_str()
                    .map(|path| format!("/spec/deep{path}"))
            )
        }),
        ("a place that is relative", |s| {
            s["linux"]["cgroupsPath"] = json!(
                s["linux"]["cgroupsPath"]
                    .as_str()
                    .map(|path| format!("spec{path}"))
            )
        }),
        ("no place", |s| {
            s["linux"]
                .as_object_mut()
                .map(|linux| linux.remove("cgroupsPath"));
        }),
        ("cache and bandwidth", |s| {
            s["linux"]["intelRdt"] = json!({ "closID": "husk", "l3CacheSchema": "L3:0=f" })
        }),
    ];
    const KNOWN: &[Known] = &[known(
        "cache and bandwidth",
        "start",
        "`process.apparmorProfile`",
    )];
    compare(CASES, KNOWN);
}
