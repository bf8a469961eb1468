//! [`SimEnv`]: virtual time and tasks of whatever runtime the simulation runs in.

use crate::{
    ledger::{Counters, Held},
    rng::{Purpose, Streams},
    yields::{Yields, yield_now},
};
use futures_core::future::BoxFuture;
use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};
use vm_core::env::Env;

#[cfg(madsim)]
use std::task::Waker;

/// Midnight UTC of 2026-01-01, in seconds since the Unix epoch; virtual wall clocks begin within a year of it.
const FIRST_DAY: u64 = 1_767_225_600;
const YEAR: u64 = 365 * 24 * 3600;

/// Which runtime the simulation takes its time and tasks from.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum SimEnvKind {
    /// The one that is current when the backend is built: madsim's, else tokio's.
    #[default]
    Detect,
    /// Tokio's: with paused time, or inside a turmoil host.
    Tokio,
    /// Madsim's.
    #[cfg(madsim)]
    Madsim,
    /// One's own clock and tasks. Its randomness and wall clock are not used: they come from the seed.
    Custom(Arc<dyn Env>),
}

impl From<Arc<dyn Env>> for SimEnvKind {
    fn from(env: Arc<dyn Env>) -> Self {
        Self::Custom(env)
    }
}

/// No runtime is current, so that there is no time and nothing to run tasks on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("build the simulator inside a tokio or madsim runtime")]
pub struct NoRuntime;

/// The environment of a simulation.
pub struct SimEnv {
    clock: Clock,
    streams: Arc<Streams>,
    counters: Arc<Counters>,
    yields: Yields,
    wall: Duration,
}

enum Clock {
    Tokio(tokio::time::Instant),
    #[cfg(madsim)]
    Madsim {
        time: madsim::time::TimeHandle,
        began: Duration,
    },
    Custom {
        env: Arc<dyn Env>,
        began: Duration,
    },
}

impl SimEnv {
    pub(crate) fn new(
        kind: SimEnvKind,
        streams: Arc<Streams>,
        counters: Arc<Counters>,
        yields: Option<Yields>,
    ) -> Result<Self, NoRuntime> {
        let clock = Clock::new(kind)?;
        let offset = streams.below(Purpose::WallClock, YEAR * 1_000_000_000);
        let wall = Duration::from_secs(FIRST_DAY) + Duration::from_nanos(offset);
        let yields = yields.unwrap_or_else(|| clock.usual_yields());
        Ok(Self { clock, streams, counters, yields, wall })
    }

    /// Names the runtime, for reports.
    #[must_use]
    pub fn runtime(&self) -> &'static str {
        match self.clock {
            Clock::Tokio(_) => "tokio",
            #[cfg(madsim)]
            Clock::Madsim { .. } => "madsim",
            Clock::Custom { .. } => "custom",
        }
    }

    /// Counts the timers that were waited for so far.
    #[must_use]
    pub fn timers_begun(&self) -> u64 {
        self.counters.timers_begun.load(Ordering::Relaxed)
    }

    pub(crate) fn yields(&self) -> Yields {
        self.yields
    }

    pub(crate) fn timer(&self, duration: Duration) -> Timer {
        let sleep = match &self.clock {
            Clock::Tokio(_) => Sleep::Tokio(Box::pin(tokio::time::sleep(duration))),
            #[cfg(madsim)]
            Clock::Madsim { time, .. } => Sleep::Madsim(time.sleep(duration), None),
            Clock::Custom { env, .. } => Sleep::Custom(env.sleep(duration)),
        };
        Timer { sleep, held: None, counters: Arc::clone(&self.counters) }
    }
}

impl Clock {
    fn new(kind: SimEnvKind) -> Result<Self, NoRuntime> {
        match kind {
            SimEnvKind::Detect => {
                #[cfg(madsim)]
                if madsim::runtime::Handle::try_current().is_ok() {
                    return Self::new(SimEnvKind::Madsim);
                }
                Self::new(SimEnvKind::Tokio)
            }
            SimEnvKind::Tokio => {
                tokio::runtime::Handle::try_current().map_err(|_| NoRuntime)?;
                Ok(Self::Tokio(tokio::time::Instant::now()))
            }
            #[cfg(madsim)]
            SimEnvKind::Madsim => {
                let time = madsim::time::TimeHandle::try_current().ok_or(NoRuntime)?;
                let began = time.elapsed();
                Ok(Self::Madsim { time, began })
            }
            SimEnvKind::Custom(env) => {
                let began = env.now();
                Ok(Self::Custom { env, began })
            }
        }
    }

    /// A first-in-first-out scheduler explores nothing by itself; madsim's does.
    fn usual_yields(&self) -> Yields {
        match self {
            #[cfg(madsim)]
            Self::Madsim { .. } => Yields::one_in(64),
            _ => Yields::one_in(8),
        }
    }
}

impl Env for SimEnv {
    fn now(&self) -> Duration {
        match &self.clock {
            Clock::Tokio(began) => began.elapsed(),
            #[cfg(madsim)]
            Clock::Madsim { time, began } => time.elapsed() - *began,
            Clock::Custom { env, began } => env.now().saturating_sub(*began),
        }
    }

    fn wall_clock(&self) -> Duration {
        self.wall + self.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(self.timer(duration))
    }

    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        match &self.clock {
            Clock::Tokio(_) => {
                if self.yields.strike(&self.streams) {
                    tokio::spawn(async move {
                        yield_now().await;
                        task.await;
                    });
                } else {
                    tokio::spawn(task);
                }
            }
            #[cfg(madsim)]
            Clock::Madsim { .. } => drop(madsim::task::spawn(task)),
            Clock::Custom { env, .. } => env.spawn(name, task),
        }
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        self.streams.fill(Purpose::Entropy, bytes);
    }
}

impl fmt::Debug for SimEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimEnv").field("runtime", &self.runtime()).finish_non_exhaustive()
    }
}

/// A wait. It is in the ledger from its first poll on, until it is over or dropped.
pub(crate) struct Timer {
    sleep: Sleep,
    held: Option<Held>,
    counters: Arc<Counters>,
}

enum Sleep {
    Tokio(Pin<Box<tokio::time::Sleep>>),
    /// Madsim's adds an entry to its heap at every poll, so it is polled again only for somebody else.
    #[cfg(madsim)]
    Madsim(madsim::time::Sleep, Option<Waker>),
    Custom(BoxFuture<'static, ()>),
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.get_mut() {
            Self::Tokio(sleep) => sleep.as_mut().poll(cx),
            #[cfg(madsim)]
            Self::Madsim(sleep, registered) => {
                if registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                    return if sleep.is_elapsed() { Poll::Ready(()) } else { Poll::Pending };
                }
                *registered = Some(cx.waker().clone());
                Pin::new(sleep).poll(cx)
            }
            Self::Custom(sleep) => sleep.as_mut().poll(cx),
        }
    }
}

impl Future for Timer {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let timer = &mut *self;
        if Pin::new(&mut timer.sleep).poll(cx).is_ready() {
            timer.held = None;
            return Poll::Ready(());
        }
        if timer.held.is_none() {
            timer.held = Some(timer.counters.timers.hold());
            timer.counters.timers_begun.fetch_add(1, Ordering::Relaxed);
        }
        Poll::Pending
    }
}
