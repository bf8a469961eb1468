//! Inodes, and the trees that hold them.

use super::{applets, rope::Rope};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};
use vm_guest_protocol::EntryKind;

/// Files take whole blocks.
const BLOCK: u64 = 4096;
/// What an inode takes beside its content.
const INODE_COST: u64 = 256;
/// The node of a tree's top directory.
pub(super) const TOP: u32 = 0;

/// A file, directory, link or device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Inode {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
    pub(super) modified_ns: u64,
    pub(super) body: Body,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Body {
    File(Rope),
    Dir(Dir),
    Symlink(Arc<str>),
    Device(Device),
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Dir {
    pub(super) entries: BTreeMap<Arc<str>, u32>,
    pub(super) parent: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Device {
    Null,
    Zero,
    Full,
    Random,
    Tty,
    Console,
}

impl Inode {
    pub(super) fn new(mode: u32, uid: u32, gid: u32, modified_ns: u64, body: Body) -> Self {
        let links = if matches!(body, Body::Dir(_)) { 2 } else { 1 };
        Self { mode, uid, gid, links, modified_ns, body }
    }

    pub(super) fn kind(&self) -> EntryKind {
        match self.body {
            Body::File(_) => EntryKind::File,
            Body::Dir(_) => EntryKind::Directory,
            Body::Symlink(_) => EntryKind::Symlink,
            Body::Device(_) => EntryKind::Other,
        }
    }

    pub(super) fn size(&self) -> u64 {
        match &self.body {
            Body::File(rope) => rope.len(),
            Body::Symlink(target) => target.len() as u64,
            Body::Dir(_) | Body::Device(_) => 0,
        }
    }

    pub(super) fn dir(&self) -> Option<&Dir> {
        if let Body::Dir(dir) = &self.body { Some(dir) } else { None }
    }

    fn cost(&self) -> u64 {
        INODE_COST + file_cost(if matches!(self.body, Body::File(_)) { self.size() } else { 0 })
    }
}

/// Gives how much room a file of this length takes.
pub(super) fn file_cost(len: u64) -> u64 {
    len.div_ceil(BLOCK) * BLOCK
}

/// A tree of inodes, held as the difference to a base.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Tree {
    #[serde(skip)]
    base: Option<Arc<BaseImage>>,
    nodes: BTreeMap<u32, Option<Arc<Inode>>>,
    next: u32,
    used: u64,
}

impl Tree {
    /// Makes a tree that holds what the base does.
    pub(super) fn over(base: Arc<BaseImage>) -> Self {
        let next = u32::try_from(base.nodes.len()).unwrap_or(u32::MAX);
        Self { base: Some(base), nodes: BTreeMap::new(), next, used: 0 }
    }

    /// Makes a tree of these inodes, with an empty top directory where they are none.
    pub(super) fn from_nodes(nodes: &BTreeMap<u32, Arc<Inode>>) -> Self {
        let mut tree = Self { base: None, nodes: BTreeMap::new(), next: 0, used: 0 };
        for (node, inode) in nodes {
            tree.used += inode.cost();
            tree.nodes.insert(*node, Some(Arc::clone(inode)));
            tree.next = tree.next.max(node.saturating_add(1));
        }
        if tree.nodes.is_empty() {
            tree.insert(Inode::new(0o755, 0, 0, 0, Body::Dir(Dir::default())));
        }
        tree
    }

    pub(super) fn rebase(&mut self, base: Arc<BaseImage>) {
        self.base = Some(base);
    }

    pub(super) fn get(&self, node: u32) -> Option<&Inode> {
        self.shared(node).map(|inode| &**inode)
    }

    /// Gives an inode as it is shared with clones of the tree.
    pub(super) fn shared(&self, node: u32) -> Option<&Arc<Inode>> {
        match self.nodes.get(&node) {
            Some(own) => own.as_ref(),
            None => self.base.as_ref()?.nodes.get(node as usize),
        }
    }

    /// Gives an inode to change. The length of a file is changed by [`set_content`](Self::set_content) alone.
    pub(super) fn get_mut(&mut self, node: u32) -> Option<&mut Inode> {
        if !self.nodes.contains_key(&node) {
            let inode = Arc::clone(self.base.as_ref()?.nodes.get(node as usize)?);
            self.used += inode.cost();
            self.nodes.insert(node, Some(inode));
        }
        self.nodes.get_mut(&node)?.as_mut().map(Arc::make_mut)
    }

    pub(super) fn dir_mut(&mut self, node: u32) -> Option<&mut Dir> {
        match &mut self.get_mut(node)?.body {
            Body::Dir(dir) => Some(dir),
            _ => None,
        }
    }

    /// Changes a file's content.
    pub(super) fn set_content(&mut self, node: u32, edit: impl FnOnce(&mut Rope)) {
        let Some(Inode { body: Body::File(rope), .. }) = self.get_mut(node) else {
            return;
        };
        let before = file_cost(rope.len());
        edit(rope);
        let after = file_cost(rope.len());
        self.used = (self.used + after).saturating_sub(before);
    }

    pub(super) fn insert(&mut self, inode: Inode) -> u32 {
        let node = self.next;
        self.next = self.next.saturating_add(1);
        self.used += inode.cost();
        self.nodes.insert(node, Some(Arc::new(inode)));
        node
    }

    /// Puts an inode at a node, as when a saved disk is brought back.
    pub(super) fn put(&mut self, node: u32, inode: Option<Arc<Inode>>) {
        self.remove(node);
        if let Some(inode) = inode {
            self.used += inode.cost();
            self.next = self.next.max(node.saturating_add(1));
            self.nodes.insert(node, Some(inode));
        }
    }

    pub(super) fn remove(&mut self, node: u32) {
        let cost = self.nodes.get(&node).and_then(Option::as_ref).map_or(0, |inode| inode.cost());
        self.used = self.used.saturating_sub(cost);
        let in_base = self.base.as_ref().is_some_and(|base| (node as usize) < base.nodes.len());
        if in_base {
            self.nodes.insert(node, None);
        } else {
            self.nodes.remove(&node);
        }
    }

    pub(super) fn next(&self) -> u32 {
        self.next
    }

    pub(super) fn set_next(&mut self, next: u32) {
        self.next = self.next.max(next);
    }

    /// Gives the bytes that the tree takes beyond its base.
    pub(super) fn used(&self) -> u64 {
        self.used
    }
}

/// The file system that every guest begins with.
#[derive(Debug)]
pub(super) struct BaseImage {
    nodes: Vec<Arc<Inode>>,
    programs: Vec<String>,
}

/// What the file of a simulated program begins with; the program's key follows.
const PROGRAM_MAGIC: &[u8] = b"\x7fSIM\0";

/// Gives the key of the program that a file holds, if it holds one.
pub(super) fn program_key(content: &[u8]) -> Option<&str> {
    std::str::from_utf8(content.strip_prefix(PROGRAM_MAGIC)?).ok()
}

impl BaseImage {
    /// Builds the image with the built-in commands and these programs.
    pub(super) fn build(programs: &[String]) -> Self {
        let mut inodes = vec![Inode::new(0o755, 0, 0, 0, Body::Dir(Dir::default()))];
        let mut builder = Builder { inodes: &mut inodes };
        for (path, mode, owner) in [
            ("/bin", 0o755, 0),
            ("/dev", 0o755, 0),
            ("/etc", 0o755, 0),
            ("/home", 0o755, 0),
            ("/home/user", 0o755, 1000),
            ("/mnt", 0o755, 0),
            ("/proc", 0o555, 0),
            ("/root", 0o700, 0),
            ("/run", 0o755, 0),
            ("/sbin", 0o755, 0),
            ("/tmp", 0o1777, 0),
            ("/usr", 0o755, 0),
            ("/usr/bin", 0o755, 0),
            ("/var", 0o755, 0),
            ("/var/tmp", 0o1777, 0),
        ] {
            builder.add(path, Inode::new(mode, owner, owner, 0, Body::Dir(Dir::default())));
        }
        for (path, mode, device) in [
            ("/dev/null", 0o666, Device::Null),
            ("/dev/zero", 0o666, Device::Zero),
            ("/dev/full", 0o666, Device::Full),
            ("/dev/urandom", 0o666, Device::Random),
            ("/dev/random", 0o666, Device::Random),
            ("/dev/tty", 0o666, Device::Tty),
            ("/dev/console", 0o600, Device::Console),
        ] {
            builder.add(path, Inode::new(mode, 0, 0, 0, Body::Device(device)));
        }
        for (path, text) in [
            (
                "/etc/passwd",
                "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n\
                 user:x:1000:1000:user:/home/user:/bin/sh\n",
            ),
            ("/etc/group", "root:x:0:\nnogroup:x:65534:\nuser:x:1000:\n"),
        ] {
            let body = Body::File(Rope::from_bytes(text.as_bytes().to_vec()));
            builder.add(path, Inode::new(0o644, 0, 0, 0, body));
        }
        for link in [("/dev/stdin", "0"), ("/dev/stdout", "1"), ("/dev/stderr", "2")] {
            let target = format!("/proc/self/fd/{}", link.1);
            builder.add(link.0, Inode::new(0o777, 0, 0, 0, Body::Symlink(target.into())));
        }
        for path in applets::PATHS {
            builder.add_program(path, path);
        }
        builder.add_program("/usr/bin/env", "/bin/env");
        for path in programs {
            builder.add_program(path, path);
        }
        builder.add("/sys", Inode::new(0o555, 0, 0, 0, Body::Dir(Dir::default())));
        let nodes = inodes.into_iter().map(Arc::new).collect();
        Self { nodes, programs: programs.to_vec() }
    }

    /// Gives its inodes, but for those in `/dev`.
    pub(super) fn without_devices(&self) -> BTreeMap<u32, Arc<Inode>> {
        let mut nodes: BTreeMap<u32, Arc<Inode>> = (0..).zip(self.nodes.iter().cloned()).collect();
        let dev = nodes.get(&TOP).and_then(|top| top.dir()?.entries.get("dev").copied());
        if let Some(inode) = dev.and_then(|dev| nodes.get_mut(&dev))
            && let Body::Dir(dir) = &mut Arc::make_mut(inode).body
        {
            let devices = std::mem::take(&mut dir.entries);
            nodes.retain(|node, _| !devices.values().any(|device| device == node));
        }
        nodes
    }

    /// Lists the programs that were built in.
    pub(super) fn programs(&self) -> &[String] {
        &self.programs
    }
}

struct Builder<'a> {
    inodes: &'a mut Vec<Inode>,
}

