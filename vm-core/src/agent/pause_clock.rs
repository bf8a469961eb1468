//! Time that a machine was not paused.

use crate::env::{Elapsed, Env};
use futures_util::future::{Either, select};
use std::{
    future::{Future, poll_fn},
    pin::pin,
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Poll, Waker},
    time::Duration,
};
use vm_planted_bugs::{Bug, planted};

/// Keeps account of the time that a machine spent paused, so that deadlines of what runs in the guest stand still
/// with it.
#[derive(Debug, Default)]
pub(crate) struct PauseClock(Mutex<Pauses>);

#[derive(Debug, Default)]
struct Pauses {
    since: Option<Duration>,
    total: Duration,
    wakers: Vec<Waker>,
}

impl PauseClock {
    /// Notes that the machine stands still.
    pub(crate) fn pause(&self, now: Duration) {
        self.lock().since.get_or_insert(now);
    }

    /// Notes that the machine runs.
    pub(crate) fn resume(&self, now: Duration) {
        let mut pauses = self.lock();
        if let Some(since) = pauses.since.take() {
            pauses.total += now.saturating_sub(since);
        }
        for waker in pauses.wakers.drain(..) {
            waker.wake();
        }
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.lock().since.is_some()
    }

    /// Gives the time spent paused until `now`.
    pub(crate) fn paused(&self, now: Duration) -> Duration {
        let pauses = self.lock();
        pauses.total + pauses.since.map_or(Duration::ZERO, |since| now.saturating_sub(since))
    }

    /// Waits for `work`, but no longer than `after` of time not paused.
    pub(crate) async fn timeout<F: Future>(
        &self,
        env: &dyn Env,
        after: Duration,
        work: F,
    ) -> Result<F::Output, Elapsed> {
        let mut work = pin!(work);
        if let Poll::Ready(output) = futures_util::poll!(&mut work) {
            return Ok(output);
        }
        let expiry = pin!(self.expire(env, after));
        match select(work, expiry).await {
            Either::Left((output, _)) => Ok(output),
            Either::Right(((), _)) => Err(Elapsed { after }),
        }
    }

    async fn expire(&self, env: &dyn Env, after: Duration) {
        let began = env.now();
        let paused_before = self.paused(began);
        loop {
            self.running().await;
            let now = env.now();
            let mut paused = self.paused(now).saturating_sub(paused_before);
            if planted(Bug::PausedTimeCounts) {
                paused = Duration::ZERO;
            }
            let used = now.saturating_sub(began).saturating_sub(paused);
            match after.checked_sub(used) {
                Some(left) if !left.is_zero() => env.sleep(left).await,
                _ => return,
            }
        }
    }

    /// Waits until the machine is not paused.
    pub(crate) async fn running(&self) {
        poll_fn(|cx| {
            let mut pauses = self.lock();
            if pauses.since.is_none() {
                return Poll::Ready(());
            }
            if !pauses.wakers.iter().any(|known| known.will_wake(cx.waker())) {
                pauses.wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }

    fn lock(&self) -> MutexGuard<'_, Pauses> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
