//! [`BlockDevice`]: a disk in a file of the host's (virtio 1.2, section 5.2).
//!
//! A request is checked whole before any of it is done: one that reaches beyond the disk, writes to a read-only one or
//! has a length that is not a whole number of sectors ends with `VIRTIO_BLK_S_IOERR` and moves nothing. What the host
//! fails to do, a full disk of its own included, ends the same way; a write that failed half-way may have changed a part
//! of its sectors, as on any disk.
//!
//! Data goes between the file and guest memory by single system calls without a copy in between. Those use the file's
//! own position, so nothing else may use the same open file.

use crate::{
    device::{DeviceBroken, Interrupt, Memory, VirtioDevice},
    queue::{Budget, Chain, DeviceQueue, Handled, QueueError, Segments, Wakeup, bytes},
};
use rustix::fs::{FallocateFlags, OFlags};
use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    num::NonZeroUsize,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    sync::Arc,
};
use virtio_bindings::{
    virtio_blk::{
        VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
        VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    },
    virtio_ids::VIRTIO_ID_BLOCK,
    virtio_ring::VIRTIO_RING_F_EVENT_IDX,
};
use virtio_queue::Queue;
use vm_memory::bitmap::AtomicBitmap;

/// The size of a sector in bytes, the unit of all positions (section 5.2.4).
pub const SECTOR: u64 = BLOCK as u64;

/// The longest serial number in bytes (section 5.2.6).
pub const SERIAL_LENGTH: usize = ID_LENGTH as usize;

/// How a disk is offered to the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockOptions {
    /// Refuses every write. Default: no.
    pub read_only: bool,
    /// The serial number that the guest reads, at most [`SERIAL_LENGTH`] bytes. Default: none.
    pub serial: String,
}

impl BlockOptions {
    /// Refuses every write, or not.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Gives the disk a serial number of at most [`SERIAL_LENGTH`] bytes.
    #[must_use]
    pub fn serial(mut self, serial: impl Into<String>) -> Self {
        self.serial = serial.into();
        self
    }
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The serial number is too long or has a byte of zero.
    #[error("a serial number has at most {SERIAL_LENGTH} bytes, none of them zero")]
    Serial,
    /// The file cannot be written, but the disk is not read-only.
    #[error("the file is not open for reading and writing")]
    NotWritable,
    /// The file cannot be read.
    #[error("the file is not open for reading")]
    NotReadable,
    /// Every write would go to the end of the file.
    #[error("the file is open for appending")]
    Appending,
    /// The host cannot use the file.
    #[error("the file: {0}")]
    Host(#[from] io::Error),
}

/// A disk.
#[derive(Debug)]
pub struct BlockDevice {
    disk: Disk,
    wakeup: Wakeup,
    active: Option<Active>,
}

/// Notes which parts of a disk a guest changed: wrote, cleared or discarded. A clone shares the note.
#[derive(Clone, Debug)]
pub struct DiskChanges {
    parts: Arc<AtomicBitmap>,
    part_bytes: u64,
}

impl DiskChanges {
    /// Begins without a change, for a disk of so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let part_bytes = (bytes / MOST_PARTS).next_power_of_two().max(LEAST_PART);
        // One bit for each part; nothing about them is a page.
        let parts = usize::try_from(bytes.div_ceil(part_bytes)).unwrap_or(usize::MAX);
        Self { parts: Arc::new(AtomicBitmap::new(parts, NonZeroUsize::MIN)), part_bytes }
    }

    /// Gives the length of a part in bytes, a power of two of at least 64 KiB.
    #[must_use]
    pub fn part_bytes(&self) -> u64 {
        self.part_bytes
    }

    /// Gives the parts that were changed, the first as the lowest bit of the first word, and forgets them.
    #[must_use]
    pub fn take(&self) -> Vec<u64> {
        self.parts.get_and_reset()
    }

    fn note(&self, at: u64, bytes: u64) {
        if bytes > 0 {
            let (first, last) = (at / self.part_bytes, (at + (bytes - 1)) / self.part_bytes);
            let index = |part: u64| usize::try_from(part).unwrap_or(usize::MAX);
            self.parts.set_addr_range(index(first), index(last - first + 1));
        }
    }
}

