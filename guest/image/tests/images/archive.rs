//! What is in an image.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    os::{
        fd::AsFd,
        unix::{
            ffi::OsStringExt,
            fs::{FileExt, PermissionsExt, symlink},
        },
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::TempDir;
use vm_guest_image::{Image, ImageError, agent};
use vm_guest_protocol::boot::BootConfig;

use crate::unpacked::{by_name, bytes_of, entries};

#[test]
fn the_agent_is_a_static_x86_64_program() {
    let agent = agent();
    assert_eq!(&agent[..7], b"\x7fELF\x02\x01\x01");
    assert_eq!(u16::from_le_bytes([agent[18], agent[19]]), 62, "x86-64");
    let number = |at: usize, length: usize| {
        agent[at..at + length].iter().rev().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte))
    };
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let kinds: Vec<usize> = (0..count).map(|index| number(table + index * size, 4)).collect();
    assert!(kinds.contains(&1), "it has a segment to load: {kinds:?}");
    assert!(!kinds.contains(&3), "it names a dynamic linker: {kinds:?}");
}

#[test]
fn an_image_without_a_root_has_what_the_agent_needs() {
    let image = Image::builder().build().expect("builds");
    let bytes = bytes_of(image.file());
    assert_eq!(bytes.len() as u64, image.len());
    assert_eq!(bytes.len() % 512, 0);
    let found = by_name(&bytes);
    let modes: BTreeMap<&str, u32> =
        found.iter().map(|(name, entry)| (name.as_str(), entry.mode)).collect();
    let expected = BTreeMap::from([
        (".", 0o040_755),
        ("bin", 0o040_755),
        ("bin/vsock", 0o120_777),
        ("bin/tcp", 0o120_777),
        ("dev", 0o040_755),
        ("dev/console", 0o020_600),
        ("dev/null", 0o020_666),
        ("init", 0o100_755),
        ("proc", 0o040_555),
        ("run", 0o040_755),
        ("sys", 0o040_555),
        ("tmp", 0o041_777),
        ("twinvm", 0o040_755),
        ("twinvm/modules", 0o040_755),
    ]);
    assert_eq!(modes, expected);
    assert_eq!(found["init"].content, agent());
    assert_eq!(found["bin/vsock"].content, b"/init");
    assert_eq!(found["bin/tcp"].content, b"/init");
    assert_eq!(found["dev/console"].device, (5, 1));
    assert!(image.module_paths().is_empty());
}

#[test]
fn the_archives_are_sealed() {
    let image = Image::builder().build().expect("builds");
    let part = image.part_for(&BootConfig::default()).expect("makes the part");
    for file in [image.file(), part.as_fd()] {
        let file = fs::File::from(file.try_clone_to_owned().expect("clones"));
        assert!(file.write_at(b"x", 0).is_err());
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(1 << 30).is_err());
    }
}

#[test]
fn a_machine_s_own_part_may_follow_the_image() {
    let image = Image::builder().build().expect("builds");
    let config = BootConfig {
        hostname: "one".to_owned(),
        modules: vec!["/m.ko".to_owned()],
        ..BootConfig::default()
    };
    let part = image.part_for(&config).expect("makes the part");
    let both = [bytes_of(image.file()), bytes_of(part.as_fd())].concat();
    let found = by_name(&both);
    assert_eq!(BootConfig::decode(&found["twinvm/boot"].content), Ok(config));
    assert!(found.contains_key("init"));
}

#[test]
fn a_user_s_root_does_not_replace_what_is_ours() {
    let root = TempDir::new().expect("a directory");
    fs::create_dir_all(root.path().join("twinvm/modules")).expect("makes");
    fs::write(root.path().join("twinvm/boot"), "theirs").expect("writes");
    fs::write(root.path().join("init"), "theirs").expect("writes");
    fs::create_dir_all(root.path().join("usr/bin")).expect("makes");
    fs::write(root.path().join("usr/bin/vsock"), "theirs").expect("writes");
    symlink("usr/bin", root.path().join("bin")).expect("links");
    fs::create_dir(root.path().join("tmp")).expect("makes");
    fs::set_permissions(root.path().join("tmp"), fs::Permissions::from_mode(0o700)).expect("sets");
    let image = Image::builder().with_directory(root.path()).build().expect("builds");
    let all = entries(&bytes_of(image.file()));
    for name in ["init", "twinvm", "bin", "tmp", "bin/vsock"] {
        assert_eq!(all.iter().filter(|entry| entry.name == name.as_bytes()).count(), 1, "{name}");
    }
    let found = by_name(&bytes_of(image.file()));
    assert_eq!(found["init"].content, agent());
    assert_eq!(found["bin"].content, b"usr/bin", "their symbolic link stays");
    assert_eq!(found["tmp"].mode, 0o040_700, "and so do their permissions");
    assert!(!found.contains_key("twinvm/boot"));
    let place = |name: &str| all.iter().position(|entry| entry.name == name.as_bytes());
    assert!(place("bin/vsock") > place("usr/bin/vsock"), "the later one wins");
}

#[test]
fn links_pipes_and_sockets_are_kept() {
    let root = TempDir::new().expect("a directory");
    let at = |name: &str| root.path().join(name);
    fs::write(at("one"), "content").expect("writes");
    fs::hard_link(at("one"), at("two")).expect("links");
    symlink("/nowhere/at/all", at("dangling")).expect("links");
    symlink(".", at("loop")).expect("links");
    mknodat(CWD, at("pipe"), FileType::Fifo, Mode::from_raw_mode(0o640), 0).expect("makes");
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("binds");
    let image = Image::builder().with_directory(root.path()).build().expect("builds");
    let found = by_name(&bytes_of(image.file()));
    assert_eq!(found["one"].content, found["two"].content);
    assert_eq!(found["dangling"].content, b"/nowhere/at/all");
    assert_eq!(found["loop"].mode & 0o170_000, 0o120_000);
    assert_eq!(found["pipe"].mode, 0o010_640);
    assert_eq!(found["socket"].mode & 0o170_000, 0o140_000);
    assert!(!found.keys().any(|name| name.starts_with("loop/")));
}

