//! System calls on files by their paths.

use super::{
    syscalls::Syscalls,
    tree::Body,
    vfs::{Caller, Ino, Vfs},
};
use bytes::Bytes;
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::{EntryKind, StatEntry};

impl Syscalls<'_> {
    /// Gives a file's metadata, following links where asked.
    ///
    /// # Errors
    /// The kernel's.
    pub fn stat(&self, path: &str, follow: bool) -> SysResult<StatEntry> {
        self.os.kernel.vfs.stat(&self.os.kernel.caller(self.pid), path, follow)
    }

    /// Gives a whole file's content without opening it.
    pub(super) fn peek_file(&self, path: &str) -> SysResult<Bytes> {
        let who = self.os.kernel.caller(self.pid);
        let ino = self.os.kernel.vfs.find(&who, path, true)?;
        self.os.kernel.vfs.access(&who, ino, 4)?;
        match &self.os.kernel.vfs.inode(ino)?.body {
            Body::File(rope) => Ok(rope.to_bytes()),
            _ => Err(Errno::INVAL),
        }
    }

    /// Checks that a file may be read (4), written (2) or executed (1).
    ///
    /// # Errors
    /// The kernel's.
    pub fn access(&self, path: &str, want: u32) -> SysResult<()> {
        let who = self.os.kernel.caller(self.pid);
        let ino = self.os.kernel.vfs.find(&who, path, true)?;
        self.os.kernel.vfs.access(&who, ino, want)
    }

    /// Lists a directory, sorted by name.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read_dir(&self, path: &str) -> SysResult<Vec<(String, EntryKind)>> {
        let mut names = self.os.kernel.vfs.read_dir(&self.os.kernel.caller(self.pid), path)?;
        names.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(names)
    }

    /// Gives where a link points.
    ///
    /// # Errors
    /// The kernel's.
    pub fn read_link(&self, path: &str) -> SysResult<String> {
        self.os.kernel.vfs.read_link(&self.os.kernel.caller(self.pid), path)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn mkdir(&mut self, path: &str, mode: u32) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| vfs.mkdir(who, path, mode)).map(|_| ())
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rmdir(&mut self, path: &str) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| vfs.rmdir(who, path))
    }

    /// Removes a name that is no directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn unlink(&mut self, path: &str) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| vfs.unlink(who, path))
    }

    /// Renames as rename(2) does.
    ///
    /// # Errors
    /// The kernel's.
    pub fn rename(&mut self, from: &str, to: &str) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| vfs.rename(who, from, to))
    }

    /// Gives a file a second name.
    ///
    /// # Errors
    /// The kernel's.
    pub fn link(&mut self, from: &str, to: &str) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| vfs.link(who, from, to))
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// The kernel's.
    pub fn symlink(&mut self, target: &str, path: &str) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| vfs.symlink(who, target, path))
    }

    /// Sets a file's permission bits.
    ///
    /// # Errors
    /// The kernel's.
    pub fn chmod(&mut self, path: &str, mode: u32) -> SysResult<()> {
        self.on_inode(path, |vfs, who, ino| vfs.chmod(who, ino, mode))
    }

    /// Sets a file's owner and group, each where given.
    ///
    /// # Errors
    /// The kernel's.
    pub fn chown(&mut self, path: &str, uid: Option<u32>, gid: Option<u32>) -> SysResult<()> {
        self.on_inode(path, |vfs, who, ino| vfs.chown(who, ino, uid, gid))
    }

    /// Sets a file's time of modification to now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn touch(&mut self, path: &str) -> SysResult<()> {
        self.on_inode(path, |vfs, who, ino| vfs.set_modified(who, ino, who.now_ns))
    }

    fn on_inode(
        &mut self,
        path: &str,
        change: impl FnOnce(&mut Vfs, &Caller<'_>, Ino) -> SysResult<()>,
    ) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| {
            let ino = vfs.find(who, path, true)?;
            change(vfs, who, ino)
        })
    }
}