impl BlockDevice {
    /// Makes a disk of a file. Its size is that of the file now; an incomplete sector at the end is out of reach.
    ///
    /// # Errors
    /// When the file is not open as the disk needs it, the serial number is too long, or the host fails.
    pub fn new(mut file: File, options: &BlockOptions) -> Result<Self, BlockError> {
        let serial = options.serial.as_bytes();
        if serial.len() > SERIAL_LENGTH || serial.contains(&0) {
            return Err(BlockError::Serial);
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
        let access = flags & OFlags::ACCMODE;
        if flags.contains(OFlags::PATH) || access == OFlags::WRONLY {
            return Err(BlockError::NotReadable);
        }
        if !options.read_only && access != OFlags::RDWR {
            return Err(BlockError::NotWritable);
        }
        if !options.read_only && flags.contains(OFlags::APPEND) {
            return Err(BlockError::Appending);
        }
        // A block device has no length of its own, but an end.
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let mut id = [0; SERIAL_LENGTH];
        id[..serial.len()].copy_from_slice(serial);
        let read_only = options.read_only;
        let changes = DiskChanges::new(if read_only { 0 } else { sectors * SECTOR });
        Ok(Self {
            disk: Disk { file, sectors, read_only, id, changes, lost_writes: false },
            wakeup: Wakeup::new()?,
            active: None,
        })
    }

    /// Gives its size in sectors.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.disk.sectors
    }

    /// Gives the note of what the guest changes.
    #[must_use]
    pub fn changes(&self) -> DiskChanges {
        self.disk.changes.clone()
    }

    #[cfg(test)]
    pub(crate) fn pretend_sectors(&mut self, sectors: u64) {
        self.disk.sectors = sectors;
    }

    fn serve(&mut self) -> Result<(), DeviceBroken> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Active { queue, interrupt, features } = active;
        let disk = &mut self.disk;
        let more = queue.serve(BUDGET, &**interrupt, |memory, chain| {
            disk.handle(memory, chain, *features).map_err(|error| error.of(NAME))
        })?;
        if more {
            self.wakeup.raise();
        }
        Ok(())
    }
}

impl VirtioDevice for BlockDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_RING_F_EVENT_IDX;
        if self.disk.read_only {
            always | 1 << VIRTIO_BLK_F_RO
        } else {
            always | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.disk.config();
        let from = usize::try_from(offset).map_or(config.len(), |from| from.min(config.len()));
        let there = data.len().min(config.len() - from);
        data.fill(0);
        data[..there].copy_from_slice(&config[from..from + there]);
    }

    fn activate(
        &mut self,
        memory: Memory,
        features: u64,
        queues: Vec<Queue>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<(), DeviceBroken> {
        let Ok([queue]) = <[Queue; 1]>::try_from(queues) else {
            return Err(DeviceBroken::new(NAME, "it has one queue"));
        };
        let queue = DeviceQueue::new(NAME, queue, memory)?;
        self.active = Some(Active { queue, interrupt, features });
        // The queue of a restored machine may hold requests that were announced to the saved one.
        self.wakeup.raise();
        Ok(())
    }

    fn queues(&self) -> Vec<&Queue> {
        self.active.iter().map(|active| active.queue.queue()).collect()
    }

    fn queue_notified(&mut self, _queue: u16) -> Result<(), DeviceBroken> {
        self.serve()
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wakeup.as_fd())
    }

    fn host_ready(&mut self) -> Result<(), DeviceBroken> {
        self.wakeup.lower();
        self.serve()
    }

    fn reset(&mut self) {
        self.active = None;
        self.wakeup.lower();
    }
}

/// What it has of the driver.
#[derive(Debug)]
struct Active {
    queue: DeviceQueue,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
}

/// The file and what it stands for.
#[derive(Debug)]
struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
    id: [u8; SERIAL_LENGTH],
    changes: DiskChanges,
    /// The host failed to keep something it had taken: it says so once only and forgets, so each later flush fails here.
    lost_writes: bool,
}

impl Disk {
    /// Does one request; an error says that the chain is none.
    fn handle(
        &mut self,
        memory: &Memory,
        chain: &mut Chain,
        features: u64,
    ) -> Result<Handled, QueueError> {
        let mut header = [0; HEADER_LENGTH as usize];
        chain.readable.read(memory, &mut header)?;
        let out = chain.readable.split_off(HEADER_LENGTH);
        let status_at = chain.writable.len().checked_sub(1).ok_or(QueueError::TooShort)?;
        let status = chain.writable.split_off(status_at);
        let request = Request {
            kind: le32(&header, 0),
            sector: le64(&header, 8),
            out: &out,
            into: &chain.writable,
            features,
        };
        let done = self.serve(memory, &request)?;
        let (code, filled) = match done {
            Done::Ok { filled } => (STATUS_OK, filled),
            Done::Failed => (STATUS_IOERR, 0),
            Done::Unsupported => (STATUS_UNSUPP, 0),
        };
        status.write(memory, &[code])?;
        // The status follows the data, so it counts only where no byte before it was left out.
        let written = if filled == status_at { filled + 1 } else { filled };
        Ok(Handled { written, moved: u64::from(out.len()) + u64::from(status_at) })
    }

