//! Handshakes, lost connections, and sessions that go on or end.

use crate::{
    fake_os::{Body, FakeOs, pattern},
    host::{Host, exec},
};
use bytes::BytesMut;
use proptest::{collection::vec, prelude::*};
use vm_guest_agent::{
    core::{AgentConfig, AgentCore, ConnId, Violation},
    os::Errno,
};
use vm_guest_protocol::{
    Channel, Decoder, ExecSpec, Frame, GuestErrorKind as Kind, Hello, PROTOCOL_VERSION, Refusal,
    Reply, Request, Welcome, encode,
};

const INPUT: usize = 700;
const READ: usize = 600;
const WRITTEN: usize = 500;

/// Some of everything that must happen exactly once.
fn begin(host: &mut Host) -> Vec<u32> {
    host.os.put("/tmp/read", Body::File((0..READ).map(|at| pattern(3, at)).collect()), 0o644);
    let input: Vec<u8> = (0..INPUT).map(|at| pattern(2, at)).collect();
    let content: Vec<u8> = (0..WRITTEN).map(|at| pattern(4, at)).collect();
    let cat = ExecSpec { stdin: true, ..exec(&["cat"]) };
    let write = Request::WriteFile { path: "/tmp/written".into(), mode: None };
    vec![
        host.open_with_stdin(Request::Exec(cat), &input, true),
        host.open(Request::Exec(exec(&["gen", "900", "400"]))),
        host.open(Request::Exec(exec(&["missing"]))),
        host.open_with_stdin(write, &content, true),
        host.open(Request::ReadFile { path: "/tmp/read".into() }),
        host.open(Request::CreateDir { path: "/tmp/dir".into(), mode: 0o755, recursive: false }),
        host.open(Request::Signal { process: 2, signal: 10 }),
    ]
}

fn check(host: &Host, ids: &[u32]) {
    let streams: Vec<_> = ids.iter().map(|id| &host.streams[id]).collect();
    let expect =
        |output, length| -> Vec<u8> { (0..length).map(|at| pattern(output, at)).collect() };
    assert_eq!(host.os.procs.len(), 2, "each program was started once");
    assert_eq!(streams[0].outs[0].bytes, expect(2, INPUT));
    assert_eq!(streams[1].outs[0].bytes, expect(0, 900));
    assert_eq!(streams[1].outs[1].bytes, expect(1, 400));
    for (index, code) in [(0, 3), (1, 7)] {
        let Some(Frame::Exited(exit)) = &streams[index].end else { panic!("{index}") };
        assert_eq!(exit.code, Some(code));
    }
    assert!(matches!(&streams[2].end, Some(Frame::Failed(it)) if it.kind == Kind::ProgramNotFound));
    assert!(host.os.file("/tmp/written") == Some(&expect(4, WRITTEN)[..]));
    assert_eq!(streams[4].outs[0].bytes, expect(3, READ));
    for (index, stream) in streams.iter().enumerate().skip(3) {
        assert_eq!(stream.end, Some(Frame::Done(Reply::Empty)), "{index}: not carried out twice");
    }
    assert!(host.os.procs[1].signals.len() <= 1);
    assert_eq!(host.os.open_files(), 0);
}

fn small() -> Host {
    let mut host = Host::with_config(AgentConfig { window: 256, ..AgentConfig::default() });
    host.window = 100;
    host.os.pipe = 60;
    host
}

