use super::*;
use crate::message::{
    EntryKind, ExecSpec, GuestErrorKind, ListedDir, ProcessEntry, ResourceLimit, StatEntry,
    TermSize, UserSpec,
};
use proptest::{collection::vec, option, prelude::*};

fn channel() -> impl Strategy<Value = Channel> {
    prop_oneof![Just(Channel::Stdin), Just(Channel::Stdout), Just(Channel::Stderr)]
}

fn entry_kind() -> impl Strategy<Value = EntryKind> {
    prop_oneof![
        Just(EntryKind::File),
        Just(EntryKind::Directory),
        Just(EntryKind::Symlink),
        Just(EntryKind::Other)
    ]
}

fn size() -> impl Strategy<Value = TermSize> {
    any::<(u16, u16)>().prop_map(|(rows, cols)| TermSize { rows, cols })
}

fn exec() -> impl Strategy<Value = ExecSpec> {
    let user = prop_oneof![
        any::<(u32, u32)>().prop_map(|(uid, gid)| UserSpec::Ids { uid, gid }),
        any::<String>().prop_map(UserSpec::Name),
    ];
    (
        any::<(String, Vec<String>, Vec<(String, String)>, Option<String>)>(),
        option::of(user),
        option::of(size()),
        any::<(Option<u64>, bool, bool)>(),
        vec(any::<(u8, u64, u64)>(), 0..=crate::MAX_LIMITS),
    )
        .prop_map(|((program, args, env, cwd), user, tty, others, limits)| {
            let (timeout_ns, stdin, lazy_start) = others;
            let limits = limits
                .into_iter()
                .map(|(resource, soft, hard)| ResourceLimit { resource, soft, hard })
                .collect();
            ExecSpec { program, args, env, cwd, user, tty, timeout_ns, stdin, limits, lazy_start }
        })
}

fn request() -> impl Strategy<Value = Request> {
    let path = any::<String>;
    prop_oneof![
        Just(Request::Ping),
        exec().prop_map(Request::Exec),
        any::<(u64, u64, u64)>().prop_map(|(process, stdout, stderr)| Request::Attach {
            process,
            stdout,
            stderr
        }),
        Just(Request::Processes),
        path().prop_map(|path| Request::ReadFile { path }),
        (path(), any::<Option<u32>>()).prop_map(|(path, mode)| Request::WriteFile { path, mode }),
        path().prop_map(|path| Request::Stat { path }),
        path().prop_map(|path| Request::ListDir { path }),
        (path(), any::<(u32, bool)>()).prop_map(|(path, (mode, recursive))| Request::CreateDir {
            path,
            mode,
            recursive
        }),
        (path(), any::<bool>()).prop_map(|(path, recursive)| Request::Remove { path, recursive }),
        (path(), path()).prop_map(|(from, to)| Request::Rename { from, to }),
        any::<u64>().prop_map(|wall_ns| Request::SetClock { wall_ns }),
        any::<[u8; 32]>().prop_map(|entropy| Request::Reseed { entropy }),
        any::<(u8, u64)>().prop_map(|(signal, grace_ns)| Request::Shutdown { signal, grace_ns }),
        any::<(u64, u8)>().prop_map(|(process, signal)| Request::Signal { process, signal }),
        (any::<u64>(), size()).prop_map(|(process, size)| Request::Resize { process, size }),
        any::<u64>().prop_map(|process| Request::Detach { process }),
    ]
}

fn exit() -> impl Strategy<Value = ProcessExit> {
    any::<(Option<u8>, Option<u8>, bool, u64)>().prop_map(
        |(code, signal, timed_out, elapsed_ns)| ProcessExit { code, signal, timed_out, elapsed_ns },
    )
}

