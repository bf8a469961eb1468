//! Honesty: what a backend does not claim must answer `Unsupported`.
//!
//! These clauses stand in for the ones that a backend leaves out because it lacks a capability: one for each
//! capability that has operations of its own.

use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_err,
};
use bytes::Bytes;
use std::{path::PathBuf, sync::Arc, time::Duration};
use vm_trait::{
    Capability, CreateDirOptions, DiskConfig, ExecRequest, ForkOptions, KernelConfig, Limit, Mib,
    MountConfig, NetworkConfig, OutputOffsets, ProcessId, RemoveOptions, Resource, RestoreOptions,
    RootConfig, Snapshot, SnapshotId, SnapshotMetadata, SnapshotOptions, TtySize, User, VmConfig,
    VmErrorKind, VmId, VmInstance, VmResult, WriteOptions,
};

/// Lists the clauses, each with the capability whose absence it binds to.
pub const CLAUSES: &[(Capability, Clause)] = &[
    (
        Capability::Exec,
        clause!(
            no_exec,
            "honesty.exec",
            "without `exec`: exec, spawn, attach_process and processes are Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Files,
        clause!(
            no_files,
            "honesty.files",
            "without `files`: every file operation is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Tty,
        clause!(no_tty, "honesty.tty", "without `tty`: a program with a terminal is Unsupported", [], faults: []),
    ),
    (
        Capability::Users,
        clause!(
            no_users,
            "honesty.users",
            "without `users`: a program for another user is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Pause,
        clause!(no_pause, "honesty.pause", "without `pause`: pause and resume are Unsupported", [], faults: []),
    ),
    (
        Capability::Snapshot,
        clause!(
            no_snapshot,
            "honesty.snapshot",
            "without `snapshot`: snapshot, restore, export, import and delete are Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::RestoreInPlace,
        clause!(
            no_restore_in_place,
            "honesty.restore_in_place",
            "without `restore_in_place`: restore of a machine is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Fork,
        clause!(no_fork, "honesty.fork", "without `fork`: fork is Unsupported", [], faults: []),
    ),
    (
        Capability::Disks,
        clause!(no_disks, "honesty.disks", "without `disks`: a machine with a disk is Unsupported", [], faults: []),
    ),
    (
        Capability::Console,
        clause!(no_console, "honesty.console", "without `console`: the console is empty", [], faults: []),
    ),
    (
        Capability::Vsock,
        clause!(no_vsock, "honesty.vsock", "without `vsock`: connect and listen are Unsupported", [], faults: []),
    ),
    (
        Capability::Root,
        clause!(
            no_root,
            "honesty.root",
            "without `root`: a machine with a root of the user's choice is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Kernel,
        clause!(
            no_kernel,
            "honesty.kernel",
            "without `kernel`: a machine with a kernel, initial RAM disk or command line of the user's is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::ConsoleFile,
        clause!(
            no_console_file,
            "honesty.console_file",
            "without `console_file`: a machine whose console goes to a file is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Inspect,
        clause!(no_inspect, "honesty.inspect", "without `inspect`: inspect is Unsupported", [], faults: []),
    ),
    (
        Capability::IncrementalSnapshot,
        clause!(
            no_incremental,
            "honesty.incremental_snapshot",
            "without `incremental_snapshot`: tracked snapshots and restores, bases and merges are Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Mounts,
        clause!(
            no_mounts,
            "honesty.mounts",
            "without `mounts`: a machine with a directory of the host is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::Limits,
        clause!(
            no_limits,
            "honesty.limits",
            "without `limits`: a machine with a limit on its programs is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::NetworkTsi,
        clause!(
            no_tsi,
            "honesty.network_tsi",
            "without `network_tsi`: a machine with that network is Unsupported",
            [],
            faults: []
        ),
    ),
    (
        Capability::NetworkPasst,
        clause!(
            no_passt,
            "honesty.network_passt",
            "without `network_passt`: a machine with that network is Unsupported",
            [],
            faults: []
        ),
    ),
];

async fn lacking(ctx: &Context, capability: Capability) -> Result<Arc<dyn VmInstance>, Broken> {
    ensure!(!ctx.has(capability), "the backend claims `{capability}`");
    let vm = ctx.running().await?;
    ensure!(!vm.capabilities().has(capability), "the machine claims `{capability}`");
    Ok(vm)
}

#[track_caller]
fn unsupported<T>(what: &str, result: VmResult<T>) -> Verdict {
    ensure_err!(result, VmErrorKind::Unsupported { .. }, "{what} should be Unsupported");
    Ok(())
}

async fn no_exec(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Exec).await?;
    let request = || ExecRequest::new("true").timeout(Duration::from_secs(5));
    unsupported("exec", vm.exec(request()).await)?;
    unsupported("spawn", vm.spawn(request()).await)?;
    let id = ProcessId(ctx.draw(0, 9));
    unsupported("attach_process", vm.attach_process(id, OutputOffsets::default()).await)?;
    unsupported("processes", vm.processes().await)
}

async fn no_files(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Files).await?;
    let path = format!("{}/honest-{}", ctx.scratch(&*vm), ctx.draw(0, 999));
    unsupported("read_file", vm.read_file(&path).await)?;
    let bytes = ctx.bytes(ctx.index(64));
    unsupported("write_file", vm.write_file(&path, bytes, WriteOptions::default()).await)?;
    unsupported("stat", vm.stat(&path).await)?;
    unsupported("list_dir", vm.list_dir(&path).await)?;
    unsupported("create_dir", vm.create_dir(&path, CreateDirOptions::default()).await)?;
    unsupported("remove", vm.remove(&path, RemoveOptions::default()).await)?;
    unsupported("rename", vm.rename(&path, &format!("{path}-2")).await)
}

async fn no_tty(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Tty).await?;
    let request = || ExecRequest::new("true").tty(TtySize { rows: 24, cols: 80 });
    unsupported("exec with a terminal", vm.exec(request()).await)?;
    unsupported("spawn with a terminal", vm.spawn(request()).await)
}

async fn no_users(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Users).await?;
    for user in [User::Ids { uid: 4711, gid: 4711 }, User::Name("nobody".to_owned())] {
        let request = || ExecRequest::new("true").user(user.clone());
        unsupported("exec as another user", vm.exec(request()).await)?;
        unsupported("spawn as another user", vm.spawn(request()).await)?;
    }
    Ok(())
}

async fn no_pause(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Pause).await?;
    unsupported("pause", vm.pause().await)?;
    unsupported("resume", vm.resume().await)
}

async fn no_snapshot(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Snapshot).await?;
    unsupported("snapshot", vm.snapshot(SnapshotOptions::default()).await)?;
    let made_up = made_up_snapshot(ctx, vm.id());
    for options in [RestoreOptions::paused(), RestoreOptions::running()] {
        unsupported("restore", ctx.backend().restore(&made_up, options).await)?;
    }
    unsupported("export_snapshot", ctx.backend().export_snapshot(&made_up).await)?;
    let bytes: Bytes = ctx.bytes(ctx.index(4096));
    unsupported("import_snapshot", ctx.backend().import_snapshot(bytes).await)?;
    unsupported("delete_snapshot", ctx.backend().delete_snapshot(&made_up).await)
}

async fn no_restore_in_place(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::RestoreInPlace).await?;
    let vm = ctx.created().await?;
    let made_up = made_up_snapshot(ctx, vm.id());
    unsupported("restore in place", vm.restore(&made_up, RestoreOptions::paused()).await)
}

async fn no_fork(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Fork).await?;
    let count = u32::try_from(ctx.draw(1, 4)).unwrap_or(1);
    unsupported("fork", vm.fork(ForkOptions::new(count)).await)
}

async fn no_disks(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::Disks).await?;
    let path = std::env::temp_dir().join(format!("no-disk-{:x}", ctx.draw(0, u64::MAX)));
    let config = VmConfig::builder().with_disk(DiskConfig::new(&path, "/data")).build()?;
    unsupported("create with a disk", ctx.backend().create(config).await)?;
    ensure!(!path.exists(), "a disk was made at {}", path.display());
    Ok(())
}

async fn no_console(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Console).await?;
    let console = vm.console();
    ensure!(console.is_empty(), "the console holds {} bytes", console.len());
    Ok(())
}

async fn no_vsock(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Vsock).await?;
    let port = u32::try_from(ctx.draw(1_025, 1 << 30)).unwrap_or(5_000);
    unsupported("connect", vm.connect(port).await)?;
    unsupported("listen", vm.listen(port).await)
}

