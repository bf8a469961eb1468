//! Files: contents, sizes, modes, metadata.

use super::{
    probe::order,
    streams::{
        SOON, disturb_link, file_error, fresh_dir, length, millis, odd_name, payload, same_bytes,
        sh, until,
    },
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use futures_util::future::join_all;
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    Capability, ExecRequest, ExecStatus, FileKind, GuestFileError, User, VmErrorKind, VmInstance,
    VmInstanceExt, WriteOptions,
};

/// What is promised of files' contents and metadata.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(sizes, "files.sizes",
        "what is written is read back byte for byte at sizes around every boundary, also when the link falters",
        [Files], faults: []),
    clause!(large, "files.large", "files of many megabytes are written and read whole", [Files], faults: []),
    clause!(endless, "files.endless",
        "reading a file that never ends is refused before it fills the host's memory, and the machine goes on",
        [Exec, Files], faults: []),
    clause!(seen_by_programs, "files.seen_by_programs", "programs of the guest see what was written, byte for byte",
        [Exec, Files], faults: []),
    clause!(made_by_programs, "files.made_by_programs", "what programs of the guest wrote is read byte for byte",
        [Exec, Files], faults: []),
    clause!(odd_names, "files.odd_names", "names may hold any characters but a slash", [Files], faults: []),
    clause!(mode_of_new_file, "files.mode_of_new_file",
        "a new file has the permission bits asked for, else 0644", [Files], faults: []),
    clause!(mode_is_kept, "files.mode_is_kept",
        "replacing a file keeps its permission bits unless others are asked for", [Files], faults: []),
    clause!(stat_tells, "files.stat_tells", "a file's kind, size, owner and time of change are told as they are",
        [Exec, Files], faults: []),
    clause!(stat_of_link, "files.stat_of_link", "the metadata of a symbolic link is its own, and reading follows it",
        [Exec, Files], faults: []),
    clause!(stat_of_device, "files.stat_of_device", "a device is told as neither file nor directory", [Files], faults: []),
    clause!(write_through_link, "files.write_through_link",
        "writing to a symbolic link replaces the file it points to, and the link stays", [Exec, Files], faults: []),
    clause!(refused_permission, "files.refused_permission",
        "what a file's permission bits refuse is refused, and told as such", [Exec, Files], faults: []),
    clause!(many_files_at_once, "files.many_files_at_once",
        "readers and writers of many files do not disturb each other", [Files], faults: []),
    clause!(slow_disk, "files.slow_disk", "a slow disk delays operations on files and changes nothing else",
        [Files], faults: [SlowIo]),
    clause!(kill_interrupts, "files.kill_interrupts",
        "killing the machine ends an operation on files as Interrupted", [Files], faults: [SlowIo])
    .fresh(),
];

async fn round_trip(vm: &dyn VmInstance, path: &str, bytes: &bytes::Bytes) -> Verdict {
    vm.write(path, bytes.clone()).await?;
    same_bytes(&vm.read_file(path).await?, bytes, "what was read back")?;
    let stat = vm.stat(path).await?;
    ensure_eq!(stat.kind, FileKind::File, "kind");
    ensure_eq!(stat.size, u64::try_from(bytes.len()).unwrap_or(0), "size");
    Ok(())
}

async fn sizes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/file", fresh_dir(ctx, &*vm).await?);
    for _ in 0..ctx.draw(1, 4) {
        let frame = 64 << 10;
        let window = 256 << 10;
        let drawn = length(ctx, 0, 100_000);
        let size = ctx.pick(&[
            0,
            1,
            4095,
            4096,
            4097,
            frame - 1,
            frame,
            frame + 1,
            window - 1,
            window,
            window + 1,
            (1 << 20) + 1,
            drawn,
        ]);
        let bytes = ctx.bytes(size);
        let trouble = disturb_link(ctx, &*vm, bytes.len())?;
        let trip = round_trip(&*vm, &path, &bytes);
        ctx.within(SOON * 3, "a round trip", trip).await??;
        trouble.took_place(ctx)?;
    }
    Ok(())
}

