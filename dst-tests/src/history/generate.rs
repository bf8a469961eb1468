//! Scripts drawn from a seed.
//!
//! Steps are drawn by proptest's strategies. A second pass leads machines back to where most operations are allowed, so
//! that a history is not a list of refusals; it guesses how operations go and is free to be wrong.

use super::script::{Act, Call, Disturbance, HOME, Program, Script, Step};
use proptest::{
    prelude::*,
    strategy::{BoxedStrategy, Union, ValueTree},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};
use vm_core::fault::{FaultKind, FaultScope};
use vm_trait::{Capabilities, Capability};

/// Names of machines, snapshots and programs.
const VMS: u8 = 4;
const SNAPSHOTS: u8 = 3;
const PROCESSES: u8 = 2;

/// What a history may be made of.
#[derive(Clone, Debug)]
pub struct Profile {
    /// What the backend can do; the rest is asked for now and then, to be refused.
    pub capabilities: Capabilities,
    /// The faults that may be ordered.
    pub faults: Vec<FaultKind>,
    /// How many steps.
    pub steps: RangeInclusive<usize>,
    /// Which calls there may be at the same time.
    pub together: Together,
    /// Whether futures are dropped before their ends.
    pub drops: bool,
    /// Whether operations are costly: then those that copy memory are rare.
    pub costly: bool,
    /// Whether operations are asked for that the backend cannot do.
    pub beyond: bool,
}

/// Which calls there may be at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Together {
    /// Any, on the same machine too.
    Any,
    /// Those of which the outcomes do not depend on the order.
    Independent,
}

impl Profile {
    /// Gives what is apt for a backend: long histories where time is simulated, short ones on a real host.
    #[must_use]
    pub fn of(capabilities: Capabilities, faults: Vec<FaultKind>, simulated: bool) -> Self {
        Self {
            capabilities,
            faults,
            steps: if simulated { 8..=45 } else { 6..=16 },
            together: Together::Any,
            drops: true,
            costly: !simulated,
            beyond: true,
        }
    }

    /// Limits a history to what goes the same way on any two backends, whatever their speed.
    #[must_use]
    pub fn for_comparison(mut self) -> Self {
        let at_once = |kind: &FaultKind| {
            matches!(
                kind,
                FaultKind::VmmKilled
                    | FaultKind::GuestPanic
                    | FaultKind::HostDiskFull
                    | FaultKind::BootPanic
            )
        };
        self.faults.retain(at_once);
        self.together = Together::Independent;
        self.drops = false;
        self.beyond = false;
        self
    }
}

/// Draws the script of a seed.
///
/// # Panics
/// Never: every draw of these strategies succeeds.
#[must_use]
pub fn script(seed: u64, profile: &Profile) -> Script {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    bytes[8..16].copy_from_slice(b"history1");
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let config = Config { failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, rng);
    let drawn = drafts(profile).new_tree(&mut runner).expect("nothing is rejected").current();
    Script { seed, steps: Composer::new(profile).compose(drawn) }
}

/// A step as it was drawn, and what may take its place.
#[derive(Clone, Debug)]
struct Draft {
    step: Step,
    /// Says how much is done to bring its machine back first.
    remedy: u8,
    resume: bool,
}

fn drafts(profile: &Profile) -> impl Strategy<Value = Vec<Draft>> + use<> {
    let steps = profile.steps.clone();
    // Some histories are calm, some stormy.
    let kinds = if profile.faults.is_empty() { vec![0] } else { vec![0, 0, 4, 12, 30] };
    let profile = profile.clone();
    prop::sample::select(kinds).prop_flat_map(move |storm| {
        let draft = (step(&profile, storm), 0_u8..10, any::<bool>());
        let draft = draft.prop_map(|(step, remedy, resume)| Draft { step, remedy, resume });
        prop::collection::vec(draft, steps.clone())
    })
}

fn step(profile: &Profile, storm: u32) -> BoxedStrategy<Step> {
    let one = call(profile).prop_map(Step::Do).boxed();
    let mut all = vec![(100, one), (22, together(profile))];
    if storm > 0 {
        all.push((storm, fault(profile)));
    }
    Union::new_weighted(all).boxed()
}

