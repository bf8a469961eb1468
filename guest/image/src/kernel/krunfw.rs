//! Kernels in libkrunfw: a shared library that holds a kernel as it lies in memory, and a function that says where.
//!
//! Nothing of the library is run. The function stores three numbers through its arguments, and they are read from its
//! code: the address to load the kernel at, the one to enter it at, and its size.

use object::{
    LittleEndian, Object, ObjectSegment, ObjectSymbol, ReadCache, ReadRef,
    elf::{self, FileHeader64, Ident, ProgramHeader64},
    endian::{U16, U32, U64},
    pod::bytes_of,
    read::elf::ElfFile64,
};
use std::fs::File;

/// What the library calls the kernel's bytes.
const BYTES: &[u8] = b"KERNEL_BUNDLE";

/// What it calls the function.
const FUNCTION: &[u8] = b"krunfw_get_kernel";

/// The longest that such a function is.
const MAX_CODE: u64 = 4096;

const PAGE: u64 = 4096;

/// Where Linux on x86-64 has the memory that it is loaded to.
const UPPER_HALF: u64 = 0xffff_ffff_8000_0000;

const E: LittleEndian = LittleEndian;

/// The kernel in a library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bundle {
    /// Where it starts in the file.
    pub(super) start: u64,
    /// Its size in bytes.
    pub(super) bytes: u64,
    load: u64,
    entry: u64,
}

impl Bundle {
    /// Finds the kernel in a file; nothing if it is no such library, and what is wrong with one as the error.
    pub(super) fn find(file: &File) -> Option<Result<Self, &'static str>> {
        let cache = ReadCache::new(file);
        let library = ElfFile64::<LittleEndian, _>::parse(&cache).ok()?;
        let symbol = |name| {
            let mut symbols = library.dynamic_symbols();
            symbols.find(|symbol| symbol.is_definition() && symbol.name_bytes() == Ok(name))
        };
        let (function, bytes) = (symbol(FUNCTION)?, symbol(BYTES)?);
        let place = |address: u64, size: u64| {
            let holds = library.segments().find_map(|segment| {
                let at = address.checked_sub(segment.address())?;
                let (offset, length) = segment.file_range();
                (at.checked_add(size)? <= length).then(|| offset.checked_add(at))?
            });
            holds.ok_or("a libkrunfw whose kernel is not in it")
        };
        let find = || {
            let start = place(bytes.address(), bytes.size())?;
            let length = function.size().min(MAX_CODE);
            let code = cache.read_bytes_at(place(function.address(), length)?, length);
            let stored = stored_numbers(code.map_err(|()| "a truncated libkrunfw")?);
            Self::of(start, bytes.size(), &stored)
                .ok_or("a libkrunfw that does not tell in a known way where its kernel belongs")
        };
        Some(find())
    }

    /// Tells the three numbers apart, in whatever order they are stored.
    fn of(start: u64, size: u64, stored: &[u64]) -> Option<Self> {
        let [one, two, three] = *stored else { return None };
        // The array may have a null at its end.
        let is_size = |number: u64| number == size || number.checked_add(1) == Some(size);
        let (bytes, others) = match (is_size(one), is_size(two), is_size(three)) {
            (true, false, false) => (one, [two, three]),
            (false, true, false) => (two, [one, three]),
            (false, false, true) => (three, [one, two]),
            _ => return None,
        };
        let (load, entry) = (others[0].min(others[1]), others[0].max(others[1]));
        let fits = load % PAGE == 0 && entry - load < bytes && load.checked_add(bytes)? < 1 << 31;
        fits.then_some(Self { start, bytes, load, entry })
    }

    /// The headers of an ELF file that loads the kernel's bytes, which come right behind them.
    pub(super) fn elf_headers(&self) -> Vec<u8> {
        let half = |number: usize| U16::new(E, u16::try_from(number).unwrap_or(u16::MAX));
        let header = FileHeader64::<LittleEndian> {
            e_ident: Ident {
                magic: elf::ELFMAG,
                class: elf::ELFCLASS64,
                data: elf::ELFDATA2LSB,
                version: elf::EV_CURRENT,
                os_abi: elf::ELFOSABI_NONE,
                abi_version: 0,
                padding: [0; 7],
            },
            e_type: U16::new(E, elf::ET_EXEC),
            e_machine: U16::new(E, elf::EM_X86_64),
            e_version: U32::new(E, u32::from(elf::EV_CURRENT.0)),
            e_entry: U64::new(E, self.entry),
            e_phoff: U64::new(E, size_of::<FileHeader64<LittleEndian>>() as u64),
            e_shoff: U64::new(E, 0),
            e_flags: U32::new(E, elf::FileFlags(0)),
            e_ehsize: half(size_of::<FileHeader64<LittleEndian>>()),
            e_phentsize: half(size_of::<ProgramHeader64<LittleEndian>>()),
            e_phnum: half(1),
            e_shentsize: half(0),
            e_shnum: half(0),
            e_shstrndx: U16::new(E, elf::SHN_UNDEF),
        };
        let segment = ProgramHeader64::<LittleEndian> {
            p_type: U32::new(E, elf::PT_LOAD),
            p_flags: U32::new(E, elf::PF_R | elf::PF_W | elf::PF_X),
            p_offset: U64::new(E, PAGE),
            p_vaddr: U64::new(E, UPPER_HALF + self.load),
            p_paddr: U64::new(E, self.load),
            p_filesz: U64::new(E, self.bytes),
            p_memsz: U64::new(E, self.bytes),
            p_align: U64::new(E, PAGE),
        };
        let mut headers = bytes_of(&header).to_vec();
        headers.extend(bytes_of(&segment));
        headers.resize(usize::try_from(PAGE).unwrap_or(headers.len()), 0);
        headers
    }
}

