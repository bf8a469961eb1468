//! The trace: everything that happens, hashed as it happens.

use crate::coverage::{Coverage, Tally};
use serde::{Deserialize, Serialize};
use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};
use twox_hash::XxHash3_128;
pub use vm_core::timeline::TimelineLine;
use vm_core::{
    fault::FaultKind,
    observe::Occurrence,
    timeline::{Mark, describe},
};
use vm_guest_protocol::Frame;
use vm_trait::VmId;

/// What kind of event a record is; part of what is hashed.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Tag {
    Begun = 1,
    Ended,
    State,
    Frame,
    LinkUp,
    LinkDown,
    Took,
    Fault,
    Ordered,
    Machine,
    ToGuest,
    ToHost,
    Console,
    Clock,
    HostFile,
    Note,
    Stream,
}

impl Tag {
    /// Gives what a record that is not the core's is about; the first number of a fault's is its kind.
    fn mark(self, numbers: &[u64]) -> Mark {
        let fault = || FaultKind::ALL.iter().find(|kind| numbers.first() == Some(&(**kind as u64)));
        match self {
            Self::Fault => fault().map_or(Mark::Note, |fault| Mark::Fault { fault: *fault }),
            Self::Ordered => fault().map_or(Mark::Note, |fault| Mark::Ordered { fault: *fault }),
            Self::Machine => Mark::Machine,
            Self::Console => Mark::Console,
            Self::HostFile => Mark::HostFile,
            _ => Mark::Note,
        }
    }
}

/// How much of a run is kept for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Timeline {
    /// Nothing: the fingerprint alone.
    #[default]
    Off,
    /// Everything but frames.
    Events,
    /// Everything.
    Frames,
}

pub(crate) struct Trace {
    timeline: Timeline,
    tally: Option<Mutex<Tally>>,
    state: Mutex<TraceState>,
}

struct TraceState {
    hasher: XxHash3_128,
    events: u64,
    lines: Vec<TimelineLine>,
}

impl Trace {
    pub(crate) fn new(seed: u64, timeline: Timeline) -> Self {
        let state = TraceState { hasher: XxHash3_128::with_seed(seed), events: 0, lines: vec![] };
        Self { timeline, tally: None, state: Mutex::new(state) }
    }

    /// Counts what happens, where that is `wanted`.
    pub(crate) fn counting(mut self, wanted: bool) -> Self {
        self.tally = wanted.then(Mutex::default);
        self
    }

    /// Counts a fault.
    pub(crate) fn fault(&self, vm: Option<VmId>, kind: FaultKind) {
        if let Some(tally) = &self.tally {
            tally.lock().unwrap_or_else(PoisonError::into_inner).fault(vm, kind);
        }
    }

    pub(crate) fn coverage(&self) -> Coverage {
        let counted =
            |tally: &Mutex<Tally>| tally.lock().unwrap_or_else(PoisonError::into_inner).coverage();
        self.tally.as_ref().map(counted).unwrap_or_default()
    }

    /// Takes note of an event: its time, VM, kind, numbers and bytes. The text is made for the timeline only.
    pub(crate) fn record(
        &self,
        at: Duration,
        vm: Option<VmId>,
        tag: Tag,
        numbers: &[u64],
        bytes: &[u8],
        text: impl FnOnce() -> String,
    ) {
        self.record_marked(at, vm, tag, numbers, bytes, || (tag.mark(numbers), text()));
    }

    fn record_marked(
        &self,
        at: Duration,
        vm: Option<VmId>,
        tag: Tag,
        numbers: &[u64],
        bytes: &[u8],
        line: impl FnOnce() -> (Mark, String),
    ) {
        const NUMBERS: usize = 4;
        const SHORT: usize = 78;
        let mut head = [0_u8; 8 * (NUMBERS + 2) + 2 + SHORT];
        let nanos = u64::try_from(at.as_nanos()).unwrap_or(u64::MAX);
        head[..8].copy_from_slice(&nanos.to_le_bytes());
        head[8..16].copy_from_slice(&vm.map_or(0, |vm| vm.0).to_le_bytes());
        head[16] = tag as u8;
        head[17] = u8::from(vm.is_some());
        let mut end = 18;
        for number in numbers.iter().take(NUMBERS) {
            head[end..end + 8].copy_from_slice(&number.to_le_bytes());
            end += 8;
        }
        // Short ones go along; each call of the hasher costs.
        let (short, long): (&[u8], &[u8]) =
            if bytes.len() <= SHORT { (bytes, &[]) } else { (&[], bytes) };
        head[end..end + short.len()].copy_from_slice(short);
        end += short.len();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.hasher.write(&head[..end]);
        if !long.is_empty() {
            state.hasher.write(long);
        }
        state.events += 1;
        let wanted = match self.timeline {
            Timeline::Off => false,
            Timeline::Events => {
                !matches!(tag, Tag::Frame | Tag::ToGuest | Tag::ToHost | Tag::Clock)
            }
            Timeline::Frames => !matches!(tag, Tag::ToGuest | Tag::ToHost | Tag::Clock),
        };
        if wanted {
            let (mark, text) = line();
            state.lines.push(TimelineLine { at, vm, mark, text });
        }
    }

