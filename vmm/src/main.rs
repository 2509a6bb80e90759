//! husk-vmm: one microVM, served on inherited descriptors. Started by the shim, by nobody else.
//!
//! ```text
//! husk-vmm [debug]
//! ```
//!
//! `debug` logs more. Exit status 0 when the client has closed the machine's connection, 1 when the
//! machine could not be offered.

use std::process::ExitCode;

use anyhow::{Context, Result};
use husk_vmm::{fs::FileServer, jail, log, service};

fn main() -> ExitCode {
    let debug = std::env::args().any(|argument| argument == "debug");
    log::start(match debug {
        true => ::log::LevelFilter::Debug,
        false => ::log::LevelFilter::Info,
    });
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            ::log::error!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let outside = jail::prepare()?;
    // The last thing taken from the host by path.
    let files = FileServer::new().context("prepare the file server")?;
    outside.enter()?;
    service::serve(files).context("serve the machine")
}
