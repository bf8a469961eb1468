//! Programs in the guest: what to run, what came of it, and handles to what runs.

use crate::error::VmResult;
use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

/// A program to run in the guest, with everything it is given. No shell is involved.
///
/// ```
/// use std::time::Duration;
/// use vm_trait::ExecRequest;
/// let request = ExecRequest::new("sh")
///     .args(["-c", "echo $GREETING"])
///     .env("GREETING", "hello")
///     .timeout(Duration::from_secs(5));
/// assert_eq!(request.args.len(), 2);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExecRequest {
    /// The program: a path, or a name to be looked for in `PATH` (the request's, or the agent's default).
    pub program: String,
    /// The arguments after the program's own name.
    #[serde(default)]
    pub args: Vec<String>,
    /// The environment, added to the VM's; nothing of the host's is ever in it.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The working directory, absolute. Default `/`.
    #[serde(default)]
    pub cwd: Option<String>,
    /// The user to run as. Default the agent's own.
    #[serde(default)]
    pub user: Option<User>,
    /// What the program reads.
    #[serde(default)]
    pub stdin: Stdin,
    /// How long the program may run, in guest time; then its process group is killed. Default no limit.
    #[serde(default)]
    pub timeout: Option<Duration>,
    /// How many bytes of each of stdout and stderr [`exec`](crate::VmInstance::exec) keeps. Default 16 MiB.
    #[serde(default = "default_output_limit")]
    pub output_limit: usize,
    /// A terminal of this size in place of pipes; stderr then comes as stdout.
    #[serde(default)]
    pub tty: Option<TtySize>,
}

fn default_output_limit() -> usize {
    16 << 20
}

impl ExecRequest {
    /// Asks to run `program` without arguments.
    #[must_use]
    pub fn new(program: impl Into<String>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: BTreeMap::new(),
            cwd: None,
            user: None,
            stdin: Stdin::Empty,
            timeout: None,
            output_limit: default_output_limit(),
            tty: None,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, cwd: impl Into<String>) -> Self {
        self.cwd = Some(cwd.into());
        self
    }

    /// Sets the user.
    #[must_use]
    pub fn user(mut self, user: User) -> Self {
        self.user = Some(user);
        self
    }

    /// Gives the program these bytes to read, then end-of-file.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Bytes>) -> Self {
        self.stdin = Stdin::Bytes(bytes.into());
        self
    }

    /// Leaves standard input open for [`GuestProcess::write_stdin`].
    #[must_use]
    pub fn open_stdin(mut self) -> Self {
        self.stdin = Stdin::Open;
        self
    }

    /// Sets how long the program may run.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets how much output is kept.
    #[must_use]
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit = bytes;
        self
    }

    /// Gives the program a terminal.
    #[must_use]
    pub fn tty(mut self, size: TtySize) -> Self {
        self.tty = Some(size);
        self
    }
}

/// What a program reads on standard input.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stdin {
    /// End-of-file at once.
    #[default]
    Empty,
    /// These bytes, then end-of-file.
    Bytes(Bytes),
    /// What is written to the handle, until it is closed there. `exec` treats it as `Empty`.
    Open,
}

/// A user of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum User {
    /// By numbers.
    Ids {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// By a name in the guest's `/etc/passwd`.
    Name(String),
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub cols: u16,
}

/// A signal, by its Linux number, 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Signal(pub u8);

impl Signal {
    /// Hang-up.
    pub const HUP: Self = Self(1);
    /// Interrupt, as by Ctrl-C.
    pub const INT: Self = Self(2);
    /// Quit.
    pub const QUIT: Self = Self(3);
    /// Kill; cannot be caught.
    pub const KILL: Self = Self(9);
    /// First user-defined signal.
    pub const USR1: Self = Self(10);
    /// Second user-defined signal.
    pub const USR2: Self = Self(12);
    /// Broken pipe.
    pub const PIPE: Self = Self(13);
    /// Termination.
    pub const TERM: Self = Self(15);
    /// Go on after a stop.
    pub const CONT: Self = Self(18);
    /// Stop; cannot be caught.
    pub const STOP: Self = Self(19);
}

