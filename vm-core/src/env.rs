//! [`Env`]: clock, tasks and randomness, as arguments.
//!
//! Nothing in this crate reads a clock, spawns a task or draws a random number by any other way, so that a run
//! under simulation is a function of its seed.

use futures_core::future::BoxFuture;
use futures_util::future::{Either, select};
use std::{fmt, future::Future, pin::pin, time::Duration};

mod tokio_env;

pub use tokio_env::TokioEnv;

/// Where time, tasks and randomness come from.
pub trait Env: Send + Sync + fmt::Debug + 'static {
    /// Gives the monotonic time since the environment began.
    fn now(&self) -> Duration;

    /// Gives the wall clock, as time since the Unix epoch.
    fn wall_clock(&self) -> Duration;

    /// Waits. Dropping the future costs nothing but what the scheduler keeps of it.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Runs a task in the background until it ends by itself; `name` is for people.
    fn spawn(&self, name: &'static str, task: BoxFuture<'static, ()>);

    /// Fills `bytes` at random.
    fn fill_random(&self, bytes: &mut [u8]);

    /// Draws a random number.
    fn random_u64(&self) -> u64 {
        let mut bytes = [0; 8];
        self.fill_random(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// The time a [`timeout`] was given is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no result after {after:?}")]
pub struct Elapsed {
    /// How long it was given.
    pub after: Duration,
}

/// Waits for `future`, but no longer than `after`. The future comes first where both are ready.
///
/// # Errors
/// [`Elapsed`], and the future is dropped.
pub async fn timeout<F: Future>(
    env: &dyn Env,
    after: Duration,
    future: F,
) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    // Most operations are done at the first poll; they then cost no timer.
    if let std::task::Poll::Ready(output) = futures_util::poll!(&mut future) {
        return Ok(output);
    }
    match select(future, env.sleep(after)).await {
        Either::Left((output, _)) => Ok(output),
        Either::Right(((), _)) => Err(Elapsed { after }),
    }
}
