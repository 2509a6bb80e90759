//! A guest that lies: in lengths, names, node ids and handles.

use std::fs;

use super::*;
use crate::fs::BadRequest;

fn raw(server: &FileServer, request: &mut [u8], room: usize) -> Result<usize, BadRequest> {
    let mut reply = vec![0; room];
    server.handle(
        &[VolatileSlice::from(request)],
        &[VolatileSlice::from(&mut reply[..])],
    )
}

#[test]
fn what_is_no_request_is_refused() {
    let host = Host::new();
    let client = host.client();
    let server = &host.server;
    let good = client.message(opcode::GETATTR, host.root, &[&[0; 16]]);
    assert!(raw(server, &mut good.clone(), 200).is_ok());
    assert!(matches!(server.handle(&[], &[]), Err(BadRequest::Short(0))));
    assert!(matches!(
        raw(server, &mut good.clone()[..39], 200),
        Err(BadRequest::Short(39))
    ));
    for len in [0_u32, 39, 55, 57, u32::MAX] {
        let mut bad = good.clone();
        bad[..4].copy_from_slice(&len.to_ne_bytes());
        assert!(matches!(
            raw(server, &mut bad, 200),
            Err(BadRequest::Length { .. })
        ));
    }
    assert!(matches!(
        raw(server, &mut good.clone(), 15),
        Err(BadRequest::NoRoom { .. })
    ));
    let mut long = client.message(opcode::SETXATTR, host.root, &[&vec![0; 1 << 20]]);
    assert!(matches!(
        raw(server, &mut long, 200),
        Err(BadRequest::Long { .. })
    ));
}

#[test]
fn unknown_operations_are_not_implemented() {
    let host = Host::new();
    let client = host.client();
    for opcode in [
        0,
        7,
        19,
        31,
        32,
        33,
        34,
        36,
        37,
        39,
        40,
        41,
        48,
        99,
        u32::MAX,
    ] {
        for node in [ROOT_ID, host.root] {
            assert_eq!(
                client.call(opcode, node, &[&[0; 64]], 200).unwrap_err(),
                libc::ENOSYS
            );
        }
    }
}

#[test]
fn arguments_that_are_missing_are_errors_and_nothing_else() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("file"), "x").unwrap();
    let file = client.walk(host.root, "file").unwrap();
    let fh = client.open(file, libc::O_RDWR).unwrap().fh;
    for opcode in 0..64 {
        if matches!(
            opcode,
            opcode::FORGET | opcode::BATCH_FORGET | opcode::DESTROY
        ) {
            continue;
        }
        for node in [0, ROOT_ID, host.root, file, 999, u64::MAX] {
            for len in 0..100 {
                let body = vec![b'/'; len];
                let _ = client.call(opcode, node, &[&body], 300);
                // With a handle that exists, and the rest of it senseless.
                let body = [&fh.to_ne_bytes()[..], &vec![0xff; len]].concat();
                let _ = client.call(opcode, node, &[&body], 300);
            }
        }
    }
    assert!(client.getattr(host.root).is_ok());
    let seen: Vec<_> = fs::read_dir(&host.dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(seen, ["file"]);
}

#[test]
fn names_are_single_components() {
    let host = Host::new();
    let client = host.client();
    for name in ["", ".", "..", "/", "a/b", "../x", "/etc/passwd", "x/"] {
        assert_eq!(
            client.lookup(host.root, name).unwrap_err(),
            libc::EINVAL,
            "{name}"
        );
        assert_eq!(
            client.mkdir(host.root, name, 0o755, 0).unwrap_err(),
            libc::EINVAL
        );
        assert_eq!(client.unlink(host.root, name).unwrap_err(), libc::EINVAL);
        let renamed = client.rename((host.root, "a"), (host.root, name), 0);
        assert_eq!(renamed.unwrap_err(), libc::EINVAL);
        let made = client.create(host.root, name, libc::O_RDWR, (0o644, 0));
        assert_eq!(made.unwrap_err(), libc::EINVAL);
        assert_eq!(
            client.symlink(host.root, name, "x").unwrap_err(),
            libc::EINVAL
        );
        assert_eq!(client.lookup(ROOT_ID, name).unwrap_err(), libc::EINVAL);
    }
    // Without its end.
    let open_end = client.get::<EntryOut>(opcode::LOOKUP, host.root, &[b"name"]);
    assert_eq!(open_end.unwrap_err(), libc::EINVAL);
    let one_name = client.done(
        opcode::RENAME,
        host.root,
        &[&host.root.to_ne_bytes(), b"a\0b"],
    );
    assert_eq!(one_name.unwrap_err(), libc::EINVAL);
}

