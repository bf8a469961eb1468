//! [`Console`]: keeps what the guest prints.

use std::{
    fs::File,
    io::{self, Write},
    os::{fd::AsFd, unix::fs::FileExt},
};

/// How many bytes are gathered at most before they are written.
const BATCH: usize = 4 << 10;

/// Where the ring begins in its file; the counter stands before it.
const RING_START: u64 = 8;

/// What a Linux kernel prints when it panics.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// What one prints that is turned off and cannot be, for want of ACPI.
const HALT: &[u8] = b"reboot: System halted";

/// Keeps what the guest prints: the last of it in a ring in a file that the owner shares, so that it outlives this
/// process, and all of it up to a limit in a file of the user's. What a host's full disk loses is counted, no more.
#[derive(Debug)]
pub struct Console {
    ring: File,
    ring_len: u64,
    written: u64,
    file: Option<Log>,
    batch: Vec<u8>,
    panic: Finder,
    halt: Finder,
    lost: u64,
}

/// A file to which all is appended.
#[derive(Debug)]
struct Log {
    file: File,
    room: u64,
}

impl Console {
    /// Writes to a ring of `ring_len` bytes, after what is in it, and to a file that may take `limit` bytes.
    #[must_use]
    pub fn new(ring: File, ring_len: u32, file: Option<(File, u64)>) -> Self {
        let file = file.map(|(file, room)| Log { file, room });
        let mut count = [0; 8];
        let counted = ring.read_exact_at(&mut count, 0);
        Self {
            ring,
            ring_len: u64::from(ring_len),
            written: counted.map_or(0, |()| u64::from_le_bytes(count)),
            file,
            batch: Vec::with_capacity(BATCH),
            panic: Finder::of(PANIC),
            halt: Finder::of(HALT),
            lost: 0,
        }
    }

    /// Adds a byte; says whether it is the first since everything was written.
    pub fn add(&mut self, byte: u8) -> bool {
        let first = self.batch.is_empty();
        self.batch.push(byte);
        self.panic.see(byte);
        self.halt.see(byte);
        if byte == b'\n' || self.batch.len() >= BATCH {
            self.write_out();
            return false;
        }
        first
    }

    /// Writes what was gathered.
    pub fn write_out(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        if self.write_ring().is_err() {
            self.lost += self.batch.len() as u64;
        }
        if let Some(log) = &mut self.file {
            let take = usize::try_from(log.room).unwrap_or(usize::MAX).min(self.batch.len());
            log.room -= take as u64;
            if log.file.write_all(&self.batch[..take]).is_err() {
                self.lost += take as u64;
            }
        }
        self.batch.clear();
    }

    /// Writes the bytes, then the counter: whoever reads the counter first finds all that it counts.
    fn write_ring(&mut self) -> io::Result<()> {
        let skipped = (self.batch.len() as u64).saturating_sub(self.ring_len);
        let mut left = &self.batch[usize::try_from(skipped).unwrap_or(0)..];
        let mut at = self.written + skipped;
        self.written += self.batch.len() as u64;
        while !left.is_empty() {
            let place = at % self.ring_len;
            let step = usize::try_from(self.ring_len - place).unwrap_or(usize::MAX).min(left.len());
            self.ring.write_all_at(&left[..step], RING_START + place)?;
            left = &left[step..];
            at += step as u64;
        }
        self.ring.write_all_at(&self.written.to_le_bytes(), 0)
    }

    /// Says whether a kernel panic was printed.
    #[must_use]
    pub fn saw_panic(&self) -> bool {
        self.panic.found
    }

    /// Says whether the kernel printed that it halts since this was last asked.
    pub fn take_halt(&mut self) -> bool {
        std::mem::take(&mut self.halt.found)
    }

    /// Counts the bytes that could not be written somewhere.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Adds a line of the machine's own.
    pub fn say(&mut self, line: &str) {
        for byte in line.bytes().chain(*b"\r\n") {
            self.add(byte);
        }
    }
}

