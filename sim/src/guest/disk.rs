//! Disks: what of them survives a crash, and how they are attached.

use super::{
    rope::Rope,
    tree::{Body, Inode, TOP, Tree},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// What a disk durably holds: what a guest that boots after a crash finds. An empty one is a disk that was just
/// made. Cloning copies no file contents.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DiskImage {
    nodes: Arc<BTreeMap<u32, Arc<Inode>>>,
}

impl DiskImage {
    pub(super) fn of(nodes: BTreeMap<u32, Arc<Inode>>) -> Self {
        Self { nodes: Arc::new(nodes) }
    }
}

/// A disk as it is attached to a new guest.
#[derive(Clone, Debug)]
pub struct DiskSetup {
    /// Where it is mounted: an absolute, normalised path other than `/`.
    pub mount: String,
    /// How many bytes it holds.
    pub capacity: u64,
    /// Whether writes fail with `ROFS`.
    pub read_only: bool,
    /// What is on it.
    pub image: DiskImage,
}

/// An attached disk, as a journalling file system with ordered metadata keeps it: directories and attributes are
/// committed together and in order, whenever anything is made durable; a file's content only when that file is.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) tree: Tree,
    pub(super) capacity: u64,
    pub(super) read_only: bool,
    durable: DiskImage,
    /// Inodes whose attributes, names or existence were changed since the last commit.
    dirty: BTreeSet<u32>,
    /// Files whose content was changed since they were last made durable.
    dirty_content: BTreeSet<u32>,
}

impl Disk {
    pub(super) fn new(setup: &DiskSetup) -> Self {
        Self {
            tree: Tree::from_nodes(&setup.image.nodes),
            capacity: setup.capacity,
            read_only: setup.read_only,
            durable: setup.image.clone(),
            dirty: BTreeSet::new(),
            dirty_content: BTreeSet::new(),
        }
    }

    pub(super) fn durable(&self) -> &DiskImage {
        &self.durable
    }

    pub(super) fn touch(&mut self, node: u32) {
        self.dirty.insert(node);
    }

    pub(super) fn touch_content(&mut self, node: u32) {
        self.dirty.insert(node);
        self.dirty_content.insert(node);
    }

    /// Makes one file or directory durable, and with it all metadata.
    pub(super) fn sync(&mut self, node: u32) {
        if self.dirty_content.remove(&node) {
            self.dirty.insert(node);
        }
        self.commit();
    }

    pub(super) fn sync_all(&mut self) {
        self.dirty.append(&mut self.dirty_content);
        self.commit();
    }

    fn commit(&mut self) {
        if self.dirty.is_empty() {
            return;
        }
        let durable = Arc::make_mut(&mut self.durable.nodes);
        for node in std::mem::take(&mut self.dirty) {
            match self.tree.shared(node).filter(|inode| inode.links > 0) {
                None => {
                    durable.remove(&node);
                }
                Some(inode) if self.dirty_content.contains(&node) => {
                    let content = durable.get(&node).map(|old| old.body.clone());
                    let mut kept = Inode::clone(inode);
                    kept.body = content.unwrap_or(Body::File(Rope::default()));
                    durable.insert(node, Arc::new(kept));
                }
                Some(inode) => {
                    durable.insert(node, Arc::clone(inode));
                }
            }
        }
        // A disk that was just made has a top directory from the first commit on.
        if let (false, Some(top)) = (durable.contains_key(&TOP), self.tree.shared(TOP)) {
            durable.insert(TOP, Arc::clone(top));
        }
    }
}

/// A disk as it is saved: what differs between the page cache and the disk is held once.
#[derive(Serialize, Deserialize)]
struct SavedDisk {
    capacity: u64,
    read_only: bool,
    durable: DiskImage,
    changed: Vec<(u32, Option<Arc<Inode>>)>,
    next: u32,
    dirty: BTreeSet<u32>,
    dirty_content: BTreeSet<u32>,
}

impl Serialize for Disk {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let changed = self
            .dirty
            .union(&self.dirty_content)
            .map(|node| (*node, self.tree.shared(*node).cloned()))
            .collect();
        SavedDisk {
            capacity: self.capacity,
            read_only: self.read_only,
            durable: self.durable.clone(),
            changed,
            next: self.tree.next(),
            dirty: self.dirty.clone(),
            dirty_content: self.dirty_content.clone(),
        }
        .serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Disk {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let saved = SavedDisk::deserialize(deserializer)?;
        let mut tree = Tree::from_nodes(&saved.durable.nodes);
        for (node, inode) in saved.changed {
            tree.put(node, inode);
        }
        tree.set_next(saved.next);
        Ok(Self {
            tree,
            capacity: saved.capacity,
            read_only: saved.read_only,
            durable: saved.durable,
            dirty: saved.dirty,
            dirty_content: saved.dirty_content,
        })
    }
}
