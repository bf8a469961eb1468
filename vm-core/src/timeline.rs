//! A run as people look at it: one line for everything that happened, in words and as data.

use crate::{fault::FaultKind, observe::Occurrence};
use serde::{Deserialize, Serialize};
use std::{fmt, time::Duration};
use vm_guest_protocol::Frame;
use vm_trait::VmId;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineLine {
    /// Time since the run began, on the backend's clock.
    pub at: Duration,
    /// The VM concerned, where there is one.
    pub vm: Option<VmId>,
    /// What it was, as data.
    pub mark: Mark,
    /// What it was, in words. What a guest said may be in it.
    pub text: String,
}

/// What a line of a timeline is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mark {
    /// An operation was called.
    Begun {
        /// Its name.
        operation: String,
        /// Counts the operations of a VM.
        call: u64,
    },
    /// An operation ended, or was dropped.
    Ended {
        /// Its name.
        operation: String,
        /// As in `Begun`.
        call: u64,
        /// `ok`, `dropped`, or the error's code.
        outcome: String,
    },
    /// The state changed.
    State {
        /// The name of what it was.
        from: String,
        /// The name of what it is.
        to: String,
    },
    /// A frame was handed to the link, or came from it.
    Frame {
        /// Whether it was sent by the host.
        sent: bool,
    },
    /// The link to the agent was made or lost.
    Link {
        /// Whether it was made.
        up: bool,
    },
    /// Something happened to a stream of the user's.
    Stream,
    /// A time was measured.
    Took,
    /// A fault was ordered.
    Ordered {
        /// Which.
        fault: FaultKind,
    },
    /// A fault happened.
    Fault {
        /// Which.
        fault: FaultKind,
    },
    /// Something about the machine below the core.
    Machine,
    /// The guest wrote to its console.
    Console,
    /// A file of the host changed.
    HostFile,
    /// A remark about the record itself, and whatever else there is.
    Note,
}

impl TimelineLine {
    /// Writes down what the core reports.
    #[must_use]
    pub fn of(at: Duration, vm: VmId, occurrence: &Occurrence<'_>) -> Self {
        let text = describe(occurrence);
        Self { at, vm: Some(vm), mark: Mark::of(occurrence), text }
    }
}

impl fmt::Display for TimelineLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>5}.{:06}s  ", self.at.as_secs(), self.at.subsec_micros())?;
        match self.vm {
            Some(vm) => write!(f, "{vm}  ")?,
            None => write!(f, "{:19}  ", "host")?,
        }
        f.write_str(&self.text)
    }
}

impl Mark {
    /// Gives what the core reports as data.
    #[must_use]
    pub fn of(occurrence: &Occurrence<'_>) -> Self {
        match occurrence {
            Occurrence::Begun { operation, call, .. } => {
                Self::Begun { operation: operation.name().to_owned(), call: *call }
            }
            Occurrence::Ended { operation, call, outcome } => Self::Ended {
                operation: operation.name().to_owned(),
                call: *call,
                outcome: (*outcome).to_owned(),
            },
            Occurrence::State { from, to } => {
                Self::State { from: from.name().to_owned(), to: to.name().to_owned() }
            }
            Occurrence::Frame { sent, .. } => Self::Frame { sent: *sent },
            Occurrence::LinkUp { .. } => Self::Link { up: true },
            Occurrence::LinkDown => Self::Link { up: false },
            Occurrence::Stream { .. } => Self::Stream,
            Occurrence::Took { .. } => Self::Took,
        }
    }
}

/// Puts what the core reports into words.
#[must_use]
pub fn describe(occurrence: &Occurrence<'_>) -> String {
    match occurrence {
        Occurrence::Begun { operation, call, detail } => {
            format!("{operation} #{call} {detail}").trim_end().to_owned()
        }
        Occurrence::Ended { operation, call, outcome } => format!("{operation} #{call}: {outcome}"),
        Occurrence::State { from, to } => format!("{from} -> {to}"),
        Occurrence::Frame { sent, stream, frame } => {
            let arrow = if *sent { "->" } else { "<-" };
            format!("{arrow} stream {stream}: {}", frame_text(frame))
        }
        Occurrence::LinkUp { resumed, failed_dials } => {
            let session = if *resumed { "resumed" } else { "new" };
            format!("link up: session {session}, after {failed_dials} failed dials")
        }
        Occurrence::LinkDown => "link down".to_owned(),
        Occurrence::Stream { number, port, change } => {
            format!("stream {number} on port {port}: {change:?}")
        }
        Occurrence::Took { stage, duration } => format!("{stage} took {duration:?}"),
    }
}

fn frame_text(frame: &Frame) -> String {
    match frame {
        Frame::Data { channel, offset, bytes } => {
            format!("Data {channel:?} {} bytes at {offset}", bytes.len())
        }
        other => format!("{other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use vm_guest_protocol::Channel;
    use vm_trait::Operation;

    fn line(occurrence: &Occurrence<'_>) -> String {
        TimelineLine::of(Duration::from_millis(12_345), VmId(7), occurrence).to_string()
    }

    #[test]
    fn a_line_says_when_on_which_machine_and_what() {
        let begun = Occurrence::Begun { operation: Operation::ReadFile, call: 3, detail: "/a" };
        let text = line(&begun);
        assert!(text.starts_with("   12.345000s  "), "{text}");
        assert!(text.contains(&VmId(7).to_string()), "{text}");
        assert!(text.ends_with("read_file #3 /a"), "{text}");
        let of_host = TimelineLine {
            at: Duration::ZERO,
            vm: None,
            mark: Mark::Note,
            text: "remark".to_owned(),
        };
        let text = of_host.to_string();
        assert!(text.contains("host ") && text.ends_with("remark"), "{text}");
    }

    #[test]
    fn bytes_of_a_frame_are_counted_and_not_printed() {
        let bytes = Bytes::from_static(b"secret");
        let frame = Frame::Data { channel: Channel::Stdout, offset: 9, bytes };
        let text = line(&Occurrence::Frame { sent: false, stream: 4, frame: &frame });
        assert!(text.ends_with("<- stream 4: Data Stdout 6 bytes at 9"), "{text}");
        let eof = Frame::Eof { channel: Channel::Stdin, offset: 5 };
        let text = line(&Occurrence::Frame { sent: true, stream: 4, frame: &eof });
        assert!(text.contains("-> stream 4: Eof") && text.contains("Stdin"), "{text}");
    }
}
