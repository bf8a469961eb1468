//! Processes: their table, their files, their end.

use super::{
    kernel::Kernel,
    limits::{self, Limits},
    pipe::Pipe,
    program::{ProgramSlot, WaitFor},
    sockets::Address,
    tree::Device,
    vfs::{Caller, Ino, OpenFlags},
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{sync::Arc, time::Duration};
use vm_guest_agent::os::{Child, ChildExit, Errno, SysResult};

/// What a process takes beside what its program allocates.
pub(super) const PROCESS_MEMORY: u64 = 64 << 10;
const MAX_PID: u32 = 32_768;

/// The agent's pid.
pub(super) const AGENT: u32 = 1;

/// An environment, in the order it was given.
pub(super) type Environment = Arc<Vec<(String, String)>>;

/// A process, or what is left of one that its parent has not waited for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Process {
    pub(super) parent: u32,
    pub(super) group: u32,
    pub(super) session: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) umask: u32,
    pub(super) cwd: Ino,
    pub(super) argv: Arc<Vec<String>>,
    pub(super) env: Environment,
    pub(super) fds: Vec<Option<Descriptor>>,
    pub(super) program: ProgramSlot,
    pub(super) exit: Option<ChildExit>,
    pub(super) wait: Option<WaitFor>,
    pub(super) stall_until: Option<Duration>,
    pub(super) stopped: bool,
    pub(super) hung: bool,
    pub(super) ignored: u64,
    pub(super) caught: u64,
    pub(super) pending: u64,
    pub(super) memory: u64,
    pub(super) limits: Limits,
    pub(super) tty: Option<u32>,
    pub(super) child_of_agent: Option<Child>,
}

/// A process's name for an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Descriptor {
    pub(super) file: u32,
    pub(super) close_on_exec: bool,
}

/// An open file, which descriptors share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct OpenFile {
    pub(super) refs: u32,
    pub(super) flags: OpenFlags,
    pub(super) offset: u64,
    pub(super) what: Opened,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Opened {
    Inode(Ino),
    Device(Device),
    Proc {
        node: u32,
        content: Bytes,
    },
    PipeRead(u32),
    PipeWrite(u32),
    Pty(u32),
    /// Where is listened.
    Listener(Address),
    Socket(u32),
}

impl Process {
    pub(super) fn is_alive(&self) -> bool {
        self.exit.is_none()
    }

    pub(super) fn state_letter(&self) -> char {
        match self {
            Self { exit: Some(_), .. } => 'Z',
            Self { stopped: true, .. } => 'T',
            Self { wait: Some(_), .. } => 'S',
            _ => 'R',
        }
    }

    /// Gives what a child begins with: it shares the caller's place in the world, but none of its open files.
    pub(super) fn child(&self, pid: u32, program: ProgramSlot) -> Self {
        Self {
            parent: pid,
            group: self.group,
            session: self.session,
            uid: self.uid,
            gid: self.gid,
            umask: self.umask,
            cwd: self.cwd,
            argv: Arc::clone(&self.argv),
            env: Arc::clone(&self.env),
            fds: Vec::new(),
            program,
            exit: None,
            wait: None,
            stall_until: None,
            stopped: false,
            hung: false,
            ignored: self.ignored,
            caught: 0,
            pending: 0,
            memory: PROCESS_MEMORY,
            limits: self.limits.clone(),
            tty: self.tty,
            child_of_agent: None,
        }
    }
}

