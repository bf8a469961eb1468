//! Snapshot, restore, fork and inspection.

use super::{
    CoreVm,
    actor::{Actor, Answer, Command, Cut, Reply, Work},
    core::Core,
    lifecycle::Origin,
};
use crate::{
    container::{self, Compatibility, ContainerWriter, Manifest},
    machine::{Machine, MachineSpec, Sections},
};
use futures_util::future::join_all;
use std::{path::PathBuf, sync::Arc};
use tokio::sync::oneshot;
use vm_guest_protocol::PROTOCOL_VERSION;
use vm_trait::{
    ForkOptions, Inspection, Operation, RestoreOptions, Snapshot, SnapshotId, SnapshotMetadata,
    SnapshotOptions, VmConfig, VmError, VmErrorKind, VmEvent, VmInstance, VmResult, VmState,
};

/// The most children of one fork.
const MOST_CHILDREN: u32 = 1024;

/// A captured state to restore from.
pub(crate) enum Saved {
    /// To be read and verified.
    File(PathBuf),
    /// Verified.
    Loaded(Box<Manifest>, Sections),
}

impl Actor {
    pub(super) async fn snapshot(
        &mut self,
        reply: &mut Reply,
        options: SnapshotOptions,
    ) -> Result<Snapshot, VmErrorKind> {
        let core = self.core.clone();
        let machine = self.machine()?;
        let env = &core.parts.env;
        let id = SnapshotId(env.random_u64());
        let after = core.config.timeouts.capture;
        let path = match options.path {
            Some(path) => path,
            None => match self.drive(reply, after, core.parts.snapshot_path(id)).await {
                Ok(path) => path?,
                Err(cut) => return Err(self.give_up(cut).await),
            },
        };
        let metadata = SnapshotMetadata {
            id,
            vm: core.id,
            backend: core.parts.hypervisor.name().to_owned(),
            taken_at: env.wall_clock(),
            arch: core.parts.hypervisor.arch().to_owned(),
            vcpus: core.config.vcpus,
            memory: core.config.memory,
            label: options.label,
        };
        let mut writer = {
            let created = ContainerWriter::create(core.parts.fs.clone(), &path, env.random_u64());
            match self.drive(reply, after, created).await {
                Ok(created) => created?,
                Err(cut) => return Err(self.give_up(cut).await),
            }
        };
        let was_running = core.lock().state == VmState::Running;
        let held_at = core.now();
        if was_running {
            self.hold().await?;
        }
        let captured = self.drive(reply, after, machine.capture()).await;
        if was_running && !matches!(captured, Err(Cut::Exited(_) | Cut::Preempted)) {
            self.let_go().await?;
        }
        core.took("paused for a snapshot", core.now().saturating_sub(held_at));
        let mut captured = match captured {
            Ok(captured) => captured?,
            Err(cut) => return Err(self.give_up(cut).await),
        };
        match self.drive(reply, after, captured.write(&mut writer)).await {
            Ok(written) => written?,
            Err(cut) => return Err(self.give_up(cut).await),
        }
        let (config, fits) = ((*core.config).clone(), compatibility(&core));
        let finished = Box::pin(writer.finish(metadata.clone(), config, fits));
        match self.drive(reply, after, finished).await {
            Ok(finished) => finished?,
            Err(cut) => return Err(self.give_up(cut).await),
        };
        core.publish(&VmEvent::SnapshotTaken(id));
        Ok(Snapshot::new(path, metadata))
    }

    pub(super) async fn restore(
        &mut self,
        reply: &mut Reply,
        saved: Saved,
        options: RestoreOptions,
    ) -> Result<(), VmErrorKind> {
        let core = self.core.clone();
        let (manifest, sections) = match saved {
            Saved::Loaded(manifest, sections) => (*manifest, sections),
            Saved::File(path) => {
                let after = core.config.timeouts.capture;
                let opened = container::open(&*core.parts.fs, &path);
                match self.drive(reply, after, opened).await {
                    Ok(opened) => opened?,
                    Err(cut) => return Err(self.give_up(cut).await),
                }
            }
        };
        manifest.compatibility.check(&compatibility(&core))?;
        self.revive(reply, Origin::Load(sections), options.resume).await
    }

