//! At every moment there is the old file or the new one, and nothing else stays.

use super::{
    integrity::OLD_MANIFEST,
    memory_fs::{Fault, Kept, run_at_most},
    *,
};
use crate::container::temp_file::{is_temp_name, temp_path};
use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
use vm_trait::DiskConfig;

const KEPT: [Kept; 4] = [Kept::Durable, Kept::All, Kept::Half, Kept::Zeros];

/// Makes a disk that holds `old`, durably, if there is one.
fn disk(old: Option<&Bytes>) -> MemoryFs {
    let fs = MemoryFs::new();
    if let Some(old) = old {
        fs.put(Path::new(PATH), old);
    }
    fs
}

/// Counts the calls that writing makes.
fn calls(draft: &Draft) -> usize {
    let fs = MemoryFs::new();
    run(draft.write(&fs, 1)).unwrap();
    fs.state().calls.len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_crash_leaves_the_old_file_or_the_new_one(
        old in proptest::option::of(small_drafts()), new in any_drafts(),
    ) {
        let (old, new_bytes) = (old.map(|old| old.bytes()), new.bytes());
        let calls = calls(&new);
        for at in 0..=calls {
            let fs = disk(old.as_ref());
            fs.set_fault(Fault::Crash(at));
            let done = run(new.write(&fs, 1)).is_ok();
            prop_assert_eq!(done, at == calls);
            for changes in 0..=fs.pending() {
                for kept in KEPT {
                    let after = fs.after_crash(changes, kept);
                    prop_assert!(run(sweep(&after, Path::new("/snapshots"))).is_ok());
                    let left = after.get(Path::new(PATH)).map(Bytes::from);
                    let is_new = left.as_ref() == Some(&new_bytes);
                    prop_assert!(is_new || (left == old && !done), "call {at}, {kept:?}");
                    prop_assert_eq!(after.paths().len(), usize::from(left.is_some()));
                    prop_assert_eq!(run(open(&after, Path::new(PATH))).is_ok(), left.is_some());
                }
            }
        }
    }

    #[test]
    fn a_failing_call_leaves_the_old_file_and_nothing_else(
        old in proptest::option::of(small_drafts()), new in any_drafts(), import in any::<bool>(),
        kind in prop_oneof![
            Just(io::ErrorKind::StorageFull), Just(io::ErrorKind::QuotaExceeded),
            Just(io::ErrorKind::PermissionDenied),
        ],
    ) {
        let (old, new_bytes) = (old.map(|old| old.bytes()), new.bytes());
        let write = async |fs: &MemoryFs| {
            if import {
                write_verified(fs.shared(), Path::new(PATH), new_bytes.clone(), 1).await.map(drop)
            } else {
                new.write(fs, 1).await.map(drop)
            }
        };
        let whole = disk(old.as_ref());
        run(write(&whole)).unwrap();
        let calls = whole.state().calls.clone();
        for (at, call) in calls.iter().enumerate() {
            let fs = disk(old.as_ref());
            fs.set_fault(Fault::Fail(at, kind));
            let error = run(write(&fs)).unwrap_err();
            let kind_matches = matches!(&error, ContainerError::Io { kind: found, .. } if *found == kind);
            prop_assert!(kind_matches, "{call}: {error}");
            let exhausted = matches!(VmErrorKind::from(error), VmErrorKind::ResourceExhausted { .. });
            prop_assert_eq!(exhausted, kind != io::ErrorKind::PermissionDenied);
            let left = fs.get(Path::new(PATH)).map(Bytes::from);
            // Once it is renamed, the new file is there; only its durability is not certain.
            let expected = if *call == "sync_dir" { Some(&new_bytes) } else { old.as_ref() };
            prop_assert_eq!(left.as_ref(), expected, "{}", call);
            prop_assert_eq!(fs.paths().len(), usize::from(left.is_some()), "{}", call);
        }
    }

    #[test]
    fn a_dropped_future_leaves_the_old_file_or_the_new_one_and_nothing_else(
        old in proptest::option::of(small_drafts()), new in any_drafts(),
    ) {
        let (old, new_bytes) = (old.map(|old| old.bytes()), new.bytes());
        for polls in 0.. {
            let fs = disk(old.as_ref());
            let done = run_at_most(polls, new.write(&fs, 1)).is_some();
            let left = fs.get(Path::new(PATH)).map(Bytes::from);
            let is_new = left.as_ref() == Some(&new_bytes);
            prop_assert!(is_new || (left == old && !done), "{polls} polls");
            prop_assert_eq!(fs.paths().len(), usize::from(left.is_some()), "{} polls", polls);
            if done {
                break;
            }
        }
    }

    #[test]
    fn a_container_with_a_hole_is_not_finished(draft in any_drafts(), polls in 0..3usize) {
        let fs = MemoryFs::new();
        let Manifest { metadata, config, compatibility, .. } = draft.manifest;
        let chunk = Bytes::from(vec![1; 200_000]);
        let mut writer = run(ContainerWriter::create(fs.shared(), Path::new(PATH), 1)).unwrap();
        run(writer.begin("ram")).unwrap();
        let written = run_at_most(polls, writer.write(chunk));
        prop_assert!(written.is_none());
        let finished = run(writer.finish(metadata, config, compatibility, None));
        // A write that was never polled was never begun, and leaves no hole.
        prop_assert_eq!(finished.is_ok(), polls == 0);
        prop_assert_eq!(fs.paths().len(), usize::from(polls == 0));
    }

    #[test]
    fn damaged_bytes_are_not_imported(draft in small_drafts(), at in any::<Index>()) {
        let fs = MemoryFs::new();
        let mut bytes = draft.bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= 0x10;
        let refused = run(write_verified(fs.shared(), Path::new(PATH), bytes.into(), 1));
        prop_assert!(matches!(refused, Err(ContainerError::Corrupt(_))));
        prop_assert!(fs.state().calls.is_empty());
    }

    #[test]
    fn misuse_is_an_error_that_stays(draft in small_drafts(), misuse in 0..4) {
        let fs = MemoryFs::new();
        let mut writer = run(ContainerWriter::create(fs.shared(), Path::new(PATH), 1)).unwrap();
        let refused = match misuse {
            0 => run(writer.write(Bytes::from_static(b"outside"))),
            1 => run(writer.begin("")),
            2 => run(writer.begin(&"x".repeat(MAX_SECTION_NAME + 1))),
            _ => run(writer.begin("twice")).and_then(|()| run(writer.begin("twice"))),
        };
        prop_assert!(refused.is_err());
        prop_assert!(run(writer.begin("fine")).is_err());
        let Manifest { metadata, config, compatibility, .. } = draft.manifest;
        let finished = run(writer.finish(metadata, config, compatibility, None));
        prop_assert!(matches!(finished, Err(ContainerError::Misuse(_))));
        prop_assert_eq!(fs.paths().len(), 0);
    }

    #[test]
    fn sweeping_takes_what_writers_left_and_nothing_else(
        files in vec("\\.?[a-z0-9][a-z0-9.\\-]{0,18}", 1..5), tag in any::<u64>(),
        others in vec("\\.?[a-z]{0,3}\\.?[0-9a-fA-F]{15,17}\\.tm?p", 0..5),
    ) {
        let dir = Path::new("/snapshots");
        let fs = MemoryFs::new();
        let mut stay: Vec<_> = files.iter().chain(&others).map(|file| dir.join(file)).collect();
        stay.retain(|path| path.file_name().is_some_and(|name| !is_temp_name(name)));
        stay.push(Path::new("/elsewhere").join(".file.0123456789abcdef.tmp"));
        for path in &stay {
            fs.put(path, b"");
        }
        let mut leftovers: Vec<_> = files
            .iter()
            .filter_map(|file| temp_path(&dir.join(file), tag).ok())
            .collect();
        leftovers.sort();
        leftovers.dedup();
        for path in &leftovers {
            prop_assert!(is_temp_name(path.file_name().unwrap()));
            fs.put(path, b"half");
        }
        prop_assert_eq!(run(sweep(&fs, dir)), Ok(leftovers.len()));
        stay.sort();
        stay.dedup();
        prop_assert_eq!(fs.paths(), stay);
    }
}

