//! [`World`]: one thing that may be the case.

use super::{
    super::{
        record::CallRecord,
        script::{Act, Call, Program},
    },
    Want,
    files::Files,
};
use std::collections::{BTreeMap, BTreeSet};
use vm_trait::Capabilities;

/// How many tracked snapshots a life of a machine remembers.
const REMEMBERED: usize = 8;

/// Machines and snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct World {
    pub(super) vms: BTreeMap<u8, Machine>,
    /// The snapshots that have names, by them.
    pub(super) names: BTreeMap<u8, u32>,
    /// All snapshots that were ever taken.
    pub(super) taken: Vec<Taken>,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Machine {
    pub(super) stage: Stage,
    pub(super) guest: Guest,
    /// Tracked snapshots of this life, the newest last.
    pub(super) tracked: Vec<u32>,
    pub(super) late: BTreeSet<Late>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Created,
    Running,
    Paused,
    Stopped,
    Crashed,
}

/// What is in a machine's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Guest {
    pub(super) files: Files,
    pub(super) keepers: BTreeMap<u8, Keeper>,
    /// Something befell its programs: they may have ended.
    pub(super) unsure: bool,
}

/// A program with a nonce and a count in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Keeper {
    pub(super) nonce: u32,
    pub(super) asked: u32,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Taken {
    pub(super) guest: Guest,
    pub(super) base: Option<u32>,
    /// The one that its file is a copy of.
    pub(super) twin: Option<u32>,
    pub(super) deleted: bool,
    /// Requests that were under way in the guest.
    pub(super) under_way: BTreeSet<Late>,
}

/// Something that may happen to a machine at any time from now on, once.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Late {
    Act(Act),
    Death,
    /// A capture that was dropped is over; a machine that cannot go on then stays paused.
    Captured,
}

