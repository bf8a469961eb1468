//! The same script on two backends, step by step.

use super::{
    Assignment, Progress, Script,
    program::step_lines,
    record::{Outcome, StepRecord},
};
use crate::target::{Detail, Target};
use std::{fmt::Write, sync::Arc};

/// Where two backends went different ways.
#[derive(Clone, Debug)]
pub struct Divergence {
    /// The number of the step.
    pub step: usize,
    /// Whose outcomes come first, and whose second.
    pub names: [String; 2],
    /// What differs.
    pub text: String,
    /// Both timelines, up to that step.
    pub timelines: [Vec<String>; 2],
}

/// What came of a script on two backends.
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Where they first went different ways.
    pub divergence: Option<Divergence>,
    /// What each of them did that the model does not allow, or left behind.
    pub broken: [Option<String>; 2],
}

impl Comparison {
    /// Says whether both went the same way, as they may.
    #[must_use]
    pub fn agrees(&self) -> bool {
        self.divergence.is_none() && self.broken.iter().all(Option::is_none)
    }
}

/// Carries out a script on both targets and compares what came of it.
#[must_use]
pub fn compare(script: &Script, left: &dyn Target, right: &dyn Target) -> Comparison {
    let run = |target: &dyn Target| {
        let assignment = Arc::new(Assignment::new(script.clone()));
        let report = target.carry_out(&assignment, Detail::Fingerprint);
        let progress = assignment.progress().clone();
        (progress, report.broken)
    };
    let ((left_progress, left_broken), (right_progress, right_broken)) = (run(left), run(right));
    let names = [left.name().to_owned(), right.name().to_owned()];
    let divergence = first_difference(script, names, [&left_progress, &right_progress]);
    Comparison { divergence, broken: [left_broken, right_broken] }
}

fn first_difference(
    script: &Script,
    names: [String; 2],
    [left, right]: [&Progress; 2],
) -> Option<Divergence> {
    let steps = left.record.steps.iter().zip(&right.record.steps);
    let differing = steps
        .enumerate()
        .find_map(|(index, (left, right))| difference(left, right).map(|text| (index, text)));
    let (step, text) = differing.or_else(|| {
        let lengths = (left.record.steps.len(), right.record.steps.len());
        let text = format!("{} steps were carried out here and {} there", lengths.0, lengths.1);
        (lengths.0 != lengths.1).then_some((lengths.0.min(lengths.1), text))
    })?;
    let lines = |progress: &Progress| {
        let seen = script.steps.iter().zip(&progress.record.steps).enumerate().take(step + 1);
        seen.flat_map(|(index, (step, seen))| step_lines(index, step, seen)).collect()
    };
    Some(Divergence { step, names, text, timelines: [lines(left), lines(right)] })
}

/// Says what differs between two records of a step. When calls began and ended, and faults that one of them counts and
/// the other cannot, are no difference.
fn difference(left: &StepRecord, right: &StepRecord) -> Option<String> {
    let mut text = String::new();
    for (a, b) in left.calls.iter().zip(&right.calls) {
        if class(&a.outcome) != class(&b.outcome) {
            let _ = write!(text, "{}: {} against {}; ", a.call, a.outcome.text(), b.outcome.text());
        }
    }
    if left.calls.len() != right.calls.len() {
        let _ = write!(text, "{} calls against {}; ", left.calls.len(), right.calls.len());
    }
    if left.states != right.states {
        let _ = write!(text, "states {:?} against {:?}; ", left.states, right.states);
    }
    (!text.is_empty()).then(|| text.trim_end_matches("; ").to_owned())
}

/// Gives what of an outcome must be the same. Where in a snapshot a damaged byte is found out depends on its format.
fn class(outcome: &Outcome) -> Outcome {
    match outcome {
        Outcome::Failed(code) if code.starts_with("snapshot_") => {
            Outcome::Failed("snapshot".to_owned())
        }
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{
        record::{CallRecord, Seen},
        script::{Act, Call},
    };

    fn step(outcome: Outcome, state: &str, began: u32) -> StepRecord {
        let call = Call::new(0, Act::Ping);
        let calls = vec![CallRecord { call, outcome, began, ended: began + 1 }];
        StepRecord { calls, states: [(0, state.to_owned())].into(), fired: Vec::new() }
    }

    #[test]
    fn outcomes_and_states_are_compared_and_times_are_not() {
        let ok = || Outcome::Ok(Seen::Nothing);
        let same = difference(&step(ok(), "running", 0), &step(ok(), "running", 7));
        assert_eq!(same, None);
        let states = difference(&step(ok(), "running", 0), &step(ok(), "crashed", 0));
        assert!(states.is_some_and(|text| text.contains("states")));
        let failed = Outcome::Failed("disconnected".to_owned());
        assert!(difference(&step(ok(), "running", 0), &step(failed, "running", 0)).is_some());
    }
}
