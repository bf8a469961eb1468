//! `vsock` and `tcp`: streams to and from the host, as the tools of the same names in a real guest.

use super::{
    super::{
        program::{Step, WaitFor},
        signals,
        syscalls::Syscalls,
    },
    Flush, Out, errno_text,
};
use bytes::{Buf, Bytes};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use vm_guest_agent::os::{Errno, SysResult};

const CHUNK: usize = 64 << 10;
const OF_VSOCK: &str = "usage: vsock connect PORT | vsock listen [--echo] PORT";
const OF_TCP: &str = "usage: tcp connect [ADDRESS] PORT | tcp listen [--echo] PORT";

/// A running `vsock` or `tcp`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) struct StreamTool {
    name: String,
    stage: Stage,
}

/// How far it got.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Stage {
    /// It waits for the host's answer.
    Dialling { fd: u32, port: u32 },
    /// It says that it listens.
    Announcing { listener: u32, echo: bool, out: Out },
    /// It waits for its one connection.
    Waiting { listener: u32 },
    /// It copies standard input to the stream, and the stream to standard output.
    Copying { input: Copier, output: Copier },
    /// It sends back what comes.
    Echoing { listener: u32, streams: Vec<Copier> },
}

/// Copies one descriptor to another until the end of the first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) struct Copier {
    from: u32,
    to: u32,
    held: Bytes,
    ended: bool,
}

/// How far a copier got.
enum Copied {
    /// It goes on.
    Some,
    /// Until it can read or write.
    Wait,
    /// The source has ended, and all is written.
    All,
}

impl Copier {
    fn new(from: u32, to: u32) -> Self {
        Self { from, to, held: Bytes::new(), ended: false }
    }

    fn step(&mut self, sys: &mut Syscalls<'_>) -> SysResult<Copied> {
        if self.held.is_empty() {
            if self.ended {
                return Ok(Copied::All);
            }
            match sys.read(self.from, CHUNK) {
                Ok(bytes) => {
                    self.ended = bytes.is_empty();
                    self.held = bytes;
                }
                Err(Errno::AGAIN) => return Ok(Copied::Wait),
                Err(errno) => return Err(errno),
            }
            if self.ended {
                return Ok(Copied::All);
            }
        }
        match sys.write(self.to, self.held.clone()) {
            Ok(taken) => self.held.advance(taken),
            Err(Errno::AGAIN) => return Ok(Copied::Wait),
            Err(errno) => return Err(errno),
        }
        Ok(Copied::Some)
    }

    /// Says what it waits for, beside others.
    fn or_wait(&self, wait: WaitFor) -> WaitFor {
        if self.held.is_empty() { wait.or_readable(self.from) } else { wait.or_writable(self.to) }
    }
}

impl StreamTool {
    /// Reads the command line; the error is the exit code.
    pub(super) fn start(
        sys: &mut Syscalls<'_>,
        name: &str,
        argv: &[String],
        out: &mut Out,
    ) -> Result<Self, u8> {
        let tcp = name == "tcp";
        let words: Vec<_> = argv.iter().skip(1).map(String::as_str).collect();
        let mut address = Some(Ipv4Addr::LOCALHOST);
        let (listens, echo, port) = match words[..] {
            ["connect", port] => (false, false, port),
            ["connect", at, port] if tcp => {
                address = at.parse().ok();
                (false, false, port)
            }
            ["listen", port] => (true, false, port),
            ["listen", "--echo", port] => (true, true, port),
            _ => {
                out.error(if tcp { OF_TCP } else { OF_VSOCK });
                return Err(2);
            }
        };
        let most = if tcp { u32::from(u16::MAX) } else { u32::MAX - 1 };
        let port = port.parse().ok().filter(|port| (1..=most).contains(port));
        let (Some(port), Some(address)) = (port, address) else {
            out.error("invalid address or port");
            return Err(2);
        };
        let of_tcp = u16::try_from(port).unwrap_or(0);
        let running = |stage| Self { name: name.to_owned(), stage };
        let mut failed = |errno| {
            out.error(&format!("port {port}: {}", errno_text(errno)));
            1
        };
        // A host that is gone shows as an error of the write.
        sys.ignore_signal(signals::PIPE).map_err(&mut failed)?;
        if listens {
            let listened = if tcp { sys.tcp_listen(of_tcp) } else { sys.vsock_listen(port) };
            let listener = listened.map_err(failed)?;
            let mut out = Out::new(name);
            out.put_to(2, b"listening\n");
            return Ok(running(Stage::Announcing { listener, echo, out }));
        }
        let dialled = if tcp { sys.tcp_connect(address, of_tcp) } else { sys.vsock_connect(port) };
        Ok(running(Stage::Dialling { fd: dialled.map_err(failed)?, port }))
    }

