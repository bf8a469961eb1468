//! The states of a virtual machine, and the one pure function that moves between them.
//!
//! ```text
//! Created ──start──▶ Starting ──booted──▶ Running ⇄ Paused
//!    ▲                  │                    │
//!    └── (stop: stays)  └──▶ Crashed ◀───────┤
//!                                            ▼
//!                             Stopping ──▶ Stopped ──start──▶ Starting
//! ```
//!
//! Every backend asks [`VmState::admits`] whether an operation may begin, and [`VmState::next`] what follows;
//! nothing else decides.

use crate::error::VmErrorKind;
use serde::{Deserialize, Serialize};
use std::fmt;
use vm_planted_bugs::{Bug, planted};

/// What a virtual machine is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Configured, never started; holds no machine.
    Created,
    /// A machine exists and has not yet answered the handshake.
    Starting,
    /// The guest runs and its agent answers.
    Running,
    /// No guest instruction runs; memory is kept.
    Paused,
    /// A stop or kill is under way.
    Stopping,
    /// The machine is gone, as asked for, or because the guest powered off.
    Stopped,
    /// The machine is gone against its owner's will.
    Crashed(CrashReason),
}

/// Why a machine crashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CrashReason {
    /// The machine could not be brought to answer the handshake.
    BootFailed,
    /// The guest's kernel panicked, or its first process died.
    GuestPanic,
    /// The process that runs the machine died.
    VmmDied,
    /// The machine no longer answered its control interface and was killed.
    Unresponsive,
    /// The whole host was lost.
    HostLost,
}

/// An operation of the trait, as errors and transitions name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Operation {
    Create,
    Start,
    Stop,
    Kill,
    Pause,
    Resume,
    Wait,
    WaitReady,
    Ping,
    Exec,
    Spawn,
    AttachProcess,
    Processes,
    ReadFile,
    WriteFile,
    Stat,
    ListDir,
    CreateDir,
    Remove,
    Rename,
    Connect,
    Listen,
    Snapshot,
    Restore,
    Fork,
    Inspect,
    Metrics,
    ImportSnapshot,
    ExportSnapshot,
    DeleteSnapshot,
    MergeSnapshot,
}

