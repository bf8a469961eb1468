//! The VMM: what runs in the launcher process.
//!
//! One process is one machine. Its main thread answers the owner and drives the devices; each vCPU has a thread. The
//! process dies with its owner (see `fds`), keeps no file but those that it was given, and reads the owner's messages
//! and the guest's doings as the words of strangers.
//!
//! | looking for | look in |
//! | --- | --- |
//! | becoming a launcher, the control socket | `fds`, [`vm_launcher::inside`] |
//! | the event loop | `serve` |
//! | the machine and its life | `machine`, `vcpus` |
//! | what a kernel finds when it starts | `boot`, `cpu`, `layout` |
//! | devices | `devices`, `ports` |
//! | a machine's state, and copies of it | `machine`, `cpu`, `saving`, `copies` |
//! | what changed since when | `tracking`, `page_map` |

mod boot;
mod bus;
mod copies;
mod cpu;
mod devices;
mod exit_detail;
mod fds;
mod flush;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod layout;
mod machine;
mod memory;
mod page_map;
mod ports;
mod refuse;
mod saving;
mod serve;
mod threads;
mod tracking;
mod vcpus;
mod wall_clock;

pub(crate) use memory::end as memory_end;

use std::{io, process::ExitCode};
use vm_launcher::inside::{channel, console, greet, heap, process, split, told};

/// Runs the machine that the owner on descriptor 3 describes, until its end; see [`control`](crate::control).
///
/// To be called first of all in a process of its own: every descriptor from 5 on is closed. What goes wrong is said on
/// standard error.
#[must_use]
pub fn launcher_main() -> ExitCode {
    if told(launch()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn launch() -> io::Result<()> {
    let inherited = fds::take()?;
    process::detach()?;
    heap::keep_small();
    split::leave_copies_to_kernel();
    let channel = greet(inherited.control)?;
    let served = serve::serve(&channel);
    drop(inherited.lifeline);
    served
}