fn call(profile: &Profile) -> BoxedStrategy<Call> {
    let act = act(profile);
    let after = if profile.drops {
        prop_oneof![24 => Just(None), 1 => Just(Some(0)), 2 => (1_u32..40_000).prop_map(Some)]
            .boxed()
    } else {
        Just(None).boxed()
    };
    (vm(), act, after)
        .prop_map(|(vm, act, drop_after_us)| Call { vm, act, after_ms: 0, drop_after_us })
        .boxed()
}

/// The first machine is asked more often than the others.
fn vm() -> BoxedStrategy<u8> {
    prop_oneof![3 => Just(0), 2 => 0..VMS].boxed()
}

fn together(profile: &Profile) -> BoxedStrategy<Step> {
    let act = match profile.together {
        Together::Any => {
            prop_oneof![2 => small(profile), 1 => lifecycle(profile), 1 => short_capture(profile)]
                .boxed()
        }
        Together::Independent => {
            prop_oneof![2 => independent(profile), 1 => Just(Act::Ping).boxed()].boxed()
        }
    };
    let after = prop_oneof![3 => Just(0_u32), 1 => 1_u32..20];
    let call = (act, after, any::<bool>(), vm()).prop_map(|(act, after_ms, same, vm)| {
        (Call { vm, act, after_ms, drop_after_us: None }, same)
    });
    (vm(), prop::collection::vec(call, 2..=4))
        .prop_map(|(vm, calls)| {
            let mostly = calls.into_iter().map(|(call, same)| match same {
                true => Call { vm, ..call },
                false => call,
            });
            Step::Together(mostly.collect())
        })
        .boxed()
}

/// Whether a fault can happen in a history whose outcome a model knows.
fn may_happen(kind: FaultKind) -> bool {
    // What a disk lies about comes out at a time of its own, and the machines of histories have neither directories of the
    // host nor a network.
    kind != FaultKind::LostSync && !matches!(kind.scope(), FaultScope::Mount | FaultScope::Network)
}

fn fault(profile: &Profile) -> BoxedStrategy<Step> {
    let kinds: Vec<_> = profile.faults.iter().copied().filter(|kind| may_happen(*kind)).collect();
    if kinds.is_empty() {
        return call(profile).prop_map(Step::Do).boxed();
    }
    let timed = profile.drops;
    let drawn = (prop::sample::select(kinds), vm(), 0_u32..3, prop::option::of(1_u32..600));
    drawn
        .prop_map(move |(kind, vm, skip, amount_ms)| {
            let at_once = matches!(kind.scope(), FaultScope::Running | FaultScope::Clock);
            let skip = if at_once || !timed { 0 } else { skip };
            Step::Fault(Disturbance { kind, vm, skip, amount_ms: amount_ms.filter(|_| timed) })
        })
        .boxed()
}

fn act(profile: &Profile) -> BoxedStrategy<Act> {
    let weigh = |weight: u32| if profile.costly { weight.div_ceil(3) } else { weight };
    let able = |capability| profile.capabilities.has(capability);
    let mut all = vec![
        (26, lifecycle(profile)),
        (60, small(profile)),
        (14, whole_trees()),
        (18, on_processes()),
        (2, Just(Act::Create).boxed()),
        (1, Just(Act::Forget).boxed()),
    ];
    if able(Capability::Snapshot) || profile.beyond {
        all.push((weigh(30), on_snapshots(profile)));
    }
    if able(Capability::Fork) || profile.beyond {
        let into = prop::collection::vec(0..VMS, 0..=2);
        all.push((weigh(8), into.prop_map(|into| Act::Fork { into }).boxed()));
    }
    if able(Capability::GuestKernel) && profile.drops {
        let off = Act::Exec { program: Program::PowerOff, timeout_ms: None, output_limit: None };
        all.push((1, Just(off).boxed()));
    }
    Union::new_weighted(all).boxed()
}

