//! [`FaultPlan`]: which faults are to happen, and when.

use super::can;
use crate::rng::{kind_index, scale, spread, stream};
use rand_chacha::rand_core::Rng;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultScope};
use vm_trait::{Capabilities, Capability};

/// Which faults are to happen in a run, and when. Plain data: it can be stored, changed and shrunk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultPlan {
    /// Its rules; each works by itself.
    #[serde(default)]
    pub rules: Vec<FaultRule>,
}

/// When one kind of fault is to happen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRule {
    /// The kind. The rule is matched at the occasions of the kind's scope and nowhere else.
    pub kind: FaultKind,
    /// At which of them.
    pub when: FaultTrigger,
    /// How strong it is, where that means something; else drawn from the seed.
    #[serde(default)]
    pub amount: Option<Duration>,
    /// How often it happens at most.
    #[serde(default)]
    pub limit: Option<u32>,
}

/// At which of its occasions a fault is to happen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FaultTrigger {
    /// At each with this probability, above 0 and at most 1.
    Probability(f64),
    /// At these, counted from 1 over all VMs.
    Occasions(Vec<u64>),
    /// Once, at the first occasion from this virtual time on. A fault of the scopes Running and Clock, which needs no
    /// occasion, happens at that time, or as soon as a machine runs.
    At(Duration),
}

/// A rule that could never fire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rule {rule} ({kind}) can never fire: {reason}")]
pub struct PlanError {
    /// The rule's place in the plan, from 0.
    pub rule: usize,
    /// Its kind.
    pub kind: FaultKind,
    /// Why not.
    pub reason: String,
}

impl FaultPlan {
    /// Plans nothing.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds a rule that fires with this probability at each occasion.
    #[must_use]
    pub fn with_probability(self, kind: FaultKind, probability: f64) -> Self {
        self.with_rule(FaultRule::new(kind, FaultTrigger::Probability(probability)))
    }

    /// Adds a rule that fires at the `n`th occasion, counted from 1.
    #[must_use]
    pub fn with_occasion(self, kind: FaultKind, n: u64) -> Self {
        self.with_rule(FaultRule::new(kind, FaultTrigger::Occasions(vec![n])))
    }

    /// Adds a rule that fires once, at a virtual time.
    #[must_use]
    pub fn with_time(self, kind: FaultKind, at: Duration) -> Self {
        self.with_rule(FaultRule::new(kind, FaultTrigger::At(at)))
    }

    /// Adds a rule.
    #[must_use]
    pub fn with_rule(mut self, rule: FaultRule) -> Self {
        self.rules.push(rule);
        self
    }

    /// Turns a random subset of all kinds on, each with a random strength: between one occasion in 2,000 and one in
    /// five.
    #[must_use]
    pub fn swarm(seed: u64) -> Self {
        Self::draw(seed, 0, FaultKind::ALL.iter().copied().filter(|kind| can(*kind)))
    }

    /// Turns a random subset of those kinds on that no promise of the contract may be affected by, each with a random
    /// strength. A stall lasts less than a second, a slow boot less than five.
    #[must_use]
    pub fn benign_swarm(seed: u64) -> Self {
        Self::draw(seed, 1, FaultKind::ALL.iter().copied().filter(|kind| is_benign(*kind)))
    }

    fn draw(seed: u64, salt: u64, kinds: impl Iterator<Item = FaultKind>) -> Self {
        let mut rules = Vec::new();
        for kind in kinds {
            // A stream for each kind: a new kind leaves the rules of the others as they are.
            let mut rng = stream(seed, 1 << 32 | salt << 16 | kind_index(kind) as u64);
            let on = rng.next_u32().is_multiple_of(3);
            let strength = f64::from(rng.next_u32()) / f64::from(u32::MAX);
            if !on {
                continue;
            }
            let amount = (salt == 1).then(|| benign_amount(kind, rng.next_u64())).flatten();
            let probability = 0.0005 * 400_f64.powf(strength);
            let limit = None;
            rules.push(FaultRule {
                kind,
                when: FaultTrigger::Probability(probability),
                amount,
                limit,
            });
        }
        Self { rules }
    }

    /// Checks that every rule can fire on machines that can do everything.
    ///
    /// # Errors
    /// [`PlanError`] for the first that cannot.
    pub fn validate(&self) -> Result<(), PlanError> {
        self.validate_for(&Capabilities::all())
    }

    /// Checks that every rule can fire on machines that can do this.
    ///
    /// # Errors
    /// [`PlanError`] for the first that cannot.
    pub fn validate_for(&self, capabilities: &Capabilities) -> Result<(), PlanError> {
        for (index, rule) in self.rules.iter().enumerate() {
            rule.validate(capabilities).map_err(|reason| PlanError {
                rule: index,
                kind: rule.kind,
                reason,
            })?;
        }
        Ok(())
    }
}

impl FaultRule {
    /// Makes a rule without amount and limit.
    #[must_use]
    pub fn new(kind: FaultKind, when: FaultTrigger) -> Self {
        Self { kind, when, amount: None, limit: None }
    }

    /// Sets how strong it is.
    #[must_use]
    pub fn with_amount(mut self, amount: Duration) -> Self {
        self.amount = Some(amount);
        self
    }

    /// Limits how often it happens.
    #[must_use]
    pub fn with_limit(mut self, limit: u32) -> Self {
        self.limit = Some(limit);
        self
    }

