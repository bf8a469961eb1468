//! Limits on what programs use.

use super::probe::{Vm, script, sh, started, works};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use std::collections::BTreeMap;
use vm_trait::{
    Capability, ExecRequest, ExecStatus, ForkOptions, Limit, Operation, Resource, RestoreOptions,
    Signal, SnapshotOptions, TtySize, User, VmConfig, VmErrorKind, VmInstanceExt,
};

/// The clauses on limits.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(bad_ones, "limits.bad_ones_are_refused",
        "a soft limit above the hard one, and an amount that Linux would not take, is refused naming the resource",
        [], faults: []),
    clause!(all_seen, "limits.each_is_seen",
        "each of the 16 limits is that of every program and of what it starts, in every way of starting one",
        [Exec, Limits], faults: []),
    clause!(others_stay, "limits.others_stay",
        "a resource that the configuration does not name is limited as it is without one", [Exec, Limits], faults: []),
    clause!(open_files, "limits.open_files",
        "a program cannot have more open files than its limit", [Exec, Limits], faults: []),
    clause!(file_size, "limits.file_size",
        "a program that writes a file beyond its limit is ended by SIGXFSZ, and the file is as long as the limit",
        [Exec, Files, Limits], faults: []),
    clause!(processes, "limits.processes",
        "a user's programs cannot have more processes than their limit, and root's can",
        [Exec, Users, GuestKernel, Limits], faults: []),
    clause!(raised, "limits.raised_up_to_the_hard_one",
        "a program may raise its soft limit up to the hard one, and without privilege not beyond",
        [Exec, Users, Limits], faults: []),
    clause!(agent_is_free, "limits.not_on_files_of_the_host_s",
        "reading and writing files for the host is not limited", [Exec, Files, Limits], faults: []),
    clause!(kept_by_snapshots, "limits.kept_by_snapshots",
        "a machine from a snapshot limits its programs as the one that was saved", [Exec, Limits, Snapshot], faults: []),
    clause!(kept_by_forks, "limits.kept_by_forks",
        "a child limits its programs as its source does", [Exec, Limits, Fork], faults: []),
];

/// What programs need of each resource to get on, in the order of [`Resource::ALL`].
const LEAST: [u64; 16] = [
    10_000,
    1 << 20,
    256 << 20,
    1 << 20,
    0,
    1 << 20,
    20_000,
    64,
    0,
    1 << 30,
    0,
    0,
    0,
    0,
    0,
    1 << 30,
];

/// Reads the table of limits that a program has written: soft and hard by resource, `None` for no limit.
fn table(text: &str) -> Result<BTreeMap<Resource, Limit>, Broken> {
    const ROWS: [&str; 16] = [
        "Max cpu time",
        "Max file size",
        "Max data size",
        "Max stack size",
        "Max core file size",
        "Max resident set",
        "Max processes",
        "Max open files",
        "Max locked memory",
        "Max address space",
        "Max file locks",
        "Max pending signals",
        "Max msgqueue size",
        "Max nice priority",
        "Max realtime priority",
        "Max realtime timeout",
    ];
    let amount = |word: Option<&str>| match word {
        Some("unlimited") => Some(None),
        word => word?.parse().ok().map(Some),
    };
    let mut limits = BTreeMap::new();
    for (resource, row) in Resource::ALL.iter().zip(ROWS) {
        let line = text.lines().find_map(|line| line.strip_prefix(row));
        let mut words = line.unwrap_or_default().split_whitespace();
        let (Some(soft), Some(hard)) = (amount(words.next()), amount(words.next())) else {
            return Err(Broken::new(format!("no row `{row}` in:\n{text}")));
        };
        limits.insert(*resource, Limit { soft, hard });
    }
    Ok(limits)
}

const SHOW: &str = "cat /proc/self/limits";

/// Gives what programs of a machine without limits of its own have.
async fn plain(ctx: &Context) -> Result<BTreeMap<Resource, Limit>, Broken> {
    table(&sh(&ctx.running().await?, SHOW).await?)
}

/// Draws a limit that does not go beyond another one and that programs get on with.
fn drawn(ctx: &Context, resource: Resource, most: Limit) -> Limit {
    let most = most.hard.unwrap_or(1 << 40).min(1 << 40);
    let most = if resource == Resource::Nofile { most.min(1 << 20) } else { most };
    let least = LEAST[usize::from(resource.number())].min(most);
    let hard = ctx.draw(least, most);
    Limit { soft: Some(ctx.draw(least, hard)), hard: Some(hard) }
}

