//! The trait itself.

use crate::{
    capability::Capabilities,
    config::VmConfig,
    error::VmResult,
    event::EventStream,
    exec::{ExecOutput, ExecRequest, GuestProcess, OutputOffsets, ProcessId, ProcessInfo, Signal},
    file::{CreateDirOptions, DirEntry, FileStat, RemoveOptions, WriteOptions},
    id::VmId,
    inspection::Inspection,
    metrics::VmMetrics,
    snapshot::{RestoreOptions, Snapshot, SnapshotOptions},
    state::{CrashReason, VmState},
    stream::{GuestListener, GuestStream},
};
use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{fmt, sync::Arc, time::Duration};

/// One virtual machine.
///
/// All methods take `&self`; share a machine as `Arc<dyn VmInstance>`. Dropping the last handle ends the machine
/// and leaves nothing behind.
///
/// # Promises that hold for every method
///
/// - **Truth.** After an operation failed, timed out or was cancelled, [`state`](Self::state) is what the machine
///   really is.
/// - **Cancellation safety.** Every future may be dropped at any await. A dropped [`start`](Self::start) or
///   [`restore`](Self::restore) is undone: the machine is removed. A dropped [`pause`](Self::pause),
///   [`resume`](Self::resume), [`stop`](Self::stop) or [`kill`](Self::kill) is carried out all the same.
/// - **Order.** Lifecycle operations (start, restore, pause, resume, snapshot, fork) are served in order of arrival.
///   Processes and files are served beside each other. `stop` and `kill` take precedence over all of them; what
///   they cut short fails with [`Interrupted`](crate::VmErrorKind::Interrupted).
/// - **Time.** Every operation ends by its deadline ([`Timeouts`](crate::Timeouts)), on the backend's own clock.
/// - **Honesty.** What the backend cannot do returns [`Unsupported`](crate::VmErrorKind::Unsupported) and is absent
///   from [`capabilities`](Self::capabilities).
///
/// # Errors common to all methods
/// [`InvalidState`](crate::VmErrorKind::InvalidState) by the table in [`VmState::admits`];
/// [`Timeout`](crate::VmErrorKind::Timeout), [`Interrupted`](crate::VmErrorKind::Interrupted),
/// [`GuestCrashed`](crate::VmErrorKind::GuestCrashed), [`VmmCrashed`](crate::VmErrorKind::VmmCrashed) and
/// [`Disconnected`](crate::VmErrorKind::Disconnected) where what they depend on ends.
///
/// # Example
/// ```
/// # use vm_sim::SimBackend;
/// # use vm_trait::*;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> VmResult<()> {
/// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
/// let vm = backend.create(VmConfig::default()).await?;
/// vm.start().await?;
/// let output = vm.exec(ExecRequest::new("echo").arg("hello")).await?;
/// assert!(output.status.success());
/// vm.pause().await?;
/// assert_eq!(vm.state(), VmState::Paused);
/// vm.resume().await?;
/// vm.stop(StopOptions::default()).await?;
/// assert_eq!(vm.wait().await, VmExit::Stopped);
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait VmInstance: Send + Sync + fmt::Debug {
    /// Gives the machine's name; it never changes.
    fn id(&self) -> VmId;

    /// Gives the configuration that the machine was made with.
    fn config(&self) -> &VmConfig;

    /// Gives the state as it is now, without waiting.
    fn state(&self) -> VmState;

    /// Gives what this machine's backend can do.
    fn capabilities(&self) -> Capabilities;

    /// Boots the machine and waits until its agent has answered the handshake. Allowed in Created, Stopped and
    /// Crashed; afterwards Running.
    ///
    /// # Errors
    /// [`BootFailed`](crate::VmErrorKind::BootFailed) with the stage and the last console lines, also when the
    /// boot did not end within [`Timeouts::boot`](crate::Timeouts::boot);
    /// [`PortInUse`](crate::VmErrorKind::PortInUse) where somebody has a port that the configuration maps.
    async fn start(&self) -> VmResult<()>;

    /// Asks the guest to end, and ends it by force once the grace is over. Allowed in every state and idempotent.
    /// When this returns, no guest code runs any more.
    ///
    /// # Errors
    /// None in ordinary operation; [`Internal`](crate::VmErrorKind::Internal) when the machine could not be removed.
    async fn stop(&self, options: StopOptions) -> VmResult<()>;

    /// Ends the machine by force. Allowed in every state and idempotent. When this returns, no guest code runs.
    ///
    /// # Errors
    /// As [`stop`](Self::stop).
    async fn kill(&self) -> VmResult<()>;

    /// Stops all guest instructions and freezes the guest's monotonic time. Allowed in Running; afterwards Paused.
    ///
    /// # Errors
    /// The common ones.
    async fn pause(&self) -> VmResult<()>;

    /// Lets the guest run on. When this returns, its wall clock is right to within a second. Allowed in Paused;
    /// afterwards Running.
    ///
    /// # Errors
    /// The common ones.
    async fn resume(&self) -> VmResult<()>;

    /// Waits until the machine is Stopped or Crashed, and says which. Allowed in every state, by any number of
    /// callers; in Created it waits for a life to begin and end.
    async fn wait(&self) -> VmExit;

    /// Waits until the machine is Running. A `timeout` of zero is refused.
    ///
    /// # Errors
    /// [`Timeout`](crate::VmErrorKind::Timeout); [`InvalidConfig`](crate::VmErrorKind::InvalidConfig) for zero.
    async fn wait_ready(&self, timeout: Duration) -> VmResult<()>;

    /// Asks the agent for an answer and gives the round-trip time. Allowed in Running.
    ///
    /// # Errors
    /// The common ones.
    async fn ping(&self) -> VmResult<Duration>;

    /// Runs a program to its end and gives what it wrote, up to the request's limit. Allowed in Running.
    ///
    /// Standard input is what the request holds, then end-of-file. Dropping the future kills the program's
    /// process group.
    ///
    /// # Errors
    /// [`ExecFailed`](crate::VmErrorKind::ExecFailed) when the program could not be started. A program that ran and
    /// failed is not an error: see [`ExecOutput::status`].
    async fn exec(&self, request: ExecRequest) -> VmResult<ExecOutput>;

    /// Starts a program and gives a handle to its streams. Allowed in Running.
    ///
    /// # Errors
    /// As [`exec`](Self::exec).
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// let process = vm.spawn(ExecRequest::new("cat").open_stdin()).await?;
    /// process.write_stdin("a line\n").await?;
    /// assert_eq!(process.read_stdout().await?.as_deref(), Some(&b"a line\n"[..]));
    /// process.close_stdin().await?;
    /// assert_eq!(process.wait().await?, ExecStatus::Exited(0));
    /// # Ok(())
    /// # }
    /// ```
    async fn spawn(&self, request: ExecRequest) -> VmResult<GuestProcess>;

    /// Takes up the streams of a process that was detached, or whose handle was lost in a restore, from `offsets` on.
    ///
    /// # Errors
    /// [`ExecFailed`](crate::VmErrorKind::ExecFailed) with `NoSuchProcess`.
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// let process = vm.spawn(ExecRequest::new("sh").args(["-c", "echo one; sleep 1; echo two"])).await?;
    /// let id = process.detach().await?;
    /// let process = vm.attach_process(id, OutputOffsets { stdout: 4, stderr: 0 }).await?;
    /// assert_eq!(process.read_stdout().await?.as_deref(), Some(&b"two\n"[..]));
    /// # Ok(())
    /// # }
    /// ```
    async fn attach_process(
        &self,
        process: ProcessId,
        offsets: OutputOffsets,
    ) -> VmResult<GuestProcess>;

    /// Lists the processes that the agent started and has not yet been told to forget, by id.
    ///
    /// # Errors
    /// The common ones.
    async fn processes(&self) -> VmResult<Vec<ProcessInfo>>;

    /// Reads a whole guest file of at most 256 MiB.
    ///
    /// # Errors
    /// [`GuestFile`](crate::VmErrorKind::GuestFile), as for all methods on files; relative paths are `InvalidPath`;
    /// [`ResourceExhausted`](crate::VmErrorKind::ResourceExhausted) for a larger file.
    async fn read_file(&self, path: &str) -> VmResult<Bytes>;

    /// Replaces a guest file: whoever reads it sees the old content or the new one, never half, also when the
    /// machine dies half-way.
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// vm.write_file("/tmp/note", "hello".into(), WriteOptions::default()).await?;
    /// assert_eq!(vm.read_file("/tmp/note").await?, "hello");
    /// assert_eq!(vm.stat("/tmp/note").await?.size, 5);
    /// # Ok(())
    /// # }
    /// ```
    async fn write_file(&self, path: &str, contents: Bytes, options: WriteOptions) -> VmResult<()>;

    /// Gives a file's metadata; symbolic links are not followed.
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    async fn stat(&self, path: &str) -> VmResult<FileStat>;

    /// Lists a directory, sorted by name as bytes.
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    async fn list_dir(&self, path: &str) -> VmResult<Vec<DirEntry>>;

    /// Makes a directory.
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    async fn create_dir(&self, path: &str, options: CreateDirOptions) -> VmResult<()>;

    /// Removes a file, a symbolic link or a directory.
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    async fn remove(&self, path: &str, options: RemoveOptions) -> VmResult<()>;

    /// Renames a file or directory, replacing a file that stands at `to`.
    ///
    /// # Errors
    /// As [`read_file`](Self::read_file).
    async fn rename(&self, from: &str, to: &str) -> VmResult<()>;

    /// Opens a byte stream to a program in the guest that listens on a vsock port. Allowed in Running.
    ///
    /// Streams belong to one life of the machine. Snapshots and forks leave those of the source alone; the restored
    /// machine and the children have none of them: their guest finds its ends reset.
    ///
    /// # Errors
    /// [`ConnectRefused`](crate::VmErrorKind::ConnectRefused) while nothing listens there;
    /// [`InvalidConfig`](crate::VmErrorKind::InvalidConfig) for the ports 0 and `u32::MAX`, and for
    /// 1024, which is the agent's own.
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let backend = SimBackend::builder().seed(1).build()?;
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// use tokio::io::{AsyncReadExt, AsyncWriteExt};
    /// let server = vm.spawn(ExecRequest::new("vsock").args(["listen", "--echo", "5000"])).await?;
    /// server.read_stderr().await?; // It says that it listens.
    /// let mut stream = vm.connect(5000).await?;
    /// stream.write_all(b"hello").await?;
    /// stream.shutdown().await?;
    /// let mut echo = Vec::new();
    /// stream.read_to_end(&mut echo).await?;
    /// assert_eq!(echo, b"hello");
    /// # Ok(())
    /// # }
    /// ```
    async fn connect(&self, port: u32) -> VmResult<GuestStream>;

    /// Takes the streams that programs in the guest open to a vsock port of the host (context id 2), from now on, until
    /// the listener is dropped or this life of the machine ends. Allowed in Running.
    ///
    /// # Errors
    /// [`PortInUse`](crate::VmErrorKind::PortInUse); [`InvalidConfig`](crate::VmErrorKind::InvalidConfig) for the ports
    /// 0 and `u32::MAX`.
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let backend = SimBackend::builder().seed(1).build()?;
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// use tokio::io::AsyncReadExt;
    /// let mut listener = vm.listen(6000).await?;
    /// let program = vm.spawn(ExecRequest::new("sh").args(["-c", "echo hello | vsock connect 6000"])).await?;
    /// let mut stream = listener.accept().await?;
    /// let mut line = [0; 6];
    /// stream.read_exact(&mut line).await?;
    /// assert_eq!(&line, b"hello\n");
    /// drop(stream);
    /// assert_eq!(program.wait().await?, ExecStatus::Exited(0));
    /// # Ok(())
    /// # }
    /// ```
    async fn listen(&self, port: u32) -> VmResult<GuestListener>;

    /// Captures memory, devices and disks as of one instant. Allowed in Running and Paused; the state stays.
    ///
    /// # Errors
    /// [`HostIo`](crate::VmErrorKind::HostIo) and [`ResourceExhausted`](crate::VmErrorKind::ResourceExhausted); then
    /// no file is left that could be mistaken for a snapshot. [`Disconnected`](crate::VmErrorKind::Disconnected) where the
    /// agent of a machine that ran before cannot be told the time.
    async fn snapshot(&self, options: SnapshotOptions) -> VmResult<Snapshot>;

    /// Puts a captured state into this machine. Allowed in Created, Stopped and Crashed; afterwards Running or
    /// Paused, as asked.
    ///
    /// # Errors
    /// [`SnapshotCorrupt`](crate::VmErrorKind::SnapshotCorrupt),
    /// [`SnapshotIncompatible`](crate::VmErrorKind::SnapshotIncompatible);
    /// [`PortInUse`](crate::VmErrorKind::PortInUse) as for [`start`](Self::start).
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    /// vm.kill().await?;
    /// vm.restore(&snapshot, RestoreOptions::running()).await?;
    /// assert_eq!(vm.state(), VmState::Running);
    /// # Ok(())
    /// # }
    /// ```
    async fn restore(&self, snapshot: &Snapshot, options: RestoreOptions) -> VmResult<()>;

    /// Makes `options.count` copies of the machine as it is now, each in the state that this one is in. Allowed in
    /// Running and Paused; the state stays. Each child has an outcome of its own.
    ///
    /// # Errors
    /// An error as a whole only when no child could be tried, or when this machine, which ran before, cannot go on as it
    /// was: [`Disconnected`](crate::VmErrorKind::Disconnected) where its agent cannot be told the time.
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// vm.write("/tmp/who", "parent").await?;
    /// let mut children = vm.fork(ForkOptions::new(2)).await?;
    /// let child = children.remove(0)?;
    /// child.write("/tmp/who", "child").await?;
    /// assert_eq!(vm.read_to_string("/tmp/who").await?, "parent");
    /// # Ok(())
    /// # }
    /// ```
    async fn fork(&self, options: ForkOptions) -> VmResult<Vec<VmResult<Arc<dyn VmInstance>>>>;

    /// Looks at the machine from outside: registers, exits, memory. Allowed in Paused; nothing changes.
    ///
    /// # Errors
    /// [`Unsupported`](crate::VmErrorKind::Unsupported) without [`Capability::Inspect`](crate::Capability::Inspect), and
    /// the common ones.
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// vm.pause().await?;
    /// let seen = vm.inspect().await?;
    /// assert_eq!(seen.vcpus.len(), usize::from(vm.config().vcpus));
    /// # Ok(())
    /// # }
    /// ```
    async fn inspect(&self) -> VmResult<Inspection> {
        let what = crate::Capability::Inspect.name().to_owned();
        let kind = crate::VmErrorKind::Unsupported { what };
        Err(crate::VmError::new(crate::Operation::Inspect, kind).with_vm(self.id()))
    }

    /// Gives the counters that the backend has.
    ///
    /// # Errors
    /// The common ones.
    async fn metrics(&self) -> VmResult<VmMetrics>;

    /// Gives the last bytes of the guest's console, also after its end, up to the configured size.
    fn console(&self) -> Bytes;

    /// Gives the events of this machine from now on.
    ///
    /// ```
    /// # use vm_sim::SimBackend;
    /// # use vm_trait::*;
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> VmResult<()> {
    /// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
    /// # let vm = backend.create(VmConfig::default()).await?;
    /// # vm.start().await?;
    /// use futures_core::Stream;
    /// use std::{future::poll_fn, pin::Pin};
    /// let mut events = vm.events();
    /// vm.kill().await?;
    /// let first = poll_fn(|cx| Pin::new(&mut events).poll_next(cx)).await;
    /// assert!(matches!(first, Some(VmEvent::State { from: VmState::Running, .. })));
    /// # Ok(())
    /// # }
    /// ```
    fn events(&self) -> EventStream;
}

/// How a machine is to be stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StopOptions {
    /// How long the guest may take before it is ended by force. Zero means at once.
    pub grace: Duration,
    /// The signal that the guest's processes get first.
    pub signal: Signal,
}

impl Default for StopOptions {
    /// Ten seconds of grace, SIGTERM.
    fn default() -> Self {
        Self { grace: Duration::from_secs(10), signal: Signal::TERM }
    }
}

impl StopOptions {
    /// Sets the grace.
    #[must_use]
    pub fn with_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Sets the first signal.
    #[must_use]
    pub fn with_signal(mut self, signal: Signal) -> Self {
        self.signal = signal;
        self
    }
}

/// How a machine is to be forked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ForkOptions {
    /// How many children, 1 to 1,024.
    pub count: u32,
}

impl ForkOptions {
    /// Asks for `count` children.
    #[must_use]
    pub fn new(count: u32) -> Self {
        Self { count }
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum VmExit {
    /// It was stopped or killed.
    Stopped,
    /// The guest powered off by itself.
    PoweredOff,
    /// It crashed.
    Crashed(CrashReason),
}
