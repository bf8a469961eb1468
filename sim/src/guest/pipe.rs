//! Pipes.

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vm_planted_bugs::{Bug, planted};

/// How many bytes a pipe holds.
pub(super) const CAPACITY: usize = 64 << 10;
/// Writes up to this are taken whole or not at all.
const ATOMIC: usize = 4096;

/// A queue of bytes with counted ends.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Pipe {
    queue: Queue,
    pub(super) readers: u32,
    pub(super) writers: u32,
    /// After how many more bytes a fault breaks it.
    pub(super) cut_after: Option<u64>,
}

/// Bytes in order, held in pieces.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Queue {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Queue {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn push(&mut self, bytes: Bytes) {
        if bytes.is_empty() {
            return;
        }
        self.len += bytes.len();
        match self.pieces.back_mut() {
            Some(last) if last.len() + bytes.len() <= ATOMIC => {
                let mut merged = BytesMut::with_capacity(last.len() + bytes.len());
                merged.extend_from_slice(last);
                merged.extend_from_slice(&bytes);
                *last = merged.freeze();
            }
            _ => self.pieces.push_back(bytes),
        }
    }

    pub(super) fn pop(&mut self, max: usize) -> Bytes {
        if max == 0 {
            return Bytes::new();
        }
        let Some(mut first) = self.pieces.pop_front() else { return Bytes::new() };
        if first.len() > max {
            self.pieces.push_front(first.split_off(max));
        } else if self.pieces.front().is_some_and(|next| first.len() + next.len() <= max) {
            let mut joined = BytesMut::from(&first[..]);
            while let Some(next) = self.pieces.front() {
                if joined.len() + next.len() > max {
                    break;
                }
                joined.extend_from_slice(next);
                self.pieces.pop_front();
            }
            first = joined.freeze();
        }
        self.len -= first.len();
        first
    }
}

/// What a pipe does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Some(usize),
    Full,
    Broken,
}

impl Pipe {
    pub(super) fn is_broken(&self) -> bool {
        self.readers == 0 || self.cut_after == Some(0)
    }

    /// Takes bytes as a blocking writer needs it: small writes whole or not at all.
    pub(super) fn write(&mut self, bytes: Bytes) -> Taken {
        if !self.is_broken() && bytes.len() <= ATOMIC && bytes.len() > CAPACITY - self.queue.len() {
            return Taken::Full;
        }
        self.write_some(bytes)
    }

    /// Takes as many bytes as there is room for.
    pub(super) fn write_some(&mut self, mut bytes: Bytes) -> Taken {
        if self.is_broken() {
            return Taken::Broken;
        }
        if bytes.is_empty() {
            return Taken::Some(0);
        }
        let given = bytes.len();
        bytes.truncate(CAPACITY - self.queue.len());
        if bytes.is_empty() {
            return Taken::Full;
        }
        let taken = if planted(Bug::FullPipeLosesBytes) { given } else { bytes.len() };
        if let Some(left) = &mut self.cut_after {
            bytes.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= bytes.len() as u64;
        }
        self.queue.push(bytes);
        Taken::Some(taken)
    }

    /// Takes bytes out; `None` when there are none and none can come.
    pub(super) fn read(&mut self, max: usize) -> Option<Bytes> {
        let ended = self.writers == 0 || self.cut_after == Some(0);
        if self.queue.len() == 0 && ended { None } else { Some(self.queue.pop(max)) }
    }

    pub(super) fn is_readable(&self) -> bool {
        self.queue.len() > 0 || self.writers == 0
    }

    pub(super) fn is_writable(&self) -> bool {
        self.is_broken() || CAPACITY - self.queue.len() >= ATOMIC
    }
}
