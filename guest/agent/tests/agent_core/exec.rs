//! Starting programs, their streams and their ends.

use crate::{
    fake_os::{Body, PIPE, pattern},
    host::{Host, exec},
};
use proptest::prelude::*;
use std::time::Duration;
use vm_guest_agent::{
    core::{AgentConfig, Violation},
    os::{ChildExit, Errno},
};
use vm_guest_protocol::{
    Channel, ExecSpec, Frame, GuestErrorKind as Kind, ProcessExit, Request, ResourceLimit,
    TermSize, UserSpec,
};

fn failure(spec: ExecSpec) -> Kind {
    failure_in(&mut Host::new(), spec)
}

fn failure_in(host: &mut Host, spec: ExecSpec) -> Kind {
    host.ask(Request::Exec(spec)).unwrap_err()
}

fn exit_of(host: &Host, id: u32) -> ProcessExit {
    match &host.streams[&id].end {
        Some(Frame::Exited(exit)) => exit.clone(),
        other => panic!("not an exit: {other:?}"),
    }
}

#[test]
fn a_program_is_started_as_asked_and_its_end_comes_last() {
    let mut host = Host::new();
    let spec = ExecSpec {
        env: vec![("A".into(), "1".into()), ("B".into(), "x=y".into())],
        cwd: Some("/tmp".into()),
        user: Some(UserSpec::Ids { uid: 5, gid: 6 }),
        ..exec(&["echo", "one", "two"])
    };
    let first = host.open(Request::Exec(spec));
    let second = host.open(Request::Exec(exec(&["/bin/env"])));
    host.settle();
    assert_eq!(host.streams[&first].outs[0].bytes, b"one two\n");
    let exit = exit_of(&host, first);
    assert_eq!((exit.code, exit.signal, exit.timed_out), (Some(0), None, false));
    let ids = [first, second].map(|id| host.streams[&id].started.clone().unwrap().process);
    assert_eq!(ids, [1, 2]);
    let spec = &host.os.procs[0].spec;
    assert_eq!(
        (spec.path.as_str(), spec.cwd.as_str(), spec.ids),
        ("/bin/echo", "/tmp", Some((5, 6)))
    );
    assert_eq!(spec.argv, ["echo", "one", "two"]);
    assert_eq!(spec.env.len(), 2);
    assert!(host.os.procs.iter().all(|process| process.released));
    assert!(host.streams[&second].outs[0].bytes.is_empty(), "nothing is in the environment");
}

#[test]
fn the_end_of_an_output_waits_a_moment_for_that_of_the_program() {
    for alone in [true, false] {
        let mut host = Host::new();
        let id = host.open(Request::Exec(exec(&["mute"])));
        host.settle();
        let ends = |host: &Host| host.streams[&id].outs.each_ref().map(|out| out.eof);
        assert_eq!(host.streams[&id].outs[0].bytes, b"that is all");
        assert_eq!(ends(&host), [false, false]);
        let due = host.core.next_deadline().unwrap();
        assert!(due <= host.os.now + Duration::from_millis(5));
        if alone {
            host.os.now = due;
            host.settle();
            assert_eq!(ends(&host), [true, true]);
            assert!(host.streams[&id].end.is_none());
        }
        assert_eq!(host.core.next_deadline().is_none(), alone);
        host.os.procs[0].exit = Some(ChildExit::Exited(4));
        host.settle();
        assert_eq!(ends(&host), [true, true]);
        assert_eq!(exit_of(&host, id).code, Some(4));
        assert_eq!(host.core.next_deadline(), None);
    }
}

#[test]
fn a_start_that_may_be_told_late_comes_with_the_first_news_or_after_a_moment() {
    for (words, stdin) in [
        (&["echo", "news"][..], false),
        (&["sleep"][..], false),
        (&["mute"][..], false),
        (&["sleep"][..], true),
    ] {
        let mut host = Host::new();
        let spec = ExecSpec { lazy_start: true, stdin, ..exec(words) };
        let id = host.open(Request::Exec(spec));
        let told = |host: &Host| host.streams[&id].started.is_some();
        host.settle();
        assert_eq!(told(&host), stdin || words[0] != "sleep");
        if !told(&host) {
            let due = host.core.next_deadline().unwrap();
            assert!(due <= host.os.now + Duration::from_millis(50));
            host.os.now = due;
            host.settle();
        }
        assert!(told(&host) && host.streams[&id].end.is_some() == (words[0] == "echo"));
    }
}

