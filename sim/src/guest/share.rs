//! Directories of the host that guests share.

use super::{
    disk::{Disk, DiskImage, DiskSetup},
    kernel::{Kernel, SimOs},
    process::{AGENT, Opened},
    program::ProgramRegistry,
    rope::Rope,
    tree::{Body, Dir, Inode, TOP},
    vfs::{Caller, Ino, ROOT, Vfs},
};
use bytes::{Bytes, BytesMut};
use std::{
    io,
    path::{Component, Path},
};
use vm_core::shared_root::Entry;
use vm_guest_agent::os::{Errno, SysResult};

/// A directory of the host as it is mounted in a new guest.
#[derive(Clone, Debug)]
pub struct ShareSetup {
    /// Where: an absolute, normalised path other than `/`.
    pub mount: String,
}

/// A directory of the host that guests mount. It is the host's: a guest has it in hand only while it runs, and neither a
/// copy of a guest nor its saved state holds any of it.
///
/// Paths are relative to it. The host follows no symbolic links in it.
#[derive(Debug)]
pub struct SharedDir(Disk);

impl Default for SharedDir {
    fn default() -> Self {
        Self(detached())
    }
}

/// A directory of the host that becomes the root of a new guest.
#[derive(Debug)]
pub struct RootInHand<'a> {
    /// The directory.
    pub dir: &'a mut SharedDir,
    /// Whether writes fail with `ROFS`.
    pub read_only: bool,
    /// The room that the host has beside what is in it.
    pub room: u64,
}

/// What stands in a guest for a directory that it does not have in hand.
fn detached() -> Disk {
    Disk::new(&DiskSetup {
        mount: String::new(),
        capacity: 0,
        read_only: false,
        image: Default::default(),
    })
}

impl SharedDir {
    /// Makes one that holds what guests with these programs begin with, but for devices.
    #[must_use]
    pub fn guest_root(programs: &ProgramRegistry) -> Self {
        let image = DiskImage::of(programs.base().without_devices());
        let setup = DiskSetup { mount: String::new(), capacity: 0, read_only: false, image };
        Self(Disk::new(&setup))
    }

    /// Says what is at a path, following no link.
    #[must_use]
    pub fn entry(&self, path: &Path) -> Entry {
        let found = self.find(path).ok().and_then(|node| self.0.tree.get(node));
        match found.map(|inode| &inode.body) {
            None => Entry::Missing,
            Some(Body::Dir(_)) => Entry::Directory,
            Some(Body::Symlink(_)) => Entry::Link,
            Some(_) => Entry::Other,
        }
    }

