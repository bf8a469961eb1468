//! Which seeds to run: numbers, ranges, and the variables `DST_SEED` and `DST_SEEDS`.

use std::{env, fmt, ops::Range};

/// The seeds of a session: `count` of them from `first` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seeds {
    /// The first.
    pub first: u64,
    /// How many, at least 1.
    pub count: u64,
    /// Who asked for them, for reports.
    pub source: SeedSource,
}

/// Who asked for the seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SeedSource {
    /// Nobody: the default of the command or test.
    Default,
    /// An option of the command line.
    Option,
    /// `DST_SEED`, with exactly that seed.
    DstSeed,
    /// `DST_SEED=random`.
    Random,
    /// `DST_SEEDS`.
    DstSeeds,
}

/// A text that is no choice of seeds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSeeds {
    /// Not a number.
    #[error(
        "{what}: `{text}` is not a number; write it in decimal or as 0x and hexadecimal digits"
    )]
    NotANumber {
        /// Where it stood.
        what: String,
        /// What stood there.
        text: String,
    },
    /// No seeds at all.
    #[error("{what}: at least 1 seed is needed")]
    None {
        /// Where it stood.
        what: String,
    },
    /// Past the last 64-bit number.
    #[error("{what}: {count} seeds from {first:#x} on pass the largest 64-bit number")]
    TooMany {
        /// Where it stood.
        what: String,
        /// The first seed.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Two variables that exclude each other.
    #[error("DST_SEED and DST_SEEDS are both set; set one of them")]
    Both,
    /// Not text.
    #[error("{what}: not UTF-8")]
    NotText {
        /// Where it stood.
        what: String,
    },
}

impl Seeds {
    /// Chooses `count` seeds from `first` on.
    ///
    /// # Errors
    /// [`BadSeeds`] where there are none, or too many.
    pub fn range(first: u64, count: u64, source: SeedSource) -> Result<Self, BadSeeds> {
        let what = source.name().to_owned();
        if count == 0 {
            return Err(BadSeeds::None { what });
        }
        if first.checked_add(count - 1).is_none() {
            return Err(BadSeeds::TooMany { what, first, count });
        }
        Ok(Self { first, count, source })
    }

    /// Chooses one seed.
    #[must_use]
    pub fn one(seed: u64, source: SeedSource) -> Self {
        Self { first: seed, count: 1, source }
    }

    /// Reads `DST_SEED` and `DST_SEEDS`; gives `None` where neither is set.
    ///
    /// # Errors
    /// [`BadSeeds`]: a value that cannot be read is never ignored.
    pub fn from_env() -> Result<Option<Self>, BadSeeds> {
        let read = |name: &str| match env::var(name) {
            Ok(text) => Ok(Some(text)),
            Err(env::VarError::NotPresent) => Ok(None),
            Err(env::VarError::NotUnicode(_)) => Err(BadSeeds::NotText { what: name.to_owned() }),
        };
        Self::from_values(read("DST_SEED")?.as_deref(), read("DST_SEEDS")?.as_deref())
    }

    /// Reads the values of `DST_SEED` and `DST_SEEDS`.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub fn from_values(seed: Option<&str>, seeds: Option<&str>) -> Result<Option<Self>, BadSeeds> {
        match (seed, seeds) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) => Err(BadSeeds::Both),
            (Some("random"), None) => Ok(Some(Self::one(random_seed(), SeedSource::Random))),
            (Some(text), None) => {
                let seed = number("DST_SEED", text)?;
                Ok(Some(Self::one(seed, SeedSource::DstSeed)))
            }
            (None, Some(text)) => {
                let count = number("DST_SEEDS", text)?;
                Self::range(0, count, SeedSource::DstSeeds).map(Some)
            }
        }
    }

    /// Gives the seed at `index`, counted from 0.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.count, "seed {index} of {}", self.count);
        self.first + index
    }

    /// Walks through the seeds.
    pub fn iter(&self) -> impl Iterator<Item = u64> + use<> {
        let this = *self;
        let indexes: Range<u64> = 0..self.count;
        indexes.map(move |index| this.at(index))
    }
}

impl SeedSource {
    fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Option => "--seeds",
            Self::DstSeed => "DST_SEED",
            Self::Random => "DST_SEED=random",
            Self::DstSeeds => "DST_SEEDS",
        }
    }
}

impl fmt::Display for Seeds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            1 => write!(f, "{:#x}", self.first)?,
            count => write!(f, "{count} from {:#x} on", self.first)?,
        }
        match self.source {
            SeedSource::Default | SeedSource::Option => Ok(()),
            source => write!(f, " ({})", source.name()),
        }
    }
}

/// Reads a number in decimal or, after `0x`, in hexadecimal digits; `_` may stand between digits.
///
/// # Errors
/// [`BadSeeds::NotANumber`] naming `what`.
pub fn number(what: &str, text: &str) -> Result<u64, BadSeeds> {
    parse_number(text)
        .ok_or_else(|| BadSeeds::NotANumber { what: what.to_owned(), text: text.to_owned() })
}

fn parse_number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    let plain = digits.replace('_', "");
    // from_str_radix accepts a sign, which no seed has.
    if digits.starts_with('_') || digits.ends_with('_') || plain.starts_with(['+', '-']) {
        return None;
    }
    u64::from_str_radix(&plain, radix).ok()
}

fn random_seed() -> u64 {
    // Failing to draw would be the host's failure; 0 is as good a seed as any other.
    getrandom::u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_are_read_in_both_bases(seed: u64) {
            prop_assert_eq!(number("x", &seed.to_string()), Ok(seed));
            prop_assert_eq!(number("x", &format!("{seed:#x}")), Ok(seed));
            prop_assert_eq!(number("x", &format!("{seed:#X}")), Ok(seed));
        }

        #[test]
        fn what_is_no_number_is_refused(text in "|0x|-1|\\+1| 1|1 |[a-f]+|0x[g-z]|1_|_1|1\\.0|0x1{17}|9{21}") {
            prop_assert!(number("x", &text).is_err());
        }

        #[test]
        fn dst_seed_is_exactly_that_seed(seed: u64) {
            let seeds = Seeds::from_values(Some(&format!("{seed:#x}")), None).unwrap().unwrap();
            prop_assert_eq!(seeds.iter().collect::<Vec<_>>(), vec![seed]);
        }

        #[test]
        fn ranges_end_before_they_wrap(first: u64, count: u64) {
            let fits = count > 0 && u128::from(first) + u128::from(count) <= 1 << 64;
            let seeds = Seeds::range(first, count, SeedSource::Option);
            prop_assert_eq!(seeds.is_ok(), fits);
            if let Ok(seeds) = seeds {
                prop_assert_eq!(seeds.at(count - 1), first + (count - 1));
            }
        }
    }

    #[test]
    fn bad_values_are_errors_and_none_is_none() {
        assert_eq!(Seeds::from_values(None, None), Ok(None));
        assert_eq!(Seeds::from_values(Some("1"), Some("2")), Err(BadSeeds::Both));
        for bad in ["", "many", "0x", "-3"] {
            assert!(Seeds::from_values(Some(bad), None).is_err(), "{bad}");
            assert!(Seeds::from_values(None, Some(bad)).is_err(), "{bad}");
        }
        assert!(Seeds::from_values(None, Some("0")).is_err());
        assert!(Seeds::from_values(None, Some("random")).is_err());
        let drawn = Seeds::from_values(Some("random"), None).unwrap().unwrap();
        assert_eq!((drawn.count, drawn.source), (1, SeedSource::Random));
    }
}
