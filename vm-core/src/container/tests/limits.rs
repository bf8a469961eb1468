//! How much a container holds, to the byte, and how much is read, hashed and written in one go.

use super::{
    integrity::OLD_MANIFEST,
    memory_fs::{Fault, run_at_most},
    *,
};
use crate::container::{
    layout::{HEADER_LEN, TRAILER_LEN},
    verify::hash_in_steps,
};

/// Up to what length small pieces are gathered before they are written.
const GATHER: usize = 64 << 10;

fn manifest() -> Manifest {
    serde_json::from_str(OLD_MANIFEST).unwrap()
}

/// Gives a container of one section.
fn one_section(name: &str, chunks: Vec<Vec<u8>>) -> Draft {
    Draft { manifest: manifest(), sections: vec![(name.to_owned(), chunks)] }
}

/// Verifies a container of empty sections of these names, whoever would write it.
fn verify_names(names: impl Iterator<Item = String>) -> Result<usize, ContainerError> {
    let (offset, hash) = (HEADER_LEN as u64, Hash::of(b""));
    let empty = |name| SectionEntry { name, offset, length: 0, hash, image: false };
    let manifest = Manifest { sections: names.map(empty).collect(), ..manifest() };
    let bytes = assemble(FORMAT, b"", &serde_json::to_vec(&manifest).unwrap());
    verify_bytes(&bytes).map(|(manifest, _)| manifest.sections.len())
}

#[test]
fn a_container_with_the_most_sections_is_read_and_none_with_more() {
    let names = |count: usize| (0..count).map(|number| number.to_string());
    assert_eq!(verify_names(names(MAX_SECTIONS)), Ok(MAX_SECTIONS));
    let refused = verify_names(names(MAX_SECTIONS + 1));
    assert!(matches!(refused, Err(ContainerError::Corrupt(_))), "{refused:?}");
}

#[test]
fn the_longest_name_is_written_and_read_and_none_that_is_longer() {
    let name = "x".repeat(MAX_SECTION_NAME);
    let draft = one_section(&name, vec![b"abc".to_vec()]);
    let (_, sections) = verify_bytes(&draft.bytes()).unwrap();
    assert_eq!(contents(&sections), draft.contents());
    let refused = verify_names([name + "x"].into_iter());
    assert!(matches!(refused, Err(ContainerError::Corrupt(_))), "{refused:?}");
}

#[test]
fn the_longest_manifest_is_read_and_none_that_is_longer() {
    let verify = |length| {
        let mut manifest = OLD_MANIFEST.as_bytes().to_vec();
        manifest.resize(length, b' ');
        verify_bytes(&assemble(FORMAT, b"abc", &manifest)).map(|(_, sections)| contents(&sections))
    };
    assert_eq!(verify(MAX_MANIFEST), Ok(vec![("ram".to_owned(), b"abc".to_vec())]));
    let refused = verify(MAX_MANIFEST + 1);
    assert!(matches!(refused, Err(ContainerError::Corrupt(_))), "{refused:?}");
}

#[test]
fn the_longest_manifest_is_written_and_none_that_is_longer() {
    let write = |length| {
        let mut manifest = manifest();
        manifest.config.env.insert("LONG".to_owned(), "x".repeat(length));
        run(Draft { manifest, sections: Vec::new() }.write(&MemoryFs::new(), 1))
    };
    let longest = MAX_MANIFEST + HEADER_LEN + TRAILER_LEN;
    let length = longest - usize::try_from(write(0).unwrap()).unwrap();
    assert_eq!(write(length), Ok(longest as u64));
    let refused = write(length + 1).unwrap_err();
    let invalid = io::ErrorKind::InvalidInput;
    assert!(matches!(refused, ContainerError::Io { kind, .. } if kind == invalid), "{refused}");
}

#[test]
fn a_short_file_is_read_in_one_go() {
    let short = 1 << 20;
    let draft = |length| one_section("ram", vec![vec![7; length]]).bytes();
    let around = draft(short).len() - short;
    let fs = MemoryFs::new();
    let reads = || fs.state().calls.iter().filter(|call| **call == "read_at").count();
    // Of a longer one the ends are read first: opened, it is then read part by part.
    for (length, opened, verified) in [(short, 1, 1), (short + 1, 5, 3)] {
        let bytes = draft(length - around);
        assert_eq!(bytes.len(), length);
        fs.put(Path::new(PATH), &bytes);
        fs.set_fault(Fault::None);
        run(open(&fs, Path::new(PATH))).unwrap();
        assert_eq!(reads(), opened, "{length}");
        fs.set_fault(Fault::None);
        assert_eq!(run(read_verified(&fs, Path::new(PATH))).unwrap(), bytes);
        assert_eq!(reads(), verified, "{length}");
    }
}

#[test]
fn others_get_their_turn_while_much_is_hashed() {
    let step = 8 << 20;
    let bytes = vec![7; 2 * step + 1];
    for (length, polls) in [(1, 1), (step, 1), (step + 1, 2), (2 * step + 1, 3)] {
        let bytes = &bytes[..length];
        let mut hasher = Hasher::new();
        assert!(run_at_most(polls - 1, hash_in_steps(&mut hasher, bytes)).is_none(), "{length}");
        let mut hasher = Hasher::new();
        assert!(run_at_most(polls, hash_in_steps(&mut hasher, bytes)).is_some(), "{length}");
        assert_eq!(hasher.finish(), Hash::of(bytes));
    }
}

/// Writes a section in pieces of these lengths, and gives the lengths of what goes to the disk.
fn writes(pieces: &[usize]) -> Vec<usize> {
    let fs = MemoryFs::new();
    let chunks = pieces.iter().map(|length| vec![7; *length]).collect();
    run(one_section("ram", chunks).write(&fs, 1)).unwrap();
    fs.state().writes.clone()
}

#[test]
fn small_pieces_are_gathered() {
    let piece = 1000;
    let writes = writes(&vec![piece; 300]);
    let (_, full) = writes.split_last().unwrap();
    assert_eq!(full.len(), 4);
    assert!(full.iter().all(|length| (GATHER - piece..=GATHER).contains(length)), "{writes:?}");
}

#[test]
fn a_long_piece_is_written_as_it_is() {
    // The section begins on the second page.
    let first = 60_000;
    let before = 4096 + first;
    let long = writes(&[first, GATHER / 2]);
    assert_eq!(long[..2], [before, GATHER / 2]);
    assert_eq!(long.len(), 3);
    // One that is shorter goes with what comes after it.
    let short = writes(&[first, GATHER / 2 - 1]);
    assert_eq!(short, [before, GATHER / 2 - 1 + long[2]]);
}
