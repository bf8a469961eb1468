//! A backend that claims nothing and does nothing, and may lie about one capability: then its operations say Ok.

use async_trait::async_trait;
use bytes::Bytes;
use std::{path::PathBuf, sync::Arc, time::Duration};
use third_party_backend::MemoryBackend;
use vm_trait::{
    Capabilities, Capability, CreateDirOptions, DirEntry, EventStream, ExecOutput, ExecRequest,
    ExecStatus, FileKind, FileStat, ForkOptions, GuestListener, GuestListenerHandle, GuestProcess,
    GuestStream, HostLimits, Inspection, KernelConfig, Mib, NetworkConfig, Operation,
    OutputOffsets, ProcessId, ProcessInfo, RemoveOptions, RestoreOptions, RootConfig, Snapshot,
    SnapshotId, SnapshotMetadata, SnapshotOptions, StopOptions, VmBackend, VmConfig, VmError,
    VmErrorKind, VmExit, VmId, VmInstance, VmMetrics, VmResult, VmState, WriteOptions,
};

/// Makes the backend.
pub(crate) fn backend(lie: Option<Capability>) -> Arc<dyn VmBackend> {
    Arc::new(Liar { lie, inner: MemoryBackend::default() })
}

#[derive(Debug)]
struct Liar {
    lie: Option<Capability>,
    inner: MemoryBackend,
}

#[derive(Debug)]
struct LyingVm {
    lie: Option<Capability>,
    inner: Arc<dyn VmInstance>,
}

fn say<T>(lie: Option<Capability>, about: Capability, operation: Operation, ok: T) -> VmResult<T> {
    if lie == Some(about) {
        return Ok(ok);
    }
    Err(VmError::new(operation, VmErrorKind::Unsupported { what: about.name().to_owned() }))
}

/// What a capture or a restore needs depends on whether changes are to be tracked.
fn about_capture(tracked: bool) -> Capability {
    if tracked { Capability::IncrementalSnapshot } else { Capability::Snapshot }
}

fn snapshot() -> Snapshot {
    let metadata = SnapshotMetadata {
        id: SnapshotId(1),
        vm: VmId(1),
        backend: "liar".to_owned(),
        taken_at: Duration::ZERO,
        arch: String::new(),
        vcpus: 1,
        memory: Mib(64),
        label: None,
        base: None,
    };
    Snapshot::new("/nowhere".into(), metadata)
}

/// A listener that nobody reaches.
#[derive(Debug)]
struct DeafListener(u32);

#[async_trait]
impl GuestListenerHandle for DeafListener {
    fn port(&self) -> u32 {
        self.0
    }

    async fn accept(&mut self) -> VmResult<GuestStream> {
        std::future::pending().await
    }
}

#[async_trait]
impl VmBackend for Liar {
    fn name(&self) -> &str {
        "liar"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn limits(&self) -> HostLimits {
        self.inner.limits()
    }

    async fn create(&self, mut config: VmConfig) -> VmResult<Arc<dyn VmInstance>> {
        // It says yes to what it lies about, and forgets it.
        match self.lie {
            Some(Capability::Disks) => config.disks.clear(),
            Some(Capability::Kernel) => config.kernel = KernelConfig::default(),
            Some(Capability::Root) => config.root = RootConfig::default(),
            Some(Capability::ConsoleFile) => config.console_file = None,
            Some(Capability::Mounts) => config.mounts.clear(),
            Some(Capability::Limits) => config.limits.clear(),
            Some(lie) if config.network.capability() == Some(lie) => {
                config.network = NetworkConfig::None;
            }
            _ => {}
        }
        let inner = self.inner.create(config).await?;
        Ok(Arc::new(LyingVm { lie: self.lie, inner }))
    }

    async fn restore(
        &self,
        _: &Snapshot,
        options: RestoreOptions,
    ) -> VmResult<Arc<dyn VmInstance>> {
        let vm = self.create(VmConfig::default()).await?;
        say(self.lie, about_capture(options.tracked), Operation::Restore, vm)
    }

    async fn export_snapshot(&self, _: &Snapshot) -> VmResult<Bytes> {
        say(self.lie, Capability::Snapshot, Operation::ExportSnapshot, Bytes::new())
    }

    async fn import_snapshot(&self, _: Bytes) -> VmResult<Snapshot> {
        say(self.lie, Capability::Snapshot, Operation::ImportSnapshot, snapshot())
    }

    async fn delete_snapshot(&self, _: &Snapshot) -> VmResult<()> {
        say(self.lie, Capability::Snapshot, Operation::DeleteSnapshot, ())
    }

    async fn merge_snapshot(&self, _: &Snapshot, _: Option<PathBuf>) -> VmResult<Snapshot> {
        say(self.lie, Capability::IncrementalSnapshot, Operation::MergeSnapshot, snapshot())
    }
}

impl LyingVm {
    fn say<T>(&self, about: Capability, operation: Operation, ok: T) -> VmResult<T> {
        say(self.lie, about, operation, ok)
    }

