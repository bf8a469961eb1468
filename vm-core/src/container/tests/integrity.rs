//! Damage is found, and nothing that is read can do harm.

use super::*;
use crate::container::layout::{HEADER_LEN, TRAILER_LEN};

fn is_corrupt(bytes: Vec<u8>) -> bool {
    matches!(verify_bytes(&bytes.into()), Err(ContainerError::Corrupt(_)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_flipped_byte_is_found(draft in small_drafts(), mask in 1..=255u8) {
        let bytes = draft.bytes();
        // Header, manifest and trailer wholly; the sections wholly where they are short.
        let (manifest, _) = verify_bytes(&bytes).unwrap();
        let body = manifest.sections.last().map_or(0, |last| last.offset + last.length);
        for at in 0..bytes.len() {
            let sampled = at % 61 == 0 || at < HEADER_LEN || at as u64 >= body || bytes.len() < 4096;
            if sampled {
                let mut flipped = bytes.to_vec();
                flipped[at] ^= mask;
                prop_assert!(is_corrupt(flipped), "byte {at} of {}", bytes.len());
            }
        }
    }

    #[test]
    fn every_truncation_is_found(draft in small_drafts()) {
        let bytes = draft.bytes();
        for length in 0..bytes.len() {
            prop_assert!(is_corrupt(bytes[..length].to_vec()), "{length} of {}", bytes.len());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn flips_in_long_sections_are_found(
        draft in any_drafts(), at in any::<Index>(), mask in 1..=255u8,
    ) {
        let mut bytes = draft.bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= mask;
        prop_assert!(is_corrupt(bytes));
    }

    #[test]
    fn extra_and_missing_bytes_are_found(
        draft in small_drafts(), at in any::<Index>(), extra in vec(any::<u8>(), 1..20),
    ) {
        let bytes = draft.bytes();
        let at = at.index(bytes.len() + 1);
        let mut longer = bytes.to_vec();
        longer.splice(at..at, extra.iter().copied());
        prop_assert!(is_corrupt(longer));
        let mut shorter = bytes.to_vec();
        shorter.drain(at..(at + extra.len()).min(bytes.len()));
        prop_assert!(shorter.len() == bytes.len() || is_corrupt(shorter));
    }

    #[test]
    fn parts_of_two_containers_do_not_make_one(one in small_drafts(), other in small_drafts()) {
        let (one, other) = (one.bytes(), other.bytes());
        if one != other {
            let cut = one.len() - TRAILER_LEN;
            prop_assert!(is_corrupt([&one[..cut], &other[other.len() - TRAILER_LEN..]].concat()));
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused(bytes in vec(any::<u8>(), 0..400), body in vec(any::<u8>(), 0..99)) {
        prop_assert!(is_corrupt(bytes.clone()));
        // Also where the hashes hold around them.
        prop_assert!(verify_bytes(&assemble(FORMAT, &body, &bytes)).is_err());
    }

    #[test]
    fn a_manifest_that_lies_is_refused(
        draft in small_drafts(), section in any::<Index>(), field in 0..6, value in any::<u64>(),
        small in any::<bool>(),
    ) {
        let bytes = draft.bytes();
        let (mut manifest, _) = verify_bytes(&bytes).unwrap();
        if manifest.sections.is_empty() {
            return Ok(());
        }
        let index = section.index(manifest.sections.len());
        let value = if small { value % 8192 } else { value };
        let before = manifest.clone();
        let first = manifest.sections[0].name.clone();
        let entry = &mut manifest.sections[index];
        match field {
            0 => entry.offset = value,
            1 => entry.length = value,
            2 => entry.name = String::new(),
            3 => entry.name = first,
            4 => manifest.format = u32::try_from(value % 9).unwrap(),
            _ => entry.hash = Hash(0),
        }
        if manifest == before {
            return Ok(());
        }
        let end = before.sections.last().map_or(0, |last| last.offset + last.length);
        let body = &bytes[HEADER_LEN..usize::try_from(end).unwrap()];
        let forged = assemble(FORMAT, body, &serde_json::to_vec(&manifest).unwrap());
        prop_assert!(matches!(verify_bytes(&forged), Err(ContainerError::Corrupt(_))));
    }

    #[test]
    fn another_format_is_incompatible(format in any::<u32>(), rest in vec(any::<u8>(), 0..300)) {
        prop_assume!(format != FORMAT);
        let mut bytes = layout::header(format).to_vec();
        bytes.extend_from_slice(&rest);
        let refused = verify_bytes(&bytes.into());
        prop_assert_eq!(refused.unwrap_err(), ContainerError::Incompatible {
            field: "format".to_owned(),
            found: format.to_string(),
            wanted: FORMAT.to_string(),
        });
    }

    #[test]
    fn a_length_that_a_file_claims_costs_nothing(
        start in prop_oneof![Just(layout::header(FORMAT).to_vec()), vec(any::<u8>(), 0..200)],
        size in prop_oneof![(1 << 20) + 1..u64::MAX, (1 << 20) + 1..1u64 << 40],
    ) {
        let fs = MemoryFs::new();
        fs.put(Path::new(PATH), &start);
        fs.state().claimed_size = Some(size);
        let refused = run(open(&fs, Path::new(PATH)));
        prop_assert!(matches!(refused, Err(ContainerError::Corrupt(_))));
        prop_assert!(fs.state().longest_read <= TRAILER_LEN);
    }
}

/// What a container of format 2 says; neither may a reader lose the ability to read it, nor trip over what it adds.
pub(super) const OLD_MANIFEST: &str = r#"{
    "format": 2,
    "metadata": {
        "id": 1, "vm": 2, "backend": "sim", "taken_at": {"secs": 3, "nanos": 4},
        "arch": "x86_64", "vcpus": 1, "memory": 128
    },
    "compatibility": {
        "backend": "sim", "arch": "x86_64", "vcpus": 1, "memory": 128, "agent_protocol": 1
    },
    "config": {},
    "sections": [{
        "name": "ram", "offset": 64, "length": 3,
        "hash": "06b05ab6733a618578af5f94892f3950"
    }],
    "added_later": [1, 2, 3]
}"#;

#[test]
fn manifests_of_other_writers_of_the_format_are_read() {
    let (manifest, sections) =
        verify_bytes(&assemble(FORMAT, b"abc", OLD_MANIFEST.as_bytes())).unwrap();
    assert_eq!(manifest.config, VmConfig::default());
    assert_eq!(contents(&sections), [("ram".to_owned(), b"abc".to_vec())]);

    let newer = OLD_MANIFEST.replace(r#""config": {}"#, r#""config": {"needed_later": 1}"#);
    let refused = verify_bytes(&assemble(FORMAT, b"abc", newer.as_bytes())).unwrap_err();
    assert!(
        matches!(&refused, ContainerError::Incompatible { field, .. } if field == "manifest"),
        "{refused}"
    );
}

#[test]
fn bytes_that_nothing_accounts_for_are_refused() {
    let bytes = assemble(FORMAT, b"abc", OLD_MANIFEST.as_bytes());
    let (whole, trailer) = bytes.split_at(bytes.len() - TRAILER_LEN);
    let trailer =
        layout::Trailer::decode(trailer.first_chunk().unwrap(), bytes.len() as u64).unwrap();
    // Between the manifest and a trailer that allows for them.
    let longer = layout::Trailer { total_length: trailer.total_length + 5, ..trailer };
    assert!(is_corrupt([whole, b"extra", &longer.encode()].concat()));
}

#[test]
fn a_file_that_becomes_shorter_while_it_is_read_is_damaged() {
    let fs = MemoryFs::new();
    fs.put(Path::new(PATH), &assemble(FORMAT, b"abc", OLD_MANIFEST.as_bytes()));
    fs.state().claimed_size = Some(1 << 20);
    let refused = run(open(&fs, Path::new(PATH))).unwrap_err();
    assert!(matches!(refused, ContainerError::Corrupt(_)), "{refused}");
    let refused = run(read_verified(&fs, Path::new(PATH))).unwrap_err();
    assert!(matches!(refused, ContainerError::Corrupt(_)), "{refused}");
}

#[test]
fn a_long_file_that_is_no_container_is_not_read_whole() {
    let fs = MemoryFs::new();
    fs.put(Path::new(PATH), &layout::header(FORMAT));
    fs.state().claimed_size = Some((1 << 20) + 1);
    let refused = run(read_verified(&fs, Path::new(PATH))).unwrap_err();
    assert!(matches!(refused, ContainerError::Corrupt(_)), "{refused}");
    assert!(fs.state().longest_read <= TRAILER_LEN);
}
