//! Work on paths and directories that is done at once.

use super::error::{MAX_PATH, failed, kinded, refused};
use crate::os::{Errno, GuestOs};
use vm_guest_protocol::{EntryKind, GuestError, GuestErrorKind, ListedDir, MAX_ENTRIES};
use vm_planted_bugs::{Bug, planted};

/// The largest encoded directory listing.
const MAX_LISTING: usize = 32 << 20;

/// How often a directory is emptied again when others keep filling it.
const REMOVE_ATTEMPTS: u32 = 8;

/// Checks that a path is absolute and normalised.
pub(super) fn check(path: &str) -> Result<(), GuestError> {
    let good = path == "/"
        || path.len() <= MAX_PATH
            && !path.contains('\0')
            && path
                .strip_prefix('/')
                .is_some_and(|rest| rest.split('/').all(|name| !matches!(name, "" | "." | "..")));
    if good { Ok(()) } else { Err(refused(GuestErrorKind::InvalidPath, path)) }
}

/// Gives the directory that a path's last name stands in.
pub(super) fn parent(path: &str) -> &str {
    match path.rfind('/') {
        None | Some(0) => "/",
        Some(at) => &path[..at],
    }
}

/// Puts a name behind a directory.
pub(super) fn join(dir: &str, name: &str) -> String {
    let mut path = String::with_capacity(dir.len() + 1 + name.len());
    path.push_str(dir);
    if !dir.ends_with('/') {
        path.push('/');
    }
    path.push_str(name);
    path
}

/// Lists a directory, sorted by the names' bytes, as it is sent.
pub(super) fn list(path: &str, os: &mut dyn GuestOs) -> Result<bytes::Bytes, GuestError> {
    check(path)?;
    let mut entries = os.read_dir(path).map_err(|errno| failed(errno, path))?;
    entries.sort_unstable_by(|(one, _), (other, _)| one.as_bytes().cmp(other.as_bytes()));
    if planted(Bug::ListingIgnoresCase) {
        entries.sort_by_key(|(name, _)| name.to_lowercase());
    }
    let too_many = entries.len() > MAX_ENTRIES;
    let listing = ListedDir { entries }.to_bytes();
    if too_many || listing.len() > MAX_LISTING {
        return Err(refused(GuestErrorKind::OutOfResources, path));
    }
    Ok(listing)
}

/// Makes a directory, and with `recursive` its missing parents.
pub(super) fn create_dir(
    path: &str,
    mode: u32,
    recursive: bool,
    os: &mut dyn GuestOs,
) -> Result<(), GuestError> {
    check(path)?;
    let mode = mode & 0o7777;
    if !recursive || planted(Bug::ParentsAreNotMade) {
        return os.mkdir(path, mode).map_err(|errno| failed(errno, path));
    }
    let ends = path.match_indices('/').skip(1).map(|(at, _)| at).chain([path.len()]);
    for end in ends {
        let prefix = &path[..end];
        let mode = if end == path.len() { mode } else { 0o755 };
        make_or_accept(prefix, mode, end == path.len(), os)?;
    }
    Ok(())
}

fn make_or_accept(
    path: &str,
    mode: u32,
    last: bool,
    os: &mut dyn GuestOs,
) -> Result<(), GuestError> {
    match os.stat(path) {
        Ok(it) if it.kind == EntryKind::Directory => return Ok(()),
        Ok(_) if last => return Err(kinded(GuestErrorKind::AlreadyExists, Errno::EXIST, path)),
        Ok(_) => return Err(failed(Errno::NOTDIR, path)),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(failed(errno, path)),
    }
    match os.mkdir(path, mode) {
        Ok(()) => Ok(()),
        // Someone else may have made it in between.
        Err(Errno::EXIST) if os.stat(path).is_ok_and(|it| it.kind == EntryKind::Directory) => {
            Ok(())
        }
        Err(errno) => Err(failed(errno, path)),
    }
}

/// Removes a file or a directory, and with `recursive` all that a directory holds. Links are removed, not followed.
pub(super) fn remove(path: &str, recursive: bool, os: &mut dyn GuestOs) -> Result<(), GuestError> {
    check(path)?;
    if path == "/" {
        return Err(kinded(GuestErrorKind::PermissionDenied, Errno::BUSY, path));
    }
    let found = if planted(Bug::RemovalFollowsLinks) { os.stat(path) } else { os.lstat(path) };
    let kind = found.map_err(|errno| failed(errno, path))?.kind;
    match (kind, recursive) {
        (EntryKind::Directory, true) => remove_tree(path, os),
        (EntryKind::Directory, false) => os.rmdir(path).map_err(|errno| failed(errno, path)),
        _ => os.unlink(path).map_err(|errno| failed(errno, path)),
    }
}

/// A directory that is being emptied.
struct Level {
    /// Its path.
    path: String,
    /// Directories in it that are not empty.
    full: Vec<String>,
    attempts: u32,
}

/// Removes a tree without recursion: the stack is no deeper than a path is long, and each level remembers only the
/// directories in it.
fn remove_tree(root: &str, os: &mut dyn GuestOs) -> Result<(), GuestError> {
    let mut stack = vec![Level { path: root.to_owned(), full: Vec::new(), attempts: 0 }];
    while let Some(level) = stack.last_mut() {
        if let Some(name) = level.full.pop() {
            let path = join(&level.path, &name);
            stack.push(Level { path, full: Vec::new(), attempts: 0 });
            continue;
        }
        match os.rmdir(&level.path) {
            Ok(()) | Err(Errno::NOENT) => {
                stack.pop();
            }
            Err(Errno::NOTEMPTY | Errno::EXIST) if level.attempts < REMOVE_ATTEMPTS => {
                level.attempts += 1;
                level.full = remove_entries(&level.path, os)?;
            }
            Err(errno) => return Err(failed(errno, &level.path)),
        }
    }
    Ok(())
}

/// Removes everything in a directory but directories that are not empty, whose names it gives.
fn remove_entries(dir: &str, os: &mut dyn GuestOs) -> Result<Vec<String>, GuestError> {
    let mut full = Vec::new();
    let entries = match os.read_dir(dir) {
        Ok(entries) => entries,
        Err(Errno::NOENT) => return Ok(full),
        Err(errno) => return Err(failed(errno, dir)),
    };
    for (name, kind) in entries {
        let path = join(dir, &name);
        let removed = match kind {
            EntryKind::Directory => os.rmdir(&path),
            _ => os.unlink(&path),
        };
        match removed {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::ISDIR) => full.push(name),
            Err(errno) => return Err(failed(errno, &path)),
        }
    }
    full.sort_unstable_by(|one, other| other.cmp(one));
    Ok(full)
}

/// Renames a file or directory.
pub(super) fn rename(from: &str, to: &str, os: &mut dyn GuestOs) -> Result<(), GuestError> {
    check(from)?;
    check(to)?;
    os.rename(from, to).map_err(|errno| failed(errno, from))
}
