//! Disks of the host.

use super::{Mib, VmConfig, is_normal_absolute, within};
use crate::error::VmErrorKind;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A disk of the host, mounted in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// The host file that holds the disk. One that does not exist is made, unless `read_only`.
    pub path: PathBuf,
    /// The size of a disk that is made. Default 64 MiB.
    #[serde(default = "default_disk_size")]
    pub size: Mib,
    /// Refuse all writes of the guest. Default false.
    #[serde(default)]
    pub read_only: bool,
    /// Where the guest sees the disk's files: an absolute, normalised path other than `/`.
    pub mount: String,
}

fn default_disk_size() -> Mib {
    Mib(64)
}

impl DiskConfig {
    /// Describes a writable disk of default size.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, mount: impl Into<String>) -> Self {
        Self { path: path.into(), size: default_disk_size(), read_only: false, mount: mount.into() }
    }
}

/// Checks all disks against each other.
pub(super) fn validate(disks: &[DiskConfig]) -> Result<(), VmErrorKind> {
    if disks.len() > VmConfig::MAX_DISKS {
        let reason = format!("{} given, at most {}", disks.len(), VmConfig::MAX_DISKS);
        return Err(VmErrorKind::invalid("disks", reason));
    }
    for (index, disk) in disks.iter().enumerate() {
        let field = |name: &str| format!("disks[{index}].{name}");
        if disk.path.as_os_str().is_empty() {
            return Err(VmErrorKind::invalid(field("path"), "empty"));
        }
        if disk.size == Mib(0) {
            return Err(VmErrorKind::invalid(field("size"), "0 MiB"));
        }
        if !is_normal_absolute(&disk.mount) || disk.mount == "/" {
            return Err(VmErrorKind::invalid(
                field("mount"),
                format!("`{}` is not an absolute, normalised path below `/`", disk.mount),
            ));
        }
        for (other, earlier) in disks[..index].iter().enumerate() {
            if earlier.path == disk.path {
                let reason = format!("the same file as disks[{other}]");
                return Err(VmErrorKind::invalid(field("path"), reason));
            }
            if within(&earlier.mount, &disk.mount) || within(&disk.mount, &earlier.mount) {
                let reason = format!("overlaps the mount of disks[{other}]");
                return Err(VmErrorKind::invalid(field("mount"), reason));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::refused;

    #[test]
    fn as_many_as_are_allowed_are_taken() {
        let all = 0..VmConfig::MAX_DISKS;
        let disks: Vec<_> =
            all.map(|n| DiskConfig::new(format!("d{n}"), format!("/m{n}"))).collect();
        assert!(validate(&disks).is_ok());
    }

    #[test]
    fn each_bad_field_is_named() {
        let disk = |mount: &str| DiskConfig::new("d", mount);
        for (field, disks) in [
            (
                "disks",
                (0..17).map(|n| DiskConfig::new(format!("d{n}"), format!("/m{n}"))).collect(),
            ),
            ("disks[0].path", vec![DiskConfig::new("", "/a")]),
            ("disks[0].size", vec![DiskConfig { size: Mib(0), ..disk("/a") }]),
            ("disks[0].mount", vec![disk("a")]),
            ("disks[0].mount", vec![disk("/")]),
            ("disks[0].mount", vec![disk("/a/../b")]),
            ("disks[0].mount", vec![disk("/a/")]),
            ("disks[1].path", vec![disk("/a"), disk("/b")]),
            ("disks[1].mount", vec![disk("/a"), DiskConfig::new("e", "/a/b")]),
        ] {
            let config = VmConfig { disks, ..VmConfig::default() };
            assert_eq!(refused(&config), field);
        }
    }
}
