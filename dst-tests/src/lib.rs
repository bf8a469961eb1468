//! The behavioural contract of twinvm: clauses, runner and reports.
//!
//! A backend's own test program needs little more than this:
//!
//! ```no_run
//! # use std::{process::ExitCode, sync::Arc};
//! # use vm_dst::target::TokioTarget;
//! # use vm_trait::{Capabilities, VmBackend};
//! # async fn open() -> Arc<dyn VmBackend> { unimplemented!() }
//! fn main() -> ExitCode {
//!     let target = TokioTarget::new("mine", Capabilities::all(), open);
//!     vm_dst::contract_main(vec![Arc::new(target)])
//! }
//! ```
//!
//! # Map of the crate
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`clause`](mod@clause) | [`Clause`](clause::Clause): a promise as data and a check |
//! | [`context`] | what a check has at hand: the backend, generated inputs, time, faults |
//! | [`host_network`] | the loopback ports of the host, a real or a simulated one |
//! | [`clauses`] | the clauses themselves, by group |
//! | [`history`] | generated histories: scripts, the reference model, shrinking, comparing backends |
//! | [`honesty`] | the clauses that bind a backend to answer `Unsupported` |
//! | [`target`] | [`Target`](target::Target): a backend to hold to the contract |
//! | [`environment`] | madsim, tokio with paused time, turmoil |
//! | [`session`] | one run inside its environment |
//! | [`pool`], [`template`] | running machines that clauses share, and that they fork |
//! | [`plan`] | which clauses are run on a target, and which are left out and why |
//! | [`runner`] | all clauses under all seeds on all cores |
//! | [`summary`], [`report`] | what came of it, as data, as text, as a page and as JUnit's XML |
//! | [`record`] | what is kept of a run that broke a promise |
//! | [`shard`], [`merge`] | a session on many machines, and putting together what they report |
//! | [`contract`] | the contract as a test program |
//! | [`contract_doc`] | the contract as a document |
//! | [`seeds`], [`filter`] | choosing seeds and clauses |
//! | [`coverage`] | what may happen, and how often it did |
//! | [`mutants`] | whether the contract notices planted bugs |
//! | [`bench`](mod@bench) | measuring the simulator |
//! | [`panics`] | catching panics |
#![forbid(unsafe_code)]

pub mod bench;
pub mod clause;
pub mod clauses;
pub mod context;
pub mod contract;
pub mod contract_doc;
pub mod coverage;
pub mod environment;
pub mod filter;
pub mod history;
pub mod honesty;
pub mod host_network;
pub mod merge;
pub mod mutants;
mod ordered;
pub mod panics;
pub mod plan;
pub mod pool;
pub mod record;
pub mod report;
pub mod runner;
pub mod seeds;
pub mod session;
pub mod shard;
pub mod soak;
pub mod summary;
pub mod target;
pub mod template;

pub use contract::{Contract, contract_main};
