//! The file server: requests of any shape, on a share in a small tmpfs. It needs root, as the server does.
//!
//! Whatever is asked, a reply is as long as it says, and everything that was open is closed in the end.

use std::{
    ffi::CStr,
    os::fd::{FromRawFd, OwnedFd},
    path::Path,
    sync::OnceLock,
};

use arbitrary::{Arbitrary, Unstructured};
use husk_vmm::fs::{FileServer, worker_init};
use vm_memory::VolatileSlice;

const SHARE: &str = "data";
const NAMES: [&[u8]; 12] = [
    b"a",
    b"b",
    b"dir",
    b"link",
    b"file",
    b"data",
    b".",
    b"..",
    b"",
    b"a/b",
    b"\xff\xfe",
    b"/",
];
const XATTRS: [&[u8]; 5] = [
    b"user.x",
    b"trusted.y",
    b"security.capability",
    b"system.posix_acl_access",
    b"",
];

#[derive(Arbitrary, Debug)]
struct Ask {
    what: What,
    /// Which of the nodes, and of the handles, that are known.
    node: u8,
    handle: u8,
    uid: u16,
    room: u16,
    /// Where request and reply are cut in two.
    cut: u8,
    /// Added to what the header says of the length.
    lie: Option<i8>,
}

#[derive(Arbitrary, Debug)]
enum What {
    Init(u32, u32),
    Lookup(u8),
    Forget(u8),
    BatchForget(u32, [u64; 2]),
    Getattr(u32),
    Setattr(u32, u64, u32, u32, u32),
    Statx(u32, u32),
    Readlink,
    Symlink(u8, u8),
    Mknod(u8, u32, u32),
    Mkdir(u8, u32),
    Unlink(u8),
    Rmdir(u8),
    Rename(u8, u8, u8, Option<u32>),
    Link(u8, u8),
    Open(u32, u32),
    Create(u8, u32, u32),
    Tmpfile(u32, u32),
    Read(u64, u32),
    Write(u64, u32, u16, u32),
    Release,
    Flush,
    Fsync(u32),
    Opendir,
    Readdir(u64, u32, bool),
    Getxattr(u8, u32),
    Listxattr(u32),
    Setxattr(u8, u32, u32, Vec<u8>),
    Removexattr(u8),
    Fallocate(u64, u64, u32),
    Lseek(u64, u32),
    Copy(u8, u64, u8, u64, u64),
    Statfs,
    Syncfs,
    Destroy,
    Reset,
    Unshare,
    Raw(u8, Vec<u8>),
}

struct Known {
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Known {
    fn node(&self, index: u8) -> u64 {
        match index {
            0 => 0,
            255 => u64::MAX,
            _ => self.nodes[usize::from(index) % self.nodes.len()],
        }
    }

    fn handle(&self, index: u8) -> u64 {
        match self.handles.len() {
            0 => index.into(),
            length => self.handles[usize::from(index) % length],
        }
    }
}

fn server() -> &'static FileServer {
    static SERVER: OnceLock<FileServer> = OnceLock::new();
    SERVER.get_or_init(|| {
        worker_init().expect("a thread that serves: as root");
        small_tmpfs(DIRECTORY);
        FileServer::new().expect("a file server: as root")
    })
}

const DIRECTORY: &CStr = c"/tmp";

/// A mount namespace of this thread's own in which `place` is a tmpfs: what the guest writes has no room.
pub(crate) fn small_tmpfs(place: &CStr) {
    let data = c"size=4m,nr_inodes=200";
    // SAFETY: flags and C strings alone.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                std::ptr::null(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            ) == 0
            && libc::mount(
                c"tmpfs".as_ptr(),
                place.as_ptr(),
                c"tmpfs".as_ptr(),
                libc::MS_NODEV | libc::MS_NOSUID,
                data.as_ptr().cast(),
            ) == 0
    };
    assert!(done, "a tmpfs: {}", std::io::Error::last_os_error());
}

fn clone_of(place: &CStr) -> OwnedFd {
    // SAFETY: a C string and flags; the descriptor is new and ours.
    unsafe {
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
        let fd = libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, place.as_ptr(), flags);
        assert!(fd >= 0, "open_tree: {}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd as libc::c_int)
    }
}

