//! The simulated host's disk: what programs see, and what a crash leaves of it.
//!
//! A file's content is durable up to its last sync. A change of names is durable once the directories it touches
//! are synced. What was not made durable may still have reached the disk, in part: a crash keeps a drawn part of it.
//! Directories themselves are durable as soon as they are made.

use bytes::{Bytes, BytesMut};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
};

/// Draws a number below its argument; 0 where that is 0.
pub(super) type Draw<'a> = &'a mut dyn FnMut(u64) -> u64;

const SECTOR: u64 = 512;

#[derive(Debug, Default)]
pub(super) struct Disk {
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    dirs: BTreeSet<PathBuf>,
    /// What programs see.
    names: BTreeMap<PathBuf, u64>,
    /// What a crash leaves, but for what is in the journal.
    durable: BTreeMap<PathBuf, u64>,
    /// Changes of names that are not durable, in order.
    journal: Vec<NameChange>,
}

#[derive(Debug, Default)]
struct Inode {
    content: Content,
    /// How many bytes a crash leaves.
    synced: u64,
    /// The disk said that a sync was done when it was not.
    sync_lost: bool,
    open: u32,
    /// It was begun and has not been given another name.
    temporary: bool,
}

#[derive(Clone, Debug)]
enum NameChange {
    Link { path: PathBuf, inode: u64 },
    Unlink { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf, inode: u64 },
}

impl Disk {
    pub(super) fn create_dir_all(&mut self, path: &Path) -> io::Result<()> {
        for part in path.ancestors().filter(|part| !part.as_os_str().is_empty()) {
            if self.names.contains_key(part) {
                return Err(io::ErrorKind::NotADirectory.into());
            }
        }
        self.dirs.extend(path.ancestors().map(Path::to_path_buf));
        Ok(())
    }

