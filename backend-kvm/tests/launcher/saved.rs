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
const HEADER: usize = 24;

const PAGE: u64 = 4096;

/// What was told of some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Told {
    Content(Vec<u8>),
    Zeros(u64),
}

/// What was told, by its place.
pub(crate) type Content = BTreeMap<u64, Told>;

/// What a launcher's copy wrote: all but memory and disks; memory; each disk.
#[derive(Default)]
pub(crate) struct Captured {
    pub(crate) generation: Option<u64>,
    state: Vec<u8>,
    pub(crate) memory: Content,
    pub(crate) disks: BTreeMap<u32, Content>,
}

/// What a launcher is given to load.
pub(crate) struct Packed {
    state: Vec<u8>,
    pieces: Vec<u8>,
    memory: Vec<Vec<u8>>,
}

/// Asks for a capture; gives the pipe that it comes through, and the generation that begins.
pub(crate) fn try_capture(
    link: &mut Link,
    parts: &Parts,
    since: Option<u64>,
    track: bool,
) -> Result<(io::PipeReader, Option<u64>), Refusal> {
    let (ours, its) = io::pipe().unwrap();
    let own = |disk: &DiskSetUp| (!disk.read_only).then(|| in_memory(&[]));
    let disks: Vec<File> = parts.set_up.disks.iter().filter_map(own).collect();
    let mut fds = vec![its.as_fd()];
    fds.extend(disks.iter().map(AsFd::as_fd));
    link.ask_with(Request::Capture { since, track }, &fds).map(|answer| match answer {
        Answer::Captured { generation } => {
            assert_eq!(generation.is_some(), track);
            (ours, generation)
        }
        other => panic!("{other:?}"),
    })
}

/// Reads a capture to its end.
pub(crate) fn read(mut pipe: impl Read) -> Captured {
    let mut captured = Captured::default();
    loop {
        let mut header = [0; HEADER];
        pipe.read_exact(&mut header).expect("a whole capture");
        let [part, kind] =
            [0, 4].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        let [offset, len] =
            [8, 16].map(|at| u64::from_le_bytes(header[at..at + 8].try_into().unwrap()));
        let told = if kind == 0 {
            let mut content = vec![0; usize::try_from(len).unwrap()];
            pipe.read_exact(&mut content).expect("a whole capture");
            Told::Content(content)
        } else {
            Told::Zeros(len)
        };
        match (part, told) {
            (0, Told::Content(content)) => captured.state.extend(content),
            (1, told) => drop(captured.memory.insert(offset, told)),
            (u32::MAX, _) => break,
            (disk, told) => drop(captured.disks.entry(disk).or_default().insert(offset, told)),
        }
    }
    assert_eq!(pipe.read(&mut [0]).unwrap(), 0, "something after the end");
    captured
}

/// Captures all of a machine.
pub(crate) fn capture(link: &mut Link, parts: &Parts) -> Captured {
    read(try_capture(link, parts, None, false).unwrap().0)
}

/// Captures what changed since a generation, or all, and begins another one.
pub(crate) fn tracked(link: &mut Link, parts: &Parts, since: Option<u64>) -> Captured {
    let (pipe, generation) = try_capture(link, parts, since, true).unwrap();
    Captured { generation, ..read(pipe) }
}

/// Gives the pages that something was told of, each with what it holds and where that stands in the packed content.
fn pages(content: &Content) -> impl Iterator<Item = (u64, Option<(&[u8], u64)>)> {
    let mut packed = 0;
    content.iter().flat_map(move |(at, told)| {
        let (at, begin) = (*at, packed);
        let len = match told {
            Told::Content(bytes) => bytes.len() as u64,
            Told::Zeros(len) => *len,
        };
        packed += if matches!(told, Told::Content(_)) { len } else { 0 };
        (0..len).step_by(4096).map(move |from| match told {
            Told::Zeros(_) => (at + from, None),
            Told::Content(bytes) => {
                let bytes = &bytes[usize::try_from(from).unwrap()..];
                (at + from, Some((&bytes[..bytes.len().min(4096)], begin + from)))
            }
        })
    })
}

