//! A disk in memory that tells what is durable from what is not, fails where it is told to, and yields around every
//! call.

use crate::host_fs::{HostFile, HostFileReader, HostFs};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    collections::BTreeMap,
    future::poll_fn,
    io,
    path::{Path, PathBuf},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

/// What goes wrong, and at which call, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// That call fails; a write has then written half.
    Fail(usize, io::ErrorKind),
    /// From that call on nothing happens any more.
    Crash(usize),
}

#[derive(Debug)]
pub(super) struct State {
    files: Vec<Content>,
    names: BTreeMap<PathBuf, usize>,
    durable_names: BTreeMap<PathBuf, usize>,
    /// Name changes since the last `sync_dir`.
    pending_names: Vec<NameChange>,
    fault: Fault,
    pub(super) calls: Vec<&'static str>,
    pub(super) longest_read: usize,
    /// How long each write was.
    pub(super) writes: Vec<usize>,
    /// Pretends that files are of this size.
    pub(super) claimed_size: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
}

#[derive(Clone, Debug)]
enum NameChange {
    Add(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
}

/// How much of what was not durable a crash leaves of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kept {
    Durable,
    All,
    Half,
    Zeros,
}

#[derive(Clone, Debug)]
pub(super) struct MemoryFs(Arc<Mutex<State>>);

impl MemoryFs {
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(State {
            files: Vec::new(),
            names: BTreeMap::new(),
            durable_names: BTreeMap::new(),
            pending_names: Vec::new(),
            fault: Fault::None,
            calls: Vec::new(),
            longest_read: 0,
            writes: Vec::new(),
            claimed_size: None,
        })))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn shared(&self) -> Arc<dyn HostFs> {
        Arc::new(self.clone())
    }

    /// Sets the next fault; calls are counted from now on.
    pub(super) fn set_fault(&self, fault: Fault) {
        let mut state = self.state();
        state.fault = fault;
        state.calls.clear();
    }

    pub(super) fn put(&self, path: &Path, bytes: &[u8]) {
        let mut state = self.state();
        let content = Content { now: bytes.to_vec(), durable: bytes.to_vec() };
        state.files.push(content);
        let file = state.files.len() - 1;
        state.names.insert(path.to_owned(), file);
        state.durable_names.insert(path.to_owned(), file);
    }

    pub(super) fn get(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.state();
        state.names.get(path).map(|file| state.files[*file].now.clone())
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.state().names.keys().cloned().collect()
    }

    /// Gives the number of ways in which name changes can be half durable.
    pub(super) fn pending(&self) -> usize {
        self.state().pending_names.len()
    }

    /// Gives the disk as a crash leaves it, with the first `changes` of the pending name changes made.
    pub(super) fn after_crash(&self, changes: usize, kept: Kept) -> Self {
        let state = self.state();
        let mut names = state.durable_names.clone();
        state.pending_names[..changes].iter().for_each(|change| change.apply(&mut names));
        let after = Self::new();
        for (path, file) in names {
            let content = &state.files[file];
            let mut bytes = content.now.clone();
            match kept {
                Kept::Durable => bytes.clone_from(&content.durable),
                Kept::All => {}
                Kept::Half => bytes.truncate(content.durable.len().midpoint(bytes.len())),
                Kept::Zeros => bytes[content.durable.len()..].fill(0),
            }
            after.put(&path, &bytes);
        }
        after
    }

    /// Counts a call, and says whether it fails.
    async fn enter(&self, call: &'static str) -> io::Result<()> {
        yield_now().await;
        let mut state = self.state();
        let index = state.calls.len();
        state.calls.push(call);
        match state.fault {
            Fault::Fail(at, kind) if at == index => Err(kind.into()),
            Fault::Crash(at) if at <= index => Err(io::ErrorKind::Other.into()),
            _ => Ok(()),
        }
    }
}

impl State {
    fn change(&mut self, change: NameChange) {
        change.apply(&mut self.names);
        self.pending_names.push(change);
    }

    fn crashed(&self) -> bool {
        matches!(self.fault, Fault::Crash(at) if at < self.calls.len())
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        self.names.get(path).copied().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Add(path, file) => {
                names.insert(path.clone(), *file);
            }
            Self::Rename(from, to) => {
                let file = names.remove(from).unwrap();
                names.insert(to.clone(), file);
            }
            Self::Remove(path) => {
                names.remove(path);
            }
        }
    }
}

