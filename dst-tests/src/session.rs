//! One run inside its environment: the check, then the proof that nothing is left.

use crate::{
    context::{Context, Setup},
    ordered::CountedFaults,
    panics::PanicSink,
    target::Run,
};
use futures_util::{
    FutureExt,
    future::{Either, select},
};
use std::{
    collections::BTreeMap, future::Future, panic::AssertUnwindSafe, pin::pin, sync::Arc,
    time::Duration,
};
use vm_core::{
    env::Env,
    fault::{FaultControl, FaultKind},
};

/// How long a run may take, on the backend's clock.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The check.
    pub check: Duration,
    /// From the drop of the last handle until nothing is left on the host.
    pub leftovers: Duration,
}

impl Limits {
    /// Limits for a clock that is simulated: hours cost little while little happens.
    pub const SIMULATED: Self =
        Self { check: Duration::from_secs(6 * 3600), leftovers: Duration::from_secs(60) };

    /// Limits for a real clock.
    pub const REAL: Self =
        Self { check: Duration::from_secs(120), leftovers: Duration::from_secs(60) };
}

/// What came of a check.
#[derive(Clone, Debug, Default)]
pub struct Kept {
    /// What was broken, if anything.
    pub broken: Option<String>,
    /// How often the check ordered each fault.
    pub faults_ordered: BTreeMap<FaultKind, u64>,
}

/// Runs the check of a clause and says what was broken, if anything, and which faults it ordered.
///
/// Every handle that the context holds is dropped afterwards, and what is then left on the host for longer than the
/// limit is held against the backend.
///
/// `sleep` waits on the clock of the runtime; the environment of the backend is not used for that, because it may count
/// the timers that are left.
pub async fn keep<S: Future<Output = ()>>(
    mut setup: Setup,
    run: Run,
    limits: Limits,
    sleep: impl FnOnce(Duration) -> S,
) -> Kept {
    let counted = setup.faults.take().map(CountedFaults::new);
    setup.faults = counted.clone().map(|counted| counted as Arc<dyn FaultControl>);
    let broken = broken_by(setup, run, limits, sleep).await;
    let faults_ordered = counted.map(|counted| counted.ordered()).unwrap_or_default();
    Kept { broken, faults_ordered }
}

async fn broken_by<S: Future<Output = ()>>(
    setup: Setup,
    run: Run,
    limits: Limits,
    sleep: impl FnOnce(Duration) -> S,
) -> Option<String> {
    let env = setup.env.clone();
    let leftovers = setup.leftovers.clone();
    let check = run.clause.check;
    let context = Context::new(setup, run);
    let check = AssertUnwindSafe(check(&context)).catch_unwind();
    let verdict = match select(check, pin!(sleep(limits.check))).await {
        Either::Left((verdict, _)) => Some(verdict),
        Either::Right(((), _)) => None,
    };
    let verdict = match verdict {
        Some(Ok(Ok(()))) => Some(Ok(context.give_back().await)),
        other => other,
    };
    drop(context);
    match verdict {
        Some(Ok(Ok(()))) => still_left(&*env, limits.leftovers, &*leftovers).await,
        Some(Ok(Err(broken))) => Some(broken.to_string()),
        Some(Err(_panic)) => Some("the check panicked".to_owned()),
        None => Some(format!(
            "the check did not end within {:?} on the backend's clock: something waits for ever",
            limits.check
        )),
    }
}

/// Puts together what a run came to: what the session says, and what panicked beside it.
#[must_use]
pub fn judge(session: Result<Option<String>, String>, panics: &PanicSink) -> Option<String> {
    let panics = panics.take();
    let said = match session {
        Ok(None) if panics.is_empty() => return None,
        Ok(None) => "a task panicked".to_owned(),
        Ok(Some(broken)) => broken,
        Err(text) if panics.is_empty() => format!("panicked: {text}"),
        Err(_) => "the run was cut short".to_owned(),
    };
    Some(panics.iter().fold(said, |text, panic| format!("{text}; {panic}")))
}

async fn still_left(
    env: &dyn Env,
    limit: Duration,
    leftovers: &(dyn Fn() -> Vec<String> + Send + Sync),
) -> Option<String> {
    let deadline = env.now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        let left = leftovers();
        if left.is_empty() {
            return None;
        }
        if env.now() >= deadline {
            return Some(format!("left behind after {limit:?}: {}", left.join(", ")));
        }
        env.sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}
