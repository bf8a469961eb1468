//! Directories of the host in the guest.

use super::probe::{Vm, made, order, script, sh, started, works};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq, ensure_err,
};
use bytes::Bytes;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    CreateDirOptions, DiskConfig, ForkOptions, GuestFileError, MountConfig, Operation,
    RemoveOptions, RestoreOptions, SnapshotOptions, VmConfig, VmErrorKind, VmInstanceExt,
};

/// The clauses on mounts.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(bad_ones, "mounts.bad_ones_are_refused",
        "too many mounts, bad or repeated host paths, and places that are not apart are refused naming mount and field",
        [], faults: []),
    clause!(missing, "mounts.missing_directory",
        "a host directory that is not there, or is a file, is refused at create naming the mount", [Mounts], faults: []),
    clause!(host_to_guest, "mounts.guest_sees_the_host",
        "what the host puts into a mounted directory, before the boot and after, the guest reads", [Exec, Files, Mounts],
        faults: []),
    clause!(guest_to_host, "mounts.host_sees_the_guest",
        "what the guest writes, renames and removes in a mounted directory is so on the host", [Exec, Files, Mounts],
        faults: []),
    clause!(many, "mounts.sixteen_at_once",
        "16 mounts are each where the configuration says", [Exec, Files, Mounts], faults: []),
    clause!(read_only, "mounts.read_only_is_enforced",
        "no way of writing to a read-only mount changes it, root's and a mount for writing again among them",
        [Exec, Files, Mounts], faults: []),
    clause!(no_escape, "mounts.no_escape",
        "neither `..` nor a symbolic link leads from a mount to other files of the host", [Exec, Files, Mounts],
        faults: []),
    clause!(apart, "mounts.apart",
        "neither a rename nor a hard link leads from one mount to another, and each keeps its own right to write",
        [Exec, Files, Mounts], faults: []),
    clause!(shared, "mounts.shared_by_machines",
        "two machines that mount a directory see what the other writes", [Exec, Files, Mounts], faults: []),
    clause!(stays, "mounts.outlive_the_machine",
        "what was written to a mount is there after kill and start, and in another machine", [Exec, Files, Mounts],
        faults: []),
    clause!(not_in_snapshots, "mounts.not_part_of_snapshots",
        "a restored machine sees a mounted directory as it is now, and not as it was when the snapshot was taken",
        [Exec, Files, Mounts, Snapshot], faults: []),
    clause!(shared_with_forks, "mounts.shared_with_forks",
        "a child and its source see what the other writes to a mount", [Exec, Files, Mounts, Fork], faults: []),
    clause!(io_error, "mounts.io_error",
        "a host that fails to read or write a mounted file is an error of that operation alone",
        [Exec, Files, Mounts], faults: [MountIo]),
    clause!(host_full, "mounts.full_host",
        "a host without room under a mount is an error of that write alone", [Exec, Files, Mounts], faults: [MountFull]),
    clause!(slow, "mounts.slow_host",
        "a slow host under a mount delays what is read and written there, and nothing is lost",
        [Exec, Files, Mounts], faults: [MountSlow]),
];

/// A directory of the host, and where the guest sees it: nothing for its root.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub(super) host: PathBuf,
    pub(super) guest: String,
}

impl Shared {
    /// Makes a directory of the host.
    pub(super) async fn new(ctx: &Context, guest: &str) -> Result<Self, Broken> {
        let host = ctx.host_path("mounted");
        ctx.make_host_dir(&host).await.map_err(|error| at(&host, &error))?;
        Ok(Self { host, guest: guest.to_owned() })
    }

    pub(super) fn config(&self) -> MountConfig {
        MountConfig::new(&self.host, self.guest.clone())
    }

    pub(super) fn inside(&self, name: &str) -> String {
        format!("{}/{name}", self.guest)
    }