impl Stage {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        }
    }

    pub(super) fn has_machine(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

impl Machine {
    pub(super) fn new(stage: Stage, guest: Guest) -> Self {
        Self { stage, guest, tracked: Vec::new(), late: BTreeSet::new() }
    }

    /// Ends its life; memory ends with it.
    pub(super) fn end(&mut self, stage: Stage) {
        *self = Self::new(stage, Guest::default());
    }

    pub(super) fn track(&mut self, snapshot: u32) {
        self.tracked.push(snapshot);
        if self.tracked.len() > REMEMBERED {
            self.tracked.remove(0);
        }
    }
}

impl World {
    /// Gives the states as records have them.
    pub(super) fn states(&self) -> BTreeMap<u8, String> {
        self.vms.iter().map(|(name, vm)| (*name, vm.stage.name().to_owned())).collect()
    }

    pub(super) fn is(&self, vm: u8, stage: Stage) -> bool {
        self.vms.get(&vm).is_some_and(|vm| vm.stage == stage)
    }

    /// Says whether a stop, kill or death may be under way.
    pub(super) fn may_end(&self, vm: u8) -> bool {
        let ends = |late: &Late| match late {
            Late::Act(act) => act.ends_life(),
            Late::Death => true,
            Late::Captured => false,
        };
        self.vms.get(&vm).is_some_and(|vm| vm.late.iter().any(ends))
    }

    /// Gives this world with a machine's life over, or with it in the state of a machine that lives.
    pub(super) fn with_stage(&self, vm: u8, stage: Stage) -> Option<Self> {
        let mut world = self.clone();
        let machine = world.vms.get_mut(&vm)?;
        if stage.has_machine() {
            if !machine.stage.has_machine() {
                return None;
            }
            machine.stage = stage;
        } else {
            machine.end(stage);
        }
        Some(world)
    }

    pub(super) fn take(&mut self, name: u8, taken: Taken) -> u32 {
        let id = u32::try_from(self.taken.len()).unwrap_or(u32::MAX);
        self.taken.push(taken);
        self.names.insert(name, id);
        id
    }

    /// Gives the worlds in which some removals of snapshots are forgotten, because their host was lost before they
    /// were for good.
    pub(super) fn with_removed_ones_back(self) -> BTreeSet<Self> {
        let gone: Vec<_> = (0..self.taken.len()).filter(|at| self.taken[*at].deleted).collect();
        let mut all = BTreeSet::from([self]);
        for at in gone {
            let back = all.iter().cloned().map(|mut world| {
                world.taken[at].deleted = false;
                world
            });
            let back: Vec<_> = back.collect();
            all.extend(back);
        }
        all
    }

    /// Says whether a snapshot and all that it builds on are there.
    pub(super) fn is_whole(&self, snapshot: u32) -> bool {
        let mut next = Some(snapshot);
        while let Some(id) = next {
            let Some(taken) = self.taken.get(id as usize) else { return false };
            if taken.deleted {
                return false;
            }
            next = taken.base;
        }
        true
    }

    /// Gives this world with those children of a fork that were made.
    pub(super) fn with_children(
        &self,
        vm: u8,
        act: &Act,
        children: &[Option<String>],
    ) -> Option<Self> {
        let Act::Fork { into } = act else { return None };
        let source = self.vms.get(&vm).filter(|vm| vm.stage.has_machine())?;
        let (stage, guest) = (source.stage, source.guest.clone());
        if children.len() != into.len() {
            return None;
        }
        let mut world = self.clone();
        for (name, _) in into.iter().zip(children).filter(|(_, error)| error.is_none()) {
            world.vms.insert(*name, Machine::new(stage, guest.clone()));
        }
        Some(world)
    }

    pub(super) fn unsure_of_programs(&self, vm: u8) -> Self {
        let mut world = self.clone();
        if let Some(vm) = world.vms.get_mut(&vm) {
            vm.guest.unsure = true;
        }
        world
    }

    /// Adds what may have become of a call of which nobody saw the end: nothing, all of it, or all of it later.
    pub(super) fn open_ended(
        &self,
        vm: u8,
        act: &Act,
        regular: &[(Want, Self)],
        found: &mut Vec<Self>,
    ) {
        found.push(self.clone());
        if matches!(act, Act::Start | Act::Restore { .. })
            && self.vms.get(&vm).is_some_and(|vm| !vm.stage.has_machine())
        {
            found.extend(self.with_stage(vm, Stage::Stopped));
        }
        // What nobody got a handle to has no name.
        let unnamed = matches!(
            act,
            Act::Create
                | Act::Revive { .. }
                | Act::Fork { .. }
                | Act::Snapshot { .. }
                | Act::Spawn { .. }
        ) || act.is_of_backend();
        if matches!(act, Act::Fork { .. } | Act::Snapshot { .. }) {
            let mut later = self.clone();
            later.vms.get_mut(&vm).map(|machine| machine.late.insert(Late::Captured));
            found.push(later);
        }
        if unnamed {
            return;
        }
        found
            .extend(regular.iter().filter(|(want, _)| want.is_success()).map(|(_, it)| it.clone()));
        let mut later = self.clone();
        if let Some(machine) = later.vms.get_mut(&vm) {
            let runs = matches!(
                act,
                Act::Exec { .. } | Act::Exchange { .. } | Act::Ask { .. } | Act::Reap { .. }
            );
            if runs {
                machine.guest.unsure = true;
            }
            machine.late.insert(Late::Act(act.clone()));
            found.push(later);
        }
    }

    /// Gives the worlds in which one of the things that may happen late has happened.
    pub(super) fn late_steps(&self, capabilities: Capabilities, resume_fails: bool) -> Vec<Self> {
        let mut after = Vec::new();
        for (name, machine) in &self.vms {
            for late in &machine.late {
                let mut world = self.clone();
                if let Some(machine) = world.vms.get_mut(name) {
                    machine.late.remove(late);
                }
                match late {
                    Late::Death if machine.stage.has_machine() => {
                        after.extend(world.with_stage(*name, Stage::Crashed));
                    }
                    Late::Captured if machine.stage == Stage::Running && resume_fails => {
                        after.extend(world.with_stage(*name, Stage::Paused));
                    }
                    Late::Death | Late::Captured => {}
                    Late::Act(Act::Exec { program: Program::PowerOff, .. }) => {
                        if machine.stage.has_machine() {
                            after.extend(world.with_stage(*name, Stage::Stopped));
                        }
                    }
                    Late::Act(act) => {
                        let regular = world.regular(&Call::new(*name, act.clone()), capabilities);
                        let done = regular.into_iter().filter(|(want, _)| want.is_success());
                        after.extend(done.map(|(_, world)| world));
                    }
                }
            }
        }
        after
    }

    /// Takes note that what the guest was about to do when it was copied is done in the copies too.
    pub(super) fn copies_keep_going(&mut self, made: &CallRecord, left: &[&CallRecord]) {
        let asked = |other: &&&CallRecord| {
            other.call.vm == made.call.vm && other.call.act.asks_guest() && other.began < made.ended
        };
        let mut late: BTreeSet<_> =
            left.iter().filter(asked).map(|other| Late::Act(other.call.act.clone())).collect();
        if let Some(source) = self.vms.get(&made.call.vm) {
            late.extend(source.late.iter().filter(|late| matches!(late, Late::Act(_))).cloned());
        }
        if late.is_empty() {
            return;
        }
        match &made.call.act {
            Act::Snapshot { into, .. } => {
                let id = self.names.get(into).copied();
                if let Some(taken) = id.and_then(|id| self.taken.get_mut(id as usize)) {
                    taken.under_way.extend(late);
                }
            }
            Act::Fork { into } => {
                for name in into {
                    if let Some(child) = self.vms.get_mut(name) {
                        child.late.extend(late.iter().cloned());
                    }
                }
            }
            _ => {}
        }
    }
}

impl Want {
    fn is_success(&self) -> bool {
        match self {
            Self::Is(outcome) => matches!(outcome, super::Outcome::Ok(_)),
            Self::Fails(_) => false,
            Self::Succeeds => true,
        }
    }
}
