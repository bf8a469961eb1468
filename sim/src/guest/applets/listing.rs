//! Commands that show the file system.

use super::{super::syscalls::Syscalls, Out, errno_text, options::Parsed, path::join, system};
use vm_guest_agent::os::SysResult;
use vm_guest_protocol::{EntryKind, StatEntry};

pub(super) fn ls(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(mut parsed) = Parsed::read(argv, "1aAldR", out) else { return 1 };
    if parsed.has('R') {
        out.error("unrecognized option: R");
        return 1;
    }
    if parsed.rest.is_empty() {
        parsed.rest.push(".".to_owned());
    }
    let (mut files, mut dirs, mut code) = (Vec::new(), Vec::new(), 0);
    parsed.rest.sort();
    for path in &parsed.rest {
        let follow = !parsed.has('l') && !parsed.has('d');
        match sys.stat(path, follow).or_else(|_| sys.stat(path, false)) {
            Ok(stat) if stat.kind == EntryKind::Directory && !parsed.has('d') => dirs.push(path),
            Ok(stat) => files.push((path.clone(), path.clone(), stat)),
            Err(errno) => {
                out.error(&format!("{path}: {}", errno_text(errno)));
                code = 1;
            }
        }
    }
    let titled = dirs.len() + files.len() > 1 || code != 0 && parsed.rest.len() > 1;
    let mut is_first = files.is_empty();
    print(sys, &parsed, &files, out);
    for dir in dirs {
        match entries(sys, &parsed, dir) {
            Ok(entries) => {
                if titled {
                    let gap = if is_first { "" } else { "\n" };
                    out.line(&format!("{gap}{dir}:"));
                }
                is_first = false;
                if parsed.has('l') {
                    out.line("total 0");
                }
                print(sys, &parsed, &entries, out);
            }
            Err(errno) => {
                out.error(&format!("can't open '{dir}': {}", errno_text(errno)));
                code = 1;
            }
        }
    }
    code
}

type Entry = (String, String, StatEntry);

fn entries(sys: &Syscalls<'_>, parsed: &Parsed, dir: &str) -> SysResult<Vec<Entry>> {
    let mut names: Vec<String> = sys.read_dir(dir)?.into_iter().map(|(name, _)| name).collect();
    if parsed.has('a') {
        names.extend([".".to_owned(), "..".to_owned()]);
    } else if !parsed.has('A') {
        names.retain(|name| !name.starts_with('.'));
    }
    names.sort();
    let mut entries = Vec::with_capacity(names.len());
    for name in names {
        let path = join(dir, &name);
        let stat = sys.stat(&path, false)?;
        entries.push((name, path, stat));
    }
    Ok(entries)
}

fn print(sys: &Syscalls<'_>, parsed: &Parsed, entries: &[Entry], out: &mut Out) {
    for (name, path, stat) in entries {
        if !parsed.has('l') {
            out.line(name);
            continue;
        }
        let owner = system::user_name(sys, stat.uid).unwrap_or_else(|| stat.uid.to_string());
        let group = system::group_name(sys, stat.gid).unwrap_or_else(|| stat.gid.to_string());
        let target = match stat.kind {
            EntryKind::Symlink => sys.read_link(path).map(|to| format!(" -> {to}")),
            _ => Ok(String::new()),
        };
        let date = system::format_date(stat.modified_ns, "%b %d %H:%M").unwrap_or_default();
        out.line(&format!(
            "{}    1 {owner:<8} {group:<8} {:>9} {date} {name}{}",
            mode_text(stat),
            stat.size,
            target.unwrap_or_default()
        ));
    }
}

fn mode_text(stat: &StatEntry) -> String {
    let mut text = String::from(match stat.kind {
        EntryKind::Directory => 'd',
        EntryKind::Symlink => 'l',
        EntryKind::File => '-',
        EntryKind::Other => 'c',
    });
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = stat.mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (stat.mode & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

pub(super) fn readlink(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "fn", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    let path = &parsed.rest[0];
    let text = if parsed.has('f') { canonical(sys, path) } else { sys.read_link(path).ok() };
    let Some(text) = text else { return 1 };
    out.put(text.as_bytes());
    if !parsed.has('n') {
        out.put(b"\n");
    }
    0
}

/// Gives a path with all links followed; its last name may be missing.
fn canonical(sys: &Syscalls<'_>, path: &str) -> Option<String> {
    let absolute =
        if path.starts_with('/') { path.to_owned() } else { join(&sys.getcwd().ok()?, path) };
    let mut names: Vec<String> = absolute.split('/').rev().map(str::to_owned).collect();
    let (mut done, mut links) = (String::new(), 0);
    while let Some(name) = names.pop() {
        match name.as_str() {
            "" | "." => continue,
            ".." => {
                done.truncate(done.rfind('/').unwrap_or(0));
                continue;
            }
            _ => {}
        }
        let next = format!("{done}/{name}");
        match sys.stat(&next, false) {
            Ok(stat) if stat.kind == EntryKind::Symlink => {
                links += 1;
                let target = sys.read_link(&next).ok().filter(|_| links <= 40)?;
                if target.starts_with('/') {
                    done.clear();
                }
                names.extend(target.split('/').rev().map(str::to_owned));
            }
            Ok(_) => done = next,
            Err(_) if names.iter().all(String::is_empty) => done = next,
            Err(_) => return None,
        }
    }
    Some(if done.is_empty() { "/".to_owned() } else { done })
}

pub(super) fn stat(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "c:L", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    let format =
        parsed.value('c').unwrap_or("  File: %n\n  Size: %s\tAccess: (%a/%A)\tUid: %u\tGid: %g");
    let mut code = 0;
    for path in &parsed.rest {
        match sys.stat(path, parsed.has('L')) {
            Ok(stat) => match stat_text(sys, format, path, &stat) {
                Ok(text) => out.line(&text),
                Err(letter) => {
                    out.error(&format!("unsupported format: %{letter}"));
                    return 1;
                }
            },
            Err(errno) => {
                out.error(&format!("can't stat '{path}': {}", errno_text(errno)));
                code = 1;
            }
        }
    }
    code
}

fn stat_text(
    sys: &Syscalls<'_>,
    format: &str,
    path: &str,
    stat: &StatEntry,
) -> Result<String, char> {
    let (mut text, mut letters) = (String::new(), format.chars());
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        match letters.next().unwrap_or('%') {
            's' => text.push_str(&stat.size.to_string()),
            'a' => text.push_str(&format!("{:o}", stat.mode)),
            'A' => text.push_str(&mode_text(stat)),
            'u' => text.push_str(&stat.uid.to_string()),
            'g' => text.push_str(&stat.gid.to_string()),
            'U' => text.push_str(&system::user_name(sys, stat.uid).unwrap_or("UNKNOWN".to_owned())),
            'G' => {
                text.push_str(&system::group_name(sys, stat.gid).unwrap_or("UNKNOWN".to_owned()));
            }
            'n' => text.push_str(path),
            'Y' => text.push_str(&(stat.modified_ns / 1_000_000_000).to_string()),
            'F' => text.push_str(match stat.kind {
                EntryKind::File if stat.size == 0 => "regular empty file",
                EntryKind::File => "regular file",
                EntryKind::Directory => "directory",
                EntryKind::Symlink => "symbolic link",
                EntryKind::Other => "character special file",
            }),
            '%' => text.push('%'),
            other => return Err(other),
        }
    }
    Ok(text)
}
