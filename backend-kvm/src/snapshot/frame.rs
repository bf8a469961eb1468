//! Frames: what a launcher's copy writes, and its owner reads as the words of a stranger.

use std::io;

/// The length of a frame's header: part and kind as `u32`, offset and length as `u64`, all little-endian.
pub(crate) const HEADER: usize = 24;

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

const CONTENT: u32 = 0;
const ZEROS: u32 = 1;

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) part: Part,
    /// Where in its part that belongs which is told.
    pub(crate) offset: u64,
    pub(crate) told: Told,
}

/// What a frame tells of its part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    /// These many bytes follow the header, at most [`MAX_CONTENT`].
    Content(usize),
    /// There are so many zeros, which do not follow; as many as the part can have.
    Zeros(u64),
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
        let (kind, length) = match self.told {
            Told::Content(length) => (CONTENT, length as u64),
            Told::Zeros(length) => (ZEROS, length),
        };
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&part.to_le_bytes());
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_le_bytes());
        bytes[16..].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// For a part or a kind that is none, and content that is too long, or there where there is none.
    pub(crate) fn decode(bytes: [u8; HEADER]) -> io::Result<Self> {
        let number =
            |at: usize| u32::from_le_bytes(bytes[at..].first_chunk().copied().unwrap_or_default());
        let long =
            |at: usize| u64::from_le_bytes(bytes[at..].first_chunk().copied().unwrap_or_default());
        let bad = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let part = number(0);
        let disk = || u8::try_from(part.wrapping_sub(FIRST_DISK)).ok().map(Part::Disk);
        let part = match part {
            STATE => Part::State,
            MEMORY => Part::Memory,
            END => Part::End,
            _ => disk().ok_or_else(|| bad(format!("part {part:#x}")))?,
        };
        let (kind, length) = (number(4), long(16));
        let short = usize::try_from(length).ok().filter(|length| *length <= MAX_CONTENT);
        let told = match (kind, short) {
            (CONTENT, Some(short)) if (short == 0) == (part == Part::End) => Told::Content(short),
            (ZEROS, _) if length > 0 && matches!(part, Part::Memory | Part::Disk(_)) => {
                Told::Zeros(length)
            }
            _ => return Err(bad(format!("{length} bytes of kind {kind} of {part:?}"))),
        };
        Ok(Self { part, offset: long(8), told })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_come_back(kind in 0_usize..3, number: u8, offset: u64, len in 1..=MAX_CONTENT, zeros in 0_u64..) {
            let part = [Part::State, Part::Memory, Part::Disk(number)][kind];
            let zeros = if part == Part::State || zeros == 0 { None } else { Some(Told::Zeros(zeros)) };
            for told in [Some(Told::Content(len)), zeros].into_iter().flatten() {
                let frame = Frame { part, offset, told };
                prop_assert_eq!(Frame::decode(frame.encode()).unwrap(), frame);
            }
        }

        #[test]
        fn any_header_is_survived(
            part in prop_oneof![0..3_u32, Just(0x100_u32), Just(u32::MAX), any::<u32>()],
            kind in prop_oneof![0..3_u32, any::<u32>()],
            offset: u64,
            length in prop_oneof![0..3_u64, any::<u64>()],
        ) {
            let mut bytes = [0; HEADER];
            bytes[..4].copy_from_slice(&part.to_le_bytes());
            bytes[4..8].copy_from_slice(&kind.to_le_bytes());
            bytes[8..16].copy_from_slice(&offset.to_le_bytes());
            bytes[16..].copy_from_slice(&length.to_le_bytes());
            if let Ok(frame) = Frame::decode(bytes) {
                prop_assert!(!matches!(frame.told, Told::Content(length) if length > MAX_CONTENT));
                prop_assert_eq!(frame.encode(), bytes);
            }
        }
    }

    #[test]
    fn the_end_has_no_content_and_nothing_else_is_empty() {
        let end = Frame { part: Part::End, offset: 0, told: Told::Content(0) };
        assert_eq!(Frame::decode(end.encode()).unwrap(), end);
        for wrong in [
            Frame { told: Told::Content(1), ..end },
            Frame { told: Told::Zeros(1), ..end },
            Frame { part: Part::Memory, ..end },
            Frame { part: Part::Memory, told: Told::Zeros(0), ..end },
            Frame { part: Part::State, told: Told::Zeros(1), ..end },
            Frame { part: Part::Memory, told: Told::Content(MAX_CONTENT + 1), ..end },
        ] {
            Frame::decode(wrong.encode()).unwrap_err();
        }
    }
}
