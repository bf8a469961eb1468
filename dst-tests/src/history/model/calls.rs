//! How operations go where nothing disturbs them.

use super::{
    super::{
        record::{Outcome, Seen},
        script::{Act, Call, Program},
    },
    Want,
    files::{FileResult, Node, is_valid, repeated},
    worlds::{Guest, Keeper, Machine, Stage, Taken, World},
};
use std::collections::BTreeSet;
use vm_trait::{Capabilities, Capability};

type Ways = Vec<(Want, World)>;

/// The guest's port of the agent.
const AGENT_PORT: u32 = 1024;

impl World {
    /// Gives every way in which a call may go from here, each with the world that it leads to.
    pub(super) fn regular(&self, call: &Call, capabilities: Capabilities) -> Ways {
        let Call { vm, act, .. } = call;
        if act.is_of_backend() {
            return self.on_snapshots(act, capabilities);
        }
        match act {
            Act::Create => {
                let mut after = self.clone();
                after.vms.insert(*vm, Machine::new(Stage::Created, Guest::default()));
                return vec![(ok(Seen::Nothing), after)];
            }
            Act::Revive { from, resume } => return self.revive(*vm, *from, *resume),
            _ => {}
        }
        let Some(machine) = self.vms.get(vm) else { return self.skipped() };
        let lacks = needed(act).iter().any(|need| !capabilities.has(*need));
        let mut ways = Vec::new();
        if lacks {
            ways.push((Want::Fails("unsupported"), self.clone()));
        }
        if !admits(machine.stage, act) {
            let code = format!("invalid_state:{}", machine.stage.name());
            ways.push((Want::Is(Outcome::Failed(code)), self.clone()));
        }
        if let Some(want) = refused(act) {
            ways.push((want, self.clone()));
        }
        if let Act::Restore { from, .. } = act
            && self.names.get(from).is_none_or(|id| !self.is_whole(*id))
        {
            return self.restored_of_nothing(*vm, *from, ways);
        }
        if let Act::Snapshot { base: Some(base), .. } = act
            && !self.names.contains_key(base)
        {
            return self.skipped();
        }
        if !ways.is_empty() {
            return ways;
        }
        match act {
            act if act.asks_guest() => self.in_guest(*vm, machine, act),
            act => self.on_machine(*vm, machine, act),
        }
    }

    fn skipped(&self) -> Ways {
        vec![(Want::Is(Outcome::Skipped), self.clone())]
    }

    fn changed(&self, vm: u8, change: impl FnOnce(&mut Machine)) -> Self {
        let mut world = self.clone();
        if let Some(machine) = world.vms.get_mut(&vm) {
            change(machine);
        }
        world
    }

    fn on_machine(&self, vm: u8, machine: &Machine, act: &Act) -> Ways {
        let lives = machine.stage.has_machine();
        let done = |world: Self| vec![(ok(Seen::Nothing), world)];
        match act {
            Act::Forget => {
                let mut world = self.clone();
                world.vms.remove(&vm);
                done(world)
            }
            Act::Start => done(self.changed(vm, |machine| machine.end(Stage::Running))),
            Act::Stop { .. } | Act::Kill if lives => {
                done(self.changed(vm, |machine| machine.end(Stage::Stopped)))
            }
            Act::Pause => done(self.changed(vm, |machine| machine.stage = Stage::Paused)),
            Act::Resume => done(self.changed(vm, |machine| machine.stage = Stage::Running)),
            Act::Wait => {
                let ends: &[&str] = match machine.stage {
                    Stage::Stopped => &["stopped", "powered off"],
                    Stage::Crashed => &["crashed"],
                    _ => &["no end yet"],
                };
                let told = ends.iter().map(|end| (ok(Seen::Text((*end).to_owned())), self.clone()));
                told.collect()
            }
            Act::WaitReady { .. } if machine.stage != Stage::Running => {
                vec![(Want::Is(Outcome::Failed("timeout".to_owned())), self.clone())]
            }
            Act::Snapshot { into, tracked, base } => {
                self.capture((vm, machine), *into, *tracked, *base)
            }
            Act::Restore { from, resume } => match self.copy_of(*from, *resume) {
                Some(copy) => done(self.changed(vm, |machine| *machine = copy)),
                None => self.skipped(),
            },
            Act::Fork { into } => {
                let all = vec![None; into.len()];
                let made = self.with_children(vm, act, &all);
                made.into_iter().map(|world| (ok(Seen::Children(all.clone())), world)).collect()
            }
            _ => done(self.clone()),
        }
    }

