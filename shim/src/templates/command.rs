//! `husk template`: builds, shows and removes templates by hand. It prints to a string; how that
//! reaches a terminal, and the exit status, are the caller's.

use std::{
    fmt::Write as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use thiserror::Error;

use super::{
    background,
    build::{self, BuildError, Built},
    gc::Limits,
    key::{Key, Scope},
    store::{Entry, Store},
};
use crate::{
    args::is_identifier,
    config::{CONFIG, Config, ConfigError, Sharing},
    options::Options,
};

pub const HELP: &str = "\
A template is a microVM that was booted once and stopped; pods start as clones of it.

usage:
  husk template build [--namespace NS]   make the template that pods of a namespace start from
  husk template ls                       show all templates, for pods of which sizes they are, and
                                         whether pods can use them
  husk template rm KEY... | --all        remove templates; running pods keep what they have
  husk template gc                       check every byte; remove what is damaged, outdated or too much
  husk template --help

NS is containerd's namespace (by default \"default\"); for Kubernetes, k8s.io/ and the pod's own.
KEY may be cut short. Each takes --config FILE, by default /etc/husk/config.toml, which says what pods
are made of, and with `templates` which of them share a template.
";

/// Characters of a key that `ls` shows, and the fewest that `rm` takes.
const SHOWN: usize = 12;
const FEWEST: usize = 4;

#[derive(Debug, Error)]
pub enum CommandError {
    /// What was typed is wrong.
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("template {0} is being made by somebody else")]
    Busy(Key),
    #[error("template {0}: no such template")]
    Unknown(String),
    #[error("template {0}: more than one begins so")]
    Ambiguous(String),
    #[error("template store {path}: {cause}")]
    Store { path: String, cause: std::io::Error },
}

/// What was asked for.
#[derive(Debug, PartialEq, Eq)]
enum Task {
    Build { namespace: Option<String> },
    List,
    Remove { keys: Vec<String> },
    RemoveAll,
    Collect,
}

/// Carries out `husk template ARGS...`; returns what to print.
pub fn run(args: &[&str]) -> Result<String, CommandError> {
    if matches!(args, ["help"]) || args.iter().any(|arg| matches!(*arg, "--help" | "-h")) {
        return Ok(HELP.to_owned());
    }
    let (task, file) = parse(args)?;
    let options = Options {
        config_path: file.unwrap_or_default().to_owned(),
        ..Options::default()
    };
    let config = Config::load(Path::new(CONFIG), &options)?;
    let store = Store::new(&config.template_dir);
    let failed = |cause| CommandError::Store {
        path: store.path().display().to_string(),
        cause,
    };
    match task {
        Task::Build { namespace } => build(&config, namespace),
        Task::List => {
            let entries = store.list().map_err(failed)?;
            Ok(table(&entries, &store.check_place(), SystemTime::now()))
        }
        Task::Remove { keys } => {
            let entries = store.list().map_err(failed)?;
            let keys = keys.iter().map(|key| find(&entries, key));
            // All or none: a wrong key is no reason to remove the others.
            for key in keys.collect::<Result<Vec<_>, _>>()? {
                background::forget(&store, key);
                store.remove(key, None).map_err(failed)?;
            }
            Ok(String::new())
        }
        Task::RemoveAll => {
            for entry in store.list().map_err(failed)? {
                background::forget(&store, &entry.key);
                store.remove(&entry.key, None).map_err(failed)?;
            }
            Ok(String::new())
        }
        Task::Collect => {
            let limits = Limits {
                space: config.template_space_mib << 20,
                keep: None,
                verify: true,
            };
            let mut text = String::new();
            for removed in store.gc(limits).map_err(failed)? {
                let _ = writeln!(text, "removed {}: {}", removed.name, removed.reason);
            }
            Ok(text)
        }
    }
}