/// A text that names no signal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a signal: give a number from 1 to 64 or a name such as TERM or SIGTERM")]
pub struct ParseSignalError(String);

const SIGNAL_NAMES: [(&str, u8); 31] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("PWR", 30),
    ("SYS", 31),
];

impl FromStr for Signal {
    type Err = ParseSignalError;

    /// Reads a number from 1 to 64, or a name with or without `SIG`, in any case.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        let number = match name.parse::<u8>() {
            Ok(number) => Some(number).filter(|number| (1..=64).contains(number)),
            Err(_) => SIGNAL_NAMES.iter().find(|(known, _)| *known == name).map(|(_, n)| *n),
        };
        number.map(Self).ok_or_else(|| ParseSignalError(text.to_owned()))
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SIGNAL_NAMES.iter().find(|(_, number)| *number == self.0) {
            Some((name, _)) => write!(f, "SIG{name}"),
            None => write!(f, "signal {}", self.0),
        }
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecStatus {
    /// By itself, with this code.
    Exited(u8),
    /// By a signal.
    Signaled(Signal),
    /// Its time ran out and its process group was killed.
    TimedOut,
}

impl ExecStatus {
    /// Says whether the program exited with 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }
}

/// What a program that ran to its end left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ExecOutput {
    /// How it ended.
    pub status: ExecStatus,
    /// What it wrote on standard output, up to the limit.
    pub stdout: Bytes,
    /// What it wrote on standard error, up to the limit.
    pub stderr: Bytes,
    /// Bytes of standard output past the limit.
    pub stdout_dropped: u64,
    /// Bytes of standard error past the limit.
    pub stderr_dropped: u64,
    /// How long it ran, in guest time.
    pub elapsed: Duration,
}

impl ExecOutput {
    /// Puts an output together; for backends.
    #[must_use]
    pub fn new(status: ExecStatus, stdout: Bytes, stderr: Bytes, elapsed: Duration) -> Self {
        Self { status, stdout, stderr, stdout_dropped: 0, stderr_dropped: 0, elapsed }
    }

    /// Counts the bytes past the limit; for backends.
    #[must_use]
    pub fn with_dropped(mut self, stdout: u64, stderr: u64) -> Self {
        self.stdout_dropped = stdout;
        self.stderr_dropped = stderr;
        self
    }

    /// Gives standard output as text, with damaged characters replaced.
    #[must_use]
    pub fn stdout_text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Gives standard error as text, with damaged characters replaced.
    #[must_use]
    pub fn stderr_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// Names a process that the agent started. Unlike a pid it is never used again within a guest's life; it is kept
/// by snapshot, restore and fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId(pub u64);

/// A process that the agent knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ProcessInfo {
    /// Its id.
    pub id: ProcessId,
    /// Its pid in the guest.
    pub pid: u32,
    /// The program it was started with.
    pub program: String,
    /// How it ended, if it has.
    pub status: Option<ExecStatus>,
}

impl ProcessInfo {
    /// Puts an entry together; for backends.
    #[must_use]
    pub fn new(id: ProcessId, pid: u32, program: String, status: Option<ExecStatus>) -> Self {
        Self { id, pid, program, status }
    }
}

/// One of a process's two outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputChannel {
    /// Standard output, or a terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// From which bytes on a process's outputs are wanted. Bytes that the agent no longer keeps are left out, and the
/// handle's [`GuestProcess::offsets`] says where it really begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputOffsets {
    /// First byte of standard output.
    pub stdout: u64,
    /// First byte of standard error.
    pub stderr: u64,
}

/// A running guest process: its streams, its signals, its end.
///
/// Reading one output never waits for the other; an output that is not read stalls only the program that writes it.
/// Dropping the handle kills the process group, unless it was [detached](Self::detach).
#[derive(Debug)]
pub struct GuestProcess {
    handle: Box<dyn GuestProcessHandle>,
}