fn lifecycle(profile: &Profile) -> BoxedStrategy<Act> {
    let mut all = vec![
        (3, Just(Act::Start).boxed()),
        (2, stop().boxed()),
        (2, Just(Act::Kill).boxed()),
        (2, Just(Act::Wait).boxed()),
        (
            2,
            prop::sample::select(vec![0_u32, 20, 60])
                .prop_map(|timeout_ms| Act::WaitReady { timeout_ms })
                .boxed(),
        ),
        (2, Just(Act::Metrics).boxed()),
    ];
    if profile.capabilities.has(Capability::Pause) || profile.beyond {
        all.push((5, Just(Act::Pause).boxed()));
        all.push((5, Just(Act::Resume).boxed()));
    }
    if profile.capabilities.has(Capability::Inspect) || profile.beyond {
        all.push((2, Just(Act::Inspect).boxed()));
    }
    Union::new_weighted(all).boxed()
}

fn stop() -> impl Strategy<Value = Act> {
    let grace = prop::sample::select(vec![0_u32, 1, 50, 500]);
    let signal = prop::sample::select(vec![15_u8, 2, 9, 10]);
    (grace, signal).prop_map(|(grace_ms, signal)| Act::Stop { grace_ms, signal })
}

fn short_capture(profile: &Profile) -> BoxedStrategy<Act> {
    if profile.costly || !profile.capabilities.has(Capability::Snapshot) {
        return small(profile);
    }
    (0..SNAPSHOTS).prop_map(|into| Act::Snapshot { into, tracked: false, base: None }).boxed()
}

fn path() -> BoxedStrategy<String> {
    let names = ["a", "b", "d", "d/a", "d/e", "d/e/f", "\u{e9} '$x\n"];
    let known = prop::sample::select(names.to_vec()).prop_map(|name| format!("{HOME}/{name}"));
    let hostile = prop::sample::select(vec![
        String::new(),
        "relative".to_owned(),
        format!("{HOME}/../{}", "x"),
        format!("{HOME}//a"),
        format!("{HOME}/a/"),
        format!("{HOME}/{}", "n".repeat(256)),
        format!("{HOME}/nul\0"),
        "/no-such-directory/a".to_owned(),
    ]);
    prop_oneof![14 => known, 1 => hostile].boxed()
}

fn own_path() -> BoxedStrategy<String> {
    path().prop_map(|path| if path.starts_with("/no") { format!("{HOME}/a") } else { path }).boxed()
}

/// A directory that may be there.
fn directory() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["", "/d", "/d/e", "/a"]).prop_map(|rest| format!("{HOME}{rest}"))
}

/// Permission bits with which their owner, who may be an ordinary user, can still do everything.
fn mode(bits: [u16; 3]) -> BoxedStrategy<Option<u16>> {
    prop_oneof![3 => Just(None), 1 => prop::sample::select(bits.to_vec()).prop_map(Some)].boxed()
}

fn file_mode() -> BoxedStrategy<Option<u16>> {
    mode([0o600, 0o755, 0o4710])
}

fn directory_mode() -> BoxedStrategy<Option<u16>> {
    mode([0o700, 0o711, 0o1770])
}

