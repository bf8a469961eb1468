//! Locks that go on after a panic: in the launcher its hook ends the process anyway, and the owner's data is whole
//! whenever a lock is let go.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