/// Checks that a file can be a ring of so many bytes.
///
/// # Errors
/// When it is none, or cannot be written.
pub fn check_ring(ring: &impl AsFd, len: u32) -> io::Result<()> {
    let about = rustix::fs::fstat(ring)?;
    if !rustix::fs::FileType::from_raw_mode(about.st_mode).is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if u64::try_from(about.st_size).unwrap_or(0) < RING_START + u64::from(len) {
        return Err(io::Error::other("it is shorter than the ring and its counter"));
    }
    Ok(())
}

/// Looks for a text in a stream of bytes, whose first letter comes again nowhere in it.
#[derive(Debug)]
struct Finder {
    text: &'static [u8],
    matched: usize,
    found: bool,
}

impl Finder {
    fn of(text: &'static [u8]) -> Self {
        Self { text, matched: 0, found: false }
    }

    fn see(&mut self, byte: u8) {
        if self.found {
            return;
        }
        // So a mismatch never leaves more than that letter.
        if byte != self.text[self.matched] {
            self.matched = 0;
        }
        if byte == self.text[self.matched] {
            self.matched += 1;
        }
        self.found = self.matched == self.text.len();
        if self.found {
            self.matched = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(len: u32) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 + u64::from(len)).unwrap();
        file
    }

    /// Reads a ring as its layout says.
    fn content(ring: &File, len: usize) -> (u64, Vec<u8>) {
        let mut bytes = vec![0; 8 + len];
        ring.read_exact_at(&mut bytes, 0).unwrap();
        let count = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let kept = count.min(len as u64);
        let of = |n: u64| bytes[8 + usize::try_from(n % len as u64).unwrap()];
        (count, (count - kept..count).map(of).collect())
    }

    proptest! {
        #[test]
        fn rings_keep_the_last_bytes(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..30),
            len in 1_u32..5000,
            limit in 0_u64..3000,
        ) {
            let (ring, log) = (ring(len), tempfile::tempfile().unwrap());
            let mut console = Console::new(
                ring.try_clone().unwrap(), len, Some((log.try_clone().unwrap(), limit)));
            let mut all = Vec::new();
            for chunk in chunks {
                for &byte in &chunk {
                    console.add(byte);
                }
                all.extend(chunk);
                console.write_out();
                let (count, kept) = content(&ring, len as usize);
                prop_assert_eq!(count, all.len() as u64);
                prop_assert!(all.ends_with(&kept));
                prop_assert_eq!(kept.len(), all.len().min(len as usize));
            }
            let mut logged = vec![0; all.len() + 1];
            let read = log.read_at(&mut logged, 0).unwrap();
            prop_assert_eq!(&logged[..read], &all[..all.len().min(usize::try_from(limit).unwrap())]);
            prop_assert_eq!(console.lost(), 0);
        }

        #[test]
        fn panics_are_found(before in "[Kern panic\n-]{0,40}", cut in 1..PANIC.len()) {
            let text = String::from_utf8_lossy(PANIC).into_owned();
            for (said, expected) in [
                (format!("{before}{}{text}", &text[..cut]), true),
                (format!("{before}{}", &text[..cut]), before.contains(&text)),
            ] {
                let mut console = Console::new(ring(16), 16, None);
                for byte in said.bytes() {
                    console.add(byte);
                }
                prop_assert_eq!(console.saw_panic(), expected || said.contains(&text));
            }
        }
    }

    #[test]
    fn an_empty_ring_only_counts() {
        let ring = ring(0);
        let mut console = Console::new(ring.try_clone().unwrap(), 0, None);
        console.say("hello");
        let mut count = [0; 8];
        ring.read_exact_at(&mut count, 0).unwrap();
        assert_eq!(u64::from_le_bytes(count), 7);
    }

    #[test]
    fn a_full_disk_loses_only_what_it_has_no_room_for() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let ring = ring(64);
        let mut console = Console::new(ring.try_clone().unwrap(), 64, Some((full, 1 << 20)));
        console.say("hello");
        assert_eq!(console.lost(), 7);
        assert_eq!(content(&ring, 64).1, b"hello\r\n");
    }
}
