//! Hooks of the OCI specification that run on the host (config.md, *POSIX-platform Hooks*): `prestart`,
//! `createRuntime`, `poststart` and `poststop`. Each is a program of the host that gets the container's state on
//! its stdin, and nothing of the shim's environment. `createContainer` and `startContainer` run in the guest: they
//! stay in the specification, which the agent reads.
//!
//! A hook may hang: each wait here has an end, and nobody else waits for it.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;
use tokio::{
    io::Interest,
    task::JoinHandle,
    time::{Instant, timeout},
};

use crate::{
    ahead,
    host_program::{HostProgram, cause_in_words, in_words},
    ready, record,
    spawn::pipe,
    spec::{SpecError, refuse},
};

/// A hook without a timeout, asked for by somebody who waits for ever, is killed after this.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// Bytes of a hook's stdout or stderr that an error shows; the rest is read and dropped.
const OUTPUT: usize = 4096;
/// For output that is left in a pipe which a child of the hook keeps open.
const REST: Duration = Duration::from_millis(100);
/// What is left to be run when a container is gone, beside its record.
const DUE: &str = "poststop.json";

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// In `Create`: the pod's namespaces exist, the container's root has not been entered. Before
    /// [`Kind::CreateRuntime`], which replaces it.
    Prestart,
    CreateRuntime,
    /// In `Start`, once the container's program runs.
    Poststart,
    /// In `Delete`, when nothing of the container is left.
    Poststop,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        })
    }
}

/// One hook, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Hook {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    timeout: Option<Duration>,
}

/// The host's hooks of one container, and what they are told of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
    oci_version: String,
    annotations: BTreeMap<String, String>,
}

/// The container that hooks are run for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    pub id: String,
    pub bundle: PathBuf,
    /// What containerd is told; 0 where there is none any more.
    pub pid: u32,
}

/// The state of a container (runtime.md, *State*).
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

/// runc's words.
#[derive(Debug, Error)]
#[error("error running {kind} hook #{index}: {cause}")]
pub struct HookError {
    kind: Kind,
    index: usize,
    cause: String,
}

/// Takes the host's hooks out of a specification.
pub fn take(spec: &mut Value) -> Result<Hooks, SpecError> {
    let mut hooks = Hooks::default();
    let Some(all) = spec.get_mut("hooks") else {
        return Ok(hooks);
    };
    if let Some(all) = all.as_object_mut() {
        for (kind, to) in [
            (Kind::Prestart, &mut hooks.prestart),
            (Kind::CreateRuntime, &mut hooks.create_runtime),
            (Kind::Poststart, &mut hooks.poststart),
            (Kind::Poststop, &mut hooks.poststop),
        ] {
            if let Some(found) = all.remove(&kind.to_string()) {
                *to = read(kind, found)?;
            }
        }
        all.retain(|_, left| {
            !left.is_null() && left.as_array().is_none_or(|left| !left.is_empty())
        });
    } else if !all.is_null() {
        return Err(refuse("hooks", "not an object"));
    }
    let empty = all.as_object().is_none_or(|all| all.is_empty());
    if let Some(spec) = spec.as_object_mut().filter(|_| empty) {
        spec.remove("hooks");
    }
    if !hooks.is_empty() {
        let text = |value: &Value| value.as_str().map(str::to_owned);
        hooks.oci_version = spec.get("ociVersion").and_then(text).unwrap_or_default();
        let annotations = spec.get("annotations").and_then(Value::as_object);
        hooks.annotations = annotations
            .into_iter()
            .flatten()
            .filter_map(|(name, value)| Some((name.clone(), text(value)?)))
            .collect();
    }
    Ok(hooks)
}

fn read(kind: Kind, found: Value) -> Result<Vec<Hook>, SpecError> {
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        path: String,
        args: Option<Vec<String>>,
        env: Option<Vec<String>>,
        timeout: Option<i64>,
    }
    let field = format!("hooks.{kind}");
    let entries: Option<Vec<Entry>> =
        serde_json::from_value(found).map_err(|e| refuse(&field, e.to_string()))?;
    let check = |(index, entry): (usize, Entry)| {
        let field = |name: &str| format!("{field}[{index}].{name}");
        if !entry.path.starts_with('/') {
            let reason = format!("{:?}: not an absolute path", entry.path);
            return Err(refuse(field("path"), reason));
        }
        let timeout = match entry.timeout.map(u64::try_from) {
            None => None,
            Some(Ok(seconds @ 1..)) => Some(Duration::from_secs(seconds)),
            Some(_) => {
                let reason = format!(
                    "{}: must be greater than 0",
                    entry.timeout.unwrap_or_default()
                );
                return Err(refuse(field("timeout"), reason));
            }
        };
        let variable = |text: String| match text.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(refuse(field("env"), format!("{text:?}: not NAME=VALUE"))),
        };
        let env = entry.env.unwrap_or_default().into_iter().map(variable);
        Ok(Hook {
            path: entry.path.into(),
            args: entry.args.unwrap_or_default(),
            env: env.collect::<Result<_, _>>()?,
            timeout,
        })
    };
    let entries = entries.unwrap_or_default().into_iter().enumerate();
    entries.map(check).collect()
}

