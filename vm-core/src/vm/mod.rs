//! The one implementation of [`VmInstance`].
//!
//! A [`CoreVm`] is a handle: it checks, and asks. Its actor carries out the lifecycle, one thing at a time; processes
//! and files go straight to the agent client, beside each other.

mod actor;
mod capture;
mod core;
mod events;
mod lifecycle;
mod streams;

pub(crate) use self::capture::{Saved, compatible_with};

use self::{
    actor::{Answer, Command, Token, Work},
    core::{Call, Core},
};
use crate::{agent::AgentClient, backend::Parts};
use async_trait::async_trait;
use bytes::Bytes;
use std::{fmt, sync::Arc, time::Duration};
use tokio::sync::oneshot;
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    Capabilities, Capability, CreateDirOptions, DirEntry, EventStream, ExecOutput, ExecRequest,
    FileStat, ForkOptions, GuestListener, GuestProcess, GuestStream, Inspection, Operation,
    OutputOffsets, ProcessId, ProcessInfo, RemoveOptions, RestoreOptions, Snapshot,
    SnapshotOptions, StopOptions, VmConfig, VmErrorKind, VmEvent, VmExit, VmId, VmInstance,
    VmMetrics, VmResult, VmState, WriteOptions,
};

/// A handle to one machine. Dropping it ends the machine.
pub(crate) struct CoreVm {
    core: Arc<Core>,
}

impl CoreVm {
    /// Makes a machine in Created.
    pub(crate) fn create(parts: &Arc<Parts>, config: Arc<VmConfig>) -> Self {
        Self { core: Core::create(parts.clone(), config) }
    }

    fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Restores a verified state into this machine, which was made for it.
    pub(crate) async fn restore_saved(
        &self,
        saved: Saved,
        options: RestoreOptions,
    ) -> Result<(), VmErrorKind> {
        self.bring_up(|token| Work::Restore(saved, options, token)).await
    }

    /// Has the actor do something, in order of arrival.
    async fn ask(&self, work: Work) -> Result<Answer, VmErrorKind> {
        let (reply, answer) = oneshot::channel();
        self.core.enqueue(Command { work, reply });
        answer.await.unwrap_or_else(|_| {
            Err(VmErrorKind::Internal { detail: "the machine's task is gone".to_owned() })
        })
    }

    /// Has the actor start or restore the machine, and undo that if the caller goes away before it learns of it.
    async fn bring_up(&self, work: impl FnOnce(Token) -> Work) -> Result<(), VmErrorKind> {
        let token = self.core.next_token();
        let undo = Undo { core: &self.core, token: Some(token) };
        let done = self.ask(work(token)).await.map(drop);
        undo.disarm();
        done
    }

    async fn ask_for_nothing(
        &self,
        call: Call<'_>,
        needs: Option<Capability>,
        work: Work,
    ) -> VmResult<()> {
        let answer = match needs.map_or(Ok(()), |capability| self.core.require(capability)) {
            Ok(()) => self.ask(work).await.map(drop),
            Err(kind) => Err(kind),
        };
        call.end(answer)
    }

    /// Gives the client of a guest that may be asked.
    fn client(&self, operation: Operation, needs: Capability) -> Result<AgentClient, VmErrorKind> {
        self.core.require(needs)?;
        let shared = self.core.lock();
        if !planted(Bug::EndedGuestIsAsked) {
            shared.state.admits(operation)?;
        }
        shared.client.clone().ok_or(VmErrorKind::Disconnected)
    }

    /// Checks what a request asks beyond running a program.
    fn check_exec(&self, request: &ExecRequest) -> Result<(), VmErrorKind> {
        if request.tty.is_some() {
            self.core.require(Capability::Tty)?;
        }
        if request.user.is_some() {
            self.core.require(Capability::Users)?;
        }
        Ok(())
    }
}

#[async_trait]
impl VmInstance for CoreVm {
    fn id(&self) -> VmId {
        self.core.id
    }

    fn config(&self) -> &VmConfig {
        &self.core.config
    }

    fn state(&self) -> VmState {
        self.core.lock().state.clone()
    }

    fn capabilities(&self) -> Capabilities {
        self.core.parts.hypervisor.capabilities()
    }

