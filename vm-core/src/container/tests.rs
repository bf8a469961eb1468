//! What the container promises, on a disk in memory.

use super::*;
use crate::machine::{SectionSink, Sections};
use memory_fs::{MemoryFs, run};
use proptest::{collection::vec, prelude::*, sample::Index};
use std::time::Duration;
use vm_trait::{Mib, SnapshotId, SnapshotMetadata, VmConfig, VmId};

mod atomicity;
mod chains;
mod integrity;
mod limits;
mod memory_fs;

const PATH: &str = "/snapshots/one";

/// What a test writes: sections by name, each in chunks.
#[derive(Clone, Debug)]
struct Draft {
    manifest: Manifest,
    sections: Vec<(String, Vec<Vec<u8>>)>,
}

impl Draft {
    fn contents(&self) -> Vec<(String, Vec<u8>)> {
        self.sections.iter().map(|(name, chunks)| (name.clone(), chunks.concat())).collect()
    }

    async fn write(&self, fs: &MemoryFs, tag: u64) -> Result<u64, ContainerError> {
        let mut writer = ContainerWriter::create(fs.shared(), Path::new(PATH), tag).await?;
        for (name, chunks) in &self.sections {
            // An error of the sink comes again from `finish`, so that a machine that ignores it does no harm.
            let _ = writer.begin(name).await;
            for chunk in chunks {
                let _ = writer.write(Bytes::copy_from_slice(chunk)).await;
            }
        }
        let Manifest { metadata, config, compatibility, .. } = self.manifest.clone();
        Ok(writer.finish(metadata, config, compatibility, None).await?.length)
    }

    fn bytes(&self) -> Bytes {
        let fs = MemoryFs::new();
        run(self.write(&fs, 1)).unwrap();
        fs.get(Path::new(PATH)).unwrap().into()
    }
}

fn contents(sections: &Sections) -> Vec<(String, Vec<u8>)> {
    sections.iter().map(|(name, bytes)| (name.to_owned(), bytes.to_vec())).collect()
}

fn manifests() -> impl Strategy<Value = Manifest> {
    let text = "\\PC{0,12}";
    let ids = (any::<u64>(), any::<u64>(), any::<u64>(), 0..1_000_000_000u32);
    let machine = (text, text, any::<u8>(), any::<u32>(), any::<u16>());
    let labels = proptest::collection::btree_map(text, text, 0..3);
    (ids, machine, proptest::option::of(text), labels).prop_map(|(ids, machine, label, labels)| {
        let (backend, arch, vcpus, memory, agent_protocol) = machine;
        let metadata = SnapshotMetadata {
            id: SnapshotId(ids.0),
            vm: VmId(ids.1),
            backend: backend.clone(),
            taken_at: Duration::new(ids.2, ids.3),
            arch: arch.clone(),
            vcpus,
            memory: Mib(memory),
            label,
            base: None,
        };
        let mut config = VmConfig::default();
        config.labels = labels;
        let memory = Mib(memory);
        let compatibility = Compatibility { backend, arch, vcpus, memory, agent_protocol };
        let (base, sections) = (None, Vec::new());
        Manifest { format: FORMAT, metadata, compatibility, config, base, sections }
    })
}

fn drafts(chunk_lengths: impl Strategy<Value = usize>) -> impl Strategy<Value = Draft> {
    // Bytes from a number are much faster to draw than a vector of bytes, and shrink better.
    let chunk = (chunk_lengths, any::<usize>()).prop_map(|(length, seed)| {
        (0..length).map(|at| at.wrapping_mul(seed | 1).to_le_bytes()[2]).collect()
    });
    let sections = vec(("[a-z/0-9]{1,9}", vec(chunk, 0..4)), 0..5);
    (manifests(), sections).prop_map(|(manifest, mut sections)| {
        sections.sort_by(|one, other| one.0.cmp(&other.0));
        sections.dedup_by(|one, other| one.0 == other.0);
        sections.reverse();
        Draft { manifest, sections }
    })
}

fn small_drafts() -> impl Strategy<Value = Draft> {
    drafts(prop_oneof![4 => 0..60usize, 1 => 4090..4100usize])
}