    fn capture(
        &self,
        (vm, machine): (u8, &Machine),
        into: u8,
        tracked: bool,
        base: Option<u8>,
    ) -> Ways {
        let base = base.and_then(|base| self.names.get(&base).copied());
        let is_tracked = |base: u32| {
            let twin = self.taken.get(base as usize).and_then(|taken| taken.twin);
            machine.tracked.contains(&twin.unwrap_or(base))
        };
        if base.is_some_and(|base| !is_tracked(base)) {
            let code = "invalid_config:base".to_owned();
            return vec![(Want::Is(Outcome::Failed(code)), self.clone())];
        }
        let mut world = self.clone();
        let guest = machine.guest.clone();
        let taken = Taken { guest, base, twin: None, deleted: false, under_way: BTreeSet::new() };
        let id = world.take(into, taken);
        if let Some(machine) = world.vms.get_mut(&vm).filter(|_| tracked || base.is_some()) {
            machine.track(id);
        }
        match base.is_some_and(|base| !self.is_whole(base)) {
            // Whether a base that is gone is missed now or when it is needed is not promised.
            true => vec![(Want::Succeeds, world), (Want::Fails(""), self.clone())],
            false => vec![(ok(Seen::Nothing), world)],
        }
    }

    /// Gives the machine that a snapshot holds.
    fn copy_of(&self, from: u8, resume: bool) -> Option<Machine> {
        let taken = self.taken.get(*self.names.get(&from)? as usize)?;
        let stage = if resume { Stage::Running } else { Stage::Paused };
        let mut machine = Machine::new(stage, taken.guest.clone());
        machine.late = taken.under_way.clone();
        Some(machine)
    }

    fn revive(&self, vm: u8, from: u8, resume: bool) -> Ways {
        let Some(id) = self.names.get(&from) else { return self.skipped() };
        if !self.is_whole(*id) {
            return vec![(Want::Fails(""), self.clone())];
        }
        let mut world = self.clone();
        world.vms.extend(self.copy_of(from, resume).map(|copy| (vm, copy)));
        vec![(ok(Seen::Nothing), world)]
    }

    /// Tells how a restore goes of a snapshot that is not there, or not whole.
    fn restored_of_nothing(&self, vm: u8, from: u8, mut ways: Ways) -> Ways {
        if !self.names.contains_key(&from) {
            return self.skipped();
        }
        if ways.is_empty() {
            ways.push((Want::Fails(""), self.clone()));
            ways.extend(self.with_stage(vm, Stage::Stopped).map(|it| (Want::Fails(""), it)));
        }
        ways
    }

    fn on_snapshots(&self, act: &Act, capabilities: Capabilities) -> Ways {
        let (Act::Carry { from, .. }
        | Act::Spoil { from, .. }
        | Act::Merge { from, .. }
        | Act::Delete { snapshot: from }) = act
        else {
            return self.skipped();
        };
        let Some(id) = self.names.get(from).copied() else { return self.skipped() };
        let Some(taken) = self.taken.get(id as usize) else { return self.skipped() };
        let mut after = self.clone();
        match act {
            Act::Merge { .. } if !capabilities.has(Capability::IncrementalSnapshot) => {
                vec![(Want::Fails("unsupported"), after)]
            }
            Act::Delete { .. } => {
                after.taken[id as usize].deleted = true;
                match taken.deleted {
                    true => vec![(Want::Fails(""), after.clone()), (Want::Succeeds, after)],
                    false => vec![(ok(Seen::Nothing), after)],
                }
            }
            _ if !self.is_whole(id) => vec![(Want::Fails(""), after)],
            Act::Spoil { .. } => {
                vec![
                    (Want::Fails("snapshot_corrupt"), after.clone()),
                    (Want::Fails("snapshot_incompatible"), after),
                ]
            }
            Act::Carry { into, .. } | Act::Merge { into, .. } => {
                // What is exported of a chain is another file, as what is merged is.
                let copied = matches!(act, Act::Carry { .. }) && taken.base.is_none();
                let twin = copied.then(|| taken.twin.unwrap_or(id));
                let whole = Taken { base: None, twin, deleted: false, ..taken.clone() };
                after.take(*into, whole);
                vec![(ok(Seen::Nothing), after)]
            }
            _ => self.skipped(),
        }
    }

