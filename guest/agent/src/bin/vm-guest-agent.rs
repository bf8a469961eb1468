//! The guest agent as a program of its own.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vm_guest_agent::linux::launch::main(std::env::args_os().skip(1)).into()
}
