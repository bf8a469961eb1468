//! [`Model`]: the processor that a guest sees.
//!
//! It is the host's as far as KVM supports it, with a topology of one package of as many cores as there are vCPUs.

use crate::control::Refusal;
use crate::vmm::refuse::{config, kvm_failed};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

/// The processor that a guest sees, but for what differs between vCPUs.
#[derive(Debug)]
pub(in crate::vmm) struct Model {
    supported: CpuId,
    deadline_timer: bool,
    vcpus: u8,
}

const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const POWER: u32 = 6;
const COUNTERS: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_2: u32 = 0x1f;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_POWER: u32 = 0x8000_0007;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_COUNTERS: u32 = 0x8000_0022;

/// Leaf 1, ECX.
const DEADLINE_TIMER: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const PERF_CAPABILITIES: u32 = 1 << 15;
/// Leaf 1, EDX: more than one logical processor in the package.
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 0x80000001, ECX: more performance counters.
const AMD_EXTENDED_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;
/// Leaf 0x80000001, ECX: the core count is in leaf 0x80000008, and leaf 0x8000001e is there.
const AMD_CORE_COUNT: u32 = 1 << 1;
/// Leaf 0x80000007, EDX: the time stamp counter runs always and evenly.
const INVARIANT_TSC: u32 = 1 << 8;

/// Where features stand that a guest finds by CPUID: leaf, index, register, the bits that follow what the guest does or
/// how many vCPUs there are, and names of some (Intel's manual, volume 2, CPUID; AMD's, volume 3, appendix E).
const FEATURE_WORDS: &[FeatureWord] = &[
    (
        1,
        0,
        "ecx",
        1 << 27 | HYPERVISOR,
        &[(0, "sse3"), (12, "fma"), (19, "sse4.1"), (20, "sse4.2"), (28, "avx")],
    ),
    (1, 0, "edx", HYPER_THREADING, &[(25, "sse"), (26, "sse2")]),
    (7, 0, "ebx", 0, &[(3, "bmi1"), (5, "avx2"), (8, "bmi2"), (16, "avx512f"), (29, "sha")]),
    (7, 0, "ecx", 1 << 4, &[(3, "pku"), (9, "vaes"), (16, "la57")]),
    (7, 0, "edx", 0, &[(22, "amx-bf16"), (24, "amx-tile")]),
    (7, 1, "eax", 0, &[(4, "avx-vnni"), (5, "avx512-bf16")]),
    (0xd, 1, "eax", 0, &[(0, "xsaveopt"), (1, "xsavec"), (3, "xsaves")]),
    (AMD_FEATURES, 0, "ecx", AMD_CORE_COUNT, &[(6, "sse4a")]),
    (AMD_FEATURES, 0, "edx", 0, &[(26, "1 GiB pages"), (27, "rdtscp")]),
    (AMD_SIZES, 0, "ebx", 0, &[(0, "clzero")]),
];

