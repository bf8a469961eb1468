//! `/proc`: files that the kernel makes up.

use super::{kernel::Kernel, process::Process};
use bytes::Bytes;
use std::{collections::BTreeMap, fmt::Write as _};
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::{EntryKind, StatEntry};

pub(super) const TOP: u32 = 0;
const UPTIME: u32 = 1;
const MEMINFO: u32 = 2;
const SYS: u32 = 3;
const KERNEL: u32 = 4;
const HOSTNAME: u32 = 5;
const SYSRQ: u32 = 6;
const SELF: u32 = 7;
const VERSION: u32 = 8;
/// Processes' nodes begin here, `PER_PROCESS` for each.
const FIRST: u32 = 1000;
const PER_PROCESS: u32 = 5;
const P_STATUS: u32 = 1;
const P_CMDLINE: u32 = 2;
const P_COMM: u32 = 3;
const P_LIMITS: u32 = 4;

const TOP_NAMES: [(&str, u32); 6] = [
    ("uptime", UPTIME),
    ("meminfo", MEMINFO),
    ("sys", SYS),
    ("sysrq-trigger", SYSRQ),
    ("self", SELF),
    ("version", VERSION),
];
const PROCESS_NAMES: [(&str, u32); 4] =
    [("status", P_STATUS), ("cmdline", P_CMDLINE), ("comm", P_COMM), ("limits", P_LIMITS)];

fn of_process(node: u32) -> Option<(u32, u32)> {
    let at = node.checked_sub(FIRST)?;
    Some((at / PER_PROCESS, at % PER_PROCESS))
}

fn process_dir(pid: u32) -> u32 {
    FIRST.saturating_add(pid.saturating_mul(PER_PROCESS))
}

fn is_there(pid: u32, processes: &BTreeMap<u32, Process>) -> bool {
    pid == 1 || processes.contains_key(&pid)
}

pub(super) fn is_dir(node: u32) -> bool {
    matches!(node, TOP | SYS | KERNEL) || of_process(node).is_some_and(|(_, file)| file == 0)
}

pub(super) fn lookup(
    at: u32,
    name: &str,
    processes: &BTreeMap<u32, Process>,
) -> SysResult<Option<u32>> {
    if !is_dir(at) {
        return Err(Errno::NOTDIR);
    }
    let named = |names: &[(&str, u32)]| names.iter().find(|(n, _)| *n == name).map(|(_, n)| *n);
    Ok(match (at, name) {
        (_, ".") => Some(at),
        (KERNEL, "..") => Some(SYS),
        (_, "..") => Some(TOP),
        (TOP, name) if name.starts_with(|c: char| c.is_ascii_digit()) => {
            name.parse().ok().filter(|pid| is_there(*pid, processes)).map(process_dir)
        }
        (TOP, _) => named(&TOP_NAMES),
        (SYS, "kernel") => Some(KERNEL),
        (KERNEL, "hostname") => Some(HOSTNAME),
        (SYS | KERNEL, _) => None,
        (dir, _) => named(&PROCESS_NAMES).map(|file| dir + file),
    })
}

pub(super) fn link(node: u32, pid: u32) -> Option<String> {
    (node == SELF).then(|| pid.to_string())
}

pub(super) fn path(node: u32) -> String {
    match node {
        SYS => "/proc/sys".to_owned(),
        KERNEL => "/proc/sys/kernel".to_owned(),
        _ => of_process(node).map_or_else(|| "/proc".to_owned(), |(pid, _)| format!("/proc/{pid}")),
    }
}

fn mode(node: u32) -> u32 {
    match node {
        SYSRQ => 0o200,
        HOSTNAME => 0o644,
        SELF => 0o777,
        node if is_dir(node) => 0o555,
        _ => 0o444,
    }
}

pub(super) fn stat(node: u32) -> StatEntry {
    let kind = match node {
        SELF => EntryKind::Symlink,
        node if is_dir(node) => EntryKind::Directory,
        _ => EntryKind::File,
    };
    StatEntry { kind, size: 0, mode: mode(node), uid: 0, gid: 0, modified_ns: 0 }
}

pub(super) fn access(node: u32, uid: u32, want: u32) -> SysResult<()> {
    let granted = if uid == 0 { mode(node) >> 6 | 4 } else { mode(node) };
    if granted & want == want { Ok(()) } else { Err(Errno::ACCES) }
}

