//! The seam to the agent.

use super::{
    fault::{OsFault, SysCall},
    kernel::{AgentChild, SimOs},
    limits::Limits,
    pipe::Taken,
    process::{AGENT, Descriptor, Opened, PROCESS_MEMORY, Process},
    program::ProgramSlot,
    pty::Pty,
    signals,
    tree::Device,
    vfs::{Caller, OpenFlags},
};
use bytes::Bytes;
use std::{collections::btree_map::Entry, sync::Arc, time::Duration};
use vm_guest_agent::os::{
    Child, ChildExit, Errno, Fd, GuestOs, Output, ReadOutcome, SpawnSpec, Spawned, SysResult,
};
use vm_guest_protocol::{EntryKind, StatEntry, TermSize};
use vm_planted_bugs::{Bug, planted};

/// What a started process's new files are not given.
const UMASK: u32 = 0o022;

impl SimOs {
    fn agent_fault(&mut self, call: &SysCall<'_>) -> SysResult<()> {
        match self.faults.ask(call) {
            Some(OsFault::Fail(errno)) => Err(errno),
            Some(OsFault::Slow(time)) => {
                self.kernel.agent_delay += time;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Makes the process, as yet without files, that a specification describes.
    fn prepare(&mut self, spec: &SpawnSpec) -> SysResult<Process> {
        let (uid, gid) = spec.ids.unwrap_or((0, 0));
        let who = Caller { uid, gid, ..self.kernel.caller(AGENT) };
        let cwd = self.kernel.vfs.find(&who, &spec.cwd, true)?;
        if !self.kernel.vfs.is_dir(cwd) {
            return Err(Errno::NOTDIR);
        }
        self.kernel.vfs.access(&who, cwd, 1)?;
        Ok(Process {
            parent: AGENT,
            group: 0,
            session: 0,
            uid,
            gid,
            umask: UMASK,
            cwd,
            argv: Arc::new(spec.argv.clone()),
            env: Arc::new(spec.env.clone()),
            fds: Vec::new(),
            program: ProgramSlot::Empty,
            exit: None,
            wait: None,
            stall_until: None,
            stopped: false,
            hung: false,
            ignored: 0,
            caught: 0,
            pending: 0,
            memory: PROCESS_MEMORY,
            limits: Limits::of(&spec.limits),
            tty: None,
            child_of_agent: None,
        })
    }

    /// Connects a new process to the agent, by a terminal or by pipes.
    fn connect(&mut self, pid: u32, spec: &SpawnSpec) -> AgentChild {
        let kernel = &mut self.kernel;
        let mut held =
            AgentChild { pid, exit: None, stdin: None, stdout: None, stderr: None, pty: None };
        let both = OpenFlags { read: true, write: true, ..OpenFlags::default() };
        let files = if let Some(size) = spec.tty {
            let pty = kernel.next_id();
            kernel.ptys.insert(pty, Pty::new(size, pid));
            let file = kernel.add_file(Opened::Pty(pty), both);
            kernel.share(file);
            kernel.share(file);
            held.pty = Some(pty);
            [file; 3]
        } else {
            let input = if spec.stdin {
                let (_, read, write) = kernel.add_pipe();
                held.stdin = Some(write);
                read
            } else {
                kernel.add_file(Opened::Device(Device::Null), both)
            };
            let (_, out_read, out_write) = kernel.add_pipe();
            let (_, err_read, err_write) = kernel.add_pipe();
            (held.stdout, held.stderr) = (Some(out_read), Some(err_read));
            [input, out_write, err_write]
        };
        if let Some(process) = kernel.processes.get_mut(&pid) {
            (process.group, process.session, process.tty) = (pid, pid, held.pty);
            let slot = |file| Some(Descriptor { file, close_on_exec: false });
            process.fds = files.into_iter().map(slot).collect();
        }
        held
    }

    fn started_fault(&mut self, held: &AgentChild, path: &str) {
        let pid = held.pid;
        let fault = self.faults.ask(&SysCall::Started { pid, path });
        let kernel = &mut self.kernel;
        match fault {
            Some(OsFault::CutOutput(after)) => {
                for file in [held.stdout, held.stderr].into_iter().flatten() {
                    if let Some(Opened::PipeRead(pipe)) = kernel.files.get(&file).map(|it| &it.what)
                        && let Some(pipe) = kernel.pipes.get_mut(pipe)
                    {
                        pipe.cut_after = Some(after);
                    }
                }
                if let Some(pty) = held.pty.and_then(|pty| kernel.ptys.get_mut(&pty)) {
                    pty.cut_after = Some(after);
                }
            }
            Some(OsFault::Hang) => {
                if let Some(process) = kernel.processes.get_mut(&pid) {
                    process.hung = true;
                }
            }
            Some(OsFault::Kill(signal)) => kernel.terminate(pid, ChildExit::Signaled(signal)),
            Some(OsFault::OomKill) => kernel.oom_kill(pid),
            _ => {}
        }
    }

    fn agent_file(&self, fd: Fd) -> SysResult<u32> {
        self.kernel.agent_files.get(&fd).copied().ok_or(Errno::BADF)
    }

    fn add_agent_file(&mut self, what: Opened, flags: OpenFlags) -> Fd {
        let file = self.kernel.add_file(what, flags);
        loop {
            self.kernel.last_fd = self.kernel.last_fd.wrapping_add(1);
            let fd = Fd(self.kernel.last_fd);
            if let Entry::Vacant(free) = self.kernel.agent_files.entry(fd) {
                free.insert(file);
                return fd;
            }
        }
    }

    fn open_agent_file(&mut self, path: &str, flags: OpenFlags, mode: u32) -> SysResult<Fd> {
        self.agent_fault(&SysCall::Open { pid: AGENT, path, write: flags.write })?;
        if self.kernel.leads_to_share(AGENT, path) {
            self.agent_fault(&SysCall::Share { pid: AGENT, write: false })?;
        }
        let ino = self.kernel.on_vfs(AGENT, |vfs, who| vfs.open(who, path, flags, mode))?;
        if self.kernel.vfs.is_dir(ino) {
            return Err(Errno::ISDIR);
        }
        let what = if ino.fs == super::vfs::PROC_FS {
            Opened::Proc { node: ino.node, content: self.kernel.proc_content(ino.node)? }
        } else if let super::tree::Body::Device(device) = self.kernel.vfs.inode(ino)?.body {
            Opened::Device(device)
        } else {
            Opened::Inode(ino)
        };
        Ok(self.add_agent_file(what, flags))
    }

    /// Lets faults of the host's happen where the agent works on a directory of the host.
    fn agent_fault_of_file(&mut self, file: u32, write: bool) -> SysResult<()> {
        match self.kernel.files.get(&file).map(|open| &open.what) {
            Some(Opened::Inode(ino)) if self.kernel.vfs.is_shared(*ino) => {
                self.agent_fault(&SysCall::Share { pid: AGENT, write })
            }
            _ => Ok(()),
        }
    }

    /// Signals the terminal's foreground group as typed characters ask.
    fn type_signals(&mut self, pty: u32, typed: Vec<u8>) {
        if let Some(group) = self.kernel.ptys.get(&pty).map(|pty| pty.group) {
            for signal in typed {
                self.kernel.signal_group(group, signal);
            }
        }
    }
}

impl GuestOs for SimOs {
    fn monotonic(&self) -> Duration {
        self.kernel.now
    }

    fn set_wall_clock(&mut self, since_epoch: Duration) -> SysResult<()> {
        let nanoseconds = |time: Duration| i128::try_from(time.as_nanos()).unwrap_or(i128::MAX);
        self.kernel.wall_offset_ns = nanoseconds(since_epoch) - nanoseconds(self.kernel.now);
        Ok(())
    }

    fn reseed(&mut self, entropy: &[u8; 32]) -> SysResult<()> {
        self.kernel.pool.reseed(entropy);
        Ok(())
    }

    fn spawn(&mut self, spec: &SpawnSpec) -> SysResult<Spawned> {
        self.agent_fault(&SysCall::Spawn { pid: AGENT, path: &spec.path })?;
        let process = self.prepare(spec)?;
        let pid = self.kernel.add_process(process)?;
        // The program is looked up with the ids and the directory of the new process.
        let image = match self.image(pid, &spec.path, &spec.argv) {
            Ok(image) => image,
            Err(errno) => {
                self.kernel.terminate(pid, ChildExit::Exited(127));
                return Err(errno);
            }
        };
        self.kernel.last_child += 1;
        let child = Child(self.kernel.last_child);
        let held = self.connect(pid, spec);
        if let Some(process) = self.kernel.processes.get_mut(&pid) {
            process.program = image.program;
            process.argv = Arc::new(image.argv);
            process.child_of_agent = Some(child);
        }
        self.started_fault(&held, &spec.path);
        self.kernel.children.insert(child, held);
        Ok(Spawned { child, pid })
    }

    fn read_output(&mut self, child: Child, output: Output, max: usize) -> SysResult<ReadOutcome> {
        let held = self.kernel.children.get(&child).ok_or(Errno::BADF)?;
        if let Some(pty) = held.pty {
            if output == Output::Stderr {
                return Ok(ReadOutcome::Eof);
            }
            let pty = self.kernel.ptys.get_mut(&pty).ok_or(Errno::BADF)?;
            return Ok(match pty.master_read(max) {
                None => ReadOutcome::Eof,
                Some(bytes) if bytes.is_empty() => ReadOutcome::WouldBlock,
                Some(bytes) => ReadOutcome::Data(bytes),
            });
        }
        let file = if output == Output::Stdout { held.stdout } else { held.stderr };
        match self.kernel.read_file(file.ok_or(Errno::BADF)?, max) {
            Ok(bytes) if bytes.is_empty() => Ok(ReadOutcome::Eof),
            Ok(bytes) => Ok(ReadOutcome::Data(bytes)),
            Err(Errno::AGAIN) => Ok(ReadOutcome::WouldBlock),
            Err(errno) => Err(errno),
        }
    }

    fn write_stdin(&mut self, child: Child, bytes: &[u8]) -> SysResult<usize> {
        let held = self.kernel.children.get(&child).ok_or(Errno::BADF)?;
        if let Some(id) = held.pty {
            let pty = self.kernel.ptys.get_mut(&id).ok_or(Errno::BADF)?;
            if pty.slaves == 0 {
                return Err(Errno::PIPE);
            }
            let (taken, typed) = pty.type_bytes(bytes);
            self.type_signals(id, typed);
            return Ok(taken);
        }
        let file = held.stdin.ok_or(Errno::BADF)?;
        let Some(Opened::PipeWrite(pipe)) = self.kernel.files.get(&file).map(|it| &it.what) else {
            return Err(Errno::BADF);
        };
        let pipe = self.kernel.pipes.get_mut(pipe).ok_or(Errno::PIPE)?;
        match pipe.write_some(Bytes::copy_from_slice(bytes)) {
            Taken::Some(taken) => Ok(taken),
            Taken::Full => Ok(0),
            Taken::Broken => Err(Errno::PIPE),
        }
    }

    fn close_stdin(&mut self, child: Child) {
        let Some(held) = self.kernel.children.get_mut(&child) else { return };
        if let Some(pty) = held.pty.and_then(|pty| self.kernel.ptys.get_mut(&pty)) {
            pty.type_eof();
            return;
        }
        if let Some(file) = held.stdin.take() {
            self.kernel.close_file(file);
        }
    }

    fn resize(&mut self, child: Child, size: TermSize) -> SysResult<()> {
        let held = self.kernel.children.get(&child).ok_or(Errno::BADF)?;
        let pty = held.pty.and_then(|pty| self.kernel.ptys.get_mut(&pty)).ok_or(Errno::NOTTY)?;
        if pty.size != (size.rows, size.cols) {
            pty.size = (size.rows, size.cols);
            let group = pty.group;
            if !planted(Bug::ResizeIsSilent) {
                self.kernel.signal_group(group, signals::WINCH);
            }
        }
        Ok(())
    }

    fn signal_group(&mut self, child: Child, signal: u8) -> SysResult<()> {
        let held = self.kernel.children.get(&child).ok_or(Errno::SRCH)?;
        if held.exit.is_some() {
            return Err(Errno::SRCH);
        }
        let group = held.pid;
        if self.kernel.signal_group(group, signal) { Ok(()) } else { Err(Errno::SRCH) }
    }

    fn try_wait(&mut self, child: Child) -> Option<ChildExit> {
        let held = self.kernel.children.get_mut(&child)?;
        if held.exit.is_none() {
            let process = self.kernel.processes.get(&held.pid)?;
            held.exit = process.exit;
            if planted(Bug::StatusOfAnother) && process.exit.is_some() {
                held.exit = self.kernel.processes.values().rev().find_map(|other| other.exit);
            }
            if held.exit.is_some() {
                self.kernel.processes.remove(&held.pid);
            }
        }
        held.exit
    }

    fn release(&mut self, child: Child) {
        let Some(held) = self.kernel.children.remove(&child) else { return };
        for file in [held.stdin, held.stdout, held.stderr].into_iter().flatten() {
            self.kernel.close_file(file);
        }
        if let Some(id) = held.pty
            && let Some(pty) = self.kernel.ptys.get_mut(&id)
        {
            pty.master = false;
            let (group, unused) = (pty.group, pty.slaves == 0);
            if unused {
                self.kernel.ptys.remove(&id);
            } else {
                self.kernel.signal_group(group, signals::HUP);
            }
        }
        if held.exit.is_none()
            && let Some(process) = self.kernel.processes.get_mut(&held.pid)
        {
            process.child_of_agent = None;
            if !process.is_alive() {
                self.kernel.processes.remove(&held.pid);
            }
        }
    }

    fn signal_all(&mut self, signal: u8) {
        let pids: Vec<_> = self.kernel.processes.keys().copied().collect();
        pids.into_iter().for_each(|pid| self.kernel.send_signal(pid, signal));
    }

    fn has_processes(&mut self) -> bool {
        self.kernel.processes.values().any(Process::is_alive)
    }

    fn open_read(&mut self, path: &str) -> SysResult<Fd> {
        let flags = OpenFlags { read: true, ..OpenFlags::default() };
        self.open_agent_file(path, flags, 0)
    }

    fn create_new(&mut self, path: &str, mode: u32) -> SysResult<Fd> {
        let flags =
            OpenFlags { write: true, create: true, exclusive: true, ..OpenFlags::default() };
        self.open_agent_file(path, flags, mode & 0o7777)
    }

    fn read(&mut self, fd: Fd, max: usize) -> SysResult<Bytes> {
        self.agent_fault(&SysCall::Read { pid: AGENT })?;
        let file = self.agent_file(fd)?;
        self.agent_fault_of_file(file, false)?;
        self.kernel.read_file(file, max)
    }

    fn write_all(&mut self, fd: Fd, bytes: &[u8]) -> SysResult<()> {
        self.agent_fault(&SysCall::Write { pid: AGENT, len: bytes.len() })?;
        let file = self.agent_file(fd)?;
        self.agent_fault_of_file(file, true)?;
        let mut rest = Bytes::copy_from_slice(bytes);
        while !rest.is_empty() {
            let taken = self.kernel.write_file(file, rest.clone())?;
            rest = rest.slice(taken..);
        }
        Ok(())
    }

    fn sync_file(&mut self, fd: Fd) -> SysResult<()> {
        self.agent_fault(&SysCall::Sync { pid: AGENT })?;
        let file = self.agent_file(fd)?;
        self.agent_fault_of_file(file, false)?;
        self.kernel.sync_file_of(file)
    }

    fn set_owner_and_mode(
        &mut self,
        fd: Fd,
        owner: Option<(u32, u32)>,
        mode: u32,
    ) -> SysResult<()> {
        let file = self.agent_file(fd)?;
        let Some(Opened::Inode(ino)) = self.kernel.files.get(&file).map(|open| &open.what) else {
            return Err(Errno::INVAL);
        };
        let ino = *ino;
        self.kernel.on_vfs(AGENT, |vfs, who| {
            if let Some((uid, gid)) = owner {
                vfs.chown(who, ino, Some(uid), Some(gid))?;
            }
            vfs.chmod(who, ino, mode)
        })
    }

    fn close(&mut self, fd: Fd) {
        if let Some(file) = self.kernel.agent_files.remove(&fd) {
            self.kernel.close_file(file);
        }
    }

    fn sync_dir(&mut self, path: &str) -> SysResult<()> {
        self.agent_fault(&SysCall::Sync { pid: AGENT })?;
        let ino = self.kernel.vfs.find(&self.kernel.caller(AGENT), path, true)?;
        if !self.kernel.vfs.is_dir(ino) {
            return Err(Errno::NOTDIR);
        }
        self.kernel.vfs.sync(ino);
        Ok(())
    }

    fn lstat(&mut self, path: &str) -> SysResult<StatEntry> {
        self.kernel.vfs.stat(&self.kernel.caller(AGENT), path, false)
    }

    fn stat(&mut self, path: &str) -> SysResult<StatEntry> {
        self.kernel.vfs.stat(&self.kernel.caller(AGENT), path, true)
    }

    fn read_link(&mut self, path: &str) -> SysResult<String> {
        self.kernel.vfs.read_link(&self.kernel.caller(AGENT), path)
    }

    fn read_dir(&mut self, path: &str) -> SysResult<Vec<(String, EntryKind)>> {
        self.kernel.vfs.read_dir(&self.kernel.caller(AGENT), path)
    }

    fn mkdir(&mut self, path: &str, mode: u32) -> SysResult<()> {
        self.kernel.on_vfs(AGENT, |vfs, who| vfs.mkdir(who, path, mode)).map(|_| ())
    }

    fn rmdir(&mut self, path: &str) -> SysResult<()> {
        self.kernel.on_vfs(AGENT, |vfs, who| vfs.rmdir(who, path))
    }

    fn unlink(&mut self, path: &str) -> SysResult<()> {
        self.kernel.on_vfs(AGENT, |vfs, who| vfs.unlink(who, path))
    }

    fn rename(&mut self, from: &str, to: &str) -> SysResult<()> {
        self.kernel.on_vfs(AGENT, |vfs, who| vfs.rename(who, from, to))
    }

    fn sync_all(&mut self) {
        self.kernel.vfs.sync_all();
    }

    fn power_off(&mut self) {
        self.kernel.power_off();
    }
}