    /// Puts a file there from the host's side.
    pub(super) async fn put(&self, ctx: &Context, name: &str, bytes: Bytes) -> Verdict {
        let path = self.host.join(name);
        ctx.write_host_file(&path, bytes).await.map_err(|error| at(&path, &error))
    }

    /// Reads a file from the host's side.
    pub(super) async fn get(&self, ctx: &Context, name: &str) -> Result<Bytes, Broken> {
        let path = self.host.join(name);
        ctx.read_host_file(&path).await.map_err(|error| at(&path, &error))
    }

    pub(super) async fn holds(
        &self,
        ctx: &Context,
        name: &str,
        bytes: &Bytes,
        when: &str,
    ) -> Verdict {
        let found = self.get(ctx, name).await?;
        ensure!(found == bytes, "{when}: the host's `{name}` is not what was written");
        Ok(())
    }
}

pub(super) fn at(path: &Path, error: &std::io::Error) -> Broken {
    Broken::new(format!("{}: {error}", path.display()))
}

async fn mounted(ctx: &Context) -> Result<(Vm, Shared), Broken> {
    let shared = Shared::new(ctx, "/mnt/shared").await?;
    let vm = started(ctx, |config| config.mounts.push(shared.config())).await?;
    Ok((vm, shared))
}

pub(super) fn some(ctx: &Context) -> Bytes {
    let most = ctx.pick(&[10, 5_000, 200_000]);
    ctx.bytes(usize::try_from(ctx.draw(1, most)).unwrap_or(1))
}

async fn bad_ones(ctx: &Context) -> Verdict {
    let mount = |n: u64, at: &str| MountConfig::new(format!("/host/{n}"), at);
    let mut config = VmConfig::default();
    let count = ctx.draw(1, 5);
    config.mounts = (0..count).map(|n| mount(n, &format!("/mounts/m{n}"))).collect();
    let last = ctx.index(config.mounts.len());
    let field = match ctx.draw(0, 5) {
        0 => {
            config.mounts[last].path = ctx.pick(&["", "/a\0b"]).into();
            format!("mounts[{last}].path")
        }
        1 => {
            let bad =
                ctx.pick(&["", "/", "data", "/a//b", "/a/", "/a/../b", "/./a", "/a\0", "/.."]);
            config.mounts[last].mount = bad.to_owned();
            format!("mounts[{last}].mount")
        }
        2 => {
            let at = ctx.pick(&["/mounts/m0", "/mounts/m0/below", "/mounts"]);
            config.mounts.push(mount(99, at));
            format!("mounts[{count}].mount")
        }
        3 => {
            let at = ctx.pick(&["/disk", "/disk/below/it"]);
            config.disks.push(DiskConfig::new("/host/disk.img", "/disk"));
            config.mounts.push(mount(99, at));
            format!("mounts[{count}].mount")
        }
        4 => {
            config.mounts.push(MountConfig::new(config.mounts[last].path.clone(), "/elsewhere"));
            format!("mounts[{count}].path")
        }
        _ => {
            config.mounts = (0..17).map(|n| mount(n, &format!("/m{n}"))).collect();
            "mounts".to_owned()
        }
    };
    let text = format!("{:?}", config.mounts);
    let outcome = ctx.backend().create(config).await;
    if let Err(error) = &outcome {
        ensure_eq!(error.operation(), Operation::Create, "the operation that refused {text}");
    }
    ensure_err!(
        outcome,
        VmErrorKind::InvalidConfig { field: found, reason } if *found == field && !reason.is_empty(),
        "create with a bad {field}: {text}"
    );
    Ok(())
}

async fn missing(ctx: &Context) -> Verdict {
    let present = Shared::new(ctx, "/present").await?;
    let path = ctx.host_path("not-there");
    if ctx.one_in(2) {
        ctx.write_host_file(&path, some(ctx)).await.map_err(|error| at(&path, &error))?;
    }
    let outcome = made(ctx, |config| {
        config.mounts = vec![present.config(), MountConfig::new(&path, "/absent")];
    })
    .await;
    ensure_err!(
        outcome,
        VmErrorKind::InvalidConfig { field, .. } if field == "mounts[1].path",
        "a mount of {}", path.display()
    );
    Ok(())
}

