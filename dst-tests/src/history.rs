//! Histories: scripts of operations, drawn or written by hand, and whether they went as they may.
//!
//! A [`Script`] is data. It is drawn from a seed by [`generate`], carried out by [`perform`] on any backend, which takes
//! down a [`Record`], and held to the reference [`model`] step by step. What fails is made small by [`shrink`]; two
//! backends are compared by [`compare`].

use crate::{context::Context, target::Target};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_core::fault::FaultKind;
use vm_trait::Capabilities;

mod acts;
pub mod compare;
pub(crate) mod ears;
pub mod generate;
pub mod linear;
pub mod model;
pub mod perform;
pub mod program;
pub mod record;
pub mod script;
pub mod shrink;
pub mod trial;

pub use model::Violation;
pub use record::Record;
pub use script::Script;
pub use trial::Trial;

/// A script that is to be carried out, and what came of it.
#[derive(Debug)]
pub struct Assignment {
    /// What is to be done.
    pub script: Script,
    /// What came of it so far.
    progress: Mutex<Progress>,
}

/// What came of a script so far.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Step by step.
    pub record: Record,
    /// Where it did not go as it may.
    pub violation: Option<Violation>,
    /// From which step on so much could be the case that nothing was checked.
    pub unchecked_from: Option<usize>,
}

impl Assignment {
    /// Gives out a script.
    #[must_use]
    pub fn new(script: Script) -> Self {
        Self { script, progress: Mutex::default() }
    }

    /// Gives what came of it so far.
    pub fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives what histories of a run may be made of.
#[must_use]
pub fn profile_of(ctx: &Context) -> generate::Profile {
    let able = FaultKind::ALL.iter().copied().filter(|kind| ctx.can_fault(*kind));
    generate::Profile::of(ctx.capabilities(), able.collect(), ctx.is_simulated())
}

/// Gives what histories on a target may be made of.
#[must_use]
pub fn profile_on(target: &dyn Target) -> generate::Profile {
    profile(target.capabilities(), target)
}

fn profile(capabilities: Capabilities, target: &dyn Target) -> generate::Profile {
    let able = FaultKind::ALL.iter().copied().filter(|kind| target.can_fault(*kind));
    let simulated = target.can_fault(FaultKind::HostLost);
    generate::Profile::of(capabilities, able.collect(), simulated)
}
