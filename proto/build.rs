//! Generates the two ttrpc contracts and the messages of CRI from `protos/`.

use std::{env, fs, io, path::Path};

use ttrpc_codegen::{Codegen, Customize};

const CONTRACTS: [&str; 2] = ["machine", "agent"];
const MESSAGES: &str = "cri";

fn main() -> io::Result<()> {
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let names = CONTRACTS.into_iter().chain([MESSAGES]);
    let protos: Vec<String> = names.map(|name| format!("protos/{name}.proto")).collect();
    for proto in &protos {
        println!("cargo:rerun-if-changed={proto}");
    }
    Codegen::new()
        .out_dir(&out)
        .inputs(&protos)
        .include("protos")
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;
    let services = CONTRACTS.map(|name| format!("{name}_ttrpc.rs"));
    let messages = CONTRACTS.into_iter().chain([MESSAGES]);
    for file in services
        .into_iter()
        .chain(messages.map(|name| format!("{name}.rs")))
    {
        strip_inner_attributes(&Path::new(&out).join(file))?;
    }
    Ok(())
}

/// A file with inner attributes cannot be `include!`d; `src/lib.rs` sets what they would.
fn strip_inner_attributes(file: &Path) -> io::Result<()> {
    let text = fs::read_to_string(file)?;
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(file, kept.join("\n"))
}
