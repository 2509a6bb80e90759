//! Generates the two ttrpc contracts from `protos/`.

use std::{env, fs, io, path::Path};

use ttrpc_codegen::{Codegen, Customize};

const CONTRACTS: [&str; 2] = ["machine", "agent"];

fn main() -> io::Result<()> {
    let out = env::var("OUT_DIR").map_err(io::Error::other)?;
    let protos = CONTRACTS.map(|name| format!("protos/{name}.proto"));
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
    for name in CONTRACTS {
        for file in [format!("{name}.rs"), format!("{name}_ttrpc.rs")] {
            strip_inner_attributes(&Path::new(&out).join(file))?;
        }
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
