//! [`ConsoleRing`]: the last of what a guest's console said, in memory that outlives its launcher.

use bytes::Bytes;
use rustix::fs::{MemfdFlags, SealFlags};
use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
};

/// How many bytes come before the ring: the count of all bytes ever written.
const HEAD: u64 = 8;

/// The ring that a launcher writes a guest's console to; for its layout see
/// [`MachineSetUp::console_ring_bytes`](crate::control::MachineSetUp::console_ring_bytes).
///
/// It is read with system calls alone, so that nothing that the launcher does to the file can do harm.
#[derive(Debug)]
pub struct ConsoleRing {
    file: File,
    size: u32,
}

impl ConsoleRing {
    /// Makes an empty ring of `size` bytes, which takes no memory until it is written to.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(size: u32) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("twinvm-console", flags)?);
        file.set_len(HEAD + u64::from(size))?;
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(Self { file, size })
    }

    /// Makes a ring with the same content, for a copy of the machine.
    ///
    /// # Errors
    /// The operating system's.
    pub fn copy(&self) -> io::Result<Self> {
        let copy = Self::new(self.size)?;
        let whole = HEAD + u64::from(self.size);
        let mut content = vec![0; usize::try_from(whole).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut content, 0)?;
        copy.file.write_all_at(&content, 0)?;
        Ok(copy)
    }

    /// Gives its file.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Gives the last bytes of the console, at most as many as the ring keeps. What is written while this reads may be
    /// in it or not.
    #[must_use]
    pub fn last(&self) -> Bytes {
        let Some(before) = self.count() else { return Bytes::new() };
        let size = u64::from(self.size);
        let mut ring = vec![0; usize::try_from(size.min(before)).unwrap_or(0)];
        if ring.is_empty() || self.file.read_exact_at(&mut ring, HEAD).is_err() {
            return Bytes::new();
        }
        // What was written meanwhile has taken the place of the oldest bytes.
        let written = self.count().map_or(size, |after| after.wrapping_sub(before).min(size));
        if before <= size {
            let lost = usize::try_from(written.saturating_sub(size - before)).unwrap_or(0);
            return Bytes::from(ring).slice(lost.min(usize::try_from(before).unwrap_or(0))..);
        }
        let oldest = usize::try_from(before % size).unwrap_or(0);
        ring.rotate_left(oldest);
        Bytes::from(ring).slice(usize::try_from(written).unwrap_or(0)..)
    }

    fn count(&self) -> Option<u64> {
        let mut head = [0; 8];
        self.file.read_exact_at(&mut head, 0).ok()?;
        Some(u64::from_le_bytes(head))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    /// Writes as a launcher does.
    fn write(ring: &ConsoleRing, bytes: &[u8]) {
        let mut count = ring.count().unwrap();
        for byte in bytes {
            let at = HEAD + count % u64::from(ring.size);
            ring.file.write_all_at(&[*byte], at).unwrap();
            count += 1;
        }
        ring.file.write_all_at(&count.to_le_bytes(), 0).unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_last_bytes_are_kept(chunks in vec(vec(any::<u8>(), 0..90), 0..8), size in 1..200u32) {
            let ring = ConsoleRing::new(size).unwrap();
            let mut all = Vec::new();
            for chunk in chunks {
                write(&ring, &chunk);
                all.extend(chunk);
                let kept = all.len().min(usize::try_from(size).unwrap());
                prop_assert_eq!(&ring.last()[..], &all[all.len() - kept..]);
            }
        }

        #[test]
        fn nonsense_is_read_without_harm(
            head in any::<u64>(), bytes in vec(any::<u8>(), 0..64), size in 1..64u32,
        ) {
            let ring = ConsoleRing::new(size).unwrap();
            let kept = bytes.len().min(usize::try_from(size).unwrap());
            ring.file.write_all_at(&bytes[..kept], HEAD).unwrap();
            ring.file.write_all_at(&head.to_le_bytes(), 0).unwrap();
            prop_assert!(ring.last().len() <= usize::try_from(size).unwrap());
        }
    }

    #[test]
    fn a_launcher_can_neither_shorten_nor_lengthen_it() {
        let ring = ConsoleRing::new(100).unwrap();
        for length in [0, 50, 109, 1 << 30] {
            assert!(ring.file.set_len(length).is_err(), "{length}");
        }
        assert!(ring.file.write_all_at(&[1; 10], 100).is_err());
    }
}
