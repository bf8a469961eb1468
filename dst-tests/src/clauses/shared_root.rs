//! Roots that are directories of the host.

use super::{
    mounts::{Shared, at, is_confined, refuses_writes, some},
    probe::{SOON, Vm, disk, made, order, sh, started, works},
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use bytes::Bytes;
use std::time::Duration;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    CreateDirOptions, ForkOptions, MountConfig, RestoreOptions, RootConfig, SnapshotOptions,
    StopOptions, VmConfig, VmErrorKind, VmInstanceExt,
};

/// The clauses on shared roots.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(missing, "root.shared_missing",
        "a shared root that is not there, is a file, lacks what is mounted on where it is read-only, or is mounted too is refused, naming the field",
        [Exec, Mounts], faults: []),
    clause!(runs, "root.shared_runs_programs",
        "programs run from a shared root, also those that were put there since, and what the host changes is seen",
        [Exec, Files, Mounts], faults: []),
    clause!(writable, "root.shared_writable",
        "what the guest writes, renames and removes in a shared root is so on the host, and stays after kill and start",
        [Exec, Files, Mounts], faults: []),
    clause!(read_only, "root.shared_read_only",
        "no way of writing to a read-only shared root changes it, a mount for writing again among them",
        [Exec, Files, Mounts], faults: []),
    clause!(own_places, "root.shared_own_places",
        "in every shared root `/dev`, `/proc`, `/run` and `/tmp` are the guest's own: neither host nor guest sees the other's",
        [Exec, Files, Mounts], faults: []),
    clause!(no_escape, "root.shared_no_escape",
        "neither `..` nor a symbolic link leads from a shared root to other files of the host",
        [Exec, Files, Mounts], faults: []),
    clause!(mounted_on, "root.shared_is_mounted_on",
        "disks and mounts are where the configuration says in a shared root; one that is read-only must have the places",
        [Exec, Files, Mounts, Disks], faults: []),
    clause!(by_machines, "root.shared_by_machines",
        "two machines whose root is the same directory see what the other writes, and one may be kept from writing",
        [Exec, Files, Mounts], faults: []),
    clause!(not_in_snapshots, "root.shared_not_part_of_snapshots",
        "a restored machine sees its shared root as it is now, with the mounts in it", [Exec, Files, Mounts, Snapshot],
        faults: []),
    clause!(with_forks, "root.shared_with_forks",
        "a child and its source see what the other writes to their shared root", [Exec, Files, Mounts, Fork], faults: []),
    clause!(io_error, "root.shared_io_error",
        "a host that fails to read or write a file of a shared root is an error of that operation alone",
        [Exec, Files, Mounts], faults: [MountIo]),
];

/// Makes a directory of the host with a guest's root files.
async fn new_root(ctx: &Context) -> Result<Shared, Broken> {
    let host = ctx.host_path("root");
    ctx.make_guest_root(&host).await.map_err(|error| at(&host, &error))?;
    Ok(Shared { host, guest: String::new() })
}

fn rooted(root: &Shared, read_only: bool) -> impl FnOnce(&mut VmConfig) {
    let root = RootConfig::shared(&root.host).with_read_only(read_only);
    move |config| config.root = root
}

async fn missing(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let path = ctx.host_path("not-there");
    match ctx.draw(0, 2) {
        0 => {}
        1 => ctx.write_host_file(&path, some(ctx)).await.map_err(|error| at(&path, &error))?,
        // There is nothing in it to mount on.
        _ => ctx.make_host_dir(&path).await.map_err(|error| at(&path, &error))?,
    }
    let outcome =
        made(ctx, |config| config.root = RootConfig::shared(&path).with_read_only(true)).await;
    ensure_err!(
        outcome,
        VmErrorKind::InvalidConfig { field, .. } if field == "root.source",
        "a read-only root of {}", path.display()
    );
    let outcome = made(ctx, |config| {
        config.root = RootConfig::shared(&root.host);
        config.mounts = vec![MountConfig::new(&root.host, "/mnt")];
    })
    .await;
    ensure_err!(
        outcome,
        VmErrorKind::InvalidConfig { field, .. } if field == "mounts[0].path",
        "a root that is mounted too"
    );
    works(ctx, &started(ctx, rooted(&root, false)).await?, "with a shared root").await
}

/// Waits until the guest reads these bytes: what a host changes may be seen somewhat later.
async fn is_seen(ctx: &Context, vm: &Vm, path: &str, bytes: &Bytes) -> Verdict {
    let begun = ctx.now();
    loop {
        match vm.read_file(path).await {
            Ok(found) if found == bytes => return Ok(()),
            _ if ctx.now() - begun < SOON => ctx.sleep(Duration::from_millis(200)).await,
            outcome => {
                let found = outcome.map(|found| found.len());
                return Err(Broken::new(format!("{path}: {found:?}, not what the host put there")));
            }
        }
    }
}

