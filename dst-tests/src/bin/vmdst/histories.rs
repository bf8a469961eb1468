//! Generated histories: `vmdst run --histories` and `vmdst replay FILE`.

use crate::{FAILED, INTERRUPTED, Problem, interrupt, jobs, print};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use vm_core::fault::FaultKind;
use vm_dst::{
    history::{
        Script, Trial,
        generate::{self, Profile},
        profile_on, program,
        shrink::{Shrunk, shrink},
    },
    seeds::Seeds,
    target::{Detail, Target},
};

/// How long a failing history is made smaller.
pub(crate) const SHRINKING: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Sums {
    run: u64,
    failed: u64,
    differing: u64,
    unchecked: u64,
    operations: u64,
    fired: BTreeMap<FaultKind, u64>,
}

/// Runs histories and shrinks the first that fails.
pub(crate) fn run(
    target: &Arc<dyn Target>,
    seeds: Seeds,
    jobs: Option<usize>,
    twice: bool,
    save: &Path,
) -> Result<u8, Problem> {
    target.fit().map_err(Problem::failed)?;
    if twice && !target.is_deterministic() {
        return Err(Problem::usage(format!("the {} backend has no fingerprints", target.name())));
    }
    let profile = profile_on(&**target);
    print(&format!("{}: environment: {}\n", target.name(), target.environment()))?;
    let (interrupt, began, bar) = (interrupt::flag(), Instant::now(), bar(seeds.count));
    let (mut sums, mut failures) = (Sums::default(), Vec::new());
    let work = |seed| {
        let trial = Trial::of(generate::script(seed, &profile), &**target, Detail::Fingerprint);
        let again = twice.then(|| Trial::of(trial.script.clone(), &**target, Detail::Fingerprint));
        let differs = again.is_some_and(|it| it.report.fingerprint != trial.report.fingerprint);
        bar.inc(1);
        (seed, trial, differs)
    };
    let mut take = |(seed, trial, differs): (u64, Trial, bool)| {
        sums.differing += u64::from(differs);
        sums.add(&trial);
        if trial.failure().is_some() {
            let broken = trial.report.broken.clone().unwrap_or_default();
            bar.suspend(|| print(&format!("FAILED history with seed {seed:#x}: {broken}\n")))?;
            failures.push(trial);
        }
        Ok(())
    };
    let jobs = jobs::for_histories(jobs, &[&**target]);
    jobs::in_order(seeds, jobs, &|| interrupt.load(Ordering::Relaxed), &work, &mut take)?;
    bar.finish_and_clear();
    let all = sums.run == seeds.count;
    if let Some(first) = failures.first() {
        let shrunk = shrink_trial(target, first, SHRINKING);
        print(&shrunk_text(target, &shrunk, save)?)?;
    }
    print(&sums.text(twice, began.elapsed()))?;
    match () {
        () if !all => Ok(INTERRUPTED),
        () if sums.failed + sums.differing > 0 => Ok(FAILED),
        () => Ok(0),
    }
}

/// Carries out the script of a file.
pub(crate) fn replay(target: &Arc<dyn Target>, file: &Path) -> Result<u8, Problem> {
    let script = Script::load(file).map_err(|error| Problem::usage(error.to_string()))?;
    target.fit().map_err(Problem::failed)?;
    let trial = Trial::of(script, &**target, Detail::Timeline);
    print(&format!("{}\n{}", trial.text(), crate::replay::text(&trial.report)))?;
    Ok(if trial.failure().is_some() { FAILED } else { 0 })
}

/// Makes a failing script smaller as long as it fails in the same way.
pub(crate) fn shrink_trial(target: &Arc<dyn Target>, failed: &Trial, limit: Duration) -> Shrunk {
    let sort = failed.failure();
    let mut fails = |script: &Script| {
        let trial = Trial::of(script.clone(), &**target, Detail::Fingerprint);
        trial.failure() == sort
    };
    shrink(&failed.script, limit, &mut fails)
}

/// Saves a small script, and gives it as a program with the line that runs it again.
pub(crate) fn shrunk_text(
    target: &Arc<dyn Target>,
    shrunk: &Shrunk,
    save: &Path,
) -> Result<String, Problem> {
    if let Some(directory) = save.parent() {
        fs::create_dir_all(directory)?;
    }
    shrunk.script.save(save).map_err(|error| Problem::failed(error.to_string()))?;
    let (size, tried, seconds) = (shrunk.script.size(), shrunk.tried, shrunk.took.as_secs_f64());
    let minimal = if shrunk.is_minimal { "" } else { ", and less might do" };
    let trial = Trial::of(shrunk.script.clone(), &**target, Detail::Fingerprint);
    Ok(format!(
        "\nshrunk to {size} operations and faults with {tried} tries in {seconds:.1} s{minimal}:\n\n{}\n{}\n\nreplay:  cargo run --release -p vm-dst -- replay {} --backend {}\n\n",
        program::program(&shrunk.script),
        trial.report.broken.unwrap_or_else(|| "it does not fail every time".to_owned()),
        save.display(),
        target.name(),
    ))
}

/// Gives what histories on both of two targets may be made of.
pub(crate) fn common_profile(left: &dyn Target, right: &dyn Target) -> Profile {
    let (mut common, right) = (profile_on(left), profile_on(right));
    common.capabilities =
        common.capabilities.iter().filter(|one| right.capabilities.has(*one)).collect();
    common.faults.retain(|kind| right.faults.contains(kind));
    if right.costly {
        common.costly = true;
        common.steps = right.steps;
    }
    common.for_comparison()
}

impl Sums {
    fn add(&mut self, trial: &Trial) {
        self.run += 1;
        self.failed += u64::from(trial.failure().is_some());
        self.unchecked += u64::from(trial.progress.unchecked_from.is_some());
        let calls: usize = trial.progress.record.steps.iter().map(|step| step.calls.len()).sum();
        self.operations += u64::try_from(calls).unwrap_or(0);
        for (kind, times) in &trial.report.faults_fired {
            *self.fired.entry(*kind).or_default() += times;
        }
    }

    fn text(&self, twice: bool, took: Duration) -> String {
        let Self { run, failed, differing, unchecked, operations, .. } = self;
        let mut text = String::new();
        if !self.fired.is_empty() {
            let fired = self.fired.iter().map(|(kind, times)| format!("{kind} {times}"));
            let _ = writeln!(text, "faults fired: {}", fired.collect::<Vec<_>>().join(", "));
        }
        if twice {
            let _ = writeln!(text, "{run} histories run twice: {differing} differing fingerprints");
        }
        if *unchecked > 0 {
            let _ = writeln!(
                text,
                "{unchecked} histories not checked to their end: too much could be the case"
            );
        }
        let seconds = took.as_secs_f64();
        let _ = writeln!(
            text,
            "{run} histories, {operations} operations in {seconds:.1} s: {failed} failed"
        );
        text
    }
}

pub(crate) fn bar(count: u64) -> ProgressBar {
    let bar = ProgressBar::new(count);
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} histories, {eta} left")
    {
        bar.set_style(style);
    }
    bar
}
