//! The operations of scripts, on real handles.

use super::{
    ears::Ear,
    perform::nothing,
    record::{Outcome, Seen, code, state_name},
    script::{Act, Call, HOME, Program},
};
use crate::context::Context;
use bytes::Bytes;
use futures_util::future::{Either, select};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vm_core::env::timeout;
use vm_trait::{
    CreateDirOptions, ExecOutput, ExecRequest, ExecStatus, FileKind, ForkOptions, GuestProcess,
    OutputOffsets, ProcessId, RemoveOptions, RestoreOptions, Signal, Snapshot, SnapshotOptions,
    StopOptions, TtySize, User, VmConfig, VmExit, VmInstance, VmResult, WriteOptions,
    config::Timeouts,
};

type Vm = Arc<dyn VmInstance>;
type Ids = BTreeMap<u8, ProcessId>;

/// Counts lines, and answers each with its name, the count and the line.
const KEEPER: &str = r#"n=0; while read line; do n=$((n+1)); echo "$0 $n $line"; done"#;

/// The machines and snapshots of a script, by their names.
pub(super) struct Machines {
    timeouts: Timeouts,
    simulated: bool,
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    vms: BTreeMap<u8, Vm>,
    /// What the machines tell of themselves.
    ears: BTreeMap<u8, Ear>,
    /// The ids of the programs that scripts have names for, by machine.
    ids: BTreeMap<u8, Ids>,
    snapshots: BTreeMap<u8, (Snapshot, Ids)>,
    /// Every snapshot that was made, to be removed at the end.
    made: Vec<Snapshot>,
    randoms: BTreeSet<Bytes>,
}

impl Machines {
    pub(super) fn new(ctx: &Context) -> Self {
        let simulated = ctx.is_simulated();
        let span = |simulated_ms, real_s| match simulated {
            true => Duration::from_millis(simulated_ms),
            false => Duration::from_secs(real_s),
        };
        // Short where time is simulated, so that what hangs does not hang for long.
        let mut timeouts = Timeouts::default();
        timeouts.boot = span(10_000, 60);
        timeouts.pause = span(500, 10);
        timeouts.capture = span(5_000, 60);
        timeouts.request = span(800, 10);
        timeouts.link = span(400, 5);
        timeouts.kill = span(2_000, 10);
        Self { timeouts, simulated, held: Mutex::default() }
    }

    /// Gives a span in which any one call must have ended.
    pub(super) fn limit(&self) -> Duration {
        let Timeouts { boot, pause, capture, request, link, kill, .. } = self.timeouts;
        self.program() + boot + capture + request * 2 + link + (pause + kill) * 2 + self.patience()
    }

    pub(super) fn patience(&self) -> Duration {
        Duration::from_secs(if self.simulated { 1 } else { 3 })
    }

    /// Gives how long a program may take that takes no time, unless a fault befalls it.
    fn program(&self) -> Duration {
        Duration::from_secs(if self.simulated { 2 } else { 20 })
    }

    pub(super) fn vm(&self, name: u8) -> Option<Vm> {
        self.held().vms.get(&name).cloned()
    }

    pub(super) fn states(&self) -> BTreeMap<u8, String> {
        let held = self.held();
        held.vms.iter().map(|(name, vm)| (*name, state_name(&vm.state()).to_owned())).collect()
    }

    /// Says what is wrong with what machines have told of themselves so far.
    pub(super) fn misheard(&self) -> Option<String> {
        let held = &mut *self.held();
        let heard = held.vms.iter().zip(held.ears.values_mut());
        let wrong = heard.map(|((name, vm), ear)| Some((name, ear.listen(&vm.state()).err()?)));
        wrong.flatten().map(|(name, wrong)| format!("vm{name} {wrong}")).next()
    }

    /// Kills machines and deletes snapshots; what is left then is for the run to find.
    pub(super) async fn remove_all(&self, ctx: &Context) {
        let held = std::mem::take(&mut *self.held());
        for vm in held.vms.values() {
            let _ = timeout(&**ctx.env(), self.limit(), vm.kill()).await;
        }
        drop(held.vms);
        for snapshot in held.made.iter().rev() {
            let _ = ctx.backend().delete_snapshot(snapshot).await;
        }
    }

