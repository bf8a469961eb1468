//! What the fuzz targets reach of the launcher.

use super::saving::read_state;
use crate::control::Refusal;
use std::{fs::File, io::Write};

/// Reads a machine's saved state, as a launcher does that is given `bytes` as the file with it, and gives what was
/// understood in the form in which it is saved; `None` where it is refused as corrupt or of another version.
///
/// # Panics
/// Where it is refused in any other way, or the host has no memory for a file.
#[must_use]
pub fn saved_state(bytes: &[u8]) -> Option<Vec<u8>> {
    let file = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(file.expect("a file in memory"));
    file.write_all(bytes).expect("room for the bytes");
    match read_state(&file) {
        Ok(machine) => {
            let version = postcard::take_from_bytes::<u32>(bytes).map(|(version, _)| version);
            let whole = (version.expect("it was read"), machine);
            Some(postcard::to_allocvec(&whole).expect("what was read can be written"))
        }
        Err(Refusal::Corrupt(_) | Refusal::Incompatible { .. }) => None,
        Err(other) => panic!("{other:?}"),
    }
}
