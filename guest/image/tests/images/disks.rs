//! Disk images, as the tools of ext4 see them.

use std::{fs, os::unix::fs::MetadataExt, path::Path, process::Command};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_guest_image::{DiskError, FileSystem, MAX_DISK_BYTES, Need, create_disk, identify};

/// Runs `e2fsck` if there is one; it must find nothing at all to say.
fn check(path: &Path) {
    let run = |program: &str| Command::new(program).arg("-fn").arg(path).output();
    let Ok(output) = run("e2fsck").or_else(|_| run("/sbin/e2fsck")) else {
        assert!(std::env::var_os("CI").is_none(), "e2fsck is missing");
        return;
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("? no") && !said.contains("rror"), "{said}");
}

fn make(bytes: u64) -> (TempDir, std::path::PathBuf) {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("disk");
    create_disk(&path, bytes).unwrap_or_else(|error| panic!("{bytes}: {error}"));
    (directory, path)
}

#[test]
fn disks_of_any_size_are_sound_and_sparse() {
    let sizes = [
        1 << 20,
        8 << 20,
        (8 << 20) + 1024,
        16 << 20,
        (64 << 20) - 512,
        64 << 20,
        1 << 30,
        4 << 30,
        40 << 30,
    ];
    for bytes in sizes {
        let (directory, path) = make(bytes);
        let status = fs::metadata(&path).expect("stats");
        assert_eq!(status.len(), bytes);
        assert!(
            status.blocks() * 512 <= 32768 + bytes / 1024,
            "{bytes}: {} sectors are taken",
            status.blocks()
        );
        assert_eq!(
            fs::read_dir(directory.path()).expect("lists").count(),
            1,
            "nothing is left beside it"
        );
        assert_eq!(identify(&path).expect("reads"), Some(FileSystem::Ext));
        check(&path);
    }
}

#[test]
fn a_disk_never_replaces_anything() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("disk");
    fs::write(&path, "precious").expect("writes");
    assert!(
        matches!(create_disk(&path, 1 << 20), Err(DiskError::AlreadyExists { path: named }) if named == path)
    );
    assert_eq!(fs::read(&path).expect("reads"), b"precious");
    let dangling = directory.path().join("link");
    std::os::unix::fs::symlink("nowhere", &dangling).expect("links");
    assert!(matches!(create_disk(&dangling, 1 << 20), Err(DiskError::AlreadyExists { .. })));
    assert_eq!(fs::read_dir(directory.path()).expect("lists").count(), 2);
    let nowhere = directory.path().join("absent/disk");
    assert!(matches!(create_disk(&nowhere, 1 << 20), Err(DiskError::Io { .. })));
}

#[test]
fn odd_sizes_are_refused() {
    let directory = TempDir::new().expect("a directory");
    for bytes in [0, 512, (1 << 20) - 512, (1 << 20) + 1, MAX_DISK_BYTES + 512, u64::MAX] {
        let refused = create_disk(&directory.path().join("disk"), bytes);
        assert!(matches!(refused, Err(DiskError::Size { bytes: named }) if named == bytes));
    }
    assert_eq!(fs::read_dir(directory.path()).expect("lists").count(), 0);
}

#[test]
fn file_systems_are_told_by_their_magic_numbers() {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("disk");
    let mut erofs = vec![0; 4096];
    erofs[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
    let cases = [
        (Vec::new(), None),
        (vec![0; 4096], None),
        (b"hsqs and more".to_vec(), Some((FileSystem::Squashfs, Need::Squashfs, false))),
        (erofs, Some((FileSystem::Erofs, Need::Erofs, false))),
    ];
    for (content, expected) in cases {
        fs::write(&path, content).expect("writes");
        let found = identify(&path).expect("reads");
        assert_eq!(found.map(|found| (found, found.need(), found.is_writable())), expected);
    }
    assert!(identify(&directory.path().join("absent")).is_err());
    assert!(identify(directory.path()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn disks_of_generated_sizes_are_sound(sectors in prop_oneof![2048_u64..200_000, 131_072_u64..4_000_000]) {
        let (_directory, path) = make(sectors * 512);
        check(&path);
    }
}
