//! What a pod is made of, unless somebody said otherwise: `/etc/husk/config.toml`, overridden by
//! the runtime options. Read once per pod. An unknown key is an error that names it and its file.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use log::LevelFilter;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{network::Serving, options::Options};

/// The file for all pods of the host. It need not exist.
pub const CONFIG: &str = "/etc/husk/config.toml";
/// A pod's memory where nobody says otherwise, MiB.
pub const DEFAULT_MEMORY_MIB: u64 = 256;
/// The least memory that the guest's kernel is known to boot in, MiB.
const MEMORY_MIB_MIN: u64 = 64;
/// As much as fits below the guest-physical addresses every CPU has (36 bits), MiB.
pub(crate) const MEMORY_MIB_MAX: u64 = 64 * 1024;
/// vCPUs of one pod at most (machine.proto).
pub(crate) const VCPUS_MAX: u32 = 64;
/// Where templates lie by default.
const TEMPLATES: &str = "/var/lib/husk/templates";
/// Disk space of all templates by default, MiB.
const TEMPLATE_SPACE_MIB: u64 = 1024;
/// As much as anybody may ask for, MiB.
const TEMPLATE_SPACE_MIB_MAX: u64 = 1 << 20;
/// Bytes of a configuration file at most.
const FILE_LIMIT: u64 = 1 << 20;

/// Which pods start as clones of one template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// None: every pod boots.
    Off,
    /// Those of a namespace.
    Namespace,
    /// All of the host.
    Node,
}

impl Sharing {
    fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Namespace => "namespace",
            Self::Node => "node",
        }
    }
}

/// Who moves the packets of a pod's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VhostNet {
    /// The host's kernel where it has vhost-net, else the VMM.
    Auto,
    /// The VMM.
    Off,
}

impl VhostNet {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Off => "off",
        }
    }
}

/// A complete, checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Guest memory, MiB; even, as the VMM wants 2 MiB steps.
    pub memory_mib: u64,
    /// vCPUs at boot.
    pub vcpus: u32,
    /// Appended to the VMM's own kernel command line.
    pub cmdline: String,
    /// From the VMM's start to the agent's first word.
    pub agent_timeout: Duration,
    pub log_level: Option<LevelFilter>,
    /// The version of the task service that containerd is told to speak, 2 or 3; containerd 1.7 knows only 2.
    pub task_api: u32,
    /// Nothing else runs on the other threads of a core that the pod runs on.
    pub core_scheduling: bool,
    pub vhost_net: VhostNet,
    pub templates: Sharing,
    /// On a file system of the host's own; need not exist.
    pub template_dir: PathBuf,
    /// Disk space of all templates together, MiB.
    pub template_space_mib: u64,
}

#[derive(Debug, Error)]
pub enum ConfigError {
    #[error("read configuration {path}: {cause}")]
    Read { path: PathBuf, cause: io::Error },
    #[error("configuration {origin}: {cause}")]
    Parse { origin: String, cause: String },
    #[error("configuration {origin}: {key} = {value}: {reason}")]
    Value {
        origin: String,
        key: &'static str,
        value: String,
        reason: String,
    },
    #[error("write the configuration down: {0}")]
    Write(String),
    #[error("find husk's own directory by /proc/self/exe: {0}")]
    Prefix(io::Error),
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Table {
    vmm: Option<PathBuf>,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    memory_mib: Option<u64>,
    vcpus: Option<u32>,
    cmdline: Option<String>,
    agent_timeout_ms: Option<u64>,
    log_level: Option<String>,
    task_api: Option<u32>,
    core_scheduling: Option<bool>,
    vhost_net: Option<String>,
    templates: Option<String>,
    template_dir: Option<PathBuf>,
    template_space_mib: Option<u64>,
}

impl Config {
    /// The configuration of a pod: `file`, or the one that the options name instead, then the
    /// options' body.
    pub fn load(file: &Path, options: &Options) -> Result<Self, ConfigError> {
        let mut config = Self::defaults(&library()?);
        if options.config_path.is_empty() {
            if let Some(text) = read(file, true)? {
                config.apply(&text, &file.display().to_string())?;
            }
        } else {
            let path = Path::new(&options.config_path);
            let text = read(path, false)?.unwrap_or_default();
            config.apply(&text, &path.display().to_string())?;
        }
        if !options.config_body.is_empty() {
            config.apply(&options.config_body, "runtime options (config_body)")?;
        }
        Ok(config)
    }

    /// How the pod's network is.
    pub fn serving(&self) -> Serving {
        Serving {
            queues: self.vcpus,
            vhost: self.vhost_net == VhostNet::Auto,
        }
    }

