//! `vmdst run`.

use crate::{
    BAD_USAGE, Chosen, FAILED, INTERRUPTED, Problem, any_number, interrupt, jobs, outputs::Outputs,
    print,
};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{IsTerminal, Write, stderr, stdout},
    path::PathBuf,
};
use vm_dst::{
    filter::ClauseFilter,
    plan::Plan,
    report,
    runner::{LastRun, Progress, Session},
    seeds::{SeedSource, Seeds},
    shard::Shard,
    summary::Summary,
};

/// How many seeds are run where nothing says how many.
const DEFAULT_SEEDS: u64 = 100;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// How many seeds to run. Default DST_SEED or DST_SEEDS, else 100
    #[arg(long, value_name = "N", value_parser = any_number)]
    seeds: Option<u64>,
    /// Runs exactly this seed
    #[arg(long, value_name = "S", value_parser = any_number, conflicts_with_all = ["seeds", "first_seed"])]
    seed: Option<u64>,
    /// The first of the seeds
    #[arg(long, value_name = "S", value_parser = any_number)]
    first_seed: Option<u64>,
    /// Runs so many generated histories in place of the clauses; the first that fails is made small and saved
    #[arg(long, value_name = "N", value_parser = any_number, conflicts_with_all = ["seeds", "clause", "json", "report", "junit", "shard", "each"])]
    histories: Option<u64>,
    /// Where a failing history is saved
    #[arg(
        long,
        value_name = "FILE",
        default_value = "target/history.json",
        requires = "histories"
    )]
    save: PathBuf,
    /// Runs only clauses whose id contains this, or matches it where it has a `*` or `?`
    #[arg(long, value_name = "GLOB")]
    clause: Vec<ClauseFilter>,
    #[command(flatten)]
    pub(crate) chosen: Chosen,
    #[command(flatten)]
    outputs: Outputs,
    /// Runs only this part of it, as `2/4`: the second of four. `vmdst merge` puts the parts' --json together
    #[arg(long, value_name = "I/N", default_value_t = Shard::WHOLE)]
    shard: Shard,
    /// How many runs go on at a time. Default as many as the backend allows, else one a core
    #[arg(long, value_name = "N", value_parser = jobs::parse)]
    jobs: Option<usize>,
    /// Says of every run as it ends how long it took, on standard error
    #[arg(long)]
    each: bool,
    /// Runs everything twice and compares the fingerprints
    #[arg(long)]
    twice: bool,
}

impl Arguments {
    fn seeds(&self) -> Result<Seeds, Problem> {
        if let Some(seed) = self.seed {
            return Ok(Seeds::one(seed, SeedSource::Option));
        }
        if self.seeds.is_none()
            && self.first_seed.is_none()
            && let Some(seeds) = Seeds::from_env()?
        {
            return Ok(seeds);
        }
        let count = self.seeds.unwrap_or(DEFAULT_SEEDS);
        Ok(Seeds::range(self.first_seed.unwrap_or(0), count, SeedSource::Option)?)
    }

    fn session(&self) -> Result<Session, Problem> {
        let seeds = self.seeds()?;
        let target = self.chosen.target()?;
        let plan = Plan::of(&*target, &self.clause);
        if plan.clauses.is_empty() && plan.ignored.is_empty() {
            let filters: Vec<_> = self.clause.iter().map(ToString::to_string).collect();
            let text =
                format!("no clause is chosen by `{}`; see `vmdst clauses`", filters.join("`, `"));
            return Err(Problem::usage(text));
        }
        if self.twice && !target.is_deterministic() {
            let text = format!(
                "--twice compares fingerprints, which the {} backend has none of",
                target.name()
            );
            return Err(Problem { text, code: BAD_USAGE });
        }
        let mut session = Session::new(target, plan, seeds);
        session.twice = self.twice;
        session.shard = self.shard;
        // Where a shard fails, only this machine can say what happened.
        session.record = self.outputs.wants_records() || self.shard != Shard::WHOLE;
        session.jobs = self.jobs.unwrap_or(session.jobs);
        Ok(session)
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    if let Some(count) = arguments.histories {
        let seeds = match arguments.seed {
            Some(seed) => Seeds::one(seed, SeedSource::Option),
            None => Seeds::range(arguments.first_seed.unwrap_or(0), count, SeedSource::Option)?,
        };
        let target = arguments.chosen.target()?;
        let (twice, save) = (arguments.twice, &arguments.save);
        return crate::histories::run(&target, seeds, arguments.jobs, twice, save);
    }
    let mut session = arguments.session()?;
    session.interrupt = interrupt::flag();
    print(&format!(
        "{}: environment: {}\nseeds: {}\n",
        session.target.name(),
        session.target.environment(),
        session.seeds
    ))?;
    let bar = progress_bar(session.runs());
    let summary = session.run(&mut |Progress { done, failed, last, .. }| {
        bar.set_position(done);
        if let Some(run) = last.filter(|_| arguments.each) {
            bar.suspend(|| report_run(&run));
        }
        if failed > 0 {
            bar.set_message(format!("{failed} failed"));
        }
    });
    bar.finish_and_clear();
    // Written first: it must not be lost where standard output cannot be written.
    arguments.outputs.write(std::slice::from_ref(&summary))?;
    print_summary(&summary)?;
    let nothing_ran = summary.clauses == 0 || session.target.fit().is_err();
    Ok(if nothing_ran && !summary.interrupted { FAILED } else { exit_code(&summary) })
}

fn report_run(run: &LastRun) {
    let outcome = if run.failed { "BROKEN" } else { "kept" };
    let (clause, seed, seconds) = (run.clause, run.seed, run.took.as_secs_f64());
    // A run goes on without anyone who reads this.
    let _ = writeln!(stderr(), "{outcome:6} {seconds:8.2} s  {clause} {seed:#x}");
}

/// Prints the report, and its last line.
pub(crate) fn print_summary(summary: &Summary) -> Result<(), Problem> {
    let width = if stdout().is_terminal() { None } else { Some(120) };
    print(&format!("{}\n{}\n", report::text(summary, width), summary.last_line()))
}

pub(crate) fn exit_code(summary: &Summary) -> u8 {
    match () {
        () if summary.interrupted => INTERRUPTED,
        () if summary.failed > 0 => FAILED,
        () => 0,
    }
}

fn progress_bar(runs: u64) -> ProgressBar {
    const TEMPLATE: &str =
        "{bar:40} {human_pos}/{human_len} runs, {per_sec}, {eta} left {msg:.red}";
    let bar = ProgressBar::new(runs);
    if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
        bar.set_style(style);
    }
    bar
}
