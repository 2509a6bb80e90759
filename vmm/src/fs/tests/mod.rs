//! The file server against real directories, driven by a small FUSE client of its own.
//!
//! They need root: detached mounts, other users' files, overlayfs. Without it they fail at once,
//! naming what is missing; `make test` runs as root.

mod attributes;
mod confinement;
mod data;
mod directories;
mod hostile;
mod names;
mod overlayfs;
mod races;
mod shares;
mod xattributes;

use std::cell::Cell;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::VolatileSlice;

use super::sys;
use super::wire::{self, *};
use super::{FileServer, worker_init};

/// A directory of the host, shared as "data", and a guest that has looked it up.
struct Host {
    dir: PathBuf,
    server: FileServer,
    root: u64,
}

impl Host {
    fn new() -> Host {
        Host::sharing(true)
    }

    fn sharing(exclusive: bool) -> Host {
        let dir = scratch();
        let server = server();
        server.share("data", clone_of(&dir), exclusive).unwrap();
        let root = Client::new(&server)
            .init()
            .lookup(ROOT_ID, "data")
            .unwrap()
            .nodeid;
        Host { dir, server, root }
    }

    /// As root of the guest.
    fn client(&self) -> Client<'_> {
        Client::new(&self.server)
    }

    /// As an ordinary user of the guest.
    fn user(&self, uid: u32, gid: u32) -> Client<'_> {
        Client {
            uid,
            gid,
            ..Client::new(&self.server)
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A new, empty directory.
fn scratch() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // SAFETY: takes nothing.
    let uid = unsafe { libc::geteuid() };
    assert_eq!(uid, 0, "the file server's tests need root");
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("husk-fs-{}-{number}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    dir
}

fn server() -> FileServer {
    worker_init().unwrap();
    FileServer::new().unwrap()
}

fn c_path(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

fn clone_of(path: &Path) -> OwnedFd {
    sys::clone_mount(&c_path(path)).unwrap()
}

/// The guest's side of the protocol. Requests and replies are cut into slices at odd places.
struct Client<'a> {
    server: &'a FileServer,
    unique: Cell<u64>,
    uid: u32,
    gid: u32,
}

type Errno = i32;

impl<'a> Client<'a> {
    fn new(server: &'a FileServer) -> Client<'a> {
        worker_init().unwrap();
        Client {
            server,
            unique: Cell::new(1),
            uid: 0,
            gid: 0,
        }
    }

    fn message(&self, opcode: u32, nodeid: u64, args: &[&[u8]]) -> Vec<u8> {
        let body = args.concat();
        let unique = self.unique.replace(self.unique.get() + 1);
        let header = InHeader {
            len: (40 + body.len()) as u32,
            opcode,
            unique,
            nodeid,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            ..Default::default()
        };
        [wire::as_bytes(&header), &body].concat()
    }

    /// Sends one request; returns what is behind the reply's header, or the positive error.
    fn call(
        &self,
        opcode: u32,
        nodeid: u64,
        args: &[&[u8]],
        room: usize,
    ) -> Result<Vec<u8>, Errno> {
        let mut request = self.message(opcode, nodeid, args);
        let mut reply = vec![0xaa; 16 + room];
        let (head, tail) = request.split_at_mut(13);
        let request = [VolatileSlice::from(head), VolatileSlice::from(tail)];
        let (head, tail) = reply.split_at_mut(9);
        let (middle, end) = tail.split_at_mut(tail.len() / 2);
        let slices = [
            VolatileSlice::from(head),
            VolatileSlice::from(middle),
            VolatileSlice::from(end),
        ];
        let len = self.server.handle(&request, &slices).unwrap();
        let header: OutHeader = wire::from_bytes(&reply).unwrap();
        assert_eq!(header.len as usize, len);
        assert_eq!(header.unique, self.unique.get() - 1);
        assert!(len <= reply.len() && header.error <= 0);
        match header.error {
            0 => Ok(reply[16..len].to_vec()),
            error => {
                assert_eq!(len, 16, "an error is the header alone");
                Err(-error)
            }
        }
    }

    fn get<T: Wire>(&self, opcode: u32, nodeid: u64, args: &[&[u8]]) -> Result<T, Errno> {
        let bytes = self.call(opcode, nodeid, args, size_of::<T>())?;
        assert_eq!(bytes.len(), size_of::<T>());
        Ok(wire::from_bytes(&bytes).unwrap())
    }

    fn done(&self, opcode: u32, nodeid: u64, args: &[&[u8]]) -> Result<(), Errno> {
        self.call(opcode, nodeid, args, 0)
            .map(|bytes| assert!(bytes.is_empty()))
    }

    /// With all that Linux 6.12 offers.
    fn init(self) -> Self {
        let ask = InitIn {
            major: 7,
            minor: 41,
            max_readahead: 128 << 10,
            flags: u32::MAX,
        };
        let ext = InitInExt {
            flags2: u32::MAX,
            ..Default::default()
        };
        let reply: InitOut = self
            .get(
                opcode::INIT,
                0,
                &[wire::as_bytes(&ask), wire::as_bytes(&ext)],
            )
            .unwrap();
        assert_eq!(
            (reply.major, reply.minor, reply.max_write),
            (7, 41, 1 << 20)
        );
        self
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<EntryOut, Errno> {
        self.get(opcode::LOOKUP, parent, &[name.as_bytes(), b"\0"])
    }

    /// The node id at the end of a path.
    fn walk(&self, start: u64, path: &str) -> Result<u64, Errno> {
        path.split('/')
            .try_fold(start, |at, name| match self.lookup(at, name)?.nodeid {
                0 => Err(libc::ENOENT),
                nodeid => Ok(nodeid),
            })
    }

    fn getattr(&self, node: u64) -> Result<Attr, Errno> {
        // fuse_getattr_in: of the inode, not of a handle.
        self.get::<AttrOut>(opcode::GETATTR, node, &[&[0; 16]])
            .map(|out| out.attr)
    }

    fn setattr(&self, node: u64, ask: SetattrIn) -> Result<Attr, Errno> {
        self.get::<AttrOut>(opcode::SETATTR, node, &[wire::as_bytes(&ask)])
            .map(|out| out.attr)
    }

    fn mkdir(&self, parent: u64, name: &str, mode: u32, umask: u32) -> Result<EntryOut, Errno> {
        let ask = MkdirIn { mode, umask };
        self.get(
            opcode::MKDIR,
            parent,
            &[wire::as_bytes(&ask), name.as_bytes(), b"\0"],
        )
    }

    fn mknod(&self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<EntryOut, Errno> {
        let ask = MknodIn {
            mode,
            rdev,
            ..Default::default()
        };
        self.get(
            opcode::MKNOD,
            parent,
            &[wire::as_bytes(&ask), name.as_bytes(), b"\0"],
        )
    }

    fn symlink(&self, parent: u64, name: &str, text: &str) -> Result<EntryOut, Errno> {
        let args = [name.as_bytes(), b"\0", text.as_bytes(), b"\0"];
        self.get(opcode::SYMLINK, parent, &args)
    }

    fn link(&self, node: u64, parent: u64, name: &str) -> Result<EntryOut, Errno> {
        let ask = LinkIn { oldnodeid: node };
        self.get(
            opcode::LINK,
            parent,
            &[wire::as_bytes(&ask), name.as_bytes(), b"\0"],
        )
    }

    fn unlink(&self, parent: u64, name: &str) -> Result<(), Errno> {
        self.done(opcode::UNLINK, parent, &[name.as_bytes(), b"\0"])
    }

    fn rename(
        &self,
        from: (u64, &str),
        (newdir, new_name): (u64, &str),
        flags: u32,
    ) -> Result<(), Errno> {
        let ask = Rename2In {
            newdir,
            flags,
            padding: 0,
        };
        let args = [
            wire::as_bytes(&ask),
            from.1.as_bytes(),
            b"\0",
            new_name.as_bytes(),
            b"\0",
        ];
        self.done(opcode::RENAME2, from.0, &args)
    }

    fn create(
        &self,
        parent: u64,
        name: &str,
        flags: i32,
        (mode, umask): (u32, u32),
    ) -> Result<(EntryOut, OpenOut), Errno> {
        self.make_open(opcode::CREATE, parent, name, flags, (mode, umask))
    }

    fn make_open(
        &self,
        opcode: u32,
        parent: u64,
        name: &str,
        flags: i32,
        (mode, umask): (u32, u32),
    ) -> Result<(EntryOut, OpenOut), Errno> {
        let ask = CreateIn {
            flags: flags as u32,
            mode,
            umask,
            open_flags: 0,
        };
        let args = [wire::as_bytes(&ask), name.as_bytes(), b"\0"];
        let bytes = self.call(opcode, parent, &args, 144)?;
        Ok((
            wire::from_bytes(&bytes).unwrap(),
            wire::from_bytes(&bytes[128..]).unwrap(),
        ))
    }

    fn open(&self, node: u64, flags: i32) -> Result<OpenOut, Errno> {
        let ask = OpenIn {
            flags: flags as u32,
            open_flags: 0,
        };
        self.get(opcode::OPEN, node, &[wire::as_bytes(&ask)])
    }

    fn opendir(&self, node: u64) -> Result<OpenOut, Errno> {
        self.get(opcode::OPENDIR, node, &[wire::as_bytes(&OpenIn::default())])
    }

    fn read(&self, node: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let ask = ReadIn {
            fh,
            offset,
            size,
            ..Default::default()
        };
        self.call(opcode::READ, node, &[wire::as_bytes(&ask)], size as usize)
    }

    fn write(&self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, Errno> {
        self.write_with(
            node,
            WriteIn {
                fh,
                offset,
                ..Default::default()
            },
            data,
        )
    }

    fn write_with(&self, node: u64, ask: WriteIn, data: &[u8]) -> Result<u32, Errno> {
        let ask = WriteIn {
            size: data.len() as u32,
            ..ask
        };
        let out: WriteOut = self.get(opcode::WRITE, node, &[wire::as_bytes(&ask), data])?;
        Ok(out.size)
    }

    fn release(&self, node: u64, fh: u64) -> Result<(), Errno> {
        let ask = ReleaseIn {
            fh,
            ..Default::default()
        };
        self.done(opcode::RELEASE, node, &[wire::as_bytes(&ask)])
    }

    fn forget(&self, node: u64, nlookup: u64) {
        let mut message = self.message(
            opcode::FORGET,
            node,
            &[wire::as_bytes(&ForgetIn { nlookup })],
        );
        let request = [VolatileSlice::from(&mut message[..])];
        assert_eq!(self.server.handle(&request, &[]).unwrap(), 0);
    }

    /// One reply of READDIR, or with `plus` of READDIRPLUS.
    fn list(
        &self,
        node: u64,
        fh: u64,
        offset: u64,
        size: u32,
        plus: bool,
    ) -> Result<Vec<Listed>, Errno> {
        let opcode = if plus {
            opcode::READDIRPLUS
        } else {
            opcode::READDIR
        };
        let ask = ReadIn {
            fh,
            offset,
            size,
            ..Default::default()
        };
        let bytes = self.call(opcode, node, &[wire::as_bytes(&ask)], size as usize)?;
        let mut rest = &bytes[..];
        let mut entries = Vec::new();
        while !rest.is_empty() {
            let head = if plus { 128 } else { 0 };
            let entry: EntryOut = if plus {
                wire::from_bytes(rest).unwrap()
            } else {
                EntryOut::default()
            };
            let dirent: Dirent = wire::from_bytes(&rest[head..]).unwrap();
            let name = rest[head + 24..head + 24 + dirent.namelen as usize].to_vec();
            entries.push(Listed {
                name,
                off: dirent.off,
                kind: dirent.kind,
                entry,
            });
            rest = &rest[(head + 24 + dirent.namelen as usize).next_multiple_of(8)..];
        }
        Ok(entries)
    }

    /// The whole directory, a page at a time as Linux 6.12 asks for it.
    fn list_all(&self, node: u64, plus: bool) -> Vec<Listed> {
        let fh = self.opendir(node).unwrap().fh;
        let mut all: Vec<Listed> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |last| last.off);
            let some = self.list(node, fh, offset, 4096, plus).unwrap();
            if some.is_empty() {
                let ask = ReleaseIn {
                    fh,
                    ..Default::default()
                };
                self.done(opcode::RELEASEDIR, node, &[wire::as_bytes(&ask)])
                    .unwrap();
                return all;
            }
            all.extend(some);
        }
    }
}

struct Listed {
    name: Vec<u8>,
    off: u64,
    kind: u32,
    entry: EntryOut,
}