#[test]
fn nothing_is_done_that_could_not_be_told() {
    let host = Host::new();
    let client = host.client();
    let ask = MkdirIn {
        mode: 0o755,
        umask: 0,
    };
    let args = [wire::as_bytes(&ask), b"dir\0"];
    assert_eq!(
        client
            .call(opcode::MKDIR, host.root, &args, 127)
            .unwrap_err(),
        libc::EIO
    );
    assert!(!host.path("dir").exists());
    fs::write(host.path("file"), "content").unwrap();
    let file = client.walk(host.root, "file").unwrap();
    let fh = client.open(file, libc::O_RDONLY).unwrap().fh;
    let ask = ReadIn {
        fh,
        size: 100,
        ..Default::default()
    };
    let short = client.call(opcode::READ, file, &[wire::as_bytes(&ask)], 99);
    assert_eq!(short.unwrap_err(), libc::EINVAL);
    let ask = ReadIn {
        size: u32::MAX,
        ..ask
    };
    let long = client.call(opcode::READ, file, &[wire::as_bytes(&ask)], 99);
    assert_eq!(long.unwrap_err(), libc::EINVAL);
}

#[test]
fn sizes_and_offsets_that_lie() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("file"), "content").unwrap();
    let file = client.walk(host.root, "file").unwrap();
    let fh = client.open(file, libc::O_RDWR).unwrap().fh;
    for size in [0, 2, u32::MAX] {
        let ask = WriteIn {
            fh,
            size,
            ..Default::default()
        };
        let wrong = client.get::<WriteOut>(opcode::WRITE, file, &[wire::as_bytes(&ask), b"x"]);
        assert_eq!(wrong.unwrap_err(), libc::EINVAL);
    }
    for offset in [u64::MAX, i64::MAX as u64 + 1] {
        assert_eq!(
            client.write(file, fh, offset, b"x").unwrap_err(),
            libc::EINVAL
        );
        assert_eq!(client.read(file, fh, offset, 1).unwrap_err(), libc::EINVAL);
    }
    let ask = SetxattrIn {
        size: 1 << 31,
        ..Default::default()
    };
    let value = client.done(
        opcode::SETXATTR,
        file,
        &[wire::as_bytes(&ask), b"user.x\0v"],
    );
    assert_eq!(value.unwrap_err(), libc::EINVAL);
    assert_eq!(fs::read(host.path("file")).unwrap(), b"content");
}

#[test]
fn node_ids_and_handles_must_belong_together() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("a"), "a").unwrap();
    fs::write(host.path("b"), "b").unwrap();
    let (a, b) = (
        client.walk(host.root, "a").unwrap(),
        client.walk(host.root, "b").unwrap(),
    );
    let fh = client.open(a, libc::O_RDWR).unwrap().fh;
    let dir = client.opendir(host.root).unwrap().fh;
    assert_eq!(client.read(b, fh, 0, 1).unwrap_err(), libc::EBADF);
    assert_eq!(client.read(a, dir, 0, 1).unwrap_err(), libc::EBADF);
    assert_eq!(client.read(a, fh + 100, 0, 1).unwrap_err(), libc::EBADF);
    assert!(client.list(host.root, fh, 0, 100, false).is_err());
    assert!(client.list(ROOT_ID, dir, 0, 100, false).is_err());
    assert_eq!(client.getattr(12_345).unwrap_err(), libc::ESTALE);
    assert_eq!(client.getattr(0).unwrap_err(), libc::ESTALE);
    // More forgotten than told, and nonsense in a batch: no harm.
    client.forget(a, u64::MAX);
    client.forget(host.root, u64::MAX);
    client.forget(4711, 1);
    let batch = BatchForgetIn {
        count: u32::MAX,
        dummy: 0,
    };
    let one = ForgetOne {
        nodeid: b,
        nlookup: 1,
    };
    let mut message = client.message(
        opcode::BATCH_FORGET,
        0,
        &[wire::as_bytes(&batch), wire::as_bytes(&one)],
    );
    assert_eq!(raw(&host.server, &mut message, 0).unwrap(), 0);
    assert_eq!(client.getattr(b).unwrap_err(), libc::ESTALE);
    assert!(
        client.getattr(host.root).is_ok(),
        "the root of a share is not forgotten"
    );
    // The open file is still there for the one who has it.
    assert_eq!(client.read(a, fh, 0, 1).unwrap(), b"a");
}

#[test]
fn versions_that_cannot_be_spoken() {
    let server = server();
    let client = Client::new(&server);
    let init = |major, minor, flags| {
        let ask = InitIn {
            major,
            minor,
            max_readahead: 0,
            flags,
        };
        let ext = InitInExt::default();
        client.get::<InitOut>(
            opcode::INIT,
            0,
            &[wire::as_bytes(&ask), wire::as_bytes(&ext)],
        )
    };
    assert_eq!(init(6, 41, u32::MAX).unwrap_err(), libc::EPROTO);
    assert_eq!(init(7, 31, u32::MAX).unwrap_err(), libc::EPROTO);
    assert_eq!(init(7, 41, 0).unwrap_err(), libc::EPROTO);
    assert_eq!(init(8, 0, 0).unwrap().major, 7);
    assert_eq!(init(7, 99, u32::MAX).unwrap().minor, 41);
}

