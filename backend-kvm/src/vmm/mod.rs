//! The VMM: what runs in the launcher process.
//!
//! One process is one machine. Its main thread answers the owner and drives the devices; each vCPU has a thread. The
//! process dies with its owner (see `fds`), keeps no file but those that it was given, and reads the owner's messages
//! and the guest's doings as the words of strangers.
//!
//! | looking for | look in |
//! | --- | --- |
//! | becoming a launcher | `fds`, `process` |
//! | the control socket and the event loop | `channel`, `serve` |
//! | the machine and its life | `machine`, `vcpus` |
//! | what a kernel finds when it starts | `boot`, `cpu`, `layout` |
//! | devices | `devices`, `ports`, `console` |
//! | a machine's state, and copies of it | `machine`, `cpu`, `saving`, `copies`, `split` |
//! | what changed since when | `tracking`, `page_map` |

mod boot;
mod bus;
mod channel;
mod console;
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
mod process;
mod refuse;
mod saving;
mod serve;
mod split;
mod threads;
mod tracking;
mod vcpus;
mod wall_clock;

use crate::control::{CONTROL_VERSION, End, FromLauncher};
pub(crate) use memory::end as memory_end;

use channel::Channel;
use std::{
    io::{self, Write},
    os::fd::OwnedFd,
    process::ExitCode,
    sync::Arc,
};

/// Runs the machine that the owner on descriptor 3 describes, until its end; see [`control`](crate::control).
///
/// To be called first of all in a process of its own: every descriptor from 5 on is closed. What goes wrong is said on
/// standard error.
#[must_use]
pub fn launcher_main() -> ExitCode {
    if told(launch()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Says on standard error what went wrong, if anything did, and whether all went well.
fn told(outcome: io::Result<()>) -> bool {
    outcome
        .inspect_err(|error| {
            let _ = writeln!(io::stderr(), "vm-kvm-launcher: {error}");
        })
        .is_ok()
}

fn launch() -> io::Result<()> {
    let inherited = fds::take()?;
    process::detach()?;
    split::leave_copies_to_kernel();
    let channel = greet(inherited.control)?;
    let served = serve::serve(&channel);
    drop(inherited.lifeline);
    served
}

/// Says hello to the owner.
fn greet(control: OwnedFd) -> io::Result<Arc<Channel>> {
    let channel = Arc::new(Channel::new(control));
    end_on_panic(channel.clone());
    channel.send(&FromLauncher::Hello { version: CONTROL_VERSION })?;
    Ok(channel)
}

/// Lets a panic in any thread end the process, and the owner hear of it.
fn end_on_panic(channel: Arc<Channel>) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        let why = format!("the machine's process panicked: {panic}");
        let _ = channel.send(&FromLauncher::Ended(End::Failed(why)));
        std::process::exit(101);
    }));
}
