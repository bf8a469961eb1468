//! A kernel small enough to be seen through: files by path, processes that do one thing each.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};
use vm_guest_agent::os::{
    Child, ChildExit, Errno, Fd, GuestOs, Output, ReadOutcome, SpawnSpec, Spawned, SysResult,
};
use vm_guest_protocol::{EntryKind, StatEntry, TermSize};

/// How much a pipe holds unless told otherwise.
pub(crate) const PIPE: usize = 64 << 10;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Body {
    File(Vec<u8>),
    Dir,
    Link(String),
    Device,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) body: Body,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Open {
    node: u64,
    at: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Proc {
    pub(crate) spec: SpawnSpec,
    pub(crate) stdin: VecDeque<u8>,
    stdin_eof: bool,
    outs: [VecDeque<u8>; 2],
    /// How much of its work is done, by output.
    made: [usize; 2],
    pub(crate) signals: Vec<u8>,
    pub(crate) exit: Option<ChildExit>,
    /// A grandchild that keeps the outputs open.
    held: bool,
    /// It has closed its outputs, though it runs.
    shut: bool,
    pipe: usize,
    pub(crate) released: bool,
    pub(crate) size: Option<TermSize>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct FakeOs {
    pub(crate) now: Duration,
    pub(crate) wall: Option<Duration>,
    pub(crate) entropy: Option<[u8; 32]>,
    names: BTreeMap<String, u64>,
    nodes: BTreeMap<u64, Node>,
    open: BTreeMap<u32, Open>,
    pub(crate) procs: Vec<Proc>,
    ids: u64,
    /// What these calls fail with, by name.
    pub(crate) faults: BTreeMap<String, Errno>,
    /// How many bytes the disk still takes.
    pub(crate) disk_left: Option<usize>,
    pub(crate) signalled_all: Vec<u8>,
    pub(crate) others: bool,
    pub(crate) synced: Vec<String>,
    pub(crate) powered_off: bool,
    /// How much a pipe holds.
    pub(crate) pipe: usize,
    /// The names that every directory lists in place of what is in it.
    pub(crate) listing: Option<Vec<String>>,
    /// What someone quicker puts in the place of every directory that is made.
    pub(crate) rival: Option<Body>,
    /// How many times more someone fills a directory that is about to be removed.
    pub(crate) fillings: usize,
}

/// What `gen` writes at an offset of an output.
pub(crate) fn pattern(output: usize, at: usize) -> u8 {
    u8::try_from((at * 7 + output * 13 + at / 251) % 256).unwrap()
}

impl FakeOs {
    pub(crate) fn new() -> Self {
        let mut os = Self { pipe: PIPE, ..Self::default() };
        os.put("/", Body::Dir, 0o755);
        for dir in ["/bin", "/usr", "/usr/bin", "/etc", "/tmp"] {
            os.put(dir, Body::Dir, 0o755);
        }
        for program in ["echo", "cat", "gen", "sleep", "leak", "flood", "deaf", "env", "mute"] {
            os.put(&format!("/bin/{program}"), Body::File(Vec::new()), 0o755);
        }
        os
    }

    pub(crate) fn put(&mut self, path: &str, body: Body, mode: u32) {
        self.ids += 1;
        self.nodes.insert(self.ids, Node { body, mode, owner: (0, 0) });
        self.names.insert(path.to_owned(), self.ids);
    }

    pub(crate) fn file(&self, path: &str) -> Option<&[u8]> {
        match &self.node(path)?.body {
            Body::File(content) => Some(content),
            _ => None,
        }
    }

    pub(crate) fn node(&self, path: &str) -> Option<&Node> {
        self.nodes.get(self.names.get(path)?)
    }

    pub(crate) fn node_mut(&mut self, path: &str) -> Option<&mut Node> {
        self.nodes.get_mut(self.names.get(path)?)
    }

    pub(crate) fn names(&self) -> Vec<&str> {
        self.names.keys().map(String::as_str).collect()
    }

    pub(crate) fn open_files(&self) -> usize {
        self.open.len()
    }

    fn fault(&self, call: &str) -> SysResult<()> {
        self.faults.get(call).map_or(Ok(()), |errno| Err(*errno))
    }

    /// Follows links in the middle of a path, and at its end if asked to.
    fn walk(&self, path: &str, follow: bool) -> SysResult<String> {
        let mut todo: Vec<String> =
            path.split('/').rev().filter(|it| !it.is_empty()).map(str::to_owned).collect();
        let (mut at, mut links) = (String::new(), 0);
        while let Some(name) = todo.pop() {
            match name.as_str() {
                "." => continue,
                ".." => {
                    at.truncate(at.rfind('/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = format!("{at}/{name}");
            let node = self.names.get(&next).and_then(|id| self.nodes.get(id));
            match node.map(|node| &node.body) {
                Some(Body::Link(to)) if follow || !todo.is_empty() => {
                    links += 1;
                    if links > 40 {
                        return Err(Errno::LOOP);
                    }
                    if to.starts_with('/') {
                        at.clear();
                    }
                    todo.extend(to.split('/').rev().filter(|it| !it.is_empty()).map(str::to_owned));
                }
                Some(Body::Dir) => at = next,
                None if !todo.is_empty() => return Err(Errno::NOENT),
                Some(_) if !todo.is_empty() => return Err(Errno::NOTDIR),
                _ => at = next,
            }
        }
        Ok(if at.is_empty() { "/".to_owned() } else { at })
    }

    fn entry(&self, path: &str) -> SysResult<StatEntry> {
        let node = self.node(path).ok_or(Errno::NOENT)?;
        let (kind, size) = match &node.body {
            Body::File(content) => (EntryKind::File, content.len()),
            Body::Dir => (EntryKind::Directory, 0),
            Body::Link(to) => (EntryKind::Symlink, to.len()),
            Body::Device => (EntryKind::Other, 0),
        };
        let (uid, gid) = node.owner;
        Ok(StatEntry { kind, size: size as u64, mode: node.mode, uid, gid, modified_ns: 0 })
    }

    fn children(&self, dir: &str) -> Vec<String> {
        let prefix = if dir == "/" { "/".to_owned() } else { format!("{dir}/") };
        let below = self.names.keys().filter_map(|path| path.strip_prefix(&prefix));
        below.filter(|it| !it.is_empty() && !it.contains('/')).map(str::to_owned).collect()
    }

    fn proc(&mut self, child: Child) -> &mut Proc {
        &mut self.procs[usize::try_from(child.0).unwrap()]
    }

    /// Forgets the processes; only when the agent has forgotten them too.
    pub(crate) fn forget_all(&mut self) {
        self.procs.clear();
    }

    /// Lets every process do what it can.
    pub(crate) fn run(&mut self) {
        for process in &mut self.procs {
            process.run();
        }
    }
}

impl Proc {
    fn run(&mut self) {
        let program = self.spec.path.rsplit('/').next().unwrap_or_default().to_owned();
        if self.exit.is_some() {
            if program == "flood" {
                self.outs[0].resize(PIPE, b'f');
            }
            return;
        }
        match program.as_str() {
            "echo" => {
                let line = self.spec.argv[1..].join(" ") + "\n";
                self.outs[0].extend(line.as_bytes());
                self.exit = Some(ChildExit::Exited(0));
            }
            "env" => {
                for (name, value) in &self.spec.env {
                    self.outs[0].extend(format!("{name}={value}\n").as_bytes());
                }
                self.exit = Some(ChildExit::Exited(0));
            }
            "cat" => {
                let count = self.stdin.len().min(self.pipe - self.outs[0].len());
                self.outs[0].extend(self.stdin.drain(..count));
                if self.stdin_eof && self.stdin.is_empty() {
                    self.exit = Some(ChildExit::Exited(3));
                }
            }
            "gen" => self.generate(),
            "mute" if !self.shut => {
                let words = self.spec.argv.get(1).map_or("that is all", String::as_str);
                self.outs[0].extend(words.as_bytes());
                self.shut = true;
            }
            "leak" | "flood" => {
                self.outs[0].extend(b"last words");
                self.held = true;
                self.exit = Some(ChildExit::Exited(0));
            }
            _ => {}
        }
    }

    /// Writes as many bytes on each output as the arguments say, and exits with 7.
    fn generate(&mut self) {
        let wanted = [1, 2].map(|index| self.spec.argv[index].parse::<usize>().unwrap());
        for (output, wanted) in wanted.into_iter().enumerate() {
            while self.made[output] < wanted && self.outs[output].len() < self.pipe {
                self.outs[output].push_back(pattern(output, self.made[output]));
                self.made[output] += 1;
            }
        }
        if self.made == wanted {
            self.exit = Some(ChildExit::Exited(7));
        }
    }
}

impl GuestOs for FakeOs {
    fn monotonic(&self) -> Duration {
        self.now
    }

    fn set_wall_clock(&mut self, since_epoch: Duration) -> SysResult<()> {
        self.fault("set_wall_clock")?;
        self.wall = Some(since_epoch);
        Ok(())
    }

    fn reseed(&mut self, entropy: &[u8; 32]) -> SysResult<()> {
        self.entropy = Some(*entropy);
        Ok(())
    }

    fn spawn(&mut self, spec: &SpawnSpec) -> SysResult<Spawned> {
        self.fault("spawn")?;
        let child = Child(self.procs.len() as u64);
        self.procs.push(Proc {
            spec: spec.clone(),
            stdin: VecDeque::new(),
            stdin_eof: !spec.stdin,
            outs: Default::default(),
            made: [0; 2],
            signals: Vec::new(),
            exit: None,
            held: false,
            shut: false,
            pipe: self.pipe,
            released: false,
            size: None,
        });
        Ok(Spawned { child, pid: 100 + u32::try_from(child.0).unwrap() })
    }

    fn read_output(&mut self, child: Child, output: Output, max: usize) -> SysResult<ReadOutcome> {
        let process = self.proc(child);
        assert!(!process.released, "a released child is not read");
        let held = process.held || (process.exit.is_none() && !process.shut);
        let out = &mut process.outs[usize::from(output == Output::Stderr)];
        if out.is_empty() {
            return Ok(if held { ReadOutcome::WouldBlock } else { ReadOutcome::Eof });
        }
        let count = out.len().min(max);
        let bytes = Bytes::from_iter(out.drain(..count));
        if process.spec.path.ends_with("flood") {
            process.outs[0].resize(PIPE, b'f');
        }
        Ok(ReadOutcome::Data(bytes))
    }

    fn write_stdin(&mut self, child: Child, bytes: &[u8]) -> SysResult<usize> {
        let process = self.proc(child);
        assert!(!process.stdin_eof && !process.released);
        if process.exit.is_some() || process.spec.path.ends_with("deaf") {
            return Err(Errno::PIPE);
        }
        let count = bytes.len().min(process.pipe - process.stdin.len());
        process.stdin.extend(&bytes[..count]);
        Ok(count)
    }

    fn close_stdin(&mut self, child: Child) {
        self.proc(child).stdin_eof = true;
    }

    fn resize(&mut self, child: Child, size: TermSize) -> SysResult<()> {
        self.proc(child).size = Some(size);
        Ok(())
    }

    fn signal_group(&mut self, child: Child, signal: u8) -> SysResult<()> {
        let process = self.proc(child);
        if process.exit.is_some() {
            return Err(Errno::SRCH);
        }
        process.signals.push(signal);
        if matches!(signal, 9 | 15) {
            process.exit = Some(ChildExit::Signaled(signal));
        }
        Ok(())
    }

    fn try_wait(&mut self, child: Child) -> Option<ChildExit> {
        self.proc(child).exit
    }

    fn release(&mut self, child: Child) {
        let process = self.proc(child);
        assert!(!process.released, "a child is released once");
        process.released = true;
    }

    fn signal_all(&mut self, signal: u8) {
        self.signalled_all.push(signal);
        if signal == 9 {
            self.others = false;
        }
    }

    fn has_processes(&mut self) -> bool {
        self.others || self.procs.iter().any(|process| process.exit.is_none())
    }

    fn open_read(&mut self, path: &str) -> SysResult<Fd> {
        self.fault("open_read")?;
        let path = self.walk(path, true)?;
        if self.entry(&path)?.kind == EntryKind::Directory {
            return Err(Errno::ISDIR);
        }
        self.ids += 1;
        let fd = u32::try_from(self.ids).unwrap();
        self.open.insert(fd, Open { node: self.names[&path], at: 0 });
        Ok(Fd(fd))
    }

    fn create_new(&mut self, path: &str, mode: u32) -> SysResult<Fd> {
        self.fault("create_new")?;
        let path = self.walk(path, false)?;
        if self.names.contains_key(&path) {
            return Err(Errno::EXIST);
        }
        self.put(&path, Body::File(Vec::new()), mode);
        self.open_read(&path)
    }

    fn read(&mut self, fd: Fd, max: usize) -> SysResult<Bytes> {
        self.fault("read")?;
        let open = self.open.get_mut(&fd.0).ok_or(Errno::BADF)?;
        let Body::File(content) = &self.nodes[&open.node].body else { return Err(Errno::INVAL) };
        let end = content.len().min(open.at + max);
        let bytes = Bytes::copy_from_slice(&content[open.at..end]);
        open.at = end;
        Ok(bytes)
    }

    fn write_all(&mut self, fd: Fd, bytes: &[u8]) -> SysResult<()> {
        self.fault("write_all")?;
        if let Some(left) = &mut self.disk_left {
            *left = left.checked_sub(bytes.len()).ok_or(Errno::NOSPC)?;
        }
        let open = self.open.get(&fd.0).ok_or(Errno::BADF)?;
        match &mut self.nodes.get_mut(&open.node).unwrap().body {
            Body::File(content) => content.extend_from_slice(bytes),
            _ => return Err(Errno::BADF),
        }
        Ok(())
    }

    fn sync_file(&mut self, fd: Fd) -> SysResult<()> {
        self.fault("sync_file")?;
        let _ = self.open.get(&fd.0).ok_or(Errno::BADF)?;
        self.synced.push("file".to_owned());
        Ok(())
    }

    fn set_owner_and_mode(
        &mut self,
        fd: Fd,
        owner: Option<(u32, u32)>,
        mode: u32,
    ) -> SysResult<()> {
        self.fault("set_owner_and_mode")?;
        let open = self.open.get(&fd.0).ok_or(Errno::BADF)?;
        let node = self.nodes.get_mut(&open.node).unwrap();
        node.mode = mode;
        node.owner = owner.unwrap_or(node.owner);
        Ok(())
    }

    fn close(&mut self, fd: Fd) {
        assert!(self.open.remove(&fd.0).is_some(), "a file is closed once");
    }

    fn sync_dir(&mut self, path: &str) -> SysResult<()> {
        self.synced.push(path.to_owned());
        self.fault("sync_dir")
    }

    fn lstat(&mut self, path: &str) -> SysResult<StatEntry> {
        let path = self.walk(path, false)?;
        self.entry(&path)
    }

    fn stat(&mut self, path: &str) -> SysResult<StatEntry> {
        let path = self.walk(path, true)?;
        self.entry(&path)
    }

    fn read_link(&mut self, path: &str) -> SysResult<String> {
        let path = self.walk(path, false)?;
        match &self.node(&path).ok_or(Errno::NOENT)?.body {
            Body::Link(to) => Ok(to.clone()),
            _ => Err(Errno::INVAL),
        }
    }

    fn read_dir(&mut self, path: &str) -> SysResult<Vec<(String, EntryKind)>> {
        let path = self.walk(path, true)?;
        if self.entry(&path)?.kind != EntryKind::Directory {
            return Err(Errno::NOTDIR);
        }
        if let Some(names) = &self.listing {
            return Ok(names.iter().map(|name| (name.clone(), EntryKind::File)).collect());
        }
        let mut entries = Vec::new();
        for name in self.children(&path).into_iter().rev() {
            let kind = self.entry(&format!("{}/{name}", path.trim_end_matches('/')))?.kind;
            entries.push((name, kind));
        }
        Ok(entries)
    }

    fn mkdir(&mut self, path: &str, mode: u32) -> SysResult<()> {
        self.fault("mkdir")?;
        let path = self.walk(path, false)?;
        if let Some(body) = self.rival.clone() {
            self.put(&path, body, 0o755);
        }
        if self.names.contains_key(&path) {
            return Err(Errno::EXIST);
        }
        self.put(&path, Body::Dir, mode);
        Ok(())
    }

    fn rmdir(&mut self, path: &str) -> SysResult<()> {
        let path = self.walk(path, false)?;
        match self.entry(&path)?.kind {
            EntryKind::Directory if self.fillings > 0 => {
                self.fillings -= 1;
                Err(Errno::NOTEMPTY)
            }
            EntryKind::Directory if self.children(&path).is_empty() => {
                self.names.remove(&path);
                Ok(())
            }
            EntryKind::Directory => Err(Errno::NOTEMPTY),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn unlink(&mut self, path: &str) -> SysResult<()> {
        self.fault("unlink")?;
        let path = self.walk(path, false)?;
        if self.entry(&path)?.kind == EntryKind::Directory {
            return Err(Errno::ISDIR);
        }
        self.names.remove(&path);
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> SysResult<()> {
        self.fault("rename")?;
        let (from, to) = (self.walk(from, false)?, self.walk(to, false)?);
        let id = self.names.remove(&from).ok_or(Errno::NOENT)?;
        self.names.insert(to, id);
        Ok(())
    }

    fn sync_all(&mut self) {
        self.synced.push("all".to_owned());
    }

    fn power_off(&mut self) {
        self.powered_off = true;
    }
}
