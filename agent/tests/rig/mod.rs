//! What the tests stand on: an agent in this process, a client of it, an image, and streams.
//!
//! One agent for all tests of the process: it reaps every child, so there can be no second.

use std::collections::HashMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use husk_agent::container::Ground;
use husk_agent::events::Events;
use husk_agent::pod::Pod;
use husk_agent::reaper::Reaper;
use husk_agent::service::Service;
use husk_agent::streams::Arrivals;
use husk_agent::{connection, launch};
use husk_proto::agent::*;
use husk_proto::agent_ttrpc::AgentClient;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, Notify, mpsc};
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

const SPEC: &str = include_str!("../../src/spec/ctr-1.7.json");
static NUMBER: AtomicU64 = AtomicU64::new(1);

pub(crate) type Answer<T> = Result<T, (String, String)>;

/// Statuses by container and exec id, and word of a new one.
type Exits = (Mutex<HashMap<(String, String), u32>>, Notify);

pub(crate) struct Rig {
    handle: tokio::runtime::Handle,
    client: AgentClient,
    sockets: mpsc::UnboundedSender<OwnedFd>,
    exits: Arc<Exits>,
    image: PathBuf,
    cgroups: PathBuf,
    /// How Prepare went.
    pub(crate) rehearsed: Result<(), String>,
}

/// The rig, or nothing but a loud word where this machine cannot carry it.
pub(crate) fn rig() -> Option<&'static Rig> {
    static RIG: OnceLock<Option<Rig>> = OnceLock::new();
    RIG.get_or_init(|| match Rig::new() {
        Ok(rig) => Some(rig),
        Err(lack) => {
            eprintln!("SKIPPED: no containers here: {lack}");
            None
        }
    })
    .as_ref()
}

