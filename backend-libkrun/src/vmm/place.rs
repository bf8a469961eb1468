//! [`Place`]: a directory for sockets that nobody else can reach.
#![allow(unsafe_code)]

use rustix::{
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
    process::DumpableBehavior,
    thread::UnshareFlags,
};
use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

/// A file system in memory that is mounted nowhere. It ends with the last process that has its descriptor, so that
/// nothing of it is ever left.
#[derive(Debug)]
pub(super) struct Place {
    root: OwnedFd,
}

impl Place {
    /// Makes one. Where this process may not mount, it first becomes the master of a user namespace of its own; it must
    /// have a single thread for that.
    ///
    /// # Errors
    /// When the host allows neither.
    pub(super) fn new() -> io::Result<Self> {
        if let Ok(root) = file_system_in_memory() {
            return Ok(Self { root });
        }
        enter_user_namespace()?;
        Ok(Self { root: file_system_in_memory()? })
    }

    /// Gives the path of a name in it, for whoever has its descriptor under the same number.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.root.as_raw_fd()))
    }
}

impl AsFd for Place {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// Gives this process all rights over mounts that are its own, and over nothing else. Its user stays who it is: files that
/// it makes are that user's.
pub(super) fn enter_user_namespace() -> io::Result<()> {
    let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
    let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNS;
    // SAFETY: neither flag takes descriptors away from anything that goes on to use them.
    unsafe { rustix::thread::unshare_unsafe(flags)? };
    // A process that lets nobody read its memory may not write these files.
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    let mapped = (|| {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", format!("{0} {0} 1", user.as_raw()))?;
        fs::write("/proc/self/gid_map", format!("{0} {0} 1", group.as_raw()))
    })();
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    mapped
}

/// Makes a file system in memory that is mounted nowhere.
pub(super) fn file_system_in_memory() -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_NODEV;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Gives the path of a descriptor, for whoever has it under the same number.
pub(super) fn path_of(fd: &impl AsRawFd) -> CString {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    CString::new(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn sockets_in_it_can_be_reached_by_its_descriptor_alone() {
        // A host that forbids both mounts and user namespaces has no libkrun machines.
        let Ok(root) = file_system_in_memory() else { return };
        let place = Place { root };
        let path = place.path("socket");
        assert!(UnixStream::connect(&path).is_err());
        let listener = UnixListener::bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(listener);
    }
}
