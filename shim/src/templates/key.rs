//! What a template is made of, and the key that follows from it: everything that must be the same
//! for a saved machine to run on. Files are known by their [`Stamp`], not by their bytes: reading
//! 18 MB at each start would cost more than the start.

use std::{
    arch::x86_64::{__cpuid, __cpuid_count, CpuidResult},
    ffi::CStr,
    fmt::{self, Write as _},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use serde::{Deserialize, Serialize};

use super::size::Size;
use crate::{VERSION, config::Config};

/// Goes up whenever husk writes templates in another way.
const FORMAT: u32 = 2;
/// Hexadecimal digits of a key.
const DIGITS: usize = 32;

/// Who may start from one template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Every pod of this host.
    Node,
    /// Pods of one namespace: containerd's, and behind a `/` Kubernetes' if there is one.
    Namespace(String),
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("node"),
            Self::Namespace(name) => write!(f, "namespace {name}"),
        }
    }
}

/// A file as the kernel knows it. Whoever writes to a file, however, changes its ctime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub device: u64,
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// Nanoseconds since the epoch.
    pub ctime_ns: i64,
}

impl From<&fs::Metadata> for Stamp {
    fn from(found: &fs::Metadata) -> Self {
        let time = |seconds: i64, ns: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(ns);
        Self {
            device: found.dev(),
            inode: found.ino(),
            size: found.size(),
            mtime_ns: time(found.mtime(), found.mtime_nsec()),
            ctime_ns: time(found.ctime(), found.ctime_nsec()),
        }
    }
}

/// A file that a template was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Where it was; not part of the key.
    pub path: PathBuf,
    pub stamp: Stamp,
}

impl Source {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)
            .map_err(|e| io::Error::new(e.kind(), format!("look at {}: {e}", path.display())))?;
        Ok(Self {
            path: path.to_owned(),
            stamp: Stamp::from(&found),
        })
    }
}

/// Everything that a template depends on, in a form that people can read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingredients {
    pub husk: String,
    pub kernel: Source,
    pub initrd: Source,
    pub vmm: Source,
    /// Vendor, signature and features, as CPUID tells them, and the microcode's version.
    pub cpu: String,
    /// The host's kernel, which is where KVM's ABI comes from.
    pub host: String,
    /// The template's; pods may have more.
    pub memory_mib: u64,
    /// That pods may have.
    pub possible_vcpus: u32,
    pub cmdline: String,
    pub scope: Scope,
}

/// The name of a template: 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key(String);