    /// Takes note of what the core reports.
    pub(crate) fn occurrence(&self, at: Duration, vm: VmId, occurrence: &Occurrence<'_>) {
        if let Some(tally) = &self.tally {
            tally.lock().unwrap_or_else(PoisonError::into_inner).occurrence(vm, occurrence);
        }
        let record = |tag: Tag, numbers: &[u64], bytes: &[u8]| {
            let line = || (Mark::of(occurrence), describe(occurrence));
            self.record_marked(at, Some(vm), tag, numbers, bytes, line);
        };
        match occurrence {
            Occurrence::Begun { operation, call, detail } => {
                record(Tag::Begun, &[*call, hash(operation.name())], detail.as_bytes());
            }
            Occurrence::Ended { operation, call, outcome } => {
                record(Tag::Ended, &[*call, hash(operation.name())], outcome.as_bytes());
            }
            Occurrence::State { from, to } => {
                record(Tag::State, &[hash(from.name()), hash(to.name())], &[]);
            }
            Occurrence::Frame { sent, stream, frame } => {
                let numbers = [u64::from(*sent), u64::from(*stream), frame_kind(frame)];
                record(Tag::Frame, &numbers, &[]);
            }
            Occurrence::LinkUp { resumed, failed_dials } => {
                record(Tag::LinkUp, &[u64::from(*resumed), u64::from(*failed_dials)], &[]);
            }
            Occurrence::LinkDown => record(Tag::LinkDown, &[], &[]),
            Occurrence::Stream { number, port, change } => {
                record(Tag::Stream, &[*number, u64::from(*port), *change as u64], &[]);
            }
            Occurrence::Took { stage, duration } => {
                let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
                record(Tag::Took, &[nanos, hash(stage)], &[]);
            }
            _ => record(Tag::Note, &[], &[]),
        }
    }

    pub(crate) fn fingerprint(&self) -> u128 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).hasher.finish_128()
    }

    pub(crate) fn events(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).events
    }

    pub(crate) fn lines(&self) -> Vec<TimelineLine> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).lines.clone()
    }
}

/// Hashes a short name (FNV-1a), so that it takes the place of a number.
pub(crate) fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

fn frame_kind(frame: &Frame) -> u64 {
    match frame {
        Frame::Hello(_) => 1,
        Frame::Welcome(_) => 2,
        Frame::Refused(_) => 3,
        Frame::Open(_) => 4,
        Frame::Started(_) => 5,
        Frame::Data { .. } => 6,
        Frame::Eof { .. } => 7,
        Frame::Credit { .. } => 8,
        Frame::Done(_) => 10,
        Frame::Failed(_) => 11,
        Frame::Exited(_) => 12,
        Frame::Close => 13,
        #[allow(unreachable_patterns, reason = "the protocol may gain frames")]
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_an_event_counts() {
        let print = |at: u64, vm: Option<VmId>, tag: Tag, numbers: &[u64], bytes: &[u8]| {
            let trace = Trace::new(1, Timeline::Off);
            trace.record(Duration::from_nanos(at), vm, tag, numbers, bytes, String::new);
            trace.fingerprint()
        };
        let base = print(5, Some(VmId(7)), Tag::Machine, &[1, 2], b"x");
        assert_eq!(base, print(5, Some(VmId(7)), Tag::Machine, &[1, 2], b"x"));
        for other in [
            print(6, Some(VmId(7)), Tag::Machine, &[1, 2], b"x"),
            print(5, Some(VmId(8)), Tag::Machine, &[1, 2], b"x"),
            print(5, None, Tag::Machine, &[1, 2], b"x"),
            print(5, Some(VmId(7)), Tag::Fault, &[1, 2], b"x"),
            print(5, Some(VmId(7)), Tag::Machine, &[1, 3], b"x"),
            print(5, Some(VmId(7)), Tag::Machine, &[1, 2], b"y"),
        ] {
            assert_ne!(base, other);
        }
    }
}
