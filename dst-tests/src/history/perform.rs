//! Carrying out a script on a backend.

use super::{
    Assignment,
    acts::Machines,
    model::{Checker, Violation},
    record::{CallRecord, Outcome, Seen, StepRecord, state_name},
    script::{Act, Call, Disturbance, Step},
};
use crate::context::Context;
use futures_util::future::{Either, join_all, select};
use std::{
    collections::BTreeSet,
    pin::pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};
use vm_core::{
    env::timeout,
    fault::{FaultKind, FaultOrder, FaultScope},
};
use vm_trait::VmState;

/// Carries out a script, holds every step to the model, and takes down what came of it. Ends with the first step that
/// does not go as it may. All machines and snapshots are removed afterwards.
///
/// # Errors
/// [`Violation`], which stands in the assignment too.
pub async fn perform(ctx: &Context, assignment: &Assignment) -> Result<(), Violation> {
    let driver = Driver::new(ctx);
    let mut checker = Checker::new(ctx.capabilities());
    let mut end = Ok(());
    for (index, step) in assignment.script.steps.iter().enumerate() {
        let seen = driver.step(step).await;
        end = checker.absorb(index, step, &seen);
        if let (Ok(()), Some(text)) = (&end, driver.machines.misheard()) {
            end = Err(Violation { step: index, sort: "events".to_owned(), text });
        }
        let mut progress = assignment.progress();
        progress.record.steps.push(seen);
        if checker.has_given_up() && progress.unchecked_from.is_none() {
            progress.unchecked_from = Some(index);
        }
        progress.violation = end.clone().err();
        drop(progress);
        if end.is_err() {
            break;
        }
    }
    driver.machines.remove_all(ctx).await;
    end
}

struct Driver<'a> {
    ctx: &'a Context,
    machines: Machines,
    stamps: AtomicU32,
    fired: Mutex<Vec<u64>>,
    /// After which time a call that has no end is given up.
    limit: Duration,
    /// After which time machines that stand still are let run on, where calls wait for their guests.
    patience: Duration,
}

impl<'a> Driver<'a> {
    fn new(ctx: &'a Context) -> Self {
        let machines = Machines::new(ctx);
        let (limit, patience) = (machines.limit(), machines.patience());
        let fired = Mutex::new(vec![0; FaultKind::ALL.len()]);
        Self { ctx, machines, stamps: AtomicU32::new(0), fired, limit, patience }
    }

    async fn step(&self, step: &Step) -> StepRecord {
        let calls = match step {
            // Alone, but for what an earlier call began that was dropped: its guest may come to stand still.
            Step::Do(call) => self.together(std::slice::from_ref(call)).await,
            Step::Together(calls) => self.together(calls).await,
            Step::Fault(disturbance) => {
                self.disturb(disturbance).await;
                Vec::new()
            }
        };
        self.settle().await;
        StepRecord { calls, states: self.machines.states(), fired: self.newly_fired() }
    }

    async fn together(&self, calls: &[Call]) -> Vec<CallRecord> {
        let waiting: Vec<_> = calls.iter().map(|_| AtomicBool::new(true)).collect();
        let mut all = pin!(join_all(calls.iter().zip(&waiting).map(async |(call, waits)| {
            let record = self.one(call).await;
            waits.store(false, Ordering::Relaxed);
            record
        })));
        let mut added = Vec::new();
        let mut records = loop {
            let patience = pin!(self.ctx.sleep(self.patience));
            if let Either::Left((records, _)) = select(all.as_mut(), patience).await {
                break records;
            }
            // What was begun is carried out, so its end is waited for whatever else ends meanwhile.
            let still =
                calls.iter().zip(&waiting).filter(|(_, waits)| waits.load(Ordering::Relaxed));
            let machines = still.map(|(call, _)| call.vm).collect();
            match select(all.as_mut(), pin!(self.resume(machines))).await {
                Either::Left((records, resuming)) => {
                    added.extend(resuming.await);
                    break records;
                }
                Either::Right((resumed, _)) => added.extend(resumed),
            }
        };
        records.extend(added);
        records
    }

