//! [`PageMap`]: what the page tables of this process say.

use crate::snapshot::PAGE;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

/// The page tables of this process (Documentation/admin-guide/mm/pagemap.rst of the kernel), where they can be read.
#[derive(Debug)]
pub(super) struct PageMap(Option<File>);

/// What they say of some pages; nothing where they could not be read.
#[derive(Debug)]
pub(super) struct Pages(Option<Vec<u8>>);

/// The length of an entry.
const ENTRY: usize = 8;

/// In the highest byte of an entry: the page is there, or swapped out.
const THERE: u8 = 0xc0;

/// Also there: the page is a file's, or shared.
const OF_FILE: u8 = 0x20;

impl PageMap {
    /// Opens those of this process.
    pub(super) fn open() -> Self {
        let open = || File::open("/proc/self/pagemap");
        let opened = open().or_else(|error| {
            // A process that may not be dumped cannot look at itself either, but where it is root's.
            if error.kind() != io::ErrorKind::PermissionDenied {
                return Err(error);
            }
            set_dumpable_behavior(DumpableBehavior::Dumpable)?;
            let opened = open();
            set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
            opened
        });
        Self(opened.ok())
    }

    /// Looks at pages from an address of this process on.
    pub(super) fn look(&self, address: u64, bytes: u64) -> Pages {
        let mut entries = vec![0; usize::try_from(bytes.div_ceil(PAGE)).unwrap_or(0) * ENTRY];
        let at = address / PAGE * ENTRY as u64;
        let read = self.0.as_ref().map(|map| map.read_exact_at(&mut entries, at));
        Pages(read.and_then(Result::ok).map(|()| entries))
    }
}

impl Pages {
    /// Whether any page can hold something that is not in a file.
    pub(super) fn any(&self) -> bool {
        let Some(entries) = &self.0 else { return true };
        highest(entries).any(|byte| byte & THERE != 0)
    }

    /// Gives the bytes, counted from the first page, that this process can have written to, of the first `bytes`.
    pub(super) fn own(&self, bytes: u64) -> Vec<Range<u64>> {
        let Some(entries) = &self.0 else { return vec![Range { start: 0, end: bytes }] };
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (start, byte) in (0..).step_by(4096).zip(highest(entries)) {
            if byte & THERE == 0 || byte & OF_FILE != 0 {
                continue;
            }
            let end = bytes.min(start + PAGE);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }
}

fn highest(entries: &[u8]) -> impl Iterator<Item = u8> {
    entries.iter().copied().skip(ENTRY - 1).step_by(ENTRY)
}
