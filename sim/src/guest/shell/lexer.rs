//! Cutting a script into tokens and words into parts.

// A method's path stands for one lifetime of the parser, a closure for all.
#![allow(clippy::redundant_closure_for_method_calls)]

use super::{
    ast::{Action, Command, Part, Word},
    parser::Parser,
};
use std::sync::Arc;

/// Why a text is no script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ParseError {
    /// It ends in the middle of a command.
    Incomplete(String),
    /// It can never become one.
    Syntax(String),
}

#[derive(Clone, Debug)]
pub(super) enum Token {
    Word(Word),
    Operator(&'static str),
    /// A number that stands right before a redirection.
    Descriptor(u32),
    Newline,
    End,
}

const OPERATORS: [&str; 18] = [
    "<<-", "&&", "||", ";;", "<<", ">>", "<&", ">&", "<>", ">|", "&>", ";", "&", "|", "<", ">",
    "(", ")",
];

impl Token {
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Word(word) => {
                word.plain().map_or_else(|| "word".to_owned(), |text| format!("\"{text}\""))
            }
            Self::Operator(operator) => format!("\"{operator}\""),
            Self::Descriptor(number) => format!("\"{number}\""),
            Self::Newline => "newline".to_owned(),
            Self::End => "end of file".to_owned(),
        }
    }
}