    async fn start(&self) -> VmResult<()> {
        let call = self.core.call(Operation::Start, "");
        call.end(self.bring_up(Work::Start).await)
    }

    async fn stop(&self, options: StopOptions) -> VmResult<()> {
        let call = self.core.call(Operation::Stop, "");
        self.ask_for_nothing(call, None, Work::Stop(options)).await
    }

    async fn kill(&self) -> VmResult<()> {
        let call = self.core.call(Operation::Kill, "");
        self.ask_for_nothing(call, None, Work::Kill).await
    }

    async fn pause(&self) -> VmResult<()> {
        let call = self.core.call(Operation::Pause, "");
        self.ask_for_nothing(call, Some(Capability::Pause), Work::Pause).await
    }

    async fn resume(&self) -> VmResult<()> {
        let call = self.core.call(Operation::Resume, "");
        self.ask_for_nothing(call, Some(Capability::Pause), Work::Resume).await
    }

    async fn wait(&self) -> VmExit {
        let call = self.core.call(Operation::Wait, "");
        let before = {
            let shared = self.core.lock();
            if planted(Bug::WaitEndsInCreated) && shared.state == VmState::Created {
                return VmExit::Stopped;
            }
            let over = shared.state.is_ended() && !planted(Bug::WaitMissesTheEnd);
            if over { None } else { Some(shared.ends) }
        };
        let exit = self
            .core
            .watch(|shared| match before {
                Some(before) if shared.ends == before => None,
                _ => shared.last_exit.clone(),
            })
            .await;
        let _ = call.end(Ok(()));
        exit
    }

    async fn wait_ready(&self, timeout: Duration) -> VmResult<()> {
        let call = self.core.call(Operation::WaitReady, "");
        if timeout.is_zero() {
            return call.end(Err(VmErrorKind::invalid("timeout", "must be above zero")));
        }
        let is_ready = |state: &VmState| {
            let early = *state == VmState::Starting && planted(Bug::ReadyTooEarly);
            *state == VmState::Running || early
        };
        let timeout =
            if planted(Bug::ReadinessHasNoLimit) { Duration::from_secs(1 << 20) } else { timeout };
        let ready = self.core.watch(|shared| is_ready(&shared.state).then_some(()));
        let ready = crate::env::timeout(&*self.core.parts.env, timeout, ready).await;
        call.end(ready.map_err(|elapsed| VmErrorKind::Timeout { after: elapsed.after }))
    }

    async fn ping(&self) -> VmResult<Duration> {
        let call = self.core.call(Operation::Ping, "");
        let state = self.core.lock().state.admits(Operation::Ping);
        let client =
            state.and_then(|()| self.core.lock().client.clone().ok_or(VmErrorKind::Disconnected));
        call.end(match client {
            Ok(client) => client.ping().await,
            Err(kind) => Err(kind),
        })
    }

    async fn exec(&self, request: ExecRequest) -> VmResult<ExecOutput> {
        let call = self.core.call(Operation::Exec, &request.program);
        let client = self.client(Operation::Exec, Capability::Exec);
        let checked = client.and_then(|it| self.check_exec(&request).map(|()| it));
        call.end(match checked {
            Ok(client) => client.exec(&self.core.config, request).await,
            Err(kind) => Err(kind),
        })
    }

    async fn spawn(&self, request: ExecRequest) -> VmResult<GuestProcess> {
        let call = self.core.call(Operation::Spawn, &request.program);
        let client = self.client(Operation::Spawn, Capability::Exec);
        let checked = client.and_then(|it| self.check_exec(&request).map(|()| it));
        let spawned = match checked {
            Ok(client) => client.spawn(self.core.id, &self.core.config, request).await,
            Err(kind) => Err(kind),
        };
        let process = call.end(spawned)?;
        let process = GuestProcess::new(process.boxed());
        self.core.publish(&VmEvent::ProcessStarted(process.id()));
        Ok(process)
    }

    async fn attach_process(
        &self,
        process: ProcessId,
        offsets: OutputOffsets,
    ) -> VmResult<GuestProcess> {
        let call = self.core.call(Operation::AttachProcess, "");
        let attached = match self.client(Operation::AttachProcess, Capability::Exec) {
            Ok(client) => client.attach(self.core.id, process, offsets).await,
            Err(kind) => Err(kind),
        };
        call.end(attached).map(|process| GuestProcess::new(process.boxed()))
    }

