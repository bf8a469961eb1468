//! [`Script`]: a history as data.

use serde::{Deserialize, Serialize};
use std::{fs, io, path::Path};
use vm_core::fault::FaultKind;

/// The directory that a test may write in, as paths of scripts name it.
pub const HOME: &str = "~";

/// How many steps, and how many calls at the same time, a script may have.
const MOST_STEPS: usize = 10_000;
const MOST_TOGETHER: usize = 8;

/// What is to be done with machines: one step after the other.
///
/// Machines, snapshots and programs have small numbers as names. A step that names one which is not there is skipped, so
/// that any part of a script is a script.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// What the backend's own draws come from, where it has any.
    pub seed: u64,
    /// The steps.
    pub steps: Vec<Step>,
}

/// A step of a script.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// One call.
    Do(Call),
    /// Calls at the same time; the step ends with the last of them.
    Together(Vec<Call>),
    /// A fault, ordered before the next step.
    Fault(Disturbance),
}

/// One operation on a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The machine, or the name that a new one gets. Operations of the backend on snapshots do not look at it.
    pub vm: u8,
    /// The operation.
    pub act: Act,
    /// How long it waits before it is called, among calls at the same time.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub after_ms: u32,
    /// After which time its future is dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop_after_us: Option<u32>,
}

/// A fault that is ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disturbance {
    /// Which.
    pub kind: FaultKind,
    /// The machine; faults of the host, and of machines that are not there yet, do not look at it.
    pub vm: u8,
    /// How many occasions pass first.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skip: u32,
    /// How strong it is, or how long until it happens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub amount_ms: Option<u32>,
}

/// An operation of the trait with its arguments.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Act {
    Create,
    /// Drops the handle.
    Forget,
    Start,
    Stop {
        grace_ms: u32,
        signal: u8,
    },
    Kill,
    Pause,
    Resume,
    /// Waits for the end of a machine's life, for a while.
    Wait,
    WaitReady {
        timeout_ms: u32,
    },
    Ping,
    Exec {
        program: Program,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_ms: Option<u32>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output_limit: Option<u32>,
    },
    /// Starts a program that keeps a nonce and a count in its memory, and detaches from it.
    Spawn {
        process: u8,
        nonce: u32,
    },
    /// Attaches to it and asks for both; asking counts.
    Ask {
        process: u8,
    },
    /// Sends it a signal that it does not catch, and waits for its end.
    Reap {
        process: u8,
        #[serde(default = "kill", skip_serializing_if = "is_kill")]
        signal: u8,
    },
    Processes,
    Read {
        path: String,
    },
    /// Writes a text several times over.
    Write {
        path: String,
        text: String,
        times: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<u16>,
    },
    Stat {
        path: String,
    },
    List {
        path: String,
    },
    MakeDir {
        path: String,
        recursive: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<u16>,
    },
    Remove {
        path: String,
        recursive: bool,
    },
    Rename {
        from: String,
        to: String,
    },
    Connect {
        port: u32,
    },
    Listen {
        port: u32,
    },
    /// Has a program in the guest send a text, several times over, to a listener of the host, which sends it back.
    Exchange {
        port: u32,
        text: String,
        times: u32,
    },
    Inspect,
    Metrics,
    /// Draws random bytes in the guest, which must never come again.
    Random,
    Snapshot {
        into: u8,
        tracked: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base: Option<u8>,
    },
    /// Restores in place.
    Restore {
        from: u8,
        resume: bool,
    },
    /// Makes a new machine of a snapshot.
    Revive {
        from: u8,
        resume: bool,
    },
    Fork {
        into: Vec<u8>,
    },
    /// Exports a snapshot and imports its bytes.
    Carry {
        from: u8,
        into: u8,
    },
    /// Exports a snapshot and imports its bytes with one of them changed.
    Spoil {
        from: u8,
        at: u32,
    },
    Merge {
        from: u8,
        into: u8,
    },
    Delete {
        snapshot: u8,
    },
}

/// A program and what it does.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Program {
    Echo(String),
    Exit(u8),
    KillItself(u8),
    Cat(String),
    /// Prints a file that is named from the directory that it runs in.
    CatIn {
        dir: String,
        name: String,
    },
    /// Prints what it is given as input: a text, several times over.
    Mirror {
        text: String,
        times: u32,
    },
    /// Prints a word of its environment.
    Say(String),
    /// Prints the size of the terminal that it runs on.
    Terminal {
        rows: u16,
        cols: u16,
    },
    /// Prints as which user and group it runs.
    RunAs {
        uid: u32,
        gid: u32,
    },
    Sleep(u32),
    Missing,
    NoName,
    PowerOff,
}

/// A file that holds no script.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadScript {
    /// It cannot be read or written.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// It is not what a script is written as.
    #[error("{path} holds no script: {error}")]
    Syntax {
        /// The file.
        path: String,
        /// What is wrong, and where.
        error: serde_json::Error,
    },
    /// It asks for more than is allowed.
    #[error("the script has {found} {what}; at most {most} are allowed")]
    TooLarge {
        /// Of what.
        what: &'static str,
        /// How many it has.
        found: usize,
        /// How many it may have.
        most: usize,
    },
}

impl Script {
    /// Reads a script from a file.
    ///
    /// # Errors
    /// [`BadScript`].
    pub fn load(path: &Path) -> Result<Self, BadScript> {
        let name = || path.display().to_string();
        let text = fs::read(path).map_err(|error| BadScript::Io { path: name(), error })?;
        let script: Self = serde_json::from_slice(&text)
            .map_err(|error| BadScript::Syntax { path: name(), error })?;
        script.check()?;
        Ok(script)
    }

