//! [`VcpuState`]: a vCPU as plain data.
#![allow(unsafe_code)]

use super::cpuid::missing_feature;
use crate::control::Refusal;
use crate::vmm::refuse::kvm_failed;
use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use std::mem::size_of;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// How many MSRs are read or written in one call.
const MSRS_AT_ONCE: usize = 128;

/// The parts of an XSAVE area that its size counts, in words, without what newer features append.
const XSAVE_WORDS: usize = size_of::<kvm_xsave>() / size_of::<u32>();

/// A vCPU as plain data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::vmm) struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// What of a host has to be known to save and restore its vCPUs.
#[derive(Clone, Debug)]
pub(in crate::vmm) struct StateKinds {
    msrs: Vec<u32>,
    xsave_words: usize,
}

impl StateKinds {
    /// Asks KVM.
    ///
    /// # Errors
    /// When it does not say.
    pub(in crate::vmm) fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, Refusal> {
        let list = kvm.get_msr_index_list().map_err(kvm_failed("KVM_GET_MSR_INDEX_LIST"))?;
        let mut msrs = list.as_slice().to_vec();
        // A timer that is set before the counter it compares with would fire at once, or never.
        msrs.sort_by_key(|&index| (index != MSR_TSC, index == MSR_TSC_DEADLINE, index));
        let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let xsave_words = bytes.div_ceil(size_of::<u32>()).max(XSAVE_WORDS);
        Ok(Self { msrs, xsave_words })
    }
}

