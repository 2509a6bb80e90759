//! Fields of config.json: the same program sees the same under husk as under runc.

use husk_tests::{
    bundle::Bundle,
    ctr::{Run, Runtime},
};
use serde_json::json;

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
    let script = "mkdir /tmp/x; chmod 700 /tmp; echo $?; chmod 755 /tmp; echo $?; ln /bin/sh /tmp/y; echo $?";
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