async fn large(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/large", fresh_dir(ctx, &*vm).await?);
    // A guest of default memory has room for one, not for two.
    let size = if ctx.heavy(32) { 32 << 20 } else { length(ctx, 1 << 20, 4 << 20) };
    let bytes = ctx.bytes(size);
    ctx.within(SOON * 10, "a large file", round_trip(&*vm, &path, &bytes)).await??;
    // A short file in its place leaves nothing of the long one.
    round_trip(&*vm, &path, &payload(ctx, 5000)).await?;
    vm.remove_all(&path).await?;
    Ok(())
}

async fn endless(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    if ctx.heavy(32) {
        let read = ctx.within(SOON * 20, "reading without end", vm.read_file("/dev/zero")).await?;
        ensure_err!(
            read,
            VmErrorKind::ResourceExhausted { .. } | VmErrorKind::GuestFile { .. },
            "reading a file without end"
        );
    }
    let word = format!("{:x}", ctx.draw(0, u64::MAX));
    let output = vm.run("echo", [word.as_str()]).await?;
    ensure_eq!(output.stdout_text(), format!("{word}\n"), "a program afterwards");
    Ok(())
}

async fn seen_by_programs(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/{}", fresh_dir(ctx, &*vm).await?, odd_name(ctx));
    for _ in 0..ctx.draw(1, 3) {
        let bytes = payload(ctx, 200_000);
        vm.write(&path, bytes.clone()).await?;
        let got = vm.exec(sh("cat < \"$1\"", [path.clone()])).await?;
        same_bytes(&got.stdout, &bytes, "what a program reads")?;
    }
    Ok(())
}

async fn made_by_programs(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/{}", fresh_dir(ctx, &*vm).await?, odd_name(ctx));
    let (first, second) = (payload(ctx, 200_000), payload(ctx, 200_000));
    let write = sh("cat > \"$1\"", [path.clone()]).stdin(first.clone());
    ensure_eq!(vm.exec(write).await?.status, ExecStatus::Exited(0), "writing");
    same_bytes(&vm.read_file(&path).await?, &first, "what a program wrote")?;
    let append = sh("cat >> \"$1\"", [path.clone()]).stdin(second.clone());
    ensure_eq!(vm.exec(append).await?.status, ExecStatus::Exited(0), "appending");
    same_bytes(&vm.read_file(&path).await?, &[first, second].concat(), "what a program appended")
}

async fn odd_names(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let name = ctx.pick(&[
        odd_name(ctx),
        odd_name(ctx),
        " ".to_owned(),
        "...".to_owned(),
        "-rf".to_owned(),
        ".hidden".to_owned(),
        "a\nb".to_owned(),
        "\u{4e2d}\u{6587} \u{1f980}".to_owned(),
        "x".repeat(255),
    ]);
    let path = format!("{dir}/{name}");
    round_trip(&*vm, &path, &payload(ctx, 100)).await?;
    let listed = vm.list_dir(&dir).await?;
    ensure_eq!(listed.len(), 1, "names in the directory");
    ensure_eq!(listed[0].name, name, "the name");
    let renamed = format!("{dir}/{}2", odd_name(ctx));
    vm.rename(&path, &renamed).await?;
    ensure!(!vm.exists(&path).await?, "{path:?} is there after it was renamed");
    vm.remove_all(&renamed).await?;
    ensure_eq!(vm.list_dir(&dir).await?, Vec::new(), "what is left");
    Ok(())
}

fn mode(ctx: &Context) -> u32 {
    u32::try_from(ctx.draw(0, 0o777)).unwrap_or(0)
}

async fn mode_of_new_file(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    vm.write(&format!("{dir}/default"), payload(ctx, 100)).await?;
    ensure_eq!(vm.stat(&format!("{dir}/default")).await?.mode, 0o644, "default mode");
    let mode = mode(ctx);
    let path = format!("{dir}/asked");
    vm.write_file(&path, payload(ctx, 100), WriteOptions { mode: Some(mode) }).await?;
    ensure_eq!(format!("{:o}", vm.stat(&path).await?.mode), format!("{mode:o}"), "mode asked for");
    Ok(())
}

