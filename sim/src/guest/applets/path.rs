//! Paths as text, and looking programs up.

use super::{super::syscalls::Syscalls, Out, options::Parsed};
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::EntryKind;

/// Finds a program by name in these directories, as a shell does; a name with a slash is a path already.
pub(in super::super) fn look_up(sys: &Syscalls<'_>, name: &str, path: &str) -> SysResult<String> {
    if name.is_empty() {
        return Err(Errno::NOENT);
    }
    if name.contains('/') {
        return Ok(name.to_owned());
    }
    let mut seen = Errno::NOENT;
    for dir in path.split(':') {
        let candidate = if dir.is_empty() { name.to_owned() } else { format!("{dir}/{name}") };
        let is_file = sys.stat(&candidate, true).is_ok_and(|stat| stat.kind == EntryKind::File);
        if !is_file {
            continue;
        }
        if sys.access(&candidate, 1).is_ok() {
            return Ok(candidate);
        }
        seen = Errno::ACCES;
    }
    Err(seen)
}

/// Puts a name under a directory.
pub(super) fn join(dir: &str, name: &str) -> String {
    format!("{}/{name}", dir.trim_end_matches('/'))
}

/// Gives a path's last name.
pub(super) fn last_name(path: &str) -> &str {
    let trimmed = path.trim_end_matches('/');
    if trimmed.is_empty() {
        return if path.is_empty() { "" } else { "/" };
    }
    trimmed.rsplit('/').next().unwrap_or(trimmed)
}

pub(super) fn basename(_: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    let mut name = last_name(&parsed.rest[0]);
    if let Some(suffix) = parsed.rest.get(1)
        && name != suffix
    {
        name = name.strip_suffix(suffix.as_str()).unwrap_or(name);
    }
    out.line(name);
    0
}

pub(super) fn dirname(_: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    let path = parsed.rest[0].trim_end_matches('/');
    let dir = match path.rsplit_once('/') {
        None if path.is_empty() && !parsed.rest[0].is_empty() => "/",
        None => ".",
        Some((above, _)) => match above.trim_end_matches('/') {
            "" => "/",
            above => above,
        },
    };
    out.line(dir);
    0
}
