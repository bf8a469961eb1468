//! One machine: a state and a file tree.

use crate::{tree::Tree, unsupported};
use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, timeout},
};
use vm_trait::{
    Capabilities, CreateDirOptions, DirEntry, EventStream, ExecOutput, ExecRequest, FileStat,
    ForkOptions, GuestFileError, GuestListener, GuestProcess, GuestStream, Operation,
    OutputOffsets, ProcessId, ProcessInfo, RemoveOptions, RestoreOptions, Snapshot,
    SnapshotOptions, StateInput, StopOptions, VmConfig, VmError, VmErrorKind, VmEvent, VmExit,
    VmId, VmInstance, VmMetrics, VmResult, VmState, WriteOptions,
};

/// How many events a slow reader may fall behind.
const EVENTS: usize = 1024;

/// A guest that is nothing but a file tree in memory; the tree lives as long as the guest runs.
#[derive(Debug)]
pub(crate) struct MemoryVm {
    id: VmId,
    config: VmConfig,
    capabilities: Capabilities,
    life: Mutex<Life>,
    /// The state, for those who wait for Running.
    state: watch::Sender<VmState>,
    /// How many lives have ended, for those who wait for an end. A state can pass by unseen; a count cannot.
    ends: watch::Sender<u64>,
    events: broadcast::Sender<VmEvent>,
}

#[derive(Debug)]
struct Life {
    state: VmState,
    guest: Option<(Tree, Instant)>,
}

impl MemoryVm {
    pub(crate) fn new(id: VmId, config: VmConfig, capabilities: Capabilities) -> Self {
        Self {
            id,
            config,
            capabilities,
            life: Mutex::new(Life { state: VmState::Created, guest: None }),
            state: watch::Sender::new(VmState::Created),
            ends: watch::Sender::new(0),
            events: broadcast::Sender::new(EVENTS),
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn error(&self, operation: Operation, kind: VmErrorKind) -> VmError {
        VmError::new(operation, kind).with_vm(self.id)
    }

    fn not_here(&self, operation: Operation, what: &str) -> VmError {
        unsupported(operation, what).with_vm(self.id)
    }

    /// Locks the machine if `operation` is allowed in its state.
    fn admitted(&self, operation: Operation) -> VmResult<MutexGuard<'_, Life>> {
        let life = self.life();
        life.state.admits(operation).map_err(|kind| self.error(operation, kind))?;
        Ok(life)
    }

    /// Moves the state, and tells those who listen.
    fn move_on(&self, life: &mut Life, input: &StateInput) {
        let Some(next) = life.state.next(input) else { return };
        let from = std::mem::replace(&mut life.state, next.clone());
        if from == next {
            return;
        }
        if next.is_ended() {
            self.ends.send_modify(|ends| *ends += 1);
        }
        self.state.send_replace(next.clone());
        // Nobody may be listening.
        let _ = self.events.send(VmEvent::State { from, to: next });
    }

    fn end(&self) {
        let mut life = self.life();
        life.guest = None;
        self.move_on(&mut life, &StateInput::StopBegun);
        self.move_on(&mut life, &StateInput::StopDone);
    }

    /// Runs `work` on the file tree of a running guest.
    fn on_files<T>(
        &self,
        operation: Operation,
        path: &str,
        work: impl FnOnce(&mut Tree) -> Result<T, GuestFileError>,
    ) -> VmResult<T> {
        let mut life = self.admitted(operation)?;
        let state = life.state.clone();
        let guest = life.guest.as_mut().ok_or(VmErrorKind::InvalidState { state });
        let (tree, _) = guest.map_err(|kind| self.error(operation, kind))?;
        work(tree).map_err(|error| {
            self.error(operation, VmErrorKind::GuestFile { path: path.to_owned(), error })
        })
    }
}

#[async_trait]
impl VmInstance for MemoryVm {
    fn id(&self) -> VmId {
        self.id
    }

    fn config(&self) -> &VmConfig {
        &self.config
    }

