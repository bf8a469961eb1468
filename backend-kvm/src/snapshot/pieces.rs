//! [`MemoryPiece`]: where a part of a saved guest's memory stands.

use super::PAGE;

/// A part of a guest's memory that stands in a file. The rest is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPiece {
    /// Where it belongs, as a guest's physical address.
    pub(crate) address: u64,
    /// How long it is.
    pub(crate) length: u64,
    /// In which of the files it stands, counted from zero.
    pub(crate) file: u64,
    /// Where in the file it begins.
    pub(crate) at: u64,
}

/// The length of a piece's encoding: its fields in order as little-endian `u64`.
const ENCODED: usize = 32;

/// Makes one of neighbours that stand one behind the other in the same file.
pub(crate) fn joined(pieces: impl Iterator<Item = MemoryPiece>) -> Vec<MemoryPiece> {
    let mut joined: Vec<MemoryPiece> = Vec::new();
    for piece in pieces {
        match joined.last_mut() {
            Some(last)
                if last.file == piece.file
                    && last.address.checked_add(last.length) == Some(piece.address)
                    && last.at.checked_add(last.length) == Some(piece.at) =>
            {
                last.length += piece.length;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

/// Gives the pieces' encoding.
pub(crate) fn encode(pieces: &[MemoryPiece]) -> Vec<u8> {
    let fields = pieces.iter().flat_map(|piece| {
        let MemoryPiece { address, length, file, at } = *piece;
        [address, length, file, at]
    });
    fields.flat_map(u64::to_le_bytes).collect()
}

/// Reads an encoding.
///
/// # Errors
/// Why it is none: pieces are whole pages, in ascending order, and do not overlap.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<MemoryPiece>, String> {
    let (encoded, left) = bytes.as_chunks::<ENCODED>();
    if !left.is_empty() {
        return Err("half a piece of memory".to_owned());
    }
    let mut end = 0;
    let pieces = encoded.iter().map(|piece| {
        let mut numbers = piece.as_chunks::<8>().0.iter().map(|le| u64::from_le_bytes(*le));
        let mut next = || numbers.next().unwrap_or_default();
        let (address, length, file, at) = (next(), next(), next(), next());
        let new_end = address.checked_add(length);
        let whole = [address, length, at].iter().all(|number| number % PAGE == 0);
        if length == 0 || !whole || address < end || at.checked_add(length).is_none() {
            return Err(format!("{length} bytes of memory at {address:#x} from {at:#x}"));
        }
        end = new_end.ok_or_else(|| format!("memory of {length} bytes at {address:#x}"))?;
        Ok(MemoryPiece { address, length, file, at })
    });
    pieces.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pieces that the launcher takes: gaps, lengths, files and places, in pages.
    fn pieces() -> impl Strategy<Value = Vec<MemoryPiece>> {
        prop::collection::vec((0_u64..3, 1_u64..4, 0_u64..2, 0_u64..3), 0..40).prop_map(|pieces| {
            let (mut address, mut places) = (0, [0, 0]);
            let place = |(gap, length, file, skip): (u64, u64, u64, u64)| {
                address += gap;
                let at = &mut places[usize::from(file == 1)];
                *at += skip;
                let piece = MemoryPiece {
                    address: address * PAGE,
                    length: length * PAGE,
                    file,
                    at: *at * PAGE,
                };
                address += length;
                *at += length;
                piece
            };
            pieces.into_iter().map(place).collect()
        })
    }

    /// Gives for each page where it stands.
    fn pages(pieces: &[MemoryPiece]) -> Vec<(u64, u64, u64)> {
        let of = |piece: &MemoryPiece| {
            let MemoryPiece { address, length, file, at } = *piece;
            (0..length / PAGE).map(move |page| (address + page * PAGE, file, at + page * PAGE))
        };
        pieces.iter().flat_map(of).collect()
    }

    proptest! {
        #[test]
        fn pieces_come_back(pieces in pieces()) {
            prop_assert_eq!(decode(&encode(&pieces)).unwrap(), pieces);
        }

        #[test]
        fn joined_pieces_say_the_same(pieces in pieces()) {
            let joined = joined(pieces.iter().copied());
            prop_assert_eq!(pages(&joined), pages(&pieces));
            prop_assert_eq!(&decode(&encode(&joined)).unwrap(), &joined);
            for pair in joined.windows(2) {
                let [first, second] = [pair[0], pair[1]];
                prop_assert!(
                    first.file != second.file
                        || first.address + first.length != second.address
                        || first.at + first.length != second.at
                );
            }
        }

        #[test]
        fn any_bytes_are_survived(
            words in prop::collection::vec(prop_oneof![any::<u64>(), (0_u64..4).prop_map(|n| n * PAGE)], 0..16),
            odd in 0_usize..8,
        ) {
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.truncate(bytes.len().saturating_sub(odd));
            if let Ok(pieces) = decode(&bytes) {
                prop_assert_eq!(encode(&pieces), bytes);
                for pair in pieces.windows(2) {
                    prop_assert!(pair[0].address + pair[0].length <= pair[1].address);
                }
            }
        }
    }
}
