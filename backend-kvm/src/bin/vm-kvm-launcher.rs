//! Runs one KVM machine for its owner.

use std::process::ExitCode;

fn main() -> ExitCode {
    vm_backend_kvm::vmm::launcher_main()
}
