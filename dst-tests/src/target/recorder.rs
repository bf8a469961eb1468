//! [`Recorder`]: what happens in a run in real time, line by line.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use vm_core::{
    env::Env,
    observe::{Observer, Occurrence},
};
use vm_trait::VmId;

/// Writes down what the core reports.
pub(super) struct Recorder {
    env: Arc<dyn Env>,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Recorder {
    pub(super) fn new(env: Arc<dyn Env>, lines: Arc<Mutex<Vec<String>>>) -> Self {
        Self { env, lines }
    }
}

impl Observer for Recorder {
    fn record(&self, vm: VmId, occurrence: &Occurrence<'_>) {
        let text = match occurrence {
            Occurrence::Begun { operation, call, detail } => {
                format!("{operation} #{call} {detail}")
            }
            Occurrence::Ended { operation, call, outcome } => {
                format!("{operation} #{call}: {outcome}")
            }
            Occurrence::State { from, to } => format!("{from} -> {to}"),
            Occurrence::LinkUp { resumed, failed_dials } => {
                format!("link up (resumed: {resumed}, dials that failed: {failed_dials})")
            }
            Occurrence::LinkDown => "link down".to_owned(),
            Occurrence::Took { stage, duration } => format!("{stage} took {}", Millis(*duration)),
            _ => return,
        };
        let line = format!("{:>12}  {vm}  {}", Millis(self.env.now()).to_string(), text.trim_end());
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

struct Millis(Duration);

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:03} ms", self.0.as_millis(), self.0.subsec_micros() % 1000)
    }
}
