//! The reference model: what machines do, told a second time and in few words.
//!
//! It knows nothing of how twinvm works. A `World` is what may be the case; `World::regular` says how an operation
//! goes where nothing disturbs it. [`Checker`] keeps the set of all worlds that fit what was seen so far: calls at the
//! same time, dropped calls and faults lead from one world to several, and what is seen next leaves only those that fit.

use super::{
    linear::{self, Span},
    record::{CallRecord, Outcome, Seen, StepRecord},
    script::{Act, Call, Disturbance, Step},
};
use std::{collections::BTreeSet, fmt};
use vm_core::fault::FaultKind;
use vm_trait::Capabilities;

mod calls;
mod faults;
mod files;
mod worlds;

use worlds::{Late, Stage, World};

/// With more worlds than these, a history is no longer checked: it says too little to be worth the time.
const MOST_WORLDS: usize = 3000;

/// What is asked of a call's outcome.
#[derive(Clone, Debug)]
enum Want {
    Is(Outcome),
    /// An error whose code begins like this.
    Fails(&'static str),
    /// Success, whatever it gives.
    Succeeds,
}

/// Where a history did not go as it may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The number of the step.
    pub step: usize,
    /// What kind of thing is wrong, the same for the same defect.
    pub sort: String,
    /// What was seen and what was expected.
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}: {}", self.step, self.text)
    }
}

/// Checks a history step by step.
#[derive(Clone, Debug)]
pub struct Checker {
    capabilities: Capabilities,
    worlds: BTreeSet<World>,
    ordered: Vec<Disturbance>,
    fired: BTreeSet<FaultKind>,
    given_up: bool,
}

impl Checker {
    /// Begins with no machines.
    #[must_use]
    pub fn new(capabilities: Capabilities) -> Self {
        Self {
            capabilities,
            worlds: BTreeSet::from([World::default()]),
            ordered: Vec::new(),
            fired: BTreeSet::new(),
            given_up: false,
        }
    }

    /// Says whether so much may be the case that the rest of the history is not checked.
    #[must_use]
    pub fn has_given_up(&self) -> bool {
        self.given_up
    }

    /// Holds a step to the model.
    ///
    /// # Errors
    /// [`Violation`] where it cannot have gone as it was seen to.
    pub fn absorb(
        &mut self,
        index: usize,
        step: &Step,
        seen: &StepRecord,
    ) -> Result<(), Violation> {
        if let Step::Fault(disturbance) = step {
            self.ordered.push(*disturbance);
        }
        self.note_fired(&seen.fired);
        let calls: Vec<_> = seen.calls.iter().collect();
        let unexplained =
            |call: &&&CallRecord| call.outcome == Outcome::Hung && !self.may_hang(&call.call.act);
        if let Some(hung) = calls.iter().find(unexplained) {
            let sort = format!("hung: {}", sort_of(&hung.call.act));
            let text = format!("{} did not end within any deadline", hung.call);
            return Err(Violation { step: index, sort, text });
        }
        if self.given_up {
            return Ok(());
        }
        let spans: Vec<_> =
            calls.iter().map(|call| Span { began: call.began, ended: call.ended }).collect();
        let this = &*self;
        let after = linear::outcomes(self.worlds.clone(), &spans, |world, at, beside| {
            let beside: Vec<_> = beside.iter().map(|other| calls[*other]).collect();
            this.successors(world, calls[at], &Beside { left: &beside, all: &calls })
        });
        if after.is_empty() {
            return Err(self.impossible(index, &calls));
        }
        let later: BTreeSet<_> = after.iter().flat_map(|world| self.closure(world)).collect();
        let fitting: BTreeSet<_> =
            later.iter().filter(|world| world.states() == seen.states).cloned().collect();
        if fitting.is_empty() {
            return Err(wrong_states(index, &calls, &later, seen));
        }
        self.given_up = fitting.len() > MOST_WORLDS;
        self.worlds = fitting;
        Ok(())
    }

    /// Says whether a call may have no end: what is asked of a program that hangs has none.
    fn may_hang(&self, act: &Act) -> bool {
        matches!(act, Act::Ask { .. }) && self.fired.contains(&FaultKind::ExecHang)
    }

