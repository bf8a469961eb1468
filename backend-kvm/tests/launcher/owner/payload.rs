//! Kernels of a few instructions, made of bytes.

/// Where a payload is loaded and entered.
pub(crate) const ENTRY: u64 = 0x10_0000;

/// x86-64 code that grows instruction by instruction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    /// Writes a byte to a port.
    pub(crate) fn out_byte(self, port: u16, value: u8) -> Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes()).raw(&[0xb0, value, 0xee])
    }

    /// Writes two bytes to a port.
    pub(crate) fn out_word(self, port: u16, value: u16) -> Self {
        let code = self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes());
        code.raw(&[0x66, 0xb8]).raw(&value.to_le_bytes()).raw(&[0x66, 0xef])
    }

    /// Prints on the serial port.
    pub(crate) fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out_byte(0x3f8, byte))
    }

    /// Prints a byte for ever.
    pub(crate) fn print_for_ever(self, byte: u8) -> Self {
        // out dx, al; jmp back to it
        self.out_byte(0x3f8, byte).raw(&[0xee, 0xeb, 0xfd])
    }

    /// Prints a byte for ever with a pause of so many turns of an empty loop.
    pub(crate) fn print_slowly_for_ever(self, byte: u8, turns: u32) -> Self {
        // mov ecx, turns; dec ecx; jnz; out dx, al; jmp to the first
        let code = self.out_byte(0x3f8, byte).raw(&[0xb9]).raw(&turns.to_le_bytes());
        code.raw(&[0xff, 0xc9, 0x75, 0xfc, 0xee, 0xeb, 0xf4])
    }

    /// Does nothing for ever, awake; the pause lets emulated processors look for interrupts.
    pub(crate) fn spin(self) -> Self {
        self.raw(&[0xf3, 0x90, 0xeb, 0xfc])
    }

    /// Sleeps for ever with interrupts off.
    pub(crate) fn halt(self) -> Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    pub(crate) fn power_off(self) -> Self {
        self.out_word(0x604, 5 << 10 | 1 << 13).spin()
    }

    pub(crate) fn reset(self) -> Self {
        self.out_byte(0x64, 0xfe).spin()
    }

    /// Faults where no handler is.
    pub(crate) fn triple_fault(self) -> Self {
        self.raw(&[0x0f, 0x0b])
    }

    /// Makes the first 2 MiB of the devices' addresses visible, in a page directory of its own.
    pub(crate) fn map_devices(self) -> Self {
        self.store(0xa018, 0xc003).store(0xc400, 0xd000_0083)
    }

    /// Stores eight bytes.
    pub(crate) fn store(self, at: u32, value: u64) -> Self {
        // mov rax, value; mov [at], rax
        let code = self.raw(&[0x48, 0xb8]).raw(&value.to_le_bytes());
        code.raw(&[0x48, 0x89, 0x04, 0x25]).raw(&at.to_le_bytes())
    }

    /// Reads four bytes from an address and prints them, lowest first.
    pub(crate) fn print_memory(self, at: u64) -> Self {
        // mov rbx, at; mov ecx, [rbx]; mov dx, 0x3f8; then four times mov al, cl; out dx, al; shr ecx, 8
        let code = self.raw(&[0x48, 0xbb]).raw(&at.to_le_bytes()).raw(&[0x8b, 0x0b]);
        let code = code.raw(&[0x66, 0xba, 0xf8, 0x03]);
        (0..4).fold(code, |code, _| code.raw(&[0x88, 0xc8, 0xee, 0xc1, 0xe9, 0x08]))
    }

    /// Writes four bytes to an address.
    pub(crate) fn write_memory(self, at: u64, value: u32) -> Self {
        // mov rbx, at; mov dword [rbx], value
        let code = self.raw(&[0x48, 0xbb]).raw(&at.to_le_bytes());
        code.raw(&[0xc7, 0x03]).raw(&value.to_le_bytes())
    }

    /// Waits awake until two bytes of memory have a value.
    pub(crate) fn await_word(self, at: u32, value: u16) -> Self {
        // pause; cmp word [at], value; jne to the pause
        let code = self.raw(&[0xf3, 0x90, 0x66, 0x81, 0x3c, 0x25]).raw(&at.to_le_bytes());
        code.raw(&value.to_le_bytes()).raw(&[0x75, 0xf2])
    }

    /// Prints one byte of memory.
    pub(crate) fn print_byte(self, at: u32) -> Self {
        // mov al, [at]; mov dx, 0x3f8; out dx, al
        let code = self.raw(&[0x8a, 0x04, 0x25]).raw(&at.to_le_bytes());
        code.raw(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    }

    /// Counts a byte of memory up for ever and prints it each time, with a pause of so many turns of an empty loop.
    pub(crate) fn count_for_ever(self, at: u32, turns: u32) -> Self {
        // inc byte [at]; mov al, [at]; mov dx, 0x3f8; out dx, al; mov ecx, turns; dec ecx; jnz; jmp to the first
        let code = self.raw(&[0xfe, 0x04, 0x25]).raw(&at.to_le_bytes()).print_byte(at);
        code.raw(&[0xb9]).raw(&turns.to_le_bytes()).raw(&[0xff, 0xc9, 0x75, 0xfc, 0xeb, 0xe2])
    }

    /// Counts up for ever, writes the count each time to the next of so many pages, a power of two, from `at` on, and
    /// prints its lowest byte, with a pause of so many turns of an empty loop.
    pub(crate) fn stamp_for_ever(self, at: u32, pages: u32, turns: u32) -> Self {
        // mov ebx, 0; inc ebx; mov eax, ebx; and eax, pages - 1; shl eax, 12; mov [rax + at], ebx
        let code = self.raw(&[0xbb, 0, 0, 0, 0, 0xff, 0xc3, 0x89, 0xd8, 0x25]);
        let code = code.raw(&(pages - 1).to_le_bytes()).raw(&[0xc1, 0xe0, 12, 0x89, 0x98]);
        // mov al, bl; mov dx, 0x3f8; out dx, al; mov ecx, turns; dec ecx; jnz; jmp to the increment
        let code =
            code.raw(&at.to_le_bytes()).raw(&[0x88, 0xd8, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xb9]);
        code.raw(&turns.to_le_bytes()).raw(&[0xff, 0xc9, 0x75, 0xfc, 0xeb, 0xdc])
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    /// Makes an ELF file of it.
    pub(crate) fn elf(&self) -> Vec<u8> {
        elf(ENTRY, ENTRY, &self.0, self.0.len() as u64)
    }

    /// Makes an ELF file of it that also puts data into memory.
    pub(crate) fn elf_with(&self, at: u64, data: &[u8]) -> Vec<u8> {
        let mut content = self.0.clone();
        let before = usize::try_from(at - ENTRY).unwrap();
        assert!(content.len() <= before, "the code is too long");
        content.resize(before, 0);
        content.extend(data);
        elf(ENTRY, ENTRY, &content, content.len() as u64)
    }
}

/// Makes an ELF file with one segment.
pub(crate) fn elf(entry: u64, address: u64, content: &[u8], in_memory: u64) -> Vec<u8> {
    const DATA: u64 = 0x1000;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [DATA, address, address, content.len() as u64, in_memory, DATA] {
        file.extend(word.to_le_bytes());
    }
    file.resize(usize::try_from(DATA).unwrap(), 0);
    file.extend(content);
    file
}