fn reply() -> impl Strategy<Value = Reply> {
    let kind = prop_oneof![
        Just(EntryKind::File),
        Just(EntryKind::Directory),
        Just(EntryKind::Symlink),
        Just(EntryKind::Other)
    ];
    let stat = (kind, any::<(u64, u32, u32, u32, u64)>()).prop_map(
        |(kind, (size, mode, uid, gid, modified_ns))| StatEntry {
            kind,
            size,
            mode,
            uid,
            gid,
            modified_ns,
        },
    );
    let entry = (any::<(u64, u32, String)>(), option::of(exit()))
        .prop_map(|((process, pid, program), exit)| ProcessEntry { process, pid, program, exit });
    prop_oneof![
        Just(Reply::Empty),
        any::<u64>().prop_map(|uptime_ns| Reply::Pong { uptime_ns }),
        stat.prop_map(Reply::Stat),
        vec(entry, 0..4).prop_map(Reply::Processes),
    ]
}

fn frame() -> impl Strategy<Value = Frame> {
    prop_oneof![
        any::<(u128, bool, Vec<u32>)>().prop_map(|(session, resume, live)| Frame::Hello(Hello {
            version: PROTOCOL_VERSION,
            session,
            resume,
            live
        })),
        any::<(u16, bool, u64)>().prop_map(|(version, resumed, uptime_ns)| Frame::Welcome(
            Welcome { version, resumed, uptime_ns }
        )),
        any::<u16>().prop_map(|agent| Frame::Refused(Refusal::Version { agent })),
        request().prop_map(Frame::Open),
        any::<(u64, u32, u64, u64, bool, u64)>().prop_map(
            |(process, pid, stdout, stderr, tty, stdin)| Frame::Started(Started {
                process,
                pid,
                stdout,
                stderr,
                tty,
                stdin
            })
        ),
        (channel(), 0..u64::MAX / 2, vec(any::<u8>(), 1..300)).prop_map(
            |(channel, offset, bytes)| Frame::Data { channel, offset, bytes: bytes.into() }
        ),
        (channel(), any::<u64>()).prop_map(|(channel, offset)| Frame::Eof { channel, offset }),
        (channel(), any::<(u64, u32)>()).prop_map(|(channel, (consumed, window))| {
            Frame::Credit { channel, consumed, window }
        }),
        reply().prop_map(Frame::Done),
        (any::<i32>(), any::<String>()).prop_map(|(errno, path)| Frame::Failed(GuestError {
            kind: GuestErrorKind::OutOfSpace,
            errno,
            path
        })),
        exit().prop_map(Frame::Exited),
        Just(Frame::Close),
    ]
}

/// Takes all frames out, as far as they go.
fn drain(decoder: &mut Decoder, frames: &mut Vec<(StreamId, Frame)>) -> Result<(), DecodeError> {
    while let Some(frame) = decoder.next_frame()? {
        frames.push(frame);
    }
    Ok(())
}

