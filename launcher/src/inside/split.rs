//! A copy of this process that goes on as another machine.
#![allow(unsafe_code)]

use super::fds::tie_life_to;
use rustix::{process::Pid, stdio::dup2_stderr};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

/// Which process this is after [`split`].
#[derive(Debug)]
pub enum Side {
    /// The one that was there before, with the number of the copy, which may have ended already.
    Original(Pid),
    /// The copy.
    Copy,
}

/// Copies this process: memory is shared until either side writes, and of the threads only the calling one goes on in the
/// copy. There, nothing may be used or dropped that threads of the original shared with it, but guest memory.
///
/// To be called while the other threads of this process are parked: a lock that one of them held would stay locked in the
/// copy.
///
/// # Errors
/// When the host has no more processes or memory.
pub fn split() -> io::Result<Side> {
    // SAFETY: by the caller's promise the other threads hold no lock that the copy takes; the C library sees to its own.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Copy),
        -1 => Err(io::Error::last_os_error()),
        pid => {
            let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::other("not a process id"))?;
            Ok(Side::Original(pid))
        }
    }
}

/// Makes the process a launcher of its own: it leaves the original's session, is tied to its own lifeline, says what goes
/// wrong where its owner reads it, and has no descriptor but those in `kept`.
///
/// To be called in a copy whose further code uses no other descriptor.
///
/// # Errors
/// When its owner is gone already.
pub fn become_launcher(
    lifeline: &OwnedFd,
    messages: &OwnedFd,
    kept: &[BorrowedFd<'_>],
) -> io::Result<()> {
    tie_life_to(lifeline)?;
    rustix::process::setsid()?;
    dup2_stderr(messages)?;
    let mut kept = kept.to_vec();
    kept.push(lifeline.as_fd());
    keep_only(&kept)
}

/// Closes all descriptors but the standard ones and those in `kept`.
///
/// To be called in a copy whose further code uses no other descriptor.
///
/// # Errors
/// When the kernel is too old for close_range(2).
pub fn keep_only(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<RawFd> = kept.iter().map(AsRawFd::as_raw_fd).collect();
    kept.extend([libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO]);
    kept.sort_unstable();
    for pair in kept.windows(2) {
        close_between(pair[0], pair[1])?;
    }
    close_between(kept.last().copied().unwrap_or_default(), RawFd::MAX)
}

/// Closes all descriptors between two.
fn close_between(low: RawFd, high: RawFd) -> io::Result<()> {
    let number = |fd: RawFd| u32::try_from(fd).unwrap_or_default();
    if high <= low + 1 {
        return Ok(());
    }
    // SAFETY: by the caller's promise, nothing that still runs in this process uses a descriptor of this range.
    if unsafe { libc::close_range(number(low) + 1, number(high) - 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the kernel reap the copies that this process makes.
pub fn leave_copies_to_kernel() {
    // SAFETY: ignoring a signal runs no code of ours; this process has no other children that it waits for.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}
