//! [`GuestOs`]: what the agent asks of its kernel.
//!
//! The seam stands at the level of system calls on purpose: looking programs up in `PATH`, reading `/etc/passwd`,
//! replacing files atomically, removing trees and ending process groups are the agent's own logic, written once and
//! run under simulation. Every method returns at once; what cannot be done now says so.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use vm_guest_protocol::{EntryKind, ResourceLimit, StatEntry, TermSize};

/// A Linux error number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Errno(pub i32);

#[allow(missing_docs)]
impl Errno {
    pub const PERM: Self = Self(1);
    pub const NOENT: Self = Self(2);
    pub const SRCH: Self = Self(3);
    pub const INTR: Self = Self(4);
    pub const IO: Self = Self(5);
    pub const TOOBIG: Self = Self(7);
    pub const NOEXEC: Self = Self(8);
    pub const BADF: Self = Self(9);
    pub const CHILD: Self = Self(10);
    pub const AGAIN: Self = Self(11);
    pub const NOMEM: Self = Self(12);
    pub const ACCES: Self = Self(13);
    pub const BUSY: Self = Self(16);
    pub const EXIST: Self = Self(17);
    pub const XDEV: Self = Self(18);
    pub const NOTDIR: Self = Self(20);
    pub const ISDIR: Self = Self(21);
    pub const INVAL: Self = Self(22);
    pub const NFILE: Self = Self(23);
    pub const MFILE: Self = Self(24);
    pub const NOTTY: Self = Self(25);
    pub const FBIG: Self = Self(27);
    pub const NOSPC: Self = Self(28);
    pub const ROFS: Self = Self(30);
    pub const MLINK: Self = Self(31);
    pub const PIPE: Self = Self(32);
    pub const NAMETOOLONG: Self = Self(36);
    pub const NOSYS: Self = Self(38);
    pub const NOTEMPTY: Self = Self(39);
    pub const LOOP: Self = Self(40);
    pub const OPNOTSUPP: Self = Self(95);
    pub const DQUOT: Self = Self(122);
}

/// The result of a system call.
pub type SysResult<T> = Result<T, Errno>;

/// Names an open file of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fd(pub u32);

/// Names a child process of the agent for as long as the agent holds it; unlike a pid it is never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Child(pub u64);

/// A program to start, with every question of policy already decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpawnSpec {
    /// Absolute path of the program's file.
    pub path: String,
    /// Arguments with the program's own name first.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    /// Absolute working directory.
    pub cwd: String,
    /// User and group to become, with no supplementary groups.
    pub ids: Option<(u32, u32)>,
    /// A terminal as controlling terminal, in place of three pipes.
    pub tty: Option<TermSize>,
    /// Whether standard input is a pipe; else it is `/dev/null`.
    pub stdin: bool,
    /// What it may use, set before it becomes another user; the rest is as the agent has it.
    pub limits: Vec<ResourceLimit>,
}

/// A program that was started, as leader of a session and process group of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spawned {
    /// Its name here.
    pub child: Child,
    /// Its pid, which is its process group's id too.
    pub pid: u32,
}

/// Which of a child's outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Output {
    /// Standard output or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What reading without waiting gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// At least one byte.
    Data(Bytes),
    /// Nothing now.
    WouldBlock,
    /// No writer is left.
    Eof,
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChildExit {
    /// With this code.
    Exited(u8),
    /// By this signal.
    Signaled(u8),
}

/// What the agent asks of its kernel. The agent owns it and is its only caller, so no method needs a lock.
pub trait GuestOs {
    /// Gives the monotonic clock. It stands still while the machine is paused.
    fn monotonic(&self) -> Duration;

    /// Sets the wall clock, as time since the Unix epoch.
    ///
    /// # Errors
    /// The kernel's; `PERM` where the agent may not.
    fn set_wall_clock(&mut self, since_epoch: Duration) -> SysResult<()>;

    /// Mixes fresh randomness into the random pool and makes it count at once.
    ///
    /// # Errors
    /// The kernel's.
    fn reseed(&mut self, entropy: &[u8; 32]) -> SysResult<()>;

    /// Starts a program. An error of `execve` is reported here, not as an exit code.
    ///
    /// # Errors
    /// The kernel's.
    fn spawn(&mut self, spec: &SpawnSpec) -> SysResult<Spawned>;

    /// Reads at most `max` bytes of a child's output.
    ///
    /// # Errors
    /// The kernel's. A terminal whose last writer is gone is `Eof`.
    fn read_output(&mut self, child: Child, output: Output, max: usize) -> SysResult<ReadOutcome>;