impl Rig {
    fn new() -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("needs root".into());
        }
        let cgroups = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(PathBuf::from);
        let cgroups = cgroups
            .into_iter()
            .find(|path| path.join("cgroup.controllers").exists());
        let cgroups = cgroups.ok_or("needs cgroup v2")?;
        let image = std::env::temp_dir().join(format!("husk-agent-test-{}", std::process::id()));
        sweep(&cgroups);
        make_image(&image)?;

        let (ready, made) = std::sync::mpsc::channel();
        let exits: Arc<Exits> = Arc::default();
        let ground_cgroups = cgroups.clone();
        let collected = Arc::clone(&exits);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let (sockets, mut incoming) = mpsc::unbounded_channel();
            let handle = runtime.handle().clone();
            tokio::task::LocalSet::new().block_on(&runtime, async move {
                let arrivals = Rc::new(Arrivals::default());
                let reaper = Rc::new(Reaper::default());
                tokio::task::spawn_local(Rc::clone(&reaper).run());
                let events = Arc::new(Events::default());
                let program = Path::new(env!("CARGO_BIN_EXE_husk-agent"));
                let ground = Ground {
                    program: launch::program(program).unwrap(),
                    path: program.into(),
                    cgroups: ground_cgroups,
                    reaper,
                    arrivals: Rc::clone(&arrivals),
                    events: Arc::clone(&events),
                };
                let door = Pod::open(ground, || Ok(()));
                let (ours, theirs) = UnixStream::pair().unwrap();
                let service = Service { door, events };
                tokio::task::spawn_local(connection::serve(theirs, Arc::new(service)));
                let client = AgentClient::new(Client::new(Socket::new(ours)));
                // Before anybody listens to events, as in a template.
                let rehearsed = client.prepare(Rig::context(), &Default::default()).await;
                tokio::spawn(collect(client.clone(), collected));
                ready.send((handle, client, sockets, rehearsed)).unwrap();
                while let Some(socket) = incoming.recv().await {
                    arrivals.connection(socket);
                }
            });
        });
        let (handle, client, sockets, rehearsed) =
            made.recv().map_err(|error| error.to_string())?;
        Ok(Self {
            handle,
            client,
            sockets,
            exits,
            image,
            cgroups,
            rehearsed: rehearsed.map(drop).map_err(|error| error.to_string()),
        })
    }

    pub(crate) fn run<F: Future<Output = ()>>(&self, test: F) {
        let patience = Duration::from_secs(120);
        self.handle.block_on(async {
            tokio::time::timeout(patience, test)
                .await
                .expect("the test takes too long")
        });
    }

    pub(crate) fn context() -> Context {
        ttrpc::context::with_timeout(60_000_000_000)
    }

    pub(crate) fn client(&self) -> &AgentClient {
        &self.client
    }

    pub(crate) fn image(&self) -> &Path {
        &self.image
    }

    /// An image of its own, to be spoilt.
    pub(crate) fn fresh_image(&self, name: &str) -> PathBuf {
        let path = self.image.with_extension(name);
        make_image(&path).unwrap();
        path
    }

    pub(crate) fn cgroup(&self, path: &str) -> PathBuf {
        self.cgroups.join(path.trim_start_matches('/'))
    }

    pub(crate) fn spec(&self, args: &[&str]) -> Value {
        let mut spec: Value = serde_json::from_str(SPEC).unwrap();
        spec["process"]["args"] = json!(args);
        spec["root"]["path"] = json!(self.image);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        spec["linux"]["cgroupsPath"] =
            json!(format!("/husk-agent-test-{}/{number}", std::process::id()));
        spec
    }

    pub(crate) fn process(&self, args: &[&str]) -> Value {
        json!({"args": args, "cwd": "/", "env": ["PATH=/bin:/usr/bin"], "user": {"uid": 0, "gid": 0}})
    }

    /// The host's side of the streams a process needs.
    fn io(&self, terminal: bool) -> Io {
        let stream = || {
            let id = NUMBER.fetch_add(1, Ordering::Relaxed);
            let (ours, theirs) = StdStream::pair().unwrap();
            self.sockets.send(theirs.into()).unwrap();
            std::io::Write::write_all(&mut &ours, &id.to_le_bytes()).unwrap();
            ours.set_nonblocking(true).unwrap();
            let (read, write) = UnixStream::from_std(ours).unwrap().into_split();
            (id, read, write)
        };
        if terminal {
            let (id, read, write) = stream();
            return Io {
                stdio: Stdio {
                    terminal: id,
                    ..Stdio::default()
                },
                stdin: AsyncMutex::new((None, Some(write))),
                stdout: AsyncMutex::new(Some(read)),
                stderr: AsyncMutex::new(None),
            };
        }
        let ((i, i_read, stdin), (o, stdout, o_write), (e, stderr, e_write)) =
            (stream(), stream(), stream());
        // A shim only reads those; forgetting must not close its side of them.
        o_write.forget();
        e_write.forget();
        Io {
            stdio: Stdio {
                stdin: i,
                stdout: o,
                stderr: e,
                ..Stdio::default()
            },
            stdin: AsyncMutex::new((Some(i_read), Some(stdin))),
            stdout: AsyncMutex::new(Some(stdout)),
            stderr: AsyncMutex::new(Some(stderr)),
        }
    }

    pub(crate) async fn create(&self, spec: Value) -> Answer<Created> {
        let id = format!("c{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.create_as(&id, spec).await
    }

    pub(crate) async fn create_as(&self, id: &str, spec: Value) -> Answer<Created> {
        let io = self.io(spec["process"]["terminal"] == json!(true));
        self.create_with(id, spec, &io).await?;
        Ok(Created { id: id.into(), io })
    }

    pub(crate) async fn create_with(&self, id: &str, spec: Value, io: &Io) -> Answer<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: serde_json::to_vec(&spec).unwrap(),
            stdio: Some(io.stdio.clone()).into(),
            ..Default::default()
        };
        self.client
            .create_container(Self::context(), &request)
            .await
            .map(drop)
            .map_err(words)
    }

    /// A running container that does nothing.
    pub(crate) async fn sleeper(&self) -> String {
        let created = self.create(self.spec(&["sleep", "1000"])).await.unwrap();
        self.start(&created.id, "").await.unwrap();
        created.id
    }

    /// From creation to deletion.
    pub(crate) async fn run_container(&self, spec: Value) -> Done {
        let c = self.create(spec).await.unwrap();
        self.start(&c.id, "").await.unwrap();
        let (out, err) = c.io.rest().await;
        let status = self.exit(&c.id, "").await;
        self.delete(&c.id, "").await.unwrap();
        Done { status, out, err }
    }

    /// Kills and deletes.
    pub(crate) async fn remove(&self, id: &str) {
        self.signal(id, "", 9, true).await.ok();
        self.exit(id, "").await;
        self.delete(id, "").await.unwrap();
    }

    pub(crate) async fn exec(&self, id: &str, exec: &str, process: Value) -> Answer<Io> {
        let io = self.io(process["terminal"] == json!(true));
        self.exec_with(id, exec, process, &io).await?;
        Ok(io)
    }

    pub(crate) async fn exec_with(
        &self,
        id: &str,
        exec: &str,
        process: Value,
        io: &Io,
    ) -> Answer<()> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: serde_json::to_vec(&process).unwrap(),
            stdio: Some(io.stdio.clone()).into(),
            ..Default::default()
        };
        self.client
            .exec(Self::context(), &request)
            .await
            .map(drop)
            .map_err(words)
    }

    pub(crate) async fn start(&self, id: &str, exec: &str) -> Answer<u32> {
        let request = StartRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client
            .start(Self::context(), &request)
            .await
            .map(|started| started.pid)
            .map_err(words)
    }

    pub(crate) async fn signal(&self, id: &str, exec: &str, signal: u32, all: bool) -> Answer<()> {
        let request = SignalRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.client
            .signal(Self::context(), &request)
            .await
            .map(drop)
            .map_err(words)
    }

    pub(crate) async fn resize(&self, id: &str, exec: &str, columns: u32, rows: u32) -> Answer<()> {
        let request = ResizePtyRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            columns,
            rows,
            ..Default::default()
        };
        self.client
            .resize_pty(Self::context(), &request)
            .await
            .map(drop)
            .map_err(words)
    }

    pub(crate) async fn delete(&self, id: &str, exec: &str) -> Answer<()> {
        let request = DeleteRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            ..Default::default()
        };
        self.client
            .delete(Self::context(), &request)
            .await
            .map(drop)
            .map_err(words)
    }

    /// Of all processes of the container; those in cgroups below its own are not among them.
    pub(crate) fn pids(&self, spec: &Value) -> Vec<u32> {
        let path = spec["linux"]["cgroupsPath"].as_str().unwrap();
        let text = fs::read_to_string(self.cgroup(path).join("cgroup.procs")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    pub(crate) async fn pause(&self, id: &str, pause: bool) -> Answer<()> {
        if pause {
            let request = PauseRequest {
                container_id: id.into(),
                ..Default::default()
            };
            self.client
                .pause(Self::context(), &request)
                .await
                .map(drop)
                .map_err(words)
        } else {
            let request = ResumeRequest {
                container_id: id.into(),
                ..Default::default()
            };
            self.client
                .resume(Self::context(), &request)
                .await
                .map(drop)
                .map_err(words)
        }
    }

    pub(crate) async fn statistics(&self, id: &str) -> HashMap<String, String> {
        let request = StatsRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .stats(Self::context(), &request)
            .await
            .unwrap()
            .files
    }

    /// Waits for the event.
    /// Whether an event named this container.
    pub(crate) fn knows_of(&self, id: &str) -> bool {
        self.exits
            .0
            .lock()
            .unwrap()
            .keys()
            .any(|(known, _)| known == id)
    }

    pub(crate) async fn exit(&self, id: &str, exec: &str) -> u32 {
        let (exits, news) = &*self.exits;
        let wait = async {
            loop {
                let notified = news.notified();
                if let Some(status) = exits.lock().unwrap().get(&(id.into(), exec.into())) {
                    return *status;
                }
                notified.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait)
            .await
            .unwrap_or_else(|_| panic!("no exit of {id} {exec}"))
    }
}

async fn collect(client: AgentClient, exits: Arc<Exits>) {
    let mut events = client
        .events(Rig::unbounded(), &EventsRequest::default())
        .await
        .unwrap();
    while let Ok(Some(event)) = events.recv().await {
        if event.has_exit() {
            let exit = event.exit();
            let key = (exit.container_id.clone(), exit.exec_id.clone());
            let before = exits.0.lock().unwrap().insert(key.clone(), exit.status);
            assert!(before.is_none(), "a second exit of {key:?}");
            exits.1.notify_waiters();
        }
    }
}

impl Rig {
    fn unbounded() -> Context {
        Context::default()
    }
}

fn words(error: ttrpc::Error) -> (String, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            (format!("{:?}", status.code()), status.message().into())
        }
        other => ("TRANSPORT".into(), other.to_string()),
    }
}

