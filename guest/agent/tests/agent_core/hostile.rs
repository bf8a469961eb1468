//! A host that means harm, or does not listen.

use crate::{
    fake_os::{Body, FakeOs},
    host::{Host, exec},
};
use bytes::{Buf, BytesMut};
use proptest::{collection::vec, prelude::*};
use std::time::Duration;
use vm_guest_agent::{
    core::{AgentConfig, AgentCore, ConnId},
    os::ChildExit,
};
use vm_guest_protocol::{
    Channel, ExecSpec, Frame, GuestErrorKind as Kind, Hello, MAX_PAYLOAD, PROTOCOL_VERSION, Reply,
    Request, encode,
};

fn channel() -> impl Strategy<Value = Channel> {
    prop_oneof![4 => Just(Channel::Stdin), 2 => Just(Channel::Stdout), 1 => Just(Channel::Stderr)]
}

fn request() -> impl Strategy<Value = Request> {
    let path = || prop_oneof![Just("/tmp/f".to_owned()), Just("/".to_owned()), any::<String>()];
    let program = prop::sample::select(vec!["echo", "cat", "sleep", "deaf", "mute", "none"]);
    prop_oneof![
        6 => (program, any::<bool>(), any::<Option<u64>>()).prop_map(|(program, stdin, timeout_ns)| {
            Request::Exec(ExecSpec { stdin, timeout_ns, lazy_start: !stdin, ..exec(&[program]) })
        }),
        2 => (0_u64..5, any::<(u64, u64)>())
            .prop_map(|(process, (stdout, stderr))| Request::Attach { process, stdout, stderr }),
        2 => path().prop_map(|path| Request::ReadFile { path }),
        4 => (path(), any::<Option<u32>>()).prop_map(|(path, mode)| Request::WriteFile { path, mode }),
        1 => path().prop_map(|path| Request::ListDir { path }),
        1 => (path(), any::<bool>()).prop_map(|(path, recursive)| Request::Remove { path, recursive }),
        1 => (0_u64..5, any::<u8>()).prop_map(|(process, signal)| Request::Signal { process, signal }),
        1 => (0_u64..5).prop_map(|process| Request::Detach { process }),
        1 => any::<(u8, u64)>().prop_map(|(signal, grace_ns)| Request::Shutdown { signal, grace_ns }),
        1 => Just(Request::Processes),
    ]
}

fn frame() -> impl Strategy<Value = Frame> {
    let offset = || prop_oneof![4 => 0_u64..20, 1 => any::<u64>().prop_map(|it| it / 2)];
    prop_oneof![
        6 => request().prop_map(Frame::Open),
        4 => (channel(), offset(), vec(any::<u8>(), 1..20))
            .prop_map(|(channel, offset, bytes)| Frame::Data { channel, offset, bytes: bytes.into() }),
        2 => (channel(), offset()).prop_map(|(channel, offset)| Frame::Eof { channel, offset }),
        3 => (channel(), offset(), any::<u32>())
            .prop_map(|(channel, consumed, window)| Frame::Credit { channel, consumed, window }),
        2 => Just(Frame::Close),
        1 => Just(Frame::Done(Reply::Empty)),
        2 => (any::<bool>(), vec(0_u32..6, 0..4)).prop_map(|(resume, live)| {
            Frame::Hello(Hello { version: PROTOCOL_VERSION, session: 77, resume, live })
        }),
    ]
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..300)) {
        let mut host = Host::new();
        host.settle();
        let _ = host.core.received(host.conn(), &bytes, &mut host.os);
        host.core.advance(&mut host.os);
    }

    /// Frames that make no sense end the connection at most; nothing panics and nothing is left behind.
    #[test]
    fn any_frames_are_survived(frames in vec((0_u32..6, frame(), 0_u64..2_000_000_000), 0..60)) {
        let (mut core, mut os) = (AgentCore::new(AgentConfig::default()), FakeOs::new());
        os.put("/tmp/f", Body::File(vec![3; 1000]), 0o644);
        let mut conn = ConnId(0);
        let greeting = |resume| Frame::Hello(Hello {
            version: PROTOCOL_VERSION, session: 77, resume, live: (0..6).collect(),
        });
        let mut say = |core: &mut AgentCore, os: &mut FakeOs, stream, frame: &Frame| {
            let mut wire = BytesMut::new();
            encode(stream, frame, &mut wire);
            if core.received(conn, &wire, os).is_err() {
                core.disconnected(conn);
                conn.0 += 1;
                core.connected(conn);
                let mut wire = BytesMut::new();
                encode(0, &greeting(true), &mut wire);
                core.received(conn, &wire, os).unwrap();
            }
            if let Some(out) = core.outgoing(conn) {
                out.clear();
            }
        };
        core.connected(ConnId(0));
        say(&mut core, &mut os, 0, &greeting(false));
        for (stream, frame, nanos) in frames {
            say(&mut core, &mut os, stream, &frame);
            os.now += Duration::from_nanos(nanos);
            os.run();
            core.advance(&mut os);
            let _ = (core.next_deadline(), core.interest(), core.to_close());
        }
        core.connected(ConnId(u64::MAX));
        let mut wire = BytesMut::new();
        let new = Hello { version: PROTOCOL_VERSION, session: 78, resume: false, live: vec![] };
        encode(0, &Frame::Hello(new), &mut wire);
        core.received(ConnId(u64::MAX), &wire, &mut os).unwrap();
        prop_assert_eq!(os.open_files(), 0);
        prop_assert!(!os.names().iter().any(|path| path.contains(".twinvm-")));
    }
}

