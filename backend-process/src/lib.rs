//! The real guest agent as an ordinary host process behind the twinvm trait, for tests.
//!
//! [`ProcessHypervisor`] makes "machines" that are one agent process each, in a private temporary directory, reached
//! over a Unix socket. There is no isolation worth the name and no kernel of the guest's own; what is real is the
//! Linux side of the agent: processes, process groups, terminals, signals and files.
//!
//! The agent usually is the program that uses this crate, run once more. Its `main` makes that possible by calling
//! [`run_agent_if_asked`] before anything else:
//!
//! ```no_run
//! vm_backend_process::run_agent_if_asked();
//! # fn rest() -> Result<(), vm_backend_process::SetupError> {
//! let hypervisor = vm_backend_process::ProcessHypervisor::new(vm_backend_process::AgentProgram::find()?)?;
//! # let _ = hypervisor;
//! # Ok(())
//! # }
//! ```
//!
//! # Where things are
//!
//! A machine lives in `BASE/twinvm-NONCE-VMID`, with mode 0700 and owned by the agent's user. `scratch` in there is the
//! directory for the guest's files ([`ProcessHypervisor::scratch_dir`]); guest paths are host paths. It is made by
//! the agent as it boots, and removed at the end of each life of a VM.
//!
//! # Who it runs as
//!
//! Where the owner is root, the agent becomes user and group 65534 before it serves; else it stays who the owner is.
//! It cannot gain privileges again. It ends, with everything that it started, when the owner is gone.
#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

mod hypervisor;
mod life;
mod machine;
mod program;

pub use hypervisor::{ProcessHypervisor, SetupError};
pub use program::{AGENT_VARIABLE, AgentProgram, RUN_AGENT_VARIABLE, run_agent_if_asked};
