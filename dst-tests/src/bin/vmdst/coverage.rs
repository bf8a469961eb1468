//! `vmdst coverage`.

use crate::{FAILED, INTERRUPTED, Problem, any_number, interrupt, print, write_json};
use std::{path::PathBuf, sync::Arc};
use vm_dst::{
    coverage::{self, Account, Count, Survey},
    environment::Environment,
    runner,
    target::{SimTarget, Target},
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many seeds to run
    #[arg(long, value_name = "N", value_parser = any_number, default_value = "1000")]
    seeds: u64,
    /// Writes all counts to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Prints what is possible as the Markdown of docs/coverage.md, and runs nothing
    #[arg(long)]
    markdown: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    if arguments.markdown {
        return print(&coverage::markdown()).map(|()| 0);
    }
    if arguments.seeds == 0 {
        return Err(Problem::usage("--seeds 0: at least one seed is run"));
    }
    let environment = Environment::from_env().map_err(Problem::usage)?;
    let target = Arc::new(SimTarget::new(environment));
    target.fit().map_err(Problem::failed)?;
    let bar = indicatif::ProgressBar::new(arguments.seeds);
    let survey = Survey {
        target,
        seeds: arguments.seeds,
        jobs: runner::cores(),
        interrupt: interrupt::flag(),
    };
    let account = survey.run(&|| bar.inc(1));
    bar.finish_and_clear();
    if let Some(path) = &arguments.json {
        write_json(path, &account)?;
    }
    print(&text(&account))?;
    Ok(match () {
        () if account.interrupted => INTERRUPTED,
        () if account.failed > 0 || account.gaps().next().is_some() => FAILED,
        () => 0,
    })
}

fn text(account: &Account) -> String {
    let mut text = String::new();
    for gap in account.gaps() {
        text += &format!("never happened: {}\n", name(gap));
    }
    for cell in account.needless_excuses() {
        text += &format!(
            "happened {} times though it is listed as one that need not: {}\n",
            cell.times,
            name(cell)
        );
    }
    let (all, gaps) = (account.cells.len(), account.gaps().count());
    let excused = account.cells.iter().filter(|cell| cell.excuse.is_some()).count();
    text + &format!(
        "{} seeds, {} runs, {} failed: of {all} cells {gaps} never happened, {excused} need not\n",
        account.seeds, account.runs, account.failed
    )
}

fn name(cell: &Count) -> String {
    let Count { operation, state, fault, .. } = cell;
    let operation = operation.unwrap_or("nothing under way");
    match fault {
        Some(fault) => format!("{operation} in {state} meets {fault}"),
        None => format!("{operation} in {state}"),
    }
}
