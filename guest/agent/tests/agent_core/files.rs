//! Files: reading, replacing, and everything about directories.

use crate::{
    fake_os::{Body, pattern},
    host::Host,
};
use proptest::{collection::vec, prelude::*};
use vm_guest_agent::{core::AgentConfig, os::Errno};
use vm_guest_protocol::{
    Channel, DEFAULT_WINDOW, EntryKind, Frame, GuestErrorKind as Kind, ListedDir, MAX_ENTRIES,
    Reply, Request,
};

fn read(host: &mut Host, path: &str) -> Result<Vec<u8>, Kind> {
    fetch(host, Request::ReadFile { path: path.to_owned() })
}

fn fetch(host: &mut Host, request: Request) -> Result<Vec<u8>, Kind> {
    let id = host.open(request);
    host.settle();
    let stream = host.streams[&id].clone();
    host.end(id)?;
    assert!(stream.outs[0].eof);
    Ok(stream.outs[0].bytes.clone())
}

fn temporaries(host: &Host) -> usize {
    host.os.names().iter().filter(|path| path.contains(".twinvm-")).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn what_is_written_is_read_back(
        size in 0_usize..600_000,
        window in 1_u32..300_000,
        piece in 5_000_usize..200_000,
    ) {
        let mut host = Host::with_config(AgentConfig { window, ..AgentConfig::default() });
        let content: Vec<u8> = (0..size).map(|at| pattern(0, at)).collect();
        let request = Request::WriteFile { path: "/tmp/f".into(), mode: Some(0o600) };
        let id = host.open_with_stdin(request, &content, true);
        while host.step(piece) {}
        prop_assert_eq!(host.end(id), Ok(Reply::Empty));
        prop_assert!(host.os.file("/tmp/f") == Some(&content[..]));
        prop_assert_eq!(host.os.node("/tmp/f").unwrap().mode, 0o600);
        prop_assert!(read(&mut host, "/tmp/f").unwrap() == content);
        prop_assert_eq!((host.os.open_files(), temporaries(&host)), (0, 0));
    }

    #[test]
    fn only_absolute_normalised_paths_are_worked_on(path in "(/|[.]{1,2}|a|\0){0,6}") {
        let parts: Vec<&str> = path.split('/').collect();
        let good = path == "/"
            || parts.len() > 1
                && parts[0].is_empty()
                && parts[1..].iter().all(|it| !["", ".", ".."].contains(it) && !it.contains('\0'));
        let invalid = |result: Result<Reply, Kind>| result == Err(Kind::InvalidPath);
        let mut host = Host::new();
        let own = || path.clone();
        for request in [
            Request::Stat { path: own() },
            Request::Remove { path: own(), recursive: false },
            Request::CreateDir { path: own(), mode: 0o755, recursive: true },
            Request::Rename { from: own(), to: "/tmp/x".into() },
            Request::Rename { from: "/etc".into(), to: own() },
            Request::ReadFile { path: own() },
            Request::ListDir { path: own() },
            Request::WriteFile { path: own(), mode: None },
        ] {
            let shown = format!("{request:?}");
            let id = host.open_with_stdin(request, b"x", true);
            host.settle();
            prop_assert_eq!(invalid(host.end(id)), !good, "{}", shown);
        }
    }

    #[test]
    fn listings_are_sorted_by_bytes(names in proptest::collection::btree_set("[a-zA-Z\u{e9}_.-]{1,8}", 0..40)) {
        let mut host = Host::new();
        let names: Vec<String> = names.into_iter().filter(|it| it != "." && it != "..").collect();
        for (index, name) in names.iter().enumerate() {
            let body = if index % 2 == 0 { Body::Dir } else { Body::Link("/etc".into()) };
            host.os.put(&format!("/tmp/{name}"), body, 0o755);
        }
        let bytes = fetch(&mut host, Request::ListDir { path: "/tmp".into() }).unwrap();
        let listed = ListedDir::from_bytes(&bytes).unwrap();
        let kinds = [EntryKind::Directory, EntryKind::Symlink];
        let expected: Vec<_> =
            names.iter().enumerate().map(|(index, name)| (name.clone(), kinds[index % 2])).collect();
        prop_assert_eq!(listed.entries, expected);
    }

    #[test]
    fn trees_are_removed_whole_and_links_are_not_followed(paths in vec("(/[ab]{1,2}){1,6}", 0..40)) {
        let mut host = Host::new();
        host.os.put("/kept", Body::Dir, 0o755);
        host.os.put("/kept/file", Body::File(vec![1]), 0o644);
        host.os.put("/tmp/t", Body::Dir, 0o755);
        for (index, path) in paths.iter().enumerate() {
            let path = format!("/tmp/t{path}");
            host.ask(Request::CreateDir { path: path.clone(), mode: 0o700, recursive: true }).unwrap();
            let body = if index % 2 == 0 { Body::Link("/kept".into()) } else { Body::File(vec![2]) };
            host.os.put(&format!("{path}/leaf"), body, 0o644);
        }
        let remove = |recursive| Request::Remove { path: "/tmp/t".into(), recursive };
        if !paths.is_empty() {
            prop_assert_eq!(host.ask(remove(false)), Err(Kind::DirectoryNotEmpty));
        }
        prop_assert_eq!(host.ask(remove(true)), Ok(Reply::Empty));
        prop_assert!(!host.os.names().iter().any(|path| path.starts_with("/tmp/t")));
        prop_assert!(host.os.file("/kept/file").is_some());
    }
}

