//! A file tree in memory, with the errors of Linux.

use bytes::Bytes;
use std::{collections::BTreeMap, time::Duration};
use vm_trait::{
    CreateDirOptions, DirEntry, FileKind, FileStat, GuestFileError, RemoveOptions, WriteOptions,
    config::is_normal_absolute,
};

/// The longest name that a file can have, in bytes.
const MAX_NAME: usize = 255;
/// Linux's error numbers for what has no kind of its own.
const ENXIO: i32 = 6;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
const ENAMETOOLONG: i32 = 36;

/// What stands at a path.
#[derive(Clone, Debug)]
enum Node {
    File(Bytes),
    Directory,
    /// The name of a device that there is no driver for.
    Device,
}

#[derive(Clone, Debug)]
struct Entry {
    node: Node,
    mode: u32,
    modified: Duration,
}

/// A file tree: entries by absolute path, the root as the empty one.
#[derive(Clone, Debug)]
pub(crate) struct Tree {
    entries: BTreeMap<String, Entry>,
    capacity: u64,
}

type FileResult<T> = Result<T, GuestFileError>;

impl Tree {
    /// Makes a tree of a root, `/tmp` and the names of two devices, whose files have at most `capacity` bytes in all.
    pub(crate) fn new(capacity: u64, now: Duration) -> Self {
        let entry = |path: &str, node, mode| (path.to_owned(), Entry { node, mode, modified: now });
        let entries = [
            entry("", Node::Directory, 0o755),
            entry("/tmp", Node::Directory, 0o1777),
            entry("/dev", Node::Directory, 0o755),
            entry("/dev/null", Node::Device, 0o666),
            entry("/dev/zero", Node::Device, 0o666),
        ];
        Self { entries: entries.into(), capacity }
    }

    pub(crate) fn read(&self, path: &str) -> FileResult<Bytes> {
        match &self.get(key(path)?)?.node {
            Node::File(bytes) => Ok(bytes.clone()),
            Node::Directory => Err(GuestFileError::IsADirectory),
            Node::Device => Err(GuestFileError::Io { errno: ENXIO }),
        }
    }

    pub(crate) fn write(
        &mut self,
        path: &str,
        contents: Bytes,
        options: &WriteOptions,
        now: Duration,
    ) -> FileResult<()> {
        let key = key(path)?;
        self.parent_of(key)?;
        let old = self.entries.get(key);
        let (old_size, old_mode) = match old.map(|entry| (&entry.node, entry.mode)) {
            Some((Node::Directory, _)) => return Err(GuestFileError::IsADirectory),
            Some((Node::Device, _)) => return Err(GuestFileError::Io { errno: ENXIO }),
            Some((Node::File(bytes), mode)) => (bytes.len() as u64, mode),
            None => (0, 0o644),
        };
        if self.used() - old_size + contents.len() as u64 > self.capacity {
            return Err(GuestFileError::OutOfSpace);
        }
        let mode = options.mode.map_or(old_mode, |mode| mode & 0o7777);
        let entry = Entry { node: Node::File(contents), mode, modified: now };
        self.entries.insert(key.to_owned(), entry);
        Ok(())
    }

    pub(crate) fn stat(&self, path: &str) -> FileResult<FileStat> {
        let entry = self.get(key(path)?)?;
        let (kind, size) = match &entry.node {
            Node::File(bytes) => (FileKind::File, bytes.len() as u64),
            Node::Directory => (FileKind::Directory, 0),
            Node::Device => (FileKind::Other, 0),
        };
        Ok(FileStat::new(kind, size, entry.mode).with_modified(entry.modified))
    }

