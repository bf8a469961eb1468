//! [`probe`]: whether this host can run machines, found out by trying.

mod tiny;

use kvm_ioctls::{Cap, Kvm};
use rustix::io::Errno;
use std::{fs::File, io, sync::mpsc, thread, time::Duration};

/// The device.
const DEVICE: &str = "/dev/kvm";

/// The only version of KVM's interface.
const API_VERSION: i32 = 12;

/// Below this rate, in instructions of the guest's kernel per second, Linux does not come up in any useful time.
const LEAST_SPEED: f64 = 20e6;

/// Below this rate a machine works, but everything takes many times longer than on the host.
const SLOW: f64 = 600e6;

/// How long a probe may take before KVM is said to hang.
const PATIENCE: Duration = Duration::from_secs(5);

/// What of KVM a machine needs.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// A host that can run machines.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Fitness {
    /// How fast a guest's kernel runs: instructions per second of a counting loop.
    pub instructions_per_second: f64,
    /// The most vCPUs that KVM gives one machine.
    pub max_vcpus: usize,
    /// Whether this host is itself a virtual machine.
    pub nested: bool,
    /// Whether machines run much slower than the host, as under a software emulation of virtualisation. Deadlines are
    /// to be set accordingly.
    pub slow: bool,
}

/// Why a host cannot run machines.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NotFit {
    /// There is no KVM.
    #[error(
        "there is no /dev/kvm: the host's kernel has no KVM, its module (kvm-intel, kvm-amd) is not loaded, or \
         virtualisation is off in the firmware"
    )]
    NoDevice,
    /// This user may not use KVM.
    #[error(
        "no permission to open /dev/kvm: add the user to the group that owns it (`usermod -aG kvm USER`, then log in \
         again)"
    )]
    NoPermission,
    /// What stands at `/dev/kvm` does not speak KVM's interface.
    #[error("/dev/kvm does not speak version 12 of KVM's interface: {found}")]
    WrongInterface {
        /// What it answered.
        found: String,
    },
    /// KVM lacks something.
    #[error("KVM lacks {capability}")]
    MissingCapability {
        /// As the kernel's documentation names it.
        capability: &'static str,
    },
    /// KVM does not run the guest's kernel on the processor.
    #[error(
        "KVM emulates the guest's kernel: {:.2} million instructions per second, at least {} million are needed",
        instructions_per_second / 1e6,
        LEAST_SPEED / 1e6
    )]
    Emulated {
        /// The rate that was measured.
        instructions_per_second: f64,
    },
    /// KVM does not come to an end.
    #[error("KVM did not run a short loop within {after:?}")]
    Hangs {
        /// How long was waited.
        after: Duration,
    },
    /// Something else failed.
    #[error("KVM does not work: {reason}")]
    Broken {
        /// What.
        reason: String,
    },
}

/// Finds out whether this host can run machines: opens KVM, asks for what is needed, and measures how fast a counting
/// loop runs in a tiny machine. It blocks for about 30 ms, and for 5 s at most.
///
/// # Errors
/// [`NotFit`], with what to do about it.
pub fn probe() -> Result<Fitness, NotFit> {
    let (send, receive) = mpsc::channel();
    // A thread that hangs in KVM cannot be ended; it is left behind.
    let thread = thread::Builder::new().name("vm-kvm-probe".to_owned());
    let body = move || {
        let _ = send.send(look());
    };
    thread.spawn(body).map_err(|error| NotFit::Broken { reason: error.to_string() })?;
    receive.recv_timeout(PATIENCE).unwrap_or(Err(NotFit::Hangs { after: PATIENCE }))
}

fn look() -> Result<Fitness, NotFit> {
    // Opened by hand first, to tell the reasons apart.
    match File::options().read(true).write(true).open(DEVICE) {
        Ok(_) => {}
        Err(error) => return Err(why_not_open(&error)),
    }
    let broken = |error: kvm_ioctls::Error| NotFit::Broken { reason: error.to_string() };
    let kvm = Kvm::new().map_err(broken)?;
    match kvm.get_api_version() {
        API_VERSION => {}
        other => return Err(NotFit::WrongInterface { found: other.to_string() }),
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(*capability) {
            return Err(NotFit::MissingCapability { capability: name });
        }
    }
    let speed = tiny::instructions_per_second(&kvm).map_err(|reason| NotFit::Broken { reason })?;
    judge(speed, kvm.get_max_vcpus(), is_virtual())
}

fn judge(instructions_per_second: f64, max_vcpus: usize, nested: bool) -> Result<Fitness, NotFit> {
    if instructions_per_second < LEAST_SPEED {
        return Err(NotFit::Emulated { instructions_per_second });
    }
    let slow = instructions_per_second < SLOW;
    Ok(Fitness { instructions_per_second, max_vcpus, nested, slow })
}

fn why_not_open(error: &io::Error) -> NotFit {
    match Errno::from_io_error(error) {
        // The node may be there without a driver behind it.
        Some(Errno::NOENT | Errno::NXIO | Errno::NODEV) => NotFit::NoDevice,
        Some(Errno::ACCESS | Errno::PERM) => NotFit::NoPermission,
        _ => NotFit::Broken { reason: format!("{DEVICE}: {error}") },
    }
}

/// Says whether this host is a guest itself.
fn is_virtual() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find_map(|line| line.strip_prefix("flags"));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "hypervisor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_told_apart() {
        let of = |errno: Errno| why_not_open(&errno.into());
        assert_eq!(of(Errno::NOENT), NotFit::NoDevice);
        assert_eq!(of(Errno::NODEV), NotFit::NoDevice);
        assert_eq!(of(Errno::ACCESS), NotFit::NoPermission);
        assert!(matches!(of(Errno::MFILE), NotFit::Broken { .. }));
    }

    #[test]
    fn speeds_are_judged() {
        let text = judge(290_000.0, 8, true).unwrap_err().to_string();
        assert!(text.contains("0.29 million") && text.contains("at least 20 million"), "{text}");
        assert!(judge(250e6, 8, true).unwrap().slow);
        assert!(!judge(3e9, 8, false).unwrap().slow);
    }

    /// What is found depends on the host; that it is found in time, and that it is sane, does not.
    #[test]
    fn this_host_is_judged_in_time() {
        let began = std::time::Instant::now();
        let found = probe();
        assert!(began.elapsed() < PATIENCE + Duration::from_secs(1));
        match found {
            Ok(fitness) => {
                assert!(fitness.instructions_per_second < 1e12 && fitness.max_vcpus > 0);
            }
            Err(NotFit::Emulated { instructions_per_second }) => {
                assert!(instructions_per_second > 1e3, "{instructions_per_second}");
            }
            Err(NotFit::Hangs { .. } | NotFit::Broken { .. }) => panic!("{found:?}"),
            Err(_) => {}
        }
    }
}