#[test]
fn bad_roots_are_refused_by_name() {
    let root = TempDir::new().expect("a directory");
    let build = |path: &Path| Image::builder().with_directory(path).build().map(drop);
    let absent = root.path().join("absent");
    assert!(matches!(build(&absent), Err(ImageError::Io { path, .. }) if path == absent));
    let file = root.path().join("dev");
    fs::write(&file, "").expect("writes");
    assert!(matches!(build(&file), Err(ImageError::NotADirectory { path }) if path == file));
    assert!(matches!(build(root.path()), Err(ImageError::Conflict { path }) if path == file));
    fs::remove_file(&file).expect("removes");
    let large = root.path().join("large");
    fs::File::create(&large).expect("makes").set_len(1 << 32).expect("grows");
    let refused = build(root.path());
    assert!(
        matches!(refused, Err(ImageError::TooLarge { path, bytes }) if path == large && bytes == 1 << 32)
    );
}

#[test]
fn a_file_that_changes_meanwhile_is_noticed() {
    let root = TempDir::new().expect("a directory");
    let path = root.path().join("restless");
    let file = fs::File::create(&path).expect("makes");
    file.set_len(1 << 20).expect("grows");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for length in (0..).map(|round| (1 << 20) + round % 2) {
                if done.load(Ordering::Relaxed) {
                    break;
                }
                file.set_len(length).expect("resizes");
            }
        });
        // It is not known in which of its moments a build meets the file, but each must end in one of two ways.
        let noticed =
            (0..1000).any(|_| match Image::builder().with_directory(root.path()).build() {
                Err(ImageError::Changed { path: named }) => named == path,
                built => built.is_err_and(|error| panic!("{error}")),
            });
        done.store(true, Ordering::Relaxed);
        assert!(noticed);
    });
}

#[derive(Clone, Debug)]
enum Node {
    File { content: Vec<u8>, mode: u32 },
    Link(Vec<u8>),
    Directory { mode: u32, below: BTreeMap<Vec<u8>, Node> },
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(
        any::<u8>().prop_filter("fits in a name", |byte| *byte != 0 && *byte != b'/'),
        1..40,
    )
    .prop_filter("no special name", |name| name != b"." && name != b"..")
}

fn node() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        (prop::collection::vec(any::<u8>(), 0..3000), 0_u32..0o10_000)
            .prop_map(|(content, mode)| Node::File { content, mode: mode | 0o400 }),
        prop::collection::vec(1_u8.., 1..200).prop_map(Node::Link),
    ];
    leaf.prop_recursive(4, 40, 6, |below| {
        (0_u32..0o10_000, prop::collection::btree_map(name(), below, 0..6))
            .prop_map(|(mode, below)| Node::Directory { mode: mode | 0o700, below })
    })
}

fn make(node: &Node, path: &Path) {
    match node {
        Node::File { content, mode } => {
            fs::write(path, content).expect("writes");
            fs::set_permissions(path, fs::Permissions::from_mode(*mode)).expect("sets");
        }
        Node::Link(target) => symlink(OsString::from_vec(target.clone()), path).expect("links"),
        Node::Directory { mode, below } => {
            fs::create_dir(path).expect("makes");
            for (name, node) in below {
                make(node, &path.join(OsString::from_vec(name.clone())));
            }
            fs::set_permissions(path, fs::Permissions::from_mode(*mode)).expect("sets");
        }
    }
}

/// What an archive must hold of it, in order.
fn expect(node: &Node, name: Vec<u8>, all: &mut Vec<(Vec<u8>, u32, Vec<u8>)>) {
    match node {
        Node::File { content, mode } => all.push((name, 0o100_000 | mode, content.clone())),
        Node::Link(target) => all.push((name, 0o120_777, target.clone())),
        Node::Directory { mode, below } => {
            all.push((name.clone(), 0o040_000 | mode, Vec::new()));
            for (below_name, node) in below {
                expect(node, [name.as_slice(), b"/", below_name].concat(), all);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_is_in_the_archive_and_always_as_the_same_bytes(
        below in prop::collection::btree_map(name(), node(), 0..6)
    ) {
        let root = TempDir::new().expect("a directory");
        let node = Node::Directory { mode: 0o755, below };
        // Twice, so that inode numbers and times differ.
        let mut built = Vec::new();
        for copy in ["one", "two"] {
            let at = root.path().join(copy);
            fs::create_dir(&at).expect("makes");
            make(&node, &at.join("tree"));
            let image = Image::builder().with_directory(&at).build().expect("builds");
            built.push(bytes_of(image.file()));
        }
        prop_assert!(built[0] == built[1]);
        let mut expected = Vec::new();
        expect(&node, b"tree".to_vec(), &mut expected);
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let found: Vec<_> = entries(&built[0])
            .into_iter()
            .filter(|entry| entry.name.starts_with(b"tree"))
            .inspect(|entry| assert_eq!((entry.time, entry.owner), (0, owner)))
            .map(|entry| (entry.name, entry.mode, entry.content))
            .collect();
        prop_assert_eq!(found, expected);
    }
}