#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) id: String,
    pub(crate) io: Io,
}

pub(crate) struct Done {
    pub(crate) status: u32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The host's side of a process's streams.
#[derive(Debug)]
pub(crate) struct Io {
    stdio: Stdio,
    stdin: AsyncMutex<(Option<OwnedReadHalf>, Option<OwnedWriteHalf>)>,
    stdout: AsyncMutex<Option<OwnedReadHalf>>,
    stderr: AsyncMutex<Option<OwnedReadHalf>>,
}

impl Io {
    pub(crate) fn none() -> Self {
        Self {
            stdio: Stdio::default(),
            stdin: AsyncMutex::new((None, None)),
            stdout: AsyncMutex::new(None),
            stderr: AsyncMutex::new(None),
        }
    }

    pub(crate) async fn line(&self) -> String {
        let mut stdout = self.stdout.lock().await;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.push(stdout.as_mut().unwrap().read_u8().await.unwrap());
        }
        String::from_utf8(line).unwrap()
    }

    pub(crate) async fn write(&self, bytes: &[u8]) {
        self.stdin
            .lock()
            .await
            .1
            .as_mut()
            .unwrap()
            .write_all(bytes)
            .await
            .unwrap();
    }

    /// What is left of stdout and stderr, to their ends. Terminals have no input any more.
    pub(crate) async fn rest(&self) -> (String, String) {
        async fn whole(half: &AsyncMutex<Option<OwnedReadHalf>>) -> String {
            let mut bytes = Vec::new();
            if let Some(half) = half.lock().await.as_mut() {
                half.read_to_end(&mut bytes).await.ok();
            }
            String::from_utf8_lossy(&bytes).into_owned()
        }
        tokio::join!(whole(&self.stdout), whole(&self.stderr))
    }

