//! The options of a mount: what the kernel takes as attributes, what the file system takes, the rest.
//!
//! The list is that of the specification ("Linux mount options"). Pure; an option that names
//! something husk does not do is an error.

use rustix::mount::MountPropagationFlags;

use crate::sys::MountAttributes;

/// The sorted options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) bind: bool,
    /// Binds what is mounted below, too.
    pub(super) recursive: bool,
    /// Changes what is mounted there already.
    pub(super) remount: bool,
    /// A tmpfs begins with what it covers.
    pub(super) copy_up: bool,
    /// Of this mount alone.
    pub(super) attributes: MountAttributes,
    /// Of this mount and all below.
    pub(super) deep: MountAttributes,
    /// Kinds, and whether each reaches all below; one after the other.
    pub(super) propagation: Vec<(u64, bool)>,
    /// Flags that a file system has as a whole, and a bind mount cannot change.
    pub(super) superblock: Vec<String>,
    /// For the file system itself: `name` or `name=value`.
    pub(super) data: Vec<String>,
}

/// How access times are kept: mount(2) has a flag for each way, and an order between them.
#[derive(Default)]
struct AccessTimes {
    named: bool,
    never: bool,
    strict: bool,
}

impl AccessTimes {
    fn take(&mut self, option: &str) -> bool {
        match option {
            "noatime" => self.never = true,
            "atime" => self.never = false,
            "strictatime" => self.strict = true,
            "nostrictatime" => self.strict = false,
            "relatime" | "norelatime" => {}
            _ => return false,
        }
        self.named = true;
        true
    }

    fn change(&self) -> Option<(u64, u64)> {
        let way = match (self.strict, self.never) {
            (true, _) => libc::MOUNT_ATTR_STRICTATIME,
            (false, true) => libc::MOUNT_ATTR_NOATIME,
            (false, false) => libc::MOUNT_ATTR_RELATIME,
        };
        self.named.then_some((way, ATIME))
    }
}

/// All three ways of keeping access times share one field.
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;

/// An attribute's name: what it sets and what it clears.
fn attribute(name: &str) -> Option<(u64, u64)> {
    Some(match name {
        "ro" => (libc::MOUNT_ATTR_RDONLY, 0),
        "rw" => (0, libc::MOUNT_ATTR_RDONLY),
        "nosuid" => (libc::MOUNT_ATTR_NOSUID, 0),
        "suid" => (0, libc::MOUNT_ATTR_NOSUID),
        "nodev" => (libc::MOUNT_ATTR_NODEV, 0),
        "dev" => (0, libc::MOUNT_ATTR_NODEV),
        "noexec" => (libc::MOUNT_ATTR_NOEXEC, 0),
        "exec" => (0, libc::MOUNT_ATTR_NOEXEC),
        "nosymfollow" => (libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
        "symfollow" => (0, libc::MOUNT_ATTR_NOSYMFOLLOW),
        "nodiratime" => (libc::MOUNT_ATTR_NODIRATIME, 0),
        "diratime" => (0, libc::MOUNT_ATTR_NODIRATIME),
        "noatime" => (libc::MOUNT_ATTR_NOATIME, ATIME),
        "strictatime" => (libc::MOUNT_ATTR_STRICTATIME, ATIME),
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (libc::MOUNT_ATTR_RELATIME, ATIME),
        _ => return None,
    })
}

impl MountAttributes {
    /// A later option wins over an earlier one.
    fn add(&mut self, (set, clear): (u64, u64)) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | clear;
        // The kernel wants the whole field cleared whenever a part of it is set.
        if clear & ATIME != 0 {
            self.clear |= ATIME;
        }
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.set & libc::MOUNT_ATTR_RDONLY != 0
    }
}

