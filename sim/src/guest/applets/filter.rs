//! Commands that read input from their start to their end: `cat`, `head`, `tail`, `wc`, `tr`, `tee`, `sort`, `cksum`.

use super::{
    super::{
        program::{Step, WaitFor},
        syscalls::{OpenFlags, READ, Syscalls},
    },
    Flush, Out, errno_text,
    options::{self, Parsed},
};
use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vm_guest_agent::os::Errno;

pub(super) const NAMES: [&str; 8] = ["cat", "head", "tail", "wc", "tr", "tee", "sort", "cksum"];
const CHUNK: usize = 64 << 10;

/// A filter in the middle of its input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) struct Filter {
    name: String,
    files: VecDeque<String>,
    /// More than one file was given, so that titles are shown.
    many: bool,
    current: Option<Input>,
    kind: Kind,
    out: Out,
    code: u8,
    done: bool,
    failed_open: u8,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Input {
    name: String,
    fd: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Kind {
    Cat,
    Head { lines: bool, count: u64, left: u64, first: bool },
    Tail { lines: bool, count: u64, from_start: bool, kept: BytesMut, first: bool },
    Wc { shown: [bool; 3], counts: [u64; 3], in_word: bool, totals: [u64; 3], files: u32 },
    Tr(Translation),
    Tee { outputs: Vec<u32> },
    Sort { text: BytesMut, numeric: bool, reverse: bool, unique: bool },
    Cksum { crc: u32, len: u64 },
}

/// What `tr` does with each byte.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Translation {
    /// What a byte becomes; `None` where it is deleted.
    map: Vec<Option<u8>>,
    squeezed: Vec<bool>,
    last: Option<u8>,
}

impl Filter {
    /// Reads the command line; the error is the exit code.
    pub(super) fn start(
        sys: &mut Syscalls<'_>,
        name: &str,
        argv: &[String],
        out: &mut Out,
    ) -> Result<Self, u8> {
        let known = match name {
            "head" | "tail" => "n:c:q",
            "wc" => "lwc",
            "tee" => "a",
            "tr" => "dscC",
            "sort" => "nru",
            "cat" => "u",
            _ => "",
        };
        // `head -3` is an old form of `head -n 3`.
        let mut argv = argv.to_vec();
        if matches!(name, "head" | "tail")
            && let Some(count) = argv.get(1).and_then(|word| word.strip_prefix('-'))
            && !count.is_empty()
            && count.chars().all(|c| c.is_ascii_digit())
        {
            argv.splice(1..2, ["-n".to_owned(), count.to_owned()]);
        }
        let usage = if name == "sort" { 2 } else { 1 };
        let mut parsed = Parsed::read(&argv, known, out).ok_or(usage)?;
        let mut code = 0;
        let kind = Self::kind(sys, name, &mut parsed, out, &mut code)?;
        let is_quiet = parsed.has('q');
        let mut files: VecDeque<_> = parsed.rest.into();
        let many = files.len() > 1 && !is_quiet;
        if files.is_empty() {
            files.push_back(if name == "wc" { String::new() } else { "-".to_owned() });
        }
        Ok(Self {
            name: name.to_owned(),
            files,
            many,
            current: None,
            kind,
            out: std::mem::take(out),
            code,
            done: false,
            failed_open: usage,
        })
    }