proptest! {
    #[test]
    fn frames_come_back_whole_however_the_bytes_are_cut(
        sent in vec((any::<u32>(), frame()), 1..4),
        cuts in vec(any::<prop::sample::Index>(), 0..6),
    ) {
        let mut wire = BytesMut::new();
        for (stream, frame) in &sent {
            encode(*stream, frame, &mut wire);
        }
        let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(wire.len())).collect();
        places.extend([0, wire.len()]);
        places.sort_unstable();
        let (mut decoder, mut got) = (Decoder::default(), Vec::new());
        for piece in places.windows(2) {
            decoder.feed(&wire[piece[0]..piece[1]]);
            drain(&mut decoder, &mut got).unwrap();
        }
        prop_assert_eq!(got, sent);
        prop_assert_eq!(decoder.buffered(), 0);
    }

    #[test]
    fn every_cut_in_two_gives_the_frame_only_with_its_last_byte(
        stream in any::<u32>(),
        frame in frame(),
    ) {
        let mut wire = BytesMut::new();
        encode(stream, &frame, &mut wire);
        for cut in 0..wire.len() {
            let mut decoder = Decoder::default();
            decoder.feed(&wire[..cut]);
            prop_assert_eq!(decoder.next_frame(), Ok(None));
            let bytes = postcard::to_allocvec(&decoder).unwrap();
            let mut decoder: Decoder = postcard::from_bytes(&bytes).unwrap();
            decoder.feed(&wire[cut..]);
            prop_assert_eq!(decoder.next_frame(), Ok(Some((stream, frame.clone()))));
        }
    }

    #[test]
    fn any_bytes_are_frames_or_an_error_that_stays(bytes in vec(any::<u8>(), 0..200)) {
        let mut decoder = Decoder::default();
        decoder.feed(&bytes);
        if let Err(error) = drain(&mut decoder, &mut Vec::new()) {
            decoder.feed(&[0; 64]);
            prop_assert_eq!(decoder.next_frame(), Err(error));
        }
    }

    /// Random bytes seldom have a plausible header; these always do, so that payload decoding is reached.
    #[test]
    fn any_payload_of_any_type_is_a_frame_or_an_error(
        kind in 0_u8..20,
        payload in vec(any::<u8>(), 0..100),
    ) {
        let mut wire = BytesMut::new();
        wire.put_u32_le(u32::try_from(payload.len()).unwrap());
        wire.put_u32_le(7);
        wire.put_u8(kind);
        wire.put_slice(&payload);
        let mut decoder = Decoder::default();
        decoder.feed(&wire);
        match decoder.next_frame() {
            Ok(Some((stream, _))) => prop_assert_eq!(stream, 7),
            Ok(None) => prop_assert!(false, "the frame is whole"),
            Err(DecodeError::UnknownType(it)) => prop_assert!(it == kind && !(1..=12).contains(&kind)),
            Err(error) => prop_assert_eq!(error, DecodeError::Malformed(kind)),
        }
    }

    /// A damaged frame is refused, or is another frame; it never panics.
    #[test]
    fn damage_anywhere_is_survived(
        frame in frame(),
        at in any::<prop::sample::Index>(),
        to in any::<u8>(),
    ) {
        let mut wire = BytesMut::new();
        encode(1, &frame, &mut wire);
        let at = at.index(wire.len());
        wire[at] = to;
        let mut decoder = Decoder::default();
        decoder.feed(&wire);
        let _ = drain(&mut decoder, &mut Vec::new());
    }

    #[test]
    fn bytes_after_a_payload_are_refused(frame in frame()) {
        // Data has no end of its own.
        prop_assume!(!matches!(frame, Frame::Data { .. }));
        let mut wire = BytesMut::new();
        encode(1, &frame, &mut wire);
        wire.put_u8(0);
        finish(0, &mut wire);
        let mut decoder = Decoder::default();
        decoder.feed(&wire);
        prop_assert_eq!(decoder.next_frame(), Err(DecodeError::Malformed(type_of(&frame))));
    }

    #[test]
    fn data_is_encoded_the_same_with_and_without_bytes(
        channel in channel(),
        offset in 0..u64::MAX / 2,
        bytes in vec(any::<u8>(), 1..100),
    ) {
        let (mut one, mut other) = (BytesMut::new(), BytesMut::new());
        encode_data(9, channel, offset, &bytes, &mut one);
        encode(9, &Frame::Data { channel, offset, bytes: bytes.into() }, &mut other);
        prop_assert_eq!(one, other);
    }

    #[test]
    fn another_version_is_understood_as_far_as_its_number(
        version in any::<u16>(),
        rest in vec(any::<u8>(), 0..50),
    ) {
        prop_assume!(version != PROTOCOL_VERSION);
        let mut payload = postcard::to_allocvec(&version).unwrap();
        payload.extend(rest);
        let frame = decode(kind::HELLO, &payload).unwrap();
        prop_assert_eq!(frame, Frame::Hello(Hello { version, session: 0, resume: false, live: Vec::new() }));
    }
}

fn header(length: u32, kind: u8) -> Decoder {
    let mut wire = BytesMut::new();
    wire.put_u32_le(length);
    wire.put_u32_le(1);
    wire.put_u8(kind);
    let mut decoder = Decoder::default();
    decoder.feed(&wire);
    decoder
}

#[test]
fn a_length_above_the_limit_is_refused_before_its_bytes_come() {
    let limit = u32::try_from(MAX_PAYLOAD).unwrap();
    assert_eq!(header(limit, kind::OPEN).next_frame(), Ok(None));
    for length in [limit + 1, u32::MAX] {
        assert_eq!(header(length, kind::OPEN).next_frame(), Err(DecodeError::TooLong(length)));
    }
}

