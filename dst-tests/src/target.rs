//! A backend to hold to the contract.

use crate::{clause::Clause, clauses, history::Assignment, seeds::Seeds};
use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};
use vm_core::{fault::FaultKind, timeline::TimelineLine};
use vm_trait::Capabilities;

mod guest_root;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod launchers;
mod process;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod real;
mod recorder;
mod sim;
mod tokio;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub use launchers::{KrunTarget, KvmTarget, LauncherTarget, Launchers};

pub use process::ProcessTarget;
pub use sim::{SimTarget, Through};
pub use tokio::{Opened, TokioTarget};

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

    /// Says whether the same seed gives the same fingerprint every time.
    fn is_deterministic(&self) -> bool {
        false
    }

    /// Gives how many runs may go on at a time, where the host sets a limit.
    fn parallel_runs(&self) -> Option<usize> {
        None
    }

    /// Gives how many seeds a test runs by default.
    fn test_seeds(&self) -> u64 {
        1
    }

    /// Gives the real time after which a run is given up as one that will never end.
    fn patience(&self) -> Duration {
        Duration::from_secs(600)
    }

    /// Gives the one line that runs this clause with this seed again.
    fn replay_line(&self, clause: &Clause, seed: u64) -> String {
        let name = trial_name(self.name(), clause);
        format!("DST_SEED={seed:#x} cargo test -- --exact {name}")
    }

    /// Runs one clause once, to its end. Called from several threads at a time, each with its own run.
    fn run(&self, clause: &'static Clause, seed: u64, detail: Detail) -> RunReport;

    /// Carries out a given script once, to its end, as the clause on generated histories does with those it draws. What
    /// came of it stands in the assignment.
    ///
    /// A target that does not implement this answers that it cannot, which is a failure.
    fn carry_out(&self, _assignment: &Arc<Assignment>, _detail: Detail) -> RunReport {
        let broken = format!("the target {} cannot carry out a given script", self.name());
        RunReport { broken: Some(broken), ..RunReport::default() }
    }
}

/// A check with what it is given.
#[derive(Clone, Debug)]
pub struct Run {
    /// The clause.
    pub clause: &'static Clause,
    /// The seed.
    pub seed: u64,
    /// A script in place of one drawn from the seed.
    pub assignment: Option<Arc<Assignment>>,
}

impl Run {
    /// Runs a clause under a seed.
    #[must_use]
    pub fn of(clause: &'static Clause, seed: u64) -> Self {
        Self { clause, seed, assignment: None }
    }

    /// Carries out a given script.
    #[must_use]
    pub fn of_script(assignment: &Arc<Assignment>) -> Self {
        let seed = assignment.script.seed;
        Self { clause: &clauses::GENERATED_HISTORY, seed, assignment: Some(assignment.clone()) }
    }
}

/// How much a run keeps of what happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// The fingerprint only.
    Fingerprint,
    /// Every event where keeping it takes next to nothing, and only where the same seed would not do the same again.
    /// The run is otherwise as with `Fingerprint`.
    Record,
    /// Every event but frames, to be shown as a timeline.
    Timeline,
    /// Every event.
    Frames,
}

/// What came of one run.
#[derive(Clone, Debug, Default)]
pub struct RunReport {
    /// What was broken, if anything.
    pub broken: Option<String>,
    /// How often each fault happened.
    pub faults_fired: BTreeMap<FaultKind, u64>,
    /// How often the check ordered each fault. Others happen of the target's own accord.
    pub faults_ordered: BTreeMap<FaultKind, u64>,
    /// A hash of everything that happened, where the target is deterministic.
    pub fingerprint: Option<u128>,
    /// Everything that happened, a line each, where it was asked for.
    pub timeline: Vec<TimelineLine>,
    /// Whether it was given up, as a run that will never end.
    pub given_up: bool,
}

/// Names the test of a clause on a backend: `sim::exec::every_exit_code`.
#[must_use]
pub fn trial_name(target: &str, clause: &Clause) -> String {
    format!("{target}::{}", clause.id.replacen('.', "::", 1))
}

/// Gives the seeds that a test of this target runs, where no variable asks for others.
#[must_use]
pub fn default_seeds(target: &dyn Target) -> Seeds {
    Seeds { first: 0, count: target.test_seeds().max(1), source: crate::seeds::SeedSource::Default }
}