    pub(super) async fn act(&self, ctx: &Context, call: &Call, stamp: u32) -> Outcome {
        let done = match &call.act {
            Act::Create => self.create(ctx, call.vm).await,
            Act::Revive { from, resume } => {
                let Some((snapshot, ids)) = self.snapshot(*from) else { return Outcome::Skipped };
                let revived = ctx.backend().restore(&snapshot, restore_options(*resume)).await;
                revived.map(|vm| self.put(call.vm, vm, ids)).map(nothing)
            }
            act if act.is_of_backend() => return self.on_snapshots(ctx, act).await,
            act => {
                let Some(vm) = self.vm(call.vm) else { return Outcome::Skipped };
                return self.on_vm(ctx, (call.vm, vm), act, stamp).await;
            }
        };
        outcome(done)
    }

    async fn create(&self, ctx: &Context, name: u8) -> VmResult<Seen> {
        let mut config = VmConfig::default();
        config.timeouts = self.timeouts.clone();
        let vm = ctx.backend().create(config).await?;
        self.put(name, vm, Ids::new());
        Ok(Seen::Nothing)
    }

    async fn on_vm(&self, ctx: &Context, vm: (u8, Vm), act: &Act, stamp: u32) -> Outcome {
        let (name, vm) = vm;
        let done = match act {
            Act::Forget => {
                let mut held = self.held();
                held.ids.remove(&name);
                let last = (held.vms.remove(&name), held.ears.remove(&name));
                drop(held);
                drop((last, vm));
                Ok(Seen::Nothing)
            }
            Act::Start => {
                self.new_life(name, &vm);
                vm.start().await.map(nothing)
            }
            Act::Stop { grace_ms, signal } => {
                let grace = Duration::from_millis((*grace_ms).into());
                let options = StopOptions::default().with_grace(grace).with_signal(Signal(*signal));
                vm.stop(options).await.map(nothing)
            }
            Act::Kill => vm.kill().await.map(nothing),
            Act::Pause => vm.pause().await.map(nothing),
            Act::Resume => vm.resume().await.map(nothing),
            Act::Wait => Ok(self.wait(ctx, &vm).await),
            Act::WaitReady { timeout_ms } => {
                vm.wait_ready(Duration::from_millis((*timeout_ms).into())).await.map(nothing)
            }
            Act::Inspect => vm.inspect().await.map(nothing),
            Act::Metrics => vm.metrics().await.map(nothing),
            Act::Snapshot { into, tracked, base } => {
                let mut options = SnapshotOptions::default();
                options.tracked = *tracked;
                if let Some(base) = base {
                    let Some((base, _)) = self.snapshot(*base) else { return Outcome::Skipped };
                    options = options.on_base(&base);
                }
                let ids = self.held().ids.get(&name).cloned().unwrap_or_default();
                vm.snapshot(options).await.map(|taken| self.keep(*into, taken, ids)).map(nothing)
            }
            Act::Restore { from, resume } => {
                let Some((snapshot, ids)) = self.snapshot(*from) else { return Outcome::Skipped };
                self.new_life(name, &vm);
                let restored = vm.restore(&snapshot, restore_options(*resume)).await;
                if restored.is_ok() {
                    self.held().ids.insert(name, ids);
                }
                restored.map(nothing)
            }
            Act::Fork { into } => self.fork((name, &vm), into).await,
            Act::Spawn { .. } | Act::Ask { .. } | Act::Reap { .. } | Act::Processes => {
                self.on_processes((name, &vm), act, stamp).await
            }
            act => self.in_guest(ctx, &vm, act).await,
        };
        outcome(done)
    }

    async fn fork(&self, (name, vm): (u8, &Vm), into: &[u8]) -> VmResult<Seen> {
        let ids = self.held().ids.get(&name).cloned().unwrap_or_default();
        let count = u32::try_from(into.len()).unwrap_or(u32::MAX);
        let children = vm.fork(ForkOptions::new(count)).await?;
        let mut told = Vec::new();
        for (child, name) in children.into_iter().zip(into) {
            told.push(match child {
                Ok(child) => {
                    self.put(*name, child, ids.clone());
                    None
                }
                Err(error) => Some(code(error.kind())),
            });
        }
        Ok(Seen::Children(told))
    }

