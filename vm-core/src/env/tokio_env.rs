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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::runtime::Builder;

    #[test]
    fn both_clocks_go_on_together_and_bytes_come_from_the_source() {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let mut next = 0;
            let env = TokioEnv::seeded(Duration::from_secs(1000), move |bytes| {
                for byte in bytes {
                    next += 1;
                    *byte = next;
                }
            });
            assert_eq!((env.now(), env.wall_clock()), (Duration::ZERO, Duration::from_secs(1000)));
            env.sleep(Duration::from_secs(7)).await;
            let (now, wall) = (Duration::from_secs(7), Duration::from_secs(1007));
            assert_eq!((env.now(), env.wall_clock()), (now, wall));
            let mut bytes = [0; 3];
            env.fill_random(&mut bytes);
            assert_eq!(bytes, [1, 2, 3]);
            env.fill_random(&mut bytes);
            assert_eq!(bytes, [4, 5, 6]);
            assert_eq!(format!("{env:?}"), "TokioEnv { .. }");
        });
    }
}