#[test]
fn a_loss_at_any_byte_loses_and_doubles_nothing() {
    let whole = {
        let mut host = small();
        let ids = begin(&mut host);
        while host.step(64) {}
        check(&host, &ids);
        host.carried
    };
    assert!(whole > 5000, "{whole}");
    for position in 0..whole {
        let mut host = small();
        let ids = begin(&mut host);
        // Whole steps up to near the place, then single bytes.
        while host.carried + 128 < position && host.step(64) {}
        while host.carried < position {
            host.os.run();
            host.carry_to_agent(1).unwrap();
            host.core.advance(&mut host.os);
            if host.carried < position {
                host.carry_to_host(1);
            }
        }
        host.cut();
        while host.step(64) {}
        check(&host, &ids);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Many losses, pieces of any size, and the agent saved and restored in between.
    #[test]
    fn many_losses_lose_and_double_nothing(
        steps in vec((1_usize..400, 0_usize..400, 0_u8..8), 0..120),
        window in 1_u32..500,
        host_window in 1_u32..500,
        pipe in 1_usize..300,
    ) {
        let mut host = Host::with_config(AgentConfig { window, ..AgentConfig::default() });
        host.window = host_window;
        host.os.pipe = pipe;
        let ids = begin(&mut host);
        for (there, back, action) in steps {
            host.os.run();
            host.carry_to_agent(there).unwrap();
            if action & 1 == 0 {
                host.core.advance(&mut host.os);
            }
            host.carry_to_host(back);
            match action {
                1 => host.cut(),
                2 => {
                    let saved = postcard::to_allocvec(&(&host.core, &host.os)).unwrap();
                    (host.core, host.os) = postcard::from_bytes(&saved).unwrap();
                }
                3 => {
                    host.core.reset_connections();
                    host.dial();
                }
                // The old connection is not known to be gone when the new one comes.
                4 => host.dial(),
                _ => {}
            }
        }
        host.settle();
        check(&host, &ids);
    }
}

fn greet(core: &mut AgentCore, os: &mut FakeOs, conn: u64, hello: Hello) -> Option<Frame> {
    let mut wire = BytesMut::new();
    encode(0, &Frame::Hello(hello), &mut wire);
    core.connected(ConnId(conn));
    core.received(ConnId(conn), &wire, os).unwrap();
    let mut decoder = Decoder::default();
    decoder.feed(&core.outgoing(ConnId(conn)).unwrap().split());
    decoder.next_frame().unwrap().map(|(_, frame)| frame)
}

fn hello(session: u128, resume: bool) -> Hello {
    Hello { version: PROTOCOL_VERSION, session, resume, live: Vec::new() }
}

fn welcome(resumed: bool) -> Option<Frame> {
    Some(Frame::Welcome(Welcome { version: PROTOCOL_VERSION, resumed, uptime_ns: 0 }))
}

#[test]
fn another_version_is_refused_and_leaves_the_session_alone() {
    let mut host = Host::new();
    let id = host.open_with_stdin(Request::Exec(exec(&["sleep"])), &[], false);
    host.settle();
    let (core, os) = (&mut host.core, &mut host.os);
    let other = Hello { version: PROTOCOL_VERSION + 1, ..hello(5, false) };
    let refused = Some(Frame::Refused(Refusal::Version { agent: PROTOCOL_VERSION }));
    assert_eq!(greet(core, os, 99, other), refused);
    assert_eq!(core.to_close(), [ConnId(99)]);
    assert!(!core.wants_input(ConnId(99)));
    assert_eq!(core.received(ConnId(99), b"anything", os), Ok(()));
    core.disconnected(ConnId(99));
    assert!(core.to_close().is_empty());
    assert_eq!(host.ask(Request::Signal { process: 1, signal: 15 }), Ok(Reply::Empty));
    assert!(host.streams[&id].end.is_some());
}

#[test]
fn a_connection_begins_with_a_greeting() {
    for (stream, frame) in
        [(1, Frame::Open(Request::Ping)), (1, Frame::Hello(hello(1, false))), (0, Frame::Close)]
    {
        let mut core = AgentCore::new(AgentConfig::default());
        let mut wire = BytesMut::new();
        encode(stream, &frame, &mut wire);
        core.connected(ConnId(1));
        let result = core.received(ConnId(1), &wire, &mut FakeOs::new());
        assert_eq!(result, Err(Violation::NoHello), "{frame:?}");
    }
    let mut host = Host::new();
    host.settle();
    host.send(0, &Frame::Hello(hello(1, false)));
    assert_eq!(host.carry_to_agent(usize::MAX), Err(Violation::Unexpected));
}

#[test]
fn a_newer_connection_takes_the_session_over() {
    let (mut core, mut os) = (AgentCore::new(AgentConfig::default()), FakeOs::new());
    assert_eq!(greet(&mut core, &mut os, 1, hello(5, true)), welcome(false));
    assert_eq!(greet(&mut core, &mut os, 2, hello(5, true)), welcome(true));
    assert_eq!(core.to_close(), [ConnId(1)]);
    let mut wire = BytesMut::new();
    encode(1, &Frame::Open(Request::Exec(exec(&["echo"]))), &mut wire);
    assert_eq!(core.received(ConnId(1), &wire, &mut os), Ok(()));
    assert!(os.procs.is_empty(), "nothing is heard on the old one");
    core.disconnected(ConnId(1));
    assert_eq!(greet(&mut core, &mut os, 3, hello(6, true)), welcome(false));
    assert_eq!(core.to_close(), [ConnId(2)]);
    assert_eq!(greet(&mut core, &mut os, 4, hello(6, false)), welcome(false));
}

#[test]
fn a_new_session_drops_files_and_keeps_processes() {
    let mut host = Host::new();
    host.os.put("/tmp/read", Body::File(vec![1; 1 << 20]), 0o644);
    host.consuming = false;
    host.open(Request::ReadFile { path: "/tmp/read".into() });
    let write = Request::WriteFile { path: "/tmp/written".into(), mode: None };
    host.open_with_stdin(write, b"half", false);
    host.open(Request::Exec(exec(&["gen", "1000000", "3"])));
    host.settle();
    assert_eq!(host.os.open_files(), 2);
    assert!(host.os.procs[0].exit.is_none());
    host.streams.clear();
    host.session += 1;
    host.consuming = true;
    host.cut();
    host.settle();
    assert_eq!(host.resumed, [false, false]);
    assert_eq!(host.os.open_files(), 0);
    assert!(!host.os.names().iter().any(|path| path.starts_with("/tmp/.")));
    assert!(host.os.procs[0].exit.is_some(), "nobody reads it, so nothing stalls it");
    assert!(host.os.procs[0].signals.is_empty());
    let id = host.open(Request::Attach { process: 1, stdout: 999_990, stderr: 0 });
    host.settle();
    let expected: Vec<u8> = (999_990..1_000_000).map(|at| pattern(0, at)).collect();
    assert_eq!(host.streams[&id].outs[0].bytes, expected);
    assert_eq!(host.streams[&id].outs[1].bytes.len(), 3);
}

#[test]
fn streams_that_the_host_no_longer_holds_are_closed() {
    let mut host = Host::new();
    let gone = host.open(Request::Exec(exec(&["sleep"])));
    let kept = host.open(Request::Exec(exec(&["sleep"])));
    host.settle();
    // The close is lost with the connection.
    host.close(gone);
    host.cut();
    host.settle();
    assert_eq!(host.resumed, [false, true]);
    assert_eq!(host.os.procs[0].signals, [9]);
    assert!(host.os.procs[1].signals.is_empty());
    assert!(host.streams[&kept].end.is_none());
}

#[test]
fn a_clone_goes_its_own_way() {
    let mut host = Host::new();
    host.open(Request::Exec(exec(&["sleep"])));
    host.settle();
    let (mut core, mut os) = (host.core.clone(), host.os.clone());
    core.reset_connections();
    assert!(core.outgoing(host.conn()).is_none());
    assert_eq!(greet(&mut core, &mut os, 1, hello(123, false)), welcome(false));
    assert!(host.ask(Request::Signal { process: 1, signal: 15 }).is_ok());
    assert!(os.procs[0].exit.is_none() && host.os.procs[0].exit.is_some());
}

#[test]
fn an_end_is_sent_once_on_a_connection() {
    let mut host = Host::new();
    let id = host.open(Request::Ping);
    host.settle();
    assert!(host.streams[&id].end.is_some());
    host.send(id, &Frame::Credit { channel: Channel::Stdout, consumed: 0, window: 1 });
    host.carry_to_agent(usize::MAX).unwrap();
    assert!(host.core.outgoing(host.conn()).unwrap().is_empty());
}

#[test]
fn a_failure_is_told_again_after_a_loss_though_the_input_has_ended() {
    let mut host = Host::new();
    let write = Request::WriteFile { path: "/missing/f".into(), mode: None };
    let id = host.open_with_stdin(write, b"late", true);
    host.settle();
    host.cut();
    host.settle();
    assert_eq!(host.resumed, [false, true]);
    assert_eq!(host.end(id), Err(Kind::NotFound));
}

#[test]
fn a_file_is_not_gone_on_with_before_the_host_says_from_where() {
    let (mut core, mut os) = (AgentCore::new(AgentConfig::default()), FakeOs::new());
    os.put("/tmp/f", Body::File(vec![1; 1 << 20]), 0o644);
    greet(&mut core, &mut os, 1, hello(5, false));
    // The first of them fill the connection, so the last waits with credit to spare.
    let mut wire = BytesMut::new();
    for id in 1..=6 {
        encode(id, &Frame::Open(Request::ReadFile { path: "/tmp/f".into() }), &mut wire);
    }
    core.received(ConnId(1), &wire, &mut os).unwrap();
    let resumed = Hello { live: (1..=6).collect(), ..hello(5, true) };
    assert_eq!(greet(&mut core, &mut os, 2, resumed), welcome(true));
    os.faults.insert("read".into(), Errno::IO);
    for (channel, answered) in [(Channel::Stderr, false), (Channel::Stdout, true)] {
        let mut wire = BytesMut::new();
        encode(6, &Frame::Credit { channel, consumed: 0, window: 1 }, &mut wire);
        core.received(ConnId(2), &wire, &mut os).unwrap();
        assert_eq!(!core.outgoing(ConnId(2)).unwrap().is_empty(), answered, "{channel:?}");
    }
}