/// Gives what several captures, the oldest first, hold together, without zeros.
pub(crate) fn overlaid<'a>(
    layers: impl IntoIterator<Item = &'a Content>,
) -> BTreeMap<u64, &'a [u8]> {
    let mut all = BTreeMap::new();
    for (at, page) in layers.into_iter().flat_map(pages) {
        all.insert(at, page.map_or(&[][..], |(bytes, _)| bytes));
    }
    all.retain(|_, bytes| bytes.iter().any(|byte| *byte != 0));
    all
}

impl Packed {
    /// Packs what several captures, the oldest first, hold together.
    pub(crate) fn new(layers: &[&Captured]) -> Self {
        let mut all = BTreeMap::new();
        for (file, layer) in (0_u64..).zip(layers) {
            for (at, page) in pages(&layer.memory) {
                match page {
                    None => drop(all.remove(&at)),
                    Some((_, packed)) => drop(all.insert(at, [file, packed])),
                }
            }
        }
        let mut pieces: Vec<[u64; 4]> = Vec::new();
        for (at, [file, packed]) in all {
            match pieces.last_mut() {
                Some([address, len, last, place])
                    if *last == file && *address + *len == at && *place + *len == packed =>
                {
                    *len += PAGE;
                }
                _ => pieces.push([at, PAGE, file, packed]),
            }
        }
        let packed = |layer: &&Captured| {
            let content = layer.memory.values().filter_map(|told| match told {
                Told::Content(bytes) => Some(&bytes[..]),
                Told::Zeros(_) => None,
            });
            content.collect::<Vec<_>>().concat()
        };
        Self {
            state: layers.last().unwrap().state.clone(),
            pieces: pieces.into_iter().flatten().flat_map(u64::to_le_bytes).collect(),
            memory: layers.iter().map(packed).collect(),
        }
    }

    /// Lets a new launcher load it, without disks.
    pub(crate) fn load(&self, set_up: &MachineSetUp) -> Result<(Owner, Parts), Refusal> {
        self.load_with(set_up, Vec::new(), false)
    }

    /// Lets a new launcher load it.
    pub(crate) fn load_with(
        &self,
        set_up: &MachineSetUp,
        disks: Vec<File>,
        track: bool,
    ) -> Result<(Owner, Parts), Refusal> {
        let mut owner = Owner::start(&launcher());
        let parts = Parts {
            set_up: set_up.clone(),
            kernel: in_memory(&[]),
            initrd: Vec::new(),
            ring: ring(set_up.console_ring_bytes),
            disks,
        };
        let mut files: Vec<_> = [&self.state, &self.pieces].map(|bytes| in_memory(bytes)).into();
        files.extend(self.memory.iter().map(|bytes| in_memory(bytes)));
        let mut fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        fds.push(parts.ring.as_fd());
        fds.extend(parts.disks.iter().map(AsFd::as_fd));
        let set_up = Box::new(set_up.clone());
        let memory_files = u8::try_from(self.memory.len()).unwrap();
        owner.say(&ToLauncher::Load { set_up, memory_files, track }, &fds).unwrap();
        match owner.hear() {
            Some((FromLauncher::SetUpDone(made), _)) => made.map(|()| (owner, parts)),
            other => panic!("{other:?}"),
        }
    }
}

fn goes_on() {
    let (mut owner, parts, came) = counting();
    let packed = Packed::new(&[&capture(&mut owner, &parts)]);
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
    let (pipe, _) = try_capture(&mut owner, &parts, None, false).unwrap();
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
    counts_on(&parts, came, said);
    let packed = Packed::new(&[&read(pipe)]);
    let (mut loaded, shown) = packed.load(&parts.set_up).unwrap();
    assert_eq!(loaded.ask(Request::Resume), Ok(Answer::Done));
    counts_on(&shown, came, 0);
}

