//! `containerd-shim-husk-v2`, which containerd executes. See the library for the map.

use std::{env, io::Write, process::ExitCode};

use anyhow::Result;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use husk_shim::{
    RUNTIME, VERSION,
    args::{Action, Invocation},
    bootstrap, cleanup, serve,
    templates::background,
    timeline,
};
use protobuf::{Message, MessageField};

fn main() -> ExitCode {
    // containerd reads stdout and stderr together: one message, and only if something is wrong.
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-husk-v2: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let begun = timeline::monotonic_ns();
    let mut invocation = Invocation::parse(env::args().skip(1))?;
    if invocation.since_ns == 0 {
        invocation.since_ns = begun;
    }
    let answer = match invocation.action {
        Action::Start => bootstrap::start(&invocation)?.into_bytes(),
        Action::Delete => cleanup::delete(&invocation)?,
        Action::Serve => return serve::run(&invocation),
        Action::BuildTemplate => return background::run(),
        Action::Version => format!("containerd-shim-husk-v2 {VERSION}\n").into_bytes(),
        Action::Info => info()?,
    };
    std::io::stdout().write_all(&answer)?;
    Ok(())
}

fn info() -> Result<Vec<u8>> {
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(RuntimeVersion {
            version: VERSION.into(),
            ..RuntimeVersion::default()
        }),
        ..RuntimeInfo::default()
    };
    Ok(info.write_to_bytes()?)
}