/// The share as every input finds it.
fn fresh() {
    let path = Path::new("/tmp");
    for entry in std::fs::read_dir(path).expect("the share").flatten() {
        let path = entry.path();
        let _ = match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            true => std::fs::remove_dir_all(path),
            false => std::fs::remove_file(path),
        };
    }
    // The thread that closes what a reset has left may still hold the little room that there is.
    let mut tries = 0;
    while let Err(e) = std::fs::write(path.join("file"), [b'x'; 5000]) {
        tries += 1;
        assert!(tries < 1000, "a file: {e}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::fs::create_dir(path.join("dir")).expect("a directory");
    std::fs::write(path.join("dir/a"), b"a").expect("a file");
    std::os::unix::fs::symlink("/etc/passwd", path.join("link")).expect("a link");
}

pub(crate) fn run(data: &[u8]) {
    let Ok((exclusive, asks)) = <(bool, Vec<Ask>)>::arbitrary_take_rest(Unstructured::new(data))
    else {
        return;
    };
    // One thread at a time: the server's directory is one.
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().expect("the lock");
    let server = server();
    fresh();
    server
        .share(SHARE, clone_of(DIRECTORY), exclusive)
        .expect("a share");
    let mut known = Known {
        nodes: vec![1],
        handles: Vec::new(),
    };
    let start = [What::Init(41, u32::MAX), What::Lookup(5), What::Lookup(4)];
    for (node, what) in (0..).zip(start) {
        let ask = Ask {
            what,
            node,
            handle: 0,
            uid: 0,
            room: 512,
            cut: 0,
            lie: None,
        };
        serve(server, &mut known, &ask);
    }
    for ask in &asks {
        serve(server, &mut known, ask);
    }
    let _ = server.unshare(SHARE);
    serve(
        server,
        &mut known,
        &Ask {
            what: What::Destroy,
            node: 0,
            handle: 0,
            uid: 0,
            room: 0,
            cut: 0,
            lie: None,
        },
    );
    assert!(server.save().is_ok(), "something is open at the end");
}

fn serve(server: &FileServer, known: &mut Known, ask: &Ask) {
    match ask.what {
        What::Unshare => drop(server.unshare(SHARE)),
        // On its own thread, in the device.
        What::Reset => server.reset(),
        _ => {}
    }
    let (opcode, body) = body(known, ask);
    let mut request = Vec::new();
    let length = 40 + body.len() as u32;
    let said = length.wrapping_add_signed(ask.lie.unwrap_or(0).into());
    request.extend(said.to_le_bytes());
    request.extend(opcode.to_le_bytes());
    request.extend(7u64.to_le_bytes());
    request.extend(known.node(ask.node).to_le_bytes());
    request.extend(u32::from(ask.uid).to_le_bytes());
    request.extend(0u32.to_le_bytes());
    request.extend(1u32.to_le_bytes());
    request.extend(0u32.to_le_bytes());
    request.extend(body);
    let mut reply = vec![0xa5; 16 + usize::from(ask.room)];
    let cut = |length: usize| usize::from(ask.cut).min(length);
    let at = cut(request.len());
    let (head, tail) = request.split_at_mut(at);
    let request = [VolatileSlice::from(head), VolatileSlice::from(tail)];
    let at = cut(reply.len());
    let (head, tail) = reply.split_at_mut(at);
    let written = server.handle(
        &request,
        &[VolatileSlice::from(head), VolatileSlice::from(tail)],
    );
    let Ok(written) = written else {
        return;
    };
    assert!(written <= reply.len(), "a reply longer than its room");
    assert!(
        reply[written..].iter().all(|byte| *byte == 0xa5) || matches!(ask.what, What::Read(..))
    );
    if written == 0 {
        return;
    }
    let number = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().expect("4 bytes"));
    assert_eq!(number(0) as usize, written, "a reply says how long it is");
    assert!((number(4) as i32) <= 0 && number(4) as i32 > -4096);
    if number(4) != 0 {
        return;
    }
    let wide = |at: usize| {
        let bytes = reply.get(at..at + 8).filter(|_| at + 8 <= written);
        bytes.map(|bytes| u64::from_le_bytes(bytes.try_into().expect("8 bytes")))
    };
    let (node, handle) = match ask.what {
        What::Lookup(_)
        | What::Mkdir(..)
        | What::Mknod(..)
        | What::Symlink(..)
        | What::Link(..) => (wide(16), None),
        What::Create(..) | What::Tmpfile(..) => (wide(16), wide(16 + 128)),
        What::Open(..) | What::Opendir => (None, wide(16)),
        _ => (None, None),
    };
    known.nodes.extend(node);
    known.handles.extend(handle);
}

