//! Writes an empty ext4 file system.
//!
//! Source: the kernel's `Documentation/filesystems/ext4`, and `journal.rst` there for the journal. The layout is the
//! plain one: each group has its bitmaps and inode table at its own start, and what is all zero is left a hole.

use std::{fs::File, io, os::unix::fs::FileExt};

const INODE_BYTES: u64 = 256;
/// Inodes up to this one are reserved; it is `lost+found`.
const FIRST_INODE: u32 = 11;
const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
const DESCRIPTOR_BYTES: u64 = 32;
/// A last group with fewer free blocks than this is left out.
const MIN_GROUP_BLOCKS: u64 = 50;
/// From this size on blocks have 4 KiB instead of 1 KiB.
const LARGE_BLOCKS_FROM: u64 = 64 << 20;
/// Linux accepts no journal shorter than 1024 blocks.
const MIN_JOURNAL_BLOCKS: u32 = 1024;

const EXTENTS_FLAG: u32 = 0x8_0000;
const TYPE_DIRECTORY: u16 = 0o040_000;
const TYPE_FILE: u16 = 0o100_000;

/// What makes one file system different from another.
pub(super) struct Identity {
    /// 16 bytes for the UUID and 16 as the seed of directory hashes.
    pub(super) random: [u8; 32],
    /// When it is made, in seconds since 1970.
    pub(super) seconds: u32,
}

/// Formats `file`, which is `bytes` long and all zero. `bytes` is at least 1 MiB and at most 16 TiB.
pub(super) fn format(file: &File, bytes: u64, identity: &Identity) -> io::Result<()> {
    let layout = Layout::new(bytes).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut descriptors = Block::default();
    let mut free_blocks = 0;
    for group in 0..layout.groups {
        let used = layout.used_blocks(group);
        let free = layout.blocks_in(group) - used;
        free_blocks += free;
        let first = layout.first_metadata_block(group);
        let at = usize::try_from(u64::from(group) * DESCRIPTOR_BYTES).map_err(io::Error::other)?;
        let (used_inodes, directories) = if group == 0 { (FIRST_INODE, 2) } else { (0, 0) };
        descriptors.u32(at, first);
        descriptors.u32(at + 0x4, first + 1);
        descriptors.u32(at + 0x8, first + 2);
        descriptors.u16(at + 0xc, low16(free));
        descriptors.u16(at + 0xe, low16(layout.inodes_per_group - used_inodes));
        descriptors.u16(at + 0x10, directories);
        layout.write(file, first, &bitmap(used, layout.blocks_in(group), layout.block_bytes))?;
        layout.write(
            file,
            first + 1,
            &bitmap(used_inodes, layout.inodes_per_group, layout.block_bytes),
        )?;
    }
    for group in (0..layout.groups).filter(|group| has_superblock(*group)) {
        let superblock = layout.superblock(group, free_blocks, identity);
        // The first one always is at 1024, whatever the size of blocks.
        let at = if group == 0 { 1024 } else { layout.offset(layout.group_start(group)) };
        file.write_all_at(&superblock.bytes, at)?;
        layout.write(file, layout.group_start(group) + 1, &descriptors.bytes)?;
    }
    layout.write_directories(file, identity)?;
    layout.write_journal(file, identity)
}

/// Where everything is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Layout {
    block_bytes: u32,
    blocks: u32,
    groups: u32,
    inodes_per_group: u32,
    inode_table_blocks: u32,
    descriptor_blocks: u32,
    journal_blocks: u32,
}

impl Layout {
    fn new(bytes: u64) -> Option<Self> {
        let large = bytes >= LARGE_BLOCKS_FROM;
        let (block_bytes, bytes_per_inode) = if large { (4096, 16 << 10) } else { (1024, 4 << 10) };
        let blocks = bytes / u64::from(block_bytes);
        let first = u64::from(block_bytes == 1024);
        let per_group = u64::from(block_bytes) * 8;
        let groups = (blocks - first).div_ceil(per_group);
        let inodes = (bytes / bytes_per_inode).div_ceil(groups).next_multiple_of(16);
        let mut layout = Self {
            block_bytes,
            blocks: u32::try_from(blocks).ok()?,
            groups: u32::try_from(groups).ok()?,
            inodes_per_group: u32::try_from(inodes).ok()?,
            inode_table_blocks: u32::try_from(
                (inodes * INODE_BYTES).div_ceil(u64::from(block_bytes)),
            )
            .ok()?,
            descriptor_blocks: u32::try_from(
                (groups * DESCRIPTOR_BYTES).div_ceil(u64::from(block_bytes)),
            )
            .ok()?,
            journal_blocks: journal_blocks(bytes, blocks),
        };
        let last = layout.groups - 1;
        let needed = u64::from(layout.metadata_blocks(last)) + MIN_GROUP_BLOCKS;
        if last > 0 && u64::from(layout.blocks_in(last)) < needed {
            layout.blocks = layout.group_start(last);
            layout.groups = last;
        }
        Some(layout)
    }

    fn blocks_per_group(&self) -> u32 {
        self.block_bytes * 8
    }

