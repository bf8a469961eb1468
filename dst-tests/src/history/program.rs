//! Scripts and records as people read them: a short program, and a timeline.

use super::{
    record::{Record, StepRecord},
    script::{Act, Call, Disturbance, Program, Script, Step},
};
use std::fmt::{self, Write};

/// Gives a script as a short program; every line is a step.
#[must_use]
pub fn program(script: &Script) -> String {
    let mut text = String::new();
    for step in &script.steps {
        let _ = match step {
            Step::Together(calls) => {
                let calls: Vec<_> = calls.iter().map(|call| format!("    {call}")).collect();
                writeln!(text, "together {{\n{}\n}}", calls.join("\n"))
            }
            Step::Do(call) => writeln!(text, "{call}"),
            Step::Fault(disturbance) => writeln!(text, "{disturbance}"),
        };
    }
    text
}

/// Gives a script with what came of each step.
#[must_use]
pub fn timeline(script: &Script, record: &Record) -> Vec<String> {
    let mut lines = Vec::new();
    for (index, step) in script.steps.iter().enumerate() {
        let Some(seen) = record.steps.get(index) else { break };
        lines.extend(step_lines(index, step, seen));
    }
    lines
}

/// Gives one step with what came of it.
#[must_use]
pub fn step_lines(index: usize, step: &Step, seen: &StepRecord) -> Vec<String> {
    let mut lines = Vec::new();
    let fault = match step {
        Step::Fault(disturbance) => Some(disturbance.to_string()),
        _ => None,
    };
    let together = seen.calls.len() > 1;
    let calls = seen.calls.iter().map(|made| {
        let when =
            if together { format!("[{}–{}] ", made.began, made.ended) } else { String::new() };
        format!("{when}{}  → {}", made.call, made.outcome.text())
    });
    for line in fault.into_iter().chain(calls) {
        let number = if lines.is_empty() { format!("{index:4}") } else { "    ".to_owned() };
        lines.push(format!("{number}  {line}"));
    }
    let states: Vec<_> = seen.states.iter().map(|(vm, state)| format!("vm{vm} {state}")).collect();
    let fired: Vec<_> = seen.fired.iter().map(|kind| kind.name()).collect();
    let fired = match fired.is_empty() {
        true => String::new(),
        false => format!("; happened: {}", fired.join(", ")),
    };
    lines.push(format!("        {}{fired}", states.join(", ")));
    lines
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.after_ms > 0 {
            write!(f, "after {} ms: ", self.after_ms)?;
        }
        write_act(f, self.vm, &self.act)?;
        match self.drop_after_us {
            Some(after) => write!(f, ", dropped after {after} us"),
            None => Ok(()),
        }
    }
}

