"""Takes two faults out of the QEMU that `setup` fetched, which break guests under its emulation of AMD-V.

1. helper_vmrun (target/i386/tcg/system/svm_helper.c) delivers an interrupt that VMRUN injects (EVENTINJ, type INTR) at once,
   but leaves its vector in cs->exception_index. The next kick of that processor delivers it a second time, whatever
   EFLAGS.IF says: guests then die of triple faults, hang, or their programs misbehave.
2. cpu_clear_ignne (target/i386/tcg/system/fpu_helper.c) clears a bit of the *first* processor's env.hflags2 without a lock,
   on whatever processor restores its x87 state. It races with the first processor's own changes there, which loses the
   bits that say whether interrupts are let in (GIF) and whether guest memory is translated (NPT): guests read their page tables
   from the wrong memory, and the lab itself panics.

Both were found in QEMU 11.1. The store of the first is made a no-op; the second returns at once, since IGNNE matters to
nothing newer than MS-DOS. Places are found by exported names and the form of the code around them; a QEMU where that does not
fit is left as it is.
"""

import struct

NO_OPERATION = {6: bytes.fromhex("660f1f440000"), 7: bytes.fromhex("0f1f8000000000")}
RETURN = 0xC3
BRANCH_TARGET = bytes.fromhex("f30f1efa")


class Unknown(Exception):
    """The program is not as the mending expects it."""


def mend(path):
    """Mend a qemu-system-x86_64 in place, or raise Unknown and leave it as it is."""
    data = bytearray(path.read_bytes())
    try:
        program = Program(data)
        store, length = program.leftover_index()
        ignne = program.ignne()
    except (KeyError, IndexError, ValueError, struct.error) as error:
        raise Unknown(f"its code is not as expected: {error!r}") from error
    data[store : store + length] = NO_OPERATION[length]
    data[ignne] = RETURN
    mended = path.with_name(f"{path.name}.mended")
    mended.write_bytes(data)
    mended.chmod(0o755)
    mended.rename(path)


class Program:
    """A 64-bit ELF program (System V ABI, AMD64 supplement)."""

    def __init__(self, data):
        self.data = data
        self.symbols = dict(self._symbols())

    def leftover_index(self):
        """The offset and length of the instruction that leaves the vector behind."""
        address, length = self.symbols["helper_vmrun"]
        delivery, _ = self.symbols["do_interrupt_x86_hardirq"]
        base = self._offset(address)
        code = bytes(self.data[base : base + length])
        calls = [at for at in range(length - 4) if code[at] == 0xE8 and self._target(code, address, at) == delivery]
        call = only(calls, "calls of do_interrupt_x86_hardirq")
        register, place = self._exception_index(code)
        # mov [reg + disp32], any register
        stores = [
            at
            for at in range(max(0, call - 96), call - 5)
            if code[at] == 0x89 and code[at + 1] & 0xC7 == 0x80 | register and code[at + 2 : at + 6] == place
        ]
        at = only(stores, "stores before the delivery")
        prefixed = code[at - 1] & 0xF8 == 0x40
        return (base + at - 1, 7) if prefixed else (base + at, 6)

    def ignne(self):
        """The offset of the first instruction of cpu_clear_ignne after the one that marks a branch's target."""
        address, _ = self.symbols["cpu_clear_ignne"]
        at = self._offset(address)
        if self.data[at : at + 4] != BRANCH_TARGET:
            raise ValueError("cpu_clear_ignne begins with something else")
        return at + 4

    def _exception_index(self, code):
        """The register and displacement of cs->exception_index: an injected NMI stores its vector, 2, there."""
        found = set()
        for at in range(len(code) - 9):
            # mov dword [reg + disp32], 2; the processor's state lies behind what is common to all processors.
            form = code[at + 1]
            if code[at] == 0xC7 and form & 0xF8 == 0x80 and form != 0x84 and code[at + 6 : at + 10] == b"\2\0\0\0":
                if struct.unpack_from("<i", code, at + 2)[0] < 0:
                    found.add((form & 7, code[at + 2 : at + 6]))
        return only(found, "places that may be exception_index")

    def _symbols(self):
        """Names with addresses and sizes of the dynamic symbols."""
        table, = struct.unpack_from("<Q", self.data, 0x28)
        size, count = struct.unpack_from("<HH", self.data, 0x3A)
        sections = [struct.unpack_from("<IIQQQQIIQQ", self.data, table + n * size) for n in range(count)]
        for _, kind, _, _, offset, length, link, _, _, entry in sections:
            if kind != 11:
                continue
            names = sections[link][4]
            for at in range(offset, offset + length, entry):
                name, _, _, _, value, bytes_ = struct.unpack_from("<IBBHQQ", self.data, at)
                start = names + name
                yield bytes(self.data[start : self.data.index(b"\0", start)]).decode(), (value, bytes_)

    def _offset(self, address):
        """Where an address of a loaded segment is in the file."""
        table, = struct.unpack_from("<Q", self.data, 0x20)
        size, count = struct.unpack_from("<HH", self.data, 0x36)
        for number in range(count):
            kind, _, offset, start, _, length, _, _ = struct.unpack_from("<IIQQQQQQ", self.data, table + number * size)
            if kind == 1 and start <= address < start + length:
                return address - start + offset
        raise ValueError(f"{address:#x} is in no segment")

    @staticmethod
    def _target(code, address, at):
        return address + at + 5 + struct.unpack_from("<i", code, at + 1)[0]


def only(found, what):
    if len(found) != 1:
        raise ValueError(f"{len(found)} {what}")
    return next(iter(found))
