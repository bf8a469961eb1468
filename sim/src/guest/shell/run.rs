//! The stack machine that runs commands.

use super::{
    Shell, Variable,
    ast::{Arm, Command, Redirection, Word},
    expand::{Expander, Halt},
    pattern,
};
use crate::guest::{
    applets::{Applet, Flush},
    program::{ProgramSlot, Step, WaitFor},
    syscalls::Syscalls,
};
use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use vm_guest_agent::os::Errno;

/// Something that is left to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Frame {
    /// Read on in a text.
    Script {
        text: Arc<str>,
        at: usize,
    },
    /// Read on in standard input: the line so far, and whole lines before it.
    Input {
        line: Vec<u8>,
        text: String,
    },
    Prompt,
    Run(Arc<Command>),
    List {
        list: Arc<Command>,
        at: usize,
    },
    /// The left side of `&&` or `||` runs.
    AndOr {
        right: Arc<Command>,
        on_success: bool,
    },
    Negate,
    /// A condition runs.
    If(Arc<Command>),
    WhileCondition {
        command: Arc<Command>,
        status: u8,
    },
    WhileBody(Arc<Command>),
    For {
        command: Arc<Command>,
        items: Arc<Vec<String>>,
        at: usize,
    },
    /// Words are expanded: the outputs of their substitutions so far, and `$?` from before them.
    Expand {
        command: Arc<Command>,
        outputs: Vec<String>,
        status: u8,
    },
    /// The output of a substitution is read.
    Collect {
        pid: u32,
        fd: u32,
        output: BytesMut,
    },
    /// Children in the foreground run; the last one's status counts.
    Wait {
        pids: Vec<u32>,
        last: u32,
        failed: u8,
    },
    /// The `wait` builtin.
    WaitJobs {
        pids: Vec<u32>,
        all: bool,
    },
    /// The `read` builtin.
    Read {
        names: Vec<String>,
        raw: bool,
        line: Vec<u8>,
        escaped: Vec<usize>,
        after_backslash: bool,
    },
    /// Descriptors are put back: each with where its former file is kept, if it had one.
    Restore(Vec<(u32, Option<u32>)>),
    /// A function ends: the parameters and the local variables' former values come back.
    Function {
        parameters: Vec<String>,
        locals: Vec<(String, Option<Variable>)>,
    },
    /// Variables are put back.
    Variables(Vec<(String, Option<Variable>)>),
    /// `.` or `eval` ends; `return` stops here for the former.
    Sourced,
    Status(u8),
    Flush,
    /// A command has ended: with `set -e` a failure ends the shell.
    Check,
}

impl Shell {
    /// Carries out one transition.
    pub(super) fn advance(&mut self, sys: &mut Syscalls<'_>, frame: Frame) -> Step {
        match frame {
            Frame::Script { text, at } => self.script(sys, text, at),
            Frame::Input { line, text } => return self.input(sys, line, text),
            Frame::Prompt => {
                let default = if sys.uid() == 0 { "# " } else { "$ " };
                self.prompt(sys, "PS1", default);
            }
            Frame::Run(command) => self.run(sys, command),
            Frame::List { list, at } => self.list(sys, list, at),
            Frame::AndOr { right, on_success } => {
                if (self.status == 0) == on_success {
                    self.stack.push(Frame::Run(right));
                }
            }
            Frame::Negate => self.status = u8::from(self.status == 0),
            Frame::If(command) => self.decide(&command),
            Frame::WhileCondition { command, status } => self.loop_decide(command, status),
            Frame::WhileBody(command) => self.loop_again(command),
            Frame::For { command, items, at } => self.for_next(sys, command, items, at),
            Frame::Expand { command, outputs, status } => {
                self.expand(sys, command, outputs, status);
            }
            Frame::Collect { pid, fd, output } => return self.collect(sys, pid, fd, output),
            Frame::Wait { pids, last, failed } => {
                return self.wait_foreground(sys, pids, last, failed);
            }
            Frame::WaitJobs { pids, all } => return self.wait_jobs(sys, pids, all),
            Frame::Read { names, raw, line, escaped, after_backslash } => {
                return self.read_on(sys, names, raw, line, escaped, after_backslash);
            }
            Frame::Status(status) => self.status = status,
            Frame::Flush => match self.out.flush(sys) {
                Flush::Done => {}
                Flush::Wait(wait) => {
                    self.stack.push(Frame::Flush);
                    return Step::Block(wait);
                }
                Flush::Failed => {
                    self.status = 1;
                    self.stack.push(Frame::Flush);
                }
            },
            Frame::Check => {
                if self.status != 0 && self.options.errexit && !self.forgives() {
                    let status = self.status;
                    self.exit(sys, status);
                }
            }
            frame @ (Frame::Restore(_)
            | Frame::Function { .. }
            | Frame::Variables(_)
            | Frame::Sourced) => self.leave(sys, frame),
        }
        Step::Continue
    }