    fn kind(
        sys: &mut Syscalls<'_>,
        name: &str,
        parsed: &mut Parsed,
        out: &mut Out,
        code: &mut u8,
    ) -> Result<Kind, u8> {
        let count = |out: &mut Out| -> Result<(bool, u64, bool), u8> {
            let lines = !parsed.has('c');
            let text = parsed.value(if lines { 'n' } else { 'c' }).unwrap_or("10");
            let (from_start, digits) = match text.strip_prefix('+') {
                Some(digits) => (true, digits),
                None => (false, text.strip_prefix('-').unwrap_or(text)),
            };
            match options::size(digits) {
                Some(count) => Ok((lines, count, from_start)),
                None => {
                    out.error(&format!("invalid number '{text}'"));
                    Err(1)
                }
            }
        };
        Ok(match name {
            "head" => {
                let (lines, count, _) = count(out)?;
                Kind::Head { lines, count, left: count, first: true }
            }
            "tail" => {
                let (lines, count, from_start) = count(out)?;
                Kind::Tail { lines, count, from_start, kept: BytesMut::new(), first: true }
            }
            "wc" => {
                let mut shown = [parsed.has('l'), parsed.has('w'), parsed.has('c')];
                if shown == [false; 3] {
                    shown = [true; 3];
                }
                Kind::Wc { shown, counts: [0; 3], in_word: false, totals: [0; 3], files: 0 }
            }
            "tr" => {
                let translation = Translation::read(parsed, out)?;
                parsed.rest.clear();
                Kind::Tr(translation)
            }
            "tee" => {
                let mut outputs = vec![1];
                let append = parsed.has('a');
                let flags = OpenFlags {
                    write: true,
                    create: true,
                    append,
                    truncate: !append,
                    ..OpenFlags::default()
                };
                for path in std::mem::take(&mut parsed.rest) {
                    match sys.open(&path, flags, 0o666) {
                        Ok(fd) => outputs.push(fd),
                        Err(errno) => {
                            out.error(&format!("{path}: {}", errno_text(errno)));
                            *code = 1;
                        }
                    }
                }
                Kind::Tee { outputs }
            }
            "sort" => Kind::Sort {
                text: BytesMut::new(),
                numeric: parsed.has('n'),
                reverse: parsed.has('r'),
                unique: parsed.has('u'),
            },
            "cksum" => Kind::Cksum { crc: 0, len: 0 },
            _ => Kind::Cat,
        })
    }

    pub(super) fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        match self.out.flush(sys) {
            Flush::Done => {}
            Flush::Wait(wait) => return Step::Block(wait),
            Flush::Failed => {
                (self.done, self.code) = (true, 1);
                return Step::Continue;
            }
        }
        if self.done {
            return Step::Exit(self.code);
        }
        let Some(input) = &self.current else {
            self.next_file(sys);
            return Step::Continue;
        };
        match sys.read(input.fd, CHUNK) {
            Ok(bytes) if bytes.is_empty() => self.end_file(sys),
            Ok(bytes) => {
                if self.chunk(bytes) {
                    self.end_file(sys);
                }
            }
            Err(Errno::AGAIN) => return Step::Block(WaitFor::readable(input.fd)),
            Err(errno) => {
                let named = if self.name == "cat" { "read error" } else { input.name.as_str() };
                self.out.error(&format!("{named}: {}", errno_text(errno)));
                self.code = self.failed_open;
                self.end_file(sys);
            }
        }
        Step::Continue
    }

    fn next_file(&mut self, sys: &mut Syscalls<'_>) {
        let Some(name) = self.files.pop_front() else {
            self.end();
            self.done = true;
            return;
        };
        let opened =
            if matches!(name.as_str(), "" | "-") { Ok(0) } else { sys.open(&name, READ, 0) };
        match opened {
            Ok(fd) => {
                self.begin_file(&name);
                self.current = Some(Input { name, fd });
            }
            Err(errno) => {
                let text = errno_text(errno);
                let message = match self.name.as_str() {
                    "head" | "wc" => format!("{name}: {text}"),
                    _ => format!("can't open '{name}': {text}"),
                };
                self.out.error(&message);
                self.code = self.failed_open;
                if self.name == "sort" {
                    self.done = true;
                }
            }
        }
    }

    fn begin_file(&mut self, name: &str) {
        match &mut self.kind {
            Kind::Head { count, left, first, .. } => {
                *left = *count;
                if self.many {
                    title(&mut self.out, name, first);
                }
            }
            Kind::Tail { first, .. } if self.many => title(&mut self.out, name, first),
            _ => {}
        }
    }

    /// Takes a piece of input in, and says whether the rest of the file is not wanted.
    fn chunk(&mut self, bytes: Bytes) -> bool {
        match &mut self.kind {
            Kind::Cat => self.out.pass(1, bytes),
            Kind::Head { lines, left, .. } => {
                let end = head_end(&bytes, *lines, left);
                self.out.pass(1, bytes.slice(..end));
                return *left == 0;
            }
            Kind::Tail { lines, count, from_start, kept, .. } => {
                kept.extend_from_slice(&bytes);
                if !*from_start {
                    let start = tail_start(kept, *lines, *count);
                    bytes::Buf::advance(kept, start);
                }
            }
            Kind::Wc { counts, in_word, .. } => {
                counts[2] += bytes.len() as u64;
                for byte in &bytes {
                    counts[0] += u64::from(*byte == b'\n');
                    let space = byte.is_ascii_whitespace() || *byte == 11;
                    counts[1] += u64::from(*in_word && space);
                    *in_word = !space;
                }
            }
            Kind::Tr(translation) => {
                let changed = translation.apply(&bytes);
                self.out.pass(1, changed);
            }
            Kind::Tee { outputs } => {
                outputs.iter().for_each(|fd| self.out.pass(*fd, bytes.clone()));
            }
            Kind::Sort { text, .. } => text.extend_from_slice(&bytes),
            Kind::Cksum { crc, len } => {
                *crc = bytes.iter().fold(*crc, |crc, byte| crc_step(crc, *byte));
                *len += bytes.len() as u64;
            }
        }
        false
    }

    fn end_file(&mut self, sys: &mut Syscalls<'_>) {
        let Some(input) = self.current.take() else { return };
        if input.fd != 0 {
            // The descriptor is this filter's own and open.
            let closed = sys.close(input.fd);
            debug_assert!(closed.is_ok(), "an open descriptor closes");
        }
        match &mut self.kind {
            Kind::Tail { lines, count, from_start, kept, .. } => {
                let mut rest = std::mem::take(kept);
                if *from_start {
                    let mut left = count.saturating_sub(1);
                    let skipped = head_end(&rest, *lines, &mut left);
                    bytes::Buf::advance(&mut rest, skipped);
                }
                self.out.pass(1, rest.freeze());
            }
            Kind::Wc { shown, counts, in_word, totals, files } => {
                counts[1] += u64::from(std::mem::take(in_word));
                *files += 1;
                for (total, count) in totals.iter_mut().zip(*counts) {
                    *total += count;
                }
                let text = wc_line(shown, &std::mem::take(counts), &input.name);
                self.out.line(&text);
            }
            Kind::Sort { text, .. } if text.last().is_some_and(|byte| *byte != b'\n') => {
                text.extend_from_slice(b"\n");
            }
            Kind::Cksum { crc, len } => {
                let (mut sum, mut rest) = (std::mem::take(crc), *len);
                while rest != 0 {
                    sum = crc_step(sum, u8::try_from(rest & 0xff).unwrap_or(0));
                    rest >>= 8;
                }
                let name = if input.name == "-" { "" } else { &input.name };
                let line = format!("{} {} {name}", !sum, std::mem::take(len));
                self.out.line(line.trim_end());
            }
            _ => {}
        }
    }

    fn end(&mut self) {
        match &mut self.kind {
            Kind::Wc { shown, totals, files, .. } if *files > 1 => {
                let text = wc_line(shown, totals, "total");
                self.out.line(&text);
            }
            Kind::Sort { text, numeric, reverse, unique } => {
                let mut lines: Vec<&[u8]> = text[..].split(|byte| *byte == b'\n').collect();
                lines.pop();
                if *numeric {
                    lines.sort_by(|a, b| leading_number(a).cmp(&leading_number(b)).then(a.cmp(b)));
                } else {
                    lines.sort_unstable();
                }
                if *unique && *numeric {
                    lines.dedup_by_key(|line| leading_number(line));
                } else if *unique {
                    lines.dedup();
                }
                if *reverse {
                    lines.reverse();
                }
                for line in lines {
                    self.out.put(line);
                    self.out.put(b"\n");
                }
            }
            _ => {}
        }
    }
}

