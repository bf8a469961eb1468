//! From sections to what a launcher is sent.

use super::{MEMORY, STATE, disk_section, runs::Runs, runs_section};
use crate::{files, life::host};
use bytes::Bytes;
use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
};
use vm_core::machine::{MachineError, Sections};

/// What is saved of a machine, each in a file.
#[derive(Debug)]
pub(crate) struct Saved {
    /// All but memory and disks.
    pub(crate) state: File,
    /// Where memory belongs.
    pub(crate) runs: File,
    /// Memory.
    pub(crate) memory: File,
}

impl Saved {
    /// Puts the sections of a machine, but those of its disks, into files. It blocks.
    ///
    /// # Errors
    /// [`MachineError::Corrupt`], and those of the host.
    pub(crate) fn new(sections: &Sections) -> Result<Self, MachineError> {
        let in_memory = |name: &str| {
            let bytes = sections.get(name)?;
            memory_file(name, bytes).map_err(|error| host(&error))
        };
        Ok(Self {
            state: in_memory(STATE)?,
            runs: in_memory(&runs_section(MEMORY))?,
            memory: in_memory(MEMORY)?,
        })
    }
}

/// Puts a writable disk, by its number among those, into a file without a name. It blocks.
///
/// # Errors
/// [`MachineError::Corrupt`], and those of the host.
pub(crate) fn restore_disk(sections: &Sections, number: usize) -> Result<File, MachineError> {
    let name = &disk_section(number);
    let corrupt = |why: String| MachineError::Corrupt(format!("{name}: {why}"));
    let content = sections.get(name)?;
    let runs = Runs::decode(sections.get(&runs_section(name))?).map_err(corrupt)?;
    if runs.packed() != content.len() as u64 {
        return Err(corrupt(format!("{} bytes for runs of {}", content.len(), runs.packed())));
    }
    let disk = files::nameless()?;
    let write = || -> io::Result<()> {
        disk.set_len(runs.total())?;
        let mut rest = &content[..];
        for (at, len) in runs.iter() {
            let (piece, left) = rest.split_at(usize::try_from(len).unwrap_or(usize::MAX));
            disk.write_all_at(piece, at)?;
            rest = left;
        }
        Ok(())
    };
    write().map_err(|error| host(&error))?;
    Ok(disk)
}

fn memory_file(name: &str, bytes: &Bytes) -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create(name, flags)?);
    file.write_all(bytes)?;
    Ok(file)
}
