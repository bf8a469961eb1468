//! Commands that change the file system.

use super::{
    super::syscalls::{OpenFlags, Syscalls},
    Out, errno_text,
    options::Parsed,
    path::{join, last_name},
    system,
};
use vm_guest_agent::os::{Errno, SysResult};
use vm_guest_protocol::{EntryKind, StatEntry};

/// How deep directories are copied and removed.
const MAX_DEPTH: u32 = 512;
const COPY_CHUNK: usize = 1 << 20;

fn is_dir(sys: &Syscalls<'_>, path: &str) -> bool {
    sys.stat(path, true).is_ok_and(|stat| stat.kind == EntryKind::Directory)
}

/// Runs a command's work on each operand; the code is 1 when any failed.
fn each(parsed: &Parsed, mut work: impl FnMut(&str) -> Result<(), String>, out: &mut Out) -> u8 {
    let mut code = 0;
    for path in &parsed.rest {
        if let Err(message) = work(path) {
            out.error(&message);
            code = 1;
        }
    }
    code
}

fn plain(path: &str) -> impl Fn(Errno) -> String {
    move |errno| format!("{path}: {}", errno_text(errno))
}

pub(super) fn mkdir(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "pm:", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    let mode = match parsed.value('m').map(|text| u32::from_str_radix(text, 8)) {
        None => None,
        Some(Ok(mode)) => Some(mode & 0o7777),
        Some(Err(_)) => {
            out.error(&format!("invalid mode '{}'", parsed.value('m').unwrap_or("")));
            return 1;
        }
    };
    let work = |path: &str| {
        let failed = |errno| format!("can't create directory '{path}': {}", errno_text(errno));
        if parsed.has('p') {
            for (end, _) in path.trim_end_matches('/').match_indices('/').filter(|(at, _)| *at > 0)
            {
                match sys.mkdir(&path[..end], 0o777) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
        }
        match sys.mkdir(path, 0o777) {
            Err(Errno::EXIST) if parsed.has('p') && is_dir(sys, path) => Ok(()),
            Ok(()) => mode.map_or(Ok(()), |mode| sys.chmod(path, mode)).map_err(failed),
            Err(errno) => Err(failed(errno)),
        }
    };
    each(&parsed, work, out)
}

pub(super) fn rmdir(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "p", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    let work = |path: &str| {
        let mut path = path;
        loop {
            sys.rmdir(path).map_err(|errno| format!("'{path}': {}", errno_text(errno)))?;
            match path.trim_end_matches('/').rsplit_once('/') {
                Some((above, _)) if parsed.has('p') && !above.is_empty() => path = above,
                _ => return Ok(()),
            }
        }
    };
    each(&parsed, work, out)
}

pub(super) fn rm(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "rRf", out) else { return 1 };
    if parsed.rest.is_empty() {
        return if parsed.has('f') { 0 } else { u8::from(!parsed.at_least(1, out)) };
    }
    let recursive = parsed.has('r') || parsed.has('R');
    let work = |path: &str| {
        let failed = |errno| format!("can't remove '{path}': {}", errno_text(errno));
        match sys.stat(path, false) {
            Err(Errno::NOENT) if parsed.has('f') => Ok(()),
            Err(errno) => Err(failed(errno)),
            Ok(stat) if stat.kind != EntryKind::Directory => sys.unlink(path).map_err(failed),
            Ok(_) if !recursive => Err(format!("'{path}' is a directory")),
            Ok(_) => remove_tree(sys, path, MAX_DEPTH),
        }
    };
    each(&parsed, work, out)
}

fn remove_tree(sys: &mut Syscalls<'_>, path: &str, depth: u32) -> Result<(), String> {
    let failed = |errno| format!("can't remove '{path}': {}", errno_text(errno));
    if depth == 0 {
        return Err(failed(Errno::NAMETOOLONG));
    }
    for (name, kind) in sys.read_dir(path).map_err(failed)? {
        let inner = join(path, &name);
        if kind == EntryKind::Directory {
            remove_tree(sys, &inner, depth - 1)?;
        } else {
            let failed = |errno| format!("can't remove '{inner}': {}", errno_text(errno));
            sys.unlink(&inner).map_err(failed)?;
        }
    }
    sys.rmdir(path).map_err(failed)
}