    /// What an exec needs depends on its request.
    fn about(request: &ExecRequest) -> Capability {
        match request {
            ExecRequest { tty: Some(_), .. } => Capability::Tty,
            ExecRequest { user: Some(_), .. } => Capability::Users,
            _ => Capability::Exec,
        }
    }
}

#[async_trait]
impl VmInstance for LyingVm {
    fn id(&self) -> VmId {
        self.inner.id()
    }

    fn config(&self) -> &VmConfig {
        self.inner.config()
    }

    fn state(&self) -> VmState {
        self.inner.state()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    async fn start(&self) -> VmResult<()> {
        self.inner.start().await
    }

    async fn stop(&self, options: StopOptions) -> VmResult<()> {
        self.inner.stop(options).await
    }

    async fn kill(&self) -> VmResult<()> {
        self.inner.kill().await
    }

    async fn pause(&self) -> VmResult<()> {
        self.say(Capability::Pause, Operation::Pause, ())
    }

    async fn resume(&self) -> VmResult<()> {
        self.say(Capability::Pause, Operation::Resume, ())
    }

    async fn wait(&self) -> VmExit {
        self.inner.wait().await
    }

    async fn wait_ready(&self, timeout: Duration) -> VmResult<()> {
        self.inner.wait_ready(timeout).await
    }

    async fn ping(&self) -> VmResult<Duration> {
        self.inner.ping().await
    }

    async fn exec(&self, request: ExecRequest) -> VmResult<ExecOutput> {
        let nothing = (Bytes::new(), Bytes::new());
        let output = ExecOutput::new(ExecStatus::Exited(0), nothing.0, nothing.1, Duration::ZERO);
        self.say(Self::about(&request), Operation::Exec, output)
    }

    async fn spawn(&self, request: ExecRequest) -> VmResult<GuestProcess> {
        let kind = VmErrorKind::Unsupported { what: Self::about(&request).name().to_owned() };
        Err(VmError::new(Operation::Spawn, kind))
    }

    async fn attach_process(&self, _: ProcessId, _: OutputOffsets) -> VmResult<GuestProcess> {
        let kind = VmErrorKind::Unsupported { what: "exec".to_owned() };
        Err(VmError::new(Operation::AttachProcess, kind))
    }

    async fn processes(&self) -> VmResult<Vec<ProcessInfo>> {
        self.say(Capability::Exec, Operation::Processes, Vec::new())
    }

    async fn read_file(&self, _: &str) -> VmResult<Bytes> {
        self.say(Capability::Files, Operation::ReadFile, Bytes::new())
    }

    async fn write_file(&self, _: &str, _: Bytes, _: WriteOptions) -> VmResult<()> {
        self.say(Capability::Files, Operation::WriteFile, ())
    }

    async fn stat(&self, _: &str) -> VmResult<FileStat> {
        self.say(Capability::Files, Operation::Stat, FileStat::new(FileKind::File, 0, 0))
    }

    async fn list_dir(&self, _: &str) -> VmResult<Vec<DirEntry>> {
        self.say(Capability::Files, Operation::ListDir, Vec::new())
    }

    async fn create_dir(&self, _: &str, _: CreateDirOptions) -> VmResult<()> {
        self.say(Capability::Files, Operation::CreateDir, ())
    }

    async fn remove(&self, _: &str, _: RemoveOptions) -> VmResult<()> {
        self.say(Capability::Files, Operation::Remove, ())
    }

    async fn rename(&self, _: &str, _: &str) -> VmResult<()> {
        self.say(Capability::Files, Operation::Rename, ())
    }

    async fn connect(&self, port: u32) -> VmResult<GuestStream> {
        let stream = GuestStream::new(port, Box::new(tokio::io::empty()));
        self.say(Capability::Vsock, Operation::Connect, stream)
    }

    async fn listen(&self, port: u32) -> VmResult<GuestListener> {
        let listener = GuestListener::new(Box::new(DeafListener(port)));
        self.say(Capability::Vsock, Operation::Listen, listener)
    }

    async fn snapshot(&self, options: SnapshotOptions) -> VmResult<Snapshot> {
        let about = about_capture(options.tracked || options.base.is_some());
        self.say(about, Operation::Snapshot, snapshot())
    }

    async fn restore(&self, _: &Snapshot, options: RestoreOptions) -> VmResult<()> {
        let about = match options.tracked {
            true => Capability::IncrementalSnapshot,
            false => Capability::RestoreInPlace,
        };
        self.say(about, Operation::Restore, ())
    }

    async fn inspect(&self) -> VmResult<Inspection> {
        let seen = Inspection::new(Vec::new(), Vec::new());
        self.say(Capability::Inspect, Operation::Inspect, seen)
    }

    async fn fork(&self, _: ForkOptions) -> VmResult<Vec<VmResult<Arc<dyn VmInstance>>>> {
        self.say(Capability::Fork, Operation::Fork, Vec::new())
    }

    async fn metrics(&self) -> VmResult<VmMetrics> {
        self.inner.metrics().await
    }

    fn console(&self) -> Bytes {
        let boot = Bytes::from_static(b"booted\n");
        if self.lie == Some(Capability::Console) { boot } else { Bytes::new() }
    }

    fn events(&self) -> EventStream {
        self.inner.events()
    }
}
