//! `linux.devices` and the rules of `linux.resources.devices`.

use serde_json::{Value, json};

use crate::compare::{Case, Known, compare, push};

fn device(spec: &mut Value, device: Value) {
    push(&mut spec["linux"]["devices"], device);
}

fn rule(spec: &mut Value, rule: Value) {
    push(&mut spec["linux"]["resources"]["devices"], rule);
}

/// Whatever the rules say, somebody without CAP_MKNOD sees little of it.
fn anything(spec: &mut Value) {
    spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
}

#[test]
fn devices_and_their_rules_are_runcs() {
    const CASES: &[Case] = &[
        ("fuse", |s| {
            device(
                s,
                json!({ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666, "uid": 1, "gid": 2 }),
            );
            rule(
                s,
                json!({ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" }),
            );
        }),
        ("tun in a directory", |s| {
            device(
                s,
                json!({ "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200 }),
            );
            rule(
                s,
                json!({ "allow": true, "type": "c", "major": 10, "minor": 200, "access": "rw" }),
            );
        }),
        ("a pipe", |s| {
            device(
                s,
                json!({ "path": "/dev/pipe", "type": "p", "fileMode": 0o640 }),
            )
        }),
        ("null again, with a mode", |s| {
            device(
                s,
                json!({ "path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o600, "gid": 5 }),
            );
        }),
        ("null by another name", |s| {
            device(
                s,
                json!({ "path": "/dev/zip", "type": "u", "major": 1, "minor": 3, "fileMode": 0o400 }),
            );
        }),
        ("a device without a rule", |s| {
            device(
                s,
                json!({ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }),
            )
        }),
        ("no rules", |s| {
            s["linux"]["resources"]["devices"] = json!([])
        }),
        ("anything", anything),
        ("everything but null", |s| {
            anything(s);
            rule(
                s,
                json!({ "allow": false, "type": "c", "major": 1, "minor": 3, "access": "rwm" }),
            );
        }),
        ("reading alone", |s| {
            rule(
                s,
                json!({ "allow": true, "type": "c", "major": 1, "minor": 11, "access": "r" }),
            );
            rule(
                s,
                json!({ "allow": false, "type": "c", "major": 1, "minor": 7, "access": "w" }),
            );
        }),
        ("a whole major number", |s| {
            rule(
                s,
                json!({ "allow": true, "type": "b", "major": 7, "access": "mr" }),
            )
        }),
    ];
    const KNOWN: &[Known] = &[];
    compare(CASES, KNOWN);
}
