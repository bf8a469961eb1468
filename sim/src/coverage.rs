//! [`Coverage`]: which operations were called in which states, and which faults met them.

use std::collections::BTreeMap;
use vm_core::{fault::FaultKind, observe::Occurrence};
use vm_trait::{Operation, VmId, VmState};

/// Something that may happen to a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cell {
    /// The operation that is under way, if one is.
    pub operation: Option<Operation>,
    /// The name of the state in which it was called, or in which the machine is where none is under way.
    pub state: &'static str,
    /// The fault that happens meanwhile, or none for the call itself.
    pub fault: Option<FaultKind>,
}

/// How often each thing happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<Cell, u64>);

impl Coverage {
    /// Gives how often something happened.
    #[must_use]
    pub fn times(&self, cell: &Cell) -> u64 {
        self.0.get(cell).copied().unwrap_or(0)
    }

    /// Gives everything that happened, in a fixed order.
    pub fn iter(&self) -> impl Iterator<Item = (&Cell, u64)> {
        self.0.iter().map(|(cell, times)| (cell, *times))
    }

    /// Adds what happened elsewhere.
    pub fn add(&mut self, other: &Self) {
        for (cell, times) in &other.0 {
            *self.0.entry(*cell).or_default() += times;
        }
    }

    fn count(
        &mut self,
        operation: Option<Operation>,
        state: &'static str,
        fault: Option<FaultKind>,
    ) {
        *self.0.entry(Cell { operation, state, fault }).or_default() += 1;
    }
}

/// Counts while a simulation runs.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    coverage: Coverage,
    states: BTreeMap<VmId, &'static str>,
    /// The operations under way, by machine and call.
    open: BTreeMap<(VmId, u64), (Operation, &'static str)>,
}

impl Tally {
    pub(crate) fn coverage(&self) -> Coverage {
        self.coverage.clone()
    }

    pub(crate) fn occurrence(&mut self, vm: VmId, occurrence: &Occurrence<'_>) {
        match occurrence {
            Occurrence::Begun { operation, call, .. } => {
                let state = self.state(vm);
                self.coverage.count(Some(*operation), state, None);
                self.open.insert((vm, *call), (*operation, state));
            }
            Occurrence::Ended { call, .. } => {
                self.open.remove(&(vm, *call));
            }
            Occurrence::State { to, .. } => {
                self.states.insert(vm, to.name());
            }
            _ => {}
        }
    }

    /// Counts a fault for each operation that it meets; one of the host meets those of every machine.
    pub(crate) fn fault(&mut self, vm: Option<VmId>, kind: FaultKind) {
        let mut met = false;
        for ((of, _), (operation, state)) in &self.open {
            if vm.is_none_or(|vm| vm == *of) {
                met = true;
                self.coverage.count(Some(*operation), state, Some(kind));
            }
        }
        if let (false, Some(vm)) = (met, vm) {
            self.coverage.count(None, self.state(vm), Some(kind));
        }
    }

    fn state(&self, vm: VmId) -> &'static str {
        self.states.get(&vm).copied().unwrap_or(VmState::Created.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_and_the_faults_that_meet_them_are_counted_by_state() {
        let mut tally = Tally::default();
        let (one, other) = (VmId(1), VmId(2));
        let begun = |operation, call| Occurrence::Begun { operation, call, detail: "" };
        tally.occurrence(one, &begun(Operation::Start, 1));
        tally.fault(Some(one), FaultKind::BootSlow);
        tally
            .occurrence(one, &Occurrence::State { from: &VmState::Created, to: &VmState::Running });
        tally.occurrence(
            one,
            &Occurrence::Ended { operation: Operation::Start, call: 1, outcome: "ok" },
        );
        tally.fault(Some(one), FaultKind::GuestPanic);
        tally.occurrence(other, &begun(Operation::Wait, 1));
        tally.fault(None, FaultKind::HostLost);
        let cell = |operation, state, fault| Cell { operation, state, fault };
        let mut coverage = tally.coverage();
        for cell in [
            cell(Some(Operation::Start), "created", None),
            cell(Some(Operation::Start), "created", Some(FaultKind::BootSlow)),
            cell(None, "running", Some(FaultKind::GuestPanic)),
            cell(Some(Operation::Wait), "created", None),
            cell(Some(Operation::Wait), "created", Some(FaultKind::HostLost)),
        ] {
            assert_eq!(coverage.times(&cell), 1, "{cell:?}");
        }
        assert_eq!(coverage.iter().count(), 5);
        coverage.add(&coverage.clone());
        assert!(coverage.iter().all(|(_, times)| times == 2));
    }
}
