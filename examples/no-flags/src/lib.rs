//! Work to be done in a virtual machine, written against `vm-trait` alone.
#![forbid(unsafe_code)]

use vm_trait::{VmError, VmInstance, VmInstanceExt};

/// Starts a machine, counts in it with programs and files, restarts it, and gives the last count.
///
/// # Errors
/// The machine's.
pub async fn count_to(vm: &dyn VmInstance, goal: u32) -> Result<u32, VmError> {
    vm.start().await?;
    let mut count = 0;
    while count < goal {
        let text = vm.run("echo", [(count + 1).to_string().as_str()]).await?.stdout_text();
        vm.write("/tmp/count", text).await?;
        count = vm.read_to_string("/tmp/count").await?.trim().parse().unwrap_or(count);
    }
    vm.restart().await?;
    vm.kill().await?;
    Ok(count)
}
