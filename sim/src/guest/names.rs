//! Making, linking, renaming and removing names.

use super::{
    tree::{Body, Dir, Inode, TOP},
    vfs::{Caller, Ino, PROC_FS, Vfs},
};
use vm_guest_agent::os::{Errno, SysResult};

impl Vfs {
    pub(super) fn attach(
        &mut self,
        who: &Caller<'_>,
        parent: Ino,
        name: &str,
        mut inode: Inode,
    ) -> SysResult<Ino> {
        self.may_change_dir(who, parent)?;
        if matches!(name, "" | "." | "..") {
            return Err(Errno::EXIST);
        }
        if self.room(parent.fs) < 512 {
            return Err(Errno::NOSPC);
        }
        let is_dir = matches!(inode.body, Body::Dir(_));
        let is_file = matches!(inode.body, Body::File(_));
        if let Body::Dir(dir) = &mut inode.body {
            dir.parent = parent.node;
        }
        let tree = self.change(parent)?;
        let node = tree.insert(inode);
        self.link_name(parent, name, node, is_dir, who.now_ns)?;
        let ino = Ino { fs: parent.fs, node };
        self.change(ino)?;
        if let Some(disk) = self.disk_mut(ino.fs).filter(|_| is_file) {
            disk.touch_content(node);
        }
        Ok(ino)
    }

    fn may_change_dir(&self, who: &Caller<'_>, dir: Ino) -> SysResult<()> {
        if dir.fs == PROC_FS {
            return Err(Errno::PERM);
        }
        let inode = self.inode(dir)?;
        if inode.dir().is_none() {
            return Err(Errno::NOTDIR);
        }
        if inode.links == 0 {
            return Err(Errno::NOENT);
        }
        who.may(inode, 3)?;
        self.check_writable(dir)
    }

    /// Checks that a name may be taken out of a directory, as the sticky bit demands.
    fn may_remove(&self, who: &Caller<'_>, dir: Ino, ino: Ino) -> SysResult<()> {
        self.may_change_dir(who, dir)?;
        if ino.fs != dir.fs || self.mounts.contains_key(&ino) {
            return Err(Errno::BUSY);
        }
        let (above, inode) = (self.inode(dir)?, self.inode(ino)?);
        let sticky = above.mode & 0o1000 != 0;
        if sticky && who.uid != 0 && who.uid != above.uid && who.uid != inode.uid {
            return Err(Errno::PERM);
        }
        Ok(())
    }

    fn link_name(
        &mut self,
        parent: Ino,
        name: &str,
        node: u32,
        is_dir: bool,
        now_ns: u64,
    ) -> SysResult<()> {
        let inode = self.change(parent)?.get_mut(parent.node).ok_or(Errno::NOENT)?;
        inode.modified_ns = now_ns;
        inode.links += u32::from(is_dir);
        if let Body::Dir(dir) = &mut inode.body {
            dir.entries.insert(name.into(), node);
        }
        Ok(())
    }

    fn unlink_name(&mut self, parent: Ino, name: &str, is_dir: bool, now_ns: u64) -> SysResult<()> {
        let inode = self.change(parent)?.get_mut(parent.node).ok_or(Errno::NOENT)?;
        inode.modified_ns = now_ns;
        inode.links = inode.links.saturating_sub(u32::from(is_dir));
        if let Body::Dir(dir) = &mut inode.body {
            dir.entries.remove(name);
        }
        Ok(())
    }

    fn drop_link(&mut self, ino: Ino) -> SysResult<()> {
        let inode = self.change(ino)?.get_mut(ino.node).ok_or(Errno::NOENT)?;
        inode.links = if inode.dir().is_some() { 0 } else { inode.links.saturating_sub(1) };
        self.drop_if_unused(ino);
        Ok(())
    }

    pub(super) fn mkdir(&mut self, who: &Caller<'_>, path: &str, mode: u32) -> SysResult<Ino> {
        let found = self.walk(who, path, false)?;
        if found.ino.is_some() {
            return Err(Errno::EXIST);
        }
        let mode = mode & 0o7777 & !who.umask;
        let inode = Inode::new(mode, who.uid, who.gid, who.now_ns, Body::Dir(Dir::default()));
        self.attach(who, found.parent, &found.name, inode)
    }

    pub(super) fn symlink(&mut self, who: &Caller<'_>, target: &str, path: &str) -> SysResult<()> {
        if target.is_empty() {
            return Err(Errno::NOENT);
        }
        let found = self.walk(who, path, false)?;
        if found.ino.is_some() {
            return Err(Errno::EXIST);
        }
        let body = Body::Symlink(target.into());
        let inode = Inode::new(0o777, who.uid, who.gid, who.now_ns, body);
        self.attach(who, found.parent, &found.name, inode).map(|_| ())
    }

