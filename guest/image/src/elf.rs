//! What is asked of x86-64 ELF files. Also part of the build script, so it uses `std` alone.

use std::fmt;

const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_INTERPRETER: u32 = 3;
const HEADER_BYTES: usize = 64;
const SEGMENT_HEADER_BYTES: usize = 56;

/// The length of a file's head that holds the ELF header and, in what linkers write, all segment headers.
pub(crate) const HEAD_BYTES: usize = 4096;

/// What the headers of an x86-64 program say (System V gABI, chapters 4 and 5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Whether it names a dynamic linker.
    pub(crate) interpreter: bool,
    /// Whether a loaded segment lies in the upper half of the address space, as a kernel's do.
    pub(crate) upper_half: bool,
    /// Where the last segment's bytes end in the file.
    pub(crate) segments_end: u64,
}

/// Why an ELF file is not an x86-64 program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum NotAProgram {
    NotElf,
    Truncated,
    Bits32,
    BigEndian,
    Machine(u16),
    Type(u16),
    NoSegments,
}

impl Header {
    /// Reads the headers from a file's first bytes ([`HEAD_BYTES`] are enough).
    pub(crate) fn parse(head: &[u8]) -> Result<Self, NotAProgram> {
        if !head.starts_with(b"\x7fELF") {
            return Err(NotAProgram::NotElf);
        }
        match head.get(4) {
            None => return Err(NotAProgram::Truncated),
            Some(1) => return Err(NotAProgram::Bits32),
            Some(_) => {}
        }
        if head.len() < HEADER_BYTES {
            return Err(NotAProgram::Truncated);
        }
        if head[5] == 2 {
            return Err(NotAProgram::BigEndian);
        }
        let machine = u16_at(head, 18).ok_or(NotAProgram::Truncated)?;
        if machine != MACHINE_X86_64 {
            return Err(NotAProgram::Machine(machine));
        }
        let kind = u16_at(head, 16).ok_or(NotAProgram::Truncated)?;
        if kind != TYPE_EXECUTABLE && kind != TYPE_SHARED {
            return Err(NotAProgram::Type(kind));
        }
        Self::segments(head)
    }

    fn segments(head: &[u8]) -> Result<Self, NotAProgram> {
        let table = u64_at(head, 32)
            .and_then(|at| usize::try_from(at).ok())
            .ok_or(NotAProgram::Truncated)?;
        let size = usize::from(u16_at(head, 54).ok_or(NotAProgram::Truncated)?);
        let count = usize::from(u16_at(head, 56).ok_or(NotAProgram::Truncated)?);
        if count == 0 || size < SEGMENT_HEADER_BYTES {
            return Err(NotAProgram::NoSegments);
        }
        let mut header = Self { interpreter: false, upper_half: false, segments_end: 0 };
        for index in 0..count {
            let start = table.checked_add(index * size).ok_or(NotAProgram::Truncated)?;
            let segment = head
                .get(start..)
                .and_then(|rest| rest.get(..SEGMENT_HEADER_BYTES))
                .ok_or(NotAProgram::Truncated)?;
            let field = |at| u64_at(segment, at).ok_or(NotAProgram::Truncated);
            let kind = u32_at(segment, 0).ok_or(NotAProgram::Truncated)?;
            header.interpreter |= kind == SEGMENT_INTERPRETER;
            header.upper_half |= kind == SEGMENT_LOAD && field(16)? >> 63 == 1;
            let end = field(8)?.checked_add(field(32)?).ok_or(NotAProgram::Truncated)?;
            header.segments_end = header.segments_end.max(end);
        }
        Ok(header)
    }
}

impl fmt::Display for NotAProgram {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotElf => write!(formatter, "not an ELF file"),
            Self::Truncated => write!(formatter, "a truncated ELF file"),
            Self::Bits32 => write!(formatter, "a 32-bit ELF file"),
            Self::BigEndian => write!(formatter, "a big-endian ELF file"),
            Self::Machine(183) => write!(formatter, "an ELF file for ARM64"),
            Self::Machine(243) => write!(formatter, "an ELF file for RISC-V"),
            Self::Machine(machine) => {
                write!(formatter, "an ELF file for another processor (machine {machine})")
            }
            Self::Type(1) => write!(formatter, "an ELF object, such as a kernel module"),
            Self::Type(4) => write!(formatter, "an ELF core dump"),
            Self::Type(kind) => write!(formatter, "an ELF file of type {kind}"),
            Self::NoSegments => write!(formatter, "an ELF file without segments"),
        }
    }
}

/// The little-endian number at `at`, if the bytes reach that far.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// The little-endian number at `at`, if the bytes reach that far.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// The little-endian number at `at`, if the bytes reach that far.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}