/// Operations that change at most one name or file, and so take effect at one instant.
fn small(profile: &Profile) -> BoxedStrategy<Act> {
    let text = prop::sample::select(vec!["", "x", "line\n", "\u{1f980}'\"$"]);
    let times = prop_oneof![6 => 0_u32..20, 1 => 4000_u32..20_000];
    let write =
        (path(), text.clone(), times.clone(), file_mode()).prop_map(|(path, text, times, mode)| {
            Act::Write { path, text: text.to_owned(), times, mode }
        });
    let rename = (path(), path()).prop_map(|(from, to)| Act::Rename { from, to });
    let mut all = vec![
        (16, write.boxed()),
        (14, path().prop_map(|path| Act::Read { path }).boxed()),
        (5, path().prop_map(|path| Act::Stat { path }).boxed()),
        (6, path().prop_map(|path| Act::List { path }).boxed()),
        (
            8,
            (own_path(), directory_mode())
                .prop_map(|(path, mode)| Act::MakeDir { path, recursive: false, mode })
                .boxed(),
        ),
        (5, path().prop_map(|path| Act::Remove { path, recursive: false }).boxed()),
        (6, rename.boxed()),
        (12, exec(profile)),
        (2, Just(Act::Ping).boxed()),
        (3, Just(Act::Random).boxed()),
    ];
    if profile.capabilities.has(Capability::Vsock) || profile.beyond {
        let port = || prop::sample::select(vec![5000_u32, 6000, 0, 1024, u32::MAX]);
        all.push((2, port().prop_map(|port| Act::Connect { port }).boxed()));
        let port = prop::sample::select(vec![7000_u32, 7001, 0, u32::MAX]);
        all.push((1, port.clone().prop_map(|port| Act::Listen { port }).boxed()));
        let exchange = (port, text, times).prop_map(|(port, text, times)| Act::Exchange {
            port,
            text: text.to_owned(),
            times,
        });
        all.push((2, exchange.boxed()));
    }
    Union::new_weighted(all).boxed()
}

/// Operations on many names, which others may see half-way.
fn whole_trees() -> BoxedStrategy<Act> {
    prop_oneof![
        3 => (own_path(), directory_mode())
            .prop_map(|(path, mode)| Act::MakeDir { path, recursive: true, mode }),
        2 => own_path().prop_map(|path| Act::Remove { path, recursive: true }),
    ]
    .boxed()
}

/// Operations that change nothing.
fn independent(profile: &Profile) -> BoxedStrategy<Act> {
    prop_oneof![
        path().prop_map(|path| Act::Read { path }),
        path().prop_map(|path| Act::Stat { path }),
        path().prop_map(|path| Act::List { path }),
        exec(profile),
    ]
    .boxed()
}

fn exec(profile: &Profile) -> BoxedStrategy<Act> {
    let program = prop_oneof![
        4 => prop::sample::select(vec!["", "text", "two\nlines", "\u{4e2d} $HOME '\""])
            .prop_map(|text| Program::Echo(text.to_owned())),
        2 => any::<u8>().prop_map(Program::Exit),
        1 => prop::sample::select(vec![1_u8, 9, 15]).prop_map(Program::KillItself),
        4 => own_path().prop_filter("no word of a command line has a NUL", |path| !path.contains('\0'))
            .prop_map(|path| if path.starts_with(HOME) { path } else { format!("{HOME}/a") })
            .prop_map(Program::Cat),
        1 => (directory(), prop::sample::select(vec!["a", "e", "f"]))
            .prop_map(|(dir, name)| Program::CatIn { dir, name: name.to_owned() }),
        2 => (prop::sample::select(vec!["", "y", "\u{4e2d}\n"]), prop_oneof![0_u32..20, 4000_u32..30_000])
            .prop_map(|(text, times)| Program::Mirror { text: text.to_owned(), times }),
        1 => prop::sample::select(vec!["", " two  words ", "$HOME=\u{e9}"])
            .prop_map(|word| Program::Say(word.to_owned())),
        1 => Just(Program::Missing),
        1 => Just(Program::NoName),
    ];
    let mut programs = vec![(17, program.boxed())];
    if profile.capabilities.has(Capability::Tty) || profile.beyond {
        // Some `stty` take other sizes for mistakes, and tell of 24 by 80.
        let size = prop::sample::select(vec![(2_u16, 2_u16), (24, 80), (500, 1000)]);
        programs.push((1, size.prop_map(|(rows, cols)| Program::Terminal { rows, cols }).boxed()));
    }
    if profile.capabilities.has(Capability::Users) || profile.beyond {
        let ids = prop::sample::select(vec![(0_u32, 0_u32), (1000, 1000), (65_534, 7)]);
        programs.push((1, ids.prop_map(|(uid, gid)| Program::RunAs { uid, gid }).boxed()));
    }
    let program = Union::new_weighted(programs);
    let limit =
        prop_oneof![6 => Just(None), 1 => prop::sample::select(vec![0_u32, 1, 4]).prop_map(Some)];
    let plain = (program, limit).prop_map(|(program, output_limit)| Act::Exec {
        program,
        timeout_ms: None,
        output_limit,
    });
    let sleeps =
        prop::sample::select(vec![(5_u32, None), (30_000, Some(60_u32)), (30_000, Some(1))]);
    let sleep = sleeps.prop_map(|(ms, timeout_ms)| Act::Exec {
        program: Program::Sleep(ms),
        timeout_ms,
        output_limit: None,
    });
    prop_oneof![7 => plain, 2 => sleep].boxed()
}