fn any_drafts() -> impl Strategy<Value = Draft> {
    drafts(prop_oneof![
        4 => 0..300usize,
        2 => 4090..4100usize,
        1 => 30_000..140_000usize,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_was_written_is_read(draft in any_drafts()) {
        let fs = MemoryFs::new();
        let size = run(draft.write(&fs, 7)).unwrap();
        prop_assert_eq!(fs.paths(), [Path::new(PATH)]);
        let bytes = Bytes::from(fs.get(Path::new(PATH)).unwrap());
        prop_assert_eq!(size, bytes.len() as u64);

        let Chain { manifest, sections, .. } = run(open(&fs, Path::new(PATH))).unwrap();
        prop_assert_eq!(contents(&sections), draft.contents());
        for (entry, (name, content)) in manifest.sections.iter().zip(sections.iter()) {
            prop_assert_eq!(&entry.name, name);
            prop_assert_eq!(entry.length, content.len() as u64);
            prop_assert_eq!(entry.hash, Hash::of(content));
            prop_assert!(entry.length < 4096 || entry.offset % 4096 == 0);
            let at = usize::try_from(entry.offset).unwrap();
            prop_assert_eq!(&bytes[at..at + content.len()], content);
        }
        let entries = manifest.sections.clone();
        prop_assert_eq!(&manifest, &Manifest { sections: entries, ..draft.manifest.clone() });

        prop_assert_eq!(run(read_verified(&fs, Path::new(PATH))).unwrap(), &bytes);
        let (again, sections) = verify_bytes(&bytes).unwrap();
        prop_assert_eq!(&again, &manifest);
        prop_assert_eq!(contents(&sections), draft.contents());

        // Exported and imported it is the same file.
        let elsewhere = MemoryFs::new();
        let imported = run(write_verified(elsewhere.shared(), Path::new(PATH), bytes.clone(), 3));
        prop_assert_eq!(imported.unwrap(), manifest);
        prop_assert_eq!(elsewhere.paths(), [Path::new(PATH)]);
        prop_assert_eq!(elsewhere.get(Path::new(PATH)).unwrap(), bytes);
    }

    #[test]
    fn chunks_make_no_difference(draft in any_drafts()) {
        let whole = |(name, chunks): &(String, Vec<Vec<u8>>)| (name.clone(), vec![chunks.concat()]);
        let sections = draft.sections.iter().map(whole).collect();
        let at_once = Draft { sections, ..draft.clone() };
        prop_assert!(at_once.bytes() == draft.bytes());
    }

    #[test]
    fn the_first_field_that_differs_is_named(one in manifests(), other in manifests()) {
        let (found, wanted) = (one.compatibility, other.compatibility);
        prop_assert_eq!(found.check(&found), Ok(()));
        let mut mixed = found.clone();
        mixed.agent_protocol = wanted.agent_protocol;
        if mixed != found {
            let Err(ContainerError::Incompatible { field, found: had, wanted: needed }) =
                found.check(&mixed)
            else {
                return Err(TestCaseError::fail("accepted"));
            };
            prop_assert_eq!(field, "agent_protocol");
            prop_assert_eq!(had, found.agent_protocol.to_string());
            prop_assert_eq!(needed, wanted.agent_protocol.to_string());
        }
        if found.backend != wanted.backend {
            let refused = found.check(&wanted);
            let named = matches!(refused, Err(ContainerError::Incompatible { field, .. }) if field == "backend");
            prop_assert!(named);
        }
    }
}

/// Puts a container together whose hashes all hold.
fn assemble(format: u32, body: &[u8], manifest: &[u8]) -> Bytes {
    let mut bytes = layout::header(format).to_vec();
    bytes.extend_from_slice(body);
    let trailer = layout::Trailer {
        total_length: (bytes.len() + manifest.len() + layout::TRAILER_LEN) as u64,
        manifest_offset: bytes.len() as u64,
        manifest_length: manifest.len() as u64,
        manifest_hash: Hash::of(manifest),
    };
    bytes.extend_from_slice(manifest);
    bytes.extend_from_slice(&trailer.encode());
    bytes.into()
}
