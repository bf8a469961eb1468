//! [`LinuxOs`] against the real kernel.
#![cfg(target_os = "linux")]
#![forbid(unsafe_code)]

use proptest::prelude::*;
use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};
use vm_guest_agent::{
    linux::{LinuxOs, Scope, proc_table, remove_tree},
    os::{Child, ChildExit, Errno, GuestOs, Output, ReadOutcome, SpawnSpec, Spawned},
};
use vm_guest_protocol::{EntryKind, ResourceLimit, TermSize};

const PATIENCE: Duration = Duration::from_secs(20);

fn sh(script: &str) -> SpawnSpec {
    SpawnSpec {
        path: "/bin/sh".to_owned(),
        argv: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        env: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
        cwd: "/".to_owned(),
        ids: None,
        tty: None,
        stdin: false,
        limits: Vec::new(),
    }
}

fn until<T>(mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "waited too long");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Reads one output to its end.
fn drain(os: &mut LinuxOs, child: Child, output: Output) -> Vec<u8> {
    let mut all = Vec::new();
    until(|| match os.read_output(child, output, 1 << 20).unwrap() {
        ReadOutcome::Data(bytes) => {
            all.extend_from_slice(&bytes);
            None
        }
        ReadOutcome::WouldBlock => None,
        ReadOutcome::Eof => Some(()),
    });
    all
}

fn finish(os: &mut LinuxOs, spec: &SpawnSpec) -> (Vec<u8>, Vec<u8>, ChildExit) {
    let Spawned { child, .. } = os.spawn(spec).unwrap();
    let stdout = drain(os, child, Output::Stdout);
    let stderr = drain(os, child, Output::Stderr);
    let exit = until(|| os.try_wait(child));
    os.release(child);
    (stdout, stderr, exit)
}

fn os() -> LinuxOs {
    LinuxOs::new(Scope::Children)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn arguments_and_environment_arrive_as_given(
        args in prop::collection::vec("[^\0]{0,40}", 0..6),
        values in prop::collection::vec("[^\0]{0,40}", 0..6),
    ) {
        let mut os = os();
        let mut spec = sh("");
        spec.path = "/usr/bin/printf".to_owned();
        spec.argv = ["printf", "%s\\0", "--"].map(str::to_owned).to_vec();
        spec.argv.extend(args.iter().cloned());
        let wanted: String = std::iter::once("--").chain(args.iter().map(String::as_str))
            .flat_map(|argument| [argument, "\0"]).collect();
        let (stdout, _, exit) = finish(&mut os, &spec);
        prop_assert_eq!(exit, ChildExit::Exited(0));
        prop_assert_eq!(String::from_utf8(stdout).unwrap(), wanted);

        spec.path = "/usr/bin/env".to_owned();
        spec.argv = vec!["env".to_owned(), "-0".to_owned()];
        spec.env = values.iter().enumerate().map(|(n, value)| (format!("V{n}"), value.clone())).collect();
        let wanted: String = spec.env.iter().map(|(name, value)| format!("{name}={value}\0")).collect();
        let (stdout, _, _) = finish(&mut os, &spec);
        prop_assert_eq!(String::from_utf8(stdout).unwrap(), wanted);
    }

    #[test]
    fn bytes_pass_through_pipes_unchanged(bytes in prop::collection::vec(any::<u8>(), 0..300_000)) {
        let mut os = os();
        let spec = SpawnSpec { stdin: true, ..sh("exec cat") };
        let child = os.spawn(&spec).unwrap().child;
        let (mut sent, mut got, mut closed) = (0, Vec::new(), false);
        until(|| {
            if sent < bytes.len() {
                sent += os.write_stdin(child, &bytes[sent..]).unwrap();
            } else if !closed {
                os.close_stdin(child);
                closed = true;
            }
            match os.read_output(child, Output::Stdout, 70_000).unwrap() {
                ReadOutcome::Data(piece) => { got.extend_from_slice(&piece); None }
                ReadOutcome::WouldBlock => None,
                ReadOutcome::Eof => Some(()),
            }
        });
        prop_assert_eq!(got, bytes);
        prop_assert_eq!(until(|| os.try_wait(child)), ChildExit::Exited(0));
        prop_assert_eq!(os.write_stdin(child, b"x"), Err(Errno::PIPE));
    }

    #[test]
    fn files_keep_what_is_written(bytes in prop::collection::vec(any::<u8>(), 0..100_000), mode in 0_u32..0o1000) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut os = os();
        let fd = os.create_new(text(&path), mode).unwrap();
        for piece in bytes.chunks(9_999) {
            os.write_all(fd, piece).unwrap();
        }
        os.sync_file(fd).unwrap();
        os.set_owner_and_mode(fd, None, mode | 0o600).unwrap();
        os.close(fd);
        os.sync_dir(text(dir.path())).unwrap();
        let stat = os.lstat(text(&path)).unwrap();
        prop_assert_eq!((stat.kind, stat.size, stat.mode), (EntryKind::File, bytes.len() as u64, mode | 0o600));
        let fd = os.open_read(text(&path)).unwrap();
        let mut got = Vec::new();
        loop {
            let piece = os.read(fd, 7_777).unwrap();
            if piece.is_empty() { break; }
            got.extend_from_slice(&piece);
        }
        prop_assert_eq!(got, bytes);
        prop_assert_eq!(os.create_new(text(&path), 0o600), Err(Errno::EXIST));
        os.close(fd);
        prop_assert_eq!(os.read(fd, 1), Err(Errno::BADF));
    }
}

