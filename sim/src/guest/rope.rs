//! File contents as a sequence of shared chunks.

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vm_planted_bugs::{Bug, planted};

/// Appends below this are merged into the chunk before, so that many small writes do not make many chunks.
const MERGE: usize = 4096;

/// A chunk of zeros that holes are made of.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// The bytes of a file. Cloning copies no bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Rope {
    /// Chunks, none of them empty, each with the offset of its end.
    chunks: Vec<(u64, Bytes)>,
}

impl Rope {
    pub(super) fn from_bytes(bytes: impl Into<Bytes>) -> Self {
        let mut rope = Self::default();
        rope.push(bytes.into());
        rope
    }

    pub(super) fn len(&self) -> u64 {
        self.chunks.last().map_or(0, |(end, _)| *end)
    }

    /// Gives at most `max` bytes from `offset` on; no bytes at the end. It stops early at a chunk's end unless
    /// the rest is small, so that big files are read without copying.
    pub(super) fn read(&self, offset: u64, max: usize) -> Bytes {
        if max == 0 || offset >= self.len() {
            return Bytes::new();
        }
        let first = self.chunk_at(offset);
        let piece = self.slice(first, offset, max);
        if piece.len() == max || piece.len() >= MERGE {
            return piece;
        }
        let mut joined = BytesMut::from(&piece[..]);
        for index in first + 1..self.chunks.len() {
            let at = offset + joined.len() as u64;
            joined.extend_from_slice(&self.slice(index, at, max - joined.len()));
            if joined.len() == max || joined.len() >= MERGE {
                break;
            }
        }
        joined.freeze()
    }

    /// Gives everything as one piece.
    pub(super) fn to_bytes(&self) -> Bytes {
        match &self.chunks[..] {
            [] => Bytes::new(),
            [(_, only)] => only.clone(),
            chunks => {
                let mut joined = BytesMut::with_capacity(usize::try_from(self.len()).unwrap_or(0));
                for (_, chunk) in chunks {
                    joined.extend_from_slice(chunk);
                }
                joined.freeze()
            }
        }
    }

    /// Puts bytes at an offset, filling a gap before it with zeros.
    pub(super) fn write(&mut self, offset: u64, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        if offset >= self.len() {
            self.extend_to(offset);
            self.push(bytes);
            return;
        }
        let end = offset + bytes.len() as u64;
        let tail = self.split_from(end);
        self.truncate(offset);
        self.push(bytes);
        for chunk in tail.into_iter().filter(|_| !planted(Bug::WriteCutsTheRest)) {
            self.push(chunk);
        }
    }

    /// Cuts or extends with zeros to this length.
    pub(super) fn set_len(&mut self, len: u64) {
        if len > self.len() { self.extend_to(len) } else { self.truncate(len) }
    }

    /// Adds bytes at the end.
    pub(super) fn push(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        let end = self.len() + bytes.len() as u64;
        match self.chunks.last_mut() {
            Some((last_end, last)) if last.len() + bytes.len() <= MERGE => {
                let mut merged = BytesMut::with_capacity(last.len() + bytes.len());
                merged.extend_from_slice(last);
                merged.extend_from_slice(&bytes);
                *last = merged.freeze();
                *last_end = end;
            }
            _ => self.chunks.push((end, bytes)),
        }
    }

    fn chunk_at(&self, offset: u64) -> usize {
        self.chunks.partition_point(|(end, _)| *end <= offset)
    }

    fn slice(&self, index: usize, offset: u64, max: usize) -> Bytes {
        let (end, chunk) = &self.chunks[index];
        let start = end - chunk.len() as u64;
        let from = usize::try_from(offset - start).unwrap_or(usize::MAX).min(chunk.len());
        chunk.slice(from..chunk.len().min(from.saturating_add(max)))
    }

    fn extend_to(&mut self, len: u64) {
        while self.len() < len {
            let gap = usize::try_from(len - self.len()).unwrap_or(usize::MAX).min(ZEROS.len());
            self.push(Bytes::from_static(&ZEROS[..gap]));
        }
    }

    fn truncate(&mut self, len: u64) {
        while let Some((end, chunk)) = self.chunks.last_mut() {
            let start = *end - chunk.len() as u64;
            if start >= len {
                self.chunks.pop();
                continue;
            }
            if *end > len {
                chunk.truncate(usize::try_from(len - start).unwrap_or(usize::MAX));
                *end = len;
            }
            break;
        }
    }

    fn split_from(&self, offset: u64) -> Vec<Bytes> {
        if offset >= self.len() {
            return Vec::new();
        }
        let first = self.chunk_at(offset);
        let mut pieces = vec![self.slice(first, offset, usize::MAX)];
        pieces.extend(self.chunks[first + 1..].iter().map(|(_, chunk)| chunk.clone()));
        pieces
    }
}

impl Serialize for Rope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.chunks.iter().map(|(_, chunk)| chunk))
    }
}

impl<'de> Deserialize<'de> for Rope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut rope = Self::default();
        let mut end = 0_u64;
        for chunk in Vec::<Bytes>::deserialize(deserializer)? {
            if !chunk.is_empty() {
                end += chunk.len() as u64;
                rope.chunks.push((end, chunk));
            }
        }
        Ok(rope)
    }
}

/// Gives at most this many zeros without copying.
pub(super) fn zeros(max: usize) -> Bytes {
    Bytes::from_static(&ZEROS[..max.min(ZEROS.len())])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Edit {
        Write(u64, Vec<u8>),
        SetLen(u64),
    }

    fn edit() -> impl Strategy<Value = Edit> {
        prop_oneof![
            3 => (0_u64..9000, proptest::collection::vec(any::<u8>(), 0..6000))
                .prop_map(|(at, bytes)| Edit::Write(at, bytes)),
            1 => (0_u64..12_000).prop_map(Edit::SetLen),
        ]
    }

    proptest! {
        #[test]
        fn a_rope_is_a_vector_of_bytes(
            edits in proptest::collection::vec(edit(), 0..12),
            at in 0_u64..16_000,
            max in 0_usize..9000,
        ) {
            let (mut rope, mut model) = (Rope::default(), Vec::new());
            for edit in edits {
                match edit {
                    Edit::Write(at, bytes) => {
                        rope.write(at, Bytes::copy_from_slice(&bytes));
                        let at = usize::try_from(at).unwrap();
                        if !bytes.is_empty() {
                            let end = at + bytes.len();
                            model.resize(model.len().max(end), 0);
                            model[at..end].copy_from_slice(&bytes);
                        }
                    }
                    Edit::SetLen(len) => {
                        rope.set_len(len);
                        model.resize(usize::try_from(len).unwrap(), 0);
                    }
                }
                prop_assert_eq!(&rope.to_bytes()[..], &model[..]);
            }
            let piece = rope.read(at, max);
            let from = usize::try_from(at).unwrap().min(model.len());
            prop_assert!(model[from..].starts_with(&piece));
            prop_assert_eq!(piece.is_empty(), max == 0 || from == model.len());
            let bytes = postcard::to_allocvec(&rope).unwrap();
            let again: Rope = postcard::from_bytes(&bytes).unwrap();
            prop_assert_eq!(&again.to_bytes()[..], &model[..]);
            prop_assert_eq!(again.len(), rope.len());
        }
    }
}
