//! A clause: one promise to users, and how it is checked.

use crate::context::Context;
use futures_core::future::BoxFuture;
use std::{fmt, panic::Location};
use vm_core::fault::{FaultKind, FaultScope};
use vm_trait::{Capability, VmError};

/// One promise, and how it is checked.
#[derive(Clone, Copy)]
pub struct Clause {
    /// Names it: `group.what_is_promised`.
    pub id: &'static str,
    /// The promise, in one line.
    pub promise: &'static str,
    /// What a backend must claim for the promise to bind it.
    pub requires: &'static [Capability],
    /// Of these a backend must claim one or more for the promise to bind it; none are needed where there are none.
    pub requires_one: &'static [Capability],
    /// Faults without which the promise cannot be put to the test. A target that cannot make one of them happen
    /// leaves the clause out, and says so.
    pub needs_faults: &'static [FaultKind],
    /// Whether the check sets deadlines, or counts things, that faults of the target's own accord would upset.
    pub undisturbed: bool,
    /// Whether the check needs machines that no other had, though its group does without.
    pub needs_fresh: bool,
    /// The check.
    pub check: Check,
}

/// A check: an async function over a context.
pub type Check = for<'a> fn(&'a Context) -> BoxFuture<'a, Verdict>;

/// What a check comes to.
pub type Verdict = Result<(), Broken>;

/// A promise that was not kept.
#[derive(Debug)]
pub struct Broken {
    /// What was seen.
    pub what: String,
    /// Where in the check.
    pub at: &'static Location<'static>,
}

impl Clause {
    /// Asks that no fault happen but those that the check orders.
    #[must_use]
    pub const fn undisturbed(mut self) -> Self {
        self.undisturbed = true;
        self
    }

    /// Asks for machines that no other check had.
    #[must_use]
    pub const fn fresh(mut self) -> Self {
        self.needs_fresh = true;
        self
    }

    /// Binds only backends that claim one of these.
    #[must_use]
    pub const fn with_one_of(mut self, capabilities: &'static [Capability]) -> Self {
        self.requires_one = capabilities;
        self
    }

    /// Says whether the check may be given a running machine that another had, and leaves it as it was: Running, with
    /// no program left and nothing but the scratch directory changed.
    #[must_use]
    pub fn shares_machine(&self) -> bool {
        let group = matches!(
            self.group(),
            "concurrency"
                | "deadline"
                | "errors"
                | "events"
                | "exec"
                | "files"
                | "pause"
                | "process"
                | "tty"
                | "vsock"
        );
        let survived = |kind: &FaultKind| {
            matches!(kind.scope(), FaultScope::Exec | FaultScope::File | FaultScope::Link)
        };
        group && !self.needs_fresh && self.needs_faults.iter().all(survived)
    }

    /// Gives the group: what stands before the dot.
    #[must_use]
    pub fn group(&self) -> &'static str {
        self.id.split_once('.').map_or(self.id, |(group, _)| group)
    }
}

impl Broken {
    /// Notes what was seen, where the caller stands.
    #[track_caller]
    #[must_use]
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), at: Location::caller() }
    }
}

impl From<VmError> for Broken {
    #[track_caller]
    fn from(error: VmError) -> Self {
        Self::new(format!("unexpected error: {error}"))
    }
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}:{})", self.what, self.at.file(), self.at.line())
    }
}

impl fmt::Debug for Clause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clause").field("id", &self.id).finish_non_exhaustive()
    }
}

/// Declares a clause over an `async fn check(ctx: &Context) -> Verdict` of the same module.
///
/// ```ignore
/// clause!(exec_every_exit_code, "exec.every_exit_code", "every exit code arrives", [Exec], faults: []);
/// ```
#[macro_export]
macro_rules! clause {
    ($check:ident, $id:literal, $promise:literal, [$($cap:ident),*], faults: [$($fault:ident),*]) => {
        $crate::clause::Clause {
            id: $id,
            promise: $promise,
            requires: &[$(vm_trait::Capability::$cap),*],
            requires_one: &[],
            needs_faults: &[$(vm_core::fault::FaultKind::$fault),*],
            undisturbed: false,
            needs_fresh: false,
            check: |ctx| Box::pin($check(ctx)),
        }
    };
}

/// Ends the check as broken unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::clause::Broken::new(format!($($text)+)));
        }
    };
}

/// Ends the check as broken unless both sides are equal.
#[macro_export]
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($text:tt)+) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            let text = format!($($text)+);
            return Err($crate::clause::Broken::new(format!("{text}: got {left:?}, wanted {right:?}")));
        }
    }};
}

/// Ends the check as broken unless the result is an error of the given kind.
#[macro_export]
macro_rules! ensure_err {
    ($result:expr, $kind:pat $(if $guard:expr)?, $($text:tt)+) => {
        match $result {
            Err(error) if matches!(error.kind(), $kind $(if $guard)?) => {}
            Err(error) => {
                let text = format!($($text)+);
                return Err($crate::clause::Broken::new(format!("{text}: wrong error: {error}")));
            }
            Ok(_) => return Err($crate::clause::Broken::new(format!("{}: got Ok", format!($($text)+)))),
        }
    };
}
