//! A machine's state on its way to a snapshot and back.
//!
//! The launcher's copy writes a [stream of frames](frame) into a pipe; the owner makes sections of it:
//!
//! | section | holds |
//! | --- | --- |
//! | `kvm.state` | vCPUs, interrupt controllers, clock and devices, in the launcher's own form |
//! | `kvm.memory` | guest memory, an image |
//! | `kvm.disk0` and so on | each writable disk, by its number, an image |
//!
//! | looking for | look in |
//! | --- | --- |
//! | what travels through the pipe | `frame` |
//! | from the pipe to sections | `capture` |
//! | from sections to a launcher | `load` |
//! | which part of memory stands where | `pieces` |

pub(crate) mod capture;
pub(crate) mod frame;
pub(crate) mod load;
pub(crate) mod pieces;

/// The section with all but memory and disks.
pub(crate) const STATE: &str = "kvm.state";

/// The image of memory.
pub(crate) const MEMORY: &str = "kvm.memory";

/// The size of a page.
pub(crate) const PAGE: u64 = 4096;

/// The longest state, in bytes.
pub(crate) const MAX_STATE: u64 = 16 << 20;

/// Gives the name of a disk's image.
pub(crate) fn disk_section(index: usize) -> String {
    format!("kvm.disk{index}")
}
