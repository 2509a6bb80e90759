//! The `linux.seccomp` object (OCI runtime specification 1.2, "Seccomp").
//!
//! Data and its validity; what becomes of it is `oci_init::seccomp`'s. Names of system calls are not
//! looked at here: profiles list those of all kernels and architectures.

use serde::{Deserialize, Serialize};

use super::{Problem, or_default};

#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Seccomp {
    /// `None` without any rule means no filter, as with runc.
    #[serde(default)]
    pub default_action: Option<Action>,
    #[serde(default)]
    pub default_errno_ret: Option<u32>,
    /// Beside the guest's own.
    #[serde(default, deserialize_with = "or_default")]
    pub architectures: Vec<Architecture>,
    /// `None` is not the same as none, see [`Seccomp::flags`].
    #[serde(default)]
    pub flags: Option<Vec<Flag>>,
    #[serde(default, deserialize_with = "or_default")]
    pub listener_path: String,
    #[serde(default, deserialize_with = "or_default")]
    pub listener_metadata: String,
    #[serde(default, deserialize_with = "or_default")]
    pub syscalls: Vec<Rule>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Rule {
    pub names: Vec<String>,
    pub action: Action,
    #[serde(default)]
    pub errno_ret: Option<u32>,
    /// All of them have to be met.
    #[serde(default, deserialize_with = "or_default")]
    pub args: Vec<Argument>,
}

#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Argument {
    /// 0 to 5.
    pub index: u32,
    /// With `SCMP_CMP_MASKED_EQ` the mask.
    pub value: u64,
    /// With `SCMP_CMP_MASKED_EQ` what the masked argument has to be.
    #[serde(default)]
    pub value_two: u64,
    pub op: Operator,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum Action {
    #[serde(rename = "SCMP_ACT_KILL")]
    Kill,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_NOTIFY")]
    Notify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum Operator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    LessOrEqual,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    GreaterOrEqual,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

/// By the name that libseccomp knows it by: all that runc takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum Architecture {
    #[serde(rename = "SCMP_ARCH_X86")]
    X86,
    #[serde(rename = "SCMP_ARCH_X86_64")]
    X86_64,
    #[serde(rename = "SCMP_ARCH_X32")]
    X32,
    #[serde(rename = "SCMP_ARCH_ARM")]
    Arm,
    #[serde(rename = "SCMP_ARCH_AARCH64")]
    Aarch64,
    #[serde(rename = "SCMP_ARCH_MIPS")]
    Mips,
    #[serde(rename = "SCMP_ARCH_MIPS64")]
    Mips64,
    #[serde(rename = "SCMP_ARCH_MIPS64N32")]
    Mips64N32,
    #[serde(rename = "SCMP_ARCH_MIPSEL")]
    Mipsel,
    #[serde(rename = "SCMP_ARCH_MIPSEL64")]
    Mipsel64,
    #[serde(rename = "SCMP_ARCH_MIPSEL64N32")]
    Mipsel64N32,
    #[serde(rename = "SCMP_ARCH_PPC")]
    Ppc,
    #[serde(rename = "SCMP_ARCH_PPC64")]
    Ppc64,
    #[serde(rename = "SCMP_ARCH_PPC64LE")]
    Ppc64Le,
    #[serde(rename = "SCMP_ARCH_RISCV64")]
    Riscv64,
    #[serde(rename = "SCMP_ARCH_S390")]
    S390,
    #[serde(rename = "SCMP_ARCH_S390X")]
    S390X,
    #[serde(rename = "SCMP_ARCH_LOONGARCH64")]
    Loongarch64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
pub enum Flag {
    /// Without effect: there is one thread.
    #[serde(rename = "SECCOMP_FILTER_FLAG_TSYNC")]
    Tsync,
    #[serde(rename = "SECCOMP_FILTER_FLAG_LOG")]
    Log,
    #[serde(rename = "SECCOMP_FILTER_FLAG_SPEC_ALLOW")]
    SpecAllow,
}

impl Seccomp {
    /// Those to set: who says nothing gets runc's default.
    pub fn flags(&self) -> &[Flag] {
        self.flags.as_deref().unwrap_or(&[Flag::SpecAllow])
    }

    /// Checks what the types do not say. `at` is the object's own path in the document.
    pub fn validate(&self, at: &str) -> Result<(), Problem> {
        let notify = "SCMP_ACT_NOTIFY is not supported: who would be notified is on the host, and \
            a process of the guest cannot be handed over to it";
        if self.default_action.is_none() && !self.syscalls.is_empty() {
            return Err(Problem::new(format!("{at}.defaultAction"), "is missing"));
        }
        if self.default_action == Some(Action::Notify) {
            return Err(Problem::new(format!("{at}.defaultAction"), notify));
        }
        if !self.listener_path.is_empty() {
            return Err(Problem::new(format!("{at}.listenerPath"), notify));
        }
        if !self.listener_metadata.is_empty() {
            return Err(Problem::new(
                format!("{at}.listenerMetadata"),
                "is set, but listenerPath is not",
            ));
        }
        for (i, rule) in self.syscalls.iter().enumerate() {
            let at = format!("{at}.syscalls[{i}]");
            if rule.action == Action::Notify {
                return Err(Problem::new(format!("{at}.action"), notify));
            }
            if rule.names.is_empty() || rule.names.iter().any(String::is_empty) {
                return Err(Problem::new(format!("{at}.names"), "lacks a name"));
            }
            if rule.names.iter().any(|name| name.contains('\0')) {
                return Err(Problem::new(format!("{at}.names"), "contains a NUL byte"));
            }
            if let Some(argument) = rule.args.iter().find(|argument| argument.index > 5) {
                return Err(Problem::new(
                    format!("{at}.args"),
                    format!("a system call has no argument {}", argument.index),
                ));
            }
        }
        Ok(())
    }
}
