//! Where things are in a guest's physical address space and among its interrupt lines.

/// The global descriptor table that a guest starts with.
pub(super) const GDT: u64 = 0x500;
/// The empty interrupt descriptor table that a guest starts with.
pub(super) const IDT: u64 = 0x520;
/// `boot_params`, the "zero page" of Linux's boot protocol.
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// The stack that a guest starts with; Linux needs none.
pub(super) const STACK: u64 = 0x8ff0;
/// Page tables that map the first GiB to itself.
pub(super) const PML4: u64 = 0x9000;
/// See [`PML4`].
pub(super) const PDPT: u64 = 0xa000;
/// See [`PML4`].
pub(super) const PAGE_DIRECTORY: u64 = 0xb000;
/// The kernel's command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// The most bytes of a command line with its final zero: `COMMAND_LINE_SIZE` of x86.
pub(super) const CMDLINE_SIZE: usize = 2048;
/// The MP table, in the last KiB of base memory, where kernels look for it.
pub(super) const MP_TABLE: u64 = 0x9_fc00;
/// Where base memory ends.
pub(super) const BASE_MEMORY_END: u64 = 0xa_0000;
/// The ACPI tables, in the area that is searched for them.
pub(super) const ACPI: u64 = 0xe_0000;
/// Where the area of the ACPI tables ends.
pub(super) const ACPI_END: u64 = 0x10_0000;
/// Where memory for kernels begins.
pub(super) const HIGH_MEMORY: u64 = 0x10_0000;

/// Where memory stops and the devices' hole begins.
pub(super) const HOLE: u64 = 0xc000_0000;
/// Where memory goes on above the hole.
pub(super) const ABOVE_HOLE: u64 = 0x1_0000_0000;
/// The first virtio device's registers; each of the others follows at [`DEVICE_STEP`].
pub(super) const DEVICES: u64 = 0xd000_0000;
/// From one virtio device's registers to the next one's.
pub(super) const DEVICE_STEP: u64 = 0x1000;
/// The I/O APIC, where KVM has it.
pub(super) const IO_APIC: u32 = 0xfec0_0000;
/// The local APICs, where KVM has them.
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs on hosts without unrestricted guests.
pub(super) const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on such hosts too.
pub(super) const TSS: usize = 0xfffb_d000;

/// The serial port's interrupt line.
pub(super) const SERIAL_LINE: u32 = 4;
/// ACPI's interrupt line.
pub(super) const SCI_LINE: u16 = 9;
/// The lines of virtio devices. Linux with ACPI sets up lines from 16 on only for devices that it finds through ACPI,
/// not for those of its command line; so all are below 16, without those of timer, cascade, serial port, clock, ACPI and
/// numeric coprocessor. More devices than lines share them.
pub(super) const DEVICE_LINES: [u32; 9] = [5, 6, 7, 10, 11, 12, 14, 15, 3];

/// The most virtio devices: 16 disks, a root, vsock and entropy.
pub(super) const MAX_DEVICES: usize = 19;
