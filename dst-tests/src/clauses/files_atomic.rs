//! Files: replaced at once or not at all, whatever happens.

use super::{
    probe::order,
    streams::{SOON, file_error, fresh_dir, length, millis, running_with, same_bytes},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use bytes::Bytes;
use futures_util::future::join_all;
use std::time::Duration;
use vm_core::{
    env::timeout,
    fault::{FaultKind, FaultOrder},
};
use vm_trait::{
    Capability, DiskConfig, ExecRequest, GuestFileError, VmConfig, VmErrorKind, VmInstance,
    VmInstanceExt, VmResult, WriteOptions,
};

/// What is promised of replacing files.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(whole_for_readers, "files.whole_for_readers",
        "who reads a file while it is replaced sees the old content or the new one, never half", [Files], faults: []),
    clause!(whole_for_programs, "files.whole_for_programs",
        "a program that reads a file while it is replaced sees the old content or the new one", [Exec, Files],
        faults: []),
    clause!(concurrent_writers, "files.concurrent_writers",
        "of several writers of one file one wins, and its content is whole", [Files], faults: []),
    clause!(cancelled_write, "files.cancelled_write",
        "a write that is given up leaves the old content or the new one, and nothing beside it", [Files], faults: []),
    clause!(full_disk, "files.full_disk",
        "a full disk is told as such, the old content stays, and nothing is left beside it", [Files],
        faults: [GuestDiskFull]),
    clause!(failing_disk, "files.failing_disk",
        "a disk that fails is told as such, the content is the old or the new one, and nothing is left beside it",
        [Files], faults: [GuestIo]),
    clause!(failing_read, "files.failing_read", "a disk that fails while a file is read is told as such", [Files],
        faults: [GuestIo]),
    clause!(whole_after_vmm_death, "files.whole_after_vmm_death",
        "a file on a disk holds the old content or the new one after the machine's process died during a write, \
         and the new one where the write had succeeded", [Files, Disks], faults: [VmmKilled]),
    clause!(whole_after_panic, "files.whole_after_panic",
        "a file on a disk holds the old content or the new one after the guest crashed during a write, \
         and the new one where the write had succeeded", [Files, Disks], faults: [GuestPanic]),
];

/// Makes contents of different lengths, each of one byte only, so that a mixture is seen.
fn contents(ctx: &Context, count: u64, most: u64) -> Vec<Bytes> {
    (0..count)
        .map(|index| {
            let byte = b'a' + u8::try_from(index % 26).unwrap_or(0);
            Bytes::from(vec![byte; length(ctx, 1, most)])
        })
        .collect()
}

/// Asks that a file's content is whole: one of these.
fn one_of(found: &[u8], contents: &[Bytes], what: &str) -> Verdict {
    ensure!(
        contents.iter().any(|whole| whole == found),
        "{what}: {} bytes that nobody wrote, from {:?} to {:?}",
        found.len(),
        found.first(),
        found.last()
    );
    Ok(())
}

async fn names(vm: &dyn VmInstance, dir: &str) -> VmResult<Vec<String>> {
    Ok(vm.list_dir(dir).await?.into_iter().map(|entry| entry.name).collect())
}

/// Reads with `read` while a task replaces the file again and again.
async fn read_while_written(ctx: &Context, by_program: bool) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/file");
    let all = contents(ctx, ctx.draw(3, 12), 200_000);
    vm.write(&path, all[0].clone()).await?;
    let (writer_vm, writer_path, to_write) = (vm.clone(), path.clone(), all.clone());
    let writer = ctx.spawn(async move {
        for bytes in to_write {
            writer_vm.write(&writer_path, bytes).await?;
        }
        Ok::<_, Broken>(())
    });
    for _ in 0..ctx.draw(3, 12) {
        let found = if by_program {
            vm.exec(ExecRequest::new("cat").arg(path.clone())).await?.stdout
        } else {
            vm.read_file(&path).await?
        };
        one_of(&found, &all, "read while it is replaced")?;
        ctx.sleep(millis(ctx, 0, 3)).await;
    }
    ctx.within(SOON, "the writer", writer.join()).await???;
    same_bytes(&vm.read_file(&path).await?, &all[all.len() - 1], "the last content")?;
    ensure_eq!(names(&*vm, &dir).await?, ["file"], "names in the end");
    Ok(())
}

