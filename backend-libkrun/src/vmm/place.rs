//! [`Place`]: a directory for sockets that nobody else can reach.
#![allow(unsafe_code)]

use rustix::{
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags},
    thread::UnshareFlags,
};
use std::{
    ffi::CString,
    io,
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
        if let Ok(root) = mount() {
            return Ok(Self { root });
        }
        let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNS;
        // SAFETY: neither flag takes descriptors away from anything that goes on to use them.
        unsafe { rustix::thread::unshare_unsafe(flags)? };
        Ok(Self { root: mount()? })
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

fn mount() -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOEXEC | MountAttrFlags::MOUNT_ATTR_NODEV;
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Makes a mount of a directory that stands nowhere: nothing leads out of it, whatever a guest asks for by `..`, and the
/// host's kernel refuses writes itself where they are to be refused.
///
/// # Errors
/// When this process may not mount what it was given.
pub(super) fn confined(directory: &OwnedFd, read_only: bool) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let mount = rustix::mount::open_tree(directory, c"", flags)?;
    if read_only {
        forbid_writing(&mount)?;
    }
    Ok(mount)
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

fn forbid_writing(mount: &OwnedFd) -> io::Result<()> {
    let attr = MountAttr { set: MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, userns: 0 };
    // SAFETY: the path is an empty string with its null, and the structure is of the size given; both outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
        let Ok(root) = mount() else { return };
        let place = Place { root };
        let path = place.path("socket");
        assert!(UnixStream::connect(&path).is_err());
        let listener = UnixListener::bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(listener);
    }
}
