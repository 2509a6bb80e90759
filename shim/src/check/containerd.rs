//! Whether this host's containerd can start pods: that there is one, that it is not too old, and that it finds the
//! shim. Looked at from its process where it runs, as its PATH is seldom that of a shell.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    os::unix::{ffi::OsStringExt, fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::{Finding, version};

const SHIM: &str = "containerd-shim-husk-v2";
const SUBJECT: &str = "containerd";
/// The oldest that the shim has been tried with.
const LEAST: (u32, u32) = (1, 7);
/// For it to say its version.
const PATIENCE: Duration = Duration::from_secs(5);
const INSTALL: &str = "install containerd 1.7 or later";

/// A containerd: its program, and where it looks for shims.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    program: PathBuf,
    path: OsString,
    runs: bool,
}

/// The one that runs, or else the one that a shell would start.
pub(super) fn find(proc: &Path, path: &OsStr) -> Option<Found> {
    running(proc).or_else(|| {
        Some(Found {
            program: look_up(SUBJECT, path)?,
            path: path.to_owned(),
            runs: false,
        })
    })
}

fn running(proc: &Path) -> Option<Found> {
    let processes = fs::read_dir(proc).ok()?.flatten();
    processes.map(|entry| entry.path()).find_map(|process| {
        let name = fs::read(process.join("comm")).ok()?;
        if name.trim_ascii_end() != SUBJECT.as_bytes() {
            return None;
        }
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        let path = environment
            .split(|byte| *byte == 0)
            .find_map(|variable| variable.strip_prefix(b"PATH="));
        Some(Found {
            program: fs::read_link(process.join("exe")).ok()?,
            path: OsString::from_vec(path.unwrap_or_default().to_vec()),
            runs: true,
        })
    })
}

