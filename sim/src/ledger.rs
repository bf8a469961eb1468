//! [`Ledger`]: what is left on the simulated host.

use serde::{Deserialize, Serialize};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// Counts what exists on the simulated host right now. Everything is zero once the last handle is dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Machines that have not ended, booted or not.
    pub machines: u64,
    /// Ends of byte streams that the host holds.
    pub streams: u64,
    /// Ports of the host that machines have, or that it listens on itself.
    pub ports: u64,
    /// Open host files.
    pub host_files: u64,
    /// Timers that somebody waits for.
    pub timers: u64,
    /// Files that were begun on the host and neither given their final name nor removed.
    pub temp_files: u64,
}

impl Ledger {
    /// Says whether nothing is left.
    #[must_use]
    pub fn is_clear(&self) -> bool {
        *self == Self::default()
    }

    /// Lists what is left, a line for each kind.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        [
            ("machines", self.machines),
            ("streams", self.streams),
            ("ports", self.ports),
            ("open host files", self.host_files),
            ("timers", self.timers),
            ("temporary files", self.temp_files),
        ]
        .iter()
        .filter(|(_, count)| *count != 0)
        .map(|(what, count)| format!("{count} {what}"))
        .collect()
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.leftovers()[..] {
            [] => f.write_str("nothing left"),
            lines => f.write_str(&lines.join(", ")),
        }
    }
}

/// The counters behind a [`Ledger`].
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) machines: Counter,
    pub(crate) streams: Counter,
    pub(crate) host_files: Counter,
    pub(crate) timers: Counter,
    /// How many timers were ever waited for.
    pub(crate) timers_begun: AtomicU64,
}

/// A count of things that exist.
#[derive(Debug, Default)]
pub(crate) struct Counter(Arc<AtomicU64>);

/// One thing that exists for as long as this does.
#[derive(Debug)]
pub(crate) struct Held(Arc<AtomicU64>);

impl Counter {
    pub(crate) fn hold(&self) -> Held {
        self.0.fetch_add(1, Ordering::Relaxed);
        Held(Arc::clone(&self.0))
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