    fn in_guest(&self, vm: u8, machine: &Machine, act: &Act) -> Ways {
        let same = |want| vec![(want, self.clone())];
        let text = |text: &str| ok(Seen::Text(text.to_owned()));
        match act {
            Act::Exec { program, timeout_ms, output_limit } => {
                if *program == Program::PowerOff {
                    let off = self.with_stage(vm, Stage::Stopped);
                    return off
                        .into_iter()
                        .flat_map(|off| [(Want::Succeeds, off.clone()), (Want::Fails(""), off)])
                        .collect();
                }
                same(ran(&machine.guest, program, *timeout_ms, *output_limit))
            }
            Act::Exchange { text, times, .. } => {
                let stdout = repeated(text, *times);
                same(ok(Seen::Ran { status: "exited 0".to_owned(), stdout, dropped: 0 }))
            }
            Act::Connect { .. } => same(Want::Is(Outcome::Failed("connect_refused".to_owned()))),
            Act::Random => same(text("new")),
            Act::Spawn { .. } | Act::Ask { .. } | Act::Reap { .. } | Act::Processes => {
                self.on_keepers(vm, &machine.guest, act)
            }
            Act::Read { .. }
            | Act::Write { .. }
            | Act::Stat { .. }
            | Act::List { .. }
            | Act::MakeDir { .. }
            | Act::Remove { .. }
            | Act::Rename { .. } => {
                let mut files = machine.guest.files.clone();
                let want = match on_files(&mut files, act) {
                    Ok(seen) => ok(seen),
                    Err(error) => Want::Is(Outcome::Failed(format!("guest_file:{error}"))),
                };
                vec![(want, self.changed(vm, |machine| machine.guest.files = files))]
            }
            _ => same(ok(Seen::Nothing)),
        }
    }

    fn on_keepers(&self, vm: u8, guest: &Guest, act: &Act) -> Ways {
        let same = |want| vec![(want, self.clone())];
        let nobody = || same(Want::Is(Outcome::Failed("exec_failed:NoSuchProcess".to_owned())));
        let mut ways = match act {
            Act::Spawn { process, nonce } => {
                let keeper = Keeper { nonce: *nonce, asked: 0 };
                let world = self.changed(vm, |machine| {
                    machine.guest.keepers.insert(*process, keeper);
                });
                vec![(ok(Seen::Nothing), world)]
            }
            Act::Ask { process } => {
                let Some(keeper) = guest.keepers.get(process).copied() else { return nobody() };
                let answer = format!("nonce-{} {}", keeper.nonce, keeper.asked + 1);
                let world = self.changed(vm, |machine| {
                    if let Some(keeper) = machine.guest.keepers.get_mut(process) {
                        keeper.asked += 1;
                    }
                });
                vec![(ok(Seen::Text(answer)), world)]
            }
            Act::Reap { process, signal } => {
                if !guest.keepers.contains_key(process) {
                    return nobody();
                }
                let world = self.changed(vm, |machine| {
                    machine.guest.keepers.remove(process);
                });
                let killed = format!("killed by {}", vm_trait::Signal(*signal));
                vec![(ok(Seen::Text(killed)), world)]
            }
            _ => same(ok(Seen::Processes(guest.keepers.keys().copied().collect()))),
        };
        if guest.unsure {
            let spawns = matches!(act, Act::Spawn { .. });
            ways.extend((!spawns).then(|| (Want::Succeeds, self.clone())));
            ways.push((Want::Fails("exec_failed"), self.clone()));
        }
        ways
    }
}

fn ok(seen: Seen) -> Want {
    Want::Is(Outcome::Ok(seen))
}

fn invalid(field: &str) -> Want {
    Want::Is(Outcome::Failed(format!("invalid_config:{field}")))
}

/// Says which operations a machine takes in which state.
fn admits(stage: Stage, act: &Act) -> bool {
    match act {
        Act::Start | Act::Restore { .. } => !stage.has_machine(),
        Act::Pause => stage == Stage::Running,
        Act::Resume | Act::Inspect => stage == Stage::Paused,
        Act::Snapshot { .. } | Act::Fork { .. } => stage.has_machine(),
        act if act.asks_guest() => stage == Stage::Running,
        _ => true,
    }
}

/// Says how a call is refused whose arguments make no sense in any state.
fn refused(act: &Act) -> Option<Want> {
    let bad_path = |path: &str| !is_valid(path);
    let refused = match act {
        Act::WaitReady { timeout_ms: 0 } => return Some(Want::Fails("invalid_config")),
        Act::Exec { program: Program::NoName, .. } => return Some(Want::Fails("invalid_config")),
        Act::Fork { into } if into.is_empty() => return Some(Want::Fails("invalid_config")),
        Act::Connect { port: 0 | AGENT_PORT | u32::MAX }
        | Act::Listen { port: 0 | u32::MAX }
        | Act::Exchange { port: 0 | u32::MAX, .. } => return Some(invalid("port")),
        Act::Read { path }
        | Act::Write { path, .. }
        | Act::Stat { path }
        | Act::List { path }
        | Act::MakeDir { path, .. }
        | Act::Remove { path, .. } => bad_path(path),
        Act::Rename { from, to } => bad_path(from) || bad_path(to),
        _ => false,
    };
    refused.then(|| Want::Is(Outcome::Failed("guest_file:InvalidPath".to_owned())))
}

