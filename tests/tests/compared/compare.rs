//! Starts each case under both runtimes, looks from the first process and from an exec, and compares.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use husk_tests::{
    command::{self, PATIENCE, eventually},
    ctr::{Container, PROBE, Runtime, ctr, fresh_id},
    terminal::Terminal,
};
use serde_json::{Value, json};

const RUNC: &str = "/opt/runc-1.3/usr/sbin/runc";
/// Where containerd and its shims look first.
const LINK: &str = "/usr/local/bin/runc";
/// The rows that a table may name.
const DIFFERENCES: &str = include_str!("../../../docs/differences.md");
/// What ctr 1.7 makes of an image.
const BASE: &str = include_str!("../../../agent/src/spec/ctr-1.7.json");

/// A name, and what makes the base specification this one.
pub type Case = (&'static str, fn(&mut Value));

/// A difference that is known.
pub struct Known {
    /// The case; one `*` stands for anything.
    pub case: &'static str,
    /// The line's key; one `*` stands for anything.
    pub key: &'static str,
    /// How the row of docs/differences.md begins.
    pub row: &'static str,
}

pub const fn known(case: &'static str, key: &'static str, row: &'static str) -> Known {
    Known { case, key, row }
}

/// In every container.
const EVERYWHERE: &[Known] = &[
    known("*", "autogroup", KERNEL),
    known("*", "call acct", KERNEL),
    known("*", "call delete_module", KERNEL),
    known("*", "call get_mempolicy", KERNEL),
    known("*", "call init_module", KERNEL),
    known("*", "call kexec_load", KERNEL),
    known("*", "call mbind", KERNEL),
    known("*", "call quotactl", KERNEL),
    known("*", "cgroup cgroup.controllers", KERNEL),
    known("*", "cgroup misc.max", KERNEL),
    known("*", "cgroup rdma.max", KERNEL),
    known("*", "mount /proc/acpi *", KERNEL),
    known("*", "mount /proc/kcore *", KERNEL),
    known("*", "path /proc/acpi", KERNEL),
    known("*", "path /proc/kcore", KERNEL),
    // Two masks fewer.
    known("*", "mounts", KERNEL),
    known("*", "self/attr/current", KERNEL),
    known("*", "self/loginuid", KERNEL),
    // The length of a slice follows the number of processors.
    known("*", "scheduler", PROCESSORS),
    known("*", "status Cpus_allowed_list", PROCESSORS),
    known("*", "mount / source", ROOT),
    known("*", "mount / type", ROOT),
    known("*", "rlimit Max pending signals", LIMITS),
    known("*", "rlimit Max processes", LIMITS),
    known("*", "sysctl user/max_user_namespaces", LIMITS),
    known("*", "self/oom_score_adj", "`oom_score_adj`"),
    known("*", "status SigIgn", "signals"),
];
const KERNEL: &str = "what the guest's kernel is not";
const PROCESSORS: &str = "memory and processors";
pub const ROOT: &str = "the source of `/`";
pub const LIMITS: &str = "limits that";

type Lines = BTreeMap<String, String>;

/// What one runtime made of one case: lines of the first process, and of an exec.
struct Seen {
    init: Lines,
    exec: Lines,
}

/// Compares containers that join a pod: for these, no shim and no VM is started.
///
/// # Panics
/// With every line that differs and is not known, and with every entry of `table` that no line has needed.
#[track_caller]
pub fn compare(cases: &[Case], table: &[Known]) {
    compare_in(|runtime| Some(Container::idle(runtime)), cases, table);
}

/// The same of containers that are their pods' first ones.
#[track_caller]
pub fn compare_first(cases: &[Case], table: &[Known]) {
    compare_in(|_| None, cases, table);
}

#[track_caller]
fn compare_in(pod: impl Fn(Runtime) -> Option<Container> + Sync, cases: &[Case], table: &[Known]) {
    let began = Instant::now();
    // For people: only cases whose names contain it; the table is not judged then.
    let chosen = std::env::var("HUSK_SPEC").ok();
    let cases: Vec<&Case> = cases
        .iter()
        .filter(|(name, _)| chosen.as_ref().is_none_or(|chosen| name.contains(chosen)))
        .collect();
    let _newer = NewerRunc::link();
    let (runc, husk) = thread::scope(|scope| {
        let look = |runtime| {
            let pod = pod(runtime);
            let see = |case: &&Case| see(runtime, pod.as_ref(), case);
            cases.iter().map(see).collect()
        };
        let runc = scope.spawn(move || look(Runtime::Runc));
        let husk: Vec<Seen> = look(Runtime::Husk);
        let runc: Vec<Seen> = runc.join().expect("runc's side");
        (runc, husk)
    });
    println!("{} specifications, {:?}", cases.len(), began.elapsed());

    let known: Vec<&Known> = EVERYWHERE.iter().chain(table).collect();
    for entry in &known {
        assert!(
            DIFFERENCES.contains(&format!("\n| {}", entry.row)),
            "docs/differences.md has no row that begins with {:?}",
            entry.row
        );
    }
    let mut needed = vec![false; known.len()];
    // By what differs: most differences are in many cases.
    let mut wrong: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for ((name, _), (runc, husk)) in cases.iter().zip(runc.iter().zip(&husk)) {
        for (side, runc, husk) in [
            ("", &runc.init, &husk.init),
            (" exec", &runc.exec, &husk.exec),
        ] {
            if side == " exec" && (runc.is_empty() || husk.is_empty()) {
                // Nothing ran there: said of the first process.
                continue;
            }
            for (key, [runc, husk]) in differing(runc, husk) {
                let mut allowed = false;
                for (entry, needed) in known.iter().zip(&mut needed) {
                    if entry.covers(name, &key) {
                        (allowed, *needed) = (true, true);
                    }
                }
                if !allowed {
                    let what = format!("{key}\n    runc {runc}\n    husk {husk}");
                    wrong.entry(what).or_default().push(format!("{name}{side}"));
                }
            }
        }
    }
    for (entry, needed) in known.iter().zip(needed) {
        if !needed && chosen.is_none() {
            let why = "no difference: take it out of the table".to_owned();
            let what = format!("{} {}", entry.case, entry.key);
            wrong.entry(what).or_default().push(why);
        }
    }
    let lines: Vec<String> = wrong
        .iter()
        .map(|(what, cases)| format!("{what}\n    in {}: {}", cases.len(), cases.join(", ")))
        .collect();
    let count = lines.len();
    assert!(
        lines.is_empty(),
        "{count} differences\n{}",
        lines.join("\n")
    );
}

/// forky's runc is everybody's, as long as this value lives. Not by ctr's option: 1.7's client forgets it for containers
/// with ids of their own.
struct NewerRunc;

impl NewerRunc {
    fn link() -> Self {
        let _ = fs::remove_file(LINK);
        symlink(RUNC, LINK).expect("link runc");
        NewerRunc
    }
}

impl Drop for NewerRunc {
    fn drop(&mut self) {
        let _ = fs::remove_file(LINK);
    }
}

impl Known {
    fn covers(&self, case: &str, key: &str) -> bool {
        let fits = |pattern: &str, text: &str| match pattern.split_once('*') {
            Some((start, end)) => text
                .strip_prefix(start)
                .is_some_and(|rest| rest.ends_with(end)),
            None => text == pattern,
        };
        fits(self.key, key) && fits(self.case, case)
    }
}

fn differing(runc: &Lines, husk: &Lines) -> Vec<(String, [String; 2])> {
    // One that does not start sees nothing: one line says so.
    if runc.contains_key("start") || husk.contains_key("start") {
        let of = |lines: &Lines| lines.get("start").cloned().unwrap_or("it runs".to_owned());
        let both = runc.contains_key("start") && husk.contains_key("start");
        if both {
            println!("both refuse: runc {}; husk {}", of(runc), of(husk));
            return Vec::new();
        }
        return vec![("start".to_owned(), [of(runc), of(husk)])];
    }
    let keys: std::collections::BTreeSet<_> = runc.keys().chain(husk.keys()).collect();
    let of = |lines: &Lines, key: &str| lines.get(key).cloned().unwrap_or("-".to_owned());
    keys.into_iter()
        .map(|key| (key.clone(), [of(runc, key), of(husk, key)]))
        .filter(|(_, [runc, husk])| runc != husk)
        .collect()
}

fn base(id: &str, root: &Path) -> Value {
    let mut spec: Value = serde_json::from_str(BASE).expect("JSON");
    spec["root"] = json!({ "path": root });
    spec["hostname"] = json!("compared");
    spec["process"]["args"] = json!(["/probe", "self"]);
    spec["linux"]["cgroupsPath"] = json!(format!("/default/{id}"));
    push(
        &mut spec["linux"]["namespaces"],
        json!({ "type": "network" }),
    );
    mount(
        &mut spec,
        "/sys/fs/cgroup",
        "cgroup",
        "cgroup",
        &["ro", "nosuid", "noexec", "nodev", "relatime"],
    );
    spec
}

pub fn push(array: &mut Value, value: Value) {
    match array.as_array_mut() {
        Some(array) => array.push(value),
        None => *array = json!([value]),
    }
}

/// One mount more, last.
pub fn mount(spec: &mut Value, destination: &str, kind: &str, source: &str, options: &[&str]) {
    push(
        &mut spec["mounts"],
        json!({ "destination": destination, "type": kind, "source": source, "options": options }),
    );
}

/// Has the probe look at these, too.
pub fn look_at(spec: &mut Value, paths: &[&str]) {
    for path in paths {
        push(&mut spec["process"]["args"], json!(path));
    }
}

/// What lies beside a container's root, for bind mounts: the specification is in it as well.
const SOURCE: &str = "/var/tmp/spec-sources";

/// A root with little in it, and what binds show; the same for both runtimes.
fn make_root(root: &Path) {
    for name in [
        "dev",
        "etc",
        "home/user",
        "opt/full",
        "proc",
        "sys",
        "tmp",
        "run",
        "mnt",
    ] {
        fs::create_dir_all(root.join(name)).expect("make a directory of the root");
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).expect("chmod");
    for (name, text) in [
        (
            "etc/passwd",
            "root:x:0:0:root:/:/probe\nuser:x:1000:1000::/home/user:/probe\n",
        ),
        ("etc/group", "root:x:0:\nuser:x:1000:\n"),
        ("opt/full/file", "full\n"),
        ("mnt/file", ""),
    ] {
        fs::write(root.join(name), text).expect("write a file of the root");
    }
    symlink("/opt/full", root.join("mnt/link")).expect("make a link");
    fs::copy(PROBE, root.join("probe")).expect("copy the probe");
}

/// `directory`, `directory/below`, `file`; made once.
pub fn make_sources() {
    let source = Path::new(SOURCE);
    fs::create_dir_all(source.join("directory/below")).expect("make a directory");
    for name in ["file", "directory/file", "directory/below/file"] {
        fs::write(source.join(name), "of the host\n").expect("write a file");
    }
}

/// What `runtime` makes of the case, in this pod or in one of its own.
fn see(runtime: Runtime, pod: Option<&Container>, (name, edit): &Case) -> Seen {
    let id = fresh_id(match runtime {
        Runtime::Husk => "spec-husk",
        Runtime::Runc => "spec-runc",
    });
    let bundle = Bundle::new(&id);
    let mut spec = base(&id, &bundle.root());
    edit(&mut spec);
    if let Some(pod) = pod {
        spec["annotations"]["io.kubernetes.cri.sandbox-id"] = json!(pod.id);
    }
    fs::write(bundle.config(), spec.to_string()).expect("write config.json");
    let terminal = spec["process"]["terminal"] == json!(true);
    let began = Instant::now();
    let mut init = Init::start(runtime, &id, &bundle.config(), terminal);
    let text = init.report();
    let mut exec = Lines::new();
    if text.ends_with("END\n") {
        let exec_id = fresh_id("exec");
        let mut command = ctr(&["task", "exec", "--exec-id", &exec_id, &id, "/probe", "self"]);
        let outcome = command::run(&mut command, b"\n");
        exec = lines(&outcome.out(), &id);
        let start = format!("exec: {}", outcome.err().trim());
        if !outcome.out().ends_with("END\n") {
            exec.insert("start".to_owned(), start);
        }
    }
    let mut init_lines = lines(&text, &id);
    // ctr sets it to its own terminal's some time after the start.
    init_lines.remove("terminal size");
    let (status, error) = init.end(&id);
    match text.ends_with("END\n") {
        true => init_lines.insert("exit status".to_owned(), status),
        false => init_lines.insert("start".to_owned(), error),
    };
    let took = began.elapsed().as_secs_f64();
    // Shown at once, which libtest would not do: a hang is found by it.
    let _ = writeln!(std::io::stderr(), "{name}: {runtime:?} {took:.1} s");
    Seen {
        init: init_lines,
        exec,
    }
}

/// Ids are the only thing in which the two specifications differ.
fn lines(text: &str, id: &str) -> Lines {
    text.replace(id, "ID")
        // runc's root is a directory of the lab's tmpfs.
        .replace("/ID/root/", "/")
        .replace("/ID/root", "/")
        // Of tmpfs in a kernel that is built so.
        .replace(",inode64", "")
        // Of the host's one cgroup file system: runc clears them when it mounts it for a container without a namespace.
        .replace(",nsdelegate,memory_recursiveprot", "")
        .lines()
        .filter_map(|line| line.split_once('\t'))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// A directory of one container's own, gone with this value.
struct Bundle(PathBuf);

impl Bundle {
    fn new(id: &str) -> Self {
        let bundle = Bundle(Path::new("/var/tmp").join(id));
        make_root(&bundle.root());
        bundle
    }

    fn root(&self) -> PathBuf {
        self.0.join("root")
    }

    fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `ctr run`, with the container's first process behind it.
enum Init {
    Piped {
        child: Child,
        stdout: Arc<Mutex<Vec<u8>>>,
        stderr: Arc<Mutex<Vec<u8>>>,
    },
    Terminal(Terminal),
}

impl Init {
    fn start(runtime: Runtime, id: &str, config: &Path, terminal: bool) -> Self {
        let mut command = ctr(&["run", "--rm", "--runtime", runtime.name()]);
        if terminal {
            command.arg("--tty");
        }
        command.arg("--config").arg(config).arg(id);
        if terminal {
            return Init::Terminal(Terminal::start(&mut command, 100, 30));
        }
        Self::piped(&mut command)
    }

    fn piped(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start ctr");
        let stdout = collect(child.stdout.take().expect("piped"));
        let stderr = collect(child.stderr.take().expect("piped"));
        Init::Piped {
            child,
            stdout,
            stderr,
        }
    }

    fn text(&self) -> String {
        match self {
            Init::Piped { stdout, .. } => text(stdout),
            // ctr's own terminal adds carriage returns, too.
            Init::Terminal(terminal) => terminal.text().replace('\r', ""),
        }
    }

    /// What the first process has said; ends with `END` when that is all.
    fn report(&mut self) -> String {
        eventually(Instant::now() + PATIENCE / 3, || {
            let ended = match self {
                Init::Piped { child, .. } => child.try_wait().is_ok_and(|status| status.is_some()),
                Init::Terminal(terminal) => terminal.status().is_some(),
            };
            let text = self.text();
            (ended || text.ends_with("END\n")).then_some(text)
        })
        .unwrap_or_else(|| self.text())
    }

    /// Has the process end, and ctr after it; its status, and what it says on the error stream.
    fn end(&mut self, id: &str) -> (String, String) {
        let (status, error) = match self {
            Init::Piped { child, stderr, .. } => {
                if let Some(mut stdin) = child.stdin.take() {
                    let _ = stdin.write_all(b"\n");
                }
                let status = eventually(Instant::now() + PATIENCE / 4, || {
                    child.try_wait().ok().flatten()
                });
                let _ = child.kill();
                let _ = child.wait();
                // Its last words may still be on their way to us.
                let failed = !status.is_some_and(|status| status.success());
                let _ = eventually(Instant::now() + Duration::from_secs(1), || {
                    (!failed || !text(stderr).is_empty()).then_some(())
                });
                (status, text(stderr))
            }
            Init::Terminal(terminal) => {
                terminal.type_in("\n");
                let status = eventually(Instant::now() + PATIENCE / 4, || terminal.status());
                // Not the whole report again.
                let text = terminal.text();
                let last = text.lines().next_back().unwrap_or_default();
                (status, last.to_owned())
            }
        };
        // What a refused start has left, or one that hangs.
        if !status.is_some_and(|status| status.success()) {
            let _ = ctr(&["task", "delete", "--force", id]).output();
            let _ = ctr(&["container", "delete", id]).output();
        }
        let status = status.map_or("it does not end".to_owned(), |status| status.to_string());
        (status, error.trim().replace(id, "ID").replace('\n', " "))
    }
}

fn text(bytes: &Mutex<Vec<u8>>) -> String {
    String::from_utf8_lossy(&bytes.lock().expect("no panic under it")).into_owned()
}

fn collect(mut source: impl Read + Send + 'static) -> Arc<Mutex<Vec<u8>>> {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&bytes);
    thread::spawn(move || {
        let mut buffer = [0; 65536];
        while let Ok(count @ 1..) = source.read(&mut buffer) {
            let read = buffer.get(..count).unwrap_or_default();
            sink.lock()
                .expect("no panic under it")
                .extend_from_slice(read);
        }
    });
    bytes
}