    fn defaults(library: &Path) -> Self {
        Self {
            vmm: library.join("husk-vmm"),
            kernel: library.join("vmlinux"),
            initrd: library.join("initrd.img"),
            memory_mib: DEFAULT_MEMORY_MIB,
            vcpus: 1,
            cmdline: String::new(),
            agent_timeout: Duration::from_secs(10),
            log_level: None,
            task_api: 2,
            core_scheduling: false,
            vhost_net: VhostNet::Auto,
            templates: Sharing::Namespace,
            template_dir: TEMPLATES.into(),
            template_space_mib: TEMPLATE_SPACE_MIB,
        }
    }

    /// The same as a configuration file, for a process that builds a template for this one. Without
    /// `log_level`, which is for pods.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        let table = Table {
            vmm: Some(self.vmm.clone()),
            kernel: Some(self.kernel.clone()),
            initrd: Some(self.initrd.clone()),
            memory_mib: Some(self.memory_mib),
            vcpus: Some(self.vcpus),
            cmdline: Some(self.cmdline.clone()),
            agent_timeout_ms: u64::try_from(self.agent_timeout.as_millis()).ok(),
            log_level: None,
            task_api: Some(self.task_api),
            core_scheduling: Some(self.core_scheduling),
            vhost_net: Some(self.vhost_net.name().into()),
            templates: Some(self.templates.name().into()),
            template_dir: Some(self.template_dir.clone()),
            template_space_mib: Some(self.template_space_mib),
        };
        basic_toml::to_string(&table).map_err(|e| ConfigError::Write(e.to_string()))
    }

    fn apply(&mut self, text: &str, origin: &str) -> Result<(), ConfigError> {
        let table: Table = basic_toml::from_str(text).map_err(|e| ConfigError::Parse {
            origin: origin.to_owned(),
            cause: e.to_string(),
        })?;
        let refuse = |key, value: String, reason: String| {
            Err(ConfigError::Value {
                origin: origin.to_owned(),
                key,
                value,
                reason,
            })
        };
        for (key, to, from) in [
            ("vmm", &mut self.vmm, table.vmm),
            ("kernel", &mut self.kernel, table.kernel),
            ("initrd", &mut self.initrd, table.initrd),
            ("template_dir", &mut self.template_dir, table.template_dir),
        ] {
            if let Some(path) = from {
                if !path.is_absolute() {
                    return refuse(key, format!("{path:?}"), "not an absolute path".into());
                }
                *to = path;
            }
        }
        if let Some(mib) = table.memory_mib {
            if !(MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&mib) || mib % 2 != 0 {
                let reason =
                    format!("must be an even number from {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX}");
                return refuse("memory_mib", mib.to_string(), reason);
            }
            self.memory_mib = mib;
        }
        if let Some(vcpus) = table.vcpus {
            if !(1..=VCPUS_MAX).contains(&vcpus) {
                return refuse(
                    "vcpus",
                    vcpus.to_string(),
                    format!("must be 1 to {VCPUS_MAX}"),
                );
            }
            self.vcpus = vcpus;
        }
        if let Some(version) = table.task_api {
            if !(2..=3).contains(&version) {
                return refuse("task_api", version.to_string(), "must be 2 or 3".into());
            }
            self.task_api = version;
        }
        if let Some(cmdline) = table.cmdline {
            if cmdline.chars().any(char::is_control) {
                return refuse(
                    "cmdline",
                    format!("{cmdline:?}"),
                    "has control characters".into(),
                );
            }
            self.cmdline = cmdline;
        }
        if let Some(ms) = table.agent_timeout_ms {
            if !(1..=600_000).contains(&ms) {
                return refuse(
                    "agent_timeout_ms",
                    ms.to_string(),
                    "must be 1 to 600000".into(),
                );
            }
            self.agent_timeout = Duration::from_millis(ms);
        }
        if let Some(level) = table.log_level {
            let Ok(parsed) = level.parse() else {
                let reason = "must be off, error, warn, info, debug or trace".into();
                return refuse("log_level", format!("{level:?}"), reason);
            };
            self.log_level = Some(parsed);
        }
        self.core_scheduling = table.core_scheduling.unwrap_or(self.core_scheduling);
        if let Some(vhost_net) = table.vhost_net {
            let known = [VhostNet::Auto, VhostNet::Off];
            let Some(known) = known.into_iter().find(|known| known.name() == vhost_net) else {
                let reason = "must be auto or off".into();
                return refuse("vhost_net", format!("{vhost_net:?}"), reason);
            };
            self.vhost_net = known;
        }
        if let Some(sharing) = table.templates {
            let known = [Sharing::Off, Sharing::Namespace, Sharing::Node];
            let Some(known) = known.into_iter().find(|known| known.name() == sharing) else {
                let reason = "must be off, namespace or node".into();
                return refuse("templates", format!("{sharing:?}"), reason);
            };
            self.templates = known;
        }
        if let Some(mib) = table.template_space_mib {
            if !(1..=TEMPLATE_SPACE_MIB_MAX).contains(&mib) {
                let reason = format!("must be 1 to {TEMPLATE_SPACE_MIB_MAX}");
                return refuse("template_space_mib", mib.to_string(), reason);
            }
            self.template_space_mib = mib;
        }
        Ok(())
    }
}