#[test]
fn replacing_keeps_mode_and_owner_and_is_durable() {
    let mut host = Host::new();
    host.os.put("/tmp/f", Body::File(b"old".to_vec()), 0o4751);
    host.os.node_mut("/tmp/f").unwrap().owner = (8, 9);
    assert_eq!(host.write("/tmp/f", b"new", None), Ok(Reply::Empty));
    let node = host.os.node("/tmp/f").unwrap();
    assert_eq!((node.mode, node.owner, &node.body), (0o4751, (8, 9), &Body::File(b"new".to_vec())));
    assert_eq!(host.os.synced, ["file", "/tmp"]);
    assert_eq!(host.write("/tmp/g", b"", None), Ok(Reply::Empty));
    assert_eq!(host.os.node("/tmp/g").unwrap().mode, 0o644);
}

#[test]
fn a_link_s_target_is_replaced() {
    let mut host = Host::new();
    host.os.put("/etc/real", Body::File(b"old".to_vec()), 0o600);
    host.os.put("/tmp/one", Body::Link("two".into()), 0o777);
    host.os.put("/tmp/two", Body::Link("../etc/real".into()), 0o777);
    host.os.put("/tmp/new", Body::Link("/etc/fresh".into()), 0o777);
    host.os.put("/tmp/loop", Body::Link("loop".into()), 0o777);
    host.os.put("/tmp/dir", Body::Link("/etc".into()), 0o777);
    for (name, target) in [("empty", ""), ("nul", "a\0b")] {
        let path = format!("/tmp/{name}");
        host.os.put(&path, Body::Link(target.to_owned()), 0o777);
        assert_eq!(host.write(&path, b"x", None), Err(Kind::NotFound), "{target:?}");
    }
    assert_eq!(host.write("/tmp/one", b"new", None), Ok(Reply::Empty));
    assert_eq!(host.os.file("/etc/real"), Some(&b"new"[..]));
    assert_eq!(host.os.node("/etc/real").unwrap().mode, 0o600);
    assert_eq!(host.os.node("/tmp/one").unwrap().body, Body::Link("two".into()));
    assert_eq!(host.write("/tmp/new", b"x", None), Ok(Reply::Empty));
    assert_eq!(host.os.file("/etc/fresh"), Some(&b"x"[..]));
    assert_eq!(host.write("/tmp/loop", b"x", None), Err(Kind::Other));
    assert_eq!(host.write("/tmp/dir", b"x", None), Err(Kind::IsADirectory));
    assert_eq!(temporaries(&host), 0);
}

