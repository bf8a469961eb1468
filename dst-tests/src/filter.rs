//! Choosing clauses by name.

use std::{fmt, str::FromStr};

/// A choice of clauses: a part of the id, or with `*` and `?` a pattern of the whole id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClauseFilter(String);

/// A text that can match no clause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an empty clause filter; give a part of an id, or a pattern such as `exec.*`")]
pub struct EmptyFilter;

impl ClauseFilter {
    /// Says whether the clause is chosen.
    #[must_use]
    pub fn matches(&self, id: &str) -> bool {
        if self.0.contains(['*', '?']) {
            glob(self.0.as_bytes(), id.as_bytes())
        } else {
            id.contains(&self.0)
        }
    }
}

impl FromStr for ClauseFilter {
    type Err = EmptyFilter;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() { Err(EmptyFilter) } else { Ok(Self(text.to_owned())) }
    }
}

impl fmt::Display for ClauseFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Matches `*` as any run of bytes and `?` as any one byte, in time proportional to the product of the lengths.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut next) = (0, 0);
    // Where the last star stood, and how much text it has taken so far.
    let mut star: Option<(usize, usize)> = None;
    while next < text.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, next));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[next] => {
                at += 1;
                next += 1;
            }
            _ => match star {
                Some((stood, taken)) => {
                    star = Some((stood, taken + 1));
                    at = stood + 1;
                    next = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chosen(filter: &str, id: &str) -> bool {
        filter.parse::<ClauseFilter>().unwrap().matches(id)
    }

    /// The definition, in exponential time.
    fn by_definition(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            ([b'*', rest @ ..], _) => {
                (0..=text.len()).any(|taken| by_definition(rest, &text[taken..]))
            }
            ([b'?', rest @ ..], [_, left @ ..]) => by_definition(rest, left),
            ([byte, rest @ ..], [first, left @ ..]) => byte == first && by_definition(rest, left),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_match_as_defined(pattern in "[ab*?]{0,7}", text in "[ab]{0,7}") {
            let expected = by_definition(pattern.as_bytes(), text.as_bytes());
            prop_assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), expected);
        }
    }

    #[test]
    fn a_plain_text_is_a_part_and_a_pattern_is_whole() {
        assert!(chosen("exit", "exec.every_exit_code"));
        assert!(chosen("exec.*", "exec.every_exit_code"));
        assert!(!chosen("exit*", "exec.every_exit_code"));
        assert!(!chosen("pause", "exec.every_exit_code"));
        assert_eq!("".parse::<ClauseFilter>(), Err(EmptyFilter));
    }
}
