//! Machines that are saved, and made again of what was saved.

use crate::{
    Test,
    copies::{counting, counts_on},
    launcher,
    machine::until,
    owner::{Link, Owner, Parts, in_memory, payload::Code, ring},
};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    os::{fd::AsFd, unix::fs::FileExt},
};
use vm_backend_kvm::control::{
    Answer, DiskSetUp, FromLauncher, MachineSetUp, Refusal, Request, Status, ToLauncher,
};

pub(crate) const TESTS: &[Test] = &[
    ("a_saved_machine_goes_on_from_where_it_stood", goes_on),
    ("the_source_of_a_capture_goes_on_meanwhile", source_goes_on),
    ("what_was_loaded_is_saved_again_whole", saved_again),
    ("disks_are_saved_as_they_are_at_that_moment", disks),
    ("a_capture_that_nobody_reads_ends", unread),
    ("captures_out_of_place_are_refused", refusals),
    ("what_makes_no_sense_is_refused", nonsense),
];

/// The bytes of a frame's header.
const HEADER: usize = 16;

/// Content by its place.
type Content = BTreeMap<u64, Vec<u8>>;

/// What a launcher's copy wrote: all but memory and disks; memory; each disk.
#[derive(Default)]
struct Captured {
    state: Vec<u8>,
    memory: Content,
    disks: BTreeMap<u32, Content>,
}

/// What a launcher is given to load.
struct Packed {
    state: Vec<u8>,
    runs: Vec<u8>,
    memory: Vec<u8>,
}

/// Asks for a capture; gives the pipe that it comes through.
fn try_capture(link: &mut Link, parts: &Parts) -> Result<io::PipeReader, Refusal> {
    let (ours, its) = io::pipe().unwrap();
    let own = |disk: &DiskSetUp| (!disk.read_only).then(|| in_memory(&[]));
    let disks: Vec<File> = parts.set_up.disks.iter().filter_map(own).collect();
    let mut fds = vec![its.as_fd()];
    fds.extend(disks.iter().map(AsFd::as_fd));
    link.ask_with(Request::Capture, &fds).map(|answer| {
        assert_eq!(answer, Answer::Done);
        ours
    })
}

/// Reads a capture to its end.
fn read(mut pipe: impl Read) -> Captured {
    let mut captured = Captured::default();
    loop {
        let mut header = [0; HEADER];
        pipe.read_exact(&mut header).expect("a whole capture");
        let [part, len] =
            [0, 4].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        let offset = u64::from_le_bytes(header[8..].try_into().unwrap());
        let mut content = vec![0; usize::try_from(len).unwrap()];
        pipe.read_exact(&mut content).expect("a whole capture");
        match part {
            0 => captured.state.extend(content),
            1 => drop(captured.memory.insert(offset, content)),
            u32::MAX => break,
            disk => drop(captured.disks.entry(disk).or_default().insert(offset, content)),
        }
    }
    assert_eq!(pipe.read(&mut [0]).unwrap(), 0, "something after the end");
    captured
}

fn capture(link: &mut Link, parts: &Parts) -> Captured {
    read(try_capture(link, parts).unwrap())
}

impl Captured {
    /// Packs memory, which is of so many bytes.
    fn pack(&self, total: u64) -> Packed {
        let mut runs = total.to_le_bytes().to_vec();
        let (mut memory, mut end) = (Vec::new(), None);
        for (at, content) in &self.memory {
            let len = content.len() as u64;
            if end == Some(*at) {
                let grown = runs.len() - 8;
                let before = u64::from_le_bytes(runs[grown..].try_into().unwrap());
                runs[grown..].copy_from_slice(&(before + len).to_le_bytes());
            } else {
                runs.extend(at.to_le_bytes());
                runs.extend(len.to_le_bytes());
            }
            memory.extend(content);
            end = Some(at + len);
        }
        Packed { state: self.state.clone(), runs, memory }
    }
}

impl Packed {
    /// Lets a new launcher load it.
    fn load(&self, set_up: &MachineSetUp) -> Result<(Owner, Parts), Refusal> {
        let mut owner = Owner::start(&launcher());
        let parts = Parts {
            set_up: set_up.clone(),
            kernel: in_memory(&[]),
            initrd: Vec::new(),
            ring: ring(set_up.console_ring_bytes),
            disks: Vec::new(),
        };
        let files = [&self.state, &self.runs, &self.memory].map(|bytes| in_memory(bytes));
        let mut fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        fds.push(parts.ring.as_fd());
        let set_up = Box::new(set_up.clone());
        owner.say(&ToLauncher::Load { set_up, memory_at: 0 }, &fds).unwrap();
        match owner.hear() {
            Some((FromLauncher::SetUpDone(made), _)) => made.map(|()| (owner, parts)),
            other => panic!("{other:?}"),
        }
    }
}

fn total(parts: &Parts) -> u64 {
    u64::from(parts.set_up.memory_mib) << 20
}

