//! The engine: asked at every occasion, it decides whether a fault happens there.

use super::{
    FaultPlan, FaultRule, FaultTrigger, is_spontaneous,
    plan::{check_amount, check_kind},
};
use crate::rng::{Streams, spread};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use vm_core::fault::{FaultKind, FaultOrder, FaultRefused};
use vm_trait::{Capabilities, VmId};

/// Which VMs an occasion concerns.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Vms<'a> {
    One(VmId),
    /// Those for which the host is working; an occasion on the host concerns each of them.
    Any(&'a BTreeSet<VmId>),
}

/// A fault that happens now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fired {
    amount: Option<Duration>,
    /// Drawn from the kind's own stream.
    pub(crate) random: u64,
}

/// A fault that befalls a running machine by itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spontaneous {
    pub(crate) kind: FaultKind,
    pub(crate) fired: Fired,
}

pub(crate) struct Engine {
    streams: Arc<Streams>,
    capabilities: Capabilities,
    /// A bit for each kind that could happen: most questions are answered without a lock.
    active: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rules: Vec<RuleState>,
    orders: Vec<OrderState>,
    /// Occasions so far, for each kind that a rule was ever there for.
    seen: BTreeMap<FaultKind, u64>,
    fired: BTreeMap<FaultKind, u64>,
}

struct RuleState {
    rule: FaultRule,
    fired: u32,
}

struct OrderState {
    order: FaultOrder,
    skipped: u32,
    /// When a spontaneous one is due.
    due: Duration,
}

impl Engine {
    pub(crate) fn new(plan: FaultPlan, streams: Arc<Streams>, capabilities: Capabilities) -> Self {
        let rules: Vec<_> =
            plan.rules.into_iter().map(|rule| RuleState { rule, fired: 0 }).collect();
        let state = State { rules, ..State::default() };
        let active = AtomicU64::new(state.active());
        Self { streams, capabilities, active, state: Mutex::new(state) }
    }

    /// Says whether this kind can be ordered.
    pub(crate) fn can(&self, kind: FaultKind) -> bool {
        check_kind(kind, &self.capabilities).is_ok()
    }

    /// Gives what the machines can do.
    pub(crate) fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Says whether a fault of this kind is planned or ordered.
    pub(crate) fn may(&self, kind: FaultKind) -> bool {
        self.active.load(Ordering::Relaxed) & bit(kind) != 0
    }

    /// Says whether a fault of this kind happens at this occasion, and takes note of both.
    pub(crate) fn occasion(&self, kind: FaultKind, vms: Vms<'_>, now: Duration) -> Option<Fired> {
        if !self.may(kind) {
            return None;
        }
        let mut state = self.lock();
        let amount = state.match_occasion(kind, vms, now, &self.streams)?;
        Some(self.fire(&mut state, kind, amount))
    }

    /// Says whether any fault could befall a running machine by itself.
    pub(crate) fn may_befall(&self) -> bool {
        self.active.load(Ordering::Relaxed) & SPONTANEOUS_BITS != 0
    }

    /// Takes the faults that befall this machine now. `delivery` says whether it was just sent something, which is what
    /// rules by probability and by count go by. Where the guest does not run, only what comes from outside befalls it.
    pub(crate) fn befall(
        &self,
        vm: VmId,
        now: Duration,
        delivery: bool,
        runs: bool,
    ) -> Vec<Spontaneous> {
        let mut happened = Vec::new();
        let mut state = self.lock();
        let due = |order: &OrderState| {
            may_strike(order.order.kind, runs)
                && order.due <= now
                && order.order.vm.is_none_or(|wanted| wanted == vm)
        };
        while let Some(index) = state.orders.iter().position(due) {
            let order = state.orders.remove(index).order;
            let amount = order.amount;
            let fired = self.fire(&mut state, order.kind, amount);
            happened.push(Spontaneous { kind: order.kind, fired });
        }
        for kind in FaultKind::ALL.iter().copied().filter(|kind| may_strike(*kind, runs)) {
            if let Some(amount) = state.match_rules(kind, now, &self.streams, delivery) {
                let fired = self.fire(&mut state, kind, amount);
                happened.push(Spontaneous { kind, fired });
            }
        }
        happened
    }

    /// Gives the next time at which a fault befalls this machine by itself.
    pub(crate) fn next_befalling(&self, vm: VmId, runs: bool) -> Option<Duration> {
        let state = self.lock();
        let orders = state.orders.iter().filter(|order| may_strike(order.order.kind, runs));
        let orders = orders.filter(|order| order.order.vm.is_none_or(|wanted| wanted == vm));
        let rules =
            state.rules.iter().filter(|rule| rule.is_alive() && may_strike(rule.rule.kind, runs));
        let times = rules.filter_map(|rule| match rule.rule.when {
            FaultTrigger::At(at) => Some(at),
            _ => None,
        });
        orders.map(|order| order.due).chain(times).min()
    }

