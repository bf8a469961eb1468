//! Signals and clocks of threads.
#![allow(unsafe_code)]

use std::{io, os::unix::thread::JoinHandleExt, thread::JoinHandle, time::Duration};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// Does nothing: the signal's only use is to bring a thread out of `KVM_RUN`.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Prepares this process for [`kick`].
///
/// # Errors
/// When the signal cannot be handled.
pub(super) fn prepare_kicks() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), ignore).map_err(io::Error::from)
}

/// Brings a thread out of `KVM_RUN`, if it is in there right now.
pub(super) fn kick(thread: &JoinHandle<()>) {
    let _ = thread.kill(SIGRTMIN());
}

/// Gives how long a thread has run on a processor; nothing for one that has ended.
pub(super) fn cpu_time(thread: &JoinHandle<()>) -> Duration {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: a thread whose handle was not joined has a valid identifier, and the pointer is to a local variable.
    if unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) } != 0 {
        return Duration::ZERO;
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a local variable; an unknown clock gives an error.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Duration::ZERO;
    }
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
