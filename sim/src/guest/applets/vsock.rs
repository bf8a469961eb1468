//! `vsock`: streams to and from the host, as the tool of the same name in a real guest.

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
use vm_guest_agent::os::{Errno, SysResult};

const CHUNK: usize = 64 << 10;
const USAGE: &str = "usage: vsock connect PORT | vsock listen [--echo] PORT";

/// A running `vsock`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) enum Vsock {
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

impl Vsock {
    /// Reads the command line; the error is the exit code.
    pub(super) fn start(
        sys: &mut Syscalls<'_>,
        argv: &[String],
        out: &mut Out,
    ) -> Result<Self, u8> {
        let words: Vec<_> = argv.iter().skip(1).map(String::as_str).collect();
        let (listens, echo, port) = match words[..] {
            ["connect", port] => (false, false, port),
            ["listen", port] => (true, false, port),
            ["listen", "--echo", port] => (true, true, port),
            _ => {
                out.error(USAGE);
                return Err(2);
            }
        };
        let Some(port) = port.parse().ok().filter(|port| !matches!(*port, 0 | u32::MAX)) else {
            out.error(&format!("invalid port '{port}'"));
            return Err(2);
        };
        let mut failed = |errno| {
            out.error(&format!("port {port}: {}", errno_text(errno)));
            1
        };
        // A host that is gone shows as an error of the write.
        sys.ignore_signal(signals::PIPE).map_err(&mut failed)?;
        if listens {
            let listener = sys.vsock_listen(port).map_err(failed)?;
            let mut out = Out::new("vsock");
            out.put_to(2, b"listening\n");
            return Ok(Self::Announcing { listener, echo, out });
        }
        let fd = sys.vsock_connect(port).map_err(failed)?;
        Ok(Self::Dialling { fd, port })
    }

    /// Goes on; the error is what is to be said before it exits with 1.
    pub(super) fn step(&mut self, sys: &mut Syscalls<'_>) -> Result<Step, Out> {
        match self {
            Self::Dialling { fd, port } => match sys.vsock_connected(*fd) {
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
            Self::Waiting { listener } => match sys.vsock_accept(*listener) {
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

fn complaint(what: &str, errno: Errno) -> Out {
    let mut out = Out::new("vsock");
    out.error(&format!("{what}: {}", errno_text(errno)));
    out
}

/// Copies both ways until the host writes no more.
fn copy(sys: &mut Syscalls<'_>, input: &mut Copier, output: &mut Copier) -> Result<Step, Out> {
    let stream = output.from;
    let received = output.step(sys).map_err(|errno| complaint("stream", errno))?;
    if matches!(received, Copied::All) {
        return Ok(Step::Exit(0));
    }
    let was_ended = input.ended;
    let sent = match input.step(sys) {
        // The host reads no more; it may still write.
        Err(Errno::PIPE) => {
            (input.ended, input.held) = (true, Bytes::new());
            Copied::All
        }
        sent => sent.map_err(|errno| complaint("standard input", errno))?,
    };
    if input.ended && !was_ended {
        let _ = sys.vsock_shutdown(stream);
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
fn echo(sys: &mut Syscalls<'_>, listener: u32, streams: &mut Vec<Copier>) -> Result<Step, Out> {
    let mut busy = false;
    match sys.vsock_accept(listener) {
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
