//! Builtin commands.

use super::{Shell, parser::is_name, run::Frame};
use crate::guest::{
    applets::{Out, errno_text, once},
    program::{Step, WaitFor},
    signals,
    syscalls::Syscalls,
};
use vm_guest_agent::os::Errno;

/// Builtins before which assignments stay, and whose errors end a script.
const SPECIAL: [&str; 16] = [
    ".", ":", "break", "continue", "eval", "exec", "exit", "export", "readonly", "return", "set",
    "shift", "times", "trap", "unset", "source",
];
const REGULAR: [&str; 19] = [
    "cd", "command", "read", "wait", "umask", "ulimit", "local", "true", "false", "echo", "printf",
    "test", "[", "pwd", "kill", "type", "hash", "jobs", "let",
];

pub(super) fn is_special(name: &str) -> bool {
    SPECIAL.contains(&name)
}

pub(super) fn is_builtin(name: &str) -> bool {
    is_special(name) || REGULAR.contains(&name)
}

impl Shell {
    /// Runs a builtin by its words.
    pub(super) fn builtin(&mut self, sys: &mut Syscalls<'_>, words: &[String]) {
        let arguments = words.get(1..).unwrap_or_default();
        let before = std::mem::take(&mut self.status);
        match words[0].as_str() {
            ":" | "times" | "hash" | "jobs" => {}
            "break" => self.leave_loops(sys, arguments, false),
            "continue" => self.leave_loops(sys, arguments, true),
            "return" => self.return_from(sys, arguments, before),
            "exit" => match self.status_argument(arguments, before) {
                Ok(status) => self.exit(sys, status),
                Err(message) => self.fatal(sys, &message),
            },
            "eval" => {
                self.status = before;
                self.eval(arguments);
            }
            "." | "source" => self.source(sys, arguments, before),
            "export" => self.export(sys, arguments, false),
            "readonly" => self.export(sys, arguments, true),
            "unset" => self.unset(sys, arguments),
            "set" => self.set(sys, arguments),
            "shift" => self.shift(sys, arguments),
            "trap" => self.trap(sys, arguments),
            "cd" => self.cd(sys, arguments),
            "command" => self.command(sys, arguments),
            "type" => self.type_of(sys, arguments),
            "read" => self.read(arguments),
            "wait" => self.wait(arguments),
            "ulimit" => self.ulimit(sys, arguments),
            "umask" => self.umask(sys, arguments),
            "local" => self.local(sys, arguments),
            "let" => self.not_supported("let"),
            "pwd" => {
                let cwd = self.get("PWD").or_else(|| sys.getcwd().ok()).unwrap_or_default();
                self.out.line(&cwd);
                self.stack.push(Frame::Flush);
            }
            name => {
                let mut out = Out::new(name);
                self.status = once(name).map_or(127, |command| command(sys, words, &mut out));
                self.out.absorb(out);
                self.stack.push(Frame::Flush);
            }
        }
    }

    fn not_supported(&mut self, name: &str) {
        self.complain(&format!("{name}: not supported"));
        self.status = 2;
    }

    fn status_argument(&self, arguments: &[String], default: u8) -> Result<u8, String> {
        match arguments.first() {
            None => Ok(default),
            Some(text) => match text.parse::<i64>() {
                Ok(number) => Ok(u8::try_from(number & 0xff).unwrap_or(0)),
                Err(_) => Err(format!("Illegal number: {text}")),
            },
        }
    }