async fn host_to_guest(ctx: &Context) -> Verdict {
    let shared = Shared::new(ctx, "/mnt/deep/shared").await?;
    let (before, after) = (some(ctx), some(ctx));
    shared.put(ctx, "before", before.clone()).await?;
    let vm = started(ctx, |config| config.mounts.push(shared.config())).await?;
    ensure!(
        vm.read_file(&shared.inside("before")).await? == before,
        "a file from before the boot differs"
    );
    shared.put(ctx, "after", after.clone()).await?;
    let size = sh(&vm, &format!("cat {} | wc -c", shared.inside("after"))).await?;
    ensure_eq!(size.trim(), after.len().to_string(), "the length of a file from after the boot");
    ensure!(
        vm.read_file(&shared.inside("after")).await? == after,
        "a file from after the boot differs"
    );
    let listed = sh(&vm, &format!("ls {}", shared.guest)).await?;
    ensure_eq!(listed, "after\nbefore", "what is in the mounted directory");
    Ok(())
}

async fn guest_to_host(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    let whole = some(ctx);
    vm.write(&shared.inside("whole"), whole.clone()).await?;
    shared.holds(ctx, "whole", &whole, "a file of the host's request").await?;
    let word = format!("word-{:x}", ctx.draw(0, u64::MAX));
    sh(&vm, &format!("cd {} && mkdir dir && echo {word} > dir/word", shared.guest)).await?;
    let line = Bytes::from(format!("{word}\n"));
    shared.holds(ctx, "dir/word", &line, "a program's file").await?;
    sh(&vm, &format!("cd {} && echo more >> dir/word && mv dir/word moved", shared.guest)).await?;
    let longer = Bytes::from(format!("{word}\nmore\n"));
    shared.holds(ctx, "moved", &longer, "a file that was appended to and renamed").await?;
    ensure!(shared.get(ctx, "dir/word").await.is_err(), "a renamed file is still at its old place");
    sh(&vm, &format!("rm {}", shared.inside("whole"))).await?;
    ensure!(shared.get(ctx, "whole").await.is_err(), "a removed file is still there");
    Ok(())
}

async fn many(ctx: &Context) -> Verdict {
    let mut all = Vec::new();
    for n in 0..VmConfig::MAX_MOUNTS {
        let shared = Shared::new(ctx, &format!("/mounts/number/{n}")).await?;
        shared.put(ctx, "which", n.to_string().into()).await?;
        all.push(shared);
    }
    let vm = started(ctx, |config| {
        config.mounts = all.iter().map(Shared::config).collect();
    })
    .await?;
    for (n, shared) in all.iter().enumerate() {
        let found = vm.read_to_string(&shared.inside("which")).await?;
        ensure_eq!(found, n.to_string(), "the file in {}", shared.guest);
    }
    works(ctx, &vm, "with 16 mounts").await
}

async fn read_only(ctx: &Context) -> Verdict {
    let shared = Shared::new(ctx, "/mnt/shared").await?;
    let bytes = some(ctx);
    shared.put(ctx, "kept", bytes.clone()).await?;
    let vm =
        started(ctx, |config| config.mounts.push(shared.config().with_read_only(true))).await?;
    refuses_writes(ctx, &vm, &shared, &bytes).await
}

