//! A host's bytes: to the frame decoder, and to the agent's core over a simulated guest.
//!
//! The input is a list of moves. The first byte of a move says what it is, the second how many bytes of the input
//! belong to it (see [`Play::step`]), so that most inputs get past the handshake and the frame's header.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use std::{sync::Arc, time::Duration};
use vm_guest_agent::core::{AgentConfig, AgentCore, ConnId};
use vm_guest_protocol::{Decoder, Frame, Hello, MAX_PAYLOAD, PROTOCOL_VERSION, encode};
use vm_sim::guest::{OsConfig, ProgramRegistry, SimOs};

/// The steps that the guest's processes may make in one move.
const BUDGET: u32 = 200;

/// The most moves of one input.
const MOVES: usize = 64;

/// What the agent may hold for one connection: its bound for data and answers, and one frame more.
const OUTGOING_MAX: usize = (2 << 20) + MAX_PAYLOAD + 4096;

thread_local! {
    static GUEST: SimOs = {
        let config = OsConfig {
            memory: 16 << 20,
            vcpus: 1,
            hostname: "guest".to_owned(),
            seed: [7; 32],
            max_processes: 32,
            disks: Vec::new(),
            shares: Vec::new(),
            host_loopback: false,
        };
        SimOs::new(config, Arc::new(ProgramRegistry::new())).expect("a guest without disks")
    };
}

fuzz_target!(|input: &[u8]| {
    decode(input);
    let mut play = Play::new();
    let mut rest = input;
    for _ in 0..MOVES {
        let Some(after) = play.step(rest) else { break };
        rest = after;
    }
});

/// Decodes the input whole and in pieces: both must give the same frames, which survive being written again.
fn decode(input: &[u8]) {
    let frames = |piece: usize| {
        let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
        for bytes in input.chunks(piece) {
            decoder.feed(bytes);
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => {
                        assert_eq!(decoder.next_frame(), Err(error));
                        return frames;
                    }
                }
            }
        }
        frames
    };
    let whole = frames(input.len().max(1));
    assert_eq!(whole, frames(usize::from(input.first().copied().unwrap_or(0)) + 1));
    for (stream, frame) in whole {
        let mut wire = BytesMut::new();
        encode(stream, &frame, &mut wire);
        let mut decoder = Decoder::default();
        decoder.feed(&wire);
        assert_eq!(decoder.next_frame(), Ok(Some((stream, frame))));
        assert_eq!(decoder.buffered(), 0);
    }
}

/// An agent, its guest, and the connection on which the host speaks.
struct Play {
    core: AgentCore,
    os: SimOs,
    now: Duration,
    conn: ConnId,
}

impl Play {
    fn new() -> Self {
        let os = GUEST.with(Clone::clone);
        let mut core = AgentCore::new(AgentConfig::default());
        core.connected(ConnId(1));
        Self { core, os, now: Duration::ZERO, conn: ConnId(1) }
    }

    /// Makes the next move and gives the input after it, or `None` at the end.
    fn step<'a>(&mut self, input: &'a [u8]) -> Option<&'a [u8]> {
        let (&[kind, length], rest) = input.split_first_chunk()?;
        let (body, rest) = rest.split_at(usize::from(length).min(rest.len()));
        match kind % 16 {
            0 => self.hear(body),
            1 => self.reconnect(false),
            2 => self.reconnect(true),
            3 if kind < 128 => self.pass(Duration::from_millis(u64::from(length) * 10)),
            3 => self.pass(Duration::from_secs(u64::from(length) * 60)),
            // Types of frames, 1 to 12, on one of four streams; mostly requests, which have most to them.
            _ if kind < 128 => self.hear_frame(4, kind >> 4 & 3, body),
            other => self.hear_frame(other - 3, kind >> 4 & 3, body),
        }
        self.settle();
        Some(rest)
    }

    /// Says a frame of a type with any payload on a stream.
    fn hear_frame(&mut self, kind: u8, stream: u8, payload: &[u8]) {
        let mut wire = Vec::with_capacity(9 + payload.len());
        wire.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
        wire.extend_from_slice(&u32::from(stream).to_le_bytes());
        wire.push(kind);
        wire.extend_from_slice(payload);
        self.hear(&wire);
    }

    fn hear(&mut self, bytes: &[u8]) {
        if self.core.received(self.conn, bytes, &mut self.os).is_err() {
            self.core.disconnected(self.conn);
            self.reconnect(true);
        }
    }

    fn reconnect(&mut self, resume: bool) {
        self.conn.0 += 1;
        self.core.connected(self.conn);
        let hello = Hello { version: PROTOCOL_VERSION, session: 1, resume, live: vec![0, 1, 2, 3] };
        let mut wire = BytesMut::new();
        encode(0, &Frame::Hello(hello), &mut wire);
        let heard = self.core.received(self.conn, &wire, &mut self.os);
        assert_eq!(heard, Ok(()), "a greeting is always heard");
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.os.set_monotonic(self.now);
    }

    /// Lets guest and agent work, and checks what the host gets: whole frames, and no more than the bounds say.
    fn settle(&mut self) {
        self.os.run(BUDGET);
        self.core.advance(&mut self.os);
        let _ = (self.core.next_deadline(), self.core.interest());
        if let Some(out) = self.core.outgoing(self.conn) {
            assert!(out.len() <= OUTGOING_MAX, "{} bytes wait for the host", out.len());
            let mut decoder = Decoder::default();
            decoder.feed(&out.split());
            while decoder.next_frame().expect("the agent sends frames").is_some() {}
            assert_eq!(decoder.buffered(), 0, "the agent sends whole frames");
        }
        for conn in self.core.to_close() {
            self.core.disconnected(conn);
        }
        self.os.take_events();
    }
}
