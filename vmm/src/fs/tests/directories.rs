//! Directories of any size, also while they change.

use std::collections::HashSet;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::*;
use crate::fs::dirs::KEPT_AHEAD;

const MANY: usize = 10_000;

/// Two of these at a time would use up what some hosts allow this process; to be held longer than the host.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with_many(host: &Host) -> u64 {
    fs::create_dir(host.path("many")).unwrap();
    for i in 0..MANY {
        fs::write(host.path(&format!("many/file-{i}")), "").unwrap();
    }
    host.client().walk(host.root, "many").unwrap()
}

fn names(listed: &[Listed]) -> HashSet<Vec<u8>> {
    listed.iter().map(|one| one.name.clone()).collect()
}

#[test]
fn ten_thousand_entries_are_each_seen_once() {
    let _alone = alone();
    let host = Host::new();
    let node = with_many(&host);
    for plus in [false, true] {
        let all = host.client().list_all(node, plus);
        assert_eq!(all.len(), MANY + 2);
        assert_eq!(names(&all).len(), MANY + 2);
    }
    let all = host.client().list_all(node, true);
    for one in &all {
        let dots = one.name.starts_with(b".");
        assert_eq!(
            one.entry.nodeid == 0,
            dots,
            "all but the dots are looked up"
        );
        assert_eq!(
            one.kind,
            u32::from(if dots { libc::DT_DIR } else { libc::DT_REG })
        );
    }
    // Told of twice by now.
    let before = host.server.nodes.len();
    for one in &all {
        host.client().forget(one.entry.nodeid, 2);
    }
    assert_eq!(before - host.server.nodes.len(), MANY);
}

#[test]
fn a_directory_can_be_emptied_while_it_is_read() {
    let _alone = alone();
    let host = Host::new();
    let client = host.client();
    let node = with_many(&host);
    let fh = client.opendir(node).unwrap().fh;
    let (mut offset, mut removed) = (0, 0);
    loop {
        let some = client
            .list(node, fh, offset, 4096, removed % 2 == 0)
            .unwrap();
        let Some(last) = some.last() else { break };
        offset = last.off;
        for one in some.iter().filter(|one| !one.name.starts_with(b".")) {
            client
                .unlink(node, std::str::from_utf8(&one.name).unwrap())
                .unwrap();
            removed += 1;
        }
    }
    assert_eq!(removed, MANY);
    client.done(opcode::RMDIR, host.root, &[b"many\0"]).unwrap();
}

#[test]
fn an_entry_that_vanished_is_left_out_of_readdirplus() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("a"), "").unwrap();
    fs::write(host.path("b"), "").unwrap();
    let fh = client.opendir(host.root).unwrap().fh;
    // Reads all of it ahead, tells one.
    let first = client.list(host.root, fh, 0, 32, false).unwrap();
    assert_eq!(first.len(), 1);
    for name in ["a", "b"] {
        fs::remove_file(host.path(name)).unwrap();
    }
    let rest = client
        .list(host.root, fh, first[0].off, 4096, true)
        .unwrap();
    assert!(rest.iter().all(|one| one.name.starts_with(b".")));
}

#[test]
fn reading_goes_back_to_any_offset() {
    let host = Host::new();
    let client = host.client();
    for i in 0..100 {
        fs::write(host.path(&format!("{i}")), "").unwrap();
    }
    let fh = client.opendir(host.root).unwrap().fh;
    let some = client.list(host.root, fh, 0, 1024, false).unwrap();
    let again = client
        .list(host.root, fh, some[3].off, 1024, false)
        .unwrap();
    assert_eq!(again[0].name, some[4].name);
    let rewound = client.list(host.root, fh, 0, 1024, false).unwrap();
    assert_eq!(names(&rewound), names(&some));
    assert!(client.list(host.root, fh, 0, 0, false).unwrap().is_empty());
}

#[test]
fn the_root_directory_lists_the_shares() {
    let host = Host::new();
    fs::write(host.path("one"), "").unwrap();
    host.server
        .share("file", clone_of(&host.path("one")), false)
        .unwrap();
    for plus in [false, true] {
        let all = host.client().list_all(ROOT_ID, plus);
        let seen: Vec<_> = all
            .iter()
            .map(|one| (one.name.as_slice(), one.kind, one.entry.nodeid))
            .collect();
        let (dir, file) = (u32::from(libc::DT_DIR), u32::from(libc::DT_REG));
        assert_eq!(seen, [(&b"data"[..], dir, 0), (&b"file"[..], file, 0)]);
    }
}

/// A guest that opens many directories and reads a little of each.
#[test]
fn directories_that_are_open_hold_little_memory() {
    let host = Host::new();
    let client = host.client();
    for name in ["a", "b", "c"] {
        fs::write(host.path(name), "").unwrap();
    }
    let opened: Vec<_> = (0..2 * KEPT_AHEAD)
        .map(|_| {
            let fh = client.opendir(host.root).unwrap().fh;
            let first = client.list(host.root, fh, 0, 32, false).unwrap();
            assert_eq!(first.len(), 1);
            (fh, first)
        })
        .collect();
    let holding = |&&(fh, _): &&(u64, Vec<Listed>)| {
        let handle = host.server.handles.dir(fh, host.root).unwrap();
        let stream = handle.stream.lock().unwrap();
        stream.held() > 0
    };
    assert_eq!(opened.iter().filter(holding).count(), KEPT_AHEAD);
    // All of them go on where they were, and hold nothing at the end.
    for (fh, mut all) in opened {
        while let Some(last) = all.last() {
            let some = client.list(host.root, fh, last.off, 32, false).unwrap();
            if some.is_empty() {
                break;
            }
            all.extend(some);
        }
        assert_eq!((all.len(), names(&all).len()), (5, 5));
        assert!(!holding(&&(fh, all)));
    }
}
