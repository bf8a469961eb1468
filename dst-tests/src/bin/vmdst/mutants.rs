//! `vmdst mutants`.

use crate::{FAILED, INTERRUPTED, Problem, any_number, interrupt, jobs, print, write_json};
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use std::{
    io::{IsTerminal, Write, stderr, stdout},
    path::PathBuf,
    sync::Arc,
};
use vm_dst::{
    environment::Environment,
    mutants::{self, Bag, Hunt, Outcome, Reach},
    runner,
    target::{SimTarget, Target},
};
use vm_planted_bugs::Bug;

/// From how many seeds a bug has to hide.
const SEEDS: u64 = 200;
/// How many seeds every clause is run with, where all are.
const SEEDS_OF_EVERY_CLAUSE: u64 = 2;
/// How much of what a clause saw is shown.
const SHOWN: usize = 90;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Hunts this bug only; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<Bug>,
    /// From how many seeds a bug has to hide. Default 200, or 2 with --every-clause
    #[arg(long, value_name = "N", value_parser = any_number)]
    seeds: Option<u64>,
    /// Runs every clause against every bug, and lists those that catch none, or only bugs that most clauses catch
    #[arg(long)]
    every_clause: bool,
    /// How many bugs are hunted at a time. Default one a core
    #[arg(long, value_name = "N", value_parser = jobs::parse)]
    jobs: Option<usize>,
    /// Where the simulated runs take place: madsim, tokio or turmoil. Default the one that explores most
    #[arg(long, value_name = "ENV")]
    env: Option<Environment>,
    /// Writes what came of it to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Prints the catalogue as the Markdown of docs/planted-bugs.md, and runs nothing
    #[arg(long)]
    markdown: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    if arguments.markdown {
        return print(&mutants::markdown()).map(|()| 0);
    }
    let hunt = hunt(arguments)?;
    let (all, tell) = (hunt.bugs.len(), stderr().is_terminal());
    let mut done = 0;
    let bag = hunt.run(&mut |outcome| {
        done += 1;
        if tell || outcome.caught.is_none() {
            let fate = if outcome.caught.is_some() { "caught" } else { "SURVIVED" };
            // A hunt goes on without anyone who reads this.
            let _ = writeln!(stderr(), "{done:>4} of {all}  {fate:8}  {}", outcome.bug);
        }
    });
    let bag = bag.map_err(|_| {
        Problem::usage(
            "this build has no planted bugs; use `cargo run --release -p vm-dst --features planted-bugs -- mutants`",
        )
    })?;
    if let Some(path) = &arguments.json {
        write_json(path, &bag)?;
    }
    let width = if stdout().is_terminal() { None } else { Some(180) };
    print(&text(&bag, width))?;
    Ok(match () {
        () if bag.interrupted => INTERRUPTED,
        () if bag.survivors().next().is_some() => FAILED,
        () => 0,
    })
}

fn hunt(arguments: &Arguments) -> Result<Hunt, Problem> {
    let environment = match arguments.env {
        Some(environment) => environment.available().map(|()| environment),
        None => Environment::from_env(),
    };
    let target = Arc::new(SimTarget::new(environment.map_err(Problem::usage)?));
    target.fit().map_err(Problem::failed)?;
    let every = arguments.every_clause;
    let bugs = if arguments.only.is_empty() { Bug::ALL.to_vec() } else { arguments.only.clone() };
    Ok(Hunt {
        target,
        bugs,
        seeds: arguments.seeds.unwrap_or(if every { SEEDS_OF_EVERY_CLAUSE } else { SEEDS }).max(1),
        jobs: arguments.jobs.unwrap_or_else(runner::cores),
        reach: if every { Reach::EveryClause } else { Reach::FirstCatch },
        interrupt: interrupt::flag(),
    })
}

fn text(bag: &Bag, width: Option<u16>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    if let Some(width) = width {
        table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    }
    table.set_header(["bug", "area", "caught by", "seeds", "runs", "what was seen"]);
    for outcome in &bag.outcomes {
        table.add_row(row(outcome));
    }
    let survivors: Vec<_> = bag.survivors().collect();
    let mut text = format!("{table}\n\n");
    for survivor in &survivors {
        let reached = match survivor.reached {
            0 => "no run reached it".to_owned(),
            times => format!("reached {times} times"),
        };
        text += &format!("SURVIVED {}: {} ({reached})\n", survivor.bug, survivor.sentence);
    }
    if let Some(idle) = &bag.idle_clauses {
        text += &format!(
            "{} clauses caught no bug but those that most clauses catch: {}\n",
            idle.len(),
            idle.join(", ")
        );
    }
    let (bugs, survived) = (bag.outcomes.len(), survivors.len());
    text + &format!(
        "{bugs} bugs: {} caught, {survived} survived, in {:.0} s\n",
        bugs - survived,
        bag.seconds
    )
}

fn row(outcome: &Outcome) -> Vec<Cell> {
    let right = |number: u64| Cell::new(number).set_alignment(CellAlignment::Right);
    let mut row = vec![Cell::new(outcome.bug), Cell::new(outcome.area)];
    match &outcome.caught {
        Some(caught) => {
            let seen: String = caught.broken.chars().take(SHOWN).collect();
            row.extend([
                Cell::new(caught.clause),
                right(caught.seeds),
                right(outcome.runs),
                Cell::new(seen.replace('\n', " ")),
            ]);
        }
        None => {
            row.extend([Cell::new("SURVIVED"), Cell::new(""), right(outcome.runs), Cell::new("")]);
        }
    }
    row
}
