//! Snapshots, and machines restored from them.

use super::probe::{
    Nonce, SOON, Stage, Ticker, Vm, clock_is_right, disk, millis, random, read_to_end, read_until,
    sh, snapshot_path, spawn_sh, started, uptime, uptime_of, works,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::{StreamExt, future::join};
use std::time::Duration;
use vm_core::fault::FaultKind;
use vm_trait::{
    Capability, ExecStatus, Mib, OutputOffsets, RestoreOptions, Snapshot, SnapshotOptions,
    StopOptions, VmConfig, VmErrorKind, VmEvent, VmState,
};

/// The clauses on snapshots and restores.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(keeps_memory, "snapshot.restored_is_not_rebooted",
        "what was in memory and the processes that ran are there in a machine made from a snapshot",
        [Exec, Files, Snapshot], faults: []),
    clause!(keeps_memory_in_place, "snapshot.restored_in_place",
        "a restore in place brings back memory and processes as they were captured, also after a crash",
        [Exec, Files, Snapshot, RestoreInPlace], faults: []),
    clause!(as_of_one_instant, "snapshot.as_of_one_instant",
        "memory and disks are captured as of the same instant: what is written later is not there",
        [Exec, Files, Disks, Snapshot], faults: []),
    clause!(restore_paused, "snapshot.restore_paused_or_running",
        "a restored machine stands still, or runs, as asked", [Exec, Files, Snapshot], faults: []),
    clause!(restore_twice, "snapshot.restore_twice",
        "two machines from one snapshot have different ids, and draw different random bytes at once",
        [Exec, Files, Snapshot, GuestKernel], faults: []),
    clause!(clock_right, "snapshot.clock_right_after_restore",
        "a restored guest's wall clock is within a second of the host's at once",
        [Exec, Snapshot, GuestKernel], faults: []),
    clause!(monotonic_goes_on, "snapshot.monotonic_time_goes_on",
        "a restored guest's monotonic clock goes on from where it was captured, however long ago, and its wall clock is \
         right in the same program",
        [Exec, Snapshot, GuestKernel], faults: []),
    clause!(state_stays, "snapshot.state_stays",
        "a snapshot leaves a running machine Running and a paused one Paused, without a change of state",
        [Exec, Files, Snapshot], faults: []),
    clause!(stream_goes_on, "snapshot.streams_go_on_in_the_source",
        "an output stream of the source loses and doubles no byte over a snapshot",
        [Exec, Snapshot], faults: []),
    clause!(attach_in_restored, "snapshot.processes_can_be_attached",
        "a process of a restored machine can be attached to by its id, from any offset",
        [Exec, Snapshot], faults: []),
    clause!(old_handles_fail, "snapshot.old_handles_fail",
        "a process handle from before a restore in place fails, and the process is attachable",
        [Exec, Snapshot, RestoreInPlace], faults: []),
    clause!(metadata_right, "snapshot.metadata_is_right",
        "a snapshot says from which machine it is, when it was taken, of what size, and its label",
        [Snapshot], faults: []),
    clause!(export_import, "snapshot.export_and_import",
        "exported bytes can be imported, and the machine restored from them is the same",
        [Exec, Files, Snapshot], faults: []),
    clause!(at_a_path, "snapshot.at_a_path",
        "a snapshot is kept at the path that was asked for, and its handle is plain data",
        [Exec, Files, Snapshot], faults: []),
    clause!(replaces, "snapshot.replaces_a_file",
        "a snapshot at the path of another one replaces it, and machines made from the old one go on",
        [Exec, Files, Snapshot], faults: []),
    clause!(delete, "snapshot.deleted_is_gone",
        "a deleted snapshot cannot be restored, and machines made from it go on",
        [Exec, Files, Snapshot], faults: []),
    clause!(source_may_end, "snapshot.outlives_its_source",
        "a snapshot can be used after its machine is gone", [Exec, Files, Snapshot], faults: []),
    clause!(chain, "snapshot.of_a_restored_machine",
        "a restored machine can be captured again, any number of times", [Exec, Files, Snapshot], faults: []),
];

