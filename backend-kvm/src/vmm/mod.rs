//! The VMM: what runs in the launcher process.

use std::process::ExitCode;

/// Runs the machine that the owner on descriptor 3 describes, until its end.
#[must_use]
pub fn launcher_main() -> ExitCode {
    ExitCode::FAILURE
}
