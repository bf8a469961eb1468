//! `exec`: streams, ends and how they are told.

use super::{
    probe::order,
    streams::{
        SOON, TICKING_CHILD, disturb_link, fresh_dir, length, millis, no_more_ticks, payload,
        same_bytes, sh, until,
    },
};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use futures_util::future::{Either, join_all, select};
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{ExecRequest, ExecStatus, Signal, Stdin, VmInstanceExt};

/// What `exec` promises of streams and ends.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(streams_apart, "exec.streams_apart",
        "what a program writes on stdout and on stderr arrives apart and byte for byte, also when the link falters",
        [Exec, Files], faults: []),
    clause!(every_exit_code, "exec.every_exit_code", "every exit code arrives", [Exec], faults: []),
    clause!(death_by_signal, "exec.death_by_signal",
        "a program that a signal ends is reported with that signal, and starts with every signal at its default",
        [Exec], faults: []),
    clause!(stdin_then_end, "exec.stdin_then_end",
        "a program reads the request's bytes and then end-of-file, also when the link falters", [Exec], faults: []),
    clause!(empty_stdin_ends, "exec.empty_stdin_ends",
        "a program that was given nothing to read sees end-of-file at once", [Exec], faults: []),
    clause!(unread_stdin, "exec.unread_stdin",
        "a program that does not read its input ends as it would otherwise", [Exec], faults: []),
    clause!(megabytes_both_ways, "exec.megabytes_both_ways",
        "megabytes go in and out at once without deadlock, also when the link falters", [Exec], faults: []),
    clause!(output_limit, "exec.output_limit",
        "each stream is kept up to the limit and what is past it is counted exactly", [Exec], faults: []),
    clause!(many_at_once, "exec.many_at_once",
        "32 programs run beside each other and each has its own result", [Exec], faults: []),
    clause!(one_stalls_no_other, "exec.one_stalls_no_other",
        "a program that takes long delays no other", [Exec], faults: []),
    clause!(left_behind_child, "exec.left_behind_child",
        "the end of a program is told though a child of it still holds its output", [Exec], faults: []).fresh(),
    clause!(elapsed_time, "exec.elapsed_time", "the time that a program took is told in guest time", [Exec], faults: []),
    clause!(dropped_kills_group, "exec.dropped_kills_group",
        "dropping the future kills the program with its children", [Exec, Files], faults: []),
    clause!(killed_from_outside, "exec.killed_from_outside",
        "a program that is killed in the guest is reported with the signal", [Exec], faults: [ExecKilled]),
    clause!(killed_for_memory, "exec.killed_for_memory",
        "a program that the guest kills for want of memory is reported as killed, and the machine goes on",
        [Exec], faults: [GuestOom]),
    clause!(output_cut, "exec.output_cut",
        "a program whose outputs break ends, and what arrived is a true beginning", [Exec], faults: [OutputCut]),
];

async fn streams_apart(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let (out, err) = (payload(ctx, 300_000), payload(ctx, 300_000));
    let paths = [format!("{dir}/out"), format!("{dir}/err")];
    vm.write(&paths[0], out.clone()).await?;
    vm.write(&paths[1], err.clone()).await?;
    let trouble = disturb_link(ctx, &*vm, 0)?;
    let got = vm.exec(sh("cat \"$1\"; cat \"$2\" >&2", paths)).await?;
    ensure_eq!(got.status, ExecStatus::Exited(0), "status");
    same_bytes(&got.stdout, &out, "stdout")?;
    same_bytes(&got.stderr, &err, "stderr")?;
    ensure_eq!((got.stdout_dropped, got.stderr_dropped), (0, 0), "bytes dropped");
    trouble.took_place(ctx)
}

async fn every_exit_code(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    for _ in 0..ctx.draw(1, 4) {
        let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
        let got = vm.exec(sh("exit \"$1\"", [code.to_string()])).await?;
        ensure_eq!(got.status, ExecStatus::Exited(code), "status");
        ensure_eq!(got.status.success(), code == 0, "success");
    }
    Ok(())
}

async fn death_by_signal(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let signal = ctx.pick(&[
        Signal::HUP,
        Signal::INT,
        Signal::QUIT,
        Signal::KILL,
        Signal::USR1,
        Signal::USR2,
        Signal::PIPE,
        Signal(14),
        Signal::TERM,
    ]);
    let got = vm.exec(sh("echo alive; kill -\"$1\" $$; exit 77", [signal.0.to_string()])).await?;
    ensure_eq!(got.status, ExecStatus::Signaled(signal), "status");
    ensure_eq!(got.stdout_text(), "alive\n", "output before the signal");
    Ok(())
}

