//! [`Hash`]: what each part of a container is checked by.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{borrow::Cow, fmt};
use twox_hash::XxHash3_128;

/// The length of a hash where it stands in bytes.
pub(super) const HASH_LEN: usize = 16;

/// A 128-bit XXH3 hash; hexadecimal digits where it is written as text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hash(pub u128);

impl Hash {
    /// Hashes bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(XxHash3_128::oneshot(bytes))
    }

    /// Gives the bytes, most significant first.
    pub(super) fn to_bytes(self) -> [u8; HASH_LEN] {
        self.0.to_be_bytes()
    }

    /// Takes bytes, most significant first.
    pub(super) fn from_bytes(bytes: [u8; HASH_LEN]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }
}

/// Hashes what comes piece by piece.
pub(crate) struct Hasher(XxHash3_128);

impl Hasher {
    pub(crate) fn new() -> Self {
        Self(XxHash3_128::new())
    }

    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    pub(crate) fn finish(&self) -> Hash {
        Hash(self.0.finish_128())
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hasher").finish_non_exhaustive()
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let digits =
            text.len() == 2 * HASH_LEN && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let wrong = || de::Error::custom("a hash has 32 hexadecimal digits");
        u128::from_str_radix(&text, 16).ok().filter(|_| digits).map(Self).ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_xxh3_with_its_published_values() {
        // From the algorithm's specification: the hash of nothing with seed 0.
        assert_eq!(Hash::of(b"").to_string(), "99aa06d3014798d86001c324468d497f");
        let bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
        let mut hasher = Hasher::new();
        bytes.chunks(77).for_each(|piece| hasher.update(piece));
        assert_eq!(hasher.finish(), Hash::of(&bytes));
    }

    #[test]
    fn text_comes_back_and_other_text_is_refused() {
        let hash = Hash::of(b"x");
        let text = serde_json::to_string(&hash).unwrap();
        assert_eq!(serde_json::from_str::<Hash>(&text).unwrap(), hash);
        assert_eq!(Hash::from_bytes(hash.to_bytes()), hash);
        for wrong in
            ["", "1", "+0000000000000000000000000000001", "g0000000000000000000000000000000"]
        {
            serde_json::from_str::<Hash>(&format!("\"{wrong}\"")).unwrap_err();
        }
    }

    #[test]
    fn a_hash_in_a_message_is_its_digits() {
        let hash = Hash(0xabc);
        assert_eq!(format!("{hash:?}"), "00000000000000000000000000000abc");
        assert_eq!(format!("{:?}", Hasher::new()), "Hasher { .. }");
    }
}
