//! Saving a guest and bringing it back.

use super::{
    fault::FaultSlot,
    kernel::{Kernel, SimOs},
    program::{ProgramRegistry, ReviveError},
    tree::BaseImage,
};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a saved guest begins with; another layout has another number.
const VERSION: u8 = 4;

/// Bytes that are no saved guest for these programs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The bytes are not what `save` wrote.
    #[error("not a saved guest")]
    Malformed(#[from] postcard::Error),
    /// The bytes were written by another version.
    #[error("a saved guest of version {0}, not {VERSION}")]
    Version(u8),
    /// The guest has a program that is not registered.
    #[error("the guest's program `{0}` is not registered")]
    UnknownProgram(String),
    /// A process's program does not decode its own state.
    #[error("the state of a process of `{program}` does not decode")]
    ProgramState {
        /// The program.
        program: String,
        /// Why.
        source: postcard::Error,
    },
}

#[derive(Serialize)]
struct Saved<'a> {
    version: u8,
    programs: &'a [String],
    kernel: &'a Kernel,
}

#[derive(Deserialize)]
struct Header {
    version: u8,
    programs: Vec<String>,
}

impl SimOs {
    /// Writes the guest's whole state, fault hooks excepted. Events not yet taken belong to it.
    ///
    /// # Errors
    /// When a registered program's state does not encode.
    pub fn save(&self) -> Result<Vec<u8>, postcard::Error> {
        let base = self.programs.base();
        postcard::to_allocvec(&Saved {
            version: VERSION,
            programs: base.programs(),
            kernel: &self.kernel,
        })
    }

    /// Brings a saved guest back. More programs may be registered than it was saved with; it does not see them.
    ///
    /// # Errors
    /// When the bytes are damaged, or one of the guest's programs is not registered.
    pub fn load(bytes: &[u8], programs: Arc<ProgramRegistry>) -> Result<Self, LoadError> {
        if let Some(version) = bytes.first().filter(|version| **version != VERSION) {
            return Err(LoadError::Version(*version));
        }
        let (header, rest) = postcard::take_from_bytes::<Header>(bytes)?;
        debug_assert_eq!(header.version, VERSION, "the first byte is the version");
        let missing = header.programs.iter().find(|path| !programs.contains(path));
        if let Some(path) = missing {
            return Err(LoadError::UnknownProgram(path.clone()));
        }
        let (mut kernel, rest) = postcard::take_from_bytes::<Kernel>(rest)?;
        if !rest.is_empty() {
            return Err(postcard::Error::DeserializeBadEncoding.into());
        }
        for process in kernel.processes.values_mut() {
            programs.revive(&mut process.program).map_err(|error| match error {
                ReviveError::Unknown(path) => LoadError::UnknownProgram(path),
                ReviveError::Malformed(program, source) => {
                    LoadError::ProgramState { program, source }
                }
            })?;
        }
        let mut base = programs.base();
        if base.programs() != header.programs {
            base = Arc::new(BaseImage::build(&header.programs));
        }
        let programs = programs.narrowed_to(&base);
        kernel.vfs.rebase(base);
        kernel.lose_shared_files();
        Ok(Self { kernel, programs, faults: FaultSlot::default() })
    }
}
