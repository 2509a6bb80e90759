//! File data: reads, writes, holes, appending, files without a name.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::*;

fn with_file(host: &Host, content: &[u8]) -> (u64, u64) {
    fs::write(host.path("file"), content).unwrap();
    let node = host.client().walk(host.root, "file").unwrap();
    (node, host.client().open(node, libc::O_RDWR).unwrap().fh)
}

#[test]
fn a_megabyte_goes_both_ways_in_one_request_each() {
    let host = Host::new();
    let client = host.client();
    let (node, fh) = with_file(&host, b"");
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i * 7 + i / 251) as u8).collect();
    assert_eq!(
        client.write(node, fh, 3, &data).unwrap() as usize,
        data.len()
    );
    assert_eq!(client.read(node, fh, 3, 1 << 20).unwrap(), data);
    assert_eq!(fs::read(host.path("file")).unwrap()[3..], data);
    // Short at the end, empty behind it.
    assert_eq!(
        client.read(node, fh, 3 + (1 << 19), 1 << 20).unwrap().len(),
        1 << 19
    );
    assert_eq!(client.read(node, fh, 5 << 20, 100).unwrap(), b"");
}

#[test]
fn more_segments_than_one_system_call_takes() {
    let host = Host::new();
    let client = host.client();
    let data: Vec<u8> = (0..5000_u32).map(|i| i as u8).collect();
    let (node, fh) = with_file(&host, &data);
    // 2,500 pairs of bytes that are no neighbours.
    let mut memory = vec![0_u8; 3 * 2500];
    let mut header = [0_u8; 16];
    let ask = ReadIn {
        fh,
        size: 5000,
        ..Default::default()
    };
    let mut message = client.message(opcode::READ, node, &[wire::as_bytes(&ask)]);
    let request = [VolatileSlice::from(&mut message[..])];
    let mut reply = vec![VolatileSlice::from(&mut header[..])];
    reply.extend(
        memory
            .chunks_mut(3)
            .map(|chunk| VolatileSlice::from(&mut chunk[..2])),
    );
    assert_eq!(client.server.handle(&request, &reply).unwrap(), 5016);
    let got: Vec<u8> = memory
        .chunks(3)
        .flat_map(|chunk| chunk[..2].to_vec())
        .collect();
    assert_eq!(got, data);
}

#[test]
fn an_unlinked_file_lives_on_while_it_is_known() {
    let host = Host::new();
    let client = host.client();
    let (node, fh) = with_file(&host, b"content");
    client.unlink(host.root, "file").unwrap();
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"content");
    let again = client.open(node, libc::O_RDWR).unwrap().fh;
    client.write(node, again, 0, b"C").unwrap();
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"Content");
    assert_eq!(client.getattr(node).unwrap().nlink, 0);
    let ask = SetattrIn {
        valid: fattr::MODE,
        mode: 0o600,
        ..Default::default()
    };
    assert_eq!(client.setattr(node, ask).unwrap().mode & 0o777, 0o600);
}

#[test]
fn appending_follows_the_host_where_others_append_too() {
    let append = libc::O_APPEND as u32;
    let host = Host::sharing(false);
    let client = host.client();
    let (node, fh) = with_file(&host, b"one ");
    fs::write(host.path("file"), "one two ").unwrap();
    // The guest believes that the file ends at 4.
    let ask = WriteIn {
        fh,
        offset: 4,
        flags: append,
        ..Default::default()
    };
    client.write_with(node, ask, b"three").unwrap();
    assert_eq!(
        fs::read_to_string(host.path("file")).unwrap(),
        "one two three"
    );
    // Write-back of a mapping is no appending, whatever handle it comes by.
    let ask = WriteIn {
        fh,
        flags: append,
        write_flags: WRITE_CACHE,
        ..Default::default()
    };
    client.write_with(node, ask, b"ONE").unwrap();
    assert_eq!(
        fs::read_to_string(host.path("file")).unwrap(),
        "ONE two three"
    );
}

