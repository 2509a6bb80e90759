//! What the agent parses: the contract's messages, OCI specifications, its helper's reports. Only what computes:
//! requests are not carried out, for they change the system they run on.

use arbitrary::{Arbitrary, Unstructured};
use husk_agent::{
    cgroup,
    control::{Order, Report},
    spec::{self, Spec, process::Process, resources::Resources},
};
use husk_proto::agent::{
    CreateContainerRequest, ExecRequest, GrowRequest, HelloRequest, SignalRequest, UpdateRequest,
};
use protobuf::Message;

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Spec(&'a [u8]),
    Process(&'a [u8]),
    Resources(&'a [u8]),
    /// The specification of `ctr`, with some bytes replaced.
    Changed(Vec<(u16, u8)>),
    /// The same with one value replaced: which, and by what.
    Replaced(u8, &'a str),
    Message(u8, &'a [u8]),
    Helper(&'a [u8]),
}

const CTR: &str = include_str!("../../agent/src/spec/ctr-1.7.json");

pub(crate) fn run(data: &[u8]) {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    match input {
        Input::Spec(json) => read_spec(json),
        Input::Process(json) => {
            if let Ok(process) = spec::parse::<Process>(json) {
                let _ = process.validate("process");
            }
        }
        Input::Resources(json) => {
            if let Ok(resources) = spec::parse::<Resources>(json) {
                let _ = cgroup::settings::settings(&resources);
            }
        }
        Input::Changed(changes) => {
            let mut json = CTR.as_bytes().to_vec();
            for (at, value) in changes {
                let at = usize::from(at) % json.len();
                json[at] = value;
            }
            read_spec(&json);
        }
        Input::Replaced(which, by) => {
            let mut spec: serde_json::Value = serde_json::from_str(CTR).expect("JSON");
            let value = serde_json::from_str(by).unwrap_or_else(|_| by.into());
            replace(&mut spec, &mut which.into(), &value);
            read_spec(&serde_json::to_vec(&spec).expect("JSON"));
        }
        Input::Message(kind, bytes) => message(kind, bytes),
        Input::Helper(json) => {
            let _ = serde_json::from_slice::<Report>(json);
            let _ = serde_json::from_slice::<Order>(json);
        }
    }
}

/// A specification that is accepted is one that the helper reads the same way.
fn read_spec(json: &[u8]) {
    let Ok(spec) = spec::parse::<Spec>(json) else {
        return;
    };
    if spec.validate().is_ok() {
        let again = serde_json::to_vec(&spec).expect("JSON");
        let again: Spec = spec::parse(&again).expect("what was written is read");
        again.validate().expect("and is as good");
    }
    let _ = cgroup::settings::settings(&spec.linux.resources);
}

/// Replaces the value that comes after `left` others.
fn replace(value: &mut serde_json::Value, left: &mut usize, by: &serde_json::Value) {
    use serde_json::Value;
    if *left == 0 {
        *value = by.clone();
    }
    let Some(rest) = left.checked_sub(1) else {
        return;
    };
    *left = rest;
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| replace(value, left, by)),
        Value::Object(values) => {
            for (_, value) in values.iter_mut() {
                replace(value, left, by);
            }
        }
        _ => {}
    }
}

fn message(kind: u8, bytes: &[u8]) {
    match kind % 6 {
        0 => {
            if let Ok(request) = CreateContainerRequest::parse_from_bytes(bytes) {
                read_spec(&request.spec);
            }
        }
        1 => {
            if let Ok(request) = ExecRequest::parse_from_bytes(bytes) {
                let _ = spec::parse::<Process>(&request.process);
            }
        }
        2 => {
            if let Ok(request) = UpdateRequest::parse_from_bytes(bytes) {
                let _ = spec::parse::<Resources>(&request.resources);
            }
        }
        3 => drop(GrowRequest::parse_from_bytes(bytes)),
        4 => drop(HelloRequest::parse_from_bytes(bytes)),
        _ => drop(SignalRequest::parse_from_bytes(bytes)),
    }
}