#[test]
fn a_start_that_was_not_told_is_told_on_the_next_connection() {
    let mut host = Host::new();
    let id = host.open(Request::Exec(ExecSpec { lazy_start: true, ..exec(&["sleep"]) }));
    host.settle();
    assert!(host.streams[&id].started.is_none());
    host.cut();
    host.dial();
    host.settle();
    assert!(host.streams[&id].started.is_some());
    assert_eq!(host.os.procs.len(), 1);
}

#[test]
fn programs_are_found_as_a_shell_finds_them() {
    let mut host = Host::new();
    host.os.put("/usr/bin/plain", Body::File(Vec::new()), 0o644);
    host.os.put("/usr/bin/echo", Body::File(Vec::new()), 0o644);
    host.os.put("/usr/bin/both", Body::Dir, 0o755);
    host.os.put("/bin/both", Body::File(Vec::new()), 0o755);
    host.os.put("/tmp/here", Body::File(Vec::new()), 0o755);
    host.os.put("/tmp/link", Body::Link("here".into()), 0o777);
    let path = |spec: ExecSpec, path: &str| ExecSpec {
        env: vec![("PATH".into(), path.into())],
        cwd: Some("/tmp".into()),
        ..spec
    };
    for (spec, kind) in [
        (exec(&["missing"]), Kind::ProgramNotFound),
        (exec(&["/bin/missing"]), Kind::ProgramNotFound),
        (exec(&["/bin/echo/x"]), Kind::ProgramNotFound),
        (exec(&["plain"]), Kind::ProgramNotExecutable),
        (exec(&["/usr/bin/plain"]), Kind::ProgramNotExecutable),
        (exec(&["/usr/bin"]), Kind::ProgramNotExecutable),
        (exec(&["here"]), Kind::ProgramNotFound),
        (path(exec(&["echo"]), "/usr/bin"), Kind::ProgramNotExecutable),
        (path(exec(&["echo"]), "/etc:/missing"), Kind::ProgramNotFound),
    ] {
        assert_eq!(failure_in(&mut host, spec.clone()), kind, "{spec:?}");
    }
    assert!(host.os.procs.is_empty());
    for (spec, found) in [
        (exec(&["echo"]), "/bin/echo"),
        (exec(&["both"]), "/bin/both"),
        (path(exec(&["here"]), "/etc::/bin"), "/tmp/here"),
        (path(exec(&["here"]), "/bin:../tmp"), "/tmp/../tmp/here"),
        (path(exec(&["./link"]), "/bin"), "/tmp/./link"),
    ] {
        let id = host.open(Request::Exec(spec));
        host.settle();
        assert!(host.streams[&id].started.is_some(), "{found}: {:?}", host.streams[&id].end);
        assert_eq!(host.os.procs.last().unwrap().spec.path, found);
        host.close(id);
    }
}

#[test]
fn senseless_requests_are_refused() {
    let mut host = Host::new();
    let base = || exec(&["echo"]);
    let env =
        |name: &str, value: &str| ExecSpec { env: vec![(name.into(), value.into())], ..base() };
    let limits = |limits: &[(u8, u64, u64)]| {
        let limits = limits.iter();
        let limits = limits.map(|(resource, soft, hard)| ResourceLimit {
            resource: *resource,
            soft: *soft,
            hard: *hard,
        });
        ExecSpec { limits: limits.collect(), ..base() }
    };
    for spec in [
        exec(&[""]),
        exec(&["ec\0ho"]),
        exec(&["echo", "a\0"]),
        exec(&["x".repeat(5000).as_str()]),
        env("", "x"),
        env("A=B", "x"),
        env("A\0", "x"),
        env("A", "\0"),
        ExecSpec { cwd: Some("/\0".into()), ..base() },
        limits(&[(16, 0, 0)]),
        limits(&[(0, 2, 1)]),
        limits(&[(7, 1, 1), (7, 1, 2)]),
    ] {
        assert_eq!(failure_in(&mut host, spec.clone()), Kind::InvalidArgument, "{spec:?}");
    }
    assert!(host.os.procs.is_empty());
}

