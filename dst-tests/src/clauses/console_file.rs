//! The host file that a console is appended to.

use super::probe::{Vm, sh, started, until, works};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure,
};
use bytes::Bytes;
use std::path::Path;
use vm_trait::VmInstanceExt;

/// The clauses on console files.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(holds_the_console, "console_file.holds_the_console",
        "the console file holds all that the console does, from the start of the machine on",
        [Exec, GuestKernel, Console, ConsoleFile], faults: []),
    clause!(is_appended, "console_file.is_appended",
        "the console file is appended to: what it held stays, over every life of the machine",
        [Exec, GuestKernel, Console, ConsoleFile], faults: []),
    clause!(full_host, "console_file.full_host",
        "a host that takes nothing of the console does not stop the guest",
        [Exec, GuestKernel, Console, ConsoleFile], faults: []),
];

/// Writes a drawn line on the guest's console, and waits until the console has it.
async fn say(ctx: &Context, vm: &Vm) -> Result<String, Broken> {
    let word = format!("said-{:016x}", ctx.draw(0, u64::MAX));
    sh(vm, &format!("echo {word} > /dev/console")).await?;
    let has = || String::from_utf8_lossy(&vm.console()).contains(&word);
    until(ctx, "a line on the console", has).await?;
    Ok(word)
}

async fn content(ctx: &Context, path: &Path) -> Result<Bytes, Broken> {
    let read = ctx.read_host_file(path).await;
    read.map_err(|error| Broken::new(format!("{}: {error}", path.display())))
}

/// Waits until the file ends with what the console shows, and gives its content.
async fn until_filed(ctx: &Context, vm: &Vm, path: &Path) -> Result<Bytes, Broken> {
    let begun = ctx.now();
    loop {
        let console = vm.console();
        let filed = content(ctx, path).await?;
        // The guest may have gone on writing in between.
        if filed.ends_with(&console) || contains(&filed, &console) {
            return Ok(filed);
        }
        ensure!(ctx.now() - begun < super::probe::SOON, "the file lacks what the console shows");
        ctx.sleep(std::time::Duration::from_millis(10)).await;
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    part.is_empty() || text.windows(part.len()).any(|window| window == part)
}

async fn holds_the_console(ctx: &Context) -> Verdict {
    let path = ctx.host_path("console.log");
    let vm = started(ctx, |config| config.console_file = Some(path.clone())).await?;
    for _ in 0..ctx.draw(1, 4) {
        let word = say(ctx, &vm).await?;
        let filed = until_filed(ctx, &vm, &path).await?;
        ensure!(contains(&filed, word.as_bytes()), "the file lacks a line of the console");
    }
    vm.kill().await?;
    until_filed(ctx, &vm, &path).await.map(drop)
}

async fn is_appended(ctx: &Context) -> Verdict {
    let path = ctx.host_path("console.log");
    let old = Bytes::from(format!("kept {:016x}\n", ctx.draw(0, u64::MAX)));
    let written = ctx.write_host_file(&path, old.clone()).await;
    written.map_err(|error| Broken::new(format!("{}: {error}", path.display())))?;
    let vm = started(ctx, |config| config.console_file = Some(path.clone())).await?;
    let mut before = old;
    for life in 1..=ctx.draw(2, 3) {
        let word = say(ctx, &vm).await?;
        let filed = until_filed(ctx, &vm, &path).await?;
        ensure!(filed.starts_with(&before), "life {life}: what the file held is gone");
        ensure!(
            contains(&filed[before.len()..], word.as_bytes()),
            "life {life}: a line is missing"
        );
        before = filed;
        vm.kill().await?;
        vm.start().await?;
    }
    Ok(())
}

async fn full_host(ctx: &Context) -> Verdict {
    let vm = started(ctx, |config| config.console_file = Some("/dev/full".into())).await?;
    for _ in 0..ctx.draw(1, 3) {
        say(ctx, &vm).await?;
    }
    works(ctx, &vm, "with a console file that takes nothing").await?;
    vm.restart().await?;
    say(ctx, &vm).await.map(drop)
}
