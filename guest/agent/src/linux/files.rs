//! System calls on files.

use super::errno;
use crate::os::{Errno, Fd, SysResult};
use bytes::Bytes;
use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Uid},
    io::{Errno as Sys, retry_on_intr},
};
use std::{collections::BTreeMap, os::fd::OwnedFd};
use vm_guest_protocol::{EntryKind, StatEntry};

/// The agent's open files.
#[derive(Debug, Default)]
pub(super) struct Files {
    open: BTreeMap<Fd, OwnedFd>,
    next: u32,
}

impl Files {
    pub(super) fn open_read(&mut self, path: &str) -> SysResult<Fd> {
        // Without NONBLOCK, opening a named pipe would wait for a writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map_err(errno)?;
        let stat = rustix::fs::fstat(&file).map_err(errno)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        Ok(self.insert(file))
    }

    pub(super) fn create_new(&mut self, path: &str, mode: u32) -> SysResult<Fd> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = permissions(mode);
        let file = retry_on_intr(|| rustix::fs::open(path, flags, mode)).map_err(errno)?;
        // The mode is meant as it stands, without our umask.
        if let Err(error) = rustix::fs::fchmod(&file, mode) {
            let _ = rustix::fs::unlink(path);
            return Err(errno(error));
        }
        Ok(self.insert(file))
    }

    pub(super) fn read(&self, fd: Fd, max: usize) -> SysResult<Bytes> {
        let file = self.file(fd)?;
        let mut buffer = vec![0; max];
        let read = retry_on_intr(|| rustix::io::read(file, &mut buffer)).map_err(errno)?;
        buffer.truncate(read);
        Ok(Bytes::from(buffer))
    }

    pub(super) fn write_all(&self, fd: Fd, mut bytes: &[u8]) -> SysResult<()> {
        let file = self.file(fd)?;
        while !bytes.is_empty() {
            let written = retry_on_intr(|| rustix::io::write(file, bytes)).map_err(errno)?;
            if written == 0 {
                return Err(Errno::IO);
            }
            bytes = &bytes[written..];
        }
        Ok(())
    }

    pub(super) fn sync(&self, fd: Fd) -> SysResult<()> {
        retry_on_intr(|| rustix::fs::fsync(self.open.get(&fd).ok_or(Sys::BADF)?)).map_err(errno)
    }

    pub(super) fn set_owner_and_mode(
        &self,
        fd: Fd,
        owner: Option<(u32, u32)>,
        mode: u32,
    ) -> SysResult<()> {
        let file = self.file(fd)?;
        if let Some((uid, gid)) = owner {
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            rustix::fs::fchown(file, Some(uid), Some(gid)).map_err(errno)?;
        }
        // After the owner: changing that takes the set-user-id bits away.
        rustix::fs::fchmod(file, permissions(mode)).map_err(errno)
    }

    pub(super) fn close(&mut self, fd: Fd) {
        self.open.remove(&fd);
    }

    fn file(&self, fd: Fd) -> SysResult<&OwnedFd> {
        self.open.get(&fd).ok_or(Errno::BADF)
    }

    fn insert(&mut self, file: OwnedFd) -> Fd {
        // Numbers come round after 2^32 files, long after the first were closed.
        while self.open.contains_key(&Fd(self.next)) {
            self.next = self.next.wrapping_add(1);
        }
        let fd = Fd(self.next);
        self.next = self.next.wrapping_add(1);
        self.open.insert(fd, file);
        fd
    }
}

pub(super) fn sync_dir(path: &str) -> SysResult<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map_err(errno)?;
    match retry_on_intr(|| rustix::fs::fsync(&dir)) {
        // File systems without anything to make durable say so in this way.
        Err(Sys::INVAL | Sys::OPNOTSUPP) => Ok(()),
        other => other.map_err(errno),
    }
}

pub(super) fn stat(path: &str, follow: bool) -> SysResult<StatEntry> {
    let flags = if follow { AtFlags::empty() } else { AtFlags::SYMLINK_NOFOLLOW };
    let stat = retry_on_intr(|| rustix::fs::statat(CWD, path, flags)).map_err(errno)?;
    Ok(entry(&stat))
}

pub(super) fn read_link(path: &str) -> SysResult<String> {
    let target = rustix::fs::readlink(path, Vec::new()).map_err(errno)?;
    target.into_string().map_err(|_| Errno(Sys::ILSEQ.raw_os_error()))
}

pub(super) fn read_dir(path: &str) -> SysResult<Vec<(String, EntryKind)>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())).map_err(errno)?;
    let mut entries = Vec::new();
    for item in rustix::fs::Dir::read_from(&dir).map_err(errno)? {
        let item = item.map_err(errno)?;
        let name = item.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match item.file_type() {
            FileType::Unknown => {
                match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => kind(FileType::from_raw_mode(stat.st_mode)),
                    // Removed since it was read.
                    Err(Sys::NOENT) => continue,
                    Err(error) => return Err(errno(error)),
                }
            }
            known => kind(known),
        };
        entries.push((name.to_string_lossy().into_owned(), kind));
    }
    Ok(entries)
}

pub(super) fn mkdir(path: &str, mode: u32) -> SysResult<()> {
    let mode = permissions(mode);
    rustix::fs::mkdir(path, mode).map_err(errno)?;
    // The mode is meant as it stands, without our umask.
    rustix::fs::chmodat(CWD, path, mode, AtFlags::empty()).map_err(errno)
}

pub(super) fn rmdir(path: &str) -> SysResult<()> {
    rustix::fs::rmdir(path).map_err(errno)
}

pub(super) fn unlink(path: &str) -> SysResult<()> {
    rustix::fs::unlink(path).map_err(errno)
}

pub(super) fn rename(from: &str, to: &str) -> SysResult<()> {
    rustix::fs::rename(from, to).map_err(errno)
}

fn permissions(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}

fn entry(stat: &Stat) -> StatEntry {
    const NANOS: u64 = 1_000_000_000;
    // Times before 1970 cannot be said; they become the epoch.
    let modified = u64::try_from(stat.st_mtime)
        .unwrap_or(0)
        .saturating_mul(NANOS)
        .saturating_add(stat.st_mtime_nsec);
    StatEntry {
        kind: kind(FileType::from_raw_mode(stat.st_mode)),
        size: u64::try_from(stat.st_size).unwrap_or(0),
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified_ns: modified,
    }
}

fn kind(file_type: FileType) -> EntryKind {
    match file_type {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Symlink,
        _ => EntryKind::Other,
    }
}
