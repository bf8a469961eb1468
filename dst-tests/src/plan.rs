//! What is to be run on a target, and what is left out and why.

use crate::{clause::Clause, clauses, filter::ClauseFilter, honesty, target::Target};

/// The clauses that a target is held to.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// To be run.
    pub clauses: Vec<&'static Clause>,
    /// Left out, each with the reason.
    pub ignored: Vec<Ignored>,
}

/// A clause that cannot be run on a target.
#[derive(Clone, Debug)]
pub struct Ignored {
    /// Which.
    pub clause: &'static Clause,
    /// Why.
    pub reason: String,
}

impl Plan {
    /// Plans every clause of the registry that one of `filters` chooses, or all where there are no filters.
    ///
    /// For each capability that the target lacks, a clause is added that holds it to answering `Unsupported`.
    #[must_use]
    pub fn of(target: &dyn Target, filters: &[ClauseFilter]) -> Self {
        Self::out_of(clauses::all(), target, filters)
    }

    /// As [`of`](Self::of), out of other clauses than the registry's.
    #[must_use]
    pub fn out_of(
        clauses: impl IntoIterator<Item = &'static Clause>,
        target: &dyn Target,
        filters: &[ClauseFilter],
    ) -> Self {
        let unfit = target.fit().err();
        let claimed = target.capabilities();
        let missing = honesty::CLAUSES.iter().filter(|(capability, _)| !claimed.has(*capability));
        let all = clauses.into_iter().chain(missing.map(|(_, clause)| clause));
        let mut plan = Self::default();
        let chosen = |clause: &&Clause| {
            filters.is_empty() || filters.iter().any(|filter| filter.matches(clause.id))
        };
        for clause in all.filter(chosen) {
            let reason = match &unfit {
                Some(reason) => Some(format!("cannot run here: {reason}")),
                None => left_out(target, clause),
            };
            match reason {
                Some(reason) => plan.ignored.push(Ignored { clause, reason }),
                None => plan.clauses.push(clause),
            }
        }
        plan
    }
}

/// Finds a clause by its id, those of [`honesty`] included.
#[must_use]
pub fn find(id: &str) -> Option<&'static Clause> {
    let honest = honesty::CLAUSES.iter().map(|(_, clause)| clause);
    clauses::all().chain(honest).find(|clause| clause.id == id)
}

fn left_out(target: &dyn Target, clause: &Clause) -> Option<String> {
    let claimed = target.capabilities();
    let lacking: Vec<_> = clause
        .requires
        .iter()
        .filter(|need| !claimed.has(**need))
        .map(|need| need.name())
        .collect();
    if !lacking.is_empty() {
        return Some(format!("the backend has no {}", lacking.join(", ")));
    }
    let one_of = clause.requires_one;
    if !one_of.is_empty() && !one_of.iter().any(|need| claimed.has(*need)) {
        let names: Vec<_> = one_of.iter().map(|need| need.name()).collect();
        return Some(format!("the backend has no {}", names.join(" and no ")));
    }
    let faults: Vec<_> = clause
        .needs_faults
        .iter()
        .filter(|kind| !target.can_fault(**kind))
        .map(|kind| kind.name())
        .collect();
    if faults.is_empty() {
        return None;
    }
    Some(format!("cannot be made to happen here: {}", faults.join(", ")))
}
