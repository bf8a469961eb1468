//! What a program asks of the kernel.

use super::{
    fault::{OsFault, SysCall},
    kernel::{Kernel, SimOs},
    pipe::{Pipe, Taken},
    process::{Descriptor, Environment, Opened, PROCESS_MEMORY, Process},
    program::ProgramSlot,
    rope::zeros,
    signals,
    tree::{Device, program_key},
    vfs::{Ino, PROC_FS},
};
use bytes::Bytes;
use std::{sync::Arc, time::Duration};
use vm_guest_agent::os::{ChildExit, Errno, SysResult};
use vm_guest_protocol::{EntryKind, StatEntry};

pub use super::vfs::OpenFlags;

/// The longest argument list with its environment.
const MAX_ARGUMENTS: usize = 2 << 20;
/// How many interpreters a script may go through.
const MAX_SCRIPTS: u32 = 4;

/// How a file is opened to be read.
pub(super) const READ: OpenFlags = OpenFlags {
    read: true,
    write: false,
    append: false,
    create: false,
    exclusive: false,
    truncate: false,
};

/// Carries a process's system calls. All of them return at once; one that would wait fails with `AGAIN`, and the
/// program answers with [`Step::Block`](super::Step::Block).
#[derive(Debug)]
pub struct Syscalls<'a> {
    os: &'a mut SimOs,
    pid: u32,
    replacement: Option<ProgramSlot>,
}

/// A program to start as a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChildSpec {
    /// The program's file.
    pub path: String,
    /// Arguments with the program's own name first.
    pub argv: Vec<String>,
    /// The environment; the caller's where not given.
    pub env: Option<Vec<(String, String)>>,
    /// The descriptors.
    pub fds: ChildFds,
    /// Whether the child leads a process group of its own.
    pub new_group: bool,
}

/// Which descriptors a child gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ChildFds {
    /// All of the caller's but those that close on exec.
    #[default]
    Inherit,
    /// Just these, each as the child's number and the caller's.
    Only(Vec<(u32, u32)>),
}

/// What a descriptor names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdStat {
    /// A file of this size.
    File {
        /// The size in bytes.
        size: u64,
    },
    /// A directory.
    Directory,
    /// A pipe.
    Pipe,
    /// A terminal.
    Terminal,
    /// A device.
    Device,
}

impl ChildSpec {
    /// Describes a child that has all of the caller's descriptors and environment.
    #[must_use]
    pub fn new(path: impl Into<String>, argv: Vec<String>) -> Self {
        Self { path: path.into(), argv, env: None, fds: ChildFds::Inherit, new_group: false }
    }
}

/// A program's file, and the arguments it is really started with.
pub(super) struct Image {
    pub(super) program: ProgramSlot,
    pub(super) argv: Vec<String>,
}

impl SimOs {
    /// Looks a program up as execve(2) does.
    pub(super) fn image(&self, pid: u32, path: &str, argv: &[String]) -> SysResult<Image> {
        let (mut path, mut argv) = (path.to_owned(), argv.to_vec());
        if argv.iter().map(String::len).sum::<usize>() > MAX_ARGUMENTS {
            return Err(Errno::TOOBIG);
        }
        for _ in 0..=MAX_SCRIPTS {
            let content = self.kernel.executable(pid, &path)?;
            if let Some(key) = program_key(&content) {
                let program = self.programs.start(key, &argv).ok_or(Errno::NOEXEC)?;
                return Ok(Image { program, argv });
            }
            let line = content.strip_prefix(b"#!").ok_or(Errno::NOEXEC)?;
            let line = line.split(|byte| *byte == b'\n').next().unwrap_or(line);
            let line = std::str::from_utf8(line).map_err(|_| Errno::NOEXEC)?.trim();
            let (interpreter, argument) = line.split_once([' ', '\t']).unwrap_or((line, ""));
            if interpreter.is_empty() {
                return Err(Errno::NOEXEC);
            }
            let mut new = vec![interpreter.to_owned()];
            new.extend(Some(argument.trim().to_owned()).filter(|it| !it.is_empty()));
            new.push(path);
            new.extend(argv.into_iter().skip(1));
            (path, argv) = (interpreter.to_owned(), new);
        }
        Err(Errno::LOOP)
    }
}

