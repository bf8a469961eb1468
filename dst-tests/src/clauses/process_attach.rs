//! Processes that outlive their handle, and what the agent tells of them.

use super::streams::{
    SOON, break_link, disturb_link, length, millis, read_at_least, read_to_end, read_until_text,
    same_bytes, sh, until,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use vm_core::fault::FaultKind;
use vm_trait::{
    ExecFailure, ExecRequest, ExecStatus, GuestProcess, OutputChannel, OutputOffsets, ProcessId,
    ProcessInfo, Signal, VmErrorKind, VmInstance,
};

/// What is promised of detached processes and of the list of processes.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(detached_lives_on, "process.detached_lives_on",
        "a detached program outlives its handle and is taken up again without losing or doubling a byte, also when \
         the link falters", [Exec], faults: []),
    clause!(attach_after_end, "process.attach_after_end",
        "what a detached program wrote until its end can be had later, from any offset, with its status",
        [Exec], faults: []),
    clause!(detached_output_is_bounded, "process.detached_output_is_bounded",
        "a detached program that nobody reads runs on, and who takes it up is told from which byte on its last output \
         is kept", [Exec], faults: []),
    clause!(attach_to_input, "process.attach_to_input",
        "who takes up a detached program can write to it and close its input", [Exec], faults: []),
    clause!(attach_then_drop, "process.attach_then_drop",
        "a program that was taken up again is killed when that handle is dropped", [Exec], faults: []),
    clause!(attach_unknown, "process.attach_unknown", "an id that names no process is told as such",
        [Exec], faults: []),
    clause!(listed_while_running, "process.listed_while_running",
        "a running program is listed with its id, pid and program", [Exec], faults: []),
    clause!(listed_after_end, "process.listed_after_end",
        "a detached program that has ended is listed with its status, and forgotten once it was taken up and let go",
        [Exec], faults: []),
    clause!(broken_link_unseen, "process.broken_link_unseen",
        "streams go on byte for byte over a link that breaks", [Exec], faults: [LinkDisconnect]),
    clause!(stalled_link_unseen, "process.stalled_link_unseen",
        "streams go on byte for byte over a link that stalls", [Exec], faults: [LinkStall]),
    clause!(short_link_unseen, "process.short_link_unseen",
        "streams go on byte for byte over a link that moves few bytes at a time", [Exec], faults: [LinkShort]),
    clause!(spawn_over_broken_link, "process.spawn_over_broken_link",
        "a program is started once over a link that breaks under the request, and ends with its handle",
        [Exec], faults: [LinkDisconnect]),
];

/// Takes up a process and asks that it begins where it should.
async fn attach(
    vm: &dyn VmInstance,
    id: ProcessId,
    offsets: OutputOffsets,
) -> Result<GuestProcess, Broken> {
    let process = vm.attach_process(id, offsets).await?;
    ensure_eq!(process.id(), id, "id of the handle");
    ensure_eq!(process.offsets(), offsets, "offsets of the handle");
    Ok(process)
}

async fn detached_lives_on(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let words: Vec<String> =
        (0..ctx.draw(4, 30)).map(|word| format!("{word} {}", ctx.text(8))).collect();
    let script = "for w in \"$@\"; do printf '%s\\n' \"$w\"; printf '%s\\n' \"$w\" >&2; sleep 0.01; done; exit 7";
    let wanted: String = words.iter().flat_map(|word| [word.as_str(), "\n"]).collect();
    let wanted = wanted.as_bytes();
    let mut process = vm.spawn(sh(script, words.clone())).await?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    for _ in 0..ctx.draw(1, 3) {
        // The reader may be anywhere in either output when it lets go.
        let least = length(ctx, 0, 12).min(wanted.len() - out.len());
        out.extend(read_at_least(&process, OutputChannel::Stdout, least).await?);
        let least = length(ctx, 0, 12).min(wanted.len() - err.len());
        err.extend(read_at_least(&process, OutputChannel::Stderr, least).await?);
        let offsets = process.offsets();
        let trouble = disturb_link(ctx, &*vm, 0)?;
        let id = process.detach().await?;
        ctx.sleep(millis(ctx, 0, 60)).await;
        process = attach(&*vm, id, offsets).await?;
        trouble.took_place(ctx)?;
    }
    let rest = read_to_end(&process, OutputChannel::Stdout);
    out.extend(ctx.within(SOON, "the rest of stdout", rest).await??);
    let rest = read_to_end(&process, OutputChannel::Stderr);
    err.extend(ctx.within(SOON, "the rest of stderr", rest).await??);
    same_bytes(&out, wanted, "stdout over all handles")?;
    same_bytes(&err, wanted, "stderr over all handles")?;
    ensure_eq!(process.wait().await?, ExecStatus::Exited(7), "status");
    Ok(())
}

