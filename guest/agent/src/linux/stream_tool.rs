//! The agent's binary called as `vsock` or `tcp`: streams between the guest's programs and the host.
//!
//! `vsock connect PORT` connects to the host, `tcp connect [ADDRESS] PORT` to an IPv4 address, the loopback one where
//! none is given; `listen PORT` takes one connection, over TCP at any address of the machine. Each copies standard input
//! to the stream, ending it where the input ends, and the stream to standard output, and exits when the stream ends, with
//! 0. `listen --echo PORT` sends back what comes on any number of connections until it is killed. `listen` says
//! `listening` on standard error once it does. The exit code is 1 when a connection cannot be made or breaks, 2 when the
//! command line makes no sense.

use super::ffi;
use rustix::{
    event::{PollFd, PollFlags},
    fs::{FileType, OFlags},
    io::{Errno as Sys, retry_on_intr},
    net::{AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType},
};
use std::{
    ffi::OsString,
    fmt::Display,
    io::{self, Write},
    net::{Ipv4Addr, SocketAddrV4},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// What carries the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Vsock, to the host.
    Vsock,
    /// TCP over IPv4.
    Tcp,
}

impl Transport {
    /// Lists both.
    pub const ALL: [Self; 2] = [Self::Vsock, Self::Tcp];

    /// Gives the name by which the binary is called.
    #[must_use]
    pub fn tool(self) -> &'static str {
        match self {
            Self::Vsock => "vsock",
            Self::Tcp => "tcp",
        }
    }

    /// Gives how the tool says what is wrong with its command line.
    #[must_use]
    pub fn usage(self) -> &'static str {
        match self {
            Self::Vsock => {
                "\
usage: vsock connect PORT         connect to the host's port, and to standard input and output
       vsock listen PORT          the same with the first connection to this machine's port
       vsock listen --echo PORT   send back what comes, on every connection"
            }
            Self::Tcp => {
                "\
usage: tcp connect [ADDRESS] PORT  connect to an IPv4 address, 127.0.0.1 if none is given, and to
                                   standard input and output
       tcp listen PORT             the same with the first connection to this machine's port
       tcp listen --echo PORT      send back what comes, on every connection"
            }
        }
    }
}

const EXIT_FAILED: u8 = 1;
const EXIT_USAGE: u8 = 2;

/// The context id of the host; see vsock(7).
const HOST: u32 = 2;

/// How much is held for one direction.
const BUFFER: usize = 64 << 10;

/// What poll(2) promises room for on a pipe that can be written to: one page.
const SAFE_WRITE: usize = 4096;

/// The most connections that are echoed at a time; more wait.
const MAX_ECHOED: usize = 256;

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Connect(Place),
    Listen(Place),
    Echo(Place),
}

/// Where to connect to, or to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// A port of the host to connect to, or of this machine to listen on.
    Vsock(u32),
    Tcp(SocketAddrV4),
}

/// Does what a command line, without the tool's own name, asks for, and gives the code to exit with.
#[must_use]
pub fn main(transport: Transport, arguments: &[OsString]) -> u8 {
    let Some(mode) = parse(transport, arguments) else {
        say(&transport.usage());
        return EXIT_USAGE;
    };
    let result = match mode {
        Mode::Connect(place) => connect(place).and_then(|stream| join(&stream)),
        Mode::Listen(place) => listen(place).and_then(|listener| {
            let stream = retry_on_intr(|| rustix::net::accept_with(&listener, STREAM_FLAGS))?;
            drop(listener);
            join(&stream)
        }),
        Mode::Echo(place) => listen(place).and_then(|listener| echo(&listener)),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            let (Mode::Connect(place) | Mode::Listen(place) | Mode::Echo(place)) = mode;
            let port = match place {
                Place::Vsock(port) => port,
                Place::Tcp(address) => address.port().into(),
            };
            say(&format_args!("{}: port {port}: {error}", transport.tool()));
            EXIT_FAILED
        }
    }
}

fn parse(transport: Transport, arguments: &[OsString]) -> Option<Mode> {
    let words: Vec<&str> = arguments.iter().map(|word| word.to_str()).collect::<Option<_>>()?;
    let place = |address: Ipv4Addr, text: &str| {
        text.bytes().all(|byte| byte.is_ascii_digit()).then_some(())?;
        Some(match transport {
            // The highest number stands for "any port" and names none.
            Transport::Vsock => Place::Vsock(text.parse().ok().filter(|port| *port != u32::MAX)?),
            Transport::Tcp => Place::Tcp(SocketAddrV4::new(address, text.parse().ok()?)),
        })
    };
    match words[..] {
        ["connect", port] => place(Ipv4Addr::LOCALHOST, port).map(Mode::Connect),
        ["connect", address, port] if transport == Transport::Tcp => {
            place(address.parse().ok()?, port).map(Mode::Connect)
        }
        ["listen", port] => place(Ipv4Addr::UNSPECIFIED, port).map(Mode::Listen),
        ["listen", "--echo", port] => place(Ipv4Addr::UNSPECIFIED, port).map(Mode::Echo),
        _ => None,
    }
}

