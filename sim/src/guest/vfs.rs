//! The file system as processes see it: paths, permissions, mounts.

use super::{
    disk::{Disk, DiskImage},
    proc_fs,
    process::Process,
    tree::{BaseImage, Body, Inode, TOP, Tree, file_cost},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::{EntryKind, StatEntry, boot::BootRoot};

/// Names an inode in all of a guest's file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Ino {
    pub(super) fs: u16,
    pub(super) node: u32,
}

/// The file system in memory.
const ROOT_FS: u16 = 0;
/// The file system of `/proc`.
pub(super) const PROC_FS: u16 = u16::MAX;
const MAX_LINKS: u32 = 40;
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4095;

/// The directory `/`.
pub(super) const ROOT: Ino = Ino { fs: ROOT_FS, node: TOP };

/// Who asks, from where.
#[derive(Clone, Copy)]
pub(super) struct Caller<'a> {
    pub(super) pid: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) cwd: Ino,
    pub(super) umask: u32,
    pub(super) now_ns: u64,
    pub(super) processes: &'a BTreeMap<u32, Process>,
}

/// What a path leads to.
pub(super) struct Found {
    pub(super) parent: Ino,
    pub(super) name: String,
    pub(super) ino: Option<Ino>,
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFlags {
    /// For reading.
    pub read: bool,
    /// For writing.
    pub write: bool,
    /// Every write goes to the end.
    pub append: bool,
    /// Make it where it is missing.
    pub create: bool,
    /// Fail where it is not missing.
    pub exclusive: bool,
    /// Empty it.
    pub truncate: bool,
}

/// All file systems of a guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Vfs {
    root: Tree,
    /// The directory `/`: that of the file system in memory, or a directory of the host.
    pub(super) top: Ino,
    disks: Vec<Disk>,
    /// The disks' numbers in the order of the configuration.
    disk_order: Vec<u16>,
    /// Which disk is mounted on a directory.
    pub(super) mounts: BTreeMap<Ino, u16>,
    /// The numbers of host directories, in the order of the configuration.
    pub(super) shares: Vec<u16>,
    /// Where in a root that is the host's something is mounted.
    pub(super) mounted_in_root: BTreeMap<u16, String>,
    /// How often an inode is held open, or as a working directory.
    pub(super) holds: BTreeMap<Ino, u32>,
    memory: u64,
    /// What processes take of the memory.
    pub(super) process_memory: u64,
}

impl Caller<'_> {
    pub(super) fn may(&self, inode: &Inode, want: u32) -> SysResult<()> {
        let granted = if self.uid == 0 {
            if want & 1 == 0 || inode.mode & 0o111 != 0 || inode.dir().is_some() { 7 } else { 6 }
        } else if self.uid == inode.uid {
            inode.mode >> 6
        } else if self.gid == inode.gid {
            inode.mode >> 3
        } else {
            inode.mode
        };
        if granted & want == want { Ok(()) } else { Err(Errno::ACCES) }
    }
}

impl Vfs {
    pub(super) fn new(base: Arc<BaseImage>, memory: u64) -> Self {
        Self {
            root: Tree::over(base),
            top: ROOT,
            disks: Vec::new(),
            disk_order: Vec::new(),
            mounts: BTreeMap::new(),
            shares: Vec::new(),
            mounted_in_root: BTreeMap::new(),
            holds: BTreeMap::new(),
            memory,
            process_memory: 0,
        }
    }

    pub(super) fn rebase(&mut self, base: Arc<BaseImage>) {
        self.root.rebase(base);
    }

    /// Mounts a disk on a directory, which is at this path.
    pub(super) fn mount(&mut self, path: &str, at: Ino, disk: Disk) -> SysResult<()> {
        let fs = u16::try_from(self.disks.len() + 1).ok().filter(|fs| *fs != PROC_FS);
        let fs = fs.ok_or(Errno::NFILE)?;
        self.disks.push(disk);
        self.mounts.insert(at, fs);
        if at.fs == self.top.fs && at.fs != ROOT_FS {
            self.mounted_in_root.insert(fs, path.to_owned());
        }
        Ok(())
    }

