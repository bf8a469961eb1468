//! A machine's state on its way to a snapshot and back.
//!
//! The launcher's copy writes a [stream of frames](frame) into a pipe; the owner makes sections of it:
//!
//! | section | holds |
//! | --- | --- |
//! | `kvm.state` | vCPUs, interrupt controllers, clock and devices, in the launcher's own form |
//! | `kvm.memory` | all pages of guest memory that are not zero, one after the other |
//! | `kvm.memory.runs` | where they belong: see [`Runs`](runs::Runs) |
//! | `kvm.disk0` and `kvm.disk0.runs` | the same of a writable disk, by the disk's number |
//!
//! | looking for | look in |
//! | --- | --- |
//! | what travels through the pipe | `frame` |
//! | which parts are there | `runs` |
//! | from the pipe to sections | `capture` |
//! | from sections to a launcher | `load` |

pub(crate) mod capture;
pub(crate) mod frame;
pub(crate) mod load;
pub(crate) mod runs;

/// The section with all but memory and disks.
pub(crate) const STATE: &str = "kvm.state";

/// The section with memory.
pub(crate) const MEMORY: &str = "kvm.memory";

/// The longest state, in bytes.
pub(crate) const MAX_STATE: u64 = 16 << 20;

/// Gives the name of a disk's section.
pub(crate) fn disk_section(index: usize) -> String {
    format!("kvm.disk{index}")
}

/// Gives the name of the section that says where the content of another one belongs.
pub(crate) fn runs_section(content: &str) -> String {
    format!("{content}.runs")
}