impl Kernel {
    /// Reads the beginning of a file that the process may execute.
    fn executable(&self, pid: u32, path: &str) -> SysResult<Bytes> {
        let who = self.caller(pid);
        let ino = self.vfs.find(&who, path, true)?;
        if self.vfs.stat_ino(ino)?.kind != EntryKind::File {
            return Err(Errno::ACCES);
        }
        self.vfs.access(&who, ino, 1)?;
        self.vfs.read_at(ino, 0, 4096)
    }
}

impl<'a> Syscalls<'a> {
    pub(super) fn new(os: &'a mut SimOs, pid: u32) -> Self {
        Self { os, pid, replacement: None }
    }

    pub(super) fn take_replacement(&mut self) -> Option<ProgramSlot> {
        self.replacement.take()
    }

    pub(super) fn process_mut(&mut self) -> Option<&mut Process> {
        self.os.kernel.processes.get_mut(&self.pid)
    }

    fn process(&self) -> Option<&Process> {
        self.os.kernel.processes.get(&self.pid)
    }

    fn fault(&mut self, call: &SysCall<'_>) -> SysResult<()> {
        match self.os.faults.ask(call) {
            Some(OsFault::Fail(errno)) => Err(errno),
            Some(OsFault::Slow(time)) => {
                let until = self.os.kernel.now + time;
                if let Some(process) = self.process_mut() {
                    process.stall_until = Some(until);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    // The process itself.

    /// Gives the process's id.
    #[must_use]
    pub fn getpid(&self) -> u32 {
        self.pid
    }

    /// Gives the parent's id.
    #[must_use]
    pub fn getppid(&self) -> u32 {
        self.process().map_or(0, |it| it.parent)
    }

    /// Gives the process group's id.
    #[must_use]
    pub fn getpgrp(&self) -> u32 {
        self.process().map_or(0, |it| it.group)
    }

    /// Gives the user's id.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.process().map_or(0, |it| it.uid)
    }

    /// Gives the group's id.
    #[must_use]
    pub fn gid(&self) -> u32 {
        self.process().map_or(0, |it| it.gid)
    }

    /// Gives the arguments, the program's own name first.
    #[must_use]
    pub fn args(&self) -> Arc<Vec<String>> {
        self.process().map(|it| Arc::clone(&it.argv)).unwrap_or_default()
    }

    /// Gives a variable of the environment.
    #[must_use]
    pub fn getenv(&self, name: &str) -> Option<String> {
        let env = &self.process()?.env;
        env.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    /// Gives the whole environment, in order.
    #[must_use]
    pub fn environment(&self) -> Environment {
        self.process().map(|it| Arc::clone(&it.env)).unwrap_or_default()
    }

    /// Gives the working directory's path.
    ///
    /// # Errors
    /// `NOENT` when it was removed.
    pub fn getcwd(&self) -> SysResult<String> {
        self.os.kernel.vfs.path_of(self.os.kernel.caller(self.pid).cwd)
    }

    /// Changes the working directory.
    ///
    /// # Errors
    /// The kernel's.
    pub fn chdir(&mut self, path: &str) -> SysResult<()> {
        let kernel = &mut self.os.kernel;
        let who = kernel.caller(self.pid);
        let ino = kernel.vfs.find(&who, path, true)?;
        if !kernel.vfs.is_dir(ino) {
            return Err(Errno::NOTDIR);
        }
        kernel.vfs.access(&who, ino, 1)?;
        kernel.vfs.hold(ino);
        if let Some(process) = kernel.processes.get_mut(&self.pid) {
            let old = std::mem::replace(&mut process.cwd, ino);
            kernel.vfs.unhold(old);
        }
        Ok(())
    }

    /// Sets which permission bits new files do not get, and gives what it was.
    pub fn umask(&mut self, mask: u32) -> u32 {
        self.process_mut().map_or(0, |it| std::mem::replace(&mut it.umask, mask & 0o777))
    }

    /// Sets how many bytes the process uses beside its fixed part.
    ///
    /// # Errors
    /// `NOMEM` when the machine has not as much; where a process goes on to ask for it, the kernel has killed it.
    pub fn set_memory(&mut self, bytes: u64) -> SysResult<()> {
        let kernel = &mut self.os.kernel;
        let Some(process) = kernel.processes.get_mut(&self.pid) else { return Err(Errno::SRCH) };
        let (old, new) = (process.memory, PROCESS_MEMORY.saturating_add(bytes));
        let others = kernel.vfs.memory_used().saturating_sub(old);
        if new > old && others.saturating_add(new) > kernel.vfs.memory() {
            kernel.oom_kill(self.pid);
            return Err(Errno::NOMEM);
        }
        process.memory = new;
        kernel.vfs.process_memory = kernel.vfs.process_memory + new - old;
        Ok(())
    }

    /// Catches a signal: it is given to [`GuestProgram::signal`](super::GuestProgram::signal).
    ///
    /// # Errors
    /// `INVAL` for one that cannot be caught.
    pub fn catch_signal(&mut self, signal: u8) -> SysResult<()> {
        self.dispose(signal, false, true)
    }

    /// Ignores a signal; children inherit that.
    ///
    /// # Errors
    /// As for [`catch_signal`](Self::catch_signal).
    pub fn ignore_signal(&mut self, signal: u8) -> SysResult<()> {
        self.dispose(signal, true, false)
    }

    /// Lets a signal do what it does by default.
    ///
    /// # Errors
    /// As for [`catch_signal`](Self::catch_signal).
    pub fn default_signal(&mut self, signal: u8) -> SysResult<()> {
        self.dispose(signal, false, false)
    }

    fn dispose(&mut self, signal: u8, ignore: bool, catch: bool) -> SysResult<()> {
        let bit = signals::bit(signal);
        if bit == 0 || matches!(signal, 9 | 19) {
            return Err(Errno::INVAL);
        }
        if let Some(process) = self.process_mut() {
            let set = |mask: u64, on: bool| if on { mask | bit } else { mask & !bit };
            process.ignored = set(process.ignored, ignore);
            process.caught = set(process.caught, catch);
            process.pending &= !bit;
        }
        Ok(())
    }

    /// Says whether a signal is ignored.
    #[must_use]
    pub fn is_ignored(&self, signal: u8) -> bool {
        self.process().is_some_and(|it| it.ignored & signals::bit(signal) != 0)
    }

    // Clocks, randomness, the machine.

    /// Gives the monotonic clock.
    #[must_use]
    pub fn monotonic(&self) -> Duration {
        self.os.kernel.now
    }

    /// Gives the wall clock, as time since the Unix epoch.
    #[must_use]
    pub fn wall_clock(&self) -> Duration {
        self.os.wall_clock()
    }

    /// Fills bytes from the random pool.
    pub fn urandom(&mut self, bytes: &mut [u8]) {
        self.os.kernel.pool.fill(bytes);
    }

    /// Gives the host name.
    #[must_use]
    pub fn hostname(&self) -> String {
        self.os.kernel.hostname.to_string()
    }

    /// Sets the host name.
    ///
    /// # Errors
    /// `PERM` for all but root; `INVAL` where it is too long.
    pub fn set_hostname(&mut self, name: &str) -> SysResult<()> {
        if self.uid() != 0 {
            return Err(Errno::PERM);
        }
        if name.len() > 64 {
            return Err(Errno::INVAL);
        }
        self.os.kernel.hostname = name.into();
        Ok(())
    }

    /// Counts the virtual CPUs.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.os.kernel.vcpus
    }

    /// Turns the machine off, with what is not durable lost.
    ///
    /// # Errors
    /// `PERM` for all but root.
    pub fn power_off(&mut self) -> SysResult<()> {
        if self.uid() != 0 {
            return Err(Errno::PERM);
        }
        self.os.kernel.power_off();
        Ok(())
    }

    /// Resets the machine, with what is not durable lost.
    ///
    /// # Errors
    /// `PERM` for all but root.
    pub fn reboot(&mut self) -> SysResult<()> {
        if self.uid() != 0 {
            return Err(Errno::PERM);
        }
        self.os.kernel.reboot();
        Ok(())
    }

    /// Makes all disks durable.
    pub fn sync_all(&mut self) {
        self.os.kernel.vfs.sync_all();
    }

    // Descriptors.

    /// Opens a file; `mode` is for one that is made.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(&mut self, path: &str, flags: OpenFlags, mode: u32) -> SysResult<u32> {
        self.fault(&SysCall::Open { pid: self.pid, path, write: flags.write })?;
        let what = self.open_what(path, flags, mode)?;
        let kernel = &mut self.os.kernel;
        let file = kernel.add_file(what, flags);
        kernel.install(self.pid, file, 0)
    }

    fn open_what(&mut self, path: &str, flags: OpenFlags, mode: u32) -> SysResult<Opened> {
        let kernel = &mut self.os.kernel;
        let who = super::vfs::Caller { processes: &kernel.processes, ..kernel.caller(self.pid) };
        let ino = kernel.vfs.open(&who, path, flags, mode)?;
        if ino.fs == PROC_FS {
            let content = if flags.read { kernel.proc_content(ino.node)? } else { Bytes::new() };
            return Ok(Opened::Proc { node: ino.node, content });
        }
        let super::tree::Body::Device(device) = kernel.vfs.inode(ino)?.body else {
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
        if matches!(open.what, Opened::Inode(_)) {
            self.fault(&SysCall::Read { pid: self.pid })?;
        }
        self.os.kernel.read_file(file, max)
    }

    /// Writes bytes, and says how many were taken.
    ///
    /// # Errors
    /// The kernel's; `AGAIN` when there is no room yet; `PIPE` with the signal when nobody reads.
    pub fn write(&mut self, fd: u32, bytes: impl Into<Bytes>) -> SysResult<usize> {
        let bytes = bytes.into();
        let file = self.os.kernel.file_of(self.pid, fd)?;
        let open = self.os.kernel.files.get(&file).ok_or(Errno::BADF)?;
        if !open.flags.write {
            return Err(Errno::BADF);
        }
        if matches!(open.what, Opened::Inode(_)) {
            self.fault(&SysCall::Write { pid: self.pid, len: bytes.len() })?;
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
        kernel.vfs.set_len(ino, len, now)
    }

    // Children.

    /// Starts a program as a child.
    ///
    /// # Errors
    /// The kernel's, those of execve(2) among them.
    pub fn spawn(&mut self, spec: ChildSpec) -> SysResult<u32> {
        self.fault(&SysCall::Spawn { pid: self.pid, path: &spec.path })?;
        let image = self.os.image(self.pid, &spec.path, &spec.argv)?;
        let parent = self.process().ok_or(Errno::SRCH)?;
        let mut child = parent.child(self.pid, image.program);
        child.argv = Arc::new(image.argv);
        if let Some(env) = spec.env {
            child.env = Arc::new(env);
        }
        child.fds = match &spec.fds {
            ChildFds::Inherit => inherited(&parent.fds),
            ChildFds::Only(pairs) => {
                let mut fds = Vec::new();
                for (own, of_parent) in pairs {
                    let slot = parent.fds.get(*of_parent as usize).copied().flatten();
                    let index = *own as usize;
                    if index >= 1024 {
                        return Err(Errno::BADF);
                    }
                    if fds.len() <= index {
                        fds.resize(index + 1, None);
                    }
                    let file = slot.ok_or(Errno::BADF)?.file;
                    fds[index] = Some(Descriptor { file, close_on_exec: false });
                }
                fds
            }
        };
        self.start(child, spec.new_group)
    }

    /// Gives the system calls of a child that was just forked, to set it up.
    pub(super) fn for_child(&mut self, pid: u32) -> Syscalls<'_> {
        Syscalls::new(self.os, pid)
    }

    /// Opens a file without a name that holds this text.
    pub(super) fn memory_file(&mut self, text: String) -> SysResult<u32> {
        let kernel = &mut self.os.kernel;
        let content = text.into();
        let file = kernel.add_file(Opened::Proc { node: u32::MAX, content }, READ);
        kernel.install(self.pid, file, 0)
    }

    /// Starts a child that runs this state of a program, with all of the caller's descriptors, as fork(2) does.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn fork(&mut self, program: ProgramSlot) -> SysResult<u32> {
        let parent = self.process().ok_or(Errno::SRCH)?;
        let mut child = parent.child(self.pid, program);
        child.fds.clone_from(&parent.fds);
        self.start(child, false)
    }

    fn start(&mut self, child: Process, new_group: bool) -> SysResult<u32> {
        let kernel = &mut self.os.kernel;
        let files: Vec<_> = child.fds.iter().flatten().map(|it| it.file).collect();
        let pid = kernel.add_process(child)?;
        files.into_iter().for_each(|file| kernel.share(file));
        if let Some(process) = kernel.processes.get_mut(&pid).filter(|_| new_group) {
            process.group = pid;
        }
        Ok(pid)
    }

    /// Makes the process run another program. The caller must end its step with `Continue`.
    ///
    /// # Errors
    /// The kernel's, those of execve(2).
    pub(super) fn exec(
        &mut self,
        path: &str,
        argv: &[String],
        env: Vec<(String, String)>,
    ) -> SysResult<()> {
        self.fault(&SysCall::Spawn { pid: self.pid, path })?;
        let image = self.os.image(self.pid, path, argv)?;
        let kernel = &mut self.os.kernel;
        let Some(process) = kernel.processes.get_mut(&self.pid) else { return Err(Errno::SRCH) };
        process.argv = Arc::new(image.argv);
        process.env = Arc::new(env);
        process.caught = 0;
        process.pending = 0;
        let freed = std::mem::replace(&mut process.memory, PROCESS_MEMORY);
        kernel.vfs.process_memory =
            (kernel.vfs.process_memory + PROCESS_MEMORY).saturating_sub(freed);
        let mut closed = Vec::new();
        for slot in &mut process.fds {
            closed.extend(slot.take_if(|descriptor| descriptor.close_on_exec));
        }
        closed.into_iter().for_each(|descriptor| kernel.close_file(descriptor.file));
        self.replacement = Some(image.program);
        Ok(())
    }

    /// Reaps a child that has ended: the one given, or any. `None` while none has.
    ///
    /// # Errors
    /// `CHILD` when there is no such child.
    pub fn wait_child(&mut self, pid: Option<u32>) -> SysResult<Option<(u32, ChildExit)>> {
        let processes = &mut self.os.kernel.processes;
        let mut children = processes
            .iter()
            .filter(|(own, it)| it.parent == self.pid && pid.is_none_or(|pid| pid == **own))
            .peekable();
        if children.peek().is_none() {
            return Err(Errno::CHILD);
        }
        let ended = children.find_map(|(pid, it)| Some((*pid, it.exit?)));
        if let Some((pid, _)) = ended {
            processes.remove(&pid);
        }
        Ok(ended)
    }

    /// Sends a signal as kill(2) does; 0 asks whether the target is there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn kill(&mut self, target: i64, signal: u8) -> SysResult<()> {
        self.os.kernel.kill(self.pid, target, signal)
    }

    // Files by path.

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
            super::tree::Body::File(rope) => Ok(rope.to_bytes()),
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
        change: impl FnOnce(&mut super::vfs::Vfs, &super::vfs::Caller<'_>, Ino) -> SysResult<()>,
    ) -> SysResult<()> {
        self.os.kernel.on_vfs(self.pid, |vfs, who| {
            let ino = vfs.find(who, path, true)?;
            change(vfs, who, ino)
        })
    }
}

fn inherited(fds: &[Option<Descriptor>]) -> Vec<Option<Descriptor>> {
    fds.iter().map(|slot| slot.filter(|it| !it.close_on_exec)).collect()
}

impl Kernel {
    /// Changes the file system on behalf of a process.
    pub(super) fn on_vfs<T>(
        &mut self,
        pid: u32,
        change: impl FnOnce(&mut super::vfs::Vfs, &super::vfs::Caller<'_>) -> SysResult<T>,
    ) -> SysResult<T> {
        let super::vfs::Caller { uid, gid, cwd, umask, now_ns, .. } = self.caller(pid);
        let processes = &self.processes;
        change(&mut self.vfs, &super::vfs::Caller { pid, uid, gid, cwd, umask, now_ns, processes })
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
            Opened::PipeWrite(_) => return Err(Errno::BADF),
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
            Opened::PipeRead(_) => return Err(Errno::BADF),
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
