//! Simple commands: assignments, builtins, functions, programs.

use super::{
    Shell, Variable,
    ast::{Redirection, Simple},
    expand::{Expander, Halt},
    run::Frame,
};
use crate::guest::{
    applets::{self, DEFAULT_PATH, errno_text},
    syscalls::{ChildSpec, Syscalls},
};
use vm_guest_agent::os::{Errno, SysResult};

/// A simple command whose words are expanded.
pub(super) struct Parts {
    assignments: Vec<(String, String)>,
    pub(super) words: Vec<String>,
    redirections: Vec<Redirection>,
    targets: Vec<String>,
}

impl Expander<'_, '_> {
    pub(super) fn simple(&mut self, simple: &Simple) -> Result<Parts, Halt> {
        let words = self.fields(&simple.words)?;
        let targets = self.targets(&simple.redirections)?;
        let mut assignments = Vec::with_capacity(simple.assignments.len());
        for (name, value) in &simple.assignments {
            let value = self.text(value)?;
            // A later assignment of the same command sees an earlier one.
            if words.is_empty() {
                self.assigned.insert(name.clone(), value.clone());
            }
            assignments.push((name.clone(), value));
        }
        Ok(Parts { assignments, words, redirections: simple.redirections.clone(), targets })
    }
}

impl Shell {
    /// Runs a simple command. `substituted` is the status of its last substitution, if it had one.
    pub(super) fn simple(&mut self, sys: &mut Syscalls<'_>, parts: Parts, substituted: Option<u8>) {
        self.stack.push(Frame::Check);
        if self.options.xtrace {
            let assigned = parts.assignments.iter().map(|(name, value)| format!("{name}={value}"));
            let words: Vec<_> = assigned.chain(parts.words.iter().cloned()).collect();
            self.out.put_to(2, format!("+ {}\n", words.join(" ")).as_bytes());
            self.out.flush(sys);
        }
        let saved = match self.redirect(sys, &parts.redirections, &parts.targets) {
            Ok(saved) => saved,
            Err(message) => {
                let is_special =
                    parts.words.first().is_some_and(|name| super::builtins::is_special(name));
                if is_special {
                    self.fatal(sys, &message);
                } else {
                    self.complain(&message);
                    self.status = 1;
                }
                return;
            }
        };
        let Some(name) = parts.words.first().cloned() else {
            self.restore(sys, saved);
            self.status = substituted.unwrap_or(0);
            for (name, value) in parts.assignments {
                if let Err(message) = self.assign(&name, value) {
                    self.fatal(sys, &message);
                    return;
                }
            }
            return;
        };
        if name == "exec" {
            self.exec(sys, &parts, saved);
            return;
        }
        let is_special = super::builtins::is_special(&name);
        let function = self.functions.get(&name).filter(|_| !is_special).cloned();
        let is_builtin = super::builtins::is_builtin(&name);
        if function.is_none() && !is_builtin {
            self.program(sys, &parts, saved);
            return;
        }
        let former = match self.assign_all(&parts.assignments) {
            Ok(former) => former,
            Err(message) => {
                self.restore(sys, saved);
                self.fatal(sys, &message);
                return;
            }
        };
        if !is_special && !former.is_empty() {
            self.stack.push(Frame::Variables(former));
        }
        if !saved.is_empty() {
            self.stack.push(Frame::Restore(saved));
        }
        match function {
            Some(body) => {
                let parameters = std::mem::replace(&mut self.parameters, parts.words[1..].to_vec());
                self.stack.push(Frame::Function { parameters, locals: Vec::new() });
                self.stack.push(Frame::Run(body));
            }
            None => self.builtin(sys, &parts.words),
        }
    }

    /// Sets variables, and gives what they were.
    fn assign_all(
        &mut self,
        assignments: &[(String, String)],
    ) -> Result<Vec<(String, Option<Variable>)>, String> {
        let mut former = Vec::new();
        for (name, value) in assignments {
            former.push((name.clone(), self.variables.get(name).cloned()));
            self.assign(name, value.clone())?;
            // A function and what it starts see the variable in their environment.
            if let Some(variable) = self.variables.get_mut(name) {
                variable.exported = true;
            }
        }
        Ok(former)
    }

    fn environment(&self, assignments: &[(String, String)]) -> Vec<(String, String)> {
        let mut env = self.exported();
        for (name, value) in assignments {
            match env.iter_mut().find(|(known, _)| known == name) {
                Some((_, old)) => value.clone_into(old),
                None => env.push((name.clone(), value.clone())),
            }
        }
        env
    }