impl Hooks {
    fn of(&self, kind: Kind) -> &[Hook] {
        match kind {
            Kind::Prestart => &self.prestart,
            Kind::CreateRuntime => &self.create_runtime,
            Kind::Poststart => &self.poststart,
            Kind::Poststop => &self.poststop,
        }
    }

    pub fn is_empty(&self) -> bool {
        let kinds = [
            Kind::Prestart,
            Kind::CreateRuntime,
            Kind::Poststart,
            Kind::Poststop,
        ];
        kinds.iter().all(|kind| self.of(*kind).is_empty())
    }

    /// Runs all hooks of a kind, up to the first that fails. None is left running after `limit`.
    pub async fn run(
        &self,
        kind: Kind,
        subject: &Subject,
        limit: Duration,
    ) -> Result<(), HookError> {
        let deadline = Instant::now() + limit;
        for (index, hook) in self.of(kind).iter().enumerate() {
            let ran = self.run_one(hook, kind, subject, deadline).await;
            ran.map_err(|cause| HookError { kind, index, cause })?;
        }
        Ok(())
    }

    /// Runs all hooks of a kind whatever becomes of them, which only the log is told.
    pub async fn run_all(&self, kind: Kind, subject: &Subject, limit: Duration) {
        let deadline = Instant::now() + limit;
        for (index, hook) in self.of(kind).iter().enumerate() {
            if let Err(cause) = self.run_one(hook, kind, subject, deadline).await {
                let error = HookError { kind, index, cause };
                log::warn!("container {}: {error}", subject.id);
            }
        }
    }

    fn state(&self, kind: Kind, subject: &Subject) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(&State {
            oci_version: &self.oci_version,
            id: &subject.id,
            status: match kind {
                Kind::Prestart | Kind::CreateRuntime => "creating",
                Kind::Poststart => "running",
                Kind::Poststop => "stopped",
            },
            pid: (kind != Kind::Poststop && subject.pid != 0).then_some(subject.pid),
            bundle: &subject.bundle,
            annotations: &self.annotations,
        })
    }

    async fn run_one(
        &self,
        hook: &Hook,
        kind: Kind,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<(), String> {
        if deadline <= Instant::now() {
            return Err("no time is left for it".to_owned());
        }
        let failed = |e: io::Error| cause_in_words(&e);
        let state = self.state(kind, subject).map_err(|e| e.to_string())?;
        // Of a file that is in memory nobody has to see whether the hook reads it.
        let state = ahead::in_memory(&state).map_err(failed)?;
        let (stdout, to_stdout) = pipe().map_err(failed)?;
        let (stderr, to_stderr) = pipe().map_err(failed)?;
        let mut command = Command::new(&hook.path);
        if let Some((name, args)) = hook.args.split_first() {
            command.arg0(name).args(args);
        }
        command
            .env_clear()
            .envs(hook.env.iter().map(|(name, value)| (name, value)))
            .current_dir(&subject.bundle)
            .stdin(state)
            .stdout(to_stdout)
            .stderr(to_stderr);
        let started = HostProgram::start(&mut command);
        // With it go our copies of the pipes' other ends.
        drop(command);
        let mut program = started
            .map_err(|e| format!("fork/exec {}: {}", hook.path.display(), cause_in_words(&e)))?;
        let outputs = [collect(stdout), collect(stderr)];

        let left = deadline.saturating_duration_since(Instant::now());
        let limit = hook.timeout.map_or(left, |timeout| timeout.min(left));
        let status = program.ended(limit).await.map_err(failed)?;
        drop(program);
        let Some(status) = status else {
            return Err(match hook.timeout {
                Some(timeout) if timeout <= left => format!(
                    "hook ran past specified timeout of {:.1}s",
                    timeout.as_secs_f64()
                ),
                _ => format!("hook did not end within {:.1}s", left.as_secs_f64()),
            });
        };
        if status.success() {
            return Ok(());
        }
        let [stdout, stderr] = outputs.map(|output| async move {
            let text = timeout(REST, output).await;
            text.ok().and_then(Result::ok).unwrap_or_default()
        });
        Err(format!(
            "{}, stdout: {}, stderr: {}",
            in_words(status),
            stdout.await,
            stderr.await
        ))
    }
}

