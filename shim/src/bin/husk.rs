//! `husk`, the command for people. It looks at the host and its pods, and sees to the templates that pods start from.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use husk_shim::{
    VERSION, check, inspect,
    templates::command::{self, CommandError},
};

const HELP: &str = "\
husk runs containers in microVMs, through containerd (runtime io.containerd.husk.v2).

usage:
  husk check       say what this host lacks to run pods; exit status 0 if nothing
  husk inspect POD show the jail that a pod's VMM is in
  husk template    build, show and remove what pods start from; husk template --help says more
  husk --version
  husk help
";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["check"] => check_host(),
        ["inspect", pod] => inspect_pod(pod),
        ["inspect"] => usage("inspect needs a pod"),
        ["template", rest @ ..] => template(rest),
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

fn inspect_pod(pod: &str) -> ExitCode {
    match inspect::inspect(pod) {
        Ok(text) => {
            // Whoever closes the pipe has seen enough.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("husk inspect: {e}");
            ExitCode::FAILURE
        }
    }
}

fn template(args: &[&str]) -> ExitCode {
    match command::run(args) {
        Ok(text) => {
            // Whoever closes the pipe has seen enough.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(CommandError::Usage(problem)) => {
            eprintln!("husk template: {problem} (see husk template --help)");
            ExitCode::from(2)
        }
        Err(e) => {
            eprintln!("husk template: {e}");
            ExitCode::FAILURE
        }
    }
}

fn usage(problem: &str) -> ExitCode {
    eprint!("husk: {problem}\n\n{HELP}");
    ExitCode::from(2)
}