impl Kernel {
    pub(super) fn caller(&self, pid: u32) -> Caller<'_> {
        let process = self.processes.get(&pid);
        Caller {
            pid,
            uid: process.map_or(0, |it| it.uid),
            gid: process.map_or(0, |it| it.gid),
            cwd: process.map_or(self.vfs.top, |it| it.cwd),
            umask: process.map_or(0, |it| it.umask),
            now_ns: self.wall_ns(),
            processes: &self.processes,
        }
    }

    /// Adds a process to the table.
    pub(super) fn add_process(&mut self, process: Process) -> SysResult<u32> {
        if self.processes.len() >= self.max_processes as usize {
            return Err(Errno::AGAIN);
        }
        // Linux does not limit root's.
        let of_user = |it: &&Process| it.uid == process.uid && it.is_alive();
        let count = || self.processes.values().filter(of_user).count() as u64;
        if process.uid != 0 && count() >= process.limits.soft(limits::NPROC) {
            return Err(Errno::AGAIN);
        }
        if self.vfs.memory().saturating_sub(self.vfs.memory_used()) < process.memory {
            return Err(Errno::NOMEM);
        }
        let mut pid = self.last_pid;
        loop {
            pid = if pid + 1 >= MAX_PID { 2 } else { pid + 1 };
            let taken = self.processes.contains_key(&pid)
                || self.processes.values().any(|it| it.group == pid || it.session == pid);
            if !taken {
                break;
            }
        }
        self.last_pid = pid;
        self.vfs.process_memory += process.memory;
        self.vfs.hold(process.cwd);
        self.processes.insert(pid, process);
        Ok(pid)
    }

    /// Ends a process: its files are closed, its children become the agent's.
    pub(super) fn terminate(&mut self, pid: u32, exit: ChildExit) {
        let Some(process) = self.processes.get_mut(&pid).filter(|it| it.is_alive()) else {
            return;
        };
        process.exit = Some(exit);
        process.program = ProgramSlot::Empty;
        process.wait = None;
        process.pending = 0;
        let (fds, cwd) = (std::mem::take(&mut process.fds), process.cwd);
        let (memory, parent) = (std::mem::take(&mut process.memory), process.parent);
        let leads = (process.session == pid).then_some(process.tty).flatten();
        for descriptor in fds.into_iter().flatten() {
            self.close_file(descriptor.file);
        }
        self.vfs.unhold(cwd);
        self.vfs.process_memory = self.vfs.process_memory.saturating_sub(memory);
        if let Some(group) = leads.and_then(|tty| Some(self.ptys.get(&tty)?.group)) {
            self.signal_group(group, super::signals::HUP);
        }
        let orphans: Vec<_> =
            self.processes.iter().filter(|(_, it)| it.parent == pid).map(|(pid, _)| *pid).collect();
        for orphan in orphans {
            if let Some(process) = self.processes.get_mut(&orphan) {
                process.parent = AGENT;
                if !process.is_alive() {
                    self.processes.remove(&orphan);
                }
            }
        }
        if parent == AGENT {
            let is_held = self.processes.get(&pid).is_some_and(|it| it.child_of_agent.is_some());
            if !is_held {
                self.processes.remove(&pid);
            }
        } else {
            self.send_signal(parent, super::signals::CHLD);
        }
    }

    // Open files.

    pub(super) fn add_file(&mut self, what: Opened, flags: OpenFlags) -> u32 {
        match &what {
            Opened::Inode(ino) => self.vfs.hold(*ino),
            Opened::PipeRead(pipe) => self.with_pipe(*pipe, |pipe| pipe.readers += 1),
            Opened::PipeWrite(pipe) => self.with_pipe(*pipe, |pipe| pipe.writers += 1),
            Opened::Pty(pty) => {
                if let Some(pty) = self.ptys.get_mut(pty) {
                    pty.slaves += 1;
                }
            }
            Opened::Device(_) | Opened::Proc { .. } | Opened::Listener(_) | Opened::Socket(_) => {}
        }
        let file = self.next_id();
        self.files.insert(file, OpenFile { refs: 1, flags, offset: 0, what });
        file
    }

    pub(super) fn close_file(&mut self, file: u32) {
        let Some(open) = self.files.get_mut(&file) else { return };
        open.refs -= 1;
        if open.refs > 0 {
            return;
        }
        let Some(open) = self.files.remove(&file) else { return };
        match open.what {
            Opened::Inode(ino) => self.vfs.unhold(ino),
            Opened::PipeRead(pipe) => self.with_pipe(pipe, |pipe| pipe.readers -= 1),
            Opened::PipeWrite(pipe) => self.with_pipe(pipe, |pipe| pipe.writers -= 1),
            Opened::Pty(id) => {
                if let Some(pty) = self.ptys.get_mut(&id) {
                    pty.slaves -= 1;
                    if pty.slaves == 0 && !pty.master {
                        self.ptys.remove(&id);
                    }
                }
            }
            Opened::Listener(address) => self.sockets.close_listener(address),
            Opened::Socket(socket) => self.sockets.close(socket),
            Opened::Device(_) | Opened::Proc { .. } => {}
        }
    }

    pub(super) fn with_pipe(&mut self, id: u32, change: impl FnOnce(&mut Pipe)) {
        if let Some(pipe) = self.pipes.get_mut(&id) {
            change(pipe);
            if pipe.readers == 0 && pipe.writers == 0 {
                self.pipes.remove(&id);
            }
        }
    }

    /// Makes a pipe whose ends are open files.
    pub(super) fn add_pipe(&mut self) -> (u32, u32, u32) {
        let pipe = self.next_id();
        self.pipes.insert(pipe, Pipe::default());
        let reading = OpenFlags { read: true, ..OpenFlags::default() };
        let writing = OpenFlags { write: true, ..OpenFlags::default() };
        let read = self.add_file(Opened::PipeRead(pipe), reading);
        let write = self.add_file(Opened::PipeWrite(pipe), writing);
        (pipe, read, write)
    }

    pub(super) fn file_of(&self, pid: u32, fd: u32) -> SysResult<u32> {
        let process = self.processes.get(&pid).ok_or(Errno::SRCH)?;
        let descriptor = process.fds.get(fd as usize).copied().flatten();
        descriptor.map(|it| it.file).ok_or(Errno::BADF)
    }

    /// Gives an open file the lowest free descriptor from `least` on.
    pub(super) fn install(&mut self, pid: u32, file: u32, least: usize) -> SysResult<u32> {
        let process = self.processes.get_mut(&pid).ok_or(Errno::SRCH)?;
        let mut fd = least;
        while process.fds.get(fd).is_some_and(Option::is_some) {
            fd += 1;
        }
        if fd >= process.max_fds() {
            self.close_file(file);
            return Err(Errno::MFILE);
        }
        if process.fds.len() <= fd {
            process.fds.resize(fd + 1, None);
        }
        process.fds[fd] = Some(Descriptor { file, close_on_exec: false });
        u32::try_from(fd).map_err(|_| Errno::MFILE)
    }

    /// Makes a descriptor name a file, closing what it named before.
    pub(super) fn install_at(&mut self, pid: u32, fd: u32, file: u32) -> SysResult<()> {
        let index = fd as usize;
        let process = self.processes.get_mut(&pid).ok_or(Errno::SRCH)?;
        if index >= process.max_fds() {
            self.close_file(file);
            return Err(Errno::BADF);
        }
        if process.fds.len() <= index {
            process.fds.resize(index + 1, None);
        }
        let old = process.fds[index].replace(Descriptor { file, close_on_exec: false });
        if let Some(old) = old {
            self.close_file(old.file);
        }
        Ok(())
    }

    pub(super) fn share(&mut self, file: u32) {
        if let Some(open) = self.files.get_mut(&file) {
            open.refs += 1;
        }
    }

    pub(super) fn close_fd(&mut self, pid: u32, fd: u32) -> SysResult<()> {
        let process = self.processes.get_mut(&pid).ok_or(Errno::SRCH)?;
        let slot = process.fds.get_mut(fd as usize).and_then(Option::take);
        self.close_file(slot.ok_or(Errno::BADF)?.file);
        Ok(())
    }

    /// Says whether what a process waits for has come.
    pub(super) fn is_ready(&self, pid: u32, wait: &WaitFor) -> bool {
        wait.until.is_some_and(|time| time <= self.now)
            || wait.readable.iter().any(|fd| self.is_fd_ready(pid, *fd, false))
            || wait.writable.iter().any(|fd| self.is_fd_ready(pid, *fd, true))
            || (wait.child && self.has_child_news(pid))
    }

    fn has_child_news(&self, pid: u32) -> bool {
        let mut children = self.processes.values().filter(|it| it.parent == pid).peekable();
        children.peek().is_none() || children.any(|it| !it.is_alive())
    }

    pub(super) fn is_fd_ready(&self, pid: u32, fd: u32, to_write: bool) -> bool {
        let Ok(file) = self.file_of(pid, fd) else { return true };
        match self.files.get(&file).map(|open| &open.what) {
            Some(Opened::PipeRead(pipe)) => {
                to_write || self.pipes.get(pipe).is_none_or(Pipe::is_readable)
            }
            Some(Opened::PipeWrite(pipe)) => {
                !to_write || self.pipes.get(pipe).is_none_or(Pipe::is_writable)
            }
            Some(Opened::Pty(pty)) => self
                .ptys
                .get(pty)
                .is_none_or(|pty| if to_write { pty.is_writable() } else { pty.is_readable() }),
            Some(Opened::Listener(address)) => to_write || self.sockets.has_waiting(*address),
            Some(Opened::Socket(socket)) => self.sockets.is_ready(*socket, to_write),
            _ => true,
        }
    }
}
