//! `linux.devices`: nodes that a container shall have. Their numbers are the host's, and in the guest stand for
//! whatever has them there: so those pass whose numbers are the same in every Linux and which the guest's kernel
//! has. Pure.

use serde_json::Value;

use crate::spec::SpecError;

/// Linux' fixed numbers (Documentation/admin-guide/devices.txt) of what the guest's kernel has.
fn is_the_guests(kind: &str, major: i64, minor: i64) -> bool {
    match (kind, major, minor) {
        // /dev/null, zero, full, random, urandom, kmsg.
        ("c" | "u", 1, 3 | 5 | 7 | 8 | 9 | 11) => true,
        // /dev/tty, console, ptmx; /dev/pts/*.
        ("c" | "u", 5, 0..=2) | ("c" | "u", 136..=143, _) => true,
        // /dev/hwrng, net/tun, fuse, loop-control; /dev/loop*.
        ("c" | "u", 10, 183 | 200 | 229 | 237) | ("b", 7, _) => true,
        // A FIFO has no number.
        ("p", ..) => true,
        _ => false,
    }
}

/// Takes out what the guest cannot have. It is refused by name, unless the container is privileged: then all of
/// the host's devices were listed, and nobody asked for one of them.
pub fn rewrite(spec: &mut Value) -> Result<(), SpecError> {
    let privileged = allows_everything(spec);
    let Some(devices) = spec.pointer_mut("/linux/devices") else {
        return Ok(());
    };
    let Some(listed) = devices.as_array_mut() else {
        // Null is none; about anything else the agent has a word to say.
        return Ok(());
    };
    let mut left_out = Vec::new();
    for (index, device) in std::mem::take(listed).into_iter().enumerate() {
        let text = |name| device.get(name).and_then(Value::as_str).unwrap_or_default();
        let number = |name| device.get(name).and_then(Value::as_i64).unwrap_or(0);
        let (kind, major, minor) = (text("type"), number("major"), number("minor"));
        // What is malformed is the agent's to name.
        if !matches!(kind, "b" | "c" | "u") || is_the_guests(kind, major, minor) {
            listed.push(device);
            continue;
        }
        let name = format!("{} ({kind} {major}:{minor})", text("path"));
        if !privileged {
            return Err(SpecError::Field {
                field: format!("linux.devices[{index}]"),
                reason: format!("{name} is a device of the host: the guest has no such device"),
            });
        }
        left_out.push(name);
    }
    if !left_out.is_empty() {
        log::info!("devices of the host that the guest does not have are left out: {left_out:?}");
    }
    Ok(())
}

/// Whether the last rule for all devices allows them (`--privileged`).
fn allows_everything(spec: &Value) -> bool {
    let rules = spec.pointer("/linux/resources/devices");
    let rules = rules.and_then(Value::as_array).into_iter().flatten();
    let all = |rule: &&Value| {
        let any = |name| matches!(rule.get(name).and_then(Value::as_i64), None | Some(-1));
        let kind = rule.get("type").and_then(Value::as_str).unwrap_or_default();
        matches!(kind, "" | "a") && any("major") && any("minor")
    };
    let last = rules.rev().find(all);
    last.and_then(|rule| rule.get("allow")?.as_bool()) == Some(true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(rules: Value) -> Value {
        json!({"linux": {"resources": {"devices": rules}, "devices": [
            {"path": "/dev/full", "type": "c", "major": 1, "minor": 7},
            {"path": "/dev/net/tun", "type": "u", "major": 10, "minor": 200},
            {"path": "/run/fifo", "type": "p"},
            {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
            {"path": "/dev/loop3", "type": "b", "major": 7, "minor": 3},
            {"path": "/dev/null", "type": "b", "major": 1, "minor": 3},
            {"path": "/dev/odd", "type": 5}
        ]}})
    }

    #[test]
    fn a_device_that_the_guest_lacks_is_refused_by_name() {
        let some = json!([{"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 232, "access": "rwm"}]);
        let no_more = json!([{"allow": true, "access": "rwm"}, {"allow": false, "access": "rwm"}]);
        for rules in [json!([]), json!(null), some, no_more] {
            let error = rewrite(&mut spec(rules)).unwrap_err().to_string();
            assert_eq!(
                error,
                "linux.devices[3]: /dev/kvm (c 10:232) is a device of the host: the guest has no such device"
            );
        }
    }

    #[test]
    fn a_privileged_container_has_those_of_the_host_that_the_guest_has() {
        for all in [
            json!([{"allow": true, "access": "rwm"}]),
            json!([{"allow": false, "access": "rwm"},
                {"allow": true, "type": "a", "major": -1, "minor": -1, "access": "rwm"}]),
        ] {
            let mut spec = spec(all);
            rewrite(&mut spec).unwrap();
            let left = spec["linux"]["devices"].as_array().unwrap();
            let paths: Vec<_> = left.iter().map(|device| &device["path"]).collect();
            assert_eq!(
                paths,
                [
                    "/dev/full",
                    "/dev/net/tun",
                    "/run/fifo",
                    "/dev/loop3",
                    "/dev/odd"
                ]
            );
        }
    }

    #[test]
    fn no_devices_are_none() {
        for mut spec in [json!({}), json!({"linux": {"devices": null}})] {
            let before = spec.clone();
            rewrite(&mut spec).unwrap();
            assert_eq!(spec, before);
        }
    }
}
