//! What a container sees, said in lines that two runtimes can be compared by.
//!
//! * `husk-probe plant DIR MANY`: makes a tree of everything that file servers get wrong, with a
//!   directory of MANY entries.
//! * `husk-probe tree DIR`: lists a tree with all that can be known of each entry.
//! * `husk-probe lock FILE`: says "locked" and holds the lock until the end of its input, or says "held".
//! * `husk-probe reread`: prints again, from its beginning, the file that its input is.
//! * `husk-probe clock`: for each line of its input, says what time it is (nanoseconds since the epoch).
//! * `husk-probe cpuid`: prints the CPUID leaves of all ranges, whether there or not: function,
//!   index, eax, ebx, ecx, edx, in hexadecimal.
//! * `husk-probe streams`: tries to reach the agent's port for streams from inside its guest, and says what
//!   comes of it.
//! * `husk-probe echo ADDRESS:PORT...`: listens there and says so, and gives everybody back what he sends, until it is killed.
//! * `husk-probe steady FILE`: works and looks at the time until it is killed; FILE says how it goes, see
//!   [`Steady`](husk_tests::steady::Steady).
//! * `husk-probe bomb`: makes children, each of which does the same, until it is killed.
//! * `husk-probe traffic`: answers whoever sends something over the network, as [`traffic`](husk_tests::traffic) has it.
//! * `husk-probe meet FILE|key:N`: waits for another one at the same page of shared memory, see `meeting`.
//! * `husk-probe self [PATH...]`: prints all that it can see of itself, of its container and of these paths, see `look`.
//! * as PID 1 of a guest, the agent of a test: ends as it is told, serves as `guest` has it, fights its VMM
//!   as `hostile` has it, or never answers anybody.

mod guest;
mod hostile;
mod look;
mod meeting;
mod network;

use std::{
    arch::x86_64::__cpuid_count,
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, ErrorKind, Read, Seek, SeekFrom, Write},
    net::{Shutdown, TcpListener},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink},
    },
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use husk_proto::{GUEST_CID, STREAM_PORT};
use husk_tests::{machine::HOSTILE_FAILED, steady};
use libc::VMADDR_CID_LOCAL;
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

