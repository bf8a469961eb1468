//! A part of a session, for one of many machines.

use crate::seeds::Seeds;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The most parts that a session can be cut into.
pub const MOST_SHARDS: u64 = 65_536;

/// A part of a session: the runs of every seed and clause are dealt out to `of` shards in turn, so that each gets its
/// share of every clause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Parts")]
pub struct Shard {
    index: u64,
    of: u64,
}

/// A text that is no shard.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadShard {
    /// Not two numbers with a slash between them.
    #[error("`{text}` is no shard; write it as `2/4`: the second of four")]
    NotTwoNumbers {
        /// What stood there.
        text: String,
    },
    /// The first number is not one of 1 to the second, or the second is too large.
    #[error(
        "there is no shard {index} of {of}: shards count from 1, and there are at most {MOST_SHARDS}"
    )]
    OutOfRange {
        /// Which.
        index: u64,
        /// Of how many.
        of: u64,
    },
}

impl Shard {
    /// The whole.
    pub const WHOLE: Self = Self { index: 1, of: 1 };

    /// Chooses the shard number `index` of `of`, counted from 1.
    ///
    /// # Errors
    /// [`BadShard::OutOfRange`].
    pub fn new(index: u64, of: u64) -> Result<Self, BadShard> {
        if (1..=of).contains(&index) && of <= MOST_SHARDS {
            Ok(Self { index, of })
        } else {
            Err(BadShard::OutOfRange { index, of })
        }
    }

    /// Gives its number, counted from 1.
    #[must_use]
    pub fn index(self) -> u64 {
        self.index
    }

    /// Gives how many there are.
    #[must_use]
    pub fn of(self) -> u64 {
        self.of
    }

    /// Says whether it has the run of these: the seed and the clause, both by their number in the session.
    #[must_use]
    pub fn has(self, seed: u64, clause: u64) -> bool {
        (seed % self.of + clause % self.of) % self.of == self.index - 1
    }

    /// Counts its runs of so many clauses under these seeds.
    #[must_use]
    pub fn runs(self, seeds: Seeds, clauses: u64) -> u64 {
        // Out of `of` seeds in a row it has each clause once.
        let even = (seeds.count / self.of).saturating_mul(clauses);
        let of_seed = |seed: u64| {
            let first = (self.index - 1 + self.of - seed) % self.of;
            clauses.saturating_sub(first).div_ceil(self.of)
        };
        even.saturating_add((0..seeds.count % self.of).map(of_seed).sum())
    }
}

impl Default for Shard {
    fn default() -> Self {
        Self::WHOLE
    }
}

impl FromStr for Shard {
    type Err = BadShard;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = |text: &str| {
            let plain = text.bytes().all(|byte| byte.is_ascii_digit());
            text.parse().ok().filter(|_| plain)
        };
        let numbers = text.split_once('/');
        let numbers = numbers.and_then(|(index, of)| digits(index).zip(digits(of)));
        let (index, of) =
            numbers.ok_or_else(|| BadShard::NotTwoNumbers { text: text.to_owned() })?;
        Self::new(index, of)
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

#[derive(Deserialize)]
struct Parts {
    index: u64,
    of: u64,
}

impl TryFrom<Parts> for Shard {
    type Error = BadShard;

    fn try_from(Parts { index, of }: Parts) -> Result<Self, BadShard> {
        Self::new(index, of)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeds::SeedSource;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_run_is_in_one_shard_and_is_counted(of in 1_u64..40, seeds in 1_u64..60, clauses in 0_u64..50) {
            let range = Seeds::range(0, seeds, SeedSource::Option).unwrap();
            let shards: Vec<_> = (1..=of).map(|index| Shard::new(index, of).unwrap()).collect();
            let mut counted = vec![0; shards.len()];
            for (seed, clause) in (0..seeds).flat_map(|seed| (0..clauses).map(move |clause| (seed, clause))) {
                let owners: Vec<_> = (0..shards.len()).filter(|at| shards[*at].has(seed, clause)).collect();
                prop_assert_eq!(owners.len(), 1);
                counted[owners[0]] += 1;
            }
            for (shard, counted) in shards.iter().zip(counted) {
                prop_assert_eq!(shard.runs(range, clauses), counted);
            }
        }

        #[test]
        fn a_shard_is_read_as_it_is_written(of in 1..=MOST_SHARDS, pick: u64) {
            let shard = Shard::new(pick % of + 1, of).unwrap();
            prop_assert_eq!(shard.to_string().parse(), Ok(shard));
            let json = serde_json::to_string(&shard).unwrap();
            prop_assert_eq!(serde_json::from_str::<Shard>(&json).unwrap(), shard);
        }

        #[test]
        fn any_other_text_is_refused(text in "0/[0-9]|[1-9]/0|5/4|[+-]?1/-1|/|1/|/1|1|1/2/3| 1/2|1/65537|[a-z]/2|9{30}/1") {
            prop_assert!(text.parse::<Shard>().is_err());
        }
    }

    #[test]
    fn a_shard_that_cannot_be_is_not_read_from_a_report() {
        assert!(serde_json::from_str::<Shard>(r#"{"index":0,"of":4}"#).is_err());
        assert!(serde_json::from_str::<Shard>(r#"{"index":5,"of":4}"#).is_err());
    }
}