    /// Takes note of faults that happened: machines that they befell may die of them.
    fn note_fired(&mut self, fired: &[FaultKind]) {
        self.fired.extend(fired);
        for kind in fired.iter().copied().filter(|kind| faults::may_kill(*kind)) {
            let befell: Vec<_> = match faults::of_host(kind) {
                true => (0..=u8::MAX).collect(),
                false => {
                    let ordered = self.ordered.iter().filter(|order| order.kind == kind);
                    ordered.map(|order| order.vm).collect()
                }
            };
            let worlds = std::mem::take(&mut self.worlds);
            let doomed = worlds.into_iter().map(|mut world| {
                for (name, vm) in &mut world.vms {
                    if befell.contains(name) {
                        vm.late.insert(Late::Death);
                    }
                }
                world
            });
            self.worlds = doomed.collect();
        }
        if fired.contains(&FaultKind::HostLost) {
            let worlds = std::mem::take(&mut self.worlds);
            self.worlds = worlds.into_iter().flat_map(World::with_removed_ones_back).collect();
        }
    }

    /// Gives the worlds that a call leads to from `world`, as it went.
    fn successors(&self, world: &World, made: &CallRecord, beside: &Beside<'_>) -> Vec<World> {
        let mut found = Vec::new();
        for world in self.closure(world) {
            let regular = world.regular(&made.call, self.capabilities);
            let fitting = regular.iter().filter(|(want, _)| fits(want, &made.outcome));
            found.extend(fitting.map(|(_, after)| after.clone()));
            self.irregular(&world, made, beside, &regular, &mut found);
        }
        for world in &mut found {
            world.copies_keep_going(made, beside.left);
        }
        found
    }

    /// Adds what a call may have led to that was dropped, interrupted or disturbed.
    fn irregular(
        &self,
        world: &World,
        made: &CallRecord,
        beside: &Beside<'_>,
        regular: &[(Want, World)],
        found: &mut Vec<World>,
    ) {
        let Call { vm, act, drop_after_us, .. } = &made.call;
        match &made.outcome {
            Outcome::Dropped if drop_after_us.is_some() => {
                world.open_ended(*vm, act, regular, found);
            }
            Outcome::Hung => world.open_ended(*vm, act, regular, found),
            Outcome::Failed(code) => {
                let ender = beside.ends(*vm) || act.ends_life() || world.may_end(*vm);
                let cut = ["interrupted", "disconnected", "vmm_crashed", "guest_crashed"];
                let interrupted = ender && cut.contains(&code.as_str());
                let moving = match code.as_str() {
                    "invalid_state:starting" => beside.begins(*vm),
                    "invalid_state:stopping" => ender,
                    _ => false,
                };
                if moving {
                    found.push(world.clone());
                }
                let in_use = code == "port_in_use" && beside.listens(*vm);
                let explained = self.fired.iter().any(|kind| faults::explains(*kind, act, code));
                if interrupted || in_use || explained {
                    world.open_ended(*vm, act, regular, found);
                }
                if explained {
                    found.extend(world.with_stage(*vm, Stage::Crashed));
                    if matches!(act, Act::Snapshot { .. } | Act::Fork { .. }) {
                        found.extend(world.with_stage(*vm, Stage::Paused));
                    }
                }
            }
            Outcome::Ok(Seen::Children(children)) => {
                let explained = |code: &Option<String>| {
                    let Some(code) = code else { return true };
                    self.fired.iter().any(|kind| faults::explains(*kind, act, code))
                };
                if children.iter().any(Option::is_some) && children.iter().all(explained) {
                    found.extend(world.with_children(*vm, act, children));
                    let stuck = world.with_stage(*vm, Stage::Paused);
                    found.extend(stuck.and_then(|it| it.with_children(*vm, act, children)));
                }
            }
            Outcome::Ok(_) if self.fired.iter().any(|kind| faults::spoils_programs(*kind)) => {
                let runs = matches!(
                    act,
                    Act::Exec { .. }
                        | Act::Exchange { .. }
                        | Act::Random
                        | Act::Ask { .. }
                        | Act::Reap { .. }
                        | Act::Processes
                );
                if runs && world.is(*vm, Stage::Running) {
                    found.push(world.unsure_of_programs(*vm));
                }
            }
            _ => {}
        }
    }