#[test]
fn working_directories_are_checked() {
    let mut host = Host::new();
    host.os.put("/private", Body::Dir, 0o700);
    host.os.put("/private/in", Body::Dir, 0o777);
    for cwd in ["tmp", "", "/missing", "/bin/echo", "/bin/echo/x"] {
        let spec = ExecSpec { cwd: Some(cwd.into()), ..exec(&["echo"]) };
        assert_eq!(failure_in(&mut host, spec), Kind::BadWorkingDirectory, "{cwd}");
    }
    for cwd in ["/private", "/private/in"] {
        let user = |uid| Some(UserSpec::Ids { uid, gid: 5 });
        let spec = |uid| ExecSpec { cwd: Some(cwd.into()), user: user(uid), ..exec(&["echo"]) };
        assert_eq!(failure_in(&mut host, spec(5)), Kind::BadWorkingDirectory, "{cwd}");
        let id = host.open(Request::Exec(spec(0)));
        host.settle();
        assert_eq!(exit_of(&host, id).code, Some(0));
    }
}

#[test]
fn users_are_looked_up_in_passwd() {
    let by = |name: &str| ExecSpec { user: Some(UserSpec::Name(name.into())), ..exec(&["echo"]) };
    assert_eq!(failure(by("nobody")), Kind::UnknownUser);
    let mut host = Host::new();
    let id = host.open(Request::Exec(by("root")));
    host.settle();
    assert_eq!(exit_of(&host, id).code, Some(0));
    let passwd = "root:x:7:8::/:\nbroken:x:y\n\u{e9}:x:1:2\nann:x:1000:1001:Ann:/:/bin/sh\n";
    host.os.put("/etc/passwd", Body::File(passwd.into()), 0o644);
    for (name, ids) in [("root", (7, 8)), ("ann", (1000, 1001)), ("\u{e9}", (1, 2))] {
        host.open(Request::Exec(by(name)));
        host.settle();
        assert_eq!(host.os.procs.last().unwrap().spec.ids, Some(ids));
    }
    for name in ["broken", "bob", "", "x", "ann:x"] {
        assert_eq!(failure_in(&mut host, by(name)), Kind::UnknownUser, "{name}");
    }
    assert_eq!(host.os.open_files(), 0);
}

#[test]
fn what_the_kernel_says_of_a_start_is_passed_on() {
    let user = || Some(UserSpec::Ids { uid: 1, gid: 1 });
    for (errno, kind) in [
        (Errno::NOENT, Kind::ProgramNotFound),
        (Errno::ACCES, Kind::ProgramNotExecutable),
        (Errno::NOEXEC, Kind::ProgramNotExecutable),
        (Errno::PERM, Kind::UserNotPermitted),
        (Errno::TOOBIG, Kind::InvalidArgument),
        (Errno::AGAIN, Kind::OutOfResources),
        (Errno::NOMEM, Kind::OutOfResources),
        (Errno::IO, Kind::Other),
    ] {
        for program in ["echo", "/bin/echo"] {
            let mut host = Host::new();
            host.os.faults.insert("spawn".into(), errno);
            let spec = ExecSpec { user: user(), ..exec(&[program]) };
            assert_eq!(failure_in(&mut host, spec), kind, "{errno:?}");
        }
    }
}

#[test]
fn a_timeout_kills_the_group_and_is_told_from_other_ends() {
    let mut host = Host::new();
    let spec = ExecSpec { timeout_ns: Some(5_000_000), ..exec(&["sleep"]) };
    host.os.now = Duration::from_secs(9);
    let late = host.open(Request::Exec(spec.clone()));
    let soon = host.open(Request::Exec(ExecSpec { timeout_ns: Some(1), ..exec(&["echo"]) }));
    let never = ExecSpec { timeout_ns: Some(u64::MAX), ..exec(&["sleep"]) };
    let never = host.open(Request::Exec(never));
    host.settle();
    let due = Duration::from_secs(9) + Duration::from_millis(5);
    assert_eq!(host.core.next_deadline(), Some(due));
    host.os.now = due - Duration::from_nanos(1);
    host.settle();
    assert!(host.os.procs[0].signals.is_empty());
    host.os.now = due;
    host.settle();
    assert_eq!(host.os.procs[0].signals, [9]);
    let exit = exit_of(&host, late);
    assert_eq!((exit.signal, exit.timed_out, exit.elapsed_ns), (Some(9), true, 5_000_000));
    assert!(!exit_of(&host, soon).timed_out, "it had ended by itself");
    assert!(host.streams[&never].end.is_none());
}

#[test]
fn the_end_does_not_wait_for_grandchildren() {
    for program in ["leak", "flood"] {
        let mut host = Host::new();
        let id = host.open(Request::Exec(exec(&[program])));
        host.settle();
        assert_eq!(exit_of(&host, id).code, Some(0));
        let out = &host.streams[&id].outs[0].bytes;
        assert!(out.starts_with(b"last words"));
        assert!(out.len() <= (1 << 20) + PIPE, "{}", out.len());
    }
}

