//! What all parts of one simulation share.

use crate::{
    env::SimEnv,
    fault::{Engine, Fired, Vms},
    guest::ProgramRegistry,
    host::{HostState, SimHostLimits},
    ledger::{Counters, Ledger},
    machine::Shared,
    rng::{Purpose, Streams},
    trace::{Tag, Trace},
    yields::{Yields, yield_now},
};
use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use vm_core::{
    env::Env,
    fault::{FaultKind, FaultScope},
    observe::{Observer, Occurrence},
};
use vm_guest_protocol::{Frame, Request};
use vm_trait::{CrashReason, Operation, VmId};

/// Where snapshots are kept that are given no path.
pub(crate) const SNAPSHOTS: &str = "/snapshots";

/// One simulation.
///
/// Locks are taken in this order: a machine, the host, the faults, the streams and the trace.
pub(crate) struct World {
    pub(crate) env: Arc<SimEnv>,
    pub(crate) streams: Arc<Streams>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) trace: Trace,
    pub(crate) faults: Engine,
    pub(crate) programs: Arc<ProgramRegistry>,
    pub(crate) limits: SimHostLimits,
    yields: Yields,
    host: Mutex<HostState>,
    machines: Mutex<BTreeMap<u64, Weak<Shared>>>,
    next_machine: AtomicU64,
    /// In nanoseconds; `u64::MAX` for never.
    dies_at: AtomicU64,
}

impl World {
    pub(crate) fn new(
        env: Arc<SimEnv>,
        streams: Arc<Streams>,
        counters: Arc<Counters>,
        trace: Trace,
        faults: Engine,
        programs: Arc<ProgramRegistry>,
        limits: SimHostLimits,
    ) -> Self {
        let yields = env.yields();
        Self {
            env,
            streams,
            counters,
            trace,
            faults,
            programs,
            limits,
            yields,
            host: Mutex::new(HostState::new(Path::new(SNAPSHOTS))),
            machines: Mutex::default(),
            next_machine: AtomicU64::new(0),
            dies_at: AtomicU64::new(u64::MAX),
        }
    }

    pub(crate) fn now(&self) -> Duration {
        self.env.now()
    }

    pub(crate) fn host(&self) -> MutexGuard<'_, HostState> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes a seam: lets other tasks go first, where the seed says so.
    pub(crate) async fn enter(&self) {
        if self.yields.strike(&self.streams) {
            yield_now().await;
        }
    }

    /// Says whether a poll at a seam should let other tasks go first.
    pub(crate) fn yields(&self) -> bool {
        self.yields.strike(&self.streams)
    }

    /// Waits for a drawn time.
    pub(crate) async fn delay(&self, purpose: Purpose, low: Duration, high: Duration) {
        self.env.timer(self.streams.duration(purpose, low, high)).await;
    }

    /// Says whether a fault happens at this occasion.
    pub(crate) fn strike(&self, kind: FaultKind, vms: Vms<'_>) -> Option<Fired> {
        if !self.faults.may(kind) {
            return None;
        }
        let fired = self.faults.occasion(kind, vms, self.now())?;
        let vm = match vms {
            Vms::One(vm) => Some(vm),
            Vms::Any(_) => None,
        };
        self.note_fault(vm, kind, &fired);
        Some(fired)
    }

    pub(crate) fn note_fault(&self, vm: Option<VmId>, kind: FaultKind, fired: &Fired) {
        self.trace.fault(vm, kind);
        let planned = fired.planned();
        let numbers = [kind as u64, planned.map_or(0, nanos)];
        self.note(vm, Tag::Fault, &numbers, || match planned {
            Some(amount) => format!("FAULT {kind} ({amount:?})"),
            None => format!("FAULT {kind}"),
        });
    }

    pub(crate) fn note(
        &self,
        vm: Option<VmId>,
        tag: Tag,
        numbers: &[u64],
        text: impl FnOnce() -> String,
    ) {
        self.trace.record(self.now(), vm, tag, numbers, &[], text);
    }

