//! Saving a machine that stands still: a copy of the process writes what the machine was, while the machine goes on.

use super::{
    copies::own_disks,
    machine::{Machine, MachineState},
    memory::{GuestMemory, Populated},
    refuse::{config, failed},
    split::{Side, keep_only, split},
    told,
};
use crate::{
    control::Refusal,
    snapshot::{
        MAX_STATE,
        frame::{Frame, MAX_CONTENT, Part},
        runs::PAGE,
    },
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};
use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};

/// The version of [`SavedState`].
const STATE_VERSION: u32 = 1;

/// The most zero pages in a row that are written like others: each run has its price.
const GAP: usize = 8;

/// An empty page.
const ZEROS: [u8; 4096] = [0; 4096];

/// A state as it is written.
#[derive(Debug, Serialize, Deserialize)]
struct SavedState {
    version: u32,
    machine: MachineState,
}

/// Begins to save a paused machine: a copy of this process writes everything into the pipe that is the first descriptor,
/// and ends. The other descriptors are an empty file for each writable disk, which take what the disks hold now.
///
/// # Errors
/// [`Refusal::State`] unless the machine is paused, [`Refusal::Config`] for descriptors that do not fit,
/// [`Refusal::Exhausted`] or [`Refusal::Failed`].
pub(super) fn capture(machine: &Machine, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
    let saved = SavedState { version: STATE_VERSION, machine: machine.save()? };
    let state = postcard::to_allocvec(&saved)
        .map_err(|error| Refusal::Failed(format!("the state cannot be written: {error}")))?;
    let mut fds = fds.into_iter();
    let pipe = fds.next().ok_or_else(|| config("descriptors", "there is no pipe"))?;
    let disks = own_disks(machine, fds)?;
    match split().map_err(|error| failed("copy of the process", error))? {
        Side::Original { .. } => Ok(()),
        Side::Copy => {
            let well = told(write_all(pipe, &state, machine.memory(), &disks));
            // What the original's threads shared with this one must not be dropped here.
            std::process::exit(i32::from(!well));
        }
    }
}

/// Reads a state that was saved.
///
/// # Errors
/// [`Refusal::Incompatible`] for one of another version, [`Refusal::Corrupt`] for what is none.
pub(super) fn read_state(file: &File) -> Result<MachineState, Refusal> {
    let bytes = read_whole(file, MAX_STATE)?;
    let unreadable = |error: postcard::Error| Refusal::Corrupt(format!("unreadable: {error}"));
    // The version comes first, in every version.
    let (version, _) = postcard::take_from_bytes::<u32>(&bytes).map_err(unreadable)?;
    if version != STATE_VERSION {
        return Err(Refusal::Incompatible {
            field: "kvm.state.version".to_owned(),
            found: version.to_string(),
            wanted: STATE_VERSION.to_string(),
        });
    }
    let (saved, rest) = postcard::take_from_bytes::<SavedState>(&bytes).map_err(unreadable)?;
    if !rest.is_empty() {
        return Err(Refusal::Corrupt(format!("{} bytes too many", rest.len())));
    }
    Ok(saved.machine)
}

/// Reads a file of at most so many bytes.
///
/// # Errors
/// [`Refusal::Corrupt`] for a longer one, and what the host refuses.
pub(super) fn read_whole(file: &File, most: u64) -> Result<Vec<u8>, Refusal> {
    let of_host = |error: io::Error| failed("saved state", error);
    let len = file.metadata().map_err(of_host)?.len();
    if len > most {
        return Err(Refusal::Corrupt(format!("{len} bytes, at most {most} can be")));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0).map_err(of_host)?;
    Ok(bytes)
}

fn write_all(pipe: OwnedFd, state: &[u8], memory: &GuestMemory, disks: &[File]) -> io::Result<()> {
    let mut kept = vec![pipe.as_fd()];
    kept.extend(disks.iter().map(AsFd::as_fd));
    keep_only(&kept)?;
    let mut out = Out(File::from(pipe));
    for (offset, piece) in (0_u64..).step_by(MAX_CONTENT).zip(state.chunks(MAX_CONTENT)) {
        out.frame(Part::State, offset, piece)?;
    }
    write_memory(memory, &mut out)?;
    for (number, disk) in (0_u8..).zip(disks) {
        write_disk(number, disk, &mut out)?;
    }
    out.frame(Part::End, 0, &[])
}

fn write_memory(memory: &GuestMemory, out: &mut Out) -> io::Result<()> {
    let mut buffer = vec![0; MAX_CONTENT];
    for region in memory.memory.iter() {
        let populated = Populated::of(region, &memory.from_file);
        let mut at = 0;
        while at < region.len() {
            let step = (region.len() - at).min(MAX_CONTENT as u64);
            let address = region.start_addr().unchecked_add(at);
            if populated.any(at, step) {
                let piece = &mut buffer[..usize::try_from(step).unwrap_or(MAX_CONTENT)];
                memory.memory.read_slice(piece, address).map_err(io::Error::other)?;
                out.content(Part::Memory, address.0, piece)?;
            }
            at += step;
        }
    }
    Ok(())
}

fn write_disk(number: u8, disk: &File, out: &mut Out) -> io::Result<()> {
    let len = disk.metadata()?.len();
    let mut buffer = vec![0; MAX_CONTENT];
    let mut at = 0;
    while at < len {
        // Holes are left out; a file system without them calls all of it data.
        at = match rustix::fs::seek(disk, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data / PAGE * PAGE,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => at,
        };
        let step = (len - at).min(MAX_CONTENT as u64);
        let piece = &mut buffer[..usize::try_from(step).unwrap_or(MAX_CONTENT)];
        disk.read_exact_at(piece, at)?;
        out.content(Part::Disk(number), at, piece)?;
        at += step;
    }
    Ok(())
}

/// The pipe to the owner.
struct Out(File);

impl Out {
    /// Writes what of some content is not zero.
    fn content(&mut self, part: Part, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for (start, end) in filled(bytes) {
            self.frame(part, offset + start as u64, &bytes[start..end])?;
        }
        Ok(())
    }

    fn frame(&mut self, part: Part, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(&Frame { part, offset, len: bytes.len() }.encode())?;
        self.0.write_all(bytes)
    }
}

/// Finds the runs of pages that hold anything, with short gaps between them left in.
fn filled(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (number, page) in bytes.chunks(ZEROS.len()).enumerate() {
        if *page == ZEROS[..page.len()] {
            continue;
        }
        let (start, end) = (number * ZEROS.len(), number * ZEROS.len() + page.len());
        match runs.last_mut() {
            Some((_, last)) if start - *last <= GAP * ZEROS.len() => *last = end,
            _ => runs.push((start, end)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_hold_all_that_is_not_zero(
            pages in prop::collection::vec(prop::bool::weighted(0.3), 0..100),
            tail in 0_usize..4096,
        ) {
            let page = |filled: &bool| if *filled { [7; 4096] } else { [0; 4096] };
            let mut bytes: Vec<u8> = pages.iter().flat_map(page).collect();
            bytes.extend(vec![1; tail]);
            let runs = filled(&bytes);
            let mut rebuilt = vec![0; bytes.len()];
            let mut last = None;
            for (start, end) in runs {
                prop_assert_eq!(start % 4096, 0);
                prop_assert!(last.is_none_or(|last| start - last > GAP * 4096));
                prop_assert!(bytes[start] != 0 && bytes[end - 1] != 0);
                rebuilt[start..end].copy_from_slice(&bytes[start..end]);
                last = Some(end);
            }
            prop_assert_eq!(rebuilt, bytes);
        }
    }
}
