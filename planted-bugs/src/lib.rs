//! Mistakes that were planted on purpose, to see whether the contract notices them.
//!
//! Each [`Bug`] stands in the code at the line where a person could have made it, as `if planted(Bug::…)`. Without the
//! feature `armed`, which only tests of the contract switch on, [`planted`] is a constant `false`: nothing of a bug is
//! compiled. With it, a bug is on for the threads that asked for it with [`plant`], and nowhere else; a simulated run
//! takes place on one thread, so runs with different bugs go on side by side.
//!
//! ```
//! use vm_planted_bugs::{ARMED, Bug, plant, planted};
//! assert!(!planted(Bug::StopForgetsCrash));
//! assert_eq!(plant(Bug::StopForgetsCrash).is_ok(), ARMED);
//! ```
#![forbid(unsafe_code)]

use std::{fmt, str::FromStr};

mod catalogue;
#[cfg(feature = "armed")]
mod thread;

pub use catalogue::{Area, Bug};
#[cfg(feature = "armed")]
pub use thread::{Planted, plant, planted};

/// Whether this build has the bugs in it.
pub const ARMED: bool = cfg!(feature = "armed");

/// Says whether a bug is on for this thread; always `false` in a build without them.
#[cfg(not(feature = "armed"))]
#[inline(always)]
#[must_use]
pub const fn planted(_bug: Bug) -> bool {
    false
}

/// Refuses: this build has no bugs in it.
///
/// # Errors
/// [`NotArmed`], always.
#[cfg(not(feature = "armed"))]
pub fn plant(_bug: Bug) -> Result<Planted, NotArmed> {
    Err(NotArmed)
}

/// A bug that is on. There is none in a build without them.
#[cfg(not(feature = "armed"))]
#[derive(Debug)]
pub struct Planted(());

#[cfg(not(feature = "armed"))]
impl Planted {
    /// Counts how often the bug's line was reached.
    #[must_use]
    pub fn reached(&self) -> u64 {
        0
    }
}

/// This build was made without the feature `armed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotArmed;

impl fmt::Display for NotArmed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "this build has no planted bugs; the feature `armed` of vm-planted-bugs adds them",
        )
    }
}

impl std::error::Error for NotArmed {}

/// A text that names no bug.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownBug(String);

impl fmt::Display for UnknownBug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is not a planted bug", self.0)
    }
}

impl std::error::Error for UnknownBug {}

impl FromStr for Bug {
    type Err = UnknownBug;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.iter().copied().find(|bug| bug.name() == text);
        found.ok_or_else(|| UnknownBug(text.to_owned()))
    }
}

impl fmt::Display for Bug {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_bug_has_a_name_of_its_own_and_a_sentence() {
        let names: BTreeSet<_> = Bug::ALL.iter().map(|bug| bug.name()).collect();
        assert_eq!(names.len(), Bug::ALL.len());
        for bug in Bug::ALL {
            assert_eq!(bug.name().parse(), Ok(*bug));
            assert!(bug.sentence().len() > 20, "{bug}: {}", bug.sentence());
        }
        assert!("no-such-bug".parse::<Bug>().is_err());
    }

    #[test]
    fn a_bug_is_on_only_where_the_build_has_it_and_someone_asked() {
        let bug = Bug::StopForgetsCrash;
        assert!(!planted(bug));
        assert_eq!(plant(bug).is_ok(), ARMED);
        assert!(!planted(bug));
    }
}