fn title(out: &mut Out, name: &str, first: &mut bool) {
    let gap = if std::mem::take(first) { "" } else { "\n" };
    let name = if name == "-" { "standard input" } else { name };
    out.line(&format!("{gap}==> {name} <=="));
}

/// Gives where the first `left` lines or bytes end, and counts them off.
fn head_end(bytes: &[u8], lines: bool, left: &mut u64) -> usize {
    if !lines {
        let end = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
        *left -= end as u64;
        return end;
    }
    let mut end = 0;
    while *left > 0 && end < bytes.len() {
        match bytes[end..].iter().position(|byte| *byte == b'\n') {
            Some(at) => {
                end += at + 1;
                *left -= 1;
            }
            None => return bytes.len(),
        }
    }
    end
}

/// Gives where the last `count` lines or bytes begin.
fn tail_start(bytes: &[u8], lines: bool, count: u64) -> usize {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    if !lines {
        return bytes.len().saturating_sub(count);
    }
    if count == 0 {
        return bytes.len();
    }
    let body = bytes.len().saturating_sub(usize::from(bytes.last() == Some(&b'\n')));
    let ends = bytes[..body].iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    ends.map(|(at, _)| at + 1).nth(count - 1).unwrap_or(0)
}

fn wc_line(shown: &[bool; 3], counts: &[u64; 3], name: &str) -> String {
    let fields: Vec<_> = (0..3).filter(|index| shown[*index]).map(|index| counts[index]).collect();
    let mut text = match fields[..] {
        // A single count stands alone, several in columns.
        [only] => only.to_string(),
        _ => fields.iter().map(|count| format!("{count:9}")).collect::<Vec<_>>().join(" "),
    };
    if !name.is_empty() {
        text.push(' ');
        text.push_str(name);
    }
    text
}