type FeatureWord = (u32, u32, &'static str, u32, &'static [(u32, &'static str)]);

/// Names the first feature that is in `there` and not in `here`.
pub(super) fn missing_feature(
    there: &[kvm_cpuid_entry2],
    here: &[kvm_cpuid_entry2],
) -> Option<String> {
    let word = |entries: &[kvm_cpuid_entry2], leaf, index, register| {
        let entry = entries.iter().find(|entry| entry.function == leaf && entry.index == index);
        entry.map_or(0, |entry| match register {
            "eax" => entry.eax,
            "ebx" => entry.ebx,
            "ecx" => entry.ecx,
            _ => entry.edx,
        })
    };
    FEATURE_WORDS.iter().find_map(|&(leaf, index, register, ignored, names)| {
        let missing = word(there, leaf, index, register) & !word(here, leaf, index, register);
        let missing = missing & !ignored;
        if missing == 0 {
            return None;
        }
        let bit = missing.trailing_zeros();
        let place = format!("CPUID {leaf:#x}.{index} {register} bit {bit}");
        let name = names.iter().find(|(known, _)| *known == bit);
        Some(name.map_or_else(|| place.clone(), |(_, name)| format!("{name} ({place})")))
    })
}

impl Model {
    /// Asks KVM what it supports.
    ///
    /// # Errors
    /// [`Refusal`] where KVM fails or cannot have so many vCPUs.
    pub(in crate::vmm) fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, Refusal> {
        let most = kvm.get_max_vcpus();
        if vcpus == 0 || usize::from(vcpus) > most.min(8) {
            let reason = format!("{vcpus}; this host can have from 1 to {}", most.min(8));
            return Err(config("vcpus", reason));
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm_failed("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { supported, deadline_timer, vcpus })
    }

    /// Gives what one vCPU answers to CPUID; its APIC's number is its own.
    pub(in crate::vmm) fn of_vcpu(&self, id: u8) -> CpuId {
        let mut cpuid = self.supported.clone();
        for entry in cpuid.as_mut_slice() {
            self.adapt(entry, id);
        }
        cpuid
    }

    fn adapt(&self, entry: &mut kvm_cpuid_entry2, id: u8) {
        let cores = u32::from(self.vcpus);
        // How many bits of the APIC's number tell cores apart.
        let bits = cores.next_power_of_two().trailing_zeros();
        let id = u32::from(id);
        match entry.function {
            FEATURES => {
                entry.ebx = entry.ebx & 0xffff | cores << 16 | id << 24;
                entry.ecx |= HYPERVISOR;
                entry.ecx &= !(PERF_CAPABILITIES | DEADLINE_TIMER);
                if self.deadline_timer {
                    entry.ecx |= DEADLINE_TIMER;
                }
                entry.edx &= !HYPER_THREADING;
                if cores > 1 {
                    entry.edx |= HYPER_THREADING;
                }
            }
            CACHES | AMD_CACHES if entry.eax & 0x1f != 0 => {
                // The last level is shared by all cores, the others by nobody.
                let sharing = if entry.eax >> 5 & 7 >= 3 { cores - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14;
                if entry.function == CACHES {
                    entry.eax |= ((1 << bits) - 1) << 26;
                }
            }
            POWER | COUNTERS | AMD_COUNTERS => clear(entry),
            TOPOLOGY | TOPOLOGY_2 => {
                let (kind, shift, count) = match entry.index {
                    0 => (1, 0, 1),
                    1 => (2, bits, cores),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = count;
                entry.ecx = entry.index | kind << 8;
                entry.edx = id;
            }
            AMD_FEATURES => {
                entry.ecx &= !AMD_EXTENDED_COUNTERS;
                if cores == 1 {
                    entry.ecx &= !AMD_CORE_COUNT;
                }
            }
            // Linux then takes KVM's clock, which stands still while the machine is paused.
            AMD_POWER => entry.edx &= !INVARIANT_TSC,
            AMD_SIZES => entry.ecx = (cores - 1) | bits << 12,
            AMD_TOPOLOGY => {
                entry.eax = id;
                entry.ebx = id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, ecx: u32, ebx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ecx, ebx, ..Default::default() }
    }

    #[test]
    fn a_missing_feature_is_named() {
        let there = [leaf(FEATURES, 0, 1 << 12 | 1 << 28, 0), leaf(7, 0, 0, 1 << 5 | 1 << 14)];
        assert_eq!(missing_feature(&there, &there), None);
        let named = |here: &[kvm_cpuid_entry2]| missing_feature(&there, here).unwrap();
        assert_eq!(named(&[there[0]]), "avx2 (CPUID 0x7.0 ebx bit 5)");
        assert_eq!(named(&[there[0], leaf(7, 0, 0, 1 << 5)]), "CPUID 0x7.0 ebx bit 14");
        assert_eq!(named(&[there[1]]), "fma (CPUID 0x1.0 ecx bit 12)");
    }

    #[test]
    fn more_features_and_those_that_the_guest_switches_are_fine() {
        let here = [leaf(FEATURES, 0, 1 << 12, 0)];
        assert_eq!(missing_feature(&[leaf(FEATURES, 0, 0, 0)], &here), None);
        // OSXSAVE follows what the guest does.
        assert_eq!(missing_feature(&[leaf(FEATURES, 0, 1 << 27, 0)], &here), None);
    }
}
