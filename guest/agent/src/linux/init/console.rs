//! The console, and the port that shows how far the start has come.

use super::super::ffi;
use rustix::{
    fs::{FileType, Mode, OFlags},
    stdio,
};
use std::{
    fmt::Display,
    io::{self, Write},
    thread,
    time::{Duration, Instant},
};
use vm_guest_protocol::boot::{BOOT_MARK_PORT, BootMark};

/// How long the console may take for what is under way when the machine ends.
const DRAIN: Duration = Duration::from_millis(500);

/// Opens the console as standard input and output unless the kernel did.
pub(super) fn open() {
    let is_missing = |stat: rustix::io::Result<rustix::fs::Stat>| {
        // What the run-time library opens in place of a descriptor that is missing.
        let null = rustix::fs::makedev(1, 3);
        stat.is_err() || stat.is_ok_and(|stat| is_device(&stat) && stat.st_rdev == null)
    };
    if ![
        rustix::fs::fstat(stdio::stdin()),
        rustix::fs::fstat(stdio::stdout()),
        rustix::fs::fstat(stdio::stderr()),
    ]
    .into_iter()
    .any(is_missing)
    {
        return;
    }
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    // A machine without a console has nobody to be told.
    if let Ok(console) = rustix::fs::open("/dev/console", flags, Mode::empty()) {
        let _ = stdio::dup2_stdin(&console);
        let _ = stdio::dup2_stdout(&console);
        let _ = stdio::dup2_stderr(&console);
    }
}

fn is_device(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
}

/// Writes a line.
pub(super) fn say(what: &dyn Display) {
    let _ = io::stderr().write_all(format!("twinvm: {what}\n").as_bytes());
}

/// Shows how far the start has come, where the machine has the port for it. It needs no file, so that it can be the
/// first thing of all, and works on kernels without `/dev/port`.
pub(super) fn mark(mark: BootMark) {
    let _ = ffi::write_port(BOOT_MARK_PORT, mark as u8);
}

/// Waits until the console has taken what was written, for a bounded time: a machine that ends drops the rest.
pub(super) fn drain() {
    let end = Instant::now() + DRAIN;
    while ffi::unsent_output(stdio::stderr()) > 0 && Instant::now() < end {
        thread::sleep(Duration::from_millis(1));
    }
}
