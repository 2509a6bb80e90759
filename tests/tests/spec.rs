//! Fields of config.json: the same program sees the same under husk as under runc.

use std::{fs, process::Command};

use containerd_shim_protos::{
    api::UpdateTaskRequest,
    protobuf::{MessageField, well_known_types::any::Any},
    shim_async::{Client, TaskClient},
};
use husk_tests::{
    bundle::Bundle,
    command::{self, PATIENCE},
    containerd,
    ctr::{Run, Runtime},
};
use serde_json::{Value, json};

/// containerd's default profile, as `ctr run --seccomp` and Kubernetes' RuntimeDefault have it.
#[test]
fn the_default_seccomp_profile_holds() {
    // unshare is not among what the profile allows to a container without CAP_SYS_ADMIN.
    let script = "grep ^Seccomp: /proc/self/status; unshare -U true; echo $?; mount -t tmpfs x /tmp; echo $?";
    let [husk, runc] = [Runtime::Husk, Runtime::Runc].map(|runtime| {
        Run::husk(&["sh", "-c", script])
            .flags(&["--seccomp"])
            .runtime(runtime)
            .go()
    });
    assert_eq!((husk.out(), husk.err()), (runc.out(), runc.err()));
    assert!(husk.out().starts_with("Seccomp:\t2\n"), "{husk:?}");
}

#[test]
fn a_seccomp_profile_does_what_it_does_under_runc() {
    // Without flags: the lab's runc is older than these.
    let script = "ulimit -c 0; mkdir /tmp/x; chmod 700 /tmp; echo $?; chmod 755 /tmp; echo $?; ln /bin/sh /tmp/y; echo $?";
    for no_new_privileges in [true, false] {
        let mut bundle = Bundle::new(&["sh", "-c", script]);
        bundle.spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
        bundle.spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [
                {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
                {"names": ["chmod"], "action": "SCMP_ACT_KILL_PROCESS",
                 "args": [{"index": 1, "value": 0o077, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
                {"names": ["link", "linkat", "there_is_no_such_call"], "action": "SCMP_ACT_TRAP"},
            ]
        });
        let outcome = bundle.assert_equals_runc();
        assert_eq!(outcome.out(), "159\n0\n159\n", "{outcome:?}");
        assert!(
            outcome.err().contains("No space left on device"),
            "{outcome:?}"
        );
    }
}

/// A field that husk does not act on is refused by its name, not dropped.
#[test]
fn an_unsupported_field_is_named() {
    let mut bundle = Bundle::new(&["true"]);
    bundle.spec["linux"]["resources"] = json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}});
    let outcome = bundle.run(Runtime::Husk);
    assert_ne!(outcome.code(), 0);
    assert!(
        outcome.err().contains("linux.resources.rdma"),
        "{outcome:?}"
    );
    // The profile's listener would be on the host.
    bundle.spec["linux"]["resources"] = json!({});
    bundle.spec["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_NOTIFY"});
    let outcome = bundle.run(Runtime::Husk);
    assert!(
        outcome.err().contains("linux.seccomp.defaultAction"),
        "{outcome:?}"
    );
}

/// Has the container see its own cgroup at /sys/fs/cgroup.
fn show_cgroup(bundle: &mut Bundle) {
    let mounts = bundle.spec["mounts"].as_array_mut().expect("mounts");
    mounts.retain(|mount| mount["destination"] != "/sys/fs/cgroup");
    mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}));
    let namespaces = bundle.spec["linux"]["namespaces"].as_array_mut();
    namespaces
        .expect("namespaces")
        .push(json!({"type": "cgroup"}));
}

