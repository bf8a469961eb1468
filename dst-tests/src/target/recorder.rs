//! [`Recorder`]: what happens in a run in real time, line by line.

use super::Detail;
use crate::record::Lines;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
};
use vm_core::{
    env::Env,
    fault::{FaultControl, FaultKind, FaultOrder, FaultRefused},
    observe::{NoObserver, Observer, Occurrence},
    timeline::{Mark, TimelineLine},
};
use vm_trait::{VmId, VmInstance};

/// The record of one run, as far as one is wanted: whoever opens the backend takes its parts.
#[derive(Clone)]
pub(super) struct Records {
    detail: Detail,
    recorder: Arc<OnceLock<Arc<Recorder>>>,
}

impl Records {
    pub(super) fn new(detail: Detail) -> Self {
        Self { detail, recorder: Arc::default() }
    }

    /// Gives what listens to the core.
    pub(super) fn observer(&self, env: &Arc<dyn Env>) -> Arc<dyn Observer> {
        if self.detail == Detail::Fingerprint {
            return Arc::new(NoObserver);
        }
        let frames = self.detail == Detail::Frames;
        let make = || Arc::new(Recorder::new(env.clone(), frames));
        self.recorder.get_or_init(make).clone()
    }

    /// Has faults written down, where there is an observer.
    pub(super) fn faults(&self, faults: Arc<dyn FaultControl>) -> Arc<dyn FaultControl> {
        match self.recorder.get() {
            Some(recorder) => recorder.clone().watch(faults),
            None => faults,
        }
    }

    pub(super) fn take(&self) -> Vec<TimelineLine> {
        self.recorder.get().map(|recorder| lock(&recorder.lines).take()).unwrap_or_default()
    }
}

/// Writes down what the core reports, and the faults.
struct Recorder {
    env: Arc<dyn Env>,
    frames: bool,
    lines: Mutex<Lines>,
    state: Mutex<Watched>,
}

/// The faults of a run, as far as they have been written down.
#[derive(Default)]
struct Watched {
    faults: Option<Weak<dyn FaultControl>>,
    fired: BTreeMap<FaultKind, u64>,
    ordered_for: BTreeMap<FaultKind, Option<VmId>>,
}

impl Recorder {
    fn new(env: Arc<dyn Env>, frames: bool) -> Self {
        Self { env, frames, lines: Mutex::default(), state: Mutex::default() }
    }

    fn watch(self: Arc<Self>, inner: Arc<dyn FaultControl>) -> Arc<dyn FaultControl> {
        lock(&self.state).faults = Some(Arc::downgrade(&inner));
        Arc::new(RecordedFaults { inner, recorder: self })
    }

    fn push(&self, vm: Option<VmId>, mark: Mark, text: String) {
        lock(&self.lines).push(TimelineLine { at: self.env.now(), vm, mark, text });
    }

    /// Writes down what has happened since it last looked.
    fn note_fired(&self) {
        let mut watched = lock(&self.state);
        let Some(faults) = watched.faults.as_ref().and_then(Weak::upgrade) else { return };
        let now = faults.fired();
        for (&fault, times) in &now {
            let before = watched.fired.get(&fault).copied().unwrap_or_default();
            let vm = watched.ordered_for.get(&fault).copied().flatten();
            for _ in before..*times {
                self.push(vm, Mark::Fault { fault }, format!("FAULT {fault}"));
            }
        }
        watched.fired = now;
    }
}

impl Observer for Recorder {
    fn record(&self, vm: VmId, occurrence: &Occurrence<'_>) {
        self.note_fired();
        if self.frames || !matches!(occurrence, Occurrence::Frame { .. }) {
            lock(&self.lines).push(TimelineLine::of(self.env.now(), vm, occurrence));
        }
    }
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

/// Writes down what is ordered, and passes it on.
#[derive(Debug)]
struct RecordedFaults {
    inner: Arc<dyn FaultControl>,
    recorder: Arc<Recorder>,
}

impl FaultControl for RecordedFaults {
    fn can(&self, kind: FaultKind) -> bool {
        self.inner.can(kind)
    }

    fn order(&self, order: FaultOrder) -> Result<(), FaultRefused> {
        let (fault, vm) = (order.kind, order.vm);
        self.inner.order(order)?;
        lock(&self.recorder.state).ordered_for.insert(fault, vm);
        self.recorder.push(vm, Mark::Ordered { fault }, format!("ordered: {fault}"));
        // Some happen at once.
        self.recorder.note_fired();
        Ok(())
    }

    fn meet(&self, vm: &Arc<dyn VmInstance>) {
        self.inner.meet(vm);
    }

    fn fired(&self) -> BTreeMap<FaultKind, u64> {
        self.inner.fired()
    }

    fn pending(&self) -> Vec<FaultOrder> {
        self.inner.pending()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use vm_core::env::TokioEnv;
    use vm_trait::{Operation, VmState};

    /// Lets the first order happen at once, and the others never.
    #[derive(Debug, Default)]
    struct FirstAtOnce(Mutex<Vec<FaultOrder>>);

    impl FaultControl for FirstAtOnce {
        fn can(&self, _: FaultKind) -> bool {
            true
        }

        fn order(&self, order: FaultOrder) -> Result<(), FaultRefused> {
            lock(&self.0).push(order);
            Ok(())
        }

        fn fired(&self) -> BTreeMap<FaultKind, u64> {
            lock(&self.0).iter().take(1).map(|order| (order.kind, 1)).collect()
        }

        fn pending(&self) -> Vec<FaultOrder> {
            lock(&self.0).iter().skip(1).cloned().collect()
        }
    }

    #[tokio::test]
    async fn what_the_core_reports_and_faults_are_written_down() {
        let env: Arc<dyn Env> = Arc::new(TokioEnv::real(|_| {}));
        let records = Records::new(Detail::Record);
        let observer = records.observer(&env);
        let faults = records.faults(Arc::new(FirstAtOnce::default()));
        let (operation, vm) = (Operation::Start, VmId(7));
        observer.record(vm, &Occurrence::Begun { operation, call: 1, detail: "" });
        faults.order(FaultOrder::next(FaultKind::VmmKilled).on(vm)).unwrap();
        faults.order(FaultOrder::next(FaultKind::BootHang)).unwrap();
        let (from, to) = (&VmState::Starting, &VmState::Running);
        observer.record(vm, &Occurrence::State { from, to });
        observer.record(vm, &Occurrence::Took { stage: "boot", duration: Duration::ZERO });
        let lines = records.take();
        let seen: Vec<_> = lines.iter().map(|line| (line.vm, line.text.as_str())).collect();
        let wanted = [
            (Some(vm), "start #1"),
            (Some(vm), "ordered: vmm_killed"),
            (Some(vm), "FAULT vmm_killed"),
            (None, "ordered: boot_hang"),
            (Some(vm), "starting -> running"),
            (Some(vm), "boot took 0ns"),
        ];
        assert_eq!(seen, wanted);
        assert_eq!(lines[2].mark, Mark::Fault { fault: FaultKind::VmmKilled });
    }

    #[tokio::test]
    async fn nothing_is_kept_where_nothing_was_asked_for() {
        let env: Arc<dyn Env> = Arc::new(TokioEnv::real(|_| {}));
        let records = Records::new(Detail::Fingerprint);
        records.observer(&env).record(VmId(1), &Occurrence::LinkDown);
        let faults = records.faults(Arc::new(FirstAtOnce::default()));
        faults.order(FaultOrder::next(FaultKind::BootHang)).unwrap();
        assert!(records.take().is_empty());
    }
}
