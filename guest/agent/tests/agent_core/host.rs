//! A host that follows the protocol to the letter, checks that the agent does, and goes on after a lost connection.

use crate::fake_os::FakeOs;
use bytes::{Buf, Bytes, BytesMut};
use std::{collections::BTreeMap, time::Duration};
use vm_guest_agent::core::{AgentConfig, AgentCore, ConnId, Violation};
use vm_guest_protocol::{
    Channel, DEFAULT_WINDOW, Decoder, ExecSpec, Frame, GuestErrorKind, Hello, MAX_DATA,
    PROTOCOL_VERSION, Reply, Request, Started, encode,
};

/// An output as the host has it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Received {
    pub(crate) bytes: Vec<u8>,
    /// Offset of the first byte.
    base: u64,
    limit: u64,
    pub(crate) eof: bool,
}

/// A stream as the host has it.
#[derive(Clone, Debug)]
pub(crate) struct HostStream {
    request: Request,
    pub(crate) started: Option<Started>,
    pub(crate) outs: [Received; 2],
    stdin: Vec<u8>,
    stdin_ended: bool,
    sent: u64,
    eof_sent: bool,
    limit: u64,
    pub(crate) consumed_by_agent: u64,
    /// `Done`, `Failed` or `Exited`.
    pub(crate) end: Option<Frame>,
    /// After how many bytes of this connection the agent has been told to send on it.
    announced: Option<usize>,
}