fn on_processes() -> BoxedStrategy<Act> {
    prop_oneof![
        4 => (0..PROCESSES, 0_u32..1000).prop_map(|(process, nonce)| Act::Spawn { process, nonce }),
        6 => (0..PROCESSES).prop_map(|process| Act::Ask { process }),
        1 => (0..PROCESSES, prop::sample::select(vec![9_u8, 15, 1, 10]))
            .prop_map(|(process, signal)| Act::Reap { process, signal }),
        2 => Just(Act::Processes),
    ]
    .boxed()
}

fn on_snapshots(profile: &Profile) -> BoxedStrategy<Act> {
    let name = || 0..SNAPSHOTS;
    let rare = if profile.costly { 1 } else { 3 };
    let snapshot = (name(), any::<bool>(), prop::option::weighted(0.3, name()));
    let snapshot = snapshot.prop_map(|(into, tracked, base)| Act::Snapshot { into, tracked, base });
    prop_oneof![
        10 => snapshot,
        6 => (name(), any::<bool>()).prop_map(|(from, resume)| Act::Restore { from, resume }),
        8 => (name(), any::<bool>()).prop_map(|(from, resume)| Act::Revive { from, resume }),
        rare => (name(), name()).prop_map(|(from, into)| Act::Carry { from, into }),
        rare => (name(), any::<u32>()).prop_map(|(from, at)| Act::Spoil { from, at }),
        rare => (name(), name()).prop_map(|(from, into)| Act::Merge { from, into }),
        2 => name().prop_map(|snapshot| Act::Delete { snapshot }),
    ]
    .boxed()
}

/// What a machine is thought to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guess {
    Off,
    Running,
    Paused,
}

struct Composer<'a> {
    profile: &'a Profile,
    vms: BTreeMap<u8, Guess>,
    snapshots: BTreeSet<u8>,
    steps: Vec<Step>,
}

impl<'a> Composer<'a> {
    fn new(profile: &'a Profile) -> Self {
        Self { profile, vms: BTreeMap::new(), snapshots: BTreeSet::new(), steps: Vec::new() }
    }

    fn compose(mut self, drafts: Vec<Draft>) -> Vec<Step> {
        let most = *self.profile.steps.end();
        for draft in drafts {
            if self.steps.len() >= most {
                break;
            }
            self.prepare(&draft);
            self.push(draft.step);
        }
        self.steps
    }

    /// Brings the machine of a draft to where its operations are allowed, most of the time.
    fn prepare(&mut self, draft: &Draft) {
        let vm = match &draft.step {
            Step::Do(call) => call.vm,
            Step::Together(calls) => calls.first().map_or(0, |call| call.vm),
            Step::Fault(_) => return,
        };
        let called = draft.step.calls();
        let restores = called.iter().any(|call| matches!(call.act, Act::Restore { .. }));
        let makes = called.iter().any(|call| matches!(call.act, Act::Create | Act::Revive { .. }));
        let needs_snapshot = called
            .iter()
            .any(|call| call.act.is_of_backend() || matches!(call.act, Act::Revive { .. }));
        if draft.remedy == 0 || makes || (needs_snapshot && self.snapshots.is_empty()) {
            return;
        }
        if !self.vms.contains_key(&vm) {
            self.bring_about(vm, draft);
        }
        let guess = self.vms.get(&vm).copied();
        let act = match guess {
            Some(Guess::Running) if restores => Act::Kill,
            Some(Guess::Off) if !restores && draft.remedy > 2 => Act::Start,
            Some(Guess::Paused) if restores => Act::Kill,
            Some(Guess::Paused) if draft.remedy > 4 => Act::Resume,
            _ => return,
        };
        self.push(Step::Do(Call::new(vm, act)));
    }