#[test]
fn every_exit_code_and_signal_is_told() {
    let mut os = os();
    for code in 0..=255 {
        let (_, _, exit) = finish(&mut os, &sh(&format!("exit {code}")));
        assert_eq!(exit, ChildExit::Exited(code));
    }
    for signal in [1, 2, 6, 9, 13, 15, 31, 34, 64] {
        let (_, _, exit) = finish(&mut os, &sh(&format!("kill -{signal} $$; sleep 30")));
        assert_eq!(exit, ChildExit::Signaled(signal));
    }
}

#[test]
fn streams_stay_apart_and_missing_stdin_is_at_its_end() {
    let (stdout, stderr, exit) = finish(&mut os(), &sh("cat; printf out; printf err >&2"));
    assert_eq!((&stdout[..], &stderr[..], exit), (&b"out"[..], &b"err"[..], ChildExit::Exited(0)));
}

#[test]
fn exec_errors_are_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str, mode: u32| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        text(&path).to_owned()
    };
    let mut os = os();
    for (path, error) in [
        ("/no/such/program".to_owned(), Errno::NOENT),
        (file("plain", "#!/bin/sh\n", 0o644), Errno::ACCES),
        (file("unknown", "echo no format\n", 0o755), Errno::NOEXEC),
        (file("lost", "#!/no/such/interpreter\n", 0o755), Errno::NOENT),
        (text(dir.path()).to_owned(), Errno::ACCES),
        ("/bin/s\0h".to_owned(), Errno::INVAL),
    ] {
        assert_eq!(os.spawn(&SpawnSpec { path: path.clone(), ..sh("") }), Err(error), "{path:?}");
    }
    let cwd = |cwd: &str| SpawnSpec { cwd: cwd.to_owned(), ..sh("pwd") };
    assert_eq!(os.spawn(&cwd("/no/such/directory")), Err(Errno::NOENT));
    assert_eq!(os.spawn(&cwd("/bin/sh")), Err(Errno::NOTDIR));
    let real = dir.path().canonicalize().unwrap();
    assert_eq!(finish(&mut os, &cwd(text(&real))).0, format!("{}\n", real.display()).into_bytes());
}

