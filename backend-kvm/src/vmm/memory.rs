//! A guest's memory: mapping it, giving it to KVM, reading files into it, counting it.
#![allow(unsafe_code)]

use super::{
    layout::{ABOVE_HOLE, HOLE},
    refuse::{config, failed, kvm_failed},
};
use crate::{control::Refusal, snapshot::pieces::MemoryPiece};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::{
    io::Errno,
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous},
};
use std::{
    ffi::c_void,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    ops::Range,
    os::fd::AsRawFd,
    sync::Arc,
};
use vm_kvm_devices::Memory;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion, ReadVolatile,
    VolatileMemoryError, VolatileSlice, bitmap::BitmapSlice,
};

/// The least memory, in MiB.
const MIN_MIB: u32 = 64;

/// The most memory, in MiB: 1 TiB, far below what any x86-64 processor can address.
const MAX_MIB: u32 = 1 << 20;

/// The most parts of a file that one guest's memory is mapped from; what is left is read. The kernel has a limit of its
/// own, by default 65,530 for a process.
const MAX_MAPPINGS: usize = 16_384;

/// The size of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// How guest memory is mapped.
const PROTECTION: i32 = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Maps memory of so many MiB, without taking any yet.
///
/// # Errors
/// [`Refusal::Config`] for sizes that cannot be, [`Refusal::Exhausted`] where the host has no room.
fn map(mib: u32) -> Result<Memory, Refusal> {
    if !(MIN_MIB..=MAX_MIB).contains(&mib) {
        let reason = format!("{mib} MiB; it must be from {MIN_MIB} to {MAX_MIB}");
        return Err(config("memory_mib", reason));
    }
    let regions = ranges(u64::from(mib) << 20).into_iter().map(|(start, bytes)| {
        let mapped = map_aligned(bytes).map_err(|error| failed("guest memory", error))?;
        // SAFETY: the range is a mapping of that size with these properties, and nothing unmaps it.
        let region = unsafe { MmapRegion::build_raw(mapped.cast(), bytes, PROTECTION, FLAGS) };
        let region = region.map_err(|error| Refusal::Failed(format!("guest memory: {error}")))?;
        let region = GuestRegionMmap::new(region, start);
        region.ok_or_else(|| Refusal::Failed("guest memory ends beyond all addresses".to_owned()))
    });
    let regions = regions.collect::<Result<Vec<_>, _>>()?;
    Memory::from_regions(regions).map_err(|error| Refusal::Failed(format!("guest memory: {error}")))
}

/// Maps so many bytes, empty, where huge pages can hold them: KVM uses those where guest and host addresses are alike
/// down to their size, and each 4 KiB page that the guest touches first costs an exit where it cannot. The mapping stays
/// for as long as the process, which is a launcher and has this one machine.
fn map_aligned(bytes: usize) -> io::Result<*mut c_void> {
    let reserved = bytes.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::OutOfMemory)?;
    let (readable, flags) =
        (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a new mapping at an address of the kernel's choice touches no other.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), reserved, readable, flags) }?;
    let memory = start.wrapping_byte_add(start.align_offset(HUGE_PAGE));
    // SAFETY: the range lies in the mapping, and the advice changes nothing but core dumps.
    unsafe { madvise(memory, bytes, Advice::LinuxDontDump) }?;
    // SAFETY: the range lies in the mapping, and the advice changes nothing but the size of pages.
    match unsafe { madvise(memory, bytes, Advice::LinuxHugepage) } {
        // The kernel was built without huge pages.
        Ok(()) | Err(Errno::INVAL) => Ok(memory),
        Err(error) => Err(error.into()),
    }
}

/// Where memory of so many MiB ends, as a guest's physical address.
pub(crate) fn end(mib: u32) -> u64 {
    ranges(u64::from(mib) << 20).last().map_or(0, |(start, bytes)| start.0 + *bytes as u64)
}

/// A guest's memory, and which of it was loaded.
#[derive(Clone, Debug)]
pub(super) struct GuestMemory {
    pub(super) memory: Memory,
    pub(super) loaded: Arc<LoadedRanges>,
}

/// Which bytes of memory were loaded, by their addresses as the guest knows them: in ascending order, and none overlap. As
/// long as nobody wrote to them, they may stand in a file alone. All others were zeros.
#[derive(Debug, Default)]
pub(super) struct LoadedRanges(Vec<Range<u64>>);

impl GuestMemory {
    /// Maps memory of so many MiB, which is empty.
    ///
    /// # Errors
    /// As [`map`].
    pub(super) fn empty(mib: u32) -> Result<Self, Refusal> {
        Ok(Self { memory: map(mib)?, loaded: Arc::default() })
    }