/// Lists the numbers that code stores through pointers: `movq` of a constant to where a register points (opcode C7 /0
/// with REX.W in the Intel manual), which is how compilers write `*argument = constant`.
fn stored_numbers(code: &[u8]) -> Vec<u64> {
    let stores = code.windows(7).filter_map(|bytes| match *bytes {
        [0x48, 0xc7, to, a, b, c, d] if to < 8 && to != 4 && to != 5 => {
            u64::try_from(i32::from_le_bytes([a, b, c, d])).ok()
        }
        _ => None,
    });
    stores.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 0x149_0000;

    fn store(to: u8, number: u32) -> Vec<u8> {
        let mut code = vec![0x48, 0xc7, to];
        code.extend(number.to_le_bytes());
        code
    }

    #[test]
    fn numbers_are_told_apart_in_every_order() {
        let numbers = [0x100_0000, 0x100_0123, SIZE];
        let expected = Bundle { start: 7, bytes: SIZE, load: numbers[0], entry: numbers[1] };
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let stored = order.map(|index| numbers[index]);
            for size in [SIZE, SIZE + 1] {
                assert_eq!(Bundle::of(7, size, &stored), Some(expected));
            }
            assert_eq!(Bundle::of(7, SIZE + 2, &stored), None);
        }
        for bad in [
            &[0x100_0000, SIZE][..],
            &[0x100_0001, 0x100_0123, SIZE],
            &[0x100_0000, 0x100_0000 + SIZE, SIZE],
            &[0x100_0000, SIZE, SIZE],
            &[0x100_0000, 0x100_0000, SIZE, 1],
            &[u64::MAX - 4095, u64::MAX, SIZE],
        ] {
            assert_eq!(Bundle::of(7, SIZE, bad), None, "{bad:x?}");
        }
        let same = [0x100_0000, 0x100_0000, SIZE];
        assert_eq!(Bundle::of(7, SIZE, &same).map(|it| it.entry), Some(0x100_0000));
    }

    #[test]
    fn stores_are_found_between_other_instructions() {
        let mut code = vec![0x55, 0x48, 0x89, 0xe5];
        code.extend(store(0, 0x100_0000));
        code.extend([0x48, 0x8b, 0x45, 0xf0]);
        code.extend(store(6, 0x100_0123));
        // To a place on the stack, and to one that is named by its address: neither is an argument.
        code.extend(store(4, 1));
        code.extend(store(5, 2));
        code.extend(store(2, 5));
        code.push(0xc3);
        assert_eq!(stored_numbers(&code), [0x100_0000, 0x100_0123, 5]);
    }

    proptest! {
        #[test]
        fn no_code_breaks_it(code: Vec<u8>, start: u64, size: u64) {
            let stored = stored_numbers(&code);
            if let Some(bundle) = Bundle::of(start, size, &stored) {
                prop_assert!(bundle.entry >= bundle.load && bundle.bytes <= size);
            }
        }

        #[test]
        fn no_numbers_break_it(stored: [u64; 3], size: u64) {
            if let Some(bundle) = Bundle::of(0, size, &stored) {
                prop_assert!(bundle.entry - bundle.load < bundle.bytes);
            }
        }
    }
}
