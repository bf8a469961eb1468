//! What the frames say.

use crate::{MAX_ENTRIES, MAX_LIMITS, MAX_LIST, bounded};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The host's first frame on a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The version that the host speaks.
    pub version: u16,
    /// Names the session; drawn at random by the host.
    pub session: u128,
    /// Whether the host goes on with a session that was open before, or begins one.
    pub resume: bool,
    /// On `resume`: the streams that the host still holds. The agent treats every other stream of the session as if
    /// it had received its [`Close`](crate::Frame::Close), which may have been lost with the connection.
    #[serde(deserialize_with = "bounded::list::<MAX_LIST, _, _>")]
    pub live: Vec<u32>,
}

/// The agent's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that the agent speaks.
    pub version: u16,
    /// Whether the agent still knew the session, so that its streams go on.
    pub resumed: bool,
    /// The guest's monotonic time.
    pub uptime_ns: u64,
}

/// The agent's other answer to [`Hello`], after which it closes the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// It speaks another version.
    Version {
        /// Which.
        agent: u16,
    },
}

/// What a stream is opened for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Answer with [`Reply::Pong`].
    Ping,
    /// Run a program: `Started`, then `Data` both ways, then `Exited` after the last byte of output.
    Exec(ExecSpec),
    /// Take up the streams of a process, from these offsets: as `Exec`, from `Started` on.
    Attach {
        /// The process.
        process: u64,
        /// First byte of standard output wanted.
        stdout: u64,
        /// First byte of standard error wanted.
        stderr: u64,
    },
    /// Answer with [`Reply::Processes`].
    Processes,
    /// Send a signal to a process's group, exactly once however often the connection is lost. `Done` also when the
    /// process has ended; `NoSuchProcess` when it is unknown.
    Signal {
        /// The process.
        process: u64,
        /// The signal, 1 to 64.
        signal: u8,
    },
    /// Set the size of a process's terminal; `InvalidArgument` where it has none.
    Resize {
        /// The process.
        process: u64,
        /// The size.
        size: TermSize,
    },
    /// Keep a process when the stream that it belongs to now is closed. `Done` also when it has ended. A stream that
    /// attaches to it later must ask for this again.
    Detach {
        /// The process.
        process: u64,
    },
    /// Read a file: `Started`, `Data` and `Eof` on [`Channel::Stdout`](crate::Channel::Stdout), then `Done`.
    ReadFile {
        /// The file.
        path: String,
    },
    /// Replace a file at once: the host sends `Data` and `Eof` on [`Channel::Stdin`](crate::Channel::Stdin), the
    /// agent answers `Done` when the new content is in place and durable.
    WriteFile {
        /// The file.
        path: String,
        /// Permission bits.
        mode: Option<u32>,
    },
    /// Answer with [`Reply::Stat`].
    Stat {
        /// The file; links are not followed.
        path: String,
    },
    /// List a directory: as `ReadFile`, the data being a postcard-encoded [`ListedDir`].
    ListDir {
        /// The directory.
        path: String,
    },
    /// Make a directory.
    CreateDir {
        /// The directory.
        path: String,
        /// Permission bits.
        mode: u32,
        /// Missing parents too; one that is there already is fine.
        recursive: bool,
    },
    /// Remove a file or directory.
    Remove {
        /// What.
        path: String,
        /// With all it holds.
        recursive: bool,
    },
    /// Rename a file or directory.
    Rename {
        /// The old path.
        from: String,
        /// The new path.
        to: String,
    },
    /// Set the wall clock, after boot, resume, restore and fork.
    SetClock {
        /// Nanoseconds since the Unix epoch.
        wall_ns: u64,
    },
    /// Reseed the random pool, after restore and fork.
    Reseed {
        /// Fresh randomness from the host.
        entropy: [u8; 32],
    },
    /// Signal every process, wait for their end for at most the grace, sync the disks and power off. `Done` comes
    /// when the request is accepted.
    Shutdown {
        /// The signal.
        signal: u8,
        /// The grace in nanoseconds.
        grace_ns: u64,
    },
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSpec {
    /// A path, or a name to be looked for in `PATH`.
    pub program: String,
    /// The arguments after the program's own name.
    #[serde(deserialize_with = "bounded::list::<MAX_LIST, _, _>")]
    pub args: Vec<String>,
    /// The whole environment.
    #[serde(deserialize_with = "bounded::list::<MAX_LIST, _, _>")]
    pub env: Vec<(String, String)>,
    /// The working directory; `/` where not given.
    pub cwd: Option<String>,
    /// The user; the agent's own where not given.
    pub user: Option<UserSpec>,
    /// A terminal in place of pipes.
    pub tty: Option<TermSize>,
    /// How long it may run, in nanoseconds of guest time.
    pub timeout_ns: Option<u64>,
    /// Whether the host will send standard input; else the program reads end-of-file at once.
    pub stdin: bool,
    /// What it may use, each resource once.
    #[serde(deserialize_with = "bounded::list::<MAX_LIMITS, _, _>")]
    pub limits: Vec<ResourceLimit>,
    /// Whether the host waits for output and end alone: where it sends no input, `Started` may then come up to 50 ms
    /// late, so that all that a short program has to say is one message.
    pub lazy_start: bool,
}

