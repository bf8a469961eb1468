//! What a machine that stands still looks like from outside.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a paused machine looks like from outside, for debuggers and tests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Inspection {
    /// Each vCPU, in order.
    pub vcpus: Vec<VcpuInspection>,
    /// Where the guest has memory, in ascending order and without overlaps. The lengths add up to what is configured.
    pub memory: Vec<MemoryRegion>,
}

/// A vCPU that stands still.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct VcpuInspection {
    /// Its registers by name, in lower case as the architecture's manuals name them.
    pub registers: BTreeMap<String, u64>,
    /// Why it last came back to the VMM in this life, in a word of the backend's; `None` where it never did.
    pub last_exit: Option<String>,
    /// How often it came back in this life, by reason.
    pub exits: BTreeMap<String, u64>,
}

/// A range of a guest's physical addresses that is memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MemoryRegion {
    /// The first address.
    pub start: u64,
    /// How many bytes.
    pub bytes: u64,
}

impl Inspection {
    /// Puts an inspection together; for backends.
    #[must_use]
    pub fn new(vcpus: Vec<VcpuInspection>, memory: Vec<MemoryRegion>) -> Self {
        Self { vcpus, memory }
    }
}

impl VcpuInspection {
    /// Puts a vCPU's part together; for backends.
    #[must_use]
    pub fn new(
        registers: BTreeMap<String, u64>,
        last_exit: Option<String>,
        exits: BTreeMap<String, u64>,
    ) -> Self {
        Self { registers, last_exit, exits }
    }
}
