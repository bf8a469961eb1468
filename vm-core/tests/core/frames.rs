//! Frames and scripts out of the protocol's types, in any order.

use crate::machine::Act;
use bytes::Bytes;
use proptest::prelude::*;
use std::time::Duration;
use vm_guest_protocol::{
    Channel, EntryKind, Frame, GuestError, GuestErrorKind, Hello, PROTOCOL_VERSION, ProcessEntry,
    ProcessExit, Refusal, Reply, Request, Started, StatEntry, Welcome,
};

/// A script of one connection; most begin with a proper handshake.
pub(crate) fn script() -> impl Strategy<Value = Vec<Act>> {
    (prop::option::weighted(0.8, any::<bool>()), prop::collection::vec(act(), 0..25)).prop_map(
        |(resumed, acts)| {
            let hello = resumed.map(|resumed| Act::Frame(0, welcome(resumed)));
            hello.into_iter().chain(acts).collect()
        },
    )
}

/// The answer to a handshake.
pub(crate) fn welcome(resumed: bool) -> Frame {
    Frame::Welcome(Welcome { version: PROTOCOL_VERSION, resumed, uptime_ns: 1 })
}

fn act() -> impl Strategy<Value = Act> {
    // The host's first streams have small numbers.
    let stream = prop_oneof![8 => 1_u32..12, 1 => Just(0), 1 => any::<u32>()];
    prop_oneof![
        12 => (stream, frame()).prop_map(|(stream, frame)| Act::Frame(stream, frame)),
        2 => prop::collection::vec(any::<u8>(), 1..60).prop_map(Act::Bytes),
        1 => huge_header().prop_map(Act::Bytes),
        3 => Just(Act::Listen),
        3 => (0_u64..20_000).prop_map(|millis| Act::Wait(Duration::from_millis(millis))),
        1 => Just(Act::HangUp),
    ]
}

/// The beginning of a frame that is said to be long.
fn huge_header() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![any::<u32>(), (4_u32 << 20) - 8..(4 << 20) + 64];
    (length, any::<u32>(), any::<u8>()).prop_map(|(length, stream, kind)| {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(stream.to_le_bytes());
        bytes.extend([kind; 64]);
        bytes
    })
}

pub(crate) fn frame() -> impl Strategy<Value = Frame> {
    prop_oneof![
        1 => (any::<bool>(), any::<u16>()).prop_map(|(resumed, version)| {
            Frame::Welcome(Welcome { version, resumed, uptime_ns: 0 })
        }),
        1 => any::<u16>().prop_map(|agent| Frame::Refused(Refusal::Version { agent })),
        6 => started(),
        6 => (channel(), offset(), prop::collection::vec(any::<u8>(), 1..3000)).prop_map(
            |(channel, offset, bytes)| Frame::Data { channel, offset, bytes: Bytes::from(bytes) }
        ),
        3 => (channel(), offset()).prop_map(|(channel, offset)| Frame::Eof { channel, offset }),
        3 => (channel(), offset(), any::<u32>()).prop_map(|(channel, consumed, window)| {
            Frame::Credit { channel, consumed, window }
        }),
        4 => reply().prop_map(Frame::Done),
        3 => failed(),
        3 => exit().prop_map(Frame::Exited),
        1 => Just(Frame::Close),
        1 => Just(Frame::Open(Request::Ping)),
        1 => any::<u128>().prop_map(|session| Frame::Hello(Hello {
            version: PROTOCOL_VERSION, session, resume: false, live: vec![],
        })),
    ]
}

fn channel() -> impl Strategy<Value = Channel> {
    prop_oneof![2 => Just(Channel::Stdout), 1 => Just(Channel::Stderr), 1 => Just(Channel::Stdin)]
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![4 => Just(0_u64), 2 => 0_u64..5_000, 1 => any::<u64>(), 1 => Just(u64::MAX)]
}

fn started() -> impl Strategy<Value = Frame> {
    (any::<u64>(), any::<u32>(), offset(), offset(), any::<bool>(), offset()).prop_map(
        |(process, pid, stdout, stderr, tty, stdin)| {
            Frame::Started(Started { process, pid, stdout, stderr, tty, stdin })
        },
    )
}

fn exit() -> impl Strategy<Value = ProcessExit> {
    (any::<Option<u8>>(), any::<Option<u8>>(), any::<bool>(), any::<u64>()).prop_map(
        |(code, signal, timed_out, elapsed_ns)| ProcessExit { code, signal, timed_out, elapsed_ns },
    )
}

fn reply() -> impl Strategy<Value = Reply> {
    let entry = (any::<u64>(), any::<u32>(), ".{0,9}", prop::option::of(exit()))
        .prop_map(|(process, pid, program, exit)| ProcessEntry { process, pid, program, exit });
    prop_oneof![
        Just(Reply::Empty),
        any::<u64>().prop_map(|uptime_ns| Reply::Pong { uptime_ns }),
        (any::<u64>(), any::<u32>(), any::<u64>()).prop_map(|(size, mode, modified_ns)| {
            Reply::Stat(StatEntry {
                kind: EntryKind::Other,
                size,
                mode,
                uid: 0,
                gid: 0,
                modified_ns,
            })
        }),
        prop::collection::vec(entry, 0..4).prop_map(Reply::Processes),
    ]
}

fn failed() -> impl Strategy<Value = Frame> {
    let kind = prop::sample::select(vec![
        GuestErrorKind::NotFound,
        GuestErrorKind::OutOfSpace,
        GuestErrorKind::ProgramNotFound,
        GuestErrorKind::NoSuchProcess,
        GuestErrorKind::OutOfResources,
        GuestErrorKind::InvalidArgument,
        GuestErrorKind::Unsupported,
        GuestErrorKind::Other,
    ]);
    (kind, any::<i32>(), ".{0,9}")
        .prop_map(|(kind, errno, path)| Frame::Failed(GuestError { kind, errno, path }))
}
