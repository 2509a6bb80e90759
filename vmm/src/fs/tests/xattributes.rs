//! Extended attributes, ACLs and file capabilities.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

impl Client<'_> {
    fn setxattr(&self, node: u64, name: &str, value: &[u8], flags: u32) -> Result<(), Errno> {
        self.setxattr_with(
            node,
            name,
            value,
            SetxattrIn {
                flags,
                ..Default::default()
            },
        )
    }

    fn setxattr_with(
        &self,
        node: u64,
        name: &str,
        value: &[u8],
        ask: SetxattrIn,
    ) -> Result<(), Errno> {
        let ask = SetxattrIn {
            size: value.len() as u32,
            ..ask
        };
        let args = [wire::as_bytes(&ask), name.as_bytes(), b"\0", value];
        self.done(opcode::SETXATTR, node, &args)
    }

    fn getxattr(&self, node: u64, name: &str, size: u32) -> Result<Vec<u8>, Errno> {
        let ask = GetxattrIn { size, padding: 0 };
        let args = [wire::as_bytes(&ask), name.as_bytes(), b"\0"];
        self.call(opcode::GETXATTR, node, &args, (size as usize).max(8))
    }

    fn listxattr(&self, node: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let ask = GetxattrIn { size, padding: 0 };
        self.call(
            opcode::LISTXATTR,
            node,
            &[wire::as_bytes(&ask)],
            (size as usize).max(8),
        )
    }
}

#[test]
fn attributes_of_files_directories_and_links() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("file"), "").unwrap();
    fs::create_dir(host.path("dir")).unwrap();
    for name in ["file", "dir"] {
        let node = client.walk(host.root, name).unwrap();
        client.setxattr(node, "user.colour", b"blue", 0).unwrap();
        assert_eq!(client.getxattr(node, "user.colour", 100).unwrap(), b"blue");
        assert_eq!(
            client.getxattr(node, "user.colour", 0).unwrap()[..4],
            4_u32.to_ne_bytes()
        );
        assert_eq!(
            client.getxattr(node, "user.colour", 3).unwrap_err(),
            libc::ERANGE
        );
        assert_eq!(
            client.getxattr(node, "user.none", 100).unwrap_err(),
            libc::ENODATA
        );
        let create = libc::XATTR_CREATE as u32;
        let again = client.setxattr(node, "user.colour", b"red", create);
        assert_eq!(again.unwrap_err(), libc::EEXIST);
        assert_eq!(client.listxattr(node, 100).unwrap(), b"user.colour\0");
        assert_eq!(
            client.listxattr(node, 0).unwrap()[..4],
            12_u32.to_ne_bytes()
        );
        client
            .done(opcode::REMOVEXATTR, node, &[b"user.colour\0"])
            .unwrap();
        assert_eq!(client.listxattr(node, 100).unwrap(), b"");
    }
    // trusted.* is what a symbolic link may have; it must not end up on the target.
    let link = client.symlink(host.root, "link", "file").unwrap().nodeid;
    client.setxattr(link, "trusted.t", b"1", 0).unwrap();
    assert_eq!(client.getxattr(link, "trusted.t", 9).unwrap(), b"1");
    assert_eq!(client.listxattr(link, 100).unwrap(), b"");
    let file = client.walk(host.root, "file").unwrap();
    assert_eq!(
        client.getxattr(file, "trusted.t", 9).unwrap_err(),
        libc::ENODATA
    );
    let fifo = client
        .mknod(host.root, "fifo", libc::S_IFIFO | 0o644, 0)
        .unwrap()
        .nodeid;
    client.setxattr(fifo, "trusted.t", b"1", 0).unwrap();
    assert_eq!(client.getxattr(fifo, "trusted.t", 9).unwrap(), b"1");
}

