//! What Linux programs expect to find mounted.

use super::{Failed, console};
use rustix::{
    fs::{CWD, Mode},
    io::Errno,
    mount::MountFlags,
};
use std::{ffi::CStr, fs, io, path::Path};

const STAGE: &str = "mounts";

/// A file system without a device.
struct Basic {
    kind: &'static str,
    at: &'static str,
    flags: MountFlags,
    options: &'static CStr,
    /// Whether no machine can go without it.
    needed: bool,
}

const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const PRIVATE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

const BASICS: [Basic; 5] = [
    Basic { kind: "proc", at: "/proc", flags: QUIET, options: c"", needed: true },
    Basic { kind: "sysfs", at: "/sys", flags: QUIET, options: c"", needed: true },
    Basic {
        kind: "devpts",
        at: "/dev/pts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: c"mode=620,gid=5,ptmxmode=666",
        needed: false,
    },
    Basic { kind: "tmpfs", at: "/dev/shm", flags: PRIVATE, options: c"mode=1777", needed: false },
    Basic { kind: "tmpfs", at: "/run", flags: PRIVATE, options: c"mode=755", needed: true },
];

/// Names in `/dev` that are no devices.
const LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

/// Mounts `/dev`.
pub(super) fn devices() -> Result<(), Failed> {
    let flags = MountFlags::NOSUID;
    Basic { kind: "devtmpfs", at: "/dev", flags, options: c"mode=755", needed: true }.mount()
}

/// Mounts what else is no disk, and makes the links in `/dev`.
pub(super) fn basics() -> Result<(), Failed> {
    for basic in &BASICS {
        basic.mount()?;
    }
    for (name, target) in LINKS {
        match rustix::fs::symlink(target, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(Failed::at(STAGE, name)(error)),
        }
    }
    Ok(())
}

/// Gives programs a `/tmp` to write to: the root's own, if that will do and it has one.
pub(super) fn temporary(keeps_own: bool) -> Result<(), Failed> {
    if keeps_own && fs::metadata("/tmp").is_ok_and(|it| it.is_dir()) {
        return Ok(());
    }
    Basic { kind: "tmpfs", at: "/tmp", flags: PRIVATE, options: c"mode=1777", needed: true }.mount()
}

/// Mounts the control groups, where the kernel has any.
pub(super) fn control_groups() {
    let at = "/sys/fs/cgroup";
    if Path::new(at).is_dir() {
        let _ = Basic { kind: "cgroup2", at, flags: QUIET, options: c"", needed: false }.mount();
    }
}

/// Refuses writes through one mount; file systems mounted below it are not touched.
pub(super) fn forbid_writing(at: &str) -> Result<(), Failed> {
    let flags = MountFlags::BIND | MountFlags::RDONLY;
    rustix::mount::mount_remount(at, flags, c"").map_err(Failed::at(STAGE, at))
}

/// Makes a directory, with its parents, unless one is there.
pub(super) fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir_all(path) {
        // A read-only file system says so even of what is there.
        Err(_) if path.is_dir() => Ok(()),
        other => other,
    }
}

impl Basic {
    fn mount(&self) -> Result<(), Failed> {
        let made = rustix::fs::mkdirat(CWD, self.at, Mode::from_raw_mode(0o755));
        let mounted = match made {
            Ok(()) | Err(Errno::EXIST) => {
                rustix::mount::mount(self.kind, self.at, self.kind, self.flags, self.options)
            }
            Err(error) => Err(error),
        };
        match mounted {
            // It is mounted there already.
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(error) if self.needed => Err(Failed::at(STAGE, self.at)(error)),
            Err(error) => {
                console::say(&format_args!("no {}: {error}", self.at));
                Ok(())
            }
        }
    }
}
