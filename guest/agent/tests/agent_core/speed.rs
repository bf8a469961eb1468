//! How long the core takes for what a simulation does most; a figure to look at, not an assertion.

use crate::{fake_os::FakeOs, host::exec};
use bytes::BytesMut;
use std::time::Instant;
use vm_guest_agent::core::{AgentConfig, AgentCore, ConnId};
use vm_guest_protocol::{ExecSpec, Frame, Hello, PROTOCOL_VERSION, Request, encode};

#[test]
#[ignore = "prints a figure; run it in release"]
#[allow(clippy::print_stderr)]
fn a_trivial_exec() {
    const ROUNDS: u32 = 200_000;
    let (mut core, mut os) = (AgentCore::new(AgentConfig::default()), FakeOs::new());
    let conn = ConnId(1);
    let hello = Hello { version: PROTOCOL_VERSION, session: 1, resume: false, live: Vec::new() };
    let mut wire = BytesMut::new();
    encode(0, &Frame::Hello(hello), &mut wire);
    core.connected(conn);
    core.received(conn, &wire, &mut os).unwrap();
    let spec: ExecSpec = exec(&["/bin/echo", "hello"]);
    let mut inside = std::time::Duration::ZERO;
    for id in 1..=ROUNDS {
        wire.clear();
        encode(id, &Frame::Open(Request::Exec(spec.clone())), &mut wire);
        let begun = Instant::now();
        core.received(conn, &wire, &mut os).unwrap();
        inside += begun.elapsed();
        os.run();
        wire.clear();
        encode(id, &Frame::Close, &mut wire);
        let begun = Instant::now();
        core.advance(&mut os);
        core.received(conn, &wire, &mut os).unwrap();
        inside += begun.elapsed();
        core.outgoing(conn).unwrap().clear();
        os.forget_all();
    }
    eprintln!("{:?} for each exec, with the fake kernel's own work", inside / ROUNDS);
}
