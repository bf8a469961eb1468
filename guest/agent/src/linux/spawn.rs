//! Starting a program: vfork, the steps in the child, exec.
#![allow(unsafe_code)]

use super::{Scope, errno, ffi};
use crate::os::{Errno, Output, SpawnSpec, SysResult};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid},
    io::Errno as Sys,
    pipe::PipeFlags,
    process::{Pid, Resource, Rlimit, Signal},
    pty::OpenptFlags,
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    termios::Winsize,
};
use std::{
    ffi::CString,
    os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd},
    time::Duration,
};
use vm_guest_protocol::{MAX_LIMITS, ResourceLimit, TermSize};

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

/// Starts a program as leader of its own session, with every signal at its default: `signals` names those that are not
/// in this process. In [`Scope::Descendants`] the kernel kills it when this thread ends.
pub(super) fn spawn(spec: &SpawnSpec, scope: Scope, signals: &[i32]) -> SysResult<Started> {
    let mut tries = 0;
    loop {
        match spawn_once(spec, scope, signals) {
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

fn spawn_once(spec: &SpawnSpec, scope: Scope, signals: &[i32]) -> SysResult<Started> {
    let image = ffi::ExecImage::new(&spec.path, &spec.argv, &spec.env)?;
    let cwd = CString::new(spec.cwd.as_str()).map_err(|_| Errno::INVAL)?;
    let (ends, theirs) = match spec.tty {
        Some(size) => terminal(size)?,
        None => pipes(spec.stdin)?,
    };
    let ids = other_ids(spec)?;
    let limits = spec.limits.iter().map(limit_of).collect::<SysResult<Vec<_>>>()?;
    let parent = rustix::process::getpid();
    let prepare = || -> rustix::io::Result<()> {
        rustix::process::setsid()?;
        theirs.become_standard()?;
        // Another user might not raise them.
        for (resource, limit) in &limits {
            rustix::process::setrlimit(*resource, *limit)?;
        }
        if let Some((uid, gid)) = ids {
            become_user(uid, gid)?;
        }
        rustix::process::chdir(cwd.as_c_str())?;
        if scope == Scope::Descendants {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(Sys::SRCH);
            }
        }
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        ffi::reset_signals(signals);
        ffi::close_others_on_exec();
        Ok(())
    };
    let steps = || match prepare() {
        // Not left to the library: execvp(3) would run a file without a known format as a shell script.
        Ok(()) => image.execute(),
        Err(error) => error.raw_os_error(),
    };
    // SAFETY: the steps only make system calls, on values laid out before; they take no lock and do not allocate, and
    // reset_signals leaves no handler of ours.
    let pid = unsafe { ffi::vfork(&steps) }?;
    Ok(Started { pid, ends })
}

/// A program's ends of its standard input and output, none of them a standard descriptor of ours.
#[derive(Debug)]
enum Theirs {
    /// Pipes; without one for input it is `/dev/null`.
    Pipes { stdin: Option<OwnedFd>, stdout: OwnedFd, stderr: OwnedFd },
    /// The terminal, which becomes the session's.
    Terminal(OwnedFd),
}

impl Theirs {
    /// Makes them the standard descriptors of this process. Safe between vfork and exec.
    fn become_standard(&self) -> rustix::io::Result<()> {
        let (stdin, stdout, stderr) = match self {
            Self::Pipes { stdin, stdout, stderr } => (stdin.as_ref(), stdout, stderr),
            Self::Terminal(slave) => (Some(slave), slave, slave),
        };
        match stdin {
            Some(stdin) => dup2_stdin(stdin)?,
            None => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let null = rustix::fs::open(c"/dev/null", flags, Mode::empty())?;
                dup2_stdin(&null)?;
                // Exec closes it.
                let _ = null.into_raw_fd();
            }
        }
        dup2_stdout(stdout)?;
        dup2_stderr(stderr)?;
        match self {
            Self::Pipes { .. } => Ok(()),
            Self::Terminal(_) => rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()),
        }
    }
}

/// What can be limited, in the order of the numbers that Linux has for it.
const RESOURCES: [Resource; MAX_LIMITS] = [
    Resource::Cpu,
    Resource::Fsize,
    Resource::Data,
    Resource::Stack,
    Resource::Core,
    Resource::Rss,
    Resource::Nproc,
    Resource::Nofile,
    Resource::Memlock,
    Resource::As,
    Resource::Locks,
    Resource::Sigpending,
    Resource::Msgqueue,
    Resource::Nice,
    Resource::Rtprio,
    Resource::Rttime,
];

/// Puts a limit into the terms of the call that sets it.
fn limit_of(limit: &ResourceLimit) -> SysResult<(Resource, Rlimit)> {
    let resource = RESOURCES.get(usize::from(limit.resource)).ok_or(Errno::INVAL)?;
    let amount = |amount: u64| (amount != ResourceLimit::NONE).then_some(amount);
    Ok((*resource, Rlimit { current: amount(limit.soft), maximum: amount(limit.hard) }))
}

/// Becomes another user without supplementary groups, for good. Safe between vfork and exec.
fn become_user(uid: u32, gid: u32) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
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

fn pipes(stdin: bool) -> SysResult<(Ends, Theirs)> {
    let input = if stdin { Some(pipe()?) } else { None };
    let (input, output, error) = (input, pipe()?, pipe()?);
    let (reader, writer) = match input {
        Some((reader, writer)) => (Some(reader), Some(not_waiting(writer)?)),
        None => (None, None),
    };
    let (stdout, stderr) = (not_waiting(output.0)?, not_waiting(error.0)?);
    let ours = Ends::Pipes { stdin: writer, stdout: Some(stdout), stderr: Some(stderr) };
    Ok((ours, Theirs::Pipes { stdin: reader, stdout: output.1, stderr: error.1 }))
}

fn terminal(size: TermSize) -> SysResult<(Ends, Theirs)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).map_err(errno)?;
    rustix::pty::unlockpt(&master).map_err(errno)?;
    let slave = not_standard(rustix::pty::ioctl_tiocgptpeer(&master, flags).map_err(errno)?)?;
    set_size(master.as_fd(), size)?;
    Ok((Ends::Terminal(not_waiting(master)?), Theirs::Terminal(slave)))
}

fn pipe() -> SysResult<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(errno)?;
    Ok((not_standard(reader)?, not_standard(writer)?))
}

/// Moves a descriptor out of the way of the program's standard ones, in a process that has closed its own.
fn not_standard(fd: OwnedFd) -> SysResult<OwnedFd> {
    if fd.as_raw_fd() > 2 {
        return Ok(fd);
    }
    rustix::io::fcntl_dupfd_cloexec(fd, 3).map_err(errno)
}

/// Makes reading or writing through a descriptor of ours never wait; a new one has no other flag to keep.
fn not_waiting(end: OwnedFd) -> SysResult<OwnedFd> {
    rustix::fs::fcntl_setfl(&end, OFlags::NONBLOCK).map_err(errno)?;
    Ok(end)
}