#[test]
fn names_that_only_resemble_those_of_writers() {
    for name in [
        "..0123456789abcdef.tmp",
        ".file.0123456789ABCDEF.tmp",
        ".file.123456789abcdef.tmp",
        ".file-0123456789abcdef.tmp",
        "file.0123456789abcdef.tmp",
        ".file.0123456789abcdef.tmp~",
        ".tmp",
        "",
    ] {
        assert!(!is_temp_name(OsStr::new(name)), "{name}");
    }
}

#[test]
fn the_temporary_file_of_another_writer_stays() {
    let fs = MemoryFs::new();
    let other = temp_path(Path::new(PATH), 5).unwrap();
    fs.put(&other, b"theirs");
    let refused = run(ContainerWriter::create(fs.shared(), Path::new(PATH), 5)).unwrap_err();
    assert!(matches!(refused, ContainerError::Io { kind: io::ErrorKind::AlreadyExists, .. }));
    assert_eq!(fs.get(&other).unwrap(), b"theirs");
}

#[test]
fn a_path_that_names_no_file_is_refused() {
    for path in ["/", "..", ""] {
        let fs = MemoryFs::new();
        let refused = run(ContainerWriter::create(fs.shared(), Path::new(path), 5)).unwrap_err();
        assert!(matches!(refused, ContainerError::Io { kind: io::ErrorKind::InvalidInput, .. }));
    }
}