async fn keeps_memory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let ticker = Ticker::begin(ctx, &vm).await?;
    let paused = ctx.has(Capability::Pause) && ctx.one_in(2);
    if paused {
        vm.pause().await?;
    }
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    nonce.there(&restored, "in a restored machine").await?;
    ticker.goes_on(ctx, &restored, "in a restored machine").await?;
    if paused {
        vm.resume().await?;
    }
    nonce.there(&vm, "in the source").await?;
    ticker.goes_on(ctx, &vm, "in the source").await?;
    done(ctx, &snapshot).await
}

async fn keeps_memory_in_place(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let ticker = Ticker::begin(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let id = vm.id();
    for _ in 0..ctx.draw(1, 2) {
        nonce.replace(ctx, &vm).await?;
        let crashes = ctx.can_fault(FaultKind::VmmKilled) && ctx.one_in(2);
        if crashes {
            super::probe::crash(ctx, &vm).await?;
        } else {
            vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 50))).await?;
        }
        vm.restore(&snapshot, RestoreOptions::running()).await?;
        nonce.there(&vm, "after a restore in place").await?;
        ticker.goes_on(ctx, &vm, "after a restore in place").await?;
        ensure_eq!(vm.id(), id, "the id after a restore in place");
    }
    done(ctx, &snapshot).await
}

async fn as_of_one_instant(ctx: &Context) -> Verdict {
    let disk = disk(ctx, "/data");
    let vm = started(ctx, |config| config.disks.push(disk)).await?;
    let on_disk = Nonce::plant_in(ctx, &vm, "/data").await?;
    let in_memory = Nonce::plant(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let disk_later = on_disk.replace(ctx, &vm).await?;
    let memory_later = in_memory.replace(ctx, &vm).await?;
    let new = Nonce::plant_in(ctx, &vm, "/data").await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    on_disk.there(&restored, "on the disk of a restored machine").await?;
    in_memory.there(&restored, "in the memory of a restored machine").await?;
    new.gone(&restored, "on the disk of a restored machine").await?;
    // And the other way round: the restored machine's disk is its own.
    on_disk.replace(ctx, &restored).await?;
    disk_later.there(&vm, "on the disk of the source").await?;
    memory_later.there(&vm, "in the memory of the source").await?;
    done(ctx, &snapshot).await
}

async fn restore_paused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let resume = ctx.one_in(2);
    let options = if resume { RestoreOptions::running() } else { RestoreOptions::paused() };
    let restored = ctx.backend().restore(&snapshot, options).await?;
    if !resume {
        ensure_eq!(restored.state(), VmState::Paused, "the state of a machine restored paused");
        ctx.sleep(millis(ctx, 0, 100)).await;
        ensure_eq!(restored.state(), VmState::Paused, "its state a while later");
        restored.resume().await?;
    }
    ensure_eq!(restored.state(), VmState::Running, "the state of a restored machine");
    nonce.there(&restored, "in a restored machine").await?;
    ensure_eq!(*restored.config(), *vm.config(), "the configuration of a restored machine");
    done(ctx, &snapshot).await
}

async fn restore_twice(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let running = RestoreOptions::running();
    let both =
        join(ctx.backend().restore(&snapshot, running), ctx.backend().restore(&snapshot, running));
    let (first, second) = both.await;
    let (first, second): (Vm, Vm) = (first?, second?);
    ensure!(
        first.id() != second.id() && first.id() != vm.id() && second.id() != vm.id(),
        "two machines have the same id"
    );
    let (one, other) = join(random(&first), random(&second)).await;
    let (one, other) = (one?, other?);
    ensure!(one != other, "two machines from one snapshot drew the same random bytes");
    ensure!(random(&vm).await? != one, "the source drew the random bytes of a restored machine");
    let changed = nonce.replace(ctx, &first).await?;
    nonce.there(&second, "in a twin").await?;
    nonce.there(&vm, "in the source").await?;
    first.kill().await?;
    works(ctx, &second, "after the twin's end").await?;
    drop(changed);
    done(ctx, &snapshot).await
}

