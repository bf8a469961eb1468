//! Copies of machines.

use crate::{
    Test, launcher,
    machine::until,
    owner::{Link, Owner, PATIENCE, Parts, in_memory, payload::Code, ring},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
};
use vm_backend_kvm::control::{
    Answer, CONTROL_VERSION, DiskSetUp, FromLauncher, Refusal, Request, Status,
};

pub(crate) const TESTS: &[Test] = &[
    ("copies_go_on_from_where_the_original_stood", copies_go_on),
    ("copies_of_copies_are_made", copies_of_copies),
    ("a_copy_outlives_its_original", a_copy_outlives_its_original),
    ("a_copy_dies_with_its_owner", a_copy_dies_with_its_owner),
    ("copies_have_disks_of_their_own", copies_have_disks_of_their_own),
    ("copies_hold_nothing_of_the_original", copies_hold_nothing_else),
    ("copies_out_of_place_are_refused", refusals),
];

/// Where payloads count.
const COUNTER: u32 = 0x20_0000;

/// A copy of a machine.
pub(crate) struct Copy {
    pub(crate) link: Link,
    exact: OwnedFd,
    pid: u32,
    pub(crate) parts: Parts,
}

/// Asks for a copy, with whatever there is in `ring` already.
fn try_fork(link: &mut Link, parts: &Parts) -> Result<Copy, Refusal> {
    let (socket, its) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    let (its_lifeline, lifeline) = io::pipe().unwrap();
    let own = |disk: &DiskSetUp| (!disk.read_only).then(|| in_memory(&[]));
    let copy = Parts {
        set_up: parts.set_up.clone(),
        kernel: in_memory(&[]),
        initrd: Vec::new(),
        ring: ring(parts.set_up.console_ring_bytes),
        disks: parts.set_up.disks.iter().filter_map(own).collect(),
    };
    let messages = in_memory(&[]);
    let mut fds = vec![its.as_fd(), its_lifeline.as_fd(), messages.as_fd(), copy.ring.as_fd()];
    fds.extend(copy.disks.iter().map(AsFd::as_fd));
    let (answer, beside) = link.ask_for(Request::Fork { name: "copy".to_owned() }, &fds);
    let Answer::Forked { pid } = answer? else { panic!("not forked") };
    let [exact] = beside.try_into().expect("a process");
    drop((its, its_lifeline));
    let mut link = Link::new(socket, lifeline.into());
    assert_eq!(hear(&mut link), FromLauncher::Hello { version: CONTROL_VERSION });
    match hear(&mut link) {
        FromLauncher::SetUpDone(Ok(())) => Ok(Copy { link, exact, pid, parts: copy }),
        FromLauncher::SetUpDone(Err(refusal)) => Err(refusal),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn fork(link: &mut Link, parts: &Parts) -> Copy {
    try_fork(link, parts).unwrap()
}

fn hear(link: &mut Link) -> FromLauncher {
    link.hear().expect("a message").0
}

impl Copy {
    fn resume(&mut self) {
        assert_eq!(self.link.ask(Request::Resume), Ok(Answer::Done));
    }

    fn has_ended(&self) {
        let mut exit = [PollFd::new(&self.exact, PollFlags::IN)];
        let patience = Timespec::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut exit, Some(&patience)).unwrap(), 1, "the copy lives on");
    }
}

/// Starts a machine that counts, lets it come some way, and pauses it; gives how far it came.
pub(crate) fn counting() -> (Owner, Parts, u8) {
    let parts = Parts::new(&Code::default().count_for_ever(COUNTER, 2000).elf());
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    until("the guest to count", || (parts.console().0 > 3).then_some(()));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let came = *parts.console().1.last().unwrap();
    (owner, parts, came)
}

/// Waits until a console says something, and checks that it counts on from `before` without a gap.
pub(crate) fn counts_on(parts: &Parts, before: u8, said: usize) {
    let bytes = until("a count", || {
        let (count, bytes) = parts.console();
        (count > said as u64 + 3).then_some(bytes)
    });
    let mut expected = before;
    for &byte in &bytes[said..] {
        expected = expected.wrapping_add(1);
        assert_eq!(byte, expected, "{bytes:?}");
    }
}

