//! A host on which somebody keeps exchanging what the guest walks through: directories for links and
//! devices, files for links and FIFOs, places in the tree for others and for none.
//!
//! Whoever loses such a race may be told any error. What it may never be told is a byte from outside
//! of the share, and nothing there may change; nor may a request wait for anybody.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use super::*;

const INSIDE: &[u8] = b"inside";
const SECRET: &[u8] = b"SECRET";
/// What there is in the share, at one place or another.
const NAMES: [&str; 12] = [
    "dir", "link", "device", "deep", "er", "sub", "file", "filelink", "pipe", "pipelike", "secret",
    "below",
];
/// What the guests make and remove.
const OWN: [&str; 4] = ["g0", "g1", "g2", "g3"];
/// Inodes that one guest remembers.
const POOL: usize = 64;

/// Numbers without a pattern (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides as u64) as usize
    }

    fn of<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.roll(choices.len())]
    }
}

/// All that a change of a tree would show in.
fn look(dir: &Path, seen: &mut Vec<String>) {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    entries.sort();
    entries.push(dir.to_owned());
    for path in entries {
        let at = fs::symlink_metadata(&path).unwrap();
        let content = at.is_file().then(|| fs::read(&path).unwrap());
        seen.push(format!(
            "{path:?} {:o} {}:{} {} {} {}.{} {content:?}",
            at.mode(),
            at.uid(),
            at.gid(),
            at.nlink(),
            at.size(),
            at.ctime(),
            at.ctime_nsec(),
        ));
        if at.is_dir() && path != dir {
            look(&path, seen);
        }
    }
}

fn hold(dir: &Path) -> OwnedFd {
    // SAFETY: AT_FDCWD is a constant that openat knows.
    let here = unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) };
    sys::openat(here, &c_path(dir), libc::O_PATH, 0).unwrap()
}

/// What is in the way of the guests: the share at `host`, and what they must not reach.
struct Stage {
    host: Host,
    outside: PathBuf,
    away: PathBuf,
    /// Directories whose entries are moved: the share's root, `dir`, `dir/sub`, `deep/er`, `away`. By name
    /// they could be links by then, and bring in what is outside.
    held: [OwnedFd; 5],
}

impl Stage {
    fn new() -> Stage {
        let (host, outside, away) = (Host::sharing(false), scratch(), scratch());
        fs::create_dir_all(host.path("dir/sub/below")).unwrap();
        fs::create_dir_all(host.path("deep/er")).unwrap();
        fs::create_dir_all(outside.join("sub/below")).unwrap();
        for file in ["file", "secret", "pipelike", "sub/file", "sub/below/secret"] {
            fs::write(host.path("dir").join(file), INSIDE).unwrap();
            fs::write(outside.join(file), SECRET).unwrap();
        }
        let client = host.client();
        let zero = (1 << 8) | 5;
        let nodes = [("device", libc::S_IFCHR, zero), ("pipe", libc::S_IFIFO, 0)];
        for (name, kind, number) in nodes {
            client.mknod(host.root, name, kind | 0o666, number).unwrap();
        }
        std::os::unix::fs::symlink(&outside, host.path("link")).unwrap();
        std::os::unix::fs::symlink(outside.join("secret"), host.path("filelink")).unwrap();
        let held = ["", "dir", "dir/sub", "deep/er"].map(|name| host.path(name));
        let [root, dir, sub, er] = held.map(|dir| hold(&dir));
        let held = [root, dir, sub, er, hold(&away)];
        Stage {
            host,
            outside,
            away,
            held,
        }
    }

    /// Moves things about on the host until told to stop.
    fn shuffle(&self, seed: u64, stop: &AtomicBool) {
        let [root, dir, sub, er, away] = &self.held;
        let exchanges = [
            ((root, c"dir"), (root, c"link")),
            ((root, c"dir"), (root, c"device")),
            ((dir, c"file"), (root, c"filelink")),
            ((dir, c"secret"), (root, c"filelink")),
            ((dir, c"pipelike"), (root, c"pipe")),
            ((dir, c"sub"), (root, c"link")),
            ((sub, c"below"), (root, c"deep")),
            ((sub, c"file"), (root, c"filelink")),
        ];
        // In depth and back; out of the share and back.
        let moves = [
            ((dir, c"sub"), (er, c"sub")),
            ((er, c"sub"), (dir, c"sub")),
            ((dir, c"sub"), (away, c"sub")),
            ((away, c"sub"), (dir, c"sub")),
        ];
        let mut dice = Dice(seed);
        while !stop.load(Ordering::Relaxed) {
            let (((from, name), (to, new_name)), flags) = match dice.roll(2) {
                0 => (dice.of(&exchanges), libc::RENAME_EXCHANGE),
                _ => (dice.of(&moves), libc::RENAME_NOREPLACE),
            };
            // Another one may have been there before.
            let _ = sys::renameat2(from.as_fd(), name, to.as_fd(), new_name, flags);
        }
    }

