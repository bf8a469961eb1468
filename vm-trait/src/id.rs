//! Names of machines and snapshots.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Names one virtual machine for as long as its handle lives.
///
/// Backends draw the number from their own source of randomness, so that a simulated run names its
/// machines the same way every time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VmId(pub u64);

/// Names one snapshot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub u64);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm-{:016x}", self.0)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snap-{:016x}", self.0)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_alike_in_errors_and_in_debug_output() {
        assert_eq!(VmId(0xabc).to_string(), "vm-0000000000000abc");
        assert_eq!(SnapshotId(0xdef).to_string(), "snap-0000000000000def");
        assert_eq!(
            format!("{:?}", (VmId(1), SnapshotId(2))),
            format!("({}, {})", VmId(1), SnapshotId(2))
        );
    }
}