fn goes_on() {
    let (mut owner, parts, came) = counting();
    let packed = capture(&mut owner, &parts).pack(total(&parts));
    drop(owner);
    // Twice from the same.
    for _ in 0..2 {
        let (mut loaded, shown) = packed.load(&parts.set_up).unwrap();
        assert_eq!(loaded.ask(Request::Status), Ok(Answer::Status(Status::Paused)));
        assert_eq!(loaded.ask(Request::Boot), Err(Refusal::State(Status::Paused)));
        assert_eq!(loaded.ask(Request::Resume), Ok(Answer::Done));
        counts_on(&shown, came, 0);
    }
}

fn source_goes_on() {
    let (mut owner, parts, came) = counting();
    let said = parts.console().1.len();
    // The pipe is full long before the end, so that most is written when the source has changed.
    let pipe = try_capture(&mut owner, &parts).unwrap();
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
    counts_on(&parts, came, said);
    let packed = read(pipe).pack(total(&parts));
    let (mut loaded, shown) = packed.load(&parts.set_up).unwrap();
    assert_eq!(loaded.ask(Request::Resume), Ok(Answer::Done));
    counts_on(&shown, came, 0);
}

/// Memory that a guest has not touched since it was loaded stands in a file only.
fn saved_again() {
    let (mut owner, parts, came) = counting();
    let first = capture(&mut owner, &parts);
    let (mut loaded, _) = first.pack(total(&parts)).load(&parts.set_up).unwrap();
    let second = capture(&mut loaded, &parts);
    assert!(!first.memory.is_empty());
    assert!(first.memory == second.memory);
    let (mut loaded, shown) = second.pack(total(&parts)).load(&parts.set_up).unwrap();
    assert_eq!(loaded.ask(Request::Resume), Ok(Answer::Done));
    counts_on(&shown, came, 0);
}

fn disks() {
    let mut parts = Parts::new(&Code::default().spin().elf());
    for read_only in [true, false, false] {
        let serial = format!("disk{}", parts.disks.len());
        parts.set_up.disks.push(DiskSetUp { serial, read_only });
        let disk = in_memory(&[]);
        disk.set_len(8 << 20).unwrap();
        parts.disks.push(disk);
    }
    parts.disks[1].write_all_at(&[7; 9000], 3 << 20).unwrap();
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let pipe = try_capture(&mut owner, &parts).unwrap();
    parts.disks[1].write_all_at(&[8; 9000], 3 << 20).unwrap();
    let captured = read(pipe);
    // Only what is not zero of the one disk that has anything, in whole pages.
    let mut page = vec![7; 9000];
    page.resize(3 * 4096, 0);
    assert_eq!(captured.disks, BTreeMap::from([(0x100, BTreeMap::from([(3 << 20, page)]))]));
}

fn unread() {
    let (mut owner, parts, _) = counting();
    let pipe = try_capture(&mut owner, &parts).unwrap();
    let pid = owner.child.id();
    let children = || {
        let list = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        list.split_whitespace().count()
    };
    assert_eq!(children(), 1);
    drop(pipe);
    until("the copy to end", || (children() == 0).then_some(()));
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
}

fn refusals() {
    let parts = Parts::new(&Code::default().spin().elf());
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    let refused = |owner: &mut Owner| try_capture(owner, &parts).err();
    assert_eq!(refused(&mut owner), Some(Refusal::State(Status::Fresh)));
    owner.ask(Request::Boot).unwrap();
    assert_eq!(refused(&mut owner), Some(Refusal::State(Status::Running)));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let answer = owner.ask(Request::Capture);
    assert!(matches!(&answer, Err(Refusal::Config { field, .. }) if field == "descriptors"));
    assert_eq!(refused(&mut owner), None);
}

fn nonsense() {
    let (mut owner, parts, _) = counting();
    let good = capture(&mut owner, &parts).pack(total(&parts));
    let load = |change: &dyn Fn(&mut Packed)| {
        let Packed { state, runs, memory } = &good;
        let (state, runs, memory) = (state.clone(), runs.clone(), memory.clone());
        let mut packed = Packed { state, runs, memory };
        change(&mut packed);
        packed.load(&parts.set_up).err()
    };
    assert_eq!(load(&|_| ()), None);
    let version = load(&|packed| packed.state[0] ^= 1);
    assert!(
        matches!(&version, Some(Refusal::Incompatible { field, .. }) if field == "kvm.state.version"),
        "{version:?}"
    );
    let changes: [&dyn Fn(&mut Packed); 8] = [
        &|packed| packed.state.truncate(100),
        &|packed| packed.state.clear(),
        &|packed| packed.state.push(0),
        &|packed| packed.runs.clear(),
        &|packed| packed.runs.truncate(12),
        &|packed| packed.memory.truncate(4096),
        // More memory than the machine has.
        &|packed| packed.runs[2] ^= 0x10,
        // A page that is none.
        &|packed| packed.runs[8] ^= 1,
    ];
    for change in changes {
        let refused = load(change);
        assert!(matches!(refused, Some(Refusal::Corrupt(_))), "{refused:?}");
    }
    let mut other = parts.set_up.clone();
    other.vcpus = 2;
    assert!(matches!(good.load(&other), Err(Refusal::Config { field, .. }) if field == "vcpus"));
}
