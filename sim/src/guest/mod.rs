//! [`SimOs`]: an in-memory operating system that behaves as a small Linux with BusyBox does.
//!
//! It implements [`GuestOs`](vm_guest_agent::os::GuestOs), so the real agent core runs on it. Everything in it,
//! running processes included, is a value: it can be cloned, saved and loaded, and goes on exactly where it was.
//! Nothing in it reads a clock, draws randomness or starts a thread of the host.
//!
//! # Map of the module
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`program`] | [`GuestProgram`]s and their registry |
//! | [`syscalls`] | [`Syscalls`], what a program asks of the kernel |
//! | [`fault`] | hooks by which a fault plan makes system calls go wrong |
//! | [`disk`] | [`DiskImage`], what of a disk survives a crash |
//!
//! A guest's file system is held as the difference to an immutable base image that all guests share, which makes a
//! fresh guest cheap to create and an idle one small to save.

mod agent_os;
mod applets;
mod descriptors;
pub mod disk;
mod entropy;
pub mod fault;
mod image;
mod kernel;
mod limits;
mod names;
mod path_calls;
mod pipe;
mod proc_fs;
mod process;
pub mod program;
mod pty;
mod rope;
mod sched;
mod share;
mod shell;
mod signals;
mod sockets;
pub mod syscalls;
mod tree;
mod vfs;

pub use disk::{DiskImage, DiskSetup};
pub use fault::{OsFault, OsFaults, SysCall};
pub use image::LoadError;
pub use kernel::{OsConfig, OsEvent, RunReport, SetupError, SimOs};
pub use program::{GuestProgram, ProgramRegistry, Step, WaitFor};
pub use share::{RootInHand, ShareSetup, SharedDir};
pub(crate) use sockets::{Address, SocketEnd};
pub use syscalls::{ChildFds, ChildSpec, FdStat, OpenFlags, Syscalls};

#[cfg(test)]
mod tests;