    fn serve(&mut self, memory: &Memory, request: &Request<'_>) -> Result<Done, QueueError> {
        let has = |feature: u32| request.features & 1 << feature != 0;
        Ok(match request.kind {
            VIRTIO_BLK_T_IN => self.read(memory, request),
            VIRTIO_BLK_T_OUT => self.write(memory, request),
            VIRTIO_BLK_T_FLUSH if has(VIRTIO_BLK_F_FLUSH) => self.flush(),
            VIRTIO_BLK_T_GET_ID => self.give_id(memory, request)?,
            VIRTIO_BLK_T_DISCARD if self.read_only || has(VIRTIO_BLK_F_DISCARD) => {
                self.clear(memory, request, &DISCARD)?
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.read_only || has(VIRTIO_BLK_F_WRITE_ZEROES) => {
                self.clear(memory, request, &WRITE_ZEROES)?
            }
            _ => Done::Unsupported,
        })
    }

    fn read(&mut self, memory: &Memory, request: &Request<'_>) -> Done {
        let Some(from) = self.place(request.sector, request.into) else { return Done::Failed };
        let filled = request.into.len();
        let outcome = self
            .file
            .seek(SeekFrom::Start(from))
            .map_err(QueueError::host)
            .and_then(|_| request.into.fill_from(memory, &mut self.file));
        if outcome.is_ok() { Done::Ok { filled } } else { Done::Failed }
    }

    fn write(&mut self, memory: &Memory, request: &Request<'_>) -> Done {
        let Some(to) = self.place(request.sector, request.out).filter(|_| !self.read_only) else {
            return Done::Failed;
        };
        // One that fails may have changed something too.
        self.changes.note(to, request.out.len().into());
        let outcome = self
            .file
            .seek(SeekFrom::Start(to))
            .map_err(QueueError::host)
            .and_then(|_| request.out.drain_into(memory, &mut self.file));
        if outcome.is_err() { Done::Failed } else { self.kept(request) }
    }

    fn flush(&mut self) -> Done {
        if !self.read_only && !self.lost_writes {
            self.lost_writes = self.file.sync_data().is_err();
        }
        if self.lost_writes { Done::Failed } else { Done::Ok { filled: 0 } }
    }

    /// Ends a request that changed something: a driver that cannot flush relies on each write to be kept when it ends
    /// (section 5.2.6.2).
    fn kept(&mut self, request: &Request<'_>) -> Done {
        if request.features & 1 << VIRTIO_BLK_F_FLUSH == 0 {
            self.flush()
        } else {
            Done::Ok { filled: 0 }
        }
    }

    fn give_id(&self, memory: &Memory, request: &Request<'_>) -> Result<Done, QueueError> {
        if request.into.len() < ID_LENGTH {
            return Ok(Done::Failed);
        }
        request.into.write(memory, &self.id)?;
        Ok(Done::Ok { filled: ID_LENGTH })
    }

    /// Discards ranges or makes them zero (section 5.2.6.1), after all of them were checked.
    fn clear(
        &mut self,
        memory: &Memory,
        request: &Request<'_>,
        limits: &ClearLimits,
    ) -> Result<Done, QueueError> {
        let length = request.out.len();
        let ranges = length / RANGE_LENGTH;
        if self.read_only || !length.is_multiple_of(RANGE_LENGTH) || ranges > limits.ranges {
            return Ok(Done::Failed);
        }
        let mut list = [0; (RANGE_LENGTH * MAX_RANGES) as usize];
        let list = &mut list[..bytes(length)];
        request.out.read(memory, list)?;
        for range in list.chunks_exact(RANGE_LENGTH as usize) {
            let (sector, count, flags) = (le64(range, 0), le32(range, 8), le32(range, 12));
            if flags & !limits.flags != 0 {
                return Ok(Done::Unsupported);
            }
            if count > limits.sectors || !self.within(sector, count.into()) {
                return Ok(Done::Failed);
            }
        }
        for range in list.chunks_exact(RANGE_LENGTH as usize) {
            let (at, length) = (le64(range, 0) * SECTOR, u64::from(le32(range, 8)) * SECTOR);
            let unmap = le32(range, 12) & FLAG_UNMAP != 0;
            self.changes.note(at, length);
            if length > 0 && limits.clear(&self.file, at, length, unmap).is_err() {
                return Ok(Done::Failed);
            }
        }
        Ok(self.kept(request))
    }

    /// Gives the place in the file where the data of a read or write begins, if all of it is on the disk.
    fn place(&self, sector: u64, data: &Segments) -> Option<u64> {
        let length = u64::from(data.len());
        let whole = length.is_multiple_of(SECTOR) && length <= MAX_DATA;
        (whole && self.within(sector, length / SECTOR)).then(|| sector * SECTOR)
    }

    fn within(&self, sector: u64, count: u64) -> bool {
        sector.checked_add(count).is_some_and(|end| end <= self.sectors)
    }

    /// Gives the configuration's bytes (section 5.2.4), up to the last field that is offered.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        config[0..8].copy_from_slice(&self.sectors.to_le_bytes());
        let mut put = |at: usize, value: u32| {
            config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(8, SIZE_MAX);
        put(12, SEGMENTS_MAX);
        put(20, BLOCK);
        if !self.read_only {
            put(36, DISCARD.sectors);
            put(40, DISCARD.ranges);
            put(44, 1);
            put(48, WRITE_ZEROES.sectors);
            put(52, WRITE_ZEROES.ranges);
            config[56] = 1;
        }
        config
    }
}

/// A request as the driver wrote it.
#[derive(Debug)]
struct Request<'a> {
    kind: u32,
    sector: u64,
    out: &'a Segments,
    into: &'a Segments,
    features: u64,
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
enum Done {
    /// Well, with this many bytes for the driver.
    Ok {
        filled: u32,
    },
    Failed,
    Unsupported,
}

/// What one request that clears ranges may ask.
#[derive(Debug)]
struct ClearLimits {
    ranges: u32,
    sectors: u32,
    flags: u32,
    zero: bool,
}

impl ClearLimits {
    fn clear(&self, file: &File, at: u64, length: u64, unmap: bool) -> io::Result<()> {
        if !self.zero {
            // To discard is to advise: a file system that cannot is no failure.
            return match punch(file, at, length) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                other => other,
            };
        }
        let quick = if unmap {
            punch(file, at, length)
        } else {
            allocate(file, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, at, length)
        };
        match quick {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                write_zeros(file, at, length)
            }
            other => other,
        }
    }
}

