//! What the launcher asks of every process that it starts.

use super::until::until;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, Signal, WaitId, WaitIdOptions},
};
use std::{io, os::fd::BorrowedFd, time::Duration};

/// How long is waited between two looks at a process.
const LOOK: Duration = Duration::from_millis(1);

/// Has this process end with the launcher, which started it, also where it is stopped. It allocates nothing.
///
/// # Errors
/// When the launcher is gone already.
pub(super) fn die_with(launcher: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    match rustix::process::getppid() {
        Some(parent) if parent == launcher => Ok(()),
        _ => Err(Errno::SRCH.into()),
    }
}

/// Says whether a process has ended.
pub(super) fn is_over(process: BorrowedFd<'_>) -> bool {
    let mut exit = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut exit, Some(&now)), Ok(1..))
}

/// Has a process stand still, and says whether it does within `patience`. One that ends does not.
///
/// # Errors
/// The operating system's.
pub(super) fn stop(process: BorrowedFd<'_>, patience: Duration) -> io::Result<bool> {
    rustix::process::pidfd_send_signal(process, Signal::STOP)?;
    let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let stopped =
        until(patience, LOOK, || match rustix::process::waitid(WaitId::PidFd(process), options) {
            Ok(seen) if seen.is_some_and(|seen| seen.stopped()) => Some(true),
            Ok(_) => is_over(process).then_some(false),
            Err(_) => Some(false),
        });
    Ok(stopped == Some(true))
}