/// Opcode and arguments (Linux, include/uapi/linux/fuse.h).
fn body(known: &Known, ask: &Ask) -> (u32, Vec<u8>) {
    let mut body = Body(Vec::new());
    let handle = known.handle(ask.handle);
    let opcode = match &ask.what {
        What::Init(minor, flags) => {
            body.u32(7).u32(*minor).u32(4096).u32(*flags).zeros(48);
            26
        }
        What::Lookup(name) => body.name(*name).is(1),
        What::Forget(count) => body.u64((*count).into()).is(2),
        What::BatchForget(count, nodes) => {
            body.u32(*count).u32(0);
            for node in nodes {
                body.u64(known.node(*node as u8)).u64(*node);
            }
            42
        }
        What::Getattr(flags) => body.u32(*flags).u32(0).u64(handle).is(3),
        What::Setattr(valid, size, mode, uid, seconds) => {
            body.u32(*valid).u32(0).u64(handle).u64(*size).u64(0);
            body.u64((*seconds).into())
                .u64(1)
                .u64(2)
                .u32(*seconds)
                .u32(3)
                .u32(4);
            body.u32(*mode).u32(0).u32(*uid).u32(*uid).u32(0).is(4)
        }
        What::Statx(flags, mask) => body.u32(0).u32(0).u64(handle).u32(*flags).u32(*mask).is(52),
        What::Readlink => 5,
        What::Symlink(name, target) => body.name(*name).name(*target).is(6),
        What::Mknod(name, mode, device) => body
            .u32(*mode)
            .u32(*device)
            .u32(0o22)
            .u32(0)
            .name(*name)
            .is(8),
        What::Mkdir(name, mode) => body.u32(*mode).u32(0).name(*name).is(9),
        What::Unlink(name) => body.name(*name).is(10),
        What::Rmdir(name) => body.name(*name).is(11),
        What::Rename(to, old, new, None) => body.u64(known.node(*to)).name(*old).name(*new).is(12),
        What::Rename(to, old, new, Some(flags)) => {
            body.u64(known.node(*to)).u32(*flags).u32(0);
            body.name(*old).name(*new).is(45)
        }
        What::Link(node, name) => body.u64(known.node(*node)).name(*name).is(13),
        What::Open(flags, more) => body.u32(*flags).u32(*more).is(14),
        What::Create(name, flags, mode) => {
            body.u32(*flags).u32(*mode).u32(0).u32(0).name(*name).is(35)
        }
        What::Tmpfile(flags, mode) => body.u32(*flags).u32(*mode).u32(0).u32(0).name(8).is(51),
        What::Read(offset, size) => body.u64(handle).u64(*offset).u32(*size).zeros(20).is(15),
        What::Write(offset, flags, length, said) => {
            let said = if said % 4 == 0 {
                *said
            } else {
                (*length).into()
            };
            body.u64(handle).u64(*offset).u32(said).u32(*flags).u64(0);
            body.u32(*flags >> 8).u32(0).zeros((*length).into()).is(16)
        }
        What::Release => {
            body.u64(handle).zeros(16);
            if ask.node % 2 == 0 { 18 } else { 29 }
        }
        What::Flush => body.u64(handle).zeros(16).is(25),
        What::Fsync(flags) => {
            body.u64(handle).u32(*flags).u32(0);
            if ask.node % 2 == 0 { 20 } else { 30 }
        }
        What::Opendir => body.u32(0).u32(0).is(27),
        What::Readdir(offset, size, plus) => {
            body.u64(handle).u64(*offset).u32(*size % 8192).zeros(20);
            if *plus { 44 } else { 28 }
        }
        What::Getxattr(name, size) => body.u32(*size).u32(0).xattr(*name).is(22),
        What::Listxattr(size) => body.u32(*size).u32(0).is(23),
        What::Setxattr(name, flags, more, value) => {
            body.u32(value.len() as u32)
                .u32(*flags)
                .u32(*more)
                .u32(0)
                .xattr(*name);
            body.0.extend(value);
            21
        }
        What::Removexattr(name) => body.xattr(*name).is(24),
        What::Fallocate(offset, length, mode) => body
            .u64(handle)
            .u64(*offset)
            .u64(*length)
            .u32(*mode)
            .u32(0)
            .is(43),
        What::Lseek(offset, whence) => body.u64(handle).u64(*offset).u32(*whence % 6).u32(0).is(46),
        What::Copy(to, from_at, node, to_at, length) => {
            body.u64(handle)
                .u64(*from_at)
                .u64(known.node(*node))
                .u64(known.handle(*to));
            body.u64(*to_at).u64(*length).u64(0).is(47)
        }
        What::Statfs => 17,
        What::Syncfs => body.u64(0).is(50),
        What::Destroy => 38,
        What::Reset | What::Unshare => 3,
        What::Raw(opcode, bytes) => {
            body.0.extend(bytes);
            u32::from(opcode % 64)
        }
    };
    (opcode, body.0)
}

struct Body(Vec<u8>);

impl Body {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn zeros(&mut self, count: usize) -> &mut Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
    /// One of [`NAMES`], or where `index` says so a longer one, with its NUL.
    fn name(&mut self, index: u8) -> &mut Self {
        match NAMES.get(usize::from(index % 16)) {
            Some(name) => self.0.extend(*name),
            None => self.0.extend(vec![b'n'; usize::from(index) + 60]),
        }
        self.0.push(0);
        self
    }
    fn xattr(&mut self, index: u8) -> &mut Self {
        self.0.extend(XATTRS[usize::from(index) % XATTRS.len()]);
        self.0.push(0);
        self
    }
    /// For a last word.
    fn is(&mut self, opcode: u32) -> u32 {
        opcode
    }
}