impl QueueError {
    fn host(error: io::Error) -> Self {
        Self::Memory(vm_memory::GuestMemoryError::IOError(error))
    }
}

fn punch(file: &File, at: u64, length: u64) -> io::Result<()> {
    allocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, length)
}

fn allocate(file: &File, mode: FallocateFlags, at: u64, length: u64) -> io::Result<()> {
    Ok(rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, mode, at, length))?)
}

fn write_zeros(file: &File, mut at: u64, mut length: u64) -> io::Result<()> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while length > 0 {
        let now = ZEROS.len().min(usize::try_from(length).unwrap_or(usize::MAX));
        file.write_all_at(&ZEROS[..now], at)?;
        at += now as u64;
        length -= now as u64;
    }
    Ok(())
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

const NAME: &str = "block device";

/// The shortest part of a disk whose change is noted: a bit for 64 KiB.
const LEAST_PART: u64 = 64 << 10;

/// Longer parts keep a disk's note below 4 MiB.
const MOST_PARTS: u64 = 16 << 20;

const BLOCK: u32 = 512;

/// Enough for 85 requests of one page, since no indirect descriptors are offered.
const QUEUE_SIZE: u16 = 256;

/// The queue without the descriptors of the header and the status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// The longest buffer of a request in bytes, as drivers are told.
const SIZE_MAX: u32 = 64 << 10;

/// The most bytes that one request moves: what a driver that keeps to both limits can ask.
const MAX_DATA: u64 = SEGMENTS_MAX as u64 * SIZE_MAX as u64;

/// What one call does at most, beside the last request begun within it: a few milliseconds of copying.
const BUDGET: Budget = Budget { chains: 64, bytes: 4 << 20 };

/// The type, a reserved field and the sector (section 5.2.6).
const HEADER_LENGTH: u32 = 16;

const ID_LENGTH: u32 = 20;

/// The sector, the number of sectors and the flags.
const RANGE_LENGTH: u32 = 16;

const MAX_RANGES: u32 = 16;

const FLAG_UNMAP: u32 = 1;

const DISCARD: ClearLimits =
    ClearLimits { ranges: MAX_RANGES, sectors: 1 << 22, flags: 0, zero: false };

/// Few sectors, for the host's file system may make it write each of them.
const WRITE_ZEROES: ClearLimits =
    ClearLimits { ranges: 1, sectors: 1 << 16, flags: FLAG_UNMAP, zero: true };

const STATUS_OK: u8 = 0;
const STATUS_IOERR: u8 = 1;
const STATUS_UNSUPP: u8 = 2;