    fn validate(&self, capabilities: &Capabilities) -> Result<(), String> {
        check_kind(self.kind, capabilities)?;
        check_amount(self.kind, self.amount)?;
        if self.limit == Some(0) {
            return Err("its limit is 0".to_owned());
        }
        match &self.when {
            FaultTrigger::Probability(p) if !(*p > 0.0 && *p <= 1.0) => {
                Err(format!("its probability is {p}, above 0 and at most 1 is needed"))
            }
            FaultTrigger::Occasions(list) if list.is_empty() => {
                Err("it names no occasion".to_owned())
            }
            FaultTrigger::Occasions(list) if list.contains(&0) => {
                Err("occasions are counted from 1".to_owned())
            }
            FaultTrigger::Probability(_) | FaultTrigger::Occasions(_) | FaultTrigger::At(_) => {
                Ok(())
            }
        }
    }
}

/// Refuses a kind that has no occasion on machines that can do this.
pub(crate) fn check_kind(kind: FaultKind, capabilities: &Capabilities) -> Result<(), String> {
    if !can(kind) {
        return Err("the simulator has no such fault".to_owned());
    }
    let needed = match kind.scope() {
        FaultScope::Network => {
            let networks = [Capability::NetworkTsi, Capability::NetworkPasst];
            return match networks.iter().any(|network| capabilities.has(*network)) {
                true => Ok(()),
                false => Err("the backend was built without a network".to_owned()),
            };
        }
        FaultScope::Exec => Capability::Exec,
        FaultScope::File => Capability::Files,
        FaultScope::Mount => Capability::Mounts,
        FaultScope::Pause | FaultScope::Resume => Capability::Pause,
        FaultScope::Snapshot | FaultScope::Restore => Capability::Snapshot,
        FaultScope::Fork => Capability::Fork,
        FaultScope::Clock => Capability::GuestKernel,
        _ => return Ok(()),
    };
    if capabilities.has(needed) {
        return Ok(());
    }
    Err(format!("the backend was built without the capability `{needed}`"))
}

/// Refuses an amount that would make the fault no fault.
pub(crate) fn check_amount(kind: FaultKind, amount: Option<Duration>) -> Result<(), String> {
    match amount {
        Some(Duration::ZERO) if kind.scope() != FaultScope::Running => {
            Err("its amount is 0".to_owned())
        }
        _ => Ok(()),
    }
}

fn is_benign(kind: FaultKind) -> bool {
    use FaultKind as K;
    matches!(
        kind,
        K::LinkShort
            | K::LinkDelayedAccept
            | K::LinkDisconnect
            | K::LinkStall
            | K::BootSlow
            | K::SlowIo
            | K::MountSlow
            | K::NetSlow
            | K::LoadSlow
    )
}

/// Draws amounts that stay well below every deadline of the default configuration.
fn benign_amount(kind: FaultKind, random: u64) -> Option<Duration> {
    use FaultKind as K;
    let most = match kind {
        K::LinkStall | K::LinkDelayedAccept | K::NetSlow => 800,
        K::BootSlow | K::LoadSlow => 5_000,
        K::SlowIo | K::MountSlow => 100,
        _ => return None,
    };
    let low = Duration::from_millis(1 + scale(random, most) / 2);
    Some(spread(random, low, Duration::from_millis(most)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_kind() -> impl Strategy<Value = FaultKind> {
        (0..FaultKind::ALL.len()).prop_map(|index| FaultKind::ALL[index])
    }

    proptest! {
        #[test]
        fn swarms_are_functions_of_their_seed_and_valid(seed: u64) {
            for make in [FaultPlan::swarm, FaultPlan::benign_swarm] {
                let plan = make(seed);
                prop_assert_eq!(&plan, &make(seed));
                prop_assert_eq!(plan.validate(), Ok(()));
            }
        }

        #[test]
        fn rules_that_can_never_fire_are_refused(kind in any_kind(), bad in 0..6) {
            let when = match bad {
                0 => FaultTrigger::Probability(0.0),
                1 => FaultTrigger::Probability(f64::NAN),
                2 => FaultTrigger::Probability(1.5),
                3 => FaultTrigger::Occasions(vec![]),
                4 => FaultTrigger::Occasions(vec![3, 0]),
                _ => FaultTrigger::At(Duration::ZERO),
            };
            let mut rule = FaultRule::new(kind, when);
            if bad == 5 {
                rule.limit = Some(0);
            }
            let plan = FaultPlan::none().with_probability(kind, 0.5).with_rule(rule);
            let refused = plan.validate().map_err(|error| (error.rule, error.kind));
            prop_assert_eq!(refused, Err((1, kind)));
        }

        #[test]
        fn plans_survive_serde(seed: u64) {
            let plan = FaultPlan::swarm(seed).with_time(FaultKind::HostLost, Duration::from_secs(3));
            let bytes = postcard::to_allocvec(&plan).unwrap();
            prop_assert_eq!(postcard::from_bytes::<FaultPlan>(&bytes).unwrap(), plan);
        }
    }

    #[test]
    fn rules_for_what_the_machines_cannot_do_are_refused() {
        let plan = FaultPlan::none().with_occasion(FaultKind::ForkChildFail, 1);
        assert_eq!(plan.validate(), Ok(()));
        let bare = Capabilities::all().without(Capability::Fork);
        assert_eq!(plan.validate_for(&bare).unwrap_err().kind, FaultKind::ForkChildFail);
    }

    #[test]
    fn swarms_differ_and_cover_every_kind() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..100 {
            assert_ne!(FaultPlan::swarm(seed), FaultPlan::swarm(seed + 1));
            seen.extend(FaultPlan::swarm(seed).rules.iter().map(|rule| rule.kind));
        }
        assert_eq!(seen.len(), FaultKind::ALL.len());
        let benign = (0..100).flat_map(|seed| FaultPlan::benign_swarm(seed).rules);
        assert!(benign.clone().all(|rule| is_benign(rule.kind)) && benign.count() > 100);
    }
}
