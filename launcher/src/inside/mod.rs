//! The launcher's side: becoming one, the talk with the owner, the console.

pub mod channel;
pub mod console;
pub mod fds;
pub mod heap;
pub mod process;
pub mod refuse;
pub mod split;

use crate::control::{CONTROL_VERSION, End, FromLauncher};
use channel::Channel;
use std::{
    io::{self, Write},
    os::fd::OwnedFd,
    sync::Arc,
};

/// Says on standard error what went wrong, if anything did, and whether all went well.
pub fn told(outcome: io::Result<()>) -> bool {
    outcome
        .inspect_err(|error| {
            let _ = writeln!(io::stderr(), "launcher: {error}");
        })
        .is_ok()
}

/// Says hello to the owner. From then on a panic in any thread ends the process, and the owner hears of it.
///
/// # Errors
/// When the owner is gone.
pub fn greet(control: OwnedFd) -> io::Result<Arc<Channel>> {
    let channel = Arc::new(Channel::new(control));
    end_on_panic(channel.clone());
    channel.send(&FromLauncher::Hello { version: CONTROL_VERSION })?;
    Ok(channel)
}

fn end_on_panic(channel: Arc<Channel>) {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        let why = format!("the machine's process panicked: {panic}");
        let _ = channel.send(&FromLauncher::Ended(End::Failed(why)));
        std::process::exit(101);
    }));
}