    /// Maps memory of so many MiB that holds what stands in files, and never writes to them. What is mapped is read when
    /// somebody asks for it.
    ///
    /// # Errors
    /// [`Refusal::Corrupt`] for pieces that cannot be of such memory and such files, and what the host refuses.
    pub(super) fn saved(mib: u32, pieces: &[MemoryPiece], files: &[File]) -> Result<Self, Refusal> {
        let of_host = |error: io::Error| failed("saved memory", error);
        let lengths = files.iter().map(|file| file.metadata().map(|about| about.len()));
        let lengths = lengths.collect::<io::Result<Vec<_>>>().map_err(of_host)?;
        let memory = map(mib)?;
        let mut mappings = 0;
        for piece in pieces {
            let number = usize::try_from(piece.file).unwrap_or(usize::MAX);
            let in_file = piece.at.checked_add(piece.length);
            let inside =
                lengths.get(number).is_some_and(|len| in_file.is_some_and(|end| end <= *len));
            let slice = usize::try_from(piece.length)
                .ok()
                .filter(|_| inside)
                .and_then(|bytes| memory.get_slice(GuestAddress(piece.address), bytes).ok());
            let (Some(slice), Some(file)) = (slice, files.get(number)) else {
                let MemoryPiece { address, length, file, at } = piece;
                let reason = format!("{length} bytes at {address:#x} from {at:#x} of file {file}");
                return Err(Refusal::Corrupt(reason));
            };
            if mappings < MAX_MAPPINGS && map_file(&slice, file, piece.at).map_err(of_host)? {
                mappings += 1;
                continue;
            }
            let mut reader = FileAt { file, len: lengths[number], offset: piece.at };
            reader.read_exact_volatile(&mut { slice }).map_err(|error| {
                Refusal::Failed(format!("saved memory at {:#x}: {error}", piece.address))
            })?;
        }
        let loaded = pieces.iter().map(|piece| piece.address..piece.address + piece.length);
        Ok(Self { memory, loaded: Arc::new(LoadedRanges(loaded.collect())) })
    }
}

impl LoadedRanges {
    /// Gives those of these bytes that were loaded.
    pub(super) fn within(&self, bytes: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        let first = self.0.partition_point(|range| range.end <= bytes.start);
        let touched = self.0[first..].iter().take_while(move |range| range.start < bytes.end);
        touched.map(move |range| range.start.max(bytes.start)..range.end.min(bytes.end))
    }
}

/// Lets memory show what stands in a file at `at`, until it is written to; false where the file cannot be mapped.
fn map_file(slice: &VolatileSlice<'_, impl BitmapSlice>, file: &File, at: u64) -> io::Result<bool> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let (readable, start) = (ProtFlags::READ | ProtFlags::WRITE, slice.ptr_guard_mut().as_ptr());
    // SAFETY: the range is whole pages of guest memory, which stays mapped at the same place; nothing runs in it yet, and
    // nothing in this process holds a Rust reference into it.
    match unsafe { rustix::mm::mmap(start.cast(), slice.len(), readable, flags, file, at) } {
        Err(Errno::NODEV) => return Ok(false),
        other => other?,
    };
    // SAFETY: as above; the advice changes nothing but core dumps.
    unsafe { madvise(start.cast(), slice.len(), Advice::LinuxDontDump) }?;
    Ok(true)
}

/// Splits so many bytes around the hole below 4 GiB.
fn ranges(bytes: u64) -> Vec<(GuestAddress, usize)> {
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut ranges = vec![(GuestAddress(0), size(bytes.min(HOLE)))];
    if bytes > HOLE {
        ranges.push((GuestAddress(ABOVE_HOLE), size(bytes - HOLE)));
    }
    ranges
}

/// Gives a guest its memory, or the same once more; with `log`, KVM logs from then on which pages are written to. The
/// caller keeps `memory` for as long as the guest may run.
///
/// # Errors
/// When KVM refuses.
pub(super) fn give_to_guest(vm: &VmFd, memory: &Memory, log: bool) -> Result<(), Refusal> {
    for (slot, region) in (0_u32..).zip(memory.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a live mapping of that size, which by the caller's promise outlives the guest, and
        // regions do not overlap. Nothing in this process holds a Rust reference into it: it is used through
        // volatile accesses only.
        unsafe { vm.set_user_memory_region(slot) }.map_err(kvm_failed("memory slot"))?;
    }
    Ok(())
}