#[test]
fn a_terminal_has_one_output_and_a_size() {
    let mut host = Host::new();
    let size = |rows| TermSize { rows, cols: 80 };
    let tty = host.open(Request::Exec(ExecSpec { tty: Some(size(1)), ..exec(&["sleep"]) }));
    let pipes = host.open(Request::Exec(exec(&["sleep"])));
    host.settle();
    assert!(host.streams[&tty].outs[1].eof && !host.streams[&pipes].outs[1].eof);
    assert!(host.streams[&tty].started.as_ref().unwrap().tty);
    let resize = |process| Request::Resize { process, size: size(3) };
    assert!(host.ask(resize(1)).is_ok());
    assert_eq!(host.os.procs[0].size, Some(size(3)));
    assert_eq!(host.ask(resize(2)), Err(Kind::InvalidArgument));
    assert_eq!(host.ask(resize(3)), Err(Kind::NoSuchProcess));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the sizes, the windows and the pieces, every byte comes once and in order.
    #[test]
    fn output_and_input_come_through_whole(
        stdout in 0_usize..200_000,
        stderr in 0_usize..200_000,
        stdin in 0_usize..400_000,
        window in 1_u32..100_000,
        host_window in 1_u32..300_000,
        piece in 1000_usize..100_000,
    ) {
        let mut host = Host::with_config(AgentConfig { window, ..AgentConfig::default() });
        host.window = host_window;
        let generate = exec(&["gen", &stdout.to_string(), &stderr.to_string()]);
        let generate = host.open(Request::Exec(generate));
        let input: Vec<u8> = (0..stdin).map(|at| pattern(2, at)).collect();
        let cat = ExecSpec { stdin: true, ..exec(&["cat"]) };
        let cat = host.open_with_stdin(Request::Exec(cat), &input, true);
        while host.step(piece) {
            for child in host.core.interest() {
                prop_assert!(!host.os.procs[usize::try_from(child.child.0).unwrap()].released);
            }
        }
        for (output, total) in [stdout, stderr].into_iter().enumerate() {
            let got = &host.streams[&generate].outs[output].bytes;
            prop_assert_eq!(got.len(), total);
            prop_assert!(got.iter().enumerate().all(|(at, byte)| *byte == pattern(output, at)));
        }
        prop_assert_eq!(exit_of(&host, generate).code, Some(7));
        prop_assert!(host.streams[&cat].outs[0].bytes == input);
        prop_assert_eq!(exit_of(&host, cat).code, Some(3));
        prop_assert_eq!(host.streams[&cat].consumed_by_agent, stdin as u64);
        prop_assert!(host.core.interest().is_empty());
    }
}

#[test]
fn a_slow_reader_stalls_only_its_own_process() {
    let mut host = Host::new();
    host.consuming = false;
    let slow = host.open(Request::Exec(exec(&["gen", "1000000", "10"])));
    host.settle();
    let window = usize::try_from(vm_guest_protocol::DEFAULT_WINDOW).unwrap();
    assert_eq!(host.streams[&slow].outs[0].bytes.len(), window);
    assert_eq!(host.streams[&slow].outs[1].bytes.len(), 10);
    assert!(host.streams[&slow].end.is_none());
    let interest = host.core.interest();
    assert!(!interest[0].stdout && interest[0].stderr, "{interest:?}");
    let quick = host.open(Request::Exec(exec(&["echo", "here"])));
    host.settle();
    assert_eq!(exit_of(&host, quick).code, Some(0));
    host.consuming = true;
    let consumed = window as u64;
    let credit = Frame::Credit { channel: Channel::Stdout, consumed, window: 1 << 20 };
    host.send(slow, &credit);
    host.allow(slow, consumed + (1 << 20));
    host.settle();
    assert_eq!(host.streams[&slow].outs[0].bytes.len(), 1_000_000);
    assert_eq!(exit_of(&host, slow).code, Some(7));
}