/// Tries to write to a directory of the host that is read-only, whose file `kept` has these bytes.
pub(super) async fn refuses_writes(
    ctx: &Context,
    vm: &Vm,
    shared: &Shared,
    bytes: &Bytes,
) -> Verdict {
    let kept = shared.inside("kept");
    ensure!(vm.read_file(&kept).await? == bytes, "a file of a read-only directory differs");
    let tries = [
        "echo x > kept",
        "echo x >> kept",
        "echo x > new",
        "mkdir new",
        "rm -f kept && test ! -e kept",
        "mv kept new",
        "ln kept new",
        "ln -s kept new",
        "chmod 600 kept",
        "touch new",
        "dd if=/dev/zero of=kept bs=1 count=1 conv=notrunc",
        // With the guest's own flag gone, only the host is left to refuse.
        "mount -o remount,rw . && echo x > new",
        "mount -o remount,rw . && echo x > kept",
        "mount -o remount,rw . && rm kept",
    ];
    for text in tries {
        let output = vm.sh(&format!("cd {}/ && {{ {text}; }} 2>/dev/null", shared.guest)).await?;
        ensure!(!output.status.success(), "`{text}` in a read-only directory: {:?}", output.status);
    }
    let new = shared.inside("new");
    for (how, outcome) in [
        ("write_file", vm.write(&kept, "x").await),
        ("write_file of a new one", vm.write(&new, "x").await),
        ("create_dir", vm.create_dir(&new, CreateDirOptions::default()).await),
        ("remove", vm.remove(&kept, RemoveOptions::default()).await),
        ("rename", vm.rename(&kept, &new).await),
    ] {
        ensure_err!(
            outcome,
            VmErrorKind::GuestFile { error: GuestFileError::ReadOnly, .. },
            "{how} in a read-only directory"
        );
    }
    shared.holds(ctx, "kept", bytes, "after all tries to write").await?;
    ensure!(shared.get(ctx, "new").await.is_err(), "a file was made in a read-only directory");
    ensure!(vm.read_file(&kept).await? == bytes, "a file of it differs in the end");
    Ok(())
}

async fn no_escape(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    is_confined(ctx, &vm, &shared).await
}

/// Tries to reach a file of the host beside a directory that the guest has and can write to.
pub(super) async fn is_confined(ctx: &Context, vm: &Vm, shared: &Shared) -> Verdict {
    // It stands beside the directory, under a name that the guest is told.
    let secret = ctx.host_path("secret");
    let word = format!("secret-{:016x}", ctx.draw(0, u64::MAX));
    let content = Bytes::from(word.clone());
    ctx.write_host_file(&secret, content.clone()).await.map_err(|error| at(&secret, &error))?;
    let name = secret.file_name().map(|name| name.to_string_lossy().into_owned());
    let (name, whole) = (name.unwrap_or_default(), secret.display().to_string());
    let ups: Vec<String> = (1..=12).map(|n| "../".repeat(n)).collect();
    let mut links = vec![whole.clone(), format!("../{name}"), format!("./../{name}")];
    links.extend(ups.iter().map(|up| format!("{up}{}", whole.trim_start_matches('/'))));
    let mut text = format!("cd {}/ || exit\nmkdir sub\nln -s .. up\nln -s / top\n", shared.guest);
    for (n, link) in links.iter().enumerate() {
        text += &format!("ln -s '{link}' l{n}\nln -s '{link}' sub/l{n}\n");
        text += &format!("cat l{n} sub/l{n} '{link}' 'sub/../{link}'\n");
    }
    text += &format!("cat 'up/{name}' 'top/{whole}' 'sub/../../{name}' '..//{name}' 2>&1\ntrue");
    let output = vm.exec(script(&text)).await?;
    ensure!(!output.stdout_text().contains(&word), "the guest read a file beside its directory");
    let mut text = format!("cd {}/\n", shared.guest);
    for n in 0..links.len() {
        text += &format!("echo x > l{n}\necho x > sub/l{n}\nrm -f l{n}/ 2>&1\n");
    }
    text += &format!("echo x > 'up/{name}'; rm -f 'sub/../../{name}'; mv 'up/{name}' stolen; true");
    // Writing through the links may change files of the guest's own.
    vm.exec(script(&text)).await?;
    let found = ctx.read_host_file(&secret).await.map_err(|error| at(&secret, &error))?;
    ensure!(found == content, "the guest changed a file beside its directory");
    ensure!(
        shared.get(ctx, "stolen").await.ok() != Some(content),
        "the guest moved a file into its directory"
    );
    Ok(())
}