#[test]
fn a_program_starts_with_clean_signals_descriptors_and_session() {
    let script = "grep -E '^Sig(Blk|Ign):' /proc/self/status; ls /proc/$$/fd; umask; \
                  cut -d' ' -f1,5,6 /proc/$$/stat";
    let leak = fs::File::open("/dev/null").unwrap();
    rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
    let mut os = os();
    let spawned = os.spawn(&sh(script)).unwrap();
    let stdout = String::from_utf8(drain(&mut os, spawned.child, Output::Stdout)).unwrap();
    let mut lines = stdout.lines();
    for name in ["SigBlk", "SigIgn"] {
        assert_eq!(lines.next(), Some(format!("{name}:\t0000000000000000").as_str()), "{stdout}");
    }
    for line in ["0", "1", "2", "0022"] {
        assert_eq!(lines.next(), Some(line), "{stdout}");
    }
    let pid = spawned.pid;
    assert_eq!(lines.next(), Some(format!("{pid} {pid} {pid}").as_str()), "{stdout}");
}

#[test]
fn signals_reach_the_group_also_after_its_leader_has_ended() {
    let mut os = os();
    let spawned = os.spawn(&sh("sleep 1000 & echo $!; exit 3")).unwrap();
    let mut line = Vec::new();
    until(|| {
        if let ReadOutcome::Data(bytes) = os.read_output(spawned.child, Output::Stdout, 99).unwrap()
        {
            line.extend_from_slice(&bytes);
        }
        line.ends_with(b"\n").then_some(())
    });
    let grandchild: i32 = String::from_utf8(line).unwrap().trim().parse().unwrap();
    assert_eq!(until(|| os.try_wait(spawned.child)), ChildExit::Exited(3));
    assert!(os.has_processes());
    os.signal_group(spawned.child, 9).unwrap();
    until(|| proc_table::process(grandchild).is_none_or(|row| row.ended).then_some(()));
    assert!(!os.has_processes());
    assert_eq!(os.signal_group(spawned.child, 9), Err(Errno::SRCH));
    assert_eq!(os.try_wait(spawned.child), Some(ChildExit::Exited(3)));
    let pid = i32::try_from(spawned.pid).unwrap();
    assert!(proc_table::process(pid).is_some(), "its pid is held until it is released");
    os.release(spawned.child);
    os.reap();
    assert!(proc_table::process(pid).is_none());
    assert_eq!(os.signal_group(spawned.child, 9), Err(Errno::SRCH));
}

#[test]
fn a_released_child_goes_on_and_is_reaped_later() {
    let mut os = os();
    let spawned = os.spawn(&sh("sleep 0.2")).unwrap();
    let pid = i32::try_from(spawned.pid).unwrap();
    os.release(spawned.child);
    assert!(proc_table::process(pid).is_some_and(|row| !row.ended));
    until(|| {
        os.reap();
        proc_table::process(pid).is_none().then_some(())
    });
}

#[test]
fn a_terminal_has_its_size_and_ends_with_its_input() {
    let mut os = os();
    let size = TermSize { rows: 33, cols: 77 };
    let script = "stty size; trap 'stty size; exit 5' WINCH; while :; do sleep 0.01; done";
    let child = os.spawn(&SpawnSpec { tty: Some(size), ..sh(script) }).unwrap().child;
    let mut seen = Vec::new();
    let mut resized = false;
    until(|| match os.read_output(child, Output::Stdout, 999).unwrap() {
        ReadOutcome::Data(bytes) => {
            seen.extend_from_slice(&bytes);
            None
        }
        ReadOutcome::WouldBlock => {
            if seen.ends_with(b"\n") && !resized {
                // The trap is set right after the first size was printed.
                thread::sleep(Duration::from_millis(200));
                os.resize(child, TermSize { rows: 11, cols: 22 }).unwrap();
                resized = true;
            }
            None
        }
        ReadOutcome::Eof => Some(()),
    });
    assert_eq!(String::from_utf8(seen).unwrap(), "33 77\r\n11 22\r\n");
    assert_eq!(until(|| os.try_wait(child)), ChildExit::Exited(5));

    for typed in ["whole line\n", "half a line", ""] {
        let spec =
            SpawnSpec { tty: Some(size), stdin: true, ..sh("stty -echo; echo ready; exec cat") };
        let child = os.spawn(&spec).unwrap().child;
        let mut seen = Vec::new();
        until(|| {
            if let ReadOutcome::Data(bytes) = os.read_output(child, Output::Stdout, 99).unwrap() {
                seen.extend_from_slice(&bytes);
            }
            seen.ends_with(b"ready\r\n").then_some(())
        });
        assert_eq!(os.write_stdin(child, typed.as_bytes()), Ok(typed.len()));
        os.close_stdin(child);
        let rest = drain(&mut os, child, Output::Stdout);
        assert_eq!(String::from_utf8(rest).unwrap(), typed.replace('\n', "\r\n"));
        assert_eq!(until(|| os.try_wait(child)), ChildExit::Exited(0));
    }
    let plain = os.spawn(&sh("exit")).unwrap().child;
    assert_eq!(os.resize(plain, size), Err(Errno::NOTTY));
}

