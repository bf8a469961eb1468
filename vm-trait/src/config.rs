//! Machine configurations and their validation.

use crate::{
    capability::{Capabilities, Capability},
    error::{VmError, VmErrorKind},
    state::Operation,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

mod disks;
mod limits;
mod mounts;
mod network;
mod root;

pub use disks::DiskConfig;
pub use limits::{Limit, Resource};
pub use mounts::MountConfig;
pub use network::{NetworkConfig, PortForward, PortMap};
pub use root::{RootConfig, RootSource};

/// An amount of memory or disk in mebibytes (2^20 bytes).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Mib(pub u32);

impl Mib {
    /// Gives the amount in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0) << 20
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// What a machine is made of. Build it with [`VmConfig::builder`], or read it with serde: missing fields have
/// their defaults, unknown ones are refused.
///
/// ```
/// use vm_trait::{Mib, VmConfig};
/// let config = VmConfig::builder().with_vcpus(2).with_memory(Mib(256)).build()?;
/// assert_eq!(config.vcpus, 2);
/// # Ok::<(), vm_trait::VmError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct VmConfig {
    /// A name for people; at most 64 letters, digits, `-`, `_` and `.`.
    pub name: Option<String>,
    /// Free text by key, for the owner's use.
    pub labels: BTreeMap<String, String>,
    /// How many vCPUs, at least 1. Default 1.
    pub vcpus: u8,
    /// How much memory, at least 64 MiB. Default 128 MiB.
    pub memory: Mib,
    /// The guest's host name; at most 63 letters, digits and `-`. Default `twinvm`.
    pub hostname: String,
    /// The environment of every program in the guest; requests add to it.
    pub env: BTreeMap<String, String>,
    /// Which kernel boots, and how. Default: the backend's own.
    pub kernel: KernelConfig,
    /// What the guest's root file system is. Default: built in.
    pub root: RootConfig,
    /// Disks of the host that outlive the machine; at most 16.
    pub disks: Vec<DiskConfig>,
    /// Directories of the host that the guest sees; at most 16. Default none.
    pub mounts: Vec<MountConfig>,
    /// What network the guest has. Default none.
    pub network: NetworkConfig,
    /// What each program that is started in the guest may use, and what it starts itself; the agent's own work is not
    /// limited. Default: what the guest's kernel gives.
    pub limits: BTreeMap<Resource, Limit>,
    /// How many of the last console bytes are kept, 1 KiB to 16 MiB. Default 64 KiB.
    pub console_bytes: u32,
    /// A host file that the whole console is appended to, up to 64 MiB of it in one life of the machine. A host that
    /// cannot take more of it does not stop the guest. Default none.
    pub console_file: Option<PathBuf>,
    /// How long operations may take.
    pub timeouts: Timeouts,
}

/// Which kernel boots, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct KernelConfig {
    /// The host file of the kernel: an ELF `vmlinux`, a `bzImage`, or a `libkrunfw.so`, which holds one. Default: the
    /// backend's choice.
    pub path: Option<PathBuf>,
    /// A host file with an initial RAM disk that is unpacked before the backend's own, whose files win.
    pub initrd: Option<PathBuf>,
    /// Words that are added to the end of the kernel's command line; printable ASCII, at most 1,024 bytes.
    pub cmdline: String,
}

impl KernelConfig {
    /// Sets the kernel's file.
    #[must_use]
    pub fn with_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Sets the user's initial RAM disk.
    #[must_use]
    pub fn with_initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        self
    }

    /// Sets what is added to the command line.
    #[must_use]
    pub fn with_cmdline(mut self, words: impl Into<String>) -> Self {
        self.cmdline = words.into();
        self
    }

    fn validate(&self) -> Result<(), VmErrorKind> {
        for (field, path) in [("kernel.path", &self.path), ("kernel.initrd", &self.initrd)] {
            check_host_path(field, path.as_deref())?;
        }
        let bytes = self.cmdline.as_bytes();
        if bytes.len() > 1024 || !bytes.iter().all(|byte| (b' '..=b'~').contains(byte)) {
            let reason = "not at most 1024 bytes of printable ASCII";
            return Err(VmErrorKind::invalid("kernel.cmdline", reason));
        }
        Ok(())
    }
}

/// How long operations may take, on the backend's clock. All must be above zero.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Timeouts {
    /// `start`, until the handshake is complete. Default 60 s.
    pub boot: Duration,
    /// `pause` and `resume`. Default 10 s.
    pub pause: Duration,
    /// `snapshot`, `restore` and `fork`. Default 60 s.
    pub capture: Duration,
    /// `ping` and every operation on files and processes but waiting for a program's end, which the request's own
    /// timeout limits. Default 30 s; reading and writing whole files has this long for every MiB.
    pub request: Duration,
    /// How long the agent may be out of reach before what waits for it fails as Disconnected. Default 10 s.
    pub link: Duration,
    /// How long a machine may take to die once it is killed. Default 10 s.
    pub kill: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(60),
            pause: Duration::from_secs(10),
            capture: Duration::from_secs(60),
            request: Duration::from_secs(30),
            link: Duration::from_secs(10),
            kill: Duration::from_secs(10),
        }
    }
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            name: None,
            labels: BTreeMap::new(),
            vcpus: 1,
            memory: Mib(128),
            hostname: "twinvm".to_owned(),
            env: BTreeMap::new(),
            kernel: KernelConfig::default(),
            root: RootConfig::default(),
            disks: Vec::new(),
            mounts: Vec::new(),
            network: NetworkConfig::None,
            limits: BTreeMap::new(),
            console_bytes: 64 << 10,
            console_file: None,
            timeouts: Timeouts::default(),
        }
    }
}

