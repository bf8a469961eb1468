//! [`Record`]: what came of a script, with everything left out that differs from run to run.

use super::script::Call;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vm_core::fault::FaultKind;
use vm_trait::{VmError, VmErrorKind, VmState};

/// What came of a script, step by step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Of each step that was begun.
    pub steps: Vec<StepRecord>,
}

/// What came of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The calls, in the order of the script; after them, those that the driver had to add.
    pub calls: Vec<CallRecord>,
    /// The state of every machine once nothing was under way.
    pub states: BTreeMap<u8, String>,
    /// Faults that happened since the step before.
    pub fired: Vec<FaultKind>,
}

/// What came of one call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallRecord {
    /// The call.
    pub call: Call,
    /// How it ended.
    pub outcome: Outcome,
    /// When it began, counted in beginnings and ends of calls of the history.
    pub began: u32,
    /// When it ended.
    pub ended: u32,
}

/// How a call ended, without times and ids.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As asked for.
    Ok(Seen),
    /// With an error: its code, and what is the same on every host of its details.
    Failed(String),
    /// Its future was dropped.
    Dropped,
    /// It named something that is not there.
    Skipped,
    /// Not within any deadline.
    Hung,
}

/// What a call gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// Nothing, or nothing that is the same twice.
    Nothing,
    /// Text, or the content of a file.
    Text(String),
    /// A program's end.
    Ran {
        /// How.
        status: String,
        /// Its standard output.
        stdout: String,
        /// How much of it was dropped.
        dropped: u64,
    },
    /// A file's kind, size and permission bits.
    Stat(String, u64, u32),
    /// Names, each with its kind.
    Names(Vec<(String, String)>),
    /// The machines of a fork, and what kept those that were not made.
    Children(Vec<Option<String>>),
    /// The programs that run, by their names.
    Processes(Vec<u8>),
}

impl Outcome {
    /// Describes an error by what is the same on every host.
    #[must_use]
    pub fn of_error(error: &VmError) -> Self {
        Self::Failed(code(error.kind()))
    }

    /// Gives it on one line.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Ok(Seen::Nothing) => "ok".to_owned(),
            Self::Ok(Seen::Text(text)) => format!("ok: {}", shortened(text)),
            Self::Ok(Seen::Ran { status, stdout, dropped }) => {
                let dropped =
                    if *dropped > 0 { format!(", {dropped} bytes dropped") } else { String::new() };
                format!("ok: {status}, {}{dropped}", shortened(stdout))
            }
            Self::Ok(Seen::Stat(kind, size, mode)) => {
                format!("ok: {kind}, {size} bytes, mode {mode:o}")
            }
            Self::Ok(Seen::Names(names)) => {
                let names: Vec<_> =
                    names.iter().map(|(name, kind)| format!("{name} ({kind})")).collect();
                format!("ok: [{}]", names.join(", "))
            }
            Self::Ok(Seen::Children(children)) => {
                let told = |child: &Option<String>| child.as_deref().unwrap_or("ok").to_owned();
                format!("ok: [{}]", children.iter().map(told).collect::<Vec<_>>().join(", "))
            }
            Self::Ok(Seen::Processes(names)) => format!("ok: {names:?}"),
            Self::Failed(code) => format!("failed: {code}"),
            Self::Dropped => "dropped".to_owned(),
            Self::Skipped => "skipped: it names what is not there".to_owned(),
            Self::Hung => "no end within any deadline".to_owned(),
        }
    }
}

/// Names an error's kind with what is the same on every host of its details.
#[must_use]
pub fn code(kind: &VmErrorKind) -> String {
    let detail = match kind {
        VmErrorKind::InvalidState { state } => state_name(state).to_owned(),
        VmErrorKind::InvalidConfig { field, .. } => field.clone(),
        VmErrorKind::GuestFile { error, .. } => format!("{error:?}"),
        VmErrorKind::ExecFailed { failure } => format!("{failure:?}"),
        VmErrorKind::SnapshotIncompatible { field, .. } => field.clone(),
        VmErrorKind::Internal { .. } => format!("{kind}"),
        _ => return kind.code().to_owned(),
    };
    format!("{}:{detail}", kind.code())
}

/// Names a state; why a machine crashed is left out.
#[must_use]
pub fn state_name(state: &VmState) -> &'static str {
    match state {
        VmState::Created => "created",
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stopping => "stopping",
        VmState::Stopped => "stopped",
        VmState::Crashed(_) => "crashed",
    }
}

fn shortened(text: &str) -> String {
    let shown: String = text.chars().take(40).collect();
    match shown.len() == text.len() {
        true => format!("{shown:?}"),
        false => format!("{shown:?}… ({} bytes)", text.len()),
    }
}
