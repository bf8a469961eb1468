//! A machine of one page that counts. The only unsafe code of the probe: it gives KVM memory of this process.
#![allow(unsafe_code)]

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// How long a loop is to run to be measured well; until one does, each has twice the steps of the one before.
const LONG_ENOUGH: Duration = Duration::from_millis(8);

/// How many loops as long as that are enough.
const LOOPS: u32 = 3;

/// How long all loops together may run, and how many there are at least unless they were long. The first ones also pay
/// for the machine's memory, and any of them may have to wait for a processor: the best counts.
const BUDGET: Duration = Duration::from_millis(80);
const LEAST_LOOPS: u32 = 12;

const PAGE: usize = 4096;

/// Counts `ecx` down to 0, two instructions a step, then leaves through a port, in 32-bit protected mode:
/// `1: dec ecx; jnz 1b; out 0x10, al; jmp 1b`.
const CODE: [u8; 7] = [0x49, 0x75, 0xfd, 0xe6, 0x10, 0xeb, 0xf9];

const PORT: u16 = 0x10;

/// Measures how many instructions of ring 0 a guest executes in a second.
///
/// # Errors
/// What of KVM failed.
pub(super) fn instructions_per_second(kvm: &Kvm) -> Result<f64, String> {
    let text = |what: &'static str| move |error: kvm_ioctls::Error| format!("{what}: {error}");
    // Declared first, so that it goes away last.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), PAGE)])
        .map_err(|error| format!("memory: {error}"))?;
    memory.write_slice(&CODE, GuestAddress(0)).map_err(|error| format!("memory: {error}"))?;
    let host = memory.get_host_address(GuestAddress(0)).map_err(|error| error.to_string())?;
    let vm = kvm.create_vm().map_err(text("KVM_CREATE_VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: PAGE as u64,
        userspace_addr: host as u64,
    };
    // SAFETY: the region is one page of memory that this process mapped for the guest alone, and it stays mapped until
    // the machine is gone, because `memory` is dropped after `vm` and `vcpu`.
    unsafe { vm.set_user_memory_region(region) }.map_err(text("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(text("KVM_CREATE_VCPU"))?;
    enter_protected_mode(&vcpu).map_err(text("KVM_SET_SREGS"))?;
    let began = Instant::now();
    let (mut steps, mut best) = (500_u32, 0.0_f64);
    let (mut loops, mut long) = (0, 0);
    while long < LOOPS && (loops < LEAST_LOOPS || began.elapsed() < BUDGET) {
        let took = count(&mut vcpu, steps)?;
        best = best.max(f64::from(steps) * 2.0 / took.as_secs_f64().max(1e-9));
        loops += 1;
        // What one that was held up took says nothing about the next.
        let at_best = f64::from(steps) * 2.0 / best;
        if at_best >= LONG_ENOUGH.as_secs_f64() || steps >= 1 << 30 {
            long += 1;
        } else {
            (steps, long) = (steps * 2, 0);
        }
    }
    Ok(best)
}

/// Lets the guest count `steps`, and gives how long that took.
fn count(vcpu: &mut VcpuFd, steps: u32) -> Result<Duration, String> {
    let mut regs = vcpu.get_regs().map_err(|error| format!("KVM_GET_REGS: {error}"))?;
    (regs.rip, regs.rcx, regs.rflags) = (0, u64::from(steps), 2);
    vcpu.set_regs(&regs).map_err(|error| format!("KVM_SET_REGS: {error}"))?;
    let began = Instant::now();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, _)) => return Ok(began.elapsed()),
            Ok(exit) => return Err(format!("a counting loop ended with {exit:?}")),
            Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
            Err(error) => return Err(format!("KVM_RUN: {error}")),
        }
    }
}

/// Flat 32-bit segments, no paging.
fn enter_protected_mode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 8,
        type_: 0xb,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { type_: 3, selector: 16, ..code };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs)
}
