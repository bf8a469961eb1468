//! Where simulated runs take place: under madsim, under tokio with paused time, or under turmoil.

use crate::panics::caught;
use futures_core::future::BoxFuture;
use std::{cell::RefCell, fmt, future::Future, rc::Rc, str::FromStr, time::Duration};

/// An environment for simulated runs. All of them are deterministic; they differ in how many schedules they explore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Environment {
    /// madsim: its scheduler picks among ready tasks at random. It exists only under `--cfg madsim`.
    Madsim,
    /// A current-thread tokio runtime with paused time: tasks run in order, but for the simulator's seeded yields.
    Tokio,
    /// A turmoil client: tokio with paused time, stepped by turmoil.
    Turmoil,
}

/// A text that names no environment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an environment; there are madsim, tokio and turmoil")]
pub struct UnknownEnvironment(String);

impl Environment {
    /// Lists every environment.
    pub const ALL: &'static [Self] = &[Self::Madsim, Self::Tokio, Self::Turmoil];

    /// Chooses the one that explores most in this build.
    #[must_use]
    pub fn best() -> Self {
        if cfg!(madsim) { Self::Madsim } else { Self::Tokio }
    }

    /// Names it, as `--env` and `DST_ENV` do.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Madsim => "madsim",
            Self::Tokio => "tokio",
            Self::Turmoil => "turmoil",
        }
    }

    /// Says in one line what it is, and what it lacks in this build.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Madsim => "madsim",
            Self::Tokio if cfg!(madsim) => "tokio with paused time (schedules are explored less)",
            Self::Tokio => {
                "tokio with paused time (RUSTFLAGS hides --cfg madsim; schedules are explored less)"
            }
            Self::Turmoil => "turmoil (schedules are explored less)",
        }
    }

    /// Says whether this build has it.
    ///
    /// # Errors
    /// Why not, and what to do.
    pub fn available(self) -> Result<(), String> {
        if self == Self::Madsim && !cfg!(madsim) {
            return Err("this build has no madsim: RUSTFLAGS hides the `--cfg madsim` of \
                        .cargo/config.toml; unset RUSTFLAGS, or add the flag to it"
                .to_owned());
        }
        Ok(())
    }

    /// Reads `DST_ENV`, and gives the best environment where it is not set.
    ///
    /// # Errors
    /// For people: an unknown environment, or one that this build has not.
    pub fn from_env() -> Result<Self, String> {
        let chosen = match std::env::var("DST_ENV") {
            Ok(text) => text.parse().map_err(|error| format!("DST_ENV: {error}"))?,
            Err(std::env::VarError::NotPresent) => Self::best(),
            Err(std::env::VarError::NotUnicode(_)) => return Err("DST_ENV: not UTF-8".to_owned()),
        };
        chosen.available()?;
        Ok(chosen)
    }

    /// Waits on the virtual clock. To be called inside [`run`](Self::run).
    #[must_use]
    pub fn sleep(self, duration: Duration) -> BoxFuture<'static, ()> {
        match self {
            #[cfg(madsim)]
            Self::Madsim => Box::pin(madsim::time::sleep(duration)),
            _ => Box::pin(tokio::time::sleep(duration)),
        }
    }

    /// Runs the future that `work` makes in a fresh runtime, to its end.
    ///
    /// # Errors
    /// The text of the panic that ended the runtime.
    pub fn run<F, T>(self, seed: u64, work: impl FnOnce() -> F + 'static) -> Result<T, String>
    where
        F: Future<Output = T> + 'static,
        T: 'static,
    {
        match self {
            Self::Madsim => under_madsim(seed, work),
            Self::Tokio => under_tokio(work),
            Self::Turmoil => under_turmoil(seed, work),
        }
    }
}

impl FromStr for Environment {
    type Err = UnknownEnvironment;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.iter().copied().find(|environment| environment.name() == text);
        found.ok_or_else(|| UnknownEnvironment(text.to_owned()))
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(madsim)]
fn under_madsim<F, T>(seed: u64, work: impl FnOnce() -> F) -> Result<T, String>
where
    F: Future<Output = T> + 'static,
{
    let runtime = madsim::runtime::Runtime::with_seed_and_config(seed, madsim::Config::default());
    let output = caught(|| runtime.block_on(async { work().await }));
    // What tasks own is dropped with the runtime, and may panic too.
    caught(|| drop(runtime)).and(output)
}

#[cfg(not(madsim))]
fn under_madsim<F, T>(_seed: u64, _work: impl FnOnce() -> F) -> Result<T, String> {
    Err(Environment::Madsim.available().err().unwrap_or_default())
}

fn under_tokio<F, T>(work: impl FnOnce() -> F) -> Result<T, String>
where
    F: Future<Output = T>,
{
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build();
    let runtime = runtime.map_err(|error| format!("no tokio runtime: {error}"))?;
    let output = caught(|| runtime.block_on(async { work().await }));
    caught(|| drop(runtime)).and(output)
}

fn under_turmoil<F, T>(seed: u64, work: impl FnOnce() -> F + 'static) -> Result<T, String>
where
    F: Future<Output = T> + 'static,
    T: 'static,
{
    let slot = Rc::new(RefCell::new(None));
    let output = slot.clone();
    caught(move || {
        let mut sim = turmoil::Builder::new()
            .rng_seed(seed)
            // Timers are exact within a step; long steps make idle time cheap.
            .tick_duration(Duration::from_millis(100))
            .simulation_duration(Duration::from_secs(7 * 24 * 3600))
            .build();
        sim.client("owner", async move {
            let result = work().await;
            slot.replace(Some(result));
            Ok(())
        });
        sim.run().map_err(|error| error.to_string())
    })??;
    output.take().ok_or_else(|| "turmoil ended before the run did".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn available() -> impl Iterator<Item = Environment> {
        Environment::ALL.iter().copied().filter(|environment| environment.available().is_ok())
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for environment in Environment::ALL {
            assert_eq!(environment.name().parse(), Ok(*environment));
        }
        assert!("docker".parse::<Environment>().is_err());
    }

    #[test]
    fn an_hour_passes_in_no_time_and_tasks_run() {
        for environment in available() {
            let began = Instant::now();
            let output = environment.run(7, move || async move {
                let (send, receive) = tokio::sync::oneshot::channel();
                let hour = environment.sleep(Duration::from_secs(3600));
                let task = async move {
                    hour.await;
                    send.send(42)
                };
                match environment {
                    #[cfg(madsim)]
                    Environment::Madsim => drop(madsim::task::spawn(task)),
                    _ => drop(tokio::spawn(task)),
                }
                receive.await
            });
            assert_eq!(output, Ok(Ok(42)), "{environment}");
            assert!(began.elapsed() < Duration::from_secs(30), "{environment}");
        }
    }

    #[test]
    fn a_panic_ends_the_run_with_its_text() {
        let sink = crate::panics::PanicSink::default();
        let _guard = sink.join();
        for environment in available() {
            let output = environment.run(7, || async {
                assert_eq!(1, 2, "not the same");
            });
            assert!(output.is_err(), "{environment}");
            assert!(sink.take().iter().any(|text| text.contains("not the same")), "{environment}");
        }
    }
}
