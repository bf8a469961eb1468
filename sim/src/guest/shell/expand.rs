//! Expanding words.

use super::{
    Shell,
    arithmetic::{self, Variables},
    ast::{Action, Command, Part, Word},
    pattern,
};
use crate::guest::syscalls::Syscalls;
use std::{collections::BTreeMap, sync::Arc};

/// What keeps an expansion from going on.
pub(super) enum Halt {
    /// The output of this command is needed first.
    Need(Arc<Command>),
    /// The script ends with this message.
    Fatal(String),
}

/// Expands words by what the shell knows. It changes nothing: what it would assign is kept apart until all is
/// expanded, since an expansion is begun anew after each command substitution.
pub(super) struct Expander<'a, 'b> {
    shell: &'a Shell,
    sys: &'a Syscalls<'b>,
    outputs: &'a [String],
    used: usize,
    pub(super) assigned: BTreeMap<String, String>,
}

/// A word being made.
#[derive(Default)]
struct Field {
    /// The text with pattern characters that do not count behind backslashes.
    pattern: String,
    has_pattern: bool,
    /// Something was quoted, so that it counts even if it is empty.
    given: bool,
}

#[derive(Default)]
struct Fields {
    done: Vec<Field>,
    current: Option<Field>,
}

impl Fields {
    fn current(&mut self) -> &mut Field {
        self.current.get_or_insert_default()
    }

    fn end(&mut self) {
        self.done.extend(self.current.take());
    }

    fn quoted(&mut self, text: &str) {
        let field = self.current();
        field.given = true;
        for c in text.chars() {
            if matches!(c, '*' | '?' | '[' | ']' | '\\' | '-' | '!' | '^') {
                field.pattern.push('\\');
            }
            field.pattern.push(c);
        }
    }

    fn plain(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let field = self.current();
        for c in text.chars() {
            field.has_pattern |= matches!(c, '*' | '?' | '[');
            if c == '\\' {
                field.pattern.push('\\');
            }
            field.pattern.push(c);
        }
    }

    /// Adds a value that was not quoted, cut where the separators say.
    fn split(&mut self, text: &str, separators: &str) {
        let mut after_blank = false;
        for c in text.chars() {
            if !separators.contains(c) {
                if after_blank {
                    self.end();
                    after_blank = false;
                }
                self.plain(c.encode_utf8(&mut [0; 4]));
            } else if matches!(c, ' ' | '\t' | '\n') {
                after_blank |= self.current.is_some();
            } else {
                // A separator that is no blank ends a field even if it is empty.
                self.current().given = true;
                self.end();
                after_blank = false;
            }
        }
        if after_blank {
            self.end();
        }
    }
}

impl<'a, 'b> Expander<'a, 'b> {
    pub(super) fn new(shell: &'a Shell, sys: &'a Syscalls<'b>, outputs: &'a [String]) -> Self {
        Self { shell, sys, outputs, used: 0, assigned: BTreeMap::new() }
    }

    /// Expands words to arguments.
    pub(super) fn fields(&mut self, words: &[Word]) -> Result<Vec<String>, Halt> {
        let mut arguments = Vec::new();
        for word in words {
            let mut fields = Fields::default();
            self.parts(&word.0, true, &mut fields)?;
            fields.end();
            for field in fields.done {
                if field.pattern.is_empty() && !field.given {
                    continue;
                }
                if field.has_pattern && !self.shell.options.noglob {
                    let names = self.glob(&field.pattern);
                    if !names.is_empty() {
                        arguments.extend(names);
                        continue;
                    }
                }
                arguments.push(pattern::unescape(&field.pattern));
            }
        }
        Ok(arguments)
    }

    /// Expands a word to one text, without cutting it and without file names.
    pub(super) fn text(&mut self, word: &Word) -> Result<String, Halt> {
        Ok(pattern::unescape(&self.pattern(word)?))
    }

    /// Expands a word to a pattern.
    pub(super) fn pattern(&mut self, word: &Word) -> Result<String, Halt> {
        let mut fields = Fields::default();
        self.parts(&word.0, false, &mut fields)?;
        fields.end();
        // Without cutting, only "$@" gives several fields.
        Ok(fields.done.into_iter().map(|field| field.pattern).collect::<Vec<_>>().join(" "))
    }

    fn parts(&mut self, parts: &[Part], split: bool, fields: &mut Fields) -> Result<(), Halt> {
        for part in parts {
            match part {
                Part::Plain(text) => fields.plain(text),
                Part::Quoted(text) => fields.quoted(text),
                Part::Home => {
                    let home = self.value("HOME").unwrap_or_else(|| "~".to_owned());
                    fields.quoted(&home);
                }
                Part::Substitution { command, quoted } => {
                    let output = self.outputs.get(self.used).cloned();
                    let output = output.ok_or_else(|| Halt::Need(Arc::clone(command)))?;
                    self.used += 1;
                    self.add(&output, *quoted, split, fields);
                }
                Part::Arithmetic { expression, quoted } => {
                    let text = self.text(expression)?;
                    let result = arithmetic::evaluate(&text, self).map_err(Halt::Fatal)?;
                    self.add(&result.to_string(), *quoted, split, fields);
                }
                Part::Parameter { name, action, quoted } => {
                    self.parameter(name, action, *quoted, split, fields)?;
                }
            }
        }
        Ok(())
    }