impl VcpuState {
    /// Reads all of a vCPU that stands still with no access half done. The order is that of the kernel's
    /// Documentation/virt/kvm/api.rst, by which reading the multiprocessing state may change what is read after it.
    ///
    /// # Errors
    /// When KVM fails.
    pub(in crate::vmm) fn save(vcpu: &VcpuFd, kinds: &StateKinds) -> Result<Self, Refusal> {
        let mp_state = vcpu.get_mp_state().map_err(kvm_failed("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(kvm_failed("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(kvm_failed("KVM_GET_SREGS"))?;
        let xsave = save_xsave(vcpu, kinds)?;
        let xcrs = vcpu.get_xcrs().map_err(kvm_failed("KVM_GET_XCRS"))?;
        let debug = vcpu.get_debug_regs().map_err(kvm_failed("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(kvm_failed("KVM_GET_LAPIC"))?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm_failed("KVM_GET_CPUID2"))?;
        let cpuid = cpuid.as_slice().to_vec();
        let msrs = save_msrs(vcpu, kinds)?;
        let events = vcpu.get_vcpu_events().map_err(kvm_failed("KVM_GET_VCPU_EVENTS"))?;
        Ok(Self { cpuid, mp_state, regs, sregs, xsave, xcrs, debug, lapic, msrs, events })
    }

    /// Puts the state into a vCPU that never ran. Events come last but for the clock's, because setting registers clears
    /// pending ones; the local APIC comes before the MSRs, one of which is its timer's.
    ///
    /// # Errors
    /// [`Refusal::Incompatible`] naming the first feature that the processor here lacks, or what KVM refuses.
    pub(in crate::vmm) fn restore(&self, vcpu: &VcpuFd, kinds: &StateKinds) -> Result<(), Refusal> {
        self.check(vcpu)?;
        let cpuid = CpuId::from_entries(&self.cpuid)
            .map_err(|error| Refusal::Failed(format!("saved CPUID: {error:?}")))?;
        vcpu.set_cpuid2(&cpuid).map_err(kvm_failed("KVM_SET_CPUID2"))?;
        vcpu.set_mp_state(self.mp_state).map_err(kvm_failed("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(kvm_failed("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm_failed("KVM_SET_SREGS"))?;
        restore_xsave(vcpu, &self.xsave, kinds)?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm_failed("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug).map_err(kvm_failed("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm_failed("KVM_SET_LAPIC"))?;
        restore_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm_failed("KVM_SET_VCPU_EVENTS"))
    }

    /// Checks that a new vCPU of this host has every feature that this one had.
    fn check(&self, vcpu: &VcpuFd) -> Result<(), Refusal> {
        let here = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(kvm_failed("KVM_GET_CPUID2"))?;
        match missing_feature(&self.cpuid, here.as_slice()) {
            None => Ok(()),
            Some(feature) => Err(Refusal::Incompatible {
                field: "cpu".to_owned(),
                found: format!("a processor with {feature}"),
                wanted: "features that this host's processor has".to_owned(),
            }),
        }
    }
}

fn save_xsave(vcpu: &VcpuFd, kinds: &StateKinds) -> Result<Vec<u32>, Refusal> {
    let mut area = xsave_area(kinds.xsave_words)?;
    if kinds.xsave_words > XSAVE_WORDS {
        // SAFETY: the area is as large as KVM_CAP_XSAVE2 says for this VM, and this process enables no feature by
        // arch_prctl that could enlarge it.
        unsafe { vcpu.get_xsave2(&mut area) }.map_err(kvm_failed("KVM_GET_XSAVE2"))?;
        let first = area.as_fam_struct_ref().xsave.region.iter();
        return Ok(first.chain(area.as_slice()).copied().collect());
    }
    let area = vcpu.get_xsave().map_err(kvm_failed("KVM_GET_XSAVE"))?;
    Ok(area.region.to_vec())
}

fn restore_xsave(vcpu: &VcpuFd, words: &[u32], kinds: &StateKinds) -> Result<(), Refusal> {
    if words.len() != kinds.xsave_words {
        return Err(Refusal::Failed(format!(
            "the saved XSAVE area has {} bytes, this host's has {}",
            words.len() * 4,
            kinds.xsave_words * 4
        )));
    }
    let mut area = xsave_area(words.len())?;
    let (first, rest) = words.split_at(XSAVE_WORDS);
    area.as_mut_slice().copy_from_slice(rest);
    // SAFETY: the length of the array behind it stays as it is.
    unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(first);
    // SAFETY: the area is as large as KVM_CAP_XSAVE2 says for this VM: its length was compared above.
    unsafe { vcpu.set_xsave2(&area) }.map_err(kvm_failed("KVM_SET_XSAVE"))
}

/// Makes an empty area of so many words, at least [`XSAVE_WORDS`].
fn xsave_area(words: usize) -> Result<Xsave, Refusal> {
    Xsave::new(words - XSAVE_WORDS).map_err(|error| Refusal::Failed(format!("XSAVE: {error:?}")))
}

/// Reads all MSRs that can be read; KVM lists some that a host does not have.
fn save_msrs(vcpu: &VcpuFd, kinds: &StateKinds) -> Result<Vec<kvm_msr_entry>, Refusal> {
    let mut saved: Vec<kvm_msr_entry> = Vec::with_capacity(kinds.msrs.len());
    let mut wanted = &kinds.msrs[..];
    while !wanted.is_empty() {
        let step = &wanted[..wanted.len().min(MSRS_AT_ONCE)];
        let mut entries = msrs(step.iter().map(|&index| (index, 0)))?;
        let read = vcpu.get_msrs(&mut entries).map_err(kvm_failed("KVM_GET_MSRS"))?;
        saved.extend(&entries.as_slice()[..read.min(step.len())]);
        // The first that cannot be read stops the call.
        wanted = &wanted[if read < step.len() { read + 1 } else { read }..];
    }
    mend_deadline(&mut saved);
    Ok(saved)
}

/// A deadline of zero is a timer that has fired or was never set. Were it restored so, one that fired just before the
/// save, and whose interrupt KVM had not delivered, would be lost; a deadline that has passed fires anew.
fn mend_deadline(msrs: &mut [kvm_msr_entry]) {
    let Some(now) = msrs.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.data) else {
        return;
    };
    for msr in msrs.iter_mut().filter(|msr| msr.index == MSR_TSC_DEADLINE && msr.data == 0) {
        msr.data = now;
    }
}

fn restore_msrs(vcpu: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), Refusal> {
    for step in saved.chunks(MSRS_AT_ONCE) {
        let entries = msrs(step.iter().map(|msr| (msr.index, msr.data)))?;
        let set = vcpu.set_msrs(&entries).map_err(kvm_failed("KVM_SET_MSRS"))?;
        if let Some(refused) = step.get(set) {
            return Err(Refusal::Failed(format!(
                "KVM refuses {:#x} for MSR {:#x}",
                refused.data, refused.index
            )));
        }
    }
    Ok(())
}

fn msrs(entries: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, Refusal> {
    let entries: Vec<_> =
        entries.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|error| Refusal::Failed(format!("MSRs: {error:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry { index, data, ..Default::default() }
    }

    #[test]
    fn a_deadline_of_zero_becomes_one_that_has_passed() {
        for (deadline, restored) in [(0, 77), (5, 5), (90, 90)] {
            let mut saved = vec![msr(MSR_TSC, 77), msr(1, 0), msr(MSR_TSC_DEADLINE, deadline)];
            mend_deadline(&mut saved);
            assert_eq!(saved.iter().map(|msr| msr.data).collect::<Vec<_>>(), [77, 0, restored]);
        }
    }
}
