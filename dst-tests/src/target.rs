//! A backend to hold to the contract.

use crate::clause::Clause;
use std::{collections::BTreeMap, fmt};
use vm_core::fault::FaultKind;
use vm_trait::Capabilities;

/// A backend to hold to the contract: how it is opened for a run, and in which environment the run takes place.
pub trait Target: Send + Sync + fmt::Debug {
    /// Gives the backend's name.
    fn name(&self) -> &str;

    /// Gives what it claims.
    fn capabilities(&self) -> Capabilities;

    /// Says whether this kind of fault can be made to happen.
    fn can_fault(&self, _kind: FaultKind) -> bool {
        false
    }

    /// Names the environment that runs take place in, for reports.
    fn environment(&self) -> &str;

    /// Says why the backend cannot run here, if it cannot.
    ///
    /// # Errors
    /// The reason, for people.
    fn fit(&self) -> Result<(), String> {
        Ok(())
    }

    /// Runs one clause once, to its end. Called from several threads at a time, each with its own run.
    fn run(&self, clause: &'static Clause, seed: u64, detail: Detail) -> RunReport;
}

/// How much a run keeps of what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// The fingerprint only.
    Fingerprint,
    /// Every event, to be shown as a timeline.
    Timeline,
}

/// What came of one run.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// What was broken, if anything.
    pub broken: Option<String>,
    /// How often each fault happened.
    pub faults_fired: BTreeMap<FaultKind, u64>,
    /// A hash of everything that happened, where the target is deterministic.
    pub fingerprint: Option<u128>,
    /// Everything that happened, a line each, where it was asked for.
    pub timeline: Vec<String>,
}