#[test]
fn file_capabilities_are_the_containers_and_labels_the_hosts() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("file"), "x").unwrap();
    let node = client.walk(host.root, "file").unwrap();
    // VFS_CAP_REVISION_2 with cap_net_raw+ep.
    let caps: Vec<u8> = [0x0200_0001_u32, 1 << 13, 0, 0, 0]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    client
        .setxattr(node, "security.capability", &caps, 0)
        .unwrap();
    assert_eq!(
        client.getxattr(node, "security.capability", 64).unwrap(),
        caps
    );
    // They do not survive a write, by anyone.
    let fh = client.open(node, libc::O_WRONLY).unwrap().fh;
    client.write(node, fh, 0, b"y").unwrap();
    let gone = client.getxattr(node, "security.capability", 64);
    assert_eq!(gone.unwrap_err(), libc::ENODATA);
    for name in [
        "security.selinux",
        "security.ima",
        "security.evm",
        "security.",
    ] {
        assert_eq!(
            client.setxattr(node, name, b"x", 0).unwrap_err(),
            libc::EPERM
        );
    }
}

/// An access control list in the kernel's xattr form: tag, permissions, id of each entry.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, perm, id) in entries {
        bytes.extend([tag.to_le_bytes(), perm.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const USER_OBJ: u16 = 1;
const USER: u16 = 2;
const GROUP_OBJ: u16 = 4;
const MASK: u16 = 16;
const OTHER: u16 = 32;

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let host = Host::new();
    let client = host.client();
    let id = u32::MAX;
    let list = acl(&[
        (USER_OBJ, 7, id),
        (USER, 6, 1000),
        (GROUP_OBJ, 5, id),
        (MASK, 7, id),
        (OTHER, 5, id),
    ]);
    client
        .setxattr(host.root, "system.posix_acl_default", &list, 0)
        .unwrap();
    let (file, _) = client
        .create(host.root, "file", libc::O_WRONLY, (0o666, 0o077))
        .unwrap();
    // By the umask it would be 0600.
    assert_eq!(file.attr.mode & 0o7777, 0o664);
    let got = client
        .getxattr(file.nodeid, "system.posix_acl_access", 200)
        .unwrap();
    assert!(got.len() > 4);
}

#[test]
fn an_acl_sets_the_mode_and_may_cost_the_setgid_bit() {
    let host = Host::new();
    let client = host.client();
    fs::write(host.path("file"), "").unwrap();
    let node = client.walk(host.root, "file").unwrap();
    let id = u32::MAX;
    let list = acl(&[(USER_OBJ, 7, id), (GROUP_OBJ, 1, id), (OTHER, 0, id)]);
    let setgid = || {
        fs::set_permissions(host.path("file"), fs::Permissions::from_mode(0o2755)).unwrap();
    };
    setgid();
    client
        .setxattr(node, "system.posix_acl_access", &list, 0)
        .unwrap();
    assert_eq!(client.getattr(node).unwrap().mode & 0o7777, 0o2710);
    setgid();
    let ask = SetxattrIn {
        setxattr_flags: SETXATTR_ACL_KILL_SGID,
        ..Default::default()
    };
    client
        .setxattr_with(node, "system.posix_acl_access", &list, ask)
        .unwrap();
    assert_eq!(client.getattr(node).unwrap().mode & 0o7777, 0o710);
}

#[test]
fn the_root_directory_has_none_and_never_says_enosys() {
    let host = Host::new();
    let client = host.client();
    assert_eq!(
        client.getxattr(ROOT_ID, "user.x", 10).unwrap_err(),
        libc::ENODATA
    );
    assert_eq!(client.listxattr(ROOT_ID, 10).unwrap(), b"");
    assert_eq!(client.listxattr(ROOT_ID, 0).unwrap(), [0; 8]);
    assert_eq!(
        client.setxattr(ROOT_ID, "user.x", b"", 0).unwrap_err(),
        libc::EROFS
    );
    let removed = client.done(opcode::REMOVEXATTR, ROOT_ID, &[b"user.x\0"]);
    assert_eq!(removed.unwrap_err(), libc::EROFS);
    let long = "user.".to_owned() + &"x".repeat(300);
    assert_eq!(
        client.getxattr(host.root, &long, 10).unwrap_err(),
        libc::ERANGE
    );
}
