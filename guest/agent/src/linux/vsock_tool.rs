//! The agent's binary called as `vsock`: streams between the guest's programs and the host.
//!
//! `vsock connect PORT` connects to the host; `vsock listen PORT` takes one connection. Both copy standard input to the
//! stream, ending it where the input ends, and the stream to standard output; they exit when the stream ends, with 0.
//! `vsock listen --echo PORT` sends back what comes on any number of connections until it is killed. `listen` says
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
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// The name by which the binary is called.
pub const NAME: &str = "vsock";

/// How the tool says what is wrong with its command line.
pub const USAGE: &str = "\
usage: vsock connect PORT         connect to the host's port, and to standard input and output
       vsock listen PORT          the same with the first connection to this machine's port
       vsock listen --echo PORT   send back what comes, on every connection";

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
    Connect(u32),
    Listen(u32),
    Echo(u32),
}

/// Does what a command line, without the tool's own name, asks for, and gives the code to exit with.
#[must_use]
pub fn main(arguments: &[OsString]) -> u8 {
    let Some(mode) = parse(arguments) else {
        say(&USAGE);
        return EXIT_USAGE;
    };
    let result = match mode {
        Mode::Connect(port) => connect(port),
        Mode::Listen(port) => listen(port).and_then(|listener| {
            let stream = retry_on_intr(|| rustix::net::accept_with(&listener, STREAM_FLAGS))?;
            drop(listener);
            join(&stream)
        }),
        Mode::Echo(port) => listen(port).and_then(|listener| echo(&listener)),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            let (Mode::Connect(port) | Mode::Listen(port) | Mode::Echo(port)) = mode;
            say(&format_args!("{NAME}: port {port}: {error}"));
            EXIT_FAILED
        }
    }
}

fn parse(arguments: &[OsString]) -> Option<Mode> {
    let words: Vec<&str> = arguments.iter().map(|word| word.to_str()).collect::<Option<_>>()?;
    // The highest number stands for "any port" and names none.
    let port = |text: &str| {
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse().ok().filter(|port| digits && *port != u32::MAX)
    };
    match words[..] {
        ["connect", text] => port(text).map(Mode::Connect),
        ["listen", text] => port(text).map(Mode::Listen),
        ["listen", "--echo", text] => port(text).map(Mode::Echo),
        _ => None,
    }
}

const STREAM_FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

fn connect(port: u32) -> io::Result<()> {
    let socket = socket()?;
    ffi::vsock_connect(socket.as_fd(), HOST, port)?;
    let flags = rustix::fs::fcntl_getfl(&socket)?;
    rustix::fs::fcntl_setfl(&socket, flags | OFlags::NONBLOCK)?;
    join(&socket)
}

fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    ffi::vsock_bind(socket.as_fd(), port)?;
    rustix::net::listen(&socket, 128)?;
    say(&"listening");
    Ok(socket)
}

/// Makes a socket that waits.
fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?)
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

    fn parsed(line: &str) -> Option<Mode> {
        parse(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
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
        assert_eq!(parsed("connect 7"), Some(Mode::Connect(7)));
        assert_eq!(parsed("listen 4294967294"), Some(Mode::Listen(u32::MAX - 1)));
        assert_eq!(parsed("listen --echo 0"), Some(Mode::Echo(0)));
        for bad in [
            "",
            "connect",
            "connect x",
            "connect -1",
            "connect +1",
            "connect 1 2",
            "listen",
            "listen --echo",
            "listen 1 --echo",
            "echo 1",
            "connect 4294967295",
            "connect 4294967296",
        ] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
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
