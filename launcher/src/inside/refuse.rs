//! Ways to make a [`Refusal`].

use crate::control::Refusal;
use std::io;

/// Says that a field of the set-up cannot be had.
#[must_use]
pub fn config(field: &str, reason: impl Into<String>) -> Refusal {
    Refusal::Config { field: field.to_owned(), reason: reason.into() }
}

/// Says that something failed at `what`, and tells a host that ran out of something apart.
#[must_use]
pub fn failed(what: &str, error: impl Into<io::Error>) -> Refusal {
    let error = error.into();
    match error.raw_os_error() {
        Some(libc::ENOMEM) => Refusal::Exhausted(format!("memory ({what})")),
        Some(libc::EMFILE | libc::ENFILE) => {
            Refusal::Exhausted(format!("file descriptors ({what})"))
        }
        Some(libc::EAGAIN) => Refusal::Exhausted(format!("threads or locked memory ({what})")),
        Some(libc::ENOSPC) => Refusal::Exhausted(format!("space ({what})")),
        _ => Refusal::Failed(format!("{what}: {error}")),
    }
}
