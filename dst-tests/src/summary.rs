//! What a session came to, as data.

use crate::{
    clause::Clause,
    record::{RunRecord, SecondRun},
    seeds::Seeds,
    shard::Shard,
    target::{RunReport, Target},
};
use serde::{Deserialize, Serialize, Serializer};
use std::{collections::BTreeMap, time::Duration};
use vm_core::fault::FaultKind;

mod saved;

pub use saved::{ContractText, Fingerprints};

/// How many failures are kept whole; all are counted.
pub(crate) const KEPT_FAILURES: usize = 1000;

/// What a session came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// The backend's name.
    pub backend: String,
    /// The environment that runs took place in.
    pub environment: String,
    /// The first seed.
    pub first_seed: u64,
    /// How many seeds were asked for.
    pub seeds: u64,
    /// Which part of their runs this is about.
    #[serde(default)]
    pub shard: Shard,
    /// How many clauses were run.
    pub clauses: usize,
    /// How many runs ended.
    pub runs: u64,
    /// How many of them broke a promise.
    pub failed: u64,
    /// How many clauses were left out.
    pub ignored: u64,
    /// Whether everything was run twice.
    pub twice: bool,
    /// Of what was run twice, how much differed in its fingerprint.
    pub differing: u64,
    /// Whether it was ended before everything was run.
    pub interrupted: bool,
    /// How long it took.
    pub seconds: f64,
    /// How often each fault happened. A kind that never happened counts zero.
    #[serde(serialize_with = "by_name")]
    pub faults_fired: BTreeMap<FaultKind, u64>,
    /// How often checks ordered each fault.
    #[serde(default, serialize_with = "by_name")]
    pub faults_ordered: BTreeMap<FaultKind, u64>,
    /// The clauses: those that were run, in the order of the registry, then those that were left out.
    pub per_clause: Vec<ClauseSummary>,
    /// What was broken; the first 1,000.
    pub failures: Vec<Failure>,
    /// How many pairs of clause and seed are done.
    #[serde(default)]
    pub(crate) items: u64,
}

/// What came of one clause.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClauseSummary {
    /// Its id.
    #[serde(deserialize_with = "saved::registered")]
    pub id: ContractText,
    /// Its group.
    #[serde(deserialize_with = "saved::registered")]
    pub group: ContractText,
    /// The promise.
    #[serde(deserialize_with = "saved::registered")]
    pub promise: ContractText,
    /// How many runs ended.
    pub runs: u64,
    /// How many of them broke the promise.
    pub failed: u64,
    /// Why it was left out, if it was.
    pub ignored: Option<String>,
    /// How long its runs took in all.
    pub seconds: f64,
    /// How often each fault happened.
    #[serde(serialize_with = "by_name")]
    pub faults_fired: BTreeMap<FaultKind, u64>,
    /// How often its check ordered each fault.
    #[serde(default, serialize_with = "by_name")]
    pub faults_ordered: BTreeMap<FaultKind, u64>,
    /// The fingerprints of its runs taken together, where the target is deterministic.
    #[serde(default)]
    pub fingerprints: Option<Fingerprints>,
}

/// A promise that was not kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Failure {
    /// The clause's id.
    #[serde(deserialize_with = "saved::registered")]
    pub clause: ContractText,
    /// The promise.
    #[serde(deserialize_with = "saved::registered")]
    pub promise: ContractText,
    /// The seed.
    pub seed: u64,
    /// What was seen.
    pub broken: String,
    /// The one line that runs it again.
    pub replay: String,
    /// What happened in it, where the session was asked for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record: Option<RunRecord>,
}

impl Summary {
    /// Begins with nothing done.
    pub(crate) fn new<'a>(
        target: &dyn Target,
        seeds: Seeds,
        clauses: &[&'static Clause],
        ignored: impl Iterator<Item = (&'static Clause, &'a str)>,
    ) -> Self {
        let run = clauses.iter().map(|clause| ClauseSummary::new(clause, None));
        let left_out = ignored.map(|(clause, reason)| ClauseSummary::new(clause, Some(reason)));
        let per_clause: Vec<_> = run.chain(left_out).collect();
        let possible = FaultKind::ALL.iter().filter(|kind| target.can_fault(**kind));
        Self {
            backend: target.name().to_owned(),
            environment: target.environment().to_owned(),
            first_seed: seeds.first,
            seeds: seeds.count,
            shard: Shard::WHOLE,
            clauses: clauses.len(),
            runs: 0,
            failed: 0,
            ignored: count(per_clause.len() - clauses.len()),
            twice: false,
            differing: 0,
            interrupted: false,
            seconds: 0.0,
            faults_fired: possible.map(|kind| (*kind, 0)).collect(),
            faults_ordered: BTreeMap::new(),
            per_clause,
            failures: Vec::new(),
            items: 0,
        }
    }