    /// Writes it to a file, with a step on each line.
    ///
    /// # Errors
    /// [`BadScript::Io`].
    pub fn save(&self, path: &Path) -> Result<(), BadScript> {
        fs::write(path, self.to_json())
            .map_err(|error| BadScript::Io { path: path.display().to_string(), error })
    }

    /// Gives it as JSON, with a step on each line.
    #[must_use]
    pub fn to_json(&self) -> String {
        let steps = self.steps.iter().filter_map(|step| serde_json::to_string(step).ok());
        let lines: Vec<_> = steps.map(|step| format!("  {step}")).collect();
        format!("{{\"seed\": {}, \"steps\": [\n{}\n]}}\n", self.seed, lines.join(",\n"))
    }

    /// Counts calls and faults.
    #[must_use]
    pub fn size(&self) -> usize {
        self.steps.iter().map(Step::size).sum()
    }

    fn check(&self) -> Result<(), BadScript> {
        let within = |what, found, most| match found <= most {
            true => Ok(()),
            false => Err(BadScript::TooLarge { what, found, most }),
        };
        within("steps", self.steps.len(), MOST_STEPS)?;
        for step in &self.steps {
            within("calls at the same time", step.calls().len(), MOST_TOGETHER)?;
            for call in step.calls() {
                if let Some((what, text, times)) = call.act.text() {
                    let bytes = text.len().saturating_mul(usize::try_from(times).unwrap_or(0));
                    within(what, bytes, 8 << 20)?;
                }
                if let Act::Fork { into } = &call.act {
                    within("children of a fork", into.len(), MOST_TOGETHER)?;
                }
            }
        }
        Ok(())
    }
}

impl Step {
    /// Gives the calls of the step; a fault has none.
    #[must_use]
    pub fn calls(&self) -> &[Call] {
        match self {
            Self::Do(call) => std::slice::from_ref(call),
            Self::Together(calls) => calls,
            Self::Fault(_) => &[],
        }
    }

    fn size(&self) -> usize {
        self.calls().len().max(1)
    }
}

impl Call {
    /// Calls an operation at once, and waits for its end.
    #[must_use]
    pub fn new(vm: u8, act: Act) -> Self {
        Self { vm, act, after_ms: 0, drop_after_us: None }
    }
}

impl Act {
    /// Says whether it ends the life of its machine.
    #[must_use]
    pub fn ends_life(&self) -> bool {
        matches!(
            self,
            Self::Stop { .. }
                | Self::Kill
                | Self::Forget
                | Self::Exec { program: Program::PowerOff, .. }
        )
    }

    /// Says whether the guest is asked.
    #[must_use]
    pub fn asks_guest(&self) -> bool {
        matches!(
            self,
            Self::Ping
                | Self::Exec { .. }
                | Self::Spawn { .. }
                | Self::Ask { .. }
                | Self::Reap { .. }
                | Self::Processes
                | Self::Read { .. }
                | Self::Write { .. }
                | Self::Stat { .. }
                | Self::List { .. }
                | Self::MakeDir { .. }
                | Self::Remove { .. }
                | Self::Rename { .. }
                | Self::Connect { .. }
                | Self::Listen { .. }
                | Self::Exchange { .. }
                | Self::Random
        )
    }

    /// Gives the text that it sends, how often, and what it becomes.
    fn text(&self) -> Option<(&'static str, &str, u32)> {
        match self {
            Self::Write { text, times, .. } => Some(("bytes in a file", text, *times)),
            Self::Exchange { text, times, .. } => Some(("bytes in a stream", text, *times)),
            Self::Exec { program: Program::Mirror { text, times }, .. } => {
                Some(("bytes of input", text, *times))
            }
            _ => None,
        }
    }

    /// Says whether it is about snapshots alone, and needs no machine.
    #[must_use]
    pub fn is_of_backend(&self) -> bool {
        matches!(
            self,
            Self::Carry { .. } | Self::Spoil { .. } | Self::Merge { .. } | Self::Delete { .. }
        )
    }
}

fn kill() -> u8 {
    9
}

fn is_kill(signal: &u8) -> bool {
    *signal == kill()
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_read_as_it_is_written_with_a_step_on_each_line() {
        let path = "~/a".to_owned();
        let calls = vec![Call::new(1, Act::Ping), Call { after_ms: 2, ..Call::new(0, Act::Kill) }];
        let disturbance =
            Disturbance { kind: FaultKind::VmmKilled, vm: 0, skip: 0, amount_ms: Some(3) };
        let steps = vec![
            Step::Do(Call::new(
                0,
                Act::Write { path, text: "x\n".to_owned(), times: 3, mode: Some(0o600) },
            )),
            Step::Together(calls),
            Step::Fault(disturbance),
        ];
        let script = Script { seed: 7, steps };
        let text = script.to_json();
        assert_eq!(text.lines().count(), 5, "{text}");
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("script.json");
        script.save(&file).unwrap();
        assert_eq!(Script::load(&file).unwrap(), script);
    }

    #[test]
    fn what_is_no_script_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("script.json");
        assert!(matches!(Script::load(&file), Err(BadScript::Io { .. })));
        for text in ["", "{}", "{\"seed\": -1, \"steps\": []}", "{\"seed\":0,\"steps\":[\"stop\"]}"]
        {
            fs::write(&file, text).unwrap();
            assert!(matches!(Script::load(&file), Err(BadScript::Syntax { .. })), "{text}");
        }
        let call = Call::new(0, Act::Ping);
        let large = Script { seed: 0, steps: vec![Step::Together(vec![call; 9])] };
        large.save(&file).unwrap();
        assert!(matches!(Script::load(&file), Err(BadScript::TooLarge { .. })));
    }
}
