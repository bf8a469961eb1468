//! Children in the foreground and in the background.

use super::{Shell, ast::Command, obituary, run::Frame, status_of};
use crate::guest::{
    program::{Step, WaitFor},
    syscalls::{OpenFlags, Syscalls},
};
use std::sync::Arc;
use vm_guest_agent::os::ChildExit;

impl Shell {
    pub(super) fn background(&mut self, sys: &mut Syscalls<'_>, command: &Arc<Command>) {
        let pid = match self.fork(sys, command) {
            Ok(pid) => pid,
            Err(errno) => {
                self.cannot_fork(sys, errno);
                return;
            }
        };
        let mut child = sys.for_child(pid);
        let flags = OpenFlags { read: true, ..OpenFlags::default() };
        let prepared =
            child.ignore_signal(2).and_then(|()| child.ignore_signal(3)).and_then(|()| {
                let null = child.open("/dev/null", flags, 0)?;
                child.dup2(null, 0)?;
                if null == 0 { Ok(()) } else { child.close(null) }
            });
        if let Err(errno) = prepared {
            self.complain(&format!("/dev/null: {}", crate::guest::applets::errno_text(errno)));
        }
        self.last_background = Some(pid);
        self.jobs.insert(pid, None);
        self.status = 0;
    }

    /// Takes in that a background child has ended.
    fn note(&mut self, pid: u32, exit: ChildExit) {
        if let Some(job) = self.jobs.get_mut(&pid) {
            *job = Some(status_of(exit));
        }
    }

    pub(super) fn wait_foreground(
        &mut self,
        sys: &mut Syscalls<'_>,
        mut pids: Vec<u32>,
        last: u32,
        mut failed: u8,
    ) -> Step {
        while !pids.is_empty() {
            match sys.wait_child(None) {
                Ok(Some((pid, exit))) => {
                    let Some(at) = pids.iter().position(|known| *known == pid) else {
                        self.note(pid, exit);
                        continue;
                    };
                    pids.remove(at);
                    let status = status_of(exit);
                    if pid == last {
                        self.status = status;
                    }
                    if status != 0 {
                        failed = status;
                    }
                    if let ChildExit::Signaled(signal) = exit
                        && let Some(text) = obituary(signal).filter(|_| pid == last)
                    {
                        self.out.put_to(2, format!("{text}\n").as_bytes());
                    }
                }
                Ok(None) => {
                    self.stack.push(Frame::Wait { pids, last, failed });
                    return Step::Block(WaitFor::child());
                }
                Err(_) => {
                    self.status = 127;
                    pids.clear();
                }
            }
        }
        if self.options.pipefail && self.status == 0 {
            self.status = failed;
        }
        self.stack.push(Frame::Flush);
        Step::Continue
    }

    pub(super) fn wait_jobs(
        &mut self,
        sys: &mut Syscalls<'_>,
        mut pids: Vec<u32>,
        all: bool,
    ) -> Step {
        while let Ok(Some((pid, exit))) = sys.wait_child(None) {
            self.note(pid, exit);
        }
        if all {
            if self.jobs.values().any(Option::is_none) {
                self.stack.push(Frame::WaitJobs { pids, all });
                return Step::Block(WaitFor::child());
            }
            self.jobs.clear();
            self.status = 0;
            return Step::Continue;
        }
        while let Some(pid) = pids.first().copied() {
            match self.jobs.get(&pid) {
                Some(None) => {
                    self.stack.push(Frame::WaitJobs { pids, all });
                    return Step::Block(WaitFor::child());
                }
                Some(Some(status)) => self.status = *status,
                None => self.status = 127,
            }
            self.jobs.remove(&pid);
            pids.remove(0);
        }
        Step::Continue
    }
}
