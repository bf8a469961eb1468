//! Events.

use super::probe::{SOON, Stage, Vm, millis, order, script, started};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
    history::ears::Ear,
};
use futures_util::StreamExt;
use std::time::Duration;
use vm_core::{
    env::timeout,
    fault::{FaultKind, FaultOrder},
};
use vm_trait::{Capability, EventStream, Operation, StopOptions, VmEvent, VmInstanceExt, VmState};

/// The clauses on events.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(states_in_order, "events.states_in_order",
        "every change of state is told once, in order, each beginning where the one before ended",
        [Exec, Files], faults: []),
    clause!(every_reader, "events.every_reader_has_all",
        "every reader gets every event from its own beginning on", [], faults: []),
    clause!(crash_is_told, "events.crash_is_told",
        "a crash is told with its reason, without a call", [Exec], faults: [VmmKilled]),
    clause!(processes_are_told, "events.processes_are_told",
        "every program that was started is told with its id", [Exec], faults: []),
    clause!(lost_agent_is_told, "events.lost_agent_is_told",
        "the loss of the connection to the agent is told, and its return", [Exec], faults: [LinkDisconnect]),
    clause!(no_return_without_loss, "events.no_return_without_loss",
        "each return of the connection to the agent follows its loss, also while the machine stops",
        [Exec], faults: [LinkStall]),
    clause!(slow_reader, "events.slow_reader_is_told",
        "a reader that is too slow is told how many events it missed, and gets the newest ones",
        [Exec], faults: [])
    .undisturbed(),
    clause!(end_of_events, "events.end_with_the_machine",
        "the events end once the last handle is dropped, and not before", [], faults: []),
];

/// Reads what has been told so far: until nothing comes for a moment.
async fn told(ctx: &Context, events: &mut EventStream) -> Vec<VmEvent> {
    let mut all = Vec::new();
    while let Ok(Some(event)) =
        timeout(&**ctx.env(), Duration::from_millis(20), events.next()).await
    {
        all.push(event);
    }
    all
}

/// Follows the changes of state from `first` to the last one.
fn follow(events: &[VmEvent], first: VmState) -> Result<Vec<VmState>, Broken> {
    let mut states = vec![first];
    for event in events {
        match event {
            VmEvent::State { from, to } => {
                ensure_eq!(Some(from), states.last(), "where the change to {to} began");
                ensure!(from != to, "a change from {from} to itself");
                states.push(to.clone());
            }
            VmEvent::Missed(count) => {
                return Err(Broken::new(format!("{count} events were missed")));
            }
            _ => {}
        }
    }
    Ok(states)
}

async fn states_in_order(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let mut events = vm.events();
    let mut moves = vec![Operation::Start, Operation::Stop, Operation::Kill];
    if ctx.has(Capability::Pause) {
        moves.extend([Operation::Pause, Operation::Resume]);
    }
    let (mut stage, mut wanted) = (Stage::Created, vec![VmState::Created]);
    for _ in 0..ctx.draw(3, 12) {
        let operation = ctx.pick(&moves);
        let allowed = stage.allows(operation);
        let outcome = super::lifecycle_table::attempt(ctx, &vm, operation).await;
        ensure_eq!(outcome.is_ok(), allowed, "{operation} in {stage:?}");
        if allowed {
            let after = stage.after(operation);
            let passing = match operation {
                Operation::Start => Some(VmState::Starting),
                Operation::Stop | Operation::Kill => Some(VmState::Stopping),
                _ => None,
            };
            if after != stage {
                wanted.extend(passing);
                wanted.push(vm.state());
            }
            stage = after;
        }
    }
    let seen = follow(&told(ctx, &mut events).await, VmState::Created)?;
    ensure_eq!(seen, wanted, "the states that were told");
    Ok(())
}

async fn every_reader(ctx: &Context) -> Verdict {
    let vm = ctx.created().await?;
    let mut early = vm.events();
    vm.start().await?;
    let mut late = vm.events();
    vm.kill().await?;
    let running = VmState::Running;
    let from_early = follow(&told(ctx, &mut early).await, VmState::Created)?;
    let from_late = follow(&told(ctx, &mut late).await, running.clone())?;
    let (starting, stopping) = (VmState::Starting, VmState::Stopping);
    let end = [running, stopping, VmState::Stopped];
    ensure_eq!(from_late, end, "what the late reader was told");
    let all: Vec<_> = [VmState::Created, starting].into_iter().chain(end).collect();
    ensure_eq!(from_early, all, "what the early reader was told");
    Ok(())
}