    async fn processes(&self) -> VmResult<Vec<ProcessInfo>> {
        let call = self.core.call(Operation::Processes, "");
        call.end(match self.client(Operation::Processes, Capability::Exec) {
            Ok(client) => client.processes().await,
            Err(kind) => Err(kind),
        })
    }

    async fn read_file(&self, path: &str) -> VmResult<Bytes> {
        let call = self.core.call(Operation::ReadFile, path);
        call.end(match self.client(Operation::ReadFile, Capability::Files) {
            Ok(client) => client.read_file(path).await,
            Err(kind) => Err(kind),
        })
    }

    async fn write_file(&self, path: &str, contents: Bytes, options: WriteOptions) -> VmResult<()> {
        let call = self.core.call(Operation::WriteFile, path);
        call.end(match self.client(Operation::WriteFile, Capability::Files) {
            Ok(client) => client.write_file(path, contents, &options).await,
            Err(kind) => Err(kind),
        })
    }

    async fn stat(&self, path: &str) -> VmResult<FileStat> {
        let call = self.core.call(Operation::Stat, path);
        call.end(match self.client(Operation::Stat, Capability::Files) {
            Ok(client) => client.stat(path).await,
            Err(kind) => Err(kind),
        })
    }

    async fn list_dir(&self, path: &str) -> VmResult<Vec<DirEntry>> {
        let call = self.core.call(Operation::ListDir, path);
        call.end(match self.client(Operation::ListDir, Capability::Files) {
            Ok(client) => client.list_dir(path).await,
            Err(kind) => Err(kind),
        })
    }

    async fn create_dir(&self, path: &str, options: CreateDirOptions) -> VmResult<()> {
        let call = self.core.call(Operation::CreateDir, path);
        call.end(match self.client(Operation::CreateDir, Capability::Files) {
            Ok(client) => client.create_dir(path, &options).await,
            Err(kind) => Err(kind),
        })
    }

    async fn remove(&self, path: &str, options: RemoveOptions) -> VmResult<()> {
        let call = self.core.call(Operation::Remove, path);
        call.end(match self.client(Operation::Remove, Capability::Files) {
            Ok(client) => client.remove(path, &options).await,
            Err(kind) => Err(kind),
        })
    }

    async fn rename(&self, from: &str, to: &str) -> VmResult<()> {
        let call = self.core.call(Operation::Rename, from);
        call.end(match self.client(Operation::Rename, Capability::Files) {
            Ok(client) => client.rename(from, to).await,
            Err(kind) => Err(kind),
        })
    }

    async fn connect(&self, port: u32) -> VmResult<GuestStream> {
        let call = self.core.call(Operation::Connect, &port.to_string());
        call.end(self.core.connect(port).await)
    }

    async fn listen(&self, port: u32) -> VmResult<GuestListener> {
        let call = self.core.call(Operation::Listen, &port.to_string());
        call.end(self.core.listen(port).await)
    }

    async fn snapshot(&self, options: SnapshotOptions) -> VmResult<Snapshot> {
        let call = self.core.call(Operation::Snapshot, "");
        let mut allowed = self.core.require(Capability::Snapshot);
        if options.tracked || options.base.is_some() {
            allowed = allowed.and(self.core.require(Capability::IncrementalSnapshot));
        }
        let answer = match allowed {
            Ok(()) => self.ask(Work::Snapshot(options)).await,
            Err(kind) => Err(kind),
        };
        call.end(answer.and_then(|answer| match answer {
            Answer::Snapshot(snapshot) => Ok(*snapshot),
            _ => Err(mixed_up()),
        }))
    }

    async fn restore(&self, snapshot: &Snapshot, options: RestoreOptions) -> VmResult<()> {
        let call = self.core.call(Operation::Restore, "");
        let mut allowed = self.core.require(Capability::RestoreInPlace);
        if options.tracked {
            allowed = allowed.and(self.core.require(Capability::IncrementalSnapshot));
        }
        let restored = match allowed {
            Ok(()) => {
                let saved = Saved::File(snapshot.path.clone());
                self.bring_up(|token| Work::Restore(saved, options, token)).await
            }
            Err(kind) => Err(kind),
        };
        call.end(restored)
    }

