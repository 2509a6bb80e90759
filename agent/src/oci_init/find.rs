//! Finds the program that `process.args[0]` names, and fails as Go's `exec.LookPath` and runc do.
//!
//! Called as the container's user, in its directory and root.

use std::fs;
use std::io;

use rustix::fs::{Access, AtFlags, CWD, accessat};

use super::failure::{Failure, words};

pub(super) fn program(args: &[String], env: &[String]) -> Result<String, Failure> {
    let Some(name) = args.first() else {
        return Err(Failure::request("process.args: must not be empty"));
    };
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.clone()),
            Err(Refusal::Stat(error)) => Err(Failure::request(format!(
                "exec: {name:?}: stat {name}: {}",
                words(&error)
            ))),
            Err(Refusal::Unfit(error)) => Err(Failure::request(format!(
                "exec: {name:?}: {}",
                words(&error)
            ))),
        };
    }
    // The last of several counts, as for the program itself.
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or_default();
    for directory in path
        .split(':')
        .filter(|_| !path.is_empty() && !name.is_empty())
    {
        let candidate = if directory.is_empty() {
            format!("./{name}")
        } else {
            format!("{directory}/{name}")
        };
        if executable(&candidate).is_ok() {
            if !candidate.starts_with('/') {
                return Err(Failure::request(format!(
                    "exec: {name:?}: cannot run executable found relative to current directory"
                )));
            }
            return Ok(candidate);
        }
    }
    Err(Failure::request(format!(
        "exec: {name:?}: executable file not found in $PATH"
    )))
}

enum Refusal {
    Stat(io::Error),
    Unfit(io::Error),
}

fn executable(path: &str) -> Result<(), Refusal> {
    let found = fs::metadata(path).map_err(Refusal::Stat)?;
    if found.is_dir() {
        return Err(Refusal::Unfit(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
        .map_err(|error| Refusal::Unfit(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(name: &str, path: &str) -> Result<String, String> {
        program(&[name.into()], &["A=b".into(), format!("PATH={path}")])
            .map_err(|failure| failure.reason)
    }

    // What is wrong with a program that is not found is shown in tests/containers.rs.
    #[test]
    fn the_path_is_searched_in_its_order() {
        assert_eq!(find("sh", "/nowhere:/bin").unwrap(), "/bin/sh");
        assert_eq!(find("/bin/sh", "").unwrap(), "/bin/sh");
        assert!(find("sh", "").is_err());
        assert!(find("", "/bin").is_err());
    }

    #[test]
    fn the_last_path_counts() {
        let env = ["PATH=/bin".to_string(), "PATH=/nowhere".to_string()];
        assert!(program(&["sh".into()], &env).is_err());
    }

    #[test]
    fn nothing_is_run_from_the_current_directory_by_accident() {
        // Tests run in the package's directory, whatever is executable there.
        let here = std::env::current_dir().unwrap();
        let up = "../".repeat(here.components().count());
        for path in [format!("{up}bin"), format!("/nowhere:{up}bin")] {
            assert_eq!(
                find("sh", &path).unwrap_err(),
                "exec: \"sh\": cannot run executable found relative to current directory"
            );
        }
    }
}
