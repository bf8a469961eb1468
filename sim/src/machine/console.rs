//! The last bytes of a console.

use bytes::{Buf, Bytes, BytesMut};

#[derive(Debug)]
pub(super) struct Console {
    bytes: BytesMut,
    limit: usize,
}

impl Console {
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: BytesMut::new(), limit }
    }

    pub(super) fn line(&mut self, line: &str) {
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\n");
        let over = self.bytes.len().saturating_sub(self.limit);
        self.bytes.advance(over);
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
