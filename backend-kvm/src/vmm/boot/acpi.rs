//! The ACPI tables: processors, interrupt controllers, virtio devices, and registers to sleep and to reset by.
//!
//! There is no SMI command port, so the machine is always in ACPI mode (ACPI 6.5, section 4.8.3).

use super::{Announced, place};
use crate::control::Refusal;
use crate::vmm::{
    layout::{ACPI, ACPI_END, DEVICE_STEP, IO_APIC, LOCAL_APIC, SCI_LINE},
    ports::{KEYBOARD_COMMAND, KEYBOARD_RESET},
    refuse::config,
};
use acpi_tables::{
    Aml,
    aml::{self, Name, Package, Path},
    facs::FACS,
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_kvm_devices::Memory;

/// The port of the PM1a status and enable registers, 4 bytes.
pub(in crate::vmm) const PM1_EVENT: u16 = 0x600;
/// The port of the PM1a control register, 2 bytes.
pub(in crate::vmm) const PM1_CONTROL: u16 = 0x604;
/// `SLP_EN` in the control register.
pub(in crate::vmm) const SLEEP_ENABLE: u16 = 1 << 13;
/// The sleep type that the tables give for power-off (`\_S5`).
const SLEEP_TYPE_OFF: u8 = 5;

const OEM: [u8; 6] = *b"TWINVM";
const TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;

/// Writes the tables; says where the root pointer is.
///
/// # Errors
/// Never with memory of the least size; [`Refusal::Config`] otherwise.
pub(super) fn write(vcpus: u8, devices: &[Announced], memory: &Memory) -> Result<u64, Refusal> {
    // The root pointer comes first, where it is searched for.
    let mut next = ACPI + 64;
    let mut put = |table: &dyn Aml, align: u64| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let at = next.next_multiple_of(align);
        next = at + bytes.len() as u64;
        if next > ACPI_END {
            return Err(config("vcpus", "the ACPI tables do not fit"));
        }
        place(memory, at, &bytes).map(|()| at)
    };
    let facs = put(&FACS::new(), 64)?;
    let dsdt = put(&dsdt(devices)?, 16)?;
    let fadt = put(&fadt(facs, dsdt).finalize(), 16)?;
    let madt = put(&madt(vcpus), 16)?;
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt, 16)?;
    let mut bytes = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut bytes);
    place(memory, ACPI, &bytes)?;
    Ok(ACPI)
}

/// How to power off, and the virtio devices by the identifier that Linux's virtio-mmio driver knows them by: not every
/// kernel looks for them on its command line.
fn dsdt(devices: &[Announced]) -> Result<Sdt, Refusal> {
    let sleep: Vec<&dyn Aml> = vec![&SLEEP_TYPE_OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO];
    let mut code = Vec::new();
    Name::new(Path::new("_S5_"), &Package::new(sleep)).to_aml_bytes(&mut code);
    let mut bus = Vec::new();
    for (number, device) in (0_u8..).zip(devices) {
        put_device(number, device, &mut bus)?;
    }
    code.extend(aml::Scope::raw(Path::new("_SB_"), bus));
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    table.append_slice(&code);
    Ok(table)
}

fn put_device(number: u8, device: &Announced, bus: &mut Vec<u8>) -> Result<(), Refusal> {
    let fits = |value: u64| {
        u32::try_from(value).map_err(|_| config("disks", "a device does not fit below 4 GiB"))
    };
    let registers = aml::Memory32Fixed::new(true, fits(device.address)?, fits(DEVICE_STEP)?);
    let line = aml::Interrupt::new(true, true, false, true, device.line);
    let hid = Name::new(Path::new("_HID"), &"LNRO0005");
    let uid = Name::new(Path::new("_UID"), &number);
    let resources = aml::ResourceTemplate::new(vec![&registers, &line]);
    let resources = Name::new(Path::new("_CRS"), &resources);
    let path = Path::new(&format!("V{number:03}"));
    aml::Device::new(path, vec![&hid, &uid, &resources]).to_aml_bytes(bus);
    Ok(())
}

fn fadt(facs: u64, dsdt: u64) -> FADTBuilder {
    let port = |port: u16, bits: u8, access| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(port))
    };
    // No fixed buttons; the reset register is there. The processor has WBINVD and C1 as all do.
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .firmware_ctrl_32(u32::try_from(facs).unwrap_or(0))
        .dsdt_32(u32::try_from(dsdt).unwrap_or(0))
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = SCI_LINE.into();
    fadt.pm1a_evt_blk = u32::from(PM1_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = port(PM1_EVENT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(PM1_CONTROL, 16, AccessSize::WordAccess);
    fadt.reset_reg = port(KEYBOARD_COMMAND, 8, AccessSize::ByteAccess);
    fadt.reset_value = KEYBOARD_RESET;
    // IAPC_BOOT_ARCH (section 5.2.9.3): devices on ISA, no VGA, no MSI; without the flag for a keyboard controller.
    fadt.iapc_boot_arch = 0b1101.into();
    fadt
}

fn madt(vcpus: u8) -> Sdt {
    /// `PCAT_COMPAT` (section 5.2.12): the old interrupt controllers are there too; without it, newer kernels leave
    /// out the lines below 16.
    const PCAT_COMPATIBLE: u32 = 1;
    let mut structures = Vec::new();
    for id in 0..vcpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut structures);
    }
    // Lines are numbered as on ISA; the I/O APIC's number follows the processors'.
    IoApic::new(vcpus, IO_APIC, 0).to_aml_bytes(&mut structures);
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM, TABLE, REVISION);
    table.append_slice(&LOCAL_APIC.to_le_bytes());
    table.append_slice(&PCAT_COMPATIBLE.to_le_bytes());
    table.append_slice(&structures);
    table
}
