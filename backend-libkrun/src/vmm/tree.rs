//! [`Tree`]: the host's directories that a guest sees, as one tree that stands nowhere.
#![allow(unsafe_code)]

use super::place::{file_system_in_memory, path_of};
use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{
        MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change,
        move_mount, open_tree, unmount,
    },
    thread::UnshareFlags,
};
use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// A directory in memory with a mount for each directory of the host. It ends with the last process that has its
/// descriptor.
///
/// Nothing leads out of it, whatever a guest asks for by `..`: above a mount is the directory in memory, and above that is
/// nothing. So all that one mount can reach are the others, which the same guest has anyway, each with its own right
/// to write: the host's kernel refuses writes to what is read-only, and to the directory in memory itself. It also refuses
/// links and renames from one mount to another.
///
/// What else is mounted within a directory is seen as it is now. What the host mounts there later is not, which could be
/// written to where the directory cannot.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    read_only: bool,
}

impl Tree {
    /// Makes one of directories with their names and whether they are read-only. This thread has mounts of its own from
    /// then on.
    ///
    /// # Errors
    /// When this process may not mount, or a directory is not where it was.
    pub(super) fn new(directories: &[(&str, bool, OwnedFd)]) -> io::Result<Self> {
        // What this process cannot see any more cannot be mounted: this comes before it leaves.
        let mut mounts = Vec::new();
        for (name, read_only, directory) in directories {
            let mount = own_mount(directory)?;
            let flags = if *read_only { MOUNT_ATTR_RDONLY } else { 0 };
            set_attributes(&mount, flags, libc::MS_PRIVATE, libc::AT_RECURSIVE)?;
            mounts.push((*name, mount));
        }
        leave_mounts()?;
        let top = file_system_in_memory()?;
        // Only what is mounted somewhere can be mounted on; here nobody looks for it, and no path leads to it.
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&top, c"", CWD, c"/", flags)?;
        let tree = attach(&top, &mounts);
        unmount(path_of(&top), UnmountFlags::DETACH)?;
        let root = tree?;
        set_attributes(&root, MOUNT_ATTR_RDONLY, 0, 0)?;
        let read_only = directories.iter().all(|(_, read_only, _)| *read_only);
        Ok(Self { root, read_only })
    }

    /// Gives its path, for whoever has its descriptor under the same number.
    pub(super) fn path(&self) -> CString {
        // The dot has the link to the descriptor followed.
        let path = [path_of(&self.root).as_bytes(), b"/."].concat();
        CString::new(path).unwrap_or_default()
    }

    /// Says whether nothing in it can be written to.
    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }
}

impl AsFd for Tree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE
    .union(OpenTreeFlags::OPEN_TREE_CLOEXEC)
    .union(OpenTreeFlags::AT_EMPTY_PATH)
    .union(OpenTreeFlags::AT_RECURSIVE);

/// Makes a mount of a directory, with what is mounted below it, that stands nowhere.
fn own_mount(directory: &OwnedFd) -> io::Result<OwnedFd> {
    match open_tree(directory, c"", CLONE) {
        // It was opened before this process got mounts of its own.
        Err(Errno::INVAL) => Ok(open_tree(opened_again(directory)?, c"", CLONE)?),
        other => Ok(other?),
    }
}

/// Opens the same directory among the mounts of this process.
fn opened_again(directory: &OwnedFd) -> io::Result<OwnedFd> {
    let path = rustix::fs::readlink(path_of(directory), Vec::new())?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let again = rustix::fs::open(path.as_c_str(), flags, Mode::empty())?;
    let (one, other) = (rustix::fs::fstat(directory)?, rustix::fs::fstat(&again)?);
    if (one.st_dev, one.st_ino) != (other.st_dev, other.st_ino) {
        let path = path.to_string_lossy();
        return Err(io::Error::other(format!("{path} is another directory by now")));
    }
    Ok(again)
}

/// Gives this thread a copy of all mounts, in which it changes nothing for anybody else.
fn leave_mounts() -> io::Result<()> {
    // SAFETY: the flag takes no descriptor away from anything.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    // What the host unmounts it still unmounts here.
    let flags = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    Ok(mount_change("/", flags)?)
}

