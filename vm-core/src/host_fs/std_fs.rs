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

    fn file(&self) -> Option<&File> {
        Some(&self.file)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        container::{self, Compatibility, ContainerError, ContainerWriter},
        machine::SectionSink,
    };
    use proptest::{collection::vec, prelude::*};
    use std::{
        os::{
            fd::OwnedFd,
            unix::{fs::PermissionsExt, net::UnixStream},
        },
        pin::pin,
        task::{Context, Poll, Waker},
        time::Duration,
    };
    use tempfile::TempDir;
    use tokio::runtime::{Builder, Runtime};
    use vm_trait::{Mib, SnapshotId, SnapshotMetadata, VmConfig, VmId};

    fn runtime() -> Runtime {
        Builder::new_current_thread().build().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    async fn write_container(path: &Path, content: Bytes) -> u64 {
        let mut writer = ContainerWriter::create(Arc::new(StdFs), path, 1).await.unwrap();
        writer.begin("ram").await.unwrap();
        writer.write(content).await.unwrap();
        finish(writer).await
    }

    async fn finish(writer: ContainerWriter) -> u64 {
        let (backend, arch, memory) = ("kvm".to_owned(), "x86_64".to_owned(), Mib(64));
        let metadata = SnapshotMetadata {
            id: SnapshotId(1),
            vm: VmId(2),
            backend: backend.clone(),
            taken_at: Duration::ZERO,
            arch: arch.clone(),
            vcpus: 1,
            memory,
            label: None,
            base: None,
        };
        let compatibility = Compatibility { backend, arch, vcpus: 1, memory, agent_protocol: 1 };
        writer.finish(metadata, VmConfig::default(), compatibility, None).await.unwrap().length
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn what_was_appended_is_read(
            chunks in vec(vec(any::<u8>(), 0..300), 0..6), offset in 0..2000u64, length in 0..2000usize,
        ) {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join("file");
            let whole = chunks.concat();
            runtime().block_on(async {
                let mut file = StdFs.create_new(&path).await.unwrap();
                for chunk in chunks {
                    file.write_all(chunk.into()).await.unwrap();
                }
                file.sync().await.unwrap();
                let reader = StdFs.open(&path).await.unwrap();
                assert_eq!(reader.size().await.unwrap(), whole.len() as u64);
                assert_eq!(reader.read_at(0, whole.len()).await.unwrap(), whole);
                let start = usize::try_from(offset).unwrap();
                match (whole.get(start..start + length), reader.read_at(offset, length).await) {
                    (Some(part), Ok(read)) => assert_eq!(read, part),
                    (None, Err(error)) => assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof),
                    (expected, got) => panic!("{expected:?}, got {got:?}"),
                }
            });
        }
    }

    #[test]
    fn a_length_beyond_the_end_is_not_allocated() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, b"abc").unwrap();
        runtime().block_on(async {
            let reader = StdFs.open(&path).await.unwrap();
            for (offset, length) in [(0, usize::MAX), (u64::MAX, 1), (1, 1 << 50)] {
                let error = reader.read_at(offset, length).await.unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            }
        });
    }

    #[test]
    fn files_and_directories_are_the_owners_alone() {
        let dir = TempDir::new().unwrap();
        let (deep, path) = (dir.path().join("a/b"), dir.path().join("a/b/file"));
        runtime().block_on(async {
            for _ in 0..2 {
                StdFs.create_dir_all(&deep).await.unwrap();
            }
            StdFs.create_new(&path).await.unwrap();
            let error = StdFs.create_new(&path).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        });
        assert_eq!((mode(&deep), mode(&path)), (0o700, 0o600));
    }

    #[test]
    fn names_move_and_go_while_what_is_open_stays() {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["b", "c", "a"] {
            fs::write(at(name), name).unwrap();
        }
        fs::create_dir(at("directory")).unwrap();
        runtime().block_on(async {
            assert_eq!(StdFs.list(dir.path()).await.unwrap(), [at("a"), at("b"), at("c")]);
            let old = StdFs.open(&at("b")).await.unwrap();
            StdFs.rename(&at("a"), &at("b")).await.unwrap();
            StdFs.sync_dir(dir.path()).await.unwrap();
            assert_eq!(old.read_at(0, 1).await.unwrap(), "b");
            assert_eq!(fs::read(at("b")).unwrap(), b"a");
            StdFs.remove(&at("b")).await.unwrap();
            StdFs.remove_now(&at("c"));
            StdFs.remove_now(&at("never there"));
            assert_eq!(StdFs.list(dir.path()).await.unwrap(), Vec::<PathBuf>::new());
            for error in [
                StdFs.remove(&at("b")).await.unwrap_err(),
                StdFs.open(&at("b")).await.unwrap_err(),
                StdFs.list(&at("nowhere")).await.unwrap_err(),
                StdFs.sync_dir(&at("nowhere")).await.unwrap_err(),
            ] {
                assert_eq!(error.kind(), io::ErrorKind::NotFound);
            }
        });
    }

    #[test]
    fn containers_are_kept() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("snapshot");
        let content = Bytes::from(vec![7; 3 << 20]);
        runtime().block_on(async {
            let size = write_container(&path, content.clone()).await;
            assert_eq!(fs::metadata(&path).unwrap().len(), size);
            let sections = container::open(&StdFs, &path).await.unwrap().sections;
            assert_eq!(sections.get("ram").unwrap(), &content);
            let bytes = container::read_verified(&StdFs, &path).await.unwrap();
            let copy = dir.path().join("copy");
            container::write_verified(Arc::new(StdFs), &copy, bytes, 2).await.unwrap();
            assert!(fs::read(&copy).unwrap() == fs::read(&path).unwrap());
            assert_eq!(container::sweep(&StdFs, dir.path()).await, Ok(0));
            assert_eq!(container::sweep(&StdFs, &dir.path().join("none")).await, Ok(0));
            assert!(container::sweep(&StdFs, &copy).await.is_err(), "a file holds no snapshots");
        });
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_dropped_future_leaves_no_temporary_file() {
        for polls in (0..22).map(|shift| 1 << shift) {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join("snapshot");
            let runtime = runtime();
            let done = {
                let _entered = runtime.enter();
                let mut write = pin!(write_container(&path, Bytes::from(vec![7; 200_000])));
                let mut context = Context::from_waker(Waker::noop());
                let poll = |_| matches!(write.as_mut().poll(&mut context), Poll::Ready(_));
                (0..polls).any(poll)
            };
            // Calls that have begun are waited for.
            drop(runtime);
            let left: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
            assert!(left.is_empty() && !done || left == [path], "after {polls} polls: {left:?}");
        }
    }

    #[test]
    fn content_that_cannot_be_made_durable_is_an_error() {
        // A socket takes what is written, and has no disk to bring it to.
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut writer = Writer { file: Arc::new(OwnedFd::from(ours).into()) };
        runtime().block_on(async {
            writer.write_all(Bytes::from_static(b"gone soon")).await.unwrap();
            assert_eq!(writer.sync().await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
        });
    }

    #[test]
    fn an_image_is_found_in_its_file_and_misses_what_is_cut_off() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("snapshot");
        runtime().block_on(async {
            let mut writer = ContainerWriter::create(Arc::new(StdFs), &path, 1).await.unwrap();
            writer.begin_image("ram", 3 << 12).await.unwrap();
            writer.write_at(1 << 12, Bytes::from(vec![7; 1 << 12])).await.unwrap();
            finish(writer).await;
            let sections = container::open(&StdFs, &path).await.unwrap().sections;
            let image = sections.image("ram").unwrap();
            let ([piece], [layer]) = (image.pieces(), image.layers()) else { panic!("{image:?}") };
            // As whoever maps it does.
            let file = layer.reader().file().unwrap();
            let mut mapped = [0; 1 << 12];
            file.read_exact_at(&mut mapped, piece.at).unwrap();
            assert_eq!(mapped, [7; 1 << 12]);

            OpenOptions::new().write(true).open(&path).unwrap().set_len(piece.at + 9).unwrap();
            for refused in [
                image.verify().await.unwrap_err(),
                image.read(*piece).await.unwrap_err(),
                image.content(image.total()).await.unwrap_err(),
            ] {
                assert!(matches!(refused, ContainerError::Corrupt(_)), "{refused}");
            }
        });
    }
}