    fn add(&self, text: &str, quoted: bool, split: bool, fields: &mut Fields) {
        if quoted {
            fields.quoted(text);
        } else if split {
            fields.split(text, &self.separators());
        } else {
            fields.plain(text);
        }
    }

    fn separators(&self) -> String {
        self.value("IFS").unwrap_or_else(|| " \t\n".to_owned())
    }

    fn value(&self, name: &str) -> Option<String> {
        self.assigned.get(name).cloned().or_else(|| self.shell.parameter(name))
    }

    fn parameter(
        &mut self,
        name: &str,
        action: &Action,
        quoted: bool,
        split: bool,
        fields: &mut Fields,
    ) -> Result<(), Halt> {
        if matches!(name, "@" | "*") && matches!(action, Action::Value) {
            self.all_parameters(name == "@", quoted, split, fields);
            return Ok(());
        }
        let value = self.value(name);
        let missing = |counts_empty: bool| match &value {
            None => true,
            Some(text) => counts_empty && text.is_empty(),
        };
        let text = match action {
            Action::Default(empty, word) | Action::Assign(empty, word) if missing(*empty) => {
                if matches!(action, Action::Default(..)) {
                    if quoted {
                        fields.quoted("");
                    }
                    return self.parts(&word.0, split && !quoted, fields);
                }
                if !super::parser::is_name(name) {
                    return Err(Halt::Fatal(format!("{name}: bad variable name")));
                }
                let text = self.text(word)?;
                self.set(name, text.clone()).map_err(Halt::Fatal)?;
                text
            }
            Action::Alternative(empty, word) => {
                if missing(*empty) {
                    String::new()
                } else {
                    if quoted {
                        fields.quoted("");
                    }
                    return self.parts(&word.0, split && !quoted, fields);
                }
            }
            Action::Require(empty, word) if missing(*empty) => {
                let message = self.text(word)?;
                let message =
                    if message.is_empty() { "parameter not set or null" } else { &message };
                return Err(Halt::Fatal(format!("{name}: {message}")));
            }
            Action::Length => self.required(name, value)?.chars().count().to_string(),
            Action::CutStart(longest, word) => {
                let cut = self.pattern(word)?;
                let value = self.required(name, value)?;
                pattern::cut_start(&value, &cut, *longest).to_owned()
            }
            Action::CutEnd(longest, word) => {
                let cut = self.pattern(word)?;
                let value = self.required(name, value)?;
                pattern::cut_end(&value, &cut, *longest).to_owned()
            }
            Action::Value => self.required(name, value)?,
            Action::Default(..) | Action::Assign(..) | Action::Require(..) => {
                value.unwrap_or_default()
            }
        };
        self.add(&text, quoted, split, fields);
        Ok(())
    }

    fn required(&self, name: &str, value: Option<String>) -> Result<String, Halt> {
        if value.is_none() && self.shell.options.nounset && !matches!(name, "@" | "*" | "!") {
            return Err(Halt::Fatal(format!("{name}: parameter not set")));
        }
        Ok(value.unwrap_or_default())
    }

    fn all_parameters(&self, at: bool, quoted: bool, split: bool, fields: &mut Fields) {
        let parameters = &self.shell.parameters;
        if quoted && !at || !split {
            let separator = if at { " ".to_owned() } else { self.separators() };
            let joined = parameters.join(&separator.chars().take(1).collect::<String>());
            self.add(&joined, quoted, false, fields);
            return;
        }
        for (index, parameter) in parameters.iter().enumerate() {
            if index > 0 {
                fields.end();
            }
            self.add(parameter, quoted, split, fields);
        }
        // "$@" without parameters gives no field, though the quotes alone would.
        if parameters.is_empty()
            && quoted
            && let Some(field) = &mut fields.current
            && field.pattern.is_empty()
        {
            field.given = false;
        }
    }

    /// Lists the files that a pattern matches, sorted.
    fn glob(&self, text: &str) -> Vec<String> {
        let mut found = vec![String::new()];
        let absolute = text.starts_with('/');
        let names: Vec<&str> = text.split('/').filter(|name| !name.is_empty()).collect();
        for (index, name) in names.iter().enumerate() {
            let is_last = index + 1 == names.len();
            let mut next = Vec::new();
            for dir in found {
                let prefix = match (dir.is_empty(), absolute) {
                    (true, false) => String::new(),
                    _ => format!("{dir}/"),
                };
                if !name.contains(['*', '?', '[']) {
                    let path = format!("{prefix}{}", pattern::unescape(name));
                    if !is_last || self.sys.stat(&path, false).is_ok() {
                        next.push(path);
                    }
                    continue;
                }
                let listed = if prefix.is_empty() { "." } else { prefix.as_str() };
                let hidden = name.starts_with('.');
                for (entry, _) in self.sys.read_dir(listed).unwrap_or_default() {
                    let shown = hidden || !entry.starts_with('.');
                    if shown && pattern::matches(name, &entry) {
                        next.push(format!("{prefix}{entry}"));
                    }
                }
            }
            found = next;
        }
        found
    }
}

impl Variables for Expander<'_, '_> {
    fn get(&self, name: &str) -> String {
        self.value(name).unwrap_or_default()
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), String> {
        if self.shell.is_readonly(name) {
            return Err(format!("{name}: is read only"));
        }
        self.assigned.insert(name.to_owned(), value);
        Ok(())
    }
}