#[test]
fn output_that_waited_for_a_full_connection_comes_once_there_is_room() {
    let mut host = Host::new();
    host.settle();
    let all: Vec<_> =
        (0..24).map(|_| host.open(Request::Exec(exec(&["gen", "200000", "0"])))).collect();
    // The host hears nothing until no more fits into the connection, and nothing at all of the last of them.
    let mut moved = true;
    while moved {
        host.os.run();
        moved = host.carry_to_agent(usize::MAX).unwrap() | host.core.advance(&mut host.os);
    }
    assert!(host.streams.values().all(|stream| stream.outs[0].bytes.is_empty()));
    let waits = host.core.outgoing(host.conn()).map_or(0, |bytes| bytes.len());
    assert!((1 << 20..2 << 20).contains(&waits), "{waits} bytes wait");
    host.settle();
    for id in all {
        assert_eq!(host.streams[&id].outs[0].bytes.len(), 200_000, "stream {id}");
        assert_eq!(exit_of(&host, id).code, Some(7));
    }
}

#[test]
fn room_for_input_is_not_watched_for_without_input() {
    let mut host = Host::new();
    let spec = ExecSpec { stdin: true, ..exec(&["sleep"]) };
    host.open(Request::Exec(spec));
    host.settle();
    let interest = host.core.interest();
    assert!(interest.len() == 1 && !interest[0].stdin, "{interest:?}");
}

#[test]
fn input_waits_for_a_program_that_does_not_read() {
    let mut host = Host::new();
    let input = vec![b'x'; 1 << 20];
    let spec = ExecSpec { stdin: true, ..exec(&["sleep"]) };
    let id = host.open_with_stdin(Request::Exec(spec), &input, true);
    host.settle();
    let window = u64::from(vm_guest_protocol::DEFAULT_WINDOW);
    assert_eq!(host.streams[&id].consumed_by_agent, PIPE as u64);
    assert_eq!(host.os.procs[0].stdin.len(), PIPE);
    assert!(host.core.interest()[0].stdin);
    assert_eq!(host.stdin_sent(id), window + PIPE as u64);
}

#[test]
fn input_that_nobody_reads_is_dropped_without_stalling_the_host() {
    for (program, stdin) in [("deaf", true), ("sleep", false), ("echo", true), ("missing", true)] {
        let mut host = Host::new();
        let input = vec![b'x'; 1 << 20];
        let spec = ExecSpec { stdin, ..exec(&[program]) };
        let id = host.open_with_stdin(Request::Exec(spec), &input, true);
        host.settle();
        assert_eq!(host.stdin_sent(id), 1 << 20, "{program}");
    }
}

#[test]
fn a_host_that_breaks_the_flow_rules_is_cut_off() {
    let data = |offset, length: usize| Frame::Data {
        channel: Channel::Stdin,
        offset,
        bytes: vec![0; length].into(),
    };
    let eof = |offset| Frame::Eof { channel: Channel::Stdin, offset };
    let credit = |consumed| Frame::Credit { channel: Channel::Stdout, consumed, window: 1 };
    // What the pipe takes at once is granted anew.
    let full = (0..6).map(|index| data(index * 65_536, 65_536)).collect();
    for (frames, violation) in [
        (vec![data(1, 1)], Violation::Gap),
        (vec![eof(1)], Violation::Gap),
        (full, Violation::Overrun),
        (vec![data(0, 3), eof(3), data(3, 1)], Violation::AfterEof),
        (vec![data(0, 3), eof(3), eof(2)], Violation::AfterEof),
        (vec![data(0, 3), eof(2)], Violation::AfterEof),
        (vec![credit(1)], Violation::Credit),
        (
            vec![Frame::Data { channel: Channel::Stdout, offset: 0, bytes: vec![0].into() }],
            Violation::Unexpected,
        ),
    ] {
        let mut host = Host::new();
        let id = host.open(Request::Exec(ExecSpec { stdin: true, ..exec(&["sleep"]) }));
        host.settle();
        for frame in &frames {
            host.send(id, frame);
        }
        assert_eq!(host.carry_to_agent(usize::MAX), Err(violation));
    }
}

#[test]
fn programs_and_directories_are_taken_up_to_the_longest_path() {
    let long = |name: &str, length: usize| "/".repeat(length - name.len()) + name;
    let echo = |length| exec(&[&long("bin/echo", length)]);
    let within = |length| ExecSpec { cwd: Some(long("tmp", length)), ..exec(&["echo"]) };
    for spec in [echo(4096), within(4096)] {
        let mut host = Host::new();
        let id = host.open(Request::Exec(spec));
        host.settle();
        assert_eq!(exit_of(&host, id).code, Some(0));
    }
    assert_eq!(failure(echo(4097)), Kind::InvalidArgument);
    assert_eq!(failure(within(4097)), Kind::BadWorkingDirectory);
}

