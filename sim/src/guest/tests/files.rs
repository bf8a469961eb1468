//! The file system, held against a small model, and what a crash leaves of disks.

use super::{boot, boot_with, run, sh, spec};
use crate::guest::{DiskImage, DiskSetup, SimOs};
use proptest::prelude::*;
use std::collections::BTreeMap;
use vm_guest_agent::os::{Errno, GuestOs, SpawnSpec, SysResult};
use vm_guest_protocol::EntryKind;

fn disk(image: DiskImage) -> DiskSetup {
    DiskSetup { mount: "/data".into(), capacity: 1 << 20, read_only: false, image }
}

fn write(os: &mut SimOs, path: &str, bytes: &[u8], sync: bool) -> SysResult<()> {
    let fd = os.create_new(path, 0o644)?;
    let written = os.write_all(fd, bytes);
    if sync {
        os.sync_file(fd)?;
    }
    os.close(fd);
    written
}

fn read(os: &mut SimOs, path: &str) -> SysResult<Vec<u8>> {
    let fd = os.open_read(path)?;
    let mut all = Vec::new();
    loop {
        let piece = os.read(fd, 1000)?;
        if piece.is_empty() {
            os.close(fd);
            return Ok(all);
        }
        all.extend_from_slice(&piece);
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Mkdir(usize),
    Remove(usize),
    Rmdir(usize),
    Rename(usize, usize),
}

const PATHS: [&str; 7] = ["/a", "/b", "/d", "/d/x", "/d/y", "/d/e", "/d/e/z"];

fn change() -> impl Strategy<Value = Change> {
    let path = 0..PATHS.len();
    prop_oneof![
        3 => (path.clone(), proptest::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(path, bytes)| Change::Write(path, bytes)),
        3 => path.clone().prop_map(Change::Mkdir),
        2 => path.clone().prop_map(Change::Remove),
        1 => path.clone().prop_map(Change::Rmdir),
        3 => (path.clone(), path).prop_map(|(from, to)| Change::Rename(from, to)),
    ]
}

/// Files with their content and directories without, by path.
type Model = BTreeMap<String, Option<Vec<u8>>>;

fn parent(model: &Model, path: &str) -> Result<(), Errno> {
    let mut ancestors = path.match_indices('/').skip(1).map(|(at, _)| &path[..at]);
    ancestors.try_for_each(|dir| match model.get(dir) {
        Some(None) => Ok(()),
        Some(Some(_)) => Err(Errno::NOTDIR),
        None => Err(Errno::NOENT),
    })
}

fn has_children(model: &Model, path: &str) -> bool {
    model.keys().any(|key| key.starts_with(&format!("{path}/")))
}

fn on_model(model: &mut Model, change: &Change) -> Result<(), Errno> {
    match change {
        Change::Write(path, bytes) => {
            parent(model, PATHS[*path])?;
            match model.get(PATHS[*path]) {
                Some(_) => Err(Errno::EXIST),
                None => {
                    model.insert(PATHS[*path].into(), Some(bytes.clone()));
                    Ok(())
                }
            }
        }
        Change::Mkdir(path) => {
            parent(model, PATHS[*path])?;
            match model.get(PATHS[*path]) {
                Some(_) => Err(Errno::EXIST),
                None => {
                    model.insert(PATHS[*path].into(), None);
                    Ok(())
                }
            }
        }
        Change::Remove(path) => {
            parent(model, PATHS[*path])?;
            match model.get(PATHS[*path]) {
                None => Err(Errno::NOENT),
                Some(None) => Err(Errno::ISDIR),
                Some(Some(_)) => {
                    model.remove(PATHS[*path]);
                    Ok(())
                }
            }
        }
        Change::Rmdir(path) => {
            parent(model, PATHS[*path])?;
            match model.get(PATHS[*path]) {
                None => Err(Errno::NOENT),
                Some(Some(_)) => Err(Errno::NOTDIR),
                Some(None) if has_children(model, PATHS[*path]) => Err(Errno::NOTEMPTY),
                Some(None) => {
                    model.remove(PATHS[*path]);
                    Ok(())
                }
            }
        }
        Change::Rename(from, to) => rename(model, PATHS[*from], PATHS[*to]),
    }
}

fn rename(model: &mut Model, from: &str, to: &str) -> Result<(), Errno> {
    parent(model, from)?;
    parent(model, to)?;
    let is_dir = model.get(from).ok_or(Errno::NOENT)?.is_none();
    if is_dir && to.starts_with(&format!("{from}/")) {
        return Err(Errno::INVAL);
    }
    if from.starts_with(&format!("{to}/")) {
        return Err(Errno::NOTEMPTY);
    }
    if from == to {
        return Ok(());
    }
    match (is_dir, model.get(to)) {
        (true, Some(Some(_))) => return Err(Errno::NOTDIR),
        (false, Some(None)) => return Err(Errno::ISDIR),
        (true, Some(None)) if has_children(model, to) => return Err(Errno::NOTEMPTY),
        _ => {}
    }
    let moved: Vec<_> = model
        .keys()
        .filter(|key| *key == from || key.starts_with(&format!("{from}/")))
        .cloned()
        .collect();
    for key in moved {
        let entry = model.remove(&key).unwrap();
        model.insert(format!("{to}{}", &key[from.len()..]), entry);
    }
    Ok(())
}

fn on_guest(os: &mut SimOs, change: &Change) -> SysResult<()> {
    let at = |path: &usize| format!("/data{}", PATHS[*path]);
    match change {
        Change::Write(path, bytes) => write(os, &at(path), bytes, false),
        Change::Mkdir(path) => os.mkdir(&at(path), 0o755),
        Change::Remove(path) => os.unlink(&at(path)),
        Change::Rmdir(path) => os.rmdir(&at(path)),
        Change::Rename(from, to) => os.rename(&at(from), &at(to)),
    }
}

fn listing(os: &mut SimOs, dir: &str, model: &mut Model) {
    for (name, kind) in os.read_dir(dir).unwrap() {
        let path = format!("{dir}/{name}");
        let key = path["/data".len()..].to_owned();
        if kind == EntryKind::Directory {
            model.insert(key, None);
            listing(os, &path, model);
        } else {
            model.insert(key, Some(read(os, &path).unwrap()));
        }
    }
}

fn content(os: &mut SimOs) -> Model {
    let mut model = Model::new();
    listing(os, "/data", &mut model);
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn changes_do_what_they_do_on_the_model(
        changes in proptest::collection::vec(change(), 0..40),
        synced in 0_usize..40,
        on_disk in any::<bool>(),
    ) {
        let mut os = boot_with(if on_disk { vec![disk(DiskImage::default())] } else { Vec::new() });
        if !on_disk {
            os.mkdir("/data", 0o755).unwrap();
        }
        let (mut model, mut durable) = (Model::new(), Model::new());
        for (index, change) in changes.iter().enumerate() {
            prop_assert_eq!(on_guest(&mut os, change), on_model(&mut model, change), "{:?}", change);
            if index == synced {
                os.sync_all();
                durable = model.clone();
            }
        }
        prop_assert_eq!(&content(&mut os), &model);
        let bytes = os.save().unwrap();
        let mut again = SimOs::load(&bytes, os.programs().clone()).unwrap();
        prop_assert!(again.save().unwrap() == bytes);
        prop_assert_eq!(&content(&mut again), &model);
        if on_disk {
            let mut rebooted = boot_with(vec![disk(os.disks().remove(0))]);
            prop_assert_eq!(content(&mut rebooted), durable);
        }
    }

    #[test]
    fn permissions_follow_owner_group_and_bits(
        mode in 0_u32..0o1000,
        (uid, gid) in (0_u32..3, 0_u32..3),
        owner in (0_u32..3, 0_u32..3),
    ) {
        let mut os = boot();
        write(&mut os, "/tmp/f", b"x", false).unwrap();
        sh(&mut os, &format!("chown {}:{} /tmp/f; chmod {mode:o} /tmp/f", owner.0, owner.1));
        let script = "for o in r w x; do test -$o /tmp/f; echo $?; done";
        let asked = run(&mut os, &SpawnSpec { ids: Some((uid, gid)), ..spec(&["sh", "-c", script]) });
        let bits = match () {
            () if uid == 0 => 6 | u32::from(mode & 0o111 != 0),
            () if uid == owner.0 => mode >> 6 & 7,
            () if gid == owner.1 => mode >> 3 & 7,
            () => mode & 7,
        };
        let expected: String =
            [4, 2, 1].iter().map(|bit| if bits & bit != 0 { "0\n" } else { "1\n" }).collect();
        prop_assert_eq!(asked.unwrap().stdout, expected);
    }
}

#[test]
fn a_crash_keeps_what_was_made_durable_and_in_order() {
    let mut os = boot_with(vec![disk(DiskImage::default())]);
    write(&mut os, "/data/kept", b"old", true).unwrap();
    os.sync_dir("/data").unwrap();
    write(&mut os, "/data/.new", b"new", true).unwrap();
    os.rename("/data/.new", "/data/kept").unwrap();
    let reboot = |os: &SimOs| boot_with(vec![disk(os.disks().remove(0))]);
    let mut crashed = reboot(&os);
    assert_eq!(read(&mut crashed, "/data/kept").unwrap(), b"old");
    assert_eq!(read(&mut crashed, "/data/.new").unwrap(), b"new");
    os.sync_dir("/data").unwrap();
    let mut crashed = reboot(&os);
    assert_eq!(read(&mut crashed, "/data/kept").unwrap(), b"new");
    assert_eq!(crashed.lstat("/data/.new"), Err(Errno::NOENT));
    // Without fsync a name may be durable before its content is.
    write(&mut os, "/data/hasty", b"lost", false).unwrap();
    os.sync_dir("/data").unwrap();
    assert_eq!(read(&mut reboot(&os), "/data/hasty").unwrap(), b"");
    let mut saved = SimOs::load(&os.save().unwrap(), os.programs().clone()).unwrap();
    assert_eq!(read(&mut saved, "/data/hasty").unwrap(), b"lost");
    assert_eq!(read(&mut reboot(&saved), "/data/hasty").unwrap(), b"");
}

#[test]
fn disks_are_full_read_only_and_apart() {
    let mut read_only = disk(DiskImage::default());
    (read_only.read_only, read_only.mount) = (true, "/mnt/ro".into());
    let mut os = boot_with(vec![read_only, disk(DiskImage::default())]);
    assert_eq!(write(&mut os, "/mnt/ro/x", b"x", false), Err(Errno::ROFS));
    write(&mut os, "/data/x", &vec![1; 1000 << 10], true).unwrap();
    assert_eq!(write(&mut os, "/data/y", &vec![2; 100 << 10], false), Err(Errno::NOSPC));
    assert_eq!(read(&mut os, "/data/x").unwrap().len(), 1000 << 10);
    os.unlink("/data/y").unwrap();
    os.unlink("/data/x").unwrap();
    write(&mut os, "/data/z", &vec![2; 100 << 10], false).unwrap();
    assert_eq!(os.rename("/data/z", "/tmp/z"), Err(Errno::XDEV));
    assert_eq!(
        sh(&mut os, "mv /data/z /tmp/z && ls /data && stat -c %s /tmp/z").stdout,
        "102400\n"
    );
    assert_eq!(os.rmdir("/data"), Err(Errno::BUSY));
    assert_eq!(os.disks().len(), 2);
    let full = sh(
        &mut os,
        "dd if=/dev/zero of=/tmp/big bs=1M; echo $?; rm /tmp/big; echo x > /tmp/s; cat /tmp/s",
    );
    assert!(full.stderr.contains("No space left on device"));
    assert_eq!(full.stdout, "1\nx\n");
}

#[test]
fn what_is_open_lives_on_without_a_name() {
    let mut os = boot_with(vec![disk(DiskImage::default())]);
    write(&mut os, "/data/f", b"content", true).unwrap();
    let fd = os.open_read("/data/f").unwrap();
    os.unlink("/data/f").unwrap();
    assert_eq!(&os.read(fd, 100).unwrap()[..], b"content");
    let mut fork = os.clone();
    os.close(fd);
    assert_eq!(os.read(fd, 1), Err(Errno::BADF));
    assert!(fork.read(fd, 1).unwrap().is_empty());
    let mut many = boot();
    assert_eq!(sh(&mut many, "cd /tmp; mkdir d; cd d; rmdir ../d; echo x > f; pwd").status, 0);
}

#[test]
fn a_large_file_is_held_and_read_whole() {
    let mut os = boot();
    let fd = os.create_new("/tmp/big", 0o600).unwrap();
    let chunk: Vec<u8> = (0..=250).cycle().take(64 << 10).collect();
    for _ in 0..1024 {
        os.write_all(fd, &chunk).unwrap();
    }
    os.close(fd);
    assert_eq!(os.stat("/tmp/big").unwrap().size, 64 << 20);
    let fd = os.open_read("/tmp/big").unwrap();
    for _ in 0..1024 {
        assert!(os.read(fd, 64 << 10).unwrap() == chunk);
    }
}