#[test]
fn a_failed_write_keeps_the_old_content_and_leaves_nothing() {
    for (call, errno, kind) in [
        ("create_new", Errno::ROFS, Kind::ReadOnly),
        ("create_new", Errno::ACCES, Kind::PermissionDenied),
        ("write_all", Errno::NOSPC, Kind::OutOfSpace),
        ("write_all", Errno::DQUOT, Kind::OutOfSpace),
        ("write_all", Errno::IO, Kind::Other),
        ("set_owner_and_mode", Errno::PERM, Kind::PermissionDenied),
        ("sync_file", Errno::IO, Kind::Other),
        ("rename", Errno::ROFS, Kind::ReadOnly),
    ] {
        let mut host = Host::new();
        host.os.put("/tmp/f", Body::File(b"old".to_vec()), 0o644);
        host.os.faults.insert(call.into(), errno);
        assert_eq!(host.write("/tmp/f", &[7; 300_000], None), Err(kind), "{call}");
        assert_eq!(host.os.file("/tmp/f"), Some(&b"old"[..]));
        assert_eq!((host.os.open_files(), temporaries(&host)), (0, 0), "{call}");
    }
}

#[test]
fn an_early_error_is_answered_at_once_and_the_rest_is_dropped() {
    for (path, kind) in [
        ("/missing/f", Kind::NotFound),
        ("/bin/echo/f", Kind::NotADirectory),
        ("/tmp", Kind::IsADirectory),
        ("/", Kind::IsADirectory),
        ("/dev", Kind::Unsupported),
    ] {
        let mut host = Host::new();
        host.os.put("/dev", Body::Device, 0o666);
        let request = Request::WriteFile { path: path.into(), mode: None };
        let id = host.open_with_stdin(request, &[], false);
        host.settle();
        assert!(host.streams[&id].end.is_some(), "{path}");
        host.more_stdin(id, &[1; 1 << 20], true);
        host.settle();
        assert_eq!(host.stdin_sent(id), 1 << 20);
        assert_eq!(host.end(id), Err(kind), "{path}");
    }
    let mut host = Host::new();
    host.os.disk_left = Some(100_000);
    assert_eq!(host.write("/tmp/big", &[1; 1 << 20], None), Err(Kind::OutOfSpace));
    assert_eq!(temporaries(&host), 0);
}

#[test]
fn a_write_that_is_given_up_leaves_nothing() {
    let mut host = Host::new();
    let request = Request::WriteFile { path: "/tmp/f".into(), mode: None };
    let id = host.open_with_stdin(request, b"half", false);
    host.settle();
    assert_eq!((host.os.open_files(), temporaries(&host)), (1, 1));
    host.close(id);
    host.settle();
    assert_eq!((host.os.open_files(), temporaries(&host)), (0, 0));
    assert!(host.os.file("/tmp/f").is_none());
}

#[test]
fn concurrent_writers_each_write_whole() {
    let mut host = Host::new();
    let ids = [1_u8, 2].map(|byte| {
        let request = Request::WriteFile { path: "/tmp/f".into(), mode: None };
        host.open_with_stdin(request, &[byte; 200_000], true)
    });
    while host.step(10_000) {}
    assert!(ids.iter().all(|id| matches!(host.streams[id].end, Some(Frame::Done(_)))));
    let content = host.os.file("/tmp/f").unwrap();
    assert!(content.len() == 200_000 && content.iter().all(|byte| *byte == content[0]));
}