#[test]
fn a_directory_is_entered_with_the_rights_of_its_owner_its_group_or_others() {
    for (mode, uid, gid, may) in [
        (0o710, 1, 9, true),
        (0o710, 2, 5, true),
        (0o710, 2, 6, false),
        (0o701, 2, 5, false),
        (0o701, 2, 6, true),
        (0o071, 1, 5, false),
    ] {
        let mut host = Host::new();
        host.os.put("/team", Body::Dir, mode);
        host.os.node_mut("/team").unwrap().owner = (1, 5);
        let user = Some(UserSpec::Ids { uid, gid });
        let spec = ExecSpec { cwd: Some("/team".into()), user, ..exec(&["echo"]) };
        let id = host.open(Request::Exec(spec));
        host.settle();
        assert_eq!(host.streams[&id].started.is_some(), may, "{mode:o} for {uid}:{gid}");
    }
}

#[test]
fn a_passwd_is_read_up_to_its_largest() {
    let line = b"\nann:x:3:4::/:\n";
    for (size, ids) in [(4 << 20, Some((3, 4))), ((4 << 20) + 1, None)] {
        let mut host = Host::new();
        let mut passwd = vec![b'x'; size - line.len()];
        passwd.extend_from_slice(line);
        host.os.put("/etc/passwd", Body::File(passwd), 0o644);
        let user = Some(UserSpec::Name("ann".into()));
        host.open(Request::Exec(ExecSpec { user, ..exec(&["echo"]) }));
        host.settle();
        assert_eq!(host.os.procs.first().and_then(|process| process.spec.ids), ids, "{size}");
        assert_eq!(host.os.open_files(), 0);
    }
}

#[test]
fn a_refusal_has_the_errno_and_blames_the_user_only_where_one_was_asked_for() {
    let mut host = Host::new();
    let id = host.open(Request::Exec(exec(&["/usr/bin"])));
    host.settle();
    let Some(Frame::Failed(error)) = &host.streams[&id].end else { panic!() };
    assert_eq!((error.kind, error.errno), (Kind::ProgramNotExecutable, Errno::ISDIR.0));
    host.os.faults.insert("spawn".into(), Errno::PERM);
    assert_eq!(failure_in(&mut host, exec(&["echo"])), Kind::Other);
}

#[test]
fn a_program_that_is_slow_to_die_is_killed_once() {
    let mut host = Host::new();
    let id = host.open(Request::Exec(ExecSpec { timeout_ns: Some(5), ..exec(&["sleep"]) }));
    host.settle();
    host.os.now = host.core.next_deadline().unwrap();
    for _ in 0..3 {
        host.core.advance(&mut host.os);
        host.os.procs[0].exit = None;
        assert_ne!(host.core.next_deadline(), Some(host.os.now), "its time does not run out again");
    }
    assert_eq!(host.os.procs[0].signals, [9]);
    host.os.procs[0].exit = Some(ChildExit::Signaled(9));
    host.settle();
    assert!(exit_of(&host, id).timed_out);
}

#[test]
fn the_end_of_silent_outputs_is_news_once_it_no_longer_waits_for_that_of_the_program() {
    let mut host = Host::new();
    let spec = ExecSpec { lazy_start: true, ..exec(&["mute", ""]) };
    let id = host.open(Request::Exec(spec));
    host.settle();
    assert!(host.streams[&id].started.is_none());
    host.os.now = Duration::from_millis(5);
    host.settle();
    assert!(host.streams[&id].started.is_some());
    assert!(host.streams[&id].outs.iter().all(|out| out.eof));
}

#[test]
fn input_is_not_credited_before_the_start_is_told() {
    let mut host = Host::new();
    let spec = ExecSpec { lazy_start: true, ..exec(&["sleep"]) };
    let id = host.open_with_stdin(Request::Exec(spec), b"unread", true);
    host.settle();
    let told =
        |host: &Host| (host.streams[&id].started.is_some(), host.streams[&id].consumed_by_agent);
    assert_eq!(told(&host), (false, 0));
    host.os.now = host.core.next_deadline().unwrap();
    host.settle();
    assert_eq!(told(&host), (true, 6));
}

#[test]
fn a_terminal_whose_program_has_ended_is_left_alone() {
    let mut host = Host::new();
    let size = TermSize { rows: 1, cols: 80 };
    host.open(Request::Exec(ExecSpec { tty: Some(size), ..exec(&["echo"]) }));
    host.settle();
    assert!(host.os.procs[0].released);
    assert!(host.ask(Request::Resize { process: 1, size }).is_ok());
    assert_eq!(host.os.procs[0].size, None);
}