impl Builder<'_> {
    fn add_program(&mut self, path: &str, key: &str) {
        let mut content = PROGRAM_MAGIC.to_vec();
        content.extend_from_slice(key.as_bytes());
        self.add(path, Inode::new(0o755, 0, 0, 0, Body::File(Rope::from_bytes(content))));
    }

    /// Adds an inode, making missing directories above it; a path without a name is left out.
    fn add(&mut self, path: &str, inode: Inode) {
        let mut names = path.split('/').filter(|name| !name.is_empty()).collect::<Vec<_>>();
        let Some(last) = names.pop() else { return };
        let mut at = 0;
        for name in names {
            at = match self.inodes[at].dir().and_then(|dir| dir.entries.get(name)) {
                Some(node) => *node as usize,
                None => {
                    let dir = Inode::new(0o755, 0, 0, 0, Body::Dir(Dir::default()));
                    self.attach(at, name, dir)
                }
            };
        }
        self.attach(at, last, inode);
    }

    fn attach(&mut self, parent: usize, name: &str, mut inode: Inode) -> usize {
        let (node, above) = (self.inodes.len(), u32::try_from(parent).unwrap_or(u32::MAX));
        if let Body::Dir(dir) = &mut inode.body {
            dir.parent = above;
            self.inodes[parent].links += 1;
        }
        if let Body::Dir(dir) = &mut self.inodes[parent].body {
            dir.entries.insert(name.into(), u32::try_from(node).unwrap_or(u32::MAX));
        }
        self.inodes.push(inode);
        node
    }
}
