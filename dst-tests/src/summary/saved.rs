//! How a summary is written down and read again.

use crate::{clauses, honesty};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use twox_hash::XxHash3_128;

/// An id, group or promise of the contract. What is read has to be in the contract of this build.
pub type ContractText = &'static str;

/// The fingerprints of many runs, taken together in a way that does not depend on their order: the sum of the hashes of
/// each seed with its fingerprint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fingerprints(u128);

impl Fingerprints {
    /// Adds the fingerprint of the run with this seed.
    pub fn add(&mut self, seed: u64, fingerprint: u128) {
        let mut hasher = XxHash3_128::new();
        hasher.write(&seed.to_le_bytes());
        hasher.write(&fingerprint.to_le_bytes());
        self.0 = self.0.wrapping_add(hasher.finish_128());
    }

    /// Adds those of other runs.
    pub fn add_all(&mut self, others: Self) {
        self.0 = self.0.wrapping_add(others.0);
    }
}

impl Serialize for Fingerprints {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:032x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Fingerprints {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let sum = u128::from_str_radix(&text, 16).ok().filter(|_| text.len() == 32);
        sum.map(Self).ok_or_else(|| D::Error::custom(format!("`{text}` is no fingerprint")))
    }
}

/// Reads an id, group or promise of the contract, and refuses a text that this build's contract does not have.
pub(super) fn registered<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<ContractText, D::Error> {
    let text = String::deserialize(deserializer)?;
    let honest = honesty::CLAUSES.iter().map(|(_, clause)| clause);
    let texts =
        clauses::all().chain(honest).flat_map(|clause| [clause.id, clause.promise, clause.group()]);
    texts.into_iter().find(|known| *known == text).ok_or_else(|| {
        D::Error::custom(format!(
            "`{text}` is not in the contract of this vmdst; read a report with the version that wrote it"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_order_of_runs_does_not_count(runs: Vec<(u64, u128)>, cut: prop::sample::Index) {
            let sum = |runs: &[(u64, u128)]| {
                let mut sum = Fingerprints::default();
                runs.iter().for_each(|(seed, fingerprint)| sum.add(*seed, *fingerprint));
                sum
            };
            let (left, right) = runs.split_at(cut.index(runs.len() + 1));
            let mut parts = sum(right);
            parts.add_all(sum(left));
            prop_assert_eq!(parts, sum(&runs));
            let json = serde_json::to_string(&parts).unwrap();
            prop_assert_eq!(serde_json::from_str::<Fingerprints>(&json).unwrap(), parts);
        }

        #[test]
        fn another_fingerprint_or_seed_is_another_sum(seed: u64, fingerprint: u128, other: (u64, u128)) {
            prop_assume!((seed, fingerprint) != other);
            let (mut one, mut two) = (Fingerprints::default(), Fingerprints::default());
            one.add(seed, fingerprint);
            two.add(other.0, other.1);
            prop_assert_ne!(one, two);
        }
    }
}