impl Parser<'_> {
    pub(super) fn lex(&mut self) -> Result<Token, ParseError> {
        self.skip_blanks();
        let rest = self.rest();
        let Some(first) = rest.chars().next() else { return Ok(Token::End) };
        if first == '\n' {
            self.at = self.resume.take().unwrap_or(self.at + 1);
            return Ok(Token::Newline);
        }
        if let Some(operator) = OPERATORS.iter().find(|operator| rest.starts_with(**operator)) {
            self.at += operator.len();
            return Ok(Token::Operator(operator));
        }
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if (1..=3).contains(&digits) && rest[digits..].starts_with(['<', '>']) {
            let number = rest[..digits].parse().unwrap_or(0);
            self.at += digits;
            return Ok(Token::Descriptor(number));
        }
        self.word().map(Token::Word)
    }

    pub(super) fn rest(&self) -> &str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn skip_blanks(&mut self) {
        loop {
            let rest = self.rest();
            if rest.starts_with([' ', '\t']) {
                self.at += 1;
            } else if rest.starts_with("\\\n") {
                self.at += 2;
            } else if rest.starts_with('#') {
                self.at += rest.find('\n').unwrap_or(rest.len());
            } else {
                return;
            }
        }
    }

    fn word(&mut self) -> Result<Word, ParseError> {
        let mut parts = Vec::new();
        if self.rest().starts_with('~') {
            let after = self.rest()[1..].chars().next();
            if after.is_none_or(|c| c == '/' || is_meta(c)) {
                parts.push(Part::Home);
                self.at += 1;
            }
        }
        while let Some(c) = self.rest().chars().next() {
            match c {
                c if is_meta(c) => break,
                '\'' => {
                    let rest = &self.rest()[1..];
                    let end =
                        rest.find('\'').ok_or_else(|| incomplete("unterminated quoted string"))?;
                    parts.push(Part::Quoted(rest[..end].to_owned()));
                    self.at += end + 2;
                }
                '"' => {
                    self.at += 1;
                    parts.push(Part::Quoted(String::new()));
                    self.double_quoted(&mut parts, Some('"'))?;
                }
                '\\' => match self.rest()[1..].chars().next() {
                    None => {
                        push_plain(&mut parts, "\\");
                        self.at += 1;
                    }
                    Some('\n') => self.at += 2,
                    Some(escaped) => {
                        parts.push(Part::Quoted(escaped.to_string()));
                        self.at += 1 + escaped.len_utf8();
                    }
                },
                '$' | '`' => self.expansion(&mut parts, false)?,
                other => {
                    push_plain(&mut parts, other.encode_utf8(&mut [0; 4]));
                    self.at += other.len_utf8();
                }
            }
        }
        Ok(Word(parts))
    }

    /// Reads on inside double quotes, up to the end given or the end of the text.
    fn double_quoted(
        &mut self,
        parts: &mut Vec<Part>,
        end: Option<char>,
    ) -> Result<(), ParseError> {
        loop {
            let Some(c) = self.rest().chars().next() else {
                return match end {
                    None => Ok(()),
                    Some(_) => Err(incomplete("unterminated quoted string")),
                };
            };
            if end == Some(c) {
                self.at += 1;
                return Ok(());
            }
            match c {
                '\\' => match self.rest()[1..].chars().next() {
                    Some('\n') => self.at += 2,
                    Some(c @ ('$' | '`' | '\\')) => {
                        push_quoted(parts, c);
                        self.at += 2;
                    }
                    Some('"') if end.is_some() => {
                        push_quoted(parts, '"');
                        self.at += 2;
                    }
                    _ => {
                        push_quoted(parts, '\\');
                        self.at += 1;
                    }
                },
                '$' | '`' => self.expansion(parts, true)?,
                other => {
                    push_quoted(parts, other);
                    self.at += other.len_utf8();
                }
            }
        }
    }

    /// Reads what a `$` or a backquote begins.
    fn expansion(&mut self, parts: &mut Vec<Part>, quoted: bool) -> Result<(), ParseError> {
        self.descend()?;
        let part = if self.rest().starts_with('`') {
            Some(Part::Substitution { command: self.backquoted()?, quoted })
        } else if self.rest().starts_with("$((") && self.is_arithmetic() {
            self.at += 3;
            let end = self.arithmetic_end()?;
            let text = self.text[self.at..end].to_owned();
            let expression = self.nested(&text, |parser| parser.here_text())?;
            self.at = end + 2;
            Some(Part::Arithmetic { expression, quoted })
        } else if self.rest().starts_with("$(") {
            self.at += 2;
            let command = self.substituted()?;
            Some(Part::Substitution { command, quoted })
        } else if self.rest().starts_with("${") {
            self.at += 2;
            Some(self.braced(quoted)?)
        } else {
            self.at += 1;
            self.simple_name().map(|name| Part::Parameter { name, action: Action::Value, quoted })
        };
        match part {
            Some(part) => parts.push(part),
            None if quoted => push_quoted(parts, '$'),
            None => push_plain(parts, "$"),
        }
        self.ascend();
        Ok(())
    }

    fn simple_name(&mut self) -> Option<String> {
        let rest = self.rest();
        let first = rest.chars().next()?;
        let len = if first == '_' || first.is_ascii_alphabetic() {
            rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric()).unwrap_or(rest.len())
        } else if first.is_ascii_digit() || "?$#@*!-".contains(first) {
            1
        } else {
            return None;
        };
        let name = rest[..len].to_owned();
        self.at += len;
        Some(name)
    }

    fn braced(&mut self, quoted: bool) -> Result<Part, ParseError> {
        let bad = || ParseError::Syntax("bad substitution".to_owned());
        let rest = self.rest();
        let measured = rest.starts_with('#')
            && rest[1..].chars().next().is_some_and(|c| c != '}' && !"%:-=+?#".contains(c));
        self.at += usize::from(measured);
        let digits = self.rest().bytes().take_while(u8::is_ascii_digit).count();
        let name = if digits > 0 {
            let name = self.rest()[..digits].to_owned();
            self.at += digits;
            name
        } else {
            self.simple_name().ok_or_else(|| {
                if self.rest().is_empty() { incomplete("missing '}'") } else { bad() }
            })?
        };
        let rest = self.rest();
        if measured {
            if !rest.starts_with('}') {
                return Err(bad());
            }
            self.at += 1;
            return Ok(Part::Parameter { name, action: Action::Length, quoted });
        }
        let (operator, len) = match rest.as_bytes() {
            [b'}', ..] => {
                self.at += 1;
                return Ok(Part::Parameter { name, action: Action::Value, quoted });
            }
            [b':', letter @ (b'-' | b'=' | b'+' | b'?'), ..] => ((true, *letter), 2),
            [letter @ (b'-' | b'=' | b'+' | b'?'), ..] => ((false, *letter), 1),
            [b'#', b'#', ..] => ((true, b'#'), 2),
            [b'%', b'%', ..] => ((true, b'%'), 2),
            [letter @ (b'#' | b'%'), ..] => ((false, *letter), 1),
            [] => return Err(incomplete("missing '}'")),
            _ => return Err(bad()),
        };
        self.at += len;
        let cuts = matches!(operator.1, b'#' | b'%');
        let word = self.braced_word(quoted && !cuts)?;
        let action = match operator {
            (flag, b'-') => Action::Default(flag, word),
            (flag, b'=') => Action::Assign(flag, word),
            (flag, b'+') => Action::Alternative(flag, word),
            (flag, b'?') => Action::Require(flag, word),
            (flag, b'#') => Action::CutStart(flag, word),
            (flag, _) => Action::CutEnd(flag, word),
        };
        Ok(Part::Parameter { name, action, quoted })
    }

    /// Reads the word inside braces, up to and with the closing one.
    fn braced_word(&mut self, quoted: bool) -> Result<Word, ParseError> {
        let mut parts = Vec::new();
        loop {
            let Some(c) = self.rest().chars().next() else {
                return Err(incomplete("missing '}'"));
            };
            match c {
                '}' => {
                    self.at += 1;
                    return Ok(Word(parts));
                }
                '\'' if !quoted => {
                    let rest = &self.rest()[1..];
                    let end =
                        rest.find('\'').ok_or_else(|| incomplete("unterminated quoted string"))?;
                    parts.push(Part::Quoted(rest[..end].to_owned()));
                    self.at += end + 2;
                }
                '"' => {
                    self.at += 1;
                    parts.push(Part::Quoted(String::new()));
                    self.double_quoted(&mut parts, Some('"'))?;
                }
                '\\' => {
                    let escaped = self.rest()[1..].chars().next().unwrap_or('\\');
                    if quoted && !"$`\"\\}".contains(escaped) {
                        push_quoted(&mut parts, '\\');
                    }
                    push_quoted(&mut parts, escaped);
                    self.at += (1 + escaped.len_utf8()).min(self.rest().len());
                }
                '$' | '`' => self.expansion(&mut parts, quoted)?,
                other => {
                    if quoted {
                        push_quoted(&mut parts, other);
                    } else {
                        push_plain(&mut parts, other.encode_utf8(&mut [0; 4]));
                    }
                    self.at += other.len_utf8();
                }
            }
        }
    }

    /// Says whether `$((` begins an arithmetic expansion rather than a subshell in a substitution.
    fn is_arithmetic(&self) -> bool {
        let mut depth = 0_u32;
        let bytes = self.rest().as_bytes();
        for (index, byte) in bytes.iter().enumerate().skip(3) {
            match byte {
                b'(' => depth += 1,
                b')' if depth == 0 => return bytes.get(index + 1).is_none_or(|next| *next == b')'),
                b')' => depth -= 1,
                _ => {}
            }
        }
        true
    }

    fn arithmetic_end(&self) -> Result<usize, ParseError> {
        let mut depth = 0_u32;
        for (index, byte) in self.rest().bytes().enumerate() {
            match byte {
                b'(' => depth += 1,
                b')' if depth == 0 => {
                    let is_closed = self.rest()[index..].starts_with("))");
                    return if is_closed {
                        Ok(self.at + index)
                    } else {
                        Err(incomplete("missing '))'"))
                    };
                }
                b')' => depth -= 1,
                _ => {}
            }
        }
        Err(incomplete("missing '))'"))
    }

    fn backquoted(&mut self) -> Result<Arc<Command>, ParseError> {
        self.at += 1;
        let mut text = String::new();
        let mut chars = self.rest().char_indices();
        loop {
            let Some((index, c)) = chars.next() else {
                return Err(incomplete("unterminated backquote"));
            };
            match c {
                '`' => {
                    self.at += index + 1;
                    return self.nested(&text, |parser| parser.whole());
                }
                '\\' => match chars.next() {
                    Some((_, c @ ('$' | '`' | '\\'))) => text.push(c),
                    Some((_, other)) => text.extend(['\\', other]),
                    None => text.push('\\'),
                },
                other => text.push(other),
            }
        }
    }

    /// Parses a text of its own; that it ends too early is an error for good.
    fn nested<T>(
        &self,
        text: &str,
        parse: impl FnOnce(&mut Parser<'_>) -> Result<T, ParseError>,
    ) -> Result<T, ParseError> {
        let mut parser = Parser::new(text, 0);
        parser.depth = self.depth;
        parse(&mut parser).map_err(|error| match error {
            ParseError::Incomplete(text) | ParseError::Syntax(text) => ParseError::Syntax(text),
        })
    }

    /// Reads the rest of the text as one inside double quotes without an end.
    fn here_text(&mut self) -> Result<Word, ParseError> {
        let mut parts = Vec::new();
        self.double_quoted(&mut parts, None)?;
        Ok(Word(parts))
    }

    /// Reads the text of a here-document whose operator was just read.
    pub(super) fn here_document(
        &mut self,
        delimiter: &Word,
        strip_tabs: bool,
    ) -> Result<Word, ParseError> {
        let (mut end, mut quoted) = (String::new(), false);
        for part in &delimiter.0 {
            match part {
                Part::Plain(text) => end.push_str(text),
                Part::Quoted(text) => {
                    end.push_str(text);
                    quoted = true;
                }
                _ => return Err(ParseError::Syntax("expansion in here-document's end".to_owned())),
            }
        }
        let missing = || incomplete("unterminated here-document");
        let start = match self.resume {
            Some(start) => start,
            None => self.at + self.rest().find('\n').ok_or_else(missing)? + 1,
        };
        let (mut at, mut body) = (start, String::new());
        loop {
            let rest = self.text.get(at..).filter(|rest| !rest.is_empty()).ok_or_else(missing)?;
            let line_end = rest.find('\n');
            let line = &rest[..line_end.unwrap_or(rest.len())];
            let line = if strip_tabs { line.trim_start_matches('\t') } else { line };
            at += line_end.map_or(rest.len(), |end| end + 1);
            if line == end {
                break;
            }
            line_end.ok_or_else(missing)?;
            body.push_str(line);
            body.push('\n');
        }
        self.resume = Some(at);
        if quoted {
            return Ok(Word(vec![Part::Quoted(body)]));
        }
        self.nested(&body, |parser| parser.here_text())
    }
}

fn incomplete(text: &str) -> ParseError {
    ParseError::Incomplete(text.to_owned())
}

fn is_meta(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | ';' | '&' | '|' | '<' | '>' | '(' | ')')
}

fn push_plain(parts: &mut Vec<Part>, text: &str) {
    match parts.last_mut() {
        Some(Part::Plain(last)) => last.push_str(text),
        _ => parts.push(Part::Plain(text.to_owned())),
    }
}

fn push_quoted(parts: &mut Vec<Part>, c: char) {
    match parts.last_mut() {
        Some(Part::Quoted(last)) => last.push(c),
        _ => parts.push(Part::Quoted(c.to_string())),
    }
}