#[async_trait]
impl HostFs for MemoryFs {
    async fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        self.enter("create_dir_all").await
    }

    async fn create_new(&self, path: &Path) -> io::Result<Box<dyn HostFile>> {
        self.enter("create_new").await?;
        let file = {
            let mut state = self.state();
            if state.names.contains_key(path) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            state.files.push(Content::default());
            let file = state.files.len() - 1;
            state.change(NameChange::Add(path.to_owned(), file));
            file
        };
        yield_now().await;
        Ok(Box::new(MemoryFile { fs: self.clone(), file }))
    }

    async fn open(&self, path: &Path) -> io::Result<Box<dyn HostFileReader>> {
        self.enter("open").await?;
        let file = self.state().find(path)?;
        Ok(Box::new(MemoryFile { fs: self.clone(), file }))
    }

    async fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.enter("rename").await?;
        {
            let mut state = self.state();
            state.find(from)?;
            state.change(NameChange::Rename(from.to_owned(), to.to_owned()));
        }
        yield_now().await;
        Ok(())
    }

    async fn remove(&self, path: &Path) -> io::Result<()> {
        self.enter("remove").await?;
        let mut state = self.state();
        state.find(path)?;
        state.change(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn remove_now(&self, path: &Path) {
        let mut state = self.state();
        if !state.crashed() && state.find(path).is_ok() {
            state.change(NameChange::Remove(path.to_owned()));
        }
    }

    async fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.enter("sync_dir").await?;
        // Nothing has the empty path, not even the current directory.
        if path.as_os_str().is_empty() {
            return Err(io::ErrorKind::NotFound.into());
        }
        {
            let mut state = self.state();
            state.durable_names = state.names.clone();
            state.pending_names.clear();
        }
        yield_now().await;
        Ok(())
    }

    async fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        self.enter("list").await?;
        Ok(self.paths().into_iter().filter(|file| file.parent() == Some(path)).collect())
    }
}

#[derive(Debug)]
struct MemoryFile {
    fs: MemoryFs,
    file: usize,
}

#[async_trait]
impl HostFile for MemoryFile {
    async fn write_all(&mut self, bytes: Bytes) -> io::Result<()> {
        let entered = self.fs.enter("write").await;
        let half = bytes.len() / 2;
        let first = &bytes[..half];
        {
            let mut state = self.fs.state();
            state.writes.push(bytes.len());
            if entered.is_ok() || !state.crashed() {
                state.files[self.file].now.extend_from_slice(first);
            }
        }
        entered?;
        yield_now().await;
        self.fs.state().files[self.file].now.extend_from_slice(&bytes[half..]);
        Ok(())
    }

    async fn sync(&mut self) -> io::Result<()> {
        self.fs.enter("sync").await?;
        {
            let mut state = self.fs.state();
            let content = &mut state.files[self.file];
            content.durable.clone_from(&content.now);
        }
        yield_now().await;
        Ok(())
    }
}

#[async_trait]
impl HostFileReader for MemoryFile {
    async fn size(&self) -> io::Result<u64> {
        self.fs.enter("size").await?;
        let state = self.fs.state();
        Ok(state.claimed_size.unwrap_or(state.files[self.file].now.len() as u64))
    }

    async fn read_at(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        self.fs.enter("read_at").await?;
        let mut state = self.fs.state();
        state.longest_read = state.longest_read.max(length);
        let content = &state.files[self.file].now;
        if state.claimed_size.is_some() && length < 1 << 20 {
            // A sparse file: zeros after its content.
            let at = |index| usize::try_from(offset + index).ok().and_then(|at| content.get(at));
            return Ok((0..length as u64).map(|index| at(index).copied().unwrap_or(0)).collect());
        }
        let start = usize::try_from(offset).unwrap();
        let range = start..start.checked_add(length).unwrap();
        content.get(range).map(Bytes::copy_from_slice).ok_or(io::ErrorKind::UnexpectedEof.into())
    }
}

async fn yield_now() {
    let mut yielded = false;
    poll_fn(
        |_| if std::mem::replace(&mut yielded, true) { Poll::Ready(()) } else { Poll::Pending },
    )
    .await;
}

/// Polls a future until it is done.
pub(super) fn run<T>(future: impl Future<Output = T>) -> T {
    run_at_most(usize::MAX, future).unwrap()
}

/// Polls a future so many times, and drops it if it is not done then.
pub(super) fn run_at_most<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..polls {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
    }
    None
}