    /// Counts the bytes that it takes of the host's disk.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.0.tree.used()
    }

    /// Loses what was not durable, with the host.
    pub fn crash(&mut self) {
        let image = self.0.durable().clone();
        let setup = DiskSetup { mount: String::new(), capacity: 0, read_only: false, image };
        self.0 = Disk::new(&setup);
    }

    /// Makes a directory, with its parents, unless it is there.
    ///
    /// # Errors
    /// `NotADirectory`.
    pub fn make_dirs(&mut self, path: &Path) -> io::Result<()> {
        let mut at = TOP;
        for name in names(path)? {
            at = match self.child(at, name)? {
                Some(node) => node,
                None => {
                    let dir = Body::Dir(Dir { parent: at, ..Dir::default() });
                    self.attach(at, name, Inode::new(0o755, 0, 0, 0, dir))?
                }
            };
            self.dir(at)?;
        }
        Ok(())
    }

    /// Makes a file that is not there, and gives its number.
    ///
    /// # Errors
    /// `AlreadyExists`; `NotFound`, `NotADirectory` of what it would stand in.
    pub fn create(&mut self, path: &Path) -> io::Result<u32> {
        let (dir, name) = self.place(path)?;
        if self.child(dir, name)?.is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.attach(dir, name, Inode::new(0o644, 0, 0, 0, Body::File(Rope::default())))
    }

    /// Finds a file, and gives its number.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`; `IsADirectory`.
    pub fn open(&self, path: &Path) -> io::Result<u32> {
        let node = self.find(path)?;
        self.rope(node).map(|_| node)
    }

    /// Gives a file's length.
    ///
    /// # Errors
    /// `NotFound` where it is gone.
    pub fn len(&self, file: u32) -> io::Result<u64> {
        self.rope(file).map(Rope::len)
    }

    /// Reads a part of a file.
    ///
    /// # Errors
    /// `NotFound` where it is gone; `UnexpectedEof`.
    pub fn read(&self, file: u32, offset: u64, length: usize) -> io::Result<Bytes> {
        let rope = self.rope(file)?;
        let mut whole = BytesMut::with_capacity(length);
        while whole.len() < length {
            let piece = rope.read(offset + whole.len() as u64, length - whole.len());
            if piece.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    /// Appends to a file as much as there is room for.
    ///
    /// # Errors
    /// `NotFound` where it is gone; `StorageFull`.
    pub fn append(&mut self, file: u32, bytes: &Bytes, room: u64) -> io::Result<()> {
        self.rope(file)?;
        let fits = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
        self.0.tree.set_content(file, |rope| rope.push(bytes.slice(..fits)));
        self.0.touch_content(file);
        if fits < bytes.len() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    /// Makes a file durable.
    pub fn sync(&mut self, file: u32) {
        self.0.sync(file);
    }

    /// Makes names durable.
    pub fn sync_names(&mut self) {
        self.0.sync(TOP);
    }

    /// Renames a file or an empty name over another file.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`; `IsADirectory` where a directory stands at either.
    pub fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.open(from)?;
        let ((dir, name), (new_dir, new_name)) = (self.place(from)?, self.place(to)?);
        if let Some(old) = self.child(new_dir, new_name)?.filter(|old| *old != node) {
            self.rope(old)?;
            self.drop_name(new_dir, new_name, old);
        }
        if let Some(entries) = self.0.tree.dir_mut(dir) {
            entries.entries.remove(name);
        }
        if let Some(entries) = self.0.tree.dir_mut(new_dir) {
            entries.entries.insert(new_name.into(), node);
        }
        self.0.touch(dir);
        self.0.touch(new_dir);
        Ok(())
    }

    /// Removes a file or link.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`, `IsADirectory`.
    pub fn remove(&mut self, path: &Path) -> io::Result<()> {
        let (dir, name) = self.place(path)?;
        let node = self.child(dir, name)?.ok_or(io::ErrorKind::NotFound)?;
        if self.dir(node).is_ok() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        self.drop_name(dir, name, node);
        Ok(())
    }

    /// Lists the files and links of a directory, by name.
    ///
    /// # Errors
    /// `NotFound`, `NotADirectory`.
    pub fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let dir = self.dir(self.find(path)?)?;
        let is_file = |node: &u32| self.dir(*node).is_err();
        let files = dir.entries.iter().filter(|(_, node)| is_file(node));
        Ok(files.map(|(name, _)| name.to_string()).collect())
    }

    fn find(&self, path: &Path) -> io::Result<u32> {
        let mut at = TOP;
        for name in names(path)? {
            at = self.child(at, name)?.ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(at)
    }

    /// Gives the directory and the name of a path.
    fn place<'a>(&self, path: &'a Path) -> io::Result<(u32, &'a str)> {
        let mut names = names(path)?;
        let name = names.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let mut at = TOP;
        for name in names {
            at = self.child(at, name)?.ok_or(io::ErrorKind::NotFound)?;
        }
        self.dir(at).map(|_| (at, name))
    }

    fn child(&self, dir: u32, name: &str) -> io::Result<Option<u32>> {
        Ok(self.dir(dir)?.entries.get(name).copied())
    }

    fn dir(&self, node: u32) -> io::Result<&Dir> {
        let inode = self.0.tree.get(node).ok_or(io::ErrorKind::NotFound)?;
        inode.dir().ok_or_else(|| io::ErrorKind::NotADirectory.into())
    }

    fn rope(&self, node: u32) -> io::Result<&Rope> {
        match &self.0.tree.get(node).ok_or(io::ErrorKind::NotFound)?.body {
            Body::File(rope) => Ok(rope),
            Body::Dir(_) => Err(io::ErrorKind::IsADirectory.into()),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn attach(&mut self, dir: u32, name: &str, inode: Inode) -> io::Result<u32> {
        self.dir(dir)?;
        let (is_dir, is_file) = (inode.dir().is_some(), matches!(inode.body, Body::File(_)));
        let node = self.0.tree.insert(inode);
        if let Some(above) = self.0.tree.get_mut(dir) {
            above.links += u32::from(is_dir);
            if let Body::Dir(dir) = &mut above.body {
                dir.entries.insert(name.into(), node);
            }
        }
        self.0.touch(dir);
        if is_file {
            self.0.touch_content(node);
        } else {
            self.0.touch(node);
        }
        Ok(node)
    }

    fn drop_name(&mut self, dir: u32, name: &str, node: u32) {
        if let Some(entries) = self.0.tree.dir_mut(dir) {
            entries.entries.remove(name);
        }
        self.0.touch(dir);
        let left = self.0.tree.get_mut(node).map_or(0, |inode| {
            inode.links = inode.links.saturating_sub(1);
            inode.links
        });
        self.0.touch(node);
        if left == 0 {
            self.0.tree.remove(node);
        }
    }
}

/// Gives the names of a path that only goes down.
fn names(path: &Path) -> io::Result<Vec<&str>> {
    let name = |part| match part {
        Component::Normal(name) => name.to_str().ok_or(io::ErrorKind::InvalidInput.into()),
        _ => Err(io::Error::from(io::ErrorKind::InvalidInput)),
    };
    path.components().map(name).collect()
}

impl SimOs {
    /// Puts a directory of the host into the guest's hands, with the room that the host has beside what is in it. The
    /// host takes it back by [`take_share`](Self::take_share).
    pub fn give_share(&mut self, index: usize, dir: &mut SharedDir, read_only: bool, room: u64) {
        if let Some(slot) = self.kernel.vfs.share_mut(index) {
            std::mem::swap(slot, &mut dir.0);
            slot.read_only = read_only;
            slot.capacity = slot.tree.used().saturating_add(room);
        }
        if index == 0 {
            self.kernel.mount_in_root_again();
        }
    }

    /// Takes a directory of the host back from a guest that has it in hand.
    pub fn take_share(&mut self, index: usize, dir: &mut SharedDir) {
        if let Some(slot) = self.kernel.vfs.share_mut(index) {
            slot.read_only = false;
            std::mem::swap(slot, &mut dir.0);
        }
    }

    /// Closes what the guest, which ends, holds open of the directories that it has in hand.
    pub fn let_go_of_shares(&mut self) {
        self.kernel.vfs.let_go_of_shares();
    }
}

impl Kernel {
    /// Says whether a path leads to a directory of the host, or a place in one where nothing is yet.
    pub(super) fn leads_to_share(&self, pid: u32, path: &str) -> bool {
        if self.vfs.shares.is_empty() {
            return false;
        }
        let found = self.vfs.walk(&self.caller(pid), path, true);
        found.is_ok_and(|found| self.vfs.is_shared(found.ino.unwrap_or(found.parent)))
    }

    /// Forgets what a saved guest held open of the host's directories: numbers of files say nothing any more.
    pub(super) fn lose_shared_files(&mut self) {
        let shares = self.vfs.shares.clone();
        let lose = |ino: &mut Ino| {
            if shares.contains(&ino.fs) && ino.node != TOP {
                ino.node = u32::MAX;
            }
        };
        for file in self.files.values_mut() {
            if let Opened::Inode(ino) = &mut file.what {
                lose(ino);
            }
        }
        self.processes.values_mut().for_each(|process| lose(&mut process.cwd));
        self.vfs.holds.retain(|ino, _| !shares.contains(&ino.fs) || ino.node == TOP);
        self.vfs.mounts.retain(|at, _| !shares.contains(&at.fs));
    }

    /// Mounts what a saved guest had mounted in a root that is the host's, at the same paths.
    fn mount_in_root_again(&mut self) {
        let vfs = &self.vfs;
        let is_mounted = |fs: &u16| vfs.mounts.values().any(|it| it == fs);
        if vfs.mounted_in_root.keys().all(is_mounted) {
            return;
        }
        for (fs, path) in vfs.mounted_in_root.clone() {
            let found = self.vfs.find(&self.caller(AGENT), &path, true);
            if let Ok(at) = found
                && at.node != TOP
                && self.vfs.is_dir(at)
            {
                self.vfs.mounts.insert(at, fs);
            }
        }
    }
}

impl Vfs {
    /// Mounts a directory of the host, which the guest does not have in hand yet.
    pub(super) fn mount_share(&mut self, path: &str, at: Ino) -> SysResult<()> {
        self.mount(path, at, detached())?;
        self.shares.extend(self.mounts.get(&at).copied());
        Ok(())
    }

    /// Makes a directory of the host, which the guest does not have in hand yet, the root.
    pub(super) fn enter_share(&mut self) -> SysResult<()> {
        self.mount_share("/", ROOT)?;
        let fs = self.mounts.remove(&ROOT).ok_or(Errno::NOENT)?;
        self.top = Ino { fs, node: TOP };
        Ok(())
    }

    /// Makes a directory in a root that is the host's, unless it is there; what the guest has of its own hides it.
    pub(super) fn make_place(&mut self, who: &Caller<'_>, name: &str) -> SysResult<()> {
        let top = self.inode(self.top)?.dir().ok_or(Errno::NOTDIR)?;
        match top.entries.get(name) {
            Some(node) if self.is_dir(Ino { node: *node, ..self.top }) => Ok(()),
            Some(_) => Err(Errno::NOTDIR),
            None => {
                let dir = Inode::new(0o755, 0, 0, who.now_ns, Body::Dir(Dir::default()));
                self.attach(who, self.top, name, dir).map(drop)
            }
        }
    }

    /// Says whether something is in a directory of the host.
    pub(super) fn is_shared(&self, ino: Ino) -> bool {
        self.shares.contains(&ino.fs)
    }

    fn share_mut(&mut self, index: usize) -> Option<&mut Disk> {
        let fs = *self.shares.get(index)?;
        self.disk_mut(fs)
    }

    fn let_go_of_shares(&mut self) {
        let (held, kept) =
            std::mem::take(&mut self.holds).into_iter().partition(|(ino, _)| self.is_shared(*ino));
        self.holds = kept;
        let held: std::collections::BTreeMap<Ino, u32> = held;
        held.into_keys().for_each(|ino| self.drop_if_unused(ino));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Op {
        MakeDirs(String),
        Write(String, Vec<u8>),
        Rename(String, String),
        Remove(String),
    }

    fn path() -> impl Strategy<Value = String> {
        "[ab](/[ab]){0,2}"
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            path().prop_map(Op::MakeDirs),
            (path(), vec(any::<u8>(), 0..20)).prop_map(|(path, bytes)| Op::Write(path, bytes)),
            (path(), path()).prop_map(|(from, to)| Op::Rename(from, to)),
            path().prop_map(Op::Remove),
        ]
    }

    proptest! {
        /// Against a real directory of this host.
        #[test]
        fn it_does_what_a_directory_does(ops in vec(op(), 1..24)) {
            let real = tempfile::tempdir().unwrap();
            let mut dir = SharedDir::default();
            let mut content: BTreeMap<String, Vec<u8>> = BTreeMap::new();
            for op in ops {
                let at = |path: &str| real.path().join(path);
                match op {
                    Op::MakeDirs(path) => {
                        let expected = std::fs::create_dir_all(at(&path)).is_ok();
                        prop_assert_eq!(dir.make_dirs(path.as_ref()).is_ok(), expected);
                    }
                    Op::Write(path, bytes) => {
                        let made = std::fs::File::create_new(at(&path)).is_ok();
                        let file = dir.create(path.as_ref());
                        prop_assert_eq!(file.is_ok(), made, "{}", path);
                        if let Ok(file) = file {
                            std::fs::write(at(&path), &bytes).unwrap();
                            dir.append(file, &bytes.clone().into(), u64::MAX).unwrap();
                            content.insert(path, bytes);
                        }
                    }
                    Op::Rename(from, to) => {
                        let is_file = at(&from).is_file();
                        let expected = is_file && std::fs::rename(at(&from), at(&to)).is_ok();
                        prop_assert_eq!(dir.rename(from.as_ref(), to.as_ref()).is_ok(), expected);
                        if expected && let Some(bytes) = content.remove(&from) {
                            content.insert(to, bytes);
                        }
                    }
                    Op::Remove(path) => {
                        let expected = std::fs::remove_file(at(&path)).is_ok();
                        prop_assert_eq!(dir.remove(path.as_ref()).is_ok(), expected);
                        content.remove(&path);
                    }
                }
                for (path, bytes) in &content {
                    let file = dir.open(path.as_ref()).unwrap();
                    prop_assert_eq!(&dir.read(file, 0, bytes.len()).unwrap()[..], &bytes[..]);
                }
            }
        }
    }

    #[test]
    fn no_path_leads_out_of_it() {
        let mut dir = SharedDir::default();
        for path in ["..", "../a", "a/../../b", "/a", "./a/.."] {
            assert!(dir.create(path.as_ref()).is_err(), "{path}");
            assert!(dir.open(path.as_ref()).is_err(), "{path}");
        }
    }
}