fn parse<'a>(args: &[&'a str]) -> Result<(Task, Option<&'a str>), CommandError> {
    let usage = |problem: String| CommandError::Usage(problem);
    let mut words = Vec::new();
    let (mut file, mut namespace, mut all) = (None, None, false);
    let mut args = args.iter().copied();
    while let Some(arg) = args.next() {
        let (flag, value) = match arg.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (flag, Some(value)),
            _ => (arg, None),
        };
        let to = match flag {
            "--all" if value.is_none() => {
                all = true;
                continue;
            }
            "--config" => &mut file,
            "--namespace" => &mut namespace,
            _ if flag.starts_with('-') => return Err(usage(format!("unknown flag {arg:?}"))),
            word => {
                words.push(word);
                continue;
            }
        };
        let value = value.or_else(|| args.next());
        *to = Some(value.ok_or_else(|| usage(format!("flag {flag} needs a value")))?);
    }
    let Some((name, rest)) = words.split_first() else {
        return Err(usage("no command for templates".into()));
    };
    if *name != "rm" {
        if let Some(extra) = rest.first() {
            return Err(usage(format!("unknown argument {extra:?}")));
        }
    }
    if all && *name != "rm" {
        return Err(usage(format!("flag --all is not for {name}")));
    }
    if namespace.is_some() && *name != "build" {
        return Err(usage(format!("flag --namespace is not for {name}")));
    }
    let task = match (*name, rest) {
        ("build", _) => Task::Build {
            namespace: namespace.map(str::to_owned),
        },
        ("ls" | "list", _) => Task::List,
        ("rm", []) if all => Task::RemoveAll,
        ("rm", []) => return Err(usage("rm: which template?".into())),
        ("rm", _) if all => return Err(usage("rm: either keys or --all".into())),
        ("rm", keys) => Task::Remove {
            keys: keys.iter().map(|&key| key.to_owned()).collect(),
        },
        ("gc", _) => Task::Collect,
        (unknown, _) => return Err(usage(format!("unknown command {unknown:?}"))),
    };
    Ok((task, file))
}

fn build(config: &Config, namespace: Option<String>) -> Result<String, CommandError> {
    let scope = match (config.templates, namespace) {
        (Sharing::Off, _) => {
            let problem = "the configuration says templates = \"off\": no pod would use it";
            return Err(CommandError::Usage(problem.into()));
        }
        (Sharing::Node, Some(_)) => {
            let problem = "--namespace: the configuration says templates = \"node\"";
            return Err(CommandError::Usage(problem.into()));
        }
        (Sharing::Node, None) => Scope::Node,
        (Sharing::Namespace, name) => Scope::Namespace(name.unwrap_or_else(|| "default".into())),
    };
    if let Scope::Namespace(name) = &scope {
        if !name.splitn(2, '/').all(is_identifier) {
            return Err(CommandError::Usage(format!(
                "--namespace {name:?}: not a namespace"
            )));
        }
    }
    match build::run(config, scope)? {
        Built::Made(key) | Built::There(key) => Ok(format!("{key}\n")),
        Built::Busy(key) => Err(CommandError::Busy(key)),
    }
}

fn find<'a>(entries: &'a [Entry], text: &str) -> Result<&'a Key, CommandError> {
    let unknown = || CommandError::Unknown(text.to_owned());
    if text.len() < FEWEST {
        return Err(unknown());
    }
    let mut fitting = entries.iter().map(|entry| &entry.key);
    let mut fitting = fitting
        .by_ref()
        .filter(|key| key.as_str().starts_with(text));
    let key = fitting.next().ok_or_else(unknown)?;
    match fitting.next() {
        Some(_) => Err(CommandError::Ambiguous(text.to_owned())),
        None => Ok(key),
    }
}

fn table(entries: &[Entry], place: &Result<(), String>, now: SystemTime) -> String {
    let mut rows =
        vec![["KEY", "AGE", "SIZE", "MEMORY", "VCPUS", "SHARED BY", "FIT"].map(String::from)];
    for entry in entries {
        let key = entry.key.as_str();
        let key = key.get(..SHOWN).unwrap_or(key).to_owned();
        let size = format!("{:.1} MiB", entry.space as f64 / f64::from(1 << 20));
        let unknown = || "?".to_owned();
        rows.push(match &entry.manifest {
            Ok(manifest) => {
                let made = UNIX_EPOCH.checked_add(Duration::from_secs(manifest.made_at));
                let age = made.and_then(|made| now.duration_since(made).ok());
                let fit = entry
                    .check()
                    .and_then(|()| place.clone())
                    .and_then(|()| manifest.made_of.outdated().map_or(Ok(()), Err));
                [
                    key,
                    age.map_or_else(unknown, age_text),
                    size,
                    format!("from {} MiB", manifest.made_of.memory_mib),
                    format!("to {}", manifest.made_of.possible_vcpus),
                    manifest.made_of.scope.to_string(),
                    fit.map_or_else(|reason| format!("no: {reason}"), |()| "yes".into()),
                ]
            }
            Err(reason) => {
                let fit = format!("no: {reason}");
                [key, unknown(), size, unknown(), unknown(), unknown(), fit]
            }
        });
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; 7] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// In the largest unit that there is at least one of.
fn age_text(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
