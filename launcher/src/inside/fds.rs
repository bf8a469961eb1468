//! The descriptors that a launcher inherits, and the lifeline.
#![allow(unsafe_code)]

use crate::control::{CONTROL_FD, LIFELINE_FD};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{FileType, OFlags, fstat},
    net::{SocketType, sockopt::socket_type},
};
use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// `F_SETSIG` of fcntl(2): which signal an asynchronous descriptor sends.
const F_SETSIG: libc::c_int = 10;

/// What a launcher inherits, made its own.
#[derive(Debug)]
pub struct Inherited {
    /// The control socket.
    pub control: OwnedFd,
    /// The lifeline; it must stay open.
    pub lifeline: OwnedFd,
}

/// Takes the inherited descriptors and ties the process's life to the lifeline; all other descriptors but the three
/// standard ones are closed. To be called once, before anything else has opened a descriptor.
///
/// # Errors
/// When the descriptors are not what an owner hands over, or the owner is gone already.
pub fn take() -> io::Result<Inherited> {
    for fd in [CONTROL_FD, LIFELINE_FD] {
        // SAFETY: F_SETFD takes an integer and works on any number, also one that is not open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the call above has shown that it is open, and by the caller's promise nobody else owns it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    // SAFETY: as above.
    let lifeline = unsafe { OwnedFd::from_raw_fd(LIFELINE_FD) };
    tie_life_to(&lifeline)?;
    if !matches!(socket_type(&control), Ok(SocketType::SEQPACKET)) {
        return Err(io::Error::other("descriptor 3 is not a control socket"));
    }
    let first_other = u32::try_from(LIFELINE_FD + 1).unwrap_or(u32::MAX);
    // SAFETY: by the caller's promise, nothing in this process owns a descriptor beyond the lifeline yet.
    if unsafe { libc::close_range(first_other, u32::MAX, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Inherited { control, lifeline })
}

/// Lets the kernel kill this process, also a stopped one, once the pipe has no writer any more.
///
/// A pipe whose last writer goes signals its asynchronous readers (fcntl(2), `F_SETSIG`; pipe(7)). Nothing in this
/// process has to run for that, unlike with a thread that polls, and unlike `PR_SET_PDEATHSIG` it does not look at
/// the thread that made the process.
///
/// # Errors
/// When it is no pipe, or the owner is gone already.
pub fn tie_life_to(lifeline: &OwnedFd) -> io::Result<()> {
    if !FileType::from_raw_mode(fstat(lifeline)?.st_mode).is_fifo() {
        return Err(io::Error::other("descriptor 4 is not a pipe"));
    }
    let fd = lifeline.as_raw_fd();
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    for (command, argument) in [(F_SETSIG, libc::SIGKILL), (libc::F_SETOWN, pid)] {
        // SAFETY: both commands take an integer, and the descriptor is open.
        if unsafe { libc::fcntl(fd, command, argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let asynchronous = OFlags::from_bits_retain(u32::try_from(libc::O_ASYNC).unwrap_or_default());
    let flags = rustix::fs::fcntl_getfl(lifeline)?;
    rustix::fs::fcntl_setfl(lifeline, flags | asynchronous | OFlags::NONBLOCK)?;
    // A writer that went before the flag was set gives no signal.
    let mut seen = [PollFd::new(lifeline, PollFlags::empty())];
    poll(&mut seen, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    if seen[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
        return Err(io::Error::other("the owner is gone"));
    }
    Ok(())
}
