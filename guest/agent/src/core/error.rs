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

#[cfg(test)]
mod tests {
    use super::*;

    const OF_PROGRAMS: [Errno; 4] = [Errno::SRCH, Errno::NOMEM, Errno::INVAL, Errno::NOSYS];

    #[test]
    fn errnos_are_told_apart_where_a_host_can_act_on_them() {
        let alike: [&[Errno]; 13] = [
            &[Errno::NOENT],
            &[Errno::PERM, Errno::ACCES],
            &[Errno::EXIST],
            &[Errno::NOTDIR],
            &[Errno::ISDIR],
            &[Errno::NOTEMPTY],
            &[Errno::NOSPC, Errno::DQUOT],
            &[Errno::ROFS],
            &[Errno::NAMETOOLONG],
            &[Errno::SRCH],
            &[Errno::NOMEM, Errno::NFILE, Errno::MFILE, Errno::AGAIN],
            &[Errno::INVAL, Errno::TOOBIG],
            &[Errno::NOSYS, Errno::OPNOTSUPP],
        ];
        let mut seen = vec![GuestErrorKind::Other];
        for errnos in alike {
            let kind = kind_of(errnos[0]);
            assert!(!seen.contains(&kind), "{errnos:?} are told as {kind:?}, as others are");
            assert!(errnos.iter().all(|errno| kind_of(*errno) == kind), "{errnos:?}");
            seen.push(kind);
        }
        assert_eq!(kind_of(Errno(5)), GuestErrorKind::Other);
    }

    #[test]
    fn what_says_little_of_a_file_is_left_to_the_errno() {
        for errno in OF_PROGRAMS {
            assert_eq!(failed(errno, "").kind, kind_of(errno));
            let error = failed(errno, "/a");
            assert_eq!((error.kind, error.errno), (GuestErrorKind::Other, errno.0));
        }
        assert_eq!(failed(Errno::NOENT, "/a").kind, GuestErrorKind::NotFound);
    }

    #[test]
    fn a_path_is_cut_where_a_letter_ends() {
        let long = format!("/{}", "ä".repeat(MAX_PATH));
        let cut = refused(GuestErrorKind::InvalidPath, &long).path;
        assert_eq!(cut.len(), MAX_PATH - 1);
        assert!(long.starts_with(&cut));
    }
}
