//! Holds the in-memory backend to the contract of twinvm.

use std::{process::ExitCode, sync::Arc};
use third_party_backend::MemoryBackend;
use vm_dst::target::TokioTarget;
use vm_trait::VmBackend;

fn main() -> ExitCode {
    let claims = MemoryBackend::default().capabilities();
    let target = TokioTarget::new("memory", claims, || async {
        let backend: Arc<dyn VmBackend> = Arc::new(MemoryBackend::default());
        backend
    });
    vm_dst::contract_main(vec![Arc::new(target)])
}