async fn no_root(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::Root).await?;
    let path = std::env::temp_dir();
    let roots = [
        RootConfig::directory(&path),
        RootConfig::image(&path),
        RootConfig::default().with_read_only(true),
    ];
    for root in roots {
        let config = VmConfig::builder().with_root(root).build()?;
        unsupported("create with a root", ctx.backend().create(config).await)?;
    }
    Ok(())
}

async fn no_kernel(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::Kernel).await?;
    let path = std::env::temp_dir().join("vmlinux");
    let kernels = [
        KernelConfig::default().with_path(&path),
        KernelConfig::default().with_initrd(&path),
        KernelConfig::default().with_cmdline("quiet"),
    ];
    for kernel in kernels {
        let config = VmConfig::builder().with_kernel(kernel).build()?;
        unsupported("create with a kernel", ctx.backend().create(config).await)?;
    }
    Ok(())
}

async fn no_console_file(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::ConsoleFile).await?;
    let path = std::env::temp_dir().join(format!("no-console-{:x}", ctx.draw(0, u64::MAX)));
    let config = VmConfig::builder().with_console_file(&path).build()?;
    unsupported("create with a console file", ctx.backend().create(config).await)?;
    ensure!(!path.exists(), "a console file was made at {}", path.display());
    Ok(())
}

