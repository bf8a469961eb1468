//! Becoming a launcher: what the process sets for itself.

use rustix::{
    fs::{FileType, Mode, OFlags, fstat},
    process::{DumpableBehavior, setsid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stderr},
};
use std::{ffi::CString, io};

/// Leaves the owner's session, lets nobody read this process's memory, and closes the standard descriptors, but for
/// standard error where it is a file: an owner keeps what is said there.
///
/// # Errors
/// When `/dev/null` cannot be opened.
pub fn detach() -> io::Result<()> {
    // It fails where the process leads a group already, which is just as good.
    let _ = setsid();
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    let kept = fstat(stderr()).is_ok_and(|about| FileType::from_raw_mode(about.st_mode).is_file());
    if !kept {
        dup2_stderr(&null)?;
    }
    Ok(())
}

/// Names the calling thread; the kernel keeps 15 bytes.
pub fn name_thread(name: &str) {
    let kept: Vec<u8> = name.bytes().filter(|&byte| byte != 0).take(15).collect();
    if let Ok(name) = CString::new(kept) {
        let _ = rustix::thread::set_name(&name);
    }
}