    pub(super) fn create(&mut self, path: &Path) -> io::Result<u64> {
        self.check_parent(path)?;
        if self.names.contains_key(path) || self.dirs.contains(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = self.next_inode;
        self.next_inode += 1;
        self.inodes.insert(inode, Inode { open: 1, temporary: true, ..Inode::default() });
        self.names.insert(path.to_path_buf(), inode);
        self.journal.push(NameChange::Link { path: path.to_path_buf(), inode });
        Ok(inode)
    }

    pub(super) fn open(&mut self, path: &Path) -> io::Result<u64> {
        let number = self.find(path)?;
        self.inode_mut(number)?.open += 1;
        Ok(number)
    }

    /// Opens a file that is appended to, and makes it where it is not there.
    pub(super) fn open_or_create(&mut self, path: &Path) -> io::Result<u64> {
        if self.names.contains_key(path) {
            return self.open(path);
        }
        let number = self.create(path)?;
        self.inode_mut(number)?.temporary = false;
        Ok(number)
    }

    pub(super) fn close(&mut self, number: u64) {
        if let Some(inode) = self.inodes.get_mut(&number) {
            inode.open = inode.open.saturating_sub(1);
            self.collect(number);
        }
    }

    /// Appends; where the disk fills up, what fits is written.
    pub(super) fn append(&mut self, number: u64, bytes: &Bytes, capacity: u64) -> io::Result<()> {
        let free = capacity.saturating_sub(self.used());
        let fits = usize::try_from(free).unwrap_or(usize::MAX).min(bytes.len());
        let full = fits < bytes.len();
        self.inode_mut(number)?.content.push(bytes.slice(..fits));
        if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    pub(super) fn sync(&mut self, number: u64) -> io::Result<()> {
        let inode = self.inode_mut(number)?;
        inode.synced = inode.content.len();
        inode.sync_lost = false;
        Ok(())
    }

    /// Says that a sync was done, and does none.
    pub(super) fn lose_sync(&mut self, number: u64) -> io::Result<()> {
        self.inode_mut(number)?.sync_lost = true;
        Ok(())
    }

    pub(super) fn len(&self, number: u64) -> io::Result<u64> {
        Ok(self.inode(number)?.content.len())
    }

    pub(super) fn read(&self, number: u64, offset: u64, length: usize) -> io::Result<Bytes> {
        let content = &self.inode(number)?.content;
        content.read(offset, length).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.check_parent(to)?;
        let inode = self.find(from)?;
        if self.dirs.contains(to) {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if from == to {
            return Ok(());
        }
        let (from, to) = (from.to_path_buf(), to.to_path_buf());
        self.names.remove(&from);
        let replaced = self.names.insert(to.clone(), inode);
        self.journal.push(NameChange::Rename { from, to, inode });
        self.inode_mut(inode)?.temporary = false;
        if let Some(replaced) = replaced {
            self.collect(replaced);
        }
        Ok(())
    }

    pub(super) fn remove(&mut self, path: &Path) -> io::Result<()> {
        let inode = self.find(path)?;
        self.names.remove(path);
        self.journal.push(NameChange::Unlink { path: path.to_path_buf() });
        self.collect(inode);
        Ok(())
    }

    pub(super) fn sync_dir(&mut self, dir: &Path) -> io::Result<()> {
        if !self.is_dir(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        // A change that is made durable takes with it the earlier ones of the same names.
        let mut paths = BTreeSet::new();
        let mut keep = Vec::new();
        let mut commit = Vec::new();
        for change in std::mem::take(&mut self.journal).into_iter().rev() {
            let touches =
                change.paths().any(|path| path.parent() == Some(dir) || paths.contains(path));
            if touches {
                paths.extend(change.paths().map(Path::to_path_buf));
                commit.push(change);
            } else {
                keep.push(change);
            }
        }
        keep.reverse();
        self.journal = keep;
        for change in commit.iter().rev() {
            change.apply(&mut self.durable);
        }
        self.collect_all();
        Ok(())
    }

    pub(super) fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        if !self.is_dir(dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(self.names.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    /// Leaves what was durable, and a drawn part of what was not. Files that are open are lost to their holders.
    pub(super) fn crash(&mut self, draw: Draw<'_>) {
        let reached = draw(self.journal.len() as u64 + 1);
        let journal = std::mem::take(&mut self.journal);
        for change in journal.iter().take(usize::try_from(reached).unwrap_or(0)) {
            change.apply(&mut self.durable);
        }
        self.names = self.durable.clone();
        for inode in self.inodes.values_mut() {
            inode.crash(draw);
        }
        self.collect_all();
    }

    /// Changes one bit of a file's content for good; `random` draws which.
    pub(super) fn flip_bit(&mut self, number: u64, draw: Draw<'_>) -> io::Result<Option<u64>> {
        let inode = self.inode_mut(number)?;
        let bits = inode.content.len() * 8;
        if bits == 0 {
            return Ok(None);
        }
        let bit = draw(bits);
        inode.content.flip(bit / 8, 1 << (bit % 8));
        Ok(Some(bit))
    }

    /// Counts the bytes that files take.
    pub(super) fn used(&self) -> u64 {
        let named: BTreeSet<_> = self.names.values().collect();
        let taken =
            self.inodes.iter().filter(|(number, inode)| inode.open > 0 || named.contains(number));
        taken.map(|(_, inode)| inode.content.len()).sum()
    }

    /// Counts files that were begun and not given another name.
    pub(super) fn temporary_files(&self) -> u64 {
        let temporary = |number| self.inodes.get(number).is_some_and(|inode| inode.temporary);
        self.names.values().filter(|number| temporary(number)).count() as u64
    }

    /// Lists all files.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.names.keys().cloned().collect()
    }

    /// Says whether a directory is there.
    pub(super) fn has_dir(&self, path: &Path) -> bool {
        self.is_dir(path)
    }

    pub(super) fn has_file(&self, path: &Path) -> bool {
        self.names.contains_key(path)
    }

    /// Takes the directories and files below a directory off the disk, in order, each by its path in it.
    pub(super) fn take_tree(&mut self, dir: &Path) -> Vec<(PathBuf, Option<Bytes>)> {
        let below = |path: &Path| Some(path.strip_prefix(dir).ok()?.to_path_buf());
        let dirs = self.dirs.iter().filter_map(|path| Some((below(path)?, None)));
        let mut tree: Vec<_> = dirs.filter(|(path, _)| !path.as_os_str().is_empty()).collect();
        let files: Vec<PathBuf> =
            self.names.keys().filter(|path| path.starts_with(dir)).cloned().collect();
        for path in files {
            if let (Some(name), Ok(number)) = (below(&path), self.find(&path)) {
                let length = self.len(number).unwrap_or(0);
                let content = self.read(number, 0, index(length)).unwrap_or_default();
                tree.push((name, Some(content)));
                let _ = self.remove(&path);
            }
        }
        self.dirs.retain(|path| path == dir || !path.starts_with(dir));
        tree
    }

    fn check_parent(&self, path: &Path) -> io::Result<()> {
        match path.parent() {
            Some(parent) if self.is_dir(parent) && path.file_name().is_some() => Ok(()),
            Some(_) => Err(io::ErrorKind::NotFound.into()),
            None => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn is_dir(&self, path: &Path) -> bool {
        path.as_os_str().is_empty() || path == Path::new("/") || self.dirs.contains(path)
    }

    fn find(&self, path: &Path) -> io::Result<u64> {
        let missing = || {
            let dir = self.dirs.contains(path);
            if dir { io::ErrorKind::IsADirectory } else { io::ErrorKind::NotFound }
        };
        self.names.get(path).copied().ok_or_else(|| missing().into())
    }

    fn inode(&self, number: u64) -> io::Result<&Inode> {
        self.inodes.get(&number).ok_or_else(|| io::Error::other("the host was lost"))
    }

    fn inode_mut(&mut self, number: u64) -> io::Result<&mut Inode> {
        self.inodes.get_mut(&number).ok_or_else(|| io::Error::other("the host was lost"))
    }

    /// Forgets a file that nothing refers to.
    fn collect(&mut self, number: u64) {
        let refers = |inode: &u64| *inode == number;
        let kept = self.inodes.get(&number).is_some_and(|inode| inode.open > 0)
            || self.names.values().any(refers)
            || self.durable.values().any(refers)
            || self.journal.iter().any(|change| change.inode().as_ref().is_some_and(refers));
        if !kept {
            self.inodes.remove(&number);
        }
    }

    fn collect_all(&mut self) {
        let numbers: Vec<_> = self.inodes.keys().copied().collect();
        for number in numbers {
            self.collect(number);
        }
    }
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Link { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            Self::Unlink { path } => {
                names.remove(path);
            }
            Self::Rename { from, to, inode } => {
                names.remove(from);
                names.insert(to.clone(), *inode);
            }
        }
    }

    fn paths(&self) -> impl Iterator<Item = &Path> {
        let (first, second) = match self {
            Self::Link { path, .. } | Self::Unlink { path } => (path, None),
            Self::Rename { from, to, .. } => (from, Some(to)),
        };
        std::iter::once(first).chain(second).map(PathBuf::as_path)
    }

    fn inode(&self) -> Option<u64> {
        match self {
            Self::Link { inode, .. } | Self::Rename { inode, .. } => Some(*inode),
            Self::Unlink { .. } => None,
        }
    }
}

impl Inode {
    fn crash(&mut self, draw: Draw<'_>) {
        let unsynced = self.content.len() - self.synced;
        // A sync that the disk lost shows: not everything is there.
        let kept = draw(unsynced + u64::from(!self.sync_lost));
        self.content.truncate(self.synced + kept);
        match draw(3) {
            // The size reached the disk, the data did not.
            0 => self.content.push(Bytes::from(vec![0; index(unsynced - kept)])),
            // One sector did not.
            1 if kept > 0 => {
                let from = self.synced + draw(kept);
                let to = (from + SECTOR).min(self.content.len());
                self.content.zero(from, to);
            }
            _ => {}
        }
        self.synced = self.content.len();
        self.sync_lost = false;
        self.open = 0;
        self.temporary = false;
    }
}

/// The bytes of a file, in the pieces in which they were written.
#[derive(Debug, Default)]
struct Content {
    /// Each with the offset of its end; none is empty.
    pieces: Vec<(u64, Bytes)>,
}

impl Content {
    fn len(&self) -> u64 {
        self.pieces.last().map_or(0, |(end, _)| *end)
    }

    fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.pieces.push((self.len() + bytes.len() as u64, bytes));
        }
    }

    fn read(&self, offset: u64, length: usize) -> Option<Bytes> {
        let end = offset.checked_add(length as u64).filter(|end| *end <= self.len())?;
        if length == 0 {
            return Some(Bytes::new());
        }
        let mut at = self.pieces.partition_point(|(piece_end, _)| *piece_end <= offset);
        let mut joined = BytesMut::new();
        let mut position = offset;
        loop {
            let (piece_end, bytes) = &self.pieces[at];
            let start = piece_end - bytes.len() as u64;
            let part = bytes.slice(index(position - start)..index(end.min(*piece_end) - start));
            if part.len() == length {
                return Some(part);
            }
            position += part.len() as u64;
            joined.extend_from_slice(&part);
            if position == end {
                return Some(joined.freeze());
            }
            at += 1;
        }
    }

    fn truncate(&mut self, length: u64) {
        while let Some((end, bytes)) = self.pieces.pop() {
            let start = end - bytes.len() as u64;
            if start < length {
                self.push(bytes.slice(..index(length.min(end) - start)));
                return;
            }
        }
    }

    fn flip(&mut self, offset: u64, mask: u8) {
        self.change(offset, offset + 1, |byte| byte ^ mask);
    }

    fn zero(&mut self, from: u64, to: u64) {
        self.change(from, to, |_| 0);
    }

    fn change(&mut self, from: u64, to: u64, with: impl Fn(u8) -> u8) {
        for (end, bytes) in &mut self.pieces {
            let start = *end - bytes.len() as u64;
            let (first, last) = (from.max(start), to.min(*end));
            if first < last {
                let mut copy = bytes.to_vec();
                for byte in &mut copy[index(first - start)..index(last - start)] {
                    *byte = with(*byte);
                }
                *bytes = copy.into();
            }
        }
    }
}

/// Turns an offset within a piece into an index.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{scale, stream};
    use proptest::prelude::*;
    use rand_chacha::rand_core::Rng;

    #[derive(Clone, Debug)]
    enum Op {
        Create(u8),
        Append(u8, Vec<u8>),
        Sync(u8),
        Rename(u8, u8),
        Remove(u8),
        SyncDir,
        Crash(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        let file = 0..4_u8;
        prop_oneof![
            3 => file.clone().prop_map(Op::Create),
            4 => (file.clone(), prop::collection::vec(1..=255_u8, 1..700)).prop_map(|(f, b)| Op::Append(f, b)),
            3 => file.clone().prop_map(Op::Sync),
            2 => (file.clone(), file.clone()).prop_map(|(a, b)| Op::Rename(a, b)),
            1 => file.prop_map(Op::Remove),
            2 => Just(Op::SyncDir),
            1 => any::<u64>().prop_map(Op::Crash),
        ]
    }

    fn path(file: u8) -> PathBuf {
        PathBuf::from(format!("/d/{file}"))
    }

    /// What was written to a file, and how much of it was synced.
    #[derive(Clone, Debug, Default)]
    struct Written {
        bytes: Vec<u8>,
        synced: usize,
    }

    fn check_after_crash(
        disk: &mut Disk,
        model: &BTreeMap<u8, (u64, Written)>,
        settled: &BTreeMap<u8, u64>,
        files: &BTreeMap<u64, Written>,
    ) -> Result<(), TestCaseError> {
        // A name that was durable and not changed since is there, and is what it was.
        for (name, inode) in settled {
            prop_assert_eq!(disk.find(&path(*name)).ok(), Some(*inode), "name {}", name);
        }
        for name in 0..4 {
            let Ok(inode) = disk.find(&path(name)) else { continue };
            let written =
                model.values().find(|(known, _)| *known == inode).map(|(_, written)| written);
            let written = written.or_else(|| files.get(&inode)).expect("a file that was made");
            let length = disk.len(inode).unwrap();
            prop_assert!(length >= written.synced as u64 && length <= written.bytes.len() as u64);
            let bytes = disk.read(inode, 0, usize::try_from(length).unwrap()).unwrap();
            prop_assert_eq!(&bytes[..written.synced], &written.bytes[..written.synced]);
            for (at, byte) in bytes.iter().enumerate() {
                prop_assert!(*byte == written.bytes[at] || *byte == 0, "torn only to zeros");
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn a_crash_loses_nothing_synced(ops in prop::collection::vec(op(), 1..60)) {
            let mut disk = Disk::default();
            disk.create_dir_all(Path::new("/d")).unwrap();
            // All files ever made since the last crash, the names as seen, and those durable and unchanged.
            let mut files: BTreeMap<u64, Written> = BTreeMap::new();
            let mut names: BTreeMap<u8, u64> = BTreeMap::new();
            let mut settled: BTreeMap<u8, u64> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Create(file) => match disk.create(&path(file)) {
                        Ok(inode) => {
                            prop_assert!(names.insert(file, inode).is_none());
                            settled.remove(&file);
                            files.insert(inode, Written::default());
                        }
                        Err(_) => prop_assert!(names.contains_key(&file)),
                    },
                    Op::Append(file, bytes) => if let Some(inode) = names.get(&file) {
                        disk.append(*inode, &bytes.clone().into(), u64::MAX).unwrap();
                        files.get_mut(inode).unwrap().bytes.extend(bytes);
                    },
                    Op::Sync(file) => if let Some(inode) = names.get(&file) {
                        disk.sync(*inode).unwrap();
                        let written = files.get_mut(inode).unwrap();
                        written.synced = written.bytes.len();
                    },
                    Op::Rename(from, to) => if let Some(inode) = names.get(&from).copied() {
                        disk.rename(&path(from), &path(to)).unwrap();
                        if from != to {
                            names.remove(&from);
                            names.insert(to, inode);
                            settled.remove(&from);
                            settled.remove(&to);
                        }
                    },
                    Op::Remove(file) => {
                        prop_assert_eq!(disk.remove(&path(file)).is_ok(), names.remove(&file).is_some());
                        settled.remove(&file);
                    }
                    Op::SyncDir => {
                        disk.sync_dir(Path::new("/d")).unwrap();
                        settled = names.clone();
                    }
                    Op::Crash(seed) => {
                        let mut rng = stream(seed, 0);
                        disk.crash(&mut |bound| scale(rng.next_u64(), bound));
                        check_after_crash(&mut disk, &BTreeMap::new(), &settled, &files)?;
                        // Begin again from what is there.
                        names.clear();
                        for name in 0..4 {
                            if let Ok(inode) = disk.find(&path(name)) {
                                names.insert(name, inode);
                                let length = usize::try_from(disk.len(inode).unwrap()).unwrap();
                                let bytes = disk.read(inode, 0, length).unwrap().to_vec();
                                files.insert(inode, Written { synced: length, bytes });
                            }
                        }
                        settled = names.clone();
                    }
                }
            }
        }

        #[test]
        fn reads_give_what_was_written(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..50), 0..10),
            from in 0_usize..200, length in 0_usize..200, cut in 0_u64..300,
        ) {
            let mut content = Content::default();
            let mut all: Vec<u8> = Vec::new();
            for piece in pieces {
                content.push(piece.clone().into());
                all.extend(piece);
            }
            let cut = cut.min(all.len() as u64);
            content.truncate(cut);
            all.truncate(usize::try_from(cut).unwrap());
            prop_assert_eq!(content.len(), all.len() as u64);
            let expected = all.get(from..from + length).map(<[u8]>::to_vec);
            prop_assert_eq!(content.read(from as u64, length).map(|bytes| bytes.to_vec()), expected);
        }
    }

    #[test]
    fn a_full_disk_takes_what_fits() {
        let mut disk = Disk::default();
        let file = disk.create(Path::new("/f")).unwrap();
        let full = disk.append(file, &Bytes::from_static(b"abcdef"), 4).unwrap_err();
        assert_eq!((full.kind(), disk.used()), (io::ErrorKind::StorageFull, 4));
        disk.remove(Path::new("/f")).unwrap();
        disk.close(file);
        assert_eq!(disk.used(), 0);
    }

    #[test]
    fn a_lost_sync_loses_something() {
        for seed in 0..50 {
            let mut disk = Disk::default();
            let file = disk.create(Path::new("/f")).unwrap();
            disk.sync_dir(Path::new("/")).unwrap();
            disk.append(file, &Bytes::from_static(b"abcdef"), 10).unwrap();
            disk.lose_sync(file).unwrap();
            let mut rng = stream(seed, 0);
            disk.crash(&mut |bound| scale(rng.next_u64(), bound));
            let left =
                disk.read(file, 0, usize::try_from(disk.len(file).unwrap()).unwrap()).unwrap();
            assert_ne!(&left[..], b"abcdef", "seed {seed}");
        }
    }
}
