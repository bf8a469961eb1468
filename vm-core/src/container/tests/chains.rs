//! Images, and chains of containers that hold what changed.

use super::{
    memory_fs::{Fault, Kept},
    *,
};
use crate::container::layout::HEADER_LEN;
use std::path::PathBuf;

/// What a container of a chain says of its image: its length, and offset, length and content of runs, zeros for 0.
#[derive(Clone, Debug)]
struct Step {
    total: usize,
    runs: Vec<(usize, usize, u8)>,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Bytes, pages, and many pages.
    let unit = prop_oneof![3 => Just(1_usize), 3 => Just(4096), 1 => Just(300_000)];
    let run = (0..4_usize, 1..4_usize, 0..6_u8);
    let step = (0..16_usize, vec(run, 0..5));
    (unit, vec(step, 1..5)).prop_map(|(unit, steps)| {
        let cut = |(total, runs): (usize, Vec<(usize, usize, u8)>)| {
            let (total, mut at) = (total * unit, 0);
            let runs = runs.into_iter().filter_map(|(gap, length, content)| {
                let offset = at + gap * unit;
                at = offset + length * unit;
                (at <= total).then_some((offset, length * unit, content))
            });
            Step { total, runs: runs.collect() }
        };
        steps.into_iter().map(cut).collect()
    })
}

fn path(number: usize) -> PathBuf {
    PathBuf::from(format!("/snapshots/{number}"))
}

/// What the image is after all of these steps.
fn model(steps: &[Step]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for step in steps {
        bytes.resize(step.total, 0);
        for (offset, length, content) in &step.runs {
            bytes[*offset..offset + length].fill(*content);
        }
    }
    bytes
}

/// Writes a chain of containers, each on the one before it.
fn write(fs: &MemoryFs, manifest: &Manifest, steps: &[Step]) -> Vec<Sealed> {
    let mut sealed: Vec<Sealed> = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let base = sealed.last().map(|base| BaseLink {
            id: SnapshotId(number as u64 - 1),
            path: BasePath::of(&path(number - 1), &path(number)),
            seal: base.seal,
        });
        sealed.push(run(write_one(fs, manifest, number, step, base)).unwrap());
    }
    sealed
}

async fn write_one(
    fs: &MemoryFs,
    manifest: &Manifest,
    number: usize,
    step: &Step,
    base: Option<BaseLink>,
) -> Result<Sealed, ContainerError> {
    let mut writer = ContainerWriter::create(fs.shared(), &path(number), 1).await?;
    writer.begin("state").await.unwrap();
    writer.write(Bytes::from(format!("state {number}"))).await.unwrap();
    writer.begin_image("ram", step.total as u64).await.unwrap();
    for (offset, length, content) in &step.runs {
        if *content == 0 {
            writer.zeros_at(*offset as u64, *length as u64).await.unwrap();
        } else {
            let bytes = Bytes::from(vec![*content; *length]);
            writer.write_at(*offset as u64, bytes).await.unwrap();
        }
    }
    writer.begin("last").await.unwrap();
    let Manifest { mut metadata, config, compatibility, .. } = manifest.clone();
    metadata.id = SnapshotId(number as u64);
    metadata.base = base.as_ref().map(|base| base.id);
    writer.finish(metadata, config, compatibility, base).await
}