#[test]
fn another_user_is_become_without_groups_or_refused() {
    let mut os = os();
    let spec =
        SpawnSpec { ids: Some((12_345, 54_321)), ..sh("id -u; id -g; id -G; echo > /proc/1/comm") };
    if !rustix::process::geteuid().is_root() {
        assert_eq!(os.spawn(&spec), Err(Errno::PERM));
        return;
    }
    let (stdout, _, exit) = finish(&mut os, &spec);
    assert_eq!(String::from_utf8(stdout).unwrap(), "12345\n54321\n54321\n");
    assert_ne!(exit, ChildExit::Exited(0));
}

#[test]
fn what_belongs_to_the_host_is_refused() {
    let mut os = os();
    assert_eq!(os.set_wall_clock(Duration::from_secs(1)), Err(Errno::PERM));
    assert_eq!(os.reseed(&[7; 32]), Err(Errno::PERM));
    os.power_off();
    assert!(os.powered_off());
    let (before, after) = (os.monotonic(), os.monotonic());
    assert!(before > Duration::ZERO && after >= before);
}

#[test]
fn directories_links_and_errors_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| text(&dir.path().join(name)).to_owned();
    let mut os = os();
    os.mkdir(&at("dir"), 0o777).unwrap();
    assert_eq!(os.stat(&at("dir")).unwrap().mode, 0o777, "no umask applies");
    assert_eq!(os.mkdir(&at("dir"), 0o700), Err(Errno::EXIST));
    fs::write(at("dir/file"), "x").unwrap();
    std::os::unix::fs::symlink("dir/file", at("link")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, at("fifo"), rustix::fs::Mode::RUSR).unwrap();
    let mut listing = os.read_dir(text(dir.path())).unwrap();
    listing.sort_by(|a, b| a.0.cmp(&b.0));
    let name = str::to_owned;
    assert_eq!(
        listing,
        [
            (name("dir"), EntryKind::Directory),
            (name("fifo"), EntryKind::Other),
            (name("link"), EntryKind::Symlink)
        ]
    );
    assert_eq!(os.lstat(&at("link")).unwrap().kind, EntryKind::Symlink);
    let stat = os.stat(&at("link")).unwrap();
    let real = fs::metadata(at("dir/file")).unwrap();
    assert_eq!((stat.kind, stat.size, stat.uid), (EntryKind::File, 1, real.uid()));
    let nanos = u64::try_from(real.mtime() * 1_000_000_000 + real.mtime_nsec()).unwrap();
    assert_eq!(stat.modified_ns, nanos);
    assert_eq!(os.read_link(&at("link")).unwrap(), "dir/file");
    assert_eq!(os.read_link(&at("dir")), Err(Errno::INVAL));
    assert_eq!(os.open_read(&at("dir")), Err(Errno::ISDIR));
    assert_eq!(os.open_read(&at("dir/file/x")), Err(Errno::NOTDIR));
    assert_eq!(os.open_read(&at("nothing")), Err(Errno::NOENT));
    assert_eq!(os.unlink(&at("dir")), Err(Errno::ISDIR));
    assert_eq!(os.rmdir(&at("dir")), Err(Errno::NOTEMPTY));
    os.rename(&at("dir/file"), &at("link")).unwrap();
    assert_eq!(os.lstat(&at("link")).unwrap().kind, EntryKind::File);
    os.rmdir(&at("dir")).unwrap();
    let fifo = os.open_read(&at("fifo")).unwrap();
    assert!(
        os.read(fifo, 1).unwrap().is_empty(),
        "a pipe without writers does not hold the agent up"
    );
    os.unlink(&at("fifo")).unwrap();
    assert_eq!(os.lstat(&at("fifo")), Err(Errno::NOENT));
}