    fn leave_loops(&mut self, sys: &mut Syscalls<'_>, arguments: &[String], again: bool) {
        let mut left = match arguments.first().map(|text| text.parse::<u32>()) {
            None => 1,
            Some(Ok(count)) if count > 0 => count,
            Some(_) => {
                self.fatal(sys, &format!("Illegal number: {}", arguments[0]));
                return;
            }
        };
        let is_loop = |frame: &Frame| {
            matches!(frame, Frame::For { .. } | Frame::WhileBody(_) | Frame::WhileCondition { .. })
        };
        let end = self.stack.iter().rposition(|frame| matches!(frame, Frame::Function { .. }));
        let loops = self.stack[end.unwrap_or(0)..].iter().filter(|frame| is_loop(frame)).count();
        left = left.min(u32::try_from(loops).unwrap_or(u32::MAX));
        while left > 0 {
            let Some(frame) = self.stack.pop() else { return };
            if is_loop(&frame) {
                left -= 1;
                if left == 0 && again {
                    match frame {
                        Frame::WhileCondition { command, .. } | Frame::WhileBody(command) => {
                            self.loop_again(command);
                        }
                        frame => self.stack.push(frame),
                    }
                }
                continue;
            }
            self.leave(sys, frame);
        }
    }

    fn return_from(&mut self, sys: &mut Syscalls<'_>, arguments: &[String], before: u8) {
        let status = match self.status_argument(arguments, before) {
            Ok(status) => status,
            Err(message) => {
                self.fatal(sys, &message);
                return;
            }
        };
        let is_end = |frame: &Frame| matches!(frame, Frame::Function { .. } | Frame::Sourced);
        if !self.stack.iter().any(is_end) {
            self.exit(sys, status);
            return;
        }
        while let Some(frame) = self.stack.pop() {
            let found = is_end(&frame);
            self.leave(sys, frame);
            if found {
                break;
            }
        }
        self.status = status;
    }

    fn eval(&mut self, arguments: &[String]) {
        let text = arguments.join(" ");
        if text.trim().is_empty() {
            self.status = 0;
        } else {
            self.stack.push(Frame::Script { text: text.into(), at: 0 });
        }
    }

    fn source(&mut self, sys: &mut Syscalls<'_>, arguments: &[String], before: u8) {
        let Some(path) = arguments.first() else {
            self.fatal(sys, ".: filename argument required");
            return;
        };
        let mut candidates = vec![path.clone()];
        if !path.contains('/') {
            let dirs = self.get("PATH").unwrap_or_default();
            let in_path = dirs.split(':').filter(|dir| !dir.is_empty());
            candidates = in_path.map(|dir| format!("{dir}/{path}")).collect();
            candidates.push(path.clone());
        }
        let content =
            candidates.iter().map(|path| sys.peek_file(path)).find(|it| *it != Err(Errno::NOENT));
        match content.unwrap_or(Err(Errno::NOENT)) {
            Ok(content) => {
                let text = String::from_utf8_lossy(&content).into_owned();
                self.status = if text.trim().is_empty() { 0 } else { before };
                self.stack.push(Frame::Sourced);
                self.stack.push(Frame::Script { text: text.into(), at: 0 });
            }
            Err(errno) => {
                self.fatal(sys, &format!(".: can't open '{path}': {}", errno_text(errno)));
            }
        }
    }