/// What a backend implements to give out [`GuestProcess`]es. Dropping it must kill the process group unless
/// `detach` was called.
#[async_trait]
#[allow(missing_docs, clippy::missing_errors_doc)]
pub trait GuestProcessHandle: Send + Sync + fmt::Debug {
    fn id(&self) -> ProcessId;
    fn pid(&self) -> u32;
    fn offsets(&self) -> OutputOffsets;
    async fn read(&self, channel: OutputChannel) -> VmResult<Option<Bytes>>;
    async fn write_stdin(&self, bytes: Bytes) -> VmResult<()>;
    async fn close_stdin(&self) -> VmResult<()>;
    async fn signal(&self, signal: Signal) -> VmResult<()>;
    async fn resize(&self, size: TtySize) -> VmResult<()>;
    async fn wait(&self) -> VmResult<ExecStatus>;
    async fn detach(&self) -> VmResult<()>;
}

impl GuestProcess {
    /// Wraps a backend's handle.
    #[must_use]
    pub fn new(handle: Box<dyn GuestProcessHandle>) -> Self {
        Self { handle }
    }

    /// Gives the id to attach by.
    #[must_use]
    pub fn id(&self) -> ProcessId {
        self.handle.id()
    }

    /// Gives the pid in the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.handle.pid()
    }

    /// Gives the offsets of the next byte that each output will give.
    #[must_use]
    pub fn offsets(&self) -> OutputOffsets {
        self.handle.offsets()
    }

    /// Reads the next bytes of standard output, or `None` at its end. Cancellation safe: no byte is lost.
    ///
    /// # Errors
    /// The common ones of [`VmInstance`](crate::VmInstance), as for every method here.
    pub async fn read_stdout(&self) -> VmResult<Option<Bytes>> {
        self.handle.read(OutputChannel::Stdout).await
    }

    /// Reads the next bytes of standard error, or `None` at its end. Cancellation safe: no byte is lost.
    ///
    /// # Errors
    /// As [`read_stdout`](Self::read_stdout).
    pub async fn read_stderr(&self) -> VmResult<Option<Bytes>> {
        self.handle.read(OutputChannel::Stderr).await
    }

    /// Writes to standard input; waits while the program does not read. When it is cancelled, a prefix of the
    /// bytes may have been taken.
    ///
    /// # Errors
    /// As [`read_stdout`](Self::read_stdout); bytes for a program that has closed its input are dropped without error.
    pub async fn write_stdin(&self, bytes: impl Into<Bytes> + Send) -> VmResult<()> {
        self.handle.write_stdin(bytes.into()).await
    }

    /// Ends standard input; the program then reads end-of-file.
    ///
    /// # Errors
    /// As [`read_stdout`](Self::read_stdout).
    pub async fn close_stdin(&self) -> VmResult<()> {
        self.handle.close_stdin().await
    }

    /// Sends a signal to the program's process group. Nothing happens where it has ended.
    ///
    /// # Errors
    /// As [`read_stdout`](Self::read_stdout).
    pub async fn signal(&self, signal: Signal) -> VmResult<()> {
        self.handle.signal(signal).await
    }

    /// Sets the size of the program's terminal.
    ///
    /// # Errors
    /// [`InvalidConfig`](crate::VmErrorKind::InvalidConfig) where it has none.
    pub async fn resize(&self, size: TtySize) -> VmResult<()> {
        self.handle.resize(size).await
    }

    /// Waits for the program's end. Output that was not read by then can still be read.
    ///
    /// # Errors
    /// As [`read_stdout`](Self::read_stdout).
    pub async fn wait(&self) -> VmResult<ExecStatus> {
        self.handle.wait().await
    }

    /// Lets go of the process without ending it, and gives the id to attach by. The agent keeps its last output.
    ///
    /// # Errors
    /// As [`read_stdout`](Self::read_stdout).
    pub async fn detach(self) -> VmResult<ProcessId> {
        self.handle.detach().await?;
        Ok(self.handle.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn signals_are_read_as_they_are_written(number in 1_u8..=31) {
            let signal = Signal(number);
            prop_assert_eq!(signal.to_string().parse(), Ok(signal));
            prop_assert_eq!(number.to_string().parse(), Ok(signal));
        }

        #[test]
        fn other_text_is_refused(text in "[A-Z]{0,3}Q|0|6[5-9]|[1-9][0-9]{3}|") {
            prop_assert!(text.parse::<Signal>().is_err());
        }
    }
}