#[test]
fn sparse_files_stay_sparse() {
    let host = Host::new();
    let client = host.client();
    let (node, fh) = with_file(&host, b"");
    client.write(node, fh, 8 << 20, b"end").unwrap();
    assert!(fs::metadata(host.path("file")).unwrap().blocks() < 100);
    let seek = |offset, whence: i32| {
        let ask = LseekIn {
            fh,
            offset,
            whence: whence as u32,
            padding: 0,
        };
        client
            .get::<LseekOut>(opcode::LSEEK, node, &[wire::as_bytes(&ask)])
            .map(|out| out.offset)
    };
    assert_eq!(seek(0, libc::SEEK_DATA).unwrap(), 8 << 20);
    assert_eq!(seek(0, libc::SEEK_HOLE).unwrap(), 0);
    assert_eq!(
        seek((8 << 20) + 3, libc::SEEK_DATA).unwrap_err(),
        libc::ENXIO
    );
    assert_eq!(seek(0, libc::SEEK_END).unwrap_err(), libc::EINVAL);
}

#[test]
fn space_is_allocated_and_punched() {
    let host = Host::new();
    let client = host.client();
    let (node, fh) = with_file(&host, &[1; 1 << 20]);
    let fallocate = |mode: i32, offset, length| {
        let ask = FallocateIn {
            fh,
            offset,
            length,
            mode: mode as u32,
            padding: 0,
        };
        client.done(opcode::FALLOCATE, node, &[wire::as_bytes(&ask)])
    };
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fallocate(punch, 0, 512 << 10).unwrap();
    assert_eq!(client.read(node, fh, 100, 4).unwrap(), [0; 4]);
    fallocate(0, 0, 2 << 20).unwrap();
    assert_eq!(client.getattr(node).unwrap().size, 2 << 20);
    assert_eq!(fallocate(0, u64::MAX, 1).unwrap_err(), libc::EFBIG);
    assert_eq!(fallocate(0, 0, 0).unwrap_err(), libc::EINVAL);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let host = Host::new();
    let client = host.client();
    let (node, fh) = with_file(&host, b"0123456789");
    let (to, open) = client
        .create(host.root, "to", libc::O_RDWR, (0o644, 0))
        .unwrap();
    let ask = CopyFileRangeIn {
        fh_in: fh,
        off_in: 2,
        nodeid_out: to.nodeid,
        fh_out: open.fh,
        off_out: 1,
        len: u64::MAX,
        flags: 0,
    };
    let out: WriteOut = client
        .get(opcode::COPY_FILE_RANGE, node, &[wire::as_bytes(&ask)])
        .unwrap();
    assert_eq!(out.size, 8);
    assert_eq!(fs::read(host.path("to")).unwrap(), b"\x0023456789");
}

#[test]
fn syncing_and_flushing() {
    let host = Host::sharing(false);
    let client = host.client();
    let (node, fh) = with_file(&host, b"x");
    for fsync_flags in [0, FSYNC_FDATASYNC] {
        let ask = FsyncIn {
            fh,
            fsync_flags,
            padding: 0,
        };
        client
            .done(opcode::FSYNC, node, &[wire::as_bytes(&ask)])
            .unwrap();
    }
    let ask = FlushIn {
        fh,
        ..Default::default()
    };
    client
        .done(opcode::FLUSH, node, &[wire::as_bytes(&ask)])
        .unwrap();
    let dir = client.opendir(host.root).unwrap().fh;
    let ask = FsyncIn {
        fh: dir,
        ..Default::default()
    };
    client
        .done(opcode::FSYNCDIR, host.root, &[wire::as_bytes(&ask)])
        .unwrap();
    client.write(node, fh, 0, b"y").unwrap();
    client.done(opcode::SYNCFS, host.root, &[&[0; 8]]).unwrap();
    client.done(opcode::SYNCFS, ROOT_ID, &[&[0; 8]]).unwrap();
    client.release(node, fh).unwrap();
    assert_eq!(client.read(node, fh, 0, 1).unwrap_err(), libc::EBADF);
}

#[test]
fn caching_is_for_exclusive_shares() {
    let host = Host::new();
    let (node, _) = with_file(&host, b"");
    let open = host.client().open(node, libc::O_RDONLY).unwrap();
    assert_eq!(open.open_flags, FOPEN_KEEP_CACHE | FOPEN_NOFLUSH);
    let open = host.client().opendir(host.root).unwrap();
    assert_eq!(open.open_flags, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR);
    let host = Host::sharing(false);
    let (node, _) = with_file(&host, b"");
    let open = host.client().open(node, libc::O_RDONLY).unwrap();
    assert_eq!(open.open_flags, FOPEN_NOFLUSH);
    assert_eq!(host.client().opendir(host.root).unwrap().open_flags, 0);
}