impl Key {
    /// A directory's name, if it is a key.
    pub fn parse(name: &str) -> Option<Self> {
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (name.len() == DIGITS && name.bytes().all(digit)).then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Ingredients {
    /// Of a pod with this configuration, here and now.
    pub fn gather(config: &Config, scope: Scope) -> io::Result<Self> {
        let size = Size::for_pod(config);
        Ok(Self {
            husk: VERSION.to_owned(),
            kernel: Source::of(&config.kernel)?,
            initrd: Source::of(&config.initrd)?,
            vmm: Source::of(&config.vmm)?,
            cpu: cpu().to_owned(),
            host: host()?,
            memory_mib: size.memory_mib,
            possible_vcpus: size.possible_vcpus,
            cmdline: config.cmdline.clone(),
            scope,
        })
    }

    pub fn key(&self) -> Key {
        let mut text = format!("husk template {FORMAT}\n{}\n", self.husk);
        for source in [&self.kernel, &self.initrd, &self.vmm] {
            // Debug output of plain numbers under their names: one line each, without ambiguity.
            let _ = writeln!(text, "{:?}", source.stamp);
        }
        let _ = writeln!(text, "{}\n{}", self.cpu, self.host);
        let (memory_mib, possible_vcpus) = (self.memory_mib, self.possible_vcpus);
        let _ = writeln!(text, "{memory_mib} MiB, {possible_vcpus} vCPUs");
        let _ = writeln!(text, "{:?}\n{:?}", self.cmdline, self.scope);
        let mut key = hex(&hmac_sha256::Hash::hash(text.as_bytes()));
        key.truncate(DIGITS);
        Key(key)
    }

    /// Why no pod of this host can use what was made of this any more; none if one could.
    pub fn outdated(&self) -> Option<String> {
        if self.husk != VERSION {
            return Some(format!("made by husk {}, this is {VERSION}", self.husk));
        }
        for (what, source) in [
            ("kernel", &self.kernel),
            ("initrd", &self.initrd),
            ("husk-vmm", &self.vmm),
        ] {
            match fs::metadata(&source.path) {
                Ok(found) if Stamp::from(&found) == source.stamp => {}
                Ok(_) => return Some(format!("{what} {} has changed", source.path.display())),
                Err(e) => return Some(format!("{what} {}: {e}", source.path.display())),
            }
        }
        if self.cpu != cpu() {
            return Some("the CPU is another".into());
        }
        match host() {
            Ok(host) if host == self.host => None,
            Ok(_) => Some("the host's kernel is another".into()),
            Err(e) => Some(format!("uname: {e}")),
        }
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Asked once per process: under a hypervisor each CPUID leaves the guest.
fn cpu() -> &'static str {
    static CPU: OnceLock<String> = OnceLock::new();
    CPU.get_or_init(|| {
        let microcode = fs::read_to_string("/sys/devices/system/cpu/cpu0/microcode/version");
        let microcode = microcode.unwrap_or_default();
        format!("{} microcode {}", cpuid(), microcode.trim())
    })
}

/// Vendor, signature, and the feature words of CPUID that are the same on every core; words with an
/// APIC id, a core count or the momentary size of the XSAVE area are left out.
#[allow(unused_unsafe)] // Only since Rust 1.93 or so is CPUID safe to call on x86-64.
fn cpuid() -> String {
    type Words = fn(CpuidResult) -> [u32; 4];
    const ALL: Words = |r| [r.eax, r.ebx, r.ecx, r.edx];
    let leaves: [(u32, u32, Words); 11] = [
        (0x0000_0001, 0, |r| [r.eax, 0, r.ecx, r.edx]),
        (0x0000_0007, 0, ALL),
        (0x0000_0007, 1, ALL),
        (0x0000_0007, 2, ALL),
        (0x0000_000d, 0, |r| [r.eax, 0, 0, r.edx]),
        (0x0000_000d, 1, |r| [r.eax, 0, r.ecx, r.edx]),
        (0x8000_0001, 0, |r| [r.eax, 0, r.ecx, r.edx]),
        (0x8000_0007, 0, |r| [0, r.ebx, 0, r.edx]),
        (0x8000_0008, 0, |r| [r.eax, r.ebx, 0, 0]),
        (0x8000_000a, 0, |r| [r.eax, 0, 0, r.edx]),
        (0x8000_0021, 0, |r| [r.eax, 0, 0, 0]),
    ];
    // SAFETY: every x86-64 processor has CPUID.
    let (basic, extended) = unsafe { (__cpuid(0), __cpuid(0x8000_0000)) };
    let mut text = String::new();
    for word in [basic.ebx, basic.edx, basic.ecx] {
        text.extend(word.to_le_bytes().map(|byte| match byte {
            0x20..=0x7e => char::from(byte),
            _ => '.',
        }));
    }
    for (leaf, subleaf, words) in leaves {
        let last = if leaf < 0x8000_0000 {
            basic.eax
        } else {
            extended.eax
        };
        if leaf > last {
            continue;
        }
        // SAFETY: as above; the leaf is one that the processor has.
        let words = words(unsafe { __cpuid_count(leaf, subleaf) });
        let _ = write!(text, " {leaf:x}.{subleaf}=");
        for (index, word) in words.iter().enumerate() {
            let separator = if index == 0 { "" } else { ":" };
            let _ = write!(text, "{separator}{word:x}");
        }
    }
    text
}

/// Release and version of the host's kernel.
fn host() -> io::Result<String> {
    // SAFETY: utsname is plain data, for which zeroes are a value.
    let mut name: libc::utsname = unsafe { std::mem::zeroed() };
    // SAFETY: `name` has room for what uname(2) writes.
    if unsafe { libc::uname(&raw mut name) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let text = |field: &[libc::c_char]| {
        // SAFETY: uname(2) ends every field with a NUL within its array.
        let field = unsafe { CStr::from_ptr(field.as_ptr()) };
        field.to_string_lossy().into_owned()
    };
    Ok(format!("{} {}", text(&name.release), text(&name.version)))
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use super::*;
    use crate::options::Options;

    /// A configuration whose files lie in `directory`.
    pub(crate) fn config(directory: &Path) -> Config {
        let mut config = Config::load(Path::new("/nowhere"), &Options::default()).unwrap();
        for (name, path) in [
            ("vmlinux", &mut config.kernel),
            ("initrd.img", &mut config.initrd),
            ("husk-vmm", &mut config.vmm),
        ] {
            *path = directory.join(name);
            if !path.exists() {
                fs::write(&path, name).unwrap();
            }
        }
        config.template_dir = directory.join("templates");
        config
    }

    fn key(config: &Config) -> Key {
        let scope = Scope::Namespace("default".into());
        Ingredients::gather(config, scope).unwrap().key()
    }

    #[test]
    fn everything_a_template_depends_on_changes_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let first = key(&config);
        assert_eq!(key(&config), first);
        assert_eq!(Key::parse(first.as_str()).unwrap(), first);
        let mut keys = vec![first.clone()];
        let mut other = config.clone();
        other.memory_mib += 2;
        keys.push(key(&other));
        other.memory_mib -= 2;
        other.vcpus = 9;
        keys.push(key(&other));
        other.vcpus = 1;
        other.cmdline = "quiet".into();
        keys.push(key(&other));
        let made = Ingredients::gather(&config, Scope::Node).unwrap();
        keys.push(made.key());
        keys.push(
            Ingredients {
                cpu: "x".into(),
                ..made.clone()
            }
            .key(),
        );
        keys.push(
            Ingredients {
                host: "x".into(),
                ..made.clone()
            }
            .key(),
        );
        keys.push(
            Ingredients {
                husk: "x".into(),
                ..made
            }
            .key(),
        );
        for path in [&config.kernel, &config.initrd, &config.vmm] {
            let new = path.with_extension("new");
            fs::copy(path, &new).unwrap();
            fs::rename(&new, path).unwrap();
            keys.push(key(&config));
        }
        let different: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(different.len(), keys.len());
    }

    #[test]
    fn pods_of_many_sizes_have_one_key() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let mut large = config.clone();
        (large.memory_mib, large.vcpus) = (config.memory_mib + 14 * 128, 8);
        assert_eq!(key(&large), key(&config));
    }

    #[test]
    fn the_place_of_a_file_does_not_matter() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let mut linked = config.clone();
        linked.kernel = directory.path().join("link");
        std::os::unix::fs::symlink(&config.kernel, &linked.kernel).unwrap();
        assert_eq!(key(&linked), key(&config));
    }

    #[test]
    fn what_has_changed_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let made = Ingredients::gather(&config, Scope::Node).unwrap();
        assert_eq!(made.outdated(), None);
        fs::write(&config.initrd, "new").unwrap();
        assert!(made.outdated().unwrap().contains("initrd.img has changed"));
        fs::remove_file(&config.kernel).unwrap();
        assert!(made.outdated().unwrap().contains("vmlinux: No such file"));
    }

    #[test]
    fn a_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        config.initrd = "/nowhere/initrd".into();
        let error = Ingredients::gather(&config, Scope::Node).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("look at /nowhere/initrd: No such")
        );
    }

    #[test]
    fn a_key_costs_well_under_a_millisecond() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let begun = Instant::now();
        for _ in 0..100 {
            key(&config);
        }
        // Generous: a debug build on a busy machine.
        assert!(begun.elapsed().as_millis() < 100, "{:?}", begun.elapsed());
    }

    #[test]
    fn only_keys_are_keys() {
        for name in ["", ".new-0123", "..", "0123456789abcdef0123456789abcdeF"] {
            assert!(Key::parse(name).is_none(), "{name}");
        }
    }
}
