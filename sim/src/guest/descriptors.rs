//! System calls on descriptors, and reading and writing what they name.

use super::{
    fault::SysCall,
    kernel::Kernel,
    limits,
    pipe::{Pipe, Taken},
    process::Opened,
    rope::zeros,
    signals,
    syscalls::{FdStat, OpenFlags, Syscalls},
    tree::{Body, Device},
    vfs::{Caller, Ino, PROC_FS, Vfs},
};
use bytes::Bytes;
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::EntryKind;

impl Syscalls<'_> {
    /// Opens a file; `mode` is for one that is made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&mut self, path: &str, flags: OpenFlags, mode: u32) -> SysResult<u32> {
        self.fault(&SysCall::Open { pid: self.pid, path, write: flags.write })?;
        if self.os.kernel.leads_to_share(self.pid, path) {
            self.fault(&SysCall::Share { pid: self.pid, write: false })?;
        }
        let what = self.open_what(path, flags, mode)?;
        let kernel = &mut self.os.kernel;
        let file = kernel.add_file(what, flags);
        kernel.install(self.pid, file, 0)
    }

    fn open_what(&mut self, path: &str, flags: OpenFlags, mode: u32) -> SysResult<Opened> {
        let kernel = &mut self.os.kernel;
        let who = Caller { processes: &kernel.processes, ..kernel.caller(self.pid) };
        let ino = kernel.vfs.open(&who, path, flags, mode)?;
        if ino.fs == PROC_FS {
            let content = if flags.read { kernel.proc_content(ino.node)? } else { Bytes::new() };
            return Ok(Opened::Proc { node: ino.node, content });
        }
        let Body::Device(device) = kernel.vfs.inode(ino)?.body else {
            return Ok(Opened::Inode(ino));
        };
        if device == Device::Tty {
            let tty = self.process().and_then(|it| it.tty).ok_or(Errno(6))?;
            return Ok(Opened::Pty(tty));
        }
        Ok(Opened::Device(device))
    }

    /// Closes a descriptor.
    ///
    /// # Errors
    /// `BADF`.
    pub fn close(&mut self, fd: u32) -> SysResult<()> {
        self.os.kernel.close_fd(self.pid, fd)
    }

    /// Makes a pipe, and gives its reading and its writing end.
    ///
    /// # Errors
    /// `MFILE`.
    pub fn pipe(&mut self) -> SysResult<(u32, u32)> {
        let kernel = &mut self.os.kernel;
        let (_, read, write) = kernel.add_pipe();
        let reading = match kernel.install(self.pid, read, 0) {
            Ok(fd) => fd,
            Err(errno) => {
                kernel.close_file(write);
                return Err(errno);
            }
        };
        match kernel.install(self.pid, write, 0) {
            Ok(writing) => Ok((reading, writing)),
            Err(errno) => {
                kernel.close_fd(self.pid, reading)?;
                Err(errno)
            }
        }
    }

    /// Makes a descriptor name what another one does.
    ///
    /// # Errors
    /// `BADF`.
    pub fn dup2(&mut self, from: u32, to: u32) -> SysResult<()> {
        let kernel = &mut self.os.kernel;
        let file = kernel.file_of(self.pid, from)?;
        if from == to {
            return Ok(());
        }
        kernel.share(file);
        kernel.install_at(self.pid, to, file)
    }

    /// Makes a new descriptor of at least `least` name what another one does; it closes on exec.
    ///
    /// # Errors
    /// `BADF`, `MFILE`.
    pub fn dup_above(&mut self, from: u32, least: u32) -> SysResult<u32> {
        let kernel = &mut self.os.kernel;
        let file = kernel.file_of(self.pid, from)?;
        kernel.share(file);
        let fd = kernel.install(self.pid, file, least as usize)?;
        self.set_close_on_exec(fd, true)?;
        Ok(fd)
    }

    /// Sets whether children get a descriptor.
    ///
    /// # Errors
    /// `BADF`.
    pub fn set_close_on_exec(&mut self, fd: u32, close: bool) -> SysResult<()> {
        let process = self.process_mut().ok_or(Errno::SRCH)?;
        let slot = process.fds.get_mut(fd as usize).and_then(Option::as_mut);
        slot.ok_or(Errno::BADF)?.close_on_exec = close;
        Ok(())
    }

    /// Reads at most `max` bytes; none at the end.
    ///
    /// # Errors
    /// The kernel's; `AGAIN` when there are none yet.
    pub fn read(&mut self, fd: u32, max: usize) -> SysResult<Bytes> {
        let file = self.os.kernel.file_of(self.pid, fd)?;
        let open = self.os.kernel.files.get(&file).ok_or(Errno::BADF)?;
        if !open.flags.read {
            return Err(Errno::BADF);
        }
        if let Opened::Inode(ino) = open.what {
            self.fault(&SysCall::Read { pid: self.pid })?;
            self.fault_of_share(ino, false)?;
        }
        self.os.kernel.read_file(file, max)
    }

    /// Writes bytes, and says how many were taken.
    ///
    /// # Errors
    /// The kernel's; `AGAIN` when there is no room yet; `PIPE` with the signal when nobody reads.
    pub fn write(&mut self, fd: u32, bytes: impl Into<Bytes>) -> SysResult<usize> {
        let mut bytes = bytes.into();
        let file = self.os.kernel.file_of(self.pid, fd)?;
        let open = self.os.kernel.files.get(&file).ok_or(Errno::BADF)?;
        if !open.flags.write {
            return Err(Errno::BADF);
        }
        if let Opened::Inode(ino) = open.what {
            let (at, append) = (open.offset, open.flags.append);
            self.fault(&SysCall::Write { pid: self.pid, len: bytes.len() })?;
            self.fault_of_share(ino, true)?;
            let at = if append { self.os.kernel.vfs.inode(ino)?.size() } else { at };
            let room = self.check_file_size(at, bytes.len())?;
            bytes.truncate(room);
        }
        let result = self.os.kernel.write_file(file, bytes);
        if result == Err(Errno::PIPE) {
            self.os.kernel.send_signal(self.pid, signals::PIPE);
        }
        result
    }

    /// Says which of these descriptors could be read and which written now.
    #[must_use]
    pub fn poll(&self, readable: &[u32], writable: &[u32]) -> (Vec<u32>, Vec<u32>) {
        let ready = |fds: &[u32], to_write| {
            let is_ready = |fd: &u32| self.os.kernel.is_fd_ready(self.pid, *fd, to_write);
            fds.iter().copied().filter(is_ready).collect()
        };
        (ready(readable, false), ready(writable, true))
    }

    /// Moves a file's offset.
    ///
    /// # Errors
    /// `PIPE`'s number 29 for what has no offset; `BADF`.
    pub fn seek(&mut self, fd: u32, offset: u64) -> SysResult<()> {
        let file = self.os.kernel.file_of(self.pid, fd)?;
        let open = self.os.kernel.files.get_mut(&file).ok_or(Errno::BADF)?;
        match open.what {
            Opened::Inode(_) | Opened::Proc { .. } => {
                open.offset = offset;
                Ok(())
            }
            _ => Err(Errno(29)),
        }
    }

    /// Says what a descriptor names.
    ///
    /// # Errors
    /// `BADF`.
    pub fn fstat(&self, fd: u32) -> SysResult<FdStat> {
        let kernel = &self.os.kernel;
        let file = kernel.file_of(self.pid, fd)?;
        Ok(match &kernel.files.get(&file).ok_or(Errno::BADF)?.what {
            Opened::Inode(ino) => match kernel.vfs.stat_ino(*ino)? {
                it if it.kind == EntryKind::Directory => FdStat::Directory,
                it => FdStat::File { size: it.size },
            },
            Opened::Proc { .. } => FdStat::File { size: 0 },
            Opened::PipeRead(_) | Opened::PipeWrite(_) => FdStat::Pipe,
            Opened::Pty(_) => FdStat::Terminal,
            Opened::Listener(_) | Opened::Socket(_) => FdStat::Socket,
            Opened::Device(_) => FdStat::Device,
        })
    }

    /// Gives a terminal's lines and columns.
    ///
    /// # Errors
    /// `NOTTY` for what is none.
    pub fn terminal_size(&self, fd: u32) -> SysResult<(u16, u16)> {
        let file = self.os.kernel.file_of(self.pid, fd)?;
        let Some(Opened::Pty(pty)) = self.os.kernel.files.get(&file).map(|open| &open.what) else {
            return Err(Errno::NOTTY);
        };
        self.os.kernel.ptys.get(pty).map(|pty| pty.size).ok_or(Errno::IO)
    }

    /// Makes a file's content durable.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fsync(&mut self, fd: u32) -> SysResult<()> {
        let file = self.os.kernel.file_of(self.pid, fd)?;
        self.fault(&SysCall::Sync { pid: self.pid })?;
        if let Some(Opened::Inode(ino)) = self.os.kernel.files.get(&file).map(|open| &open.what) {
            self.fault_of_share(*ino, false)?;
        }
        self.os.kernel.sync_file_of(file)
    }

    /// Cuts or extends an open file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn ftruncate(&mut self, fd: u32, len: u64) -> SysResult<()> {
        let kernel = &mut self.os.kernel;
        let file = kernel.file_of(self.pid, fd)?;
        let open = kernel.files.get(&file).ok_or(Errno::BADF)?;
        let (Opened::Inode(ino), true) = (&open.what, open.flags.write) else {
            return Err(Errno::INVAL);
        };
        let (ino, now) = (*ino, kernel.wall_ns());
        if len > kernel.vfs.inode(ino)?.size() {
            self.check_file_size(len.saturating_sub(1), 1)?;
        }
        self.os.kernel.vfs.set_len(ino, len, now)
    }

    /// Gives how many of `wanted` bytes at an offset the process may write.
    fn check_file_size(&mut self, at: u64, wanted: usize) -> SysResult<usize> {
        let most = self.process().map_or(u64::MAX, |it| it.limits.soft(limits::FSIZE));
        let room = usize::try_from(most.saturating_sub(at)).unwrap_or(usize::MAX);
        if room == 0 && wanted > 0 {
            self.os.kernel.send_signal(self.pid, signals::XFSZ);
            return Err(Errno::FBIG);
        }
        Ok(wanted.min(room))
    }

    /// Lets faults of the host's happen where the process works on a directory of the host.
    fn fault_of_share(&mut self, ino: Ino, write: bool) -> SysResult<()> {
        if !self.os.kernel.vfs.is_shared(ino) {
            return Ok(());
        }
        self.fault(&SysCall::Share { pid: self.pid, write })
    }
}