impl Operation {
    /// Lists every operation, in a fixed order.
    pub const ALL: &'static [Self] = &[
        Self::Create,
        Self::Start,
        Self::Stop,
        Self::Kill,
        Self::Pause,
        Self::Resume,
        Self::Wait,
        Self::WaitReady,
        Self::Ping,
        Self::Exec,
        Self::Spawn,
        Self::AttachProcess,
        Self::Processes,
        Self::ReadFile,
        Self::WriteFile,
        Self::Stat,
        Self::ListDir,
        Self::CreateDir,
        Self::Remove,
        Self::Rename,
        Self::Connect,
        Self::Listen,
        Self::Snapshot,
        Self::Restore,
        Self::Fork,
        Self::Inspect,
        Self::Metrics,
        Self::ImportSnapshot,
        Self::ExportSnapshot,
        Self::DeleteSnapshot,
        Self::MergeSnapshot,
    ];

    /// Names the operation as reports and errors do, in snake case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Wait => "wait",
            Self::WaitReady => "wait_ready",
            Self::Ping => "ping",
            Self::Exec => "exec",
            Self::Spawn => "spawn",
            Self::AttachProcess => "attach_process",
            Self::Processes => "processes",
            Self::ReadFile => "read_file",
            Self::WriteFile => "write_file",
            Self::Stat => "stat",
            Self::ListDir => "list_dir",
            Self::CreateDir => "create_dir",
            Self::Remove => "remove",
            Self::Rename => "rename",
            Self::Connect => "connect",
            Self::Listen => "listen",
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
            Self::Fork => "fork",
            Self::Inspect => "inspect",
            Self::Metrics => "metrics",
            Self::ImportSnapshot => "import_snapshot",
            Self::ExportSnapshot => "export_snapshot",
            Self::DeleteSnapshot => "delete_snapshot",
            Self::MergeSnapshot => "merge_snapshot",
        }
    }

    /// Says whether the operation needs an answer of the guest agent.
    #[must_use]
    pub fn needs_guest(self) -> bool {
        matches!(
            self,
            Self::Ping
                | Self::Exec
                | Self::Spawn
                | Self::AttachProcess
                | Self::Processes
                | Self::ReadFile
                | Self::WriteFile
                | Self::Stat
                | Self::ListDir
                | Self::CreateDir
                | Self::Remove
                | Self::Rename
        )
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Something that happened to a machine and may move its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StateInput {
    /// A cold boot or an in-place restore begins.
    BootBegun,
    /// The handshake with the guest agent is complete.
    Ready,
    /// A restored machine stands still, as asked for.
    RestoredPaused,
    /// The boot was given up by its caller, or a restore failed: the machine has been removed.
    BootAbandoned,
    /// No guest instruction runs any more.
    PauseDone,
    /// Guest instructions run again.
    ResumeDone,
    /// A stop or kill begins.
    StopBegun,
    /// The machine is gone after a stop or kill.
    StopDone,
    /// The guest powered off by itself.
    PoweredOff,
    /// The machine ended against its owner's will.
    Crashed(CrashReason),
}

impl VmState {
    /// Decides whether `operation` may begin in this state.
    ///
    /// `stop`, `kill`, `wait`, `metrics` and everything that is asked of the backend are allowed in every state.
    /// While a lifecycle operation is under way (Starting, Stopping), others wait their turn instead of asking.
    ///
    /// ```
    /// use vm_trait::{Operation, VmErrorKind, VmState};
    /// assert!(VmState::Running.admits(Operation::Pause).is_ok());
    /// assert_eq!(
    ///     VmState::Paused.admits(Operation::Exec),
    ///     Err(VmErrorKind::InvalidState { state: VmState::Paused }),
    /// );
    /// ```
    ///
    /// # Errors
    /// [`VmErrorKind::InvalidState`] with this state.
    pub fn admits(&self, operation: Operation) -> Result<(), VmErrorKind> {
        let allowed = match operation {
            Operation::Start if planted(Bug::CrashedCannotStart) => {
                matches!(self, Self::Created | Self::Stopped)
            }
            Operation::Restore if planted(Bug::RestoreOverRunning) => true,
            Operation::Start | Operation::Restore => {
                matches!(self, Self::Created | Self::Stopped | Self::Crashed(_))
            }
            Operation::Pause if planted(Bug::PauseOfPaused) => {
                matches!(self, Self::Running | Self::Paused)
            }
            Operation::Connect | Operation::Listen if planted(Bug::StreamsOfPaused) => {
                matches!(self, Self::Running | Self::Paused)
            }
            Operation::Inspect if planted(Bug::InspectionOfRunning) => {
                matches!(self, Self::Running | Self::Paused)
            }
            Operation::Snapshot if planted(Bug::PausedIsNotCaptured) => {
                matches!(self, Self::Running)
            }
            op if op.needs_guest() && planted(Bug::PausedGuestIsAsked) => {
                matches!(self, Self::Running | Self::Paused)
            }
            Operation::Pause | Operation::Connect | Operation::Listen => {
                matches!(self, Self::Running)
            }
            Operation::Resume | Operation::Inspect => matches!(self, Self::Paused),
            Operation::Snapshot | Operation::Fork => matches!(self, Self::Running | Self::Paused),
            op if op.needs_guest() => matches!(self, Self::Running),
            _ => true,
        };
        if allowed { Ok(()) } else { Err(VmErrorKind::InvalidState { state: self.clone() }) }
    }

    /// Gives the state that follows when `input` happens in this one, or `None` where it cannot happen.
    #[must_use]
    pub fn next(&self, input: &StateInput) -> Option<Self> {
        use StateInput as I;
        Some(match (self, input) {
            (Self::Created | Self::Stopped | Self::Crashed(_), I::BootBegun) => Self::Starting,
            (Self::Crashed(_), I::StopDone) if planted(Bug::StopForgetsCrash) => Self::Stopped,
            (Self::Created, I::StopDone) if planted(Bug::StopOfCreated) => Self::Stopped,
            (Self::Starting, I::RestoredPaused) if planted(Bug::RestoredPausedRuns) => {
                Self::Running
            }
            (Self::Starting, I::BootAbandoned) if planted(Bug::AbandonedBootCrashes) => {
                Self::Crashed(CrashReason::BootFailed)
            }
            (Self::Paused, I::Crashed(_)) if planted(Bug::CrashOfPausedIsMissed) => return None,
            (Self::Running, I::PoweredOff) if planted(Bug::PowerOffIsACrash) => {
                Self::Crashed(CrashReason::VmmDied)
            }
            (Self::Starting, I::Ready) => Self::Running,
            (Self::Starting, I::RestoredPaused) => Self::Paused,
            (Self::Starting, I::BootAbandoned) => Self::Stopped,
            (Self::Running, I::PauseDone) => Self::Paused,
            (Self::Paused, I::ResumeDone) => Self::Running,
            (Self::Created, I::StopBegun | I::StopDone) => Self::Created,
            (Self::Crashed(reason), I::StopBegun | I::StopDone) => Self::Crashed(reason.clone()),
            (Self::Stopped, I::StopBegun | I::StopDone) => Self::Stopped,
            (Self::Starting | Self::Running | Self::Paused | Self::Stopping, I::StopBegun) => {
                Self::Stopping
            }
            // While a stop is under way, however the machine ends is the end that was asked for.
            (Self::Stopping, I::StopDone | I::PoweredOff | I::Crashed(_)) => Self::Stopped,
            (Self::Running | Self::Paused | Self::Starting, I::PoweredOff) => Self::Stopped,
            (Self::Running | Self::Paused | Self::Starting, I::Crashed(reason)) => {
                Self::Crashed(reason.clone())
            }
            _ => return None,
        })
    }

    /// Says whether a machine exists in this state.
    #[must_use]
    pub fn has_machine(&self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Paused | Self::Stopping)
    }

    /// Says whether [`wait`](crate::VmInstance::wait) resolves in this state.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        matches!(self, Self::Stopped | Self::Crashed(_))
    }

    /// Names the state as reports do, without its reason.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Crashed(_) => "crashed",
        }
    }
}

