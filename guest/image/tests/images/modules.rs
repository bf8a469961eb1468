//! Modules found, ordered and put into images.

use std::{collections::BTreeMap, fs, path::Path};

use tempfile::TempDir;
use vm_guest_image::{Image, ImageError, Kernel, KernelError, KernelModules, Need};

use crate::{
    made_kernel::{Packing, RELEASE, bzimage, elf, pack},
    unpacked::{by_name, bytes_of},
};

/// File, packing and direct dependencies of each module.
const MODULES: [(&str, &str, Packing, &[&str]); 14] = [
    ("kernel/drivers/virtio/virtio_ring.ko", "virtio_ring", Packing::None, &[]),
    ("kernel/drivers/virtio/virtio.ko.xz", "virtio", Packing::Xz, &["virtio_ring"]),
    (
        "kernel/drivers/virtio/virtio_mmio.ko.gz",
        "virtio_mmio",
        Packing::Gzip,
        &["virtio", "virtio_ring"],
    ),
    ("kernel/net/vsock.ko", "vsock", Packing::None, &[]),
    ("kernel/net/common.ko.zst", "common", Packing::Zstd, &["vsock"]),
    (
        "kernel/net/vmw_vsock_virtio_transport.ko",
        "vmw_vsock_virtio_transport",
        Packing::None,
        &["common", "virtio"],
    ),
    ("kernel/drivers/virtio_blk.ko", "virtio_blk", Packing::None, &["virtio"]),
    ("kernel/drivers/virtio-rng.ko", "virtio_rng", Packing::None, &["rng-core", "virtio"]),
    ("kernel/net/failover.ko", "failover", Packing::None, &[]),
    ("kernel/drivers/net_failover.ko", "net_failover", Packing::None, &["failover"]),
    ("kernel/drivers/virtio_net.ko", "virtio_net", Packing::None, &["net_failover", "virtio"]),
    ("kernel/fs/overlay.ko", "overlay", Packing::None, &[]),
    ("kernel/fs/fuse/fuse.ko", "fuse", Packing::None, &[]),
    ("kernel/fs/fuse/virtiofs.ko.xz", "virtiofs", Packing::Xz, &["fuse", "virtio"]),
];

fn content(name: &str, dependencies: &[&str]) -> Vec<u8> {
    format!("\x7fELF of {name}\0depends={}\0intree=Y\0", dependencies.join(",")).into_bytes()
}

fn make(directory: &Path, but: &[&str], with_list: bool) {
    let mut list = String::new();
    for (path, name, packing, dependencies) in MODULES {
        if but.contains(&name) {
            continue;
        }
        let file = directory.join(path);
        fs::create_dir_all(file.parent().expect("has one")).expect("makes");
        fs::write(file, pack(packing, &content(name, dependencies))).expect("writes");
        let dependencies: Vec<&str> = dependencies
            .iter()
            .filter_map(|wanted| MODULES.iter().find(|module| module.1 == *wanted))
            .map(|module| module.0)
            .collect();
        list += &format!("{path}: {}\n", dependencies.join(" "));
    }
    fs::write(
        directory.join("modules.builtin"),
        "kernel/fs/ext4/ext4.ko\nkernel/drivers/rng-core.ko\n",
    )
    .expect("writes");
    if with_list {
        fs::write(directory.join("modules.dep"), list).expect("writes");
    }
}

fn kernel(directory: &Path, content: &[u8]) -> Kernel {
    let path = directory.join("vmlinuz");
    fs::write(&path, bzimage(&pack(Packing::Gzip, &elf(content)))).expect("writes");
    Kernel::open(&path).expect("opens")
}