    /// Undoes what a frame stands for when it ends or is given up.
    pub(super) fn leave(&mut self, sys: &mut Syscalls<'_>, frame: Frame) {
        match frame {
            Frame::Restore(saved) => self.restore(sys, saved),
            Frame::Function { parameters, locals } => {
                self.parameters = parameters;
                self.put_back(locals);
            }
            Frame::Variables(former) => self.put_back(former),
            Frame::Collect { fd, .. } => {
                // The descriptor is the shell's own and open.
                let closed = sys.close(fd);
                debug_assert!(closed.is_ok(), "an open descriptor closes");
            }
            _ => {}
        }
    }

    fn put_back(&mut self, former: Vec<(String, Option<Variable>)>) {
        for (name, variable) in former.into_iter().rev() {
            match variable {
                Some(variable) => self.variables.insert(name, variable),
                None => self.variables.remove(&name),
            };
        }
    }

    /// Says whether a failure is part of a condition.
    fn forgives(&self) -> bool {
        self.forgiving
            || self.stack.iter().any(|frame| {
                matches!(
                    frame,
                    Frame::AndOr { .. }
                        | Frame::Negate
                        | Frame::If(_)
                        | Frame::WhileCondition { .. }
                )
            })
    }

    fn run(&mut self, sys: &mut Syscalls<'_>, command: Arc<Command>) {
        match &*command {
            Command::Simple(_) | Command::Redirected { .. } | Command::Case { .. } => {
                self.stack.push(Frame::Expand {
                    command,
                    outputs: Vec::new(),
                    status: self.status,
                });
            }
            Command::For { words, .. } => match words {
                Some(_) => self.stack.push(Frame::Expand {
                    command,
                    outputs: Vec::new(),
                    status: self.status,
                }),
                None => {
                    let items = Arc::new(self.parameters.clone());
                    self.status = 0;
                    self.stack.push(Frame::For { command, items, at: 0 });
                }
            },
            Command::List(_) => self.stack.push(Frame::List { list: command, at: 0 }),
            Command::And(left, right) | Command::Or(left, right) => {
                let on_success = matches!(&*command, Command::And(..));
                self.stack.push(Frame::AndOr { right: Arc::clone(right), on_success });
                self.stack.push(Frame::Run(Arc::clone(left)));
            }
            Command::If { condition, .. } => {
                let condition = Arc::clone(condition);
                self.stack.push(Frame::If(command));
                self.stack.push(Frame::Run(condition));
            }
            Command::While { condition, .. } => {
                let condition = Arc::clone(condition);
                self.stack.push(Frame::WhileCondition { command, status: 0 });
                self.stack.push(Frame::Run(condition));
            }
            Command::Function { name, body } => {
                self.functions.insert(name.clone(), Arc::clone(body));
                self.status = 0;
            }
            Command::Subshell(body) => self.subshell(sys, body),
            Command::Pipeline { negate, stages } => {
                if *negate {
                    self.stack.push(Frame::Negate);
                } else {
                    self.stack.push(Frame::Check);
                }
                match &stages[..] {
                    [only] => self.stack.push(Frame::Run(Arc::clone(only))),
                    stages => self.pipeline(sys, stages),
                }
            }
        }
    }

    fn subshell(&mut self, sys: &mut Syscalls<'_>, body: &Arc<Command>) {
        self.stack.push(Frame::Check);
        match self.fork(sys, body) {
            Ok(pid) => self.stack.push(Frame::Wait { pids: vec![pid], last: pid, failed: 0 }),
            Err(errno) => self.cannot_fork(sys, errno),
        }
    }

    pub(super) fn cannot_fork(&mut self, sys: &mut Syscalls<'_>, errno: Errno) {
        let text = crate::guest::applets::errno_text(errno);
        self.fatal(sys, &format!("can't fork: {text}"));
    }

