//! Copies of a machine that stands still, each in a process of its own.

use super::{
    greet, heap,
    machine::{Machine, MachineState, Outside},
    memory::GuestMemory,
    process::name_thread,
    refuse::{config, failed},
    serve::serve_made,
    split::{Side, become_launcher, split},
    told,
    tracking::Parts,
};
use crate::control::{MachineSetUp, Refusal};
use rustix::{
    fs::{SeekFrom, copy_file_range, seek},
    io::Errno,
    process::{PidfdFlags, pidfd_open},
};
use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsFd, OwnedFd},
};

/// How many bytes of a disk are copied in one call.
const COPY_STEP: u64 = 64 << 20;

/// What a copy is made of.
#[derive(Debug)]
struct Parcel {
    control: OwnedFd,
    lifeline: OwnedFd,
    messages: OwnedFd,
    outside: Outside,
}

/// Makes a copy of a paused machine and says which process it is. In the copy, it never returns.
///
/// # Errors
/// [`Refusal::State`] unless the machine is paused, [`Refusal::Config`] for descriptors that do not fit,
/// [`Refusal::Exhausted`] or [`Refusal::Failed`].
pub(super) fn fork(
    machine: &Machine,
    name: String,
    fds: Vec<OwnedFd>,
) -> Result<(u32, OwnedFd), Refusal> {
    let state = machine.save()?;
    machine.show_console();
    let parcel = Parcel::new(machine, fds)?;
    match split().map_err(|error| failed("copy of the process", error))? {
        Side::Original(pid) => {
            let exact = pidfd_open(pid, PidfdFlags::empty());
            let exact = exact.map_err(|error| failed("copy of the process", error))?;
            Ok((pid.as_raw_nonzero().get().unsigned_abs(), exact))
        }
        Side::Copy => {
            let set_up = MachineSetUp { name, ..machine.set_up().clone() };
            let well = told(parcel.go_on(&set_up, machine.memory().clone(), &state));
            // What the original's threads shared with this one must not be dropped here.
            std::process::exit(i32::from(!well));
        }
    }
}

impl Parcel {
    /// Takes a request's descriptors in their order, and fills the copy's own disks.
    fn new(machine: &Machine, fds: Vec<OwnedFd>) -> Result<Self, Refusal> {
        let set_up = machine.set_up();
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or_else(|| config("descriptors", "one is missing"));
        let (control, lifeline, messages) = (next()?, next()?, next()?);
        let ring = File::from(next()?);
        let log = if set_up.console_file { Some(File::from(next()?)) } else { None };
        let mut own = own_disks(machine, fds, None)?.into_iter();
        let disks = machine.disks().map(|(disk, file)| {
            if disk.read_only {
                return file.try_clone().map_err(|error| failed("disk", error));
            }
            own.next().ok_or_else(|| config("descriptors", "one is missing"))
        });
        let disks = disks.collect::<Result<_, Refusal>>()?;
        Ok(Self { control, lifeline, messages, outside: Outside { ring, log, disks } })
    }

    /// Lives as the copy, until its machine ends or its owner hangs up.
    fn go_on(
        self,
        set_up: &MachineSetUp,
        memory: GuestMemory,
        state: &MachineState,
    ) -> io::Result<()> {
        let Self { control, lifeline, messages, outside } = self;
        let mut kept = vec![control.as_fd(), outside.ring.as_fd()];
        kept.extend(outside.log.as_ref().map(AsFd::as_fd));
        kept.extend(outside.disks.iter().map(AsFd::as_fd));
        become_launcher(&lifeline, &messages, &kept)?;
        name_thread(&format!("vm-{}", set_up.name));
        let channel = greet(control)?;
        let revived = Machine::revive(set_up, outside, memory, state, &channel);
        // What the original wrote beside its machine, and what the state took to be taken up.
        heap::give_back();
        serve_made(revived, &channel, Vec::new())
    }
}

