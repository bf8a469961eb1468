//! The contract on every backend of this workspace: one test for each clause and backend.

use std::{process::ExitCode, sync::Arc};
use vm_dst::{
    contract::Contract,
    environment::Environment,
    target::{ProcessTarget, SimTarget},
};

fn main() -> ExitCode {
    vm_backend_process::run_agent_if_asked();
    match Environment::from_env() {
        Ok(environment) => {
            let sim = SimTarget::new(environment);
            let targets = Contract::of(vec![Arc::new(sim), Arc::new(ProcessTarget::new())]);
            targets.refusing_unknown_backends().main()
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
