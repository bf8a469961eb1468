//! Terminals, with the line discipline that Linux sets up by default.

use super::pipe::{Queue, Taken};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vm_guest_protocol::TermSize;

/// How many bytes of output wait for the master.
const OUTPUT: usize = 64 << 10;
/// How many bytes of input wait for the slave.
const INPUT: usize = 4096;

/// A terminal between the agent and a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Pty {
    pub(super) size: (u16, u16),
    /// The session's foreground process group.
    pub(super) group: u32,
    /// Open ends on the session's side.
    pub(super) slaves: u32,
    /// Whether the agent holds the other side.
    pub(super) master: bool,
    pub(super) cut_after: Option<u64>,
    output: Queue,
    /// Finished lines; an empty one is a typed end-of-file.
    lines: VecDeque<Bytes>,
    waiting: usize,
    line: Vec<u8>,
}

/// A signal that a typed character asks for.
pub(super) type TypedSignal = u8;

impl Pty {
    pub(super) fn new(size: TermSize, group: u32) -> Self {
        Self {
            size: (size.rows, size.cols),
            group,
            slaves: 0,
            master: true,
            cut_after: None,
            output: Queue::default(),
            lines: VecDeque::new(),
            waiting: 0,
            line: Vec::new(),
        }
    }

    /// Types bytes, and gives how many were taken and the signals that they ask for.
    pub(super) fn type_bytes(&mut self, bytes: &[u8]) -> (usize, Vec<TypedSignal>) {
        let mut signals = Vec::new();
        for (index, byte) in bytes.iter().enumerate() {
            if self.waiting + self.line.len() >= INPUT && self.waiting > 0 {
                return (index, signals);
            }
            self.type_byte(*byte, &mut signals);
        }
        (bytes.len(), signals)
    }

    /// Types end-of-file.
    pub(super) fn type_eof(&mut self) {
        self.type_byte(4, &mut Vec::new());
    }

    fn type_byte(&mut self, byte: u8, signals: &mut Vec<TypedSignal>) {
        let signal = match byte {
            3 => Some(2),
            28 => Some(3),
            26 => Some(20),
            _ => None,
        };
        if let Some(signal) = signal {
            self.line.clear();
            self.echo(&[b'^', byte + b'@']);
            signals.push(signal);
            return;
        }
        match byte {
            4 => self.finish_line(),
            b'\r' | b'\n' => {
                self.line.push(b'\n');
                self.echo(b"\r\n");
                self.finish_line();
            }
            8 | 127 if self.line.pop().is_some() => self.echo(b"\x08 \x08"),
            8 | 127 => {}
            21 => {
                for _ in 0..std::mem::take(&mut self.line).len() {
                    self.echo(b"\x08 \x08");
                }
            }
            // A line that is too long loses what does not fit but its end.
            _ if self.line.len() < INPUT - 1 => {
                self.line.push(byte);
                if byte < 32 && byte != b'\t' {
                    self.echo(&[b'^', byte + b'@']);
                } else {
                    self.echo(&[byte]);
                }
            }
            _ => {}
        }
    }

    fn echo(&mut self, bytes: &[u8]) {
        if self.output.len() + bytes.len() <= OUTPUT {
            self.output.push(Bytes::copy_from_slice(bytes));
        }
    }

    fn finish_line(&mut self) {
        let line = std::mem::take(&mut self.line);
        self.waiting += line.len();
        self.lines.push_back(line.into());
    }

    /// Reads as the session does: at most one line; `None` while there is none, empty at end-of-file.
    pub(super) fn slave_read(&mut self, max: usize) -> Option<Bytes> {
        let Some(mut line) = self.lines.pop_front() else {
            return (!self.master).then(Bytes::new);
        };
        if line.len() > max {
            self.lines.push_front(line.split_off(max));
        }
        self.waiting -= line.len();
        Some(line)
    }

    /// Writes as the session does, newlines becoming line ends.
    pub(super) fn slave_write(&mut self, bytes: &Bytes) -> Taken {
        if !self.master || self.cut_after == Some(0) {
            return Taken::Broken;
        }
        let (mut taken, mut cooked) = (0, BytesMut::with_capacity(bytes.len() + 8));
        for byte in bytes {
            if self.output.len() + cooked.len() + 2 > OUTPUT {
                break;
            }
            if *byte == b'\n' {
                cooked.extend_from_slice(b"\r\n");
            } else {
                cooked.extend_from_slice(&[*byte]);
            }
            taken += 1;
        }
        if taken == 0 && !bytes.is_empty() {
            return Taken::Full;
        }
        if let Some(left) = &mut self.cut_after {
            cooked.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= cooked.len() as u64;
        }
        self.output.push(cooked.freeze());
        Taken::Some(taken)
    }

    /// Reads as the agent does; `None` when the session's side is closed and drained.
    pub(super) fn master_read(&mut self, max: usize) -> Option<Bytes> {
        let ended = self.slaves == 0 || self.cut_after == Some(0);
        if self.output.len() == 0 && ended { None } else { Some(self.output.pop(max)) }
    }

    pub(super) fn is_readable(&self) -> bool {
        !self.lines.is_empty() || !self.master
    }

    pub(super) fn is_writable(&self) -> bool {
        !self.master || self.cut_after == Some(0) || self.output.len() + 4096 <= OUTPUT
    }
}
