//! Kernels told from other files, and unpacked.

use std::{fs, path::PathBuf, process::Command};

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

/// Makes a shared library as libkrunfw is, at this level of optimization.
fn library(directory: &TempDir, numbers: [u32; 3], optimization: &str) -> PathBuf {
    let [load, entry, size] = numbers;
    let source = format!(
        r#"__attribute__((aligned(65536))) char KERNEL_BUNDLE[{BUNDLE} + 1] =
            "Linux version {RELEASE} (someone@somewhere) #1\n";
        char *krunfw_get_kernel(unsigned long *load, unsigned long *entry, unsigned long *size) {{
            *load = {load}; *entry = {entry}; *size = {size};
            return KERNEL_BUNDLE;
        }}"#
    );
    let (code, made) = (directory.path().join("code.c"), directory.path().join("libkrunfw.so.5"));
    fs::write(&code, source).expect("writes");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", optimization, "-o"]).args([&made, &code]);
    assert!(compiler.status().expect("there is a C compiler").success());
    made
}

const BUNDLE: u32 = 3 << 12;

#[test]
fn drivers_that_are_built_in_are_found_by_their_names() {
    for (content, is_there) in [
        (&b"a\0virtio_net\0b"[..], true),
        (b"a\0virtio_net: too large\0b", false),
        (b"a\0no_virtio_net\0b", false),
        (b"", false),
    ] {
        let (_directory, path) = file(&elf(content));
        let opened = Kernel::open(&path).expect("opens");
        assert_eq!(opened.drives_virtio_net().expect("reads"), is_there, "{content:?}");
    }
}

#[test]
fn the_kernel_of_a_libkrunfw_becomes_an_elf_file() {
    let directory = TempDir::new().expect("a directory");
    for optimization in ["-O0", "-O2", "-Os"] {
        for entry in [0x100_0000, 0x100_0123] {
            let path = library(&directory, [0x100_0000, entry, BUNDLE], optimization);
            let opened = Kernel::open(&path).expect("opens");
            assert_eq!(
                (opened.format(), opened.release()),
                (KernelFormat::Libkrunfw, Some(RELEASE)),
                "{optimization}"
            );
            let bytes = bytes_of(opened.elf().expect("is there").as_fd());
            assert_eq!(bytes[24..32], u64::from(entry).to_le_bytes());
            assert!(bytes[4096..].starts_with(b"Linux version "));
            assert_eq!(bytes.len() as u64, 4096 + u64::from(BUNDLE));
            let (_directory, path) = file(&bytes);
            assert_eq!(Kernel::open(&path).expect("opens").format(), KernelFormat::Elf);
            assert!(
                !opened.has_tsi().expect("reads") && !opened.drives_serial_port().expect("reads")
            );
        }
    }
    let path = library(&directory, [0x100_0000, 0x100_0123, BUNDLE - 4096], "-O2");
    assert!(
        matches!(Kernel::open(&path), Err(KernelError::NotAKernel { found, .. }) if found.contains("libkrunfw"))
    );
    let path = library(&directory, [0x100_0000, 0x100_0123, BUNDLE], "-O2");
    let whole = fs::read(&path).expect("reads");
    for length in (0..whole.len()).step_by(997) {
        let (_directory, path) = file(&whole[..length]);
        assert!(Kernel::open(&path).is_err(), "{length} of {} bytes", whole.len());
    }
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