    /// Remembers the configuration's order of disks, given by where they are mounted.
    pub(super) fn set_disk_order(&mut self, mounted_at: impl Iterator<Item = Ino>) {
        self.disk_order = mounted_at.filter_map(|at| self.mounts.get(&at).copied()).collect();
    }

    pub(super) fn durable_images(&self) -> impl Iterator<Item = DiskImage> {
        self.disk_order
            .iter()
            .filter_map(|fs| self.disks.get(usize::from(*fs) - 1))
            .map(|disk| disk.durable().clone())
    }

    pub(super) fn memory(&self) -> u64 {
        self.memory
    }

    pub(super) fn memory_used(&self) -> u64 {
        self.root.used() + self.process_memory
    }

    // Paths.

    /// Follows a path; its last name may be missing.
    pub(super) fn walk(&self, who: &Caller<'_>, path: &str, follow: bool) -> SysResult<Found> {
        if path.len() > MAX_PATH {
            return Err(Errno::NAMETOOLONG);
        }
        self.walk_from(who, who.cwd, path, follow, &mut 0)
    }

    /// Follows a path to something that is there.
    pub(super) fn find(&self, who: &Caller<'_>, path: &str, follow: bool) -> SysResult<Ino> {
        self.walk(who, path, follow)?.ino.ok_or(Errno::NOENT)
    }

    fn walk_from(
        &self,
        who: &Caller<'_>,
        from: Ino,
        path: &str,
        follow: bool,
        links: &mut u32,
    ) -> SysResult<Found> {
        if path.is_empty() {
            return Err(Errno::NOENT);
        }
        let mut at = if path.starts_with('/') { self.top } else { from };
        let mut rest = path.trim_start_matches('/');
        let (mut parent, mut last) = (at, "");
        while !rest.is_empty() {
            let (name, after) = rest.split_once('/').unwrap_or((rest, ""));
            let is_last = after.trim_start_matches('/').is_empty();
            let must_be_dir = rest.len() > name.len();
            rest = after.trim_start_matches('/');
            if name.len() > MAX_NAME {
                return Err(Errno::NAMETOOLONG);
            }
            (parent, last) = (at, name);
            let Some(child) = self.child(who, at, name)? else {
                if is_last {
                    let missing = Found { parent, name: last.to_owned(), ino: None };
                    return Ok(missing);
                }
                return Err(Errno::NOENT);
            };
            let target = self.link_target(who, child);
            match target {
                Some(target) if !is_last || follow || must_be_dir => {
                    *links += 1;
                    if *links > MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    let found = self.walk_from(who, at, &target, true, links)?;
                    match found.ino {
                        Some(ino) => at = ino,
                        None if is_last => return Ok(found),
                        None => return Err(Errno::NOENT),
                    }
                }
                _ => at = child,
            }
            if (must_be_dir || !is_last) && !self.is_dir(at) {
                return Err(Errno::NOTDIR);
            }
        }
        Ok(Found { parent, name: last.to_owned(), ino: Some(at) })
    }

    fn child(&self, who: &Caller<'_>, at: Ino, name: &str) -> SysResult<Option<Ino>> {
        if at.fs == PROC_FS {
            if name == ".." && at.node == proc_fs::TOP {
                return Ok(Some(self.top));
            }
            let node = proc_fs::lookup(at.node, name, who.processes)?;
            return Ok(node.map(|node| Ino { fs: PROC_FS, node }));
        }
        let inode = self.inode(at)?;
        let dir = inode.dir().ok_or(Errno::NOTDIR)?;
        who.may(inode, 1)?;
        let own = self.own_place(at, name);
        let node = match name {
            "." => return Ok(Some(at)),
            ".." if at == self.top => return Ok(Some(at)),
            ".." if at.node == TOP && at.fs != ROOT_FS => {
                let mount = self.mounts.iter().find(|(_, fs)| **fs == at.fs);
                let (on, _) = mount.ok_or(Errno::NOENT)?;
                return self.child(who, *on, "..");
            }
            ".." => dir.parent,
            name => match own.or_else(|| dir.entries.get(name)) {
                Some(node) => *node,
                None => return Ok(None),
            },
        };
        let fs = if own.is_some() { ROOT_FS } else { at.fs };
        let ino = Ino { fs, node };
        if ino == ROOT {
            return Ok(Some(self.top));
        }
        Ok(Some(self.cross(ino, at == self.top && name == "proc")))
    }