    /// Gives all worlds that this one may have become by itself: calls whose end nobody saw are carried out late, and
    /// machines die of faults.
    fn closure(&self, world: &World) -> BTreeSet<World> {
        let resume_fails = self.fired.iter().any(|kind| faults::may_keep_paused(*kind));
        let mut all = BTreeSet::from([world.clone()]);
        let mut new = vec![world.clone()];
        while let Some(world) = new.pop() {
            for after in world.late_steps(self.capabilities, resume_fails) {
                if all.len() <= MOST_WORLDS && all.insert(after.clone()) {
                    new.push(after);
                }
            }
        }
        all
    }

    fn impossible(&self, index: usize, calls: &[&CallRecord]) -> Violation {
        let names: BTreeSet<_> = calls.iter().map(|made| sort_of(&made.call.act)).collect();
        let sort = format!("outcome: {}", names.into_iter().collect::<Vec<_>>().join(", "));
        let [made] = calls else {
            let went: Vec<_> = calls
                .iter()
                .map(|made| format!("{} → {}", made.call, made.outcome.text()))
                .collect();
            let text = format!("no order explains what these came to: {}", went.join("; "));
            return Violation { step: index, sort, text };
        };
        let wanted: BTreeSet<_> = self
            .worlds
            .iter()
            .flat_map(|world| world.regular(&made.call, self.capabilities))
            .map(|(want, _)| match want {
                Want::Is(outcome) => outcome.text(),
                Want::Fails(code) => format!("failed: {code}"),
                Want::Succeeds => "ok".to_owned(),
            })
            .collect();
        let wanted = wanted.into_iter().take(5).collect::<Vec<_>>().join("; or ");
        let text = format!("{} → {}; wanted {wanted}", made.call, made.outcome.text());
        Violation { step: index, sort, text }
    }
}

/// The other calls at the same time.
struct Beside<'a> {
    /// Those that have not had their effect.
    left: &'a [&'a CallRecord],
    /// All of the step.
    all: &'a [&'a CallRecord],
}

impl Beside<'_> {
    /// Says whether one of the step's calls ends this machine's life.
    fn ends(&self, vm: u8) -> bool {
        self.all.iter().any(|made| made.call.vm == vm && made.call.act.ends_life())
    }

    fn begins(&self, vm: u8) -> bool {
        let begins = |act: &Act| matches!(act, Act::Start | Act::Restore { .. });
        self.all.iter().any(|made| made.call.vm == vm && begins(&made.call.act))
    }

    fn listens(&self, vm: u8) -> bool {
        let listening = |made: &&&CallRecord| {
            let listens = matches!(made.call.act, Act::Listen { .. } | Act::Exchange { .. });
            made.call.vm == vm && listens
        };
        self.all.iter().filter(listening).count() > 1
    }
}

fn wrong_states(
    index: usize,
    calls: &[&CallRecord],
    worlds: &BTreeSet<World>,
    seen: &StepRecord,
) -> Violation {
    let wanted: BTreeSet<_> =
        worlds.iter().map(|world| format!("{:?}", world.states())).take(5).collect();
    let wanted = wanted.into_iter().collect::<Vec<_>>().join(" or ");
    let went: Vec<_> =
        calls.iter().map(|made| format!("{} → {}", made.call, made.outcome.text())).collect();
    let names: BTreeSet<_> = calls.iter().map(|made| sort_of(&made.call.act)).collect();
    let sort = format!("states: {}", names.into_iter().collect::<Vec<_>>().join(", "));
    let text = format!("after {}: states {:?}; wanted {wanted}", went.join("; "), seen.states);
    Violation { step: index, sort, text }
}

fn fits(want: &Want, outcome: &Outcome) -> bool {
    match (want, outcome) {
        (Want::Is(wanted), outcome) => wanted == outcome,
        (Want::Fails(prefix), Outcome::Failed(code)) => code.starts_with(prefix),
        (Want::Succeeds, Outcome::Ok(_)) => true,
        _ => false,
    }
}

/// Names an operation without its arguments.
fn sort_of(act: &Act) -> String {
    let text = format!("{act:?}");
    text.split([' ', '{']).next().unwrap_or_default().to_lowercase()
}