fn needed(act: &Act) -> &'static [Capability] {
    match act {
        Act::Pause | Act::Resume => &[Capability::Pause],
        Act::Inspect => &[Capability::Inspect],
        Act::Snapshot { tracked: false, base: None, .. } => &[Capability::Snapshot],
        Act::Snapshot { .. } => &[Capability::Snapshot, Capability::IncrementalSnapshot],
        Act::Restore { .. } => &[Capability::RestoreInPlace],
        Act::Fork { .. } => &[Capability::Fork],
        Act::Connect { .. } | Act::Listen { .. } => &[Capability::Vsock],
        Act::Exchange { .. } => &[Capability::Vsock, Capability::Exec],
        Act::Exec { program: Program::Terminal { .. }, .. } => &[Capability::Exec, Capability::Tty],
        Act::Exec { program: Program::RunAs { .. }, .. } => &[Capability::Exec, Capability::Users],
        Act::Exec { .. }
        | Act::Spawn { .. }
        | Act::Ask { .. }
        | Act::Reap { .. }
        | Act::Processes
        | Act::Random => &[Capability::Exec],
        Act::Read { .. }
        | Act::Write { .. }
        | Act::Stat { .. }
        | Act::List { .. }
        | Act::MakeDir { .. }
        | Act::Remove { .. }
        | Act::Rename { .. } => &[Capability::Files],
        _ => &[],
    }
}

fn on_files(files: &mut super::files::Files, act: &Act) -> FileResult<Seen> {
    match act {
        Act::Read { path } => files.read(path).map(Seen::Text),
        Act::Write { path, text, times, mode } => {
            files.write(path, text, *times, *mode).map(|()| Seen::Nothing)
        }
        Act::Stat { path } => Ok(match files.stat(path)? {
            Node::Directory(mode) => Seen::Stat("directory".to_owned(), 0, (*mode).into()),
            Node::File { text, times, mode } => {
                let size = text.len() as u64 * u64::from(*times);
                Seen::Stat("file".to_owned(), size, (*mode).into())
            }
        }),
        Act::List { path } => files.list(path).map(Seen::Names),
        Act::MakeDir { path, recursive, mode } => {
            files.make_dir(path, *recursive, *mode).map(|()| Seen::Nothing)
        }
        Act::Remove { path, recursive } => files.remove(path, *recursive).map(|()| Seen::Nothing),
        Act::Rename { from, to } => files.rename(from, to).map(|()| Seen::Nothing),
        _ => Ok(Seen::Nothing),
    }
}

/// Says what comes of a program.
fn ran(guest: &Guest, program: &Program, timeout_ms: Option<u32>, limit: Option<u32>) -> Want {
    let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
    let ends = |status: String, stdout: String| {
        let kept = stdout.len().min(limit);
        let dropped = (stdout.len() - kept) as u64;
        let stdout = String::from_utf8_lossy(&stdout.as_bytes()[..kept]).into_owned();
        ok(Seen::Ran { status, stdout, dropped })
    };
    let cat = |path: &str| match guest.files.read(path) {
        Ok(text) => ends("exited 0".to_owned(), text),
        Err(_) => ends("exited 1".to_owned(), String::new()),
    };
    match program {
        Program::Echo(text) => ends("exited 0".to_owned(), format!("{text}\n")),
        Program::Exit(code) => ends(format!("exited {code}"), String::new()),
        Program::KillItself(signal) => {
            ends(format!("killed by {}", vm_trait::Signal(*signal)), String::new())
        }
        // A guest takes two slashes for one, where requests of the host are refused.
        Program::Cat(path) => cat(&path.replace("//", "/")),
        Program::CatIn { dir, name } => match guest.files.stat(dir) {
            Ok(Node::Directory(_)) => cat(&format!("{dir}/{name}")),
            _ => Want::Is(Outcome::Failed("exec_failed:BadWorkingDirectory".to_owned())),
        },
        Program::Mirror { text, times } => ends("exited 0".to_owned(), repeated(text, *times)),
        Program::Say(word) => ends("exited 0".to_owned(), format!("{word}\n")),
        Program::Terminal { rows, cols } => {
            ends("exited 0".to_owned(), format!("{rows} {cols}\r\n"))
        }
        Program::RunAs { uid, gid } => ends("exited 0".to_owned(), format!("{uid}\n{gid}\n")),
        Program::Sleep(ms) if timeout_ms.is_some_and(|limit| limit < *ms) => {
            ends("timed out".to_owned(), String::new())
        }
        Program::Sleep(_) => ends("exited 0".to_owned(), String::new()),
        _ => Want::Fails("exec_failed:NotFound"),
    }
}