/// Fills an empty file for each writable disk with what that holds, or with those parts of it that changed.
///
/// # Errors
/// [`Refusal::Config`] for more or fewer files than disks, and what the host refuses.
pub(super) fn own_disks(
    machine: &Machine,
    files: impl Iterator<Item = OwnedFd>,
    changed: Option<&[Parts]>,
) -> Result<Vec<File>, Refusal> {
    let files: Vec<_> = files.map(File::from).collect();
    let writable: Vec<_> = machine.disks().filter(|(disk, _)| !disk.read_only).collect();
    if files.len() != writable.len() {
        let reason = format!("{} files came for {} disks", files.len(), writable.len());
        return Err(config("descriptors", reason));
    }
    for (number, ((disk, from), to)) in writable.iter().zip(&files).enumerate() {
        let copied = match changed.and_then(|disks| disks.get(number)) {
            None => copy_disk(from, to, std::iter::once(0..u64::MAX)),
            Some(changed) => copy_disk(from, to, changed.ranges()),
        };
        copied.map_err(|error| failed(&disk.serial, error))?;
    }
    Ok(files)
}

/// Copies parts of a disk's content into an empty file, which becomes as long.
fn copy_disk(from: &File, to: &File, parts: impl Iterator<Item = Range<u64>>) -> io::Result<()> {
    let len = seek(from, SeekFrom::End(0))?;
    to.set_len(len)?;
    for part in parts {
        copy_part(from, to, part.start, part.end.min(len))?;
    }
    Ok(())
}

/// Copies the bytes from `at` up to `len`, and leaves out what the disk has no blocks for.
fn copy_part(from: &File, to: &File, mut at: u64, len: u64) -> io::Result<()> {
    while at < len {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            // A block device has no holes.
            Err(Errno::INVAL) => at,
            Err(error) => return Err(error.into()),
        };
        if data >= len {
            break;
        }
        let end = seek(from, SeekFrom::Hole(data)).unwrap_or(len).min(len);
        copy_range(from, to, data, end)?;
        at = end;
    }
    Ok(())
}

/// Copies the bytes from `at` up to `end` to the same place.
fn copy_range(from: &File, to: &File, mut at: u64, end: u64) -> io::Result<()> {
    while at < end {
        let step = usize::try_from((end - at).min(COPY_STEP)).unwrap_or(usize::MAX);
        let (mut read_at, mut write_at) = (at, at);
        let copied = match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), step)
        {
            // Not between these file systems.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                copy_bytes(from, to, at, step)?
            }
            other => other?,
        };
        if copied == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at += copied as u64;
    }
    Ok(())
}

/// Copies at most so many bytes through a buffer, and says how many.
fn copy_bytes(from: &File, to: &File, at: u64, most: usize) -> io::Result<usize> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; most.min(1 << 20)];
    let read = from.read_at(&mut buffer, at)?;
    to.write_all_at(&buffer[..read], at)?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn disks_are_copied_with_their_holes(
            pieces in prop::collection::vec((0_u64..8 << 20, prop::collection::vec(any::<u8>(), 1..9000)), 0..6),
            len in 1_u64..9 << 20,
        ) {
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            for (at, bytes) in &pieces {
                from.write_all_at(bytes, *at).unwrap();
            }
            from.set_len(len).unwrap();
            copy_disk(&from, &to, std::iter::once(0..u64::MAX)).unwrap();
            let read = |file: &File| {
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                file.read_exact_at(&mut bytes, 0).unwrap();
                bytes
            };
            prop_assert_eq!(to.metadata().unwrap().len(), len);
            prop_assert!(read(&from) == read(&to));
            prop_assert!(to.metadata().unwrap().blocks() <= from.metadata().unwrap().blocks() + 64);
        }

        #[test]
        fn parts_of_disks_are_copied(
            parts in prop::collection::btree_map(0_u64..64, any::<bool>(), 0..20),
            len in 1_u64..4 << 20,
        ) {
            const PART: u64 = 64 << 10;
            let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            for (part, filled) in &parts {
                from.write_all_at(&vec![u8::from(*filled); 1 << 16], part * PART).unwrap();
            }
            from.set_len(len).unwrap();
            let copied = parts.keys().filter(|part| *part * PART < len);
            copy_disk(&from, &to, copied.map(|part| part * PART..(part + 1) * PART)).unwrap();
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            to.read_exact_at(&mut bytes, 0).unwrap();
            for (part, bytes) in (0..).zip(bytes.chunks(1 << 16)) {
                let filled = parts.get(&part).copied().unwrap_or(false);
                prop_assert!(bytes.iter().all(|byte| *byte == u8::from(filled)));
            }
            prop_assert_eq!(to.metadata().unwrap().len(), len);
        }
    }
}
