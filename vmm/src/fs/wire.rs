//! The FUSE wire format: the structs, opcodes and flags of protocol 7.41 that the server speaks.
//!
//! Source: include/uapi/linux/fuse.h of Linux 6.12; names are those of the header without their
//! prefix. All integers are in the host's (and guest's) byte order. No logic lives here, and no
//! struct may contain padding: its bytes go to the guest as they are.

/// A struct that is exactly its bytes on the wire.
///
/// # Safety
/// `repr(C)`, made of integers only, no padding: every byte pattern is a value and every value's
/// bytes are initialised.
pub(super) unsafe trait Wire: Copy + Default {}

/// Reads a `T` from the start of `bytes`; `None` when they are too few.
pub(super) fn from_bytes<T: Wire>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: the length was checked, `read_unaligned` asks for no alignment, and `Wire` says that
    // any bytes make a value.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// The bytes of `value` as they go on the wire.
pub(super) fn as_bytes<T: Wire>(value: &T) -> &[u8] {
    // SAFETY: `Wire` promises that all `size_of::<T>()` bytes are initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident [$size:literal] { $($field:ident: $ty:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default)]
        #[allow(dead_code)]
        pub(super) struct $name { $(pub(super) $field: $ty),* }
        const _: () = {
            let fields = 0 $(+ size_of::<$ty>())*;
            assert!(size_of::<$name>() == $size && fields == $size);
        };
        // SAFETY: repr(C), integers and `Wire` structs only; the assertion rules out padding.
        unsafe impl Wire for $name {}
    )*};
}

wire! {
    /// fuse_in_header. `total_extlen` counts 8-byte units at the end of the request.
    InHeader [40] {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    OutHeader [16] { len: u32, error: i32, unique: u64 }
    Attr [88] {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32,
        rdev: u32, blksize: u32, flags: u32,
    }
    /// fuse_entry_out. `entry_valid` and `attr_valid` are seconds.
    EntryOut [128] {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr,
    }
    AttrOut [104] { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    ForgetIn [8] { nlookup: u64 }
    ForgetOne [16] { nodeid: u64, nlookup: u64 }
    BatchForgetIn [8] { count: u32, dummy: u32 }
    StatxTime [16] { sec: i64, nsec: u32, reserved: i32 }
    /// fuse_statx, bit for bit statx(2)'s.
    Statx [256] {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16,
        spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64,
        atime: StatxTime, btime: StatxTime, ctime: StatxTime, mtime: StatxTime,
        rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    StatxOut [288] {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx,
    }
    SetattrIn [88] {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64,
        atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    MknodIn [16] { mode: u32, rdev: u32, umask: u32, padding: u32 }
    MkdirIn [8] { mode: u32, umask: u32 }
    RenameIn [8] { newdir: u64 }
    Rename2In [16] { newdir: u64, flags: u32, padding: u32 }
    LinkIn [8] { oldnodeid: u64 }
    OpenIn [8] { flags: u32, open_flags: u32 }
    CreateIn [16] { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    OpenOut [16] { fh: u64, open_flags: u32, backing_id: i32 }
    ReleaseIn [24] { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    FlushIn [24] { fh: u64, unused: u32, padding: u32, lock_owner: u64 }
    ReadIn [40] {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteIn [40] {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteOut [8] { size: u32, padding: u32 }
    StatfsOut [80] {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64,
        bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
    }
    FsyncIn [16] { fh: u64, fsync_flags: u32, padding: u32 }
    /// fuse_setxattr_in with SETXATTR_EXT, which INIT insists on.
    SetxattrIn [16] { size: u32, flags: u32, setxattr_flags: u32, padding: u32 }
    GetxattrIn [8] { size: u32, padding: u32 }
    GetxattrOut [8] { size: u32, padding: u32 }
    InitIn [16] { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    /// What follows [`InitIn`] when its flags have INIT_EXT.
    InitInExt [48] { flags2: u32, unused: [u32; 11] }
    InitOut [64] {
        major: u32, minor: u32, max_readahead: u32, flags: u32,
        max_background: u16, congestion_threshold: u16, max_write: u32, time_gran: u32,
        max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32, unused: [u32; 6],
    }
    FallocateIn [32] { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    /// fuse_dirent without its name, which follows and is padded to 8 bytes.
    Dirent [24] { ino: u64, off: u64, namelen: u32, kind: u32 }
    LseekIn [24] { fh: u64, offset: u64, whence: u32, padding: u32 }
    LseekOut [8] { offset: u64 }
    CopyFileRangeIn [56] {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
}

/// The node id of the root (FUSE_ROOT_ID).
pub(super) const ROOT_ID: u64 = 1;
/// The major version; a different one cannot be spoken.
pub(super) const MAJOR: u32 = 7;
/// The newest minor version spoken.
pub(super) const MINOR: u32 = 41;
/// The oldest minor version spoken: SETXATTR_EXT and HANDLE_KILLPRIV_V2 came with it.
pub(super) const OLDEST_MINOR: u32 = 33;

/// enum fuse_opcode.
pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
}

/// INIT flags; bits 32 and up travel in `flags2`.
pub(super) mod init {
    pub(crate) const ASYNC_READ: u64 = 1 << 0;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const SUBMOUNTS: u64 = 1 << 27;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
}

/// fuse_setattr_in.valid.
pub(super) mod fattr {
    pub(crate) const MODE: u32 = 1 << 0;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Flags of a reply to OPEN, CREATE and OPENDIR.
pub(super) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
pub(super) const FOPEN_CACHE_DIR: u32 = 1 << 3;
pub(super) const FOPEN_NOFLUSH: u32 = 1 << 5;
/// fuse_attr.flags: the directory is the root of a file system of its own.
pub(super) const ATTR_SUBMOUNT: u32 = 1 << 0;
/// fuse_open_in.open_flags: the caller has no CAP_FSETID, truncation drops set-id bits.
pub(super) const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// fuse_write_in.write_flags: page cache write-back, the handle is any that may write.
pub(super) const WRITE_CACHE: u32 = 1 << 0;
/// fuse_write_in.write_flags: the caller has no CAP_FSETID.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// fuse_fsync_in.fsync_flags: data only.
pub(super) const FSYNC_FDATASYNC: u32 = 1 << 0;
/// fuse_setxattr_in.setxattr_flags: the caller is not in the file's group, drop set-gid.
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_survive_the_way_to_bytes_and_back() {
        let header = InHeader {
            len: 40,
            opcode: opcode::WRITE,
            unique: 7,
            ..Default::default()
        };
        let back: InHeader = from_bytes(as_bytes(&header)).unwrap();
        assert_eq!((back.len, back.opcode, back.unique), (40, 16, 7));
        assert!(from_bytes::<InHeader>(&[0; 39]).is_none());
        assert_eq!(as_bytes(&EntryOut::default()).len(), 128);
    }
}