#[test]
fn a_configuration_that_cannot_be_written_is_an_error() {
    let fs = MemoryFs::new();
    let (manifest, _) = verify_bytes(&assemble(FORMAT, b"abc", OLD_MANIFEST.as_bytes())).unwrap();
    let Manifest { metadata, compatibility, .. } = manifest;
    let mut config = VmConfig::default();
    config.disks.push(DiskConfig::new(OsStr::from_bytes(b"/disk\xff"), "/data"));
    let writer = run(ContainerWriter::create(fs.shared(), Path::new(PATH), 1)).unwrap();
    let refused =
        run(writer.finish(metadata.clone(), config, compatibility.clone(), None)).unwrap_err();
    assert!(matches!(VmErrorKind::from(refused), VmErrorKind::HostIo { .. }));

    let mut config = VmConfig::default();
    config.env.insert("LONG".to_owned(), "x".repeat(MAX_MANIFEST));
    let writer = run(ContainerWriter::create(fs.shared(), Path::new(PATH), 1)).unwrap();
    assert!(run(writer.finish(metadata, config, compatibility, None)).is_err());
    assert!(fs.paths().is_empty());
}

#[test]
fn a_file_without_a_directory_is_written_to_the_current_one() {
    let fs = MemoryFs::new();
    let bytes = assemble(FORMAT, b"abc", OLD_MANIFEST.as_bytes());
    run(write_verified(fs.shared(), Path::new("one"), bytes.clone(), 1)).unwrap();
    assert_eq!(fs.paths(), [Path::new("one")]);
    assert_eq!(fs.get(Path::new("one")).unwrap(), bytes);
}

#[test]
fn sweeping_goes_on_after_a_file_that_stays_and_tells_of_it() {
    let dir = Path::new("/snapshots");
    let leftovers = [1, 2].map(|tag| temp_path(Path::new(PATH), tag).unwrap());
    for (kind, told) in [
        (io::ErrorKind::PermissionDenied, Err(io::ErrorKind::PermissionDenied)),
        // Somebody else swept it.
        (io::ErrorKind::NotFound, Ok(1)),
    ] {
        let fs = MemoryFs::new();
        leftovers.iter().for_each(|path| fs.put(path, b"half"));
        // The first call lists, the second one removes the first file.
        fs.set_fault(Fault::Fail(1, kind));
        let swept = run(sweep(&fs, dir)).map_err(|error| match error {
            ContainerError::Io { path, kind, .. } if Path::new(&path) == leftovers[0] => kind,
            other => panic!("{other}"),
        });
        assert_eq!(swept, told);
        assert_eq!(fs.paths(), [leftovers[0].clone()]);
    }
}