/// Reads a hook's output to its end, so that it is never held up, and keeps the beginning.
fn collect(pipe: std::os::fd::OwnedFd) -> JoinHandle<String> {
    tokio::spawn(async move {
        let mut kept = Vec::new();
        // SAFETY: F_SETFL takes a number; the other status flags of a new pipe are clear.
        if unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) } != 0 {
            return String::new();
        }
        let Ok(pipe) = ready::watch(pipe, Interest::READABLE) else {
            return String::new();
        };
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = ready::read(&pipe, &mut buffer).await {
            let room = OUTPUT.saturating_sub(kept.len());
            kept.extend(buffer.iter().take(count.min(room)));
        }
        String::from_utf8_lossy(&kept).into_owned()
    })
}

/// Hooks that have to be run when a container is gone, written down for whoever sees to that should the shim
/// not live to do so.
#[derive(Serialize, Deserialize)]
struct Due {
    hooks: Hooks,
    subject: Subject,
}

/// Writes down that `poststop` is due; nothing if there are no such hooks.
pub fn note_due(directory: &Path, hooks: &Hooks, subject: &Subject) -> io::Result<()> {
    if hooks.poststop.is_empty() {
        return Ok(());
    }
    let due = Due {
        hooks: hooks.clone(),
        subject: subject.clone(),
    };
    record::write(directory, DUE, &serde_json::to_vec(&due)?)
}

/// They have been run, or are about to be.
pub fn forget_due(directory: &Path) {
    let _ = fs::remove_file(directory.join(DUE));
}