    async fn wait(&self, ctx: &Context, vm: &Vm) -> Seen {
        let a_while = Duration::from_millis(if self.simulated { 50 } else { 200 });
        let text = match timeout(&**ctx.env(), a_while, vm.wait()).await {
            Ok(VmExit::Stopped) => "stopped",
            Ok(VmExit::PoweredOff) => "powered off",
            Ok(VmExit::Crashed(_)) => "crashed",
            Ok(_) => "ended in another way",
            Err(_) => "no end yet",
        };
        Seen::Text(text.to_owned())
    }

    async fn in_guest(&self, ctx: &Context, vm: &Vm, act: &Act) -> VmResult<Seen> {
        let at = |path: &str| located(ctx, vm, path);
        match act {
            Act::Ping => vm.ping().await.map(nothing),
            Act::Exec { program, timeout_ms, output_limit } => {
                self.exec(ctx, vm, program, (*timeout_ms, *output_limit)).await
            }
            Act::Read { path } => {
                vm.read_file(&at(path)).await.map(|bytes| Seen::Text(text(&bytes)))
            }
            Act::Write { path, text, times, mode } => {
                let options = WriteOptions { mode: mode.map(u32::from) };
                vm.write_file(&at(path), repeated(text, *times), options).await.map(nothing)
            }
            Act::Stat { path } => {
                let stat = vm.stat(&at(path)).await?;
                // What a directory takes up is the file system's business.
                let size = if stat.kind == FileKind::Directory { 0 } else { stat.size };
                Ok(Seen::Stat(kind_name(stat.kind).to_owned(), size, stat.mode))
            }
            Act::List { path } => {
                let entries = vm.list_dir(&at(path)).await?;
                let name =
                    |entry: vm_trait::DirEntry| (entry.name, kind_name(entry.kind).to_owned());
                Ok(Seen::Names(entries.into_iter().map(name).collect()))
            }
            Act::MakeDir { path, recursive, mode } => {
                let mode = mode.map(u32::from);
                let options = CreateDirOptions { recursive: *recursive, mode };
                vm.create_dir(&at(path), options).await.map(nothing)
            }
            Act::Remove { path, recursive } => {
                vm.remove(&at(path), RemoveOptions { recursive: *recursive }).await.map(nothing)
            }
            Act::Rename { from, to } => vm.rename(&at(from), &at(to)).await.map(nothing),
            Act::Connect { port } => vm.connect(*port).await.map(nothing),
            Act::Listen { port } => vm.listen(*port).await.map(nothing),
            Act::Exchange { port, text, times } => {
                self.exchange(ctx, vm, *port, repeated(text, *times)).await
            }
            _ => {
                let request = ExecRequest::new("head").args(["-c", "16", "/dev/urandom"]);
                let drawn = vm.exec(request.timeout(self.program())).await?;
                let whole = drawn.stdout.len() == 16;
                let new = whole && self.held().randoms.insert(drawn.stdout);
                let text = if new {
                    "new"
                } else if whole {
                    "drawn before"
                } else {
                    "none"
                };
                Ok(Seen::Text(text.to_owned()))
            }
        }
    }