#[test]
fn data_has_between_one_byte_and_the_limit() {
    for (length, good) in [(0, false), (1, true), (MAX_DATA, true), (MAX_DATA + 1, false)] {
        let mut payload = vec![1];
        payload.extend(5_u64.to_le_bytes());
        payload.resize(RAW + length, b'x');
        assert_eq!(decode(kind::DATA, &payload).is_ok(), good, "{length} bytes");
    }
}

#[test]
fn data_whose_offsets_overflow_is_refused() {
    let mut payload = vec![1];
    payload.extend(u64::MAX.to_le_bytes());
    payload.push(b'x');
    assert_eq!(decode(kind::DATA, &payload), Err(DecodeError::Malformed(kind::DATA)));
}

#[test]
fn a_request_fits_exactly_up_to_the_limit() {
    let request = |length| Request::Stat { path: "x".repeat(length) };
    let overhead =
        postcard::to_allocvec(&request(MAX_PAYLOAD - 16)).unwrap().len() + 16 - MAX_PAYLOAD;
    let most = request(MAX_PAYLOAD - overhead);
    assert!(fits(&most));
    assert!(!fits(&request(MAX_PAYLOAD - overhead + 1)));
    let mut wire = BytesMut::new();
    encode(1, &Frame::Open(most.clone()), &mut wire);
    let mut decoder = Decoder::default();
    decoder.feed(&wire);
    assert_eq!(decoder.next_frame(), Ok(Some((1, Frame::Open(most)))));
}

#[test]
fn long_lists_are_refused_however_short_their_items() {
    let request =
        |args| Request::Exec(ExecSpec { args: vec![String::new(); args], ..ExecSpec::default() });
    for (args, good) in [(MAX_LIST, true), (MAX_LIST + 1, false)] {
        let payload = postcard::to_allocvec(&request(args)).unwrap();
        assert_eq!(decode(kind::OPEN, &payload).is_ok(), good, "{args}");
        assert_eq!(fits(&request(args)), good, "{args}");
    }
}

#[test]
fn bytes_that_are_read_into_the_buffer_are_counted_until_they_are_taken_out() {
    let mut bytes = BytesMut::new();
    encode_data(7, Channel::Stdout, 1 << 40, b"some", &mut bytes);
    let mut decoder = Decoder::default();
    assert_eq!(decoder.buffered(), 0);
    decoder.buffer_mut().extend_from_slice(&bytes);
    decoder.buffer_mut().extend_from_slice(b"xy");
    assert_eq!(decoder.buffered(), bytes.len() + 2);
    let data = Frame::Data {
        channel: Channel::Stdout,
        offset: 1 << 40,
        bytes: Bytes::from_static(b"some"),
    };
    assert_eq!(decoder.next_frame(), Ok(Some((7, data))));
    assert_eq!(decoder.buffered(), 2);
}

proptest! {
    #[test]
    fn listings_come_back_whole_and_others_are_refused(
        names in vec((any::<String>(), entry_kind()), 0..70),
        cut: prop::sample::Index,
    ) {
        let listed = ListedDir { entries: names };
        let bytes = listed.to_bytes();
        prop_assert_eq!(ListedDir::from_bytes(&bytes), Ok(listed));
        prop_assert!(ListedDir::from_bytes(&bytes[..cut.index(bytes.len())]).is_err());
    }
}

#[test]
fn what_a_peer_may_hold_has_the_sizes_that_were_agreed() {
    // Both sides reckon with them without telling each other.
    let sizes = [MAX_DATA, crate::DEFAULT_WINDOW as usize, MAX_PAYLOAD];
    assert_eq!(sizes, [65_536, 262_144, 4_194_304]);
    let counts = [MAX_LIST, crate::MAX_LIMITS, crate::MAX_ENTRIES];
    assert_eq!(counts, [131_072, 16, 1_048_576]);
}