async fn bad_ones(ctx: &Context) -> Verdict {
    for _ in 0..ctx.draw(3, 6) {
        let resource = ctx.pick(Resource::ALL);
        let low = ctx.draw(0, 1 << 40);
        let bad = match ctx.draw(0, 4) {
            0 => (resource, Limit { soft: Some(low + 1 + ctx.draw(0, 99)), hard: Some(low) }),
            1 => (resource, Limit { soft: None, hard: Some(low) }),
            2 => (resource, Limit { soft: Some(low), hard: Some(u64::MAX) }),
            3 => (resource, Limit { soft: Some(u64::MAX), hard: None }),
            _ => {
                let hard = ctx.pick(&[None, Some((1 << 20) + 1 + low)]);
                (Resource::Nofile, Limit { soft: Some(64), hard })
            }
        };
        let mut config = VmConfig::default();
        config.limits.insert(bad.0, bad.1);
        let outcome = ctx.backend().create(config).await;
        if let Err(error) = &outcome {
            ensure_eq!(error.operation(), Operation::Create, "the operation that refused {bad:?}");
        }
        let named = format!("limits.{}", bad.0);
        ensure_err!(
            outcome,
            VmErrorKind::InvalidConfig { field, reason } if *field == named && !reason.is_empty(),
            "create with {bad:?}"
        );
    }
    Ok(())
}

/// Starts a machine with a drawn limit on each resource.
async fn limited(ctx: &Context) -> Result<(Vm, BTreeMap<Resource, Limit>), Broken> {
    let most = plain(ctx).await?;
    let limits: BTreeMap<_, _> =
        most.iter().map(|(resource, most)| (*resource, drawn(ctx, *resource, *most))).collect();
    let vm = started(ctx, |config| config.limits.clone_from(&limits)).await?;
    Ok((vm, limits))
}

async fn all_seen(ctx: &Context) -> Verdict {
    let (vm, limits) = limited(ctx).await?;
    ensure_eq!(vm.config().limits, limits, "the configuration's limits");
    let direct = vm.exec(ExecRequest::new("cat").args(["/proc/self/limits"])).await?;
    ensure_eq!(table(&direct.stdout_text())?, limits, "the limits of a program");
    let nested = sh(&vm, "sh -c 'sh -c \"cat /proc/self/limits; true\"; true'").await?;
    ensure_eq!(table(&nested)?, limits, "the limits of what a program starts");
    let process = vm.spawn(script(SHOW)).await?;
    let output = super::probe::read_to_end(&process).await?;
    let output = String::from_utf8_lossy(&output).into_owned();
    ensure_eq!(table(&output)?, limits, "the limits of a spawned program");
    process.wait().await?;
    if ctx.has(Capability::Tty) {
        let request = script(SHOW).tty(TtySize { rows: 50, cols: 200 });
        let shown = vm.exec(request).await?.stdout_text();
        ensure_eq!(table(&shown)?, limits, "the limits of a program on a terminal");
    }
    if ctx.has(Capability::Users) {
        let request = script(SHOW).user(User::Ids { uid: 4711, gid: 4711 });
        let shown = vm.exec(request).await?.stdout_text();
        ensure_eq!(table(&shown)?, limits, "the limits of another user's program");
    }
    works(ctx, &vm, "with limits").await
}

async fn others_stay(ctx: &Context) -> Verdict {
    let mut expected = plain(ctx).await?;
    let resource = ctx.pick(Resource::ALL);
    let limit = drawn(ctx, resource, expected[&resource]);
    expected.insert(resource, limit);
    let vm = started(ctx, |config| {
        config.limits.insert(resource, limit);
    })
    .await?;
    ensure_eq!(table(&sh(&vm, SHOW).await?)?, expected, "the limits with one on {resource}");
    Ok(())
}

async fn open_files(ctx: &Context) -> Verdict {
    // A shell's own numbers are single digits.
    let most = ctx.draw(6, 9);
    let vm = started(ctx, |config| {
        config.limits.insert(Resource::Nofile, Limit::of(most));
    })
    .await?;
    ensure_eq!(sh(&vm, "ulimit -n").await?, most.to_string(), "what the shell says of it");
    // The standard ones are 0 to 2.
    let open: Vec<String> = (3..most).map(|n| format!("{n}</dev/null")).collect();
    let open = format!("exec {}", open.join(" "));
    sh(&vm, &format!("{open}; echo opened")).await?;
    let output = vm.sh(&format!("{open}; exec {most}</dev/null; echo opened")).await?;
    ensure!(
        !output.stdout_text().contains("opened"),
        "a program has {} open files with a limit of {most}",
        most + 1
    );
    Ok(())
}