/// Gives the target of each source: a name in the last operand where that is a directory.
fn targets(sys: &Syscalls<'_>, parsed: &mut Parsed) -> Result<Vec<(String, String)>, String> {
    let last = parsed.rest.pop().unwrap_or_default();
    let sources = std::mem::take(&mut parsed.rest);
    if is_dir(sys, &last) {
        let into = |source: String| {
            let target = join(&last, last_name(&source));
            (source, target)
        };
        return Ok(sources.into_iter().map(into).collect());
    }
    match <[String; 1]>::try_from(sources) {
        Ok([source]) => Ok(vec![(source, last)]),
        Err(_) => Err(format!("target '{last}' is not a directory")),
    }
}

fn each_pair(
    sys: &mut Syscalls<'_>,
    mut parsed: Parsed,
    mut work: impl FnMut(&mut Syscalls<'_>, &str, &str) -> Result<(), String>,
    out: &mut Out,
) -> u8 {
    let mut code = 0;
    let pairs = match targets(sys, &mut parsed) {
        Ok(pairs) => pairs,
        Err(message) => {
            out.error(&message);
            return 1;
        }
    };
    for (source, target) in pairs {
        if let Err(message) = work(sys, &source, &target) {
            out.error(&message);
            code = 1;
        }
    }
    code
}

pub(super) fn mv(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "fn", out).filter(|it| it.at_least(2, out)) else {
        return 1;
    };
    let keep = parsed.has('n');
    let work = |sys: &mut Syscalls<'_>, source: &str, target: &str| {
        if keep && sys.stat(target, false).is_ok() {
            return Ok(());
        }
        match sys.rename(source, target) {
            Ok(()) => Ok(()),
            Err(Errno::XDEV) => {
                copy_tree(sys, source, target, true, MAX_DEPTH)?;
                remove_any(sys, source)
            }
            Err(errno) => Err(format!("can't rename '{source}': {}", errno_text(errno))),
        }
    };
    each_pair(sys, parsed, work, out)
}

fn remove_any(sys: &mut Syscalls<'_>, path: &str) -> Result<(), String> {
    match sys.unlink(path) {
        Err(Errno::ISDIR) => remove_tree(sys, path, MAX_DEPTH),
        other => other.map_err(|errno| format!("can't remove '{path}': {}", errno_text(errno))),
    }
}

pub(super) fn cp(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "rRapf", out).filter(|it| it.at_least(2, out)) else {
        return 1;
    };
    let keep = parsed.has('a') || parsed.has('p');
    let recursive = keep && parsed.has('a') || parsed.has('r') || parsed.has('R');
    let work = |sys: &mut Syscalls<'_>, source: &str, target: &str| {
        let stat = sys.stat(source, !recursive);
        let stat = stat.map_err(|errno| format!("can't stat '{source}': {}", errno_text(errno)))?;
        if stat.kind == EntryKind::Directory {
            if !recursive {
                return Err(format!("omitting directory '{source}'"));
            }
            let inside = format!("{}/", target.trim_end_matches('/'));
            if inside.starts_with(&format!("{}/", source.trim_end_matches('/'))) {
                return Err(format!("recursion detected, omitting directory '{source}'"));
            }
        }
        copy_tree(sys, source, target, keep, MAX_DEPTH)
    };
    each_pair(sys, parsed, work, out)
}

/// Copies a file, or a directory with all it holds.
fn copy_tree(
    sys: &mut Syscalls<'_>,
    source: &str,
    target: &str,
    keep: bool,
    depth: u32,
) -> Result<(), String> {
    let stat = sys.stat(source, false);
    let mut stat = stat.map_err(|errno| format!("can't stat '{source}': {}", errno_text(errno)))?;
    let created = |errno| format!("can't create '{target}': {}", errno_text(errno));
    match stat.kind {
        EntryKind::Directory if depth == 0 => return Err(created(Errno::NAMETOOLONG)),
        EntryKind::Directory => {
            if !is_dir(sys, target) {
                sys.mkdir(target, stat.mode | 0o700).map_err(|errno| {
                    format!("can't create directory '{target}': {}", errno_text(errno))
                })?;
            }
            let listed = sys.read_dir(source);
            let listed =
                listed.map_err(|errno| format!("can't open '{source}': {}", errno_text(errno)))?;
            for (name, _) in listed {
                copy_tree(sys, &join(source, &name), &join(target, &name), keep, depth - 1)?;
            }
        }
        EntryKind::Symlink if depth < MAX_DEPTH || keep => {
            let to = sys.read_link(source).map_err(created)?;
            match sys.unlink(target) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(created(errno)),
            }
            return sys.symlink(&to, target).map_err(created);
        }
        _ => {
            stat = sys
                .stat(source, true)
                .map_err(|errno| format!("can't stat '{source}': {}", errno_text(errno)))?;
            if stat.kind == EntryKind::Directory {
                return Err(format!("omitting directory '{source}'"));
            }
            copy_file(sys, source, target, stat.mode)?;
        }
    }
    if keep { keep_attributes(sys, target, &stat).map_err(created) } else { Ok(()) }
}

