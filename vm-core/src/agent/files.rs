//! Guest files, as requests to the agent.

use super::{AgentClient, odd_answer};
use bytes::{Bytes, BytesMut};
use std::time::Duration;
use vm_guest_protocol::{Channel, EntryKind, ListedDir, Reply, Request};
use vm_trait::{
    CreateDirOptions, DirEntry, FileKind, FileStat, GuestFileError, RemoveOptions, VmErrorKind,
    WriteOptions,
};

/// The most bytes that are read of one guest file, so that a guest cannot fill the host's memory.
const MOST_OF_A_FILE: usize = 256 << 20;
/// The most bytes of one listing.
const MOST_OF_A_LISTING: usize = 64 << 20;

impl AgentClient {
    pub(crate) async fn read_file(&self, path: &str) -> Result<Bytes, VmErrorKind> {
        check_path(path)?;
        self.read_all(Request::ReadFile { path: path.to_owned() }, MOST_OF_A_FILE).await
    }

    pub(crate) async fn write_file(
        &self,
        path: &str,
        contents: Bytes,
        options: &WriteOptions,
    ) -> Result<(), VmErrorKind> {
        check_path(path)?;
        let after = self.whole_file_timeout(contents.len());
        let request = Request::WriteFile { path: path.to_owned(), mode: options.mode };
        let guard = self.open_with(request, |stream| {
            stream.stdin.push(contents);
            stream.stdin.close();
        })?;
        self.deadline(after, guard.outcome()).await.map(drop)
    }

    pub(crate) async fn stat(&self, path: &str) -> Result<FileStat, VmErrorKind> {
        check_path(path)?;
        match self.unary(Request::Stat { path: path.to_owned() }).await? {
            Reply::Stat(stat) => Ok(FileStat::new(kind(stat.kind), stat.size, stat.mode)
                .with_owner(stat.uid, stat.gid)
                .with_modified(Duration::from_nanos(stat.modified_ns))),
            _ => Err(odd_answer()),
        }
    }

    pub(crate) async fn list_dir(&self, path: &str) -> Result<Vec<DirEntry>, VmErrorKind> {
        check_path(path)?;
        let bytes =
            self.read_all(Request::ListDir { path: path.to_owned() }, MOST_OF_A_LISTING).await?;
        let listed = ListedDir::from_bytes(&bytes).map_err(|_| odd_answer())?;
        Ok(listed.entries.into_iter().map(|(name, it)| DirEntry::new(name, kind(it))).collect())
    }

    pub(crate) async fn create_dir(
        &self,
        path: &str,
        options: &CreateDirOptions,
    ) -> Result<(), VmErrorKind> {
        check_path(path)?;
        let mode = options.mode.unwrap_or(0o755);
        let recursive = options.recursive;
        self.unary(Request::CreateDir { path: path.to_owned(), mode, recursive }).await.map(drop)
    }

    pub(crate) async fn remove(
        &self,
        path: &str,
        options: &RemoveOptions,
    ) -> Result<(), VmErrorKind> {
        check_path(path)?;
        let recursive = options.recursive;
        self.unary(Request::Remove { path: path.to_owned(), recursive }).await.map(drop)
    }

    pub(crate) async fn rename(&self, from: &str, to: &str) -> Result<(), VmErrorKind> {
        check_path(from)?;
        check_path(to)?;
        let request = Request::Rename { from: from.to_owned(), to: to.to_owned() };
        self.unary(request).await.map(drop)
    }

    /// Reads a whole stream of at most `most` bytes; its deadline moves on with every MiB that arrives.
    async fn read_all(&self, request: Request, most: usize) -> Result<Bytes, VmErrorKind> {
        const PIECE: usize = 1 << 20;
        let timeout = self.inner.parts.timeouts.request;
        let guard = self.open_with(request, |_| {})?;
        let mut content = Content::default();
        loop {
            let until = content.length + PIECE;
            let piece = self.deadline(timeout, async {
                while content.length < until {
                    let taken = guard.wait(|stream| match (stream.stdout.take(), &stream.end) {
                        (Some(chunk), _) => Some(Some(chunk)),
                        (None, Some(_)) => Some(None),
                        (None, None) => None,
                    });
                    match taken.await {
                        Some(chunk) => content.push(chunk),
                        None => return guard.outcome().await.map(|_| true),
                    }
                    guard.grant(Channel::Stdout);
                }
                Ok(false)
            });
            if piece.await? {
                return Ok(content.into_bytes());
            }
            if content.length > most {
                return Err(VmErrorKind::ResourceExhausted {
                    resource: format!("room for more than {most} bytes of one guest file"),
                });
            }
        }
    }

    fn whole_file_timeout(&self, length: usize) -> Duration {
        let pieces = u32::try_from(length >> 20).unwrap_or(u32::MAX).saturating_add(1);
        self.inner.parts.timeouts.request.saturating_mul(pieces)
    }
}

/// Chunks put together, without a copy where there is only one.
#[derive(Default)]
struct Content {
    first: Bytes,
    more: BytesMut,
    length: usize,
}

impl Content {
    fn push(&mut self, chunk: Bytes) {
        self.length += chunk.len();
        if self.first.is_empty() {
            self.first = chunk;
            return;
        }
        if self.more.is_empty() {
            self.more.extend_from_slice(&self.first);
        }
        self.more.extend_from_slice(&chunk);
    }

    fn into_bytes(self) -> Bytes {
        if self.more.is_empty() { self.first } else { self.more.freeze() }
    }
}

fn kind(kind: EntryKind) -> FileKind {
    match kind {
        EntryKind::File => FileKind::File,
        EntryKind::Directory => FileKind::Directory,
        EntryKind::Symlink => FileKind::Symlink,
        EntryKind::Other => FileKind::Other,
    }
}

fn check_path(path: &str) -> Result<(), VmErrorKind> {
    if vm_trait::config::is_normal_absolute(path) {
        return Ok(());
    }
    Err(VmErrorKind::GuestFile { path: path.to_owned(), error: GuestFileError::InvalidPath })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_put_together_and_counted() {
        let mut content = Content::default();
        for chunk in ["ab", "", "cde", "f"] {
            content.push(chunk.into());
        }
        assert_eq!(content.length, 6);
        assert_eq!(content.into_bytes(), "abcdef");
    }
}
