//! Measuring the simulator: throughput, memory and determinism of its scenarios, on one thread. Machines of KVM are
//! measured in [`kvm`].

use crate::environment::Environment;
use serde::Serialize;
use std::{
    fs,
    time::{Duration, Instant},
};
use vm_sim::scenario::{self, Mismatch, Outcome};

pub mod kvm;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod side_by_side;

/// How many operations a scenario has.
pub const OPERATIONS: u32 = 50;
/// How many seeds are measured before the bare program gets its turn, so that both meet the same noise.
const BATCH: u64 = 100;

/// What is to be measured.
#[derive(Clone, Copy, Debug)]
pub struct Bench {
    /// Where.
    pub environment: Environment,
    /// How many seeds of the mixed scenario.
    pub seeds: u64,
    /// How many seeds of the idle scenario.
    pub idle_seeds: u64,
    /// How many seeds to run twice, to compare the fingerprints.
    pub twice: u64,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Measured {
    /// The environment.
    pub environment: &'static str,
    /// How many seeds of the mixed scenario were run.
    pub seeds: u64,
    /// How many operations each of them had.
    pub operations: u32,
    /// How many of them one core runs in a second.
    pub seeds_per_second_per_core: f64,
    /// Their rate over that of a bare madsim program that waits on timers as often.
    pub ratio_to_bare_madsim: Option<f64>,
    /// Why there is no such ratio, where there is none.
    pub ratio_missing_because: Option<&'static str>,
    /// Virtual time over real time on the idle scenario.
    pub simulated_time_ratio: f64,
    /// How often a seed waited on a timer, on average.
    pub timers_per_seed: f64,
    /// How many events a seed's fingerprint is made of, on average.
    pub events_per_seed: f64,
    /// Resident memory before the mixed scenario, in KiB, where the host tells.
    pub resident_kib_before: Option<u64>,
    /// Resident memory after it.
    pub resident_kib_after: Option<u64>,
    /// How many seeds were run twice.
    pub seeds_run_twice: u64,
    /// How many of them had two fingerprints.
    pub differing_fingerprints: u64,
    /// How long it all took, in seconds.
    pub seconds: f64,
}

impl Bench {
    /// Measures, and calls `progress` with how much of the whole is done, from 0 to 1.
    ///
    /// # Errors
    /// The seed whose run did not go as it should, and why.
    pub fn run(&self, progress: &mut dyn FnMut(f64)) -> Result<Measured, String> {
        let began = Instant::now();
        let steps = self.seeds + self.twice * 2 + self.idle_seeds;
        let mut done = 0;
        let mut step = |count: u64| {
            done += count;
            #[expect(clippy::cast_precision_loss, reason = "shown as a share")]
            progress(done as f64 / steps.max(1) as f64);
        };
        // Whatever is allocated once and for all is not to be taken for a leak.
        (0..BATCH.min(self.seeds)).try_for_each(|seed| mixed(self.environment, seed).map(drop))?;
        let mut totals = Totals::default();
        let resident_kib_before = resident_kib();
        for first in (0..self.seeds).step_by(usize::try_from(BATCH).unwrap_or(1)) {
            let batch = first..self.seeds.min(first + BATCH);
            let count = batch.end - batch.start;
            totals.batch(self.environment, batch)?;
            step(count);
        }
        let resident_kib_after = resident_kib();
        let simulated_time_ratio = self.idle(&mut step)?;
        let differing_fingerprints = self.differing(&mut step)?;
        let madsim = self.environment == Environment::Madsim;
        Ok(Measured {
            environment: self.environment.describe(),
            seeds: self.seeds,
            operations: OPERATIONS,
            seeds_per_second_per_core: per(self.seeds, totals.mixed),
            ratio_to_bare_madsim: madsim.then(|| ratio(totals.bare, totals.mixed)),
            ratio_missing_because: (!madsim).then_some("the scenario did not run under madsim"),
            simulated_time_ratio,
            timers_per_seed: mean(totals.timers, self.seeds),
            events_per_seed: mean(totals.events, self.seeds),
            resident_kib_before,
            resident_kib_after,
            seeds_run_twice: self.twice,
            differing_fingerprints,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    fn idle(&self, step: &mut dyn FnMut(u64)) -> Result<f64, String> {
        let began = Instant::now();
        let mut virtual_time = Duration::ZERO;
        for seed in 0..self.idle_seeds {
            let run = self.environment.run(seed, move || scenario::idle(seed));
            virtual_time += outcome(seed, run)?.virtual_time;
            step(1);
        }
        Ok(ratio(virtual_time, began.elapsed()))
    }

    fn differing(&self, step: &mut dyn FnMut(u64)) -> Result<u64, String> {
        let mut differing = 0;
        for seed in 0..self.twice {
            let first = mixed(self.environment, seed)?;
            let second = mixed(self.environment, seed)?;
            differing += u64::from(first.fingerprint != second.fingerprint);
            step(2);
        }
        Ok(differing)
    }
}

/// Runs the mixed scenario once.
///
/// # Errors
/// Why the run did not go as it should, with its seed.
pub fn mixed(environment: Environment, seed: u64) -> Result<Outcome, String> {
    outcome(seed, environment.run(seed, move || scenario::mixed(seed, OPERATIONS)))
}

#[derive(Default)]
struct Totals {
    mixed: Duration,
    bare: Duration,
    timers: u64,
    events: u64,
}

impl Totals {
    fn batch(
        &mut self,
        environment: Environment,
        seeds: std::ops::Range<u64>,
    ) -> Result<(), String> {
        let mut timers = Vec::new();
        let began = Instant::now();
        for seed in seeds {
            let outcome = mixed(environment, seed)?;
            timers.push((seed, outcome.timers));
            self.timers += outcome.timers;
            self.events += outcome.events;
        }
        self.mixed += began.elapsed();
        if environment == Environment::Madsim {
            let began = Instant::now();
            for (seed, timers) in timers {
                bare(seed, timers)?;
            }
            self.bare += began.elapsed();
        }
        Ok(())
    }
}

#[cfg(madsim)]
fn bare(seed: u64, timers: u64) -> Result<(), String> {
    Environment::Madsim.run(seed, move || scenario::bare_madsim(timers))
}

#[cfg(not(madsim))]
fn bare(_seed: u64, _timers: u64) -> Result<(), String> {
    Environment::Madsim.available()
}

fn outcome(seed: u64, run: Result<Result<Outcome, Mismatch>, String>) -> Result<Outcome, String> {
    let run = run.and_then(|outcome| outcome.map_err(|error| error.to_string()));
    run.map_err(|why| format!("seed {seed:#x}: {why}"))
}

/// Gives this process's resident memory, where the host tells.
fn resident_kib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[expect(clippy::cast_precision_loss, reason = "shown as a rate")]
fn per(count: u64, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE)
}

#[expect(clippy::cast_precision_loss, reason = "shown as a mean")]
fn mean(sum: u64, count: u64) -> f64 {
    sum as f64 / count.max(1) as f64
}

fn ratio(over: Duration, under: Duration) -> f64 {
    over.as_secs_f64() / under.as_secs_f64().max(f64::MIN_POSITIVE)
}
