//! What a process may use. FSIZE, DATA, NPROC, NOFILE and AS are enforced; the others are kept, inherited and shown.

use super::process::Process;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};
use vm_guest_protocol::{MAX_LIMITS, ResourceLimit};

/// The numbers that Linux has for what is enforced here.
pub(super) const FSIZE: u8 = 1;
pub(super) const DATA: u8 = 2;
pub(super) const NPROC: u8 = 6;
pub(super) const NOFILE: u8 = 7;
pub(super) const AS: u8 = 9;

const NONE: u64 = ResourceLimit::NONE;

/// Name and unit of each resource, as `/proc` shows them.
const SHOWN: [(&str, &str); MAX_LIMITS] = [
    ("cpu time", "seconds"),
    ("file size", "bytes"),
    ("data size", "bytes"),
    ("stack size", "bytes"),
    ("core file size", "bytes"),
    ("resident set", "bytes"),
    ("processes", "processes"),
    ("open files", "files"),
    ("locked memory", "bytes"),
    ("address space", "bytes"),
    ("file locks", "locks"),
    ("pending signals", "signals"),
    ("msgqueue size", "bytes"),
    ("nice priority", ""),
    ("realtime priority", ""),
    ("realtime timeout", "us"),
];

/// A soft and a hard limit.
pub(super) type Pair = (u64, u64);

/// The limits of a process, which its children have too. Held as what differs from the kernel's own.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Limits(Arc<BTreeMap<u8, Pair>>);

impl Limits {
    pub(super) fn of(limits: &[ResourceLimit]) -> Self {
        let pairs = limits.iter().map(|limit| (limit.resource, (limit.soft, limit.hard)));
        Self(Arc::new(pairs.collect()))
    }

    pub(super) fn get(&self, resource: u8) -> Pair {
        self.0.get(&resource).copied().unwrap_or_else(|| at_first(resource))
    }

    pub(super) fn soft(&self, resource: u8) -> u64 {
        self.get(resource).0
    }

    pub(super) fn set(&mut self, resource: u8, pair: Pair) {
        Arc::make_mut(&mut self.0).insert(resource, pair);
    }

    /// Shows all, as `/proc/PID/limits` does.
    pub(super) fn table(&self) -> String {
        let amount = |amount: u64| match amount {
            NONE => "unlimited".to_owned(),
            amount => amount.to_string(),
        };
        let mut table = String::new();
        let mut row = |name: &str, soft: &str, hard: &str, unit: &str| {
            let _ = writeln!(table, "{name:<25} {soft:<20} {hard:<20} {unit:<10}");
        };
        row("Limit", "Soft Limit", "Hard Limit", "Units");
        for (resource, (name, unit)) in (0..).zip(SHOWN) {
            let (soft, hard) = self.get(resource);
            row(&format!("Max {name}"), &amount(soft), &amount(hard), unit);
        }
        table
    }
}

/// What a process has where nobody said anything.
fn at_first(resource: u8) -> Pair {
    match resource {
        3 => (8 << 20, NONE),
        4 => (0, NONE),
        NOFILE => (1024, 524_288),
        8 => (8 << 20, 8 << 20),
        12 => (819_200, 819_200),
        13 | 14 => (0, 0),
        _ => (NONE, NONE),
    }
}

impl Process {
    /// Gives the first descriptor that the process may not have.
    pub(super) fn max_fds(&self) -> usize {
        usize::try_from(self.limits.soft(NOFILE)).unwrap_or(usize::MAX)
    }

    /// Says whether the process may have this much memory.
    pub(super) fn may_grow_to(&self, bytes: u64) -> bool {
        bytes <= self.limits.soft(AS).min(self.limits.soft(DATA))
    }
}
