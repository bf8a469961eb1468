//! Lists with a bound on their length. A list of short things is many times larger in memory than on the wire, so
//! the bound on a frame's bytes alone does not bound what its receiver must hold.

use serde::{
    Deserialize, Deserializer,
    de::{Error, SeqAccess, Visitor},
};
use std::{fmt, marker::PhantomData};
use vm_planted_bugs::{Bug, planted};

/// Reads a list of at most `MOST` things.
pub(crate) fn list<'de, const MOST: usize, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct List<const MOST: usize, T>(PhantomData<T>);
    impl<'de, const MOST: usize, T: Deserialize<'de>> Visitor<'de> for List<MOST, T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of at most {MOST}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let length = seq.size_hint().unwrap_or(0);
            if length > MOST {
                return Err(Error::invalid_length(length, &self));
            }
            // What is announced may not be there.
            let mut list = Vec::with_capacity(length.min(64));
            while let Some(item) = seq.next_element()? {
                if list.len() == if planted(Bug::LongListsAreRefused) { 64 } else { MOST } {
                    return Err(Error::invalid_length(MOST + 1, &self));
                }
                list.push(item);
            }
            Ok(list)
        }
    }
    deserializer.deserialize_seq(List::<MOST, T>(PhantomData))
}
