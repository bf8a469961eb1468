//! A directory of the host, written into an archive.

use std::{
    ffi::{CString, OsStr, OsString},
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{
        AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, fstat, major, minor, openat, readlinkat,
        statat,
    },
    io::Errno,
};

use crate::{
    cpio::{Archive, MAX_FILE_BYTES, MAX_NAME_BYTES, Metadata},
    image::ImageError,
};

/// Writes what is below `root` into the archive, the names of each directory in the order of their bytes.
///
/// `keep` is asked for each path, relative to `root`; what it refuses is left out with all that is below. Symbolic
/// links are kept, never followed. Memory is bounded by the names in one directory at each level.
pub(crate) fn add_tree(
    archive: &mut Archive,
    root: &Path,
    keep: impl Fn(&[u8]) -> bool,
) -> Result<(), ImageError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = openat(CWD, root, flags, Mode::empty()).map_err(|error| match error {
        Errno::NOTDIR => ImageError::NotADirectory { path: root.to_owned() },
        error => io_error(root, error),
    })?;
    let status = fstat(&top).map_err(|error| io_error(root, error))?;
    archive.add(b".", metadata_of(&status), &[]).map_err(ImageError::Memory)?;
    let mut levels = vec![Level::open(top, Vec::new(), root)?];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.next() else {
            levels.pop();
            continue;
        };
        let mut path = level.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.as_bytes());
        if keep(&path) {
            let entry =
                Entry { directory: &level.directory, name, on_host: host_path(root, &path), path };
            if let Some(below) = entry.add(archive)? {
                levels.push(below);
            }
        }
    }
    Ok(())
}

/// A directory of which some names are still to be written.
struct Level {
    directory: OwnedFd,
    path: Vec<u8>,
    names: std::vec::IntoIter<CString>,
}

impl Level {
    fn open(directory: OwnedFd, path: Vec<u8>, on_host: &Path) -> Result<Self, ImageError> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory).map_err(|error| io_error(on_host, error))? {
            let entry = entry.map_err(|error| io_error(on_host, error))?;
            let name = entry.file_name();
            if name != c"." && name != c".." {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(Self { directory, path, names: names.into_iter() })
    }
}

/// One name in a directory.
struct Entry<'a> {
    directory: &'a OwnedFd,
    name: CString,
    path: Vec<u8>,
    on_host: PathBuf,
}

impl Entry<'_> {
    /// Writes it; returns the directory behind it, if it is one.
    fn add(self, archive: &mut Archive) -> Result<Option<Level>, ImageError> {
        if self.path.len() > MAX_NAME_BYTES {
            return Err(ImageError::NameTooLong { path: self.on_host });
        }
        let status = statat(self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.failed(error))?;
        match FileType::from_raw_mode(status.st_mode) {
            FileType::Directory => {
                archive.add(&self.path, metadata_of(&status), &[]).map_err(ImageError::Memory)?;
                let directory = self.open(&status, OFlags::DIRECTORY)?;
                Level::open(directory, self.path, &self.on_host).map(Some)
            }
            FileType::RegularFile => self.add_file(archive, &status).map(|()| None),
            FileType::Symlink => {
                let target = readlinkat(self.directory, &self.name, Vec::new())
                    .map_err(|error| self.failed(error))?;
                if target.as_bytes().len() > MAX_NAME_BYTES {
                    return Err(ImageError::NameTooLong { path: self.on_host });
                }
                archive
                    .add(&self.path, metadata_of(&status), target.as_bytes())
                    .map_err(ImageError::Memory)?;
                Ok(None)
            }
            _ => {
                archive.add(&self.path, metadata_of(&status), &[]).map_err(ImageError::Memory)?;
                Ok(None)
            }
        }
    }

    fn add_file(&self, archive: &mut Archive, status: &Stat) -> Result<(), ImageError> {
        // Not to wait for a writer should a pipe have taken the file's place.
        let file = File::from(self.open(status, OFlags::NONBLOCK | OFlags::NOCTTY)?);
        let bytes = u64::try_from(status.st_size).unwrap_or(0);
        if bytes > MAX_FILE_BYTES {
            return Err(ImageError::TooLarge { path: self.on_host.clone(), bytes });
        }
        let size = u32::try_from(bytes)
            .map_err(|_| ImageError::TooLarge { path: self.on_host.clone(), bytes })?;
        archive.add_file(&self.path, metadata_of(status), &file, size).map_err(
            |error| match error.kind() {
                io::ErrorKind::UnexpectedEof => self.changed(),
                _ => ImageError::Copy { path: self.on_host.clone(), source: error },
            },
        )?;
        let more = (&file)
            .read(&mut [0])
            .map_err(|error| ImageError::Io { path: self.on_host.clone(), source: error })?;
        let now = fstat(&file).map_err(|error| self.failed(error))?;
        if more != 0 || !same_content(status, &now) {
            return Err(self.changed());
        }
        Ok(())
    }

    /// Opens what `status` describes; what has taken its place since is refused.
    fn open(&self, status: &Stat, flags: OFlags) -> Result<OwnedFd, ImageError> {
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened =
            openat(self.directory, &self.name, flags, Mode::empty()).map_err(
                |error| match error {
                    Errno::LOOP | Errno::NOTDIR => self.changed(),
                    error => self.failed(error),
                },
            )?;
        let now = fstat(&opened).map_err(|error| self.failed(error))?;
        if (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino) {
            Ok(opened)
        } else {
            Err(self.changed())
        }
    }

    fn failed(&self, error: Errno) -> ImageError {
        match error {
            Errno::NOENT => self.changed(),
            error => io_error(&self.on_host, error),
        }
    }

    fn changed(&self) -> ImageError {
        ImageError::Changed { path: self.on_host.clone() }
    }
}

fn same_content(before: &Stat, after: &Stat) -> bool {
    before.st_size == after.st_size
        && (before.st_mtime, before.st_mtime_nsec) == (after.st_mtime, after.st_mtime_nsec)
        && (before.st_ctime, before.st_ctime_nsec) == (after.st_ctime, after.st_ctime_nsec)
}

fn metadata_of(status: &Stat) -> Metadata {
    let device = match FileType::from_raw_mode(status.st_mode) {
        FileType::CharacterDevice | FileType::BlockDevice => {
            (major(status.st_rdev), minor(status.st_rdev))
        }
        _ => (0, 0),
    };
    Metadata { mode: status.st_mode, user: status.st_uid, group: status.st_gid, device }
}

fn host_path(root: &Path, path: &[u8]) -> PathBuf {
    let below: OsString = OsString::from_vec(path.to_vec());
    root.join::<&OsStr>(&below)
}

fn io_error(path: &Path, error: Errno) -> ImageError {
    ImageError::Io { path: path.to_owned(), source: error.into() }
}
