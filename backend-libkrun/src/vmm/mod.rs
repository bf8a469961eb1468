//! What runs in the launcher process and in its child.
//!
//! The launcher has one thread. It answers the owner, keeps the console, and watches its child. The child is a copy of it,
//! made before there is anything to share, which becomes a machine of libkrun's: libkrun takes a process for itself, and
//! ends it when the guest ends.
//!
//! | looking for | look in |
//! | --- | --- |
//! | answers to the owner | `serve` |
//! | what a machine is made of | `plan` |
//! | the child, from outside and from inside | `guest` |
//! | libkrun's calls | `context` |
//! | how the launcher's processes end with it, and stand still | `child` |
//! | how virtual processors and the guest's clock stand still | `freeze` |
//! | where the agent's socket is | `place` |
//! | the process by which a guest's packets reach the host | `passt` |
//! | the host's ports that lead to the guest's | `ports` |
//! | what a machine's sockets may do on the host | `sockets` |
//! | how host directories become one tree | `tree` |
//! | waiting for what nothing tells of | `until` |

mod child;
mod context;
mod freeze;
mod guest;
mod passt;
mod place;
mod plan;
mod ports;
mod serve;
mod sockets;
mod tree;
mod until;

use std::{io, process::ExitCode};
use vm_launcher::inside::{fds, greet, process, told};

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
    let channel = greet(inherited.control)?;
    let served = serve::serve(&channel);
    drop(inherited.lifeline);
    served
}