    /// Starts a child that runs a command in a copy of this shell.
    pub(super) fn fork(
        &mut self,
        sys: &mut Syscalls<'_>,
        command: &Arc<Command>,
    ) -> Result<u32, Errno> {
        let (stack, forgiving) = (std::mem::take(&mut self.stack), self.forgiving);
        let out = std::mem::take(&mut self.out);
        let mut child = self.clone();
        (self.stack, self.out) = (stack, out);
        child.forgiving = forgiving || self.forgives();
        child.is_subshell = true;
        child.interactive = false;
        child.jobs.clear();
        child.arrived.clear();
        child.traps.retain(|_, script| script.is_empty());
        child.stack.push(Frame::Run(Arc::clone(command)));
        sys.fork(ProgramSlot::Applet(Box::new(Applet::Shell(Box::new(child)))))
    }

    fn pipeline(&mut self, sys: &mut Syscalls<'_>, stages: &[Arc<Command>]) {
        let (mut pids, mut input) = (Vec::new(), None);
        for (index, stage) in stages.iter().enumerate() {
            let is_last = index + 1 == stages.len();
            let made = if is_last { Ok(None) } else { sys.pipe().map(Some) };
            let started = made.and_then(|pipe| {
                let pid = self.fork(sys, stage)?;
                let mut child = sys.for_child(pid);
                if let Some(input) = input {
                    child.dup2(input, 0)?;
                    child.close(input)?;
                }
                if let Some((read, write)) = pipe {
                    child.dup2(write, 1)?;
                    child.close(read)?;
                    child.close(write)?;
                    sys.close(write)?;
                }
                if let Some(input) = input.take() {
                    sys.close(input)?;
                }
                input = pipe.map(|(read, _)| read);
                Ok(pid)
            });
            match started {
                Ok(pid) => pids.push(pid),
                Err(errno) => {
                    self.cannot_fork(sys, errno);
                    return;
                }
            }
        }
        let last = pids.last().copied().unwrap_or(0);
        self.stack.push(Frame::Wait { pids, last, failed: 0 });
    }

    fn list(&mut self, sys: &mut Syscalls<'_>, list: Arc<Command>, at: usize) {
        let Command::List(commands) = &*list else { return };
        let Some((command, in_background)) = commands.get(at) else {
            if commands.is_empty() {
                self.status = 0;
            }
            return;
        };
        let command = Arc::clone(command);
        let in_background = *in_background;
        if at + 1 < commands.len() {
            self.stack.push(Frame::List { list, at: at + 1 });
        }
        if in_background {
            self.background(sys, &command);
        } else {
            self.stack.push(Frame::Run(command));
        }
    }

    fn decide(&mut self, command: &Command) {
        let Command::If { then, otherwise, .. } = command else { return };
        let branch = if self.status == 0 { Some(then) } else { otherwise.as_ref() };
        self.status = 0;
        self.stack.extend(branch.map(|branch| Frame::Run(Arc::clone(branch))));
    }

    fn loop_decide(&mut self, command: Arc<Command>, status: u8) {
        let Command::While { body, until, .. } = &*command else { return };
        if (self.status == 0) == *until {
            self.status = status;
            return;
        }
        let body = Arc::clone(body);
        self.status = 0;
        self.stack.push(Frame::WhileBody(command));
        self.stack.push(Frame::Run(body));
    }

    pub(super) fn loop_again(&mut self, command: Arc<Command>) {
        let Command::While { condition, .. } = &*command else { return };
        let condition = Arc::clone(condition);
        self.stack.push(Frame::WhileCondition { command, status: self.status });
        self.stack.push(Frame::Run(condition));
    }

    fn for_next(
        &mut self,
        sys: &mut Syscalls<'_>,
        command: Arc<Command>,
        items: Arc<Vec<String>>,
        at: usize,
    ) {
        let Command::For { name, body, .. } = &*command else { return };
        let Some(item) = items.get(at) else { return };
        if let Err(message) = self.assign(name, item.clone()) {
            self.fatal(sys, &message);
            return;
        }
        let body = Arc::clone(body);
        self.stack.push(Frame::For { command, items, at: at + 1 });
        self.stack.push(Frame::Run(body));
    }

