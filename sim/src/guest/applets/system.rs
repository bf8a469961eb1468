//! Commands about users, the machine, the clock and processes.

use super::{
    super::{
        signals,
        syscalls::{FdStat, Syscalls},
    },
    Out, errno_text, look_up,
    options::Parsed,
};
use std::fmt::Write as _;
use vm_guest_agent::os::Errno;

/// Where programs are looked for when `PATH` is not set.
pub(in super::super) const DEFAULT_PATH: &str = "/bin:/usr/bin:/sbin";

/// Reads a file of users or groups into its lines' fields.
fn table(sys: &Syscalls<'_>, path: &str) -> Vec<Vec<String>> {
    let content = sys.peek_file(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&content);
    text.lines().map(|line| line.split(':').map(str::to_owned).collect()).collect()
}

pub(super) fn user_name(sys: &Syscalls<'_>, uid: u32) -> Option<String> {
    let uid = uid.to_string();
    let users = table(sys, "/etc/passwd");
    users.into_iter().find(|user| user.get(2) == Some(&uid)).map(|mut user| user.swap_remove(0))
}

pub(super) fn group_name(sys: &Syscalls<'_>, gid: u32) -> Option<String> {
    let gid = gid.to_string();
    let groups = table(sys, "/etc/group");
    groups.into_iter().find(|it| it.get(2) == Some(&gid)).map(|mut it| it.swap_remove(0))
}

/// Gives a user's ids, by name or number.
pub(super) fn user_ids(sys: &Syscalls<'_>, name: &str) -> Option<(u32, u32)> {
    let users = table(sys, "/etc/passwd");
    let user = users.iter().find(|user| user.first().is_some_and(|known| known == name));
    match user {
        Some(user) => Some((user.get(2)?.parse().ok()?, user.get(3)?.parse().ok()?)),
        None => name.parse().ok().map(|uid| (uid, uid)),
    }
}

pub(super) fn group_id(sys: &Syscalls<'_>, name: &str) -> Option<u32> {
    let groups = table(sys, "/etc/group");
    let group = groups.iter().find(|group| group.first().is_some_and(|known| known == name));
    match group {
        Some(group) => group.get(2)?.parse().ok(),
        None => name.parse().ok(),
    }
}

/// Runs a program in a changed environment; `None` when the process runs it now.
pub(super) fn env(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> Option<u8> {
    let mut env = sys.environment().to_vec();
    let mut words = argv.iter().skip(1).peekable();
    while let Some(word) = words.peek() {
        match word.as_str() {
            "-i" | "-" => env.clear(),
            "-u" => {
                words.next();
                let Some(name) = words.peek() else {
                    out.error("option requires an argument: u");
                    return Some(1);
                };
                env.retain(|(known, _)| known != *name);
            }
            "--" => {
                words.next();
                break;
            }
            word if word.starts_with('-') && word.len() > 1 => {
                out.error(&format!("unrecognized option: {}", &word[1..]));
                return Some(1);
            }
            _ => break,
        }
        words.next();
    }
    while let Some((name, value)) = words.peek().and_then(|word| word.split_once('=')) {
        match env.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => value.clone_into(old),
            None => env.push((name.to_owned(), value.to_owned())),
        }
        words.next();
    }
    let command: Vec<String> = words.cloned().collect();
    let Some(name) = command.first() else {
        for (name, value) in &env {
            out.line(&format!("{name}={value}"));
        }
        return Some(0);
    };
    let path = env.iter().find(|(known, _)| known == "PATH").map(|(_, path)| path.clone());
    let found = look_up(sys, name, path.as_deref().unwrap_or(DEFAULT_PATH));
    match found.and_then(|path| sys.exec(&path, &command, env)) {
        Ok(()) => None,
        Err(errno) => {
            out.error(&format!("can't execute '{name}': {}", errno_text(errno)));
            Some(if errno == Errno::NOENT { 127 } else { 126 })
        }
    }
}