fn main() -> ExitCode {
    if std::process::id() == 1 && env::args_os().next().as_deref() == Some(OsStr::new("/init")) {
        be_init();
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk-probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the guest as `husk_probe=` on the kernel's command line says (the kernel puts what it does
/// not know into the environment), or never.
fn be_init() {
    use rustix::system::{RebootCommand, reboot};
    let done = match env::var("husk_probe").as_deref() {
        Ok("power-off") => reboot(RebootCommand::PowerOff),
        Ok("reset") => reboot(RebootCommand::Restart),
        Ok("serve") => {
            let workers = env::var("husk_workers").ok();
            let workers = workers.and_then(|count| count.parse().ok());
            panic!("{:?}", guest::serve(workers.unwrap_or(0)));
        }
        Ok("hostile") => {
            if let Err(error) = hostile::run() {
                hostile::print(&format!("{HOSTILE_FAILED}{error:#}\n"));
                panic!("{error:#}");
            }
            loop {
                std::thread::park();
            }
        }
        // The end of init is a kernel panic.
        Ok("exit") => std::process::exit(1),
        Ok("spin") => loop {
            std::hint::spin_loop();
        },
        _ => loop {
            std::thread::park();
        },
    };
    panic!("reboot: {done:?}");
}

fn run() -> Result<()> {
    let args: Vec<_> = env::args_os().skip(1).collect();
    match args.as_slice() {
        [verb, directory, many] if verb == "plant" => {
            let many = many.to_str().and_then(|text| text.parse().ok());
            plant(Path::new(directory), many.context("MANY is a number")?)
        }
        [verb, directory] if verb == "tree" => tree(Path::new(directory)),
        [verb, file] if verb == "lock" => lock(Path::new(file)),
        [verb] if verb == "reread" => reread(),
        [verb] if verb == "clock" => clock(),
        [verb] if verb == "cpuid" => cpuid(),
        [verb] if verb == "streams" => streams(),
        [verb, servers @ ..] if verb == "echo" => echo(servers),
        [verb, file] if verb == "steady" => steady::run(Path::new(file)),
        [verb] if verb == "bomb" => bomb(),
        [verb] if verb == "traffic" => {
            network::echo()?;
            network::bulk()?;
            loop {
                std::thread::park();
            }
        }
        [verb, place] if verb == "meet" => meeting::meet(&place.to_string_lossy()),
        [verb, paths @ ..] if verb == "self" => {
            let paths: Vec<_> = paths
                .iter()
                .map(|path| path.to_string_lossy().into_owned())
                .collect();
            look::run(&paths)
        }
        _ => bail!(
            "usage: husk-probe plant DIR MANY | tree DIR | lock FILE | reread | clock | cpuid | streams | \
             echo ADDRESS:PORT... | steady FILE | bomb | traffic | meet FILE|key:N | self [PATH...]"
        ),
    }
}

fn echo(servers: &[OsString]) -> Result<()> {
    let listeners = servers.iter().map(|at| {
        let at = at.to_str().context("an address")?;
        TcpListener::bind(at).with_context(|| format!("listen at {at}"))
    });
    let listeners = listeners.collect::<Result<Vec<_>>>()?;
    println!("listening");
    let serve = |listener: TcpListener| {
        for client in listener.incoming().flatten() {
            thread::spawn(move || {
                if io::copy(&mut &client, &mut &client).is_ok() {
                    // Whoever has gone knows.
                    let _ = client.shutdown(Shutdown::Write);
                }
            });
        }
    };
    let all = listeners
        .into_iter()
        .map(|l| thread::spawn(move || serve(l)));
    for listener in all.collect::<Vec<_>>() {
        let _ = listener.join();
    }
    Ok(())
}

fn clock() -> Result<()> {
    for line in io::stdin().lines() {
        line?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        println!("{}", now.as_nanos());
    }
    Ok(())
}

fn cpuid() -> Result<()> {
    for base in [0, 0x4000_0000, 0x8000_0000, 0xc000_0000] {
        for function in base..base + 0x30 {
            for index in 0..4 {
                // SAFETY: every x86-64 processor has the instruction. (Newer compilers know.)
                #[allow(unused_unsafe)]
                let leaf = unsafe { __cpuid_count(function, index) };
                let (eax, ebx, ecx, edx) = (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx);
                println!("{function:x} {index:x} {eax:x} {ebx:x} {ecx:x} {edx:x}");
            }
        }
    }
    Ok(())
}

/// By both addresses that a guest has of its own. Whoever is let in would wait for the request that names
/// its stream.
fn streams() -> Result<()> {
    for cid in [VMADDR_CID_LOCAL, GUEST_CID] {
        let outcome = match guest::connect(cid, STREAM_PORT) {
            Err(error) => format!("refused: {error}"),
            Ok(mut stream) => {
                stream.set_read_timeout(Some(Duration::from_secs(2)))?;
                // A stream's id comes first. Who is shown the door may notice here or below.
                let written = stream.write_all(&(u64::MAX - u64::from(cid)).to_le_bytes());
                let read = written.and_then(|()| stream.read(&mut [0; 1]));
                match read.map_err(|error| error.kind()) {
                    Err(ErrorKind::WouldBlock | ErrorKind::TimedOut) => "let in".into(),
                    other => format!("turned away: {other:?}"),
                }
            }
        };
        println!("{cid}: {outcome}");
    }
    Ok(())
}

/// Goes on where no child can be made: a shell would end there, and its bomb with it.
fn bomb() -> Result<()> {
    loop {
        // SAFETY: nothing but this loop runs in the child, and this process has no other thread.
        let _ = unsafe { libc::fork() };
    }
}

fn lock(path: &Path) -> Result<()> {
    use rustix::fs::{FlockOperation, flock};
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => println!("locked"),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            println!("held");
            return Ok(());
        }
        Err(error) => return Err(error).with_context(|| format!("lock {}", path.display())),
    }
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}

fn reread() -> Result<()> {
    let mut file = File::from(rustix::io::dup(rustix::stdio::stdin())?);
    file.seek(SeekFrom::Start(0))?;
    io::copy(&mut file, &mut io::stdout())?;
    Ok(())
}