/// What a host offers; configurations are checked against it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLimits {
    /// The most vCPUs that one machine may have.
    pub max_vcpus: u8,
    /// The most memory that one machine may have.
    pub max_memory: Mib,
}

impl VmConfig {
    /// The least memory that a guest boots in.
    pub const MIN_MEMORY: Mib = Mib(64);
    /// The most disks.
    pub const MAX_DISKS: usize = 16;
    /// The most host directories.
    pub const MAX_MOUNTS: usize = 16;

    /// Starts from the defaults.
    #[must_use]
    pub fn builder() -> VmConfigBuilder {
        VmConfigBuilder(Self::default())
    }

    /// Checks everything that can be checked without a host.
    ///
    /// # Errors
    /// [`VmErrorKind::InvalidConfig`] for the first bad field.
    pub fn validate(&self) -> Result<(), VmErrorKind> {
        if let Some(name) = &self.name {
            check_word("name", name, 64, "-_.")?;
        }
        check_word("hostname", &self.hostname, 63, "-")?;
        if self.hostname.starts_with('-') || self.hostname.ends_with('-') {
            return Err(VmErrorKind::invalid("hostname", "must not begin or end with `-`"));
        }
        if self.vcpus == 0 {
            return Err(VmErrorKind::invalid("vcpus", "0 given, at least 1 is needed"));
        }
        if self.memory < Self::MIN_MEMORY {
            return Err(VmErrorKind::invalid(
                "memory",
                format!("{} given, a guest needs at least {}", self.memory, Self::MIN_MEMORY),
            ));
        }
        check_env("env", &self.env)?;
        if !(1 << 10..=16 << 20).contains(&self.console_bytes) {
            return Err(VmErrorKind::invalid(
                "console_bytes",
                format!("{} given, 1024 to 16777216 are allowed", self.console_bytes),
            ));
        }
        self.timeouts.validate()?;
        self.kernel.validate()?;
        root::validate(&self.root, &self.mounts)?;
        check_host_path("console_file", self.console_file.as_deref())?;
        disks::validate(&self.disks)?;
        mounts::validate(&self.mounts, &self.disks)?;
        self.network.validate()?;
        limits::validate(&self.limits)
    }

    /// Checks the configuration against what a host offers, after [`validate`](Self::validate).
    ///
    /// # Errors
    /// [`VmErrorKind::InvalidConfig`] for the first bad field.
    pub fn validate_for(&self, limits: &HostLimits) -> Result<(), VmErrorKind> {
        self.validate()?;
        if self.vcpus > limits.max_vcpus {
            return Err(VmErrorKind::invalid(
                "vcpus",
                format!("{} given, this host allows at most {}", self.vcpus, limits.max_vcpus),
            ));
        }
        if self.memory > limits.max_memory {
            return Err(VmErrorKind::invalid(
                "memory",
                format!("{} given, this host allows at most {}", self.memory, limits.max_memory),
            ));
        }
        Ok(())
    }

    /// Checks that a backend of these capabilities can do all that the configuration asks for.
    ///
    /// # Errors
    /// [`VmErrorKind::Unsupported`] for the first that it cannot.
    pub fn validate_with(&self, capabilities: Capabilities) -> Result<(), VmErrorKind> {
        let is_shared = self.root.shared_directory().is_some();
        let asked = [
            (Capability::Disks, !self.disks.is_empty()),
            (Capability::Kernel, self.kernel != KernelConfig::default()),
            (Capability::Root, !is_shared && self.root != RootConfig::default()),
            (Capability::ConsoleFile, self.console_file.is_some()),
            (Capability::Mounts, is_shared || !self.mounts.is_empty()),
            (Capability::Limits, !self.limits.is_empty()),
        ];
        let network = self.network.capability().map(|capability| (capability, true));
        for (capability, asked) in asked.into_iter().chain(network) {
            if asked && !capabilities.has(capability) {
                return Err(VmErrorKind::Unsupported { what: capability.name().to_owned() });
            }
        }
        Ok(())
    }
}

impl Timeouts {
    fn validate(&self) -> Result<(), VmErrorKind> {
        let all = [
            ("boot", self.boot),
            ("pause", self.pause),
            ("capture", self.capture),
            ("request", self.request),
            ("link", self.link),
            ("kill", self.kill),
        ];
        match all.iter().find(|(_, timeout)| timeout.is_zero()) {
            Some((name, _)) => {
                Err(VmErrorKind::invalid(format!("timeouts.{name}"), "must be above zero"))
            }
            None => Ok(()),
        }
    }
}

