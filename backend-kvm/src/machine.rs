//! [`KvmMachine`]: the seam's view of a life that can be saved and copied.

use crate::{
    control::{Answer, Request},
    hypervisor::LoadParcel,
    snapshot::{capture::Capture, load::Saved},
    vmm::memory_end,
};
use async_trait::async_trait;
use bytes::Bytes;
use rustix::pipe::PipeFlags;
use std::{fs::File, io, os::fd::AsFd, sync::Arc, time::Instant};
use tokio::{net::unix::pipe, task::spawn_blocking};
use vm_core::machine::{
    Acceptor, CaptureOrder, Captured, Generation, Link, Machine, MachineError, MachineExit,
    MachineSpec, MachineStats, MachineStatus, Sections,
};
use vm_launcher::{
    files,
    life::{Life, Lives, host},
    machine::{LauncherMachine, name_of, unexpected},
    program::{Ours, Process, Started},
};
use vm_trait::{Inspection, VmConfig};

/// How much of a state may wait in the pipe for its reader.
const PIPE_BYTES: usize = 1 << 20;

/// One life of a KVM machine.
#[derive(Debug)]
pub(crate) struct KvmMachine {
    plain: LauncherMachine,
    lives: Arc<Lives>,
    config: Arc<VmConfig>,
    /// The name of its process.
    name: String,
}

impl KvmMachine {
    /// Makes the machine of a VM's present life, which is kept among all `lives`.
    pub(crate) fn new(spec: &MachineSpec, life: Arc<Life>, lives: &Arc<Lives>) -> Self {
        let plain = LauncherMachine::new(spec, life, lives);
        Self { plain, lives: lives.clone(), config: spec.config.clone(), name: name_of(spec) }
    }

    fn life(&self) -> &Arc<Life> {
        self.plain.life()
    }

    /// Makes one copy. When the future is dropped, nothing is left of it.
    async fn copy(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>, MachineError> {
        let began = Instant::now();
        let of_host = |error: io::Error| host(&error);
        let (ours, control, lifeline) = Ours::new().map_err(of_host)?;
        let ring = self.life().copy_console().map_err(of_host)?;
        let console_file = spec.config.console_file.as_deref().map(files::open_console_file);
        let console_file = console_file.transpose()?;
        let disks = own_disks(&spec.config)?;
        let mut fds = vec![control.as_fd(), lifeline.as_fd(), ours.messages.as_fd(), ring.file()];
        fds.extend(console_file.as_ref().map(AsFd::as_fd));
        fds.extend(disks.iter().map(AsFd::as_fd));
        let name = name_of(spec);
        let (answer, beside) = self.life().ask_for(Request::Fork { name }, &fds).await?;
        let process = match (answer?, beside.into_iter().next()) {
            (Answer::Forked { pid }, Some(exact)) => Process::of_launcher(pid, exact),
            (other, _) => return Err(unexpected(&other)),
        };
        drop((control, lifeline, console_file, disks));
        let Ours { control, lifeline, messages } = ours;
        let spawn_time = began.elapsed();
        let started = Started { control, process, lifeline, messages, spawn_time };
        let life = Life::of_copy(started, ring).await?;
        Ok(Arc::new(Self::new(spec, life, &self.lives)))
    }
}

#[async_trait]
impl Machine for KvmMachine {
    async fn boot(&self) -> Result<(), MachineError> {
        self.plain.boot().await
    }

    async fn pause(&self) -> Result<(), MachineError> {
        self.plain.pause().await
    }

    async fn resume(&self) -> Result<(), MachineError> {
        self.plain.resume().await
    }

    async fn kill(&self) -> Result<(), MachineError> {
        self.plain.kill().await
    }

    async fn wait(&self) -> MachineExit {
        self.plain.wait().await
    }

    async fn status(&self) -> Result<MachineStatus, MachineError> {
        self.plain.status().await
    }

    async fn connect(&self, port: u32) -> Result<Box<dyn Link>, MachineError> {
        self.plain.connect(port).await
    }

    async fn listen(&self, port: u32) -> Result<Box<dyn Acceptor>, MachineError> {
        self.plain.listen(port).await
    }

    async fn capture(&self, order: CaptureOrder) -> Result<Box<dyn Captured>, MachineError> {
        let of_host = |error: io::Error| host(&error);
        let (its, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map(|(ours, its)| (its, ours))
            .map_err(|error| host(&error.into()))?;
        // A longer pipe is quicker; a host may not allow it.
        let _ = rustix::pipe::fcntl_setpipe_size(&its, PIPE_BYTES);
        let ours = pipe::Receiver::from_owned_fd(ours).map_err(of_host)?;
        let disks = own_disks(&self.config)?;
        let mut fds = vec![its.as_fd()];
        fds.extend(disks.iter().map(AsFd::as_fd));
        let since = order.since.map(|generation| generation.0);
        let request = Request::Capture { since, track: order.track };
        let generation = match self.life().request(request, &fds).await? {
            Answer::Captured { generation } => generation.map(Generation),
            other => return Err(unexpected(&other)),
        };
        let lengths = disks.iter().map(|disk| disk.metadata().map(|about| about.len()));
        let lengths = lengths.collect::<io::Result<_>>().map_err(of_host)?;
        Ok(Box::new(Capture::new(ours, memory_end(self.config.memory.0), lengths, generation)))
    }

    async fn load(&self, sections: &Sections, track: bool) -> Result<(), MachineError> {
        let writable = self.config.disks.iter().filter(|disk| !disk.read_only).count();
        let saved = Saved::new(sections, writable).await?;
        let (config, name) = (self.config.clone(), self.name.clone());
        let ring = self.life().ring().try_clone_to_owned().map_err(|error| host(&error))?;
        let parcel = spawn_blocking(move || LoadParcel::new(saved, &config, name, track));
        let parcel = parcel.await.map_err(|error| MachineError::Failed(error.to_string()))??;
        let (message, fds) = parcel.packet(ring.as_fd());
        self.life().set_up(&message, &fds).await
    }

    async fn fork(&self, specs: &[MachineSpec]) -> Vec<Result<Arc<dyn Machine>, MachineError>> {
        let mut copies = Vec::with_capacity(specs.len());
        for spec in specs {
            copies.push(self.copy(spec).await);
        }
        copies
    }

    async fn inspect(&self) -> Result<Inspection, MachineError> {
        match self.life().request(Request::Inspect, &[]).await? {
            Answer::Inspection(seen) => Ok(*seen),
            other => Err(unexpected(&other)),
        }
    }

    async fn stats(&self) -> Result<MachineStats, MachineError> {
        self.plain.stats().await
    }

    fn console(&self) -> Bytes {
        self.plain.console()
    }
}

/// Makes an empty file for each writable disk, for a copy of it.
fn own_disks(config: &VmConfig) -> Result<Vec<File>, MachineError> {
    config.disks.iter().filter(|disk| !disk.read_only).map(|_| files::nameless()).collect()
}