fn keep_attributes(sys: &mut Syscalls<'_>, target: &str, stat: &StatEntry) -> SysResult<()> {
    if sys.uid() == 0 {
        sys.chown(target, Some(stat.uid), Some(stat.gid))?;
    }
    sys.chmod(target, stat.mode)
}

fn copy_file(sys: &mut Syscalls<'_>, source: &str, target: &str, mode: u32) -> Result<(), String> {
    let read = OpenFlags { read: true, ..OpenFlags::default() };
    let from = sys
        .open(source, read, 0)
        .map_err(|errno| format!("can't open '{source}': {}", errno_text(errno)))?;
    let write = OpenFlags { write: true, create: true, truncate: true, ..OpenFlags::default() };
    let result = match sys.open(target, write, mode & 0o777) {
        Err(errno) => Err(format!("can't create '{target}': {}", errno_text(errno))),
        Ok(to) => {
            let copied = pump(sys, from, to);
            let closed = sys.close(to);
            copied
                .map_err(|errno| format!("write error: {}", errno_text(errno)))
                .and(closed.map_err(errno_text))
        }
    };
    let closed = sys.close(from).map_err(errno_text);
    result.and(closed)
}

fn pump(sys: &mut Syscalls<'_>, from: u32, to: u32) -> SysResult<()> {
    loop {
        let mut bytes = sys.read(from, COPY_CHUNK)?;
        if bytes.is_empty() {
            return Ok(());
        }
        while !bytes.is_empty() {
            let taken = sys.write(to, bytes.clone())?;
            bytes = bytes.slice(taken..);
        }
    }
}

pub(super) fn ln(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(mut parsed) = Parsed::read(argv, "sfn", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    if parsed.rest.len() == 1 {
        parsed.rest.push(".".to_owned());
    }
    let (symbolic, force) = (parsed.has('s'), parsed.has('f'));
    let work = |sys: &mut Syscalls<'_>, source: &str, target: &str| {
        if force {
            match sys.unlink(target) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(plain(target)(errno)),
            }
        }
        let made = if symbolic { sys.symlink(source, target) } else { sys.link(source, target) };
        made.map_err(|errno| {
            let named = if errno == Errno::NOENT && !symbolic { source } else { target };
            plain(named)(errno)
        })
    };
    each_pair(sys, parsed, work, out)
}

pub(super) fn touch(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "c", out).filter(|it| it.at_least(1, out)) else {
        return 1;
    };
    let flags = OpenFlags { write: true, create: true, ..OpenFlags::default() };
    let work = |path: &str| match sys.touch(path) {
        Err(Errno::NOENT) if parsed.has('c') => Ok(()),
        Err(Errno::NOENT) => {
            let made = sys.open(path, flags, 0o666).and_then(|fd| sys.close(fd));
            made.map_err(plain(path))
        }
        other => other.map_err(plain(path)),
    };
    each(&parsed, work, out)
}

pub(super) fn chmod(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    // A mode such as -x is no option.
    let (recursive, argv) = match argv.get(1).map(String::as_str) {
        Some("-R") => (true, &argv[1..]),
        _ => (false, argv),
    };
    let [_, mode, paths @ ..] = argv else {
        out.error("missing operand");
        return 1;
    };
    if paths.is_empty() {
        out.error("missing operand");
        return 1;
    }
    if apply_mode(0, mode).is_none() {
        out.error(&format!("invalid mode '{mode}'"));
        return 1;
    }
    let mut code = 0;
    let mut queue: Vec<String> = paths.iter().rev().cloned().collect();
    while let Some(path) = queue.pop() {
        let changed = sys.stat(&path, true).and_then(|stat| {
            sys.chmod(&path, apply_mode(stat.mode, mode).unwrap_or(stat.mode))?;
            if recursive && stat.kind == EntryKind::Directory {
                let names = sys.read_dir(&path)?.into_iter().rev();
                let inner = names.filter(|(_, kind)| *kind != EntryKind::Symlink);
                queue.extend(inner.map(|(name, _)| join(&path, &name)));
            }
            Ok(())
        });
        if let Err(errno) = changed {
            out.error(&plain(&path)(errno));
            code = 1;
        }
    }
    code
}