    async fn exec(
        &self,
        ctx: &Context,
        vm: &Vm,
        program: &Program,
        (timeout_ms, output_limit): (Option<u32>, Option<u32>),
    ) -> VmResult<Seen> {
        let sh = |script: String| ExecRequest::new("sh").args(["-c".to_owned(), script]);
        let mut request = match program {
            Program::Echo(text) => ExecRequest::new("echo").arg(text),
            Program::Exit(code) => sh(format!("exit {code}")),
            Program::KillItself(signal) => sh(format!("kill -{signal} $$")),
            Program::Cat(path) => ExecRequest::new("cat").arg(located(ctx, vm, path)),
            Program::CatIn { dir, name } => {
                ExecRequest::new("cat").arg(name).cwd(located(ctx, vm, dir))
            }
            Program::Mirror { text, times } => {
                ExecRequest::new("cat").stdin(repeated(text, *times))
            }
            Program::Say(word) => sh(r#"echo "$WORD""#.to_owned()).env("WORD", word),
            Program::Terminal { rows, cols } => {
                ExecRequest::new("stty").arg("size").tty(TtySize { rows: *rows, cols: *cols })
            }
            Program::RunAs { uid, gid } => {
                sh("id -u; id -g".to_owned()).user(User::Ids { uid: *uid, gid: *gid })
            }
            Program::Sleep(ms) => {
                ExecRequest::new("sleep").arg(format!("{}.{:03}", ms / 1000, ms % 1000))
            }
            Program::Missing => ExecRequest::new("no-program-has-this-name"),
            Program::NoName => ExecRequest::new(""),
            Program::PowerOff => ExecRequest::new("poweroff").arg("-f"),
        };
        let limit = timeout_ms.map(|limit| Duration::from_millis(limit.into()));
        request = request.timeout(limit.unwrap_or_else(|| self.program()));
        if let Some(bytes) = output_limit {
            request = request.output_limit(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        let output = vm.exec(request).await;
        if *program == Program::PowerOff {
            let limit = self.timeouts.kill;
            let gone = async { vm.wait().await };
            let _ = timeout(&**ctx.env(), limit, gone).await;
        }
        Ok(ran(&output?))
    }

    /// Takes the stream of a program that sends `bytes` and prints what comes back, and sends back what came.
    async fn exchange(&self, ctx: &Context, vm: &Vm, port: u32, bytes: Bytes) -> VmResult<Seen> {
        let mut listener = vm.listen(port).await?;
        let request = ExecRequest::new("vsock").args(["connect", &port.to_string()]);
        let request = request.stdin(bytes.clone()).timeout(self.program());
        let mut host = pin!(async {
            let mut stream = listener.accept().await.map_err(io::Error::other)?;
            let mut came = Vec::new();
            stream.read_to_end(&mut came).await?;
            stream.write_all(&came).await?;
            stream.shutdown().await?;
            io::Result::Ok(came)
        });
        let (output, came) = match select(pin!(vm.exec(request)), host.as_mut()).await {
            Either::Left((output, _)) => {
                let output = output?;
                (output, timeout(&**ctx.env(), self.program(), host).await.ok())
            }
            Either::Right((came, exec)) => (exec.await?, Some(came)),
        };
        match came {
            Some(Ok(came)) if came == bytes => Ok(ran(&output)),
            Some(Ok(came)) => {
                Ok(Seen::Text(format!("{} of {} bytes came", came.len(), bytes.len())))
            }
            Some(Err(_)) => Ok(Seen::Text("the stream broke".to_owned())),
            None => Ok(Seen::Text("the stream did not end".to_owned())),
        }
    }

    async fn on_processes(&self, vm: (u8, &Vm), act: &Act, stamp: u32) -> VmResult<Seen> {
        let (name, vm) = vm;
        let id = |process: &u8| {
            let held = self.held();
            let known = held.ids.get(&name).and_then(|ids| ids.get(process)).copied();
            known.unwrap_or(ProcessId(u64::MAX - u64::from(*process)))
        };
        match act {
            Act::Spawn { process, nonce } => {
                let args = ["-c".to_owned(), KEEPER.to_owned(), format!("nonce-{nonce}")];
                let spawned = vm.spawn(ExecRequest::new("sh").args(args).open_stdin()).await?;
                let id = spawned.detach().await?;
                self.held().ids.entry(name).or_default().insert(*process, id);
                Ok(Seen::Nothing)
            }
            Act::Ask { process } => {
                let process = vm.attach_process(id(process), OutputOffsets::default()).await?;
                ask(process, stamp).await
            }
            Act::Reap { process, signal } => {
                let process = vm.attach_process(id(process), OutputOffsets::default()).await?;
                process.signal(Signal(*signal)).await?;
                Ok(Seen::Text(status(process.wait().await?)))
            }
            _ => {
                let running: BTreeSet<_> = vm
                    .processes()
                    .await?
                    .into_iter()
                    .filter(|process| process.status.is_none())
                    .map(|process| process.id)
                    .collect();
                let held = self.held();
                let known = held.ids.get(&name).into_iter().flatten();
                let running = known.filter(|(_, id)| running.contains(*id)).map(|(name, _)| *name);
                Ok(Seen::Processes(running.collect()))
            }
        }
    }

    async fn on_snapshots(&self, ctx: &Context, act: &Act) -> Outcome {
        let (Act::Carry { from, .. }
        | Act::Spoil { from, .. }
        | Act::Merge { from, .. }
        | Act::Delete { snapshot: from }) = act
        else {
            return Outcome::Skipped;
        };
        let Some((snapshot, ids)) = self.snapshot(*from) else { return Outcome::Skipped };
        let backend = ctx.backend();
        let done = match act {
            Act::Merge { into, .. } => {
                let merged = backend.merge_snapshot(&snapshot, None).await;
                merged.map(|merged| self.keep(*into, merged, ids)).map(nothing)
            }
            Act::Delete { .. } => backend.delete_snapshot(&snapshot).await.map(nothing),
            _ => match backend.export_snapshot(&snapshot).await {
                Ok(bytes) => self.import(ctx, act, bytes, ids).await,
                Err(error) => Err(error),
            },
        };
        outcome(done)
    }

    async fn import(&self, ctx: &Context, act: &Act, bytes: Bytes, ids: Ids) -> VmResult<Seen> {
        match act {
            Act::Carry { into, .. } => {
                let imported = ctx.backend().import_snapshot(bytes).await?;
                self.keep(*into, imported, ids);
            }
            Act::Spoil { at, .. } => {
                let mut bytes = bytes.to_vec();
                let length = bytes.len().max(1);
                if let Some(byte) = bytes.get_mut(usize::try_from(*at).unwrap_or(0) % length) {
                    *byte ^= 0x10;
                }
                let imported = ctx.backend().import_snapshot(bytes.into()).await?;
                self.held().made.push(imported);
            }
            _ => {}
        }
        Ok(Seen::Nothing)
    }

    fn new_life(&self, name: u8, vm: &Vm) {
        if !vm.state().has_machine() {
            self.held().ids.remove(&name);
        }
    }

    fn put(&self, name: u8, vm: Vm, ids: Ids) {
        let mut held = self.held();
        held.ids.insert(name, ids);
        let ear = Ear::new(&*vm);
        let before = (held.ears.insert(name, ear), held.vms.insert(name, vm));
        drop(held);
        drop(before);
    }

    fn keep(&self, name: u8, snapshot: Snapshot, ids: Ids) {
        let mut held = self.held();
        held.made.push(snapshot.clone());
        held.snapshots.insert(name, (snapshot, ids));
    }

    fn snapshot(&self, name: u8) -> Option<(Snapshot, Ids)> {
        self.held().snapshots.get(&name).cloned()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends a line that nobody else sends, and reads up to its answer.
async fn ask(process: GuestProcess, stamp: u32) -> VmResult<Seen> {
    let question = format!("question-{stamp}");
    process.write_stdin(format!("{question}\n")).await?;
    let mut seen = Vec::new();
    let mut answer = None;
    while answer.is_none() {
        let Some(bytes) = process.read_stdout().await? else { break };
        seen.extend_from_slice(&bytes);
        let heard = String::from_utf8_lossy(&seen);
        let whole = heard.rfind('\n').map_or("", |end| &heard[..end]);
        let line = whole.lines().find_map(|line| line.strip_suffix(&question));
        answer = line.map(|line| line.trim_end().to_owned());
    }
    match answer {
        Some(answer) => {
            process.detach().await?;
            Ok(Seen::Text(answer))
        }
        None => Ok(Seen::Text("the program has ended".to_owned())),
    }
}

fn located(ctx: &Context, vm: &Vm, path: &str) -> String {
    match path.strip_prefix(HOME) {
        Some(rest) => format!("{}{rest}", ctx.scratch(&**vm)),
        None => path.to_owned(),
    }
}

fn restore_options(resume: bool) -> RestoreOptions {
    if resume { RestoreOptions::running() } else { RestoreOptions::paused() }
}

fn outcome(done: VmResult<Seen>) -> Outcome {
    match done {
        Ok(seen) => Outcome::Ok(seen),
        Err(error) => Outcome::of_error(&error),
    }
}

fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "link",
        _ => "other",
    }
}

fn status(status: ExecStatus) -> String {
    match status {
        ExecStatus::Exited(code) => format!("exited {code}"),
        ExecStatus::Signaled(signal) => format!("killed by {signal}"),
        ExecStatus::TimedOut => "timed out".to_owned(),
    }
}

fn ran(output: &ExecOutput) -> Seen {
    let stdout = text(&output.stdout);
    Seen::Ran { status: status(output.status), stdout, dropped: output.stdout_dropped }
}

fn repeated(text: &str, times: u32) -> Bytes {
    text.repeat(usize::try_from(times).unwrap_or(0)).into()
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
