//! Commands that make text, and the texts of errors.

use super::{super::syscalls::Syscalls, Out, unescape};
use bytes::{Bytes, BytesMut};
use std::time::Duration;
use vm_guest_agent::os::Errno;

/// Gives an error's text as the C library does.
pub(in super::super) fn errno_text(errno: Errno) -> String {
    let text = match errno.0 {
        1 => "Operation not permitted",
        2 => "No such file or directory",
        3 => "No such process",
        4 => "Interrupted system call",
        5 => "I/O error",
        6 => "No such device or address",
        7 => "Argument list too long",
        8 => "Exec format error",
        9 => "Bad file descriptor",
        10 => "No child process",
        11 => "Resource temporarily unavailable",
        12 => "Out of memory",
        13 => "Permission denied",
        16 => "Resource busy",
        17 => "File exists",
        18 => "Cross-device link",
        20 => "Not a directory",
        21 => "Is a directory",
        22 => "Invalid argument",
        23 => "Too many open files in system",
        24 => "No file descriptors available",
        25 => "Not a tty",
        27 => "File too large",
        28 => "No space left on device",
        29 => "Invalid seek",
        30 => "Read-only file system",
        31 => "Too many links",
        32 => "Broken pipe",
        36 => "Filename too long",
        38 => "Function not implemented",
        39 => "Directory not empty",
        40 => "Symbolic link loop",
        88 => "Socket operation on non-socket",
        98 => "Address in use",
        104 => "Connection reset by peer",
        number => return format!("Unknown error {number}"),
    };
    text.to_owned()
}

pub(super) fn echo(_: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let mut words = argv.get(1..).unwrap_or_default();
    let (mut newline, mut escapes) = (true, false);
    while let Some(letters) = words.first().and_then(|word| word.strip_prefix('-')) {
        if letters.is_empty() || !letters.chars().all(|c| matches!(c, 'n' | 'e' | 'E')) {
            break;
        }
        for letter in letters.chars() {
            match letter {
                'n' => newline = false,
                other => escapes = other == 'e',
            }
        }
        words = &words[1..];
    }
    for (index, word) in words.iter().enumerate() {
        if index > 0 {
            out.put(b" ");
        }
        if escapes {
            let (bytes, stop) = unescape(word, true);
            out.put(&bytes);
            if stop {
                return 0;
            }
        } else {
            out.put(word.as_bytes());
        }
    }
    if newline {
        out.put(b"\n");
    }
    0
}

pub(super) fn seq(_: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let mut numbers = Vec::new();
    for word in argv.iter().skip(1) {
        let Ok(number) = word.parse::<i64>() else {
            out.error(&format!("invalid number '{word}'"));
            return 1;
        };
        numbers.push(number);
    }
    let (first, step, last) = match numbers[..] {
        [last] => (1, 1, last),
        [first, last] => (first, 1, last),
        [first, step, last] => (first, step, last),
        _ => {
            out.error("missing operand");
            return 1;
        }
    };
    if step == 0 {
        out.error("zero increment");
        return 1;
    }
    let mut number = first;
    while if step > 0 { number <= last } else { number >= last } {
        out.line(&number.to_string());
        let Some(next) = number.checked_add(step) else { break };
        number = next;
    }
    0
}

/// Adds the times of `sleep` up.
pub(super) fn sleep_time(argv: &[String], out: &mut Out) -> Option<Duration> {
    let words = argv.get(1..).filter(|words| !words.is_empty());
    let Some(words) = words else {
        out.error("missing operand");
        return None;
    };
    let mut total = Duration::ZERO;
    for word in words {
        let digits = word.trim_end_matches(['s', 'm', 'h', 'd']);
        let unit = match &word[digits.len()..] {
            "" | "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => f64::NAN,
        };
        let plain = digits.chars().all(|c| c.is_ascii_digit() || c == '.');
        let time = digits.parse::<f64>().ok().filter(|_| plain);
        let time = time.and_then(|time| Duration::try_from_secs_f64(time * unit).ok());
        let Some(time) = time else {
            out.error(&format!("invalid number '{word}'"));
            return None;
        };
        total = total.saturating_add(time);
    }
    Some(total)
}

/// Gives what `yes` writes over and over, in whole lines.
pub(super) fn yes_block(argv: &[String]) -> Bytes {
    let mut line = match argv.get(1..) {
        Some(words) if !words.is_empty() => words.join(" "),
        _ => "y".to_owned(),
    };
    line.push('\n');
    let mut block = BytesMut::new();
    while block.len() + line.len() <= 4096 || block.is_empty() {
        block.extend_from_slice(line.as_bytes());
    }
    block.freeze()
}