pub(crate) struct Host {
    pub(crate) core: AgentCore,
    pub(crate) os: FakeOs,
    pub(crate) session: u128,
    pub(crate) streams: BTreeMap<u32, HostStream>,
    last: u32,
    conn: u64,
    decoder: Decoder,
    out: BytesMut,
    /// `Welcome` has come.
    ready: bool,
    pub(crate) resumed: Vec<bool>,
    /// The window that the host grants when it has consumed.
    pub(crate) window: u32,
    /// The host consumes output.
    pub(crate) consuming: bool,
    /// How many bytes have gone either way.
    pub(crate) carried: usize,
    /// How many of them have gone to the agent on this connection.
    delivered: usize,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with_config(AgentConfig::default())
    }

    pub(crate) fn with_config(config: AgentConfig) -> Self {
        let mut host = Self {
            core: AgentCore::new(config),
            os: FakeOs::new(),
            session: 77,
            streams: BTreeMap::new(),
            last: 0,
            conn: 0,
            decoder: Decoder::default(),
            out: BytesMut::new(),
            ready: false,
            resumed: Vec::new(),
            window: DEFAULT_WINDOW,
            consuming: true,
            carried: 0,
            delivered: 0,
        };
        host.dial();
        host
    }

    pub(crate) fn conn(&self) -> ConnId {
        ConnId(self.conn)
    }

    /// Dials and greets; what was on its way on the connection before is lost.
    pub(crate) fn dial(&mut self) {
        self.conn += 1;
        self.decoder = Decoder::default();
        self.out = BytesMut::new();
        self.ready = false;
        self.streams.values_mut().for_each(|stream| stream.announced = None);
        self.delivered = 0;
        self.core.connected(self.conn());
        let hello = Hello {
            version: PROTOCOL_VERSION,
            session: self.session,
            resume: self.conn > 1,
            live: self.streams.keys().copied().collect(),
        };
        self.send(0, &Frame::Hello(hello));
    }

    /// Loses the connection, and dials again.
    pub(crate) fn cut(&mut self) {
        self.core.disconnected(self.conn());
        self.dial();
    }

    pub(crate) fn send(&mut self, stream: u32, frame: &Frame) {
        encode(stream, frame, &mut self.out);
    }

    pub(crate) fn open(&mut self, request: Request) -> u32 {
        self.open_with_stdin(request, &[], false)
    }

    pub(crate) fn open_with_stdin(&mut self, request: Request, stdin: &[u8], end: bool) -> u32 {
        self.last += 1;
        let out = || Received { limit: u64::from(DEFAULT_WINDOW), ..Received::default() };
        let stream = HostStream {
            request: request.clone(),
            started: None,
            outs: [out(), out()],
            stdin: stdin.to_vec(),
            stdin_ended: end,
            sent: 0,
            eof_sent: false,
            limit: u64::from(DEFAULT_WINDOW),
            consumed_by_agent: 0,
            end: None,
            announced: None,
        };
        self.streams.insert(self.last, stream);
        if self.ready {
            self.announce_with(self.last, &Frame::Open(request));
        }
        self.last
    }

    pub(crate) fn close(&mut self, stream: u32) {
        self.streams.remove(&stream);
        if self.ready {
            self.send(stream, &Frame::Close);
        }
    }

    /// Queues the standard input that the agent may be sent.
    fn send_stdin(&mut self) {
        if !self.ready {
            return;
        }
        for (id, stream) in &mut self.streams {
            let total = stream.stdin.len() as u64;
            while stream.sent < total.min(stream.limit) {
                let from = usize::try_from(stream.sent).unwrap();
                let end = usize::try_from(total.min(stream.limit)).unwrap().min(from + MAX_DATA);
                let bytes = Bytes::copy_from_slice(&stream.stdin[from..end]);
                let frame = Frame::Data { channel: Channel::Stdin, offset: stream.sent, bytes };
                encode(*id, &frame, &mut self.out);
                stream.sent = end as u64;
            }
            if stream.stdin_ended && stream.sent == total && !stream.eof_sent {
                let frame = Frame::Eof { channel: Channel::Stdin, offset: total };
                encode(*id, &frame, &mut self.out);
                stream.eof_sent = true;
            }
        }
    }

    /// Carries at most `most` bytes to the agent.
    pub(crate) fn carry_to_agent(&mut self, most: usize) -> Result<bool, Violation> {
        self.send_stdin();
        if !self.core.wants_input(self.conn()) {
            return Ok(false);
        }
        let piece = self.out.split_to(most.min(self.out.len()));
        self.carried += piece.len();
        self.delivered += piece.len();
        self.core.received(self.conn(), &piece, &mut self.os)?;
        Ok(!piece.is_empty())
    }

    /// Carries at most `most` bytes to the host.
    pub(crate) fn carry_to_host(&mut self, most: usize) -> bool {
        let conn = self.conn();
        let Some(outgoing) = self.core.outgoing(conn) else { return false };
        let count = most.min(outgoing.len());
        self.decoder.feed(&outgoing[..count]);
        outgoing.advance(count);
        self.carried += count;
        while let Some((stream, frame)) = self.decoder.next_frame().unwrap() {
            self.frame(stream, frame);
        }
        count > 0
    }

    /// Moves everything until nothing moves any more.
    pub(crate) fn settle(&mut self) {
        while self.step(usize::MAX) {}
    }

    /// Moves at most so many bytes each way. Says whether anything moved.
    pub(crate) fn step(&mut self, most: usize) -> bool {
        self.os.run();
        let sent = self.carry_to_agent(most).unwrap();
        let advanced = self.core.advance(&mut self.os);
        let got = self.carry_to_host(most);
        let due = self.core.next_deadline() == Some(Duration::ZERO);
        sent || advanced || got || due
    }

    fn frame(&mut self, id: u32, frame: Frame) {
        if let Frame::Welcome(welcome) = frame {
            assert_eq!(id, 0);
            self.ready = true;
            self.resumed.push(welcome.resumed);
            self.announce();
            return;
        }
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if let Frame::Credit { channel, consumed, window } = frame {
            assert_eq!(channel, Channel::Stdin);
            assert!(consumed >= stream.consumed_by_agent, "consumed never goes back");
            assert!(consumed <= stream.stdin.len() as u64);
            stream.consumed_by_agent = consumed;
            stream.limit = stream.limit.max(consumed + u64::from(window));
            return;
        }
        let announced = stream.announced.is_some_and(|at| at <= self.delivered);
        assert!(announced, "nothing comes before the host has announced the stream");
        match frame {
            Frame::Started(started) => {
                let consumed = stream.consumed_by_agent;
                assert!(consumed == 0 || consumed >= started.stdin, "credit is for this stream");
                if stream.started.is_none() {
                    stream.outs[0].base = started.stdout;
                    stream.outs[1].base = started.stderr;
                    stream.outs[0].limit = started.stdout + u64::from(DEFAULT_WINDOW);
                    stream.outs[1].limit = started.stderr + u64::from(DEFAULT_WINDOW);
                }
                stream.started = Some(started);
            }
            Frame::Data { channel, offset, bytes } => {
                let out = &mut stream.outs[channel as usize - 1];
                assert!(stream.started.is_some() && !out.eof);
                let have = out.base + out.bytes.len() as u64;
                assert!(offset <= have, "no gap");
                assert!(offset + bytes.len() as u64 <= out.limit, "never beyond the window");
                let known = usize::try_from(have - offset).unwrap().min(bytes.len());
                out.bytes.extend_from_slice(&bytes[known..]);
                if self.consuming {
                    let consumed = out.base + out.bytes.len() as u64;
                    out.limit = out.limit.max(consumed + u64::from(self.window));
                    let window = self.window;
                    self.send(id, &Frame::Credit { channel, consumed, window });
                }
            }
            Frame::Eof { channel, offset } => {
                let out = &mut stream.outs[channel as usize - 1];
                assert_eq!(
                    offset,
                    out.base + out.bytes.len() as u64,
                    "the end is after the last byte"
                );
                out.eof = true;
            }
            end @ (Frame::Done(_) | Frame::Failed(_) | Frame::Exited(_)) => {
                if matches!(end, Frame::Exited(_)) {
                    assert!(stream.outs.iter().all(|out| out.eof), "the end comes last");
                }
                if let Some(known) = &stream.end {
                    assert_eq!(*known, end, "a repeated end is the same");
                }
                stream.end = Some(end);
            }
            other => panic!("the agent does not send {other:?}"),
        }
    }

    /// Announces the streams on a new connection.
    fn announce(&mut self) {
        let resumed = self.resumed.last() == Some(&true);
        let mut frames = Vec::new();
        for (id, stream) in &mut self.streams {
            // Until the agent says how far it is, it may have nothing.
            stream.sent = stream.consumed_by_agent;
            stream.eof_sent = false;
            if stream.started.is_none() && stream.end.is_none() || !resumed {
                frames.push((*id, Frame::Open(stream.request.clone())));
                continue;
            }
            for (out, channel) in stream.outs.iter().zip([Channel::Stdout, Channel::Stderr]) {
                let consumed = out.base + out.bytes.len() as u64;
                let window = u32::try_from(out.limit.saturating_sub(consumed)).unwrap();
                frames.push((*id, Frame::Credit { channel, consumed, window }));
            }
        }
        for (id, frame) in frames {
            self.announce_with(id, &frame);
        }
    }

    fn announce_with(&mut self, id: u32, frame: &Frame) {
        self.send(id, frame);
        let at = self.delivered + self.out.len();
        self.streams.get_mut(&id).unwrap().announced.get_or_insert(at);
    }

    /// Opens a stream and gives how it ended.
    pub(crate) fn ask(&mut self, request: Request) -> Result<Reply, GuestErrorKind> {
        let id = self.open(request);
        self.settle();
        self.end(id)
    }

    /// Closes a stream and gives how it ended.
    pub(crate) fn end(&mut self, id: u32) -> Result<Reply, GuestErrorKind> {
        let end = self.streams[&id].end.clone();
        self.close(id);
        self.settle();
        match end {
            Some(Frame::Done(reply)) => Ok(reply),
            Some(Frame::Failed(error)) => Err(error.kind),
            other => panic!("stream {id} ended with {other:?}"),
        }
    }

    pub(crate) fn write(
        &mut self,
        path: &str,
        content: &[u8],
        mode: Option<u32>,
    ) -> Result<Reply, GuestErrorKind> {
        let request = Request::WriteFile { path: path.to_owned(), mode };
        let id = self.open_with_stdin(request, content, true);
        self.settle();
        self.end(id)
    }

    /// How much standard input was put on its way.
    pub(crate) fn stdin_sent(&self, id: u32) -> u64 {
        self.streams[&id].sent
    }

    /// Takes note that the agent was allowed to send up to an offset of standard output.
    pub(crate) fn allow(&mut self, id: u32, limit: u64) {
        self.streams.get_mut(&id).unwrap().outs[0].limit = limit;
    }

    /// Goes on with standard input that another stream has begun.
    pub(crate) fn continue_stdin(&mut self, id: u32, from: usize, bytes: &[u8], end: bool) {
        let stream = self.streams.get_mut(&id).unwrap();
        stream.stdin = vec![0; from];
        stream.sent = from as u64;
        self.more_stdin(id, bytes, end);
    }

    pub(crate) fn more_stdin(&mut self, id: u32, bytes: &[u8], end: bool) {
        let stream = self.streams.get_mut(&id).unwrap();
        stream.stdin.extend_from_slice(bytes);
        stream.stdin_ended = end;
    }
}

pub(crate) fn exec(words: &[&str]) -> ExecSpec {
    ExecSpec {
        program: words[0].to_owned(),
        args: words[1..].iter().map(|&word| word.to_owned()).collect(),
        ..ExecSpec::default()
    }
}
