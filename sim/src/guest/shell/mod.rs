//! `sh`: a POSIX shell whose whole state, in the middle of any command, is a value.
//!
//! A script is read command by command, as shells do, and run by a stack of [`Frame`]s. Each step of the process
//! carries out one transition of the frame on top, so that the shell can be saved between any two of them.

mod arithmetic;
mod ast;
mod builtins;
mod expand;
mod jobs;
mod lexer;
mod parser;
mod pattern;
mod redirect;
mod run;
mod simple;
mod ulimit;

use super::{
    applets::Out,
    program::{Step, WaitFor},
    signals,
    syscalls::{FdStat, Syscalls},
};
use ast::Command;
use lexer::ParseError;
use run::Frame;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};
use vm_guest_agent::os::Errno;

/// How deep functions, scripts and compound commands may be nested while they run.
const MAX_FRAMES: usize = 4000;

/// A shell in the middle of its work.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Shell {
    arguments: Vec<String>,
    /// `$0`.
    name: String,
    /// `$1` and so on.
    parameters: Vec<String>,
    variables: BTreeMap<String, Variable>,
    functions: BTreeMap<String, Arc<Command>>,
    options: Options,
    status: u8,
    /// `$$`, which a subshell keeps.
    main_pid: u32,
    last_background: Option<u32>,
    /// Background children, with the status of those that were reaped.
    jobs: BTreeMap<u32, Option<u8>>,
    /// Commands by signal, 0 being the shell's end; an empty one ignores.
    traps: BTreeMap<u8, String>,
    arrived: VecDeque<u8>,
    stack: Vec<Frame>,
    out: Out,
    is_subshell: bool,
    /// A failing command does not end a subshell that is part of a condition.
    forgiving: bool,
    interactive: bool,
    started: bool,
    ending: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Variable {
    /// `None` where it is exported or read only but was never set.
    value: Option<String>,
    exported: bool,
    readonly: bool,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Options {
    errexit: bool,
    nounset: bool,
    noglob: bool,
    xtrace: bool,
    pipefail: bool,
    noexec: bool,
}

impl Shell {
    /// Makes a shell that will read its arguments in its first step.
    pub(super) fn start(argv: &[String]) -> Self {
        Self {
            arguments: argv.to_vec(),
            name: argv.first().cloned().unwrap_or_else(|| "sh".to_owned()),
            parameters: Vec::new(),
            variables: BTreeMap::new(),
            functions: BTreeMap::new(),
            options: Options::default(),
            status: 0,
            main_pid: 0,
            last_background: None,
            jobs: BTreeMap::new(),
            traps: BTreeMap::new(),
            arrived: VecDeque::new(),
            stack: Vec::new(),
            out: Out::default(),
            is_subshell: false,
            forgiving: false,
            interactive: false,
            started: false,
            ending: false,
        }
    }

    pub(super) fn signal(&mut self, _: &mut Syscalls<'_>, signal: u8) {
        if !self.arrived.contains(&signal) {
            self.arrived.push_back(signal);
        }
    }

    pub(super) fn step(&mut self, sys: &mut Syscalls<'_>) -> Step {
        if !self.started {
            self.started = true;
            self.begin(sys);
            return Step::Continue;
        }
        if let Some(step) = self.run_traps(sys) {
            return step;
        }
        let Some(frame) = self.stack.pop() else {
            return self.end(sys);
        };
        if self.stack.len() > MAX_FRAMES {
            self.complain("maximum nesting reached");
            self.exit(sys, 2);
            return Step::Continue;
        }
        self.advance(sys, frame)
    }

    fn begin(&mut self, sys: &mut Syscalls<'_>) {
        self.main_pid = sys.getpid();
        for (name, value) in sys.environment().iter().filter(|(name, _)| parser::is_name(name)) {
            let value = Some(value.clone());
            self.variables
                .insert(name.clone(), Variable { value, exported: true, readonly: false });
        }
        if let Ok(cwd) = sys.getcwd() {
            self.put("PWD", cwd);
        }
        self.put("IFS", " \t\n".to_owned());
        self.put("OPTIND", "1".to_owned());
        self.put("PPID", sys.getppid().to_string());
        let mut words: VecDeque<String> = self.arguments.iter().skip(1).cloned().collect();
        let (mut is_command, mut from_input) = (false, false);
        while let Some(word) =
            words.front().filter(|word| word.len() > 1 && word.starts_with(['-', '+']))
        {
            let word = word.clone();
            words.pop_front();
            if word == "--" {
                break;
            }
            for letter in word[1..].chars() {
                match letter {
                    'c' => is_command = true,
                    's' => from_input = true,
                    'i' => self.interactive = true,
                    'l' => {}
                    letter if self.options.set(letter, word.starts_with('-')) => {}
                    letter => {
                        self.complain(&format!("illegal option -{letter}"));
                        self.exit(sys, 2);
                        return;
                    }
                }
            }
        }
        if is_command {
            let Some(script) = words.pop_front() else {
                self.complain("-c requires an argument");
                self.exit(sys, 2);
                return;
            };
            if let Some(name) = words.pop_front() {
                self.name = name;
            }
            self.stack.push(Frame::Script { text: script.into(), at: 0 });
        } else if let (Some(path), false) = (words.front().cloned(), from_input) {
            words.pop_front();
            match sys.peek_file(&path) {
                Ok(content) => {
                    let text = String::from_utf8_lossy(&content).into_owned();
                    self.stack.push(Frame::Script { text: text.into(), at: 0 });
                    self.name = path;
                }
                Err(errno) => {
                    let text = super::applets::errno_text(errno);
                    self.complain(&format!("can't open '{path}': {text}"));
                    self.exit(sys, if errno == Errno::NOENT { 127 } else { 126 });
                }
            }
        } else {
            let is_terminal = |fd| sys.fstat(fd) == Ok(FdStat::Terminal);
            self.interactive |= is_terminal(0) && is_terminal(2);
            if self.interactive {
                self.prompt(sys, "PS1", if sys.uid() == 0 { "# " } else { "$ " });
            }
            self.stack.push(Frame::Input { line: Vec::new(), text: String::new() });
        }
        self.parameters = words.into();
    }

    /// Begins what a trapped signal asks for, unless a command in the foreground has to end first.
    fn run_traps(&mut self, _: &mut Syscalls<'_>) -> Option<Step> {
        if self.arrived.is_empty() || self.ending {
            return None;
        }
        match self.stack.last() {
            Some(Frame::Wait { .. } | Frame::Collect { .. } | Frame::Flush) => return None,
            Some(Frame::WaitJobs { .. }) => {
                self.stack.pop();
                self.status = 128 + self.arrived.front().copied().unwrap_or(0);
            }
            _ => {}
        }
        let signal = self.arrived.pop_front()?;
        if let Some(script) = self.traps.get(&signal).filter(|script| !script.is_empty()) {
            let text = script.as_str().into();
            self.stack.push(Frame::Status(self.status));
            self.stack.push(Frame::Script { text, at: 0 });
        }
        Some(Step::Continue)
    }

    /// Ends the shell when nothing is left to do, after its exit trap.
    fn end(&mut self, sys: &mut Syscalls<'_>) -> Step {
        if let Some(script) = self.traps.remove(&0).filter(|script| !script.is_empty()) {
            self.ending = false;
            self.stack.push(Frame::Status(self.status));
            self.stack.push(Frame::Script { text: script.into(), at: 0 });
            return Step::Continue;
        }
        self.ending = true;
        match self.out.flush(sys) {
            super::applets::Flush::Wait(wait) => Step::Block(wait),
            _ => Step::Exit(self.status),
        }
    }

    /// Gives up all that is left to do but the exit trap.
    fn exit(&mut self, sys: &mut Syscalls<'_>, status: u8) {
        // Messages go where they would have gone; what cannot be written now is written at the end.
        self.out.flush(sys);
        while let Some(frame) = self.stack.pop() {
            self.leave(sys, frame);
        }
        self.status = status;
        self.ending = true;
    }

    /// Reads the next line of a script and runs it; what stands behind goes on later.
    fn script(&mut self, sys: &mut Syscalls<'_>, text: Arc<str>, at: usize) {
        match parser::next_line(&text, at) {
            Ok((Some(command), next)) => {
                let is_last = text[next..].trim_matches([' ', '\t', '\n', ';']).is_empty();
                if !is_last {
                    self.stack.push(Frame::Script { text, at: next });
                }
                if !self.options.noexec {
                    self.stack.push(Frame::Run(command));
                }
            }
            Ok((None, _)) => {}
            Err(ParseError::Incomplete(message) | ParseError::Syntax(message)) => {
                self.syntax_error(sys, &message);
            }
        }
    }

    fn syntax_error(&mut self, sys: &mut Syscalls<'_>, message: &str) {
        let text = match message {
            "bad substitution" => message.to_owned(),
            _ => format!("syntax error: {message}"),
        };
        self.fatal(sys, &text);
    }

    /// Tells of an error that ends a script, or the line of an interactive shell.
    fn fatal(&mut self, sys: &mut Syscalls<'_>, message: &str) {
        self.complain(message);
        if self.interactive && !self.is_subshell {
            while let Some(frame) = self.stack.pop() {
                if matches!(frame, Frame::Input { .. }) {
                    self.stack.push(frame);
                    break;
                }
                self.leave(sys, frame);
            }
            self.status = 2;
        } else {
            self.exit(sys, 2);
        }
    }

    /// Reads on in standard input, a byte at a time so that nothing is taken from the commands that share it.
    fn input(&mut self, sys: &mut Syscalls<'_>, mut line: Vec<u8>, mut text: String) -> Step {
        loop {
            let ended = match sys.read(0, 1) {
                Ok(bytes) if bytes.is_empty() => true,
                Ok(bytes) => {
                    line.extend_from_slice(&bytes);
                    false
                }
                Err(Errno::AGAIN) => {
                    self.stack.push(Frame::Input { line, text });
                    return Step::Block(WaitFor::readable(0));
                }
                Err(_) => true,
            };
            if !ended && line.last() != Some(&b'\n') {
                continue;
            }
            text.push_str(&String::from_utf8_lossy(&std::mem::take(&mut line)));
            match parser::next_line(&text, 0) {
                Err(ParseError::Incomplete(_)) if !ended => {
                    self.prompt(sys, "PS2", "> ");
                    continue;
                }
                Err(ParseError::Incomplete(message) | ParseError::Syntax(message)) => {
                    if !ended {
                        self.stack.push(Frame::Input { line, text: String::new() });
                    }
                    self.syntax_error(sys, &message);
                }
                Ok((None, _)) if ended => {}
                Ok((command, _)) => {
                    if !ended {
                        self.stack.push(Frame::Input { line, text: String::new() });
                    }
                    if self.interactive {
                        self.stack.push(Frame::Prompt);
                    }
                    self.stack.extend(command.map(Frame::Run));
                }
            }
            return Step::Continue;
        }
    }

    fn prompt(&mut self, _: &Syscalls<'_>, name: &str, default: &str) {
        if self.interactive {
            let text = self.get(name).unwrap_or_else(|| default.to_owned());
            self.out.put_to(2, text.as_bytes());
            self.stack.push(Frame::Flush);
        }
    }

    // Variables.

    fn get(&self, name: &str) -> Option<String> {
        self.variables.get(name).and_then(|it| it.value.clone())
    }

    fn is_readonly(&self, name: &str) -> bool {
        self.variables.get(name).is_some_and(|it| it.readonly)
    }

    fn put(&mut self, name: &str, value: String) {
        self.variables.entry(name.to_owned()).or_default().value = Some(value);
    }

    /// Sets a variable, or tells that it must not be.
    fn assign(&mut self, name: &str, value: String) -> Result<(), String> {
        if self.is_readonly(name) {
            return Err(format!("{name}: is read only"));
        }
        self.put(name, value);
        Ok(())
    }

    /// Gives a variable's or a special parameter's value.
    fn parameter(&self, name: &str) -> Option<String> {
        let separated =
            || self.get("IFS").map_or(" ".to_owned(), |it| it.chars().take(1).collect());
        match name {
            "?" => Some(self.status.to_string()),
            "$" => Some(self.main_pid.to_string()),
            "#" => Some(self.parameters.len().to_string()),
            "!" => self.last_background.map(|pid| pid.to_string()),
            "-" => Some(self.options.letters()),
            "0" => Some(self.name.clone()),
            "@" | "*" if self.parameters.is_empty() => None,
            "@" => Some(self.parameters.join(" ")),
            "*" => Some(self.parameters.join(&separated())),
            name if name.starts_with(|c: char| c.is_ascii_digit()) => {
                let index: usize = name.parse().ok()?;
                self.parameters.get(index.checked_sub(1)?).cloned()
            }
            name => self.get(name),
        }
    }

    fn exported(&self) -> Vec<(String, String)> {
        let exported = self.variables.iter().filter(|(_, it)| it.exported);
        exported.filter_map(|(name, it)| Some((name.clone(), it.value.clone()?))).collect()
    }

    /// Writes a message of the shell on standard error.
    fn complain(&mut self, message: &str) {
        let name = self.name.rsplit('/').next().unwrap_or("sh").to_owned();
        self.out.put_to(2, format!("{name}: {message}\n").as_bytes());
        self.stack.push(Frame::Flush);
    }
}

impl Options {
    /// Sets an option by its letter, and says whether there is such one.
    fn set(&mut self, letter: char, on: bool) -> bool {
        let option = match letter {
            'e' => &mut self.errexit,
            'u' => &mut self.nounset,
            'f' => &mut self.noglob,
            'x' => &mut self.xtrace,
            'n' => &mut self.noexec,
            _ => return false,
        };
        *option = on;
        true
    }

    fn set_named(&mut self, name: &str, on: bool) -> bool {
        match name {
            "errexit" => self.set('e', on),
            "nounset" => self.set('u', on),
            "noglob" => self.set('f', on),
            "xtrace" => self.set('x', on),
            "pipefail" => {
                self.pipefail = on;
                true
            }
            _ => false,
        }
    }

    fn letters(&self) -> String {
        let all =
            [('e', self.errexit), ('u', self.nounset), ('f', self.noglob), ('x', self.xtrace)];
        all.iter().filter(|(_, on)| *on).map(|(letter, _)| letter).collect()
    }
}

/// Gives the status that stands for how a child ended.
fn status_of(exit: vm_guest_agent::os::ChildExit) -> u8 {
    match exit {
        vm_guest_agent::os::ChildExit::Exited(code) => code,
        vm_guest_agent::os::ChildExit::Signaled(signal) => signal.saturating_add(128),
    }
}

/// What the shell says of a child in the foreground that a signal ended.
fn obituary(signal: u8) -> Option<&'static str> {
    Some(match signal {
        signals::HUP => "Hangup",
        3 => "Quit",
        4 => "Illegal instruction",
        6 => "Aborted",
        7 => "Bus error",
        8 => "Floating point exception",
        signals::KILL => "Killed",
        10 => "User defined signal 1",
        11 => "Segmentation fault",
        12 => "User defined signal 2",
        14 => "Alarm clock",
        signals::TERM => "Terminated",
        _ => return None,
    })
}