/// Runs what a shim that is gone had left to be run. Bounded.
pub fn run_due(directory: &Path, limit: Duration) {
    let Ok(text) = fs::read(directory.join(DUE)) else {
        return;
    };
    forget_due(directory);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match (serde_json::from_slice::<Due>(&text), runtime) {
        (Ok(due), Ok(runtime)) => {
            runtime.block_on(due.hooks.run_all(Kind::Poststop, &due.subject, limit));
        }
        (Err(e), _) => eprintln!("hooks in {}: {e}", directory.display()),
        (_, Err(e)) => eprintln!("run the hooks in {}: {e}", directory.display()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn of(hooks: Value) -> Result<Hooks, SpecError> {
        take(&mut json!({"ociVersion": "1.1.0", "annotations": {"a": "b"}, "hooks": hooks}))
    }

    fn subject(bundle: &Path) -> Subject {
        Subject {
            id: "c".into(),
            bundle: bundle.to_owned(),
            pid: 7,
        }
    }

    fn sh(script: &str) -> Value {
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]})
    }

    #[test]
    fn the_hosts_are_taken_and_the_guests_stay() {
        let guests = json!([{"path": "/x"}]);
        let mut spec = json!({"hooks": {
            "prestart": [{"path": "/p", "timeout": 3}], "createContainer": guests,
            "startContainer": [], "poststop": null
        }});
        let hooks = take(&mut spec).unwrap();
        assert_eq!(hooks.prestart[0].timeout, Some(Duration::from_secs(3)));
        assert!(hooks.poststop.is_empty() && !hooks.is_empty());
        assert_eq!(spec, json!({"hooks": {"createContainer": guests}}));
        let mut spec = json!({"hooks": {"prestart": []}});
        assert!(take(&mut spec).unwrap().is_empty());
        assert_eq!(spec, json!({}));
    }

    #[test]
    fn wrong_ones_are_refused_by_name() {
        for (hook, words) in [
            (
                json!({"path": "x"}),
                "hooks.prestart[1].path: \"x\": not an absolute path",
            ),
            (
                json!({}),
                "hooks.prestart[1].path: \"\": not an absolute path",
            ),
            (
                json!({"path": "/x", "timeout": 0}),
                "hooks.prestart[1].timeout: 0: must be",
            ),
            (
                json!({"path": "/x", "timeout": -3}),
                "hooks.prestart[1].timeout: -3: must be",
            ),
            (
                json!({"path": "/x", "env": ["a"]}),
                "hooks.prestart[1].env: \"a\": not NAME=VALUE",
            ),
            (json!({"path": 5}), "hooks.prestart: invalid type"),
        ] {
            let error = of(json!({"prestart": [{"path": "/y"}, hook]})).unwrap_err();
            assert!(error.to_string().starts_with(words), "{error}");
        }
        assert!(of(json!([])).is_err());
    }

    #[tokio::test]
    async fn they_get_the_state_and_nothing_of_ours() {
        let bundle = tempfile::tempdir().unwrap();
        let script =
            "cat >state; env >env; echo $0 >name; ls -l /proc/self/fd | grep -c memfd: >fds";
        let hook = json!({"path": "/bin/sh", "args": ["me", "-c", script],
            "env": ["PATH=/bin:/usr/bin", "A=b=c"]});
        let hooks = of(json!({"createRuntime": [hook], "poststop": [sh("cat >state")]})).unwrap();
        let subject = subject(bundle.path());
        hooks
            .run(Kind::CreateRuntime, &subject, SOON)
            .await
            .unwrap();
        let read = |name: &str| fs::read_to_string(bundle.path().join(name)).unwrap();
        let state: Value = serde_json::from_str(&read("state")).unwrap();
        let told = json!({"ociVersion": "1.1.0", "id": "c", "status": "creating", "pid": 7,
            "bundle": bundle.path(), "annotations": {"a": "b"}});
        assert_eq!(state, told);
        assert_eq!(read("name"), "me\n");
        let env = read("env");
        let inherited = |line: &&str| {
            !["PWD", "SHLVL", "_", "OLDPWD"].contains(&line.split('=').next().unwrap())
        };
        assert_eq!(env.lines().filter(inherited).count(), 2, "{env}");
        assert!(env.contains("A=b=c\n"));
        hooks.run(Kind::Poststop, &subject, SOON).await.unwrap();
        let state: Value = serde_json::from_str(&read("state")).unwrap();
        assert_eq!(state["status"], "stopped");
        assert_eq!(state.get("pid"), None);
    }

    #[tokio::test]
    async fn the_first_that_fails_is_told_in_runcs_words_and_is_the_last() {
        let bundle = tempfile::tempdir().unwrap();
        let subject = subject(bundle.path());
        let prestart = |hooks: Value| of(json!({"prestart": hooks})).unwrap();
        let fails = sh("echo out; echo err >&2; exit 3");
        let hooks = prestart(json!([sh("true"), fails, sh("touch late")]));
        let error = hooks.run(Kind::Prestart, &subject, SOON).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running prestart hook #1: exit status 3, stdout: out\n, stderr: err\n"
        );
        assert!(!bundle.path().join("late").exists());
        hooks.run_all(Kind::Prestart, &subject, SOON).await;
        assert!(bundle.path().join("late").exists());

        let hooks = prestart(json!([{"path": "/no/such/hook"}]));
        let error = hooks.run(Kind::Prestart, &subject, SOON).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running prestart hook #0: fork/exec /no/such/hook: no such file or directory"
        );
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed_at_its_timeout_or_at_the_limit() {
        let bundle = tempfile::tempdir().unwrap();
        let subject = subject(bundle.path());
        let mut hang = sh("echo $$ >pid; exec sleep 60");
        let short = Duration::from_millis(300);
        let hooks = of(json!({"poststart": [hang.clone()]})).unwrap();
        let error = hooks
            .run(Kind::Poststart, &subject, short)
            .await
            .unwrap_err();
        assert!(
            error.to_string().ends_with("hook did not end within 0.3s"),
            "{error}"
        );
        hang["timeout"] = 1.into();
        let hooks = of(json!({"poststart": [hang]})).unwrap();
        let error = hooks
            .run(Kind::Poststart, &subject, SOON)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "error running poststart hook #0: hook ran past specified timeout of 1.0s"
        );
        let pid = fs::read_to_string(bundle.path().join("pid")).unwrap();
        let process = PathBuf::from(format!("/proc/{}", pid.trim()));
        while process.exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn one_that_leaves_somebody_behind_holds_nobody_up() {
        let bundle = tempfile::tempdir().unwrap();
        let script = "sleep 60 & echo $! >left; yes | head -c 300000; exit 1";
        let hooks = of(json!({"prestart": [sh(script)]})).unwrap();
        let ran = hooks
            .run(Kind::Prestart, &subject(bundle.path()), SOON)
            .await;
        let error = ran.unwrap_err().to_string();
        assert!(
            error.contains("exit status 1") && error.len() < 2 * OUTPUT,
            "{error}"
        );
        let left = fs::read_to_string(bundle.path().join("left")).unwrap();
        let killed = Command::new("kill").arg(left.trim()).status().unwrap();
        assert!(killed.success());
    }

    #[test]
    fn what_is_due_is_run_once() {
        let top = tempfile::tempdir().unwrap();
        let directory = top.path().join("husk/default/c");
        let hooks = of(json!({"poststop": [sh("exit 1"), sh("echo ran >>ran")]})).unwrap();
        note_due(&directory, &Hooks::default(), &subject(top.path())).unwrap();
        assert!(!directory.exists());
        note_due(&directory, &hooks, &subject(top.path())).unwrap();
        for _ in 0..2 {
            run_due(&directory, SOON);
        }
        assert_eq!(fs::read_to_string(top.path().join("ran")).unwrap(), "ran\n");
    }
}