/// Resources become the same files of cgroup v2.
#[test]
fn resources_are_those_that_runc_sets() {
    let files = "cpu.weight cpu.max memory.max memory.low memory.high memory.swap.max pids.max hugetlb.2MB.max";
    let script = format!("cd /sys/fs/cgroup; for f in {files}; do echo $f $(cat $f); done");
    let mut bundle = Bundle::new(&["sh", "-c", &script]);
    show_cgroup(&mut bundle);
    bundle.spec["linux"]["resources"] = json!({
        "cpu": {"shares": 2, "quota": 50_000, "period": 90_000},
        "memory": {"limit": 64 << 20, "reservation": 32 << 20, "swap": 80 << 20, "swappiness": 60, "disableOOMKiller": false},
        "pids": {"limit": 50},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 4 << 20}],
        "network": {"classID": 5},
        "unified": {"memory.high": "50331648", "pids.max": "40"},
    });
    let outcome = bundle.assert_equals_runc();
    assert!(outcome.out().contains("pids.max 40\n"), "{outcome:?}");

    bundle.spec["process"]["args"] = json!(["cat", "/sys/fs/cgroup/io.weight"]);
    bundle.spec["linux"]["resources"] = json!({"blockIO": {"weight": 500}});
    assert_eq!(bundle.run(Runtime::Husk).ok(), "default 4950\n");
    for (resources, words) in [
        (
            json!({"unified": {"nosuch.max": "1"}}),
            "unified resource \"nosuch.max\" can't be set: controller \"nosuch\" not available",
        ),
        (
            json!({"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}}),
            "linux.resources.blockIO: \"8:0 rbps=1\": the guest has no such device",
        ),
    ] {
        bundle.spec["linux"]["resources"] = resources;
        let outcome = bundle.run(Runtime::Husk);
        assert!(
            outcome.code() != 0 && outcome.err().contains(words),
            "{outcome:?}"
        );
    }
}

/// By the request that CRI makes for it, which ctr has no command for; runc's own program has one.
#[test]
fn limits_are_changed_while_it_runs() {
    let resources = json!({
        "cpu": {"shares": 2, "quota": 40_000, "period": 80_000, "cpus": "0"},
        "memory": {"limit": 96 << 20, "reservation": 40 << 20, "swap": 96 << 20},
        "pids": {"limit": 44},
        "unified": {"memory.high": "67108864"},
    });
    let files =
        "cpu.weight cpu.max cpuset.cpus memory.max memory.low memory.high memory.swap.max pids.max";
    let script = format!("cd /sys/fs/cgroup; for f in {files}; do echo $f $(cat $f); done");
    let mut bundle = Bundle::new(&["sleep", "86400"]);
    show_cgroup(&mut bundle);
    let [husk, runc] = [Runtime::Husk, Runtime::Runc].map(|runtime| {
        let container = bundle.detached(runtime);
        let before = container.exec(&["sh", "-c", &script]).ok();
        update(runtime, &container.id, &resources).expect("update");
        let after = container.exec(&["sh", "-c", &script]).ok();
        assert!(after.contains("pids.max 44\n"), "{runtime:?}: {after}");
        // What cannot be is refused by name, and leaves what was.
        let wrong = json!({"unified": {"nosuch.max": "1"}});
        let error = update(runtime, &container.id, &wrong).expect_err("no such file");
        assert!(error.contains("nosuch"), "{runtime:?}: {error}");
        assert_eq!(container.exec(&["sh", "-c", &script]).ok(), after);
        (before, after)
    });
    assert_eq!(husk, runc);
}

fn update(runtime: Runtime, id: &str, resources: &Value) -> Result<(), String> {
    match runtime {
        Runtime::Husk => update_by_shim(id, resources),
        Runtime::Runc => {
            let mut command = Command::new("runc");
            command.args(["--root", "/run/containerd/runc/default", "update"]);
            let outcome = command::run(
                command.args(["--resources", "-", id]),
                resources.to_string().as_bytes(),
            );
            match outcome.code() {
                0 => Ok(()),
                _ => Err(outcome.err()),
            }
        }
    }
}

fn update_by_shim(id: &str, resources: &Value) -> Result<(), String> {
    let path = format!("{}/{id}/address", containerd::TASKS);
    let address = fs::read_to_string(path).expect("read the shim's address");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let request = UpdateTaskRequest {
        id: id.to_owned(),
        resources: MessageField::some(Any {
            value: resources.to_string().into_bytes(),
            ..Any::default()
        }),
        ..UpdateTaskRequest::default()
    };
    let answer = runtime.block_on(async {
        let client = Client::connect(&address).await?;
        let context = ttrpc::context::with_duration(PATIENCE);
        TaskClient::new(client).update(context, &request).await
    });
    answer.map(drop).map_err(|error| error.to_string())
}

/// runc says so too, and clients show it.
#[test]
fn a_limit_of_memory_that_is_too_low_to_start_is_named() {
    let mut bundle = Bundle::new(&["true"]);
    bundle.spec["linux"]["resources"] = json!({"memory": {"limit": 65_536}});
    let outcome = bundle.run(Runtime::Husk);
    assert_ne!(outcome.code(), 0);
    assert!(
        outcome.err().contains("OOM-killed (memory limit too low?)"),
        "{outcome:?}"
    );
}

/// Whose program needs more files meets the limit itself; runc needs some of its own to start it.
#[test]
fn a_limit_of_open_files_is_the_programs_own() {
    let mut bundle = Bundle::new(&["sh", "-c", "echo started; echo $(echo piped)"]);
    let mut run = |limit, runtime| {
        let limit = json!({"type": "RLIMIT_NOFILE", "soft": limit, "hard": limit});
        bundle.spec["process"]["rlimits"] = json!([limit]);
        bundle.run(runtime)
    };
    let [husk, runc] = [Runtime::Husk, Runtime::Runc].map(|runtime| run(10, runtime));
    assert_eq!(husk.out(), "started\npiped\n", "{husk:?}");
    assert_eq!((husk.out(), husk.code()), (runc.out(), runc.code()));
    let [husk, runc] = [Runtime::Husk, Runtime::Runc].map(|runtime| run(3, runtime));
    assert_eq!((&*husk.out(), husk.code()), ("started\n", 2), "{husk:?}");
    assert_ne!(runc.code(), 0);
    assert!(runc.err().contains("too many open files"), "{runc:?}");
}

/// createContainer's programs are the image's under husk, and the host's under runc; startContainer's are the image's.
#[test]
fn hooks_of_the_container_run_in_it() {
    let hook = |script: &str| json!({"path": "/bin/sh", "args": ["sh", "-c", script]});
    let mut bundle = Bundle::new(&["cat", "/tmp/log"]);
    bundle.spec["hooks"] = json!({"startContainer": [hook("id -u >/tmp/log; grep -c '\"status\":\"created\"' >>/tmp/log")]});
    assert_eq!(bundle.assert_equals_runc().out(), "0\n1\n");

    bundle.spec["hooks"]["createContainer"] = json!([hook("echo made >/tmp/made")]);
    bundle.spec["process"]["args"] = json!(["cat", "/tmp/made", "/tmp/log"]);
    assert_eq!(bundle.run(Runtime::Husk).ok(), "made\n0\n1\n");

    for kind in ["createContainer", "startContainer"] {
        bundle.spec["hooks"] = json!({});
        bundle.spec["hooks"][kind] = json!([hook("echo no >&2; exit 3")]);
        let outcome = bundle.run(Runtime::Husk);
        let words = format!("error running {kind} hook #0: exit status 3, stdout: , stderr: no");
        assert!(
            outcome.code() != 0 && outcome.err().contains(&words),
            "{outcome:?}"
        );
    }
}
