//! Kernels told from other files, and unpacked.

use std::{fs, path::PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_guest_image::{Kernel, KernelError, KernelFormat};

use std::os::fd::AsFd;

use crate::{
    made_kernel::{PACKINGS, Packing, RELEASE, bzimage, elf, pack},
    unpacked::bytes_of,
};

fn file(content: &[u8]) -> (TempDir, PathBuf) {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("kernel");
    fs::write(&path, content).expect("writes");
    (directory, path)
}

fn changed(mut bytes: Vec<u8>, at: usize, to: &[u8]) -> Vec<u8> {
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

#[test]
fn other_files_are_named_for_what_they_are() {
    let kernel = elf(b"");
    let image = bzimage(&pack(Packing::Gzip, &kernel));
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (Vec::new(), "an empty file"),
        (b"#!/bin/sh\necho hello\n".to_vec(), "text"),
        (kernel[..40].to_vec(), "a truncated ELF file"),
        (kernel[..100].to_vec(), "a truncated ELF file"),
        (changed(kernel.clone(), 4, &[1]), "a 32-bit ELF file"),
        (changed(kernel.clone(), 18, &183_u16.to_le_bytes()), "an ELF file for ARM64"),
        (
            changed(kernel.clone(), 16, &1_u16.to_le_bytes()),
            "an ELF object, such as a kernel module",
        ),
        (
            changed(kernel.clone(), 80, &0x40_0000_u64.to_le_bytes()),
            "an ELF program that runs in user space",
        ),
        (vm_guest_image::agent().to_vec(), "an ELF program that runs in user space"),
        (changed(image.clone(), 0x236, &[0]), "a 32-bit bzImage"),
        (changed(image.clone(), 0x211, &[0]), "a zImage"),
        (image[..0x210].to_vec(), "a truncated bzImage"),
        (pack(Packing::Gzip, &kernel), "a file compressed with gzip"),
        (changed(vec![0; 4096], 0x38, b"ARM\x64"), "an ARM64 kernel image"),
        (b"070701000000".to_vec(), "a cpio archive, such as an initial file system"),
        (changed(vec![0; 4096], 0, b"MZ"), "a program for UEFI or Windows"),
        (vec![0x80; 4096], "something else"),
    ];
    for (content, expected) in cases {
        let (_directory, path) = file(&content);
        match Kernel::open(&path) {
            Err(KernelError::NotAKernel { found, path: named }) => {
                assert_eq!((found.as_str(), named), (expected, path));
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
}

#[test]
fn truncated_kernels_are_refused() {
    let kernel = elf(&[7; 5000]);
    let image = bzimage(&pack(Packing::Xz, &kernel));
    for whole in [kernel, image] {
        let (_directory, path) = file(&whole[..whole.len() - 100]);
        assert!(
            matches!(Kernel::open(&path), Err(KernelError::Truncated { needed, bytes, .. }) if needed > bytes)
        );
    }
}

#[test]
fn what_is_no_file_is_refused() {
    let directory = TempDir::new().expect("a directory");
    assert!(
        matches!(Kernel::open(directory.path()), Err(KernelError::NotAKernel { found, .. }) if found == "a directory")
    );
    assert!(matches!(Kernel::open(&directory.path().join("absent")), Err(KernelError::Io { .. })));
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .expect("makes");
    assert!(
        matches!(Kernel::open(&pipe), Err(KernelError::NotAKernel { found, .. }) if found == "a pipe")
    );
}

#[test]
fn an_elf_kernel_is_taken_as_it_is() {
    let kernel = elf(b"content");
    let (_directory, path) = file(&kernel);
    let opened = Kernel::open(&path).expect("opens");
    assert_eq!((opened.format(), opened.release()), (KernelFormat::Elf, Some(RELEASE)));
    assert_eq!(bytes_of(opened.elf().expect("is there").as_fd()), kernel);
    assert_eq!(Kernel::find(Some(&path)).expect("finds").path(), path);
}

#[test]
fn payloads_of_all_kinds_are_unpacked() {
    let content: Vec<u8> =
        (0..9_000_000_u32).flat_map(|number| u8::try_from(number / 7 % 251)).collect();
    let kernel = elf(&content);
    for packing in PACKINGS {
        let (_directory, path) = file(&bzimage(&pack(packing, &kernel)));
        let opened = Kernel::open(&path).expect("opens");
        assert_eq!(
            (opened.format(), opened.release()),
            (KernelFormat::BzImage, Some(RELEASE)),
            "{packing:?}"
        );
        let unpacked = opened.elf().unwrap_or_else(|error| panic!("{packing:?}: {error}"));
        let bytes = bytes_of(unpacked.as_fd());
        assert_eq!(bytes.len() as u64, unpacked.len());
        assert!(bytes == kernel, "{packing:?}");
    }
}

#[test]
fn payloads_that_cannot_be_unpacked_are_refused() {
    let kernel = elf(&[7; 5000]);
    let whole = pack(Packing::Xz, &kernel);
    let bomb = pack(Packing::Gzip, &vec![0; 1 << 20]);
    let cases: [(&[u8], &str); 5] = [
        (b"BZh91AY&SY and so on", "compressed with bzip2, which is not supported"),
        (b"unheard of", "unknown way"),
        (&whole[..whole.len() / 2], "cannot be unpacked"),
        (&bomb, "not an ELF file"),
        (&pack(Packing::Zstd, &kernel[..200]), "truncated ELF"),
    ];
    for (payload, expected) in cases {
        let (_directory, path) = file(&bzimage(payload));
        match Kernel::open(&path).expect("opens").elf() {
            Err(KernelError::Payload { reason, .. }) => {
                assert!(reason.contains(expected), "{reason}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn damaged_kernels_do_no_harm(
        packing in prop::sample::select(&PACKINGS[..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        length in any::<prop::sample::Index>(),
        cut in any::<bool>(),
        in_image in any::<bool>(),
    ) {
        let kernel = elf(&[0x5a; 3000]);
        let mut bytes = if in_image { bzimage(&pack(packing, &kernel)) } else { kernel };
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if cut {
            bytes.truncate(length.index(bytes.len()));
        }
        let (_directory, path) = file(&bytes);
        if let Ok(kernel) = Kernel::open(&path) {
            let _ = kernel.elf();
        }
    }
}
