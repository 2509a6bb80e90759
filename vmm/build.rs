//! Generates the messages of the state file from `protos/state.proto`.

use std::{env, fs, io, path::Path};

use ttrpc_codegen::Codegen;

fn main() -> io::Result<()> {
    const PROTO: &str = "protos/state.proto";
    println!("cargo:rerun-if-changed={PROTO}");
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    Codegen::new()
        .out_dir(&out)
        .inputs([PROTO])
        .include("protos")
        .rust_protobuf()
        .run()?;
    // A file with inner attributes cannot be `include!`d; `src/state.rs` sets what they would.
    let file = Path::new(&out).join("state.rs");
    let text = fs::read_to_string(&file)?;
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(file, kept.join("\n"))
}