pub(super) fn pwd(sys: &mut Syscalls<'_>, _: &[String], out: &mut Out) -> u8 {
    match sys.getcwd() {
        Ok(path) => {
            out.line(&path);
            0
        }
        Err(errno) => {
            out.error(&format!("getcwd: {}", errno_text(errno)));
            1
        }
    }
}

pub(super) fn id(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "ugnG", out) else { return 1 };
    let ids = match parsed.rest.first() {
        None => (sys.uid(), sys.gid()),
        Some(name) => match user_ids(sys, name) {
            Some(ids) => ids,
            None => {
                out.error(&format!("unknown user {name}"));
                return 1;
            }
        },
    };
    let user = || user_name(sys, ids.0);
    let group = || group_name(sys, ids.1);
    let text = match (parsed.has('u'), parsed.has('g') || parsed.has('G'), parsed.has('n')) {
        (true, _, false) => ids.0.to_string(),
        (true, _, true) => user().unwrap_or_else(|| ids.0.to_string()),
        (_, true, false) => ids.1.to_string(),
        (_, true, true) => group().unwrap_or_else(|| ids.1.to_string()),
        _ => {
            let named = |id: u32, name: Option<String>| match name {
                Some(name) => format!("{id}({name})"),
                None => id.to_string(),
            };
            let group = named(ids.1, group());
            format!("uid={} gid={group} groups={group}", named(ids.0, user()))
        }
    };
    out.line(&text);
    0
}

pub(super) fn whoami(sys: &mut Syscalls<'_>, _: &[String], out: &mut Out) -> u8 {
    let uid = sys.uid();
    match user_name(sys, uid) {
        Some(name) => {
            out.line(&name);
            0
        }
        None => {
            out.error(&format!("unknown uid {uid}"));
            1
        }
    }
}

pub(super) fn hostname(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(name) = argv.get(1) else {
        out.line(&sys.hostname());
        return 0;
    };
    match sys.set_hostname(name) {
        Ok(()) => 0,
        Err(errno) => {
            out.error(&format!("sethostname: {}", errno_text(errno)));
            1
        }
    }
}

pub(super) fn nproc(sys: &mut Syscalls<'_>, _: &[String], out: &mut Out) -> u8 {
    out.line(&sys.cpus().to_string());
    0
}

pub(super) fn uname(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "asnrvm", out) else { return 1 };
    let hostname = sys.hostname();
    let all = parsed.has('a');
    let fields =
        [('s', "Linux"), ('n', &hostname), ('r', "6.1.0-sim"), ('v', "#1"), ('m', "x86_64")];
    let mut shown: Vec<&str> =
        fields.iter().filter(|(letter, _)| all || parsed.has(*letter)).map(|it| it.1).collect();
    if shown.is_empty() {
        shown.push("Linux");
    }
    out.line(&shown.join(" "));
    0
}

pub(super) fn sync(sys: &mut Syscalls<'_>, _: &[String], _: &mut Out) -> u8 {
    sys.sync_all();
    0
}

pub(super) fn halt(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "fnd:", out) else { return 1 };
    if sys.uid() != 0 {
        out.error(&errno_text(Errno::PERM));
        return 1;
    }
    if !parsed.has('n') {
        sys.sync_all();
    }
    let is_reboot = argv.first().is_some_and(|name| name.ends_with("reboot"));
    let done = if is_reboot { sys.reboot() } else { sys.power_off() };
    u8::from(done.is_err())
}

pub(super) fn tty(sys: &mut Syscalls<'_>, _: &[String], out: &mut Out) -> u8 {
    let is_terminal = sys.fstat(0) == Ok(FdStat::Terminal);
    out.line(if is_terminal { "/dev/tty" } else { "not a tty" });
    u8::from(!is_terminal)
}

pub(super) fn stty(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    match (argv.get(1).map(String::as_str), sys.terminal_size(0)) {
        (Some("size"), Ok((rows, cols))) => {
            out.line(&format!("{rows} {cols}"));
            0
        }
        (Some("size"), Err(errno)) => {
            out.error(&format!("standard input: {}", errno_text(errno)));
            1
        }
        (argument, _) => {
            out.error(&format!("invalid argument '{}'", argument.unwrap_or("")));
            1
        }
    }
}