async fn apart(ctx: &Context) -> Verdict {
    let (open, kept) = (Shared::new(ctx, "/mnt/open").await?, Shared::new(ctx, "/mnt/kept").await?);
    let (bytes, other) = (some(ctx), some(ctx));
    open.put(ctx, "file", bytes.clone()).await?;
    kept.put(ctx, "file", other.clone()).await?;
    // Which of them is the first must not matter.
    let mut mounts = vec![open.config(), kept.config().with_read_only(true)];
    if ctx.one_in(2) {
        mounts.reverse();
    }
    let vm = started(ctx, |config| config.mounts = mounts).await?;
    for (from, to) in [(&open, &kept), (&kept, &open)] {
        let (from, to) = (from.inside("file"), to.inside("moved"));
        ensure!(vm.rename(&from, &to).await.is_err(), "{from} became {to}");
        let linked = vm.sh(&format!("ln {from} {to} 2>/dev/null")).await?;
        ensure!(!linked.status.success(), "{to} is a hard link to {from}");
    }
    let tries = [
        "echo x > ../kept/file",
        "echo x > ../kept/new",
        "ln -s ../kept way && echo x > way/new",
        "mount -o remount,rw ../kept; echo x > ../kept/new",
        "mount -o bind . ../kept; umount ../kept; echo x > ../kept/new",
    ];
    for text in tries {
        let output = vm.sh(&format!("cd {} && {{ {text}; }} 2>/dev/null", open.guest)).await?;
        ensure!(!output.status.success(), "`{text}` beside a read-only mount: {:?}", output.status);
    }
    open.holds(ctx, "file", &bytes, "the one that can be written to").await?;
    kept.holds(ctx, "file", &other, "the read-only one").await?;
    for name in ["moved", "new"] {
        ensure!(kept.get(ctx, name).await.is_err(), "`{name}` was made in a read-only mount");
    }
    vm.write(&open.inside("file"), other.clone()).await?;
    open.holds(ctx, "file", &other, "what was written in the end").await
}

async fn shared(ctx: &Context) -> Verdict {
    let (one, shared) = mounted(ctx).await?;
    let there = Shared { guest: "/other/place".to_owned(), ..shared.clone() };
    let other = started(ctx, |config| config.mounts.push(there.config())).await?;
    let bytes = some(ctx);
    one.write(&shared.inside("from-one"), bytes.clone()).await?;
    ensure!(
        other.read_file(&there.inside("from-one")).await? == bytes,
        "the other machine reads something else"
    );
    other.write(&there.inside("from-other"), bytes.clone()).await?;
    ensure!(
        one.read_file(&shared.inside("from-other")).await? == bytes,
        "the first machine reads something else"
    );
    other.kill().await?;
    ensure!(
        one.read_file(&shared.inside("from-other")).await? == bytes,
        "it reads something else after the other's end"
    );
    Ok(())
}

async fn stays(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    let bytes = some(ctx);
    vm.write(&shared.inside("stays"), bytes.clone()).await?;
    vm.kill().await?;
    shared.holds(ctx, "stays", &bytes, "after kill").await?;
    vm.start().await?;
    ensure!(
        vm.read_file(&shared.inside("stays")).await? == bytes,
        "after another start the file differs"
    );
    drop(vm);
    shared.holds(ctx, "stays", &bytes, "after the machine is gone").await?;
    let next = started(ctx, |config| config.mounts.push(shared.config())).await?;
    ensure!(
        next.read_file(&shared.inside("stays")).await? == bytes,
        "in another machine the file differs"
    );
    Ok(())
}

