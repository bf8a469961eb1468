//! A program that runs work in virtual machines and depends on `vm-trait` alone. `tests/quickstart.rs` is the README's
//! example.
#![forbid(unsafe_code)]

use vm_trait::{VmInstance, VmInstanceExt, VmResult};

/// Greets from inside a machine, and leaves the greeting in a file there.
///
/// # Errors
/// The machine's.
pub async fn greet(vm: &dyn VmInstance, whom: &str) -> VmResult<String> {
    let greeting = vm.run("echo", ["hello", whom]).await?.stdout_text();
    vm.write("/tmp/greeting", greeting.clone()).await?;
    Ok(greeting)
}
