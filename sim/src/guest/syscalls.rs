//! What a program asks of the kernel.

use super::{
    fault::{OsFault, SysCall},
    kernel::{Kernel, SimOs},
    process::{Descriptor, Environment, Opened, PROCESS_MEMORY, Process},
    program::ProgramSlot,
    signals,
    tree::program_key,
};
use bytes::Bytes;
use std::{sync::Arc, time::Duration};
use vm_guest_agent::os::{ChildExit, Errno, SysResult};
use vm_guest_protocol::{EntryKind, MAX_LIMITS};

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
    pub(super) os: &'a mut SimOs,
    pub(super) pid: u32,
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
    /// A connection or listener, over vsock or TCP.
    Socket,
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

    pub(super) fn process(&self) -> Option<&Process> {
        self.os.kernel.processes.get(&self.pid)
    }

    pub(super) fn fault(&mut self, call: &SysCall<'_>) -> SysResult<()> {
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
    /// `NOMEM` when the machine has not as much, the kernel having killed the process, or when its limits forbid it.
    pub fn set_memory(&mut self, bytes: u64) -> SysResult<()> {
        let kernel = &mut self.os.kernel;
        let Some(process) = kernel.processes.get_mut(&self.pid) else { return Err(Errno::SRCH) };
        let (old, new) = (process.memory, PROCESS_MEMORY.saturating_add(bytes));
        if new > old && !process.may_grow_to(new) {
            return Err(Errno::NOMEM);
        }
        let others = kernel.vfs.memory_used().saturating_sub(old);
        if new > old && others.saturating_add(new) > kernel.vfs.memory() {
            kernel.oom_kill(self.pid);
            return Err(Errno::NOMEM);
        }
        process.memory = new;
        kernel.vfs.process_memory = kernel.vfs.process_memory + new - old;
        Ok(())
    }

    /// Gives the soft and the hard limit on a resource, by the number that Linux has for it.
    #[must_use]
    pub fn limit(&self, resource: u8) -> (u64, u64) {
        self.process().map(|it| it.limits.get(resource)).unwrap_or_default()
    }

    /// Sets the soft and the hard limit on a resource.
    ///
    /// # Errors
    /// `INVAL` where the soft one is above the hard one; `PERM` where another user than root raises the hard one.
    pub fn set_limit(&mut self, resource: u8, (soft, hard): (u64, u64)) -> SysResult<()> {
        let process = self.process_mut().ok_or(Errno::SRCH)?;
        if soft > hard || usize::from(resource) >= MAX_LIMITS {
            return Err(Errno::INVAL);
        }
        if hard > process.limits.get(resource).1 && process.uid != 0 {
            return Err(Errno::PERM);
        }
        process.limits.set(resource, (soft, hard));
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
}

fn inherited(fds: &[Option<Descriptor>]) -> Vec<Option<Descriptor>> {
    fds.iter().map(|slot| slot.filter(|it| !it.close_on_exec)).collect()
}