#[test]
fn what_a_dead_machine_left_under_our_name_is_replaced() {
    let mut host = Host::new();
    host.os.put(&format!("/tmp/.twinvm-{:032x}-1.tmp", 77), Body::File(b"junk".to_vec()), 0o600);
    assert_eq!(host.write("/tmp/f", b"new", None), Ok(Reply::Empty));
    assert_eq!(host.os.file("/tmp/f"), Some(&b"new"[..]));
    assert_eq!(temporaries(&host), 0);
}

#[test]
fn reading_fails_with_its_kind() {
    let mut host = Host::new();
    host.os.put("/tmp/f", Body::File(vec![1; 10]), 0o644);
    assert_eq!(read(&mut host, "/tmp"), Err(Kind::IsADirectory));
    assert_eq!(read(&mut host, "/tmp/none"), Err(Kind::NotFound));
    assert_eq!(read(&mut host, "/tmp/f/g"), Err(Kind::NotADirectory));
    let list = |path: &str| Request::ListDir { path: path.into() };
    assert_eq!(fetch(&mut host, list("/tmp/f")), Err(Kind::NotADirectory));
    assert_eq!(fetch(&mut host, list("/none")), Err(Kind::NotFound));
    host.os.faults.insert("read".into(), Errno::IO);
    assert_eq!(read(&mut host, "/tmp/f"), Err(Kind::Other));
    assert_eq!(host.os.open_files(), 0);
}

#[test]
fn stat_does_not_follow_links() {
    let mut host = Host::new();
    host.os.put("/tmp/link", Body::Link("/none".into()), 0o777);
    let stat = |path: &str| Request::Stat { path: path.into() };
    let Ok(Reply::Stat(entry)) = host.ask(stat("/tmp/link")) else { panic!() };
    assert_eq!((entry.kind, entry.size, entry.mode), (EntryKind::Symlink, 5, 0o777));
    assert_eq!(host.ask(stat("/none")), Err(Kind::NotFound));
}

#[test]
fn directories_are_made_with_and_without_parents() {
    let mut host = Host::new();
    host.os.put("/tmp/link", Body::Link("/etc".into()), 0o777);
    host.os.put("/tmp/file", Body::File(Vec::new()), 0o644);
    let mut make = |path: &str, recursive| {
        let path = path.to_owned();
        host.ask(Request::CreateDir { path, mode: 0o710, recursive }).err()
    };
    assert_eq!(make("/tmp/a/b", false), Some(Kind::NotFound));
    assert_eq!(make("/tmp/a", false), None);
    assert_eq!(make("/tmp/a", false), Some(Kind::AlreadyExists));
    assert_eq!(make("/tmp/a/b/c", true), None);
    assert_eq!(make("/tmp/a/b/c", true), None);
    assert_eq!(make("/tmp/link/d/e", true), None);
    assert_eq!(make("/tmp/link", true), None);
    assert_eq!(make("/", true), None);
    assert_eq!(make("/tmp/file", true), Some(Kind::AlreadyExists));
    assert_eq!(make("/tmp/file/x", true), Some(Kind::NotADirectory));
    assert_eq!(host.os.node("/tmp/a/b").unwrap().mode, 0o755);
    assert_eq!(host.os.node("/tmp/a/b/c").unwrap().mode, 0o710);
    assert!(host.os.node("/etc/d/e").is_some());
}