    /// Does all that a guest can, wherever it gets to, until told to stop. Returns how often it has read
    /// what it may.
    fn roam(&self, seed: u64, stop: &AtomicBool, steps: &AtomicU64) -> u64 {
        let client = self.host.client();
        let mut dice = Dice(seed);
        let mut pool = vec![self.host.root];
        let mut found = 0;
        while !stop.load(Ordering::Relaxed) {
            steps.fetch_add(1, Ordering::Relaxed);
            let (node, name) = (*dice.of(&pool), *dice.of(&NAMES));
            let (other, own, new) = (*dice.of(&pool), *dice.of(&OWN), *dice.of(&OWN));
            let mut learned = Vec::new();
            match dice.roll(16) {
                0..=4 => learned.extend(client.lookup(node, name).map(|entry| entry.nodeid)),
                5 => {
                    if let Ok(open) = client.opendir(node) {
                        let all = client
                            .list(node, open.fh, 0, 4096, true)
                            .unwrap_or_default();
                        learned.extend(all.iter().map(|listed| listed.entry.nodeid));
                        client.release(node, open.fh).unwrap();
                    }
                }
                6..=8 => {
                    let flags = [libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC];
                    if let Ok(open) = client.open(node, *dice.of(&flags)) {
                        found += u64::from(self.read(&client, node, open.fh));
                        let _ = client.write(node, open.fh, 0, INSIDE);
                        client.release(node, open.fh).unwrap();
                    }
                }
                9 => {
                    let name = if dice.roll(2) == 0 { own } else { name };
                    let made = client.create(node, name, libc::O_RDWR, (0o644, 0));
                    if let Ok((entry, open)) = made {
                        found += u64::from(self.read(&client, entry.nodeid, open.fh));
                        let _ = client.write(entry.nodeid, open.fh, 0, INSIDE);
                        client.release(entry.nodeid, open.fh).unwrap();
                        client.forget(entry.nodeid, 1);
                    }
                }
                10 => {
                    let made = match dice.roll(3) {
                        0 => client.mkdir(node, own, 0o755, 0),
                        1 => client.symlink(node, own, self.outside.to_str().unwrap()),
                        _ => client.link(other, node, own),
                    };
                    let _ = made.map(|entry| client.forget(entry.nodeid, 1));
                }
                11 => drop(client.rename((node, own), (other, new), libc::RENAME_EXCHANGE)),
                12 => drop(client.rename((node, own), (other, new), 0)),
                13 => {
                    let _ = client.unlink(node, own);
                    let _ = client.done(opcode::RMDIR, node, &[own.as_bytes(), b"\0"]);
                }
                14 => {
                    let valid = [
                        fattr::MODE,
                        fattr::UID | fattr::GID,
                        fattr::SIZE,
                        fattr::MTIME,
                    ];
                    let ask = SetattrIn {
                        valid: *dice.of(&valid),
                        mode: 0o777,
                        uid: 1234,
                        gid: 1234,
                        ..Default::default()
                    };
                    let _ = client.setattr(node, ask);
                }
                _ => {
                    let ask = SetxattrIn {
                        size: 1,
                        ..Default::default()
                    };
                    let args = [wire::as_bytes(&ask), b"trusted.husk\0x"];
                    let _ = client.done(opcode::SETXATTR, node, &args);
                }
            }
            for node in learned.into_iter().filter(|node| *node != 0) {
                // The share's root stays known: it is where a guest that got lost starts again.
                if pool.len() < POOL {
                    pool.push(node);
                } else {
                    let place = 1 + dice.roll(POOL - 1);
                    client.forget(std::mem::replace(&mut pool[place], node), 1);
                }
            }
        }
        found
    }

    /// True when there was something to be read.
    fn read(&self, client: &Client<'_>, node: u64, fh: u64) -> bool {
        let data = client.read(node, fh, 0, 100).unwrap_or_default();
        assert!(
            INSIDE.starts_with(&data),
            "read {:?}, which is not in the share",
            String::from_utf8_lossy(&data)
        );
        !data.is_empty()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for dir in [&self.outside, &self.away] {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// Two who move things about and two guests' threads, on one share.
fn race(time: Duration) {
    let stage = Stage::new();
    let mut before = Vec::new();
    look(&stage.outside, &mut before);
    let (stop, steps) = (AtomicBool::new(false), AtomicU64::new(0));
    let end = Instant::now() + time;
    let found: u64 = std::thread::scope(|scope| {
        for seed in [1, 2] {
            let (stage, stop) = (&stage, &stop);
            scope.spawn(move || stage.shuffle(seed, stop));
        }
        let guests = [3, 4].map(|seed| {
            let (stage, stop, steps) = (&stage, &stop, &steps);
            scope.spawn(move || stage.roam(seed, stop, steps))
        });
        let watch = |patience: Duration| {
            let (start, last) = (Instant::now(), steps.load(Ordering::Relaxed));
            while steps.load(Ordering::Relaxed) == last && !guests.iter().all(|g| g.is_finished()) {
                if start.elapsed() > patience {
                    // Whoever waits for somebody else is not to be waited for.
                    eprintln!("a request is not answered");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        while Instant::now() < end && !guests.iter().any(|guest| guest.is_finished()) {
            watch(Duration::from_secs(10));
        }
        stop.store(true, Ordering::Relaxed);
        while !guests.iter().all(|guest| guest.is_finished()) {
            watch(Duration::from_secs(10));
        }
        guests.map(|guest| guest.join().unwrap()).iter().sum()
    });
    let mut after = Vec::new();
    look(&stage.outside, &mut after);
    assert_eq!(before, after, "something outside has changed");
    println!("{steps:?} steps, {found} reads of files of the share");
    assert!(found > 100, "{found}: the guests hardly got anywhere");
}

#[test]
fn no_race_leads_out_of_the_share() {
    race(Duration::from_secs(5));
}

#[test]
#[ignore = "long: part of make test-long"]
fn no_race_leads_out_of_the_share_in_ten_minutes() {
    race(Duration::from_secs(600));
}