impl Options {
    /// Sorts the options; the error is the one that is not supported.
    pub(super) fn parse(options: &[String]) -> Result<Self, &str> {
        let mut sorted = Self::default();
        let mut times = AccessTimes::default();
        for option in options {
            match option.as_str() {
                "bind" => sorted.bind = true,
                "rbind" => {
                    sorted.bind = true;
                    sorted.recursive = true;
                }
                "remount" => sorted.remount = true,
                "tmpcopyup" => sorted.copy_up = true,
                // The kernel's defaults, said aloud; and what it does not know any more.
                "" | "defaults" | "loud" | "silent" | "nomand" | "mand" | "iversion"
                | "noiversion" => {}
                "sync" | "dirsync" | "lazytime" | "async" | "nolazytime" => {
                    sorted.superblock.push(option.clone());
                }
                // The shim has taken those of bind mounts.
                "idmap" | "ridmap" => return Err(option),
                name if times.take(name) => {}
                name => {
                    if let Some(change) = attribute(name) {
                        sorted.attributes.add(change);
                    } else if let Some(kind) = propagation(name) {
                        sorted.propagation.push(kind);
                    } else if let Some(change) = name.strip_prefix('r').and_then(attribute) {
                        sorted.deep.add(change);
                    } else {
                        sorted.data.push(name.into());
                    }
                }
            }
        }
        if let Some(change) = times.change() {
            sorted.attributes.add(change);
        }
        Ok(sorted)
    }
}

/// `linux.rootfsPropagation`, which has the words of the options.
pub(super) fn propagation(name: &str) -> Option<(u64, bool)> {
    let (kind, deep) = match name {
        "private" => (MountPropagationFlags::PRIVATE, false),
        "rprivate" => (MountPropagationFlags::PRIVATE, true),
        "slave" => (MountPropagationFlags::DOWNSTREAM, false),
        "rslave" => (MountPropagationFlags::DOWNSTREAM, true),
        "shared" => (MountPropagationFlags::SHARED, false),
        "rshared" => (MountPropagationFlags::SHARED, true),
        "unbindable" => (MountPropagationFlags::UNBINDABLE, false),
        "runbindable" => (MountPropagationFlags::UNBINDABLE, true),
        _ => return None,
    };
    Some((u64::from(kind.bits()), deep))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Options {
        let options: Vec<String> = text.split(',').map(String::from).collect();
        Options::parse(&options).unwrap()
    }

    #[test]
    fn options_are_sorted() {
        let options = parse("nosuid,strictatime,mode=755,size=65536k");
        assert_eq!(
            options.attributes.set,
            libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME
        );
        assert_eq!(options.attributes.clear, ATIME);
        assert_eq!(options.data, ["mode=755", "size=65536k"]);
        assert!(!options.bind);
    }

    #[test]
    fn binds_and_propagation() {
        let options = parse("rbind,rprivate,ro,rnosuid");
        assert!(options.bind && options.recursive);
        assert_eq!(options.propagation, [(libc::MS_PRIVATE, true)]);
        assert!(options.attributes.is_read_only());
        assert_eq!(options.deep.set, libc::MOUNT_ATTR_NOSUID);
        assert!(parse("bind,rro").deep.is_read_only());
    }

    #[test]
    fn the_later_option_wins() {
        assert!(!parse("ro,rw").attributes.is_read_only());
        assert!(parse("rw,ro").attributes.is_read_only());
    }

    /// As mount(2) orders its flags, whatever the order of the options.
    #[test]
    fn access_times_are_kept_in_one_way() {
        let way = |text| {
            let attributes = parse(text).attributes;
            assert_eq!(attributes.clear & ATIME, ATIME, "{text}");
            attributes.set
        };
        for text in [
            "relatime",
            "noatime,atime",
            "strictatime,nostrictatime",
            "norelatime",
        ] {
            assert_eq!(way(text), libc::MOUNT_ATTR_RELATIME, "{text}");
        }
        for text in ["noatime,relatime", "relatime,noatime"] {
            assert_eq!(way(text), libc::MOUNT_ATTR_NOATIME, "{text}");
        }
        for text in ["noatime,strictatime", "strictatime,noatime"] {
            assert_eq!(way(text), libc::MOUNT_ATTR_STRICTATIME, "{text}");
        }
        assert_eq!(parse("ro").attributes.clear, 0);
    }

    #[test]
    fn what_is_of_the_file_system_as_a_whole_is_no_data() {
        let options = parse("sync,iversion,remount,tmpcopyup,size=1m");
        assert!(options.remount && options.copy_up);
        assert_eq!(
            (options.superblock, options.data),
            (vec!["sync".into()], vec!["size=1m".into()])
        );
    }

    #[test]
    fn what_is_not_done_is_named() {
        assert_eq!(Options::parse(&["ro".into(), "idmap".into()]), Err("idmap"));
    }
}