    /// Writes to a child's standard input, and says how much was taken; 0 when it is full.
    ///
    /// # Errors
    /// `PIPE` when no reader is left.
    fn write_stdin(&mut self, child: Child, bytes: &[u8]) -> SysResult<usize>;

    /// Closes a child's standard input; on a terminal it types end-of-file. Harmless when it is closed.
    fn close_stdin(&mut self, child: Child);

    /// Sets the size of a child's terminal and tells it.
    ///
    /// # Errors
    /// `NOTTY` where it has none.
    fn resize(&mut self, child: Child, size: TermSize) -> SysResult<()>;

    /// Sends a signal to every process of the child's group.
    ///
    /// # Errors
    /// `SRCH` when none is left, or when the child was reaped.
    fn signal_group(&mut self, child: Child, signal: u8) -> SysResult<()>;

    /// Says how a child ended, reaping it, or `None` while it runs. The answer stays until `release`.
    fn try_wait(&mut self, child: Child) -> Option<ChildExit>;

    /// Closes what the agent holds of a child. A child that still runs goes on.
    fn release(&mut self, child: Child);

    /// Sends a signal to every process of the guest but the agent.
    fn signal_all(&mut self, signal: u8);

    /// Says whether any process of the guest but the agent is left.
    fn has_processes(&mut self) -> bool;

    /// Opens a file for reading, following links. A directory is `ISDIR`.
    ///
    /// # Errors
    /// The kernel's.
    fn open_read(&mut self, path: &str) -> SysResult<Fd>;

    /// Makes a new file for writing that nothing stood at before.
    ///
    /// # Errors
    /// The kernel's; `EXIST`.
    fn create_new(&mut self, path: &str, mode: u32) -> SysResult<Fd>;

    /// Reads on in a file; no bytes at its end.
    ///
    /// # Errors
    /// The kernel's.
    fn read(&mut self, fd: Fd, max: usize) -> SysResult<Bytes>;

    /// Writes on in a file, all of it.
    ///
    /// # Errors
    /// The kernel's; then any part may have been written.
    fn write_all(&mut self, fd: Fd, bytes: &[u8]) -> SysResult<()>;

    /// Makes a file's content durable.
    ///
    /// # Errors
    /// The kernel's.
    fn sync_file(&mut self, fd: Fd) -> SysResult<()>;

    /// Sets an open file's owner and permission bits.
    ///
    /// # Errors
    /// The kernel's.
    fn set_owner_and_mode(&mut self, fd: Fd, owner: Option<(u32, u32)>, mode: u32)
    -> SysResult<()>;

    /// Closes a file.
    fn close(&mut self, fd: Fd);

    /// Makes a directory's names durable.
    ///
    /// # Errors
    /// The kernel's.
    fn sync_dir(&mut self, path: &str) -> SysResult<()>;

    /// Gives a file's metadata without following a link at its end.
    ///
    /// # Errors
    /// The kernel's.
    fn lstat(&mut self, path: &str) -> SysResult<StatEntry>;

    /// Gives a file's metadata, following links.
    ///
    /// # Errors
    /// The kernel's.
    fn stat(&mut self, path: &str) -> SysResult<StatEntry>;

    /// Gives where a symbolic link points.
    ///
    /// # Errors
    /// The kernel's; `INVAL` where it is no link.
    fn read_link(&mut self, path: &str) -> SysResult<String>;

    /// Lists a directory without `.` and `..`, in any order.
    ///
    /// # Errors
    /// The kernel's.
    fn read_dir(&mut self, path: &str) -> SysResult<Vec<(String, EntryKind)>>;

    /// Makes a directory.
    ///
    /// # Errors
    /// The kernel's.
    fn mkdir(&mut self, path: &str, mode: u32) -> SysResult<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// The kernel's.
    fn rmdir(&mut self, path: &str) -> SysResult<()>;

    /// Removes a name that is no directory.
    ///
    /// # Errors
    /// The kernel's.
    fn unlink(&mut self, path: &str) -> SysResult<()>;

    /// Renames, replacing what stands at `to` as rename(2) does.
    ///
    /// # Errors
    /// The kernel's.
    fn rename(&mut self, from: &str, to: &str) -> SysResult<()>;

    /// Makes all disks durable.
    fn sync_all(&mut self);

    /// Turns the machine off. It may return before that is done.
    fn power_off(&mut self);
}
