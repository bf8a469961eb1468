//! Snapshot, restore, fork and inspection.

use super::{
    CoreVm,
    actor::{Actor, Answer, Command, Cut, Reply, Work},
    core::Core,
    lifecycle::Origin,
};
use crate::{
    container::{self, BaseLink, BasePath, Chain, Compatibility, ContainerWriter, Hash, MAX_CHAIN},
    machine::{CaptureOrder, Generation, Machine, MachineSpec},
};
use futures_util::future::join_all;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::oneshot;
use vm_guest_protocol::PROTOCOL_VERSION;
use vm_planted_bugs::{Bug, planted};
use vm_trait::{
    ForkOptions, Inspection, Operation, RestoreOptions, Snapshot, SnapshotId, SnapshotMetadata,
    SnapshotOptions, VmConfig, VmError, VmErrorKind, VmEvent, VmInstance, VmResult, VmState,
};

/// The most children of one fork.
const MOST_CHILDREN: u32 = 1024;

/// A captured state to restore from.
pub(crate) enum Saved {
    /// To be opened.
    File(PathBuf),
    /// Opened from there.
    Opened(PathBuf, Box<Chain>),
}

/// A snapshot that another one can be taken on.
#[derive(Clone, Debug)]
pub(super) struct Tracked {
    id: SnapshotId,
    path: PathBuf,
    seal: Hash,
    /// How many files it needs, its own included.
    length: usize,
    generation: Generation,
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
        let base = match &options.base {
            Some(base) => Some(self.base(reply, base, options.path.as_deref()).await?),
            None => None,
        };
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
            label: options.label.filter(|_| !planted(Bug::LabelIsForgotten)),
            base: base.as_ref().map(|base| base.id),
        };
        let mut writer = {
            let created = ContainerWriter::create(core.parts.fs.clone(), &path, env.random_u64());
            match self.drive(reply, after, created).await {
                Ok(created) => created?,
                Err(cut) => return Err(self.give_up(cut).await),
            }
        };
        let was_running = core.lock().state == VmState::Running;
        let stood_before = core.stood_still();
        if was_running {
            self.hold().await?;
        }
        let order = CaptureOrder {
            since: match &base {
                Some(_) if planted(Bug::NewestBaseIsTaken) => {
                    self.tracked.back().map(|newest| newest.generation)
                }
                base => base.as_ref().map(|base| base.generation),
            },
            track: options.tracked || base.is_some(),
        };
        let captured = self.drive(reply, after, machine.capture(order)).await;
        let stays = planted(Bug::FailedSaveLeavesPaused) && !matches!(captured, Ok(Ok(_)));
        if was_running && !stays && !matches!(captured, Err(Cut::Exited(_) | Cut::Preempted)) {
            self.let_go().await?;
        }
        core.took("paused for a snapshot", core.stood_still().saturating_sub(stood_before));
        let mut captured = match captured {
            Ok(captured) => captured?,
            Err(cut) => return Err(self.give_up(cut).await),
        };
        match self.drive(reply, after, captured.write(&mut writer)).await {
            Ok(written) => written?,
            Err(cut) => return Err(self.give_up(cut).await),
        }
        let (config, fits) = ((*core.config).clone(), compatibility(&core));
        let length = 1 + base.as_ref().map_or(0, |base| base.length);
        let link = base.map(|base| BaseLink {
            id: base.id,
            path: BasePath::of(&base.path, &path),
            seal: base.seal,
        });
        let finished = Box::pin(writer.finish(metadata.clone(), config, fits, link));
        let sealed = match self.drive(reply, after, finished).await {
            Ok(finished) => finished?,
            Err(cut) => return Err(self.give_up(cut).await),
        };
        if let Some(generation) = captured.generation() {
            self.track(Tracked { id, path: path.clone(), seal: sealed.seal, length, generation });
        }
        core.publish(&VmEvent::SnapshotTaken(id));
        Ok(Snapshot::new(path, metadata))
    }

    /// Finds the base of a snapshot that is to be taken, and makes sure that the file it is said to be in holds it: the
    /// one that was written, or a copy of it.
    async fn base(
        &mut self,
        reply: &mut Reply,
        base: &Snapshot,
        path: Option<&Path>,
    ) -> Result<Tracked, VmErrorKind> {
        let refuse = |reason: String| VmErrorKind::invalid("base", reason);
        let id = base.metadata.id;
        let tracked = self.tracked.iter().find(|tracked| tracked.id == id).cloned();
        let mut tracked = tracked.ok_or_else(|| {
            refuse(format!(
                "what changed since {id} is not known; take a snapshot with `tracked` first"
            ))
        })?;
        if tracked.length >= MAX_CHAIN {
            return Err(refuse(format!(
                "{id} builds on {} others; merge it, and take a tracked one",
                tracked.length - 1
            )));
        }
        tracked.path.clone_from(&base.path);
        if path == Some(&tracked.path) {
            return Err(refuse(format!("{id} is in the file that would be written")));
        }
        let core = self.core.clone();
        let after = core.config.timeouts.capture;
        let seal = container::seal(&*core.parts.fs, &tracked.path);
        let seal = match self.drive(reply, after, seal).await {
            Ok(seal) => seal?,
            Err(cut) => return Err(self.give_up(cut).await),
        };
        if seal != tracked.seal && !planted(Bug::BaseIsNotLookedAt) {
            let detail = format!("{} does not hold {id}", tracked.path.display());
            return Err(VmErrorKind::SnapshotCorrupt { detail });
        }
        Ok(tracked)
    }

    fn track(&mut self, tracked: Tracked) {
        self.tracked.push_back(tracked);
        if self.tracked.len() > Generation::KEPT {
            self.tracked.pop_front();
        }
    }

    pub(super) async fn restore(
        &mut self,
        reply: &mut Reply,
        saved: Saved,
        options: RestoreOptions,
    ) -> Result<(), VmErrorKind> {
        let core = self.core.clone();
        let (path, chain) = match saved {
            Saved::Opened(path, chain) => (path, *chain),
            Saved::File(path) => {
                let after = core.config.timeouts.capture;
                let opened = container::open(&*core.parts.fs, &path);
                let chain = match self.drive(reply, after, opened).await {
                    Ok(opened) => opened?,
                    Err(cut) => return Err(self.give_up(cut).await),
                };
                (path, chain)
            }
        };
        let Chain { manifest, sections, seal, length } = chain;
        manifest.compatibility.check(&compatibility(&core))?;
        let track = options.tracked;
        self.revive(reply, Origin::Load { sections, track }, options.resume).await?;
        if track {
            let (id, generation) = (manifest.metadata.id, Generation::LOADED);
            self.track(Tracked { id, path, seal, length, generation });
        }
        Ok(())
    }

    pub(super) async fn fork(
        &mut self,
        reply: &mut Reply,
        options: &ForkOptions,
    ) -> Result<Vec<VmResult<Arc<dyn VmInstance>>>, VmErrorKind> {
        let fewest = u32::from(!planted(Bug::ForkIntoNone));
        if !(fewest..=MOST_CHILDREN).contains(&options.count) {
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
        let stood_before = core.stood_still();
        if was_running {
            self.hold().await?;
        }
        let forked = self.drive(reply, after, machine.fork(&specs)).await;
        // The children get going while the source does.
        let children_run = was_running || planted(Bug::ChildrenRunAtOnce);
        let forked = forked.map(|machines| {
            let adopted = children.iter().zip(machines).map(|(child, machine)| {
                machine.map(|machine| adopt(child.core(), machine, children_run))
            });
            adopted.collect::<Vec<_>>()
        });
        let resumes = was_running || planted(Bug::ForkResumesPaused);
        if resumes && !matches!(forked, Err(Cut::Exited(_) | Cut::Preempted)) {
            self.let_go().await?;
        }
        core.took("paused for a fork", core.stood_still().saturating_sub(stood_before));
        let forked = match forked {
            Ok(forked) if planted(Bug::OneFailedChildFailsAll) => {
                let whole = forked.into_iter().collect::<Result<Vec<_>, _>>()?;
                whole.into_iter().map(Ok).collect()
            }
            Ok(forked) => forked,
            Err(cut) => return Err(self.give_up(cut).await),
        };
        let outcomes = children.into_iter().zip(forked).map(|(child, adopted)| async move {
            let outcome = match adopted {
                Ok(answer) => adopted_with(answer.await),
                Err(error) => Err(error.into()),
            };
            let id = child.core().id;
            outcome
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

/// What becomes of a command, once the actor has carried it out.
type Outcome = Result<Answer, VmErrorKind>;

/// Gives a forked machine to the actor of its VM, which brings it up at once and then answers.
fn adopt(child: &Arc<Core>, machine: Arc<dyn Machine>, resume: bool) -> oneshot::Receiver<Outcome> {
    let (reply, answer) = oneshot::channel();
    child.enqueue(Command { work: Work::Adopt { machine, resume }, reply });
    answer
}

/// Says whether a forked machine is fit for use, of the actor's answer.
fn adopted_with(answer: Result<Outcome, oneshot::error::RecvError>) -> Result<(), VmErrorKind> {
    match answer {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_could_not_be_taken_over_is_not_fit_for_use() {
        assert_eq!(adopted_with(Ok(Ok(Answer::Done))), Ok(()));
        assert_eq!(
            adopted_with(Ok(Err(VmErrorKind::Disconnected))),
            Err(VmErrorKind::Disconnected)
        );
    }
}