async fn file_size(ctx: &Context) -> Verdict {
    let most = ctx.draw(1, 40) * 1024;
    let vm = started(ctx, |config| {
        config.limits.insert(Resource::Fsize, Limit::of(most));
    })
    .await?;
    let path = format!("{}/grows", ctx.scratch(&*vm));
    let write = |blocks: u64| {
        let (input, output) = ("if=/dev/zero".to_owned(), format!("of={path}"));
        ExecRequest::new("dd").args([
            input,
            output,
            "bs=1024".to_owned(),
            format!("count={blocks}"),
        ])
    };
    let blocks = most / 1024;
    let output = vm.exec(write(blocks)).await?;
    ensure!(output.status.success(), "a file as long as its limit: {:?}", output.status);
    let output = vm.exec(write(blocks + ctx.draw(1, 20))).await?;
    ensure_eq!(output.status, ExecStatus::Signaled(Signal(25)), "a file beyond its limit");
    ensure_eq!(vm.stat(&path).await?.size, most, "the length of a file that was to be longer");
    Ok(())
}

async fn processes(ctx: &Context) -> Verdict {
    let most = ctx.draw(2, 6);
    let vm = started(ctx, |config| {
        config.limits.insert(Resource::Nproc, Limit::of(most));
    })
    .await?;
    let user = User::Ids { uid: 4711, gid: 4711 };
    // The shell itself is one of them.
    let output = vm.exec(start(most - 1).user(user.clone())).await?;
    ensure!(
        output.stdout_text().contains("started"),
        "{most} processes with that limit: {}",
        output.stderr_text()
    );
    let output = vm.exec(start(most + ctx.draw(0, 3)).user(user)).await?;
    ensure!(
        !output.stdout_text().contains("started"),
        "more than {most} processes were started with that limit"
    );
    let output = vm.exec(start(most + 3)).await?;
    ensure!(output.stdout_text().contains("started"), "root's processes were limited");
    works(ctx, &vm, "with a limit on processes").await
}

/// Starts so many programs beside the shell, says so, and waits for their end.
fn start(count: u64) -> ExecRequest {
    let programs = "sleep 1 >/dev/null 2>&1 & ".repeat(usize::try_from(count).unwrap_or(0));
    script(&format!("{programs} echo started; wait"))
}

async fn raised(ctx: &Context) -> Verdict {
    let soft = ctx.draw(64, 200);
    let hard = soft + ctx.draw(1, 100);
    let vm = started(ctx, |config| {
        let limit = Limit { soft: Some(soft), hard: Some(hard) };
        config.limits.insert(Resource::Nofile, limit);
    })
    .await?;
    let user = User::Ids { uid: 4711, gid: 4711 };
    let text = format!("ulimit -n; ulimit -Hn; ulimit -Sn {hard}; ulimit -n");
    let output = vm.exec(script(&text).user(user.clone())).await?;
    let expected = format!("{soft}\n{hard}\n{hard}\n");
    ensure_eq!(output.stdout_text(), expected, "the soft limit before and after it was raised");
    let text = format!("ulimit -n {} 2>/dev/null; ulimit -Hn", hard + 1);
    let output = vm.exec(script(&text).user(user)).await?;
    let shown = output.stdout_text();
    ensure!(
        shown.trim() == hard.to_string() || (shown.is_empty() && !output.status.success()),
        "an unprivileged program raised its hard limit of {hard} to {shown}"
    );
    Ok(())
}

async fn agent_is_free(ctx: &Context) -> Verdict {
    let vm = started(ctx, |config| {
        config.limits.insert(Resource::Fsize, Limit::of(1024));
        config.limits.insert(Resource::Nofile, Limit::of(8));
    })
    .await?;
    let path = format!("{}/large", ctx.scratch(&*vm));
    let bytes = ctx.bytes(usize::try_from(ctx.draw(1025, 100_000)).unwrap_or(1025));
    vm.write(&path, bytes.clone()).await?;
    ensure!(vm.read_file(&path).await? == bytes, "a file larger than programs may write differs");
    Ok(())
}

async fn kept_by_snapshots(ctx: &Context) -> Verdict {
    let (vm, limits) = limited(ctx).await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    ensure_eq!(table(&sh(&restored, SHOW).await?)?, limits, "the limits in a restored machine");
    ensure_eq!(table(&sh(&vm, SHOW).await?)?, limits, "the limits in the source");
    Ok(())
}

async fn kept_by_forks(ctx: &Context) -> Verdict {
    let (vm, limits) = limited(ctx).await?;
    for child in vm.fork(ForkOptions::new(1)).await? {
        ensure_eq!(table(&sh(&child?, SHOW).await?)?, limits, "the limits in a child");
    }
    Ok(())
}
