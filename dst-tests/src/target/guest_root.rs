//! Copies of the directory with a guest's root files.

use crate::context::GuestRoot;
use std::{
    env, fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The variable that names a directory with a guest's root file system.
const ROOT_VARIABLE: &str = "TWINVM_ROOT";

/// Finds the directory with a guest's root file system.
pub(super) fn root() -> Result<PathBuf, String> {
    let Some(root) = env::var_os(ROOT_VARIABLE).map(PathBuf::from) else {
        return Err(format!(
            "{ROOT_VARIABLE} is not set; it names a directory with a guest's root file system that has a shell"
        ));
    };
    if !root.join("bin/sh").is_file() {
        return Err(format!("{ROOT_VARIABLE}={}: there is no bin/sh in it", root.display()));
    }
    Ok(root)
}

/// Makes roots that are copies of that directory.
pub(super) fn copied_root() -> Arc<GuestRoot> {
    Arc::new(|path| {
        let copied = root().map_err(io::Error::other).and_then(|root| copy(&root, &path));
        Box::pin(async { copied })
    })
}

/// Copies a directory with all that is in it, links as links, into one that is not there yet.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy(&from, &to)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
        } else {
            fs::copy(&from, &to)?;
        }
    }
    fs::set_permissions(to, fs::metadata(from)?.permissions())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_copy_has_directories_links_and_modes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("deep/to"));
        fs::create_dir_all(from.join("bin")).unwrap();
        fs::create_dir(from.join("tmp")).unwrap();
        fs::set_permissions(from.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::write(from.join("bin/sh"), "shell").unwrap();
        fs::set_permissions(from.join("bin/sh"), fs::Permissions::from_mode(0o751)).unwrap();
        symlink("sh", from.join("bin/ash")).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(to.join("bin/ash")).unwrap(), "shell");
        assert_eq!(fs::read_link(to.join("bin/ash")).unwrap(), Path::new("sh"));
        let mode = |path: &str| fs::metadata(to.join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("bin/sh"), mode("tmp")), (0o751, 0o1777));
    }
}
