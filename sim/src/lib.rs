//! A seeded, deterministic simulated backend with fault injection.
//!
//! Everything above the hypervisor and above the guest's system calls is the code that real machines run: the core of
//! `vm-core` and the agent of `vm-guest-agent`. This crate replaces what is below: machines, the byte stream to the
//! agent, the guest's kernel, the host's disk, the clock and randomness. A run is a function of its seed.
//!
//! # Map of the crate
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`backend`] | [`SimBackend`], the entrance |
//! | [`env`](mod@env) | virtual time, under tokio, turmoil or madsim |
//! | [`machine`] | the simulated hypervisor |
//! | [`guest`] | the guest's operating system and its programs |
//! | [`host`] | the host's limits, its disk and its loopback ports |
//! | [`fault`] | fault plans |
//! | [`trace`] | fingerprint and timeline |
//! | [`coverage`] | which operations were called in which states, and which faults met them |
//! | [`ledger`] | what is left on the host |
//! | [`scenario`] | runs to measure by |
#![forbid(unsafe_code)]

pub mod backend;
#[cfg(test)]
mod backend_tests;
pub mod coverage;
pub mod env;
pub mod fault;
#[cfg(test)]
mod fault_tests;
pub mod guest;
pub mod host;
pub mod ledger;
pub mod machine;
#[cfg(test)]
mod network_tests;
mod rng;
pub mod scenario;
#[cfg(test)]
mod stream_tests;
pub mod trace;
mod world;
mod yields;

pub use backend::{BuildError, SimBackend, SimBackendBuilder};
pub use coverage::{Cell, Coverage};
pub use env::{SimEnv, SimEnvKind};
pub use fault::{FaultPlan, FaultRule, FaultTrigger, PlanError};
pub use guest::{GuestProgram, ProgramRegistry};
pub use host::{SimHost, SimHostFs, SimHostLimits, SimTcpListener, SimTcpStream};
pub use ledger::Ledger;
pub use trace::{Timeline, TimelineLine};
pub use yields::Yields;