#[test]
fn a_tree_is_removed_whatever_stands_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    fs::write(&outside, "stays").unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    std::os::unix::fs::symlink(&outside, root.join("a/link")).unwrap();
    for path in ["a/b/c", "a/b", "a"] {
        let none = fs::Permissions::from_mode(0o0);
        fs::set_permissions(root.join(path), none).unwrap();
    }
    remove_tree(&root).unwrap();
    assert!(!root.exists() && outside.exists());
    remove_tree(&root).unwrap();
}

#[test]
fn limits_are_those_of_the_program_and_not_of_the_agent() {
    let own = || fs::read_to_string("/proc/self/limits").unwrap();
    let before = own();
    let mut os = os();
    let limit = |resource, soft, hard| ResourceLimit { resource, soft, hard };
    let limits = vec![limit(1, 4096, 8192), limit(4, 0, 0), limit(7, 17, 23)];
    let spec =
        SpawnSpec { limits, ..sh("ulimit -n; ulimit -Hn; ulimit -c; exec cat /proc/self/limits") };
    let (stdout, _, exit) = finish(&mut os, &spec);
    assert_eq!(exit, ChildExit::Exited(0));
    let shown = String::from_utf8(stdout).unwrap();
    assert!(shown.starts_with("17\n23\n0\n"), "{shown}");
    let row = |name: &str| -> Vec<String> {
        let row = shown.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        row.split_whitespace().take(2).map(str::to_owned).collect()
    };
    assert_eq!(row("Max file size"), ["4096", "8192"]);
    assert_eq!(row("Max open files"), ["17", "23"]);
    assert_eq!(own(), before);
}

#[test]
fn each_of_the_sixteen_limits_is_set() {
    const AMOUNTS: [u64; 16] = [
        9_000,
        1 << 20,
        1 << 30,
        1 << 20,
        11,
        1 << 30,
        3_000,
        64,
        12 << 10,
        1 << 40,
        13,
        14,
        15,
        0,
        0,
        1 << 40,
    ];
    let limits = (0..).zip(AMOUNTS).map(|(resource, amount)| ResourceLimit {
        resource,
        soft: amount,
        hard: amount,
    });
    let spec = SpawnSpec { limits: limits.collect(), ..sh("exec cat /proc/self/limits") };
    let (stdout, _, _) = finish(&mut os(), &spec);
    let table = String::from_utf8(stdout).unwrap();
    // Words of the name, soft, hard and unit; the first row is the heading.
    for (row, amount) in table.lines().skip(1).zip(AMOUNTS) {
        let shown: Vec<&str> = row[25..].split_whitespace().take(2).collect();
        assert_eq!(shown, [amount.to_string(), amount.to_string()], "{row}");
    }
    assert_eq!(table.lines().count(), 17);
}

#[test]
fn a_file_that_grows_beyond_its_limit_ends_the_program() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let mut os = os();
    let limits = vec![ResourceLimit { resource: 1, soft: 5000, hard: 5000 }];
    let script = format!("exec head -c 9000 /dev/zero > {}", text(&file));
    let (_, _, exit) = finish(&mut os, &SpawnSpec { limits, ..sh(&script) });
    assert_eq!(exit, ChildExit::Signaled(25));
    assert_eq!(fs::metadata(&file).unwrap().len(), 5000);
}