    /// Goes on; the error is what is to be said before it exits with 1.
    pub(super) fn step(&mut self, sys: &mut Syscalls<'_>) -> Result<Step, Out> {
        self.stage.step(sys).map_err(|complaint| {
            let mut out = Out::new(&self.name);
            out.error(&complaint);
            out
        })
    }
}

impl Stage {
    fn step(&mut self, sys: &mut Syscalls<'_>) -> Result<Step, String> {
        match self {
            Self::Dialling { fd, port } => match sys.connected(*fd) {
                Ok(()) => *self = Self::copying(*fd),
                Err(Errno::AGAIN) => return Ok(Step::Block(WaitFor::writable(*fd))),
                Err(errno) => return Err(complaint(&format!("port {port}"), errno)),
            },
            Self::Announcing { listener, echo, out } => match out.flush(sys) {
                Flush::Wait(wait) => return Ok(Step::Block(wait)),
                // Who does not listen to it can still connect.
                Flush::Done | Flush::Failed => {
                    let listener = *listener;
                    *self = match echo {
                        true => Self::Echoing { listener, streams: Vec::new() },
                        false => Self::Waiting { listener },
                    };
                }
            },
            Self::Waiting { listener } => match sys.accept(*listener) {
                Ok(fd) => {
                    let _ = sys.close(*listener);
                    *self = Self::copying(fd);
                }
                Err(Errno::AGAIN) => return Ok(Step::Block(WaitFor::readable(*listener))),
                Err(errno) => return Err(complaint("accept", errno)),
            },
            Self::Copying { input, output } => return copy(sys, input, output),
            Self::Echoing { listener, streams } => return echo(sys, *listener, streams),
        }
        Ok(Step::Continue)
    }

    fn copying(fd: u32) -> Self {
        Self::Copying { input: Copier::new(0, fd), output: Copier::new(fd, 1) }
    }
}

fn complaint(what: &str, errno: Errno) -> String {
    format!("{what}: {}", errno_text(errno))
}

/// Copies both ways until the other side writes no more.
fn copy(sys: &mut Syscalls<'_>, input: &mut Copier, output: &mut Copier) -> Result<Step, String> {
    let stream = output.from;
    let received = output.step(sys).map_err(|errno| complaint("stream", errno))?;
    if matches!(received, Copied::All) {
        return Ok(Step::Exit(0));
    }
    let was_ended = input.ended;
    let sent = match input.step(sys) {
        // The other side reads no more; it may still write.
        Err(Errno::PIPE) => {
            (input.ended, input.held) = (true, Bytes::new());
            Copied::All
        }
        sent => sent.map_err(|errno| complaint("standard input", errno))?,
    };
    if input.ended && !was_ended {
        let _ = sys.shutdown(stream);
    }
    Ok(match (received, sent) {
        (Copied::Wait, Copied::Wait) => {
            Step::Block(input.or_wait(output.or_wait(WaitFor::default())))
        }
        (Copied::Wait, Copied::All) => Step::Block(output.or_wait(WaitFor::default())),
        _ => Step::Continue,
    })
}

/// Takes connections and sends back what comes on each.
fn echo(sys: &mut Syscalls<'_>, listener: u32, streams: &mut Vec<Copier>) -> Result<Step, String> {
    let mut busy = false;
    match sys.accept(listener) {
        Ok(fd) => {
            streams.push(Copier::new(fd, fd));
            busy = true;
        }
        Err(Errno::AGAIN) => {}
        // The one too many is closed.
        Err(Errno::MFILE) => busy = true,
        Err(errno) => return Err(complaint("accept", errno)),
    }
    streams.retain_mut(|stream| match stream.step(sys) {
        Ok(Copied::Wait) => true,
        Ok(Copied::Some) => {
            busy = true;
            true
        }
        Ok(Copied::All) | Err(_) => {
            let _ = sys.close(stream.from);
            busy = true;
            false
        }
    });
    if busy {
        return Ok(Step::Continue);
    }
    let wait =
        streams.iter().fold(WaitFor::readable(listener), |wait, stream| stream.or_wait(wait));
    Ok(Step::Block(wait))
}