async fn runs(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let (first, second) = (some(ctx), some(ctx));
    root.put(ctx, "file", first.clone()).await?;
    let vm = started(ctx, rooted(&root, ctx.one_in(2))).await?;
    ensure!(vm.read_file("/file").await? == first, "a file from before the boot differs");
    let size = sh(&vm, "cat /file | wc -c").await?;
    ensure_eq!(size.trim(), first.len().to_string(), "the length of a file from before the boot");
    root.put(ctx, "file", second.clone()).await?;
    is_seen(ctx, &vm, "/file", &second).await?;
    let word = format!("word-{:x}", ctx.draw(0, u64::MAX));
    root.put(ctx, "script", format!("echo {word}\n").into()).await?;
    ensure_eq!(sh(&vm, "sh /script").await?, word, "a script from after the boot");
    works(ctx, &vm, "with a shared root").await
}

async fn writable(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let vm = started(ctx, rooted(&root, false)).await?;
    let whole = some(ctx);
    vm.create_dir("/srv/data", CreateDirOptions { recursive: true, mode: None }).await?;
    vm.write("/srv/data/whole", whole.clone()).await?;
    root.holds(ctx, "srv/data/whole", &whole, "a file of the host's request").await?;
    let word = format!("word-{:x}", ctx.draw(0, u64::MAX));
    sh(&vm, &format!("cd / && mkdir own && echo {word} > own/word && mv own/word etc/moved"))
        .await?;
    let line = Bytes::from(format!("{word}\n"));
    root.holds(ctx, "etc/moved", &line, "a file that was made and renamed").await?;
    ensure!(root.get(ctx, "own/word").await.is_err(), "a renamed file is still at its old place");
    // A program that the guest puts there is one.
    let printed = sh(&vm, "cp /bin/cat /own/cat && chmod 755 /own/cat && /own/cat /etc/moved");
    ensure_eq!(printed.await?, word, "what a copied program prints");
    sh(&vm, "rm /srv/data/whole").await?;
    ensure!(root.get(ctx, "srv/data/whole").await.is_err(), "a removed file is still there");
    vm.kill().await?;
    root.holds(ctx, "etc/moved", &line, "after kill").await?;
    vm.start().await?;
    ensure_eq!(sh(&vm, "/own/cat /etc/moved").await?, word, "after another start");
    drop(vm);
    root.holds(ctx, "etc/moved", &line, "after the machine is gone").await?;
    let next = started(ctx, rooted(&root, true)).await?;
    ensure_eq!(sh(&next, "/own/cat /etc/moved").await?, word, "in another machine");
    Ok(())
}

async fn read_only(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let bytes = some(ctx);
    root.put(ctx, "kept", bytes.clone()).await?;
    let vm = started(ctx, rooted(&root, true)).await?;
    refuses_writes(ctx, &vm, &root, &bytes).await?;
    vm.write("/tmp/file", bytes.clone()).await?;
    ensure!(vm.read_file("/tmp/file").await? == bytes, "a file in /tmp differs");
    works(ctx, &vm, "with a read-only shared root").await
}

async fn own_places(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    for place in ["dev", "run", "tmp", "proc"] {
        root.put(ctx, &format!("{place}/of-host"), "host".into()).await?;
    }
    let vm = started(ctx, rooted(&root, ctx.one_in(2))).await?;
    for place in ["dev", "run", "tmp", "proc"] {
        let of_host = format!("/{place}/of-host");
        ensure!(vm.read_file(&of_host).await.is_err(), "the guest sees the host's {of_host}");
    }
    for place in ["dev", "run", "tmp"] {
        vm.write(&format!("/{place}/of-guest"), "guest").await?;
        let found = vm.read_to_string(&format!("/{place}/of-guest")).await?;
        ensure_eq!(found, "guest", "a file in /{place}");
        let on_host = root.get(ctx, &format!("{place}/of-guest")).await;
        ensure!(on_host.is_err(), "what the guest wrote to /{place} is on the host");
    }
    sh(&vm, "echo x > /dev/null && test -r /proc/uptime && cd /tmp/.. && test -e bin/sh").await?;
    vm.kill().await?;
    vm.start().await?;
    let after = vm.read_file("/tmp/of-guest").await;
    ensure!(after.is_err(), "what was written to /tmp is there after another start");
    Ok(())
}

async fn no_escape(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let vm = started(ctx, rooted(&root, false)).await?;
    is_confined(ctx, &vm, &root).await
}

