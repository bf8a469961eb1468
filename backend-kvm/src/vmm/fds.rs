//! The descriptors that a launcher inherits, and those of its events.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
pub(super) use vm_launcher::inside::fds::take;
use vmm_sys_util::eventfd::EventFd;

/// Borrows an event's descriptor.
pub(super) fn of_event(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns its descriptor and is borrowed for as long as the result.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
