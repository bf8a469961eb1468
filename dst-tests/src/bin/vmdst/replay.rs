//! `vmdst replay`.

use crate::{Chosen, FAILED, Problem, any_number, print};
use std::path::PathBuf;
use vm_dst::{
    plan::{self, Plan},
    record::run_patiently,
    target::{Detail, RunReport},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A script to carry out, as `vmdst shrink` and `vmdst run --histories` save it
    #[arg(value_name = "FILE", conflicts_with_all = ["seed", "clause"], required_unless_present = "clause")]
    file: Option<PathBuf>,
    /// The seed, in decimal or after 0x in hexadecimal digits
    #[arg(long, value_name = "S", value_parser = any_number, requires = "clause")]
    seed: Option<u64>,
    /// The clause's id
    #[arg(long, value_name = "ID", requires = "seed")]
    clause: Option<String>,
    #[command(flatten)]
    chosen: Chosen,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    let Arguments { file, seed, clause, chosen } = arguments;
    if let Some(file) = file {
        return crate::histories::replay(&chosen.target()?, file);
    }
    let (Some(id), Some(seed)) = (clause, seed) else {
        return Err(Problem::usage("give a file, or a clause and a seed"));
    };
    let clause = plan::find(id)
        .ok_or_else(|| Problem::usage(format!("there is no clause `{id}`; see `vmdst clauses`")))?;
    let target = chosen.target()?;
    let plan = Plan::out_of([clause], &*target, &[]);
    if let Some(ignored) = plan.ignored.iter().find(|ignored| ignored.clause.id == clause.id) {
        return Err(Problem::usage(format!(
            "{id} is not run on {}: {}",
            target.name(),
            ignored.reason
        )));
    }
    print(&format!(
        "{id} with seed {seed:#x} on {}\nenvironment: {}\npromise: {}\n\n",
        target.name(),
        target.environment(),
        clause.promise
    ))?;
    // Given up where it never ends.
    let report = run_patiently(&target, (clause, *seed), Detail::Timeline).ok_or_else(|| {
        let patience = target.patience();
        Problem::failed(format!("the run did not end within {patience:?} of real time: a livelock"))
    })?;
    print(&text(&report))?;
    Ok(if report.broken.is_some() { FAILED } else { 0 })
}

/// Gives a report as text.
pub(crate) fn text(report: &RunReport) -> String {
    // What the console said may have several lines.
    let indent = format!("\n{:36}", "");
    let shown =
        report.timeline.iter().map(|line| line.to_string().trim_end().replace('\n', &indent));
    let mut lines: Vec<_> = shown.collect();
    if !lines.is_empty() {
        lines.push(String::new());
    }
    if !report.faults_fired.is_empty() {
        let fired = report.faults_fired.iter().map(|(kind, times)| format!("{kind} {times}"));
        lines.push(format!("faults fired: {}", fired.collect::<Vec<_>>().join(", ")));
    }
    if let Some(fingerprint) = report.fingerprint {
        lines.push(format!("fingerprint: {fingerprint:032x}"));
    }
    lines.push(match &report.broken {
        Some(broken) => format!("outcome: FAILED: {broken}"),
        None => "outcome: kept".to_owned(),
    });
    lines.join("\n") + "\n"
}