async fn not_in_snapshots(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    vm.write(&shared.inside("file"), "old").await?;
    vm.write("/tmp/file", "old").await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.write(&shared.inside("file"), "new").await?;
    let restored = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    ensure_eq!(restored.read_to_string("/tmp/file").await?, "old", "the guest's own file");
    ensure_eq!(restored.read_to_string(&shared.inside("file")).await?, "new", "the mounted file");
    restored.write(&shared.inside("file"), "newer").await?;
    ensure_eq!(
        vm.read_to_string(&shared.inside("file")).await?,
        "newer",
        "the mounted file in the source"
    );
    shared.holds(ctx, "file", &"newer".into(), "after the restored machine wrote").await
}

async fn shared_with_forks(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    for child in vm.fork(ForkOptions::new(1)).await? {
        let child = child?;
        child.write(&shared.inside("from-child"), "child").await?;
        ensure_eq!(
            vm.read_to_string(&shared.inside("from-child")).await?,
            "child",
            "in the source"
        );
        vm.write(&shared.inside("from-source"), "source").await?;
        let found = child.read_to_string(&shared.inside("from-source")).await?;
        ensure_eq!(found, "source", "in the child");
    }
    Ok(())
}

async fn io_error(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    let bytes = some(ctx);
    vm.write(&shared.inside("file"), bytes.clone()).await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::MountIo).on(vm.id()))?;
    match ctx.draw(0, 2) {
        0 => {
            let output = vm.sh(&format!("cat {} > /dev/null", shared.inside("file"))).await?;
            ensure!(!output.status.success(), "a program read in spite of the host's error");
        }
        1 => {
            let outcome = vm.read_file(&shared.inside("file")).await;
            ensure_err!(outcome, VmErrorKind::GuestFile { .. }, "a read with an error of the host");
        }
        _ => {
            let outcome = vm.write(&shared.inside("file"), "new").await;
            ensure_err!(
                outcome,
                VmErrorKind::GuestFile { .. },
                "a write with an error of the host"
            );
        }
    }
    ordered.must_have_fired(ctx)?;
    ensure!(
        vm.read_file(&shared.inside("file")).await? == bytes,
        "the file differs after the error"
    );
    works(ctx, &vm, "after an error of the host").await
}

async fn host_full(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    vm.write(&shared.inside("file"), "old").await?;
    let ordered = order(ctx, FaultOrder::next(FaultKind::MountFull).on(vm.id()))?;
    if ctx.one_in(2) {
        let output = vm.sh(&format!("echo new > {}", shared.inside("other"))).await?;
        ensure!(!output.status.success(), "a program wrote to a host without room");
    } else {
        let outcome = vm.write(&shared.inside("file"), "new").await;
        ensure_err!(
            outcome,
            VmErrorKind::GuestFile { error: GuestFileError::OutOfSpace, .. },
            "a write to a host without room"
        );
        ensure_eq!(
            vm.read_to_string(&shared.inside("file")).await?,
            "old",
            "the file that was to be replaced"
        );
    }
    ordered.must_have_fired(ctx)?;
    vm.write(&shared.inside("file"), "new").await?;
    shared.holds(ctx, "file", &"new".into(), "once the host has room").await
}

async fn slow(ctx: &Context) -> Verdict {
    let (vm, shared) = mounted(ctx).await?;
    let bytes = some(ctx);
    let slow = Duration::from_millis(ctx.draw(100, 3000));
    let ordered = order(ctx, FaultOrder::next(FaultKind::MountSlow).on(vm.id()).with_amount(slow))?;
    let begun = ctx.now();
    vm.write(&shared.inside("file"), bytes.clone()).await?;
    ordered.must_have_fired(ctx)?;
    ensure!(ctx.now() - begun >= slow, "a write on a slow host took {:?}", ctx.now() - begun);
    shared.holds(ctx, "file", &bytes, "after a slow write").await
}