#[test]
fn removing_and_renaming() {
    let mut host = Host::new();
    host.os.put("/tmp/file", Body::File(vec![5]), 0o644);
    host.os.put("/tmp/link", Body::Link("/etc".into()), 0o777);
    let remove = |path: &str, recursive| Request::Remove { path: path.into(), recursive };
    assert_eq!(host.ask(remove("/", true)), Err(Kind::PermissionDenied));
    assert_eq!(host.ask(remove("/none", true)), Err(Kind::NotFound));
    assert_eq!(host.ask(remove("/tmp/link", true)), Ok(Reply::Empty));
    assert!(host.os.node("/etc").is_some());
    let rename = |from: &str, to: &str| Request::Rename { from: from.into(), to: to.into() };
    assert_eq!(host.ask(rename("/tmp/file", "/etc/file")), Ok(Reply::Empty));
    assert_eq!(host.os.file("/etc/file"), Some(&[5][..]));
    assert_eq!(host.ask(rename("/tmp/file", "/etc/x")), Err(Kind::NotFound));
    host.os.faults.insert("rename".into(), Errno::XDEV);
    let id = host.open(rename("/etc/file", "/tmp/file"));
    host.settle();
    let Some(Frame::Failed(error)) = &host.streams[&id].end else { panic!() };
    assert_eq!((error.kind, error.errno, error.path.as_str()), (Kind::Other, 18, "/etc/file"));
    assert_eq!(host.ask(remove("/etc/file", false)), Ok(Reply::Empty));
}

#[test]
fn no_more_of_a_file_is_held_than_the_agent_s_window() {
    let mut host = Host::with_config(AgentConfig { window: 100_000, ..AgentConfig::default() });
    host.consuming = false;
    host.os.put("/tmp/f", Body::File(vec![1; 1 << 20]), 0o644);
    let id = host.open(Request::ReadFile { path: "/tmp/f".into() });
    host.settle();
    assert_eq!(host.streams[&id].outs[0].bytes.len(), 100_000);
}

#[test]
fn no_more_of_a_file_is_read_than_the_host_would_take() {
    let mut host = Host::with_config(AgentConfig { window: 1 << 20, ..AgentConfig::default() });
    host.consuming = false;
    host.os.put("/tmp/f", Body::File(vec![b'o'; 1 << 20]), 0o644);
    let id = host.open(Request::ReadFile { path: "/tmp/f".into() });
    host.settle();
    // A file has one output: credit for another is none for it.
    host.send(id, &Frame::Credit { channel: Channel::Stderr, consumed: 0, window: 1 << 20 });
    host.settle();
    let taken = usize::try_from(DEFAULT_WINDOW).unwrap();
    assert_eq!(host.streams[&id].outs[0].bytes.len(), taken);
    host.os.node_mut("/tmp/f").unwrap().body = Body::File(vec![b'n'; 1 << 20]);
    host.allow(id, 2 << 20);
    let consumed = u64::from(DEFAULT_WINDOW);
    host.send(id, &Frame::Credit { channel: Channel::Stdout, consumed, window: 1 << 20 });
    host.settle();
    let (old, new) = host.streams[&id].outs[0].bytes.split_at(taken);
    assert!(old.iter().all(|byte| *byte == b'o') && new.iter().all(|byte| *byte == b'n'));
    assert_eq!(new.len(), (1 << 20) - taken);
}

#[test]
fn credit_for_a_file_that_is_written_comes_once_half_the_window_is_used() {
    let mut host = Host::new();
    let half = DEFAULT_WINDOW / 2;
    let request = Request::WriteFile { path: "/tmp/f".into(), mode: None };
    let content = vec![1; usize::try_from(half).unwrap() - 1];
    let id = host.open_with_stdin(request, &content, false);
    host.settle();
    assert_eq!(host.streams[&id].consumed_by_agent, 0);
    host.more_stdin(id, &[1], false);
    host.settle();
    assert_eq!(host.streams[&id].consumed_by_agent, u64::from(half));
}

#[test]
fn bytes_that_come_again_are_not_written_again() {
    let mut host = Host::new();
    let request = Request::WriteFile { path: "/tmp/f".into(), mode: None };
    let id = host.open_with_stdin(request, b"once", false);
    host.settle();
    host.os.faults.insert("write_all".into(), Errno::IO);
    let bytes = b"once"[..].into();
    host.send(id, &Frame::Data { channel: Channel::Stdin, offset: 0, bytes });
    host.more_stdin(id, b"", true);
    host.settle();
    assert_eq!(host.end(id), Ok(Reply::Empty));
    assert_eq!(host.os.file("/tmp/f"), Some(&b"once"[..]));
}

