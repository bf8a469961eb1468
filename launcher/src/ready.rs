//! Descriptors that a runtime watches.
#![allow(unsafe_code)]

use std::{io, os::fd::OwnedFd};
use tokio::io::{Interest, unix::AsyncFd};

/// Lets the runtime that is current tell when `fd` is ready.
///
/// # Errors
/// The operating system's.
///
/// # Panics
/// Outside a tokio runtime with I/O enabled.
pub(crate) fn watched(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open, and the same descriptor, for as long as the `AsyncFd` owns it; nothing else closes it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}