    fn find_program(&self, sys: &Syscalls<'_>, parts: &Parts) -> SysResult<String> {
        let given = parts.assignments.iter().rev().find(|(name, _)| name == "PATH");
        let path = given.map(|(_, path)| path.clone()).or_else(|| self.get("PATH"));
        applets::look_up(sys, &parts.words[0], path.as_deref().unwrap_or(DEFAULT_PATH))
    }

    /// Starts a program and waits for it, or becomes it where nothing else is left to do.
    fn program(&mut self, sys: &mut Syscalls<'_>, parts: &Parts, saved: super::redirect::Saved) {
        let env = self.environment(&parts.assignments);
        let found = self.find_program(sys, parts);
        let nothing_left = !self.interactive
            && self.traps.values().all(String::is_empty)
            && self.stack.iter().all(|frame| matches!(frame, Frame::Check | Frame::Restore(_)));
        if nothing_left {
            let failed = found.and_then(|path| self.become_program(sys, &path, parts, env));
            if let Err(errno) = failed {
                self.cannot_execute(&parts.words[0], errno);
            }
            self.stack.insert(self.stack.len().saturating_sub(1), Frame::Restore(saved));
            return;
        }
        let started = found.and_then(|path| {
            let mut spec = ChildSpec::new(path.clone(), parts.words.clone());
            spec.env = Some(env.clone());
            match sys.spawn(spec) {
                Err(Errno::NOEXEC) => {
                    let mut spec = ChildSpec::new("/bin/sh", script_words(&path, &parts.words));
                    spec.env = Some(env);
                    sys.spawn(spec)
                }
                other => other,
            }
        });
        match started {
            Ok(pid) => {
                self.restore(sys, saved);
                self.stack.push(Frame::Wait { pids: vec![pid], last: pid, failed: 0 });
            }
            Err(errno) => {
                self.stack.push(Frame::Restore(saved));
                self.cannot_execute(&parts.words[0], errno);
            }
        }
    }

    fn become_program(
        &mut self,
        sys: &mut Syscalls<'_>,
        path: &str,
        parts: &Parts,
        env: Vec<(String, String)>,
    ) -> SysResult<()> {
        match sys.exec(path, &parts.words, env.clone()) {
            // A file that is no program is a script.
            Err(Errno::NOEXEC) => sys.exec("/bin/sh", &script_words(path, &parts.words), env),
            other => other,
        }
    }

    fn cannot_execute(&mut self, name: &str, errno: Errno) {
        let text = match errno {
            Errno::NOENT => "not found".to_owned(),
            errno => errno_text(errno),
        };
        self.complain(&format!("{name}: {text}"));
        self.status = if errno == Errno::NOENT { 127 } else { 126 };
    }

    /// The `exec` builtin: redirections stay, and a program replaces the shell.
    fn exec(&mut self, sys: &mut Syscalls<'_>, parts: &Parts, saved: super::redirect::Saved) {
        Self::keep_redirections(sys, saved);
        self.status = 0;
        let program = Parts {
            assignments: parts.assignments.clone(),
            words: parts.words[1..].to_vec(),
            redirections: Vec::new(),
            targets: Vec::new(),
        };
        if program.words.is_empty() {
            for (name, value) in &parts.assignments {
                self.put(name, value.clone());
            }
            return;
        }
        let env = self.environment(&program.assignments);
        let found = self.find_program(sys, &program);
        if let Err(errno) = found.and_then(|path| self.become_program(sys, &path, &program, env)) {
            self.cannot_execute(&program.words[0], errno);
            let status = self.status;
            self.exit(sys, status);
        }
    }

    /// The `command` builtin: a builtin or program, but no function.
    pub(super) fn run_without_function(&mut self, sys: &mut Syscalls<'_>, words: &[String]) {
        if super::builtins::is_builtin(&words[0]) {
            self.builtin(sys, words);
            return;
        }
        let parts = Parts {
            assignments: Vec::new(),
            words: words.to_vec(),
            redirections: Vec::new(),
            targets: Vec::new(),
        };
        self.program(sys, &parts, Vec::new());
    }

    /// Says where a name leads, as `command -v` does.
    pub(super) fn describe(&self, sys: &Syscalls<'_>, name: &str) -> Option<String> {
        let is_own = self.functions.contains_key(name) || super::builtins::is_builtin(name);
        if is_own || name == "exec" {
            return Some(name.to_owned());
        }
        let path = self.get("PATH");
        let found = applets::look_up(sys, name, path.as_deref().unwrap_or(DEFAULT_PATH)).ok()?;
        sys.access(&found, 1).ok().map(|()| found)
    }
}

fn script_words(path: &str, words: &[String]) -> Vec<String> {
    let mut script = vec!["sh".to_owned(), path.to_owned()];
    script.extend(words.iter().skip(1).cloned());
    script
}
