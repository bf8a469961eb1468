//! [`Tracker`]: what changed since which moment of a machine's life.
//!
//! What the guest writes to memory is in KVM's log, which is switched on at the first capture that is tracked; what this
//! process writes for it, memory notes itself. For what changed since a machine was loaded there is no need of either:
//! what is mapped from a file is private, so that a page that anybody wrote to is this process's own, as its page tables
//! say. A machine that was just loaded runs as fast as one that nobody tracks.

use super::{memory::give_to_guest, refuse::kvm_failed};
use crate::{control::Refusal, snapshot::PAGE};
use kvm_ioctls::VmFd;
use std::{collections::VecDeque, ops::Range};
use vm_core::machine::Generation;
use vm_kvm_devices::{DiskChanges, Memory};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// Which parts of some bytes changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Parts {
    /// The length of a part in bytes.
    length: u64,
    /// A bit for each part, the first as the lowest of the first word.
    words: Vec<u64>,
}

/// What changed since some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Of each region of memory; without it, all pages that are this process's own.
    pub(super) memory: Option<Vec<Parts>>,
    /// Of each writable disk.
    pub(super) disks: Vec<Parts>,
}

/// Keeps track of what changes.
#[derive(Debug)]
pub(super) struct Tracker {
    moments: Moments,
    /// Whether KVM's log is on.
    logs: bool,
    /// The notes of all writable disks.
    disks: Vec<DiskChanges>,
}

impl Tracker {
    /// Begins with nothing to keep track of.
    pub(super) fn new(disks: Vec<DiskChanges>) -> Self {
        Self { moments: Moments::default(), logs: false, disks }
    }

    /// Keeps track from here on of a machine that was just loaded.
    pub(super) fn loaded(&mut self) {
        self.moments.loaded();
    }

    /// Looks at what changed in a machine that stands still; with `track`, that is noted from now on.
    ///
    /// # Errors
    /// When KVM refuses; no moment is known any more then.
    pub(super) fn look(&mut self, vm: &VmFd, memory: &Memory, track: bool) -> Result<(), Refusal> {
        if !track && self.moments.known.is_empty() {
            return Ok(());
        }
        let changes = self.changes(vm, memory, track).inspect_err(|_| {
            self.moments.known.clear();
            self.logs = false;
        })?;
        self.moments.add(&changes);
        Ok(())
    }

    /// Gives what changed between a moment and the last [`look`](Self::look).
    ///
    /// # Errors
    /// [`Refusal::Generation`] for a moment that is not known.
    pub(super) fn since(&self, moment: u64) -> Result<Changes, Refusal> {
        self.moments.since(moment).ok_or(Refusal::Generation(moment))
    }

    /// Makes the last [`look`](Self::look) a moment, and gives its number.
    pub(super) fn begin(&mut self) -> u64 {
        self.moments.begin()
    }

    fn changes(&mut self, vm: &VmFd, memory: &Memory, track: bool) -> Result<Changes, Refusal> {
        let taken = |disk: &DiskChanges| Parts { length: disk.part_bytes(), words: disk.take() };
        let disks = self.disks.iter().map(taken).collect();
        if self.logs {
            let memory = (0..).zip(memory.iter()).map(|(slot, region)| {
                let bytes = usize::try_from(region.len()).unwrap_or(usize::MAX);
                let words = vm.get_dirty_log(slot, bytes).map_err(kvm_failed("dirty log"))?;
                let mut parts = Parts { length: PAGE, words };
                parts.add(&(**region).bitmap().get_and_reset());
                Ok(parts)
            });
            return Ok(Changes { memory: Some(memory.collect::<Result<_, Refusal>>()?), disks });
        }
        if track {
            give_to_guest(vm, memory, true)?;
            memory.iter().for_each(|region| (**region).bitmap().reset());
            self.logs = true;
        }
        Ok(Changes { memory: None, disks })
    }
}