#[test]
fn a_long_path_is_refused_with_an_error_that_fits() {
    for character in ["x", "\u{e9}"] {
        let path = character.repeat((MAX_PAYLOAD - 64) / character.len());
        for request in [
            Request::Stat { path: path.clone() },
            Request::Exec(exec(&[&path])),
            Request::Exec(ExecSpec { cwd: Some(path.clone()), ..exec(&["echo"]) }),
            Request::Exec(ExecSpec {
                user: Some(vm_guest_protocol::UserSpec::Name(path.clone())),
                ..exec(&["echo"])
            }),
        ] {
            let mut host = Host::new();
            let id = host.open(request);
            host.settle();
            let Some(Frame::Failed(error)) = &host.streams[&id].end else { panic!() };
            assert!(error.path.len() <= 4096);
        }
    }
}

#[test]
fn streams_and_processes_are_bounded() {
    let mut host = Host::new();
    let ids: Vec<u32> = (0..1024).map(|_| host.open(Request::Ping)).collect();
    host.settle();
    assert_eq!(host.ask(Request::Ping), Err(Kind::OutOfResources));
    host.close(ids[0]);
    assert!(host.ask(Request::Ping).is_ok());
    let mut host = Host::new();
    for process in 1..=1000 {
        let long = "./".repeat(2040) + "bin/sleep";
        let id = host.open(Request::Exec(exec(&[&long])));
        host.settle();
        host.ask(Request::Detach { process }).unwrap();
        host.close(id);
    }
    assert_eq!(host.ask(Request::Exec(exec(&["echo"]))), Err(Kind::OutOfResources));
    let Ok(Reply::Processes(all)) = host.ask(Request::Processes) else { panic!() };
    assert_eq!(all.len(), 1000);
}

#[test]
fn a_host_that_does_not_listen_is_not_heard_and_memory_stays_bounded() {
    let mut host = Host::new();
    host.os.put("/tmp/big", Body::File(vec![9; 8 << 20]), 0o644);
    host.settle();
    let conn = host.conn();
    let mut wire = BytesMut::new();
    // Windows without bounds on many streams, then requests with large answers.
    for id in 1..=64 {
        encode(id, &Frame::Open(Request::ReadFile { path: "/tmp/big".into() }), &mut wire);
        let credit = Frame::Credit { channel: Channel::Stdout, consumed: 0, window: u32::MAX };
        encode(id, &credit, &mut wire);
    }
    for id in 100..20_000 {
        encode(
            id,
            &Frame::Open(Request::Stat { path: format!("/{}", "x".repeat(200)) }),
            &mut wire,
        );
        encode(id, &Frame::Close, &mut wire);
    }
    host.core.received(conn, &wire, &mut host.os).unwrap();
    for _ in 0..10 {
        host.core.advance(&mut host.os);
    }
    let waiting = host.core.outgoing(conn).unwrap().len();
    assert!((1 << 20..(2 << 20) + 4096).contains(&waiting), "{waiting}");
    assert!(!host.core.wants_input(conn));
    // It listens after all: everything comes.
    let mut total = 0;
    loop {
        let outgoing = host.core.outgoing(conn).unwrap();
        total += outgoing.len();
        outgoing.advance(outgoing.len());
        if host.core.next_deadline() != Some(Duration::ZERO) {
            break;
        }
        assert!(host.core.advance(&mut host.os));
    }
    assert!(host.core.wants_input(conn));
    // Every file up to the agent's own window, and every failure.
    assert!(total > 64 * (256 << 10) + 19_900 * 200, "{total}");
}