fn read(path: &Path, may_be_missing: bool) -> Result<Option<String>, ConfigError> {
    let failed = |cause| ConfigError::Read {
        path: path.to_owned(),
        cause,
    };
    match fs::metadata(path) {
        Ok(found) if found.len() > FILE_LIMIT => {
            let cause = format!("larger than {FILE_LIMIT} bytes");
            return Err(failed(io::Error::other(cause)));
        }
        Ok(_) => {}
        Err(e) if may_be_missing && e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(e)),
    }
    fs::read_to_string(path).map(Some).map_err(failed)
}

/// `<prefix>/lib/husk` beside the `<prefix>/bin` that this program is installed in.
pub fn library() -> Result<PathBuf, ConfigError> {
    let program = env::current_exe().map_err(ConfigError::Prefix)?;
    let prefix = program.parent().and_then(Path::parent);
    Ok(prefix.unwrap_or(Path::new("/usr")).join("lib/husk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: Option<&str>, body: &str) -> Result<Config, ConfigError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.toml");
        if let Some(text) = file {
            fs::write(&path, text).unwrap();
        }
        let options = Options {
            config_body: body.into(),
            ..Options::default()
        };
        Config::load(&path, &options)
    }

    #[test]
    fn no_file_means_defaults() {
        let config = load(None, "").unwrap();
        assert_eq!((config.memory_mib, config.vcpus), (256, 1));
        assert_eq!(config.agent_timeout, Duration::from_secs(10));
        assert_eq!(config.templates, Sharing::Namespace);
        assert!(config.serving().vhost);
        assert!(config.kernel.ends_with("lib/husk/vmlinux"));
    }

    #[test]
    fn the_body_overrides_the_file() {
        let config = load(
            Some("memory_mib = 512\nvcpus = 2\nkernel = \"/k\"\n"),
            "memory_mib = 128\nlog_level = \"debug\"\n",
        )
        .unwrap();
        assert_eq!((config.memory_mib, config.vcpus), (128, 2));
        assert_eq!(config.kernel, Path::new("/k"));
        assert_eq!(config.log_level, Some(LevelFilter::Debug));
    }

    #[test]
    fn comes_back_from_its_own_toml() {
        let body = "memory_mib = 128\nkernel = \"/a \\\"b\\\"/ü\"\ntemplates = \"node\"\n\
                    template_space_mib = 7\ntemplate_dir = \"/t\"\ncmdline = \"a='b' \\\\\"\n\
                    core_scheduling = true\nvhost_net = \"off\"\n";
        let config = load(None, body).unwrap();
        assert_eq!(config.templates, Sharing::Node);
        assert!(config.core_scheduling);
        assert!(!config.serving().vhost);
        assert_eq!(load(None, &config.to_toml().unwrap()).unwrap(), config);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file() {
        let error = load(Some("memroy_mib = 512\n"), "")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("config.toml") && error.contains("memroy_mib"),
            "{error}"
        );
        let error = load(None, "frob = 1").unwrap_err().to_string();
        assert!(
            error.contains("config_body") && error.contains("frob"),
            "{error}"
        );
    }

    #[test]
    fn a_wrong_value_is_named_with_its_key() {
        for (text, key) in [
            ("memory_mib = 32", "memory_mib = 32"),
            ("memory_mib = 65", "memory_mib = 65"),
            ("vcpus = 0", "vcpus = 0"),
            ("kernel = \"k\"", "kernel"),
            ("cmdline = \"a\\nb\"", "cmdline"),
            ("agent_timeout_ms = 0", "agent_timeout_ms"),
            ("log_level = \"loud\"", "log_level"),
            ("memory_mib = \"much\"", "memory_mib"),
            ("templates = \"all\"", "templates = \"all\""),
            ("templates = true", "templates"),
            ("core_scheduling = \"yes\"", "core_scheduling"),
            ("vhost_net = \"on\"", "vhost_net = \"on\""),
            ("template_dir = \"t\"", "template_dir"),
            ("template_space_mib = 0", "template_space_mib = 0"),
        ] {
            let error = load(Some(text), "").unwrap_err().to_string();
            assert!(
                error.contains("config.toml") && error.contains(key),
                "{error}"
            );
        }
    }

    #[test]
    fn a_named_file_must_exist() {
        let options = Options {
            config_path: "/nowhere/husk.toml".into(),
            ..Options::default()
        };
        let error = Config::load(Path::new(CONFIG), &options)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("read configuration /nowhere/husk.toml: No such file"),
            "{error}"
        );
    }
}
