//! A backend that lies: a machine that was paused and resumed says Ok to writes of files and forgets every other one.

use async_trait::async_trait;
use bytes::Bytes;
use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};
use vm_trait::{
    Capabilities, CreateDirOptions, DirEntry, EventStream, ExecOutput, ExecRequest, FileStat,
    ForkOptions, GuestListener, GuestProcess, GuestStream, HostLimits, Inspection, OutputOffsets,
    ProcessId, ProcessInfo, RemoveOptions, RestoreOptions, Snapshot, SnapshotOptions, StopOptions,
    VmBackend, VmConfig, VmExit, VmId, VmInstance, VmMetrics, VmResult, VmState, WriteOptions,
};

/// Puts the lie in front of a backend.
pub(crate) fn forgetful(inner: Arc<dyn VmBackend>) -> Arc<dyn VmBackend> {
    Arc::new(Forgetful(inner))
}

#[derive(Debug)]
struct Forgetful(Arc<dyn VmBackend>);

#[derive(Debug)]
struct ForgetfulVm {
    inner: Arc<dyn VmInstance>,
    was_resumed: AtomicBool,
    writes: AtomicU32,
}

fn wrap(inner: Arc<dyn VmInstance>) -> Arc<dyn VmInstance> {
    let (was_resumed, writes) = (AtomicBool::new(false), AtomicU32::new(0));
    Arc::new(ForgetfulVm { inner, was_resumed, writes })
}

#[async_trait]
impl VmBackend for Forgetful {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    fn limits(&self) -> HostLimits {
        self.0.limits()
    }

    async fn create(&self, config: VmConfig) -> VmResult<Arc<dyn VmInstance>> {
        self.0.create(config).await.map(wrap)
    }

    async fn restore(
        &self,
        snapshot: &Snapshot,
        options: RestoreOptions,
    ) -> VmResult<Arc<dyn VmInstance>> {
        self.0.restore(snapshot, options).await.map(wrap)
    }

    async fn export_snapshot(&self, snapshot: &Snapshot) -> VmResult<Bytes> {
        self.0.export_snapshot(snapshot).await
    }

    async fn import_snapshot(&self, bytes: Bytes) -> VmResult<Snapshot> {
        self.0.import_snapshot(bytes).await
    }

    async fn delete_snapshot(&self, snapshot: &Snapshot) -> VmResult<()> {
        self.0.delete_snapshot(snapshot).await
    }

    async fn merge_snapshot(
        &self,
        snapshot: &Snapshot,
        path: Option<PathBuf>,
    ) -> VmResult<Snapshot> {
        self.0.merge_snapshot(snapshot, path).await
    }
}

#[async_trait]
impl VmInstance for ForgetfulVm {
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
        self.inner.capabilities()
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
        self.inner.pause().await
    }

    async fn resume(&self) -> VmResult<()> {
        self.inner.resume().await?;
        self.was_resumed.store(true, Ordering::Relaxed);
        Ok(())
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
        self.inner.exec(request).await
    }

    async fn spawn(&self, request: ExecRequest) -> VmResult<GuestProcess> {
        self.inner.spawn(request).await
    }

    async fn attach_process(
        &self,
        process: ProcessId,
        offsets: OutputOffsets,
    ) -> VmResult<GuestProcess> {
        self.inner.attach_process(process, offsets).await
    }

    async fn processes(&self) -> VmResult<Vec<ProcessInfo>> {
        self.inner.processes().await
    }

    async fn read_file(&self, path: &str) -> VmResult<Bytes> {
        self.inner.read_file(path).await
    }

    async fn write_file(&self, path: &str, contents: Bytes, options: WriteOptions) -> VmResult<()> {
        let lies = self.was_resumed.load(Ordering::Relaxed)
            && self.writes.fetch_add(1, Ordering::Relaxed) % 2 == 1;
        // What is refused is refused, so that the lie takes a step more to be seen.
        if lies && self.inner.state() == VmState::Running && self.inner.stat(path).await.is_ok() {
            return Ok(());
        }
        self.inner.write_file(path, contents, options).await
    }

    async fn stat(&self, path: &str) -> VmResult<FileStat> {
        self.inner.stat(path).await
    }

    async fn list_dir(&self, path: &str) -> VmResult<Vec<DirEntry>> {
        self.inner.list_dir(path).await
    }

    async fn create_dir(&self, path: &str, options: CreateDirOptions) -> VmResult<()> {
        self.inner.create_dir(path, options).await
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> VmResult<()> {
        self.inner.remove(path, options).await
    }

    async fn rename(&self, from: &str, to: &str) -> VmResult<()> {
        self.inner.rename(from, to).await
    }

    async fn connect(&self, port: u32) -> VmResult<GuestStream> {
        self.inner.connect(port).await
    }

    async fn listen(&self, port: u32) -> VmResult<GuestListener> {
        self.inner.listen(port).await
    }

    async fn snapshot(&self, options: SnapshotOptions) -> VmResult<Snapshot> {
        self.inner.snapshot(options).await
    }

    async fn restore(&self, snapshot: &Snapshot, options: RestoreOptions) -> VmResult<()> {
        self.inner.restore(snapshot, options).await
    }

    async fn fork(&self, options: ForkOptions) -> VmResult<Vec<VmResult<Arc<dyn VmInstance>>>> {
        let children = self.inner.fork(options).await?;
        Ok(children.into_iter().map(|child| child.map(wrap)).collect())
    }

    async fn inspect(&self) -> VmResult<Inspection> {
        self.inner.inspect().await
    }

    async fn metrics(&self) -> VmResult<VmMetrics> {
        self.inner.metrics().await
    }

    fn console(&self) -> Bytes {
        self.inner.console()
    }

    fn events(&self) -> EventStream {
        self.inner.events()
    }
}
