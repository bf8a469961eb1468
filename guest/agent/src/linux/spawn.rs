//! Starting a program: fork, the steps in the child, exec.
#![allow(unsafe_code)]

use super::{Scope, errno, ffi};
use crate::os::{Errno, Output, SpawnSpec, SysResult};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid},
    io::Errno as Sys,
    pipe::PipeFlags,
    process::{Pid, Signal},
    pty::OpenptFlags,
    termios::Winsize,
};
use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    time::Duration,
};
use vm_guest_protocol::TermSize;

/// How often a program file that is open for writing is tried again, and how long after.
const BUSY_TRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(2);

/// What a started program left with us.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) pid: Pid,
    pub(super) ends: Ends,
}

/// Our ends of a program's standard input and output, all non-blocking and closed on exec.
#[derive(Debug)]
pub(super) enum Ends {
    /// Pipes.
    Pipes { stdin: Option<OwnedFd>, stdout: Option<OwnedFd>, stderr: Option<OwnedFd> },
    /// The terminal's master.
    Terminal(OwnedFd),
}

impl Ends {
    /// Gives the descriptor to read an output from.
    pub(super) fn output(&self, output: Output) -> Option<BorrowedFd<'_>> {
        match (self, output) {
            (Self::Pipes { stdout, .. }, Output::Stdout) => stdout.as_ref().map(AsFd::as_fd),
            (Self::Pipes { stderr, .. }, Output::Stderr) => stderr.as_ref().map(AsFd::as_fd),
            (Self::Terminal(master), Output::Stdout) => Some(master.as_fd()),
            (Self::Terminal(_), Output::Stderr) => None,
        }
    }

    /// Gives the descriptor to write input to.
    pub(super) fn input(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Pipes { stdin, .. } => stdin.as_ref().map(AsFd::as_fd),
            Self::Terminal(master) => Some(master.as_fd()),
        }
    }

    /// Gives the terminal's master.
    pub(super) fn terminal(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Pipes { .. } => None,
            Self::Terminal(master) => Some(master.as_fd()),
        }
    }
}

/// Starts a program as leader of its own session. In [`Scope::Descendants`] the kernel kills it when this thread ends;
/// in [`Scope::Machine`] it is not spared, as the agent is, when memory runs out.
pub(super) fn spawn(spec: &SpawnSpec, scope: Scope) -> SysResult<Started> {
    let mut tries = 0;
    loop {
        match spawn_once(spec, scope) {
            // Another process may hold the file for a moment between its fork and its exec.
            Err(Errno(code)) if code == Sys::TXTBSY.raw_os_error() && tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(BUSY_PAUSE);
            }
            other => return other,
        }
    }
}

/// Sets a terminal's size, and tells its foreground processes.
pub(super) fn set_size(master: BorrowedFd<'_>, size: TermSize) -> SysResult<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(master, size).map_err(errno)
}

fn spawn_once(spec: &SpawnSpec, scope: Scope) -> SysResult<Started> {
    let image = ffi::ExecImage::new(&spec.path, &spec.argv, &spec.env)?;
    let cwd = CString::new(spec.cwd.as_str()).map_err(|_| Errno::INVAL)?;
    let mut command = Command::new(&spec.path);
    command.env_clear();
    let (ends, terminal) = match spec.tty {
        Some(size) => (attach_terminal(&mut command, size)?, true),
        None => (attach_pipes(&mut command, spec.stdin)?, false),
    };
    let ids = other_ids(spec)?;
    let parent = rustix::process::getpid();
    let in_child = move || -> io::Result<()> {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        if scope == Scope::Machine {
            // Before the user changes, who could not write it. A kernel without it spares nobody.
            let _ = write_own(c"/proc/self/oom_score_adj", b"0");
        }
        if let Some((uid, gid)) = ids {
            become_user(uid, gid)?;
        }
        rustix::process::chdir(cwd.as_c_str())?;
        if scope == Scope::Descendants {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(Sys::SRCH.into());
            }
        }
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        ffi::reset_signals();
        ffi::close_others_on_exec();
        // Not left to the library: execvp(3) would run a file without a known format as a shell script.
        Err(image.execute())
    };
    // SAFETY: between fork and exec the closure only makes system calls, on values laid out before the fork; it
    // takes no lock and does not allocate.
    unsafe { command.pre_exec(in_child) };
    let child = command.spawn().map_err(|error| error_of(&error))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
    Ok(Started { pid, ends })
}

/// Becomes another user without supplementary groups, for good. Safe between fork and exec.
fn become_user(uid: u32, gid: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

/// Writes to a file of the kernel's about this process. Safe between fork and exec.
fn write_own(path: &CStr, bytes: &[u8]) -> rustix::io::Result<usize> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::io::write(rustix::fs::open(path, flags, Mode::empty())?, bytes)
}

/// Gives the user to become, or `None` where that is what we are.
fn other_ids(spec: &SpawnSpec) -> SysResult<Option<(u32, u32)>> {
    let Some((uid, gid)) = spec.ids else {
        return Ok(None);
    };
    if rustix::process::geteuid().is_root() {
        return Ok(Some((uid, gid)));
    }
    let own = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    if own == (uid, gid) { Ok(None) } else { Err(Errno::PERM) }
}

fn attach_pipes(command: &mut Command, stdin: bool) -> SysResult<Ends> {
    let stdin = if stdin {
        let (reader, writer) = pipe()?;
        command.stdin(Stdio::from(reader));
        Some(ours(writer)?)
    } else {
        command.stdin(Stdio::null());
        None
    };
    let (stdout, writer) = pipe()?;
    command.stdout(Stdio::from(writer));
    let (stderr, writer) = pipe()?;
    command.stderr(Stdio::from(writer));
    Ok(Ends::Pipes { stdin, stdout: Some(ours(stdout)?), stderr: Some(ours(stderr)?) })
}

fn attach_terminal(command: &mut Command, size: TermSize) -> SysResult<Ends> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).map_err(errno)?;
    rustix::pty::unlockpt(&master).map_err(errno)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(errno)?;
    set_size(master.as_fd(), size)?;
    command.stdin(Stdio::from(slave.try_clone().map_err(|error| error_of(&error))?));
    command.stdout(Stdio::from(slave.try_clone().map_err(|error| error_of(&error))?));
    command.stderr(Stdio::from(slave));
    Ok(Ends::Terminal(ours(master)?))
}

fn pipe() -> SysResult<(OwnedFd, OwnedFd)> {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(errno)
}

fn ours(end: OwnedFd) -> SysResult<OwnedFd> {
    let flags = rustix::fs::fcntl_getfl(&end).map_err(errno)?;
    rustix::fs::fcntl_setfl(&end, flags | OFlags::NONBLOCK).map_err(errno)?;
    Ok(end)
}

fn error_of(error: &io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(Errno::IO.0))
}
