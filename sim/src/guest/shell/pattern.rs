//! Patterns of file names, `case` and `${x%…}`. A backslash takes the next character as it is.

/// Says whether a pattern matches the whole text.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    // Where the last star stood, and how much of the text it has taken.
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        if pattern.get(p) == Some(&'*') {
            star = Some((p + 1, t));
            p += 1;
            continue;
        }
        if let Some(next) = one(&pattern, p, text[t]) {
            (p, t) = (next, t + 1);
            continue;
        }
        let Some((after, taken)) = star else { return false };
        star = Some((after, taken + 1));
        (p, t) = (after, taken + 1);
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// Matches one character, and gives where the pattern goes on.
fn one(pattern: &[char], at: usize, c: char) -> Option<usize> {
    match *pattern.get(at)? {
        '?' => Some(at + 1),
        '\\' => match pattern.get(at + 1) {
            Some(escaped) => (*escaped == c).then_some(at + 2),
            None => (c == '\\').then_some(at + 1),
        },
        '[' => match bracket(pattern, at + 1, c) {
            Some((holds, next)) => holds.then_some(next),
            None => (c == '[').then_some(at + 1),
        },
        plain => (plain == c).then_some(at + 1),
    }
}

/// Matches a set such as `a-z]`; `None` where it has no end.
fn bracket(pattern: &[char], mut at: usize, c: char) -> Option<(bool, usize)> {
    let negated = matches!(pattern.get(at), Some('!' | '^'));
    at += usize::from(negated);
    let (start, mut holds) = (at, false);
    loop {
        let mut low = *pattern.get(at)?;
        if low == ']' && at > start {
            return Some((holds != negated, at + 1));
        }
        if low == '[' && pattern.get(at + 1) == Some(&':') {
            let end = pattern[at + 2..].windows(2).position(|pair| pair == [':', ']'])?;
            let class: String = pattern[at + 2..at + 2 + end].iter().collect();
            holds |= in_class(&class, c);
            at += end + 4;
            continue;
        }
        if low == '\\' {
            at += 1;
            low = *pattern.get(at)?;
        }
        at += 1;
        match (pattern.get(at), pattern.get(at + 1)) {
            (Some('-'), Some(high)) if *high != ']' => {
                holds |= (low..=*high).contains(&c);
                at += 2;
            }
            _ => holds |= low == c,
        }
    }
}

fn in_class(class: &str, c: char) -> bool {
    match class {
        "alpha" => c.is_ascii_alphabetic(),
        "digit" => c.is_ascii_digit(),
        "alnum" => c.is_ascii_alphanumeric(),
        "upper" => c.is_ascii_uppercase(),
        "lower" => c.is_ascii_lowercase(),
        "space" => c.is_ascii_whitespace(),
        "punct" => c.is_ascii_punctuation(),
        "xdigit" => c.is_ascii_hexdigit(),
        _ => false,
    }
}

/// Takes the backslashes out.
pub(super) fn unescape(pattern: &str) -> String {
    let (mut text, mut chars) = (String::with_capacity(pattern.len()), pattern.chars());
    while let Some(c) = chars.next() {
        text.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    text
}

/// Cuts what a pattern matches off the beginning of a text.
pub(super) fn cut_start<'a>(text: &'a str, pattern: &str, longest: bool) -> &'a str {
    let mut ends = boundaries(text);
    if longest {
        ends.reverse();
    }
    ends.into_iter().find(|end| matches(pattern, &text[..*end])).map_or(text, |end| &text[end..])
}

/// Cuts what a pattern matches off the end of a text.
pub(super) fn cut_end<'a>(text: &'a str, pattern: &str, longest: bool) -> &'a str {
    let mut starts = boundaries(text);
    if !longest {
        starts.reverse();
    }
    starts.into_iter().find(|at| matches(pattern, &text[*at..])).map_or(text, |at| &text[..at])
}

fn boundaries(text: &str) -> Vec<usize> {
    text.char_indices().map(|(at, _)| at).chain([text.len()]).collect()
}
