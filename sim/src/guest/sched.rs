//! The scheduler.

use super::{
    kernel::{RunReport, SimOs},
    program::Step,
    signals,
    syscalls::Syscalls,
};
use std::time::Duration;
use vm_guest_agent::os::ChildExit;

/// The virtual CPU time of a step.
const STEP: Duration = Duration::from_micros(5);
/// How many steps a process makes before the next one's turn.
const SLICE: u32 = 8;

impl SimOs {
    /// Lets processes run in turn until all are blocked, for at most `budget` steps. The clock stands still
    /// meanwhile; the machine may move it by the CPU time that the report gives.
    pub fn run(&mut self, budget: u32) -> RunReport {
        self.run_ordered(budget, &mut |_| 0)
    }

    /// Does as [`run`](Self::run) does, with `pick(n)` drawing which of the `n` processes that can go on comes next,
    /// from 0, counted from the one whose turn it is.
    pub fn run_ordered(&mut self, budget: u32, pick: &mut dyn FnMut(usize) -> usize) -> RunReport {
        let mut report = RunReport::default();
        let mut ready = Vec::new();
        loop {
            self.collect_ready(&mut ready);
            if ready.is_empty() {
                return report;
            }
            // Processes of one pass run each once, so that a drawn order starves nobody.
            while !ready.is_empty() {
                if report.steps >= budget {
                    report.more = true;
                    return report;
                }
                let choice = if ready.len() == 1 { 0 } else { pick(ready.len()) % ready.len() };
                let pid = ready.remove(choice);
                if self.can_run(pid) {
                    self.kernel.turn = pid;
                    let steps = self.run_slice(pid, SLICE.min(budget - report.steps));
                    report.steps += steps;
                    report.cpu += STEP * steps;
                    self.kernel.cpu += STEP * steps;
                }
                if self.kernel.is_halted() {
                    return report;
                }
            }
        }
    }

    /// Says whether a process could go on now.
    #[must_use]
    pub fn has_runnable(&self) -> bool {
        self.kernel.processes.keys().any(|pid| self.can_run(*pid))
    }

    /// Gives the monotonic time at which a sleeping process wakes next, if any sleeps.
    #[must_use]
    pub fn next_wakeup(&self) -> Option<Duration> {
        if self.kernel.is_halted() {
            return None;
        }
        let sleeping = self.kernel.processes.values();
        sleeping
            .filter(|it| it.is_alive() && !it.stopped && !it.hung)
            .filter_map(|it| {
                it.stall_until.filter(|time| *time > self.kernel.now).or(it.wait.as_ref()?.until)
            })
            .min()
    }

    fn collect_ready(&self, ready: &mut Vec<u32>) {
        ready.clear();
        ready.extend(self.kernel.processes.keys().filter(|pid| self.can_run(**pid)));
        let after = ready.partition_point(|pid| *pid <= self.kernel.turn);
        ready.rotate_left(after);
    }

    fn can_run(&self, pid: u32) -> bool {
        let kernel = &self.kernel;
        if kernel.is_halted() {
            return false;
        }
        let Some(process) = kernel.processes.get(&pid) else { return false };
        let held = !process.is_alive() || process.stopped || process.hung;
        if held || process.stall_until.is_some_and(|time| time > kernel.now) {
            return false;
        }
        process.pending != 0 || process.wait.as_ref().is_none_or(|wait| kernel.is_ready(pid, wait))
    }

    /// Steps a process until it blocks, ends or has made as many steps, and gives how many it made.
    fn run_slice(&mut self, pid: u32, steps: u32) -> u32 {
        let Some(process) = self.kernel.processes.get_mut(&pid) else { return 0 };
        process.wait = None;
        process.stall_until = None;
        let mut program = std::mem::take(&mut process.program);
        let mut made = 0;
        while made < steps {
            made += 1;
            let mut sys = Syscalls::new(self, pid);
            while let Some(signal) = sys.next_signal() {
                program.signal(&mut sys, signal);
            }
            let step = program.step(&mut sys);
            if let Some(next) = sys.take_replacement() {
                program = next;
            }
            let Some(process) =
                self.kernel.processes.get_mut(&pid).filter(|process| process.is_alive())
            else {
                return made;
            };
            match step {
                Step::Continue => {}
                Step::Block(wait) => process.wait = Some(wait),
                Step::Exit(code) => {
                    self.kernel.terminate(pid, ChildExit::Exited(code));
                    return made;
                }
            }
            let wait = process.wait.as_ref();
            let blocked = wait.is_some() || process.stopped || process.stall_until.is_some();
            if blocked || self.kernel.is_halted() {
                break;
            }
        }
        if let Some(process) = self.kernel.processes.get_mut(&pid).filter(|it| it.is_alive()) {
            process.program = program;
        }
        made
    }
}

impl Syscalls<'_> {
    /// Takes the lowest caught signal that has come.
    fn next_signal(&mut self) -> Option<u8> {
        let process = self.process_mut()?;
        (process.pending != 0).then(|| {
            let signal =
                u8::try_from(process.pending.trailing_zeros() + 1).unwrap_or(signals::KILL);
            process.pending &= !signals::bit(signal);
            signal
        })
    }
}