    fn export(&mut self, sys: &mut Syscalls<'_>, arguments: &[String], readonly: bool) {
        if matches!(arguments, [] | [_]) && arguments.first().is_none_or(|word| word == "-p") {
            let word = if readonly { "readonly" } else { "export" };
            for (name, variable) in &self.variables {
                if if readonly { variable.readonly } else { variable.exported } {
                    let value = variable.value.as_ref().map(|value| format!("={}", quote(value)));
                    self.out.line(&format!("{word} {name}{}", value.unwrap_or_default()));
                }
            }
            self.stack.push(Frame::Flush);
            return;
        }
        for word in arguments {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (word.as_str(), None),
            };
            if !is_name(name) {
                self.fatal(sys, &format!("{name}: bad variable name"));
                return;
            }
            if let Some(value) = value
                && let Err(message) = self.assign(name, value)
            {
                self.fatal(sys, &message);
                return;
            }
            let variable = self.variables.entry(name.to_owned()).or_default();
            variable.exported |= !readonly;
            variable.readonly |= readonly;
        }
    }

    fn unset(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        let mut functions = false;
        for name in arguments {
            match name.as_str() {
                "-f" => functions = true,
                "-v" => functions = false,
                name if functions => {
                    self.functions.remove(name);
                }
                name if self.is_readonly(name) => {
                    self.fatal(sys, &format!("{name}: is read only"));
                    return;
                }
                name => {
                    self.variables.remove(name);
                }
            }
        }
    }

    fn set(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        if arguments.is_empty() {
            for (name, variable) in &self.variables {
                if let Some(value) = &variable.value {
                    self.out.line(&format!("{name}={}", quote(value)));
                }
            }
            self.stack.push(Frame::Flush);
            return;
        }
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let on = word.starts_with('-');
            match word.as_str() {
                "--" => {
                    self.parameters = words.cloned().collect();
                    return;
                }
                "-o" | "+o" => {
                    let name = words.next().map_or("", String::as_str);
                    if !self.options.set_named(name, on) {
                        self.fatal(sys, &format!("set: illegal option {word} {name}"));
                        return;
                    }
                }
                word if word.len() > 1 && word.starts_with(['-', '+']) => {
                    for letter in word[1..].chars() {
                        if letter == 'o' {
                            let name = words.next().map_or("", String::as_str);
                            if self.options.set_named(name, on) {
                                continue;
                            }
                        } else if self.options.set(letter, on) {
                            continue;
                        }
                        self.fatal(sys, &format!("set: illegal option -{letter}"));
                        return;
                    }
                }
                _ => {
                    self.parameters = std::iter::once(word).chain(words).cloned().collect();
                    return;
                }
            }
        }
    }

    fn shift(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        let count = match arguments.first().map(|text| text.parse::<usize>()) {
            None => 1,
            Some(Ok(count)) => count,
            Some(Err(_)) => {
                self.fatal(sys, &format!("Illegal number: {}", arguments[0]));
                return;
            }
        };
        if count > self.parameters.len() {
            self.status = 1;
        } else {
            self.parameters.drain(..count);
        }
    }

    fn trap(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        let name_of = |signal: u8| match signal {
            0 => "EXIT".to_owned(),
            signal => signals::NAMES
                .iter()
                .find(|(_, number)| *number == signal)
                .map_or_else(|| signal.to_string(), |(name, _)| (*name).to_owned()),
        };
        let (script, names) = match arguments {
            [] => {
                for (signal, script) in &self.traps {
                    self.out.line(&format!("trap -- {} {}", quote(script), name_of(*signal)));
                }
                self.stack.push(Frame::Flush);
                return;
            }
            [dashes, rest @ ..] if dashes == "--" => return self.trap(sys, rest),
            [only] => (None, std::slice::from_ref(only)),
            [reset, names @ ..] if reset == "-" => (None, names),
            // A number first means that all are to be reset.
            [number, ..] if number.parse::<u8>().is_ok() => (None, arguments),
            [script, names @ ..] => (Some(script.clone()), names),
        };
        for name in names {
            let signal = if name == "EXIT" { Some(0) } else { signals::parse(name) };
            let Some(signal) = signal else {
                self.complain(&format!("trap: {name}: invalid signal specification"));
                self.status = 1;
                return;
            };
            let disposed = match &script {
                _ if signal == 0 => Ok(()),
                None => sys.default_signal(signal),
                Some(script) if script.is_empty() => sys.ignore_signal(signal),
                Some(_) => sys.catch_signal(signal),
            };
            // What cannot be caught may be named, to no effect.
            debug_assert!(
                matches!(disposed, Ok(()) | Err(Errno::INVAL)),
                "no other error is known"
            );
            match &script {
                Some(script) => self.traps.insert(signal, script.clone()),
                None => self.traps.remove(&signal),
            };
        }
    }

    fn cd(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        let arguments = match arguments.first().map(String::as_str) {
            Some("-L" | "-P" | "--") => &arguments[1..],
            _ => arguments,
        };
        let target = match arguments.first().map(String::as_str) {
            None => self.get("HOME").unwrap_or_else(|| "/".to_owned()),
            Some("-") => self.get("OLDPWD").unwrap_or_default(),
            Some(path) => path.to_owned(),
        };
        if let Err(errno) = sys.chdir(&target) {
            self.complain(&format!("cd: can't cd to {target}: {}", errno_text(errno)));
            self.status = 2;
            return;
        }
        let old = self.get("PWD").unwrap_or_default();
        let new = logical(&old, &target);
        self.put("OLDPWD", old);
        self.put("PWD", new.clone());
        if arguments.first().is_some_and(|word| word == "-") {
            self.out.line(&new);
            self.stack.push(Frame::Flush);
        }
    }

    fn command(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        match arguments.first().map(String::as_str) {
            None => {}
            Some("-v" | "-V") => {
                for name in &arguments[1..] {
                    match self.describe(sys, name) {
                        Some(text) => self.out.line(&text),
                        None => self.status = 127,
                    }
                }
                self.stack.push(Frame::Flush);
            }
            Some("-p") if arguments.len() > 1 => self.run_without_function(sys, &arguments[1..]),
            Some(_) => self.run_without_function(sys, arguments),
        }
    }

    fn type_of(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        for name in arguments {
            let text = match self.describe(sys, name) {
                Some(_) if self.functions.contains_key(name) => format!("{name} is a function"),
                Some(own) if own == *name && !name.contains('/') => {
                    format!("{name} is a shell builtin")
                }
                Some(path) => format!("{name} is {path}"),
                None => {
                    self.status = 127;
                    format!("{name}: not found")
                }
            };
            self.out.line(&text);
        }
        self.stack.push(Frame::Flush);
    }

    fn wait(&mut self, arguments: &[String]) {
        let mut pids = Vec::new();
        for word in arguments {
            match word.parse() {
                Ok(pid) => pids.push(pid),
                Err(_) => {
                    self.complain(&format!("wait: Illegal number: {word}"));
                    self.status = 2;
                    return;
                }
            }
        }
        self.stack.push(Frame::WaitJobs { all: pids.is_empty(), pids });
    }

    fn umask(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        match arguments.first() {
            None => {
                let mask = sys.umask(0);
                sys.umask(mask);
                self.out.line(&format!("{mask:04o}"));
                self.stack.push(Frame::Flush);
            }
            Some(text) => match u32::from_str_radix(text, 8) {
                Ok(mask) if mask <= 0o777 => {
                    sys.umask(mask);
                }
                _ => {
                    self.complain(&format!("umask: illegal mode: {text}"));
                    self.status = 2;
                }
            },
        }
    }

    fn local(&mut self, sys: &mut Syscalls<'_>, arguments: &[String]) {
        let Some(at) = self.stack.iter().rposition(|frame| matches!(frame, Frame::Function { .. }))
        else {
            self.fatal(sys, "local: not in a function");
            return;
        };
        for word in arguments {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (word.as_str(), None),
            };
            if !is_name(name) {
                self.fatal(sys, &format!("local: {name}: bad variable name"));
                return;
            }
            let former = self.variables.get(name).cloned();
            if let Frame::Function { locals, .. } = &mut self.stack[at] {
                locals.push((name.to_owned(), former));
            }
            if let Some(value) = value
                && let Err(message) = self.assign(name, value.to_owned())
            {
                self.fatal(sys, &message);
                return;
            }
        }
    }

    fn read(&mut self, arguments: &[String]) {
        let (mut raw, mut names) = (false, arguments);
        while let [word, rest @ ..] = names
            && word.starts_with('-')
        {
            match word.as_str() {
                "-r" => raw = true,
                "--" => {}
                other => {
                    self.complain(&format!("read: illegal option {other}"));
                    self.status = 2;
                    return;
                }
            }
            names = rest;
            if word == "--" {
                break;
            }
        }
        if let Some(name) = names.iter().find(|name| !is_name(name)) {
            self.complain(&format!("read: {name}: bad variable name"));
            self.status = 2;
            return;
        }
        let names = if names.is_empty() { vec!["REPLY".to_owned()] } else { names.to_vec() };
        let (line, escaped) = (Vec::new(), Vec::new());
        self.stack.push(Frame::Read { names, raw, line, escaped, after_backslash: false });
    }

    /// Reads on in the line that `read` wants, a byte at a time.
    pub(super) fn read_on(
        &mut self,
        sys: &mut Syscalls<'_>,
        names: Vec<String>,
        raw: bool,
        mut line: Vec<u8>,
        mut escaped: Vec<usize>,
        mut after_backslash: bool,
    ) -> Step {
        let whole = loop {
            match sys.read(0, 1) {
                Ok(bytes) => match bytes.first() {
                    None => break false,
                    Some(b'\n') if after_backslash => after_backslash = false,
                    Some(b'\n') => break true,
                    Some(b'\\') if !raw && !after_backslash => after_backslash = true,
                    Some(0) => {}
                    Some(byte) => {
                        if std::mem::take(&mut after_backslash) {
                            escaped.push(line.len());
                        }
                        line.push(*byte);
                    }
                },
                Err(Errno::AGAIN) => {
                    self.stack.push(Frame::Read { names, raw, line, escaped, after_backslash });
                    return Step::Block(WaitFor::readable(0));
                }
                Err(errno) => {
                    self.complain(&format!("read error: {}", errno_text(errno)));
                    break false;
                }
            }
        };
        self.status = u8::from(!whole);
        let separators = self.get("IFS").unwrap_or_else(|| " \t\n".to_owned());
        for (name, value) in names.iter().zip(split_line(&line, &escaped, &separators, names.len()))
        {
            if let Err(message) = self.assign(name, value) {
                self.fatal(sys, &message);
                break;
            }
        }
        Step::Continue
    }
}

