//! `spawn`: streams, signals and ends of processes that run beside the caller.

use super::streams::{
    SOON, TICKING_CHILD, disturb_link, fresh_dir, length, millis, no_more_ticks, read_at_least,
    read_to_end, read_until_text, same_bytes, sh, until,
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::{join, join_all};
use std::{sync::Arc, time::Duration};
use vm_core::env::timeout;
use vm_trait::{
    ExecFailure, ExecRequest, ExecStatus, OutputChannel, OutputOffsets, Signal, StopOptions,
    VmErrorKind, VmInstanceExt,
};

/// What `spawn` promises of streams and ends.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(streams_as_it_comes, "process.streams_as_it_comes",
        "output can be read as soon as it is written, while input is still open, also when the link falters",
        [Exec], faults: []),
    clause!(offsets_count, "process.offsets_count", "the offsets of a handle count the bytes that it gave",
        [Exec], faults: []),
    clause!(closed_stdin_ends, "process.closed_stdin_ends", "closing standard input is read as end-of-file",
        [Exec], faults: []),
    clause!(write_to_closed_input, "process.write_to_closed_input",
        "bytes for a program that closed its input or has ended are dropped without error", [Exec], faults: []),
    clause!(slow_reader, "process.slow_reader",
        "output that nobody reads stalls its own program only, and waits to be read", [Exec], faults: []),
    clause!(outputs_independent, "process.outputs_independent",
        "reading one output never waits for the other", [Exec], faults: []),
    clause!(read_after_end, "process.read_after_end",
        "output that was not read when the program ended can be read after it, and then ends for good",
        [Exec], faults: []),
    clause!(cancelled_read, "process.cancelled_read", "giving up a read loses no byte", [Exec], faults: []),
    clause!(cancelled_write, "process.cancelled_write",
        "giving up a write leaves a beginning of its bytes or all of them, in order with those of other writes",
        [Exec], faults: []),
    clause!(signal_is_caught, "process.signal_is_caught", "a program that catches a signal goes on as it likes",
        [Exec], faults: []),
    clause!(signal_ends, "process.signal_ends", "a signal that is not caught ends the program and its children",
        [Exec, Files], faults: []),
    clause!(signal_to_ended, "process.signal_to_ended", "a signal to a program that has ended is no error",
        [Exec], faults: []),
    clause!(stopped_and_continued, "process.stopped_and_continued",
        "a program that is stopped by a signal goes on when it is continued", [Exec], faults: []),
    clause!(many_wait, "process.many_wait", "any number of tasks can wait for a program, and all hear the same",
        [Exec], faults: []),
    clause!(wait_with_timeout, "process.wait_with_timeout", "a spawned program's time limit ends it too",
        [Exec], faults: []),
    clause!(dropped_kills_group, "process.dropped_kills_group",
        "dropping the handle kills the program with its children", [Exec, Files], faults: []),
    clause!(cycles_leave_nothing, "process.cycles_leave_nothing",
        "many programs started and dropped leave no process behind", [Exec], faults: []),
    clause!(known_by_pid, "process.known_by_pid", "a handle's pid is the program's own, and its id is never used again",
        [Exec], faults: []),
    clause!(spawn_failures, "process.spawn_failures", "a program that cannot be started is told by spawn itself",
        [Exec], faults: []),
    clause!(kill_interrupts, "process.kill_interrupts",
        "stopping or killing the machine ends whatever waits for a program as Interrupted", [Exec], faults: [])
        .fresh(),
];

async fn streams_as_it_comes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let trouble = disturb_link(ctx, &*vm, 0)?;
    let process = vm.spawn(ExecRequest::new("cat").open_stdin()).await?;
    for _ in 0..ctx.draw(1, 6) {
        let bytes = ctx.bytes(length(ctx, 1, 5000));
        process.write_stdin(bytes.clone()).await?;
        let reading = read_at_least(&process, OutputChannel::Stdout, bytes.len());
        let got = ctx.within(SOON, "the echo while input is open", reading).await??;
        same_bytes(&got, &bytes, "the echo")?;
    }
    process.close_stdin().await?;
    ensure_eq!(process.read_stdout().await?, None, "after the last byte");
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    trouble.took_place(ctx)
}