const STREAM_FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

fn connect(place: Place) -> io::Result<OwnedFd> {
    let socket = socket(place)?;
    match place {
        Place::Vsock(port) => ffi::vsock_connect(socket.as_fd(), HOST, port)?,
        Place::Tcp(address) => retry_on_intr(|| rustix::net::connect(&socket, &address))?,
    }
    let flags = rustix::fs::fcntl_getfl(&socket)?;
    rustix::fs::fcntl_setfl(&socket, flags | OFlags::NONBLOCK)?;
    Ok(socket)
}

fn listen(place: Place) -> io::Result<OwnedFd> {
    let socket = socket(place)?;
    match place {
        Place::Vsock(port) => ffi::vsock_bind(socket.as_fd(), port)?,
        Place::Tcp(address) => {
            // Connections of a listener before may still be on their way out.
            rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
            rustix::net::bind(&socket, &address)?;
        }
    }
    rustix::net::listen(&socket, 128)?;
    say(&"listening");
    Ok(socket)
}

/// Makes a socket that waits.
fn socket(place: Place) -> io::Result<OwnedFd> {
    let family = match place {
        Place::Vsock(_) => AddressFamily::VSOCK,
        Place::Tcp(_) => AddressFamily::INET,
    };
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(family, SocketType::STREAM, flags, None)?)
}

fn join(stream: &OwnedFd) -> io::Result<()> {
    relay(stream.as_fd(), rustix::stdio::stdin(), rustix::stdio::stdout())
}

/// Bytes on their way in one direction.
struct Pipe {
    bytes: Vec<u8>,
    /// How many of them are written.
    written: usize,
    /// Whether the source has no more.
    ended: bool,
}

impl Pipe {
    fn new() -> Self {
        Self { bytes: Vec::with_capacity(BUFFER), written: 0, ended: false }
    }

    fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    /// Whether the source is to be read.
    fn wants(&self) -> bool {
        self.is_empty() && !self.ended
    }

    /// Whether everything is written and nothing will follow.
    fn done(&self) -> bool {
        self.is_empty() && self.ended
    }