#[test]
fn modules_are_found_beside_the_kernel_and_loaded_in_order() {
    for with_list in [true, false] {
        let directory = TempDir::new().expect("a directory");
        let modules = directory.path().join("lib/modules").join(RELEASE);
        make(&modules, &[], with_list);
        let boot = directory.path().join("boot");
        fs::create_dir(&boot).expect("makes");
        let found = KernelModules::find(&kernel(&boot, b""), None).expect("finds");
        assert_eq!(
            found.directory().and_then(|directory| directory.canonicalize().ok()),
            modules.canonicalize().ok()
        );
        for need in Need::ALL {
            let absent = matches!(need, Need::Squashfs | Need::Erofs);
            assert_eq!(found.supports(need), !absent, "{need:?}");
        }
        let image = Image::builder().with_modules(&found).build().expect("builds");
        let archive = by_name(&bytes_of(image.file()));
        let dependencies: BTreeMap<&str, &[&str]> =
            MODULES.iter().map(|module| (module.1, module.3)).collect();
        let loaded = image.modules_for(&Need::ALL);
        assert_eq!(loaded.len(), MODULES.len());
        let mut before: Vec<&str> = vec!["rng-core"];
        for path in &loaded {
            let name = path
                .strip_prefix("/twinvm/modules/")
                .and_then(|name| name.strip_suffix(".ko"))
                .expect("a path");
            assert!(
                dependencies[name].iter().all(|needed| before.contains(needed)),
                "{name} after {before:?}"
            );
            assert_eq!(archive[&path[1..]].content, content(name, dependencies[name]), "unpacked");
            before.push(name);
        }
        assert_eq!(image.module_paths(), image.modules_for(&[Need::Vsock]));
        assert!(
            !image
                .module_paths()
                .iter()
                .any(|path| path.contains("blk") || path.contains("overlay"))
        );
        assert_eq!(image.modules_for(&[Need::Ext4]), Vec::<String>::new(), "built in");
        assert_eq!(image.modules_for(&[Need::Overlay]), ["/twinvm/modules/overlay.ko"]);
        let shares = image.modules_for(&[Need::Shares]);
        assert!(shares.ends_with(&[
            "/twinvm/modules/fuse.ko".to_owned(),
            "/twinvm/modules/virtiofs.ko".to_owned()
        ]));
    }
}

#[test]
fn missing_modules_are_named() {
    let directory = TempDir::new().expect("a directory");
    let modules = directory.path().join("modules");
    make(&modules, &["common", "virtio_mmio", "virtio_blk"], false);
    match KernelModules::find(&kernel(directory.path(), b""), Some(&modules)) {
        Err(KernelError::MissingModules { names, directory }) => {
            assert_eq!(
                (names, directory),
                (vec!["common".to_owned(), "virtio_mmio".to_owned()], modules)
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kernel_with_everything_built_in_needs_no_modules() {
    let directory = TempDir::new().expect("a directory");
    match KernelModules::find(&kernel(directory.path(), b""), None) {
        Err(error @ KernelError::NoModules { .. }) => {
            let text = error.to_string();
            for place in
                ["/lib/modules/", "/usr/lib/modules/", &directory.path().display().to_string()]
            {
                assert!(text.contains(place), "{text}");
            }
        }
        other => panic!("{other:?}"),
    }
    let built_in = kernel(directory.path(), b"\0vmw_vsock_virtio_transport\0\0virtio-mmio\0");
    let found = KernelModules::find(&built_in, None).expect("needs none");
    assert_eq!(found.directory(), None);
    assert!(found.supports(Need::Vsock));
}

#[test]
fn damaged_modules_and_lists_are_refused() {
    let directory = TempDir::new().expect("a directory");
    let modules = directory.path().join("modules");
    make(&modules, &[], true);
    let kernel = kernel(directory.path(), b"");
    let bad = modules.join("kernel/drivers/virtio/virtio.ko.xz");
    fs::write(&bad, b"\xfd7zXZ\0 and nothing").expect("writes");
    let found = KernelModules::find(&kernel, Some(&modules)).expect("finds");
    let built = Image::builder().with_modules(&found).build();
    assert!(matches!(built, Err(ImageError::Module { path, .. }) if path == bad));
    // Each depends on the next one, and the last one on the first.
    let all: Vec<&str> = MODULES.iter().map(|module| module.0).collect();
    let circle: String = (0..all.len())
        .map(|index| format!("{}: {}\n", all[index], all[(index + 1) % all.len()]))
        .collect();
    fs::write(modules.join("modules.dep"), circle + ":::\n\0\n:\n").expect("writes");
    assert!(KernelModules::find(&kernel, Some(&modules)).is_ok(), "each is loaded once");
}