impl Parts {
    /// Gives the bytes that changed, as ranges that do not touch, in ascending order. The last may end behind the end.
    pub(super) fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            at = self.next(start, false).unwrap_or(self.words.len() as u64 * 64);
            Some(start * self.length..at * self.length)
        })
    }

    /// Finds the first part from one on that changed, or that did not.
    fn next(&self, from: u64, changed: bool) -> Option<u64> {
        let mut mask = u64::MAX << (from % 64);
        let first = usize::try_from(from / 64).ok()?;
        for (number, word) in (from / 64..).zip(self.words.get(first..)?) {
            let found = if changed { *word } else { !*word } & mask;
            if found != 0 {
                return Some(number * 64 + u64::from(found.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    fn add(&mut self, words: &[u64]) {
        self.words.resize(self.words.len().max(words.len()), 0);
        for (word, more) in self.words.iter_mut().zip(words) {
            *word |= more;
        }
    }
}

/// The last moments of a machine's life, and what changed between them.
#[derive(Debug, Default)]
struct Moments {
    known: VecDeque<Moment>,
    /// The number of the last one that is not that of the loading.
    last: u64,
}

#[derive(Debug)]
struct Moment {
    number: u64,
    /// What changed from then until the next.
    changes: Changes,
}

impl Moments {
    fn loaded(&mut self) {
        let number = Generation::LOADED.0;
        self.known.push_back(Moment { number, changes: Changes::default() });
    }

    fn begin(&mut self) -> u64 {
        self.last += 1;
        if self.known.len() >= Generation::KEPT {
            self.known.pop_front();
        }
        self.known.push_back(Moment { number: self.last, changes: Changes::default() });
        self.last
    }

    fn add(&mut self, changes: &Changes) {
        if let Some(moment) = self.known.back_mut() {
            moment.changes.add(changes);
        }
    }

    fn since(&self, moment: u64) -> Option<Changes> {
        let from = self.known.iter().position(|known| known.number == moment)?;
        let mut changes = Changes { memory: Some(Vec::new()), disks: Vec::new() };
        for moment in self.known.iter().skip(from) {
            changes.add(&moment.changes);
        }
        if moment == Generation::LOADED.0 {
            changes.memory = None;
        }
        Some(changes)
    }
}

impl Changes {
    fn add(&mut self, more: &Self) {
        fn merge(all: &mut Vec<Parts>, more: &[Parts]) {
            for (parts, more) in all.iter_mut().zip(more) {
                parts.add(&more.words);
            }
            all.extend(more.iter().skip(all.len()).cloned());
        }
        merge(&mut self.disks, &more.disks);
        if let Some(more) = &more.memory {
            merge(self.memory.get_or_insert_default(), more);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// How many parts the tests' memory and disk have.
    const COUNT: u64 = 200;

    fn parts(numbers: &BTreeSet<u64>, length: u64) -> Parts {
        let mut words = vec![0; usize::try_from(COUNT.div_ceil(64)).unwrap()];
        for number in numbers {
            words[usize::try_from(number / 64).unwrap()] |= 1 << (number % 64);
        }
        Parts { length, words }
    }

    fn numbers(parts: &Parts) -> BTreeSet<u64> {
        let length = parts.length;
        parts.ranges().flat_map(|range| range.start / length..range.end / length).collect()
    }

    fn sets() -> impl Strategy<Value = BTreeSet<u64>> {
        prop_oneof![
            prop::collection::btree_set(0..COUNT, 0..20),
            (0..COUNT, 0..COUNT).prop_map(|(from, to)| (from..to).collect()),
        ]
    }

    proptest! {
        #[test]
        fn ranges_hold_the_parts_that_changed(set in sets()) {
            let parts = parts(&set, 4096);
            prop_assert_eq!(numbers(&parts), set);
            let ranges: Vec<_> = parts.ranges().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn a_moment_knows_all_that_changed_since(
            loaded: bool,
            steps in prop::collection::vec((sets(), sets(), any::<bool>()), 1..30),
        ) {
            let mut moments = Moments::default();
            let mut model: Vec<(u64, BTreeSet<u64>, BTreeSet<u64>)> = Vec::new();
            if loaded {
                moments.loaded();
                model.push((0, BTreeSet::new(), BTreeSet::new()));
            }
            for (memory, disk, begin) in steps {
                moments.add(&Changes {
                    memory: Some(vec![parts(&memory, 4096)]),
                    disks: vec![parts(&disk, 1 << 16)],
                });
                for (_, all_memory, all_disk) in &mut model {
                    all_memory.extend(&memory);
                    all_disk.extend(&disk);
                }
                for (number, memory, disk) in model.iter().rev().take(Generation::KEPT) {
                    let changes = moments.since(*number).unwrap();
                    match changes.memory {
                        None => prop_assert_eq!(*number, 0),
                        Some(parts) => prop_assert_eq!(&numbers(&parts[0]), memory),
                    }
                    prop_assert_eq!(&numbers(&changes.disks[0]), disk);
                }
                for (number, ..) in model.iter().rev().skip(Generation::KEPT) {
                    prop_assert_eq!(moments.since(*number), None);
                }
                if begin {
                    model.push((moments.begin(), BTreeSet::new(), BTreeSet::new()));
                }
                prop_assert_eq!(moments.since(moments.last + 1), None);
            }
        }
    }
}
