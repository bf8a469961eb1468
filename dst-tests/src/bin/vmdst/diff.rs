//! `vmdst diff`.

use crate::{
    Backend, Chosen, FAILED, INTERRUPTED, Problem, any_number, histories, interrupt, jobs, print,
};
use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use vm_dst::{
    environment::Environment,
    history::{
        Script,
        compare::{Comparison, Divergence, compare},
        generate, program,
        shrink::shrink,
    },
    seeds::{SeedSource, Seeds},
    target::Target,
};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One backend
    #[arg(long, value_enum, default_value_t = Backend::Sim)]
    left: Backend,
    /// The other
    #[arg(long, value_enum)]
    right: Backend,
    /// How many histories
    #[arg(long, value_name = "N", default_value = "100", value_parser = any_number)]
    histories: u64,
    /// The first of their seeds
    #[arg(long, value_name = "S", default_value = "0", value_parser = any_number)]
    first_seed: u64,
    /// Compares the script of a file in place of generated ones
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// How many histories go on at a time. Default as many as both backends allow, else one a core
    #[arg(long, value_name = "N", value_parser = jobs::parse)]
    jobs: Option<usize>,
    /// For how long at most, in seconds; histories that were not begun by then are told as not run
    #[arg(long, value_name = "S", value_parser = any_number)]
    seconds: Option<u64>,
    /// For how long at most a script is made smaller on which they differ, in seconds
    #[arg(long, value_name = "S", default_value = "30", value_parser = any_number)]
    shrink: u64,
    /// Where such a script is saved
    #[arg(long, value_name = "FILE", default_value = "target/divergence.json")]
    save: PathBuf,
    /// Where simulated runs take place
    #[arg(long, value_name = "ENV")]
    env: Option<Environment>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    let chosen = Chosen { backend: arguments.left, env: arguments.env };
    let (left, right) = (chosen.target_of(arguments.left)?, chosen.target_of(arguments.right)?);
    for target in [&left, &right] {
        let name = target.name();
        target.fit().map_err(|why| Problem::failed(format!("{name} cannot run here: {why}")))?;
    }
    if let Some(file) = &arguments.script {
        let script = Script::load(file).map_err(|error| Problem::usage(error.to_string()))?;
        let comparison = compare(&script, &*left, &*right);
        print(&text(&script, &comparison))?;
        return Ok(if comparison.agrees() { 0 } else { FAILED });
    }
    many(arguments, &left, &right)
}

fn many(
    arguments: &Arguments,
    left: &Arc<dyn Target>,
    right: &Arc<dyn Target>,
) -> Result<u8, Problem> {
    let seeds = Seeds::range(arguments.first_seed, arguments.histories, SeedSource::Option)?;
    let profile = histories::common_profile(&**left, &**right);
    let faults: Vec<_> = profile.faults.iter().map(|kind| kind.name()).collect();
    print(&format!(
        "{} against {}; in common: {:?}; faults: {}\n",
        left.name(),
        right.name(),
        profile.capabilities,
        if faults.is_empty() { "none".to_owned() } else { faults.join(", ") }
    ))?;
    let (interrupt, began, bar) = (interrupt::flag(), Instant::now(), histories::bar(seeds.count));
    let limit = arguments.seconds.map(Duration::from_secs);
    let (mut run, mut steps, mut differing) = (0_u64, 0, Vec::new());
    let ends =
        || interrupt.load(Ordering::Relaxed) || limit.is_some_and(|limit| began.elapsed() > limit);
    let work = |seed| {
        let script = generate::script(seed, &profile);
        let comparison = compare(&script, &**left, &**right);
        bar.inc(1);
        (seed, script, comparison)
    };
    let mut take = |(seed, script, comparison): (u64, Script, Comparison)| {
        (run, steps) = (run + 1, steps + script.steps.len());
        if !comparison.agrees() {
            let told = format!("seed {seed:#x}:\n{}\n", text(&script, &comparison));
            bar.suspend(|| print(&told))?;
            differing.push(script);
        }
        Ok(())
    };
    let jobs = jobs::for_histories(arguments.jobs, &[&**left, &**right]);
    jobs::in_order(seeds, jobs, &ends, &work, &mut take)?;
    bar.finish_and_clear();
    if let Some(script) = differing.first() {
        print(&smaller(arguments, script, (&**left, &**right))?)?;
    }
    let seconds = began.elapsed().as_secs_f64();
    let not_run = seeds.count - run;
    let rest = if not_run > 0 { format!(", {not_run} not run") } else { String::new() };
    print(&format!(
        "{run} histories of {steps} steps on both in {seconds:.1} s: {} differ{rest}\n",
        differing.len()
    ))?;
    match () {
        () if !differing.is_empty() => Ok(FAILED),
        () if run == 0 || (not_run > 0 && limit.is_none()) => Ok(INTERRUPTED),
        () => Ok(0),
    }
}

fn smaller(
    arguments: &Arguments,
    script: &Script,
    (left, right): (&dyn Target, &dyn Target),
) -> Result<String, Problem> {
    let mut differs = |script: &Script| !compare(script, left, right).agrees();
    let shrunk = shrink(script, Duration::from_secs(arguments.shrink), &mut differs);
    if let Some(directory) = arguments.save.parent() {
        std::fs::create_dir_all(directory)?;
    }
    shrunk.script.save(&arguments.save).map_err(|error| Problem::failed(error.to_string()))?;
    Ok(format!(
        "\nshrunk to {} operations and faults with {} tries in {:.1} s:\n\n{}\nagain:  cargo run --release -p vm-dst -- diff --left {} --right {} --script {}\n\n",
        shrunk.script.size(),
        shrunk.tried,
        shrunk.took.as_secs_f64(),
        program::program(&shrunk.script),
        left.name(),
        right.name(),
        arguments.save.display(),
    ))
}

fn text(script: &Script, comparison: &Comparison) -> String {
    let mut lines = Vec::new();
    if let Some(Divergence { step, names, text, timelines }) = &comparison.divergence {
        lines.push(format!("they differ at step {step}: {text}"));
        for (name, timeline) in names.iter().zip(timelines) {
            lines.push(format!("  {name}:"));
            lines.extend(timeline.iter().map(|line| format!("  {line}")));
        }
    }
    let broken = ["left", "right"].into_iter().zip(&comparison.broken);
    lines.extend(broken.filter_map(|(side, broken)| Some(format!("{side}: {}", broken.as_ref()?))));
    if lines.is_empty() {
        lines.push(format!("both go the same way\n\n{}", program::program(script)));
    }
    lines.join("\n") + "\n"
}
