//! Signals.

use super::{kernel::Kernel, process::AGENT};
use vm_guest_agent::os::{ChildExit, Errno, SysResult};
use vm_planted_bugs::{Bug, planted};

pub(super) const HUP: u8 = 1;
pub(super) const KILL: u8 = 9;
pub(super) const PIPE: u8 = 13;
pub(super) const TERM: u8 = 15;
pub(super) const CHLD: u8 = 17;
const CONT: u8 = 18;
const STOP: u8 = 19;
const TSTP: u8 = 20;
const TTOU: u8 = 22;
const URG: u8 = 23;
pub(super) const XFSZ: u8 = 25;
pub(super) const WINCH: u8 = 28;
/// The highest signal.
pub(super) const MAX: u8 = 64;

/// Signals by name, as `kill` and `trap` know them.
pub(super) const NAMES: [(&str, u8); 26] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("WINCH", 28),
    ("PWR", 30),
];

/// Reads a signal's number or its name, with or without `SIG`.
pub(super) fn parse(text: &str) -> Option<u8> {
    if let Ok(number) = text.parse::<u8>() {
        return (number <= MAX).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    NAMES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// Gives a signal's bit in a mask.
pub(super) fn bit(signal: u8) -> u64 {
    if (1..=MAX).contains(&signal) { 1 << (signal - 1) } else { 0 }
}

impl Kernel {
    /// Sends a signal to a process, and carries out what it does by default.
    pub(super) fn send_signal(&mut self, pid: u32, signal: u8) {
        let Some(process) = self.processes.get_mut(&pid).filter(|it| it.is_alive()) else {
            return;
        };
        let mask = bit(signal);
        match signal {
            KILL => {}
            CONT => process.stopped = planted(Bug::StoppedStaysStopped) && process.stopped,
            STOP => {
                process.stopped = true;
                return;
            }
            _ => {}
        }
        if signal != KILL && process.ignored & mask != 0 {
            return;
        }
        if signal != KILL && process.caught & mask != 0 {
            process.pending |= mask;
            return;
        }
        match signal {
            CHLD | CONT | URG | WINCH => {}
            TSTP..=TTOU => process.stopped = true,
            _ => self.terminate(pid, ChildExit::Signaled(signal)),
        }
    }

    /// Sends a signal to every process of a group, and says whether there was any, one that has ended counting.
    pub(super) fn signal_group(&mut self, group: u32, signal: u8) -> bool {
        let members: Vec<_> = self
            .processes
            .iter()
            .filter(|(_, it)| it.group == group)
            .map(|(pid, _)| *pid)
            .filter(|pid| *pid == group || !planted(Bug::KillMissesChildren))
            .collect();
        if signal != 0 {
            members.iter().for_each(|pid| self.send_signal(*pid, signal));
        }
        !members.is_empty()
    }

    /// Carries out kill(2) for a process.
    pub(super) fn kill(&mut self, who: u32, target: i64, signal: u8) -> SysResult<()> {
        if signal > MAX {
            return Err(Errno::INVAL);
        }
        let sender = self.processes.get(&who).ok_or(Errno::SRCH)?;
        let (uid, group) = (sender.uid, sender.group);
        let pids: Vec<u32> = match target {
            -1 => {
                let others = self.processes.keys().copied();
                others.filter(|pid| *pid != AGENT && *pid != who).collect()
            }
            0 => self.members(group),
            target if target < 0 => self.members(u32::try_from(-target).map_err(|_| Errno::SRCH)?),
            target => {
                let pid = u32::try_from(target).map_err(|_| Errno::SRCH)?;
                // The agent has a handler for no signal, so that none reaches it.
                if pid == AGENT {
                    return if uid == 0 { Ok(()) } else { Err(Errno::PERM) };
                }
                vec![pid].into_iter().filter(|pid| self.processes.contains_key(pid)).collect()
            }
        };
        if pids.is_empty() {
            return Err(Errno::SRCH);
        }
        let allowed: Vec<_> = pids
            .into_iter()
            .filter(|pid| uid == 0 || self.processes.get(pid).is_some_and(|it| it.uid == uid))
            .collect();
        if allowed.is_empty() {
            return Err(Errno::PERM);
        }
        if signal != 0 {
            allowed.into_iter().for_each(|pid| self.send_signal(pid, signal));
        }
        Ok(())
    }

    fn members(&self, group: u32) -> Vec<u32> {
        self.processes.iter().filter(|(_, it)| it.group == group).map(|(pid, _)| *pid).collect()
    }
}
