//! Files in memory that nobody can change any more.

use std::{fs::File, io};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Makes an empty file in memory that [`seal`] can seal.
pub(crate) fn in_memory(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?))
}

/// Makes every later change of the file's size or content impossible, through any descriptor.
pub(crate) fn seal(file: &File) -> io::Result<()> {
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
    Ok(fcntl_add_seals(file, seals)?)
}