/// Keeps the memory that a vCPU shares with KVM out of copies of this process: a copy could not use it, and would keep
/// the vCPU alive.
///
/// # Errors
/// When the host refuses.
pub(super) fn keep_from_copies(vcpu: &mut VcpuFd, run_bytes: usize) -> Result<(), Refusal> {
    let run: *mut kvm_bindings::kvm_run = vcpu.get_kvm_run();
    // SAFETY: the range is the vCPU's own mapping, of the size that KVM says, and the advice changes nothing but forks.
    unsafe { madvise(run.cast(), run_bytes, Advice::LinuxDontFork) }
        .map_err(|error| failed("vCPU", error))
}

/// Counts the bytes of a guest's memory that are resident.
pub(super) fn resident_bytes(memory: &Memory) -> u64 {
    const PAGE: usize = 4096;
    const STEP: usize = PAGE << 12;
    let mut pages = 0_u64;
    let mut seen = vec![0_u8; STEP / PAGE];
    for region in memory.iter() {
        let len = usize::try_from(region.len()).unwrap_or(0);
        for offset in (0..len).step_by(STEP) {
            let step = STEP.min(len - offset);
            let start = region.as_ptr().wrapping_add(offset);
            // SAFETY: the range lies in a live mapping, page by page, and the vector has a byte for each page.
            let done = unsafe { libc::mincore(start.cast(), step, seen.as_mut_ptr()) };
            if done == 0 {
                let present = seen[..step / PAGE].iter().filter(|&&page| page & 1 != 0).count();
                pages += present as u64;
            }
        }
    }
    pages * PAGE as u64
}

/// Reads a file at an offset of its own: launchers share the file's description, and with it the one that it has.
#[derive(Debug)]
pub(super) struct FileAt<'a> {
    file: &'a File,
    len: u64,
    offset: u64,
}

impl<'a> FileAt<'a> {
    /// Begins at the start of a file of `len` bytes.
    pub(super) fn new(file: &'a File, len: u64) -> Self {
        Self { file, len, offset: 0 }
    }

    /// Where to read next, unless that is behind the end.
    fn place(&self) -> Option<libc::off_t> {
        libc::off_t::try_from(self.offset).ok().filter(|_| self.offset < self.len)
    }

    /// Tells how long the file was.
    pub(super) fn len(&self) -> u64 {
        self.len
    }
}

impl ReadVolatile for FileAt<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        // Also where a kernel's header names a place that no file can have.
        let Some(offset) = self.place() else { return Ok(0) };
        let guard = buf.ptr_guard_mut();
        // One that fails may have written something too.
        buf.bitmap().mark_dirty(0, buf.len());
        // SAFETY: the guard's range is valid for writes of its length; nobody else uses it before the guest runs.
        let read =
            unsafe { libc::pread(self.file.as_raw_fd(), guard.as_ptr().cast(), buf.len(), offset) };
        let read = usize::try_from(read)
            .map_err(|_| VolatileMemoryError::IOError(io::Error::last_os_error()))?;
        self.offset += read as u64;
        Ok(read)
    }
}

impl Read for FileAt<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(offset) = self.place() else { return Ok(0) };
        let read = rustix::io::pread(self.file, buf, offset.unsigned_abs())?;
        self.offset += read as u64;
        Ok(read)
    }
}