    /// Finds the directories in memory that a root which is the host's has as every other root does.
    fn own_place(&self, at: Ino, name: &str) -> Option<&u32> {
        if at != self.top || at.fs == ROOT_FS || !BootRoot::PLACES.contains(&name) {
            return None;
        }
        self.root.get(TOP)?.dir()?.entries.get(name)
    }

    /// Goes from a directory to what is mounted on it.
    fn cross(&self, ino: Ino, is_proc: bool) -> Ino {
        if is_proc {
            return Ino { fs: PROC_FS, node: proc_fs::TOP };
        }
        if self.mounts.is_empty() {
            return ino;
        }
        self.mounts.get(&ino).map_or(ino, |fs| Ino { fs: *fs, node: TOP })
    }

    fn link_target(&self, who: &Caller<'_>, ino: Ino) -> Option<Arc<str>> {
        if ino.fs == PROC_FS {
            return proc_fs::link(ino.node, who.pid).map(Into::into);
        }
        match &self.inode(ino).ok()?.body {
            Body::Symlink(target) => Some(Arc::clone(target)),
            _ => None,
        }
    }

    /// Gives an inode outside `/proc`.
    pub(super) fn inode(&self, ino: Ino) -> SysResult<&Inode> {
        self.tree(ino.fs).and_then(|tree| tree.get(ino.node)).ok_or(Errno::NOENT)
    }

    fn tree(&self, fs: u16) -> Option<&Tree> {
        match fs {
            ROOT_FS => Some(&self.root),
            fs => self.disks.get(usize::from(fs) - 1).map(|disk| &disk.tree),
        }
    }

    pub(super) fn disk_mut(&mut self, fs: u16) -> Option<&mut Disk> {
        self.disks.get_mut(usize::from(fs).checked_sub(1)?)
    }

    /// Gives a tree to change, having noted that its inode's attributes change.
    pub(super) fn change(&mut self, ino: Ino) -> SysResult<&mut Tree> {
        if ino.fs == ROOT_FS {
            return Ok(&mut self.root);
        }
        let disk = self.disk_mut(ino.fs).ok_or(Errno::PERM)?;
        if disk.read_only {
            return Err(Errno::ROFS);
        }
        disk.touch(ino.node);
        Ok(&mut disk.tree)
    }

    pub(super) fn check_writable(&self, ino: Ino) -> SysResult<()> {
        match ino.fs {
            PROC_FS => Err(Errno::PERM),
            ROOT_FS => Ok(()),
            fs => match self.disks.get(usize::from(fs) - 1) {
                Some(disk) if disk.read_only => Err(Errno::ROFS),
                Some(_) => Ok(()),
                None => Err(Errno::IO),
            },
        }
    }

    pub(super) fn is_dir(&self, ino: Ino) -> bool {
        if ino.fs == PROC_FS {
            return proc_fs::is_dir(ino.node);
        }
        self.inode(ino).is_ok_and(|inode| inode.dir().is_some())
    }

    /// Gives the room that is left where an inode lives.
    pub(super) fn room(&self, fs: u16) -> u64 {
        match fs {
            ROOT_FS => self.memory.saturating_sub(self.memory_used()),
            fs => self
                .disks
                .get(usize::from(fs) - 1)
                .map_or(0, |disk| disk.capacity.saturating_sub(disk.tree.used())),
        }
    }

    // Holds.

    pub(super) fn hold(&mut self, ino: Ino) {
        *self.holds.entry(ino).or_insert(0) += 1;
    }

    pub(super) fn unhold(&mut self, ino: Ino) {
        let Some(count) = self.holds.get_mut(&ino) else { return };
        *count -= 1;
        if *count == 0 {
            self.holds.remove(&ino);
            self.drop_if_unused(ino);
        }
    }

    pub(super) fn drop_if_unused(&mut self, ino: Ino) {
        let gone = self.inode(ino).is_ok_and(|inode| inode.links == 0);
        if gone
            && !self.holds.contains_key(&ino)
            && let Ok(tree) = self.change(ino)
        {
            tree.remove(ino.node);
        }
    }

    // Metadata.

