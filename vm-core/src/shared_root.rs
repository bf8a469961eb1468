//! What a host directory must have in it to be a guest's root.

use crate::machine::MachineError;
use std::path::{Path, PathBuf};
use vm_guest_protocol::boot::BootRoot;
use vm_trait::VmConfig;

/// What is at a path of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A directory.
    Directory,
    /// A symbolic link, which only the guest can follow.
    Link,
    /// Something else.
    Other,
    /// Nothing.
    Missing,
}

/// Checks that a shared root is a directory, and that its guest finds in it what it is to mount on, or can make it. Other
/// roots need nothing. What changes afterwards fails the boot.
///
/// `look` says what is at a path, following no link in its last name.
///
/// # Errors
/// [`MachineError::Config`] for `root.source`, or for the disk or mount whose place is not there.
pub fn check(config: &VmConfig, look: impl Fn(&Path) -> Entry) -> Result<(), MachineError> {
    let Some(root) = config.root.shared_directory() else { return Ok(()) };
    let flaw = |field: &str, path: &Path, reason: &str| {
        let reason = format!("{}: {reason}", path.display());
        Err(MachineError::Config { field: field.to_owned(), reason })
    };
    // A dot has a link followed that the user named.
    match look(&root.join(".")) {
        Entry::Directory => {}
        Entry::Missing => return flaw("root.source", root, "no such directory"),
        _ => return flaw("root.source", root, "not a directory"),
    }
    let read_only = config.root.read_only;
    for place in BootRoot::PLACES {
        let path = root.join(place);
        match look(&path) {
            Entry::Directory => {}
            Entry::Missing if !read_only => {}
            Entry::Missing => {
                let reason = "not there to mount on, and a read-only root is not written to";
                return flaw("root.source", &path, reason);
            }
            _ => return flaw("root.source", &path, "not a directory, which guests mount on"),
        }
    }
    for (field, place) in places(config) {
        if is_own(place) {
            continue;
        }
        let mut path = PathBuf::from(root);
        for name in place.components() {
            path.push(name);
            match look(&path) {
                Entry::Directory => {}
                Entry::Link => break,
                Entry::Missing if !read_only => break,
                Entry::Missing => {
                    let reason = "not there to mount on, and the root is read-only";
                    return flaw(&field, &path, reason);
                }
                Entry::Other => return flaw(&field, &path, "not a directory"),
            }
        }
    }
    Ok(())
}

/// Lists where disks and mounts go, in the root, each with its field.
fn places(config: &VmConfig) -> impl Iterator<Item = (String, &Path)> {
    let disks = config.disks.iter().enumerate();
    let disks = disks.map(|(n, it)| (format!("disks[{n}].mount"), within_root(&it.mount)));
    let mounts = config.mounts.iter().enumerate();
    disks.chain(mounts.map(|(n, it)| (format!("mounts[{n}].mount"), within_root(&it.mount))))
}

fn within_root(at: &str) -> &Path {
    Path::new(at.trim_start_matches('/'))
}

/// Says whether a path in the root is in a file system of the guest's own.
fn is_own(path: &Path) -> bool {
    BootRoot::PLACES.iter().any(|place| path.starts_with(place))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use vm_trait::{DiskConfig, MountConfig, RootConfig};

    /// What a directory has in it.
    fn tree() -> BTreeMap<PathBuf, Entry> {
        let own = BootRoot::PLACES.map(|place| (place, Entry::Directory));
        let others = [
            (".", Entry::Directory),
            ("mnt", Entry::Directory),
            ("mnt/deep", Entry::Directory),
            ("file", Entry::Other),
            ("way", Entry::Link),
        ];
        let all = own.into_iter().chain(others);
        all.map(|(path, entry)| (Path::new("/r").join(path), entry)).collect()
    }

    fn outcome(config: &VmConfig, tree: &BTreeMap<PathBuf, Entry>) -> Result<(), String> {
        let look = |path: &Path| tree.get(path).copied().unwrap_or(Entry::Missing);
        check(config, look).map_err(|error| match error {
            MachineError::Config { field, .. } => field,
            other => format!("{other:?}"),
        })
    }

    fn shared(read_only: bool) -> VmConfig {
        let root = RootConfig::shared("/r").with_read_only(read_only);
        VmConfig::builder().with_root(root).build().unwrap()
    }

    #[test]
    fn other_roots_need_nothing() {
        let config = VmConfig::builder().with_root(RootConfig::directory("/r")).build().unwrap();
        assert_eq!(outcome(&config, &BTreeMap::new()), Ok(()));
        let named = Err("root.source".to_owned());
        assert_eq!(outcome(&shared(false), &BTreeMap::new()), named);
    }

    #[test]
    fn places_are_looked_for_where_they_cannot_be_made() {
        for (at, writable, read_only) in [
            ("/mnt", true, true),
            ("/mnt/deep", true, true),
            ("/mnt/deep/er", true, false),
            ("/new", true, false),
            ("/file", false, false),
            ("/file/below", false, false),
            ("/way/where", true, true),
            ("/tmp/new", true, true),
            ("/run/new/er", true, true),
            ("/runner", true, false),
        ] {
            for (is_read_only, fits) in [(false, writable), (true, read_only)] {
                let mut mounted = shared(is_read_only);
                mounted.mounts = vec![MountConfig::new("h", at)];
                let expected = if fits { Ok(()) } else { Err("mounts[0].mount".to_owned()) };
                assert_eq!(outcome(&mounted, &tree()), expected, "{at} {is_read_only}");
                let mut disk = shared(is_read_only);
                disk.disks = vec![DiskConfig::new("d", at)];
                let expected = if fits { Ok(()) } else { Err("disks[0].mount".to_owned()) };
                assert_eq!(outcome(&disk, &tree()), expected, "{at} {is_read_only}");
            }
        }
    }

    proptest! {
        #[test]
        fn the_guest_s_own_directories_can_be_mounted_on(
            place in prop::sample::select(&BootRoot::PLACES),
            found in prop::sample::select(&[Entry::Directory, Entry::Link, Entry::Other, Entry::Missing]),
            read_only: bool,
        ) {
            let mut tree = tree();
            tree.insert(Path::new("/r").join(place), found);
            let fits = found == Entry::Directory || found == Entry::Missing && !read_only;
            let expected = if fits { Ok(()) } else { Err("root.source".to_owned()) };
            prop_assert_eq!(outcome(&shared(read_only), &tree), expected);
        }
    }

    #[test]
    fn what_is_missing_is_told_from_what_is_no_directory() {
        let reason = |tree: &BTreeMap<PathBuf, Entry>| {
            let look = |path: &Path| tree.get(path).copied().unwrap_or(Entry::Missing);
            check(&shared(true), look).unwrap_err().to_string()
        };
        for (path, missing, other) in [
            ("/r/.", "no such directory", "not a directory"),
            ("/r/proc", "/r/proc: not there to mount on", "/r/proc: not a directory"),
        ] {
            let mut tree = tree();
            tree.insert(path.into(), Entry::Other);
            assert!(reason(&tree).contains(other), "{}", reason(&tree));
            tree.remove(Path::new(path));
            assert!(reason(&tree).contains(missing), "{}", reason(&tree));
        }
    }
}