    /// Writes all of `bytes`, closes stdin, and reads stdout to its end meanwhile.
    pub(crate) async fn through(&self, bytes: &[u8]) -> Vec<u8> {
        let write = async {
            let mut stdin = self.stdin.lock().await.1.take().unwrap();
            stdin.write_all(bytes).await.unwrap();
        };
        let read = async {
            let mut back = Vec::with_capacity(bytes.len());
            self.stdout
                .lock()
                .await
                .as_mut()
                .unwrap()
                .read_to_end(&mut back)
                .await
                .unwrap();
            back
        };
        tokio::join!(write, read).1
    }

    /// Reads what is there, until nothing has come for a while; how many bytes that was.
    pub(crate) async fn drained(&self) -> usize {
        let mut stdout = self.stdout.lock().await;
        let mut buffer = vec![0; 1 << 20];
        let mut count = 0;
        let half = stdout.as_mut().unwrap();
        while let Ok(Ok(read)) =
            tokio::time::timeout(Duration::from_millis(100), half.read(&mut buffer)).await
        {
            if read == 0 {
                break;
            }
            count += read;
        }
        count
    }

    /// Returns when the agent has closed stdin.
    pub(crate) async fn stdin_closed(&self) {
        let mut byte = [0];
        let mut stdin = self.stdin.lock().await;
        assert_eq!(
            stdin.0.as_mut().unwrap().read(&mut byte).await.unwrap_or(0),
            0
        );
    }
}

/// Children of this process that have ended and were not reaped.
pub(crate) fn zombies() -> Vec<u32> {
    let is_zombie = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_whitespace();
        let state = fields.next()?;
        let parent: u32 = fields.next()?.parse().ok()?;
        (state == "Z" && parent == std::process::id()).then_some(pid)
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(is_zombie)
        .collect()
}

/// Clears away what earlier runs that failed have left.
fn sweep(cgroups: &Path) {
    let dead = |name: &str| {
        let pid = name.strip_prefix("husk-agent-test-")?.split('.').next()?;
        (!Path::new("/proc").join(pid).exists()).then_some(())
    };
    // A rehearsal keeps it, in a guest for good.
    fs::remove_dir(cgroups.join("husk-template")).ok();
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten();
    for left in entries(cgroups).filter(|left| dead(&left.file_name().to_string_lossy()).is_some())
    {
        fs::write(left.path().join("cgroup.kill"), "1").ok();
        std::thread::sleep(Duration::from_millis(100));
        entries(&left.path()).for_each(|below| drop(fs::remove_dir(below.path())));
        fs::remove_dir(left.path()).ok();
    }
    for left in entries(&std::env::temp_dir())
        .filter(|left| dead(&left.file_name().to_string_lossy()).is_some())
    {
        fs::remove_dir_all(left.path()).ok();
    }
}

fn make_image(path: &Path) -> Result<(), String> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .find(|path| Path::new(path).exists());
    let busybox = busybox.ok_or("needs busybox-static: apt-get install busybox-static")?;
    let make = || -> std::io::Result<()> {
        for directory in [
            "bin", "etc", "home/u", "proc", "root", "tmp", "dev", "sys", "run",
        ] {
            fs::create_dir_all(path.join(directory))?;
        }
        fs::copy(busybox, path.join("bin/busybox"))?;
        for applet in [
            "sh", "cat", "echo", "sleep", "ls", "id", "grep", "true", "yes", "head", "tr", "tty",
            "stty", "wc", "ps", "hostname", "readlink", "mknod", "touch", "mkdir", "kill", "pwd",
            "test", "cut", "chmod",
        ] {
            fs::hard_link(path.join("bin/busybox"), path.join("bin").join(applet))?;
        }
        fs::write(
            path.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/sh\nu:x:1000:1000::/home/u:/bin/sh\n",
        )?;
        for (name, text) in [
            ("garbage", "\u{1}nothing that runs"),
            ("nointerpreter", "#!/no/such/interpreter\n"),
        ] {
            fs::write(path.join(name), text)?;
            fs::set_permissions(
                path.join(name),
                std::os::unix::fs::PermissionsExt::from_mode(0o755),
            )?;
        }
        fs::set_permissions(
            path.join("root"),
            std::os::unix::fs::PermissionsExt::from_mode(0o700),
        )
    };
    make().map_err(|error| format!("make {}: {error}", path.display()))
}