async fn mode_is_kept(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/file", fresh_dir(ctx, &*vm).await?);
    let mut wanted = mode(ctx) | 0o600;
    vm.write_file(&path, payload(ctx, 100), WriteOptions { mode: Some(wanted) }).await?;
    for _ in 0..ctx.draw(1, 4) {
        let asked = if ctx.one_in(2) { Some(mode(ctx) | 0o600) } else { None };
        vm.write_file(&path, payload(ctx, 100), WriteOptions { mode: asked }).await?;
        wanted = asked.unwrap_or(wanted);
        let found = vm.stat(&path).await?.mode;
        ensure_eq!(format!("{found:o}"), format!("{wanted:o}"), "mode after asking for {asked:?}");
    }
    Ok(())
}

/// Gives the ids that programs, and so the agent, run with.
async fn own_ids(vm: &dyn VmInstance) -> Result<(u32, u32), Broken> {
    let told = vm.sh("id -u; id -g").await?.stdout_text();
    let ids: Vec<u32> = told.lines().filter_map(|line| line.parse().ok()).collect();
    match ids[..] {
        [uid, gid] => Ok((uid, gid)),
        _ => Err(Broken::new(format!("`id` says {told:?}"))),
    }
}

async fn stat_tells(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/file");
    // The guest's wall clock is right to within a second, and file times are coarse.
    let slack = Duration::from_secs(2);
    let before = ctx.env().wall_clock();
    vm.write(&path, payload(ctx, 9000)).await?;
    let after = ctx.env().wall_clock();
    let first = vm.stat(&path).await?;
    ensure!(
        first.modified + slack >= before && first.modified <= after + slack,
        "changed at {:?}, between {before:?} and {after:?}",
        first.modified
    );
    ensure_eq!((first.uid, first.gid), own_ids(&*vm).await?, "owner");
    ctx.sleep(millis(ctx, 20, 60)).await;
    vm.write(&path, payload(ctx, 9000)).await?;
    let second = vm.stat(&path).await?;
    ensure!(second.modified > first.modified, "a change left the time at {:?}", second.modified);
    ensure_eq!(vm.stat(&dir).await?.kind, FileKind::Directory, "kind of a directory");
    ensure_eq!(vm.stat("/").await?.kind, FileKind::Directory, "kind of `/`");
    Ok(())
}

async fn stat_of_link(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let bytes = payload(ctx, 9000);
    vm.write(&format!("{dir}/file"), bytes.clone()).await?;
    let made =
        vm.exec(sh("ln -s file link; ln -s missing loose", [""; 0]).cwd(dir.clone())).await?;
    ensure_eq!(
        made.status,
        ExecStatus::Exited(0),
        "making links, which said {}",
        made.stderr_text()
    );
    let stat = vm.stat(&format!("{dir}/link")).await?;
    ensure_eq!((stat.kind, stat.size), (FileKind::Symlink, 4), "kind and size of the link");
    same_bytes(
        &vm.read_file(&format!("{dir}/link")).await?,
        &bytes,
        "what is read through the link",
    )?;
    let loose = format!("{dir}/loose");
    ensure_eq!(vm.stat(&loose).await?.kind, FileKind::Symlink, "kind of a link to nothing");
    file_error(vm.read_file(&loose).await, &GuestFileError::NotFound, "reading a link to nothing")
}

async fn stat_of_device(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let device = ctx.pick(&["/dev/null", "/dev/zero"]);
    ensure_eq!(vm.stat(device).await?.kind, FileKind::Other, "kind of {device}");
    Ok(())
}

async fn write_through_link(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let (path, link) = (format!("{dir}/real/file"), format!("{dir}/link"));
    vm.create_dir_all(&format!("{dir}/real")).await?;
    let dangles = ctx.one_in(3);
    if !dangles {
        vm.write(&path, "old").await?;
    }
    let target = if ctx.one_in(2) { path.clone() } else { "real/file".to_owned() };
    let made = vm.exec(ExecRequest::new("ln").args(["-s", &target, &link])).await?;
    ensure_eq!(made.status, ExecStatus::Exited(0), "making a link");
    let bytes = payload(ctx, 9000);
    vm.write(&link, bytes.clone()).await?;
    ensure_eq!(vm.stat(&link).await?.kind, FileKind::Symlink, "kind of the link after writing");
    same_bytes(&vm.read_file(&path).await?, &bytes, "the file it points to")?;
    ensure_eq!(vm.list_dir(&format!("{dir}/real")).await?.len(), 1, "names beside the file");
    Ok(())
}

