//! Locks that go on after a panic: the panic hook ends the process anyway.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
