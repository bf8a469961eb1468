//! Registers as Linux's 64-bit boot protocol wants them, and as firmware would leave the rest.

use crate::control::Refusal;
use crate::vmm::{
    layout::{GDT, IDT, PAGE_DIRECTORY, PDPT, PML4, STACK, ZERO_PAGE},
    refuse::{config, kvm_failed},
};
use kvm_bindings::{Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use std::collections::BTreeMap;
use vm_kvm_devices::Memory;
use vm_memory::{Bytes, GuestAddress};

/// Selectors that the boot protocol names: `__BOOT_CS`, `__BOOT_DS`; and a task register, which a processor must have.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// Memory type range registers on, write-back where none says else.
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Offsets of local APIC registers, and delivery modes.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const MODE_NMI: u32 = 4;
const MODE_EXTERNAL: u32 = 7;

/// Sets what every vCPU has from the start.
///
/// # Errors
/// When KVM refuses.
pub(in crate::vmm) fn prepare_all(vcpu: &VcpuFd) -> Result<(), Refusal> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(kvm_failed("KVM_SET_FPU"))?;
    set_msrs(vcpu)?;
    let mut lapic = vcpu.get_lapic().map_err(kvm_failed("KVM_GET_LAPIC"))?;
    for (offset, mode) in [(LVT_LINT0, MODE_EXTERNAL), (LVT_LINT1, MODE_NMI)] {
        for (register, byte) in
            lapic.regs[offset..offset + 4].iter_mut().zip((mode << 8).to_le_bytes())
        {
            *register = byte.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).map_err(kvm_failed("KVM_SET_LAPIC"))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), Refusal> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let wanted = [
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLE_WRITE_BACK),
    ];
    let msrs = Msrs::from_entries(&wanted)
        .map_err(|error| Refusal::Failed(format!("registers: {error:?}")))?;
    let set = vcpu.set_msrs(&msrs).map_err(kvm_failed("KVM_SET_MSRS"))?;
    if set < wanted.len() {
        return Err(Refusal::Failed(format!("KVM refuses MSR {:#x}", wanted[set].index)));
    }
    Ok(())
}

/// Lets the first vCPU begin at `entry` in 64-bit mode, with the zero page in RSI.
///
/// # Errors
/// When KVM refuses.
pub(in crate::vmm) fn enter_kernel(vcpu: &VcpuFd, entry: u64) -> Result<(), Refusal> {
    let mut sregs = vcpu.get_sregs().map_err(kvm_failed("KVM_GET_SREGS"))?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = u16::try_from(descriptors().len() * 8 - 1).unwrap_or(u16::MAX);
    sregs.idt.base = IDT;
    sregs.idt.limit = 7;
    sregs.cs = segment(CODE, 0xb, 1);
    let data = segment(DATA, 3, 1);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK, 0xb, 0);
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).map_err(kvm_failed("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: entry,
        rsp: STACK,
        rbp: STACK,
        rsi: ZERO_PAGE,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(kvm_failed("KVM_SET_REGS"))
}

/// Writes the descriptor table and page tables that [`enter_kernel`] refers to.
///
/// # Errors
/// Never with memory of the least size; [`Refusal::Config`] otherwise.
pub(in crate::vmm) fn write_tables(memory: &Memory) -> Result<(), Refusal> {
    /// Present and writable; for a page directory's entry, a page of 2 MiB.
    const TABLE: u64 = 3;
    const LARGE_PAGE: u64 = 0x83;
    let put = |value: u64, at: u64| {
        memory
            .write_obj(value, GuestAddress(at))
            .map_err(|error| config("memory_mib", error.to_string()))
    };
    for (number, descriptor) in (0..).zip(descriptors()) {
        put(descriptor, GDT + number * 8)?;
    }
    put(0, IDT)?;
    put(PDPT | TABLE, PML4)?;
    put(PAGE_DIRECTORY | TABLE, PDPT)?;
    for number in 0..512 {
        put(number << 21 | LARGE_PAGE, PAGE_DIRECTORY + number * 8)?;
    }
    Ok(())
}

/// The descriptors: two that are empty, 64-bit code, data, and a 64-bit task segment, which takes two.
fn descriptors() -> [u64; 6] {
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff, 0]
}

/// The hidden part of a segment register as the descriptor would load it.
fn segment(selector: u16, type_: u8, s: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: if selector == TASK { 0xf_ffff } else { 0xffff_ffff },
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(selector == DATA),
        s,
        l: u8::from(selector == CODE),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Gives a vCPU's general, control and segment base registers by name.
///
/// # Errors
/// KVM's.
pub(in crate::vmm) fn registers_of(vcpu: &VcpuFd) -> Result<BTreeMap<String, u64>, Refusal> {
    let regs = vcpu.get_regs().map_err(kvm_failed("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(kvm_failed("KVM_GET_SREGS"))?;
    let named = [
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("r8", regs.r8),
        ("r9", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("rip", regs.rip),
        ("rflags", regs.rflags),
        ("cr0", sregs.cr0),
        ("cr2", sregs.cr2),
        ("cr3", sregs.cr3),
        ("cr4", sregs.cr4),
        ("cr8", sregs.cr8),
        ("efer", sregs.efer),
        ("cs", u64::from(sregs.cs.selector)),
        ("ss", u64::from(sregs.ss.selector)),
        ("fs.base", sregs.fs.base),
        ("gs.base", sregs.gs.base),
    ];
    Ok(named.map(|(name, value)| (name.to_owned(), value)).into())
}
