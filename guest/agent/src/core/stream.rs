//! The streams of a session.

use super::{
    file::{Read, Write},
    flow::Intake,
};
use serde::{Deserialize, Serialize};
use vm_guest_protocol::{Frame, GuestError, Reply};

/// One stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Stream {
    pub(super) job: Job,
    /// What the host sends on it, where it is not a process that takes it.
    pub(super) intake: Intake,
    /// The host expects frames on it, on this connection.
    pub(super) announced: bool,
    /// Its end was sent on this connection.
    pub(super) end_sent: bool,
}

/// What a stream is for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Job {
    /// It reads a process.
    Process {
        id: u64,
        /// The process goes on when the stream is closed.
        keep: bool,
    },
    /// It reads a file or a listing.
    Read(Box<Read>),
    /// It replaces a file.
    Write(Box<Write>),
    /// It has ended.
    Over(Outcome),
}

/// How a request ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Outcome {
    Done(Reply),
    /// A list of the processes, which is made when it is sent: it may be large, and nothing happens by making it.
    Processes,
    Failed(GuestError),
}

impl Stream {
    pub(super) fn new(job: Job) -> Self {
        Self { job, intake: Intake::new(), announced: true, end_sent: false }
    }

    /// Ends the stream.
    pub(super) fn finish(&mut self, result: Result<Reply, GuestError>) {
        self.job = Job::Over(result.into());
    }
}

impl From<Result<Reply, GuestError>> for Outcome {
    fn from(result: Result<Reply, GuestError>) -> Self {
        match result {
            Ok(reply) => Self::Done(reply),
            Err(error) => Self::Failed(error),
        }
    }
}

impl Outcome {
    /// Makes the frame that says so.
    pub(super) fn frame(&self, processes: impl FnOnce() -> Reply) -> Frame {
        match self {
            Self::Done(reply) => Frame::Done(reply.clone()),
            Self::Processes => Frame::Done(processes()),
            Self::Failed(error) => Frame::Failed(error.clone()),
        }
    }
}