/// Puts a [`VmConfig`] together.
#[derive(Clone, Debug, Default)]
pub struct VmConfigBuilder(VmConfig);

impl VmConfigBuilder {
    /// Sets the name for people.
    #[must_use]
    pub fn with_name(mut self, name: impl Into<String>) -> Self {
        self.0.name = Some(name.into());
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn with_label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.labels.insert(key.into(), value.into());
        self
    }

    /// Sets how many vCPUs.
    #[must_use]
    pub fn with_vcpus(mut self, vcpus: u8) -> Self {
        self.0.vcpus = vcpus;
        self
    }

    /// Sets how much memory.
    #[must_use]
    pub fn with_memory(mut self, memory: Mib) -> Self {
        self.0.memory = memory;
        self
    }

    /// Sets the guest's host name.
    #[must_use]
    pub fn with_hostname(mut self, hostname: impl Into<String>) -> Self {
        self.0.hostname = hostname.into();
        self
    }

    /// Sets a variable of the environment of every program.
    #[must_use]
    pub fn with_env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.0.env.insert(name.into(), value.into());
        self
    }

    /// Sets which kernel boots, and how.
    #[must_use]
    pub fn with_kernel(mut self, kernel: KernelConfig) -> Self {
        self.0.kernel = kernel;
        self
    }

    /// Sets what the guest's root file system is.
    #[must_use]
    pub fn with_root(mut self, root: RootConfig) -> Self {
        self.0.root = root;
        self
    }

    /// Sets a host file for the console.
    #[must_use]
    pub fn with_console_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.console_file = Some(path.into());
        self
    }

    /// Adds a disk.
    #[must_use]
    pub fn with_disk(mut self, disk: DiskConfig) -> Self {
        self.0.disks.push(disk);
        self
    }

    /// Adds a directory of the host.
    #[must_use]
    pub fn with_mount(mut self, mount: MountConfig) -> Self {
        self.0.mounts.push(mount);
        self
    }

    /// Sets what network the guest has.
    #[must_use]
    pub fn with_network(mut self, network: NetworkConfig) -> Self {
        self.0.network = network;
        self
    }

    /// Sets how much of a resource each program may use.
    #[must_use]
    pub fn with_limit(mut self, resource: Resource, limit: Limit) -> Self {
        self.0.limits.insert(resource, limit);
        self
    }

    /// Sets how many console bytes are kept.
    #[must_use]
    pub fn with_console_bytes(mut self, bytes: u32) -> Self {
        self.0.console_bytes = bytes;
        self
    }

    /// Sets how long operations may take.
    #[must_use]
    pub fn with_timeouts(mut self, timeouts: Timeouts) -> Self {
        self.0.timeouts = timeouts;
        self
    }

    /// Checks the configuration and gives it out.
    ///
    /// # Errors
    /// [`VmErrorKind::InvalidConfig`] for the first bad field.
    pub fn build(self) -> Result<VmConfig, VmError> {
        self.0.validate().map_err(|kind| VmError::new(Operation::Create, kind))?;
        Ok(self.0)
    }
}

/// Says whether `path` is absolute and without `.`, `..`, empty parts, a trailing slash or a NUL.
#[must_use]
pub fn is_normal_absolute(path: &str) -> bool {
    let Some(rest) = path.strip_prefix('/') else {
        return false;
    };
    !path.contains('\0')
        && (rest.is_empty() || rest.split('/').all(|part| !matches!(part, "" | "." | "..")))
}

fn check_host_path(field: &str, path: Option<&std::path::Path>) -> Result<(), VmErrorKind> {
    let bad = |path: &std::path::Path| {
        let bytes = path.as_os_str().as_encoded_bytes();
        bytes.is_empty() || bytes.contains(&0)
    };
    match path {
        Some(path) if bad(path) => Err(VmErrorKind::invalid(field, "empty, or with a NUL byte")),
        _ => Ok(()),
    }
}

fn within(inner: &str, outer: &str) -> bool {
    inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn check_word(field: &str, word: &str, most: usize, extra: &str) -> Result<(), VmErrorKind> {
    let fits = (1..=most).contains(&word.len());
    if fits && word.chars().all(|c| c.is_ascii_alphanumeric() || extra.contains(c)) {
        return Ok(());
    }
    let reason =
        format!("`{word}` is not 1 to {most} characters out of letters, digits and `{extra}`");
    Err(VmErrorKind::invalid(field, reason))
}

/// Checks that an environment can be given to a Linux program.
///
/// # Errors
/// [`VmErrorKind::InvalidConfig`] naming the variable.
pub fn check_env(field: &str, env: &BTreeMap<String, String>) -> Result<(), VmErrorKind> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            let reason = format!("`{name}` cannot name a variable");
            return Err(VmErrorKind::invalid(field, reason));
        }
        if value.contains('\0') {
            return Err(VmErrorKind::invalid(format!("{field}.{name}"), "contains a NUL byte"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