fn look_up(program: &str, path: &OsStr) -> Option<PathBuf> {
    let executable = |path: &PathBuf| {
        fs::metadata(path)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(path)
        .map(|directory| directory.join(program))
        .find(executable)
}

pub(super) fn findings(
    found: Option<&Found>,
    says: impl Fn(&Path) -> Option<String>,
) -> Vec<Finding> {
    let Some(found) = found else {
        return vec![Finding::bad(
            SUBJECT,
            "neither running nor in PATH",
            INSTALL,
        )];
    };
    vec![age(found, says(&found.program).as_deref()), shim(found)]
}

/// `containerd --version` says `containerd <where from> <version> <commit>`.
fn age(found: &Found, says: Option<&str>) -> Finding {
    let program = found.program.display();
    let release = says.and_then(|says| {
        let mut words = says.split_whitespace().skip(1);
        words.find(|word| version(word.trim_start_matches('v')).is_some())
    });
    let number = release.and_then(|release| version(release.trim_start_matches('v')));
    match (release, number) {
        (Some(release), Some(number)) if number < LEAST => {
            let what = format!(
                "{program}: version {release}, older than {}.{}",
                LEAST.0, LEAST.1
            );
            Finding::bad(SUBJECT, what, INSTALL)
        }
        (Some(release), Some(_)) if found.runs => {
            Finding::good(SUBJECT, format!("{program}: version {release}, runs"))
        }
        (Some(release), Some(_)) => Finding::advice(
            SUBJECT,
            format!("{program}: version {release}, does not run"),
            "systemctl start containerd",
        ),
        _ => Finding::advice(
            SUBJECT,
            format!("{program}: does not say its version"),
            INSTALL,
        ),
    }
}

/// containerd looks in its PATH, and beside itself.
fn shim(found: &Found) -> Finding {
    let beside = found.program.parent().unwrap_or(Path::new("/"));
    let shim = look_up(SHIM, &found.path).or_else(|| look_up(SHIM, beside.as_os_str()));
    match shim {
        Some(shim) => Finding::good("shim", shim.display().to_string()),
        None => Finding::bad(
            "shim",
            format!(
                "{SHIM} is not in containerd's PATH ({})",
                found.path.to_string_lossy()
            ),
            "make install with a PREFIX whose bin is there, or link it to /usr/local/bin",
        ),
    }
}

/// What the program answers to `--version`, if it does in time.
pub(super) fn ask(program: &Path) -> Option<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().ok()?.is_none() {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A host with this in its directory `bin`, and a containerd that runs if `runs`.
    fn host(programs: &[&str], runs: bool) -> (tempfile::TempDir, Option<Found>) {
        let top = tempfile::tempdir().unwrap();
        let (bin, other, proc) = (
            top.path().join("bin"),
            top.path().join("other"),
            top.path().join("proc"),
        );
        for directory in [&bin, &other, &proc.join("12"), &proc.join("self")] {
            fs::create_dir_all(directory).unwrap();
        }
        for program in programs {
            fs::write(bin.join(program), "").unwrap();
            fs::set_permissions(bin.join(program), fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(
            proc.join("12/comm"),
            if runs { "containerd\n" } else { "bash\n" },
        )
        .unwrap();
        symlink(other.join("containerd"), proc.join("12/exe")).unwrap();
        let environment = format!("A=b\0PATH={}:/nowhere\0", bin.display());
        fs::write(proc.join("12/environ"), environment).unwrap();
        let found = find(&proc, bin.as_os_str());
        (top, found)
    }

    fn lines(found: Option<&Found>, says: &str) -> String {
        let findings = findings(found, |_| Some(says.to_owned()));
        let lines: Vec<String> = findings.iter().map(Finding::to_string).collect();
        lines.join("\n")
    }

    const GOOD: &str = "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6";

    #[test]
    fn a_host_without_one_is_told_to_install_it() {
        let (_top, found) = host(&[], false);
        assert!(lines(found.as_ref(), "").starts_with("bad     containerd: neither running"));
    }

    #[test]
    fn one_that_is_too_old_is_named() {
        let (_top, found) = host(&[SHIM], true);
        let said = lines(
            found.as_ref(),
            "containerd github.com/containerd/containerd v1.6.20 abc",
        );
        assert!(
            said.starts_with("bad     containerd: ")
                && said.contains("version v1.6.20, older than 1.7"),
            "{said}"
        );
        let said = lines(found.as_ref(), GOOD);
        assert!(
            said.starts_with("ok ") && said.contains("1.7.24~ds1, runs"),
            "{said}"
        );
        let said = lines(
            found.as_ref(),
            "containerd github.com/containerd/containerd/v2 2.1.9+unknown x",
        );
        assert!(
            said.starts_with("ok ") && said.contains("2.1.9+unknown"),
            "{said}"
        );
        assert!(lines(found.as_ref(), "what?").starts_with("advice  containerd: "));
    }

    #[test]
    fn one_that_does_not_run_is_looked_at_all_the_same() {
        let (_top, found) = host(&[SUBJECT, SHIM], false);
        let said = lines(found.as_ref(), GOOD);
        assert!(
            said.starts_with("advice  containerd: ") && said.contains("systemctl start"),
            "{said}"
        );
    }

    #[test]
    fn the_shim_is_looked_for_where_containerd_does() {
        let (top, found) = host(&[], true);
        let said = lines(found.as_ref(), GOOD);
        assert!(
            said.contains("\nbad     shim: ") && said.contains("link it to"),
            "{said}"
        );
        let beside = top.path().join("other").join(SHIM);
        fs::write(&beside, "").unwrap();
        // A file that nobody may execute is none.
        assert!(lines(found.as_ref(), GOOD).contains("\nbad     shim: "));
        fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(lines(found.as_ref(), GOOD).contains("\nok      shim: "));
    }

    #[test]
    fn its_version_is_asked_for_with_an_end() {
        assert!(ask(Path::new("/bin/echo")).is_some_and(|said| said.contains("echo")));
        assert_eq!(ask(Path::new("/no/such/containerd")), None);
    }
}
