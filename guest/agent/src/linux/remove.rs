//! Removing a tree that others filled.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Removes a directory and all it holds, links unfollowed, also where directories in it forbid that; one that is
/// gone is fine.
///
/// # Errors
/// When something cannot be removed.
pub fn remove_tree(root: &Path) -> io::Result<()> {
    match fs::remove_dir_all(root) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            open_up(root);
            absent_is_fine(fs::remove_dir_all(root))
        }
        other => absent_is_fine(other),
    }
}

/// Gives the owner every permission on each directory below, so that its names can be removed.
fn open_up(root: &Path) {
    let mut next: Vec<PathBuf> = vec![root.to_owned()];
    while let Some(dir) = next.pop() {
        // What cannot be changed shows when it is removed.
        let _ = fs::set_permissions(&dir, fs::Permissions::from_mode(0o700));
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                next.push(entry.path());
            }
        }
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