/// How much of a resource a program may use, as setrlimit(2) has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceLimit {
    /// The number that Linux has for the resource, below [`MAX_LIMITS`].
    pub resource: u8,
    /// What is enforced.
    pub soft: u64,
    /// What `soft` may be raised to.
    pub hard: u64,
}

impl ResourceLimit {
    /// The amount that means no limit (`RLIM_INFINITY`).
    pub const NONE: u64 = u64::MAX;
}

/// A user of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UserSpec {
    /// By numbers.
    Ids {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// By a name in `/etc/passwd`.
    Name(String),
}

/// The size of a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TermSize {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub cols: u16,
}

/// The agent's first answer on a stream of `Exec`, `Attach`, `ReadFile` and `ListDir`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The process, or 0.
    pub process: u64,
    /// Its pid, or 0.
    pub pid: u32,
    /// Offset of the first byte that will come on standard output.
    pub stdout: u64,
    /// Offset of the first byte that will come on standard error.
    pub stderr: u64,
    /// Whether the process has a terminal.
    pub tty: bool,
    /// Offset of the first byte of standard input that this stream sends: above 0 where it attaches to a process that
    /// another stream has sent input to.
    pub stdin: u64,
}

/// How a process ended. Sent after all its output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessExit {
    /// The exit code, unless a signal ended it.
    pub code: Option<u8>,
    /// The signal that ended it.
    pub signal: Option<u8>,
    /// Whether the agent ended it because its time ran out.
    pub timed_out: bool,
    /// How long it ran, in nanoseconds of guest time.
    pub elapsed_ns: u64,
}

/// A request's good end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Nothing to say.
    Empty,
    /// To `Ping`.
    Pong {
        /// The guest's monotonic time.
        uptime_ns: u64,
    },
    /// To `Stat`.
    Stat(StatEntry),
    /// To `Processes`, by id.
    Processes(#[serde(deserialize_with = "bounded::list::<MAX_LIST, _, _>")] Vec<ProcessEntry>),
}

/// A file's metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatEntry {
    /// What it is.
    pub kind: EntryKind,
    /// Its size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change of content, nanoseconds since the Unix epoch.
    pub modified_ns: u64,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Anything else.
    Other,
}

/// A directory's names, sorted as bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedDir {
    /// Names and what they name.
    #[serde(deserialize_with = "bounded::list::<MAX_ENTRIES, _, _>")]
    pub entries: Vec<(String, EntryKind)>,
}

/// A process that the agent knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessEntry {
    /// Its id.
    pub process: u64,
    /// Its pid.
    pub pid: u32,
    /// What it was started with.
    pub program: String,
    /// How it ended, if it has.
    pub exit: Option<ProcessExit>,
}

/// A request's bad end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{kind:?} (errno {errno}): {path}")]
pub struct GuestError {
    /// What went wrong.
    pub kind: GuestErrorKind,
    /// The guest's errno, or 0.
    pub errno: i32,
    /// The path concerned, or empty.
    pub path: String,
}

/// What went wrong in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum GuestErrorKind {
    /// No such file.
    NotFound,
    /// Not permitted.
    PermissionDenied,
    /// It is there already.
    AlreadyExists,
    /// A part of the path is no directory.
    NotADirectory,
    /// It is a directory.
    IsADirectory,
    /// The directory holds something.
    DirectoryNotEmpty,
    /// The disk is full.
    OutOfSpace,
    /// The file system is read-only.
    ReadOnly,
    /// Not an absolute, normalised path.
    InvalidPath,
    /// No such program.
    ProgramNotFound,
    /// The program cannot be executed.
    ProgramNotExecutable,
    /// The working directory cannot be entered.
    BadWorkingDirectory,
    /// No such user.
    UnknownUser,
    /// Not permitted to run as that user.
    UserNotPermitted,
    /// No such process.
    NoSuchProcess,
    /// Out of memory or processes.
    OutOfResources,
    /// An argument holds a NUL byte, is empty where it must not be, or is too long.
    InvalidArgument,
    /// The agent cannot do this.
    Unsupported,
    /// Anything else; see the errno.
    Other,
}

impl GuestError {
    /// Makes an error without errno and path.
    #[must_use]
    pub fn new(kind: GuestErrorKind) -> Self {
        Self { kind, errno: 0, path: String::new() }
    }

    /// Names the path concerned.
    #[must_use]
    pub fn with_path(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }
}

impl ListedDir {
    /// Encodes the listing as it is sent.
    #[must_use]
    pub fn to_bytes(&self) -> Bytes {
        postcard::to_allocvec(self).map(Bytes::from).unwrap_or_default()
    }

    /// Decodes a listing.
    ///
    /// # Errors
    /// When the bytes are no listing.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, postcard::Error> {
        postcard::from_bytes(bytes)
    }
}