async fn stdin_then_end(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let bytes = payload(ctx, 600_000);
    let trouble = disturb_link(ctx, &*vm, bytes.len())?;
    let running = vm.exec(ExecRequest::new("cat").stdin(bytes.clone()));
    let got = ctx.within(SOON, "cat", running).await??;
    ensure_eq!(got.status, ExecStatus::Exited(0), "status");
    same_bytes(&got.stdout, &bytes, "what cat read")?;
    trouble.took_place(ctx)
}

async fn empty_stdin_ends(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut request = ExecRequest::new("wc").arg("-c");
    // `exec` gives no handle to write to, so an open standard input would never end.
    request.stdin = ctx.pick(&[Stdin::Empty, Stdin::Open, Stdin::Bytes(ctx.bytes(0))]);
    let got = ctx.within(SOON, "reading an empty stdin", vm.exec(request)).await??;
    ensure_eq!(got.stdout_text().trim().to_owned(), "0", "bytes read");
    Ok(())
}

async fn unread_stdin(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let script =
        ctx.pick(&["exit \"$1\"", "exec <&-; sleep 0.1; exit \"$1\"", "read line; exit \"$1\""]);
    let mut bytes = b"a line\n".to_vec();
    bytes.extend_from_slice(&ctx.bytes(length(ctx, 0, 900_000)));
    let request = sh(script, [code.to_string()]).stdin(bytes);
    let got = ctx.within(SOON, "a program that does not read", vm.exec(request)).await??;
    ensure_eq!(got.status, ExecStatus::Exited(code), "status of `{script}`");
    Ok(())
}

async fn megabytes_both_ways(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    // More than all buffers between the two ends hold; eight mebibytes where runs are few.
    let size = if ctx.heavy(16) { 8 << 20 } else { length(ctx, 1 << 20, 3 << 20) };
    let bytes = ctx.bytes(size);
    let trouble = disturb_link(ctx, &*vm, bytes.len())?;
    let running = vm.exec(ExecRequest::new("cat").stdin(bytes.clone()));
    let got = ctx.within(SOON * 6, "megabytes through cat", running).await??;
    ensure_eq!(got.status, ExecStatus::Exited(0), "status");
    same_bytes(&got.stdout, &bytes, "what came back")?;
    trouble.took_place(ctx)
}

async fn output_limit(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (out, err) = (length(ctx, 0, 200_000), length(ctx, 0, 200_000));
    let around = ctx.pick(&[out, err, out.max(1) - 1, err + 1]);
    let limit = ctx.pick(&[0, 1, around, length(ctx, 0, 250_000)]);
    let script = "yes o | head -c \"$1\"; yes e | head -c \"$2\" >&2";
    let request = sh(script, [out.to_string(), err.to_string()]).output_limit(limit);
    let got = ctx.within(SOON, "output past the limit", vm.exec(request)).await??;
    ensure_eq!(got.status, ExecStatus::Exited(0), "status with limit {limit}");
    let text = |letter: u8, size: usize| -> Vec<u8> {
        [letter, b'\n'].into_iter().cycle().take(size.min(limit)).collect()
    };
    same_bytes(&got.stdout, &text(b'o', out), "stdout up to the limit")?;
    same_bytes(&got.stderr, &text(b'e', err), "stderr up to the limit")?;
    let past = |size: usize| u64::try_from(size.saturating_sub(limit)).unwrap_or(u64::MAX);
    ensure_eq!(got.stdout_dropped, past(out), "dropped of {out} bytes of stdout, limit {limit}");
    ensure_eq!(got.stderr_dropped, past(err), "dropped of {err} bytes of stderr, limit {limit}");
    Ok(())
}

async fn many_at_once(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let wanted: Vec<(String, u8, String)> = (0..32)
        .map(|index| {
            let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
            let pause = format!("0.{:03}", ctx.draw(0, 80));
            (format!("{index} {}", ctx.text(10)), code, pause)
        })
        .collect();
    let script = "printf %s \"$1\"; sleep \"$3\"; printf %s \"$1\" >&2; exit \"$2\"";
    let tasks: Vec<_> = wanted
        .iter()
        .map(|(text, code, pause)| {
            let request = sh(script, [text.clone(), code.to_string(), pause.clone()]);
            let vm = vm.clone();
            ctx.spawn(async move { vm.exec(request).await })
        })
        .collect();
    let all = join_all(tasks.into_iter().map(crate::context::Task::join));
    let results = ctx.within(SOON * 2, "32 programs", all).await?;
    for (result, (text, code, _)) in results.into_iter().zip(&wanted) {
        let got = result??;
        ensure_eq!(got.status, ExecStatus::Exited(*code), "status");
        same_bytes(&got.stdout, text.as_bytes(), "stdout")?;
        same_bytes(&got.stderr, text.as_bytes(), "stderr")?;
    }
    Ok(())
}

