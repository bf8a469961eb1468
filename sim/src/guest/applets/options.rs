//! Command-line options.

use super::Out;

/// Options and what follows them.
pub(super) struct Parsed {
    options: Vec<(char, Option<String>)>,
    pub(super) rest: Vec<String>,
}

impl Parsed {
    /// Reads options; in `known` a letter with a colon behind it takes a value. What is unknown is told, and the
    /// command should fail.
    pub(super) fn read(argv: &[String], known: &str, out: &mut Out) -> Option<Self> {
        let mut parsed = Self { options: Vec::new(), rest: Vec::new() };
        let mut words = argv.iter().skip(1);
        while let Some(word) = words.next() {
            if word == "--" {
                parsed.rest.extend(words.cloned());
                break;
            }
            let Some(letters) = word.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                parsed.rest.push(word.clone());
                continue;
            };
            if let Some(name) = letters.strip_prefix('-') {
                out.error(&format!("unrecognized option: {name}"));
                return None;
            }
            for (at, letter) in letters.char_indices() {
                let Some(place) = known.find(letter).filter(|_| letter != ':') else {
                    out.error(&format!("unrecognized option: {letter}"));
                    return None;
                };
                if !known[place + 1..].starts_with(':') {
                    parsed.options.push((letter, None));
                    continue;
                }
                let attached = &letters[at + letter.len_utf8()..];
                let value = if attached.is_empty() {
                    words.next().cloned()
                } else {
                    Some(attached.to_owned())
                };
                if value.is_none() {
                    out.error(&format!("option requires an argument: {letter}"));
                    return None;
                }
                parsed.options.push((letter, value));
                break;
            }
        }
        Some(parsed)
    }

    pub(super) fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(known, _)| *known == letter)
    }

    /// Gives the last value of an option.
    pub(super) fn value(&self, letter: char) -> Option<&str> {
        let values = self.options.iter().rev().filter(|(known, _)| *known == letter);
        values.filter_map(|(_, value)| value.as_deref()).next()
    }

    /// Says that operands are missing where there are fewer.
    pub(super) fn at_least(&self, count: usize, out: &mut Out) -> bool {
        if self.rest.len() < count {
            out.error("missing operand");
        }
        self.rest.len() >= count
    }
}

/// Reads a number with an optional size suffix.
pub(super) fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor: u64 = match &text[digits.len()..] {
        "" | "c" => 1,
        "w" => 2,
        "b" => 512,
        "k" | "K" | "kB" | "KiB" => 1024,
        "m" | "M" | "MiB" => 1 << 20,
        "g" | "G" | "GiB" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}
