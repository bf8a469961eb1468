//! `printf` and escape sequences.

use super::{super::syscalls::Syscalls, Out};

/// Carries out escape sequences; the second value says that output ends here. In the text of `echo` and `%b` an
/// octal number begins with a zero.
pub(super) fn unescape(text: &str, leading_zero: bool) -> (Vec<u8>, bool) {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        at += 1;
        if *byte != b'\\' {
            out.push(*byte);
            continue;
        }
        let Some(letter) = bytes.get(at) else {
            out.push(b'\\');
            break;
        };
        at += 1;
        match letter {
            b'a' => out.push(7),
            b'b' => out.push(8),
            b'c' => return (out, true),
            b'e' => out.push(27),
            b'f' => out.push(12),
            b'n' => out.push(b'\n'),
            b'r' => out.push(b'\r'),
            b't' => out.push(b'\t'),
            b'v' => out.push(11),
            b'\\' => out.push(b'\\'),
            b'x' => {
                let (value, used) = digits(&bytes[at..], 16, 2);
                if used == 0 {
                    out.extend_from_slice(b"\\x");
                } else {
                    out.push(value);
                }
                at += used;
            }
            b'0'..=b'7' => {
                let from = if leading_zero && *letter == b'0' { at } else { at - 1 };
                let (value, used) = digits(&bytes[from..], 8, 3);
                out.push(value);
                at = from + used;
            }
            other => out.extend_from_slice(&[b'\\', *other]),
        }
    }
    (out, false)
}

fn digits(bytes: &[u8], radix: u32, most: usize) -> (u8, usize) {
    let (mut value, mut used) = (0_u32, 0);
    while let Some(digit) =
        bytes.get(used).filter(|_| used < most).and_then(|byte| char::from(*byte).to_digit(radix))
    {
        value = value * radix + digit;
        used += 1;
    }
    (u8::try_from(value & 0xff).unwrap_or(0), used)
}

pub(super) fn printf(_: &mut Syscalls<'_>, argv: &[String], out: &mut Out) -> u8 {
    let mut words = argv.iter().skip(1).skip_while(|word| *word == "--");
    let Some(format) = words.next() else {
        out.error("missing operand");
        return 1;
    };
    let mut printer = Printer { words: words.map(String::as_str).collect(), at: 0, code: 0 };
    loop {
        let before = printer.at;
        if printer.pass(format, out) || printer.at >= printer.words.len() || printer.at == before {
            return printer.code;
        }
    }
}

struct Printer<'a> {
    words: Vec<&'a str>,
    at: usize,
    code: u8,
}

/// The parts of a conversion between `%` and its letter.
#[derive(Default)]
struct Conversion {
    left: bool,
    zero: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    width: usize,
    precision: Option<usize>,
}

/// The widest field.
const MAX_WIDTH: usize = 1 << 16;

