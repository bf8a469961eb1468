//! [`CoreBackend`]: a whole backend out of a hypervisor and an environment.

use crate::{env::Env, host_fs::HostFs, machine::Hypervisor, observe::Observer};
use std::{path::PathBuf, sync::Arc};

/// What a backend is made of.
#[derive(Clone, Debug)]
pub struct CoreParts {
    /// Makes the machines.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Clock, tasks and randomness.
    pub env: Arc<dyn Env>,
    /// Where snapshots are kept.
    pub fs: Arc<dyn HostFs>,
    /// The directory for snapshots that are given no path.
    pub snapshots: PathBuf,
    /// Who listens.
    pub observer: Arc<dyn Observer>,
}