/// Memory that a guest has not touched since it was loaded stands in a file only.
fn saved_again() {
    let (mut owner, parts, came) = counting();
    let first = capture(&mut owner, &parts);
    let (mut loaded, _) = Packed::new(&[&first]).load(&parts.set_up).unwrap();
    let second = capture(&mut loaded, &parts);
    assert!(!first.memory.is_empty());
    assert!(first.memory == second.memory);
    let (mut loaded, shown) = Packed::new(&[&second]).load(&parts.set_up).unwrap();
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
    let (pipe, _) = try_capture(&mut owner, &parts, None, false).unwrap();
    parts.disks[1].write_all_at(&[8; 9000], 3 << 20).unwrap();
    let captured = read(pipe);
    // Only what is not zero of the one disk that has anything, in whole pages.
    let mut page = vec![7; 9000];
    page.resize(3 * 4096, 0);
    assert_eq!(
        captured.disks,
        BTreeMap::from([(0x100, BTreeMap::from([(3 << 20, Told::Content(page))]))])
    );
}

fn unread() {
    let (mut owner, parts, _) = counting();
    let (pipe, _) = try_capture(&mut owner, &parts, None, false).unwrap();
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
    let refused = |owner: &mut Owner| try_capture(owner, &parts, None, true).err();
    assert_eq!(refused(&mut owner), Some(Refusal::State(Status::Fresh)));
    owner.ask(Request::Boot).unwrap();
    assert_eq!(refused(&mut owner), Some(Refusal::State(Status::Running)));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let answer = owner.ask(Request::Capture { since: None, track: false });
    assert!(matches!(&answer, Err(Refusal::Config { field, .. }) if field == "descriptors"));
    assert_eq!(refused(&mut owner), None);
}

fn nonsense() {
    let (mut owner, parts, _) = counting();
    let good = Packed::new(&[&capture(&mut owner, &parts)]);
    let load = |change: &dyn Fn(&mut Packed)| {
        let Packed { state, pieces, memory } = &good;
        let (state, pieces, memory) = (state.clone(), pieces.clone(), memory.clone());
        let mut packed = Packed { state, pieces, memory };
        change(&mut packed);
        packed.load(&parts.set_up).err()
    };
    assert_eq!(load(&|_| ()), None);
    let version = load(&|packed| packed.state[0] ^= 1);
    assert!(
        matches!(&version, Some(Refusal::Incompatible { field, .. }) if field == "kvm.state.version"),
        "{version:?}"
    );
    fn put(packed: &mut Packed, field: usize, value: u64) {
        packed.pieces[8 * field..8 * field + 8].copy_from_slice(&value.to_le_bytes());
    }
    let memory = u64::from(parts.set_up.memory_mib) << 20;
    let changes: [&dyn Fn(&mut Packed); 13] = [
        &|packed| packed.state.truncate(100),
        &|packed| packed.state.clear(),
        &|packed| packed.state.push(0),
        &|packed| packed.pieces.truncate(31),
        &|packed| packed.memory[0].truncate(4096),
        &|packed| packed.memory.clear(),
        // The same piece twice.
        &|packed| packed.pieces = packed.pieces[..32].repeat(2),
        // Beyond memory, wholly or in part, and beyond all addresses.
        &|packed| put(packed, packed.pieces.len() / 8 - 4, memory),
        &|packed| put(packed, packed.pieces.len() / 8 - 3, memory),
        &|packed| put(packed, packed.pieces.len() / 8 - 3, 0_u64.wrapping_sub(PAGE)),
        // A page that is none, another file, and a place beyond it.
        &|packed| put(packed, 0, 1),
        &|packed| put(packed, 2, 1),
        &|packed| put(packed, 3, 0_u64.wrapping_sub(PAGE)),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let refused = load(change);
        assert!(matches!(refused, Some(Refusal::Corrupt(_))), "{number}: {refused:?}");
    }
    let mut other = parts.set_up.clone();
    other.vcpus = 2;
    assert!(matches!(good.load(&other), Err(Refusal::Config { field, .. }) if field == "vcpus"));
}