pub(super) fn list(
    node: u32,
    processes: &BTreeMap<u32, Process>,
) -> SysResult<Vec<(String, EntryKind)>> {
    let files = |names: &[(&str, u32)]| {
        names.iter().map(|(name, node)| ((*name).to_owned(), stat(*node).kind)).collect::<Vec<_>>()
    };
    Ok(match node {
        TOP => {
            let mut names = files(&TOP_NAMES);
            let pids = std::iter::once(1).chain(processes.keys().copied());
            names.extend(pids.map(|pid| (pid.to_string(), EntryKind::Directory)));
            names
        }
        SYS => vec![("kernel".to_owned(), EntryKind::Directory)],
        KERNEL => vec![("hostname".to_owned(), EntryKind::File)],
        node if is_dir(node) => {
            PROCESS_NAMES.iter().map(|(name, _)| ((*name).to_owned(), EntryKind::File)).collect()
        }
        _ => return Err(Errno::NOTDIR),
    })
}

impl Kernel {
    /// Gives a `/proc` file's content.
    pub(super) fn proc_content(&self, node: u32) -> SysResult<Bytes> {
        let text = match node {
            UPTIME => {
                let centis = self.now.as_millis() / 10;
                format!("{}.{:02} 0.00\n", centis / 100, centis % 100)
            }
            MEMINFO => {
                let (total, used) = (self.vfs.memory(), self.vfs.memory_used());
                let free = total.saturating_sub(used) / 1024;
                format!(
                    "MemTotal:       {:8} kB\nMemFree:        {free:8} kB\nMemAvailable:   {free:8} kB\n",
                    total / 1024
                )
            }
            HOSTNAME => format!("{}\n", self.hostname),
            VERSION => "Linux version 6.1.0-sim\n".to_owned(),
            SYSRQ => return Err(Errno::INVAL),
            node => return self.process_content(node),
        };
        Ok(text.into())
    }

    fn process_content(&self, node: u32) -> SysResult<Bytes> {
        let (pid, file) = of_process(node).ok_or(Errno::ISDIR)?;
        let process = self.processes.get(&pid);
        if process.is_none() && pid != 1 {
            return Err(Errno::SRCH);
        }
        let argv = process.map_or(&[][..], |process| &process.argv);
        let name = argv.first().map_or("init", |name| name.rsplit('/').next().unwrap_or(name));
        Ok(match file {
            P_CMDLINE => {
                let mut text = String::new();
                for argument in argv {
                    text.push_str(argument);
                    text.push('\0');
                }
                text.into()
            }
            P_LIMITS => process.map(|it| it.limits.clone()).unwrap_or_default().table().into(),
            P_COMM => format!("{name}\n").into(),
            P_STATUS => {
                let mut text = format!("Name:\t{name}\n");
                let (state, parent, uid, gid) = process
                    .map_or(('S', 0, 0, 0), |it| (it.state_letter(), it.parent, it.uid, it.gid));
                let _ = writeln!(text, "State:\t{state}\nPid:\t{pid}\nPPid:\t{parent}");
                let _ = writeln!(text, "Uid:\t{uid}\t{uid}\t{uid}\t{uid}");
                let _ = writeln!(text, "Gid:\t{gid}\t{gid}\t{gid}\t{gid}");
                text.into()
            }
            _ => return Err(Errno::ISDIR),
        })
    }

    /// Carries out a write to a `/proc` file.
    pub(super) fn proc_write(&mut self, node: u32, bytes: &[u8]) -> SysResult<usize> {
        match node {
            HOSTNAME => {
                let name = String::from_utf8_lossy(bytes);
                let name = name.lines().next().unwrap_or("");
                if name.len() > 64 {
                    return Err(Errno::INVAL);
                }
                self.hostname = name.into();
            }
            SYSRQ => match bytes.first() {
                Some(b'c') => self.panic("sysrq triggered crash"),
                Some(b'b') => self.reboot(),
                Some(b'o') => self.power_off(),
                Some(b's') => self.vfs.sync_all(),
                _ => {}
            },
            _ => return Err(Errno::INVAL),
        }
        Ok(bytes.len())
    }
}
