//! `husk`, the command for people. It looks at the host and changes nothing.

use std::{env, process::ExitCode};

use husk_shim::{VERSION, check};

const HELP: &str = "\
husk runs containers in microVMs, through containerd (runtime io.containerd.husk.v2).

usage:
  husk check       say what this host lacks to run pods; exit status 0 if nothing
  husk --version
  husk help
";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["check"] => check_host(),
        ["--version" | "-V" | "version"] => {
            println!("husk {VERSION}");
            ExitCode::SUCCESS
        }
        ["help" | "--help" | "-h"] => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        [] => usage("no command"),
        [unknown] => usage(&format!("unknown command {unknown:?}")),
        [_, extra, ..] => usage(&format!("unknown argument {extra:?}")),
    }
}

fn check_host() -> ExitCode {
    let findings = check::findings();
    for finding in &findings {
        println!("{finding}");
    }
    match findings.iter().any(check::Finding::is_bad) {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}

fn usage(problem: &str) -> ExitCode {
    eprint!("husk: {problem}\n\n{HELP}");
    ExitCode::from(2)
}