/// Puts mounts into a directory that is mounted itself, and makes a mount of the whole that stands nowhere.
fn attach(top: &OwnedFd, mounts: &[(&str, OwnedFd)]) -> io::Result<OwnedFd> {
    for (name, mount) in mounts {
        rustix::fs::mkdirat(top, *name, Mode::RWXU)?;
        move_mount(mount, c"", top, *name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(open_tree(top, c"", CLONE)?)
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 1;

/// Sets attributes of a mount and how it hears of others; with `AT_RECURSIVE`, also of those below it.
fn set_attributes(
    mount: &OwnedFd,
    set: u64,
    propagation: libc::c_ulong,
    how: libc::c_int,
) -> io::Result<()> {
    let attr = MountAttr { set, clear: 0, propagation, userns: 0 };
    // SAFETY: the path is an empty string with its null, and the structure is of the size given; both outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | how,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::place::{Place, enter_user_namespace};
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    use std::{fs, os::unix::net::UnixListener, path::PathBuf};
    use vm_launcher::inside::split::{Side, split};

    /// A host with a directory to write to, one to read, and a secret beside both.
    struct Host(PathBuf);

    impl Host {
        fn new(name: &str) -> Self {
            let host = Self(std::env::temp_dir().join(format!("{name}-{}", std::process::id())));
            for directory in ["open", "kept"] {
                fs::create_dir_all(host.0.join(directory).join("sub")).unwrap();
                fs::write(host.0.join(directory).join("which"), directory).unwrap();
            }
            fs::write(host.0.join("secret"), "secret").unwrap();
            host
        }

        fn directories(&self) -> [(&'static str, bool, OwnedFd); 2] {
            [("0", false, "open"), ("1", true, "kept")].map(|(name, read_only, directory)| {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let path = self.0.join(directory);
                (name, read_only, rustix::fs::open(path, flags, Mode::empty()).unwrap())
            })
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn check(host: &Host, tree: &Tree) {
        let inside = |path: &str| format!("{}/{path}", tree.path().to_string_lossy());
        assert_eq!(fs::read_to_string(inside("0/which")).unwrap(), "open");
        assert_eq!(fs::read_to_string(inside("1/which")).unwrap(), "kept");
        fs::write(inside("0/sub/new"), "new").unwrap();
        assert_eq!(fs::read_to_string(host.0.join("open/sub/new")).unwrap(), "new");
        for path in ["new", "1/new", "1/which", "1/sub/new", "0/../new", "0/../1/new"] {
            let refused = fs::write(inside(path), "x").unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ReadOnlyFilesystem, "{path}");
        }
        assert!(fs::rename(inside("0/which"), inside("1/which")).is_err());
        assert!(fs::hard_link(inside("1/which"), inside("0/linked")).is_err());
        assert!(
            fs::rename(inside("0"), inside("2")).is_err() && fs::remove_dir(inside("0")).is_err()
        );
        for up in 1..9 {
            for path in ["secret".to_owned(), host.0.join("secret").display().to_string()] {
                let path = inside(&format!("0/sub/{}{path}", "../".repeat(up)));
                assert!(fs::read(&path).is_err(), "{path}");
            }
        }
        let names: Vec<_> = fs::read_dir(inside("0/../../.."))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(!tree.is_read_only());
    }

    /// Runs a test in a process of its own, which it may change as it likes.
    fn alone(test: impl FnOnce()) {
        match split().unwrap() {
            Side::Copy => {
                test();
                std::process::exit(0);
            }
            Side::Original(pid) => {
                let ended = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED).unwrap().unwrap();
                assert_eq!(ended.exit_status(), Some(0), "{ended:?}");
            }
        }
    }

    #[test]
    fn a_guest_gets_its_directories_and_no_others() {
        // A host that forbids both mounts and user namespaces has no libkrun machines.
        if file_system_in_memory().is_err() {
            return;
        }
        let host = Host::new("tree");
        alone(|| {
            let before = fs::read_to_string("/proc/self/mounts").unwrap();
            let tree = Tree::new(&host.directories()).unwrap();
            check(&host, &tree);
            assert_eq!(fs::read_to_string("/proc/self/mounts").unwrap(), before);
        });
    }

    #[test]
    fn who_may_not_mount_has_a_user_namespace_for_it() {
        let host = Host::new("namespace");
        let directories = host.directories();
        alone(|| {
            // Some hosts forbid it.
            if let Err(error) = enter_user_namespace() {
                assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
                return;
            }
            let place = Place::new().unwrap();
            let _listener = UnixListener::bind(place.path("socket")).unwrap();
            check(&host, &Tree::new(&directories).unwrap());
        });
    }

    #[test]
    fn a_directory_that_is_gone_is_no_other_one() {
        let host = Host::new("gone");
        let directories = host.directories();
        fs::remove_dir_all(host.0.join("open")).unwrap();
        fs::create_dir(host.0.join("open")).unwrap();
        assert!(opened_again(&directories[0].2).is_err());
        assert!(opened_again(&directories[1].2).is_ok());
    }
}