    /// With blocks of 1 KiB the boot sector has block 0 for itself, and groups start behind it.
    fn first_block(&self) -> u32 {
        u32::from(self.block_bytes == 1024)
    }

    fn group_start(&self, group: u32) -> u32 {
        self.first_block() + group * self.blocks_per_group()
    }

    fn blocks_in(&self, group: u32) -> u32 {
        (self.blocks - self.group_start(group)).min(self.blocks_per_group())
    }

    /// The group's block bitmap; the inode bitmap and the inode table follow.
    fn first_metadata_block(&self, group: u32) -> u32 {
        let copies = if has_superblock(group) { 1 + self.descriptor_blocks } else { 0 };
        self.group_start(group) + copies
    }

    fn metadata_blocks(&self, group: u32) -> u32 {
        self.first_metadata_block(group) - self.group_start(group) + 2 + self.inode_table_blocks
    }

    fn root_block(&self) -> u32 {
        self.group_start(0) + self.metadata_blocks(0)
    }

    fn journal_start(&self) -> u32 {
        self.root_block() + 2
    }

    fn used_blocks(&self, group: u32) -> u32 {
        let content = if group == 0 { 2 + self.journal_blocks } else { 0 };
        self.metadata_blocks(group) + content
    }

    fn offset(&self, block: u32) -> u64 {
        u64::from(block) * u64::from(self.block_bytes)
    }

    fn write(&self, file: &File, block: u32, bytes: &[u8]) -> io::Result<()> {
        file.write_all_at(bytes, self.offset(block))
    }

    fn superblock(&self, group: u32, free_blocks: u32, identity: &Identity) -> Block {
        let mut block = Block::of(1024);
        block.u32(0x0, self.inodes_per_group * self.groups);
        block.u32(0x4, self.blocks);
        block.u32(0xc, free_blocks);
        block.u32(0x10, self.inodes_per_group * self.groups - FIRST_INODE);
        block.u32(0x14, self.first_block());
        let size = self.block_bytes.trailing_zeros() - 10;
        block.u32(0x18, size);
        block.u32(0x1c, size);
        block.u32(0x20, self.blocks_per_group());
        block.u32(0x24, self.blocks_per_group());
        block.u32(0x28, self.inodes_per_group);
        block.u32(0x30, identity.seconds);
        // Never checked for the number of mounts.
        block.u16(0x36, u16::MAX);
        block.u16(0x38, 0xef53);
        // Clean; go on after errors.
        block.u16(0x3a, 1);
        block.u16(0x3c, 1);
        block.u32(0x40, identity.seconds);
        // Revision 1, which has the fields from here on.
        block.u32(0x4c, 1);
        block.u32(0x54, FIRST_INODE);
        block.u16(0x58, low16(u32::try_from(INODE_BYTES).unwrap_or(0)));
        block.u16(0x5a, low16(group));
        let has_journal = self.journal_blocks > 0;
        // Extended attributes and hashed directories, and a journal.
        block.u32(0x5c, 0x28 | if has_journal { 0x4 } else { 0 });
        // Types in directory entries, and extents.
        block.u32(0x60, 0x2 | 0x40);
        // Sparse superblocks, large files, huge files, many subdirectories, large inodes.
        block.u32(0x64, 0x1 | 0x2 | 0x8 | 0x20 | 0x40);
        block.bytes(0x68, &identity.random[..16]);
        block.bytes(0xec, &identity.random[16..]);
        // Half MD4, over signed characters.
        block.u8(0xfc, 1);
        block.u32(0x160, 1);
        // Mounted with extended attributes and access control lists.
        block.u32(0x100, 0xc);
        block.u32(0x108, identity.seconds);
        block.u16(0x15c, 32);
        block.u16(0x15e, 32);
        if has_journal {
            block.u32(0xe0, JOURNAL_INODE);
            // A copy of the journal's map and size, for repairs.
            block.u8(0xfd, 1);
            block.bytes(0x10c, &extent(self.journal_start(), self.journal_blocks).bytes);
            let (low, high) = halves(self.offset(self.journal_blocks));
            block.u32(0x10c + 60, high);
            block.u32(0x10c + 64, low);
        }
        block
    }

    /// Writes the root directory and the `lost+found` in it.
    fn write_directories(&self, file: &File, identity: &Identity) -> io::Result<()> {
        let (root, lost) = (self.root_block(), self.root_block() + 1);
        self.write_inode(file, identity, ROOT_INODE, TYPE_DIRECTORY | 0o755, 3, (root, 1))?;
        self.write_inode(file, identity, FIRST_INODE, TYPE_DIRECTORY | 0o700, 2, (lost, 1))?;
        let names = [(ROOT_INODE, "."), (ROOT_INODE, ".."), (FIRST_INODE, "lost+found")];
        self.write(file, root, &directory(&names, self.block_bytes).bytes)?;
        let names = [(FIRST_INODE, "."), (ROOT_INODE, "..")];
        self.write(file, lost, &directory(&names, self.block_bytes).bytes)
    }

