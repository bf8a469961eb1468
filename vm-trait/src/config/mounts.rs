//! Host directories that a guest sees.

use super::{DiskConfig, VmConfig, check_host_path, is_normal_absolute, within};
use crate::error::VmErrorKind;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// The longest path of a mount in the guest, in bytes.
const MAX_GUEST_PATH: usize = 1024;

/// A directory of the host that the guest sees as one of its own. Both see what the other writes.
///
/// The directory is the host's and no part of the machine: snapshots do not hold it, a restored or forked machine
/// shares it with all others that have it, and it stays as it is when the machine ends. Nothing outside of it can be
/// reached from the guest: symbolic links are followed in the guest's own tree.
/// What else the host has mounted below it is seen as it is when the machine starts.
///
/// ```
/// use vm_trait::{MountConfig, VmConfig};
/// let config = VmConfig::builder()
///     .with_mount(MountConfig::new("/srv/models", "/models").with_read_only(true))
///     .with_mount(MountConfig::new("/srv/results", "/results"))
///     .build()?;
/// assert!(config.mounts[0].read_only);
/// # Ok::<(), vm_trait::VmError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct MountConfig {
    /// The host directory. It must exist when the machine is made, and is not given twice.
    pub path: PathBuf,
    /// Where the guest sees it: an absolute, normalised path other than `/`, at most 1,024 bytes, that is neither
    /// within nor around that of another mount or disk.
    pub mount: String,
    /// Refuse all writes of the guest; the host refuses them, whatever the guest's kernel does. Default false.
    #[serde(default)]
    pub read_only: bool,
}

impl MountConfig {
    /// Describes a writable mount.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>, mount: impl Into<String>) -> Self {
        Self { path: path.into(), mount: mount.into(), read_only: false }
    }

    /// Says whether writes of the guest are refused.
    #[must_use]
    pub fn with_read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }
}

/// Checks all mounts, against each other and against disks that are in order.
pub(super) fn validate(mounts: &[MountConfig], disks: &[DiskConfig]) -> Result<(), VmErrorKind> {
    if mounts.len() > VmConfig::MAX_MOUNTS {
        let reason = format!("{} given, at most {}", mounts.len(), VmConfig::MAX_MOUNTS);
        return Err(VmErrorKind::invalid("mounts", reason));
    }
    for (index, mount) in mounts.iter().enumerate() {
        let field = |name: &str| format!("mounts[{index}].{name}");
        check_host_path(&field("path"), Some(&mount.path))?;
        let at = &mount.mount;
        if !is_normal_absolute(at) || at == "/" || at.len() > MAX_GUEST_PATH {
            let reason = format!(
                "`{at}` is not an absolute, normalised path below `/` of at most {MAX_GUEST_PATH} bytes"
            );
            return Err(VmErrorKind::invalid(field("mount"), reason));
        }
        if let Some(other) = mounts[..index].iter().position(|it| it.path == mount.path) {
            let reason = format!("the same directory as mounts[{other}]");
            return Err(VmErrorKind::invalid(field("path"), reason));
        }
        let earlier = mounts[..index].iter().map(|it| &it.mount).enumerate();
        let taken = earlier
            .map(|(other, at)| (format!("mounts[{other}]"), at))
            .chain(disks.iter().enumerate().map(|(n, it)| (format!("disks[{n}]"), &it.mount)))
            .find(|(_, other)| within(at, other) || within(other, at));
        if let Some((other, _)) = taken {
            return Err(VmErrorKind::invalid(field("mount"), format!("overlaps that of {other}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn checked(mounts: Vec<MountConfig>, disks: Vec<DiskConfig>) -> Result<(), String> {
        let config = VmConfig { mounts, disks, ..VmConfig::default() };
        config.validate().map_err(|kind| match kind {
            VmErrorKind::InvalidConfig { field, .. } => field,
            other => format!("{other:?}"),
        })
    }

    fn overlap(one: &str, other: &str) -> bool {
        let (one, other): (Vec<&str>, Vec<&str>) =
            (one.split('/').collect(), other.split('/').collect());
        one.iter().zip(&other).all(|(one, other)| one == other)
    }

    #[test]
    fn each_bad_field_is_named() {
        let good = || MountConfig::new("h", "/a");
        for (field, mounts) in [
            (
                "mounts",
                (0..17).map(|n| MountConfig::new(format!("h{n}"), format!("/m{n}"))).collect(),
            ),
            ("mounts[0].path", vec![MountConfig::new("", "/a")]),
            ("mounts[0].path", vec![MountConfig::new("a\0b", "/a")]),
            ("mounts[1].mount", vec![good(), MountConfig::new("i", "/")]),
            ("mounts[1].mount", vec![good(), MountConfig::new("i", "/a/b")]),
            ("mounts[1].path", vec![good(), MountConfig::new("h", "/b")]),
            ("mounts[0].mount", vec![MountConfig::new("h", format!("/{}", "x".repeat(1024)))]),
        ] {
            assert_eq!(checked(mounts, Vec::new()), Err(field.to_owned()));
        }
        assert_eq!(checked(vec![good(), MountConfig::new("i", "/ab")], Vec::new()), Ok(()));
    }

    proptest! {
        #[test]
        fn only_places_that_are_apart_are_taken(
            mounts in prop::collection::vec("(/[ab]{1,2}){1,3}", 1..5),
            disks in prop::collection::vec("(/[ab]{1,2}){1,3}", 0..3),
        ) {
            let first_bad = (0..mounts.len()).find(|index| {
                let others = mounts[..*index].iter().chain(&disks);
                others.into_iter().any(|other| overlap(other, &mounts[*index]))
            });
            let disks_apart = (0..disks.len())
                .all(|index| !disks[..index].iter().any(|other| overlap(other, &disks[index])));
            prop_assume!(disks_apart);
            let disks = disks.iter().enumerate();
            let disks = disks.map(|(n, at)| DiskConfig::new(format!("d{n}"), at.clone())).collect();
            let mounts = mounts.iter().enumerate();
            let mounts = mounts.map(|(n, at)| MountConfig::new(format!("h{n}"), at.clone())).collect();
            let expected = first_bad.map_or(Ok(()), |index| Err(format!("mounts[{index}].mount")));
            prop_assert_eq!(checked(mounts, disks), expected);
        }

        #[test]
        fn only_normal_paths_are_taken(parts in prop::collection::vec("|\\.|\\.\\.|[a-z]", 1..4)) {
            let at = format!("/{}", parts.join("/"));
            let normal = parts.iter().all(|part| !matches!(part.as_str(), "" | "." | ".."));
            prop_assert_eq!(checked(vec![MountConfig::new("h", at)], Vec::new()).is_ok(), normal);
        }
    }

    #[test]
    fn as_many_as_are_allowed_are_taken() {
        let mount = |n| MountConfig::new(format!("h{n}"), format!("/m{n}"));
        assert_eq!(checked((0..VmConfig::MAX_MOUNTS).map(mount).collect(), Vec::new()), Ok(()));
        let longest = MountConfig::new("h", format!("/{}", "x".repeat(MAX_GUEST_PATH - 1)));
        assert_eq!(checked(vec![longest], Vec::new()), Ok(()));
    }
}
