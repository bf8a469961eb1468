//! The clauses, by group. Each group module lists its clauses in a constant `CLAUSES`.

use crate::clause::Clause;

mod boot_files;
mod cancel;
mod cancel_start;
mod chaos;
mod concurrency;
mod config;
mod console_file;
mod copies;
mod copies_streams;
mod copies_time;
mod copies_writes;
mod deadline;
mod errors;
mod events;
mod exec;
mod exec_large;
mod exec_start;
mod exec_timeout;
mod files;
mod files_atomic;
mod files_names;
mod fork;
mod guest_streams;
mod history;
mod incremental;
mod incremental_bases;
mod inspect;
mod integrity;
mod leftovers;
mod lifecycle;
mod lifecycle_boot;
mod lifecycle_ends;
mod lifecycle_table;
mod lifecycle_told;
mod limits;
mod meetings;
mod metrics;
mod mounts;
mod network;
mod network_life;
mod network_ports;
mod pause;
mod probe;
mod process;
mod process_attach;
mod process_links;
mod shared_root;
mod snapshot;
mod snapshot_faults;
mod streams;
mod tty;
mod vsock;
mod vsock_life;

pub use history::GENERATED_HISTORY;

/// Gives every clause, in the order of the groups.
pub fn all() -> impl Iterator<Item = &'static Clause> {
    GROUPS.iter().copied().flatten()
}

const GROUPS: &[&[Clause]] = &[
    exec::CLAUSES,
    exec_start::CLAUSES,
    exec_timeout::CLAUSES,
    exec_large::CLAUSES,
    process::CLAUSES,
    process_attach::CLAUSES,
    process_links::CLAUSES,
    tty::CLAUSES,
    files::CLAUSES,
    files_atomic::CLAUSES,
    files_names::CLAUSES,
    lifecycle::CLAUSES,
    lifecycle_table::CLAUSES,
    lifecycle_boot::CLAUSES,
    lifecycle_ends::CLAUSES,
    lifecycle_told::CLAUSES,
    pause::CLAUSES,
    snapshot::CLAUSES,
    snapshot_faults::CLAUSES,
    incremental::CLAUSES,
    incremental_bases::CLAUSES,
    copies_streams::SNAPSHOT_CLAUSES,
    copies_time::SNAPSHOT_CLAUSES,
    copies_writes::SNAPSHOT_CLAUSES,
    integrity::CLAUSES,
    fork::CLAUSES,
    copies_streams::FORK_CLAUSES,
    copies_time::FORK_CLAUSES,
    copies_writes::FORK_CLAUSES,
    inspect::CLAUSES,
    vsock::CLAUSES,
    vsock_life::CLAUSES,
    cancel::CLAUSES,
    cancel_start::CLAUSES,
    concurrency::CLAUSES,
    deadline::CLAUSES,
    config::CLAUSES,
    console_file::CLAUSES,
    boot_files::CLAUSES,
    limits::CLAUSES,
    mounts::CLAUSES,
    shared_root::CLAUSES,
    network::CLAUSES,
    network_ports::CLAUSES,
    network_life::CLAUSES,
    errors::CLAUSES,
    events::CLAUSES,
    metrics::CLAUSES,
    leftovers::CLAUSES,
    chaos::CLAUSES,
    meetings::CLAUSES,
    history::CLAUSES,
];