    /// Adds what came of one seed for the clause at `index`: one report, or two to compare.
    pub(crate) fn add(
        &mut self,
        target: &dyn Target,
        (index, clause): (usize, &'static Clause),
        seed: u64,
        reports: &[RunReport],
        took: Duration,
    ) {
        let entry = &mut self.per_clause[index];
        entry.seconds += took.as_secs_f64();
        self.items += 1;
        if let Some(fingerprint) = reports.first().and_then(|report| report.fingerprint) {
            entry.fingerprints.get_or_insert_default().add(seed, fingerprint);
        }
        let (mut broken, mut record) = (None, None);
        for report in reports {
            self.runs += 1;
            entry.runs += 1;
            if report.broken.is_some() {
                self.failed += 1;
                entry.failed += 1;
                if broken.is_none() {
                    broken.clone_from(&report.broken);
                    record = record_of(report);
                }
            }
            for (kind, times) in &report.faults_ordered {
                *entry.faults_ordered.entry(*kind).or_default() += times;
                *self.faults_ordered.entry(*kind).or_default() += times;
            }
            for (kind, times) in &report.faults_fired {
                *entry.faults_fired.entry(*kind).or_default() += times;
                *self.faults_fired.entry(*kind).or_default() += times;
            }
        }
        if let [first, second] = reports
            && (first.fingerprint.is_none() || first.fingerprint != second.fingerprint)
        {
            self.differing += 1;
            if broken.is_none() {
                self.failed += 1;
                entry.failed += 1;
                let hash = |report: &RunReport| {
                    report
                        .fingerprint
                        .map_or_else(|| "none".to_owned(), |hash| format!("{hash:032x}"))
                };
                let (first, second) = (hash(first), hash(second));
                broken = Some(format!("two runs of one seed differ: {first} and {second}"));
            }
        }
        if let Some(broken) = broken
            && self.failures.len() < KEPT_FAILURES
        {
            let replay = target.replay_line(clause, seed);
            let (id, promise) = (clause.id, clause.promise);
            self.failures.push(Failure { clause: id, promise, seed, broken, replay, record });
        }
    }

    /// Puts the failures into an order that does not depend on which thread was first.
    pub(crate) fn sort_failures(&mut self) {
        self.failures.sort_by(|a, b| (a.clause, a.seed).cmp(&(b.clause, b.seed)));
    }

    /// Gives the failures with one of each clause before a second of any, so that no clause hides another.
    #[must_use]
    pub fn ranked_failures(&self) -> Vec<&Failure> {
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        let mut ranked: Vec<_> = self
            .failures
            .iter()
            .map(|failure| {
                let rank = seen.entry(failure.clause).or_default();
                *rank += 1;
                (*rank, failure)
            })
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, failure)| failure).collect()
    }

    /// Says whether everything was run and every promise was kept.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.failed == 0 && !self.interrupted
    }

    /// Gives the last line of a report: `1000 seeds, 84 clauses, 84000 runs: 0 failed`.
    #[must_use]
    pub fn last_line(&self) -> String {
        let Self { seeds, clauses, runs, failed, ignored, .. } = self;
        let mut line = format!("{seeds} seeds, {clauses} clauses, {runs} runs: {failed} failed");
        if *ignored > 0 {
            line += &format!(", {ignored} ignored");
        }
        line
    }

    /// Gives the faults that could happen and never did.
    pub fn faults_never_fired(&self) -> impl Iterator<Item = FaultKind> + '_ {
        self.faults_fired.iter().filter(|(_, times)| **times == 0).map(|(kind, _)| *kind)
    }
}

impl ClauseSummary {
    fn new(clause: &'static Clause, ignored: Option<&str>) -> Self {
        Self {
            id: clause.id,
            group: clause.group(),
            promise: clause.promise,
            runs: 0,
            failed: 0,
            ignored: ignored.map(str::to_owned),
            seconds: 0.0,
            faults_fired: BTreeMap::new(),
            faults_ordered: BTreeMap::new(),
            fingerprints: None,
        }
    }
}

fn record_of(report: &RunReport) -> Option<RunRecord> {
    if report.given_up {
        return Some(RunRecord { second: Some(SecondRun::Endless), ..RunRecord::default() });
    }
    (!report.timeline.is_empty()).then(|| RunRecord::of_run(report.timeline.clone()))
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

fn by_name<S: Serializer>(
    faults: &BTreeMap<FaultKind, u64>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(faults.iter().map(|(kind, times)| (kind.name(), times)))
}