    /// Makes a machine in one of the ways in which they come about.
    fn bring_about(&mut self, vm: u8, draft: &Draft) {
        let source = self.vms.iter().find(|(_, guess)| **guess != Guess::Off).map(|(vm, _)| *vm);
        let forks = self.profile.capabilities.has(Capability::Fork);
        let revives = self.profile.capabilities.has(Capability::Snapshot);
        let snapshot = self.snapshots.first().copied();
        let call = match (source, snapshot) {
            (_, Some(from)) if revives && draft.remedy.is_multiple_of(2) => {
                Call::new(vm, Act::Revive { from, resume: draft.resume })
            }
            (Some(source), _) if forks => Call::new(source, Act::Fork { into: vec![vm] }),
            _ => Call::new(vm, Act::Create),
        };
        self.push(Step::Do(call));
    }

    fn push(&mut self, step: Step) {
        for call in step.calls() {
            self.guess(call);
        }
        self.steps.push(step);
    }

    fn guess(&mut self, call: &Call) {
        let known = self.vms.get(&call.vm).copied();
        match (&call.act, known) {
            (Act::Create, _) => self.set(call.vm, Guess::Off),
            (Act::Revive { from, resume } | Act::Restore { from, resume }, _) => {
                let new = matches!(call.act, Act::Revive { .. }) || known == Some(Guess::Off);
                if self.snapshots.contains(from) && new {
                    self.set(call.vm, if *resume { Guess::Running } else { Guess::Paused });
                }
            }
            (Act::Forget, _) => {
                self.vms.remove(&call.vm);
            }
            (Act::Start, Some(Guess::Off)) => self.set(call.vm, Guess::Running),
            (act, Some(_)) if act.ends_life() => self.set(call.vm, Guess::Off),
            (Act::Pause, Some(Guess::Running)) => self.set(call.vm, Guess::Paused),
            (Act::Resume, Some(Guess::Paused)) => self.set(call.vm, Guess::Running),
            (Act::Snapshot { into, .. }, Some(Guess::Running | Guess::Paused)) => {
                self.snapshots.insert(*into);
            }
            (Act::Carry { into, .. } | Act::Merge { into, .. }, _)
                if !self.snapshots.is_empty() =>
            {
                self.snapshots.insert(*into);
            }
            (Act::Fork { into }, Some(guess @ (Guess::Running | Guess::Paused))) => {
                for child in into {
                    self.set(*child, guess);
                }
            }
            _ => {}
        }
    }

    fn set(&mut self, vm: u8, guess: Guess) {
        self.vms.insert(vm, guess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_script_every_time_and_no_other_seed_does() {
        let profile = Profile::of(Capabilities::all(), FaultKind::ALL.to_vec(), true);
        let texts: BTreeSet<_> = (0..200).map(|seed| script(seed, &profile).to_json()).collect();
        assert_eq!(texts.len(), 200);
        assert!((0..200).all(|seed| texts.contains(&script(seed, &profile).to_json())));
    }

    #[test]
    fn every_operation_and_every_fault_is_drawn() {
        let profile = Profile::of(Capabilities::all(), FaultKind::ALL.to_vec(), true);
        let scripts = (0..400).map(|seed| script(seed, &profile));
        let (mut acts, mut kinds) = (BTreeSet::new(), BTreeSet::new());
        for step in scripts.flat_map(|script| script.steps) {
            if let Step::Fault(disturbance) = &step {
                kinds.insert(disturbance.kind);
            }
            let names = step.calls().iter().map(|call| format!("{:?}", call.act));
            acts.extend(names.map(|name| name.split([' ', '{']).next().unwrap_or("").to_owned()));
        }
        let expected: BTreeSet<_> =
            FaultKind::ALL.iter().copied().filter(|kind| may_happen(*kind)).collect();
        assert_eq!(kinds, expected);
        assert_eq!(acts.len(), 36, "{acts:?}");
    }
}