async fn attach_after_end(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let (out, err) = (ctx.text(4000).into_bytes(), ctx.text(100));
    let script = "printf %s \"$1\"; printf %s \"$2\" >&2; exit \"$3\"";
    let text = String::from_utf8_lossy(&out).into_owned();
    let process = vm.spawn(sh(script, [text, err.clone(), code.to_string()])).await?;
    let id = process.detach().await?;
    until(ctx, "the program has ended", || async {
        let known = vm.processes().await?;
        Ok(known.iter().any(|known| known.id == id && known.status.is_some()))
    })
    .await?;
    let from = length(ctx, 0, u64::try_from(out.len()).unwrap_or(0));
    let offsets = OutputOffsets { stdout: u64::try_from(from).unwrap_or(0), stderr: 0 };
    let process = attach(&*vm, id, offsets).await?;
    same_bytes(
        &read_to_end(&process, OutputChannel::Stdout).await?,
        &out[from..],
        "rest of stdout",
    )?;
    same_bytes(&read_to_end(&process, OutputChannel::Stderr).await?, err.as_bytes(), "stderr")?;
    ensure_eq!(process.wait().await?, ExecStatus::Exited(code), "status");
    Ok(())
}

async fn detached_output_is_bounded(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let total = ctx.draw(600_000, 3 << 20);
    let process = vm.spawn(sh("yes | head -c \"$1\"", [total.to_string()])).await?;
    let id = process.detach().await?;
    until(ctx, "the program has ended", || async {
        let known = vm.processes().await?;
        Ok(known.iter().any(|known| known.id == id && known.status.is_some()))
    })
    .await?;
    let asked = ctx.draw(0, total);
    let process = vm.attach_process(id, OutputOffsets { stdout: asked, stderr: 0 }).await?;
    let begin = process.offsets().stdout;
    ensure!((asked..=total).contains(&begin), "asked for {asked} of {total}, got {begin}");
    let out = read_to_end(&process, OutputChannel::Stdout).await?;
    let count = u64::try_from(out.len()).unwrap_or(0);
    ensure_eq!(begin + count, total, "the last byte's offset");
    let right = |(index, byte): (u64, &u8)| *byte == if index % 2 == 0 { b'y' } else { b'\n' };
    ensure!((begin..).zip(&out).all(right), "bytes from {begin} on are not what was written there");
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn attach_to_input(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(ExecRequest::new("cat").open_stdin()).await?;
    let (first, second) = (ctx.bytes(length(ctx, 1, 3000)), ctx.bytes(length(ctx, 1, 3000)));
    process.write_stdin(first.clone()).await?;
    let mut out = read_at_least(&process, OutputChannel::Stdout, first.len()).await?;
    let offsets = process.offsets();
    let id = process.detach().await?;
    let process = attach(&*vm, id, offsets).await?;
    process.write_stdin(second.clone()).await?;
    process.close_stdin().await?;
    let rest = read_to_end(&process, OutputChannel::Stdout);
    out.extend(ctx.within(SOON, "cat after end-of-file", rest).await??);
    same_bytes(&out, &[first, second].concat(), "what cat read from both handles")?;
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn attach_then_drop(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(ExecRequest::new("sleep").arg("600")).await?;
    let id = process.detach().await?;
    ctx.sleep(millis(ctx, 0, 50)).await;
    let listed = vm.processes().await?;
    ensure!(
        listed.iter().any(|known| known.id == id && known.status.is_none()),
        "the detached program does not run: {listed:?}"
    );
    let process = vm.attach_process(id, OutputOffsets::default()).await?;
    drop(process);
    until(ctx, "the program is gone", || async { Ok(vm.processes().await?.is_empty()) }).await
}

async fn attach_unknown(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let ended = vm.spawn(ExecRequest::new("true")).await?;
    let known = ended.id();
    ended.wait().await?;
    drop(ended);
    until(ctx, "the ended program is forgotten", || async { Ok(vm.processes().await?.is_empty()) })
        .await?;
    let id = if ctx.one_in(2) { known } else { ProcessId(ctx.draw(1 << 40, u64::MAX)) };
    let result = vm.attach_process(id, OutputOffsets::default()).await;
    ensure_err!(
        result,
        VmErrorKind::ExecFailed { failure: ExecFailure::NoSuchProcess },
        "taking up {id:?}"
    );
    Ok(())
}

async fn listed_while_running(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    ensure_eq!(vm.processes().await?, Vec::new(), "processes of an idle guest");
    let mut running = Vec::new();
    for _ in 0..ctx.draw(1, 6) {
        let request = ctx.pick(&[
            ExecRequest::new("sleep").arg("600"),
            ExecRequest::new("cat").open_stdin(),
            sh("sleep 600; true", [""; 0]),
        ]);
        let program = request.program.clone();
        running.push((vm.spawn(request).await?, program));
    }
    let wanted: Vec<ProcessInfo> = running
        .iter()
        .map(|(process, program)| {
            ProcessInfo::new(process.id(), process.pid(), program.clone(), None)
        })
        .collect();
    let mut by_id = wanted.clone();
    by_id.sort_by_key(|known| known.id);
    ensure_eq!(vm.processes().await?, by_id, "the list, by id");
    let (process, _) = running.swap_remove(ctx.index(running.len()));
    let id = process.id();
    drop(process);
    by_id.retain(|known| known.id != id);
    until(ctx, "the list without the dropped one", || async { Ok(vm.processes().await? == by_id) })
        .await
}

async fn listed_after_end(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let (request, wanted) = if ctx.one_in(2) {
        (sh("exit \"$1\"", [code.to_string()]), ExecStatus::Exited(code))
    } else {
        (sh("kill -KILL $$", [""; 0]), ExecStatus::Signaled(Signal::KILL))
    };
    let process = vm.spawn(request).await?;
    let pid = process.pid();
    let id = process.detach().await?;
    let wanted = vec![ProcessInfo::new(id, pid, "sh".to_owned(), Some(wanted))];
    until(ctx, "the list with the status", || async { Ok(vm.processes().await? == wanted) })
        .await?;
    let process = vm.attach_process(id, OutputOffsets::default()).await?;
    ensure_eq!(Some(process.wait().await?), wanted[0].status, "status");
    drop(process);
    until(ctx, "the list is empty", || async { Ok(vm.processes().await?.is_empty()) }).await
}

/// Sends bytes through a program while the link is in trouble, and asks that all come back as they were.
async fn streams_in_trouble(ctx: &Context, kind: FaultKind) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(ExecRequest::new("cat").open_stdin()).await?;
    for _ in 0..ctx.draw(1, 4) {
        let bytes = ctx.bytes(length(ctx, 1, 800_000));
        let trouble = break_link(ctx, &*vm, kind, bytes.len())?;
        let writing = process.write_stdin(bytes.clone());
        let reading = read_at_least(&process, OutputChannel::Stdout, bytes.len());
        let both = futures_util::future::join(writing, reading);
        let (written, read) = ctx.within(SOON * 2, "a round through cat", both).await?;
        written?;
        same_bytes(&read?, &bytes, "what came back")?;
        trouble.took_place(ctx)?;
    }
    process.close_stdin().await?;
    ensure_eq!(process.read_stdout().await?, None, "after the last byte");
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn broken_link_unseen(ctx: &Context) -> Verdict {
    streams_in_trouble(ctx, FaultKind::LinkDisconnect).await
}

async fn stalled_link_unseen(ctx: &Context) -> Verdict {
    streams_in_trouble(ctx, FaultKind::LinkStall).await
}

async fn short_link_unseen(ctx: &Context) -> Verdict {
    streams_in_trouble(ctx, FaultKind::LinkShort).await
}

async fn spawn_over_broken_link(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    for _ in 0..ctx.draw(1, 3) {
        let trouble = break_link(ctx, &*vm, FaultKind::LinkDisconnect, 0)?;
        let process = vm.spawn(sh("echo up; sleep 600", [""; 0])).await?;
        read_until_text(ctx, &process, "up\n").await?;
        let listed = vm.processes().await?;
        ensure_eq!(listed.len(), 1, "programs after one spawn");
        ensure_eq!(listed[0].id, process.id(), "id of the program");
        trouble.took_place(ctx)?;
        drop(process);
        until(ctx, "the program is gone", || async { Ok(vm.processes().await?.is_empty()) })
            .await?;
    }
    Ok(())
}
