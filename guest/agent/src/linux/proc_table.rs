//! The table of processes, as `/proc` shows it.

use super::{errno, ffi};
use crate::os::{Errno, SysResult};
use rustix::process::{Pid, PidfdFlags};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::AsFd,
};

/// A process at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessRow {
    /// Its pid.
    pub pid: i32,
    /// Its parent's pid.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Its session.
    pub session: i32,
    /// Whether it has ended and only waits to be reaped.
    pub ended: bool,
    /// CPU time used, in clock ticks, with that of the children that it reaped.
    pub cpu_ticks: u64,
    /// When it started, in clock ticks since boot: with the pid it names the process for ever.
    pub started: u64,
    /// Resident memory, in pages.
    pub resident_pages: u64,
}

impl ProcessRow {
    /// Sends a signal to this process, and never to another one that has its pid by now.
    ///
    /// # Errors
    /// The kernel's; `SRCH` when it is gone.
    pub fn signal(&self, signal: u8) -> SysResult<()> {
        let pid = Pid::from_raw(self.pid).ok_or(Errno::SRCH)?;
        let exact = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(errno)?;
        // From here on the descriptor names one process; it is the one meant if that was there before.
        if process(self.pid).is_none_or(|now| now.started != self.started) {
            return Err(Errno::SRCH);
        }
        ffi::signal_exactly(exact.as_fd(), signal)
    }
}

/// Lists every process that can be seen, by pid. Processes that end meanwhile are left out.
#[must_use]
pub fn processes() -> Vec<ProcessRow> {
    let mut rows: Vec<ProcessRow> = pids().filter_map(process).collect();
    rows.sort_unstable_by_key(|row| row.pid);
    rows
}

/// Looks one process up.
#[must_use]
pub fn process(pid: i32) -> Option<ProcessRow> {
    parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Picks the processes that descend from `ancestor`, without itself.
#[must_use]
pub fn descendants(rows: &[ProcessRow], ancestor: i32) -> Vec<ProcessRow> {
    let mut children: BTreeMap<i32, Vec<&ProcessRow>> = BTreeMap::new();
    for row in rows {
        children.entry(row.parent).or_default().push(row);
    }
    let mut seen = BTreeSet::from([ancestor]);
    let mut found = Vec::new();
    let mut next = vec![ancestor];
    while let Some(parent) = next.pop() {
        for row in children.get(&parent).into_iter().flatten() {
            // The table is not read at one instant, so that parents could seem to form a ring.
            if seen.insert(row.pid) {
                found.push(**row);
                next.push(row.pid);
            }
        }
    }
    found
}

/// Lists the live processes that carry a mark; see [`set_mark`](super::set_mark).
#[must_use]
pub fn marked(mark: u64) -> Vec<ProcessRow> {
    let carries = |pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/limits"))
            .is_ok_and(|limits| mark_in(&limits) == Some(mark))
    };
    pids().filter(carries).filter_map(process).filter(|row| !row.ended).collect()
}

fn pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn parse(stat: &str) -> Option<ProcessRow> {
    // The second field is the program's name in brackets, which may itself hold spaces and brackets.
    let (head, rest) = stat.rsplit_once(')')?;
    let pid = head.split(' ').next()?.parse().ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Field 3 of proc(5) is the first one here.
    let field = |number: usize| fields.get(number - 3).copied();
    let number = |at: usize| field(at)?.parse::<u64>().ok();
    let signed = |at: usize| field(at)?.parse::<i32>().ok();
    Some(ProcessRow {
        pid,
        parent: signed(4)?,
        group: signed(5)?,
        session: signed(6)?,
        ended: matches!(field(3)?, "Z" | "X"),
        cpu_ticks: (14..=17).map(number).sum::<Option<u64>>()?,
        started: number(22)?,
        resident_pages: number(24)?,
    })
}

fn mark_in(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max realtime timeout"))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(pid: i32, parent: i32) -> ProcessRow {
        ProcessRow {
            pid,
            parent,
            group: pid,
            session: pid,
            ended: false,
            cpu_ticks: 0,
            started: 0,
            resident_pages: 0,
        }
    }

    #[test]
    fn this_process_is_in_the_table_under_its_parent() {
        let me = i32::try_from(std::process::id()).unwrap();
        let rows = processes();
        let mine = rows.iter().find(|row| row.pid == me).unwrap();
        assert!(!mine.ended && mine.resident_pages > 0 && mine.started > 0);
        assert!(descendants(&rows, mine.parent).iter().any(|row| row.pid == me));
        assert!(descendants(&rows, me).iter().all(|row| row.pid != me));
    }

    proptest! {
        #[test]
        fn a_programs_name_cannot_forge_fields(name in "[ ()a-z0-9]{0,15}", pid in 1..i32::MAX) {
            let rest = "S 7 8 9 0 -1 0 0 0 0 0 3 4 5 6 20 0 1 0 55 1000 66 0";
            let row = parse(&format!("{pid} ({name}) {rest}")).unwrap();
            prop_assert_eq!((row.pid, row.parent, row.group, row.session), (pid, 7, 8, 9));
            prop_assert_eq!((row.cpu_ticks, row.started, row.resident_pages), (18, 55, 66));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = parse(&text);
            let _ = mark_in(&text);
        }

        #[test]
        fn descendants_are_those_whose_parents_lead_to_the_ancestor(
            parents in prop::collection::vec(0..20_i32, 20),
        ) {
            let rows: Vec<_> = (1..=20).zip(&parents).map(|(pid, parent)| row(pid, *parent)).collect();
            let found: BTreeSet<i32> = descendants(&rows, 1).iter().map(|row| row.pid).collect();
            for pid in 2..=20_i32 {
                let mut at = pid;
                for _ in 0..20 {
                    if at > 1 {
                        at = parents[usize::try_from(at - 1).unwrap()];
                    }
                }
                prop_assert_eq!(found.contains(&pid), at == 1, "{}", pid);
            }
        }
    }
}
