//! Frames: what a launcher's copy writes, and its owner reads as the words of a stranger.

use std::io;

/// The length of a frame's header: part and length as `u32`, offset as `u64`, all little-endian.
pub(crate) const HEADER: usize = 16;

/// The most bytes behind one header.
pub(crate) const MAX_CONTENT: usize = 1 << 20;

/// What a frame's bytes are a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// Vcpus, devices and the like.
    State,
    /// Guest memory, at a guest's physical address.
    Memory,
    /// The writable disk of this number.
    Disk(u8),
    /// The end, which has no content.
    End,
}

const STATE: u32 = 0;
const MEMORY: u32 = 1;
const FIRST_DISK: u32 = 0x100;
const END: u32 = u32::MAX;

/// The header of some content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) part: Part,
    /// Where the content belongs in its part.
    pub(crate) offset: u64,
    /// How long it is.
    pub(crate) len: usize,
}

impl Frame {
    /// Gives the header's bytes.
    pub(crate) fn encode(self) -> [u8; HEADER] {
        let part = match self.part {
            Part::State => STATE,
            Part::Memory => MEMORY,
            Part::Disk(number) => FIRST_DISK + u32::from(number),
            Part::End => END,
        };
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&part.to_le_bytes());
        bytes[4..8].copy_from_slice(&u32::try_from(self.len).unwrap_or(u32::MAX).to_le_bytes());
        bytes[8..].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// For a part that is none, and content that is too long, or there where there is none.
    pub(crate) fn decode(bytes: [u8; HEADER]) -> io::Result<Self> {
        let [part, len] = [0, 4]
            .map(|at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        let mut offset = [0; 8];
        offset.copy_from_slice(&bytes[8..]);
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let disk = || u8::try_from(part.wrapping_sub(FIRST_DISK)).ok().map(Part::Disk);
        let part = match part {
            STATE => Part::State,
            MEMORY => Part::Memory,
            END => Part::End,
            _ => disk().ok_or_else(|| bad(format!("part {part:#x}")))?,
        };
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_CONTENT || (len == 0) != (part == Part::End) {
            return Err(bad(format!("{len} bytes of {part:?}")));
        }
        Ok(Self { part, offset: u64::from_le_bytes(offset), len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_come_back(kind in 0..3, number: u8, offset: u64, len in 1..=MAX_CONTENT) {
            let part = [Part::State, Part::Memory, Part::Disk(number)][usize::try_from(kind).unwrap()];
            let frame = Frame { part, offset, len };
            prop_assert_eq!(Frame::decode(frame.encode()).unwrap(), frame);
        }

        #[test]
        fn any_header_is_survived(bytes: [u8; HEADER]) {
            if let Ok(frame) = Frame::decode(bytes) {
                prop_assert!(frame.len <= MAX_CONTENT);
                prop_assert_eq!(frame.encode(), bytes);
            }
        }
    }

    #[test]
    fn the_end_has_no_content_and_nothing_else_is_empty() {
        let end = Frame { part: Part::End, offset: 0, len: 0 };
        assert_eq!(Frame::decode(end.encode()).unwrap(), end);
        for wrong in [Frame { len: 1, ..end }, Frame { part: Part::Memory, ..end }] {
            Frame::decode(wrong.encode()).unwrap_err();
        }
    }
}
