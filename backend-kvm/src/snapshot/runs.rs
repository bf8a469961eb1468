//! [`Runs`]: where packed content belongs.

use bytes::{BufMut, Bytes, BytesMut};

/// The size of a page.
pub(crate) const PAGE: u64 = 4096;

/// The length of a run's encoding: offset and length as little-endian `u64`.
const ENCODED: usize = 16;

/// Where packed content belongs: runs in ascending order that do not touch; all else is zeros. Encoded as the length of the
/// whole and then offset and length of each run, as little-endian `u64`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Runs {
    total: u64,
    runs: Vec<(u64, u64)>,
}

impl Runs {
    /// Begins with nothing but zeros, of so many bytes.
    pub(crate) fn new(total: u64) -> Self {
        Self { total, runs: Vec::new() }
    }

    /// How long the whole is, with all zeros.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// How many bytes of content there are.
    pub(crate) fn packed(&self) -> u64 {
        self.runs.iter().map(|(_, len)| len).sum()
    }

    /// Gives offset and length of each run.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.runs.iter().copied()
    }

    /// Adds content behind all that is there.
    ///
    /// # Errors
    /// Why it cannot be there.
    pub(crate) fn add(&mut self, offset: u64, len: u64) -> Result<(), String> {
        let end = self.runs.last().map_or(0, |(at, len)| at + len);
        let new_end = offset.checked_add(len);
        if len == 0 || offset < end || new_end.is_none_or(|new_end| new_end > self.total) {
            return Err(format!("{len} bytes at {offset:#x} of {:#x}, after {end:#x}", self.total));
        }
        match self.runs.last_mut() {
            Some((_, last)) if offset == end => *last += len,
            _ => self.runs.push((offset, len)),
        }
        Ok(())
    }

    /// Gives the encoding.
    pub(crate) fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(8 + self.runs.len() * ENCODED);
        bytes.put_u64_le(self.total);
        for (offset, len) in &self.runs {
            bytes.put_u64_le(*offset);
            bytes.put_u64_le(*len);
        }
        bytes.freeze()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// Why it is none.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes);
        let (total, rest) = bytes.split_at_checked(8).ok_or("too short for runs")?;
        let mut runs = Self::new(number(total).unwrap_or_default());
        let (encoded, left) = rest.as_chunks::<ENCODED>();
        if !left.is_empty() {
            return Err("half a run".to_owned());
        }
        let mut end = None;
        for run in encoded {
            let (offset, len) = run.split_at(8);
            let [offset, len] = [offset, len].map(|bytes| number(bytes).unwrap_or_default());
            if end == Some(offset) {
                return Err(format!("runs that touch at {offset:#x}"));
            }
            runs.add(offset, len)?;
            end = Some(offset + len);
        }
        Ok(runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_come_back(pieces in prop::collection::vec((0_u64..1000, 1_u64..1000), 0..50)) {
            let mut runs = Runs::new(200_000);
            let mut end = 0;
            for (gap, len) in &pieces {
                runs.add(end + gap, *len).unwrap();
                end += gap + len;
            }
            prop_assert_eq!(runs.packed(), pieces.iter().map(|(_, len)| len).sum::<u64>());
            prop_assert_eq!(Runs::decode(&runs.encode()).unwrap(), runs);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(runs) = Runs::decode(&bytes) {
                prop_assert!(runs.packed() <= runs.total());
                prop_assert_eq!(&runs.encode()[..], &bytes[..]);
            }
        }
    }

    #[test]
    fn what_overlaps_or_lies_outside_is_refused() {
        let mut runs = Runs::new(100);
        runs.add(10, 20).unwrap();
        for (offset, len) in [(0, 5), (29, 1), (90, 11), (40, 0), (u64::MAX, 2)] {
            runs.add(offset, len).unwrap_err();
        }
        runs.add(30, 70).unwrap();
        assert_eq!(runs.iter().collect::<Vec<_>>(), [(10, 90)]);
    }
}
