//! The root of the machine.

use super::{Failed, disks, mounts, shares};
use rustix::{
    fs::{AtFlags, CWD, Mode},
    mount::{MountFlags, UnmountFlags},
};
use std::{
    ffi::CString,
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};
use vm_guest_protocol::boot::{BootConfig, BootRoot};

const STAGE: &str = "root";

/// The disk's own file system; a file system in memory; both together, or a directory of the host.
const LOWER: &str = "/twinvm/lower";
const LAYER: &str = "/twinvm/layer";
const MERGED: &str = "/twinvm/merged";

/// Where the agent's program is offered under its other names; the second leads to the first.
const TOOL: &str = "/bin/vsock";
const SECOND_TOOL: &str = "/bin/tcp";

/// Types of file systems that live in memory, as statfs(2) has them.
const IN_MEMORY: [i64; 2] = [0x8584_58f6, 0x0102_1994];

/// Makes the configured root that of this process and of all that will descend from it.
pub(super) fn enter(config: &BootConfig) -> Result<(), Failed> {
    let (serial, read_only) = match &config.root {
        BootRoot::Initial { .. } => return Ok(()),
        BootRoot::Disk { serial, read_only } => (serial, read_only),
        BootRoot::Shared { read_only } => {
            mounts::make_dir(MERGED.as_ref()).map_err(Failed::at(STAGE, MERGED))?;
            shares::mount_root(MERGED, *read_only)?;
            return switch(MERGED);
        }
    };
    let device = disks::find(STAGE, serial)?;
    for place in [LOWER, LAYER, MERGED] {
        mounts::make_dir(place.as_ref()).map_err(Failed::at(STAGE, place))?;
    }
    disks::mount(&device, LOWER.as_ref(), true).map_err(Failed::at(STAGE, serial))?;
    let root = if *read_only {
        let missing = missing_places(config);
        if missing.is_empty() { LOWER } else { add_places(&missing)? }
    } else {
        add_layer()?
    };
    switch(root)?;
    if !read_only {
        offer_tools();
    }
    Ok(())
}

/// Lists the directories that are to be mounted on and that the disk does not have.
fn missing_places(config: &BootConfig) -> Vec<PathBuf> {
    let disks = config.disks.iter().map(|disk| disk.mount.trim_start_matches('/'));
    let shares = config.shares.iter().map(|share| share.mount.trim_start_matches('/'));
    let places = BootRoot::PLACES.into_iter().chain(disks).chain(shares).map(PathBuf::from);
    places.filter(|place| !Path::new(LOWER).join(place).is_dir()).collect()
}

/// Lays the disk over directories in memory, and lets nothing be written.
fn add_places(missing: &[PathBuf]) -> Result<&'static str, Failed> {
    mount_layer()?;
    let below = Path::new(LAYER).join("places");
    for place in missing {
        mounts::make_dir(&below.join(place)).map_err(Failed::at(STAGE, place.display()))?;
    }
    overlay(format!("lowerdir={LOWER}:{}", below.display()), MountFlags::RDONLY)
}

/// Lays a file system in memory over the disk, which takes what is written.
fn add_layer() -> Result<&'static str, Failed> {
    mount_layer()?;
    let (upper, work) = (Path::new(LAYER).join("upper"), Path::new(LAYER).join("work"));
    for dir in [&upper, &work] {
        mounts::make_dir(dir).map_err(Failed::at(STAGE, dir.display()))?;
    }
    // The root directory's owner and mode are those of the upper one.
    let copied = fs::metadata(LOWER).and_then(|lower| {
        std::os::unix::fs::chown(&upper, Some(lower.uid()), Some(lower.gid()))?;
        fs::set_permissions(&upper, fs::Permissions::from_mode(lower.mode() & 0o7777))
    });
    copied.map_err(Failed::at(STAGE, "root directory"))?;
    let options =
        format!("lowerdir={LOWER},upperdir={},workdir={}", upper.display(), work.display());
    overlay(options, MountFlags::empty())
}

fn mount_layer() -> Result<(), Failed> {
    rustix::mount::mount("tmpfs", LAYER, "tmpfs", MountFlags::empty(), c"mode=755")
        .map_err(Failed::at(STAGE, "tmpfs"))
}

fn overlay(options: String, flags: MountFlags) -> Result<&'static str, Failed> {
    let options = CString::new(options).map_err(Failed::at(STAGE, "overlay"))?;
    rustix::mount::mount("overlay", MERGED, "overlay", flags, options.as_c_str())
        .map_err(Failed::at(STAGE, "overlay"))?;
    // The overlay keeps its own hold on both.
    for place in [LOWER, LAYER] {
        let _ = rustix::mount::unmount(place, UnmountFlags::DETACH);
    }
    Ok(MERGED)
}

/// Moves everything over to the new root and leaves the old one, as switch_root(8) does.
fn switch(new: &str) -> Result<(), Failed> {
    for place in BootRoot::PLACES.into_iter().filter(|place| *place != "tmp") {
        let (old, new) = (Path::new("/").join(place), Path::new(new).join(place));
        let moved = mounts::make_dir(&new).and_then(|()| {
            // Through a link the place could be one in the old root.
            if !fs::symlink_metadata(&new)?.is_dir() {
                return Err(io::ErrorKind::NotADirectory.into());
            }
            Ok(rustix::mount::mount_move(&old, &new)?)
        });
        moved.map_err(Failed::at(STAGE, old.display()))?;
    }
    empty_old_root();
    let failed = Failed::at::<rustix::io::Errno>;
    rustix::process::chdir(new).map_err(failed(STAGE, "chdir"))?;
    rustix::mount::mount_move(".", "/").map_err(failed(STAGE, "move"))?;
    rustix::process::chroot(".").map_err(failed(STAGE, "chroot"))?;
    rustix::process::chdir("/").map_err(failed(STAGE, "chdir"))
}

/// Gives back the memory of the old root's files. One that is not in memory is left as it is.
fn empty_old_root() {
    let in_memory = rustix::fs::statfs("/").is_ok_and(|it| IN_MEMORY.contains(&it.f_type));
    if let (true, Ok(root)) = (in_memory, fs::symlink_metadata("/")) {
        empty(Path::new("/"), root.dev());
    }
}

/// Removes what is in a directory, but nothing of other file systems.
fn empty(dir: &Path, device: u64) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(it) = fs::symlink_metadata(&path) else {
            continue;
        };
        if it.dev() != device {
            continue;
        }
        // What cannot be removed costs its memory and nothing else.
        if it.is_dir() {
            empty(&path, device);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Puts the agent's program where the initial file system had it under its other names. A root that has something
/// there, or no room, keeps what it has.
fn offer_tools() {
    let mode = Mode::from_raw_mode(0o755);
    if fs::symlink_metadata(TOOL).is_err() && fs::copy("/proc/self/exe", TOOL).is_ok() {
        let _ = rustix::fs::chmodat(CWD, TOOL, mode, AtFlags::empty());
        let _ = std::os::unix::fs::symlink(TOOL, SECOND_TOOL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_emptied_without_following_links() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(other.path().join("kept"), "").unwrap();
        fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        fs::write(dir.path().join("a/b/file"), "").unwrap();
        std::os::unix::fs::symlink(other.path(), dir.path().join("a/link")).unwrap();
        empty(dir.path(), fs::symlink_metadata(dir.path()).unwrap().dev());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(other.path().join("kept").exists());
    }

    #[test]
    fn another_file_system_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        empty(dir.path(), fs::symlink_metadata(dir.path()).unwrap().dev().wrapping_add(1));
        assert!(dir.path().join("file").exists());
    }
}