impl Kernel {
    /// Changes the file system on behalf of a process.
    pub(super) fn on_vfs<T>(
        &mut self,
        pid: u32,
        change: impl FnOnce(&mut Vfs, &Caller<'_>) -> SysResult<T>,
    ) -> SysResult<T> {
        let Caller { uid, gid, cwd, umask, now_ns, .. } = self.caller(pid);
        let processes = &self.processes;
        change(&mut self.vfs, &Caller { pid, uid, gid, cwd, umask, now_ns, processes })
    }

    pub(super) fn read_file(&mut self, file: u32, max: usize) -> SysResult<Bytes> {
        let open = self.files.get_mut(&file).ok_or(Errno::BADF)?;
        let bytes = match &open.what {
            Opened::Inode(ino) => self.vfs.read_at(*ino, open.offset, max)?,
            Opened::Proc { content, .. } => {
                let from = usize::try_from(open.offset).unwrap_or(usize::MAX).min(content.len());
                content.slice(from..content.len().min(from.saturating_add(max)))
            }
            Opened::Device(Device::Null | Device::Tty | Device::Console) => Bytes::new(),
            Opened::Device(Device::Zero | Device::Full) => zeros(max),
            Opened::Device(Device::Random) => {
                let mut bytes = vec![0; max.min(64 << 10)];
                self.pool.fill(&mut bytes);
                bytes.into()
            }
            Opened::PipeRead(pipe) => {
                let pipe = self.pipes.get_mut(pipe).ok_or(Errno::IO)?;
                return match pipe.read(max) {
                    None => Ok(Bytes::new()),
                    Some(bytes) if bytes.is_empty() && max > 0 => Err(Errno::AGAIN),
                    Some(bytes) => Ok(bytes),
                };
            }
            Opened::Pty(pty) => {
                let pty = self.ptys.get_mut(pty).ok_or(Errno::IO)?;
                return pty.slave_read(max).ok_or(Errno::AGAIN);
            }
            Opened::Socket(socket) => return self.sockets.read(*socket, max),
            Opened::PipeWrite(_) | Opened::Listener(_) => return Err(Errno::BADF),
        };
        open.offset += bytes.len() as u64;
        Ok(bytes)
    }

    pub(super) fn write_file(&mut self, file: u32, bytes: Bytes) -> SysResult<usize> {
        let now = self.wall_ns();
        let open = self.files.get_mut(&file).ok_or(Errno::BADF)?;
        let taken = match &open.what {
            Opened::Inode(ino) => {
                let end = self.vfs.inode(*ino)?.size();
                let at = if open.flags.append { end } else { open.offset };
                let taken = self.vfs.write_at(*ino, at, bytes, now)?;
                open.offset = at + taken as u64;
                return Ok(taken);
            }
            Opened::Proc { node, .. } => {
                let node = *node;
                return self.proc_write(node, &bytes);
            }
            Opened::Device(Device::Full) => return Err(Errno::NOSPC),
            Opened::Device(Device::Console) => {
                for line in String::from_utf8_lossy(&bytes).lines() {
                    self.log(line);
                }
                return Ok(bytes.len());
            }
            Opened::Device(Device::Random) => return Ok(bytes.len()),
            Opened::Device(_) => return Ok(bytes.len()),
            Opened::PipeWrite(pipe) => {
                self.pipes.get_mut(pipe).map_or(Taken::Broken, |pipe: &mut Pipe| pipe.write(bytes))
            }
            Opened::Pty(pty) => match self.ptys.get_mut(pty).map(|pty| pty.slave_write(&bytes)) {
                None | Some(Taken::Broken) => return Err(Errno::IO),
                Some(taken) => taken,
            },
            Opened::Socket(socket) => return self.sockets.write(*socket, bytes),
            Opened::PipeRead(_) | Opened::Listener(_) => return Err(Errno::BADF),
        };
        match taken {
            Taken::Some(taken) => Ok(taken),
            Taken::Full => Err(Errno::AGAIN),
            Taken::Broken => Err(Errno::PIPE),
        }
    }

    pub(super) fn sync_file_of(&mut self, file: u32) -> SysResult<()> {
        match self.files.get(&file).map(|open| &open.what) {
            Some(Opened::Inode(ino)) => {
                let ino = *ino;
                self.vfs.sync(ino);
                Ok(())
            }
            Some(_) => Err(Errno::INVAL),
            None => Err(Errno::BADF),
        }
    }
}