    /// Reads from the source, which can be read.
    fn fill(&mut self, source: BorrowedFd<'_>) -> rustix::io::Result<()> {
        self.bytes.resize(BUFFER, 0);
        let read = retry_on_intr(|| rustix::io::read(source, &mut self.bytes[..]));
        self.written = 0;
        self.bytes.truncate(*read.as_ref().unwrap_or(&0));
        match read {
            Ok(count) => self.ended = count == 0,
            Err(Sys::AGAIN) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Takes note of a write.
    fn wrote(&mut self, written: rustix::io::Result<usize>) -> rustix::io::Result<()> {
        match written {
            Ok(count) => self.written += count,
            Err(Sys::AGAIN) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Sends what it holds on a stream.
    fn send(&mut self, stream: BorrowedFd<'_>) -> rustix::io::Result<()> {
        let rest = &self.bytes[self.written..];
        let sent = retry_on_intr(|| rustix::net::send(stream, rest, SendFlags::NOSIGNAL));
        self.wrote(sent)
    }

    /// Drops what it holds: nobody takes it any more.
    fn give_up(&mut self) {
        self.bytes.clear();
        self.written = 0;
        self.ended = true;
    }
}

/// Copies `input` to a non-blocking stream and the stream to `output`, until the stream ends.
fn relay(stream: BorrowedFd<'_>, input: BorrowedFd<'_>, output: BorrowedFd<'_>) -> io::Result<()> {
    let (mut out, mut back) = (Pipe::new(), Pipe::new());
    let mut half_closed = false;
    // The output may be shared with others, so it is left as it is, and asked for no more than what does not block.
    let is_file = rustix::fs::fstat(output)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    let piece = if is_file { BUFFER } else { SAFE_WRITE };
    while !back.done() {
        if out.done() && !half_closed {
            half_closed = true;
            // It may be closed altogether already.
            let _ = rustix::net::shutdown(stream, Shutdown::Write);
        }
        let mut on_stream = PollFlags::empty();
        on_stream.set(PollFlags::IN, back.wants());
        on_stream.set(PollFlags::OUT, !out.is_empty());
        let on_output = if back.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        let on_input = if out.wants() { PollFlags::IN } else { PollFlags::empty() };
        let ready = wait(&[(stream, on_stream), (input, on_input), (output, on_output)])?;
        if ready[1] {
            // An input that cannot be read has no more to say.
            if out.fill(input).is_err() {
                out.give_up();
            }
        }
        // A peer that hears no more may still have something to say.
        if ready[0] && !out.is_empty() && out.send(stream).is_err() {
            out.give_up();
        }
        if ready[0] && back.wants() {
            back.fill(stream)?;
        }
        if ready[2] {
            let rest = &back.bytes[back.written..];
            let rest = &rest[..rest.len().min(piece)];
            let written = retry_on_intr(|| rustix::io::write(output, rest));
            back.wrote(written)?;
        }
    }
    Ok(())
}

/// Sends back what comes on every connection.
fn echo(listener: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(listener)?;
    rustix::fs::fcntl_setfl(listener, flags | OFlags::NONBLOCK)?;
    let mut streams: Vec<(OwnedFd, Pipe)> = Vec::new();
    loop {
        let accepts = if streams.len() < MAX_ECHOED { PollFlags::IN } else { PollFlags::empty() };
        let mut asked = vec![(listener.as_fd(), accepts)];
        asked.extend(streams.iter().map(|(stream, pipe)| {
            let flags = if pipe.is_empty() { PollFlags::IN } else { PollFlags::OUT };
            (stream.as_fd(), flags)
        }));
        let ready = wait(&asked)?;
        let mut at = 0;
        streams.retain_mut(|(stream, pipe)| {
            at += 1;
            // Closing it tells the peer how it ended.
            !ready[at] || (echo_once(stream.as_fd(), pipe).is_ok() && !pipe.done())
        });
        if ready[0] {
            match rustix::net::accept_with(listener, STREAM_FLAGS) {
                Ok(stream) => streams.push((stream, Pipe::new())),
                // The one that was there has gone again.
                Err(Sys::AGAIN | Sys::INTR | Sys::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn echo_once(stream: BorrowedFd<'_>, pipe: &mut Pipe) -> rustix::io::Result<()> {
    if pipe.wants() {
        pipe.fill(stream)?;
    }
    if pipe.is_empty() { Ok(()) } else { pipe.send(stream) }
}

/// Waits until one of the descriptors is ready for what is asked of it; those of which nothing is asked are left out.
fn wait(asked: &[(BorrowedFd<'_>, PollFlags)]) -> io::Result<Vec<bool>> {
    let wanted = |flags: &PollFlags| !flags.is_empty();
    let mut polled: Vec<PollFd<'_>> = asked
        .iter()
        .filter(|(_, flags)| wanted(flags))
        .map(|(fd, flags)| PollFd::from_borrowed_fd(*fd, *flags))
        .collect();
    retry_on_intr(|| rustix::event::poll(&mut polled, None))?;
    let mut results = polled.iter().map(|fd| !fd.revents().is_empty());
    Ok(asked.iter().map(|(_, flags)| wanted(flags) && results.next().unwrap_or(false)).collect())
}

fn say(what: &dyn Display) {
    // With standard error gone there is nobody to tell.
    let _ = io::stderr().write_all(format!("{what}\n").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{
        io::Read,
        net::Shutdown as Half,
        os::unix::net::UnixStream,
        thread::{self, JoinHandle},
    };

    fn parsed(transport: Transport, line: &str) -> Option<Mode> {
        parse(transport, &line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    /// Relays between the peer of the first stream given and the two others: the input's writer, the output's reader.
    fn relaying() -> (UnixStream, UnixStream, UnixStream, JoinHandle<io::Result<()>>) {
        let (stream, peer) = UnixStream::pair().unwrap();
        let (input, writer) = UnixStream::pair().unwrap();
        let (output, reader) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let worker = thread::spawn(move || relay(stream.as_fd(), input.as_fd(), output.as_fd()));
        (peer, writer, reader, worker)
    }

    fn all_of(mut stream: impl Read) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn command_lines_are_understood_or_refused() {
        let vsock = |port| Some(Place::Vsock(port));
        let of_vsock = |line| parsed(Transport::Vsock, line);
        assert_eq!(of_vsock("connect 7"), vsock(7).map(Mode::Connect));
        assert_eq!(of_vsock("listen 4294967294"), vsock(u32::MAX - 1).map(Mode::Listen));
        assert_eq!(of_vsock("listen --echo 0"), vsock(0).map(Mode::Echo));
        let tcp =
            |address: [u8; 4], port| Some(Place::Tcp(SocketAddrV4::new(address.into(), port)));
        let of_tcp = |line| parsed(Transport::Tcp, line);
        assert_eq!(of_tcp("connect 7"), tcp([127, 0, 0, 1], 7).map(Mode::Connect));
        assert_eq!(of_tcp("connect 10.1.2.3 7"), tcp([10, 1, 2, 3], 7).map(Mode::Connect));
        assert_eq!(of_tcp("listen 65535"), tcp([0; 4], 65_535).map(Mode::Listen));
        assert_eq!(of_tcp("listen --echo 0"), tcp([0; 4], 0).map(Mode::Echo));
        for transport in Transport::ALL {
            for bad in [
                "",
                "connect",
                "connect x",
                "connect -1",
                "connect +1",
                "connect 1 2",
                "connect 10.1.2.3 2 3",
                "listen",
                "listen --echo",
                "listen 1 --echo",
                "echo 1",
                "connect 4294967295",
                "connect 4294967296",
            ] {
                assert_eq!(parsed(transport, bad), None, "{bad}");
            }
        }
        assert_eq!(of_vsock("connect 10.1.2.3 7"), None);
        assert_eq!(of_tcp("connect 65536"), None);
        assert_eq!(of_tcp("connect 10.1.2 7"), None);
    }

    #[test]
    fn an_echo_over_tcp_is_reached() {
        let place = |port| Place::Tcp(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
        let listener = std::net::TcpListener::from(listen(place(0)).unwrap());
        let port = listener.local_addr().unwrap().port();
        let echoing = listener.try_clone().unwrap();
        // It has no end; the test's own ends it.
        thread::spawn(move || echo(&echoing.into()));
        let stream = std::net::TcpStream::from(connect(place(port)).unwrap());
        stream.set_nonblocking(false).unwrap();
        (&stream).write_all(b"there and back").unwrap();
        stream.shutdown(Half::Write).unwrap();
        assert_eq!(all_of(&stream), b"there and back");
        assert!(connect(place(0)).is_err());
    }

    #[test]
    fn the_end_of_the_input_leaves_the_other_direction_open() {
        let (mut peer, mut writer, reader, worker) = relaying();
        writer.write_all(b"question").unwrap();
        drop(writer);
        assert_eq!(all_of(&peer), b"question");
        peer.write_all(b"answer").unwrap();
        drop(peer);
        worker.join().unwrap().unwrap();
        assert_eq!(all_of(reader), b"answer");
    }

    #[test]
    fn the_end_of_the_stream_is_the_end_though_the_input_stays_open() {
        let (mut peer, writer, reader, worker) = relaying();
        peer.write_all(b"all").unwrap();
        peer.shutdown(Half::Write).unwrap();
        worker.join().unwrap().unwrap();
        assert_eq!(all_of(reader), b"all");
        drop(writer);
    }

    #[test]
    fn a_peer_that_does_not_read_is_still_heard() {
        let (mut peer, mut writer, reader, worker) = relaying();
        peer.shutdown(Half::Read).unwrap();
        let _ = writer.write_all(&[0; 1000]);
        peer.write_all(b"still here").unwrap();
        drop(peer);
        worker.join().unwrap().unwrap();
        assert_eq!(all_of(reader), b"still here");
    }

    #[test]
    fn an_output_without_a_reader_is_an_error() {
        let (mut peer, _writer, reader, worker) = relaying();
        drop(reader);
        peer.write_all(b"x").unwrap();
        assert!(worker.join().unwrap().is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Both directions at once, each far more than is held, neither waiting for the other.
        #[test]
        fn every_byte_arrives_both_ways(there in 0..400_000_usize, back in 0..400_000_usize, seed: u8) {
            let pattern = |len: usize, seed: u8| -> Vec<u8> {
                (0..=250_u8).cycle().take(len).map(|it| it ^ seed).collect()
            };
            let (there, back) = (pattern(there, seed), pattern(back, !seed));
            let (mut peer, mut writer, reader, worker) = relaying();
            let (sent, answered) = (there.clone(), back.clone());
            let feeding = thread::spawn(move || {
                writer.write_all(&sent).unwrap();
            });
            let mut answering = peer.try_clone().unwrap();
            let answerer = thread::spawn(move || {
                answering.write_all(&answered).unwrap();
                answering.shutdown(Half::Write).unwrap();
            });
            // The relay ends with the stream, so what goes the other way is to be read meanwhile.
            let reading = thread::spawn(move || all_of(reader));
            let mut got = Vec::new();
            while got.len() < there.len() {
                let mut buffer = [0; 10_000];
                match peer.read(&mut buffer) {
                    Ok(0) | Err(_) => break,
                    Ok(count) => got.extend_from_slice(&buffer[..count]),
                }
            }
            worker.join().unwrap().unwrap();
            prop_assert_eq!(reading.join().unwrap(), back);
            prop_assert!(there.starts_with(&got));
            let _ = feeding.join();
            let _ = answerer.join();
        }
    }
}