    async fn fork(&self, options: ForkOptions) -> VmResult<Vec<VmResult<Arc<dyn VmInstance>>>> {
        let call = self.core.call(Operation::Fork, "");
        let answer = match self.core.require(Capability::Fork) {
            Ok(()) => self.ask(Work::Fork(options)).await,
            Err(kind) => Err(kind),
        };
        call.end(answer.and_then(|answer| match answer {
            Answer::Children(children) => Ok(children),
            _ => Err(mixed_up()),
        }))
    }

    async fn inspect(&self) -> VmResult<Inspection> {
        let call = self.core.call(Operation::Inspect, "");
        let answer = match self.core.require(Capability::Inspect) {
            Ok(()) => self.ask(Work::Inspect).await,
            Err(kind) => Err(kind),
        };
        call.end(answer.and_then(|answer| match answer {
            Answer::Inspection(mut seen) => {
                if planted(Bug::InspectionOfAnother) {
                    seen.vcpus.clear();
                }
                Ok(*seen)
            }
            _ => Err(mixed_up()),
        }))
    }

    async fn metrics(&self) -> VmResult<VmMetrics> {
        let call = self.core.call(Operation::Metrics, "");
        call.end(self.core.metrics().await)
    }

    fn console(&self) -> Bytes {
        let shared = self.core.lock();
        match &shared.machine {
            Some(machine) => machine.console(),
            None => shared.console.clone(),
        }
    }

    fn events(&self) -> EventStream {
        Box::pin(self.core.lock().subscribers.subscribe())
    }
}

impl Core {
    async fn metrics(&self) -> Result<VmMetrics, VmErrorKind> {
        let (machine, client, boot, up_since, pauses, state) = {
            let shared = self.lock();
            (
                shared.machine.clone(),
                shared.client.clone(),
                shared.boot,
                shared.up_since,
                shared.pauses.clone(),
                shared.state.clone(),
            )
        };
        let now = self.now();
        let mut metrics = VmMetrics::default();
        metrics.boot = boot;
        metrics.uptime = up_since.map(|since| now.saturating_sub(since));
        metrics.paused = up_since.map(|_| pauses.paused(now));
        if let Some(machine) = machine {
            let after = self.config.timeouts.request;
            let stats = crate::env::timeout(&*self.parts.env, after, machine.stats()).await;
            let stats =
                stats.map_err(|elapsed| VmErrorKind::Timeout { after: elapsed.after })??;
            metrics.cpu_time = stats.cpu_time;
            metrics.memory_used_bytes = stats.memory_used_bytes;
            metrics.vm_exits = stats.vm_exits;
        }
        if let Some(client) = client {
            let counters = client.counters();
            metrics.agent_bytes_sent = Some(counters.sent_bytes);
            metrics.agent_bytes_received = Some(counters.received_bytes);
            metrics.agent_reconnects = Some(counters.reconnects);
            if state == VmState::Running && self.has(Capability::Exec) {
                let processes = client.processes().await?;
                let running = processes.iter().filter(|process| process.status.is_none()).count();
                metrics.processes = u64::try_from(running).ok();
            }
        }
        Ok(metrics)
    }
}

impl Drop for CoreVm {
    fn drop(&mut self) {
        let (reply, _) = oneshot::channel();
        self.core.enqueue(Command { work: Work::Dispose, reply });
    }
}

impl fmt::Debug for CoreVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CoreVm")
            .field("id", &self.core.id)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// Undoes a start or restore when it is dropped.
struct Undo<'a> {
    core: &'a Core,
    token: Option<Token>,
}

impl Undo<'_> {
    fn disarm(mut self) {
        self.token = None;
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(token) = self.token
            && !planted(Bug::LateCancelIsMissed)
        {
            let (reply, _) = oneshot::channel();
            self.core.enqueue(Command { work: Work::Undo(token), reply });
        }
    }
}

fn mixed_up() -> VmErrorKind {
    VmErrorKind::Internal { detail: "the machine's task answered another question".to_owned() }
}
