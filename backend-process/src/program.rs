//! Which program is the agent.

use crate::SetupError;
use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};
use vm_guest_agent::linux::launch;

/// The variable that names the agent's binary.
pub const AGENT_VARIABLE: &str = "TWINVM_AGENT";

/// The variable that makes [`run_agent_if_asked`] run the agent.
pub const RUN_AGENT_VARIABLE: &str = "TWINVM_RUN_AGENT";

/// The name of the agent's binary.
const BINARY: &str = "vm-guest-agent";

static CAN_BE_AGENT: AtomicBool = AtomicBool::new(false);

/// Which program is the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentProgram {
    /// This program, run once more; its `main` must call [`run_agent_if_asked`] first.
    ThisProgram,
    /// A binary.
    Binary(PathBuf),
}

/// Becomes the agent where this process was started for that, and then does not return.
///
/// It must be the first thing that `main` does, before there are other threads.
pub fn run_agent_if_asked() {
    if env::var_os(RUN_AGENT_VARIABLE).is_some() {
        std::process::exit(launch::main(env::args_os().skip(1)).into());
    }
    CAN_BE_AGENT.store(true, Ordering::Relaxed);
}

impl AgentProgram {
    /// Finds an agent: what [`AGENT_VARIABLE`] names, else this program if its `main` is prepared, else a binary
    /// `vm-guest-agent` beside this program or, as for a test, in the directory above.
    ///
    /// # Errors
    /// [`SetupError::NoAgent`].
    pub fn find() -> Result<Self, SetupError> {
        if let Some(path) = env::var_os(AGENT_VARIABLE) {
            let path = PathBuf::from(path);
            return match path.is_file() {
                true => Ok(Self::Binary(path)),
                false => Err(SetupError::NoAgent { looked_at: path }),
            };
        }
        if CAN_BE_AGENT.load(Ordering::Relaxed) {
            return Ok(Self::ThisProgram);
        }
        let here = env::current_exe().unwrap_or_default();
        let near = here.ancestors().skip(1).take(2).map(|dir| dir.join(BINARY));
        match near.into_iter().find(|path| path.is_file()) {
            Some(path) => Ok(Self::Binary(path)),
            None => Err(SetupError::NoAgent { looked_at: here.with_file_name(BINARY) }),
        }
    }

    /// Begins the command that runs the agent, with nothing of this process's environment but what programs need
    /// to be loaded.
    pub(crate) fn command(&self) -> Command {
        let mut command = match self {
            // The link leads to this very program even if its file was replaced meanwhile.
            Self::ThisProgram => Command::new(Path::new("/proc/self/exe")),
            Self::Binary(path) => Command::new(path),
        };
        command.env_clear();
        if let Some(libraries) = env::var_os("LD_LIBRARY_PATH") {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        if *self == Self::ThisProgram {
            command.env(RUN_AGENT_VARIABLE, "1");
        }
        command
    }
}
