//! Processes beyond their streams: signals, detaching, attaching, forgetting.

use crate::{
    fake_os::pattern,
    host::{Host, exec},
};
use std::time::Duration;
use vm_guest_agent::os::ChildExit;
use vm_guest_protocol::{ExecSpec, Frame, GuestErrorKind as Kind, Reply, Request};

fn spawn(host: &mut Host, words: &[&str]) -> u32 {
    let id = host.open(Request::Exec(ExecSpec { stdin: true, ..exec(words) }));
    host.settle();
    id
}

fn known(host: &mut Host) -> Vec<u64> {
    match host.ask(Request::Processes) {
        Ok(Reply::Processes(entries)) => entries.iter().map(|entry| entry.process).collect(),
        other => panic!("{other:?}"),
    }
}

fn attach(host: &mut Host, process: u64, stdout: u64, stderr: u64) -> u32 {
    let id = host.open(Request::Attach { process, stdout, stderr });
    host.settle();
    id
}

#[test]
fn signals_reach_the_group_once_and_are_answered() {
    let mut host = Host::new();
    let id = spawn(&mut host, &["sleep"]);
    let signal = |process, signal| Request::Signal { process, signal };
    assert_eq!(host.ask(signal(1, 10)), Ok(Reply::Empty));
    assert_eq!(host.ask(signal(1, 15)), Ok(Reply::Empty));
    assert_eq!(host.os.procs[0].signals, [10, 15]);
    let Some(Frame::Exited(exit)) = &host.streams[&id].end else { panic!() };
    assert_eq!((exit.code, exit.signal), (None, Some(15)));
    assert_eq!(host.ask(signal(1, 15)), Ok(Reply::Empty), "it has ended, which is no error");
    assert_eq!(host.ask(signal(2, 15)), Err(Kind::NoSuchProcess));
    for bad in [0, 65, 255] {
        assert_eq!(host.ask(signal(1, bad)), Err(Kind::InvalidArgument));
    }
}

#[test]
fn closing_a_stream_kills_and_forgets_unless_detached() {
    let mut host = Host::new();
    let (first, second) = (spawn(&mut host, &["sleep"]), spawn(&mut host, &["sleep"]));
    let ended = spawn(&mut host, &["echo"]);
    assert_eq!(known(&mut host), [1, 2, 3]);
    assert_eq!(host.ask(Request::Detach { process: 2 }), Ok(Reply::Empty));
    assert_eq!(host.ask(Request::Detach { process: 9 }), Err(Kind::NoSuchProcess));
    for id in [first, second, ended] {
        host.close(id);
    }
    host.settle();
    assert_eq!(host.os.procs[0].signals, [9]);
    assert!(host.os.procs[0].released && host.os.procs[1].signals.is_empty());
    assert_eq!(known(&mut host), [2]);
    let again = attach(&mut host, 2, 0, 0);
    host.close(again);
    host.settle();
    assert_eq!(host.os.procs[1].signals, [9], "who attaches must detach again");
    assert_eq!(known(&mut host), [0; 0]);
}

#[test]
fn a_detached_process_is_never_stalled_and_keeps_its_last_output() {
    let mut host = Host::new();
    host.consuming = false;
    let id = spawn(&mut host, &["gen", "1000000", "5"]);
    host.ask(Request::Detach { process: 1 }).unwrap();
    host.close(id);
    host.settle();
    host.consuming = true;
    assert!(host.os.procs[0].exit.is_some());
    let id = attach(&mut host, 1, 0, 1);
    let stream = &host.streams[&id];
    let started = stream.started.clone().unwrap();
    let oldest = 1_000_000 - (256 << 10);
    assert_eq!((started.stdout, started.stderr), (oldest as u64, 1));
    let expected: Vec<u8> = (oldest..1_000_000).map(|at| pattern(0, at)).collect();
    assert!(stream.outs[0].bytes == expected);
    assert!(matches!(stream.end, Some(Frame::Exited(_))));
}