    pub(crate) fn list(&self, path: &str) -> FileResult<Vec<DirEntry>> {
        let key = key(path)?;
        if !matches!(self.get(key)?.node, Node::Directory) {
            return Err(GuestFileError::NotADirectory);
        }
        let mut found: Vec<_> = self
            .below(key)
            .filter_map(|(path, entry)| {
                let name = &path[key.len() + 1..];
                let kind = match entry.node {
                    Node::File(_) => FileKind::File,
                    Node::Directory => FileKind::Directory,
                    Node::Device => FileKind::Other,
                };
                (!name.contains('/')).then(|| DirEntry::new(name, kind))
            })
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    pub(crate) fn create_dir(
        &mut self,
        path: &str,
        options: &CreateDirOptions,
        now: Duration,
    ) -> FileResult<()> {
        let key = key(path)?;
        if options.recursive {
            for (end, _) in key.match_indices('/').skip(1) {
                let parent = &key[..end];
                self.make_missing_dir(parent, 0o755, now)?;
            }
            let mode = options.mode.unwrap_or(0o755) & 0o7777;
            return self.make_missing_dir(key, mode, now).map_err(|error| match error {
                GuestFileError::NotADirectory => GuestFileError::AlreadyExists,
                other => other,
            });
        }
        if key.is_empty() {
            return Err(GuestFileError::AlreadyExists);
        }
        self.parent_of(key)?;
        if self.entries.contains_key(key) {
            return Err(GuestFileError::AlreadyExists);
        }
        self.make_missing_dir(key, options.mode.unwrap_or(0o755) & 0o7777, now)
    }

    pub(crate) fn remove(&mut self, path: &str, options: &RemoveOptions) -> FileResult<()> {
        let key = key(path)?;
        self.get(key)?;
        if key.is_empty() {
            return Err(GuestFileError::Io { errno: EBUSY });
        }
        if !options.recursive && self.below(key).next().is_some() {
            return Err(GuestFileError::DirectoryNotEmpty);
        }
        self.take(key);
        Ok(())
    }

    pub(crate) fn rename(&mut self, from: &str, to: &str) -> FileResult<()> {
        let (from, to) = (key(from)?, key(to)?);
        let moved = self.get(from)?.node.clone();
        if from.is_empty() || to.is_empty() {
            return Err(GuestFileError::Io { errno: EBUSY });
        }
        if from == to {
            return Ok(());
        }
        self.parent_of(to)?;
        if to.strip_prefix(from).is_some_and(|rest| rest.starts_with('/')) {
            return Err(GuestFileError::Io { errno: EINVAL });
        }
        match (moved, self.entries.get(to).map(|entry| &entry.node)) {
            (_, None) => {}
            (Node::Directory, Some(Node::Directory)) => {
                if self.below(to).next().is_some() {
                    return Err(GuestFileError::DirectoryNotEmpty);
                }
            }
            (_, Some(Node::Directory)) => return Err(GuestFileError::IsADirectory),
            (Node::Directory, Some(_)) => return Err(GuestFileError::NotADirectory),
            (_, Some(_)) => {}
        }
        for (path, entry) in self.take(from) {
            self.entries.insert(format!("{to}{}", &path[from.len()..]), entry);
        }
        Ok(())
    }

    /// Counts the bytes of all files.
    pub(crate) fn used(&self) -> u64 {
        let sizes = self.entries.values().map(|entry| match &entry.node {
            Node::File(bytes) => bytes.len() as u64,
            Node::Directory | Node::Device => 0,
        });
        sizes.sum()
    }

    fn get(&self, key: &str) -> FileResult<&Entry> {
        if !key.is_empty() {
            self.parent_of(key)?;
        }
        self.entries.get(key).ok_or(GuestFileError::NotFound)
    }

    /// Checks that everything above `key` is a directory, from the root down.
    fn parent_of(&self, key: &str) -> FileResult<()> {
        for (end, _) in key.match_indices('/') {
            match self.entries.get(&key[..end]).map(|entry| &entry.node) {
                Some(Node::Directory) => {}
                Some(_) => return Err(GuestFileError::NotADirectory),
                None => return Err(GuestFileError::NotFound),
            }
        }
        if key.is_empty() { Err(GuestFileError::IsADirectory) } else { Ok(()) }
    }

    fn make_missing_dir(&mut self, key: &str, mode: u32, now: Duration) -> FileResult<()> {
        match self.entries.get(key).map(|entry| &entry.node) {
            Some(Node::Directory) => Ok(()),
            Some(_) => Err(GuestFileError::NotADirectory),
            None => {
                let entry = Entry { node: Node::Directory, mode, modified: now };
                self.entries.insert(key.to_owned(), entry);
                Ok(())
            }
        }
    }

    fn below(&self, key: &str) -> impl Iterator<Item = (&String, &Entry)> {
        let from = format!("{key}/");
        let until = format!("{key}0");
        // `0` is the character after `/`.
        self.entries.range(from..until)
    }

    /// Takes `key` and everything below it out.
    fn take(&mut self, key: &str) -> Vec<(String, Entry)> {
        let mut paths: Vec<_> = self.below(key).map(|(path, _)| path.clone()).collect();
        paths.push(key.to_owned());
        paths.into_iter().filter_map(|path| self.entries.remove_entry(&path)).collect()
    }
}

/// Turns a path into a key: itself, but for the root, which is empty.
fn key(path: &str) -> FileResult<&str> {
    if !is_normal_absolute(path) {
        return Err(GuestFileError::InvalidPath);
    }
    if path.split('/').any(|name| name.len() > MAX_NAME) {
        return Err(GuestFileError::Io { errno: ENAMETOOLONG });
    }
    Ok(path.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path() -> impl Strategy<Value = String> {
        proptest::collection::vec("[ab]", 1..4).prop_map(|names| format!("/{}", names.join("/")))
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(String, usize),
        CreateDir(String, bool),
        Remove(String, bool),
        Rename(String, String),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (path(), 0_usize..9).prop_map(|(path, size)| Step::Write(path, size)),
            (path(), any::<bool>()).prop_map(|(path, all)| Step::CreateDir(path, all)),
            (path(), any::<bool>()).prop_map(|(path, all)| Step::Remove(path, all)),
            (path(), path()).prop_map(|(from, to)| Step::Rename(from, to)),
        ]
    }

    proptest! {
        #[test]
        fn every_entry_stands_in_a_directory_and_the_capacity_holds(
            steps in proptest::collection::vec(step(), 0..40)
        ) {
            let mut tree = Tree::new(16, Duration::ZERO);
            for step in steps {
                let _ = match step {
                    Step::Write(path, size) => {
                        let before = tree.read(&path).ok();
                        let bytes = Bytes::from(vec![7; size]);
                        let result = tree.write(&path, bytes.clone(), &WriteOptions::default(), Duration::ZERO);
                        let expected = if result.is_ok() { Some(bytes) } else { before };
                        prop_assert_eq!(tree.read(&path).ok(), expected);
                        result
                    }
                    Step::CreateDir(path, recursive) => {
                        let options = CreateDirOptions { recursive, mode: None };
                        tree.create_dir(&path, &options, Duration::ZERO)
                    }
                    Step::Remove(path, recursive) => tree.remove(&path, &RemoveOptions { recursive }),
                    Step::Rename(from, to) => tree.rename(&from, &to),
                };
                prop_assert!(tree.used() <= 16);
                for key in tree.entries.keys().filter(|key| !key.is_empty()) {
                    prop_assert_eq!(tree.parent_of(key), Ok(()), "{}", key);
                }
            }
        }
    }
}
