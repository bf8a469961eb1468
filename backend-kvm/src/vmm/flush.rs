//! [`FlushTimer`]: sees to it that a line without an end is shown too.

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

/// How long a line without an end waits.
const DELAY: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// A timer that is readable a while after it was armed.
#[derive(Debug)]
pub(super) struct FlushTimer {
    timer: OwnedFd,
    armed: AtomicBool,
}

impl FlushTimer {
    /// Makes one that is not armed.
    ///
    /// # Errors
    /// When the host has no more timers.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { timer, armed: AtomicBool::new(false) })
    }

    /// Arms it, unless it is.
    pub(super) fn arm(&self) {
        if !self.armed.swap(true, Ordering::AcqRel) {
            let once =
                Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: DELAY };
            let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        }
    }

    /// Takes note that it was readable.
    pub(super) fn fired(&self) {
        let _ = rustix::io::read(&self.timer, &mut [0_u8; 8]);
        self.armed.store(false, Ordering::Release);
    }
}

impl AsFd for FlushTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}
