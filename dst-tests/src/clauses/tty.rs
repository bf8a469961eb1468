//! Programs on a terminal.

use super::streams::{SOON, millis, read_to_end, read_until_text, sh, until};
use crate::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use vm_trait::{ExecRequest, ExecStatus, OutputChannel, Signal, TtySize, VmErrorKind};

/// What is promised of terminals.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(is_a_terminal, "tty.is_a_terminal",
        "a program has a terminal on all three streams when it asks for one, and on none otherwise",
        [Exec, Tty], faults: []),
    clause!(size_as_asked, "tty.size_as_asked", "the terminal has the size that was asked for", [Exec, Tty], faults: []),
    clause!(resize_is_seen, "tty.resize_is_seen", "a program sees the terminal's new size", [Exec, Tty], faults: []),
    clause!(resize_signals, "tty.resize_signals", "a program is told by a signal when its terminal is resized",
        [Exec, Tty], faults: []),
    clause!(resize_without_terminal, "tty.resize_without_terminal",
        "resizing where there is no terminal is refused", [Exec, Tty], faults: []),
    clause!(errors_come_as_output, "tty.errors_come_as_output",
        "on a terminal stderr comes as stdout, in the order in which it was written", [Exec, Tty], faults: []),
    clause!(echoes_and_edits, "tty.echoes_and_edits",
        "a terminal echoes what is typed, hands it over by the line, and its end of input is read as end-of-file",
        [Exec, Tty], faults: []),
    clause!(interrupt_character, "tty.interrupt_character", "Ctrl-C typed on a terminal interrupts the program",
        [Exec, Tty], faults: []),
    clause!(drop_ends_program, "tty.drop_ends_program", "dropping the handle ends a program on a terminal too",
        [Exec, Tty], faults: []),
];

fn size(ctx: &Context) -> TtySize {
    // `stty` of BusyBox takes 1 for a size that nobody set, and says 24 or 80.
    let draw = |most| u16::try_from(ctx.draw(2, most)).unwrap_or(2);
    TtySize { rows: draw(500), cols: draw(1000) }
}

fn as_stty_tells(size: TtySize) -> String {
    format!("{} {}", size.rows, size.cols)
}

async fn is_a_terminal(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let script = "for n in 0 1 2; do if test -t $n; then echo yes; else echo no; fi; done";
    let without = vm.exec(sh(script, [""; 0])).await?;
    ensure_eq!(without.stdout_text(), "no\nno\nno\n", "without a terminal");
    let with = vm.exec(sh(script, [""; 0]).tty(size(ctx))).await?;
    ensure_eq!(with.stdout_text().replace('\r', ""), "yes\nyes\nyes\n", "with a terminal");
    ensure_eq!(with.status, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn size_as_asked(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let size = size(ctx);
    let got = vm.exec(ExecRequest::new("stty").arg("size").tty(size)).await?;
    ensure_eq!(got.stdout_text().trim_end().to_owned(), as_stty_tells(size), "size");
    Ok(())
}

async fn resize_is_seen(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let script = "echo ready; while read line; do stty size; done";
    let process = vm.spawn(sh(script, [""; 0]).tty(size(ctx)).open_stdin()).await?;
    read_until_text(ctx, &process, "ready").await?;
    for _ in 0..ctx.draw(1, 4) {
        let size = size(ctx);
        process.resize(size).await?;
        process.write_stdin("\n").await?;
        read_until_text(ctx, &process, &format!("\n{}\r\n", as_stty_tells(size))).await?;
    }
    Ok(())
}

async fn resize_signals(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let script = "trap 'stty size; exit 0' WINCH; echo ready; while true; do sleep 0.05; done";
    let process = vm.spawn(sh(script, [""; 0]).tty(TtySize { rows: 1, cols: 1 })).await?;
    read_until_text(ctx, &process, "ready").await?;
    let mut size = size(ctx);
    // A terminal that keeps its size signals nothing.
    size.rows += 1;
    process.resize(size).await?;
    read_until_text(ctx, &process, &format!("{}\r\n", as_stty_tells(size))).await?;
    let status = ctx.within(SOON, "the end", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Exited(0), "status");
    Ok(())
}

async fn resize_without_terminal(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let process = vm.spawn(ExecRequest::new("cat").open_stdin()).await?;
    ensure_err!(
        process.resize(size(ctx)).await,
        VmErrorKind::InvalidConfig { .. },
        "resizing pipes"
    );
    process.close_stdin().await?;
    ensure_eq!(process.wait().await?, ExecStatus::Exited(0), "status afterwards");
    Ok(())
}

async fn errors_come_as_output(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let to_stderr: Vec<bool> = (0..ctx.draw(2, 10)).map(|_| ctx.one_in(2)).collect();
    let args: Vec<&str> = to_stderr.iter().map(|err| if *err { "err" } else { "out" }).collect();
    let script = "for w in \"$@\"; do case $w in err) echo $w >&2;; *) echo $w;; esac; done";
    let request = sh(script, args.clone()).tty(size(ctx));
    let wanted: String = args.iter().flat_map(|word| [*word, "\r\n"]).collect();
    if ctx.one_in(2) {
        let got = vm.exec(request).await?;
        ensure_eq!(got.stdout_text(), wanted, "stdout");
        ensure!(got.stderr.is_empty(), "stderr holds {:?}", got.stderr);
    } else {
        let process = vm.spawn(request).await?;
        let out = read_to_end(&process, OutputChannel::Stdout).await?;
        ensure_eq!(String::from_utf8_lossy(&out), wanted, "stdout");
        ensure_eq!(process.read_stderr().await?, None, "stderr");
    }
    Ok(())
}

async fn echoes_and_edits(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let request = sh("while read line; do echo \"<$line>\"; done; echo over; exit 4", [""; 0]);
    let process = vm.spawn(request.tty(size(ctx)).open_stdin()).await?;
    let word = format!("word{}", ctx.draw(0, 999_999));
    process.write_stdin(word.clone()).await?;
    let echoed = read_until_text(ctx, &process, &word).await?;
    ensure_eq!(echoed, word, "the echo, before the line is over");
    process.write_stdin("\n").await?;
    read_until_text(ctx, &process, &format!("<{word}>")).await?;
    process.close_stdin().await?;
    read_until_text(ctx, &process, "over").await?;
    let status = ctx.within(SOON, "the end", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Exited(4), "status");
    Ok(())
}

async fn interrupt_character(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let request = sh("echo ready; exec sleep 600", [""; 0]).tty(size(ctx)).open_stdin();
    let process = vm.spawn(request).await?;
    read_until_text(ctx, &process, "ready").await?;
    ctx.sleep(millis(ctx, 0, 50)).await;
    process.write_stdin("\x03").await?;
    let status = ctx.within(SOON, "the end", process.wait()).await??;
    ensure_eq!(status, ExecStatus::Signaled(Signal::INT), "status");
    Ok(())
}

async fn drop_ends_program(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let script = "trap '' HUP; echo ready; while true; do sleep 1; done";
    let process = vm.spawn(sh(script, [""; 0]).tty(size(ctx))).await?;
    read_until_text(ctx, &process, "ready").await?;
    drop(process);
    until(ctx, "no process is left", || async { Ok(vm.processes().await?.is_empty()) }).await
}
