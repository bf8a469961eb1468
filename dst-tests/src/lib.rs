//! The behavioural contract of twinvm: clauses, runner and reports.
//!
//! # Map of the crate
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`clause`] | [`Clause`](clause::Clause): a promise as data and a check |
//! | [`context`] | what a check has at hand: the backend, generated inputs, time, faults |
//! | [`clauses`] | the clauses themselves, by group |
//! | [`target`] | [`Target`](target::Target): a backend to hold to the contract |
#![forbid(unsafe_code)]

pub mod clause;
pub mod clauses;
pub mod context;
pub mod target;