pub(in super::super) fn kill(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let mut words = argv.iter().skip(1).map(String::as_str).peekable();
    let mut signal = signals::TERM;
    match words.peek().copied() {
        Some("-l") => {
            for (name, number) in signals::NAMES {
                out.line(&format!("{number:2}) {name}"));
            }
            return 0;
        }
        Some("-s") => {
            words.next();
            let name = words.next().unwrap_or("");
            let Some(number) = signals::parse(name) else {
                out.error(&format!("bad signal name '{name}'"));
                return 1;
            };
            signal = number;
        }
        Some("--") => {
            words.next();
        }
        Some(word) if word.starts_with('-') => {
            let name = &word[1..];
            let Some(number) = signals::parse(name) else {
                out.error(&format!("bad signal name '{name}'"));
                return 1;
            };
            signal = number;
            words.next();
            if words.peek() == Some(&"--") {
                words.next();
            }
        }
        _ => {}
    }
    if words.peek().is_none() {
        out.error("you need to specify whom to kill");
        return 1;
    }
    let mut code = 0;
    for word in words {
        let Ok(pid) = word.parse::<i64>() else {
            out.error(&format!("invalid number '{word}'"));
            code = 1;
            continue;
        };
        if let Err(errno) = sys.kill(pid, signal) {
            out.error(&format!("can't kill pid {pid}: {}", errno_text(errno)));
            code = 1;
        }
    }
    code
}

pub(super) fn date(sys: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let Some(parsed) = Parsed::read(argv, "u", out) else { return 1 };
    let format = match parsed.rest.first().map(|word| word.strip_prefix('+').ok_or(word)) {
        None => "%a %b %e %H:%M:%S UTC %Y",
        Some(Ok(format)) => format,
        Some(Err(word)) => {
            out.error(&format!("invalid date '{word}'"));
            return 1;
        }
    };
    let now = u64::try_from(sys.wall_clock().as_nanos()).unwrap_or(u64::MAX);
    match format_date(now, format) {
        Ok(text) => {
            out.line(&text);
            0
        }
        Err(letter) => {
            out.error(&format!("unsupported format: %{letter}"));
            1
        }
    }
}

/// Writes a time as `strftime` does, in UTC; the error is a conversion that is not known.
pub(super) fn format_date(ns: u64, format: &str) -> Result<String, char> {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let seconds = ns / 1_000_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let (mut text, mut letters) = (String::new(), format.chars());
    while let Some(letter) = letters.next() {
        if letter != '%' {
            text.push(letter);
            continue;
        }
        let written = match letters.next().unwrap_or('%') {
            's' => write!(text, "{seconds}"),
            'N' => write!(text, "{:09}", ns % 1_000_000_000),
            'Y' => write!(text, "{year}"),
            'm' => write!(text, "{month:02}"),
            'd' => write!(text, "{day:02}"),
            'e' => write!(text, "{day:2}"),
            'H' => write!(text, "{hour:02}"),
            'M' => write!(text, "{minute:02}"),
            'S' => write!(text, "{second:02}"),
            'F' => write!(text, "{year}-{month:02}-{day:02}"),
            'T' => write!(text, "{hour:02}:{minute:02}:{second:02}"),
            'Z' => write!(text, "UTC"),
            'z' => write!(text, "+0000"),
            'a' => write!(text, "{}", DAYS[usize::try_from(days % 7).unwrap_or(0)]),
            'b' => {
                let index = usize::try_from(month.saturating_sub(1)).unwrap_or(0);
                write!(text, "{}", MONTHS.get(index).copied().unwrap_or(""))
            }
            'n' => writeln!(text),
            '%' => write!(text, "%"),
            other => return Err(other),
        };
        debug_assert!(written.is_ok(), "writing to a string does not fail");
    }
    Ok(text)
}

/// Gives the Gregorian year, month and day of a day since the epoch.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that leap days come last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}
