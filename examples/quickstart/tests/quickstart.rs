//! The example of the README.

use vm_sim::SimBackend;
use vm_trait::{RestoreOptions, SnapshotOptions, VmBackend, VmConfig, VmInstanceExt, VmResult};

#[tokio::test(start_paused = true)]
async fn a_machine_and_its_copy() -> VmResult<()> {
    let backend = SimBackend::builder().seed(42).build().expect("inside a runtime");
    let vm = backend.create(VmConfig::default()).await?;
    vm.start().await?;
    assert_eq!(vm.run("echo", ["hello", "world"]).await?.stdout_text(), "hello world\n");
    vm.write("/tmp/greeting", "hello").await?;

    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let copy = backend.restore(&snapshot, RestoreOptions::running()).await?;
    vm.remove_all("/tmp/greeting").await?;
    assert_eq!(copy.read_to_string("/tmp/greeting").await?, "hello");
    Ok(())
}
