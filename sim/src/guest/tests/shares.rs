//! Directories of the host, and limits.

use super::{boot, config, run, sh, spec};
use crate::guest::{
    OsConfig, ProgramRegistry, RootInHand, SetupError, ShareSetup, SharedDir, SimOs,
};
use std::sync::Arc;
use vm_core::shared_root::Entry;
use vm_guest_agent::os::{Errno, GuestOs, SpawnSpec};
use vm_guest_protocol::ResourceLimit;

fn with_share() -> SimOs {
    let shares = vec![ShareSetup { mount: "/mnt/it".to_owned() }];
    let config = OsConfig { shares, ..config() };
    SimOs::new(config, Arc::new(ProgramRegistry::new())).unwrap()
}

/// Runs a script with the directory in hand.
fn with<T>(
    os: &mut SimOs,
    dir: &mut SharedDir,
    read_only: bool,
    act: impl FnOnce(&mut SimOs) -> T,
) -> T {
    os.give_share(0, dir, read_only, 1 << 20);
    let done = act(os);
    os.take_share(0, dir);
    done
}

fn content(dir: &SharedDir, path: &str) -> Option<Vec<u8>> {
    let file = dir.open(path.as_ref()).ok()?;
    let length = usize::try_from(dir.len(file).unwrap()).unwrap();
    Some(dir.read(file, 0, length).unwrap().to_vec())
}

#[test]
fn the_tree_is_the_host_s_and_guests_have_it_in_turn() {
    let (mut one, mut other, mut dir) = (with_share(), with_share(), SharedDir::default());
    with(&mut one, &mut dir, false, |os| sh(os, "echo one > /mnt/it/file; mkdir /mnt/it/d"));
    assert_eq!(content(&dir, "file").unwrap(), b"one\n");
    let ran =
        with(&mut other, &mut dir, false, |os| sh(os, "cd /mnt/it; cat file; mv file d; ls .."));
    assert_eq!(ran.stdout, "one\nit\n");
    assert_eq!(content(&dir, "d/file").unwrap(), b"one\n");
    // Without it in hand there is nothing.
    assert_eq!(sh(&mut one, "ls /mnt/it").stdout, "");
    assert!(one.save().unwrap().len() < with_share().save().unwrap().len() + 64);
}

#[test]
fn a_read_only_one_is_not_changed() {
    let (mut os, mut dir) = (with_share(), SharedDir::default());
    let file = dir.create("kept".as_ref()).unwrap();
    dir.append(file, &"text".into(), 100).unwrap();
    for script in
        ["echo > kept", "rm kept", "mkdir d", "mv kept new", "ln -s kept new", "chmod 7 kept"]
    {
        let script = format!("cd /mnt/it && {script}");
        let ran = with(&mut os, &mut dir, true, |os| sh(os, &script));
        assert_ne!(ran.status, 0, "{script}");
    }
    assert_eq!(content(&dir, "kept").unwrap(), b"text");
    assert_eq!(dir.list("".as_ref()).unwrap(), ["kept"]);
    with(&mut os, &mut dir, false, |os| sh(os, "rm /mnt/it/kept"));
    assert_eq!(content(&dir, "kept"), None);
}

#[test]
fn room_is_the_host_s() {
    let (mut os, mut dir) = (with_share(), SharedDir::default());
    let script = "dd if=/dev/zero of=/mnt/it/large bs=1024 count=2000";
    let ran = with(&mut os, &mut dir, false, |os| sh(os, script));
    assert_ne!(ran.status, 0);
    let length = content(&dir, "large").unwrap().len();
    assert!((900 << 10..=1 << 20).contains(&length), "{length}");
}

#[test]
fn what_a_saved_guest_held_open_is_lost_to_it() {
    let (mut os, mut dir) = (with_share(), SharedDir::default());
    let fd = with(&mut os, &mut dir, false, |os| {
        let fd = os.create_new("/mnt/it/file", 0o644).unwrap();
        os.write_all(fd, b"text").unwrap();
        fd
    });
    let mut loaded = SimOs::load(&os.save().unwrap(), Arc::new(ProgramRegistry::new())).unwrap();
    // Another directory may have another file of that number.
    assert_eq!(with(&mut loaded, &mut dir, false, |os| os.write_all(fd, b"x")), Err(Errno::NOENT));
    let ran = with(&mut loaded, &mut dir, false, |os| sh(os, "cat /mnt/it/file"));
    assert_eq!(ran.stdout, "text");
    with(&mut os, &mut dir, false, |os| os.write_all(fd, b", more").unwrap());
    assert_eq!(content(&dir, "file").unwrap(), b"text, more");
}