impl Seek for FileAt<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.offset.checked_add_signed(by),
        };
        self.offset = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_leaves_the_hole_free() {
        assert_eq!(ranges(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ranges(HOLE), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ranges(5 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(ABOVE_HOLE), 2 << 30)]
        );
    }

    #[test]
    fn behind_the_end_of_a_file_there_is_nothing() {
        let file = pages_of(1);
        for offset in [8192, 8193, 1 << 63, u64::MAX] {
            let mut reader = FileAt::new(&file, 8192);
            reader.seek(SeekFrom::Start(offset)).unwrap();
            assert_eq!(reader.read(&mut [0; 9]).unwrap(), 0);
            let memory = map(64).unwrap();
            let mut slice = memory.get_slice(GuestAddress(0), 9).unwrap();
            assert_eq!(reader.read_volatile(&mut slice).unwrap(), 0);
        }
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for mib in [0, 63, MAX_MIB + 1, u32::MAX] {
            let refusal = map(mib).unwrap_err();
            assert!(matches!(refusal, Refusal::Config { field, .. } if field == "memory_mib"));
        }
    }

    /// Gives a file of two pages of ones, two of twos, and so on.
    fn pages_of(count: u8) -> File {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (1..=count).flat_map(|number| [number; 8192]).collect();
        rustix::io::pwrite(&file, &bytes, 0).unwrap();
        file
    }

    const PAGE: u64 = crate::snapshot::PAGE;

    fn piece(page: u64, pages: u64, file: u64, at: u64) -> MemoryPiece {
        MemoryPiece { address: page * PAGE, length: pages * PAGE, file, at: at * PAGE }
    }

    #[test]
    fn memory_shows_what_stands_in_files_and_keeps_what_is_written() {
        let files = [pages_of(3), pages_of(9)];
        let pieces = [piece(1, 2, 1, 14), piece(3, 3, 0, 3), piece(0x1000, 1, 1, 0)];
        let saved = GuestMemory::saved(64, &pieces, &files).unwrap();
        let read = |page: u64| saved.memory.read_obj::<u8>(GuestAddress(page * PAGE + 9)).unwrap();
        let seen: Vec<_> = (0..7).map(read).collect();
        assert_eq!((&seen[..], read(0x1000)), (&[0, 8, 8, 2, 3, 3, 0][..], 1));
        saved.memory.write_obj(77_u8, GuestAddress(4 * PAGE)).unwrap();
        assert_eq!(read(4), 3);
        let mut kept = [0];
        rustix::io::pread(&files[0], &mut kept, 4 * PAGE).unwrap();
        assert_eq!(kept, [3]);
        // Only what was written to is this process's own.
        let host = saved.memory.get_host_address(GuestAddress(PAGE)).unwrap() as u64;
        let own = crate::vmm::page_map::PageMap::open().look(host, 5 * PAGE).own(5 * PAGE);
        assert_eq!(own, [Range { start: 3 * PAGE, end: 4 * PAGE }]);
    }

    #[test]
    fn pieces_outside_of_memory_or_files_are_refused() {
        let files = [pages_of(3)];
        let end = (64 << 20) / PAGE;
        for wrong in [
            piece(0, 7, 0, 0),
            piece(0, 1, 0, 6),
            piece(0, 1, 1, 0),
            piece(0, 1, u64::MAX, 0),
            piece(end, 1, 0, 0),
            piece(end - 1, 2, 0, 0),
            MemoryPiece { at: u64::MAX - 4095, ..piece(0, 1, 0, 0) },
        ] {
            let refusal = GuestMemory::saved(64, &[wrong], &files).unwrap_err();
            assert!(matches!(refusal, Refusal::Corrupt(_)), "{wrong:?}: {refusal:?}");
        }
    }

    #[test]
    fn loaded_ranges_are_found() {
        let loaded = LoadedRanges(vec![10..20, 20..30, 40..50]);
        let within = |bytes| loaded.within(bytes).collect::<Vec<_>>();
        assert_eq!(within(0..10), []);
        assert_eq!(within(15..45), [15..20, 20..30, 40..45]);
        assert_eq!(within(30..40), []);
        assert_eq!(within(49..100), [Range { start: 49, end: 50 }]);
    }

    #[test]
    fn huge_pages_can_hold_memory() {
        for region in map(5 << 10).unwrap().iter() {
            assert_eq!(region.as_ptr().align_offset(HUGE_PAGE), 0);
            assert_eq!(region.start_addr().0 % HUGE_PAGE as u64, 0);
        }
    }

    #[test]
    fn only_touched_memory_is_resident() {
        let memory = map(5 << 10).unwrap();
        assert_eq!(resident_bytes(&memory), 0);
        memory.write_obj(1_u8, GuestAddress(0)).unwrap();
        memory.write_obj(1_u8, GuestAddress(ABOVE_HOLE + (1 << 30))).unwrap();
        let resident = resident_bytes(&memory);
        assert!((8 << 10..16 << 20).contains(&resident), "{resident}");
    }

    #[test]
    fn files_are_read_at_an_offset_of_their_own() {
        let file = tempfile::tempfile().unwrap();
        rustix::io::pwrite(&file, b"0123456789", 0).unwrap();
        let memory = map(64).unwrap();
        let mut reader = FileAt::new(&file, 10);
        reader.seek(SeekFrom::Start(4)).unwrap();
        memory.read_exact_volatile_from(GuestAddress(0x1000), &mut reader, 3).unwrap();
        let mut found = [0; 3];
        memory.read_slice(&mut found, GuestAddress(0x1000)).unwrap();
        assert_eq!(&found, b"456");
        assert_eq!(rustix::fs::tell(&file).unwrap(), 0);
        memory.read_exact_volatile_from(GuestAddress(0), &mut reader, 4).unwrap_err();
    }
}