fn write_act(f: &mut fmt::Formatter<'_>, vm: u8, act: &Act) -> fmt::Result {
    match act {
        Act::Create => write!(f, "vm{vm} = create()"),
        Act::Forget => write!(f, "drop(vm{vm})"),
        Act::Start => write!(f, "vm{vm}.start()"),
        Act::Stop { grace_ms, signal } => {
            write!(f, "vm{vm}.stop(grace {grace_ms} ms, signal {signal})")
        }
        Act::Kill => write!(f, "vm{vm}.kill()"),
        Act::Pause => write!(f, "vm{vm}.pause()"),
        Act::Resume => write!(f, "vm{vm}.resume()"),
        Act::Wait => write!(f, "vm{vm}.wait()"),
        Act::WaitReady { timeout_ms } => write!(f, "vm{vm}.wait_ready({timeout_ms} ms)"),
        Act::Ping => write!(f, "vm{vm}.ping()"),
        Act::Exec { program, timeout_ms, output_limit } => {
            write!(f, "vm{vm}.exec({program}")?;
            if let Some(timeout) = timeout_ms {
                write!(f, ", timeout {timeout} ms")?;
            }
            if let Some(limit) = output_limit {
                write!(f, ", output limit {limit}")?;
            }
            f.write_str(")")
        }
        Act::Spawn { process, nonce } => write!(f, "p{process} = vm{vm}.spawn(keeper of {nonce})"),
        Act::Ask { process } => write!(f, "vm{vm}.attach(p{process}).ask()"),
        Act::Reap { process, signal } => {
            write!(f, "vm{vm}.attach(p{process}).signal({signal}).wait()")
        }
        Act::Processes => write!(f, "vm{vm}.processes()"),
        Act::Read { path } => write!(f, "vm{vm}.read_file({path:?})"),
        Act::Write { path, text, times, mode } => {
            write!(f, "vm{vm}.write_file({path:?}, {text:?} × {times}{})", bits(*mode))
        }
        Act::Stat { path } => write!(f, "vm{vm}.stat({path:?})"),
        Act::List { path } => write!(f, "vm{vm}.list_dir({path:?})"),
        Act::MakeDir { path, recursive, mode } => {
            write!(f, "vm{vm}.create_dir({path:?}{}{})", all(*recursive), bits(*mode))
        }
        Act::Remove { path, recursive } => write!(f, "vm{vm}.remove({path:?}{})", all(*recursive)),
        Act::Rename { from, to } => write!(f, "vm{vm}.rename({from:?}, {to:?})"),
        Act::Connect { port } => write!(f, "vm{vm}.connect({port})"),
        Act::Listen { port } => write!(f, "vm{vm}.listen({port})"),
        Act::Exchange { port, text, times } => {
            write!(f, "vm{vm}.listen({port}).exchange({text:?} × {times})")
        }
        Act::Inspect => write!(f, "vm{vm}.inspect()"),
        Act::Metrics => write!(f, "vm{vm}.metrics()"),
        Act::Random => write!(f, "vm{vm}.exec(random bytes)"),
        Act::Snapshot { into, tracked, base } => {
            let base = base.map(|base| format!("on s{base}")).unwrap_or_default();
            let tracked = if *tracked { "tracked" } else { "" };
            let comma = if !base.is_empty() && !tracked.is_empty() { ", " } else { "" };
            write!(f, "s{into} = vm{vm}.snapshot({tracked}{comma}{base})")
        }
        Act::Restore { from, resume } => write!(f, "vm{vm}.restore(s{from}, {})", stands(*resume)),
        Act::Revive { from, resume } => {
            write!(f, "vm{vm} = backend.restore(s{from}, {})", stands(*resume))
        }
        Act::Fork { into } => {
            let children: Vec<_> = into.iter().map(|child| format!("vm{child}")).collect();
            write!(f, "[{}] = vm{vm}.fork({})", children.join(", "), into.len())
        }
        Act::Carry { from, into } => write!(f, "s{into} = import(export(s{from}))"),
        Act::Spoil { from, at } => write!(f, "import(export(s{from}) with byte {at} changed)"),
        Act::Merge { from, into } => write!(f, "s{into} = merge(s{from})"),
        Act::Delete { snapshot } => write!(f, "delete(s{snapshot})"),
    }
}

fn all(recursive: bool) -> &'static str {
    if recursive { ", recursive" } else { "" }
}

fn bits(mode: Option<u16>) -> String {
    mode.map(|mode| format!(", mode {mode:o}")).unwrap_or_default()
}

fn stands(resume: bool) -> &'static str {
    if resume { "running" } else { "paused" }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Echo(text) => write!(f, "echo {text:?}"),
            Self::Exit(code) => write!(f, "exit {code}"),
            Self::KillItself(signal) => write!(f, "kill -{signal} $$"),
            Self::Cat(path) => write!(f, "cat {path:?}"),
            Self::CatIn { dir, name } => write!(f, "cat {name:?} in {dir:?}"),
            Self::Mirror { text, times } => write!(f, "cat with input {text:?} × {times}"),
            Self::Say(word) => write!(f, "echo $WORD with WORD={word:?}"),
            Self::Terminal { rows, cols } => write!(f, "stty size on {rows} × {cols}"),
            Self::RunAs { uid, gid } => write!(f, "id as {uid}:{gid}"),
            Self::Sleep(ms) => write!(f, "sleep {ms} ms"),
            Self::Missing => f.write_str("a program that is not there"),
            Self::NoName => f.write_str("a program without a name"),
            Self::PowerOff => f.write_str("poweroff"),
        }
    }
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fault({}, vm{}", self.kind, self.vm)?;
        if self.skip > 0 {
            write!(f, ", the {}th occasion", self.skip + 1)?;
        }
        if let Some(amount) = self.amount_ms {
            write!(f, ", {amount} ms")?;
        }
        f.write_str(")")
    }
}