async fn offsets_count(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(sh("cat; yes e | head -c 1234 >&2", [""; 0]).open_stdin()).await?;
    ensure_eq!(process.offsets(), OutputOffsets::default(), "offsets at the start");
    let bytes = ctx.bytes(length(ctx, 1, 200_000));
    let feeding = async {
        process.write_stdin(bytes.clone()).await?;
        process.close_stdin().await
    };
    let reading = async {
        let mut count = 0;
        while let Some(bytes) = process.read_stdout().await? {
            ensure!(!bytes.is_empty(), "a read gave no bytes and no end");
            count += u64::try_from(bytes.len()).unwrap_or(0);
            ensure_eq!(process.offsets().stdout, count, "offset of stdout");
        }
        Ok(count)
    };
    let (fed, count) = join(feeding, reading).await;
    fed?;
    ensure_eq!(count?, u64::try_from(bytes.len()).unwrap_or(0), "bytes in all");
    ensure_eq!(process.offsets().stderr, 0, "offset of stderr before it is read");
    let err = read_to_end(&process, OutputChannel::Stderr).await?;
    ensure_eq!(err.len(), 1234, "bytes of stderr");
    ensure_eq!(process.offsets().stderr, 1234, "offset of stderr");
    Ok(())
}

async fn closed_stdin_ends(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(ExecRequest::new("wc").arg("-c").open_stdin()).await?;
    let mut size = 0;
    for _ in 0..ctx.draw(0, 4) {
        let bytes = ctx.bytes(length(ctx, 0, 100_000));
        size += bytes.len();
        process.write_stdin(bytes).await?;
    }
    process.close_stdin().await?;
    let out =
        ctx.within(SOON, "wc after end-of-file", read_to_end(&process, OutputChannel::Stdout));
    let out = String::from_utf8_lossy(&out.await??).trim().to_owned();
    ensure_eq!(out, size.to_string(), "bytes read by the program");
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn write_to_closed_input(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let request = sh("exec <&-; echo closed; sleep 0.2; exit \"$1\"", [code.to_string()]);
    let process = vm.spawn(request.open_stdin()).await?;
    read_until_text(ctx, &process, "closed\n").await?;
    let writing = process.write_stdin(ctx.bytes(length(ctx, 1, 900_000)));
    ctx.within(SOON, "writing to a closed input", writing).await??;
    ensure_eq!(process.wait().await?, ExecStatus::Exited(code), "status");
    let writing = process.write_stdin(ctx.bytes(length(ctx, 1, 900_000)));
    ctx.within(SOON, "writing to a program that has ended", writing).await??;
    process.close_stdin().await?;
    Ok(())
}

async fn slow_reader(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let size = 4 << 20;
    let slow = vm.spawn(sh("yes | head -c \"$1\"", [size.to_string()])).await?;
    let mut more = Vec::new();
    for _ in 0..ctx.draw(0, 4) {
        let script = "yes | head -c \"$1\" & yes | head -c \"$1\" >&2; wait";
        more.push(vm.spawn(sh(script, [size.to_string()])).await?);
    }
    let others = async {
        for _ in 0..10 {
            vm.ping().await?;
            let bytes = ctx.bytes(length(ctx, 0, 20_000));
            let got = vm.exec(ExecRequest::new("cat").stdin(bytes.clone())).await?;
            same_bytes(&got.stdout, &bytes, "output of a program beside the unread one")?;
        }
        Ok::<_, Broken>(())
    };
    ctx.within(SOON, "ten programs beside some with unread output", others).await??;
    // Whoever drops them has had enough.
    drop(more);
    let reading = read_to_end(&slow, OutputChannel::Stdout);
    let all = ctx.within(SOON * 3, "the unread output", reading).await??;
    ensure_eq!(all.len(), size, "bytes of the unread output");
    ensure!(all.chunks(2).all(|line| line == b"y\n"), "the unread output is not what was written");
    ensure_eq!(slow.wait().await?, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn outputs_independent(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let size = length(ctx, 1 << 20, (3 << 20) / 2);
    let script = "yes o | head -c \"$1\" & yes e | head -c \"$1\" >&2; wait";
    let process = vm.spawn(sh(script, [size.to_string()])).await?;
    let (first, second) = if ctx.one_in(2) {
        (OutputChannel::Stdout, OutputChannel::Stderr)
    } else {
        (OutputChannel::Stderr, OutputChannel::Stdout)
    };
    let reading = read_at_least(&process, first, size);
    let got = ctx.within(SOON, "one output while the other is not read", reading).await??;
    ensure_eq!(got.len(), size, "bytes of {first:?}");
    let got = ctx.within(SOON, "the other output", read_to_end(&process, second)).await??;
    ensure_eq!(got.len(), size, "bytes of {second:?}");
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn read_after_end(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (out, err) = (ctx.text(400), ctx.text(400));
    let script = "printf %s \"$1\"; printf %s \"$2\" >&2; exit 3";
    let process = vm.spawn(sh(script, [out.clone(), err.clone()])).await?;
    let status = ctx.within(SOON, "the end", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Exited(3), "status");
    same_bytes(&read_to_end(&process, OutputChannel::Stdout).await?, out.as_bytes(), "stdout")?;
    same_bytes(&read_to_end(&process, OutputChannel::Stderr).await?, err.as_bytes(), "stderr")?;
    for _ in 0..2 {
        ensure_eq!(process.read_stdout().await?, None, "stdout past its end");
        ensure_eq!(process.read_stderr().await?, None, "stderr past its end");
    }
    ensure_eq!(process.wait().await?, status, "status when asked again");
    Ok(())
}

async fn cancelled_read(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let words: Vec<String> = (0..ctx.draw(5, 20)).map(|word| format!("word {word}")).collect();
    let script = "for w in \"$@\"; do echo \"$w\"; sleep 0.01; done";
    let process = vm.spawn(sh(script, words.clone())).await?;
    let mut all = Vec::new();
    let end = ctx.now() + SOON;
    loop {
        ensure!(ctx.now() < end, "the output has no end: {:?}", String::from_utf8_lossy(&all));
        match timeout(&**ctx.env(), millis(ctx, 0, 12), process.read_stdout()).await {
            Ok(Ok(Some(bytes))) => all.extend_from_slice(&bytes),
            Ok(Ok(None)) => break,
            Ok(Err(error)) => return Err(error.into()),
            Err(_given_up) => {}
        }
    }
    let wanted: String = words.iter().flat_map(|word| [word.as_str(), "\n"]).collect();
    same_bytes(&all, wanted.as_bytes(), "the output")
}

async fn cancelled_write(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(sh("sleep 0.1; cat", [""; 0]).open_stdin()).await?;
    let mut written = Vec::new();
    for byte in b'a'..=b'a' + u8::try_from(ctx.draw(1, 9)).unwrap_or(1) {
        let size = length(ctx, 1, 400_000);
        let write = process.write_stdin(vec![byte; size]);
        let done = match timeout(&**ctx.env(), millis(ctx, 0, 20), write).await {
            Ok(result) => result.map(|()| true)?,
            Err(_given_up) => false,
        };
        written.push((byte, size, done));
    }
    process.close_stdin().await?;
    let reading = read_to_end(&process, OutputChannel::Stdout);
    let out = ctx.within(SOON, "what the program read", reading).await??;
    let mut rest = &out[..];
    for (byte, size, done) in written {
        let count = rest.iter().take_while(|found| **found == byte).count();
        ensure!(count <= size && (count == size || !done), "{count} of {size} bytes, done: {done}");
        rest = &rest[count..];
    }
    ensure!(rest.is_empty(), "{} bytes out of order", rest.len());
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn signal_is_caught(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let signal = ctx.pick(&[Signal::HUP, Signal::INT, Signal::TERM, Signal::USR1, Signal::USR2]);
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let script =
        "trap 'echo caught; exit \"$2\"' \"$1\"; echo ready; while true; do sleep 0.05; done";
    let process = vm.spawn(sh(script, [signal.0.to_string(), code.to_string()])).await?;
    read_until_text(ctx, &process, "ready\n").await?;
    process.signal(signal).await?;
    read_until_text(ctx, &process, "caught\n").await?;
    let status = ctx.within(SOON, "the end", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Exited(code), "status after {signal}");
    Ok(())
}

async fn signal_ends(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let ticks = format!("{}/ticks", fresh_dir(ctx, &*vm).await?);
    let signal = ctx.pick(&[Signal::HUP, Signal::TERM, Signal::KILL, Signal::USR1, Signal::USR2]);
    let process = vm.spawn(sh(&format!("{TICKING_CHILD}sleep 600"), [ticks.clone()])).await?;
    until(ctx, "the child runs", || vm.exists(&ticks)).await?;
    process.signal(signal).await?;
    let status = ctx.within(SOON, "the end", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Signaled(signal), "status");
    no_more_ticks(ctx, &*vm, &ticks).await
}

async fn signal_to_ended(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(ExecRequest::new("true")).await?;
    if ctx.one_in(2) {
        ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status");
    } else {
        ctx.sleep(millis(ctx, 20, 100)).await;
    }
    let signal = ctx.pick(&[Signal::HUP, Signal::KILL, Signal::TERM, Signal::USR1]);
    process.signal(signal).await?;
    process.wait().await?;
    process.signal(signal).await?;
    Ok(())
}

async fn stopped_and_continued(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let script = "echo ready; while read line; do echo \"got $line\"; done";
    let process = vm.spawn(sh(script, [""; 0]).open_stdin()).await?;
    read_until_text(ctx, &process, "ready\n").await?;
    process.signal(Signal::STOP).await?;
    // A signal is sent when this returns, and carried out soon after.
    ctx.sleep(Duration::from_millis(50)).await;
    process.write_stdin("hello\n").await?;
    let early = timeout(&**ctx.env(), millis(ctx, 50, 150), process.read_stdout()).await;
    ensure!(early.is_err(), "a stopped program answered: {early:?}");
    process.signal(Signal::CONT).await?;
    read_until_text(ctx, &process, "got hello\n").await?;
    process.close_stdin().await?;
    let status = ctx.within(SOON, "the end", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn many_wait(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let code = u8::try_from(ctx.draw(0, 255)).unwrap_or(0);
    let request = sh("sleep 0.05; exit \"$1\"", [code.to_string()]);
    let process = Arc::new(vm.spawn(request).await?);
    let tasks: Vec<_> = (0..ctx.draw(2, 8))
        .map(|_| {
            let (process, env) = (process.clone(), ctx.env().clone());
            let begin = millis(ctx, 0, 150);
            ctx.spawn(async move {
                env.sleep(begin).await;
                process.wait().await
            })
        })
        .collect();
    let all = join_all(tasks.into_iter().map(crate::context::Task::join));
    for status in ctx.within(SOON, "all who wait", all).await? {
        ensure_eq!(status??, ExecStatus::Exited(code), "status");
    }
    Ok(())
}

async fn wait_with_timeout(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let limit = millis(ctx, 50, 300);
    let before = ctx.now();
    let request = sh("echo begun; sleep 600", [""; 0]).open_stdin();
    let process = vm.spawn(request.timeout(limit)).await?;
    let status = ctx.within(SOON, "the time limit", process.wait()).await??;
    ensure_eq!(status, ExecStatus::TimedOut, "status");
    let took = ctx.now().saturating_sub(before) + Duration::from_millis(20);
    ensure!(took >= limit, "ended after {took:?} of {limit:?}");
    Ok(())
}

async fn dropped_kills_group(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let ticks = format!("{}/ticks", fresh_dir(ctx, &*vm).await?);
    let process = vm.spawn(sh(&format!("{TICKING_CHILD}sleep 600"), [ticks.clone()])).await?;
    until(ctx, "the child runs", || vm.exists(&ticks)).await?;
    drop(process);
    until(ctx, "no process is left", || async { Ok(vm.processes().await?.is_empty()) }).await?;
    no_more_ticks(ctx, &*vm, &ticks).await
}

async fn cycles_leave_nothing(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    for _ in 0..ctx.draw(10, 40) {
        let request = match ctx.draw(0, 3) {
            0 => ExecRequest::new("true"),
            1 => ExecRequest::new("sleep").arg("600"),
            2 => ExecRequest::new("cat").open_stdin(),
            _ => ExecRequest::new("yes"),
        };
        let process = vm.spawn(request).await?;
        if ctx.one_in(3) {
            ctx.sleep(millis(ctx, 0, 5)).await;
        }
        drop(process);
    }
    until(ctx, "no process is left", || async { Ok(vm.processes().await?.is_empty()) }).await
}

async fn known_by_pid(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut ids = Vec::new();
    for _ in 0..ctx.draw(2, 8) {
        let process = vm.spawn(sh("echo $$", [""; 0])).await?;
        let told = read_to_end(&process, OutputChannel::Stdout).await?;
        let told = String::from_utf8_lossy(&told).trim().to_owned();
        ensure_eq!(process.pid().to_string(), told, "pid");
        ensure!(!ids.contains(&process.id()), "the id {:?} came twice", process.id());
        ids.push(process.id());
    }
    Ok(())
}

async fn spawn_failures(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let name = format!("missing-{:x}", ctx.draw(0, u64::MAX));
    let program = if ctx.one_in(2) { name } else { format!("/{name}") };
    let result = vm.spawn(ExecRequest::new(program).open_stdin()).await;
    ensure_err!(
        result,
        VmErrorKind::ExecFailed { failure: ExecFailure::NotFound },
        "a missing program"
    );
    ensure!(vm.processes().await?.is_empty(), "a process is left of a failed start");
    Ok(())
}

async fn kill_interrupts(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = Arc::new(vm.spawn(ExecRequest::new("sleep").arg("600").open_stdin()).await?);
    let others = [process.clone(), process.clone(), process.clone(), process.clone()];
    let [reads, reads_errors, waits, writes] = others;
    let filler = ctx.bytes(1 << 20);
    let runs = vm.clone();
    let tasks = vec![
        (
            "exec",
            ctx.spawn(
                async move { runs.exec(ExecRequest::new("sleep").arg("600")).await.map(drop) },
            ),
        ),
        ("read_stdout", ctx.spawn(async move { reads.read_stdout().await.map(drop) })),
        ("read_stderr", ctx.spawn(async move { reads_errors.read_stderr().await.map(drop) })),
        ("wait", ctx.spawn(async move { waits.wait().await.map(drop) })),
        (
            "write_stdin",
            ctx.spawn(async move {
                // What is written may be held on its way, but not without bound.
                for _ in 0..32 {
                    writes.write_stdin(filler.clone()).await?;
                }
                Ok(())
            }),
        ),
    ];
    ctx.sleep(millis(ctx, 20, 200)).await;
    let what = if ctx.one_in(2) {
        vm.kill().await?;
        "a kill"
    } else {
        vm.stop(StopOptions::default().with_grace(millis(ctx, 0, 500))).await?;
        "a stop"
    };
    for (waiting, task) in tasks {
        let result = ctx.within(SOON, waiting, task.join()).await??;
        ensure_err!(result, VmErrorKind::Interrupted, "{waiting} under {what}");
    }
    let late = vm.spawn(ExecRequest::new("true")).await;
    ensure_err!(late, VmErrorKind::InvalidState { .. }, "spawn after {what}");
    Ok(())
}