    /// Lets guests run on that calls wait for: a program under way cannot end while its guest stands still. Others stay as
    /// they are, so that what comes of a history does not depend on how long a machine takes to boot.
    async fn resume(&self, machines: BTreeSet<u8>) -> Vec<CallRecord> {
        let mut records = Vec::new();
        let states = self.machines.states();
        for (vm, state) in states.into_iter().filter(|(vm, _)| machines.contains(vm)) {
            if state == state_name(&VmState::Paused) {
                records.push(self.one(&Call::new(vm, Act::Resume)).await);
            }
        }
        records
    }

    async fn one(&self, call: &Call) -> CallRecord {
        if call.after_ms > 0 {
            self.ctx.sleep(Duration::from_millis(call.after_ms.into())).await;
        }
        let began = self.stamps.fetch_add(1, Ordering::Relaxed);
        let act = self.machines.act(self.ctx, call, began);
        let limit = call.drop_after_us.map(|after| Duration::from_micros(after.into()));
        let outcome = match timeout(&**self.ctx.env(), limit.unwrap_or(self.limit), act).await {
            Ok(outcome) => outcome,
            Err(_) if limit.is_some() => Outcome::Dropped,
            Err(_) => Outcome::Hung,
        };
        let ended = self.stamps.fetch_add(1, Ordering::Relaxed);
        CallRecord { call: call.clone(), outcome, began, ended }
    }

    async fn disturb(&self, disturbance: &Disturbance) {
        let Disturbance { kind, vm, skip, amount_ms } = *disturbance;
        let mut order = FaultOrder::next(kind).after(skip);
        order.amount = amount_ms.map(|amount| Duration::from_millis(amount.into()));
        let of_host = matches!(
            kind.scope(),
            FaultScope::Create | FaultScope::Snapshot | FaultScope::Restore | FaultScope::Fork
        );
        let vm = self.machines.vm(vm);
        if !of_host {
            let Some(vm) = &vm else { return };
            self.ctx.meet(vm);
            order = order.on(vm.id());
            let fits = match kind.scope() {
                FaultScope::Running | FaultScope::Clock => vm.state() == VmState::Running,
                _ => true,
            };
            if !fits {
                return;
            }
        }
        // A target that refuses has its reason; nothing then happens, and nothing is expected.
        if !self.ctx.can_fault(kind) || self.ctx.fault(order).is_err() || amount_ms.is_some() {
            return;
        }
        let ends =
            matches!(kind, FaultKind::GuestPanic | FaultKind::VmmKilled | FaultKind::HostLost);
        if let (true, Some(vm)) = (ends, vm) {
            self.until(|| !vm.state().has_machine()).await;
        }
    }

    async fn settle(&self) {
        self.until(|| {
            let states = self.machines.states();
            !states.values().any(|state| state == "starting" || state == "stopping")
        })
        .await;
    }

    /// Waits for a condition, as long as any call may take.
    async fn until(&self, condition: impl Fn() -> bool) {
        let begun = self.ctx.now();
        let mut pause = Duration::from_millis(1);
        while !condition() && self.ctx.now() - begun < self.limit {
            self.ctx.sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    fn newly_fired(&self) -> Vec<FaultKind> {
        let mut before = self.fired.lock().unwrap_or_else(PoisonError::into_inner);
        let kinds = FaultKind::ALL.iter().copied().zip(before.iter_mut());
        let new = kinds.filter_map(|(kind, before)| {
            let now = self.ctx.fired(kind);
            let more = now > *before;
            *before = now;
            more.then_some(kind)
        });
        new.collect()
    }
}

/// Says that a call went well and gave nothing.
pub(super) fn nothing<T>(_: T) -> Seen {
    Seen::Nothing
}