#[test]
fn the_guest_cannot_use_up_the_descriptors() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("file"), "").unwrap();
    let node = client.walk(host.root, "file").unwrap();
    let root = client.opendir(host.root).unwrap().fh;
    let mut permits = Vec::new();
    while let Ok(permit) = host.server.budget.take() {
        permits.push(permit);
    }
    assert_eq!(client.open(node, libc::O_RDONLY).unwrap_err(), libc::ENFILE);
    for dir in [host.root, ROOT_ID] {
        assert_eq!(client.opendir(dir).unwrap_err(), libc::ENFILE);
    }
    assert_eq!(
        client.mkdir(host.root, "dir", 0o755, 0).unwrap_err(),
        libc::ENFILE
    );
    assert!(!host.path("dir").exists());
    // What there is can still be listed.
    let listed = client.list(host.root, root, 0, 4096, true).unwrap();
    assert_eq!(listed.len(), 3);
    permits.pop();
    assert!(client.open(node, libc::O_RDONLY).is_ok());
}

#[test]
fn a_guest_without_descriptors_goes_on_with_what_it_knows() {
    let host = Host::new();
    let client = host.client();
    for name in ["known", "new"] {
        fs::write(host.path(name), "").unwrap();
    }
    let known = client.walk(host.root, "known").unwrap();
    let mut permits = Vec::new();
    while let Ok(permit) = host.server.budget.take() {
        permits.push(permit);
    }
    assert_eq!(client.walk(host.root, "known").unwrap(), known);
    assert_eq!(client.lookup(host.root, "new").unwrap_err(), libc::ENFILE);
    assert_eq!(client.lookup(host.root, "none").unwrap().nodeid, 0);
    // Told twice, forgotten twice.
    client.forget(known, 1);
    assert!(client.getattr(known).is_ok());
    client.forget(known, 1);
    assert_eq!(client.getattr(known).unwrap_err(), libc::ESTALE);
    permits.extend(host.server.budget.take());
    // Nor is another container kept out.
    let other = scratch();
    host.server.share("other", clone_of(&other), true).unwrap();
    fs::remove_dir_all(other).unwrap();
    assert!(client.walk(ROOT_ID, "other").is_ok());
    host.server.unshare("other").unwrap();
    assert!(
        host.server.budget.take().is_err(),
        "a share is not charged for"
    );
}

/// A guest's kernel forgets at once what it may not believe: so it comes by with what is left.
#[test]
fn when_little_is_left_names_are_good_for_one_use() {
    let host = Host::new();
    let client = host.client();
    for name in ["before", "then"] {
        fs::write(host.path(name), "").unwrap();
    }
    let day = client.lookup(host.root, "before").unwrap().entry_valid;
    assert_eq!(day, 86_400);
    let mut permits = Vec::new();
    while host.server.budget.is_ample() {
        permits.push(host.server.budget.take().unwrap());
    }
    let flags = libc::O_RDWR;
    let made = client.create(host.root, "new", flags, (0o644, 0));
    for entry in [
        client.lookup(host.root, "before").unwrap(),
        client.lookup(host.root, "then").unwrap(),
        client.mkdir(host.root, "dir", 0o755, 0).unwrap(),
        made.unwrap().0,
    ] {
        assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (0, 0));
        assert_ne!(entry.attr_valid, 0, "its attributes are as good as ever");
    }
    permits.clear();
    let again = client.lookup(host.root, "then").unwrap();
    assert_eq!(again.entry_valid, day);
}

/// No request may hold up the others, and a device that is stopped, for longer than it must.
#[test]
fn transfers_are_no_longer_than_agreed_on() {
    const AGREED: usize = 1 << 20;
    let host = Host::new();
    let client = host.client();
    let made = client.create(host.root, "file", libc::O_RDWR, (0o644, 0));
    let (file, fh) = made.map(|(entry, open)| (entry.nodeid, open.fh)).unwrap();
    let data = vec![1; AGREED + 1];
    assert_eq!(client.write(file, fh, 0, &data).unwrap_err(), libc::EINVAL);
    assert_eq!(client.write(file, fh, 0, &data[1..]).unwrap(), 1 << 20);
    let read = |size| client.read(file, fh, 0, size).map(|data| data.len());
    assert_eq!(read(AGREED as u32), Ok(AGREED));
    assert_eq!(read(AGREED as u32 + 1), Err(libc::EINVAL));
}