    /// Puts a machine on the list of those that die with the host.
    pub(crate) fn enlist(&self, machine: &Arc<Shared>) -> u64 {
        let number = self.next_machine.fetch_add(1, Ordering::Relaxed);
        self.machines().insert(number, Arc::downgrade(machine));
        number
    }

    pub(crate) fn strike_off(&self, number: u64) {
        self.machines().remove(&number);
    }

    /// Loses the host. No lock may be held.
    pub(crate) fn lose_host(&self) {
        self.note(None, Tag::HostFile, &[9], || "the host is lost".to_owned());
        for machine in self.living() {
            machine.end(vm_core::machine::MachineExit::Crashed(CrashReason::HostLost));
        }
        self.dies_at.store(u64::MAX, Ordering::Relaxed);
        let mut draw = |bound| self.streams.below(Purpose::HostDisk, bound);
        let ended = self.host().crash(&mut draw);
        drop(ended);
    }

    /// Gives when the host is to die of a sync that its disk lost.
    pub(crate) fn dies_at(&self) -> Option<Duration> {
        let nanos = self.dies_at.load(Ordering::Relaxed);
        (nanos != u64::MAX).then(|| Duration::from_nanos(nanos))
    }

    /// Has the host die, at the latest then.
    pub(crate) fn die_at(&self, time: Duration) {
        self.dies_at.fetch_min(nanos(time), Ordering::Relaxed);
        self.wake_machines();
    }

    /// Loses the host where it was to die by now. No lock may be held.
    pub(crate) fn die_if_due(&self) {
        if self.dies_at().is_some_and(|due| due <= self.now()) {
            self.lose_host();
        }
    }

    /// Lets every machine look again when it has to act next.
    pub(crate) fn wake_machines(&self) {
        for machine in self.living() {
            machine.wake_driver();
        }
    }

    pub(crate) fn ledger(&self) -> Ledger {
        let (ports, temp_files) = {
            let host = self.host();
            (host.tcp.count(), host.temporary_files())
        };
        Ledger {
            machines: self.counters.machines.get(),
            streams: self.counters.streams.get(),
            ports,
            host_files: self.counters.host_files.get(),
            timers: self.counters.timers.get(),
            temp_files,
        }
    }

    fn living(&self) -> Vec<Arc<Shared>> {
        self.machines().values().filter_map(Weak::upgrade).collect()
    }

    fn machines(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Shared>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Knows for which VMs the host saves and restores, so that faults of its disk belong to an operation.
    fn track(&self, vm: VmId, operation: Operation, begun: bool) {
        let mut host = self.host();
        let set = match operation {
            Operation::Snapshot => &mut host.saving,
            Operation::Restore => &mut host.restoring,
            _ => return,
        };
        if begun {
            set.insert(vm);
        } else {
            set.remove(&vm);
        }
    }

    /// A guest that is asked to stop may turn deaf.
    fn shutdown_sent(&self, vm: VmId) {
        debug_assert_eq!(FaultKind::StopIgnored.scope(), FaultScope::Stop);
        if self.strike(FaultKind::StopIgnored, Vms::One(vm)).is_some() {
            for machine in self.living().iter().filter(|machine| machine.vm() == vm) {
                machine.turn_deaf();
            }
        }
    }
}

/// The observer that feeds the trace.
pub(crate) struct Watcher(pub(crate) Arc<World>);

impl Observer for Watcher {
    fn record(&self, vm: VmId, occurrence: &Occurrence<'_>) {
        let world = &self.0;
        world.trace.occurrence(world.now(), vm, occurrence);
        match occurrence {
            Occurrence::Begun { operation, .. } => world.track(vm, *operation, true),
            Occurrence::Ended { operation, .. } => world.track(vm, *operation, false),
            Occurrence::Frame {
                sent: true, frame: Frame::Open(Request::Shutdown { .. }), ..
            } => {
                world.shutdown_sent(vm);
            }
            _ => {}
        }
    }
}

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watcher")
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("seed", &self.streams.seed()).finish_non_exhaustive()
    }
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