fn copies_go_on() {
    let (mut owner, parts, came) = counting();
    let said = parts.console().1.len();
    let mut copies: Vec<_> = (0..3).map(|_| fork(&mut owner, &parts)).collect();
    for copy in &mut copies {
        assert_eq!(copy.link.ask(Request::Status), Ok(Answer::Status(Status::Paused)));
        assert_eq!(copy.parts.console().0, 0);
        copy.resume();
        counts_on(&copy.parts, came, 0);
    }
    // Each has its own counter, and the original's has not moved.
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
    counts_on(&parts, came, said);
    // Later ones begin where the original is then.
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let came = *parts.console().1.last().unwrap();
    let mut later = fork(&mut owner, &parts);
    later.resume();
    counts_on(&later.parts, came, 0);
}

fn copies_of_copies() {
    let (mut owner, parts, came) = counting();
    let mut copy = fork(&mut owner, &parts);
    let mut grandchild = fork(&mut copy.link, &copy.parts);
    grandchild.resume();
    counts_on(&grandchild.parts, came, 0);
    copy.resume();
    counts_on(&copy.parts, came, 0);
}

fn a_copy_outlives_its_original() {
    let (mut owner, parts, came) = counting();
    let mut copy = fork(&mut owner, &parts);
    owner.child.kill().unwrap();
    owner.child.wait().unwrap();
    copy.resume();
    counts_on(&copy.parts, came, 0);
    assert_eq!(copy.link.ask(Request::Pause), Ok(Answer::Done));
}

fn a_copy_dies_with_its_owner() {
    let (mut owner, parts, _) = counting();
    for hang_up in [false, true] {
        let mut copy = fork(&mut owner, &parts);
        if hang_up {
            let (other, _) = io::pipe().unwrap();
            copy.link.socket = other.into();
        } else {
            copy.link.lifeline = None;
        }
        copy.has_ended();
    }
    // The kernel has reaped them: the original has no children left.
    let children = format!("/proc/{0}/task/{0}/children", owner.child.id());
    until("no child", || fs::read_to_string(&children).unwrap().is_empty().then_some(()));
    assert_eq!(owner.ask(Request::Resume), Ok(Answer::Done));
}

fn copies_have_disks_of_their_own() {
    let mut parts = Parts::new(&Code::default().count_for_ever(COUNTER, 2000).elf());
    for (serial, read_only) in [("own", false), ("shared", true)] {
        parts.set_up.disks.push(DiskSetUp { serial: serial.to_owned(), read_only });
        let mut content = vec![0; 1 << 20];
        content[70_000..70_004].copy_from_slice(b"data");
        parts.disks.push(in_memory(&content));
    }
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    owner.ask(Request::Boot).unwrap();
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let copy = fork(&mut owner, &parts);
    let [own] = &copy.parts.disks[..] else { panic!("one writable disk") };
    let read = |file: &File| {
        let mut found = vec![0; 1 << 20];
        file.read_exact_at(&mut found, 0).unwrap();
        found
    };
    assert!(read(own) == read(&parts.disks[0]));
    assert_eq!(own.metadata().unwrap().len(), 1 << 20);
}

/// A copy that kept a descriptor of the original would keep its machine, its sockets or its owner's alive.
fn copies_hold_nothing_else() {
    let (mut owner, parts, _) = counting();
    let first = fork(&mut owner, &parts);
    let second = fork(&mut owner, &parts);
    let open = |pid: u32| {
        let mut links: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|entry| fs::read_link(entry.unwrap().path()).unwrap().display().to_string())
            .map(|link| link.split(['[', ':']).next().unwrap_or_default().to_owned())
            .collect();
        links.sort();
        links
    };
    assert_eq!(open(first.pid), open(second.pid));
    let sockets = |pid: u32| open(pid).iter().filter(|link| *link == "socket").count();
    assert_eq!(sockets(first.pid), 1, "{:?}", open(first.pid));
    let maps = fs::read_to_string(format!("/proc/{}/maps", second.pid)).unwrap();
    assert_eq!(maps.lines().filter(|line| line.contains("kvm-vcpu")).count(), 1, "{maps}");
}

fn refusals() {
    let parts = Parts::new(&Code::default().spin().elf());
    let mut owner = Owner::start(&launcher());
    owner.set_up(&parts).unwrap();
    let refused = |owner: &mut Owner| try_fork(owner, &parts).err();
    assert_eq!(refused(&mut owner), Some(Refusal::State(Status::Fresh)));
    owner.ask(Request::Boot).unwrap();
    assert_eq!(refused(&mut owner), Some(Refusal::State(Status::Running)));
    assert_eq!(owner.ask(Request::Pause), Ok(Answer::Done));
    let answer = owner.ask(Request::Fork { name: String::new() });
    assert!(matches!(&answer, Err(Refusal::Config { field, .. }) if field == "descriptors"));
    assert_eq!(refused(&mut owner), None);
}