fn plant(root: &Path, count: u32) -> Result<()> {
    fs::create_dir_all(root).with_context(|| format!("create {}", root.display()))?;
    let file = |name: &str, content: &[u8]| -> Result<std::path::PathBuf> {
        let path = root.join(name);
        fs::write(&path, content).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    };
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .with_context(|| format!("chmod {}", path.display()))
    };

    for (uid, gid) in [(0, 0), (1, 65534), (1000, 1000), (123_456, 654_321)] {
        let path = file(&format!("owner-{uid}-{gid}"), b"owned")?;
        chown(&path, Some(uid), Some(gid)).with_context(|| format!("chown {}", path.display()))?;
        let link = root.join(format!("owner-{uid}-{gid}.link"));
        symlink("nowhere", &link).with_context(|| format!("symlink {}", link.display()))?;
        lchown(&link, Some(uid), Some(gid))
            .with_context(|| format!("lchown {}", link.display()))?;
    }
    for bits in [0o4755, 0o2755, 0o6711, 0o1777, 0o000, 0o444] {
        let path = file(&format!("mode-{bits:04o}"), b"#!/bin/sh\n")?;
        mode(&path, bits)?;
    }
    let path = file("owner-then-setuid", b"x")?;
    chown(&path, Some(7), Some(8))?;
    mode(&path, 0o4755)?;

    let setgid = root.join("setgid-directory");
    fs::create_dir(&setgid).context("mkdir setgid-directory")?;
    chown(&setgid, Some(0), Some(4242)).context("chown setgid-directory")?;
    mode(&setgid, 0o2775)?;
    fs::write(setgid.join("inherits-the-group"), b"").context("write in setgid-directory")?;
    fs::create_dir(setgid.join("inherits-the-bit")).context("mkdir in setgid-directory")?;

    let path = file("xattrs", b"attributed")?;
    let long = vec![b'x'; 3000];
    for (name, value) in [
        ("user.short", &b"value"[..]),
        ("user.empty", &b""[..]),
        ("user.binary", &b"\0\xff\n"[..]),
        ("user.long", &long),
        ("trusted.husk", &b"trusted"[..]),
    ] {
        // The privilege to set some of them is itself something to compare.
        if let Err(error) = rustix::fs::setxattr(&path, name, value, XattrFlags::empty()) {
            println!("set {name}: {error}");
        }
    }
    rustix::fs::removexattr(&path, "user.short").context("remove user.short")?;

    let first = file("hard-link-1", b"linked")?;
    fs::hard_link(&first, root.join("hard-link-2")).context("link hard-link-2")?;
    fs::hard_link(&first, root.join("hard-link-3")).context("link hard-link-3")?;
    fs::remove_file(root.join("hard-link-2")).context("unlink hard-link-2")?;

    for (name, target) in [
        (
            "out-of-the-root",
            "../../../../../../../../etc/hostname-of-the-host",
        ),
        ("absolute", "/etc/passwd"),
        ("loop", "loop"),
        ("into-proc", "/proc/1/root"),
    ] {
        symlink(target, root.join(name)).with_context(|| format!("symlink {name}"))?;
    }

    let mut sparse = File::create(root.join("sparse")).context("create sparse")?;
    sparse.seek(SeekFrom::Start(64 << 20))?;
    sparse.write_all(b"after the hole")?;
    sparse.seek(SeekFrom::Start(8 << 20))?;
    sparse.write_all(b"island")?;
    drop(sparse);

    for name in ["new\nline", "tab\t", " space ", "-n", "*", "caf\u{e9}"] {
        file(name, name.as_bytes())?;
    }
    fs::write(root.join(OsStr::from_bytes(b"not-utf8-\xff")), b"bytes")
        .context("write a name that is not UTF-8")?;
    file(&"n".repeat(255), b"longest")?;

    for (name, kind) in [("fifo", FileType::Fifo), ("socket", FileType::Socket)] {
        rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), 0)
            .with_context(|| format!("mknod {name}"))?;
    }

    let unlinked = root.join("unlinked");
    let mut ghost = File::create_new(&unlinked)?;
    fs::remove_file(&unlinked)?;
    ghost.write_all(b"still there")?;
    ghost.rewind()?;
    let mut read = String::new();
    // Opened for writing only: reading must fail as it does everywhere.
    println!(
        "read a write-only file: {:?}",
        ghost.read_to_string(&mut read).err().map(|e| e.kind())
    );
    println!("unlinked file has {} links", ghost.metadata()?.nlink());

    fs::write(root.join("renamed-from"), b"moved")?;
    fs::write(root.join("renamed-to"), b"replaced")?;
    fs::rename(root.join("renamed-from"), root.join("renamed-to")).context("rename over a file")?;

    let many = root.join("many");
    fs::create_dir(&many)?;
    for number in 0..count {
        let name = format!("entry-{number:05}");
        File::create(many.join(&name)).with_context(|| format!("create many/{name}"))?;
    }
    for number in (0..count).step_by(7) {
        let name = format!("entry-{number:05}");
        fs::remove_file(many.join(&name)).with_context(|| format!("unlink many/{name}"))?;
    }
    Ok(())
}