    pub(super) fn link(&mut self, who: &Caller<'_>, from: &str, to: &str) -> SysResult<()> {
        let ino = self.find(who, from, false)?;
        let found = self.walk(who, to, false)?;
        if found.ino.is_some() {
            return Err(Errno::EXIST);
        }
        if ino.fs != found.parent.fs {
            return Err(Errno::XDEV);
        }
        if self.is_dir(ino) {
            return Err(Errno::PERM);
        }
        self.may_change_dir(who, found.parent)?;
        self.link_name(found.parent, &found.name, ino.node, false, who.now_ns)?;
        self.change(ino)?.get_mut(ino.node).ok_or(Errno::NOENT)?.links += 1;
        Ok(())
    }

    pub(super) fn rmdir(&mut self, who: &Caller<'_>, path: &str) -> SysResult<()> {
        if path.trim_end_matches('/').rsplit('/').next() == Some(".") {
            return Err(Errno::INVAL);
        }
        let found = self.walk(who, path, false)?;
        let ino = found.ino.ok_or(Errno::NOENT)?;
        if ino == self.top || ino.fs != found.parent.fs {
            return Err(Errno::BUSY);
        }
        if ino.fs == PROC_FS {
            return Err(Errno::PERM);
        }
        let dir = self.inode(ino)?.dir().ok_or(Errno::NOTDIR)?;
        let is_empty = dir.entries.is_empty();
        self.may_remove(who, found.parent, ino)?;
        if !is_empty || found.name == ".." {
            return Err(Errno::NOTEMPTY);
        }
        self.unlink_name(found.parent, &found.name, true, who.now_ns)?;
        self.drop_link(ino)
    }

    pub(super) fn unlink(&mut self, who: &Caller<'_>, path: &str) -> SysResult<()> {
        let found = self.walk(who, path, false)?;
        let ino = found.ino.ok_or(Errno::NOENT)?;
        if self.is_dir(ino) {
            return Err(Errno::ISDIR);
        }
        if path.ends_with('/') {
            return Err(Errno::NOTDIR);
        }
        self.may_remove(who, found.parent, ino)?;
        self.unlink_name(found.parent, &found.name, false, who.now_ns)?;
        self.drop_link(ino)
    }

    pub(super) fn rename(&mut self, who: &Caller<'_>, from: &str, to: &str) -> SysResult<()> {
        // As Linux does, both directories before either name.
        self.find_directory_of(who, from)?;
        self.find_directory_of(who, to)?;
        let source = self.walk(who, from, false)?;
        let ino = source.ino.ok_or(Errno::NOENT)?;
        let target = self.walk(who, to, false)?;
        let special = |name: &str| matches!(name, "" | "." | "..");
        if special(&source.name) || special(&target.name) {
            return Err(Errno::BUSY);
        }
        if source.parent.fs != target.parent.fs {
            return Err(Errno::XDEV);
        }
        let is_dir = self.is_dir(ino);
        if !is_dir && (to.ends_with('/') || from.ends_with('/')) {
            return Err(Errno::NOTDIR);
        }
        self.may_remove(who, source.parent, ino)?;
        self.may_change_dir(who, target.parent)?;
        if is_dir && self.is_within(target.parent, ino) {
            return Err(Errno::INVAL);
        }
        if target.ino.is_some_and(|old| self.is_within(source.parent, old)) {
            return Err(Errno::NOTEMPTY);
        }
        if let Some(old) = target.ino {
            if old == ino {
                return Ok(());
            }
            match (is_dir, self.is_dir(old)) {
                (true, false) => return Err(Errno::NOTDIR),
                (false, true) => return Err(Errno::ISDIR),
                _ => {}
            }
            self.may_remove(who, target.parent, old)?;
            if self.inode(old)?.dir().is_some_and(|dir| !dir.entries.is_empty()) {
                return Err(Errno::NOTEMPTY);
            }
            self.unlink_name(target.parent, &target.name, is_dir, who.now_ns)?;
            self.drop_link(old)?;
        }
        self.unlink_name(source.parent, &source.name, is_dir, who.now_ns)?;
        self.link_name(target.parent, &target.name, ino.node, is_dir, who.now_ns)?;
        if let Some(dir) = self.change(ino)?.dir_mut(ino.node).filter(|_| is_dir) {
            dir.parent = target.parent.node;
        }
        Ok(())
    }

    /// Follows a path but for its last name, to a directory.
    fn find_directory_of(&self, who: &Caller<'_>, path: &str) -> SysResult<()> {
        let Some((above, _)) = path.trim_end_matches('/').rsplit_once('/') else { return Ok(()) };
        if above.is_empty() {
            return Ok(());
        }
        match self.is_dir(self.find(who, above, true)?) {
            true => Ok(()),
            false => Err(Errno::NOTDIR),
        }
    }

    fn is_within(&self, mut dir: Ino, of: Ino) -> bool {
        loop {
            if dir == of {
                return true;
            }
            let Some(parent) = self.inode(dir).ok().and_then(Inode::dir).map(|dir| dir.parent)
            else {
                return false;
            };
            if dir.node == TOP || parent == dir.node {
                return false;
            }
            dir.node = parent;
        }
    }
}
