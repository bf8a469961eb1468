//! Which bug is on, for each thread.

use crate::{Bug, NotArmed};
use std::cell::Cell;

/// How often a thread with a bug may ask whether one is on. Runs that end ask far less often; one that does not, because
/// of its bug, cannot be ended from outside.
const PATIENCE: u64 = 100_000_000;

thread_local! {
    static ON: Cell<Option<Bug>> = const { Cell::new(None) };
    static REACHED: Cell<u64> = const { Cell::new(0) };
    static ASKED: Cell<u64> = const { Cell::new(0) };
}

/// Says whether a bug is on for this thread.
///
/// # Panics
/// Once, where a thread with a bug has asked so often that its run will never end.
#[must_use]
pub fn planted(bug: Bug) -> bool {
    // A thread that is being torn down has no bug any more.
    let Some(on) = ON.try_with(Cell::get).ok().flatten() else { return false };
    let asked = ASKED.get() + 1;
    ASKED.set(asked);
    // Once: what is dropped while the run is unwound asks too.
    assert!(asked != PATIENCE, "the run does not end: a livelock");
    if on == bug {
        REACHED.set(REACHED.get() + 1);
    }
    on == bug
}

/// Switches a bug on for this thread, until what it gives is dropped.
///
/// # Errors
/// None in this build; one without the feature `armed` refuses.
pub fn plant(bug: Bug) -> Result<Planted, NotArmed> {
    let before = ON.replace(Some(bug));
    REACHED.set(0);
    ASKED.set(0);
    Ok(Planted { before })
}

/// A bug that is on for as long as this lives. It belongs to the thread that planted it.
#[derive(Debug)]
pub struct Planted {
    before: Option<Bug>,
}

impl Planted {
    /// Counts how often the bug's line was reached since it was planted.
    #[must_use]
    pub fn reached(&self) -> u64 {
        REACHED.get()
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        ON.set(self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_is_on_for_its_thread_and_as_long_as_it_is_planted() {
        let planted_here = plant(Bug::StopForgetsCrash).unwrap();
        assert!(planted(Bug::StopForgetsCrash) && !planted(Bug::StopOfCreated));
        let elsewhere = std::thread::spawn(|| planted(Bug::StopForgetsCrash));
        assert!(!elsewhere.join().unwrap());
        assert_eq!(planted_here.reached(), 1);
        drop(planted_here);
        assert!(!planted(Bug::StopForgetsCrash));
    }

    #[test]
    fn a_run_without_an_end_is_ended_once() {
        let _on = plant(Bug::StopForgetsCrash).unwrap();
        let endless = std::panic::catch_unwind(|| while !planted(Bug::StopOfCreated) {});
        assert!(endless.is_err());
        assert!(!planted(Bug::StopOfCreated));
    }
}
