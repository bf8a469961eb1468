//! The last bytes of a console, and what of it goes to a file of the host.

use bytes::{Buf, Bytes, BytesMut};
use vm_planted_bugs::{Bug, planted};

/// The most that goes to the host's file in one life of a machine.
const FILE_LIMIT: usize = 64 << 20;

#[derive(Debug)]
pub(super) struct Console {
    bytes: BytesMut,
    limit: usize,
    /// How many of the last bytes were not taken note of yet.
    fresh: usize,
    file: Option<FileShare>,
}

/// What goes to the host's file.
#[derive(Debug)]
struct FileShare {
    waiting: BytesMut,
    left: usize,
}

impl Console {
    /// Keeps `limit` bytes, and, where there `is_filed`, what is to go to a file.
    pub(super) fn new(limit: usize, is_filed: bool) -> Self {
        let file = is_filed.then(|| FileShare { waiting: BytesMut::new(), left: FILE_LIMIT });
        Self { bytes: BytesMut::new(), limit, fresh: 0, file }
    }

    pub(super) fn line(&mut self, line: &str) {
        self.bytes.extend_from_slice(line.as_bytes());
        self.bytes.extend_from_slice(b"\n");
        let limit = if planted(Bug::ConsoleHasNoBound) { usize::MAX } else { self.limit };
        let over = self.bytes.len().saturating_sub(limit);
        self.bytes.advance(over);
        self.fresh = (self.fresh + line.len() + 1).min(self.bytes.len());
        if let Some(file) = &mut self.file {
            file.put(line.as_bytes());
            file.put(b"\n");
        }
    }

    /// Takes what is to be appended to the file.
    pub(super) fn take_for_file(&mut self) -> Bytes {
        self.file.as_mut().map_or_else(Bytes::new, |file| file.waiting.split().freeze())
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

impl FileShare {
    fn put(&mut self, bytes: &[u8]) {
        let taken = bytes.len().min(self.left);
        self.waiting.extend_from_slice(&bytes[..taken]);
        self.left -= taken;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keeps_the_last_bytes(lines in prop::collection::vec("[a-z]{0,20}", 0..30), limit in 1_usize..100) {
            let mut console = Console::new(limit, true);
            let mut all = String::new();
            for line in &lines {
                console.line(line);
                all.push_str(line);
                all.push('\n');
            }
            let kept = &all.as_bytes()[all.len().saturating_sub(limit)..];
            prop_assert_eq!(&console.to_bytes()[..], kept);
            prop_assert_eq!(&console.take_for_file()[..], all.as_bytes());
        }

        #[test]
        fn a_file_gets_the_first_bytes_up_to_its_limit(left in 0_usize..200, lines in prop::collection::vec("[a-z]{0,20}", 0..30)) {
            let mut console = Console::new(100, true);
            console.file.as_mut().unwrap().left = left;
            let (mut all, mut got) = (String::new(), Vec::new());
            for line in &lines {
                console.line(line);
                all.push_str(line);
                all.push('\n');
                got.extend_from_slice(&console.take_for_file());
            }
            prop_assert_eq!(&got[..], &all.as_bytes()[..all.len().min(left)]);
        }
    }
}
