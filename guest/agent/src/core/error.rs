//! What the host is told when something cannot be done.

use crate::os::Errno;
use vm_guest_protocol::{GuestError, GuestErrorKind};

/// The longest path that is worked on and shown in an error.
pub(super) const MAX_PATH: usize = 4096;

/// Makes the error of a system call, on a file where there is a path.
pub(super) fn failed(errno: Errno, path: &str) -> GuestError {
    use GuestErrorKind as K;
    let kind = match kind_of(errno) {
        // Of a file, these say nothing that the errno does not say better.
        K::NoSuchProcess | K::OutOfResources | K::InvalidArgument | K::Unsupported
            if !path.is_empty() =>
        {
            K::Other
        }
        kind => kind,
    };
    kinded(kind, errno, path)
}

/// Makes an error of a kind of its own for a failed system call.
pub(super) fn kinded(kind: GuestErrorKind, errno: Errno, path: &str) -> GuestError {
    GuestError { errno: errno.0, ..refused(kind, path) }
}

/// Makes the error of a request that was not tried. A path that came from the host may be as long as a frame, and
/// the error must fit into one too.
pub(super) fn refused(kind: GuestErrorKind, path: &str) -> GuestError {
    GuestError::new(kind).with_path(&path[..path.floor_char_boundary(MAX_PATH)])
}

/// Says what an errno means to a host.
pub(super) fn kind_of(errno: Errno) -> GuestErrorKind {
    use GuestErrorKind as K;
    match errno {
        Errno::NOENT => K::NotFound,
        Errno::PERM | Errno::ACCES => K::PermissionDenied,
        Errno::EXIST => K::AlreadyExists,
        Errno::NOTDIR => K::NotADirectory,
        Errno::ISDIR => K::IsADirectory,
        Errno::NOTEMPTY => K::DirectoryNotEmpty,
        Errno::NOSPC | Errno::DQUOT => K::OutOfSpace,
        Errno::ROFS => K::ReadOnly,
        Errno::NAMETOOLONG => K::InvalidPath,
        Errno::SRCH => K::NoSuchProcess,
        Errno::NOMEM | Errno::NFILE | Errno::MFILE | Errno::AGAIN => K::OutOfResources,
        Errno::INVAL | Errno::TOOBIG => K::InvalidArgument,
        Errno::NOSYS | Errno::OPNOTSUPP => K::Unsupported,
        _ => K::Other,
    }
}
