//! Templates through the real shim and the real `husk`: built in the background, cloned, fallen back
//! from, damaged, and seen to by hand. What a start was shows in the shim's log.

use std::{
    fs::{self, File, Permissions},
    io::Read,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    },
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Duration,
};

use crate::{Host, Task};

const HUSK: &str = env!("CARGO_BIN_EXE_husk");

/// A host whose kernel file says `kernel`, and whose pods start from templates.
async fn host(kernel: &str) -> Templates {
    let mut host = Host::new().await;
    fs::write(host.at("vmlinux"), kernel).unwrap();
    host.settings = vec![
        "templates = \"namespace\"".into(),
        format!("template_dir = {:?}", host.at("templates")),
    ];
    fs::write(host.at("config.toml"), host.configuration()).unwrap();
    Templates(host)
}

struct Templates(Host);

impl Drop for Templates {
    fn drop(&mut self) {
        // Their memory is immutable, which only husk undoes.
        self.husk(&["rm", "--all"]);
    }
}

impl Templates {
    fn husk(&self, args: &[&str]) -> Output {
        let output = Command::new(HUSK)
            .arg("template")
            .args(args)
            .args(["--config", self.0.at("config.toml").to_str().unwrap()])
            .output();
        output.unwrap()
    }

    fn said(&self, args: &[&str]) -> String {
        let output = self.husk(args);
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {complaint}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn build(&self) -> String {
        let namespace = self.0.namespace.clone();
        self.said(&["build", "--namespace", &namespace])
            .trim()
            .to_owned()
    }

    /// The names in the store, notes left out.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.at("templates"));
        let names = entries.into_iter().flatten().flatten();
        let names = names.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with(".tried-")).collect()
    }

    fn place(&self, key: &str) -> PathBuf {
        self.0.at("templates").join(key)
    }

    /// The key, once there is exactly one template and nothing else.
    async fn built(&self) -> String {
        for _ in 0..1000 {
            if let [name] = self.names().as_slice() {
                if !name.starts_with('.') {
                    return name.clone();
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no template: {:?}", self.names());
    }

    /// Runs a pod from start to shutdown; returns what its shim logged.
    async fn pod(&self, id: &str) -> String {
        let task = self.0.start(id, &["sh", "-c", "exit 7"], &[]).await;
        let log = Log::of(&task);
        self.0.create(&task).await;
        finish(&task).await;
        log.text()
    }

    async fn nothing_is_left(&self, task: &Task) {
        self.0.nothing_is_left(&task.address()).await;
    }
}

async fn finish(task: &Task) {
    task.run("").await.unwrap();
    assert_eq!(task.wait("").await, 7);
    task.delete("").await.unwrap();
    task.shutdown().await;
}

/// The FIFO that containerd would read.
struct Log(File);

impl Log {
    fn of(task: &Task) -> Self {
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(task.bundle.join("log"));
        Self(fifo.unwrap())
    }

    fn text(&self) -> String {
        let mut text = Vec::new();
        // Ends with EAGAIN, as it is held open for writing too.
        let _ = (&self.0).read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }
}

/// What `chattr` does.
fn immutable(file: &File, on: bool) {
    let mut flags: libc::c_int = 0;
    // SAFETY: both requests work on an int.
    unsafe {
        if libc::ioctl(file.as_raw_fd(), 0x8008_6601, &raw mut flags) == 0 {
            flags = if on { flags | 0x10 } else { flags & !0x10 };
            libc::ioctl(file.as_raw_fd(), 0x4008_6602, &raw const flags);
        }
    }
}

pub(crate) async fn the_second_pod_is_a_clone() {
    let host = host("boots").await;
    let first = host.pod("c1").await;
    assert!(
        first.contains(" booted=") && !first.contains("warn"),
        "{first}"
    );
    let key = host.built().await;
    let second = host.pod("c2").await;
    assert!(
        second.contains(" restored=") && !second.contains(" booted="),
        "{second}"
    );
    assert!(!second.contains("warn"), "{second}");
    // Every bar of the timeline, in one line.
    let line = second.lines().find(|line| line.contains("start of c2"));
    for bar in [
        "create", "vmm", "restored", "agent", "rootfs", "created", "start", "started",
    ] {
        assert!(
            line.unwrap().contains(&format!(" {bar}=")),
            "{bar}: {line:?}"
        );
    }
    let made = fs::read_to_string(host.place(&key).join("template.json")).unwrap();
    assert!(
        made.contains(&format!("\"namespace\": \"{}\"", host.0.namespace)),
        "{made}"
    );
    // A member of a pod starts no VM and wants no template.
    assert_eq!(host.names(), [key]);
}

pub(crate) async fn pods_at_once_have_one_template_built() {
    let host = host("boots").await;
    let mut tasks = Vec::new();
    for n in 0..6 {
        let task = host
            .0
            .start(&format!("c{n}"), &["sh", "-c", "exit 7"], &[])
            .await;
        tasks.push((Log::of(&task), task));
    }
    let all = tasks.iter().map(|(_, task)| async {
        host.0.create(task).await;
        task.run("").await.unwrap();
    });
    futures::future::join_all(all).await;
    let key = host.built().await;
    let mut builds = 0;
    for (log, task) in &tasks {
        assert_eq!(task.wait("").await, 7);
        // Whoever asked for it hears of it.
        for _ in 0..100 {
            builds += log.text().matches(&format!("template {key} built")).count();
            if builds > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        task.delete("").await.unwrap();
        task.shutdown().await;
    }
    assert_eq!(builds, 1);
    // The cgroup that they had in common stays, as under runc, when its maker is not the last to go.
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
        for _ in 0..100 {
            let _ = fs::remove_dir(PathBuf::from(root).join(&host.0.namespace));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    host.nothing_is_left(&tasks[0].1).await;
    let cloned = host.pod("last").await;
    assert!(cloned.contains(" restored="), "{cloned}");
}

pub(crate) async fn what_is_wrong_with_a_template_costs_no_pod() {
    for (kernel, complaint, stays) in [
        (
            "clone-unfit",
            "the VMM refuses it: state_fd: wrong checksum",
            false,
        ),
        ("clone-fails", "KVM_SET_CPUID2: no", true),
        (
            "clone-dies",
            "husk-vmm exited with status 9: husk-vmm: bus error",
            false,
        ),
        (
            "clone-silent",
            "the agent did not answer within 750 ms",
            false,
        ),
    ] {
        let host = host(kernel).await;
        let key = host.build();
        let log = host.pod("c1").await;
        assert!(
            log.contains(" booted=") && log.contains(complaint),
            "{kernel}: {log}"
        );
        // What only looks well is gone; what may be the host's fault is not.
        assert_eq!(host.names().contains(&key), stays, "{kernel}");
    }
}

pub(crate) async fn pods_of_other_sizes_are_clones_of_the_same() {
    let mut host = host("boots").await;
    let key = host.build();
    let listed = host.said(&["ls"]);
    assert!(
        listed.contains("from 256 MiB") && listed.contains("to 8"),
        "{listed}"
    );
    let usual = host.pod("usual").await;
    assert!(
        !usual.contains(" grown=") && !usual.contains("warn"),
        "{usual}"
    );
    for (id, memory_mib, vcpus) in [("large", 2048, 1), ("busy", 256, 2), ("both", 384, 8)] {
        host.0.settings.truncate(2);
        let size = format!("memory_mib = {memory_mib}\nvcpus = {vcpus}");
        host.0.settings.push(size);
        let log = host.pod(id).await;
        assert!(
            log.contains(" restored=") && log.contains(" grown=") && !log.contains("warn"),
            "{id}: {log}"
        );
    }
    assert_eq!(host.names(), [key]);
}

pub(crate) async fn a_clone_that_cannot_grow_costs_no_pod() {
    let mut host = host("clone-cannot-grow").await;
    host.build();
    host.0.settings.push("memory_mib = 512".into());
    let log = host.pod("c1").await;
    let complaint = "give the guest the pod's size: memory/probe: ENOMEM";
    assert!(log.contains(" booted=") && log.contains(complaint), "{log}");
}

pub(crate) async fn a_store_that_is_open_to_others_is_left_alone() {
    let host = host("boots").await;
    let key = host.build();
    let store = host.0.at("templates");
    let mode = |mode| fs::set_permissions(&store, Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    let log = host.pod("c1").await;
    assert!(
        log.contains(" booted=") && log.contains("no template: ") && log.contains("has mode 777"),
        "{log}"
    );
    // Neither removed nor built anew, which would help nobody.
    assert_eq!(fs::read_dir(&store).unwrap().count(), 1);
    assert!(host.said(&["ls"]).contains("has mode 777"));
    let refused = host.husk(&["build", "--namespace", &host.0.namespace]);
    let complaint = String::from_utf8(refused.stderr).unwrap();
    assert!(complaint.contains("has mode 777"), "{complaint}");
    mode(0o700);
    let log = host.pod("c2").await;
    assert!(log.contains(" restored="), "{log}");
    assert_eq!(host.names(), [key]);
}

pub(crate) async fn a_template_that_vanishes_in_use_is_used() {
    let host = host("clone-vanishes").await;
    host.build();
    let log = host.pod("c1").await;
    assert!(log.contains(" restored=") && !log.contains("warn"), "{log}");
    assert_eq!(host.names(), [".old-by-test"]);
    assert!(
        host.said(&["gc"])
            .contains("removed .old-by-test: left over")
    );
}

pub(crate) async fn a_damaged_template_is_replaced() {
    let host = host("boots").await;
    for round in 0..4 {
        let key = host.build();
        let memory = host.place(&key).join("memory");
        let read = File::open(&memory).unwrap();
        let before = fs::metadata(&memory).unwrap();
        if round == 0 {
            let wrote = File::options().write(true).open(&memory);
            let kept = fs::remove_file(&memory);
            // Where the file system can, it refuses.
            assert!(wrote.is_err() == kept.is_err());
        }
        if round < 2 {
            immutable(&read, false);
        }
        let complaint = match round {
            0 => {
                let file = File::options().write(true).open(&memory).unwrap();
                file.write_all_at(b"G", 0).unwrap();
                // Whoever hides that cannot hide the ctime.
                file.set_modified(before.modified().unwrap()).unwrap();
                "memory was changed after it was made"
            }
            1 => {
                File::options()
                    .write(true)
                    .open(&memory)
                    .unwrap()
                    .set_len(4096)
                    .unwrap();
                "memory has 4096 bytes, not 1048576"
            }
            2 => {
                fs::write(host.place(&key).join("template.json"), "{").unwrap();
                "template.json: EOF"
            }
            _ => {
                let copy = host.place(&key).join("copy");
                fs::copy(host.place(&key).join("state"), &copy).unwrap();
                fs::rename(&copy, host.place(&key).join("state")).unwrap();
                "state was changed after it was made"
            }
        };
        let row = host.said(&["ls"]);
        assert!(row.contains(&format!("no: {complaint}")), "{row}");
        let log = host.pod(&format!("c{round}")).await;
        assert!(log.contains(" booted=") && log.contains(complaint), "{log}");
        assert_eq!(log.matches("level=warn").count(), 1, "{log}");
        // The pod that missed it has a new one built.
        assert_eq!(host.built().await, key);
        assert!(host.said(&["ls"]).contains("yes"));
        host.said(&["rm", &key[..8]]);
    }
}

pub(crate) async fn a_build_that_fails_leaves_nothing_and_is_not_repeated() {
    for (kernel, complaint) in [
        (
            "save-fails",
            "save the microVM: pwrite: No space left on device",
        ),
        (
            "prepare-fails",
            "prepare the guest: mount /sys/fs/cgroup: EINVAL",
        ),
        (
            "try-fails",
            "try the new template: the VMM refuses it: state_fd: of another machine",
        ),
    ] {
        let host = host(kernel).await;
        let task = host.0.start("c1", &["sleep", "60"], &[]).await;
        let log = Log::of(&task);
        host.0.create(&task).await;
        task.run("").await.unwrap();
        let mut text = String::new();
        for _ in 0..500 {
            text += &log.text();
            if text.contains("was not built") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(text.contains(complaint), "{kernel}: {text}");
        task.kill("", libc::SIGKILL).await.unwrap();
        task.wait("").await;
        task.delete("").await.unwrap();
        task.shutdown().await;
        assert!(host.names().is_empty(), "{:?}", host.names());
        let second = host.pod("c2").await;
        assert!(
            second.contains(" booted=") && !second.contains("template"),
            "{second}"
        );
        assert!(host.names().is_empty(), "{:?}", host.names());
        // By hand it may be tried at any time, and says why it fails.
        let output = host.husk(&["build"]);
        assert_eq!(output.status.code(), Some(1));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            said.starts_with("husk template: ") && said.contains(complaint),
            "{said}"
        );
        assert_eq!(said.lines().count(), 1);
        assert!(host.names().is_empty());
        no_cgroup();
    }
}

fn no_cgroup() {
    assert!(!PathBuf::from("/sys/fs/cgroup/husk-template").exists());
    assert!(!PathBuf::from("/sys/fs/cgroup/unified/husk-template").exists());
}

pub(crate) async fn a_build_that_is_interrupted_leaves_nothing() {
    let host = host("save-hangs").await;
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let mut builder = Command::new(HUSK)
            .args(["template", "build", "--config"])
            .arg(host.0.at("config.toml"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let drafted = || {
            host.names()
                .iter()
                .any(|name| host.place(name).join("state").exists())
        };
        while !drafted() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        // Not twice at once.
        let second = host.husk(&["build"]);
        assert_eq!(second.status.code(), Some(1));
        let said = String::from_utf8(second.stderr).unwrap();
        assert!(said.contains("is being made by somebody else"), "{said}");
        assert_eq!(host.said(&["gc"]), "");
        // SAFETY: kill(2) takes numbers.
        unsafe { libc::kill(i32::try_from(builder.id()).unwrap(), signal) };
        let status = builder.wait().unwrap();
        if signal == libc::SIGINT {
            assert_eq!(status.code(), Some(1));
        } else {
            // Nobody can tidy up after that but the next one.
            while !host.said(&["gc"]).contains(": left over") {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        assert!(host.names().is_empty(), "{:?}", host.names());
        no_cgroup();
    }
}

pub(crate) async fn templates_are_seen_to_by_hand() {
    let host = host("boots").await;
    assert_eq!(host.said(&["ls"]).lines().count(), 1);
    let key = host.build();
    assert_eq!(host.build(), key);
    let table = host.said(&["ls"]);
    let row = table.lines().nth(1).unwrap();
    for cell in [
        &key[..12],
        "256 MiB",
        &format!("namespace {}", host.0.namespace),
        "yes",
    ] {
        assert!(row.contains(cell), "{cell}: {table}");
    }
    assert_eq!(host.said(&["gc"]), "");
    for (args, status, complaint) in [
        (
            &["rm", "ffffffff"][..],
            1,
            "template ffffffff: no such template",
        ),
        (&["rm"][..], 2, "rm: which template?"),
        (&["frob"][..], 2, "unknown command \"frob\""),
        (
            &["ls", "--namespace", "x"][..],
            2,
            "flag --namespace is not for ls",
        ),
        (
            &["build", "--namespace", "../x"][..],
            2,
            "--namespace \"../x\"",
        ),
    ] {
        let output = host.husk(args);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(complaint), "{args:?}: {said}");
    }
    // A node upgrade makes it garbage.
    fs::write(host.0.at("initrd"), "new").unwrap();
    assert!(host.said(&["ls"]).contains("initrd has changed"));
    let said = host.said(&["gc"]);
    assert!(
        said.starts_with(&format!("removed {key}: initrd ")),
        "{said}"
    );
    assert!(host.names().is_empty());
    no_cgroup();
}

pub(crate) async fn namespaces_share_no_template() {
    let host = host("boots").await;
    let ours = host.build();
    let other = host.said(&["build", "--namespace", "other"]);
    assert_ne!(ours, other.trim());
    let task = host
        .0
        .start(
            "c1",
            &["sh", "-c", "exit 7"],
            &[("io.kubernetes.cri.sandbox-namespace", "team-a")],
        )
        .await;
    let log = Log::of(&task);
    host.0.create(&task).await;
    finish(&task).await;
    let log = log.text();
    assert!(log.contains(" booted="), "{log}");
    // It has one of its own built.
    while host.names().len() < 3 || host.names().iter().any(|name| name.starts_with('.')) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
