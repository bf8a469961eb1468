//! Putting together what many machines report: the shards of a session into one summary, and sessions on several
//! backends side by side.

use crate::{
    shard::Shard,
    summary::{ClauseSummary, KEPT_FAILURES, Summary},
};
use std::{collections::BTreeMap, fs, io, path::PathBuf};
use vm_core::fault::FaultKind;

/// Why reports do not fit together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// There is none.
    #[error("no reports to merge; name the files that `vmdst run --json` wrote")]
    None,
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds no report.
    #[error("{}: no report of `vmdst run --json`: {source}", path.display())]
    NoReport {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// Two reports are not of the same session.
    #[error("{second} does not belong to the session of {first}: they differ in {what}")]
    Differ {
        /// The first report.
        first: String,
        /// The other one.
        second: String,
        /// What they differ in.
        what: Difference,
    },
    /// The same shard stands in two reports.
    #[error("{first} and {second} both are shard {shard}; give each shard once")]
    Doubled {
        /// Which.
        shard: Shard,
        /// Where it stood first.
        first: String,
        /// Where it stood again.
        second: String,
    },
    /// Shards of a session are not there.
    #[error("{backend}: {} of {of} shards are missing, the first of them {}", missing.len(), first_of(missing))]
    Missing {
        /// The backend of the session.
        backend: String,
        /// The numbers of those that are missing.
        missing: Vec<u64>,
        /// How many there are.
        of: u64,
    },
}

/// What reports of one backend and environment differ in though they should be of one session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// How many shards there are.
    Shards,
    /// The seeds.
    Seeds,
    /// The clauses, or which were left out and why.
    Clauses,
    /// Whether everything was run twice.
    Twice,
    /// The faults that the target can make happen.
    Faults,
}

/// A report and where it came from, for errors.
#[derive(Clone, Debug)]
pub struct Part {
    /// Its name: a file.
    pub name: String,
    /// What it says.
    pub summary: Summary,
}

/// Reads reports that `vmdst run --json` or `vmdst merge --json` wrote.
///
/// # Errors
/// [`MergeError::Unreadable`] and [`MergeError::NoReport`].
pub fn read(paths: &[PathBuf]) -> Result<Vec<Part>, MergeError> {
    let mut parts = Vec::new();
    for path in paths {
        let text = fs::read_to_string(path)
            .map_err(|source| MergeError::Unreadable { path: path.clone(), source })?;
        let no_report = |source| MergeError::NoReport { path: path.clone(), source };
        // Of several backends there is a list.
        let summaries: Vec<Summary> = if text.trim_start().starts_with('[') {
            serde_json::from_str(&text).map_err(no_report)?
        } else {
            vec![serde_json::from_str(&text).map_err(no_report)?]
        };
        let name = path.display().to_string();
        parts.extend(summaries.into_iter().map(|summary| Part { name: name.clone(), summary }));
    }
    Ok(parts)
}

/// Puts reports together: one summary for each backend and environment, in the order of their first reports.
///
/// # Errors
/// [`MergeError`] where a shard is missing or stands twice, or is of another session.
pub fn merge(parts: Vec<Part>) -> Result<Vec<Summary>, MergeError> {
    let mut sessions: Vec<Vec<Part>> = Vec::new();
    for part in parts {
        let of = |part: &Part| (part.summary.backend.clone(), part.summary.environment.clone());
        match sessions.iter_mut().find(|session| of(&session[0]) == of(&part)) {
            Some(session) => session.push(part),
            None => sessions.push(vec![part]),
        }
    }
    if sessions.is_empty() {
        return Err(MergeError::None);
    }
    sessions.into_iter().map(merge_session).collect()
}

fn merge_session(parts: Vec<Part>) -> Result<Summary, MergeError> {
    let mut shards: BTreeMap<u64, Part> = BTreeMap::new();
    let mut head: Option<Part> = None;
    for part in parts {
        let head = head.get_or_insert_with(|| part.clone());
        if let Some(what) = difference(&head.summary, &part.summary) {
            let (first, second) = (head.name.clone(), part.name);
            return Err(MergeError::Differ { first, second, what });
        }
        let shard = part.summary.shard;
        if let Some(first) = shards.get(&shard.index()) {
            let (first, second) = (first.name.clone(), part.name);
            return Err(MergeError::Doubled { shard, first, second });
        }
        shards.insert(shard.index(), part);
    }
    let Some(Part { summary: head, .. }) = head else { return Err(MergeError::None) };
    let of = head.shard.of();
    let missing: Vec<_> = (1..=of).filter(|index| !shards.contains_key(index)).collect();
    if !missing.is_empty() {
        return Err(MergeError::Missing { backend: head.backend, missing, of });
    }
    let mut summaries = shards.into_values().map(|part| part.summary);
    let Some(mut whole) = summaries.next() else { return Err(MergeError::None) };
    for summary in summaries {
        add(&mut whole, summary);
    }
    whole.shard = Shard::WHOLE;
    whole.sort_failures();
    whole.failures.truncate(KEPT_FAILURES);
    Ok(whole)
}

fn difference(one: &Summary, other: &Summary) -> Option<Difference> {
    let clauses = |summary: &Summary| {
        let clauses = summary.per_clause.iter();
        clauses.map(|clause| (clause.id, clause.ignored.clone())).collect::<Vec<_>>()
    };
    let kinds = |summary: &Summary| summary.faults_fired.keys().copied().collect::<Vec<_>>();
    let checks = [
        (one.shard.of() == other.shard.of(), Difference::Shards),
        ((one.first_seed, one.seeds) == (other.first_seed, other.seeds), Difference::Seeds),
        (clauses(one) == clauses(other), Difference::Clauses),
        (one.twice == other.twice, Difference::Twice),
        (kinds(one) == kinds(other), Difference::Faults),
    ];
    checks.into_iter().find(|(same, _)| !same).map(|(_, what)| what)
}

fn add(whole: &mut Summary, part: Summary) {
    whole.runs += part.runs;
    whole.failed += part.failed;
    whole.differing += part.differing;
    whole.interrupted |= part.interrupted;
    // Of all machines together, as if it had been one.
    whole.seconds += part.seconds;
    whole.items += part.items;
    add_faults(&mut whole.faults_fired, &part.faults_fired);
    add_faults(&mut whole.faults_ordered, &part.faults_ordered);
    for (clause, other) in whole.per_clause.iter_mut().zip(&part.per_clause) {
        add_clause(clause, other);
    }
    whole.failures.extend(part.failures);
}

fn add_clause(clause: &mut ClauseSummary, other: &ClauseSummary) {
    clause.runs += other.runs;
    clause.failed += other.failed;
    clause.seconds += other.seconds;
    add_faults(&mut clause.faults_fired, &other.faults_fired);
    add_faults(&mut clause.faults_ordered, &other.faults_ordered);
    if let Some(others) = other.fingerprints {
        clause.fingerprints.get_or_insert_default().add_all(others);
    }
}

fn add_faults(to: &mut BTreeMap<FaultKind, u64>, from: &BTreeMap<FaultKind, u64>) {
    for (kind, times) in from {
        *to.entry(*kind).or_default() += times;
    }
}

fn first_of(missing: &[u64]) -> u64 {
    missing.first().copied().unwrap_or_default()
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Shards => "how many shards there are",
            Self::Seeds => "the seeds",
            Self::Clauses => "the clauses that were run, or in why others were not",
            Self::Twice => "whether everything was run twice",
            Self::Faults => "the faults that can be made to happen",
        })
    }
}
