//! The last bytes of a console.

use bytes::{Buf, Bytes, BytesMut};

#[derive(Debug)]
pub(super) struct Console {
    bytes: BytesMut,
    limit: usize,
    /// How many of the last bytes were not taken note of yet.
    fresh: usize,
}

impl Console {
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: BytesMut::new(), limit, fresh: 0 }
    }

    pub(super) fn line(&mut self, line: &str) {
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\n");
        let over = self.bytes.len().saturating_sub(self.limit);
        self.bytes.advance(over);
        self.fresh = (self.fresh + line.len() + 1).min(self.bytes.len());
    }

    /// Gives what was written since the last call.
    pub(super) fn take_fresh(&mut self) -> &[u8] {
        let fresh = std::mem::take(&mut self.fresh);
        &self.bytes[self.bytes.len() - fresh..]
    }

    pub(super) fn to_bytes(&self) -> Bytes {
        Bytes::copy_from_slice(&self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keeps_the_last_bytes(lines in prop::collection::vec("[a-z]{0,20}", 0..30), limit in 1_usize..100) {
            let mut console = Console::new(limit);
            let mut all = String::new();
            for line in &lines {
                console.line(line);
                all.push_str(line);
                all.push('\n');
            }
            let kept = &all.as_bytes()[all.len().saturating_sub(limit)..];
            prop_assert_eq!(&console.to_bytes()[..], kept);
        }
    }
}