    pub(super) fn stat(&self, who: &Caller<'_>, path: &str, follow: bool) -> SysResult<StatEntry> {
        self.stat_ino(self.find(who, path, follow)?)
    }

    pub(super) fn stat_ino(&self, ino: Ino) -> SysResult<StatEntry> {
        if ino.fs == PROC_FS {
            return Ok(proc_fs::stat(ino.node));
        }
        let inode = self.inode(ino)?;
        Ok(StatEntry {
            kind: inode.kind(),
            size: inode.size(),
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            modified_ns: inode.modified_ns,
        })
    }

    /// Checks that the caller may read (4), write (2) or execute (1).
    pub(super) fn access(&self, who: &Caller<'_>, ino: Ino, want: u32) -> SysResult<()> {
        if ino.fs == PROC_FS {
            return proc_fs::access(ino.node, who.uid, want);
        }
        if want & 2 != 0 {
            self.check_writable(ino)?;
        }
        who.may(self.inode(ino)?, want)
    }

    pub(super) fn read_link(&self, who: &Caller<'_>, path: &str) -> SysResult<String> {
        let ino = self.find(who, path, false)?;
        self.link_target(who, ino).map(|target| target.to_string()).ok_or(Errno::INVAL)
    }

    pub(super) fn read_dir(
        &self,
        who: &Caller<'_>,
        path: &str,
    ) -> SysResult<Vec<(String, EntryKind)>> {
        let ino = self.find(who, path, true)?;
        if ino.fs == PROC_FS {
            return proc_fs::list(ino.node, who.processes);
        }
        let inode = self.inode(ino)?;
        let dir = inode.dir().ok_or(Errno::NOTDIR)?;
        who.may(inode, 4)?;
        let mut names = Vec::with_capacity(dir.entries.len());
        for (name, node) in &dir.entries {
            names.push((name.to_string(), self.inode(Ino { fs: ino.fs, node: *node })?.kind()));
        }
        Ok(names)
    }

    /// Gives a directory's path.
    pub(super) fn path_of(&self, mut ino: Ino) -> SysResult<String> {
        if ino.fs == PROC_FS {
            return Ok(proc_fs::path(ino.node));
        }
        let mut names = Vec::new();
        while ino != ROOT && ino != self.top {
            if ino.node == TOP {
                ino = *self.mounts.iter().find(|(_, fs)| **fs == ino.fs).ok_or(Errno::NOENT)?.0;
            }
            let inode = self.inode(ino)?;
            let parent = Ino { fs: ino.fs, node: inode.dir().ok_or(Errno::NOTDIR)?.parent };
            let above = self.inode(parent)?.dir().ok_or(Errno::NOTDIR)?;
            let name = above.entries.iter().find(|(_, node)| **node == ino.node);
            names.push(Arc::clone(name.ok_or(Errno::NOENT)?.0));
            ino = parent;
        }
        names.reverse();
        Ok(format!("/{}", names.join("/")))
    }

    pub(super) fn chmod(&mut self, who: &Caller<'_>, ino: Ino, mode: u32) -> SysResult<()> {
        self.check_writable(ino)?;
        if who.uid != 0 && who.uid != self.inode(ino)?.uid {
            return Err(Errno::PERM);
        }
        let inode = self.change(ino)?.get_mut(ino.node).ok_or(Errno::NOENT)?;
        inode.mode = mode & 0o7777;
        Ok(())
    }

    pub(super) fn chown(
        &mut self,
        who: &Caller<'_>,
        ino: Ino,
        uid: Option<u32>,
        gid: Option<u32>,
    ) -> SysResult<()> {
        self.check_writable(ino)?;
        let old = self.inode(ino)?;
        let owner_alone = who.uid == old.uid && uid.is_none_or(|uid| uid == old.uid);
        if who.uid != 0 && !(owner_alone && gid.is_none_or(|gid| gid == who.gid)) {
            return Err(Errno::PERM);
        }
        let inode = self.change(ino)?.get_mut(ino.node).ok_or(Errno::NOENT)?;
        inode.uid = uid.unwrap_or(inode.uid);
        inode.gid = gid.unwrap_or(inode.gid);
        Ok(())
    }

