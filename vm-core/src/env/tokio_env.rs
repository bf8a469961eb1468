//! [`Env`] on tokio: real time for real backends, paused time for simulations.

use super::Env;
use futures_core::future::BoxFuture;
use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::time::Instant;

/// An environment on the tokio runtime that is current when its methods are called.
///
/// With [`TokioEnv::real`] it belongs to real machines. With [`TokioEnv::seeded`], under a current-thread runtime with
/// paused time, it is deterministic.
pub struct TokioEnv {
    began: Instant,
    began_wall: Duration,
    random: Mutex<Random>,
}

type Random = Box<dyn FnMut(&mut [u8]) + Send>;

impl TokioEnv {
    /// Takes the wall clock from the operating system and randomness from `random`, which should be the operating
    /// system's.
    ///
    /// # Panics
    /// Outside a tokio runtime with time enabled.
    #[must_use]
    pub fn real(random: impl FnMut(&mut [u8]) + Send + 'static) -> Self {
        #[expect(clippy::disallowed_methods, reason = "this is where real time comes in")]
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::seeded(wall, random)
    }

    /// Begins the wall clock at `wall` and takes randomness from `random`.
    ///
    /// # Panics
    /// Outside a tokio runtime with time enabled.
    #[must_use]
    pub fn seeded(wall: Duration, random: impl FnMut(&mut [u8]) + Send + 'static) -> Self {
        Self { began: Instant::now(), began_wall: wall, random: Mutex::new(Box::new(random)) }
    }
}

impl Env for TokioEnv {
    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn wall_clock(&self) -> Duration {
        self.began_wall + self.began.elapsed()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }

    fn spawn(&self, _name: &'static str, task: BoxFuture<'static, ()>) {
        tokio::spawn(task);
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        let mut random = self.random.lock().unwrap_or_else(PoisonError::into_inner);
        random(bytes);
    }
}

impl fmt::Debug for TokioEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokioEnv").finish_non_exhaustive()
    }
}