async fn one_stalls_no_other(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let long = vm.exec(ExecRequest::new("sleep").arg("600"));
    let others = async {
        for _ in 0..10 {
            let text = ctx.text(20);
            let got = vm.exec(sh("printf %s \"$1\"", [text.clone()])).await?;
            same_bytes(&got.stdout, text.as_bytes(), "stdout")?;
        }
        Ok(())
    };
    let others = Box::pin(ctx.within(SOON, "ten programs beside a long one", others));
    match select(long, others).await {
        Either::Left((ended, _)) => {
            let got = ended?;
            ensure!(false, "sleeping for ten minutes ended first: {got:?}");
            Ok(())
        }
        Either::Right((verdict, _)) => verdict?,
    }
}

async fn left_behind_child(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let before = ctx.now();
    let request = sh("(sleep 600; echo late) & echo early; exit \"$1\"", [code.to_string()]);
    let got = vm.exec(request).await?;
    let took = ctx.now().saturating_sub(before);
    ensure!(took < SOON, "the end was told after {took:?}");
    ensure_eq!(got.status, ExecStatus::Exited(code), "status");
    ensure_eq!(got.stdout_text(), "early\n", "stdout");
    Ok(())
}

async fn elapsed_time(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let pause = millis(ctx, 50, 300);
    let before = ctx.now();
    let seconds = format!("0.{:03}", pause.as_millis());
    let got = vm.exec(ExecRequest::new("sleep").arg(seconds)).await?;
    let took = ctx.now().saturating_sub(before);
    // Guest and host clocks may tick apart by a little.
    let slack = Duration::from_millis(20);
    ensure!(got.elapsed + slack >= pause, "slept {pause:?}, told {:?}", got.elapsed);
    ensure!(got.elapsed <= took + slack, "took {took:?} in all, told {:?}", got.elapsed);
    Ok(())
}

async fn dropped_kills_group(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let ticks = format!("{}/ticks", fresh_dir(ctx, &*vm).await?);
    let running = vm.exec(sh(&format!("{TICKING_CHILD}sleep 600"), [ticks.clone()]));
    let has_begun = Box::pin(until(ctx, "the child runs", || vm.exists(&ticks)));
    match select(running, has_begun).await {
        Either::Left((ended, _)) => {
            let got = ended?;
            ensure!(false, "the program ended by itself: {got:?}");
        }
        Either::Right((verdict, running)) => {
            verdict?;
            drop(running);
        }
    }
    until(ctx, "no process is left", || async { Ok(vm.processes().await?.is_empty()) }).await?;
    no_more_ticks(ctx, &*vm, &ticks).await
}

async fn killed_from_outside(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let trouble = order(ctx, FaultOrder::next(FaultKind::ExecKilled).on(vm.id()))?;
    let running = vm.exec(sh("sleep 5; exit 0", [""; 0]));
    let got = ctx.within(SOON, "a killed program", running).await??;
    ensure!(matches!(got.status, ExecStatus::Signaled(_)), "status is {:?}", got.status);
    trouble.must_have_fired(ctx)?;
    let got = vm.run("true", []).await?;
    ensure!(got.status.success(), "the next program: {got:?}");
    Ok(())
}

async fn killed_for_memory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(ExecRequest::new("sleep").arg("600")).await?;
    ctx.sleep(millis(ctx, 0, 200)).await;
    let trouble = order(ctx, FaultOrder::next(FaultKind::GuestOom).on(vm.id()))?;
    let status = ctx.within(SOON, "the kill", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Signaled(Signal::KILL), "status");
    trouble.must_have_fired(ctx)?;
    let got = vm.run("true", []).await?;
    ensure!(got.status.success(), "the next program: {got:?}");
    Ok(())
}

async fn output_cut(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let size = length(ctx, 1, 300_000);
    let bytes = ctx.bytes(size);
    let trouble = order(ctx, FaultOrder::next(FaultKind::OutputCut).on(vm.id()))?;
    let running = vm.exec(ExecRequest::new("cat").stdin(bytes.clone()));
    let got = ctx.within(SOON, "a program whose outputs break", running).await??;
    ensure!(got.stdout.len() <= size, "{} of {size} bytes", got.stdout.len());
    same_bytes(&got.stdout, &bytes[..got.stdout.len()], "a beginning of the output")?;
    // What a pipe holds may have been written before the outputs broke.
    ensure!(
        got.stdout.len() == size || !got.status.success() || size <= 64 << 10,
        "{} of {size} bytes came and the program claims success",
        got.stdout.len()
    );
    trouble.must_have_fired(ctx)?;
    let again = vm.exec(ExecRequest::new("cat").stdin(bytes.clone())).await?;
    same_bytes(&again.stdout, &bytes, "the next program's output")
}