impl CrashReason {
    /// Names the reason as reports do.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::BootFailed => "boot failed",
            Self::GuestPanic => "guest panic",
            Self::VmmDied => "the VMM process died",
            Self::Unresponsive => "the VMM did not answer and was killed",
            Self::HostLost => "the host was lost",
        }
    }
}

impl fmt::Display for CrashReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Crashed(reason) => write!(f, "crashed ({reason})"),
            other => f.write_str(other.name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const STATES: [VmState; 7] = [
        VmState::Created,
        VmState::Starting,
        VmState::Running,
        VmState::Paused,
        VmState::Stopping,
        VmState::Stopped,
        VmState::Crashed(CrashReason::GuestPanic),
    ];

    /// One row per operation: a letter per state of `STATES`, `y` where the operation may begin.
    const ADMITTED: &[(Operation, &str)] = &[
        (Operation::Create, "yyyyyyy"),
        (Operation::Start, "y....yy"),
        (Operation::Stop, "yyyyyyy"),
        (Operation::Kill, "yyyyyyy"),
        (Operation::Pause, "..y...."),
        (Operation::Resume, "...y..."),
        (Operation::Wait, "yyyyyyy"),
        (Operation::WaitReady, "yyyyyyy"),
        (Operation::Ping, "..y...."),
        (Operation::Exec, "..y...."),
        (Operation::Spawn, "..y...."),
        (Operation::AttachProcess, "..y...."),
        (Operation::Processes, "..y...."),
        (Operation::ReadFile, "..y...."),
        (Operation::WriteFile, "..y...."),
        (Operation::Stat, "..y...."),
        (Operation::ListDir, "..y...."),
        (Operation::CreateDir, "..y...."),
        (Operation::Remove, "..y...."),
        (Operation::Rename, "..y...."),
        (Operation::Connect, "..y...."),
        (Operation::Listen, "..y...."),
        (Operation::Snapshot, "..yy..."),
        (Operation::Restore, "y....yy"),
        (Operation::Fork, "..yy..."),
        (Operation::Inspect, "...y..."),
        (Operation::Metrics, "yyyyyyy"),
        (Operation::ImportSnapshot, "yyyyyyy"),
        (Operation::ExportSnapshot, "yyyyyyy"),
        (Operation::DeleteSnapshot, "yyyyyyy"),
        (Operation::MergeSnapshot, "yyyyyyy"),
    ];

    #[test]
    fn every_operation_in_every_state() {
        assert_eq!(ADMITTED.len(), Operation::ALL.len());
        for ((operation, row), listed) in ADMITTED.iter().zip(Operation::ALL) {
            assert_eq!(operation, listed);
            for (state, letter) in STATES.iter().zip(row.chars()) {
                let got = state.admits(*operation);
                if letter == 'y' {
                    assert_eq!(got, Ok(()), "{operation} in {state}");
                } else {
                    let state = state.clone();
                    assert_eq!(got, Err(VmErrorKind::InvalidState { state }), "{operation}");
                }
            }
        }
    }

    /// One row per input: the state that follows in each of `STATES`, `-` where it cannot happen.
    /// C created, s starting, R running, P paused, g stopping, S stopped, X crashed.
    #[test]
    fn every_input_in_every_state() {
        let panic = || StateInput::Crashed(CrashReason::GuestPanic);
        let rows: [(StateInput, &str); 10] = [
            (StateInput::BootBegun, "s----ss"),
            (StateInput::Ready, "-R-----"),
            (StateInput::RestoredPaused, "-P-----"),
            (StateInput::BootAbandoned, "-S-----"),
            (StateInput::PauseDone, "--P----"),
            (StateInput::ResumeDone, "---R---"),
            (StateInput::StopBegun, "CggggSX"),
            (StateInput::StopDone, "C---SSX"),
            (StateInput::PoweredOff, "-SSSS--"),
            (panic(), "-XXXS--"),
        ];
        for (input, row) in rows {
            for (state, letter) in STATES.iter().zip(row.chars()) {
                let expected = "CsRPgSX".find(letter).map(|index| STATES[index].clone());
                assert_eq!(state.next(&input), expected, "{input:?} in {state}");
            }
        }
    }

    #[test]
    fn the_reason_of_a_crash_is_kept_by_stop() {
        let crashed = VmState::Crashed(CrashReason::VmmDied);
        assert_eq!(crashed.next(&StateInput::StopDone), Some(crashed.clone()));
    }

    #[test]
    fn a_machine_exists_from_its_start_until_its_end() {
        let has: Vec<bool> = STATES.iter().map(VmState::has_machine).collect();
        assert_eq!(has, [false, true, true, true, true, false, false]);
        let ended: Vec<bool> = STATES.iter().map(VmState::is_ended).collect();
        assert_eq!(ended, [false, false, false, false, false, true, true]);
    }

    #[test]
    fn every_state_and_reason_has_a_name_of_its_own_that_is_shown() {
        let reasons = [
            CrashReason::BootFailed,
            CrashReason::GuestPanic,
            CrashReason::VmmDied,
            CrashReason::Unresponsive,
            CrashReason::HostLost,
        ];
        let mut names: BTreeSet<&str> = STATES.iter().map(VmState::name).collect();
        assert!(names.contains("running"));
        names.extend(reasons.iter().map(CrashReason::name));
        assert!(!names.contains("") && names.len() == STATES.len() + reasons.len(), "{names:?}");
        for reason in reasons {
            assert_eq!(reason.to_string(), reason.name());
            let shown = format!("crashed ({})", reason.name());
            assert_eq!(VmState::Crashed(reason).to_string(), shown);
        }
        for state in &STATES[..6] {
            assert_eq!(state.to_string(), state.name());
        }
    }
}