/// So many requests, with answers of some 4,000 bytes.
fn stats(count: u32) -> BytesMut {
    let mut wire = BytesMut::new();
    for id in (0..count).map(|index| 100 + index) {
        let path = format!("/{}", "x".repeat(4000));
        encode(id, &Frame::Open(Request::Stat { path }), &mut wire);
        encode(id, &Frame::Close, &mut wire);
    }
    wire
}

#[test]
fn streams_go_on_once_a_full_connection_is_below_its_bound() {
    let mut host = Host::new();
    host.settle();
    for _ in 0..24 {
        host.open(Request::Exec(exec(&["gen", "200000", "0"])));
    }
    let mut moved = true;
    while moved {
        host.os.run();
        moved = host.carry_to_agent(usize::MAX).unwrap() | host.core.advance(&mut host.os);
    }
    let waiting = host.core.outgoing(host.conn()).unwrap().len();
    host.carry_to_host(waiting - (1 << 20));
    assert_ne!(host.core.next_deadline(), Some(Duration::ZERO), "there is no room yet");
    assert!(!host.core.advance(&mut host.os));
    host.carry_to_host(1);
    assert_eq!(host.core.next_deadline(), Some(Duration::ZERO));
    assert!(host.core.advance(&mut host.os));
}

#[test]
fn frames_that_wait_are_heard_once_the_connection_is_below_its_bound() {
    let mut host = Host::new();
    host.settle();
    let conn = host.conn();
    host.core.received(conn, &stats(1000), &mut host.os).unwrap();
    let outgoing = host.core.outgoing(conn).unwrap();
    outgoing.advance(outgoing.len() - (2 << 20));
    assert_eq!(host.core.next_deadline(), None, "they wait");
    host.core.outgoing(conn).unwrap().advance(1);
    assert_eq!(host.core.next_deadline(), Some(Duration::ZERO));
    assert!(host.core.advance(&mut host.os));
    assert!(host.core.outgoing(conn).unwrap().len() > 2 << 20);
}

#[test]
fn a_connection_is_read_while_it_is_below_its_bound() {
    let mut host = Host::new();
    host.open(Request::Exec(exec(&["sleep"])));
    host.settle();
    let conn = host.conn();
    let waiting = |host: &mut Host| host.core.outgoing(conn).unwrap().len();
    // What the end of the program adds is tried out on a copy.
    let (mut core, mut os) = (host.core.clone(), host.os.clone());
    os.procs[0].exit = Some(ChildExit::Exited(0));
    core.advance(&mut os);
    let last = core.outgoing(conn).unwrap().len();
    let mut ping = BytesMut::new();
    encode(2, &Frame::Open(Request::Ping), &mut ping);
    encode(2, &Frame::Close, &mut ping);
    for (piece, most) in [(stats(1), 8192), (ping, last)] {
        while waiting(&mut host) < (2 << 20) - most {
            host.core.received(conn, &piece, &mut host.os).unwrap();
        }
    }
    let excess = waiting(&mut host) - ((2 << 20) - last);
    host.core.outgoing(conn).unwrap().advance(excess);
    assert!(host.core.wants_input(conn));
    host.os.procs[0].exit = Some(ChildExit::Exited(0));
    host.core.advance(&mut host.os);
    assert_eq!(waiting(&mut host), 2 << 20);
    assert!(!host.core.wants_input(conn));
    host.core.outgoing(conn).unwrap().advance(1);
    assert!(host.core.wants_input(conn));
}