#[test]
fn what_is_not_durable_is_lost_with_the_host() {
    let (mut os, mut dir) = (with_share(), SharedDir::default());
    with(&mut os, &mut dir, false, |os| {
        sh(os, "cd /mnt/it; echo kept > kept; sync; echo lost > lost; echo more >> kept");
    });
    dir.crash();
    assert_eq!(content(&dir, "kept").unwrap(), b"kept\n");
    assert_eq!(content(&dir, "lost"), None);
}

/// Boots a guest whose root is a directory of the host, with another directory in it.
fn on_root(dir: &mut SharedDir, read_only: bool) -> Result<SimOs, SetupError> {
    let shares = vec![ShareSetup { mount: "/srv/it".to_owned() }];
    let config = OsConfig { shares, ..config() };
    let root = RootInHand { dir, read_only, room: 1 << 20 };
    SimOs::on_shared_root(config, Arc::new(ProgramRegistry::new()), root)
}

#[test]
fn a_root_of_the_host_s_is_the_root_of_every_path() {
    let mut dir = SharedDir::guest_root(&ProgramRegistry::new());
    assert!(on_root(&mut dir, true).is_err(), "there is no /srv/it, and none can be made");
    let mut os = on_root(&mut dir, false).unwrap();
    let script = "echo own > /tmp/file; echo root > /file; cd /srv/it; pwd; cd ..; pwd; cd /tmp/..; \
                  pwd; cat file tmp/../file ../file; ls -d /../srv; rmdir /tmp /srv/it / 2>/dev/null; \
                  mv /tmp /other 2>/dev/null; ls /tmp";
    let ran = with(&mut os, &mut dir, false, |os| sh(os, script));
    assert_eq!(ran.stdout, "/srv/it\n/srv\n/\nroot\nroot\nroot\n/../srv\nfile\n", "{}", ran.stderr);
    assert_eq!(content(&dir, "file").unwrap(), b"root\n");
    assert_eq!(content(&dir, "tmp/file"), None);
    assert!(on_root(&mut dir, true).is_ok(), "the places are there by now");
}

#[test]
fn a_root_without_places_gets_them_where_it_can() {
    let mut dir = SharedDir::default();
    let lacking = on_root(&mut dir, true).unwrap_err();
    assert_eq!(lacking, SetupError::Root { place: "dev" });
    on_root(&mut dir, false).unwrap();
    assert!(
        ["dev", "proc", "run", "sys", "tmp", "srv/it"]
            .iter()
            .all(|it| dir.entry(it.as_ref()) == Entry::Directory)
    );
}

#[test]
fn a_loaded_guest_finds_what_was_mounted_in_its_root_by_path() {
    let mut dir = SharedDir::guest_root(&ProgramRegistry::new());
    let mut inside = SharedDir::default();
    let os = on_root(&mut dir, false).unwrap();
    let mut loaded = SimOs::load(&os.save().unwrap(), Arc::new(ProgramRegistry::new())).unwrap();
    // The same paths in another order have other numbers.
    let mut other = SharedDir::guest_root(&ProgramRegistry::new());
    other.make_dirs("first/second".as_ref()).unwrap();
    other.make_dirs("srv/it".as_ref()).unwrap();
    let mut both = |os: &mut SimOs, script: &str| {
        with(os, &mut other, false, |os| {
            os.give_share(1, &mut inside, false, 1 << 20);
            let ran = sh(os, script);
            os.take_share(1, &mut inside);
            ran
        })
    };
    let ran = both(&mut loaded, "echo text > /srv/it/file; ls -d /first/second; ls /first/second");
    assert_eq!(ran.stdout, "/first/second\n", "{}", ran.stderr);
    assert_eq!(content(&inside, "file").unwrap(), b"text\n");
    assert_eq!(content(&other, "srv/it/file"), None);
}

#[test]
fn limits_are_shown_set_and_inherited() {
    let mut os = boot();
    let limit = |resource, soft, hard| ResourceLimit { resource, soft, hard };
    let limits = vec![limit(7, 20, 30), limit(1, 4096, u64::MAX)];
    let script = "ulimit -n; ulimit -Hn; ulimit -f; ulimit -Hf; ulimit -n 25; sh -c 'ulimit -Sn'; \
                  ulimit -Hn; cat /proc/self/limits; ulimit -n 40";
    let limited = SpawnSpec { limits, ids: Some((5, 5)), ..spec(&["sh", "-c", script]) };
    let ran = run(&mut os, &limited).unwrap();
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines[..6], ["20", "30", "8", "unlimited", "25", "25"]);
    let row = lines.iter().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["25", "25", "files"]);
    assert!(ran.stderr.contains("error setting limit"), "{}", ran.stderr);
    assert_eq!(ran.status, 1);
}