    fn state(&self) -> VmState {
        self.life().state.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    async fn start(&self) -> VmResult<()> {
        let mut life = self.admitted(Operation::Start)?;
        self.move_on(&mut life, &StateInput::BootBegun);
        life.guest = Some((Tree::new(self.config.memory.bytes(), wall_clock()), Instant::now()));
        self.move_on(&mut life, &StateInput::Ready);
        Ok(())
    }

    async fn stop(&self, _: StopOptions) -> VmResult<()> {
        self.end();
        Ok(())
    }

    async fn kill(&self) -> VmResult<()> {
        self.end();
        Ok(())
    }

    async fn pause(&self) -> VmResult<()> {
        Err(self.not_here(Operation::Pause, "pausing"))
    }

    async fn resume(&self) -> VmResult<()> {
        Err(self.not_here(Operation::Resume, "pausing"))
    }

    async fn wait(&self) -> VmExit {
        let mut ends = self.ends.subscribe();
        let seen = *ends.borrow_and_update();
        if !self.life().state.is_ended() {
            // The sender is part of this machine, so that it cannot be gone before the wait is over.
            let _ = ends.wait_for(|count| *count > seen).await;
        }
        VmExit::Stopped
    }

    async fn wait_ready(&self, limit: Duration) -> VmResult<()> {
        let operation = Operation::WaitReady;
        if limit.is_zero() {
            let kind = VmErrorKind::invalid("timeout", "must be above zero");
            return Err(self.error(operation, kind));
        }
        let mut state = self.state.subscribe();
        match timeout(limit, state.wait_for(|state| *state == VmState::Running)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(self.error(operation, VmErrorKind::Timeout { after: limit })),
        }
    }

    async fn ping(&self) -> VmResult<Duration> {
        let asked = Instant::now();
        drop(self.admitted(Operation::Ping)?);
        Ok(asked.elapsed())
    }

    async fn exec(&self, _: ExecRequest) -> VmResult<ExecOutput> {
        Err(self.not_here(Operation::Exec, "running programs"))
    }

    async fn spawn(&self, _: ExecRequest) -> VmResult<GuestProcess> {
        Err(self.not_here(Operation::Spawn, "running programs"))
    }

    async fn attach_process(&self, _: ProcessId, _: OutputOffsets) -> VmResult<GuestProcess> {
        Err(self.not_here(Operation::AttachProcess, "running programs"))
    }

    async fn processes(&self) -> VmResult<Vec<ProcessInfo>> {
        Err(self.not_here(Operation::Processes, "running programs"))
    }

    async fn read_file(&self, path: &str) -> VmResult<Bytes> {
        self.on_files(Operation::ReadFile, path, |tree| tree.read(path))
    }

    async fn write_file(&self, path: &str, contents: Bytes, options: WriteOptions) -> VmResult<()> {
        let now = wall_clock();
        self.on_files(Operation::WriteFile, path, |tree| tree.write(path, contents, &options, now))
    }

    async fn stat(&self, path: &str) -> VmResult<FileStat> {
        self.on_files(Operation::Stat, path, |tree| tree.stat(path))
    }

    async fn list_dir(&self, path: &str) -> VmResult<Vec<DirEntry>> {
        self.on_files(Operation::ListDir, path, |tree| tree.list(path))
    }

    async fn create_dir(&self, path: &str, options: CreateDirOptions) -> VmResult<()> {
        let now = wall_clock();
        self.on_files(Operation::CreateDir, path, |tree| tree.create_dir(path, &options, now))
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> VmResult<()> {
        self.on_files(Operation::Remove, path, |tree| tree.remove(path, &options))
    }

    async fn rename(&self, from: &str, to: &str) -> VmResult<()> {
        self.on_files(Operation::Rename, from, |tree| tree.rename(from, to))
    }

    async fn connect(&self, _: u32) -> VmResult<GuestStream> {
        Err(self.not_here(Operation::Connect, "vsock"))
    }

    async fn listen(&self, _: u32) -> VmResult<GuestListener> {
        Err(self.not_here(Operation::Listen, "vsock"))
    }

    async fn snapshot(&self, _: SnapshotOptions) -> VmResult<Snapshot> {
        Err(self.not_here(Operation::Snapshot, "snapshots"))
    }

    async fn restore(&self, _: &Snapshot, _: RestoreOptions) -> VmResult<()> {
        Err(self.not_here(Operation::Restore, "snapshots"))
    }

    async fn fork(&self, _: ForkOptions) -> VmResult<Vec<VmResult<Arc<dyn VmInstance>>>> {
        Err(self.not_here(Operation::Fork, "forks"))
    }

    async fn metrics(&self) -> VmResult<VmMetrics> {
        let life = self.life();
        let mut metrics = VmMetrics::default();
        if let Some((tree, began)) = &life.guest {
            metrics.uptime = Some(began.elapsed());
            metrics.memory_used_bytes = Some(tree.used());
        }
        Ok(metrics)
    }

    fn console(&self) -> Bytes {
        Bytes::new()
    }

    fn events(&self) -> EventStream {
        let next = |mut receiver: broadcast::Receiver<VmEvent>| async move {
            match receiver.recv().await {
                Ok(event) => Some((event, receiver)),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    Some((VmEvent::Missed(missed), receiver))
                }
                Err(broadcast::error::RecvError::Closed) => None,
            }
        };
        stream::unfold(self.events.subscribe(), next).boxed()
    }
}

fn wall_clock() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