    /// Writes an empty journal: a superblock, whose numbers have the high byte first, and nothing else.
    fn write_journal(&self, file: &File, identity: &Identity) -> io::Result<()> {
        if self.journal_blocks == 0 {
            return Ok(());
        }
        let extent = (self.journal_start(), self.journal_blocks);
        self.write_inode(file, identity, JOURNAL_INODE, TYPE_FILE | 0o600, 1, extent)?;
        let mut block = Block::of(1024);
        // Magic number and type: superblock, version 2. Then size, length, first block of the log, first transaction,
        // and how many file systems use it.
        let fields = [
            (0x0, 0xc03b_3998),
            (0x4, 4),
            (0xc, self.block_bytes),
            (0x10, self.journal_blocks),
            (0x14, 1),
            (0x18, 1),
            (0x40, 1),
        ];
        for (at, value) in fields {
            block.bytes(at, &u32::to_be_bytes(value));
        }
        block.bytes(0x30, &identity.random[..16]);
        self.write(file, self.journal_start(), &block.bytes)
    }

    fn write_inode(
        &self,
        file: &File,
        identity: &Identity,
        number: u32,
        mode: u16,
        links: u16,
        (start, blocks): (u32, u32),
    ) -> io::Result<()> {
        let mut inode = Block::of(usize::try_from(INODE_BYTES).unwrap_or(0));
        let (low, high) = halves(self.offset(blocks));
        inode.u16(0x0, mode);
        inode.u32(0x4, low);
        inode.u32(0x6c, high);
        // Access, change, modification and creation.
        for at in [0x8, 0xc, 0x10, 0x90] {
            inode.u32(at, identity.seconds);
        }
        inode.u16(0x1a, links);
        // In sectors.
        inode.u32(0x1c, blocks * (self.block_bytes / 512));
        inode.u32(0x20, EXTENTS_FLAG);
        inode.bytes(0x28, &extent(start, blocks).bytes);
        inode.u16(0x80, 32);
        let table = self.offset(self.first_metadata_block(0) + 2);
        file.write_all_at(&inode.bytes, table + u64::from(number - 1) * INODE_BYTES)
    }
}

/// Bytes with little-endian numbers in them, growing as they are written.
#[derive(Default)]
struct Block {
    bytes: Vec<u8>,
}

impl Block {
    fn of(length: usize) -> Self {
        Self { bytes: vec![0; length] }
    }

    fn bytes(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(bytes);
    }

    fn u8(&mut self, at: usize, value: u8) {
        self.bytes(at, &[value]);
    }

    fn u16(&mut self, at: usize, value: u16) {
        self.bytes(at, &value.to_le_bytes());
    }

    fn u32(&mut self, at: usize, value: u32) {
        self.bytes(at, &value.to_le_bytes());
    }
}

/// What an inode has in place of block numbers: the head of an extent tree, and one extent.
fn extent(start: u32, blocks: u32) -> Block {
    let mut block = Block::of(60);
    block.u16(0x0, 0xf30a);
    block.u16(0x2, 1);
    block.u16(0x4, 4);
    block.u16(0x10, low16(blocks));
    block.u32(0x14, start);
    block
}

fn directory(entries: &[(u32, &str)], block_bytes: u32) -> Block {
    let mut block = Block::of(0);
    let mut at = 0;
    for (index, (inode, name)) in entries.iter().enumerate() {
        let length = if index + 1 == entries.len() {
            block_bytes as usize - at
        } else {
            (8 + name.len()).next_multiple_of(4)
        };
        block.u32(at, *inode);
        block.u16(at + 4, u16::try_from(length).unwrap_or(u16::MAX));
        block.u8(at + 6, u8::try_from(name.len()).unwrap_or(u8::MAX));
        // A directory.
        block.u8(at + 7, 2);
        block.bytes(at + 8, name.as_bytes());
        at += length;
    }
    block
}

/// A block of bits of which the first `used` are set, and all from `count` on, which stand for nothing.
fn bitmap(used: u32, count: u32, block_bytes: u32) -> Vec<u8> {
    let mut bits = vec![0_u8; block_bytes as usize];
    for bit in (0..used).chain(count..block_bytes * 8) {
        bits[(bit / 8) as usize] |= 1 << (bit % 8);
    }
    bits
}

/// Whether the group has a copy of the superblock and of the descriptors: 0, 1 and the powers of 3, 5 and 7.
fn has_superblock(group: u32) -> bool {
    let is_power = |base: u32| {
        std::iter::successors(Some(base), |power| power.checked_mul(base))
            .any(|power| power == group)
    };
    group <= 1 || [3, 5, 7].into_iter().any(is_power)
}

fn journal_blocks(bytes: u64, blocks: u64) -> u32 {
    match blocks {
        _ if bytes < 8 << 20 => 0,
        0..65_536 => MIN_JOURNAL_BLOCKS,
        65_536..524_288 => 4096,
        _ => 8192,
    }
}

fn low16(value: u32) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(u16::MAX)
}

fn halves(value: u64) -> (u32, u32) {
    (
        u32::try_from(value & 0xffff_ffff).unwrap_or(u32::MAX),
        u32::try_from(value >> 32).unwrap_or(u32::MAX),
    )
}
