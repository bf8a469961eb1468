//! Which bug is on, for each thread.

use crate::{Bug, NotArmed};
use std::cell::Cell;

thread_local! {
    static ON: Cell<Option<Bug>> = const { Cell::new(None) };
    static REACHED: Cell<u64> = const { Cell::new(0) };
}

/// Says whether a bug is on for this thread.
#[must_use]
pub fn planted(bug: Bug) -> bool {
    // A thread that is being torn down has no bug any more.
    let on = ON.try_with(|on| on.get() == Some(bug)).unwrap_or(false);
    if on {
        let _ = REACHED.try_with(|reached| reached.set(reached.get() + 1));
    }
    on
}

/// Switches a bug on for this thread, until what it gives is dropped.
///
/// # Errors
/// None in this build; one without the feature `armed` refuses.
pub fn plant(bug: Bug) -> Result<Planted, NotArmed> {
    let before = ON.replace(Some(bug));
    REACHED.set(0);
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
}
