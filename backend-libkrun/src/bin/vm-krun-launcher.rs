//! Runs one machine of libkrun for its owner.

use std::process::ExitCode;

#[cfg(any(feature = "vendored", feature = "system"))]
fn main() -> ExitCode {
    vm_backend_libkrun::vmm::launcher_main()
}

/// Without libkrun there is nothing to run.
#[cfg(not(any(feature = "vendored", feature = "system")))]
fn main() -> ExitCode {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "this launcher was built without libkrun");
    ExitCode::FAILURE
}