async fn whole_for_readers(ctx: &Context) -> Verdict {
    read_while_written(ctx, false).await
}

async fn whole_for_programs(ctx: &Context) -> Verdict {
    read_while_written(ctx, true).await
}

async fn concurrent_writers(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/file");
    let all = contents(ctx, ctx.draw(2, 8), 200_000);
    let tasks: Vec<_> = all
        .iter()
        .cloned()
        .map(|bytes| {
            let (vm, path) = (vm.clone(), path.clone());
            ctx.spawn(async move { vm.write(&path, bytes).await })
        })
        .collect();
    let writers = join_all(tasks.into_iter().map(crate::context::Task::join));
    for result in ctx.within(SOON, "all writers", writers).await? {
        result??;
    }
    one_of(&vm.read_file(&path).await?, &all, "after all writers")?;
    ensure_eq!(names(&*vm, &dir).await?, ["file"], "names in the end");
    Ok(())
}

async fn cancelled_write(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/file");
    let all = contents(ctx, 4, 900_000);
    vm.write(&path, all[0].clone()).await?;
    for bytes in &all[1..] {
        let patience = Duration::from_micros(ctx.draw(0, 5000));
        let write = vm.write_file(&path, bytes.clone(), WriteOptions::default());
        if let Ok(result) = timeout(&**ctx.env(), patience, write).await {
            result?;
        }
        one_of(&vm.read_file(&path).await?, &all, "after a write that was given up")?;
    }
    super::streams::until(ctx, "nothing is left beside the file", || async {
        Ok(names(&*vm, &dir).await? == ["file"])
    })
    .await?;
    one_of(&vm.read_file(&path).await?, &all, "in the end")
}

/// Replaces a file while the disk is in trouble, and asks what is there afterwards.
async fn write_in_trouble(
    ctx: &Context,
    kind: FaultKind,
    told: impl Fn(VmResult<()>) -> Verdict,
) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/file");
    let all = contents(ctx, 3, 300_000);
    let has_old = !ctx.one_in(3);
    if has_old {
        vm.write(&path, all[0].clone()).await?;
    }
    // The trouble may begin at any step: opening, each of the writes, making it durable.
    let steps = if kind == FaultKind::GuestIo { 4 } else { all[1].len().div_ceil(64 << 10) };
    let skip = u32::try_from(ctx.index(steps)).unwrap_or(0);
    let trouble = order(ctx, FaultOrder::next(kind).on(vm.id()).after(skip))?;
    told(vm.write(&path, all[1].clone()).await)?;
    trouble.must_have_fired(ctx)?;
    let left = names(&*vm, &dir).await?;
    if has_old {
        ensure_eq!(left, ["file"], "names after the failure");
        let found = vm.read_file(&path).await?;
        let most = if kind == FaultKind::GuestDiskFull { 1 } else { 2 };
        one_of(&found, &all[..most], "after the failure")?;
    } else {
        let may_be_new = kind != FaultKind::GuestDiskFull && left == ["file"];
        ensure!(left.is_empty() || may_be_new, "a failed write left {left:?}");
    }
    vm.write(&path, all[2].clone()).await?;
    same_bytes(&vm.read_file(&path).await?, &all[2], "once the trouble is over")
}

async fn full_disk(ctx: &Context) -> Verdict {
    write_in_trouble(ctx, FaultKind::GuestDiskFull, |result| {
        file_error(result, &GuestFileError::OutOfSpace, "writing to a full disk")
    })
    .await
}