/// Reads the image of a chain as a machine would.
async fn read(fs: &MemoryFs, path: &Path) -> Result<Bytes, ContainerError> {
    let chain = open(fs, path).await?;
    let image = chain.sections.image("ram").unwrap();
    let content = image.content(image.total()).await?;
    // What is mapped is the same.
    image.verify().await?;
    let mut mapped = vec![0; content.len()];
    for piece in image.pieces() {
        let at = usize::try_from(piece.offset).unwrap();
        let bytes = image.read(*piece).await?;
        mapped[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    assert!(content == mapped);
    Ok(content)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_chain_gives_what_was_written(manifest in manifests(), steps in steps()) {
        let fs = MemoryFs::new();
        let sealed = write(&fs, &manifest, &steps);
        for number in 0..steps.len() {
            let chain = run(open(&fs, &path(number))).unwrap();
            prop_assert_eq!((chain.length, chain.seal), (number + 1, sealed[number].seal));
            prop_assert_eq!(run(seal(&fs, &path(number))), Ok(sealed[number].seal));
            let state = format!("state {number}");
            prop_assert_eq!(&chain.sections.get("state").unwrap()[..], state.as_bytes());
            prop_assert!(chain.sections.find("ram").is_none() && chain.sections.find("ram.map").is_none());
            prop_assert!(run(read(&fs, &path(number))).unwrap() == model(&steps[..=number]));
        }
    }

    #[test]
    fn a_merged_chain_is_the_same_and_whole(manifest in manifests(), steps in steps()) {
        let fs = MemoryFs::new();
        write(&fs, &manifest, &steps);
        let (last, whole) = (path(steps.len() - 1), Path::new("/elsewhere/whole"));
        let (merged, sealed) =
            run(merge(fs.shared(), &last, whole, 9, |metadata| metadata.id = SnapshotId(99))).unwrap();
        for number in 0..steps.len() {
            run(fs.remove(&path(number))).unwrap();
        }
        prop_assert_eq!((merged.base, merged.metadata.base), (None, None));
        let chain = run(open(&fs, whole)).unwrap();
        prop_assert_eq!((chain.length, chain.seal), (1, sealed.seal));
        prop_assert_eq!(chain.manifest.metadata.id, SnapshotId(99));
        prop_assert!(run(read(&fs, whole)).unwrap() == model(&steps));
        prop_assert!(verify_bytes(&run(read_verified(&fs, whole)).unwrap()).is_ok());
    }

    #[test]
    fn a_chain_with_a_damaged_link_is_refused(
        manifest in manifests(), steps in steps(), link in any::<Index>(), at in any::<Index>(),
        mask in 1..=255_u8,
    ) {
        let fs = MemoryFs::new();
        write(&fs, &manifest, &steps);
        let last = path(steps.len() - 1);
        let number = link.index(steps.len());
        let link = path(number);
        let mut bytes = fs.get(&link).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= mask;
        fs.put(&link, &bytes);
        let corrupt = |error| matches!(error, ContainerError::Corrupt(_));
        prop_assert!(corrupt(run(read(&fs, &last)).unwrap_err()));
        let whole = Path::new("/elsewhere/whole");
        prop_assert!(corrupt(run(merge(fs.shared(), &last, whole, 9, |_| ())).unwrap_err()));
        prop_assert!(fs.get(whole).is_none());
        // A base that is whole, and not the one that was built on.
        let Ok(()) = run(fs.remove(&link)) else { panic!("it was there") };
        prop_assert!(link == last || corrupt(run(open(&fs, &last)).unwrap_err()));
        let other = Step { total: steps[number].total + 1, runs: vec![(0, 1, 1)] };
        run(write_one(&fs, &manifest, number, &other, None)).unwrap();
        prop_assert!(link == last || corrupt(run(open(&fs, &last)).unwrap_err()));
    }

    #[test]
    fn a_merge_that_fails_leaves_nothing(
        manifest in manifests(), steps in steps(), call in any::<Index>(), crash in any::<bool>(),
    ) {
        let fs = MemoryFs::new();
        write(&fs, &manifest, &steps);
        let before = fs.paths();
        let (last, whole) = (path(steps.len() - 1), Path::new("/snapshots/whole"));
        let merged = || run(merge(fs.shared(), &last, whole, 9, |_| ()));
        fs.set_fault(Fault::None);
        merged().unwrap();
        run(fs.remove(whole)).unwrap();
        run(fs.sync_dir(Path::new("/snapshots"))).unwrap();
        let call = call.index(fs.state().calls.len());
        let full = io::ErrorKind::StorageFull;
        fs.set_fault(if crash { Fault::Crash(call) } else { Fault::Fail(call, full) });
        let outcome = merged();
        fs.set_fault(Fault::None);
        if crash {
            for changes in 0..=fs.pending() {
                for kept in [Kept::Durable, Kept::All, Kept::Half, Kept::Zeros] {
                    let after = fs.after_crash(changes, kept);
                    prop_assert!(run(read(&after, &last)).unwrap() == model(&steps));
                    let stands = after.get(whole).is_some();
                    prop_assert!(!stands || run(read(&after, whole)).unwrap() == model(&steps));
                }
            }
        } else if let Err(error) = outcome {
            let of_space = matches!(error, ContainerError::Io { out_of_space: true, .. });
            prop_assert!(of_space, "{:?}", error);
            // Only where the directory could not be made durable it stands there, and whole.
            if fs.get(whole).is_none() {
                prop_assert_eq!(fs.paths(), before);
            }
        }
        if fs.get(whole).is_some() && !crash {
            prop_assert!(run(read(&fs, whole)).unwrap() == model(&steps));
        }
    }
}

#[test]
fn a_long_run_is_read_in_steps() {
    let fs = MemoryFs::new();
    let (manifest, _) = plain();
    let steps = [Step { total: 3 << 20, runs: vec![(4096, (5 << 19) + 1, 7)] }];
    write(&fs, &manifest, &steps);
    assert!(run(read(&fs, &path(0))).unwrap() == model(&steps));
}

#[test]
fn a_container_with_a_base_does_not_travel_alone() {
    let fs = MemoryFs::new();
    let (manifest, _) = plain();
    let steps = vec![Step { total: 8, runs: vec![(0, 8, 1)] }; 2];
    write(&fs, &manifest, &steps);
    let refused = run(read_verified(&fs, &path(1))).unwrap_err();
    assert!(matches!(refused, ContainerError::Incompatible { field, .. } if field == "base"));
}

#[test]
fn a_chain_has_an_end() {
    let fs = MemoryFs::new();
    let (manifest, _) = plain();
    let steps = vec![Step { total: 8, runs: vec![(0, 8, 1)] }; MAX_CHAIN + 1];
    write(&fs, &manifest, &steps);
    assert!(run(read(&fs, &path(MAX_CHAIN - 1))).is_ok());
    let refused = run(open(&fs, &path(MAX_CHAIN))).unwrap_err();
    assert!(matches!(refused, ContainerError::Corrupt(_)));
}

#[test]
fn a_base_is_found_where_both_were_moved_to() {
    let fs = MemoryFs::new();
    let (manifest, _) = plain();
    let steps = vec![Step { total: 8, runs: vec![(0, 8, 1)] }; 2];
    write(&fs, &manifest, &steps);
    for number in 0..2 {
        fs.put(&Path::new("/moved").join(number.to_string()), &fs.get(&path(number)).unwrap());
        run(fs.remove(&path(number))).unwrap();
    }
    assert!(run(open(&fs, Path::new("/moved/1"))).is_ok());
    assert_eq!(BasePath::of(Path::new("a/b"), Path::new("c/d")), BasePath::At("a/b".into()));
}

fn plain() -> (Manifest, Sections) {
    verify_bytes(&assemble(FORMAT, b"abc", integrity::OLD_MANIFEST.as_bytes())).unwrap()
}

#[test]
fn images_are_used_as_they_must_be() {
    let fs = MemoryFs::new();
    let mistakes: [fn(&mut ContainerWriter) -> bool; 6] = [
        |writer| run(writer.write_at(0, Bytes::from_static(b"no image"))).is_err(),
        |writer| {
            run(writer.begin_image("ram", 8)).unwrap();
            run(writer.write(Bytes::from_static(b"where?"))).is_err()
        },
        |writer| {
            run(writer.begin_image("ram", 8)).unwrap();
            run(writer.write_at(4, Bytes::from_static(b"too long"))).is_err()
        },
        |writer| {
            run(writer.begin_image("ram", 8)).unwrap();
            run(writer.zeros_at(4, 2)).unwrap();
            run(writer.write_at(5, Bytes::from_static(b"!"))).is_err()
        },
        |writer| {
            run(writer.begin_image("ram", 8)).unwrap();
            run(writer.zeros_at(0, 0)).is_err()
        },
        |writer| {
            run(writer.begin_image("ram", 8)).unwrap();
            run(writer.begin("ram")).is_err()
        },
    ];
    for mistake in mistakes {
        let mut writer = run(ContainerWriter::create(fs.shared(), &path(0), 1)).unwrap();
        assert!(mistake(&mut writer));
    }
}

#[test]
fn every_image_has_a_map_of_its_own() {
    let fs = MemoryFs::new();
    let (Manifest { metadata, config, compatibility, .. }, _) = plain();
    let mut writer = run(ContainerWriter::create(fs.shared(), &path(0), 1)).unwrap();
    for (name, offset) in [("ram", 4), ("disk", 0)] {
        run(writer.begin_image(name, 8)).unwrap();
        run(writer.write_at(offset, Bytes::from_static(name.as_bytes()))).unwrap();
    }
    run(writer.finish(metadata, config, compatibility, None)).unwrap();
    let Chain { manifest, sections, .. } = run(open(&fs, &path(0))).unwrap();
    // Other readers of the format look for these names.
    let names: Vec<_> = manifest.sections.iter().map(|entry| &entry.name[..]).collect();
    assert_eq!(names, ["ram", "ram.map", "disk", "disk.map"]);
    for (name, content) in [("ram", b"\0\0\0\0ram\0"), ("disk", b"disk\0\0\0\0")] {
        assert_eq!(run(sections.image(name).unwrap().content(8)).unwrap(), &content[..]);
    }
}

#[test]
fn an_image_is_refused_without_its_own_map() {
    let fs = MemoryFs::new();
    let (manifest, _) = plain();
    write(&fs, &manifest, &[Step { total: 8, runs: vec![(0, 8, 1)] }]);
    let bytes = Bytes::from(fs.get(&path(0)).unwrap());
    let (manifest, _) = verify_bytes(&bytes).unwrap();
    let end = manifest.sections.last().map_or(0, |last| last.offset + last.length);
    let body = &bytes[HEADER_LEN..usize::try_from(end).unwrap()];
    let lies: [fn(&mut SectionEntry); 2] =
        [|map| map.name = "other.map".to_owned(), |map| map.image = true];
    for lie in lies {
        let mut manifest = manifest.clone();
        let map = manifest.sections.iter_mut().find(|entry| entry.name == "ram.map");
        lie(map.unwrap());
        let forged = assemble(FORMAT, body, &serde_json::to_vec(&manifest).unwrap());
        let wanted = ContainerError::Corrupt("image `ram` has no map".to_owned());
        assert_eq!(verify_bytes(&forged).unwrap_err(), wanted);
    }
}