    pub(super) fn set_modified(&mut self, who: &Caller<'_>, ino: Ino, ns: u64) -> SysResult<()> {
        self.check_writable(ino)?;
        let inode = self.inode(ino)?;
        if who.uid != inode.uid {
            who.may(inode, 2)?;
        }
        self.change(ino)?.get_mut(ino.node).ok_or(Errno::NOENT)?.modified_ns = ns;
        Ok(())
    }

    // Content.

    /// Opens a file outside `/proc`, making it where asked.
    pub(super) fn open(
        &mut self,
        who: &Caller<'_>,
        path: &str,
        flags: OpenFlags,
        mode: u32,
    ) -> SysResult<Ino> {
        let found = self.walk(who, path, !(flags.create && flags.exclusive))?;
        let Some(ino) = found.ino else {
            if !flags.create {
                return Err(Errno::NOENT);
            }
            if path.ends_with('/') {
                return Err(Errno::ISDIR);
            }
            let inode = Inode::new(
                mode & !who.umask,
                who.uid,
                who.gid,
                who.now_ns,
                Body::File(Default::default()),
            );
            return self.attach(who, found.parent, &found.name, inode);
        };
        if flags.create && flags.exclusive {
            return Err(Errno::EXIST);
        }
        if (flags.write || flags.create) && self.is_dir(ino) {
            return Err(Errno::ISDIR);
        }
        let want = if flags.read { 4 } else { 0 } | if flags.write { 2 } else { 0 };
        let is_device = ino.fs != PROC_FS && matches!(self.inode(ino)?.body, Body::Device(_));
        if is_device {
            who.may(self.inode(ino)?, want)?;
        } else {
            self.access(who, ino, want)?;
        }
        if flags.truncate && flags.write && ino.fs != PROC_FS && !is_device {
            self.set_len(ino, 0, who.now_ns)?;
        }
        Ok(ino)
    }

    pub(super) fn read_at(&self, ino: Ino, offset: u64, max: usize) -> SysResult<Bytes> {
        match &self.inode(ino)?.body {
            Body::File(rope) => Ok(rope.read(offset, max)),
            Body::Dir(_) => Err(Errno::ISDIR),
            _ => Err(Errno::INVAL),
        }
    }

    /// Writes as much as there is room for, and says how much that was.
    pub(super) fn write_at(
        &mut self,
        ino: Ino,
        offset: u64,
        mut bytes: Bytes,
        now_ns: u64,
    ) -> SysResult<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let old = self.inode(ino)?.size();
        let room = self.room(ino.fs).saturating_add(file_cost(old));
        let limit = room - room % file_cost(1);
        if offset >= limit && offset >= old {
            return Err(Errno::NOSPC);
        }
        let limit = limit.max(file_cost(old));
        let fits = usize::try_from(limit.saturating_sub(offset)).unwrap_or(usize::MAX);
        if fits == 0 {
            return Err(Errno::NOSPC);
        }
        bytes.truncate(fits);
        let taken = bytes.len();
        self.edit(ino, now_ns, |rope| rope.write(offset, bytes))?;
        Ok(taken)
    }

    pub(super) fn set_len(&mut self, ino: Ino, len: u64, now_ns: u64) -> SysResult<()> {
        let old = file_cost(self.inode(ino)?.size());
        if file_cost(len) > old && file_cost(len) - old > self.room(ino.fs) {
            return Err(Errno::NOSPC);
        }
        self.edit(ino, now_ns, |rope| rope.set_len(len))
    }

    fn edit(
        &mut self,
        ino: Ino,
        now_ns: u64,
        edit: impl FnOnce(&mut super::rope::Rope),
    ) -> SysResult<()> {
        let tree = self.change(ino)?;
        tree.get_mut(ino.node).ok_or(Errno::NOENT)?.modified_ns = now_ns;
        tree.set_content(ino.node, edit);
        if let Some(disk) = self.disk_mut(ino.fs) {
            disk.touch_content(ino.node);
        }
        Ok(())
    }

    pub(super) fn sync(&mut self, ino: Ino) {
        if let Some(disk) = self.disk_mut(ino.fs) {
            disk.sync(ino.node);
        }
    }

    pub(super) fn sync_all(&mut self) {
        self.disks.iter_mut().for_each(Disk::sync_all);
    }
}