#[test]
fn attaching_goes_on_at_the_offset_asked_for() {
    for (from, to) in [(0, 0), (900, 900), (1000, 1000), (u64::MAX, 1000)] {
        let mut host = Host::new();
        host.consuming = false;
        let id = spawn(&mut host, &["gen", "1000", "5"]);
        host.ask(Request::Detach { process: 1 }).unwrap();
        host.close(id);
        let id = attach(&mut host, 1, from, 5);
        let started = host.streams[&id].started.clone().unwrap();
        assert_eq!((started.stdout, started.stderr), (to, 5));
        let start = usize::try_from(to).unwrap();
        let expected: Vec<u8> = (start..1000).map(|at| pattern(0, at)).collect();
        assert_eq!(host.streams[&id].outs[0].bytes, expected);
        host.close(id);
        host.settle();
        assert_eq!(known(&mut host), [0; 0], "attached to and closed");
    }
}

#[test]
fn attaching_takes_a_process_over_with_its_input() {
    let mut host = Host::new();
    let old = spawn(&mut host, &["cat"]);
    host.more_stdin(old, b"one ", false);
    host.settle();
    let new = attach(&mut host, 1, 0, 0);
    let Some(Frame::Failed(error)) = &host.streams[&old].end else { panic!() };
    assert_eq!(error.kind, Kind::NoSuchProcess);
    assert_eq!(host.streams[&new].started.as_ref().unwrap().stdin, 4);
    // What the old stream still had on its way is dropped, and closing it does no harm.
    host.more_stdin(old, b"lost", true);
    host.settle();
    host.close(old);
    host.continue_stdin(new, 4, b"two", true);
    host.settle();
    assert!(host.streams[&new].outs[0].bytes.ends_with(b"two"));
    let Some(Frame::Exited(exit)) = &host.streams[&new].end else { panic!() };
    assert_eq!(exit.code, Some(3));
    assert_eq!(
        host.ask(Request::Attach { process: 7, stdout: 0, stderr: 0 }),
        Err(Kind::NoSuchProcess)
    );
}

#[test]
fn input_that_waits_from_an_earlier_stream_is_not_taken_for_the_new_one_s() {
    for lost in [false, true] {
        let mut host = Host::new();
        let old = spawn(&mut host, &["sleep"]);
        host.more_stdin(old, &[b'x'; 100_000], false);
        host.settle();
        host.ask(Request::Detach { process: 1 }).unwrap();
        host.close(old);
        host.settle();
        let new = host.open(Request::Attach { process: 1, stdout: 0, stderr: 0 });
        host.continue_stdin(new, 100_000, b"new", true);
        host.carry_to_agent(usize::MAX).unwrap();
        if lost {
            host.cut();
        }
        host.settle();
        assert_eq!(host.streams[&new].started.as_ref().unwrap().stdin, 100_000);
        let mut got = Vec::new();
        for _ in 0..3 {
            got.extend(host.os.procs[0].stdin.drain(..));
            host.settle();
        }
        assert_eq!((got.len(), &got[100_000..]), (100_003, &b"new"[..]));
    }
}

#[test]
fn input_after_the_end_that_an_earlier_stream_gave_is_not_taken() {
    let mut host = Host::new();
    let old = spawn(&mut host, &["sleep"]);
    host.more_stdin(old, &[b'x'; 100_000], true);
    host.settle();
    host.ask(Request::Detach { process: 1 }).unwrap();
    host.close(old);
    host.settle();
    let new = attach(&mut host, 1, 0, 0);
    host.continue_stdin(new, 100_000, b"late", false);
    let mut got = Vec::new();
    for _ in 0..4 {
        got.extend(host.os.procs[0].stdin.drain(..));
        host.settle();
    }
    assert_eq!((got.len(), got.last()), (100_000, Some(&b'x')));
}

#[test]
fn the_oldest_ended_processes_are_forgotten() {
    let mut host = Host::new();
    for process in 1..=70 {
        let id = spawn(&mut host, &["echo", "x"]);
        host.ask(Request::Detach { process }).unwrap();
        host.close(id);
    }
    let alive = spawn(&mut host, &["sleep"]);
    host.ask(Request::Detach { process: 71 }).unwrap();
    host.close(alive);
    host.settle();
    assert_eq!(known(&mut host), (7..=71).collect::<Vec<_>>());
    // One that is attached to is not among them.
    let kept = attach(&mut host, 7, 0, 0);
    for process in 72..=140 {
        let id = spawn(&mut host, &["echo", "x"]);
        host.ask(Request::Detach { process }).unwrap();
        host.close(id);
    }
    assert!(known(&mut host).starts_with(&[7, 71, 77]));
    host.ask(Request::Detach { process: 7 }).unwrap();
    host.close(kept);
    assert!(known(&mut host).starts_with(&[7, 71, 78]));
}

