//! `vmdst merge`.

use crate::{
    FAILED, Problem,
    outputs::Outputs,
    print,
    run::{exit_code, print_summary},
};
use std::path::PathBuf;
use vm_dst::merge;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What `vmdst run --json` wrote: every shard of a session once, and sessions on other backends to be shown beside it
    #[arg(value_name = "REPORT", required = true)]
    reports: Vec<PathBuf>,
    #[command(flatten)]
    outputs: Outputs,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    let parts =
        merge::read(&arguments.reports).map_err(|error| Problem::usage(error.to_string()))?;
    let summaries = merge::merge(parts).map_err(|error| Problem::usage(error.to_string()))?;
    arguments.outputs.write(&summaries)?;
    // A backend that could not run anywhere is shown beside the others; alone it proves nothing.
    let nothing_ran = summaries.iter().all(|summary| summary.clauses == 0);
    let mut code = if nothing_ran { FAILED } else { 0 };
    for summary in &summaries {
        print(&format!("{}: environment: {}\n", summary.backend, summary.environment))?;
        print_summary(summary)?;
        code = code.max(exit_code(summary));
    }
    Ok(code)
}