/// Applies a mode in octal, or such as `u+x,go=r`; `None` where it is none.
fn apply_mode(old: u32, text: &str) -> Option<u32> {
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        return u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
    }
    let mut mode = old;
    for clause in text.split(',') {
        let at = clause.find(['+', '-', '='])?;
        let (mut who, operator) = (0, clause.as_bytes()[at]);
        for letter in clause[..at].chars() {
            who |= match letter {
                'u' => 0o700,
                'g' => 0o070,
                'o' => 0o007,
                'a' => 0o777,
                _ => return None,
            };
        }
        // Without a class the mask applies.
        let who = if who == 0 { if operator == b'-' { 0o777 } else { 0o755 } } else { who };
        let mut bits = 0;
        for letter in clause[at + 1..].chars() {
            bits |= match letter {
                'r' => 0o444,
                'w' => 0o222,
                'x' => 0o111,
                _ => return None,
            };
        }
        mode = match operator {
            b'+' => mode | bits & who,
            b'-' => mode & !(bits & who),
            _ => mode & !who | bits & who,
        };
    }
    Some(mode)
}

pub(super) fn chown(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(mut parsed) = Parsed::read(argv, "R", out).filter(|it| it.at_least(2, out)) else {
        return 1;
    };
    let owner = parsed.rest.remove(0);
    let (user, group) = match owner.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (owner.as_str(), None),
    };
    let user_ids = match user {
        "" => None,
        name => match system::user_ids(sys, name) {
            Some(ids) => Some(ids),
            None => {
                out.error(&format!("unknown user {name}"));
                return 1;
            }
        },
    };
    let gid = match group {
        None => None,
        Some("") => user_ids.map(|(_, gid)| gid),
        Some(name) => match system::group_id(sys, name) {
            Some(gid) => Some(gid),
            None => {
                out.error(&format!("unknown group {name}"));
                return 1;
            }
        },
    };
    let uid = user_ids.map(|(uid, _)| uid);
    let mut code = 0;
    let mut queue: Vec<String> = parsed.rest.iter().rev().cloned().collect();
    while let Some(path) = queue.pop() {
        let mut changed = sys.chown(&path, uid, gid);
        let is_dir = sys.stat(&path, false).is_ok_and(|stat| stat.kind == EntryKind::Directory);
        if changed.is_ok() && parsed.has('R') && is_dir {
            changed = sys.read_dir(&path).map(|names| {
                queue.extend(names.into_iter().rev().map(|(name, _)| join(&path, &name)));
            });
        }
        if let Err(errno) = changed {
            out.error(&plain(&path)(errno));
            code = 1;
        }
    }
    code
}

pub(super) fn mktemp(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "dp:", out) else { return 1 };
    let dir = parsed.value('p').map(str::to_owned).or_else(|| sys.getenv("TMPDIR"));
    let dir = dir.unwrap_or_else(|| "/tmp".to_owned());
    let template = match parsed.rest.first() {
        Some(template) if parsed.value('p').is_some() => join(&dir, template),
        Some(template) => template.clone(),
        None => join(&dir, "tmp.XXXXXX"),
    };
    let Some(stem) = template.strip_suffix("XXXXXX") else {
        out.error(&format!("{template}: {}", errno_text(Errno::INVAL)));
        return 1;
    };
    const LETTERS: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    for _ in 0..100 {
        let mut random = [0; 6];
        sys.urandom(&mut random);
        let name = random.map(|byte| char::from(LETTERS[usize::from(byte) % LETTERS.len()]));
        let path = format!("{stem}{}", name.iter().collect::<String>());
        let flags =
            OpenFlags { write: true, create: true, exclusive: true, ..OpenFlags::default() };
        let made = if parsed.has('d') {
            sys.mkdir(&path, 0o700)
        } else {
            sys.open(&path, flags, 0o600).and_then(|fd| sys.close(fd))
        };
        match made {
            Ok(()) => {
                out.line(&path);
                return 0;
            }
            Err(Errno::EXIST) => {}
            Err(errno) => {
                out.error(&plain(&template)(errno));
                return 1;
            }
        }
    }
    out.error(&plain(&template)(Errno::EXIST));
    1
}