async fn clock_right(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    ctx.sleep(millis(ctx, 2100, 2400)).await;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    clock_is_right(ctx, &restored, "after a restore").await?;
    clock_is_right(ctx, &vm, "in the source").await?;
    done(ctx, &snapshot).await
}

async fn monotonic_goes_on(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    ctx.sleep(millis(ctx, 50, 250)).await;
    let begun = ctx.now();
    let before = uptime(&vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let captured = ctx.now() - begun;
    // Hours cost nothing where time is simulated.
    let most = if ctx.is_simulated() { 4 * 3_600_000 } else { 2_500 };
    let kept = if ctx.one_in(2) { millis(ctx, 200, 600) } else { millis(ctx, 2_100, most) };
    ctx.sleep(kept).await;
    let restoring = ctx.now();
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    let wall = ctx.env().wall_clock();
    let text = sh(&restored, "cat /proc/uptime; date +%s").await?;
    let after = uptime_of(&text)?;
    let shown = text.lines().last().and_then(|line| line.parse().ok()).unwrap_or(0);
    let (low, high) = (wall.as_secs().saturating_sub(1), ctx.env().wall_clock().as_secs() + 1);
    ensure!(
        (low..=high).contains(&shown),
        "in its first program a restored guest's clock shows {shown}, the host's {low} to {high}"
    );
    ensure!(after >= before, "the monotonic clock went back from {before:?} to {after:?}");
    let most = captured + (ctx.now() - restoring) + Duration::from_millis(11);
    ensure!(
        after - before <= most,
        "the monotonic clock counted {:?} over a restore, {most:?} at most are explained",
        after - before
    );
    done(ctx, &snapshot).await
}

async fn state_stays(ctx: &Context) -> Verdict {
    let stage = match ctx.has(Capability::Pause) {
        true => ctx.pick(&[Stage::Running, Stage::Paused]),
        false => Stage::Running,
    };
    let vm = stage.reach(ctx).await?;
    let mut events = vm.events();
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    ensure!(stage.holds(&vm.state()), "after a snapshot in {stage:?} the state is {}", vm.state());
    let taken = async {
        while let Some(event) = events.next().await {
            match event {
                VmEvent::State { from, to } => {
                    return Err(Broken::new(format!("a snapshot changed {from} to {to}")));
                }
                VmEvent::SnapshotTaken(id) => {
                    ensure_eq!(id, snapshot.metadata.id, "the snapshot of the event");
                    return Ok(());
                }
                _ => {}
            }
        }
        Err(Broken::new("the events ended"))
    };
    ctx.within(SOON, "the event of a snapshot", taken).await??;
    if stage == Stage::Paused {
        vm.resume().await?;
    }
    works(ctx, &vm, "after a snapshot").await?;
    done(ctx, &snapshot).await
}

/// A program that writes numbered lines, some before a snapshot and some after it.
fn counting(lines: u64) -> String {
    format!("i=0; while [ $i -lt {lines} ]; do echo line $i; i=$((i+1)); sleep 0.01; done; exit 3")
}

fn counted(lines: u64) -> String {
    (0..lines).map(|n| format!("line {n}\n")).collect()
}

async fn stream_goes_on(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let lines = ctx.draw(8, 25);
    let process = spawn_sh(&vm, &counting(lines)).await?;
    let seen = read_until(&process, "line 1\n").await?;
    let (snapshot, rest) =
        join(vm.snapshot(SnapshotOptions::default()), read_to_end(&process)).await;
    let snapshot = snapshot?;
    let text = seen + &String::from_utf8_lossy(&rest?);
    ensure_eq!(text, counted(lines), "the output of a process over a snapshot");
    ensure_eq!(process.wait().await?, ExecStatus::Exited(3), "its end");
    done(ctx, &snapshot).await
}

async fn attach_in_restored(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let lines = ctx.draw(8, 25);
    let process = spawn_sh(&vm, &counting(lines)).await?;
    let seen = read_until(&process, "line 1\n").await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    let known = restored.processes().await?;
    ensure!(known.iter().any(|info| info.id == process.id()), "a restored process is not listed");
    // What the reader had acknowledged may be forgotten, so ask for what comes after it.
    let read = u64::try_from(seen.len()).unwrap_or(0);
    let offsets = OutputOffsets { stdout: read, stderr: 0 };
    let attached = restored.attach_process(process.id(), offsets).await?;
    ensure_eq!(attached.offsets().stdout, read, "the offset attached at");
    let rest = read_to_end(&attached).await?;
    let text = seen + &String::from_utf8_lossy(&rest);
    ensure_eq!(text, counted(lines), "the output of a process over a restore");
    ensure_eq!(attached.wait().await?, ExecStatus::Exited(3), "its end");
    done(ctx, &snapshot).await
}

async fn old_handles_fail(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = spawn_sh(&vm, "echo ready; sleep 1000").await?;
    read_until(&process, "ready\n").await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.kill().await?;
    vm.restore(&snapshot, RestoreOptions::running()).await?;
    let old = ctx.within(SOON, "a handle from before a restore", process.wait()).await?;
    ensure_err!(
        old,
        VmErrorKind::Disconnected | VmErrorKind::Interrupted,
        "a handle from before a restore"
    );
    let id = process.id();
    drop(process);
    let offsets = OutputOffsets { stdout: 6, stderr: 0 };
    let attached = vm.attach_process(id, offsets).await?;
    let status = attached.signal(vm_trait::Signal::KILL).await;
    status?;
    let ended = ctx.within(SOON, "the end of a killed process", attached.wait()).await??;
    ensure_eq!(ended, ExecStatus::Signaled(vm_trait::Signal::KILL), "its end");
    done(ctx, &snapshot).await
}

async fn metadata_right(ctx: &Context) -> Verdict {
    let limits = ctx.backend().limits();
    let most = u32::from(limits.max_vcpus.min(4)).max(1);
    let vcpus = u8::try_from(ctx.draw(1, u64::from(most))).unwrap_or(1);
    let memory = Mib(u32::try_from(ctx.draw(64, 160)).unwrap_or(64)).min(limits.max_memory);
    let vm = started(ctx, |config: &mut VmConfig| {
        config.vcpus = vcpus;
        config.memory = memory;
    })
    .await?;
    let label = ctx.text(30);
    let before = ctx.env().wall_clock();
    let snapshot = vm.snapshot(SnapshotOptions::default().with_label(label.clone())).await?;
    let after = ctx.env().wall_clock();
    let metadata = &snapshot.metadata;
    ensure_eq!(metadata.vm, vm.id(), "the machine");
    ensure_eq!((metadata.vcpus, metadata.memory), (vcpus, memory), "the size");
    ensure_eq!(metadata.label.as_deref(), Some(label.as_str()), "the label");
    ensure_eq!(metadata.backend, ctx.backend().name(), "the backend");
    ensure!(!metadata.arch.is_empty(), "the architecture is empty");
    ensure!(
        (before..=after).contains(&metadata.taken_at),
        "taken at {:?}, not from {before:?} to {after:?}",
        metadata.taken_at
    );
    let other = vm.snapshot(SnapshotOptions::default()).await?;
    ensure!(other.metadata.id != metadata.id, "two snapshots have the same id");
    ensure!(other.path != snapshot.path, "two snapshots have the same path");
    ensure_eq!(other.metadata.label, None, "the label of a snapshot without");
    done(ctx, &other).await?;
    done(ctx, &snapshot).await
}

async fn export_import(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let options = SnapshotOptions::default().with_label(ctx.text(20));
    let snapshot = vm.snapshot(options).await?;
    let bytes = ctx.backend().export_snapshot(&snapshot).await?;
    ensure_eq!(ctx.backend().export_snapshot(&snapshot).await?, bytes, "a second export");
    done(ctx, &snapshot).await?;
    let imported = ctx.backend().import_snapshot(bytes).await?;
    ensure_eq!(imported.metadata, snapshot.metadata, "the metadata of an imported snapshot");
    let restored = ctx.backend().restore(&imported, RestoreOptions::running()).await?;
    nonce.there(&restored, "in a machine from an imported snapshot").await?;
    done(ctx, &imported).await
}

async fn at_a_path(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let path = snapshot_path(ctx, &vm, "asked.snap").await?;
    let snapshot = vm.snapshot(SnapshotOptions::default().with_path(&path)).await?;
    ensure_eq!(snapshot.path, path, "the path of a snapshot");
    let text = serde_json::to_string(&snapshot).map_err(|error| Broken::new(error.to_string()))?;
    let read: Snapshot =
        serde_json::from_str(&text).map_err(|error| Broken::new(error.to_string()))?;
    ensure_eq!(read, snapshot, "a handle that was stored");
    let mut tampered = read;
    tampered.metadata.memory = Mib(ctx.pick(&[1, 64, 100_000]));
    let restored = ctx.backend().restore(&tampered, RestoreOptions::running()).await?;
    ensure_eq!(restored.config().memory, vm.config().memory, "what counts is in the file");
    nonce.there(&restored, "in a restored machine").await?;
    done(ctx, &snapshot).await
}

async fn replaces(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = snapshot_path(ctx, &vm, "replaced.snap").await?;
    let options = SnapshotOptions::default().with_path(&path);
    let old = Nonce::plant(ctx, &vm).await?;
    let first = vm.snapshot(options.clone()).await?;
    let running = RestoreOptions::running();
    let from_first = ctx.backend().restore(&first, running).await?;
    let new = old.replace(ctx, &vm).await?;
    let second = vm.snapshot(options).await?;
    let from_second = ctx.backend().restore(&second, running).await?;
    new.there(&from_second, "in a machine from the new file").await?;
    old.there(&from_first, "in a machine from the file that was replaced").await?;
    done(ctx, &second).await?;
    old.there(&from_first, "after the file was deleted").await
}

async fn delete(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    ctx.backend().delete_snapshot(&snapshot).await?;
    ensure_err!(
        ctx.backend().restore(&snapshot, RestoreOptions::running()).await,
        VmErrorKind::HostIo { .. },
        "a restore from a deleted snapshot"
    );
    ensure_err!(
        ctx.backend().export_snapshot(&snapshot).await,
        VmErrorKind::HostIo { .. },
        "an export of a deleted snapshot"
    );
    ensure_err!(
        ctx.backend().delete_snapshot(&snapshot).await,
        VmErrorKind::HostIo { .. },
        "a second delete"
    );
    nonce.there(&restored, "after its snapshot was deleted").await
}

async fn source_may_end(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let nonce = Nonce::plant(ctx, &vm).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.kill().await?;
    drop(vm);
    for _ in 0..ctx.draw(1, 3) {
        let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
        nonce.there(&restored, "in a machine whose source is gone").await?;
    }
    done(ctx, &snapshot).await
}

async fn chain(ctx: &Context) -> Verdict {
    let mut vm = ctx.running().await?;
    let mut nonces = Vec::new();
    for _ in 0..ctx.draw(2, 4) {
        nonces.push(Nonce::plant(ctx, &vm).await?);
        let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
        vm = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
        done(ctx, &snapshot).await?;
    }
    for nonce in nonces {
        nonce.there(&vm, "at the end of a chain of snapshots").await?;
    }
    Ok(())
}

/// Removes a snapshot that a check no longer needs.
async fn done(ctx: &Context, snapshot: &Snapshot) -> Verdict {
    Ok(ctx.backend().delete_snapshot(snapshot).await?)
}