async fn mounted_on(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let (known, own) = (Shared::new(ctx, "/mnt").await?, Shared::new(ctx, "/run/deep/er").await?);
    let new = Shared::new(ctx, "/srv/new/place").await?;
    for lacking in [true, false] {
        let outcome = made(ctx, |config| {
            rooted(&root, true)(config);
            if lacking {
                config.mounts.push(new.config());
            } else {
                config.disks.push(disk(ctx, "/srv/disk"));
            }
        })
        .await;
        let named = if lacking { "mounts[0].mount" } else { "disks[0].mount" };
        ensure_err!(
            outcome,
            VmErrorKind::InvalidConfig { field, .. } if field == named,
            "a place that a read-only root does not have"
        );
    }
    let read_only = ctx.one_in(2);
    let mut all = vec![&known, &own];
    if !read_only {
        all.push(&new);
    }
    let vm = started(ctx, |config| {
        rooted(&root, read_only)(config);
        config.mounts = all.iter().map(|it| it.config()).collect();
        config.disks.push(disk(ctx, "/home"));
    })
    .await?;
    let bytes = some(ctx);
    for shared in &all {
        vm.write(&shared.inside("file"), bytes.clone()).await?;
        shared.holds(ctx, "file", &bytes, "a mount in a shared root").await?;
        let below = format!("{}/file", shared.guest.trim_start_matches('/'));
        let hidden = root.get(ctx, &below).await;
        ensure!(hidden.is_err(), "what was written to {} is in the root too", shared.guest);
    }
    vm.write("/home/file", bytes.clone()).await?;
    ensure!(root.get(ctx, "home/file").await.is_err(), "what was written to a disk is in the root");
    sh(&vm, "cd /mnt/.. && test -e bin/sh && cd /home/.. && test -e bin/sh").await?;
    let linked = vm.sh("ln /mnt/file /etc/linked 2>/dev/null").await?;
    ensure!(!linked.status.success(), "a hard link leads from a mount to the root");
    ensure!(vm.rename("/mnt/file", "/etc/moved").await.is_err(), "a file was renamed across");
    if !read_only {
        // The place was made in the directory.
        root.put(ctx, "srv/new/place/hidden", bytes.clone()).await?;
        let hidden = vm.read_file(&new.inside("hidden")).await;
        ensure!(hidden.is_err(), "what is beneath a mount is seen");
    }
    vm.stop(StopOptions::default()).await?;
    vm.start().await?;
    ensure!(vm.read_file("/home/file").await? == bytes, "a disk in a shared root lost a file");
    Ok(())
}

async fn by_machines(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let one = started(ctx, rooted(&root, false)).await?;
    let read_only = ctx.one_in(2);
    let other = started(ctx, rooted(&root, read_only)).await?;
    let bytes = some(ctx);
    one.write("/from-one", bytes.clone()).await?;
    ensure!(other.read_file("/from-one").await? == bytes, "the other machine reads something else");
    let written = other.write("/from-other", bytes.clone()).await;
    ensure_eq!(written.is_err(), read_only, "whether the other machine is kept from writing");
    if !read_only {
        ensure!(one.read_file("/from-other").await? == bytes, "the first reads something else");
    }
    other.write("/tmp/own", bytes).await?;
    ensure!(one.read_file("/tmp/own").await.is_err(), "machines share /tmp");
    other.kill().await?;
    works(ctx, &one, "after the end of another with the same root").await
}

async fn not_in_snapshots(ctx: &Context) -> Verdict {
    let (root, inside) = (new_root(ctx).await?, Shared::new(ctx, "/mnt").await?);
    let vm = started(ctx, |config| {
        rooted(&root, false)(config);
        config.mounts.push(inside.config());
    })
    .await?;
    vm.write("/file", "old").await?;
    vm.write("/tmp/file", "old").await?;
    vm.write("/mnt/file", "mounted").await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.write("/file", "new").await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    ensure_eq!(restored.read_to_string("/tmp/file").await?, "old", "the guest's own file");
    ensure_eq!(restored.read_to_string("/file").await?, "new", "a file of the root");
    ensure_eq!(restored.read_to_string("/mnt/file").await?, "mounted", "a file of a mount in it");
    restored.write("/file", "newer").await?;
    ensure_eq!(vm.read_to_string("/file").await?, "newer", "a file of the root in the source");
    root.holds(ctx, "file", &"newer".into(), "after the restored machine wrote").await?;
    works(ctx, &restored, "restored with a shared root").await
}

async fn with_forks(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let vm = started(ctx, rooted(&root, false)).await?;
    for child in vm.fork(ForkOptions::new(1)).await? {
        let child = child?;
        child.write("/from-child", "child").await?;
        ensure_eq!(vm.read_to_string("/from-child").await?, "child", "in the source");
        vm.write("/from-source", "source").await?;
        ensure_eq!(child.read_to_string("/from-source").await?, "source", "in the child");
        works(ctx, &child, "a child with a shared root").await?;
    }
    Ok(())
}

async fn io_error(ctx: &Context) -> Verdict {
    let root = new_root(ctx).await?;
    let vm = started(ctx, rooted(&root, false)).await?;
    let bytes = some(ctx);
    vm.write("/file", bytes.clone()).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::MountIo).on(vm.id()))?;
    let outcome = match ctx.one_in(2) {
        true => vm.read_file("/file").await.map(drop),
        false => vm.write("/file", "new").await,
    };
    ensure_err!(outcome, VmErrorKind::GuestFile { .. }, "a file with an error of the host");
    ordered.must_have_fired(ctx)?;
    ensure!(vm.read_file("/file").await? == bytes, "the file differs after the error");
    works(ctx, &vm, "after an error of the host").await
}
