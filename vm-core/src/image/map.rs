//! [`ImageMap`]: where packed content belongs.

use super::Piece;
use bytes::{BufMut, Bytes, BytesMut};
use vm_planted_bugs::{Bug, planted};

/// The length of a run's encoding: offset, length, and whether it has content, as little-endian `u64`.
const ENCODED: usize = 24;

/// A part of an image that a snapshot says something about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
    /// Whether the snapshot holds its bytes; else it is zeros, whatever a base says.
    pub content: bool,
}

/// Where packed content belongs: runs in ascending order that do not overlap. All else is what the base holds, and zeros
/// where there is no base.
///
/// It is encoded as the length of the whole, and then offset, length and kind of each run, as little-endian `u64`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageMap {
    total: u64,
    runs: Vec<Run>,
}

impl ImageMap {
    /// Begins without a run, for an image of so many bytes.
    #[must_use]
    pub fn new(total: u64) -> Self {
        Self { total, runs: Vec::new() }
    }

    /// How long the whole image is.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// How many bytes of content there are.
    #[must_use]
    pub fn packed(&self) -> u64 {
        self.runs.iter().filter(|run| run.content).map(|run| run.length).sum()
    }

    /// Gives the runs.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Adds a run behind all others.
    ///
    /// # Errors
    /// Why it cannot be there.
    pub fn add(&mut self, run: Run) -> Result<(), String> {
        let Run { offset, length, content } = run;
        let end = self.runs.last().map_or(0, |last| last.offset + last.length);
        let new_end = offset.checked_add(length);
        if length == 0 || offset < end || new_end.is_none_or(|new_end| new_end > self.total) {
            let total = self.total;
            return Err(format!("{length} bytes at {offset:#x} of {total:#x}, after {end:#x}"));
        }
        match self.runs.last_mut() {
            Some(last) if offset == end && last.content == content => last.length += length,
            _ => self.runs.push(run),
        }
        Ok(())
    }

    /// Gives the encoding.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(8 + self.runs.len() * ENCODED);
        bytes.put_u64_le(self.total);
        for run in &self.runs {
            bytes.put_u64_le(run.offset);
            bytes.put_u64_le(run.length);
            bytes.put_u64_le(u64::from(run.content));
        }
        bytes.freeze()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// Why it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (total, rest) = bytes.split_first_chunk::<8>().ok_or("too short for a map")?;
        let mut map = Self::new(u64::from_le_bytes(*total));
        let (encoded, left) = rest.as_chunks::<ENCODED>();
        if !left.is_empty() {
            return Err("half a run".to_owned());
        }
        for run in encoded {
            let mut numbers = run.as_chunks::<8>().0.iter().map(|le| u64::from_le_bytes(*le));
            let mut next = || numbers.next().unwrap_or_default();
            let (offset, length, kind) = (next(), next(), next());
            if kind > 1 {
                return Err(format!("a run of kind {kind} at {offset:#x}"));
            }
            let before = map.runs.len();
            map.add(Run { offset, length, content: kind == 1 })?;
            if map.runs.len() == before {
                return Err(format!("runs that are one at {offset:#x}"));
            }
        }
        Ok(map)
    }
}

