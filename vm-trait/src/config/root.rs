//! What the guest's root file system is.

use super::{MountConfig, check_host_path};
use crate::error::VmErrorKind;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What the guest's root file system is.
///
/// ```
/// use vm_trait::{MountConfig, RootConfig, VmConfig};
/// let config = VmConfig::builder()
///     .with_root(RootConfig::shared("/srv/debian").with_read_only(true))
///     .with_mount(MountConfig::new("/srv/results", "/mnt"))
///     .build()?;
/// assert!(config.root.read_only);
/// # Ok::<(), vm_trait::VmError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RootConfig {
    /// Where its files come from. Default: built in.
    pub source: RootSource,
    /// Refuse all writes to it but below `/tmp`, `/run`, `/dev` and disks. Else what is written is kept in the guest's
    /// memory, and ends with the machine; a [shared](RootSource::Shared) root keeps it on the host. Default false.
    pub read_only: bool,
}

/// Where a guest's root files come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RootSource {
    /// The backend's own: on real machines the agent and nothing else.
    #[default]
    BuiltIn,
    /// A host directory, copied into the guest's memory as the machine starts.
    Directory(PathBuf),
    /// A host file that holds a file system, which the guest mounts and never writes to.
    Image(PathBuf),
    /// A host directory that is the root itself, and is not copied. A backend needs
    /// [`Mounts`](crate::Capability::Mounts) for it, not [`Root`](crate::Capability::Root).
    ///
    /// It is the host's, as a [mount](MountConfig) is: both see what the other writes, a copy of the machine shares it, any
    /// number of machines may have it at a time, nothing outside of it can be reached, and it stays when the machine
    /// ends. What the host changes may be seen some seconds later, and programs that run must bear it. What several machines
    /// write at a time is theirs to keep apart.
    ///
    /// `/dev`, `/proc`, `/run`, `/sys` and `/tmp` are the guest's own, in its memory. They, and the places of disks and
    /// mounts, are directories of the host directory that are mounted on. Those that are missing are made in it; where
    /// `read_only` is set they must be there, or the configuration is refused at create. The five must not be symbolic
    /// links.
    ///
    /// With `read_only` the host refuses writes, whatever the guest's kernel does. Without, what the guest leaves there is
    /// as little to be trusted as the guest: it chooses modes, setuid among them, and owners as far as the host's user who
    /// runs the machine may give files away. Keep the directory where other users of the host cannot enter.
    ///
    /// The agent's tools `vsock` and `tcp` are not put into it.
    Shared(PathBuf),
}

impl RootConfig {
    /// Takes the files of a host directory.
    #[must_use]
    pub fn directory(path: impl Into<PathBuf>) -> Self {
        Self { source: RootSource::Directory(path.into()), read_only: false }
    }

    /// Takes a disk image of the host.
    #[must_use]
    pub fn image(path: impl Into<PathBuf>) -> Self {
        Self { source: RootSource::Image(path.into()), read_only: false }
    }

    /// Has a host directory as the root, which the guest also writes to.
    #[must_use]
    pub fn shared(path: impl Into<PathBuf>) -> Self {
        Self { source: RootSource::Shared(path.into()), read_only: false }
    }

    /// Says whether writes are refused.
    #[must_use]
    pub fn with_read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Gives the host directory that is the root itself, where one is.
    #[must_use]
    pub fn shared_directory(&self) -> Option<&Path> {
        match &self.source {
            RootSource::Shared(path) => Some(path),
            _ => None,
        }
    }
}

/// Checks a root, and that no mount is of the same directory.
pub(super) fn validate(root: &RootConfig, mounts: &[MountConfig]) -> Result<(), VmErrorKind> {
    match &root.source {
        RootSource::BuiltIn => {}
        RootSource::Directory(path) | RootSource::Image(path) | RootSource::Shared(path) => {
            check_host_path("root.source", Some(path))?;
        }
    }
    let shared = root.shared_directory();
    match mounts.iter().position(|mount| shared == Some(&mount.path)) {
        Some(index) => {
            let reason = "the same directory as root.source";
            Err(VmErrorKind::invalid(format!("mounts[{index}].path"), reason))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VmConfig;
    use crate::config::tests::refused;

    #[test]
    fn each_bad_field_is_named() {
        let mount = |path: &str, at: &str| MountConfig::new(path, at);
        for (field, root, mounts) in [
            ("root.source", RootConfig::directory(""), vec![]),
            ("root.source", RootConfig::image(""), vec![]),
            ("root.source", RootConfig::shared(""), vec![]),
            ("root.source", RootConfig::shared("a\0b"), vec![]),
            ("mounts[1].path", RootConfig::shared("r"), vec![mount("a", "/a"), mount("r", "/b")]),
        ] {
            let config = VmConfig { root, mounts, ..VmConfig::default() };
            assert_eq!(refused(&config), field);
        }
        let root = RootConfig::directory("r");
        let copied = VmConfig { root, mounts: vec![mount("r", "/b")], ..VmConfig::default() };
        assert!(copied.validate().is_ok());
    }

    #[test]
    fn a_shared_root_is_written_as_others_are() {
        let root = RootConfig::shared("/srv/root").with_read_only(true);
        let text = r#"{"source":{"shared":"/srv/root"},"read_only":true}"#;
        assert_eq!(serde_json::to_string(&root).unwrap(), text);
        assert_eq!(serde_json::from_str::<RootConfig>(text).unwrap(), root);
        assert_eq!(root.shared_directory(), Some(Path::new("/srv/root")));
        assert_eq!(RootConfig::directory("/srv/root").shared_directory(), None);
    }
}