    pub(crate) fn order(&self, order: FaultOrder, now: Duration) -> Result<(), FaultRefused> {
        let refuse =
            |reason: &str| Err(FaultRefused { kind: order.kind, reason: reason.to_owned() });
        if let Err(reason) = check_kind(order.kind, &self.capabilities) {
            return refuse(&reason);
        }
        if let Err(reason) = check_amount(order.kind, order.amount) {
            return refuse(&reason);
        }
        if is_spontaneous(order.kind) && order.skip != 0 {
            return refuse("a fault of this scope has no occasions to skip");
        }
        let due = match order.kind {
            FaultKind::ClockForward | FaultKind::ClockBack => now,
            _ => now + order.amount.unwrap_or_default(),
        };
        let mut state = self.lock();
        state.orders.push(OrderState { order, skipped: 0, due });
        self.active.store(state.active(), Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn fired(&self) -> BTreeMap<FaultKind, u64> {
        self.lock().fired.clone()
    }

    pub(crate) fn pending(&self) -> Vec<FaultOrder> {
        self.lock().orders.iter().map(|order| order.order.clone()).collect()
    }

    fn fire(&self, state: &mut State, kind: FaultKind, amount: Option<Duration>) -> Fired {
        *state.fired.entry(kind).or_default() += 1;
        self.active.store(state.active(), Ordering::Relaxed);
        Fired { amount, random: self.streams.fault(kind) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn active(&self) -> u64 {
        let rules = self.rules.iter().filter(|rule| rule.is_alive()).map(|rule| rule.rule.kind);
        let orders = self.orders.iter().map(|order| order.order.kind);
        rules.chain(orders).fold(0, |bits, kind| bits | bit(kind))
    }

    /// Gives the amount where a fault happens. An order comes before the rules; all of them count the occasion.
    #[allow(clippy::option_option, reason = "whether it happens, and whether it says how strong")]
    fn match_occasion(
        &mut self,
        kind: FaultKind,
        vms: Vms<'_>,
        now: Duration,
        streams: &Streams,
    ) -> Option<Option<Duration>> {
        let mut chosen = None;
        for (index, order) in self.orders.iter_mut().enumerate() {
            if order.order.kind != kind || !vms.hold(order.order.vm) {
                continue;
            }
            if order.skipped < order.order.skip {
                order.skipped += 1;
            } else if chosen.is_none() {
                chosen = Some(index);
            }
        }
        let ruled = self.match_rules(kind, now, streams, true);
        match chosen {
            Some(index) => Some(self.orders.remove(index).order.amount),
            None => ruled,
        }
    }

    #[allow(clippy::option_option, reason = "whether it happens, and whether it says how strong")]
    fn match_rules(
        &mut self,
        kind: FaultKind,
        now: Duration,
        streams: &Streams,
        counts: bool,
    ) -> Option<Option<Duration>> {
        if !self.rules.iter().any(|rule| rule.rule.kind == kind) {
            return None;
        }
        let seen = self.seen.entry(kind).or_default();
        *seen += u64::from(counts);
        let mut happens = None;
        for rule in self.rules.iter_mut().filter(|rule| rule.rule.kind == kind) {
            let strikes = match &rule.rule.when {
                FaultTrigger::Probability(p) => {
                    counts && (streams.fault(kind) as f64) < p * (u64::MAX as f64)
                }
                FaultTrigger::Occasions(list) => counts && list.contains(seen),
                FaultTrigger::At(at) => *at <= now,
            };
            if strikes && rule.is_alive() && happens.is_none() {
                rule.fired += 1;
                happens = Some(rule.rule.amount);
            }
        }
        happens
    }
}

impl RuleState {
    /// Says whether the rule may fire again.
    fn is_alive(&self) -> bool {
        let once = matches!(self.rule.when, FaultTrigger::At(_)).then_some(1);
        let limit = once.or(self.rule.limit);
        limit.is_none_or(|limit| self.fired < limit)
    }
}

impl Vms<'_> {
    fn hold(self, wanted: Option<VmId>) -> bool {
        match (self, wanted) {
            (_, None) => true,
            (Self::One(vm), Some(wanted)) => vm == wanted,
            (Self::Any(vms), Some(wanted)) => vms.contains(&wanted),
        }
    }
}

impl Fired {
    /// Gives how strong the fault is: as planned, else drawn from this range.
    pub(crate) fn amount(&self, low: Duration, high: Duration) -> Duration {
        self.amount.unwrap_or_else(|| spread(self.random, low, high))
    }

    /// Gives how strong the fault is, if that was planned.
    pub(crate) fn planned(&self) -> Option<Duration> {
        self.amount
    }
}

/// Says whether a kind can befall a machine by itself: any such kind while its guest runs, else what comes from outside.
fn may_strike(kind: FaultKind, runs: bool) -> bool {
    let from_outside = matches!(kind, FaultKind::VmmKilled | FaultKind::HostLost);
    is_spontaneous(kind) && (runs || from_outside)
}

fn bit(kind: FaultKind) -> u64 {
    1 << kind as u32
}

const SPONTANEOUS_BITS: u64 = {
    let mut bits = 0;
    let mut index = 0;
    while index < FaultKind::ALL.len() {
        let kind = FaultKind::ALL[index];
        if matches!(
            kind,
            FaultKind::GuestPanic
                | FaultKind::VmmKilled
                | FaultKind::GuestOom
                | FaultKind::HostLost
                | FaultKind::ClockForward
                | FaultKind::ClockBack
        ) {
            bits |= 1 << index;
        }
        index += 1;
    }
    bits
};

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VM: VmId = VmId(1);

    fn engine(plan: FaultPlan) -> Engine {
        Engine::new(plan, Arc::new(Streams::new(1)), Capabilities::all())
    }

    fn any_kind() -> impl Strategy<Value = FaultKind> {
        (0..FaultKind::ALL.len()).prop_map(|index| FaultKind::ALL[index])
    }

    fn occasional() -> impl Strategy<Value = FaultKind> {
        any_kind().prop_filter("has occasions", |kind| !is_spontaneous(*kind))
    }

    proptest! {
        #[test]
        fn a_rule_fires_at_its_own_kind_only(kind in occasional(), other in occasional(), n in 1_u64..5) {
            let engine = engine(FaultPlan::none().with_occasion(kind, n));
            for turn in 1..8 {
                if other != kind {
                    prop_assert!(engine.occasion(other, Vms::One(VM), Duration::ZERO).is_none());
                }
                let fires = engine.occasion(kind, Vms::One(VM), Duration::ZERO).is_some();
                prop_assert_eq!(fires, turn == n);
            }
            prop_assert_eq!(engine.fired(), BTreeMap::from([(kind, 1)]));
        }

        #[test]
        fn an_order_waits_for_its_vm_and_skips(kind in occasional(), skip in 0_u32..5) {
            let engine = engine(FaultPlan::none());
            engine.order(FaultOrder::next(kind).on(VM).after(skip), Duration::ZERO).unwrap();
            for turn in 0..8 {
                prop_assert!(engine.occasion(kind, Vms::One(VmId(2)), Duration::ZERO).is_none());
                let working = BTreeSet::from([VM, VmId(2)]);
                let fires = engine.occasion(kind, Vms::Any(&working), Duration::ZERO).is_some();
                prop_assert_eq!(fires, turn == skip);
                prop_assert_eq!(engine.pending().len(), usize::from(turn < skip));
            }
        }

        #[test]
        fn limits_hold(kind in occasional(), limit in 1_u32..5) {
            let rule = FaultRule::new(kind, FaultTrigger::Probability(1.0)).with_limit(limit);
            let engine = engine(FaultPlan::none().with_rule(rule));
            let fires = (0..10).filter(|_| engine.occasion(kind, Vms::One(VM), Duration::ZERO).is_some());
            prop_assert_eq!(fires.count(), usize::try_from(limit).unwrap());
        }

        #[test]
        fn timed_rules_fire_once_from_their_time_on(kind in any_kind(), at in 1_u64..100) {
            let engine = engine(FaultPlan::none().with_time(kind, Duration::from_secs(at)));
            let fires = |now: u64| {
                let now = Duration::from_secs(now);
                if is_spontaneous(kind) {
                    engine.befall(VM, now, false, true).len() == 1
                } else {
                    engine.occasion(kind, Vms::One(VM), now).is_some()
                }
            };
            prop_assert!(!fires(at - 1) && fires(at) && !fires(at + 1));
        }
    }

    #[test]
    fn the_bits_are_those_of_the_spontaneous_kinds() {
        for kind in FaultKind::ALL {
            assert_eq!(bit(*kind), 1 << crate::rng::kind_index(*kind), "{kind}");
            assert_eq!(SPONTANEOUS_BITS & bit(*kind) != 0, is_spontaneous(*kind), "{kind}");
        }
    }

    #[test]
    fn probabilities_are_roughly_kept() {
        let engine = engine(FaultPlan::none().with_probability(FaultKind::BitRot, 0.25));
        let fires =
            |_: &u32| engine.occasion(FaultKind::BitRot, Vms::One(VM), Duration::ZERO).is_some();
        let count = (0..4000).filter(fires).count();
        assert!((800..1200).contains(&count), "{count}");
    }
}