/// Cuts a line for `read`: the last name gets all that is left.
fn split_line(line: &[u8], escaped: &[usize], separators: &str, count: usize) -> Vec<String> {
    let is_separator =
        |at: usize| separators.as_bytes().contains(&line[at]) && !escaped.contains(&at);
    let is_blank = |at: usize| is_separator(at) && matches!(line[at], b' ' | b'\t' | b'\n');
    let (mut at, mut values) = (0, Vec::with_capacity(count));
    let skip_blanks = |at: &mut usize| {
        while *at < line.len() && is_blank(*at) {
            *at += 1;
        }
    };
    skip_blanks(&mut at);
    while values.len() + 1 < count {
        let start = at;
        while at < line.len() && !is_separator(at) {
            at += 1;
        }
        values.push(String::from_utf8_lossy(&line[start..at]).into_owned());
        skip_blanks(&mut at);
        if at < line.len() && is_separator(at) && !is_blank(at) {
            at += 1;
            skip_blanks(&mut at);
        }
    }
    let mut end = line.len();
    while end > at && is_blank(end - 1) {
        end -= 1;
    }
    // A single separator that ends the last field is no part of it.
    let inner = (at..end).filter(|index| is_separator(*index)).count();
    if inner == 1 && end > at && is_separator(end - 1) {
        end -= 1;
    }
    values.push(String::from_utf8_lossy(&line[at..end]).into_owned());
    values
}

/// Goes from a directory along a path, by names alone.
fn logical(from: &str, path: &str) -> String {
    let whole = if path.starts_with('/') { path.to_owned() } else { format!("{from}/{path}") };
    let mut names: Vec<&str> = Vec::new();
    for name in whole.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
    format!("/{}", names.join("/"))
}

/// Writes a value so that a shell reads it back.
fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\'', "'\\''"))
}
