//! Saving a machine that stands still: a copy of the process writes what the machine was, while the machine goes on.

use super::{
    copies::own_disks,
    machine::{Machine, MachineState},
    memory::GuestMemory,
    page_map::PageMap,
    refuse::{config, failed},
    split::{Side, keep_only, split},
    told,
    tracking::{Changes, Parts},
};
use crate::{
    control::Refusal,
    snapshot::{
        MAX_STATE, PAGE,
        frame::{Frame, MAX_CONTENT, Part, Told},
    },
};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Write},
    ops::Range,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    bitmap::AtomicBitmap,
};

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
/// and ends. The other descriptors are an empty file for each writable disk, which take what the disks hold now. Of
/// memory and disks, only what changed `since` some moment is written, where one is named. With `track`, this is a moment
/// too, whose number is given.
///
/// # Errors
/// [`Refusal::State`] unless the machine is paused, [`Refusal::Config`] for descriptors that do not fit,
/// [`Refusal::Generation`] for a moment that is not known, [`Refusal::Exhausted`] or [`Refusal::Failed`].
pub(super) fn capture(
    machine: &mut Machine,
    since: Option<u64>,
    track: bool,
    fds: Vec<OwnedFd>,
) -> Result<Option<u64>, Refusal> {
    let saved = SavedState { version: STATE_VERSION, machine: machine.save()? };
    let state = postcard::to_allocvec(&saved)
        .map_err(|error| Refusal::Failed(format!("the state cannot be written: {error}")))?;
    let mut fds = fds.into_iter();
    let pipe = fds.next().ok_or_else(|| config("descriptors", "there is no pipe"))?;
    let changes = machine.changes(since, track)?;
    let disks = own_disks(machine, fds, changes.as_ref().map(|changes| &changes.disks[..]))?;
    match split().map_err(|error| failed("copy of the process", error))? {
        Side::Original(_) => Ok(track.then(|| machine.begin_moment())),
        Side::Copy => {
            let well = told(write_all(pipe, &state, machine.memory(), &disks, changes.as_ref()));
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

fn write_all(
    pipe: OwnedFd,
    state: &[u8],
    memory: &GuestMemory,
    disks: &[File],
    changes: Option<&Changes>,
) -> io::Result<()> {
    let mut kept = vec![pipe.as_fd()];
    kept.extend(disks.iter().map(AsFd::as_fd));
    keep_only(&kept)?;
    let mut out = Out { pipe: File::from(pipe), buffer: vec![0; MAX_CONTENT] };
    for (offset, piece) in (0_u64..).step_by(MAX_CONTENT).zip(state.chunks(MAX_CONTENT)) {
        out.frame(Part::State, offset, piece)?;
    }
    let page_map = PageMap::open();
    for (number, region) in memory.memory.iter().enumerate() {
        match changes.map(|changes| &changes.memory) {
            None => write_region(memory, region, &page_map, &mut out)?,
            Some(None) => write_own_pages(memory, region, &page_map, &mut out)?,
            Some(Some(regions)) => {
                for range in regions.get(number).into_iter().flat_map(Parts::ranges) {
                    write_changed(memory, region, range, &mut out)?;
                }
            }
        }
    }
    for (number, disk) in (0_u8..).zip(disks) {
        match changes.and_then(|changes| changes.disks.get(usize::from(number))) {
            None => write_disk(number, disk, &mut out)?,
            Some(changed) => write_changed_disk(number, disk, changed, &mut out)?,
        }
    }
    out.told(Part::End, 0, Told::Content(0))
}

/// Writes what of a region is not zero.
fn write_region(
    memory: &GuestMemory,
    region: &Region,
    page_map: &PageMap,
    out: &mut Out,
) -> io::Result<()> {
    for piece in pieces(0..region.len()) {
        let bytes = piece.end - piece.start;
        let address = region.start_addr().0 + piece.start;
        let there = page_map.look(host(region) + piece.start, bytes).any();
        if there || memory.loaded.within(address..address + bytes).next().is_some() {
            out.memory(memory, address, bytes, Zeros::Untold)?;
        }
    }
    Ok(())
}

/// Writes those pages of a region that are this process's own: what was written to since the machine was loaded.
fn write_own_pages(
    memory: &GuestMemory,
    region: &Region,
    page_map: &PageMap,
    out: &mut Out,
) -> io::Result<()> {
    for piece in pieces(0..region.len()) {
        let pages = page_map.look(host(region) + piece.start, piece.end - piece.start);
        for own in pages.own(piece.end - piece.start) {
            let address = region.start_addr().0 + piece.start + own.start;
            // What was not loaded was zeros then, which nobody has to say again.
            out.memory(memory, address, own.end - own.start, Zeros::OfLoaded)?;
        }
    }
    Ok(())
}

/// Writes bytes of a region that changed, zeros too.
fn write_changed(
    memory: &GuestMemory,
    region: &Region,
    changed: Range<u64>,
    out: &mut Out,
) -> io::Result<()> {
    for piece in pieces(changed.start..changed.end.min(region.len())) {
        let address = region.start_addr().0 + piece.start;
        out.memory(memory, address, piece.end - piece.start, Zeros::Told)?;
    }
    Ok(())
}

/// Writes what of a disk is not zero.
fn write_disk(number: u8, disk: &File, out: &mut Out) -> io::Result<()> {
    let len = disk.metadata()?.len();
    let mut at = 0;
    while at < len {
        // Holes are left out; a file system without them calls all of it data.
        at = match rustix::fs::seek(disk, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data / PAGE * PAGE,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => at,
        };
        let step = (len - at).min(MAX_CONTENT as u64);
        out.disk(number, disk, at, step, false)?;
        at += step;
    }
    Ok(())
}

/// Writes the parts of a disk that changed, zeros too.
fn write_changed_disk(number: u8, disk: &File, changed: &Parts, out: &mut Out) -> io::Result<()> {
    let len = disk.metadata()?.len();
    for range in changed.ranges() {
        for piece in pieces(range.start..range.end.min(len)) {
            out.disk(number, disk, piece.start, piece.end - piece.start, true)?;
        }
    }
    Ok(())
}

/// A part of guest memory.
type Region = GuestRegionMmap<AtomicBitmap>;

/// Where a region stands in this process.
fn host(region: &Region) -> u64 {
    region.as_ptr() as u64
}

/// Cuts bytes into pieces of one frame each.
fn pieces(bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let end = bytes.end;
    bytes.step_by(MAX_CONTENT).map(move |at| at..end.min(at + MAX_CONTENT as u64))
}

/// Which zeros of memory are written.
#[derive(Clone, Copy, Debug)]
enum Zeros {
    /// None.
    Untold,
    /// Those where something was loaded.
    OfLoaded,
    /// All.
    Told,
}

/// The pipe to the owner.
struct Out {
    pipe: File,
    buffer: Vec<u8>,
}

impl Out {
    /// Writes at most [`MAX_CONTENT`] bytes of memory.
    fn memory(
        &mut self,
        memory: &GuestMemory,
        address: u64,
        bytes: u64,
        zeros: Zeros,
    ) -> io::Result<()> {
        let read = |piece: &mut [u8]| {
            let read = memory.memory.read_slice(piece, GuestAddress(address));
            read.map_err(io::Error::other)
        };
        let told = |all: Range<u64>| match zeros {
            Zeros::Untold => Vec::new(),
            Zeros::OfLoaded => memory.loaded.within(all).collect(),
            Zeros::Told => vec![all],
        };
        self.content((Part::Memory, address, bytes), read, told)
    }

    /// Writes at most [`MAX_CONTENT`] bytes of a disk.
    fn disk(
        &mut self,
        number: u8,
        disk: &File,
        at: u64,
        bytes: u64,
        zeros: bool,
    ) -> io::Result<()> {
        let read = |piece: &mut [u8]| disk.read_exact_at(piece, at);
        self.content((Part::Disk(number), at, bytes), read, |all| zeros.then_some(all))
    }

    /// Writes what `read` puts into so many bytes, and of its zeros those that `told` picks.
    fn content<Z: IntoIterator<Item = Range<u64>>>(
        &mut self,
        (part, at, bytes): (Part, u64, u64),
        read: impl FnOnce(&mut [u8]) -> io::Result<()>,
        told: impl Fn(Range<u64>) -> Z,
    ) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let piece = &mut buffer[..usize::try_from(bytes).unwrap_or(MAX_CONTENT)];
        read(piece)?;
        for run in runs(piece) {
            let (start, end) = (at + run.start as u64, at + run.end as u64);
            if run.filled {
                self.frame(part, start, &piece[run.start..run.end])?;
                continue;
            }
            for zeros in told(start..end) {
                self.told(part, zeros.start, Told::Zeros(zeros.end - zeros.start))?;
            }
        }
        self.buffer = buffer;
        Ok(())
    }

    fn frame(&mut self, part: Part, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.told(part, offset, Told::Content(bytes.len()))?;
        self.pipe.write_all(bytes)
    }

    fn told(&mut self, part: Part, offset: u64, told: Told) -> io::Result<()> {
        self.pipe.write_all(&Frame { part, offset, told }.encode())
    }
}

/// Some whole pages, but for the last, and whether they hold anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    start: usize,
    end: usize,
    filled: bool,
}

/// Cuts bytes into runs with and without content, of which no two alike touch. Short gaps count as content.
fn runs(bytes: &[u8]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (number, page) in bytes.chunks(ZEROS.len()).enumerate() {
        let filled = *page != ZEROS[..page.len()];
        let (start, end) = (number * ZEROS.len(), number * ZEROS.len() + page.len());
        if let [.., content, gap] = &mut runs[..]
            && filled
            && !gap.filled
            && gap.end - gap.start <= GAP * ZEROS.len()
        {
            content.end = end;
            runs.pop();
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.filled == filled => last.end = end,
            _ => runs.push(Run { start, end, filled }),
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
            let runs = runs(&bytes);
            let mut end = 0;
            for (number, run) in runs.iter().enumerate() {
                prop_assert_eq!((run.start, run.start % 4096), (end, 0));
                end = run.end;
                let content = &bytes[run.start..run.end];
                if run.filled {
                    prop_assert!(content[0] != 0 && content[content.len() - 1] != 0);
                } else {
                    prop_assert!(content.iter().all(|byte| *byte == 0));
                    let outer = number == 0 || number + 1 == runs.len();
                    prop_assert!(outer || content.len() > GAP * 4096);
                }
            }
            prop_assert_eq!(end, bytes.len());
            prop_assert!(runs.windows(2).all(|pair| pair[0].filled != pair[1].filled));
        }
    }
}
