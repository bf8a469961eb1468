//! Archives, taken apart again by a reader that shares nothing with the writer.

use std::{collections::BTreeMap, fs::File, os::fd::BorrowedFd, os::unix::fs::FileExt};

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) time: u32,
    pub(crate) device: (u32, u32),
    pub(crate) content: Vec<u8>,
}

pub(crate) fn bytes_of(file: BorrowedFd<'_>) -> Vec<u8> {
    let file = File::from(file.try_clone_to_owned().expect("clones"));
    let mut bytes = vec![0; usize::try_from(file.metadata().expect("stats").len()).expect("fits")];
    file.read_exact_at(&mut bytes, 0).expect("reads");
    bytes
}

/// Every entry of archives put behind each other, in order, read as the kernel reads them.
pub(crate) fn entries(bytes: &[u8]) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == 0 {
            at += 1;
            continue;
        }
        assert_eq!(at % 4, 0, "headers are aligned");
        assert_eq!(&bytes[at..at + 6], b"070701");
        let field = |index: usize| {
            let digits = std::str::from_utf8(&bytes[at + 6 + index * 8..][..8]).expect("digits");
            u32::from_str_radix(digits, 16).expect("a number")
        };
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name = &bytes[at + 110..][..name_size];
        assert_eq!(name.last(), Some(&0));
        let start = (at + 110 + name_size).next_multiple_of(4);
        let entry = Entry {
            name: name[..name_size - 1].to_vec(),
            mode: field(1),
            owner: (field(2), field(3)),
            time: field(5),
            device: (field(9), field(10)),
            content: bytes[start..start + size].to_vec(),
        };
        at = (start + size).next_multiple_of(4);
        if entry.name != b"TRAILER!!!" {
            entries.push(entry);
        }
    }
    entries
}

pub(crate) fn by_name(bytes: &[u8]) -> BTreeMap<String, Entry> {
    entries(bytes)
        .into_iter()
        .map(|entry| (String::from_utf8_lossy(&entry.name).into_owned(), entry))
        .collect()
}
