//! The clauses, by group. Each group module lists its clauses in a constant `CLAUSES`.

use crate::clause::Clause;

mod exec;
mod exec_start;
mod exec_timeout;
mod files;
mod files_atomic;
mod files_names;
mod process;
mod process_attach;
mod streams;
mod tty;

/// Gives every clause, in the order of the groups.
pub fn all() -> impl Iterator<Item = &'static Clause> {
    GROUPS.iter().copied().flatten()
}

const GROUPS: &[&[Clause]] = &[
    exec::CLAUSES,
    exec_start::CLAUSES,
    exec_timeout::CLAUSES,
    process::CLAUSES,
    process_attach::CLAUSES,
    tty::CLAUSES,
    files::CLAUSES,
    files_atomic::CLAUSES,
    files_names::CLAUSES,
];