/// Asks that an operation failed with an errno of the guest.
fn io_error<T>(result: VmResult<T>, what: &str) -> Verdict {
    match result {
        Ok(_) => Err(Broken::new(format!("{what}: got Ok"))),
        Err(error) => match error.kind() {
            VmErrorKind::GuestFile { error: GuestFileError::Io { errno: 5 }, .. } => Ok(()),
            _ => Err(Broken::new(format!("{what}: got `{error}`, wanted an I/O error"))),
        },
    }
}

async fn failing_disk(ctx: &Context) -> Verdict {
    let told = |result| io_error(result, "writing to a failing disk");
    write_in_trouble(ctx, FaultKind::GuestIo, told).await
}

async fn failing_read(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/file", fresh_dir(ctx, &*vm).await?);
    let bytes = ctx.bytes(length(ctx, 1, 300_000));
    vm.write(&path, bytes.clone()).await?;
    let trouble = order(ctx, FaultOrder::next(FaultKind::GuestIo).on(vm.id()))?;
    io_error(vm.read_file(&path).await, "reading from a failing disk")?;
    trouble.must_have_fired(ctx)?;
    same_bytes(&vm.read_file(&path).await?, &bytes, "once the trouble is over")
}

/// Lets the machine die during a write, and asks what is on its disk in the next life.
async fn write_in_death(ctx: &Context, kind: FaultKind) -> Verdict {
    let disk = DiskConfig::new(ctx.host_path("disk.img"), "/data");
    let vm = running_with(ctx, VmConfig::builder().with_disk(disk).build()?).await?;
    let path = "/data/file";
    let all = contents(ctx, 8, 900_000);
    vm.write(path, all[0].clone()).await?;
    if ctx.can_fault(FaultKind::SlowIo) && ctx.one_in(2) {
        // The death is more likely to come half-way.
        let _ = order(
            ctx,
            FaultOrder::next(FaultKind::SlowIo).on(vm.id()).with_amount(millis(ctx, 1, 30)),
        )?;
    }
    let trouble = order(
        ctx,
        FaultOrder::next(kind).on(vm.id()).with_amount(Duration::from_micros(ctx.draw(0, 30_000))),
    )?;
    let (mut last, mut tried) = (0, 0);
    let failed = async {
        loop {
            tried = 1 + tried % 7;
            match vm.write(path, all[tried].clone()).await {
                Ok(()) => last = tried,
                Err(error) => return error,
            }
        }
    };
    let error = ctx.within(SOON, "the machine's death", failed).await?;
    ensure!(
        matches!(
            error.kind(),
            VmErrorKind::GuestCrashed { .. }
                | VmErrorKind::VmmCrashed { .. }
                | VmErrorKind::Disconnected
                | VmErrorKind::InvalidState { .. }
        ),
        "the write under way failed with `{error}`"
    );
    trouble.must_have_fired(ctx)?;
    ctx.within(SOON, "the machine's end", vm.wait()).await?;
    vm.start().await?;
    let whole = [all[last].clone(), all[tried].clone()];
    one_of(&vm.read_file(path).await?, &whole, "in the machine's next life")?;
    if ctx.has(Capability::Exec) {
        // Whatever a write left half-done does not stand in the way of the next one.
        let found = vm.exec(ExecRequest::new("cat").arg(path)).await?.stdout;
        one_of(&found, &whole, "for a program in the machine's next life")?;
    }
    vm.write(path, all[0].clone()).await?;
    same_bytes(&vm.read_file(path).await?, &all[0], "written in the next life")
}

async fn whole_after_vmm_death(ctx: &Context) -> Verdict {
    write_in_death(ctx, FaultKind::VmmKilled).await
}

async fn whole_after_panic(ctx: &Context) -> Verdict {
    write_in_death(ctx, FaultKind::GuestPanic).await
}