/// Puts the runs of a map over pieces. The content of the runs is packed in a layer's file from `start` on.
pub(super) fn overlay(base: &[Piece], map: &ImageMap, layer: usize, start: u64) -> Vec<Piece> {
    let mut pieces = Vec::with_capacity(base.len() + map.runs.len());
    let mut under = base.iter().copied();
    let mut next = under.next();
    let mut at = start;
    // A base may be longer: what lies behind the end is covered like anything else.
    let behind = Run { offset: map.total, length: u64::MAX - map.total, content: false };
    let says = |run: &&Run| run.content || !planted(Bug::ZerosDoNotCover);
    let behind = [&behind].into_iter().filter(|_| !planted(Bug::BaseIsNotCut));
    for run in map.runs.iter().filter(says).chain(behind) {
        let run_end = run.offset + run.length;
        while let Some(piece) = next.filter(|piece| piece.offset < run_end) {
            let piece_end = piece.offset + piece.length;
            if piece.offset < run.offset {
                let length = piece_end.min(run.offset) - piece.offset;
                pieces.push(Piece { length, ..piece });
            }
            next = if piece_end > run_end {
                let cut = run_end - piece.offset;
                let (length, at) = (piece.length - cut, piece.at + cut);
                Some(Piece { offset: run_end, length, at, ..piece })
            } else {
                under.next()
            };
        }
        if run.content {
            pieces.push(Piece { offset: run.offset, length: run.length, layer, at });
            at += run.length;
        }
    }
    if planted(Bug::BaseIsNotCut) {
        pieces.extend(next.into_iter().chain(under));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Gives a map of up to `total` bytes: gaps, lengths and kinds of runs.
    fn maps() -> impl Strategy<Value = ImageMap> {
        let runs = prop::collection::vec((0_u64..8, 1_u64..8, any::<bool>()), 0..12);
        (0_u64..100, runs).prop_map(|(total, runs)| {
            let mut map = ImageMap::new(total);
            let mut at = 0;
            for (gap, length, content) in runs {
                at += gap;
                // What has no room any more is left out.
                let _ = map.add(Run { offset: at, length, content });
                at += length;
            }
            map
        })
    }

    /// Does what [`overlay`] does, byte by byte: of each byte, in which layer and where it stands.
    fn byte_by_byte(maps: &[ImageMap]) -> Vec<Option<(usize, u64)>> {
        let mut bytes = Vec::new();
        for (layer, map) in maps.iter().enumerate() {
            bytes.resize(usize::try_from(map.total).unwrap(), None);
            let mut at = 1000;
            for run in &map.runs {
                for offset in run.offset..run.offset + run.length {
                    bytes[usize::try_from(offset).unwrap()] = run.content.then_some((layer, at));
                    at += u64::from(run.content);
                }
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn maps_come_back(map in maps()) {
            prop_assert_eq!(ImageMap::decode(&map.encode()).unwrap(), map);
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Ok(map) = ImageMap::decode(&bytes) {
                prop_assert!(map.packed() <= map.total());
                prop_assert_eq!(&map.encode()[..], &bytes[..]);
            }
        }

        #[test]
        fn layers_lie_one_over_the_other(maps in prop::collection::vec(maps(), 1..6)) {
            let mut pieces = Vec::new();
            for (layer, map) in maps.iter().enumerate() {
                pieces = overlay(&pieces, map, layer, 1000);
            }
            let wanted = byte_by_byte(&maps);
            let mut found = vec![None; wanted.len()];
            let mut end = 0;
            for piece in &pieces {
                prop_assert!(piece.length > 0 && piece.offset >= end, "{:?}", pieces);
                end = piece.offset + piece.length;
                for (offset, at) in (piece.offset..end).zip(piece.at..) {
                    found[usize::try_from(offset).unwrap()] = Some((piece.layer, at));
                }
            }
            prop_assert_eq!(found, wanted);
        }
    }

    #[test]
    fn what_overlaps_or_lies_outside_is_refused() {
        let mut map = ImageMap::new(100);
        let run = |offset, length| Run { offset, length, content: true };
        map.add(run(10, 20)).unwrap();
        for (offset, length) in [(0, 5), (29, 1), (90, 11), (40, 0), (u64::MAX, 2)] {
            map.add(run(offset, length)).unwrap_err();
        }
        map.add(run(30, 60)).unwrap();
        map.add(Run { offset: 90, length: 10, content: false }).unwrap();
        assert_eq!(map.runs(), [run(10, 80), Run { offset: 90, length: 10, content: false }]);
        assert_eq!((map.packed(), map.total()), (80, 100));
    }
}