    /// Expands the words of a command and goes on with it, or runs a substitution first.
    fn expand(
        &mut self,
        sys: &mut Syscalls<'_>,
        command: Arc<Command>,
        outputs: Vec<String>,
        status: u8,
    ) {
        let substituted = std::mem::replace(&mut self.status, status);
        let mut expander = Expander::new(self, sys, &outputs);
        let expanded = match &*command {
            Command::Simple(simple) => expander.simple(simple).map(Expanded::Simple),
            Command::Redirected { redirections, .. } => {
                expander.targets(redirections).map(Expanded::Redirected)
            }
            Command::For { words, .. } => {
                expander.fields(words.as_deref().unwrap_or_default()).map(Expanded::For)
            }
            Command::Case { word, arms } => expander.arm(word, arms).map(Expanded::Case),
            _ => return,
        };
        let assigned = std::mem::take(&mut expander.assigned);
        match expanded {
            Err(Halt::Need(substitution)) => {
                self.stack.push(Frame::Expand { command, outputs, status });
                self.substitute(sys, &substitution);
            }
            Err(Halt::Fatal(message)) => self.fatal(sys, &message),
            Ok(expanded) => {
                assigned.into_iter().for_each(|(name, value)| self.put(&name, value));
                let substituted = Some(substituted).filter(|_| !outputs.is_empty());
                match expanded {
                    Expanded::Simple(parts) => self.simple(sys, parts, substituted),
                    Expanded::Redirected(targets) => {
                        if let Command::Redirected { body, redirections } = &*command {
                            self.redirected(sys, body, redirections, &targets);
                        }
                    }
                    Expanded::For(items) => {
                        self.status = 0;
                        self.stack.push(Frame::For { command, items: Arc::new(items), at: 0 });
                    }
                    Expanded::Case(body) => {
                        self.status = 0;
                        self.stack.extend(body.map(Frame::Run));
                    }
                }
            }
        }
    }

    fn redirected(
        &mut self,
        sys: &mut Syscalls<'_>,
        body: &Arc<Command>,
        redirections: &[Redirection],
        targets: &[String],
    ) {
        match self.redirect(sys, redirections, targets) {
            Ok(saved) => {
                self.stack.push(Frame::Restore(saved));
                self.stack.push(Frame::Run(Arc::clone(body)));
            }
            Err(message) => {
                self.stack.push(Frame::Check);
                self.complain(&message);
                self.status = 1;
            }
        }
    }

    fn substitute(&mut self, sys: &mut Syscalls<'_>, command: &Arc<Command>) {
        let started = sys.pipe().and_then(|(read, write)| {
            let pid = self.fork(sys, command)?;
            let mut child = sys.for_child(pid);
            child.dup2(write, 1)?;
            child.close(read)?;
            if write != 1 {
                child.close(write)?;
            }
            sys.close(write)?;
            // Kept out of the way of the descriptors that scripts use.
            let kept = sys.dup_above(read, 10)?;
            sys.close(read)?;
            Ok((pid, kept))
        });
        match started {
            Ok((pid, fd)) => {
                self.stack.push(Frame::Collect { pid, fd, output: BytesMut::new() });
            }
            Err(errno) => self.cannot_fork(sys, errno),
        }
    }

    fn collect(&mut self, sys: &mut Syscalls<'_>, pid: u32, fd: u32, mut output: BytesMut) -> Step {
        match sys.read(fd, 64 << 10) {
            Ok(bytes) if bytes.is_empty() => {
                let mut text = String::from_utf8_lossy(&output).replace('\0', "");
                text.truncate(text.trim_end_matches('\n').len());
                if let Some(Frame::Expand { outputs, .. }) = self.stack.last_mut() {
                    outputs.push(text);
                }
                self.leave(sys, Frame::Collect { pid, fd, output });
                self.stack.push(Frame::Wait { pids: vec![pid], last: pid, failed: 0 });
                return Step::Continue;
            }
            Ok(bytes) => output.extend_from_slice(&bytes),
            Err(Errno::AGAIN) => {
                self.stack.push(Frame::Collect { pid, fd, output });
                return Step::Block(WaitFor::readable(fd));
            }
            Err(_) => output.clear(),
        }
        self.stack.push(Frame::Collect { pid, fd, output });
        Step::Continue
    }
}

/// What the words of a command came to.
enum Expanded {
    Simple(super::simple::Parts),
    Redirected(Vec<String>),
    For(Vec<String>),
    Case(Option<Arc<Command>>),
}

impl Expander<'_, '_> {
    fn arm(&mut self, word: &Word, arms: &[Arm]) -> Result<Option<Arc<Command>>, Halt> {
        let text = self.text(word)?;
        for arm in arms {
            for candidate in &arm.patterns {
                if pattern::matches(&self.pattern(candidate)?, &text) {
                    return Ok(arm.body.clone());
                }
            }
        }
        Ok(None)
    }

    /// Expands where redirections go.
    pub(super) fn targets(&mut self, redirections: &[Redirection]) -> Result<Vec<String>, Halt> {
        redirections.iter().map(|redirection| self.text(&redirection.target)).collect()
    }
}
