//! From tokens to commands.

use super::{
    ast::{Arm, Command, Part, Redirection, RedirectionKind, Simple, Word},
    lexer::{ParseError, Token},
};
use std::sync::Arc;

/// How deep commands and expansions may be nested.
const MAX_DEPTH: u32 = 100;
/// Words that end a list.
const ENDS: [&str; 8] = ["then", "else", "elif", "fi", "do", "done", "esac", "}"];

type Parsed<T> = Result<T, ParseError>;

/// Reads a script command by command.
pub(super) struct Parser<'a> {
    pub(super) text: &'a str,
    pub(super) at: usize,
    /// Where the text goes on behind here-documents of the current line.
    pub(super) resume: Option<usize>,
    pub(super) depth: u32,
    token: Option<Token>,
}

/// Reads the next whole line of commands at an offset, and gives where it ends; `None` at the end of the text.
pub(super) fn next_line(text: &str, at: usize) -> Parsed<(Option<Arc<Command>>, usize)> {
    let mut parser = Parser::new(text, at);
    while matches!(parser.peek()?, Token::Newline) {
        parser.token = None;
    }
    if matches!(parser.peek()?, Token::End) {
        return Ok((None, text.len()));
    }
    let command = parser.list(false)?;
    match parser.next()? {
        Token::Newline | Token::End => Ok((Some(command), parser.at)),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(token: &Token) -> ParseError {
    let text = format!("unexpected {}", token.describe());
    if matches!(token, Token::End) {
        ParseError::Incomplete(text)
    } else {
        ParseError::Syntax(text)
    }
}

impl<'a> Parser<'a> {
    pub(super) fn new(text: &'a str, at: usize) -> Self {
        Self { text, at, resume: None, depth: 0, token: None }
    }

    pub(super) fn descend(&mut self) -> Parsed<()> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ParseError::Syntax("nested too deeply".to_owned()));
        }
        Ok(())
    }

    pub(super) fn ascend(&mut self) {
        self.depth -= 1;
    }

    /// Reads the text to its end as one list.
    pub(super) fn whole(&mut self) -> Parsed<Arc<Command>> {
        let command = self.list(true)?;
        match self.next()? {
            Token::End => Ok(command),
            other => Err(unexpected(&other)),
        }
    }

    /// Reads a list up to and with the closing parenthesis, for a substitution.
    pub(super) fn substituted(&mut self) -> Parsed<Arc<Command>> {
        let outer = self.token.take();
        let command = self.list(true)?;
        match self.next()? {
            Token::Operator(")") => {}
            other => return Err(unexpected(&other)),
        }
        self.token = outer;
        Ok(command)
    }

    fn peek(&mut self) -> Parsed<&Token> {
        if self.token.is_none() {
            self.token = Some(self.lex()?);
        }
        self.token.as_ref().ok_or_else(|| unexpected(&Token::End))
    }

    fn next(&mut self) -> Parsed<Token> {
        self.peek()?;
        self.token.take().ok_or_else(|| unexpected(&Token::End))
    }

    fn is_operator(&mut self, operator: &str) -> Parsed<bool> {
        Ok(matches!(self.peek()?, Token::Operator(it) if *it == operator))
    }

    fn accept(&mut self, operator: &str) -> Parsed<bool> {
        let is_next = self.is_operator(operator)?;
        if is_next {
            self.token = None;
        }
        Ok(is_next)
    }

    fn is_word(&mut self, text: &str) -> Parsed<bool> {
        Ok(matches!(self.peek()?, Token::Word(word) if word.plain() == Some(text)))
    }

    fn accept_word(&mut self, text: &str) -> Parsed<bool> {
        let is_next = self.is_word(text)?;
        if is_next {
            self.token = None;
        }
        Ok(is_next)
    }

    fn expect_word(&mut self, text: &str) -> Parsed<()> {
        if self.accept_word(text)? { Ok(()) } else { Err(unexpected(&self.next()?)) }
    }

    fn skip_newlines(&mut self) -> Parsed<()> {
        while matches!(self.peek()?, Token::Newline) {
            self.token = None;
        }
        Ok(())
    }

    fn at_list_end(&mut self) -> Parsed<bool> {
        Ok(match self.peek()? {
            Token::End | Token::Operator(")" | ";;") => true,
            Token::Word(word) => word.plain().is_some_and(|text| ENDS.contains(&text)),
            _ => false,
        })
    }

    /// Reads commands up to what ends a list; over several lines where asked.
    fn list(&mut self, lines: bool) -> Parsed<Arc<Command>> {
        self.descend()?;
        let mut commands = Vec::new();
        loop {
            if lines {
                self.skip_newlines()?;
            }
            if self.at_list_end()? {
                break;
            }
            let command = self.and_or()?;
            let in_background = self.accept("&")?;
            commands.push((command, in_background));
            let separated = in_background || self.accept(";")?;
            match self.peek()? {
                Token::Newline if lines => {}
                Token::Newline => break,
                _ if separated => {}
                _ => break,
            }
        }
        self.ascend();
        if commands.is_empty() {
            let token = self.next()?;
            // Where a list may be empty, what ends it is an error in the caller's eyes too.
            if matches!(token, Token::Operator(")") | Token::End) && lines {
                self.token = Some(token);
                return Ok(Arc::new(Command::List(commands)));
            }
            return Err(unexpected(&token));
        }
        if let [(_, false)] = commands[..]
            && let Some((command, _)) = commands.pop()
        {
            return Ok(command);
        }
        Ok(Arc::new(Command::List(commands)))
    }

    fn and_or(&mut self) -> Parsed<Arc<Command>> {
        let mut left = self.pipeline()?;
        loop {
            let is_and = self.is_operator("&&")?;
            if !is_and && !self.is_operator("||")? {
                return Ok(left);
            }
            self.token = None;
            self.skip_newlines()?;
            let right = self.pipeline()?;
            left =
                Arc::new(if is_and { Command::And(left, right) } else { Command::Or(left, right) });
        }
    }

    fn pipeline(&mut self) -> Parsed<Arc<Command>> {
        let mut negate = false;
        while self.accept_word("!")? {
            negate = !negate;
        }
        let first = self.command()?;
        let mut stages = vec![first];
        while self.accept("|")? {
            self.skip_newlines()?;
            stages.push(self.command()?);
        }
        if let ([only], false) = (&stages[..], negate) {
            return Ok(Arc::clone(only));
        }
        Ok(Arc::new(Command::Pipeline { negate, stages }))
    }

    fn command(&mut self) -> Parsed<Arc<Command>> {
        self.descend()?;
        let compound = self.compound()?;
        let command = match compound {
            Some(command) => {
                let redirections = self.redirections()?;
                if redirections.is_empty() {
                    command
                } else {
                    Arc::new(Command::Redirected { body: command, redirections })
                }
            }
            None => self.simple()?,
        };
        self.ascend();
        Ok(command)
    }

    fn compound(&mut self) -> Parsed<Option<Arc<Command>>> {
        if self.accept("(")? {
            let body = self.list(true)?;
            if !self.accept(")")? {
                return Err(unexpected(&self.next()?));
            }
            if matches!(&*body, Command::List(commands) if commands.is_empty()) {
                return Err(ParseError::Syntax("unexpected \")\"".to_owned()));
            }
            return Ok(Some(Arc::new(Command::Subshell(body))));
        }
        let Token::Word(word) = self.peek()? else { return Ok(None) };
        let Some(keyword) = word.plain().map(str::to_owned) else { return Ok(None) };
        let command = match keyword.as_str() {
            "{" => {
                self.token = None;
                let body = self.list(true)?;
                self.expect_word("}")?;
                return Ok(Some(body));
            }
            "if" => {
                self.token = None;
                self.if_rest()?
            }
            "while" | "until" => {
                self.token = None;
                let condition = self.list(true)?;
                let body = self.do_group()?;
                Command::While { condition, body, until: keyword == "until" }
            }
            "for" => self.for_loop()?,
            "case" => self.case()?,
            word if ENDS.contains(&word) => {
                return Err(ParseError::Syntax(format!("unexpected \"{word}\"")));
            }
            _ => return Ok(None),
        };
        Ok(Some(Arc::new(command)))
    }

    fn if_rest(&mut self) -> Parsed<Command> {
        self.descend()?;
        let condition = self.list(true)?;
        self.expect_word("then")?;
        let then = self.list(true)?;
        let otherwise = if self.accept_word("elif")? {
            let inner = self.if_rest()?;
            self.ascend();
            return Ok(Command::If { condition, then, otherwise: Some(Arc::new(inner)) });
        } else if self.accept_word("else")? {
            Some(self.list(true)?)
        } else {
            None
        };
        self.expect_word("fi")?;
        self.ascend();
        Ok(Command::If { condition, then, otherwise })
    }

    fn do_group(&mut self) -> Parsed<Arc<Command>> {
        self.expect_word("do")?;
        let body = self.list(true)?;
        self.expect_word("done")?;
        Ok(body)
    }

    fn for_loop(&mut self) -> Parsed<Command> {
        self.token = None;
        let name = match self.next()? {
            Token::Word(word) => {
                let name = word.plain().filter(|name| is_name(name)).map(str::to_owned);
                name.ok_or_else(|| ParseError::Syntax("bad for loop variable".to_owned()))?
            }
            other => return Err(unexpected(&other)),
        };
        self.skip_newlines()?;
        let mut words = None;
        if self.accept_word("in")? {
            let mut items = Vec::new();
            loop {
                match self.next()? {
                    Token::Word(word) => items.push(word),
                    Token::Operator(";") | Token::Newline => break,
                    other => return Err(unexpected(&other)),
                }
            }
            words = Some(items);
        } else {
            self.accept(";")?;
        }
        self.skip_newlines()?;
        let body = self.do_group()?;
        Ok(Command::For { name, words, body })
    }

    fn case(&mut self) -> Parsed<Command> {
        self.token = None;
        let word = match self.next()? {
            Token::Word(word) => word,
            other => return Err(unexpected(&other)),
        };
        self.skip_newlines()?;
        self.expect_word("in")?;
        let mut arms = Vec::new();
        loop {
            self.skip_newlines()?;
            if self.accept_word("esac")? {
                return Ok(Command::Case { word, arms });
            }
            self.accept("(")?;
            let mut patterns = Vec::new();
            loop {
                match self.next()? {
                    Token::Word(pattern) => patterns.push(pattern),
                    other => return Err(unexpected(&other)),
                }
                if !self.accept("|")? {
                    break;
                }
            }
            if !self.accept(")")? {
                return Err(unexpected(&self.next()?));
            }
            self.skip_newlines()?;
            let is_empty = self.is_operator(";;")? || self.is_word("esac")?;
            let body = if is_empty { None } else { Some(self.list(true)?) };
            arms.push(Arm { patterns, body });
            if !self.accept(";;")? {
                self.skip_newlines()?;
                self.expect_word("esac")?;
                return Ok(Command::Case { word, arms });
            }
        }
    }

    fn redirections(&mut self) -> Parsed<Vec<Redirection>> {
        let mut redirections = Vec::new();
        while let Some(redirection) = self.redirection()? {
            redirections.push(redirection);
        }
        Ok(redirections)
    }

    fn redirection(&mut self) -> Parsed<Option<Redirection>> {
        let mut given = None;
        if let Token::Descriptor(number) = self.peek()? {
            given = Some(*number);
            self.token = None;
        }
        let Token::Operator(operator) = self.peek()? else { return Ok(None) };
        let (kind, fd) = match *operator {
            "<" => (RedirectionKind::Read, 0),
            ">" | ">|" => (RedirectionKind::Write, 1),
            ">>" => (RedirectionKind::Append, 1),
            "<>" => (RedirectionKind::ReadWrite, 0),
            "<&" => (RedirectionKind::Duplicate, 0),
            ">&" => (RedirectionKind::Duplicate, 1),
            "&>" => (RedirectionKind::Both, 1),
            "<<" | "<<-" => (RedirectionKind::Here, 0),
            _ => return Ok(None),
        };
        let strip_tabs = *operator == "<<-";
        self.token = None;
        let target = match self.next()? {
            Token::Word(word) => word,
            Token::Descriptor(number) => Word(vec![Part::Plain(number.to_string())]),
            other => return Err(unexpected(&other)),
        };
        let target = match kind {
            RedirectionKind::Here => self.here_document(&target, strip_tabs)?,
            _ => target,
        };
        Ok(Some(Redirection { fd: given.unwrap_or(fd), kind, target }))
    }

    fn simple(&mut self) -> Parsed<Arc<Command>> {
        let mut simple = Simple::default();
        loop {
            if let Some(redirection) = self.redirection()? {
                simple.redirections.push(redirection);
                continue;
            }
            let Token::Word(_) = self.peek()? else { break };
            let Token::Word(word) = self.next()? else { break };
            if simple.words.is_empty()
                && let Some(assignment) = assignment(&word)
            {
                simple.assignments.push(assignment);
                continue;
            }
            simple.words.push(word);
            if simple.words.len() == 1 && simple.assignments.is_empty() && self.accept("(")? {
                return self.function(&simple);
            }
        }
        let is_empty = simple.words.is_empty()
            && simple.assignments.is_empty()
            && simple.redirections.is_empty();
        if is_empty {
            return Err(unexpected(&self.next()?));
        }
        Ok(Arc::new(Command::Simple(simple)))
    }

    fn function(&mut self, simple: &Simple) -> Parsed<Arc<Command>> {
        let name = simple.words.first().and_then(Word::plain).filter(|name| is_name(name));
        let name = name.ok_or_else(|| ParseError::Syntax("bad function name".to_owned()))?;
        let name = name.to_owned();
        if !self.accept(")")? {
            return Err(unexpected(&self.next()?));
        }
        self.skip_newlines()?;
        let Some(body) = self.compound()? else { return Err(unexpected(&self.next()?)) };
        let redirections = self.redirections()?;
        let body = if redirections.is_empty() {
            body
        } else {
            Arc::new(Command::Redirected { body, redirections })
        };
        Ok(Arc::new(Command::Function { name, body }))
    }
}

/// Says whether a text can name a variable.
pub(super) fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic())
        && text.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
}

/// Takes a word such as `name=value` apart.
fn assignment(word: &Word) -> Option<(String, Word)> {
    let Some(Part::Plain(first)) = word.0.first() else { return None };
    let (name, value) = first.split_once('=')?;
    if !is_name(name) {
        return None;
    }
    let mut parts = Vec::with_capacity(word.0.len());
    match value.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/')) {
        Some(rest) => parts.extend([Part::Home, Part::Plain(rest.to_owned())]),
        None if value.is_empty() => {}
        None => parts.push(Part::Plain(value.to_owned())),
    }
    parts.extend(word.0[1..].iter().cloned());
    Some((name.to_owned(), Word(parts)))
}