async fn crash_is_told(ctx: &Context) -> Verdict {
    let vm = Stage::Running.reach(ctx).await?;
    let mut events = vm.events();
    let delay = millis(ctx, 0, 50);
    let killed = FaultOrder::next(FaultKind::VmmKilled).on(vm.id()).with_amount(delay);
    let ordered = order(ctx, killed)?;
    let crashed = async {
        while let Some(event) = events.next().await {
            if let VmEvent::State { to: VmState::Crashed(reason), .. } = event {
                return Ok(reason);
            }
        }
        Err(Broken::new("the events ended without a crash"))
    };
    let reason = ctx.within(delay + SOON, "the event of a crash", crashed).await??;
    ordered.must_have_fired(ctx)?;
    ensure_eq!(VmState::Crashed(reason), vm.state(), "the reason that was told");
    Ok(())
}

async fn processes_are_told(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut events = vm.events();
    let mut started = Vec::new();
    for _ in 0..ctx.draw(1, 6) {
        let process = vm.spawn(script("exit 0")).await?;
        started.push(process.id());
        process.wait().await?;
    }
    let told: Vec<_> = told(ctx, &mut events)
        .await
        .into_iter()
        .filter_map(|event| match event {
            VmEvent::ProcessStarted(id) => Some(id),
            _ => None,
        })
        .collect();
    ensure_eq!(told, started, "the programs that were told");
    Ok(())
}

async fn lost_agent_is_told(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut events = vm.events();
    let ordered = order(ctx, FaultOrder::next(FaultKind::LinkDisconnect).on(vm.id()))?;
    let begun = ctx.now();
    while !ordered.fired(ctx) {
        ensure!(ctx.now() - begun < SOON, "the link was used and did not break");
        // It is either served over the new connection, or says that the old one broke.
        if let Err(error) = vm.ping().await {
            ensure!(error.is_retriable(), "a ping over a link that breaks: {error}");
        }
    }
    vm.sh("true").await.ok();
    let told = async {
        let (mut lost, mut back) = (0, 0);
        while let Some(event) = events.next().await {
            match event {
                VmEvent::AgentLost => lost += 1,
                VmEvent::AgentBack => back += 1,
                VmEvent::State { to, .. } => {
                    return Err(Broken::new(format!("a lost connection made the machine {to}")));
                }
                _ => {}
            }
            if lost > 0 && lost == back {
                return Ok(());
            }
        }
        Err(Broken::new("the events ended"))
    };
    ctx.within(SOON, "the events of a connection lost and back", told).await?
}

async fn no_return_without_loss(ctx: &Context) -> Verdict {
    let link = Duration::from_secs(4);
    let vm = started(ctx, |config| config.timeouts.link = link).await?;
    let mut ear = Ear::new(&*vm);
    let ready = vm.spawn(script("trap '' TERM; echo ready; sleep 1000")).await?;
    ensure!(ready.read_stdout().await?.is_some(), "the program ended");
    let ordered = order(ctx, FaultOrder::next(FaultKind::LinkStall).on(vm.id()))?;
    // Longer than it takes to notice that nothing comes, and to connect again.
    let grace = millis(ctx, 0, 500) + link;
    vm.stop(StopOptions::default().with_grace(grace)).await?;
    ordered.must_have_fired(ctx)?;
    // What is told a moment late counts, too.
    ctx.sleep(Duration::from_millis(20)).await;
    ear.listen(&vm.state()).map_err(Broken::new)
}

async fn slow_reader(ctx: &Context) -> Verdict {
    const KEPT: u64 = 1024;
    let vm: Vm = ctx.running().await?;
    let mut events = vm.events();
    // Going past what is kept takes a thousand programs, so few runs do.
    let count = if ctx.one_in(16) { ctx.draw(KEPT + 1, KEPT + 40) } else { ctx.draw(1, 60) };
    let mut last = None;
    for _ in 0..count {
        let process = vm.spawn(vm_trait::ExecRequest::new("true")).await?;
        last = Some(process.id());
        process.wait().await?;
    }
    let (mut missed, mut seen, mut newest) = (0, 0, None);
    for event in told(ctx, &mut events).await {
        match event {
            VmEvent::Missed(many) => missed += many,
            VmEvent::ProcessStarted(id) => {
                seen += 1;
                newest = Some(id);
            }
            _ => {}
        }
    }
    ensure_eq!(seen + missed, count, "events seen and missed");
    ensure_eq!(newest, last, "the newest event");
    if count <= KEPT {
        ensure_eq!(missed, 0, "events missed of {count}");
    } else {
        ensure!(seen <= KEPT && missed > 0, "{seen} of {count} events were kept");
    }
    Ok(())
}

async fn end_of_events(ctx: &Context) -> Verdict {
    let stage = ctx.pick(&Stage::reachable(ctx));
    let vm = stage.reach(ctx).await?;
    let mut events = vm.events();
    told(ctx, &mut events).await;
    let second = std::sync::Arc::clone(&vm);
    drop(vm);
    let early = timeout(&**ctx.env(), millis(ctx, 1, 30), events.next()).await;
    ensure!(!matches!(early, Ok(None)), "the events ended with a handle left");
    drop(second);
    let rest = async { while events.next().await.is_some() {} };
    ctx.within(SOON, "the end of the events", rest).await
}
