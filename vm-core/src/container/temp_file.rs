//! A file that grows under a temporary name until it is whole.

use super::ContainerError;
use crate::host_fs::{HostFile, HostFs};
use bytes::Bytes;
use std::{
    ffi::{OsStr, OsString},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};
use vm_planted_bugs::{Bug, planted};

/// A file under a temporary name; gone when dropped before [`commit`](Self::commit) renamed it.
#[derive(Debug)]
pub(super) struct TempFile {
    file: Box<dyn HostFile>,
    name: TempName,
    target: PathBuf,
}

/// A name to be removed again.
#[derive(Debug)]
struct TempName {
    fs: Arc<dyn HostFs>,
    path: PathBuf,
    armed: bool,
}

impl Drop for TempName {
    fn drop(&mut self) {
        if self.armed && !planted(Bug::HalfMadeFileIsLeft) {
            self.fs.remove_now(&self.path);
        }
    }
}

impl TempFile {
    pub(super) async fn create(
        fs: Arc<dyn HostFs>,
        target: &Path,
        tag: u64,
    ) -> Result<Self, ContainerError> {
        let path = temp_path(target, tag)?;
        // Armed before the file exists: a future dropped inside `create_new` may have made it.
        let mut name = TempName { fs, path, armed: true };
        let file = match name.fs.create_new(&name.path).await {
            Ok(file) => file,
            Err(error) => {
                // A file that stood there before belongs to someone else.
                name.armed = error.kind() != io::ErrorKind::AlreadyExists;
                return Err(ContainerError::io(&name.path, &error));
            }
        };
        Ok(Self { file, name, target: target.to_owned() })
    }

    pub(super) async fn write_all(&mut self, bytes: Bytes) -> Result<(), ContainerError> {
        let result = self.file.write_all(bytes).await;
        result.map_err(|error| ContainerError::io(&self.name.path, &error))
    }

    /// Gives the error for content that the file cannot have.
    pub(super) fn refuse(&self, reason: &str) -> ContainerError {
        invalid(&self.target, reason)
    }

    /// Makes the file durable and gives it its name.
    ///
    /// When only the last step fails, making the name durable, the new file stands whole under the name; a crash of the
    /// host may then still bring back the old one.
    pub(super) async fn commit(mut self) -> Result<(), ContainerError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |error: io::Error| ContainerError::io(&path, &error)
        };
        if !planted(Bug::SnapshotIsNotSynced) {
            self.file.sync().await.map_err(fail(&self.name.path))?;
        }
        let fs = &self.name.fs;
        fs.rename(&self.name.path, &self.target).await.map_err(fail(&self.target))?;
        self.name.armed = false;
        let dir = parent(&self.target);
        if planted(Bug::SnapshotNameIsNotSynced) {
            return Ok(());
        }
        self.name.fs.sync_dir(dir).await.map_err(fail(dir))
    }
}

pub(super) async fn sweep(fs: &dyn HostFs, dir: &Path) -> Result<usize, ContainerError> {
    let files = match fs.list(dir).await {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(ContainerError::io(dir, &error)),
    };
    let mut removed = 0;
    let mut failure = None;
    for name in files.iter().filter_map(|path| path.file_name()).filter(|name| is_temp_name(name)) {
        let path = dir.join(name);
        match fs.remove(&path).await {
            Ok(()) => removed += 1,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => failure = failure.or(Some(ContainerError::io(&path, &error))),
        }
    }
    failure.map_or(Ok(removed), Err)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn invalid(target: &Path, reason: &str) -> ContainerError {
    ContainerError::io(target, &io::Error::new(io::ErrorKind::InvalidInput, reason))
}

/// Gives `.{file}.{tag}.tmp` beside the file.
pub(super) fn temp_path(target: &Path, tag: u64) -> Result<PathBuf, ContainerError> {
    let Some(file) = target.file_name() else {
        return Err(invalid(target, "this path does not name a file"));
    };
    let mut name = OsString::from(".");
    name.push(file);
    name.push(format!(".{tag:016x}.tmp"));
    Ok(target.with_file_name(name))
}

/// Says whether a name is one that [`temp_path`] gives.
pub(super) fn is_temp_name(name: &OsStr) -> bool {
    let inner = |name: &[u8]| -> Option<bool> {
        let (file, tag) =
            name.strip_prefix(b".")?.strip_suffix(b".tmp")?.split_last_chunk::<17>()?;
        let hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        Some(!file.is_empty() && tag[0] == b'.' && tag[1..].iter().all(hex))
    };
    inner(name.as_encoded_bytes()).unwrap_or(false)
}