#[test]
fn what_takes_the_name_of_a_file_meanwhile_gives_it_no_rights() {
    let mut host = Host::new();
    let request = Request::WriteFile { path: "/tmp/f".into(), mode: None };
    let id = host.open_with_stdin(request, b"new", false);
    host.settle();
    host.os.put("/tmp/f", Body::Link("/etc".into()), 0o777);
    host.os.node_mut("/tmp/f").unwrap().owner = (8, 9);
    host.more_stdin(id, b"", true);
    host.settle();
    assert_eq!(host.end(id), Ok(Reply::Empty));
    let node = host.os.node("/tmp/f").unwrap();
    assert_eq!((node.mode, node.owner, &node.body), (0o644, (0, 0), &Body::File(b"new".to_vec())));
}

#[test]
fn a_link_s_target_may_be_as_long_as_a_path() {
    for (length, outcome) in [(4096, Ok(Reply::Empty)), (4097, Err(Kind::InvalidPath))] {
        let mut host = Host::new();
        let name = "etc/fresh";
        let target = "/".repeat(length - name.len()) + name;
        host.os.put("/tmp/link", Body::Link(target), 0o777);
        assert_eq!(host.write("/tmp/link", b"x", None), outcome);
        assert_eq!(host.os.file("/etc/fresh").is_some(), outcome.is_ok());
    }
}

#[test]
fn a_directory_is_listed_up_to_its_most_names_and_bytes() {
    let names = |count| (0..count).map(|n| format!("{n:07x}")).collect::<Vec<_>>();
    let bytes = |total: usize| {
        // What is around one name in an encoded listing.
        let entries = vec![("x".repeat(32 << 20), EntryKind::File)];
        let around = ListedDir { entries }.to_bytes().len() - (32 << 20);
        vec!["x".repeat(total - around)]
    };
    for (listing, fits) in [
        (names(MAX_ENTRIES), true),
        (names(MAX_ENTRIES + 1), false),
        (bytes(32 << 20), true),
        (bytes((32 << 20) + 1), false),
    ] {
        let mut host = Host::new();
        host.consuming = false;
        let count = listing.len();
        host.os.listing = Some(listing);
        let id = host.open(Request::ListDir { path: "/tmp".into() });
        host.settle();
        assert_eq!(host.streams[&id].started.is_some(), fits, "{count} names");
        if !fits {
            assert_eq!(host.end(id), Err(Kind::OutOfResources));
        }
    }
}

#[test]
fn a_parent_that_someone_else_makes_meanwhile_is_taken_if_it_is_a_directory() {
    let make = || Request::CreateDir { path: "/tmp/a".into(), mode: 0o700, recursive: true };
    let mut host = Host::new();
    host.os.rival = Some(Body::Dir);
    assert_eq!(host.ask(make()), Ok(Reply::Empty));
    let mut host = Host::new();
    host.os.rival = Some(Body::File(Vec::new()));
    assert_eq!(host.ask(make()), Err(Kind::AlreadyExists));
    let mut host = Host::new();
    host.os.put("/tmp/a", Body::Link("/none".into()), 0o777);
    assert_eq!(host.ask(make()), Err(Kind::AlreadyExists), "it leads nowhere");
}

#[test]
fn a_directory_that_others_keep_filling_is_given_up_in_the_end() {
    for (fillings, outcome) in [(8, Ok(Reply::Empty)), (9, Err(Kind::DirectoryNotEmpty))] {
        let mut host = Host::new();
        host.os.put("/tmp/t", Body::Dir, 0o755);
        host.os.fillings = fillings;
        let remove = Request::Remove { path: "/tmp/t".into(), recursive: true };
        assert_eq!(host.ask(remove), outcome);
        assert_eq!(host.os.node("/tmp/t").is_none(), outcome.is_ok());
    }
}