fn leading_number(line: &[u8]) -> i64 {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_start();
    let digits = text.strip_prefix('-').unwrap_or(text);
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let number = digits[..end].parse().unwrap_or(0);
    if text.starts_with('-') { -number } else { number }
}

/// Takes a byte into the checksum that POSIX gives `cksum`.
fn crc_step(crc: u32, byte: u8) -> u32 {
    let mut value = crc ^ u32::from(byte) << 24;
    for _ in 0..8 {
        value = if value & 0x8000_0000 != 0 { value << 1 ^ 0x04c1_1db7 } else { value << 1 };
    }
    value
}

impl Translation {
    fn read(parsed: &Parsed, out: &mut Out) -> Result<Self, u8> {
        let (delete, squeeze) = (parsed.has('d'), parsed.has('s'));
        let complement = parsed.has('c') || parsed.has('C');
        let Some(first) = parsed.rest.first() else {
            out.error("missing operand");
            return Err(1);
        };
        let second = parsed.rest.get(1).map(|set| expand_set(set)).unwrap_or_default();
        if second.is_empty() && !delete && !squeeze {
            out.error("missing operand");
            return Err(1);
        }
        let mut from = expand_set(first);
        if complement {
            from = (0..=255).filter(|byte| !from.contains(byte)).collect();
        }
        let mut map: Vec<Option<u8>> = (0..=255).map(Some).collect();
        let mut squeezed = vec![false; 256];
        if delete {
            from.iter().for_each(|byte| map[usize::from(*byte)] = None);
        } else if let Some(last) = second.last() {
            for (index, byte) in from.iter().enumerate() {
                map[usize::from(*byte)] = Some(*second.get(index).unwrap_or(last));
            }
        }
        if squeeze {
            let set = if second.is_empty() { &from } else { &second };
            set.iter().for_each(|byte| squeezed[usize::from(*byte)] = true);
        }
        Ok(Self { map, squeezed, last: None })
    }

    fn apply(&mut self, bytes: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(bytes.len());
        for byte in bytes {
            let Some(Some(changed)) = self.map.get(usize::from(*byte)).copied() else { continue };
            let squeezed = self.squeezed.get(usize::from(changed)).copied().unwrap_or(false);
            if squeezed && self.last == Some(changed) {
                continue;
            }
            self.last = Some(changed);
            out.extend_from_slice(&[changed]);
        }
        out.freeze()
    }
}

/// Lists a set such as `a-z\n[:digit:]`.
fn expand_set(text: &str) -> Vec<u8> {
    let (bytes, _) = super::unescape(text, false);
    let (mut set, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        if let Some(end) = bytes[at..]
            .strip_prefix(b"[:")
            .and_then(|rest| rest.windows(2).position(|pair| pair == b":]"))
        {
            let class = &bytes[at + 2..at + 2 + end];
            let is_in = |byte: &u8| match class {
                b"alpha" => byte.is_ascii_alphabetic(),
                b"digit" => byte.is_ascii_digit(),
                b"alnum" => byte.is_ascii_alphanumeric(),
                b"upper" => byte.is_ascii_uppercase(),
                b"lower" => byte.is_ascii_lowercase(),
                b"space" => byte.is_ascii_whitespace() || *byte == 11,
                b"punct" => byte.is_ascii_punctuation(),
                b"xdigit" => byte.is_ascii_hexdigit(),
                b"blank" => matches!(byte, b' ' | b'\t'),
                b"cntrl" => byte.is_ascii_control(),
                b"print" => matches!(byte, 32..=126),
                b"graph" => byte.is_ascii_graphic(),
                _ => false,
            };
            set.extend((0..=127).filter(is_in));
            at += end + 4;
            continue;
        }
        match bytes.get(at + 1..at + 3) {
            Some([b'-', last]) if *last >= bytes[at] => {
                set.extend(bytes[at]..=*last);
                at += 3;
            }
            _ => {
                set.push(bytes[at]);
                at += 1;
            }
        }
    }
    set
}
