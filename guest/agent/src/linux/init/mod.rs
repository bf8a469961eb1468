//! The agent as the first process of a machine.
//!
//! [`run`] does what [`BootConfig`] says, in this order: what Linux programs expect below `/dev`, `/proc`, `/sys`
//! and `/run`; kernel modules; the root; `/tmp`; disks; host directories; the network; then it listens on vsock and serves until
//! the machine ends.
//!
//! # When something fails
//!
//! A set-up that fails says `twinvm: init failed: STAGE: REASON` on the console and ends the process. So does every
//! other death of the agent, a panic or a fatal signal: the kernel panics when its first process ends, which the host
//! sees. Nothing here catches it. When memory runs out the kernel spares its first process, and no other one.
//!
//! # Signals
//!
//! The kernel keeps signals without a handler from its first process, so no program of the guest can kill the agent.
//! Those by which BusyBox's `poweroff`, `halt` and `reboot` ask the first process for an end are heard: USR2 and USR1
//! turn the machine off, TERM restarts it, each after all processes had TERM, a second's time, and KILL.
//!
//! # Where files are kept
//!
//! `/tmp` is the root's own directory where the root can be written to and is no directory of the host, else a file
//! system in memory. Where the root is a disk, what is written to it is kept in memory. Where it is another one than the
//! initial file system, what the machine was started from is emptied.

mod console;
mod devices;
mod disks;
mod end;
mod modules;
mod mounts;
mod network;
mod root;
mod shares;

pub(super) use end::{Ending, end_machine};

use super::{Listener, Scope, ServeConfig, ffi, serve};
use crate::core::AgentConfig;
use rustix::{
    fs::Mode,
    process::{Resource, Rlimit},
    time::ClockId,
};
use std::{
    fmt::Display,
    fs, io,
    time::{Duration, Instant},
};
use vm_guest_protocol::{
    AGENT_PORT,
    boot::{BOOT_CONFIG_PATH, BootConfig, BootMark, BootRoot},
};

/// Where the image keeps what is of no use once the machine has started.
const IMAGE_DIR: &str = "/twinvm";

/// How many files a program may open; and how many it may ask to be allowed.
const OPEN_FILES: u64 = 65_536;
const OPEN_FILES_AT_MOST: u64 = 524_288;

/// Why the machine could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("{stage}: {reason}")]
struct Failed {
    stage: &'static str,
    reason: String,
}

impl Failed {
    fn new(stage: &'static str, reason: impl Display) -> Self {
        Self { stage, reason: reason.to_string() }
    }

    /// Makes one of an error at a path or with another object.
    fn at<E: Display>(stage: &'static str, object: impl Display) -> impl FnOnce(E) -> Self {
        move |error| Self::new(stage, format_args!("{object}: {error}"))
    }
}

/// Sets the machine up and serves. It returns only when the machine is to die: with the code for the process to end
/// with.
pub(super) fn run() -> u8 {
    let started = Instant::now();
    let failed = match set_up(started).and_then(|listener| {
        let config =
            ServeConfig { agent: AgentConfig::default(), scope: Scope::Machine, lifeline: None };
        serve(&listener, config).map_err(|error| Failed::new("serve", error))
    }) {
        Ok(ended) => Failed::new("end", format_args!("the machine runs on after {ended:?}")),
        Err(failed) => failed,
    };
    console::say(&format_args!("init failed: {failed}"));
    console::drain();
    1
}

fn set_up(started: Instant) -> Result<Listener, Failed> {
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    mounts::devices()?;
    console::open();
    console::mark(BootMark::Init);
    console::say(&"init");
    let _ = rustix::process::setsid();
    mounts::basics()?;
    allow_files();
    let config = read_config()?;
    if !config.hostname.is_empty() {
        let name = config.hostname.as_bytes();
        rustix::system::sethostname(name).map_err(Failed::at("hostname", &config.hostname))?;
    }
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    modules::load_all(&config.modules, &command_line)?;
    root::enter(&config)?;
    let keeps_temporary = match config.root {
        BootRoot::Initial { read_only } | BootRoot::Disk { read_only, .. } => !read_only,
        BootRoot::Shared { .. } => false,
    };
    mounts::temporary(keeps_temporary)?;
    disks::mount_all(&config.disks)?;
    shares::mount_all(&config)?;
    if let Some(network) = &config.network {
        // What is in a directory of the host's is for the user's programs to change.
        network::set_up(network, !matches!(config.root, BootRoot::Shared { .. }))?;
    }
    if let BootRoot::Initial { read_only } = config.root {
        // Every other root came with that directory's end, and a directory of its name is the user's.
        remove_image_dir();
        if read_only {
            mounts::forbid_writing("/")?;
        }
    }
    // Programs may need it; the agent does not, nor a guest whose kernel has no network.
    if let Err(error) = ffi::set_interface_up("lo") {
        console::say(&format_args!("no loopback: {error}"));
    }
    let listener = Listener::vsock(AGENT_PORT).map_err(Failed::at("listen", AGENT_PORT))?;
    console::mark(BootMark::Listening);
    report(started);
    mounts::control_groups();
    Ok(listener)
}

/// Says how long it took, in seconds: since the kernel's start, and since ours.
fn report(started: Instant) {
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    let own = started.elapsed();
    let since_boot = Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    );
    let (since_boot, own) = (since_boot.as_secs_f64(), own.as_secs_f64());
    console::say(&format_args!("ready at {since_boot:.2} s (init {own:.2} s)"));
}

/// Lets programs open more files than kernels allow at first.
fn allow_files() {
    // It is comfort: a kernel without it serves too.
    let limit = Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES_AT_MOST) };
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
}

fn read_config() -> Result<BootConfig, Failed> {
    let bytes =
        fs::read(BOOT_CONFIG_PATH).map_err(Failed::at("configuration", BOOT_CONFIG_PATH))?;
    let _ = fs::remove_file(BOOT_CONFIG_PATH);
    BootConfig::decode(&bytes).map_err(|error| Failed::new("configuration", error))
}

/// Gives back the memory of what the image brought for the start alone.
fn remove_image_dir() {
    match super::remove_tree(IMAGE_DIR.as_ref()) {
        Err(error) if error.kind() != io::ErrorKind::ReadOnlyFilesystem => {
            console::say(&format_args!("{IMAGE_DIR}: {error}"));
        }
        _ => {}
    }
}