async fn refused_permission(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/file");
    if own_ids(&*vm).await?.0 != 0 {
        let denied = GuestFileError::PermissionDenied;
        vm.write_file(&path, "secret".into(), WriteOptions { mode: Some(0) }).await?;
        file_error(vm.read_file(&path).await, &denied, "reading a file of mode 0")?;
        let closed = vm_trait::CreateDirOptions { mode: Some(0o500), recursive: false };
        vm.create_dir(&format!("{dir}/closed"), closed).await?;
        let inside = format!("{dir}/closed/file");
        file_error(vm.write(&inside, "x").await, &denied, "writing into a read-only directory")?;
        let made = vm.create_dir(&inside, vm_trait::CreateDirOptions::default()).await;
        file_error(made, &denied, "making a directory in a read-only directory")?;
        return file_error(vm.rename(&path, &inside).await, &denied, "renaming into it");
    }
    // Nothing is refused to root, so another user tries.
    ensure!(
        ctx.has(Capability::Users),
        "root cannot be refused anything and there is no other user"
    );
    let id = u32::try_from(ctx.draw(1, 60_000)).unwrap_or(1);
    let read = || {
        let user = User::Ids { uid: id, gid: id };
        vm.exec(ExecRequest::new("cat").arg(path.clone()).user(user))
    };
    vm.write_file(&path, "secret".into(), WriteOptions { mode: Some(0o600) }).await?;
    let refused = read().await?;
    ensure!(!refused.status.success(), "user {id} read a file of mode 600: {refused:?}");
    ensure!(refused.stdout.is_empty(), "user {id} read {:?}", refused.stdout);
    vm.write_file(&path, "open".into(), WriteOptions { mode: Some(0o604) }).await?;
    ensure_eq!(read().await?.stdout_text(), "open", "a file of mode 604 that user {id} reads");
    Ok(())
}

async fn many_files_at_once(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let rounds = ctx.draw(1, 4);
    let tasks: Vec<_> = (0..16)
        .map(|index| {
            let (vm, path) = (vm.clone(), format!("{dir}/{index}"));
            let contents: Vec<_> = (0..rounds).map(|_| payload(ctx, 90_000)).collect();
            ctx.spawn(async move {
                for bytes in &contents {
                    round_trip(&*vm, &path, bytes).await?;
                }
                Ok::<_, Broken>(())
            })
        })
        .collect();
    let all = join_all(tasks.into_iter().map(crate::context::Task::join));
    for result in ctx.within(SOON * 2, "16 files at once", all).await? {
        result??;
    }
    ensure_eq!(vm.list_dir(&dir).await?.len(), 16, "files in the end");
    Ok(())
}

async fn slow_disk(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/file", fresh_dir(ctx, &*vm).await?);
    let bytes = payload(ctx, 100_000);
    let delay = millis(ctx, 100, 3000);
    let trouble = order(ctx, FaultOrder::next(FaultKind::SlowIo).on(vm.id()).with_amount(delay))?;
    let before = ctx.now();
    round_trip(&*vm, &path, &bytes).await?;
    let took = ctx.now().saturating_sub(before);
    ensure!(took >= delay, "took {took:?} on a disk that is {delay:?} late");
    trouble.must_have_fired(ctx)
}

async fn kill_interrupts(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let path = format!("{}/file", fresh_dir(ctx, &*vm).await?);
    vm.write(&path, payload(ctx, 9000)).await?;
    let trouble = order(
        ctx,
        FaultOrder::next(FaultKind::SlowIo).on(vm.id()).with_amount(Duration::from_secs(20)),
    )?;
    let (other, bytes, write) = (vm.clone(), payload(ctx, 100_000), ctx.one_in(2));
    let task = ctx.spawn(async move {
        if write { other.write(&path, bytes).await } else { other.read_file(&path).await.map(drop) }
    });
    until(ctx, "the disk is slow", || async { Ok(trouble.fired(ctx)) }).await?;
    ctx.sleep(millis(ctx, 0, 2000)).await;
    vm.kill().await?;
    let result = ctx.within(SOON, "the operation on the file", task.join()).await??;
    ensure_err!(result, VmErrorKind::Interrupted, "the operation under a kill");
    Ok(())
}
