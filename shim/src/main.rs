//! `containerd-shim-husk-v2`, which containerd executes. See the library for the map.

use std::{env, io::Write, process::ExitCode};

use anyhow::Result;
use husk_shim::{
    ahead,
    args::{Action, Invocation},
    bootstrap, cleanup, info, serve,
    templates::background,
    timeline,
};

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
        Action::Version => info::version().into_bytes(),
        Action::Info => info::runtime_info(&ahead::read_stdin()?)?,
    };
    std::io::stdout().write_all(&answer)?;
    Ok(())
}