async fn no_inspect(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::Inspect).await?;
    unsupported("inspect", vm.inspect().await)
}

async fn no_incremental(ctx: &Context) -> Verdict {
    let vm = lacking(ctx, Capability::IncrementalSnapshot).await?;
    let base = made_up_snapshot(ctx, vm.id());
    let options = SnapshotOptions::default();
    unsupported("a tracked snapshot", vm.snapshot(options.clone().tracked()).await)?;
    unsupported("a snapshot on a base", vm.snapshot(options.on_base(&base)).await)?;
    let tracked = RestoreOptions::running().tracked();
    unsupported("a tracked restore", ctx.backend().restore(&base, tracked).await)?;
    let other = ctx.created().await?;
    unsupported("a tracked restore in place", other.restore(&base, tracked).await)?;
    unsupported("merge_snapshot", ctx.backend().merge_snapshot(&base, None).await)
}

async fn no_mounts(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::Mounts).await?;
    let read_only = ctx.one_in(2);
    let mount = MountConfig::new(std::env::temp_dir(), "/mounted").with_read_only(read_only);
    let config = VmConfig::builder().with_mount(mount).build()?;
    unsupported("create with a mount", ctx.backend().create(config).await)?;
    let root = RootConfig::shared(std::env::temp_dir()).with_read_only(read_only);
    let config = VmConfig::builder().with_root(root).build()?;
    unsupported("create with a shared root", ctx.backend().create(config).await)
}

async fn no_limits(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::Limits).await?;
    let resource = ctx.pick(Resource::ALL);
    let config = VmConfig::builder().with_limit(resource, Limit::of(1 << 20)).build()?;
    unsupported("create with a limit", ctx.backend().create(config).await)
}

async fn no_tsi(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::NetworkTsi).await?;
    no_network(ctx, NetworkConfig::tsi()).await
}

async fn no_passt(ctx: &Context) -> Verdict {
    lacking(ctx, Capability::NetworkPasst).await?;
    no_network(ctx, NetworkConfig::passt()).await
}

async fn no_network(ctx: &Context, network: NetworkConfig) -> Verdict {
    let port = u16::try_from(ctx.draw(1, 65_535)).unwrap_or(1);
    for network in [network.clone(), network.with_port(port, 80)] {
        let config = VmConfig::builder().with_network(network).build()?;
        unsupported("create with a network", ctx.backend().create(config).await)?;
    }
    Ok(())
}

fn made_up_snapshot(ctx: &Context, vm: VmId) -> Snapshot {
    let metadata = SnapshotMetadata {
        id: SnapshotId(ctx.draw(0, u64::MAX)),
        vm,
        backend: ctx.backend().name().to_owned(),
        taken_at: Duration::ZERO,
        arch: std::env::consts::ARCH.to_owned(),
        vcpus: 1,
        memory: Mib(128),
        label: None,
        base: None,
    };
    Snapshot::new(PathBuf::from("/nowhere/made-up.snapshot"), metadata)
}
