//! One script on one target, and what it came to.

use super::{Assignment, Progress, Script, Violation, program};
use crate::target::{Detail, RunReport, Target};
use std::sync::Arc;

/// What a script came to.
#[derive(Clone, Debug)]
pub struct Trial {
    /// What was done.
    pub script: Script,
    /// What came of it, step by step.
    pub progress: Progress,
    /// What the run says.
    pub report: RunReport,
}

impl Trial {
    /// Carries a script out.
    #[must_use]
    pub fn of(script: Script, target: &dyn Target, detail: Detail) -> Self {
        let assignment = Arc::new(Assignment::new(script));
        let report = target.carry_out(&assignment, detail);
        let progress = assignment.progress().clone();
        Self { script: assignment.script.clone(), progress, report }
    }

    /// Names the way in which it failed, the same for the same defect: the sort of what the model does not allow, or
    /// that something else is wrong, such as a panic or what was left behind.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        match (&self.progress.violation, &self.report.broken) {
            (Some(Violation { sort, .. }), _) => Some(sort.clone()),
            (None, Some(_)) => Some("beside the model".to_owned()),
            (None, None) => None,
        }
    }

    /// Gives the script as a program, what came of each step, and what is wrong.
    #[must_use]
    pub fn text(&self) -> String {
        let mut lines = program::timeline(&self.script, &self.progress.record);
        if let Some(broken) = &self.report.broken {
            lines.push(format!("broken: {broken}"));
        }
        format!("{}\n{}\n", program::program(&self.script), lines.join("\n"))
    }
}