    pub(super) async fn fork(
        &mut self,
        reply: &mut Reply,
        options: &ForkOptions,
    ) -> Result<Vec<VmResult<Arc<dyn VmInstance>>>, VmErrorKind> {
        if !(1..=MOST_CHILDREN).contains(&options.count) {
            let reason = format!("{} given, 1 to {MOST_CHILDREN} are allowed", options.count);
            return Err(VmErrorKind::invalid("count", reason));
        }
        let core = self.core.clone();
        let machine = self.machine()?;
        let after = core.config.timeouts.capture;
        let children: Vec<_> =
            (0..options.count).map(|_| CoreVm::create(&core.parts, core.config.clone())).collect();
        let specs: Vec<_> = children
            .iter()
            .map(|child| MachineSpec {
                vm: child.core().id,
                life: 1,
                config: core.config.clone(),
                loads: false,
            })
            .collect();
        let was_running = core.lock().state == VmState::Running;
        let held_at = core.now();
        if was_running {
            self.hold().await?;
        }
        let forked = self.drive(reply, after, machine.fork(&specs)).await;
        if was_running && !matches!(forked, Err(Cut::Exited(_) | Cut::Preempted)) {
            self.let_go().await?;
        }
        core.took("paused for a fork", core.now().saturating_sub(held_at));
        let forked = match forked {
            Ok(forked) => forked,
            Err(cut) => return Err(self.give_up(cut).await),
        };
        let outcomes = children.into_iter().zip(forked).map(|(child, machine)| async move {
            let adopted = match machine {
                Ok(machine) => adopt(child.core(), machine, was_running).await,
                Err(error) => Err(error.into()),
            };
            let id = child.core().id;
            adopted
                .map(|()| Arc::new(child) as Arc<dyn VmInstance>)
                .map_err(|kind| VmError::new(Operation::Fork, kind).with_vm(id))
        });
        match self.drive(reply, after, join_all(outcomes)).await {
            Ok(outcomes) => Ok(outcomes),
            Err(cut) => Err(self.give_up(cut).await),
        }
    }
}

impl Actor {
    pub(super) async fn inspect(&mut self, reply: &mut Reply) -> Result<Inspection, VmErrorKind> {
        let machine = self.machine()?;
        let after = self.core.config.timeouts.request;
        match self.drive(reply, after, machine.inspect()).await {
            Ok(seen) => Ok(seen?),
            Err(cut) => Err(self.give_up(cut).await),
        }
    }
}

/// Gives a forked machine to the actor of its VM, and waits until it is fit for use.
async fn adopt(
    child: &Arc<Core>,
    machine: Arc<dyn Machine>,
    resume: bool,
) -> Result<(), VmErrorKind> {
    let (reply, answer) = oneshot::channel();
    child.enqueue(Command { work: Work::Adopt { machine, resume }, reply });
    match answer.await {
        Ok(Ok(Answer::Done)) => Ok(()),
        Ok(Err(kind)) => Err(kind),
        Ok(Ok(_)) | Err(_) => Err(VmErrorKind::Interrupted),
    }
}

fn compatibility(core: &Core) -> Compatibility {
    compatible_with(&core.parts, &core.config)
}

/// Says what a captured state must be to be restored into a machine of this configuration.
pub(crate) fn compatible_with(
    parts: &crate::backend::CoreParts,
    config: &VmConfig,
) -> Compatibility {
    Compatibility {
        backend: parts.hypervisor.name().to_owned(),
        arch: parts.hypervisor.arch().to_owned(),
        vcpus: config.vcpus,
        memory: config.memory,
        agent_protocol: PROTOCOL_VERSION,
    }
}
