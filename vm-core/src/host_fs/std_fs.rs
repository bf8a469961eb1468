//! [`StdFs`]: the real file system.

use super::{HostFile, HostFileReader, HostFs};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

/// The file system of the host, for real backends.
///
/// Calls run on tokio's pool for blocking work and need its runtime. A call whose future is dropped may still be
/// carried out; a file that `create_new` made for nobody is removed again. New files and directories are open to
/// their owner alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct StdFs;

#[async_trait]
impl HostFs for StdFs {
    async fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        blocking(move || DirBuilder::new().recursive(true).mode(0o700).create(path)).await
    }

    async fn create_new(&self, path: &Path) -> io::Result<Box<dyn HostFile>> {
        let path = path.to_owned();
        let made = blocking(move || {
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            Ok(Unclaimed { file: Some(file), path })
        })
        .await?;
        let file = made.claim().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(Writer { file: Arc::new(file) }))
    }

    async fn open(&self, path: &Path) -> io::Result<Box<dyn HostFileReader>> {
        let path = path.to_owned();
        let file = blocking(move || File::open(path)).await?;
        Ok(Box::new(Reader { file: Arc::new(file) }))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (from, to) = (from.to_owned(), to.to_owned());
        blocking(move || fs::rename(from, to)).await
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        blocking(move || fs::remove_file(path)).await
    }

    fn remove_now(&self, path: &Path) {
        // There is nobody to tell; `sweep` finds what is left.
        let _ = fs::remove_file(path);
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let path = path.to_owned();
        blocking(move || File::open(path)?.sync_all()).await
    }

    async fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        let path = path.to_owned();
        blocking(move || {
            let mut files = Vec::new();
            for entry in fs::read_dir(path)? {
                let entry = entry?;
                if entry.file_type()?.is_file() {
                    files.push(entry.path());
                }
            }
            files.sort();
            Ok(files)
        })
        .await
    }
}

/// A file that was made, and that is removed again when nobody waits for it any more.
struct Unclaimed {
    file: Option<File>,
    path: PathBuf,
}

impl Unclaimed {
    fn claim(mut self) -> Option<File> {
        self.file.take()
    }
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[derive(Debug)]
struct Writer {
    file: Arc<File>,
}

#[async_trait]
impl HostFile for Writer {
    async fn write_all(&mut self, bytes: Bytes) -> io::Result<()> {
        let file = self.file.clone();
        blocking(move || (&*file).write_all(&bytes)).await
    }

    async fn sync(&mut self) -> io::Result<()> {
        let file = self.file.clone();
        blocking(move || file.sync_all()).await
    }
}

#[derive(Debug)]
struct Reader {
    file: Arc<File>,
}

#[async_trait]
impl HostFileReader for Reader {
    async fn size(&self) -> io::Result<u64> {
        let file = self.file.clone();
        blocking(move || Ok(file.metadata()?.len())).await
    }

    async fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let file = self.file.clone();
        blocking(move || {
            // A length beyond the file's end must not become an allocation.
            let end = offset.checked_add(length as u64);
            if end.is_none_or(|end| end > file.metadata().map_or(0, |metadata| metadata.len())) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let mut bytes = vec![0; length];
            file.read_exact_at(&mut bytes, offset)?;
            Ok(bytes.into())
        })
        .await
    }
}

/// Runs a call that blocks where it holds up no task.
#[expect(
    clippy::disallowed_methods,
    reason = "only real backends use this file system, never the simulator"
)]
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(error) => Err(io::Error::other(error)),
    }
}
