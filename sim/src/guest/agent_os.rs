//! The seam to the agent.

use super::SimOs;
use bytes::Bytes;
use std::time::Duration;
use vm_guest_agent::os::{Child, ChildExit, Errno, Fd, GuestOs, Output, ReadOutcome, SpawnSpec, Spawned, SysResult};
use vm_guest_protocol::{EntryKind, StatEntry, TermSize};

#[allow(unused_variables)]
impl GuestOs for SimOs {
    fn monotonic(&self) -> Duration { Duration::ZERO }
    fn set_wall_clock(&mut self, since_epoch: Duration) -> SysResult<()> { Err(Errno::NOSYS) }
    fn reseed(&mut self, entropy: &[u8; 32]) -> SysResult<()> { Err(Errno::NOSYS) }
    fn spawn(&mut self, spec: &SpawnSpec) -> SysResult<Spawned> { Err(Errno::NOSYS) }
    fn read_output(&mut self, child: Child, output: Output, max: usize) -> SysResult<ReadOutcome> { Err(Errno::NOSYS) }
    fn write_stdin(&mut self, child: Child, bytes: &[u8]) -> SysResult<usize> { Err(Errno::NOSYS) }
    fn close_stdin(&mut self, child: Child) {  }
    fn resize(&mut self, child: Child, size: TermSize) -> SysResult<()> { Err(Errno::NOSYS) }
    fn signal_group(&mut self, child: Child, signal: u8) -> SysResult<()> { Err(Errno::NOSYS) }
    fn try_wait(&mut self, child: Child) -> Option<ChildExit> { None }
    fn release(&mut self, child: Child) {  }
    fn signal_all(&mut self, signal: u8) {  }
    fn has_processes(&mut self) -> bool { false }
    fn open_read(&mut self, path: &str) -> SysResult<Fd> { Err(Errno::NOSYS) }
    fn create_new(&mut self, path: &str, mode: u32) -> SysResult<Fd> { Err(Errno::NOSYS) }
    fn read(&mut self, fd: Fd, max: usize) -> SysResult<Bytes> { Err(Errno::NOSYS) }
    fn write_all(&mut self, fd: Fd, bytes: &[u8]) -> SysResult<()> { Err(Errno::NOSYS) }
    fn sync_file(&mut self, fd: Fd) -> SysResult<()> { Err(Errno::NOSYS) }
    fn set_owner_and_mode(&mut self, fd: Fd, owner: Option<(u32, u32)>, mode: u32) -> SysResult<()> { Err(Errno::NOSYS) }
    fn close(&mut self, fd: Fd) {  }
    fn sync_dir(&mut self, path: &str) -> SysResult<()> { Err(Errno::NOSYS) }
    fn lstat(&mut self, path: &str) -> SysResult<StatEntry> { Err(Errno::NOSYS) }
    fn stat(&mut self, path: &str) -> SysResult<StatEntry> { Err(Errno::NOSYS) }
    fn read_link(&mut self, path: &str) -> SysResult<String> { Err(Errno::NOSYS) }
    fn read_dir(&mut self, path: &str) -> SysResult<Vec<(String, EntryKind)>> { Err(Errno::NOSYS) }
    fn mkdir(&mut self, path: &str, mode: u32) -> SysResult<()> { Err(Errno::NOSYS) }
    fn rmdir(&mut self, path: &str) -> SysResult<()> { Err(Errno::NOSYS) }
    fn unlink(&mut self, path: &str) -> SysResult<()> { Err(Errno::NOSYS) }
    fn rename(&mut self, from: &str, to: &str) -> SysResult<()> { Err(Errno::NOSYS) }
    fn sync_all(&mut self) {  }
    fn power_off(&mut self) {  }
}