impl Printer<'_> {
    /// Goes through the format once, and says whether output ends.
    fn pass(&mut self, format: &str, out: &mut Out) -> bool {
        let mut rest = format;
        while let Some(start) = rest.find('%') {
            let (bytes, stop) = unescape(&rest[..start], false);
            out.put(&bytes);
            if stop {
                return true;
            }
            rest = &rest[start + 1..];
            if let Some(after) = rest.strip_prefix('%') {
                out.put(b"%");
                rest = after;
                continue;
            }
            let conversion = self.conversion(&mut rest);
            let Some(letter) = rest.chars().next() else {
                out.error("%: invalid format");
                self.code = 1;
                return true;
            };
            rest = &rest[letter.len_utf8()..];
            if self.convert(&conversion, letter, out) {
                return true;
            }
        }
        let (bytes, stop) = unescape(rest, false);
        out.put(&bytes);
        stop
    }

    fn conversion(&mut self, rest: &mut &str) -> Conversion {
        let mut it = Conversion::default();
        while let Some(flag) = rest.chars().next().filter(|c| "-0+ #".contains(*c)) {
            match flag {
                '-' => it.left = true,
                '0' => it.zero = true,
                '+' => it.plus = true,
                ' ' => it.space = true,
                _ => it.alternate = true,
            }
            *rest = &rest[1..];
        }
        it.width = self.number(rest).unwrap_or(0);
        if let Some(after) = rest.strip_prefix('.') {
            *rest = after;
            it.precision = Some(self.number(rest).unwrap_or(0));
        }
        it
    }

    fn number(&mut self, rest: &mut &str) -> Option<usize> {
        if let Some(after) = rest.strip_prefix('*') {
            *rest = after;
            return self.word().parse().ok().map(|width: usize| width.min(MAX_WIDTH));
        }
        let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let number = rest[..end].parse().ok().map(|width: usize| width.min(MAX_WIDTH));
        *rest = &rest[end..];
        number
    }

    fn word(&mut self) -> &str {
        self.at += 1;
        self.words.get(self.at - 1).copied().unwrap_or("")
    }

    fn convert(&mut self, it: &Conversion, letter: char, out: &mut Out) -> bool {
        match letter {
            's' => {
                let bytes = self.word().as_bytes().to_vec();
                let kept = it.precision.unwrap_or(bytes.len()).min(bytes.len());
                pad(it, &bytes[..kept], out);
            }
            'b' => {
                let (bytes, stop) = unescape(self.word(), true);
                pad(it, &bytes, out);
                return stop;
            }
            'c' => {
                let first = self.word().as_bytes().first().copied();
                pad(it, first.as_slice(), out);
            }
            'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
                let number = self.integer(out);
                let text = integer_text(it, letter, number);
                pad(it, text.as_bytes(), out);
            }
            other => {
                out.error(&format!("%{other}: invalid format"));
                self.code = 1;
                return true;
            }
        }
        false
    }

    fn integer(&mut self, out: &mut Out) -> i64 {
        let word = self.word().to_owned();
        let text = word.trim_start();
        if text.is_empty() {
            return 0;
        }
        if let Some(quoted) = text.strip_prefix(['\'', '"']) {
            return quoted.chars().next().map_or(0, |c| i64::from(u32::from(c)));
        }
        let (sign, magnitude) = match text.strip_prefix('-') {
            Some(rest) => (-1, rest),
            None => (1, text.strip_prefix('+').unwrap_or(text)),
        };
        let (radix, digits) = match magnitude {
            hex if hex.starts_with("0x") || hex.starts_with("0X") => (16, &hex[2..]),
            octal if octal.len() > 1 && octal.starts_with('0') => (8, &octal[1..]),
            plain => (10, plain),
        };
        i64::from_str_radix(digits, radix).map(|number| sign * number).unwrap_or_else(|_| {
            out.error(&format!("invalid number '{word}'"));
            self.code = 1;
            0
        })
    }
}

fn integer_text(it: &Conversion, letter: char, number: i64) -> String {
    let (sign, mut digits) = match letter {
        'd' | 'i' => {
            let sign = match number {
                ..0 => "-",
                _ if it.plus => "+",
                _ if it.space => " ",
                _ => "",
            };
            (sign, number.unsigned_abs().to_string())
        }
        'x' => (if it.alternate && number != 0 { "0x" } else { "" }, format!("{number:x}")),
        'X' => (if it.alternate && number != 0 { "0X" } else { "" }, format!("{number:X}")),
        'o' => (if it.alternate { "0" } else { "" }, format!("{number:o}")),
        _ => ("", number.cast_unsigned().to_string()),
    };
    let least = match it.precision {
        Some(precision) => precision,
        None if it.zero && !it.left => it.width.saturating_sub(sign.len()),
        None => 1,
    };
    if digits.len() < least {
        digits.insert_str(0, &"0".repeat(least - digits.len()));
    }
    format!("{sign}{digits}")
}

fn pad(it: &Conversion, bytes: &[u8], out: &mut Out) {
    let spaces = " ".repeat(it.width.saturating_sub(bytes.len()));
    if !it.left {
        out.put(spaces.as_bytes());
    }
    out.put(bytes);
    if it.left {
        out.put(spaces.as_bytes());
    }
}