#[test]
fn a_killed_process_is_not_known_while_it_dies() {
    let mut host = Host::new();
    let id = spawn(&mut host, &["sleep"]);
    host.close(id);
    host.carry_to_agent(usize::MAX).unwrap();
    assert!(!host.os.procs[0].released);
    assert_eq!(known(&mut host), [0; 0]);
    assert!(host.os.procs[0].released);
}

#[test]
fn shutdown_waits_for_processes_up_to_its_grace() {
    for obedient in [true, false] {
        let mut host = Host::new();
        host.os.others = true;
        host.os.now = Duration::from_secs(1);
        let request = Request::Shutdown { signal: 15, grace_ns: 1_000_000_000 };
        assert_eq!(host.ask(request), Ok(Reply::Empty));
        assert_eq!(host.os.signalled_all, [15]);
        host.os.now += Duration::from_millis(500);
        host.settle();
        assert!(!host.os.powered_off);
        let next = host.core.next_deadline();
        assert!(next.is_some_and(|it| it > host.os.now && it <= Duration::from_secs(2)));
        if obedient {
            host.os.others = false;
        } else {
            host.os.now = Duration::from_secs(2);
        }
        host.settle();
        assert!(host.os.powered_off && host.os.synced == ["all"]);
        assert_eq!(host.os.signalled_all, [15, 9]);
        assert_eq!(host.core.next_deadline(), None);
    }
    assert_eq!(
        Host::new().ask(Request::Shutdown { signal: 0, grace_ns: 0 }),
        Err(Kind::InvalidArgument)
    );
}

#[test]
fn clock_and_entropy_are_passed_on() {
    let mut host = Host::new();
    host.os.now = Duration::from_nanos(42);
    assert_eq!(host.ask(Request::Ping), Ok(Reply::Pong { uptime_ns: 42 }));
    assert_eq!(host.ask(Request::SetClock { wall_ns: 5 }), Ok(Reply::Empty));
    assert_eq!(host.os.wall, Some(Duration::from_nanos(5)));
    assert_eq!(host.ask(Request::Reseed { entropy: [3; 32] }), Ok(Reply::Empty));
    assert_eq!(host.os.entropy, Some([3; 32]));
    host.os.faults.insert("set_wall_clock".into(), vm_guest_agent::os::Errno::PERM);
    assert_eq!(host.ask(Request::SetClock { wall_ns: 5 }), Err(Kind::PermissionDenied));
}

#[test]
fn killed_processes_do_not_push_out_one_that_has_ended() {
    let mut host = Host::new();
    let id = spawn(&mut host, &["echo"]);
    host.ask(Request::Detach { process: 1 }).unwrap();
    host.close(id);
    for _ in 0..65 {
        let id = spawn(&mut host, &["sleep"]);
        host.close(id);
        host.settle();
    }
    assert_eq!(known(&mut host), [1]);
}

#[test]
fn closing_a_stream_with_output_of_an_ended_program_leaves_the_others_alone() {
    let mut host = Host::new();
    host.consuming = false;
    // The window and a pipe hold it, so it ends; not all of it is read.
    let ended = spawn(&mut host, &["gen", "300000", "0"]);
    let other = spawn(&mut host, &["sleep"]);
    assert!(host.os.procs[0].exit.is_some() && !host.os.procs[0].released);
    host.close(ended);
    host.settle();
    assert!(host.os.procs[0].released);
    assert_eq!(host.ask(Request::Signal { process: 2, signal: 15 }), Ok(Reply::Empty));
    assert!(matches!(&host.streams[&other].end, Some(Frame::Exited(_))));
}

#[test]
fn a_program_that_ends_as_the_grace_does_is_noted_and_the_machine_turned_off() {
    let mut host = Host::new();
    spawn(&mut host, &["sleep"]);
    host.ask(Request::Shutdown { signal: 15, grace_ns: 1000 }).unwrap();
    host.os.now = Duration::from_nanos(1000);
    host.os.procs[0].exit = Some(ChildExit::Signaled(15));
    assert!(host.core.advance(&mut host.os), "something has changed");
    assert!(host.os.powered_off && host.os.procs[0].released);
}
