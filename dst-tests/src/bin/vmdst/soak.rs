//! `vmdst soak`.

use crate::{
    Backend, Chosen, FAILED, INTERRUPTED, Problem, any_number, interrupt, print, write_json,
};
use indicatif::{ProgressBar, ProgressStyle};
use std::{
    fmt::Write,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    thread,
    time::Duration,
};
use vm_dst::soak::{Failure, Repeated, Soak, Soaked, Watch};

/// How many rounds there can be.
const MOST_ROUNDS: u64 = 1_000_000;

/// How many children a fork can have.
const MOST_CHILDREN: u64 = 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    chosen: Chosen,
    /// What to do again and again
    #[arg(long, value_enum, default_value_t = What::Restore)]
    what: What,
    /// How often; for a fork, how many children
    #[arg(long, value_name = "N", default_value = "50", value_parser = any_number)]
    rounds: u64,
    /// How many virtual processors the machines have
    #[arg(long, value_name = "N", default_value = "1", value_parser = any_number)]
    vcpus: u64,
    /// The seed of simulated machines
    #[arg(long, value_name = "S", default_value = "0", value_parser = any_number)]
    seed: u64,
    /// Writes what came of it to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Restore a machine that was captured with all its vCPUs busy, one restore after another
    Restore,
    /// Fork an idle machine into as many children at once, and look at their memory
    Fork,
    /// Boot machines, one after another: what fails here too is not the restore's fault
    Boot,
}

pub(crate) fn run(arguments: &Arguments) -> Result<u8, Problem> {
    let soak = soak(arguments)?;
    let chosen = &arguments.chosen;
    let environment = chosen.environment_of_sim()?;
    let watch = Arc::new(Watch { ends: interrupt::flag(), ..Watch::default() });
    let bar = progress_bar(soak.rounds);
    let soaked = thread::scope(|scope| {
        let work = scope.spawn(|| match environment {
            Some(environment) => soak.simulated(environment, arguments.seed, watch.clone()),
            None => soak.on_kvm(watch.clone()),
        });
        while !work.is_finished() {
            bar.set_position(u64::from(watch.done.load(Ordering::Relaxed)));
            match watch.failed.load(Ordering::Relaxed) {
                0 => {}
                failed => bar.set_message(format!("{failed} failed")),
            }
            thread::sleep(Duration::from_millis(50));
        }
        work.join().unwrap_or_else(|_| Err("it panicked".to_owned()))
    });
    bar.finish_and_clear();
    let soaked = soaked.map_err(Problem::failed)?;
    if let Some(path) = &arguments.json {
        write_json(path, &soaked)?;
    }
    print(&text(&soaked))?;
    Ok(match () {
        () if !soaked.failures.is_empty() => FAILED,
        () if soaked.rounds < soaked.asked => INTERRUPTED,
        () => 0,
    })
}

fn soak(arguments: &Arguments) -> Result<Soak, Problem> {
    if matches!(arguments.chosen.backend, Backend::Process | Backend::Libkrun) {
        return Err(Problem::usage("this backend has no machines to restore or fork"));
    }
    let (what, most) = match arguments.what {
        What::Restore => (Repeated::Restore, MOST_ROUNDS),
        What::Fork => (Repeated::Fork, MOST_CHILDREN),
        What::Boot => (Repeated::Boot, MOST_ROUNDS),
    };
    let rounds =
        u32::try_from(arguments.rounds).ok().filter(|_| (1..=most).contains(&arguments.rounds));
    let rounds = rounds.ok_or_else(|| Problem::usage(format!("--rounds: from 1 to {most}")))?;
    let vcpus = u8::try_from(arguments.vcpus).ok().filter(|vcpus| *vcpus > 0);
    let vcpus = vcpus.ok_or_else(|| Problem::usage("--vcpus: from 1 to 255"))?;
    Ok(Soak { what, rounds, vcpus })
}

fn text(soaked: &Soaked) -> String {
    let what = match soaked.what {
        Repeated::Restore => "restores under load",
        Repeated::Fork => "children of one fork",
        Repeated::Boot => "boots",
    };
    let vcpus = soaked.vcpus;
    let mut text = format!("{} on {}, {vcpus} vCPUs\n", what, soaked.backend);
    for spread in &soaked.measured {
        let (min, median, max) = (spread.min, spread.median, spread.max);
        let what = format!("{} ({})", spread.what, spread.count);
        let _ = writeln!(
            text,
            "  {what:40} min {min:.1}, median {median:.1}, max {max:.1} {}",
            spread.unit
        );
    }
    for Failure { round, at, why, console } in &soaked.failures {
        let _ = writeln!(text, "FAILED round {round} at {at}: {why}");
        console.lines().for_each(|line| {
            let _ = writeln!(text, "  | {line}");
        });
    }
    if soaked.rounds < soaked.asked {
        let _ = writeln!(text, "ended early: {} rounds were asked for", soaked.asked);
    }
    let _ = writeln!(text, "{} of {} rounds went well", soaked.well, soaked.rounds);
    text
}

fn progress_bar(rounds: u32) -> ProgressBar {
    let bar = ProgressBar::new(rounds.into());
    if let Ok(style) =
        ProgressStyle::with_template("{bar:40} {pos}/{len} rounds, {eta} left {msg:.red}")
    {
        bar.set_style(style);
    }
    bar
}
