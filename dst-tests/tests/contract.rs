//! The contract on every backend of this workspace: one test for each clause and backend.

use std::{process::ExitCode, sync::Arc};
use vm_dst::{
    contract::Contract,
    environment::Environment,
    target::{KrunTarget, KvmTarget, ProcessTarget, SimTarget, Target},
};

fn main() -> ExitCode {
    vm_backend_process::run_agent_if_asked();
    vm_backend_kvm::run_launcher_if_asked();
    vm_backend_libkrun::run_launcher_if_asked();
    match Environment::from_env() {
        Ok(environment) => {
            let targets: Vec<Arc<dyn Target>> = vec![
                Arc::new(SimTarget::new(environment)),
                Arc::new(ProcessTarget::new()),
                Arc::new(KvmTarget::new()),
                Arc::new(KrunTarget::new()),
            ];
            Contract::of(targets).refusing_unknown_backends().main()
        }
        Err(error) => {
            complain(&error);
            ExitCode::from(2)
        }
    }
}

#[expect(clippy::print_stderr, reason = "this is a test program's output")]
fn complain(error: &str) {
    eprintln!("error: {error}");
}