fn tree(root: &Path) -> Result<()> {
    let mut inodes = BTreeMap::new();
    let mut lines = String::new();
    list(root, Path::new("."), &mut inodes, &mut lines)?;
    io::stdout().write_all(lines.as_bytes())?;
    Ok(())
}

/// `inodes` gives each file with several names the first of them, since numbers may differ.
fn list(
    root: &Path,
    name: &Path,
    inodes: &mut BTreeMap<u64, String>,
    lines: &mut String,
) -> Result<()> {
    let path = root.join(name);
    let meta = fs::symlink_metadata(&path).with_context(|| format!("stat {}", path.display()))?;
    let kind = meta.file_type();
    let mut line = format!(
        "{name:?} {:o} {}:{} rdev {}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.rdev()
    );
    if !kind.is_dir() {
        let first = inodes
            .entry(meta.ino())
            .or_insert_with(|| format!("{name:?}"));
        line += &format!(" links {} of {first} size {}", meta.nlink(), meta.size());
    }
    if kind.is_symlink() {
        line += &format!(" -> {:?}", fs::read_link(&path)?);
        line += &format!(
            " reaches {:?}",
            fs::metadata(&path).map_err(|e| e.kind()).is_ok()
        );
    }
    // An empty file has nothing more to compare, and thousands of them take minutes in the lab.
    let empty = kind.is_file() && meta.len() == 0;
    if kind.is_file() && !empty {
        let mut file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        line += &format!(" sum {:016x}", checksum(&mut file)?);
        line += &format!(" sparse {}", meta.blocks() * 512 < meta.size());
        line += &format!(" data at {:?}", extents(&file, meta.size())?);
    }
    if !kind.is_symlink() && !kind.is_socket() && !kind.is_fifo() && !empty {
        line += &xattrs(&path)?;
    }
    lines.push_str(&line);
    lines.push('\n');
    if kind.is_dir() {
        let mut names: Vec<_> = fs::read_dir(&path)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<_>>()?;
        names.sort();
        for child in names {
            list(root, &name.join(child), inodes, lines)?;
        }
    }
    Ok(())
}

/// Where the file's data is between its holes, by lseek(2).
fn extents(file: &File, size: u64) -> Result<Vec<(u64, u64)>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let begin = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(begin) => begin,
            // No data after this.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error).context("SEEK_DATA"),
        };
        at = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(begin)).context("SEEK_HOLE")?;
        found.push((begin, at));
    }
    Ok(found)
}

/// FNV-1a: enough to see a difference, no dependency.
fn checksum(file: &mut File) -> Result<u64> {
    let mut sum = 0xcbf2_9ce4_8422_2325_u64;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(sum);
        }
        // Holes are long: a block of zeroes is folded in at once.
        if buffer[..count].iter().all(|&byte| byte == 0) {
            sum = sum.rotate_left(5) ^ count as u64;
            continue;
        }
        sum = fold(sum, &buffer[..count]);
    }
}

fn fold(sum: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(sum, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn xattrs(path: &Path) -> Result<String> {
    let mut names = vec![0_u8; 65536];
    let count = rustix::fs::llistxattr(path, &mut names[..])
        .with_context(|| format!("list xattrs of {}", path.display()))?;
    let mut sorted: Vec<&[u8]> = names[..count]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .collect();
    sorted.sort();
    let mut line = String::new();
    for name in sorted {
        let mut value = vec![0_u8; 65536];
        let count = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..])
            .with_context(|| format!("read an xattr of {}", path.display()))?;
        line += &format!(
            " {}={:02x?}",
            String::from_utf8_lossy(name),
            &value[..count.min(8)]
        );
        line += &format!("({count}, sum {:016x})", fold(0, &value[..count]));
    }
    Ok(line)
}
