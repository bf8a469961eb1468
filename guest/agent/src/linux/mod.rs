//! The Linux form of the agent: [`LinuxOs`] makes the real system calls, [`serve`] is the main loop around the core.
//!
//! An agent has one of three [`Scope`]s. In a guest it is PID 1 and everything but itself is its to signal, to reap
//! and to power off. As an ordinary process for tests it owns only what descends from it, and it touches neither the
//! host's clock nor its random pool. Inside a larger program it owns only the children it started.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`launch`] | the command line of the agent binary |
//! | `init` | the first process of a machine |
//! | [`stream_tool`] | the same binary as tools that connect to the host |
//! | [`proc_table`] | `/proc` as a table |

mod ffi;
mod files;
mod guest_os;
mod init;
pub mod launch;
pub mod proc_table;
mod remove;
mod serve;
mod spawn;
pub mod stream_tool;

pub use guest_os::{LinuxOs, Scope};
pub use remove::remove_tree;
pub use serve::{Ended, Listener, ServeConfig, serve};

use crate::os::Errno;
use rustix::process::{Resource, Rlimit};
use std::io;

/// Marks this process, and by inheritance all that will descend from it, with a number from 2^62 to 2^63 - 1.
///
/// The mark is the hard limit of real-time CPU time in microseconds: it is inherited through fork and exec whatever
/// session, parent or environment a process takes, it cannot be raised again without privilege, and at this size it
/// limits nothing. [`proc_table::marked`] finds what carries it.
///
/// # Errors
/// When the number is out of range, or an earlier mark is lower.
pub fn set_mark(mark: u64) -> io::Result<()> {
    if !(1 << 62..1 << 63).contains(&mark) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let limit = Rlimit { current: Some(mark), maximum: Some(mark) };
    Ok(rustix::process::setrlimit(Resource::Rttime, limit)?)
}

fn errno(error: rustix::io::Errno) -> Errno {
    Errno(error.raw_os_error())
}
